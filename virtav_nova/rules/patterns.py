# SPDX-License-Identifier: Apache-2.0
"""Expressions for Hyperscan that tell where a string of a rule may be.

Each matches wherever the string does, and elsewhere too: assertions and
``fullword`` are left out, and of long strings only a piece is taken. So what
is not found is not there, and what is found has yet to be looked at by
libyara.

Strings of all kinds become trees of sets of bytes first. A set is an integer
with a bit for each of the 256 bytes.
"""

import base64
import collections.abc
import functools
import itertools
import re
import typing

import yaramod

from virtav_nova.rules import syntax

#: Every byte.
ANY = (1 << 256) - 1
#: Positions of a piece that is taken out of a string.
PIECE_MAX = 12
#: Bits of information that a piece has to have. A page has 2**12 places, so
#: that in every 2**12th page of noise there is one such piece.
BITS_MIN = 24
#: Bytes in a row, at least, that Hyperscan finds fast.
LITERAL_MIN = 4
#: Choices for one string that are given at most.
OPTIONS_MAX = 3
#: Pieces of which any one may be there, for one choice.
UNION_MAX = 32
#: Characters of an expression for a string as a whole.
TEXT_MAX = 2000
#: Repetitions that are told apart; more are as good as any number.
_REPEAT_MAX = 64
_DEPTH_MAX = 60

#: Half bits of information of each byte in machine code, as measured on
#: :mod:`virtav_nova.rules.sample`; all others have 18.
_HALF_BITS = {
    0x00: 5, 0x48: 8, 0xff: 8, 0x0f: 9, 0x89: 9, 0x24: 10, 0x8b: 10,
    0x01: 11, 0x41: 11, 0x44: 12, 0x4c: 12, 0xe8: 12, 0x83: 12, 0x66: 12,
    0x8d: 12, 0x85: 12, 0xc0: 12, 0x84: 13, 0x49: 13, 0x08: 13, 0x1f: 13,
    0x31: 13, 0xe9: 13, 0x04: 14, 0x74: 14, 0x45: 14, 0x10: 14, 0x02: 14,
    0xfe: 14, 0xc1: 14, 0xc7: 14, 0x40: 15, 0x80: 15, 0x03: 15, 0xc3: 15,
    0x05: 15, 0x39: 15, 0xfd: 15, 0xef: 15, 0x18: 15, 0xcc: 12, 0x90: 12}


class Expression(typing.NamedTuple):
    """One expression, for Hyperscan with ``.`` for every byte.

    :param literal: bytes in a row and nothing else, which always compiles.
    :param differs: is looked for in what :func:`differences` gives.
    """

    text: str
    caseless: bool = False
    literal: bool = False
    differs: bool = False


#: Expressions of which at least one matches wherever the string does.
Option = tuple[Expression, ...]


class _Cat(typing.NamedTuple):
    parts: 'tuple[_Node, ...]'


class _Choice(typing.NamedTuple):
    branches: 'tuple[_Node, ...]'


class _Repeat(typing.NamedTuple):
    part: '_Node'
    low: int
    high: int | None


_Node = int | _Cat | _Choice | _Repeat
_EMPTY = _Cat(())

#: What stands at one place of a string that is laid out in a row; None
#: where the length is not fixed.
_Row = list['int | _Choice | None']


class UnknownError(Exception):
    """A string that is not understood here."""


def options(string: yaramod.String) -> list[Option]:
    """Find ways to notice a string.

    :param string: of a :class:`virtav_nova.rules.syntax.Rule`.
    :returns: the best first. None when the string has too little of its own
        to be noticed by, or is not understood.
    """
    try:
        forms = _forms(string)
        found = [_form_options(form) for form in forms]
        if _is_keyed(string):
            found = [[tuple(each._replace(differs=True) for each in option)
                      for option in options_] for options_ in found]
    except (UnknownError, ValueError, RecursionError):
        return []
    if not found or not all(found):
        return []
    # Each form is noticed on its own: the n-th choice of all together.
    chosen = []
    for index in range(max(len(each) for each in found)):
        union = tuple(dict.fromkeys(itertools.chain.from_iterable(
            each[min(index, len(each) - 1)] for each in found)))
        if len(union) <= UNION_MAX:
            chosen.append(union)
    return chosen


