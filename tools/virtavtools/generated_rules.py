# SPDX-License-Identifier: Apache-2.0
"""Made-up YARA rules that cost what public ones do.

The shape is that of 14,555 public rules in their page form, from 19
repositories, as far as it was measured: lengths and kinds of strings, how
many there are and how many of them a condition needs, modifiers, wildcards,
and the few rules in which nothing can be looked for at once. Hexadecimal
strings are made of x86-64 instructions, so that some of them have pieces in
common with real code. The same seed gives the same rules everywhere.
"""

import itertools
import random
import re

#: A page that holds it matches a rule of every set.
PROBE = b'VIRTAV-GENERATED-PROBE-51f0c2'
PROBE_RULE = 'generated_probe'

#: Lengths of strings in bytes: (share of strings, length up to there).
_HEX_LENGTHS = ((0, 5), (.1, 11), (.5, 20), (.9, 62), (.99, 468), (1, 1400))
_TEXT_LENGTHS = ((0, 5), (.1, 8), (.5, 21), (.9, 62), (.99, 130), (1, 600))
#: How many strings a condition needs at least, with weights.
_NEEDED = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 11),
           (341, 147, 103, 75, 53, 52, 126, 78, 15, 10))
#: Mean number of strings beyond those needed.
_SPARE = 2.8
#: Share of rules with strings of code, of those without a piece to look
#: for, and of those in which it is too common.
_CODE_RULES = .36
_WEAK_RULES = .02
_COMMON_RULES = .003
_REGEXES = .016
_WILD = .6  # share of hexadecimal strings with wildcards
_JUMPS = .18
_ALTERNATIVES = .023
#: Modifiers of text strings, with weights.
_MODIFIERS = (
    ('ascii', 'fullword ascii', '', 'ascii wide', 'ascii wide nocase',
     'fullword wide', 'wide', 'ascii wide fullword', 'fullword',
     'ascii nocase', 'ascii wide nocase fullword', 'nocase', 'xor', 'base64'),
    (171, 159, 153, 149, 137, 75, 74, 25, 23, 15, 8, 6, 3, 2))
#: What a page takes of the strings that a condition needs.
_BYTES_MAX = 3400

#: x86-64 instructions; a lower-case letter is a byte that varies.
_CODE = re.findall(r'\w+', """
55|4889E5|4883ECi|4883C4i|5B|5D|4154|4155|4156|4157|415C|415D|415E|415F|C3
488Br|488D0Daaaa|488D35aaaa|488D3Daaaa|488B05aaaa|488905aaaa|E8aaaa|E9aaaa
4889r|48C7C0i000000|B8i000000|BEi000000|BFi000000|31C0|31D2|31C9|31F6|31FF
4885C0|85C0|74j|75j|0F84aa0000|0F85aa0000|EBj|488B45i|488945i|8B45i|8945i
0FB6r|0FB700|0FBEC0|83F8i|83C001|4883C001|4839r|29r|01r|0FAFr|C1E0i|C1E8i
4898|4863r|488B4424i|4889442Bi|F30F1EFA|0F1F4000|660F6FC1|660FEFC0|0F1100
3345i|3245i|8A040A|88040A|30040A|41B8iiii|448B45i|448945i|FFD0|FF15aaaa
""")
#: On one of a hundred pages of code, or on more.
_COMMON = ('4883C4085B5D415C415D415E415FC3', '64482B042528000000',
           '0F1F8400000000000F1F440000', '660F1F8400000000000F1F4000',
           '5B5D415C415D415E415FC30F1F', '48894424F831C0')
_SYLLABLES = re.findall(r'\w+', """
ab ac ad al am an ar as at ba be bo ca ce co cr da de di do dr ec ed el em en
er es et ex fa fe fi for fr ga ge gi go gr ha he hi ho ic id il im in ing ion
is it ive ka ke ki la le li lo lu ma me mi mo na ne ni no nt ob oc ol om on op
or os ou ow pa pe pi po pr qu ra re ri ro ru sa sc se sh si so sp st su ta ten
th ti to tr tu ul um un up ur us ut va ve vi wa we wi wo xe ya yo ze zi
""")
_JOINTS = (('', ' ', '_', '.', '/', '-', ':', '=', '\\\\', '%s', '%d', '\\n'),
           (60, 20, 5, 4, 4, 2, 1, 1, 1, 1, 1, 1))
