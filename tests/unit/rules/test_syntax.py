# SPDX-License-Identifier: Apache-2.0

import gc
import os
import pathlib
import subprocess
import sys
import unittest

import yara
import yaramod

from tests.unit import base
from virtav_nova import exception
from virtav_nova.rules import syntax

TWO = '''
import "pe"
import "math"
// rule Commented { condition: true }
private global rule Small : a b
{
    meta:
        author = "A. N. Author" /* rule X { */
        score = 75
        tested = true
        negative = -3
    condition: filesize < 1MB
}
rule Second {
    strings:
        $text = "a // \\"b\\" }" wide xor(1-3) // not this }
        $ = { 4D 5A /* } */ ?? [2-4] // }
              ( 90 | 91 92 ) }
        $re = /a\\/[^"]b{2}/i fullword
    condition:
        Small and $text at pe.entry_point or any of ($*)
}
'''

NESTED = '''
import sys
from virtav_nova.rules import carrier
from virtav_nova.rules import lint
from virtav_nova.rules import page_form
from virtav_nova.rules import syntax
number = int(sys.argv[1])
for kind, (strings, condition) in {
    'parentheses': ('', '(' * number + 'true' + ')' * number),
    'not': ('', 'not ' * number + 'true'),
    'minus': ('', '-' * number + '1 == 1'),
    'and': ('', ' and '.join(['$a'] * number)),
    'or': ('', ' or '.join(['uint8(0) == 1'] * number) + ' or $a'),
    'sum': ('', '+'.join(['#a'] * number) + '== 1 and $a'),
    'groups': ('$r = /' + '(' * number + 'a' + ')' * number + '/', '$r'),
    'alternatives': ('$r = /a' + '|a' * number + '/', '$r'),
    'repeats': ('$r = /' + 'a*' * number + 'b/', '$r'),
    'hex': ('$r = { 41 ' + '( 42 ' * number + ')' * number + ' }', '$r'),
}.items():
    text = 'rule R { strings: $a = "abcdef" %s condition: %s }' % (
        strings, condition)
    source = syntax.parse(text, 'nested')
    rule = source.rules[0]
    page_form.rewrite(source, rule)
    lint.examine(source, rule)
    carrier.demand(source, rule)
    if rule.condition is not None:
        rule.condition.text
    print(kind, rule.unparsed or 'parsed', flush=True)
'''


def parse(text, name='test.yar'):
    return syntax.parse(text, name)


def only(text):
    return parse(text).rules[0]


