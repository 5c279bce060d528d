# SPDX-License-Identifier: Apache-2.0
"""Pages that a rule must match: the proof that it can, and a target.

The condition is solved for the smallest set of strings that satisfies it;
each string is written in its shortest form. libyara has the last word: what
is given out was matched by the rule itself.

No byte of a signature is ever to be run. A carrier has one byte of its own,
a RET instruction, which is all that a test has to call.
"""

import base64
import collections.abc
import dataclasses
import re
import typing

import yara
import yaramod

from virtav_nova.i18n import _
from virtav_nova.rules import syntax

PAGE = 4096
RET = 0xc3
#: Where strings begin: in front of them is the place of a header.
_FIRST = 16
_GAP = 4
#: Bytes of a range in which there is room for several strings.
_WIDE = 256
#: Solutions of a term that are kept, and what is tried at most.
_SOLUTIONS = 8
_TRIALS = 24
#: Bytes between strings, which must be no part of words, and after them.
_FILLERS = ((0x00, 0xcc), (0x00, 0x00), (0x0a, 0x0a), (0x00, 0x90))
_ANY = 0x90
_BYTES = frozenset(range(256))
_WORD = frozenset(b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'
                  b'0123456789_')
_DIGIT = frozenset(b'0123456789')
_SPACE = frozenset(b' \t\n\r\v\f')
_CLASSES = {
    'w': _WORD, 'W': _BYTES - _WORD, 'd': _DIGIT, 'D': _BYTES - _DIGIT,
    's': _SPACE, 'S': _BYTES - _SPACE}
_CONTROLS = {'n': 10, 't': 9, 'r': 13, 'f': 12, 'a': 7, 'v': 11}
_ITEM = re.compile(rb'\\x([0-9a-fA-F]{2})|\\(.)|(.)', re.DOTALL)
_READ = re.compile(r'u?int(8|16|32)(be)?')


class Placed(typing.NamedTuple):
    """A string in a page.

    :param identifier: in its rule; with the rule's name in front where it
        is another one's.
    :param offset: bytes into the page.
    :param length: in bytes.
    """

    identifier: str
    offset: int
    length: int


class Carrier(typing.NamedTuple):
    """A page that a rule was seen to match.

    :param page: 4096 bytes; empty where none can be made.
    :param entry: offset of the RET.
    :param why: there is none.
    """

    page: bytes
    entry: int = 0
    strings: tuple[Placed, ...] = ()
    why: str = ''


class Split(typing.NamedTuple):
    """Pages that a rule matches together, but none of them alone.

    :param pages: each holds one or some of the strings, in the order in
        which they are to be put together.
    :param why: there are none.
    """

    pages: tuple[Carrier, ...] = ()
    why: str = ''


class Demand(typing.NamedTuple):
    """What a rule asks for at least.

    :param strings: how many different ones.
    :param size: bytes of them with gaps between; 0 where it asks for none.
    :param fixed: something must stand at a place of its own, such as a
        header.
    :param why: it cannot hold on a page at all.
    """

    strings: int = 0
    size: int = 0
    fixed: bool = False
    why: str = ''


def demand(source: syntax.Source, rule: syntax.Rule) -> Demand:
    """Say what a rule asks for at least, without any trial.

    :param source: the file that the rule stands in.
    """
    solver = _Solver(source)
    try:
        needs = _needs(solver, source, rule)
        demands = [
            Demand(len(need.counts), solver.cost(need),
                   bool(need.data or any(
                       solver.place(need, key) is not None
                       for key in need.counts)))
            for need in needs]
    except _NoneError as none:
        return Demand(why=str(none))
    except RecursionError:
        return Demand(why=_('condition nested too deep'))
    return min(demands, key=lambda each: (each.fixed, each.size))


def make(source: syntax.Source, rule: syntax.Rule) -> Carrier:
    """Make a page that a rule matches.

    :param source: the file that the rule stands in.
    """
    try:
        return _first(source, rule)
    except _NoneError as none:
        return Carrier(b'', why=str(none))
    except RecursionError:
        return Carrier(b'', why=_('condition nested too deep'))


def split(source: syntax.Source, rule: syntax.Rule) -> Split:
    """Spread the strings of a rule over pages, one each.

    :param source: the file that the rule stands in.
    """
    whole = make(source, rule)
    try:
        if whole.page:
            pages = [_alone(whole, each) for each in whole.strings]
        else:
            pages = _apart(source, rule)
        if len(pages) < 2:
            return Split(why=_('one string is all it takes'))
        rules = _compiled(source, rule)
    except _NoneError as none:
        return Split(why=str(none))
    except RecursionError:
        return Split(why=whole.why)
    if any(_matches(rules, each.page, rule) for each in pages):
        return Split(why=_('one page of it matches'))
    if not _matches(rules, b''.join(each.page for each in pages), rule):
        return Split(why=_('it does not match them together'))
    return Split(tuple(pages))


