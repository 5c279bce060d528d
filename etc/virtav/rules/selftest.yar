// SPDX-License-Identifier: Apache-2.0
//
// Proves that pages are scanned. The signature is harmless: it is text that
// occurs nowhere but in the self-test and in the documentation.

rule VirtAV_SelfTest : selftest
{
    meta:
        author = "VirtAV contributors"
        description = "The harmless self-test signature of VirtAV"
        licence = "Apache-2.0"
        severity = "test"

    strings:
        $signature = "VIRTAV-HARMLESS-SELFTEST-SIGNATURE-7f3c1d8a52e94b60"

    condition:
        $signature
}
