# SPDX-License-Identifier: Apache-2.0
"""Rules with everything YARA can say, and pages made for them.

Made of random numbers, so that a test can have any number of them and shrink
what fails. Strings are short and of few letters: they nearly match often.
"""

import base64
import re
import typing

import yara

from virtav_nova.rules import directory

_LETTERS = b'abcdefghABCDEFGH0123_. -'
_LENGTHS = (4096, 1024, 5120)
_BASE64 = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
_OWN_BASE64 = _BASE64[::-1]


class String(typing.NamedTuple):
    """A string of a rule.

    :param definition: as in the source.
    :param pieces: of which each is likely to match it, or nearly.
    """

    definition: str
    pieces: list[bytes]


def files(random, count):
    """Make rule files.

    :param random: a :class:`random.Random`.
    :param count: rules.
    :returns: the files, and pieces that pages are to be made of.
    """
    pieces = []
    sources = {'a.yar': '', 'b/b.yar': ''}
    for name, source in sources.items():
        modules = [module for module in ('math', 'pe', 'elf', 'string')
                   if random.random() < .3]
        source = ''.join(f'import "{module}"\n' for module in modules)
        names = []
        for number in range(random.randint(1, count)):
            strings = [_string(random) for _ in range(random.randint(0, 5))]
            text = _rule(random, f'r{number}', strings, names, modules)
            try:
                yara.compile(source=source + text)
            except yara.Error:
                continue
            names.append(f'r{number}')
            source += text
            pieces += [piece for string in strings
                       for piece in string.pieces]
        sources[name] = source
    return [directory.RuleFile(name, source.encode())
            for name, source in sources.items()], pieces


def page(random, pieces):
    """Make a page.

    :param pieces: bytes that are to be in it.
    """
    length = random.choice((*_LENGTHS, random.randint(0, 100)))
    parts = []
    if random.random() < .3:
        parts.append(random.choice((b'MZ', b'\x7fELF', b'\0\0MZ', b'a')))
    for _ in range(random.randint(0, 12)):
        piece = random.choice(pieces) if pieces else b''
        chance = random.random()
        if chance < .1:
            piece = piece[:-1]
        elif chance < .15:
            piece = piece.swapcase()
        elif chance < .25:
            piece = b''.join(bytes((byte, 0)) for byte in piece)
        elif chance < .3:
            key = random.randrange(256)
            piece = bytes(byte ^ key for byte in piece)
        parts += [piece, random.choice(
            (b'', b' ', b'\0', b'a', b'\n', random.randbytes(3),
             bytes(random.randrange(300))))]
    data = b''.join(parts)
    if random.random() < .3:
        # Up to the very end.
        return data[-length:].rjust(length, b'\x90') if length else b''
    return data[:length].ljust(length, random.choice(
        (b'\0', b'\x90', b'a', b'\xff')))


def _word(random, least=1, most=20):
    return bytes(random.choices(
        _LETTERS, k=random.randint(least, most)))


def _escaped(text):
    return ''.join(
        chr(byte) if chr(byte).isalnum() or byte in b' _-'
        else f'\\x{byte:02x}' for byte in text)


def _string(random):
    kind = random.random()
    if kind < .45:
        return _plain(random)
    return _hex(random) if kind < .7 else _regex(random)