class ParseTest(base.TestCase):

    def _assert_refused(self, message, text):
        with self.assertRaisesRegex(
                exception.RuleError, message) as caught:
            parse(text)
        self.assertTrue(caught.exception.way_out)

    def test_rules_of_a_file(self):
        source = parse(TWO)
        self.assertEqual(('pe', 'math'), source.imports)
        small, second = source.rules
        self.assertEqual(
            ('Small', 5, True, True, ('a', 'b'), (), ()),
            (small.name, small.line, small.is_private, small.is_global,
             small.tags, small.modules, small.references))
        self.assertEqual(
            {'author': 'A. N. Author', 'score': 75, 'tested': True,
             'negative': -3}, small.metas)
        self.assertEqual('filesize < 1MB', small.condition_text)
        self.assertEqual(
            ('Second', False, False, (), ('pe',), ('Small',)),
            (second.name, second.is_private, second.is_global, second.tags,
             second.modules, second.references))
        self.assertEqual(['$text', '$', '$re'], [
            string.identifier for string in second.strings])
        self.assertEqual(
            ['$text', '$', '$re'],
            [each.identifier for each in second.definitions])
        self.assertEqual('"a // \\"b\\" }" wide xor ( 1 - 3 )',
                         second.definitions[0].text)
        self.assertTrue(second.text.startswith('rule Second {'))
        self.assertTrue(second.text.endswith('}'))
        self.assertIsInstance(second.condition, yaramod.OrExpression)
        self.assertFalse(small.unparsed + second.unparsed)

    def test_what_is_cut_out_is_what_stood_there(self):
        source = parse(TWO)
        # Put together again they compile, and so does each alone.
        yara.compile(source='import "pe"' + '\n'.join(
            rule.text for rule in source.rules))
        for rule in source.rules:
            yara.compile(source=source.standalone(rule))

    def test_standalone_matches_by_its_own_rule_alone(self):
        source = parse('''
            rule Global { strings: $a = "aaa" condition: $a }
            global rule Always { condition: filesize > 3 }
            rule Unrelated { condition: true }
            rule Last { condition: any of (Glo*) }''')
        last = source.by_name['Last']
        self.assertEqual(['Global', 'Always'], [
            rule.name for rule in source.needed(last)])
        rules = yara.compile(source=source.standalone(last))
        self.assertEqual(['Last'], [
            match.rule for match in rules.match(data='aaab')])
        self.assertEqual([], rules.match(data='aaa'))
        self.assertEqual([], rules.match(data='bbbb'))

    def test_include_is_refused(self):
        self._assert_refused(
            r'test\.yar:2: include is refused',
            '\n include "/etc/hostname"\nrule A { condition: true }')

    def test_a_hidden_include_reaches_no_parser(self):
        secret = self.write('secret', 'rule Secret { condition: true }')
        for hidden in (
                f'rule A {{ condition: true }} /**/include/**/"{secret}"',
                f'rule A {{ condition: true include "{secret}" }}',
                f'rule A {{ strings: $a = /x include "{secret}/ '
                'condition: $a }',
                f'rule A {{ meta: a = "x" include "{secret}" '
                'condition: true }'):
            with self.subTest(hidden):
                try:
                    [rule] = parse(hidden).rules
                except exception.RuleError:
                    continue
                self.assertTrue(rule.unparsed)

    def test_a_comment_is_not_read(self):
        rule = only('rule A { condition: /* include "x" */ true }')
        self.assertFalse(rule.unparsed)

    def test_what_is_no_list_of_rules(self):
        for line, text in (
                (1, 'junk'), (1, 'rule'), (1, 'rule 1'), (2, '\nrule A'),
                (1, 'rule A {'), (1, 'rule A { strings: $a = "x'),
                (2, 'rule A {\n strings: $a = /x\n'), (1, 'rule A { /* }'),
                (1, 'private'), (1, 'import pe'), (1, 'rule A { x: }'),
                (1, 'rule A { strings: $a = { 41 '), (1, 'rule A }'),
                (1, 'rule A : b : c { condition: true }'),
                (1, 'YARA\x17\x01'),
                (3, 'rule A { condition: true }\n\nrule A { condition: '
                    'true }')):
            with self.subTest(text):
                self._assert_refused(rf'^test\.yar:{line}: ', text)

    def test_odd_characters(self):
        self._assert_refused(r'test\.yar:2: holds a NUL', '\n\0')
        self._assert_refused(r'test\.yar:3: not UTF-8', '\n\n\udcff')
        self.assertEqual('A', only('\ufeffrule A { condition: true }').name)
        rule = only('rule A { strings: $a = "é" condition: $a }')
        self.assertEqual('é'.encode(), rule.strings[0].pure_text)

    def test_one_bad_rule_does_not_spoil_the_others(self):
        source = parse('rule A { condition: true }\n'
                       'rule B {\n condition:\n nothing.here }\n'
                       'rule C { condition: A }')
        first, bad, last = source.rules
        self.assertEqual("line 4: Unrecognized identifier 'nothing' "
                         'referenced', bad.unparsed)
        self.assertIsNone(bad.condition)
        self.assertEqual((), bad.strings)
        self.assertFalse(first.unparsed + last.unparsed)

    def test_external_variables(self):
        for condition, names in (
                ('filename matches /x/', ('filename',)),
                ('extension == ".exe" and level > 3',
                 ('extension', 'level')),
                ('is_exe and not count == 2', ('is_exe', 'count'))):
            with self.subTest(condition):
                rule = only('rule A { meta: a = "b" strings: $a = "xyz" '
                            f'condition: $a and {condition} }}')
                self.assertEqual((names, ''), (rule.externals,
                                               rule.unparsed))

    def test_numbers_by_words(self):
        rule = only('import "math" rule A { strings: $a = "xyz" condition: '
                    'for any i in (0..math.min(1, #a)) : (@a[i] > 1) }')
        self.assertEqual((('math',), ''), (rule.modules, rule.unparsed))

    def test_nothing_dangles(self):
        for number in range(200):
            rule = only('rule A { strings: $a = /a+%d/ condition: $a and '
                        '#a > 2 }' % number)
            gc.collect()
            parse(TWO)
            self.assertEqual('a+%d' % number, rule.strings[0].unit.text)
            self.assertEqual('$a', rule.condition.left_operand.text)


class NestingTest(unittest.TestCase):
    """What a parser that recurses does not survive, in a process apart."""

    def _assert_survived(self, number, what):
        found = subprocess.run(
            (sys.executable, '-c', NESTED, str(number)), text=True,
            capture_output=True, timeout=300,
            cwd=pathlib.Path(syntax.__file__).parents[2],
            env={**os.environ, 'PYTHONPATH': '.'})
        self.assertEqual((0, ''), (found.returncode, found.stderr),
                         found.stdout)
        self.assertEqual(10, len(found.stdout.splitlines()))
        for line in found.stdout.splitlines():
            self.assertRegex(line, what)

    def test_a_little(self):
        self._assert_survived(90, 'parsed')

    def test_more(self):
        self._assert_survived(950, 'parsed|more than')

    def test_far_too_much(self):
        self._assert_survived(100_000, 'more than')


