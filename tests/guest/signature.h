/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The harmless string that the self-test rule looks for. It stands here once;
 * etc/virtav/rules/selftest.yar must name the same string.
 */
#define VIRTAV_SIGNATURE "VIRTAV-HARMLESS-SELFTEST-SIGNATURE-7f3c1d8a52e94b60"