_WORDS = ('Create', 'Get', 'Set', 'Open', 'Remote', 'Thread', 'Process',
          'File', 'Key', 'http://', 'User-Agent: ', 'cmd.exe /c ', '/bin/',
          '/var/', 'Software\\\\', '.dll', '.exe', 'Global\\\\')


def _length(rng, table):
    share = rng.random()
    for (low, least), (high, most) in itertools.pairwise(table):
        if share <= high:
            part = (share - low) / (high - low)
            # Between two quantiles lengths grow by factors.
            return round(least * (most / least) ** part)
    raise AssertionError


def _instructions(rng, length):
    """Bytes of code, each as two hexadecimal digits."""
    result = []
    while len(result) < length:
        one = rng.choice(_CODE)
        place = 0
        while place < len(one):
            digit = one[place]
            if digit in 'aijr':
                value = {'a': rng.getrandbits(8), 'j': rng.randrange(2, 128),
                         'i': rng.choice((8, 16, 24, 32, 40, 64, 1, 2, 255,
                                          rng.getrandbits(8))),
                         'r': 0xc0 | rng.getrandbits(6)}[digit]
                result.append('%02X' % value)
                place += 1
            else:
                result.append(one[place:place + 2].upper())
                place += 2
    return result[:length]


def _hex(rng, length, rare):
    """A hexadecimal string.

    :param rare: no code but what it was made for may have it
    """
    digits = _instructions(rng, length)
    if rare:
        at = rng.randrange(length - 3)
        digits[at:at + 4] = ['%02X' % one for one in rng.randbytes(4)]
    if length >= 10 and rng.random() < _WILD:
        # In runs, as addresses are left out; five bytes stay together.
        keep = min(at, length - 6) if rare else rng.randrange(length - 4)
        share = rng.uniform(.05, .5)
        place = 1
        while place < length - 1:
            run = rng.choice((1, 1, 4, 4, 4))
            if rng.random() < share:
                for at in range(place, min(place + run, length - 1)):
                    if not keep <= at < keep + 6:
                        digits[at] = '??'
            place += run
        if rng.random() < _JUMPS / _WILD:
            at = keep if keep > 1 else min(keep + 6, length - 1)
            digits.insert(at, '[%d-%d]' % rng.choice(
                ((1, 4), (2, 8), (4, 16), (0, 30))))
        elif rng.random() < _ALTERNATIVES / _WILD:
            at = keep - 1 if keep > 1 else min(keep + 6, length - 1)
            digits[at] = '( %02X | %02X %02X )' % tuple(rng.randbytes(3))
    return '{ %s }' % ' '.join(digits)


def _words(rng, length):
    text = rng.choice(_WORDS) if rng.random() < .15 else ''
    while len(text) < length:
        syllable = rng.choice(_SYLLABLES)
        if rng.random() < .15:
            syllable = syllable.title()
        if rng.random() < .05:
            syllable += str(rng.randrange(100))
        text += syllable + rng.choices(*_JOINTS)[0]
    text = text[:length]
    # A backslash at the end would take the quote with it.
    return text.rstrip('\\ ') + rng.choice('aeghklrstxz')


def _text(rng, length):
    words = _words(rng, length)
    if '\\' in words:  # Cutting may have parted what belongs together.
        words = words.replace('\\\\', '/').replace('\\n', '.').replace(
            '\\', '.')
    modifiers = rng.choices(*_MODIFIERS)[0]
    return ('"%s" %s' % (words, modifiers)).rstrip()


def _regex(rng, length):
    first, second = (''.join(rng.choices(_SYLLABLES, k=3)) for _ in range(2))
    form = rng.choice((
        '/%s(%s|on|off)[0-9]{1,4}/', '/%s[a-z]{2,8}%s/ ascii wide',
        '/%s\\s%s\\.(exe|dll|tmp)/ nocase', '/(%s|%s)_[A-F0-9]{8}/'))
    return form % (first, second)


