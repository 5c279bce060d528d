# SPDX-License-Identifier: Apache-2.0
"""List of all options, for oslo-config-generator."""

from oslo_config import cfg

from virtav_nova.conf import rules
from virtav_nova.conf import worker


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """:returns: each group with its options."""
    return [rules.list_opts(), worker.list_opts()]
