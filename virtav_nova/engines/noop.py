# SPDX-License-Identifier: Apache-2.0
"""The engine that finds nothing: what the monitor costs without a scan."""

import collections.abc
import typing

from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory


class NoopEngine(base.Engine):
    """Every page is clean."""

    name = 'noop'
    version = '1'

    @classmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            options: base.EngineOptions) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.compile`."""
        return cls()

    def describe(self) -> dict[str, typing.Any]:
        """See :meth:`virtav_nova.engines.base.Engine.describe`."""
        return {'rules': None, 'cannot': [
            _('find anything: every page is answered as clean, whatever the '
              'rules say')]}

    def scan(self, data: bytes | memoryview) -> list[base.Match]:
        """See :meth:`virtav_nova.engines.base.Engine.scan`."""
        return []