def _weak(rng, _length):
    """A string without five bytes that are certain."""
    return rng.choice((
        lambda: '"%s"' % _words(rng, 3),
        lambda: '{ %02X ?? %02X %02X ?? ?? %02X ?? %02X }' % tuple(
            rng.randbytes(5)),
        lambda: '/[%s]{3}[0-9]{2}%s[^x]{2}Q/' % (
            rng.choice(('a-f', 'g-m', 'n-z')), rng.choice('XYZ')),
        lambda: '"%s" xor' % _words(rng, 12),
        lambda: '"%s" base64' % _words(rng, 14)))()


def _rule(rng, number):
    kind = rng.random()
    code = rng.random() < _CODE_RULES
    needed = rng.choices(*_NEEDED)[0]
    spare = min(int(rng.expovariate(1 / (_SPARE + .5))), 30)
    if kind < _WEAK_RULES:
        # One string has to be found, and any of them may be it.
        strings = [_weak(rng, 0) for _ in range(2 + needed)]
        needed = max(needed, 2)
    elif kind < _WEAK_RULES + _COMMON_RULES:
        strings = ['{ %s }' % ' '.join(
            one[at:at + 2] for at in range(0, len(one), 2))
            for one in rng.sample(_COMMON, 2)]
        strings.append('/[g-m]{4}[0-9]{3}Q/')
        needed = 3
    else:
        strings = []
        room = _BYTES_MAX
        for _ in range(needed + spare):
            if rng.random() < _REGEXES:
                strings.append(_regex(rng, 0))
                continue
            hexadecimal = rng.random() < (.95 if code else .1)
            length = _length(rng, _HEX_LENGTHS if hexadecimal
                             else _TEXT_LENGTHS)
            # Wide text takes two bytes for a character.
            length = max(min(length, room // 2), 8 if needed == 1 else 6)
            room -= length
            # As for public rules after those that match harmless code
            # were taken out.
            strings.append(_hex(rng, length, needed < 4) if hexadecimal
                           else _text(rng, length))
    names = ['$s%d' % at for at in range(len(strings))]
    if needed >= len(names):
        condition = 'all of them'
    elif needed == 1 and rng.random() < .9:
        condition = 'any of them'
    elif needed > 2 and rng.random() < .2:
        names = ['$x0', '$x1', *names[2:]]
        condition = '1 of ($x*) and %d of ($s*)' % min(
            needed - 1, len(names) - 2)
    elif needed > 1 and rng.random() < .1:
        condition = '%s or %d of them' % (
            ' and '.join(names[:needed]), needed)
    else:
        condition = '%d of them' % needed
    return """rule generated_%05d : generated
{
    meta:
        author = "generated"
        description = "made up to be measured"
    strings:
%s
    condition:
        %s
}
""" % (number, ''.join('        %s = %s\n' % pair for pair in zip(
        names, strings, strict=True)).rstrip('\n'), condition)


def rules(count, seed=1):
    """Make rules.

    :param count: how many, with the probe's
    :param seed: of what differs between sets
    :returns: the source text
    """
    # Each by itself: a set begins like every larger one.
    made = [_rule(random.Random('%d %d' % (seed, number)),  # noqa: S311
                  number) for number in range(1, count)]
    return 'rule %s { strings: $probe = "%s" condition: $probe }\n%s' % (
        PROBE_RULE, PROBE.decode(), ''.join(made))


def write(directory, count, seed=1, files=10):
    """Write a rule directory.

    :param directory: a path that is made
    :param count: how many rules
    :param files: how many files they are in
    """
    directory.mkdir(parents=True)
    parts = rules(count, seed).split('\nrule ')
    size = -(-len(parts) // files)
    for number in range(0, len(parts), size):
        text = '\nrule '.join(parts[number:number + size])
        if number:
            text = 'rule ' + text
        (directory / ('generated-%02d.yar' % (number // size))).write_text(
            text + '\n')
