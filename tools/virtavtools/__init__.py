# SPDX-License-Identifier: Apache-2.0
"""What the scripts in tools/ share; standard library only."""

import pathlib

#: Top of the checkout that these tools belong to.
ROOT = pathlib.Path(__file__).resolve().parents[2]
