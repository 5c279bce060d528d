# SPDX-License-Identifier: Apache-2.0

import base64
import re

import yara

from tests.unit import base
from virtav_nova.rules import patterns
from virtav_nova.rules import syntax


def options(definition):
    """Find by what a string is noticed."""
    source = syntax.parse(
        f'rule r {{ strings: $a = {definition} condition: $a }}', 'x')
    rule = source.rules[0]
    assert not rule.unparsed, rule.unparsed
    return patterns.options(rule.strings[0])


def is_noticed(option, data):
    """Tell whether one of some expressions is in data."""
    for expression in option:
        where = (patterns.differences(data) if expression.differs else data)
        if re.search(expression.text.encode(), where,
                     re.DOTALL | re.IGNORECASE * expression.caseless):
            return True
    return False


class PatternsTest(base.TestCase):

    def _assert_noticed(self, definition, *texts):
        """Whatever libyara finds is noticed in each way."""
        rules = yara.compile(
            source=f'rule r {{ strings: $a = {definition} condition: $a }}')
        found = options(definition)
        self.assertTrue(found, definition)
        for text in texts:
            for data in (text, b'..' + text + b'..', b'\0' + text + b'\xff'):
                if not rules.match(data=data):
                    continue
                for option in found:
                    self.assertTrue(is_noticed(option, data),
                                    (definition, data, option))
        self.assertTrue(any(rules.match(data=text) for text in texts),
                        (definition, texts))
        for option in found:
            self.assertFalse(is_noticed(option, bytes(100)))
        return found

    def test_text(self):
        found = self._assert_noticed('"some text to find"',
                                     b'some text to find')
        (expression,), *_more = found
        self.assertTrue(expression.literal)
        self.assertEqual(patterns.PIECE_MAX, len(expression.text) // 4)
        self._assert_noticed(r'"a\x00b\"\\c\tdefg"', b'a\0b"\\c\tdefg')

    def test_wide_and_nocase(self):
        wide = b's\0o\0m\0e\0 \0o\0n\0e\0'
        self._assert_noticed('"some one" wide', wide)
        found = self._assert_noticed('"some one" ascii wide', wide,
                                     b'some one')
        self.assertTrue(all(len(option) == 2 for option in found))
        self._assert_noticed('"Some One" nocase', b'sOME oNE')
        self._assert_noticed('"Some One" nocase wide', wide.upper())
        self._assert_noticed('"some one" fullword', b'some one')

    def test_xor(self):
        text = b'some text to find'
        for keys, definition in (
                (range(256), 'xor'), (range(5, 10), 'xor(5-9)'),
                ((0x20,), 'xor(0x20)')):
            found = self._assert_noticed(
                f'"some text to find" {definition}',
                *(bytes(byte ^ key for byte in text) for key in keys))
            self.assertTrue(all(len(option) == 1 for option in found))
        wide = b''.join(bytes((byte, 0)) for byte in text)
        self._assert_noticed(
            '"some text to find" xor wide',
            *(bytes(byte ^ key for byte in wide) for key in (0, 1, 255)))

    def test_base64(self):
        text = b'some text to find'
        coded = [base64.b64encode(b'x' * count + text + b'y' * more)
                 for count in range(4) for more in range(4)]
        self._assert_noticed('"some text to find" base64', *coded)
        self._assert_noticed(
            '"some text to find" base64wide',
            *(b''.join(bytes((byte, 0)) for byte in each)
              for each in coded))
        alphabet = ('ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba'
                    '0123456789+/')
        table = bytes.maketrans(
            b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
            b'+/', alphabet.encode())
        self._assert_noticed(f'"some text to find" base64("{alphabet}")',
                             *(each.translate(table) for each in coded))

    def test_hex(self):
        self._assert_noticed('{ 11 22 33 44 55 66 }', b'\x11"3DUf')
        self._assert_noticed('{ 11 2? ?3 ~44 ~5? 66 77 88 }',
                             b'\x11\x2f\xf3\x45\x66fw\x88')
        self._assert_noticed('{ 11 22 33 [2-4] 44 55 [-] 66 77 }',
                             b'\x11"3...DU.....fw', b'\x11"3..DUfw')
        self._assert_noticed('{ 11 22 ( 33 | 44 ) 55 66 77 }',
                             b'\x11"3Ufw', b'\x11"DUfw')
        self._assert_noticed(
            '{ ( 11 22 33 44 55 | 66 77 [2-3] 88 99 aa bb ) ?? }',
            b'\x11"3DU.', b'fw..\x88\x99\xaa\xbb.')
        self._assert_noticed('{ 11 22 /* 33 */ 44 55 // 66\n 77 88 }',
                             b'\x11"DUw\x88')

    def test_regex(self):
        for definition, *texts in (
                ('/some (text|words) to find/', b'some text to find',
                 b'some words to find'),
                ('/SOME text/i', b'some TEXT'),
                ('/^some text$/', b'some text'),
                (r'/\bsome\b text\B/ nocase', b'SOME TEXTx'),
                ('/some.text/', b'some text', b'some\ntext'),
                ('/some.text/s', b'some\ntext'),
                ('/some{2}x*t+ex{1,3}t{,2}q?u/', b'someetexxttqu',
                 b'someexxttexu'),
                ('/some{x te{xt/', b'some{x te{xt'),
                (r'/some\/text\.\x41\tz/', b'some/text.A\tz'),
                ('/[]x]some[^]x]text/', b']some.text'),
                (r'/some[\w-]text[\w\.-]more/', b'some-text.more',
                 b'someatextwmore'),
                (r'/some[\w-z]text/', b'someytext', b'someatext',
                 b'some-text'),
                ('/some(a|b|)text/', b'sometext', b'someatext'),
                ('/(some text){2}/ wide',
                 b''.join(bytes((byte, 0)) for byte in b'some text' * 2)),
                (r'/some\Dtext\W\Sx\s/ wide ascii', b'some.text.ax ',
                 b''.join(bytes((byte, 0)) for byte in b'some.text.ax '))):
            self._assert_noticed(definition, *texts)

    def test_too_little_to_notice(self):
        for definition in ('"ab"', '{ 00 ?? 00 }', '/[0-9]+/', '/.*/',
                           '{ 00 00 00 00 00 00 }', '/a*b*c*d*/'):
            self.assertEqual([], options(definition), definition)

    def test_what_is_not_understood(self):
        # libyara and others do not agree what these are.
        for definition in (r'/some[^\w-x]text words/',
                           '"some text to find" base64 wide'):
            self.assertEqual([], options(definition), definition)
        deep = '(' * 90 + 'some text' + ')' * 90
        self.assertEqual([], options(f'/{deep}/'))

    def test_prefers_what_is_rare_in_code(self):
        (expression,), *_more = options(
            '{ 48 8B 05 00 00 00 00 00 00 00 00 00 00 E7 A9 B3 D6 F2 }')
        self.assertIn(r'\xe7\xa9\xb3\xd6\xf2', expression.text)

    def test_several_choices(self):
        found = options('"a long text of which there are several pieces"')
        self.assertLess(2, len(found))
        texts = [option[0].text for option in found]
        self.assertEqual(len(texts), len(set(texts)))

    def test_fixed(self):
        expression = patterns.at(3, b'a.')
        self.assertTrue(is_noticed((expression,), b'xxxa.'))
        self.assertFalse(is_noticed((expression,), b'xxa.xxxxxa.'))
        self.assertFalse(is_noticed((expression,), b'xxxab'))

    def test_differences(self):
        self.assertEqual(b'', patterns.differences(b''))
        self.assertEqual(b'\3\1\3', patterns.differences(b'\1\2\3'))
        self.assertEqual(bytes(4095) + b'a',
                         patterns.differences(memoryview(b'a' * 4096)))