def _plain(random):
    text = _word(random, *random.choice(((1, 3), (4, 8), (6, 30))))
    if random.random() < .15:
        text += b'\0' + _word(random)
    if random.random() < .1:
        text += bytes((random.randrange(128, 256),))
    coding = random.random()
    modifiers = []
    pieces = [text]
    if coding < .12:
        low = random.randrange(256)
        high = random.randint(low, 255)
        modifiers.append(random.choice(('xor', f'xor({low:#x}-{high})',
                                        f'xor({low})')))
        pieces = [bytes(byte ^ key for byte in text)
                  for key in (low, high, 0, random.randrange(256))]
        modifiers += random.sample(('wide', 'ascii', 'fullword', 'private'),
                                   random.randint(0, 2))
        pieces += map(_wide, pieces[:2])
    elif coding < .24:
        alphabet = random.choice(('', f'("{_OWN_BASE64}")'))
        modifiers += [each + alphabet for each in random.choice(
            (('base64',), ('base64wide',), ('base64', 'base64wide')))]
        modifiers += random.sample(('wide', 'ascii', 'private'),
                                   random.randint(0, 1))
        pieces = [base64.b64encode(_word(random, count, count) + each
                                   + _word(random, 0, 3))
                  for each in (text, _wide(text)) for count in range(3)]
        if alphabet:
            table = bytes.maketrans(_BASE64.encode(), _OWN_BASE64.encode())
            pieces = [each.translate(table) for each in pieces]
        pieces += map(_wide, pieces[:3])
    else:
        modifiers += random.sample(
            ('wide', 'ascii', 'nocase', 'fullword', 'private'),
            random.choice((0, 0, 1, 2, 3)))
        if 'wide' in modifiers:
            pieces.append(_wide(text))
        if 'nocase' in modifiers:
            pieces.append(text.swapcase())
    return String(f'"{_escaped(text)}" {" ".join(modifiers)}', pieces)


def _wide(text):
    return b''.join(bytes((byte, 0)) for byte in text)


def _hex(random):
    units, piece = _hex_units(random, random.randint(1, 12), 0)
    modifier = ' private' if random.random() < .1 else ''
    return String(f'{{ {units} }}{modifier}', [piece])


def _hex_units(random, count, depth):
    units = []
    piece = b''
    for place in range(count):
        byte = random.choice(_LETTERS)
        kind = random.random()
        inner = 0 < place < count - 1
        if kind < .08 and inner:
            units.append('??')
        elif kind < .12 and inner:
            units.append(random.choice((f'{byte >> 4:X}?',
                                        f'?{byte & 15:X}')))
        elif kind < .16 and inner:
            units.append(random.choice((
                f'~{byte ^ 1:02X}', f'~{byte >> 4 ^ 1:X}?',
                f'~?{byte & 15 ^ 1:X}')))
        elif kind < .22 and inner and not depth:
            low = random.randrange(4)
            high = low + random.choice((0, 1, 3, 300))
            units.append(random.choice(
                (f'[{low}-{high}]', f'[{low}]', f'[{low}-]', '[-]')))
            piece += b'a' * low
            continue
        elif kind < .3 and depth < 2:
            branches = [_hex_units(random, random.randint(1, 4), depth + 1)
                        for _ in range(random.randint(1, 3))]
            units.append('( %s )' % ' | '.join(
                branch for branch, _piece in branches))
            piece += random.choice(branches)[1]
            continue
        else:
            units.append(f'{byte:02X}')
        piece += bytes((byte,))
    return ' '.join(units), piece


def _regex(random):
    pattern, piece = _expression(random, random.randint(1, 8), 0)
    flags = ''.join(random.sample('is', random.choice((0, 0, 1, 2))))
    if random.random() < .1:
        pattern = '^' + pattern
    if random.random() < .1:
        pattern += '$'
    modifiers = random.sample(
        ('ascii', 'nocase', 'fullword', 'private'),
        random.choice((0, 0, 1, 2)))
    if random.random() < .4:
        modifiers.append('wide')
    return String(f'/{pattern}/{flags} {" ".join(modifiers)}',
                  [piece, _wide(piece), piece.swapcase()])


