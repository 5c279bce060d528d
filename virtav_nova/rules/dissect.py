# SPDX-License-Identifier: Apache-2.0
"""Taking files of rules to pieces: parse, and make the page form.

Runs in the process apart, but for :func:`pieces`.
"""

import collections.abc
import hashlib
import re
import typing

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.rules import carrier
from virtav_nova.rules import lint
from virtav_nova.rules import page_form
from virtav_nova.rules import syntax

Unit: typing.TypeAlias = dict[str, typing.Any]
Results: typing.TypeAlias = collections.abc.Iterator[tuple[int, Unit]]

#: Where a rule begins, in a file that cannot be read as a whole.
_BEGIN = re.compile(
    r'^[ \t]*(?:(?:private|global)\s+)*rule\s+(?P<name>\w+)',
    re.MULTILINE | re.ASCII)
_INCLUDE = re.compile(
    r'^[ \t]*include[ \t]+("[^"\n]*")[ \t]*(?://.*)?$', re.MULTILINE)
_IMPORT = re.compile(r'^[ \t]*import[ \t]+"\w+"', re.MULTILINE | re.ASCII)
_META_MAX = 64
_VALUE_MAX = 2000


class Piece(typing.NamedTuple):
    """A part of a file that should be one rule.

    :param line: where it begins.
    """

    name: str
    line: int
    start: int
    end: int


def pieces(text: str) -> list[Piece]:
    """Find where rules seem to begin, and to end."""
    found: list[Piece] = []
    starts = list(_BEGIN.finditer(text))
    line = 1
    position = 0
    ends = [match.start() for match in starts[1:]] + [len(text)]
    for match, end in zip(starts, ends, strict=False):
        line += text.count('\n', position, match.start())
        position = match.start()
        found.append(Piece(match['name'], line, position, end))
    return found


class Dissect:
    """Parses files of rules, and makes the page form of each rule.

    A unit is a ``file`` (its name) with its ``text``. It has a result for
    each rule, with ``name``, ``line``, ``original``, ``metas``, ``tags``,
    ``text``, ``dropped``, ``refused`` and ``key``, perhaps ``warnings``; and
    one with an empty name for what is no rule.

    :param settings: with ``lint`` each rule is looked at more closely, which
        takes five times as long.
    """

    several = 1

    def __init__(self, settings: Unit, data: bytes) -> None:
        self._lint = bool(settings.get('lint'))
        # What is loaded when it is needed cannot be loaded any more.
        syntax.parse('rule a { condition: true }', 'a')

    def work(self, units: list[Unit]) -> Results:
        """See :mod:`virtav_nova.rules.apart`."""
        [unit] = units
        name, text = unit['file'], unit['text']
        source: syntax.Source | None
        try:
            source = syntax.parse(text, name)
        except exception.RuleError:
            results, source = _salvage(text, name)
            for result in results:
                yield unit['id'], result
        if source:
            for rule in source.rules:
                result = _result(source, rule)
                if self._lint and result['text']:
                    result['warnings'] = _warnings(source, rule)
                yield unit['id'], result


class Carry:
    """Makes a page for each rule, that the rule has to match.

    A unit is the ``text`` of a rule in its page form; its result has a
    ``page`` in hexadecimal, or says why there is none (``reason``).
    """

    several = 1

    def __init__(self, settings: Unit, data: bytes) -> None:
        syntax.parse('rule a { condition: true }', 'a')

    def work(self, units: list[Unit]) -> Results:
        """See :mod:`virtav_nova.rules.apart`."""
        [unit] = units
        try:
            source = syntax.parse(unit['text'], 'rule')
            made = carrier.make(source, source.rules[0])
        except exception.RuleError as error:
            yield unit['id'], {'reason': str(error)}
        else:
            yield unit['id'], ({'page': made.page.hex()} if made.page
                               else {'reason': made.why})


def _salvage(text: str, name: str
             ) -> tuple[list[Unit], syntax.Source | None]:
    """Read what can be read of a file that is broken somewhere.

    :returns: results for what cannot, and the rest.
    """
    results: list[Unit] = []

    def refuse(rule: str, line: int, original: str, reason: str) -> None:
        results.append({'name': rule, 'line': line, 'original': original,
                        'refused': reason})

    for match in _INCLUDE.finditer(text):
        line = text.count('\n', 0, match.start()) + 1
        refuse('', line, match[0].strip(), _(
            'include is refused: it would read files of this host'))
    text = _INCLUDE.sub('', text)
    found = pieces(text)
    head = text[:found[0].start] if found else text
    kept = [head]
    if _problem(head, name):
        kept = [''.join(f'{match[0]} ' for match in _IMPORT.finditer(head)),
                '\n' * head.count('\n')]
    names: set[str] = set()
    for piece in found:
        part = text[piece.start:piece.end]
        problem = (_('a second rule %s') % piece.name
                   if piece.name in names else _problem(part, name))
        names.add(piece.name)
        if problem:
            refuse(piece.name, piece.line, part, problem)
            part = '\n' * part.count('\n')
        kept.append(part)
    try:
        source = syntax.parse(''.join(kept), name)
    except exception.RuleError as error:
        refuse('', 0, '', str(error))
        return results, None
    if not results and not source.rules:
        refuse('', 0, '', _problem(text, name) or _('holds no rule'))
    return results, source


def _problem(text: str, name: str) -> str:
    try:
        syntax.parse(text, name)
    except exception.RuleError as error:
        # The line would be that in the piece.
        return re.sub(r'^.*?:\d+: ', '', str(error), count=1,
                      flags=re.DOTALL)
    return ''


def _result(source: syntax.Source, rule: syntax.Rule) -> Unit:
    try:
        form = page_form.rewrite(source, rule)
    except (RecursionError, ValueError, KeyError) as error:
        form = page_form.PageForm('', refused=_(
            'not understood: %s') % type(error).__name__)
    return {
        'name': rule.name, 'line': rule.line, 'original': rule.text,
        'metas': {
            key[:_VALUE_MAX]: value[:_VALUE_MAX]
            if isinstance(value, str) else value
            for key, value in list(rule.metas.items())[:_META_MAX]},
        'tags': rule.tags[:_META_MAX],
        'private': rule.is_private,
        'text': form.text,
        'dropped': [f'{each.text[:_VALUE_MAX]}: {each.why}'
                    for each in form.dropped[:_META_MAX]],
        'refused': form.refused,
        'key': _key(form.text) if form.text else ''}


def _warnings(source: syntax.Source, rule: syntax.Rule) -> list[str]:
    try:
        found = lint.examine(source, rule)
    except (RecursionError, ValueError, KeyError) as error:
        return [_('not understood: %s') % type(error).__name__]
    said = [f'{each.kind}: {each.text}' for each in found.warnings]
    if found.verdict == lint.NEVER:
        said.insert(0, _('never on one page: %s') % found.why)
    return said[:_META_MAX]


def _key(text: str) -> str:
    """:returns: equal for rules with the same strings and condition."""
    tokens = [match[0] for match in syntax.TOKEN.finditer(text)
              if match.lastgroup != 'blank']
    begin = min((tokens.index(word) for word in ('strings', 'condition')
                 if word in tokens), default=0)
    return hashlib.sha256(
        '\0'.join(tokens[begin:]).encode('utf-8', 'replace')).hexdigest()[:32]
