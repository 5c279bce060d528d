# SPDX-License-Identifier: Apache-2.0
"""Body signatures of ClamAV (.ndb and .ldb) as rules.

The formats are those of ClamAV's manual, "Creating signatures". A signature
says more than its bytes: the type of file, the place in it, how the file was
unpacked. A page of memory knows none of that, so it is left out, and said to
be. The rule then matches more than the signature; less only where one of
several ways to match is left out. A signature of which nothing would be left
is not taken.
"""

import collections.abc
import re
import typing

from virtav_nova import text
from virtav_nova.i18n import _

#: Characters of one line; the longest of the official databases has 60,000.
LINE_MAX = 1 << 20
#: Strings of one signature; the format has no more.
_SUBSIGNATURES_MAX = 64
_DEPTH_MAX = 32
_NAME_MAX = 96
#: Known bytes in a row, without which a string would be looked for on every
#: page in vain.
_RUN_MIN = 2

#: Types of files that may be executed from pages; the others are text that
#: ClamAV has put in a form of its own, or are not executed.
_TARGETS = {
    0: _('any file'), 1: 'PE', 2: 'OLE2', 3: 'HTML', 4: _('mail'),
    5: _('graphics'), 6: 'ELF', 7: _('text'), 8: _('unused'), 9: 'Mach-O',
    10: 'PDF', 11: 'Flash', 12: 'Java'}
_EXECUTED = (0, 1, 6, 9)

_BODY = re.compile(
    r'''(?P<byte>[0-9a-fA-F?]{2})
    |(?P<any>\*)
    |\{(?P<jump>[0-9]*-?[0-9]*)\}
    |\[(?P<near>[0-9]+-[0-9]+)\]
    |(?P<border>!?\([BLW]\))
    |(?P<open>!?\()
    |(?P<or>\|)
    |(?P<close>\))''', re.VERBOSE)
_LOGIC = re.compile(r'\s*(?:(?P<number>\d+)|(?P<sign>[()&|])'
                    r'|(?P<count>[=<>])(?P<value>\d+)(?:,(?P<kinds>\d+))?)')
_OFFSET = re.compile(r'(\*|\d+|EOF-\d+|EP[+-]\d+|S\d+[+-]\d+|SL[+-]\d+|SE\d+'
                     r'|VI|\$\d+\$)(?:,\d+)?:')


class Converted(typing.NamedTuple):
    """What became of one signature.

    :param name: as ClamAV has it, printable.
    :param line: in the file.
    :param rule: its text; empty when it was not taken.
    :param lost: what the rule does not say any more, or why there is none.
    """

    name: str
    line: int
    rule: str
    lost: tuple[str, ...]


class _Unfit(Exception):
    """A part of a signature cannot be said in a rule."""


class _Term(typing.NamedTuple):
    """A condition, or nothing that is certain.

    :param condition: empty when nothing is known.
    :param strings: those in it.
    """

    condition: str
    strings: tuple[str, ...] = ()


_NOTHING = _Term('')


def convert(lines: collections.abc.Iterable[str], kind: str,
            all_targets: bool = False, used: set[str] | None = None
            ) -> collections.abc.Iterator[Converted]:
    """Convert signatures.

    :param lines: of the file.
    :param kind: ``ndb`` or ``ldb``.
    :param all_targets: take those for files that are not executed, too.
    :param used: names of rules that are taken; grows.
    :returns: what became of each; the names of the rules differ.
    """
    used = set() if used is None else used
    for number, line in enumerate(lines, 1):
        line = line.rstrip('\r\n')
        if not line.strip() or line.startswith('#'):
            continue
        name = text.printable(re.split('[:;]', line[:1024], maxsplit=1)[0],
                              _NAME_MAX)
        lost: list[str] = []
        try:
            if len(line) > LINE_MAX:
                raise _Unfit(_('more than %d characters') % LINE_MAX)
            make = {'ndb': _ndb, 'ldb': _ldb}[kind]
            strings, condition = make(line, lost, all_targets)
            identifier = _identifier(name, used)
            rule = _rule(identifier, name, strings, condition, lost)
        except _Unfit as error:
            yield Converted(name, number, '', (str(error),))
        else:
            yield Converted(name, number, rule, tuple(lost))


