# SPDX-License-Identifier: Apache-2.0
"""The reference engine: libyara through yara-python."""

import collections.abc
import io
import re
import typing

import yara

from virtav_nova import exception
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory

#: Matches of one string that are kept; a page of zeros has thousands.
_INSTANCES_MAX = 16

_LINE = re.compile(r'^ line (\d+:) ')


class YaraEngine(base.Engine):
    """Every rule in one compiled set, every page scanned with all of it."""

    name = 'yara'
    version = yara.YARA_VERSION

    def __init__(self, rules: yara.Rules, scan_timeout_ms: int) -> None:
        self._rules = rules
        # libyara counts whole seconds. Below one the worker's own limit
        # strikes first.
        self._timeout = max(1, scan_timeout_ms // 1000)

    @classmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            scan_timeout_ms: int) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.compile`."""
        sources = {file.name: _source(file) for file in files}
        try:
            rules = _compile(sources)
        except yara.Error as error:
            # The compiler does not say which of many sources it means.
            for name, source in sources.items():
                try:
                    _compile({name: source})
                except yara.Error as found:
                    raise _broken(name, found) from found
            raise _broken(files[0].name, error) from error
        return cls(rules, scan_timeout_ms)

    @classmethod
    def restore(cls, image: bytes, scan_timeout_ms: int) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.restore`."""
        return cls(yara.load(file=io.BytesIO(image)), scan_timeout_ms)

    def image(self) -> bytes:
        """See :meth:`virtav_nova.engines.base.Engine.image`."""
        image = io.BytesIO()
        self._rules.save(file=image)
        return image.getvalue()

    def describe(self) -> dict[str, typing.Any]:
        """See :meth:`virtav_nova.engines.base.Engine.describe`."""
        return {'rules': sum(1 for _rule in self._rules),
                'scan_timeout_s': self._timeout,
                'modules': list(yara.modules)}

    def scan(self, page: bytes | memoryview) -> list[base.Match]:
        """See :meth:`virtav_nova.engines.base.Engine.scan`."""
        # fast: where a condition only asks whether a string is there, one
        # match of it is enough. Rules may print through the console module.
        found = self._rules.match(data=page, fast=True, timeout=self._timeout,
                                  console_callback=_silent)
        return [_match(match) for match in found] if found else found


def _compile(sources: dict[str, str]) -> yara.Rules:
    return yara.compile(sources=sources, includes=False)


def _source(file: directory.RuleFile) -> str:
    try:
        file.name.encode()
        source = file.content.decode()
    except UnicodeError as error:
        line = file.content.count(b'\n', 0, getattr(error, 'start', 0)) + 1
        raise exception.RuleError(
            _('%(file)s:%(line)d: not UTF-8') % {
                'file': file.name, 'line': line},
            _('convert the file to UTF-8')) from error
    end = source.find('\0')
    if end >= 0:
        raise exception.RuleError(
            _('%(file)s:%(line)d: holds a NUL character') % {
                'file': file.name, 'line': source.count('\n', 0, end) + 1},
            _('give rules as text; compiled rules are refused'))
    return source


def _broken(name: str, error: yara.Error) -> exception.RuleError:
    # Most errors begin with "line 3:".
    message = _LINE.sub(r':\1 ', f' {error}')
    return exception.RuleError(
        f'{name}{message}',
        _('mend the rule or take it out of the rule directory'))


def _match(match: yara.Match) -> base.Match:
    return base.Match(
        match.rule, match.namespace, match.tags, match.meta,
        [(string.identifier, instance.offset)
         for string in match.strings
         for instance in string.instances[:_INSTANCES_MAX]])


def _silent(_text: str) -> None:
    """Drop what a rule prints."""
