# SPDX-License-Identifier: Apache-2.0
"""Tests of what tools/ shares; they need neither network nor root."""

import pathlib
import sys

# The tools are not part of the installed package.
sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / 'tools'))