def _expression(random, count, depth):
    pattern = ''
    pieces = b''
    for _ in range(count):
        byte = random.choice(_LETTERS)
        kind = random.random()
        if kind < .35:
            word = _word(random, 1, 8)
            part, piece = re.escape(word.decode()), word
        elif kind < .45:
            part, piece = random.choice((
                ('.', b'x'), ('\\d', b'1'), ('\\D', b'x'), ('\\w', b'a'),
                ('\\W', b'-'), ('\\s', b' '), ('\\S', b'a'),
                ('\\t', b'\t'), ('\\n', b'\n'), ('\\x41', b'A'),
                ('{', b'{'), ('\\/', b'/'), (']', b']')))
        elif kind < .6:
            part, piece = random.choice((
                ('[a-f]', b'c'), ('[^a-f]', b'x'), ('[0-9a-f]', b'1'),
                ('[]x]', b']'), ('[^]x]', b'a'), ('[\\w-]', b'-'),
                ('[\\w\\.-]', b'.'), ('[\\w-x]', b'x'), ('[a\\-c]', b'b'),
                ('[^\\s]', b'a'), ('[\\x00-\\x20]', b'\0'),
                ('[A-Fx\\]]', b'D'), ('[\\d_]', b'_'), ('[^\\W]', b'w')))
        elif kind < .7:
            part, piece = random.choice(('\\b', '\\B', '\\b')), b''
        elif kind < .8 and depth < 2:
            branches = [_expression(random, random.randint(0, 3), depth + 1)
                        for _ in range(random.randint(1, 3))]
            part = '(%s)' % '|'.join(branch for branch, _ in branches)
            piece = random.choice(branches)[1]
        else:
            part, piece = re.escape(chr(byte)), bytes((byte,))
        if random.random() < .2 and len(piece) and '\\b' not in part.lower():
            if not (len(part) == 1 or (part[0] in '[(\\' and kind >= .35)):
                part = f'({part})'
            low = random.randrange(4)
            repeat, times = random.choice((
                ('*', low), ('+', low + 1), ('?', 1), ('*?', low),
                ('+?', 1), ('??', 0), (f'{{{low}}}', low),
                (f'{{{low},}}', low + 1), (f'{{,{low + 1}}}', low),
                (f'{{{low},{low + 3}}}', low + 1), (f'{{{low},}}?', low)))
            part += repeat
            piece *= times
        pattern += part
        pieces += piece
    return pattern, pieces


def _rule(random, name, strings, names, modules):
    identifiers = []
    definitions = []
    for number, string in enumerate(strings):
        identifier = random.choice(('a', 'a_', 'b')) + str(number)
        identifiers.append(identifier)
        definitions.append(f'        ${identifier} = {string.definition}\n')
    modifier = random.choice(
        [''] * 12 + ['private ', 'private ', 'global ', 'global private '])
    condition = _condition(random, identifiers, names, modules, 0)
    unused = [each for each in identifiers if each not in condition]
    if unused and 'them' not in condition:
        # Strings have to be used.
        condition = f'({condition}) {random.choice(("and", "or"))} ' + (
            _set_condition(random, unused))
    if modifier.startswith('global') and random.random() < .7:
        condition = 'filesize < 5000'
        definitions = []
    section = (f'    strings:\n{"".join(definitions)}' if definitions
               else '')
    tags = random.choice(('', ' : t', ' : t u'))
    return (f'{modifier}rule {name}{tags} {{\n    meta:\n'
            f'        n = {random.randrange(9)}\n{section}'
            f'    condition:\n        {condition}\n}}\n')


def _number(random, identifiers, depth=0):
    choices = [str(random.randrange(5)), 'filesize', '-1', '4KB',
               'uint8(0)', 'uint16be(2)', 'int32(filesize - 4)']
    if identifiers:
        one = random.choice(identifiers)
        choices += [f'#{one}', f'#{one}', f'@{one}', f'!{one}',
                    f'@{one}[{random.randint(1, 3)}]', f'!{one}[2]',
                    f'#{one} in (0..{random.choice((10, 5000))})',
                    f'uint16(@{one})', f'uint8(@{one} + !{one})']
    chosen = random.choice(choices)
    if depth < 2 and random.random() < .25:
        sign = random.choice('+-*\\%&|^')
        chosen = f'({chosen} {sign} {_number(random, identifiers, depth + 1)})'
    return chosen


def _set(random, identifiers):
    if random.random() < .4:
        return 'them'
    if random.random() < .4:
        return f'(${random.choice(("a", "b", "a_", ""))}*)'
    return '(%s)' % ', '.join(
        f'${each}' for each in random.choices(
            identifiers, k=random.randint(1, 4)))


def _quantity(random, size):
    return random.choice((
        'any', 'all', 'none', '0', '1', '2', str(size), '(1 + 1)',
        '(#%s)', '50%%', '1%%', '100%%', 'any', 'all', '2', '3'))


