# SPDX-License-Identifier: Apache-2.0
"""Rule files as the text that libyara compiles."""

import collections.abc
import re

import yara

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.rules import directory
from virtav_nova.rules import syntax

_LINE = re.compile(r'^ line (\d+:) ')


def texts(files: collections.abc.Iterable[directory.RuleFile],
          quarantine: frozenset[tuple[str, str]] = frozenset()
          ) -> dict[str, str]:
    """Decode rule files.

    :param files: sorted by name.
    :param quarantine: namespace and name of rules to leave out, together
        with those that refer to them.
    :returns: text by namespace, which is the name of the file.
    :raises RuleError: for what is no text, and when a rule cannot be left
        out.
    """
    sources = {file.name: _text(file) for file in files}
    for namespace, text in sources.items():
        names = {name for of, name in quarantine if of == namespace}
        if names:
            sources[namespace] = _without(namespace, text, names)
    return sources


def _without(namespace: str, text: str, names: set[str]) -> str:
    """Leave out rules, but keep the numbers of the lines."""
    source = syntax.parse(text, namespace)
    for rule in source.rules:
        if names.intersection((rule.name, *rule.references)):
            names.add(rule.name)
    for rule in source.rules:
        if rule.name in names:
            begin = text.index(rule.text, _offset(text, rule.line))
            end = begin + len(rule.text)
            text = ''.join((text[:begin], '\n' * rule.text.count('\n'),
                            text[end:]))
    for rule in syntax.parse(text, namespace).rules:
        if rule.name in names:
            raise exception.RuleError(
                _('%(file)s:%(line)d: rule %(rule)s cannot be left out') % {
                    'file': namespace, 'line': rule.line,
                    'rule': rule.name},
                _('take it out of the file: it took too long to evaluate'))
    return text


def _offset(text: str, line: int) -> int:
    """:returns: where a line begins."""
    offset = 0
    for _line in range(line - 1):
        offset = text.index('\n', offset) + 1
    return offset


def compiled(sources: collections.abc.Mapping[str, str]) -> yara.Rules:
    """Compile rules.

    :param sources: text by namespace.
    :raises RuleError: with a message that begins with the file's name, and
        the line where it is known.
    """
    try:
        return _compile(sources)
    except yara.Error as error:
        # The compiler does not say which of many sources it means.
        for name, source in sources.items():
            try:
                _compile({name: source})
            except yara.Error as found:
                raise _broken(name, found) from found
        raise _broken(next(iter(sources)), error) from error


def _compile(sources: collections.abc.Mapping[str, str]) -> yara.Rules:
    return yara.compile(sources=dict(sources), includes=False)


def _text(file: directory.RuleFile) -> str:
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
