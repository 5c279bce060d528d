# SPDX-License-Identifier: Apache-2.0
"""Fuzzing with atheris: what strangers send must not do harm.

``python -m tests.fuzz TARGET --seconds N`` runs one; the tests beside this
run each for 30 s, or for 10 minutes with ``VIRTAV_NIGHTLY=1``.
"""