def _set_condition(random, identifiers):
    quantity = _quantity(random, len(identifiers))
    if '#' in quantity:
        quantity %= random.choice(identifiers)
    quantity = quantity.replace('%%', '%')
    names = '(%s)' % ', '.join(f'${each}' for each in identifiers)
    return f'{quantity} of {names}'


def _condition(random, identifiers, names, modules, depth):
    def inner():
        return _condition(random, identifiers, names, modules, depth + 1)

    kind = random.random()
    if depth < 3 and kind < .45:
        if kind < .08:
            return f'not ({inner()})' if kind < .05 else f'(not {inner()})'
        sign = random.choice(('and', 'or', 'and'))
        return '(' + f' {sign} '.join(
            inner() for _ in range(random.randint(2, 3))) + ')'
    if kind < .5:
        return random.choice(
            ('true', 'false', 'filesize > 100', 'uint16(0) == 0x5A4D',
             'uint8(1) == 0x61', '0x464c457f == uint32(0)',
             'int8(0) == -1', 'uint16be(3) == 0x6161'))
    if kind < .54 and names:
        if random.random() < .3:
            return f'{random.choice(("any", "all", "1"))} of (r*)'
        return random.choice(names)
    if kind < .58 and modules:
        return random.choice({
            'math': ('math.entropy(0, filesize) > 2.0',
                     'math.max(1, 2) == 2',
                     'math.mean(@a0, 10) < 100.0 or defined @a0'),
            'pe': ('pe.is_pe', 'pe.number_of_sections == 0',
                   'pe.machine != pe.MACHINE_I386', 'pe.is_dll()',
                   'pe.imphash() == ""', 'not pe.is_pe',
                   'for any s in pe.sections : (s.name == "x")',
                   'pe.version_info["a"] contains "b"', 'defined pe.machine',
                   'pe.MACHINE_I386 == 0x14c', 'pe.exports("x")'),
            'elf': ('elf.type == elf.ET_EXEC', 'elf.machine != 5',
                    'for any s in elf.sections : (s.size > 0)'),
            'string': ('string.length("ab") == 2',)}[random.choice(modules)])
    if not identifiers:
        return f'{_number(random, [])} {random.choice(("<", ">", "=="))} ' + (
            _number(random, []))
    one = random.choice(identifiers)
    if kind < .66:
        return f'${one}'
    if kind < .7:
        return random.choice((
            f'${one} at {random.choice((0, 4, "filesize - 8"))}',
            f'${one} in (0..{random.choice((0, 100, "filesize"))})',
            f'${one} in (@{one}[2]..filesize)'))
    if kind < .8:
        sign = random.choice(('<', '>', '<=', '>=', '==', '!='))
        return (f'{_number(random, identifiers)} {sign} '
                f'{_number(random, identifiers)}')
    if kind < .83:
        return f'defined {_number(random, identifiers)}'
    if kind < .85:
        return random.choice((
            '"abc" contains "b"', '"abc" icontains "B"', '"ab" matches /b/'))
    quantity = _quantity(random, len(identifiers)).replace('%%', '%')
    if '#' in quantity:
        quantity %= one
    names_ = _set(random, identifiers)
    if kind < .93:
        where = random.choice(('', '', '', ' in (0..100)', ' at 0',
                               f' in (0..@{one})'))
        return f'{quantity} of {names_}{where}'
    if kind < .97:
        body = random.choice((
            '$', '$ at 0', '# > 1', '@ < 100', '! > 3', 'not $',
            '# == 0', f'@ > @{one}', f'$ and ${one}', '$ in (0..500)',
            '@[2] > @[1]', 'defined @'))
        return f'for {quantity} of {names_} : ({body})'
    body = random.choice((
        f'@{one}[i] < 100', f'#{one} > i', f'${one}', f'!{one}[i] == 4',
        f'${one} at i', 'i == 2', f'for any of them : ($ at @{one}[i])'))
    span = random.choice(('(1..3)', f'(1..#{one})', '(0, 1, 4)',
                          f'(0..#{one})'))
    return f'for {quantity} i in {span} : ({body})'