def straddle(carrier: Carrier, number: int = 0) -> tuple[bytes, bytes]:
    """Move a carrier so that one string lies across the end of a page.

    :param carrier: one without anything at a fixed place.
    :param number: of the string in the carrier.
    :returns: a page and the one that follows it. Half of the string is in
        each.
    """
    chosen = carrier.strings[number]
    start = PAGE - chosen.offset - (chosen.length + 1) // 2
    pages = bytearray(b'\xcc' * (2 * PAGE))
    pages[start:start + PAGE] = carrier.page
    pages[start + carrier.entry] = 0xcc
    return bytes(pages[:PAGE]), bytes(pages[PAGE:])


class _NoneError(Exception):
    """No page can be made, and why."""


#: A string: name of its rule, number in it.
_Key = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class _Need:
    """What must be in the page.

    :ivar counts: how often each string.
    :ivar places: offsets of strings that have a fixed one.
    :ivar data: bytes at fixed offsets.
    :ivar near: string, the string it is placed by, and how far from it.
    :ivar beside: string, distance from it, bytes.
    :ivar before: strings, and those they stand in front of.
    :ivar floor: offset from which on strings without a place stand.
    :ivar absent: strings that must not be there.
    """

    counts: dict[_Key, int] = dataclasses.field(default_factory=dict)
    places: dict[_Key, int] = dataclasses.field(default_factory=dict)
    data: dict[int, int] = dataclasses.field(default_factory=dict)
    near: tuple[tuple[_Key, _Key, int], ...] = ()
    beside: tuple[tuple[_Key, int, bytes], ...] = ()
    before: tuple[tuple[_Key, _Key], ...] = ()
    floor: int = 0
    absent: frozenset[_Key] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but counts."""
        return not (self.places or self.data or self.near or self.beside
                    or self.before or self.floor or self.absent)


class _Written(typing.NamedTuple):
    """A string as it is written into a page.

    :param start: it must be at the very start of what is scanned.
    :param end: it must be at the very end.
    """

    data: bytes
    start: bool = False
    end: bool = False


def _needs(solver: '_Solver', source: syntax.Source, rule: syntax.Rule
           ) -> list[_Need]:
    """Solve a rule and the global rules of its file.

    :returns: solutions, the cheapest first; at least one.
    :raises _NoneError: when there is none.
    """
    needs = [_Need()]
    for each in (rule, *source.needed(rule)):
        if each is rule or each.is_global:
            needs = solver.both(needs, solver.rule(each))
    if not needs:
        raise _NoneError(solver.why or _('its terms contradict each other'))
    return needs


def _first(source: syntax.Source, rule: syntax.Rule) -> Carrier:
    """Find a page that matches.

    :raises _NoneError: when there is none.
    """
    solver = _Solver(source)
    needs = _needs(solver, source, rule)
    rules = _compiled(source, rule)
    why = ''
    trials = 0
    for need in needs:
        for backwards in (False, True):
            for gap, rest in _FILLERS:
                try:
                    carrier = solver.page(need, gap, rest, backwards, rule)
                except _NoneError as none:
                    why = why or str(none)
                    break
                trials += 1
                if _matches(rules, carrier.page, rule):
                    return carrier
                if trials >= _TRIALS:
                    raise _NoneError(solver.blame(needs[0], trials, rule))
    raise _NoneError(why or solver.blame(needs[0], trials, rule))


def _alone(whole: Carrier, string: Placed) -> Carrier:
    """:returns: a page with one string of a carrier, where it was."""
    end = string.offset + string.length
    page = bytearray(min(end + _GAP, PAGE)).ljust(PAGE, b'\xcc')
    page[string.offset:end] = whole.page[string.offset:end]
    entry = PAGE - 1 if end < PAGE else 0
    page[entry] = RET
    return Carrier(bytes(page), entry, (string,))


def _apart(source: syntax.Source, rule: syntax.Rule) -> list[Carrier]:
    """:returns: a page for each string of a rule that needs several."""
    solver = _Solver(source)
    needs = [need for need in _needs(solver, source, rule)
             if not (need.places or need.data or need.near or need.beside)]
    if not needs:
        raise _NoneError(_('its strings have fixed places'))
    return [solver.page(_Need({key: count}), 0x00, 0xcc, False, rule)
            for key, count in needs[0].counts.items()]


def _compiled(source: syntax.Source, rule: syntax.Rule) -> yara.Rules:
    try:
        return yara.compile(
            source=source.standalone(rule), includes=False,
            externals=dict.fromkeys(rule.externals, ''))
    except yara.Error as error:
        raise _NoneError(str(error)) from error


def _matches(rules: yara.Rules, data: bytes, rule: syntax.Rule) -> bool:
    try:
        return any(match.rule == rule.name for match in rules.match(
            data=data, timeout=10, console_callback=_silent))
    except yara.Error:
        return False


def _silent(_text: str) -> None:
    """Drop what a rule prints."""


class _Solver:
    """Solves conditions and writes what they need."""

    def __init__(self, source: syntax.Source) -> None:
        self._source = source
        self._written: dict[_Key, _Written] = {}
        self._solved: dict[tuple[str, bool], list[_Need]] = {}
        #: What stood in the way, where nothing is found.
        self.why = ''

    def rule(self, rule: syntax.Rule, negated: bool = False
             ) -> list[_Need]:
        """:returns: solutions of a rule, or of its contrary."""
        key = rule.name, negated
        if key not in self._solved:
            if rule.condition is None:
                raise _NoneError(rule.unparsed)
            self._solved[key] = _Terms(self, rule).solve(
                rule.condition, {}, None, negated)
        return self._solved[key]

    def referred(self, name: str, negated: bool = False) -> list[_Need]:
        return self.rule(self._source.by_name[name], negated)

    def written(self, key: _Key) -> _Written:
        if key not in self._written:
            self._written[key] = _write(
                self._source.by_name[key[0]].strings[key[1]])
        return self._written[key]

    def cost(self, need: _Need) -> int:
        return sum(count * (len(self.written(key).data) + _GAP)
                   for key, count in need.counts.items())

    def cheapest(self, needs: collections.abc.Iterable[_Need]
                 ) -> list[_Need]:
        return sorted(needs, key=self.cost)[:_SOLUTIONS]

    def both(self, left: list[_Need], right: list[_Need]) -> list[_Need]:
        found = []
        for one in left:
            for other in right:
                merged = _merged(one, other)
                if merged is not None:
                    found.append(merged)
        if left and right and not found:
            self.why = self.why or _('its terms contradict each other')
        return self.cheapest(found)

    def page(self, need: _Need, gap: int, rest: int, backwards: bool,
             rule: syntax.Rule) -> Carrier:
        """Write a page.

        :param gap: byte between strings.
        :param rest: byte after them.
        :param backwards: the last string first.
        """
        free = bytearray(b'\1' * PAGE)
        page = bytearray((gap,) * PAGE)
        placed: list[tuple[_Key, int]] = []
        for offset, value in need.data.items():
            page[offset], free[offset] = value, 0
        keys = _order(need, backwards)
        tied = {near[0]: near for near in need.near}
        fixed = [key for key in keys if self.place(need, key) is not None]
        loose = [key for key in keys
                 if key not in fixed and key not in tied]
        where: dict[_Key, int] = {}
        position = max(_FIRST, need.floor,
                       *(each + 1 + _GAP for each in need.data))
        for key in [*fixed, *loose, *(key for key in keys
                                      if key not in fixed
                                      and key not in loose)]:
            data = self.written(key).data
            for copy in range(need.counts[key]):
                place = self.place(need, key)
                if copy or place is None:
                    near = tied.get(key)
                    if near and not copy and near[1] in where:
                        place = where[near[1]] + near[2]
                        if free[place:place + len(data)] != (
                                b'\1' * len(data)):
                            # Perhaps a little further does as well.
                            place = _room(free, max(place, 0), len(data))
                    else:
                        place = _room(free, position, len(data))
                _put(page, free, place, data)
                where.setdefault(key, place)
                placed.append((key, place))
        for key, distance, data in need.beside:
            place = where.get(key, 0) + distance
            if 0 <= place <= PAGE - len(data):
                page[place:place + len(data)] = data
                free[place:place + len(data)] = bytes(len(data))
        end = max((place + len(self.written(key).data)
                   for key, place in placed), default=_FIRST) + _GAP
        for offset in range(end, PAGE):
            if free[offset]:
                page[offset] = rest
        strings = [Placed(self._name(key, rule), place,
                          len(self.written(key).data))
                   for key, place in placed]
        strings.sort(key=lambda each: each.offset)
        entry = free.rfind(1)
        if entry < 0:
            raise _NoneError(_('the strings do not fit into a page'))
        page[entry] = RET
        return Carrier(bytes(page), entry, tuple(strings))

    def blame(self, need: _Need, trials: int, rule: syntax.Rule) -> str:
        """Say why no page matches that should."""
        for key in need.counts:
            owner = self._source.by_name[key[0]]
            text = owner.definitions[key[1]].text
            alone = yara.compile(
                source=f'rule R {{ strings: $a = {text} condition: $a }}',
                includes=False)
            data = self.written(key).data
            if not alone.match(data=data.center(len(data) + 2 * _GAP, b'\0'),
                               timeout=10):
                return _('libyara does not find %(name)s (%(size)d bytes) '
                         'inside a page') % {
                    'name': self._name(key, rule), 'size': len(data)}
        return _('%d pages were made, it matched none') % trials

    def place(self, need: _Need, key: _Key) -> int | None:
        written = self.written(key)
        if key in need.places:
            return need.places[key]
        if written.start:
            return 0
        if written.end:
            return PAGE - len(written.data)
        return None

    def _name(self, key: _Key, rule: syntax.Rule) -> str:
        owner = self._source.by_name[key[0]]
        name = owner.definitions[key[1]].identifier
        return name if owner is rule else f'{owner.name}.{name}'


#: Loop variables with the value they are tried with.
_Scope = dict[str, int]


class _Terms:
    """Solves the condition of one rule."""

    def __init__(self, solver: _Solver, rule: syntax.Rule) -> None:
        self._solver = solver
        self._rule = rule
        self._number = {string.identifier: number
                        for number, string in enumerate(rule.strings)}

    def solve(self, expression: yaramod.Expression, scope: _Scope,
              current: int | None, negated: bool = False) -> list[_Need]:
        """Find what makes an expression hold.

        :param current: number of the string that ``$`` means.
        :param negated: or rather not hold.
        :returns: solutions, the cheapest first.
        """
        while True:
            if isinstance(expression, yaramod.ParenthesesExpression):
                expression = expression.enclosed_expr
            elif isinstance(expression, yaramod.NotExpression):
                expression, negated = expression.operand, not negated
            else:
                break
        if isinstance(expression, (yaramod.AndExpression,
                                   yaramod.OrExpression)):
            every = isinstance(expression, yaramod.AndExpression) != negated
            parts = [self.solve(each, scope, current, negated)
                     for each in syntax.operands(expression)]
            if not every:
                return self._solver.cheapest(
                    need for part in parts for need in part)
            needs = [_Need()]
            for part in parts:
                needs = self._solver.both(needs, part)
            return needs
        try:
            found = self._term(expression, scope, current, negated)
            for need in found:
                self._solver.cost(need)
        except _NoneError as none:
            self._solver.why = self._solver.why or str(none)
            found = []
        if not found and not self._solver.why:
            self._solver.why = _('cannot be had on a page: %s') % (
                expression.text[:80])
        return found

    def _term(self, expression: yaramod.Expression, scope: _Scope,
              current: int | None, negated: bool) -> list[_Need]:
        match expression:
            case yaramod.BoolLiteralExpression():
                return [_Need()] if expression.value != negated else []
            case yaramod.StringExpression():
                key = self._key(expression.id, current)
                if negated:
                    return [_Need(absent=frozenset((key,)))]
                return [_Need({key: 1})]
            case yaramod.StringCountExpression():
                key = self._key(expression.id, current)
                return [_Need(absent=frozenset((key,))) if negated
                        else _Need({key: 1})]
            case yaramod.StringAtExpression():
                return self._at(expression, scope, current, negated)
            case yaramod.StringInRangeExpression():
                return self._within(expression, scope, current, negated)
            case yaramod.OfExpression():
                return self._of(expression, scope, negated)
            case yaramod.ForStringExpression():
                return self._for_strings(expression, scope, negated)
            case yaramod.ForArrayExpression():
                return self._for_array(expression, scope, current, negated)
            case yaramod.IdExpression() if expression.symbol:
                name = expression.symbol.name
                if name in self._rule.references:
                    return self._solver.referred(name, negated)
                return []
        if type(expression) in _COMPARE:
            sign = _COMPARE[type(expression)]
            return self._compare(
                _INVERSE[sign] if negated else sign, expression, scope,
                current)
        return []

    def _key(self, identifier: str, current: int | None) -> _Key:
        number = (current if len(identifier) == 1
                  else self._number.get('$' + identifier[1:]))
        if number is None:
            raise _NoneError(_('not understood'))
        return self._rule.name, number

    def _at(self, expression: yaramod.StringAtExpression, scope: _Scope,
            current: int | None, negated: bool) -> list[_Need]:
        key = self._key(expression.id, current)
        if negated:
            return [_Need()]
        place = self._place(expression.at_expr, scope, current)
        if place is None:
            return []
        other, offset = place
        if other is None:
            if not 0 <= offset <= PAGE - len(
                    self._solver.written(key).data):
                return []
            return [_Need({key: 1}, {key: offset})]
        return [_Need(_counts(key, other), near=((key, other, offset),))]

    def _within(self, expression: yaramod.StringInRangeExpression,
                scope: _Scope, current: int | None,
                negated: bool) -> list[_Need]:
        key = self._key(expression.id, current)
        if negated:
            return [_Need()]
        limits = expression.range_expr
        if not isinstance(limits, yaramod.RangeExpression):
            return []
        low = self._place(limits.low, scope, current)
        high = self._place(limits.high, scope, current)
        if low is None or high is None:
            return []
        other, offset = low
        if other is None:
            end = PAGE if high[0] else high[1]
            if end - offset >= _WIDE:
                # Others may have to be there, too.
                return [_Need({key: 1}, floor=offset)]
            if offset <= _FIRST <= end:
                offset = _FIRST
            if not 0 <= offset <= PAGE - len(
                    self._solver.written(key).data):
                return []
            return [_Need({key: 1}, {key: offset})]
        if other == key:
            return [_Need({key: 2})]
        # Behind the other string, unless that is too far.
        behind = len(self._solver.written(other).data) + _GAP
        if high[0] == other:
            behind = min(behind, high[1])
        return [_Need(_counts(key, other),
                      near=((key, other, max(offset, behind)),))]

    def _of(self, expression: yaramod.OfExpression, scope: _Scope,
            negated: bool) -> list[_Need]:
        numbers = syntax.members(self._rule, expression.iterable)
        if numbers is None:
            names = [each.symbol.name for each
                     in getattr(expression.iterable, 'elements', ())
                     if isinstance(each, yaramod.IdExpression)
                     and each.symbol]
            options = [self._solver.referred(name) for name in names
                       if name in self._rule.references]
        else:
            place = None
            if expression.range is not None and not isinstance(
                    expression.range, yaramod.RangeExpression):
                place = self._place(expression.range, scope, None)
                if place is None or place[0] is not None:
                    return []
            options = []
            for number in numbers:
                key = (self._rule.name, number)
                try:
                    self._solver.written(key)
                except _NoneError as none:
                    self._solver.why = self._solver.why or str(none)
                    options.append([])
                    continue
                options.append([_Need(
                    {key: 1}, {key: place[1]} if place else {})])
        return self._some(expression.variable, options, numbers, negated)

    def _for_strings(self, expression: yaramod.ForStringExpression,
                     scope: _Scope, negated: bool) -> list[_Need]:
        numbers = syntax.members(self._rule, expression.iterable)
        if numbers is None:
            return []
        options = [self.solve(expression.body, scope, number)
                   for number in numbers]
        return self._some(expression.variable, options, numbers, negated)

    def _some(self, quantifier: yaramod.Expression,
              options: list[list[_Need]], numbers: list[int] | None,
              negated: bool) -> list[_Need]:
        """Satisfy so many of a set.

        :param options: solutions for each of the set.
        :param numbers: the strings, where it is one of strings.
        """
        size = len(options)
        needed = syntax.quorum(quantifier, size)
        if needed is None:
            needed = self._number_of(quantifier)
        if needed is None:
            return []
        keys = frozenset((self._rule.name, number)
                         for number in numbers or ())
        if negated:
            if needed == 0:
                needed = 1
            else:
                # Most easily none of them.
                return [_Need(absent=keys)]
        elif needed == 0:
            return [_Need(absent=keys)]
        usable = sorted(
            (option for option in options if option),
            key=lambda option: self._solver.cost(option[0]))
        found = []
        for start in range(min(len(usable) - needed, 3) + 1):
            chosen = usable[start:start + needed]
            if all(option[0].is_plain for option in chosen):
                # At once: there may be thousands.
                found.append(_Need({key: count for option in chosen
                                    for key, count
                                    in option[0].counts.items()}))
                continue
            needs = [_Need()]
            for option in chosen:
                needs = self._solver.both(needs, option)
            found += needs
        return self._solver.cheapest(found)

    def _number_of(self, quantifier: yaramod.Expression) -> int | None:
        value = self._value(quantifier, {}, None)
        return value if isinstance(value, int) else None

    def _for_array(self, expression: yaramod.ForArrayExpression,
                   scope: _Scope, current: int | None,
                   negated: bool) -> list[_Need]:
        if negated:
            return [_Need()]
        iterable = expression.iterable
        values: list[int] = []
        if isinstance(iterable, yaramod.RangeExpression):
            low = self._value(iterable.low, scope, current)
            high = self._value(iterable.high, scope, current)
            if isinstance(low, int):
                values = [low]
                if isinstance(high, int):
                    values = list(range(low, min(high, low + 64) + 1))
        elif isinstance(iterable, yaramod.SetExpression):
            values = [value for value in (
                self._value(each, scope, current)
                for each in iterable.elements) if isinstance(value, int)]
        options = [self.solve(expression.body,
                              {**scope, expression.id: value}, current)
                   for value in values]
        if isinstance(expression.variable, yaramod.AllExpression) and (
                isinstance(iterable, yaramod.RangeExpression)
                and len(values) == 1):
            return options[0]
        return self._some(expression.variable, options, None, False)

    def _compare(self, sign: str, expression: typing.Any, scope: _Scope,
                 current: int | None) -> list[_Need]:
        left, right = expression.left_operand, expression.right_operand
        counts: list[_Key | None] = []
        for one, other, turned in ((left, right, sign),
                                   (right, left, _TURNED[sign])):
            while isinstance(one, yaramod.ParenthesesExpression):
                one = one.enclosed_expr
            value = self._value(other, scope, current)
            counts.append(None)
            if isinstance(one, yaramod.StringCountExpression) or (
                    isinstance(one, yaramod.StringInRangeExpression)
                    and one.id[0] == '#'):
                counted = self._key(one.id, current)
                if value is not None:
                    return self._counted(counted, turned, value)
                counts[-1] = counted
            elif isinstance(one, yaramod.IntFunctionExpression):
                if isinstance(value, int):
                    return self._read(one, turned, value, scope, current)
                return []
        more = {'>': counts[0], '<': counts[1]}.get(sign)
        if more is not None and None not in counts:
            return [_Need({more: 2})]
        # What is asked for its place or length has to be there.
        present: dict[_Key, int] = {}
        for each in _walk(expression):
            if isinstance(each, (yaramod.StringOffsetExpression,
                                 yaramod.StringLengthExpression,
                                 yaramod.StringCountExpression)):
                key = self._key(each.id, current)
                which = self._value(
                    getattr(each, 'index_expr', None), scope, current)
                present[key] = max(present.get(key, 1), which or 1)
            elif isinstance(each, (yaramod.StructAccessExpression,
                                   yaramod.FunctionCallExpression,
                                   yaramod.EntrypointExpression)):
                return []
        one_place = self._place(left, scope, current)
        other_place = self._place(right, scope, current)
        if one_place is not None and other_place is not None:
            return self._solver.both(
                [_Need(present)],
                self._ordered(one_place, sign, other_place))
        return [_Need(present)] if present else []

    def _counted(self, key: _Key, sign: str, value: int) -> list[_Need]:
        absent = _Need(absent=frozenset((key,)))
        if sign == '!=':
            return [_Need({key: 1}) if value == 0 else _Need()]
        if sign in ('<', '<='):
            least = value - (sign == '<')
            if least < 0:
                return []
            return [absent] if least == 0 else [_Need()]
        count = value + (sign == '>')
        if count <= 0:
            return [absent if sign == '==' else _Need()]
        if count > PAGE:
            return []
        return [_Need({key: count})]

    def _read(self, read: yaramod.IntFunctionExpression, sign: str,
              value: int, scope: _Scope,
              current: int | None) -> list[_Need]:
        kind = _READ.fullmatch(read.function)
        if kind is None:
            return []
        if sign == '!=':
            return [_Need()]
        if sign == '>':
            value += 1
        elif sign == '<':
            value -= 1
        size = int(kind[1]) // 8
        try:
            data = value.to_bytes(size, 'big' if kind[2] else 'little',
                                  signed=value < 0)
        except OverflowError:
            return []
        place = self._place(read.argument, scope, current)
        if place is not None:
            key, offset = place
            if key is not None:
                return [_Need({key: 1}, beside=((key, offset, data),))]
            if not 0 <= offset <= PAGE - size:
                return []
            return [_Need(data={offset + index: byte
                                for index, byte in enumerate(data)})]
        # A pointer to what is read, as in the header of a PE file.
        inner = read.argument
        base = 0
        if isinstance(inner, yaramod.PlusExpression):
            added = self._value(inner.right_operand, scope, current)
            if not isinstance(added, int):
                return []
            base, inner = added, inner.left_operand
        while isinstance(inner, yaramod.ParenthesesExpression):
            inner = inner.enclosed_expr
        if isinstance(inner, yaramod.IntFunctionExpression):
            target = 0x80
            pointers = self._read(inner, '==', target, scope, current)
            there = _Need(data={target + base + index: byte
                                for index, byte in enumerate(data)})
            return self._solver.both(pointers, [there])
        return []

    def _ordered(self, left: tuple[_Key | None, int], sign: str,
                 right: tuple[_Key | None, int]) -> list[_Need]:
        """Satisfy a comparison of two places."""
        one, other = left[0], right[0]
        if one is None and other is None:
            held = {'==': left[1] == right[1], '!=': left[1] != right[1],
                    '<': left[1] < right[1], '<=': left[1] <= right[1],
                    '>': left[1] > right[1], '>=': left[1] >= right[1]}
            return [_Need()] if held[sign] else []
        if one is None and other is not None:
            return self._ordered(right, _TURNED[sign], left)
        if one is None:
            return []
        if other is None:
            offset = right[1] - left[1]
            if sign == '==':
                if not 0 <= offset < PAGE:
                    return []
                return [_Need({one: 1}, {one: offset})]
            if sign in ('>', '>='):
                return [_Need({one: 1}, floor=offset + 1)]
            return [_Need({one: 1})]
        counts = _counts(one, other)
        if one == other:
            return [_Need({one: 2})]
        if sign == '==':
            return [_Need(counts, near=(
                (one, other, right[1] - left[1]),))]
        pair = (one, other) if sign in ('<', '<=') else (other, one)
        return [_Need(counts, before=(pair,))]

    def _place(self, expression: typing.Any, scope: _Scope,
               current: int | None) -> tuple[_Key | None, int] | None:
        """Read a place: so far from a string, or from the start."""
        match expression:
            case yaramod.ParenthesesExpression():
                return self._place(expression.enclosed_expr, scope, current)
            case yaramod.StringOffsetExpression():
                return self._key(expression.id, current), 0
            case yaramod.PlusExpression() | yaramod.MinusExpression():
                left = self._place(expression.left_operand, scope, current)
                right = self._place(
                    expression.right_operand, scope, current)
                if left is None or right is None:
                    return None
                if isinstance(expression, yaramod.PlusExpression):
                    if left[0] is not None and right[0] is not None:
                        return None
                    return left[0] or right[0], left[1] + right[1]
                if right[0] is not None:
                    return None
                return left[0], left[1] - right[1]
        value = self._value(expression, scope, current)
        return None if value is None else (None, value)

    def _value(self, expression: typing.Any, scope: _Scope,
               current: int | None) -> int | None:
        """Evaluate what does not depend on where strings are."""
        match expression:
            case yaramod.ParenthesesExpression():
                return self._value(expression.enclosed_expr, scope, current)
            case yaramod.IntLiteralExpression():
                return syntax.integer(expression)
            case yaramod.FilesizeExpression():
                return PAGE
            case yaramod.UnaryMinusExpression():
                value = self._value(expression.operand, scope, current)
                return None if value is None else -value
            case yaramod.StringLengthExpression():
                return len(self._solver.written(
                    self._key(expression.id, current)).data)
            case yaramod.IdExpression() if expression.symbol:
                return scope.get(expression.symbol.name)
        calculate = _ARITHMETIC.get(type(expression))
        if calculate is None:
            return None
        left = self._value(expression.left_operand, scope, current)
        right = self._value(expression.right_operand, scope, current)
        if left is None or right is None:
            return None
        try:
            return calculate(left, right)
        except (ZeroDivisionError, ValueError, OverflowError):
            return None


_COMPARE: dict[type, str] = {
    yaramod.EqExpression: '==', yaramod.NeqExpression: '!=',
    yaramod.LtExpression: '<', yaramod.LeExpression: '<=',
    yaramod.GtExpression: '>', yaramod.GeExpression: '>='}
_INVERSE = {'==': '!=', '!=': '==', '<': '>=', '<=': '>', '>': '<=',
            '>=': '<'}
_TURNED = {'==': '==', '!=': '!=', '<': '>', '<=': '>=', '>': '<',
           '>=': '<='}
_ARITHMETIC: dict[type, collections.abc.Callable[[int, int], int]] = {
    yaramod.PlusExpression: lambda left, right: left + right,
    yaramod.MinusExpression: lambda left, right: left - right,
    yaramod.MultiplyExpression: lambda left, right: left * right,
    yaramod.DivideExpression: lambda left, right: left // right,
    yaramod.ModuloExpression: lambda left, right: left % right}


def _counts(*keys: _Key) -> dict[_Key, int]:
    return dict.fromkeys(keys, 1)


def _walk(expression: yaramod.Expression
          ) -> collections.abc.Iterator[yaramod.Expression]:
    todo: list[typing.Any] = [expression]
    while todo:
        each = todo.pop()
        yield each
        for name in ('left_operand', 'right_operand', 'operand',
                     'enclosed_expr', 'argument', 'index_expr'):
            child = getattr(each, name, None)
            if child is not None:
                todo.append(child)


def _merged(one: _Need, other: _Need) -> _Need | None:
    """:returns: both together, None where they contradict each other."""
    places = dict(one.places)
    data = dict(one.data)
    for key, offset in other.places.items():
        if places.setdefault(key, offset) != offset:
            return None
    for offset, value in other.data.items():
        if data.setdefault(offset, value) != value:
            return None
    counts = dict(one.counts)
    for key, count in other.counts.items():
        counts[key] = max(count, counts.get(key, 0))
    absent = one.absent | other.absent
    if not absent.isdisjoint(counts):
        return None
    return _Need(
        counts, places, data, one.near + other.near,
        one.beside + other.beside, one.before + other.before,
        max(one.floor, other.floor), absent)


def _order(need: _Need, backwards: bool) -> list[_Key]:
    keys = list(need.counts)
    if backwards:
        keys.reverse()
    for _turn in keys:
        for first, second in need.before:
            one, other = keys.index(first), keys.index(second)
            if one > other:
                keys.insert(other, keys.pop(one))
    return keys


def _room(free: bytearray, position: int, size: int) -> int:
    """:returns: offset of free bytes with a gap on either side."""
    place = free.find(b'\1' * (size + 2 * _GAP), position - _GAP)
    if place < 0 or place + _GAP + size >= PAGE:
        raise _NoneError(_('the strings do not fit into a page'))
    return place + _GAP


def _put(page: bytearray, free: bytearray, place: int,
         data: bytes) -> None:
    if place < 0 or place + len(data) > PAGE:
        raise _NoneError(_('the strings do not fit into a page'))
    end = place + len(data)
    if any(not free[offset] and page[offset] != data[offset - place]
           for offset in range(place, end)):
        raise _NoneError(_('its strings would lie over each other'))
    page[place:end] = data
    free[place:end] = bytes(len(data))


def _write(string: yaramod.String) -> _Written:
    """Write a string in the shortest form that matches.

    :raises _NoneError: when it has none.
    """
    modifiers = syntax.modifiers(string)
    start = end = False
    if isinstance(string, yaramod.HexString):
        try:
            return _Written(_write_hex(syntax.hex_units(string)))
        except ValueError as error:
            raise _NoneError(str(error)) from error
    if isinstance(string, yaramod.Regexp):
        data = _write_regexp(string.unit)
        text = string.unit.text
        start = text.startswith('^')
        end = text.endswith('$') and not text.endswith('\\$')
    else:
        data = bytes(string.pure_text)
    if not modifiers.ascii:
        data = _widened(data)
    if modifiers.base64 is not None:
        data = _encoded(data, modifiers.base64)
    elif modifiers.base64wide is not None:
        data = _widened(_encoded(data, modifiers.base64wide))
    if modifiers.xor is not None:
        data = bytes(byte ^ modifiers.xor[0] for byte in data)
    return _Written(data, start, end)


def _widened(data: bytes) -> bytes:
    return b''.join(bytes((byte, 0)) for byte in data)


def _encoded(data: bytes, alphabet: bytes) -> bytes:
    coded = base64.b64encode(data).rstrip(b'=')
    return coded.translate(bytes.maketrans(syntax.BASE64, alphabet))


def _write_hex(units: tuple[syntax.HexUnit, ...]) -> bytes:
    data = bytearray()
    for unit in units:
        match unit:
            case syntax.HexByte(value, mask, inverted):
                byte = value & mask | _ANY & ~mask & 0xff
                # Another value where it must not be this one.
                data.append(byte ^ (mask & -mask) if inverted else byte)
            case syntax.HexJump(low):
                _check_length(low)
                data += bytes((_ANY,)) * low
            case syntax.HexChoice(branches):
                data += min((_write_hex(branch) for branch in branches),
                            key=len)
        _check_length(len(data))
    return bytes(data)


def _write_regexp(unit: yaramod.RegexpUnit) -> bytes:
    match unit:
        case yaramod.RegexpConcat():
            data = b''
            for each in unit.units:
                data += _write_regexp(each)
                _check_length(len(data))
            return data
        case yaramod.RegexpOr():
            return min((_write_regexp(unit.left),
                        _write_regexp(unit.right)), key=len)
        case yaramod.RegexpGroup():
            return _write_regexp(unit.unit)
        case yaramod.RegexpIteration() | yaramod.RegexpOptional():
            return b''
        case yaramod.RegexpPositiveIteration():
            return _write_regexp(unit.operand)
        case yaramod.RegexpRange():
            data = _write_regexp(unit.operand)
            _check_length(len(data) * (unit.range[0] or 0))
            return data * (unit.range[0] or 0)
        case yaramod.RegexpClass():
            return _chosen(_class(unit.characters), unit.is_negative)
        case yaramod.RegexpStartOfLine() | yaramod.RegexpEndOfLine() | (
                yaramod.RegexpWordBoundary()) | (
                yaramod.RegexpNonWordBoundary()):
            return b''
        case yaramod.RegexpAnyChar():
            return b'A'
    text = unit.text
    if len(text) == 2 and text[0] == '\\' and text[1] in _CLASSES:
        return _chosen(_CLASSES[text[1]], False)
    return literal(text)


def _check_length(size: int) -> None:
    if size > PAGE:
        raise _NoneError(_('a string is longer than a page'))


def literal(text: str) -> bytes:
    """Give the bytes that a literal part of an expression means."""
    return bytes(_literal(match) for match in _ITEM.finditer(text.encode()))


def _literal(match: re.Match[bytes]) -> int:
    if match[1]:
        return int(match[1], 16)
    if match[2]:
        return _CONTROLS.get(match[2].decode('latin-1'), match[2][0])
    return match[3][0]


def _class(characters: str) -> frozenset[int]:
    """:returns: the bytes that a character class names."""
    found: set[int] = set()
    items = list(_ITEM.finditer(characters.encode()))
    position = 0
    while position < len(items):
        match = items[position]
        name = match[2].decode('latin-1') if match[2] else ''
        if name in _CLASSES:
            found |= _CLASSES[name]
        elif position + 2 < len(items) and items[position + 1][3] == b'-':
            found.update(range(_literal(match),
                               _literal(items[position + 2]) + 1))
            position += 2
        else:
            found.add(_literal(match))
        position += 1
    return frozenset(found)


def _chosen(allowed: frozenset[int], negative: bool) -> bytes:
    if negative:
        allowed = _BYTES - allowed
    for byte in b'Aa0 ':
        if byte in allowed:
            return bytes((byte,))
    if not allowed:
        raise _NoneError(_('a character class allows nothing'))
    return bytes((min(allowed),))
