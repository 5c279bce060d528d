# SPDX-License-Identifier: Apache-2.0
"""Tests with real guests under the patched QEMU."""

import pathlib
import sys

# The tools are not part of the installed package.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))