class HelpersTest(unittest.TestCase):

    def test_integers_are_those_of_libyara(self):
        for text, value in (('1KB', 1024), ('2MB', 2 << 20), ('0x10', 16),
                            ('0o17', 15), ('12', 12), ('007', 7)):
            rule = only('rule A { condition: filesize == %s }' % text)
            self.assertEqual(
                value, syntax.integer(rule.condition.right_operand))
            yara.compile(source='rule A { condition: %s == %d }' % (
                text, value)).match(data=b'')[0]

    def test_operands_of_a_long_chain(self):
        rule = only('rule A { strings: $a = "xyz" condition: %s }'
                    % ' or '.join(['#a == %d' % number
                                   for number in range(700)]))
        self.assertEqual(
            ['#a == %d' % number for number in range(700)],
            [each.text for each in syntax.operands(rule.condition)])

    def test_members(self):
        for text, expected in (
                ('them', [0, 1, 2, 3]), ('($a*)', [0, 1]), ('($*)',
                [0, 1, 2, 3]), ('($b, $a1)', [2, 0]), ('($a1, $a*)',
                [0, 0, 1])):
            rule = only('rule A { strings: $a1 = "111" $a2 = "222" '
                        '$b = "333" $ = "444" condition: any of %s }' % text)
            self.assertEqual(expected, syntax.members(
                rule, rule.condition.iterable), text)
        rule = parse('rule A { condition: true } rule B { condition: '
                     'any of (A) }').rules[1]
        self.assertIsNone(syntax.members(rule, rule.condition.iterable)
                          if isinstance(rule.condition,
                                        yaramod.OfExpression) else None)

    def test_quorum(self):
        strings = ' '.join('$%d = "%dxyz"' % (number, number)
                           for number in range(3))
        data = ['0xyz 1xyz 2xyz'[:5 * number] for number in range(4)]
        for text in ('all', 'any', 'none', '1', '2', '50%', '34%', '67%',
                     '66%', '100%', '1%'):
            rule = only('rule A { strings: %s condition: %s of them }' % (
                strings, text))
            least = syntax.quorum(rule.condition.variable, 3)
            compiled = yara.compile(source=rule.text)
            for number in range(4):
                expected = number >= least if least else not number
                self.assertEqual(
                    expected, bool(compiled.match(data=data[number])),
                    (text, number))
        rule = only('rule A { strings: %s condition: #0 of them }' % strings)
        self.assertIsNone(syntax.quorum(rule.condition.variable, 3))

    def test_hex_units(self):
        rule = only('rule A { strings: $a = { 4? ?A ~00 ~4? [4] 01 [1-] '
                    '( 01 | 02 [2-3] ( 03 | ?? ) ) 1122 /* } */ } '
                    'condition: $a }')
        byte, jump = syntax.HexByte, syntax.HexJump
        self.assertEqual((
            byte(0x40, 0xf0, False), byte(0x0a, 0x0f, False),
            byte(0, 0xff, True), byte(0x40, 0xf0, True), jump(4, 4),
            byte(1, 0xff, False), jump(1, None),
            syntax.HexChoice((
                (byte(1, 0xff, False),),
                (byte(2, 0xff, False), jump(2, 3), syntax.HexChoice((
                    (byte(3, 0xff, False),), (byte(0, 0, False),)))))),
            byte(0x11, 0xff, False), byte(0x22, 0xff, False)),
            syntax.hex_units(rule.strings[0]))

    def test_modifiers(self):
        alphabet = ''.join(chr(33 + number) for number in range(64)
                           ).replace('"', '~').replace('\\', '}')
        for text, changed in (
                ('"abcd"', {}), ('"abcd" wide', {'ascii': False,
                                                 'wide': True}),
                ('"abcd" wide ascii', {'wide': True}),
                ('"abcd" xor', {'xor': (0, 255)}),
                ('"abcd" xor(3)', {'xor': (3, 3)}),
                ('"abcd" xor(0x01-0x10)', {'xor': (1, 16)}),
                ('"abcd" nocase fullword', {'nocase': True,
                                            'fullword': True}),
                ('/abcd/is', {'nocase': True, 'dotall': True}),
                ('"abcd" base64', {'base64': syntax.BASE64}),
                ('"abcd" base64wide', {'base64wide': syntax.BASE64}),
                ('"abcd" base64("%s")' % alphabet,
                 {'base64': alphabet.encode()})):
            with self.subTest(text):
                rule = only('rule A { strings: $a = %s condition: $a }'
                            % text)
                plain = syntax.Modifiers(
                    True, False, False, False, False, None, None, None)
                self.assertEqual(plain._replace(**changed),
                                 syntax.modifiers(rule.strings[0]))
