# SPDX-License-Identifier: Apache-2.0
"""The reference engine: libyara through yara-python."""

import collections.abc
import typing

import yara

from virtav_nova.engines import base
from virtav_nova.engines import sources
from virtav_nova.i18n import _
from virtav_nova.rules import directory

#: Matches of one string that are kept; a page of zeros has thousands.
_INSTANCES_MAX = 16


class YaraEngine(base.Engine):
    """Every rule in one compiled set, every page scanned with all of it."""

    name = 'yara'
    version = yara.YARA_VERSION

    def __init__(self, rules: yara.Rules, scan_timeout_ms: int) -> None:
        self._rules = rules
        self._timeout = seconds(scan_timeout_ms)

    @classmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            options: base.EngineOptions) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.compile`."""
        texts = sources.texts(files, options.quarantine)
        return cls(sources.compiled(texts), options.scan_timeout_ms)

    def describe(self) -> dict[str, typing.Any]:
        """See :meth:`virtav_nova.engines.base.Engine.describe`."""
        return {'rules': sum(1 for _rule in self._rules),
                'scan_timeout_s': self._timeout,
                'modules': list(yara.modules),
                'cannot': [
                    _('find rules whose strings lie on several pages'),
                    _('tell which rule took too long')]}

    def scan(self, data: bytes | memoryview) -> list[base.Match]:
        """See :meth:`virtav_nova.engines.base.Engine.scan`."""
        if self.progress is not None:
            self.progress(0)
        return matches(self._rules, data, self._timeout)


def seconds(scan_timeout_ms: int) -> int:
    """:returns: the limit of a scan as libyara counts it.

    Below a second the worker's own limit strikes first.
    """
    return max(1, scan_timeout_ms // 1000)


def matches(rules: yara.Rules, data: bytes | memoryview, timeout: int
            ) -> list[base.Match]:
    """Evaluate compiled rules.

    :param data: of any length.
    :param timeout: seconds.
    :returns: the matches in the order of the rules.
    :raises yara.Error: when it takes too long, or goes wrong.
    """
    # fast: where a condition only asks whether a string is there, one match
    # of it is enough. Rules may print through the console module.
    found = rules.match(data=data, fast=True, timeout=timeout,
                        console_callback=_silent)
    return [_match(match) for match in found] if found else []


def _match(match: yara.Match) -> base.Match:
    return base.Match(
        match.rule, match.namespace, match.tags, match.meta,
        [(string.identifier, instance.offset)
         for string in match.strings
         for instance in string.instances[:_INSTANCES_MAX]])


def _silent(_text: str) -> None:
    """Drop what a rule prints."""