def _ndb(line: str, lost: list[str], all_targets: bool
         ) -> tuple[dict[str, str], str]:
    """``name:target:offset:body[:level[:level]]``"""
    fields = line.split(':')
    if not 4 <= len(fields) <= 6:
        raise _Unfit(_('not a line of an .ndb file: %d fields')
                     % len(fields))
    _target(fields[1], lost, all_targets)
    if fields[2] != '*':
        lost.append(_('offset %s') % text.printable(fields[2], 40))
    return {'$a': _hex(fields[3], lost)}, '$a'


def _ldb(line: str, lost: list[str], all_targets: bool
         ) -> tuple[dict[str, str], str]:
    """``name;target description;expression;subsignature;...``"""
    fields = line.split(';')
    if not 4 <= len(fields) <= 3 + _SUBSIGNATURES_MAX:
        raise _Unfit(_('not a line of an .ldb file: %d fields')
                     % len(fields))
    target = '0'
    for part in fields[1].split(','):
        key, _colon, value = part.partition(':')
        if key == 'Target':
            target = value
        elif key not in ('Engine', ''):
            lost.append(text.printable(part, 60))
    _target(target, lost, all_targets)
    strings: dict[int, str | None] = {}
    for number, body in enumerate(fields[3:]):
        try:
            strings[number] = _subsignature(body, number, lost)
        except _Unfit as error:
            strings[number] = None
            lost.append(_('subsignature %(number)d: %(why)s') % {
                'number': number, 'why': error})
    term = _Expression(fields[2], strings, lost).parse()
    if not term.condition:
        raise _Unfit('; '.join(lost) or _('nothing of it is certain'))
    used = sorted(set(term.strings), key=lambda name: int(name[2:]))
    if not used:
        raise _Unfit(_('asks for no bytes'))
    return {name: str(strings[int(name[2:])]) for name in used}, \
        term.condition


def _target(value: str, lost: list[str], all_targets: bool) -> None:
    number = int(value) if re.fullmatch(r'\d{1,4}', value, re.ASCII) else -1
    name = _TARGETS.get(number, text.printable(value, 20))
    if number not in _EXECUTED and not all_targets:
        raise _Unfit(
            _('is for files of type %s, which are not executed') % name)
    if number:
        lost.append(_('type of file: %s') % name)


def _subsignature(body: str, number: int, lost: list[str]) -> str:
    """:returns: the definition of a string."""
    body, modifiers = _modifiers(body)
    if '#' in body:
        raise _Unfit(_('compares bytes or images'))
    if re.match(r'\$\{', body) or re.search(r'\$\d+\$', body):
        raise _Unfit(_('macro'))
    if '/' in body:
        raise _Unfit(_('regular expression (PCRE)'))
    match = _OFFSET.match(body)
    if match:
        body = body[match.end():]
        if match[1] != '*':
            lost.append(_('subsignature %(number)d: offset %(offset)s') % {
                'number': number, 'offset': match[0][:-1]})
    plain = _plain(body, modifiers)
    if plain:
        return plain
    if 'f' in modifiers:
        lost.append(_('subsignature %d: bounds of the word') % number)
    both = 'a' in modifiers and 'w' in modifiers
    if both:
        lost.append(_('subsignature %d: only its wide form is looked for')
                    % number)
    return _hex(body, lost, nocase='i' in modifiers, wide='w' in modifiers)


def _plain(body: str, modifiers: str) -> str:
    """Write bytes as a string of text, where a modifier needs one.

    :returns: nothing where none does, or the bytes are no text.
    """
    if not modifiers or not re.fullmatch(
            '(?:[2-6][0-9a-f]|7[0-9a-e]){2,}', body, re.IGNORECASE):
        return ''
    words = [word for letter, word in (
        ('i', 'nocase'), ('a', 'ascii'), ('w', 'wide'), ('f', 'fullword'))
        if letter in modifiers]
    value = bytes.fromhex(body).decode('ascii')
    return ' '.join([_quoted(value), *words])


def _modifiers(body: str) -> tuple[str, str]:
    match = re.search(r'::([aifw]+)$', body, re.ASCII)
    return (body[:match.start()], match[1]) if match else (body, '')


