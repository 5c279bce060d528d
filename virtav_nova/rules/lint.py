# SPDX-License-Identifier: Apache-2.0
"""What is to be said of a rule that is to look at single pages.

Nothing is scanned here: how often a rule matches harmless pages, and what it
costs, is measured when rules are imported.
"""

import collections.abc
import typing

import yara
import yaramod

from virtav_nova.i18n import _
from virtav_nova.rules import carrier
from virtav_nova.rules import page_form
from virtav_nova.rules import syntax

#: It can hold on a page as its author wrote it.
AS_WRITTEN = 'as-written'
#: It can once some terms are dropped.
DROPPED = 'dropped'
#: It cannot; its reason says whether pages together may do.
NEVER = 'never'
#: Only libyara understands it; it has to be evaluated for every page.
UNKNOWN = 'unknown'

#: libyara looks for atoms of so many bytes, and shorter ones are common.
_ATOM = 4
#: Fewer bytes are found by chance, or in harmless code.
_THIN = 8
#: What lies across the end of a page is looked for up to this length.
_JUNCTION = 512

_NOTHING = carrier.Demand()


class Warned(typing.NamedTuple):
    """Something that need not be a fault.

    :param kind: ``short``, ``unbounded``, ``thin``, ``long`` or
        ``libyara``; stable, for programs.
    :param text: for people.
    """

    kind: str
    text: str


class Finding(typing.NamedTuple):
    """What is to be said of a rule.

    :param verdict: one of those above.
    :param why: for ``NEVER`` and ``UNKNOWN``.
    :param dropped: terms that do not count on a page.
    :param strings: so many different ones have to be there at least.
    :param size: bytes of those.
    """

    rule: str
    line: int
    verdict: str
    why: str
    dropped: tuple[page_form.Dropped, ...]
    strings: int
    size: int
    warnings: tuple[Warned, ...]

    def plain(self) -> dict[str, typing.Any]:
        """:returns: the finding in what JSON has."""
        return {
            **self._asdict(),
            'dropped': [each._asdict() for each in self.dropped],
            'warnings': [each._asdict() for each in self.warnings]}


def examine(source: syntax.Source, rule: syntax.Rule) -> Finding:
    """Say whether and how a rule can hold on a page.

    :param source: the file that it stands in.
    """
    def found(verdict: str, why: str, asked: carrier.Demand = _NOTHING,
              warnings: collections.abc.Iterable[Warned] = ()) -> Finding:
        return Finding(rule.name, rule.line, verdict, why, form.dropped,
                       asked.strings, asked.size, tuple(warnings))

    form = page_form.PageForm('')
    if rule.unparsed:
        return found(UNKNOWN, rule.unparsed)
    form = page_form.rewrite(source, rule)
    if form.refused:
        return found(NEVER, form.refused)
    changed = syntax.parse(form.text, source.name)
    bare = changed.rules[0]
    asked = carrier.demand(changed, bare)
    if asked.why:
        return found(NEVER, asked.why, asked)
    warnings = [*_strings(bare), *_compiled(form.text)]
    if asked.size < _THIN and not asked.fixed:
        warnings.append(Warned('thin', _(
            'asks for no more than %d bytes of a page') % asked.size))
    if asked.size > carrier.PAGE:
        return found(NEVER, _(
            'its strings take %d bytes and do not fit into one page; pages '
            'together may match') % asked.size, asked, warnings)
    if not form.dropped:
        return found(AS_WRITTEN, '', asked, warnings)
    written = carrier.demand(source, rule)
    if written.why or written.fixed:
        return found(DROPPED, '', asked, warnings)
    return found(AS_WRITTEN, '', asked, warnings)


def _strings(rule: syntax.Rule) -> collections.abc.Iterator[Warned]:
    """Look at the strings of a rule one by one."""
    for string, definition in zip(
            rule.strings, rule.definitions, strict=True):
        name = definition.identifier
        literal, size, bounded = _measured(string)
        if literal < _ATOM:
            yield Warned('short', _(
                '%(name)s: no more than %(size)d bytes in a row are fixed, '
                'which is slow to look for') % {
                    'name': name, 'size': literal})
        if not bounded:
            yield Warned('unbounded', _(
                '%s: nothing bounds its length') % name)
        if size > _JUNCTION:
            yield Warned('long', _(
                '%(name)s: %(size)d bytes or more; across the end of a page '
                'no more than %(most)d bytes are looked at') % {
                    'name': name, 'size': size, 'most': _JUNCTION})


