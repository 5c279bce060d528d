# SPDX-License-Identifier: Apache-2.0

from tests.unit import base
from virtav_nova.rules import necessary
from virtav_nova.rules import syntax

_STRINGS = '$a = "aaaa" $b = "bbbb" $c = "cccc" $d1 = "dddd" $d2 = "eeee"'
_NAMES = ('a', 'b', 'c', 'd1', 'd2')
A, B, C, D1, D2 = (necessary.String('r', number) for number in range(5))
MZ = necessary.Fixed(0, b'MZ')


def formula(condition, before='', strings=_STRINGS):
    """Find what the last rule of a source needs."""
    source = syntax.parse(
        'import "pe"\nimport "math"\n' + before +
        f'rule r {{ strings: {strings} condition: {condition} }}', 'x')
    rule = source.rules[-1]
    assert not rule.unparsed, rule.unparsed
    return necessary.formulas(source)['r']


class NecessaryTest(base.TestCase):

    def _assert_needs(self, expected, *conditions, **more):
        for condition in conditions:
            with self.subTest(condition=condition):
                self.assertEqual(expected, formula(condition, **more))

    def test_one_string(self):
        self._assert_needs(
            A, '$a', '($a)', '$a at 5', '$a in (0..10)', '#a > 0', '#a >= 1',
            '0 < #a', '#a == 3', '3 <= #a', '#a in (0..100) > 2', '#a',
            '@a < 5', '!a > 3', '@a[2] == @a + 4', 'uint16(@a) == 1',
            'uint32(@a + !a) != 5', 'defined @a', 'defined (!a)',
            '#a * 2 > 1', '#a > -1 and $a', 'not not $b and $a',
            'for any i in (1..3) : ($a at i)', 'any of ($a)', '1 of ($a)',
            'for any i in (1..#b) : (@a[i] < 5)', '$a and filesize > 5',
            '#a > 1KB', '@a == 1 or false', '-@a < 1', '#a > 0.5',
            '#a == 1.0')

    def test_nothing(self):
        self._assert_needs(
            necessary.ALWAYS, 'not $a', '#a == 0', '#a >= 0', '#a < 3',
            '#a != 3', '0 of them', 'none of them', '#b of them', 'true',
            '$a or true', 'for all i in (1..#a) : ($b)', 'defined $a',
            'for none of them : ($)', '$a or filesize > 5', 'pe.is_pe',
            'math.max(#a, 1) == 1', 'not ($a and $b)', '(-1) of them',
            'for 0 i in (1..2) : ($a)', 'not @a == 1', 'defined (#a > 1)',
            'for #b i in (1..2) : ($a)', '#a > #b - 5', 'filesize',
            '#a == 0.0000000000000001')

    def test_several(self):
        every = necessary.AtLeast(5, (A, B, C, D1, D2))
        any_ = necessary.AtLeast(1, (A, B, C, D1, D2))
        self._assert_needs(every, 'all of them', '5 of them', '100% of them',
                           '81% of them', 'for all of them : ($ at 0)',
                           '$a and $b and $c and $d1 and $d2')
        self._assert_needs(any_, 'any of them', '1 of them', '1% of them',
                           '20% of them', 'any of ($*)',
                           '#a + #b + #c + #d1 + #d2 > 0',
                           'for any of them : (# > 3)')
        self._assert_needs(necessary.AtLeast(2, (A, B, C, D1, D2)),
                           '2 of them', '21% of them', '40% of them',
                           'for 2 of them : (@ < 100)',
                           '2 of them in (0..100)')
        self._assert_needs(necessary.AtLeast(2, (D1, D2)), 'all of ($d*)',
                           '$d1 and $d2', '@d1 < @d2', '#d1 * #d2 == 3',
                           '#d1 > 0 and #d2 > 0')
        self._assert_needs(
            necessary.AtLeast(2, (A, B)), '$a at @b', '$a in (@b..filesize)',
            '$a in (0..@b + !b)', '#a in (0..@b)', '$a in (@b..@b + 5)',
            'for any i in (0..3) : ($a in (@b[i]..filesize))')
        self._assert_needs(
            A, '$a at #b', '$a in (0..#b)', '$a at uint8(@a)')
        self._assert_needs(
            necessary.AtLeast(2, (A, necessary.AtLeast(1, (D1, D2)))),
            '$a and any of ($d*)', '$a and ($d1 or $d2)')
        self._assert_needs(
            necessary.AtLeast(1, (necessary.AtLeast(2, (D1, A)),
                                  necessary.AtLeast(2, (D2, A)))),
            'for any of ($d*) : ($ and $a)')

    def test_a_string_that_is_given_twice_counts_twice(self):
        self._assert_needs(necessary.AtLeast(2, (A, A, B)),
                           '2 of ($a, $a, $b)')
        self.assertTrue(necessary.holds(formula('2 of ($a, $a, $b)'), {A}))

    def test_never(self):
        self._assert_needs(necessary.NEVER, 'false', '6 of them',
                           '$a and false', 'uint8(0) == 1 and false')
        self.assertFalse(necessary.holds(necessary.NEVER, {A, B}))
        self.assertGreater(necessary.fewest(necessary.NEVER), 5)

    def test_anonymous_strings(self):
        self._assert_needs(
            necessary.AtLeast(2, (A, B)), 'all of them',
            'for all of them : ($ at 0)', strings='$ = "aaaa" $ = "bbbb"')

    def test_fixed_bytes(self):
        for offset, value, condition in (
                (0, b'MZ', 'uint16(0) == 0x5A4D'),
                (0, b'MZ', '0x5A4D == uint16(0)'),
                (0, b'MZ', 'uint16be(0) == 0x4D5A'),
                (8, b'\xfb\xff\xff\xff', 'int32(8) == -5'),
                (3, b'\xff', 'uint8(3) == 255')):
            self._assert_needs(necessary.Fixed(offset, value), condition)
        self._assert_needs(
            necessary.ALWAYS, 'uint8(0) == 256', 'uint8(0) > 1',
            'uint16(filesize - 2) == 5', 'uint16(100000) == 5',
            'uint8(-1) == 5', 'uint8(0) == #a')

    def test_modules(self):
        self._assert_needs(
            MZ, 'pe.number_of_sections > 1', 'pe.is_dll()',
            'pe.exports("x")', 'pe.machine != pe.MACHINE_I386',
            'for any s in pe.sections : (s.name == "x")',
            'pe.sections[0].name contains "x"',
            'pe.version_info["x"] == "y"',
            'pe.imphash() == "x"')
        self._assert_needs(necessary.ALWAYS, 'pe.MACHINE_I386 == 0x14c',
                           'not pe.is_dll()', 'defined pe.machine')
        self._assert_needs(necessary.AtLeast(2, (MZ, A)),
                           'pe.number_of_sections == #a and $a')

    def test_references(self):
        one = 'rule o { strings: $x = "xxxx" condition: $x } '
        other = necessary.String('o', 0)
        self._assert_needs(necessary.AtLeast(2, (other, A)), 'o and $a',
                           before=one)
        self._assert_needs(other, 'o or false', before=one)
        self._assert_needs(
            necessary.ALWAYS, 'not o', '1 of (o*)', '1 of (o, o*)',
            before=one)
        second = 'rule o2 { strings: $x = "xxxx" condition: $x } '
        self._assert_needs(
            necessary.AtLeast(1, (other, necessary.String('o2', 0))),
            'any of (o, o2)', before=one + second)

    def test_loop_variable_hides_a_rule(self):
        reader = necessary._Reader(
            syntax.parse('rule o { condition: false } '
                         'rule r { condition: o }', 'x').rules[1],
            {'o': necessary.NEVER})
        self.assertEqual(necessary.NEVER, reader._reference('o'))
        reader._variables.append('o')
        self.assertEqual(necessary.ALWAYS, reader._reference('o'))

    def test_global_rules(self):
        source = syntax.parse(
            'rule first { strings: $x = "xxxx" condition: $x } '
            'global rule g { strings: $y = "yyyy" condition: $y } '
            'rule r { strings: $z = "zzzz" condition: $z }', 'x')
        found = necessary.formulas(source)
        everywhere = necessary.String('g', 0)
        self.assertEqual(everywhere, found['g'])
        for name in ('first', 'r'):
            self.assertEqual(necessary.AtLeast(
                2, (everywhere, necessary.String(name, 0))), found[name])

    def test_what_is_not_parsed_needs_nothing(self):
        source = syntax.parse(
            'rule r { strings: $a = "aaaa" condition: '
            + '(' * 150 + '$a' + ')' * 150 + ' }', 'x')
        self.assertTrue(source.rules[0].unparsed)
        self.assertEqual({'r': necessary.ALWAYS}, necessary.formulas(source))

    def test_long_chains(self):
        self._assert_needs(A, ' and '.join(['$a'] * 1500),
                           ' or '.join(['$a'] * 1500))

    def test_references_that_multiply(self):
        before = 'rule r0 { strings: $x = "x" $y = "y" condition: any of them}'
        for number in range(1, 30):
            last = f'r{number - 1}'
            before += (f' rule r{number} {{ condition: {last} and for any i '
                       f'in (1..2) : ({last}) or ({last} and filesize > i) '
                       f'and for any j in (1..2) : ({last}) }}')
        self.assertLessEqual(
            len(necessary.leaves(formula('r29', before=before))), 2)

    def test_assuming(self):
        whole = formula('2 of them and ($a or $b)')
        self.assertEqual(necessary.AtLeast(1, (B, C, D1, D2)),
                         necessary.assuming(whole, {A}))
        self.assertEqual(necessary.ALWAYS,
                         necessary.assuming(whole, {A, C}))
        self.assertEqual([A, B, C, D1, D2], necessary.leaves(whole))

    def test_apart(self):
        for condition, known, expected in (
                ('$a and $b', {C}, necessary.AtLeast(2, (A, B))),
                ('$a and $b', {A}, B),
                ('($a or $b) and $c', {A}, C),
                ('pe.is_dll() or ($a and $b)', {MZ},
                 necessary.AtLeast(2, (A, B))),
                ('$c or 2 of ($d*)', {C}, necessary.AtLeast(2, (D1, D2))),
                ('2 of ($a, $b, $c)', {A, B}, C),
                ('$a or $b', {A, B}, necessary.ALWAYS),
                ('$a and $b', {A, B}, necessary.ALWAYS),
                ('true', set(), necessary.ALWAYS)):
            self.assertEqual(
                expected, necessary.apart(formula(condition), known),
                condition)

    def test_fewest(self):
        for count, condition in (
                (0, 'true'), (1, 'any of them'), (5, 'all of them'),
                (3, '3 of them'), (2, '$a and ($b or $c)'),
                (1, '$a or ($b and $c)'), (1, '($a or $b) and ($a or $c)'),
                (2, '2 of them and ($a or $b)')):
            self.assertEqual(count, necessary.fewest(formula(condition)),
                             condition)

    def test_joins(self):
        for condition in ('all of them', '2 of them', '$a and $b',
                          '$a or ($b and $c)', '$a or 2 of ($d*)'):
            self.assertTrue(necessary.joins(formula(condition)), condition)
        for condition in ('any of them', '$a or $b', 'true', '$a', '6 of them',
                          '$a or false'):
            self.assertFalse(necessary.joins(formula(condition)), condition)