def _hex(body: str, lost: list[str], nocase: bool = False,
         wide: bool = False) -> str:
    """:returns: a hex string as a rule has it."""
    parts: list[str] = []
    # For each open alternative: where it began, and whether it is negated.
    stack: list[tuple[int, bool]] = []
    run = longest = position = 0
    while position < len(body):
        match = _BODY.match(body, position)
        if match is None:
            raise _Unfit(_('not understood: %s')
                         % text.printable(body[position:], 20))
        position = match.end()
        if match['byte']:
            parts.append(_byte(match['byte'], nocase))
            run = 0 if '?' in match['byte'] else run + 1
            if wide:
                parts.append('00')
            if not stack:
                longest = max(longest, run)
            continue
        run = 0
        if match['any'] or match['jump'] or match['near']:
            if stack:
                raise _Unfit(_('jump inside an alternative'))
            parts.append(_jump(match['jump'] or match['near'] or '', wide))
        elif match['border']:
            lost.append(_('border of a word or line'))
        elif match['open']:
            if len(stack) >= _DEPTH_MAX:
                raise _Unfit(_('nested more than %d deep') % _DEPTH_MAX)
            stack.append((len(parts), match['open'].startswith('!')))
            parts.append('(')
        elif not stack:
            raise _Unfit(_('an alternative without a parenthesis'))
        elif match['or']:
            parts.append('|')
        else:
            begin, negated = stack.pop()
            if negated:
                parts[begin:] = _negated(parts[begin + 1:], lost)
            else:
                parts.append(')')
    if stack:
        raise _Unfit(_('an open parenthesis'))
    # A string begins and ends with something to look for.
    while parts and (parts[0].startswith('[') or parts[0] == '??'):
        parts.pop(0)
    while parts and (parts[-1].startswith('[') or parts[-1] == '??'):
        parts.pop()
    if longest < _RUN_MIN:
        raise _Unfit(_('fewer than %d known bytes in a row') % _RUN_MIN)
    return '{ %s }' % ' '.join(_merged(parts))


def _byte(pair: str, nocase: bool) -> str:
    pair = pair.upper()
    if nocase and '?' not in pair:
        char = chr(int(pair, 16))
        if char.isascii() and char.isalpha():
            return f'({ord(char.lower()):02X} | {ord(char.upper()):02X})'
    return pair


def _jump(bounds: str, wide: bool) -> str:
    low, dash, high = bounds.partition('-')
    if not dash:
        high = low
    least, most = int(low or 0), int(high) if high else None
    if wide:
        least *= 2
        most = None if most is None else most * 2
    if most is None:
        return f'[{least}-]' if least else '[-]'
    if most < least:
        raise _Unfit(_('jump from %(least)d to %(most)d') % {
            'least': least, 'most': most})
    return f'[{least}-{most}]'


def _negated(parts: list[str], lost: list[str]) -> list[str]:
    """:returns: what is not one of some alternatives."""
    if '(' in parts:
        raise _Unfit(_('negated alternatives with others inside'))
    branches = ' '.join(parts).split('|')
    if len(branches) == 1 and len(parts) == 1 and parts[0] != '??':
        return ['~' + parts[0]]
    lengths = {len(branch.split()) for branch in branches}
    lost.append(_('negated alternatives'))
    return [f'[{min(lengths)}-{max(lengths)}]']


def _merged(parts: list[str]) -> collections.abc.Iterator[str]:
    """Join jumps in a row, which a rule may not have."""
    low: int = 0
    high: int | None = 0
    for part in parts:
        if part.startswith('['):
            first, _dash, last = part[1:-1].partition('-')
            low += int(first or 0)
            high = high + int(last) if last and high is not None else None
            continue
        if high is None:
            yield f'[{low}-]' if low else '[-]'
        elif high:
            yield f'[{low}-{high}]'
        low, high = 0, 0
        yield part


