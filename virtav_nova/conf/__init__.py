# SPDX-License-Identifier: Apache-2.0
"""Configuration options, one module a group."""

from oslo_config import cfg

from virtav_nova.conf import rules
from virtav_nova.conf import worker


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the options of all groups.

    :param conf: the configuration to register them with.
    """
    rules.register_opts(conf)
    worker.register_opts(conf)