def differences(data: bytes | memoryview) -> bytes:
    """Exclusive or of each byte with the next one.

    It is the same whatever key of one byte a text was coded with.

    :returns: as many bytes; the last stays as it is.
    """
    number = int.from_bytes(data, 'little')
    return (number ^ number >> 8).to_bytes(len(data), 'little')


def at(offset: int, value: bytes) -> Expression:
    """Make the expression for bytes at a fixed offset.

    :param offset: from the beginning of what is scanned, in bytes.
    """
    gap = f'.{{{offset}}}' if offset else ''
    return Expression(
        '^' + gap + ''.join(_byte(each) for each in value))


def _forms(string: yaramod.String) -> list[_Node]:
    """:returns: trees of which one is there wherever the string is."""
    modifiers = syntax.modifiers(string)
    if isinstance(string, yaramod.PlainString):
        return _plain_forms(string.pure_text, modifiers, string.is_wide)
    if isinstance(string, yaramod.HexString):
        return [_hex(syntax.hex_units(string))]
    if not isinstance(string, yaramod.Regexp):
        raise UnknownError
    tree = _Regex(string.pure_text, modifiers.dotall).tree()
    if modifiers.nocase:
        tree = _mapped(tree, _closed)
    forms = []
    if modifiers.ascii:
        forms.append(tree)
    if modifiers.wide:
        forms.append(_mapped(tree, _wide))
    return forms


def _is_keyed(string: yaramod.String) -> bool:
    return (isinstance(string, yaramod.PlainString)
            and syntax.modifiers(string).xor is not None)


def _plain_forms(text: bytes, modifiers: syntax.Modifiers,
                 is_wide: bool) -> list[_Node]:
    coded = [(alphabet, wide) for alphabet, wide in (
        (modifiers.base64, False), (modifiers.base64wide, True)) if alphabet]
    if coded:
        # What is widened first and coded then is rare.
        if is_wide:
            raise UnknownError
        return [_text(_widened(piece) if wide else piece)
                for alphabet, wide in coded
                for piece in _base64_pieces(text, alphabet)]
    texts = []
    if modifiers.ascii:
        texts.append(text)
    if modifiers.wide:
        texts.append(_widened(text))
    if modifiers.xor:
        return [_text(differences(each)[:-1]) for each in texts]
    forms: list[_Node] = [_text(each) for each in texts]
    if modifiers.nocase:
        return [_mapped(each, _closed) for each in forms]
    return forms