def _compiled(text: str) -> collections.abc.Iterator[Warned]:
    """Ask libyara."""
    try:
        rules = yara.compile(source=text, includes=False)
    except yara.Error as error:
        yield Warned('libyara', str(error))
        return
    for warning in rules.warnings:
        yield Warned('libyara', str(warning))


class _Measure(typing.NamedTuple):
    """How much of a string is known.

    :param literal: longest run of fixed bytes.
    :param size: bytes at least.
    """

    literal: int
    size: int
    bounded: bool


def _measured(string: yaramod.String) -> _Measure:
    modifiers = syntax.modifiers(string)
    wide = 2 if modifiers.wide and not modifiers.ascii else 1
    if isinstance(string, yaramod.HexString):
        try:
            return _hex(syntax.hex_units(string))
        except ValueError:
            return _Measure(0, 0, False)
    if isinstance(string, yaramod.Regexp):
        try:
            measure, _left, _right = _regexp(string.unit)
        except RecursionError:
            return _Measure(0, 0, False)
        return _Measure(measure.literal * wide, measure.size * wide,
                        measure.bounded)
    size = len(string.pure_text) * wide
    return _Measure(size, size, True)


def _hex(units: tuple[syntax.HexUnit, ...]) -> _Measure:
    literal = run = size = 0
    bounded = True
    for unit in units:
        match unit:
            case syntax.HexByte(_value, mask, inverted):
                run = run + 1 if mask == 0xff and not inverted else 0
                size += 1
            case syntax.HexJump(low, high):
                run = 0
                size += low
                bounded = bounded and high is not None
            case syntax.HexChoice(branches):
                run = 0
                inner = [_hex(branch) for branch in branches]
                # Which one it is is not known: all must have a run.
                literal = max(literal, min(
                    (each.literal for each in inner), default=0))
                size += min((each.size for each in inner), default=0)
                bounded = bounded and all(each.bounded for each in inner)
        literal = max(literal, run)
    return _Measure(literal, size, bounded)


def _regexp(unit: yaramod.RegexpUnit) -> tuple[_Measure, int, int]:
    """:returns: the measure, and fixed bytes at the beginning and end.

    All of it is fixed where those are as long as it is.
    """
    match unit:
        case yaramod.RegexpConcat():
            return _concatenated([_regexp(each) for each in unit.units])
        case yaramod.RegexpGroup():
            return _regexp(unit.unit)
        case yaramod.RegexpOr():
            left, right = _regexp(unit.left)[0], _regexp(unit.right)[0]
            return _Measure(min(left.literal, right.literal),
                            min(left.size, right.size),
                            left.bounded and right.bounded), 0, 0
        case yaramod.RegexpIteration():
            return _Measure(0, 0, False), 0, 0
        case yaramod.RegexpPositiveIteration():
            inner, begin, end = _regexp(unit.operand)
            return inner._replace(bounded=False), begin, end
        case yaramod.RegexpOptional():
            return _regexp(unit.operand)[0]._replace(literal=0, size=0), 0, 0
        case yaramod.RegexpRange():
            least, most = unit.range
            inner = _regexp(unit.operand)[0]
            times = least or 0
            fixed = inner.literal == inner.size
            literal = (inner.literal * times if fixed
                       else inner.literal if times else 0)
            begin = literal if fixed else 0
            return _Measure(
                literal, inner.size * times,
                inner.bounded and most is not None), begin, begin
        case yaramod.RegexpStartOfLine() | yaramod.RegexpEndOfLine() | (
                yaramod.RegexpWordBoundary()) | (
                yaramod.RegexpNonWordBoundary()):
            return _Measure(0, 0, True), 0, 0
        case yaramod.RegexpClass() | yaramod.RegexpAnyChar() | (
                yaramod.RegexpWordChar()) | yaramod.RegexpNonWordChar() | (
                yaramod.RegexpDigit()) | yaramod.RegexpNonDigit() | (
                yaramod.RegexpSpace()) | yaramod.RegexpNonSpace():
            return _Measure(0, 1, True), 0, 0
    size = len(carrier.literal(unit.text))
    return _Measure(size, size, True), size, size


def _concatenated(parts: list[tuple[_Measure, int, int]]
                  ) -> tuple[_Measure, int, int]:
    literal = size = begin = run = 0
    bounded = whole = True
    for measure, left, right in parts:
        fixed = left == measure.size == measure.literal
        literal = max(literal, measure.literal, run + left)
        run = run + right if fixed else right
        if whole:
            begin += left
            whole = fixed
        size += measure.size
        bounded = bounded and measure.bounded
    return _Measure(literal, size, bounded), begin, run