class _Expression:
    """A logical expression, such as ``(0&1)|(2>3,2)``."""

    def __init__(self, source: str, strings: dict[int, str | None],
                 lost: list[str]) -> None:
        self._strings = strings
        self._lost = lost
        self._tokens: list[re.Match[str]] = []
        position = 0
        while position < len(source.rstrip()):
            match = _LOGIC.match(source, position)
            if match is None:
                raise _Unfit(_('expression not understood: %s')
                             % text.printable(source[position:], 20))
            self._tokens.append(match)
            position = match.end()
        self._at = 0

    def parse(self) -> _Term:
        """:raises _Unfit: when it is none."""
        term = self._expression(0)
        if self._at < len(self._tokens):
            raise _Unfit(_('expression not understood'))
        return term

    def _next(self, group: str, value: str = '') -> re.Match[str] | None:
        if self._at < len(self._tokens):
            match = self._tokens[self._at]
            if match[group] and (not value or match[group] == value):
                self._at += 1
                return match
        return None

    def _expression(self, depth: int) -> _Term:
        # Both operators bind alike in ClamAV, from the left.
        left = self._operand(depth)
        while True:
            if self._next('sign', '&'):
                left = _joined(left, self._operand(depth), 'and')
            elif self._next('sign', '|'):
                left = _joined(left, self._operand(depth), 'or')
            else:
                return left

    def _operand(self, depth: int) -> _Term:
        if depth > _DEPTH_MAX:
            raise _Unfit(_('nested more than %d deep') % _DEPTH_MAX)
        number = self._next('number')
        begin = self._at
        if number:
            index = int(number['number'])
            if index not in self._strings:
                raise _Unfit(_('no subsignature %d') % index)
            indexes = [index]
            term = _Term(f'$s{index}', (f'$s{index}',))
            if self._strings[index] is None:
                term = _NOTHING
        elif self._next('sign', '('):
            term = self._expression(depth + 1)
            if not self._next('sign', ')'):
                raise _Unfit(_('an open parenthesis'))
            indexes = sorted({
                int(match['number']) for match in self._tokens[
                    begin:self._at] if match['number']})
        else:
            raise _Unfit(_('expression not understood'))
        count = self._next('count')
        return self._counted(term, indexes, count) if count else term

    def _counted(self, term: _Term, indexes: list[int],
                 count: re.Match[str]) -> _Term:
        """A number of matches of one or more subsignatures."""
        sign, value = count['count'], int(count['value'])
        known = [index for index in indexes
                 if self._strings[index] is not None]
        names = tuple(f'$s{index}' for index in known)
        total = ' + '.join(f'#s{index}' for index in known)
        if len(known) < len(indexes):
            # Fewer are seen than there are. Where few are asked for, that
            # tells nothing; where many are, it would miss some.
            self._lost.append(
                _('number of matches: %s') % count[0].strip())
            return _NOTHING
        if sign == '=' and value == 0:
            none = ' or '.join(names)
            return _Term(f'not ({none})', names)
        parts = []
        if not (sign == '>' and value == 0):
            equals = '==' if sign == '=' else sign
            parts.append(f'{total} {equals} {value}')
        if sign == '>':
            kinds = int(count['kinds'] or 0)
            if not parts or kinds:
                parts.append(f'{max(kinds, 1)} of ({", ".join(names)})')
        elif count['kinds']:
            self._lost.append(
                _('number of matches: %s') % count[0].strip())
        if len(parts) == 1:
            return _Term(f'({parts[0]})', names)
        return _Term('(%s)' % ' and '.join(parts), names)


def _joined(left: _Term, right: _Term, word: str) -> _Term:
    # What is not known is as if it held in "and"; in "or" its branch is
    # left out, or the rest would be of no use.
    if not left.condition or not right.condition:
        return left if left.condition else right
    return _Term(f'({left.condition} {word} {right.condition})',
                 left.strings + right.strings)


def _identifier(name: str, used: set[str]) -> str:
    """:returns: a name for the rule, and notes that it is used."""
    base = 'ClamAV_' + re.sub(r'\W', '_', name, flags=re.ASCII)
    identifier, number = base, 1
    while identifier in used:
        number += 1
        identifier = f'{base}_{number}'
    used.add(identifier)
    return identifier


def _rule(identifier: str, name: str, strings: dict[str, str],
          condition: str, lost: list[str]) -> str:
    lines = [f'rule {identifier}', '{', '    meta:',
             f'        clamav = {_quoted(name)}']
    if lost:
        said = text.printable('; '.join(dict.fromkeys(lost)), 1000)
        lines.append(f'        clamav_lost = {_quoted(said)}')
    lines += ['', '    strings:']
    lines += [f'        {key} = {value}' for key, value in strings.items()]
    lines += ['', '    condition:', f'        {condition}', '}', '']
    return '\n'.join(lines)


def _quoted(value: str) -> str:
    return '"%s"' % value.replace('\\', '\\\\').replace('"', '\\"')