def _base64_pieces(text: bytes, alphabet: bytes) -> list[bytes]:
    """Give what is the same whatever stands around the text.

    :returns: for each place where it can begin within three bytes.
    """
    table = bytes.maketrans(
        b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/',
        alphabet)
    pieces = []
    for before in range(3):
        # Six bits a character: those that have bits of other bytes go.
        first = -(-before * 8 // 6)
        last = (before + len(text)) * 8 // 6
        coded = base64.b64encode(bytes(before) + text + bytes(2))
        pieces.append(coded[first:last].translate(table))
    return pieces


def _widened(text: bytes) -> bytes:
    return b''.join(bytes((byte, 0)) for byte in text)


def _text(text: bytes) -> _Node:
    return _Cat(tuple(1 << byte for byte in text))


def _hex(units: collections.abc.Iterable[syntax.HexUnit]) -> _Node:
    parts: list[_Node] = []
    for unit in units:
        if isinstance(unit, syntax.HexByte):
            parts.append(_masked(unit.value, unit.mask, unit.inverted))
        elif isinstance(unit, syntax.HexJump):
            parts.append(_Repeat(ANY, unit.low, unit.high))
        else:
            parts.append(_Choice(tuple(map(_hex, unit.branches))))
    return _Cat(tuple(parts))


@functools.cache
def _masked(value: int, mask: int, inverted: bool) -> int:
    found = sum(1 << byte for byte in range(256)
                if byte & mask == value & mask)
    return found ^ ANY if inverted else found


def _mapped(node: _Node, change: collections.abc.Callable[[int], _Node]
            ) -> _Node:
    """Change all sets of a tree."""
    if isinstance(node, int):
        return change(node)
    if isinstance(node, _Cat):
        return _Cat(tuple(_mapped(part, change) for part in node.parts))
    if isinstance(node, _Choice):
        return _Choice(tuple(
            _mapped(branch, change) for branch in node.branches))
    return node._replace(part=_mapped(node.part, change))


_UPPER = sum(1 << byte for byte in b'ABCDEFGHIJKLMNOPQRSTUVWXYZ')
_LOWER = _UPPER << 32


def _closed(members: int) -> int:
    """:returns: a set with both cases of its letters."""
    return members | (members & _UPPER) << 32 | (members & _LOWER) >> 32


def _wide(members: int) -> _Node:
    return _Cat((members, 1))


def _members(members: int) -> list[int]:
    return [byte for byte in range(256) if members >> byte & 1]


class _Regex:
    """Reads a regular expression as libyara does.

    :param text: without slashes and modifiers.
    :param dotall: whether ``.`` is a newline too.
    """

    _CLASSES: typing.ClassVar[dict[int, int]] = {
        ord('d'): sum(1 << byte for byte in b'0123456789'),
        ord('s'): sum(1 << byte for byte in b' \t\n\v\f\r'),
        ord('w'): _UPPER | _LOWER | sum(
            1 << byte for byte in b'0123456789_')}
    _CLASSES.update([(letter - 32, members ^ ANY)
                     for letter, members in _CLASSES.items()])
    _ESCAPES: typing.ClassVar[dict[int, int]] = {
        ord('a'): 7, ord('f'): 12, ord('n'): 10, ord('r'): 13, ord('t'): 9}
    #: A brace that begins nothing of the kind is a brace.
    _RANGE: typing.ClassVar[re.Pattern[bytes]] = re.compile(
        rb'\{(?!\})(\d*)(,?)(\d*)\}')

    def __init__(self, text: bytes, dotall: bool) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._dot = ANY if dotall else ANY ^ 1 << 10

    def tree(self) -> _Node:
        """:raises UnknownError: when libyara would not take it."""
        tree = self._choice()
        if self._at < len(self._text):
            raise UnknownError
        return tree

    def _peek(self) -> int:
        return self._text[self._at] if self._at < len(self._text) else -1

    def _next(self) -> int:
        if self._at >= len(self._text):
            raise UnknownError
        self._at += 1
        return self._text[self._at - 1]

    def _choice(self) -> _Node:
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise UnknownError
        branches = [self._sequence()]
        while self._peek() == ord('|'):
            self._at += 1
            branches.append(self._sequence())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in (-1, ord('|'), ord(')')):
            parts.append(self._repeated(self._single()))
        return parts[0] if len(parts) == 1 else _Cat(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        high: int | None
        while True:
            sign = self._peek()
            high = None
            if sign == ord('*'):
                low = 0
            elif sign == ord('+'):
                low = 1
            elif sign == ord('?'):
                low = 0
                high = 1
            elif counts := self._RANGE.match(self._text, self._at):
                # Both may be missing, as PCRE would not have it.
                low = int(counts[1] or 0)
                high = low
                if counts[2]:
                    high = int(counts[3]) if counts[3] else None
                self._at = counts.end() - 1
            else:
                return part
            self._at += 1
            # How much is taken first is no matter.
            if self._peek() == ord('?'):
                self._at += 1
            part = _Repeat(part, low, high)

    def _single(self) -> _Node:
        byte = self._next()
        if byte == ord('('):
            if self._peek() == ord('?'):
                raise UnknownError
            group = self._choice()
            if self._next() != ord(')'):
                raise UnknownError
            return group
        if byte == ord('['):
            return self._class()
        if byte == ord('.'):
            return self._dot
        if byte in b'^$':
            return _EMPTY
        if byte in b'*+?' or self._RANGE.match(self._text, self._at - 1):
            raise UnknownError
        if byte == ord('\\'):
            escaped = self._peek()
            if escaped in b'bB':
                self._at += 1
                return _EMPTY
            if escaped in self._CLASSES:
                self._at += 1
                return self._CLASSES[escaped]
            if escaped in b'0123456789':
                raise UnknownError
            return 1 << self._escaped()
        return 1 << byte

    def _escaped(self) -> int:
        byte = self._next()
        if byte == ord('x'):
            digits = self._text[self._at:self._at + 2]
            self._at += 2
            if len(digits) < 2:
                raise UnknownError
            return int(digits, 16)
        return self._ESCAPES.get(byte, byte)

    def _class(self) -> int:
        negated = self._peek() == ord('^')
        if negated:
            self._at += 1
        members = 0
        first = True
        while True:
            byte = self._next()
            if byte == ord(']') and not first:
                break
            first = False
            if byte == ord('\\'):
                escaped = self._peek()
                if escaped in self._CLASSES:
                    members |= self._CLASSES[escaped]
                    if not self._ranges(1):
                        self._at += 1
                        continue
                    # To libyara this is a range that begins with the
                    # letter, to others a class and a dash: take both.
                    if negated:
                        raise UnknownError
                    members |= 1 << ord('-')
                byte = self._escaped()
            if self._ranges(0):
                self._at += 1
                last = self._next()
                if last == ord('\\'):
                    # What libyara makes of a class here is not known.
                    if self._peek() in self._CLASSES:
                        raise UnknownError
                    last = self._escaped()
                for each in range(byte, last + 1):
                    members |= 1 << each
            else:
                members |= 1 << byte
        return members ^ ANY if negated else members

    def _ranges(self, ahead: int) -> bool:
        """:returns: whether a dash follows that is not the last."""
        dash = self._text[self._at + ahead:self._at + ahead + 2]
        return len(dash) == 2 and dash[:1] == b'-' and dash[1:] != b']'


def _form_options(form: _Node) -> list[Option]:
    """:returns: ways to notice a tree, the best first."""
    rows = _rows(form)
    found: list[tuple[float, Option]] = []
    for row in rows:
        if isinstance(row, _Choice):
            found += _choice_options(row)
        else:
            found += _row_options(row)
    found.sort(key=lambda each: -each[0])
    chosen = list(dict.fromkeys(option for _score, option in found))
    if len(chosen) >= OPTIONS_MAX:
        return chosen[:OPTIONS_MAX]
    whole = _whole(form)
    if whole is not None and (whole,) not in chosen:
        chosen.append((whole,))
    return chosen


def _choice_options(choice: _Choice) -> list[tuple[float, Option]]:
    """:returns: score and the union of what each branch is noticed by."""
    union: list[Expression] = []
    lowest = float('inf')
    for branch in choice.branches:
        best: tuple[float, Option] | None = None
        for row in _rows(branch):
            found = (_choice_options(row) if isinstance(row, _Choice)
                     else _row_options(row))
            for each in found:
                if best is None or each[0] > best[0]:
                    best = each
        if best is None:
            return []
        lowest = min(lowest, best[0])
        union += best[1]
    if len(union) > UNION_MAX:
        return []
    # Each more is looked for at a price.
    return [(lowest - len(union), tuple(dict.fromkeys(union)))]


def _rows(form: _Node) -> 'list[list[int] | _Choice]':
    """Lay out what is sure to stand in a row.

    :returns: sets that follow one another, and choices between others.
    """
    laid: _Row = []
    _lay(form, laid, 0)
    rows: list[list[int] | _Choice] = []
    row: list[int] = []
    for place in [*laid, None]:
        if isinstance(place, int):
            row.append(place)
            continue
        if row:
            rows.append(row)
        row = []
        if isinstance(place, _Choice):
            rows.append(place)
    return rows


def _lay(node: _Node, laid: _Row, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise UnknownError
    if isinstance(node, int):
        laid.append(node)
    elif isinstance(node, _Cat):
        for part in node.parts:
            _lay(part, laid, depth + 1)
    elif isinstance(node, _Choice):
        union = 0
        for branch in node.branches:
            single: _Row = []
            _lay(branch, single, depth + 1)
            if len(single) != 1 or not isinstance(single[0], int):
                laid.append(node)
                return
            union |= single[0]
        laid.append(union)
    else:
        for _index in range(min(node.low, PIECE_MAX)):
            _lay(node.part, laid, depth + 1)
            # Long enough for any piece.
            if len(laid) > 1 << 16:
                raise UnknownError
        if node.high != node.low or node.low > PIECE_MAX:
            laid.append(None)


def _row_options(row: list[int]) -> list[tuple[float, Option]]:
    """Choose pieces of a row.

    :returns: score and choice; literals first, which do not overlap.
    """
    half = [_half_bits(members) for members in row]
    for index in range(1, len(row)):
        # The same byte again tells next to nothing: fill, padding.
        if row[index] == row[index - 1]:
            half[index] = half[index] // 4
    before = [0, *itertools.accumulate(half)]
    found: list[tuple[float, Option]] = []
    begin = 0
    for is_exact, run in itertools.groupby(row, _exact):
        end = begin + len(list(run))
        if is_exact and end - begin >= LITERAL_MIN:
            found += _pieces(row, before, begin, end)
        begin = end
    return found


def _pieces(row: list[int], before: list[int], begin: int, end: int
            ) -> collections.abc.Iterator[tuple[float, Option]]:
    """Choose pieces around a run of bytes.

    :param before: half bits before each place of the row.
    :param begin: of the run in the row.
    :param end: the place behind it.
    """
    for _index in range(OPTIONS_MAX):
        size = min(end - begin, PIECE_MAX)
        if size < LITERAL_MIN:
            return
        start = begin
        for place in range(begin + 1, end - size + 1):
            if (before[place + size] - before[place]
                    > before[start + size] - before[start]):
                start = place
        stop = start + size
        bits = (before[stop] - before[start]) / 2
        first, last = start, stop
        if bits < 2 * BITS_MIN:
            # Say more of what stands around it.
            first = max(0, start - PIECE_MAX // 2)
            last = min(len(row), stop + PIECE_MAX // 2)
            while row[first] == ANY:
                first += 1
            while row[last - 1] == ANY:
                last -= 1
            bits = (before[last] - before[first]) / 2
        if bits >= BITS_MIN:
            yield bits, (_expression(row[first:last]),)
        # The next in the longer rest.
        if start - begin > end - stop:
            end = start
        else:
            begin = stop


@functools.cache
def _half_bits(members: int) -> int:
    """:returns: half bits of information in being of this set."""
    if members == ANY:
        return 0
    count = members.bit_count()
    if not count:
        return 18
    if count > 32:
        # 256 / count is how much it says, times two for half bits.
        return 2 * (8 - (count - 1).bit_length())
    bytes_ = _members(members)
    best = min(_HALF_BITS.get(byte, 18) for byte in bytes_)
    return max(0, best - 2 * ((count - 1).bit_length() - (
        _closed(members) == members and count == 2)))


@functools.cache
def _exact(members: int) -> bool:
    """:returns: whether a set is one byte, or one letter of either case."""
    return members.bit_count() == 1 or (
        members.bit_count() == 2 and _closed(members & -members) == members)


def _expression(row: list[int]) -> Expression:
    literal = all(map(_exact, row))
    # Without regard to case it finds more, but faster than by sets.
    caseless = literal and any(
        members.bit_count() == 2 for members in row)
    if caseless:
        row = [members & -members for members in row]
    return Expression(''.join(map(_set_text, row)), caseless, literal)


def _whole(form: _Node) -> Expression | None:
    """:returns: an expression for all of a tree, if it tells enough."""
    if _bits(form) < BITS_MIN:
        return None
    text = _node_text(form)
    return Expression(text) if len(text) <= TEXT_MAX else None


def _bits(node: _Node) -> float:
    if isinstance(node, int):
        return _half_bits(node) / 2
    if isinstance(node, _Cat):
        return sum(map(_bits, node.parts))
    if isinstance(node, _Choice):
        return min(map(_bits, node.branches))
    return _bits(node.part) * node.low


def _node_text(node: _Node) -> str:
    if isinstance(node, int):
        return _set_text(node)
    if isinstance(node, _Cat):
        return ''.join(map(_node_text, node.parts))
    if isinstance(node, _Choice):
        return f'(?:{"|".join(map(_node_text, node.branches))})'
    low, high = node.low, node.high
    if low > _REPEAT_MAX:
        low, high = _REPEAT_MAX, None
    if high is not None and high > _REPEAT_MAX:
        high = None
    part = _node_text(node.part)
    if not part or high == 0:
        return ''
    return f'(?:{part}){{{low},{"" if high is None else high}}}'


@functools.cache
def _set_text(members: int) -> str:
    if members == ANY:
        return '.'
    if members.bit_count() == 1:
        return _byte(members.bit_length() - 1)
    negated = members.bit_count() > 128 or not members
    ranges = []
    for _key, group in itertools.groupby(
            enumerate(_members(members ^ ANY if negated else members)),
            key=lambda pair: pair[1] - pair[0]):
        bytes_ = [byte for _index, byte in group]
        ranges.append(_byte(bytes_[0]))
        if len(bytes_) > 1:
            ranges.append(f'-{_byte(bytes_[-1])}')
    return f'[{"^" if negated else ""}{"".join(ranges)}]'


def _byte(byte: int) -> str:
    return f'\\x{byte:02x}'
