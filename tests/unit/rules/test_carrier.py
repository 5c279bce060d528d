# SPDX-License-Identifier: Apache-2.0

import os
import pathlib
import unittest

import yara

from virtav_nova import exception
from virtav_nova.rules import carrier
from virtav_nova.rules import directory
from virtav_nova.rules import page_form
from virtav_nova.rules import syntax

#: A directory of public rules, to see how many get a page.
RULES = os.environ.get('VIRTAV_RULES_DIR')

STRINGS = '''
    $a = "alphaalpha" $b = "bravo" fullword $c = { C0 FF EE ?? 11 }
    $d = "delta" wide nocase'''


def source_of(condition, strings=STRINGS, before=''):
    return syntax.parse(
        f'import "pe" {before} rule Tested {{ strings: {strings} '
        f'condition: {condition} }}', 'test.yar')


def matches(source, data):
    rules = yara.compile(source=source.standalone(source.rules[-1]))
    return any(match.rule == 'Tested' for match in rules.match(data=data))


def used(condition):
    """:returns: the condition, and so that every string is used."""
    return f'({condition}) and (any of them or true)'


class CarrierTest(unittest.TestCase):

    def _make(self, condition, strings=STRINGS, before=''):
        source = source_of(condition, strings, before)
        made = carrier.make(source, source.rules[-1])
        self.assertEqual('', made.why, (condition, strings))
        self.assertEqual(carrier.PAGE, len(made.page))
        self.assertTrue(matches(source, made.page))
        self.assertEqual(carrier.RET, made.page[made.entry])
        for string in made.strings:
            self.assertFalse(
                string.offset <= made.entry < string.offset + string.length)
        return made

    def _assert_none(self, why, condition, strings=STRINGS):
        source = source_of(condition, strings)
        made = carrier.make(source, source.rules[-1])
        self.assertEqual(b'', made.page)
        self.assertRegex(made.why, why)

    def test_strings(self):
        for string in (
                '"plain"', '"wide" wide', '"wide" wide ascii',
                '"case" nocase', '"word" fullword', '"word" wide fullword',
                '"keyed" xor', '"keyed" xor(5)', '"keyed" xor(0x80-0x90)',
                '"keyed" xor(7) wide', '"coded text" base64',
                '"coded text" base64wide', '"coded" wide base64',
                '"coded text" base64("!@#$%^&*(){}[].,|ABCDEFGHIJ\\x09LMNOPQR'
                'STUVWXYZabcdefghijklmnopqrstu")',
                '"quote \\" \\\\ \\x00 \\t é"',
                '{ 01 02 ?? 4? ?A ~00 ~4? 05 06 }',
                '{ 01 02 [4] 03 04 [1-300] 05 06 [-] 07 08 }',
                '{ 01 02 ( 03 | 04 05 ( 06 | ?? ) ) 07 08 [2-] 09 0A }',
                '/abc[0-9]{3,5}d+e*f?(gh|i)\\/./', '/[^\\n\\x00]{4}xyz/',
                '/\\bword\\b/', '/\\w\\W\\s\\S\\d\\Dabcd/', '/abcd/is',
                '/[a\\]\\-z-]{2}abc/', '/a{2}bcd{0,3}/ wide', '/^start/',
                '/abcdef$/', '/\\x41\\x42\\n\\.\\+/',
                '/(ab|cd)(ef|gh)/ nocase',
                '/url=.{1,20}end/ fullword', '/[A-F0-9]{32}/',
                '/[^a-zA-Z0-9 ]{3}xyz/', '/a[^\\W]bcd/'):
            with self.subTest(string):
                made = self._make('$s', f'$s = {string}')
                self.assertEqual(['$s'], [each.identifier
                                          for each in made.strings])

    def test_conditions(self):
        for condition in (
                'all of them', 'any of them', '2 of them', '50% of them',
                '$a and not $b', '$a and none of ($c, $d)', '#a > 5',
                '#a == 3 and #b == 0', '#c >= 2 and #c < 4', '$a at 100',
                '$a at 0 and $b', '$a in (200..300)',
                '$a in (@b..@b + 100)', '$a at @b + 64', '@a < @b',
                '@b < @a and @a < @c', '@a[2] > @b', '!a == 10 and $b',
                'uint16(0) == 0x5a4d and $a', 'uint32be(8) == 0x01020304',
                'uint16(0) == 0x5a4d and uint32(uint32(0x3c)) == 0x4550 '
                'and $a', 'uint8(@a + 10) == 7', 'filesize < 10KB and $a',
                'filesize == 4096 and $b', 'not filesize > 1MB and $a',
                'for all of ($a, $b) : (# > 2)',
                'for any of them : ($ at 512)',
                'for 2 of them : (@ > 100)',
                'for any i in (1..#a) : (@a[i] > 20)',
                'for all i in (1, 2, 3) : (#a > i)',
                'not ($a or not $b)', 'not none of them',
                '2 of ($a, $b) at 100 or $c', '#a in (0..3000) > 2',
                '$a or pe.is_pe', 'not (pe.is_pe and $b) and $a',
                'true and $a', '#a > #b and $b'):
            with self.subTest(condition):
                self._make(used(condition))

    def test_rules_it_refers_to(self):
        before = ('private rule Helper { strings: $a = "helper" condition: '
                  '$a } global rule Whole { strings: $ = "whole" condition: '
                  'all of them and filesize > 1000 }')
        made = self._make(used('Helper and $a'), before=before)
        self.assertEqual(
            {'$a', 'Helper.$a', 'Whole.$'},
            {each.identifier for each in made.strings})
        self._make(used('any of (Hel*) and $a'), before=before)

    def test_no_page(self):
        for why, condition, strings in (
                ('pe.is_pe', 'pe.is_pe and $a', STRINGS),
                ('filesize', 'filesize > 1MB and $a', STRINGS),
                ('contradict', '$a and not $a', STRINGS),
                ('false', 'false', STRINGS),
                ('fit', '#a > 1000', STRINGS),
                ('longer than a page', '$l', '$l = { 41 [5000] 42 43 }'),
                ('longer than a page', '$l',
                 '$l = /((ab{1000}){1000}c){1000}/'),
                ('allows nothing', '$l', '$l = /abc[^\\x00-\\xff]/'),
                ('cannot be had', '$a at 5000', STRINGS),
                ('nothing', 'nothing.here', STRINGS)):
            with self.subTest(condition=condition, strings=strings):
                self._assert_none(why, f'({condition}) and any of them'
                                  if condition != 'nothing.here'
                                  else condition, strings)

    def test_string_that_libyara_does_not_find(self):
        self._assert_none(
            r'libyara does not find \$l \(1600 bytes\)', '$l',
            '$l = { %s }' % ' '.join(
                '55 8B %02X' % (number & 0x0f) + ' ?? ' * 5
                for number in range(200)))

    def test_many_strings_in_little_time(self):
        strings = ' '.join('$s%d = "%04dxyz"' % (number, number)
                           for number in range(3000))
        self._make('300 of them', strings)

    def test_demand(self):
        for expected, condition in (
                ((1, 9, False), 'any of them'), ((2, 18, False), '2 of them'),
                ((1, 9, True), '$b and uint16(0) == 0x5a4d'),
                ((0, 0, False), 'not $a'), ((1, 9, False), '$b or $a at 0'),
                ((1, 14, True), '$a at 50')):
            source = source_of(used(condition))
            found = carrier.demand(source, source.rules[-1])
            self.assertEqual(expected, found[:3], condition)
        source = source_of('pe.is_pe and any of them')
        self.assertRegex(
            carrier.demand(source, source.rules[-1]).why, 'pe.is_pe')


class SplitTest(unittest.TestCase):

    def test_one_string_a_page(self):
        for condition in ('all of them', '3 of them', '$a and $c',
                          '#a > 1 and #b == 1', '@c < @a and $b'):
            with self.subTest(condition):
                source = source_of(used(condition))
                found = carrier.split(source, source.rules[-1])
                self.assertEqual('', found.why)
                self.assertGreater(len(found.pages), 1)
                whole = b''.join(each.page for each in found.pages)
                self.assertEqual(4096 * len(found.pages), len(whole))
                self.assertTrue(matches(source, whole))
                for each in found.pages:
                    self.assertFalse(matches(source, each.page))
                    self.assertEqual(carrier.RET, each.page[each.entry])

    def test_more_than_a_page_of_strings(self):
        source = source_of('all of them', '$a = { 41 42 43 [3000] 44 45 46 } '
                                          '$b = { 51 52 53 [3000] 54 55 56 }')
        self.assertRegex(
            carrier.make(source, source.rules[-1]).why, 'fit')
        found = carrier.split(source, source.rules[-1])
        self.assertEqual(2, len(found.pages))
        self.assertTrue(matches(
            source, b''.join(each.page for each in found.pages)))

    def test_what_cannot_be_split(self):
        for why, condition in (('one string', '$a'),
                               ('pe.is_pe', 'pe.is_pe and $a'),
                               ('together', '$a at @b + 20')):
            source = source_of(used(condition))
            found = carrier.split(source, source.rules[-1])
            self.assertEqual((), found.pages)
            self.assertRegex(found.why, why)


class StraddleTest(unittest.TestCase):

    def test_half_a_string_on_each_page(self):
        for condition in ('$a', '$d', '2 of ($a, $b, $c)'):
            source = source_of(used(condition))
            made = carrier.make(source, source.rules[-1])
            for number, string in enumerate(made.strings):
                before, after = carrier.straddle(made, number)
                self.assertEqual((4096, 4096), (len(before), len(after)))
                self.assertFalse(matches(source, before))
                self.assertFalse(matches(source, after))
                self.assertTrue(matches(source, before + after))
                # It is within reach of a junction.
                start = string.offset
                text = made.page[start:start + string.length]
                self.assertIn(text, before[-512:] + after[:512])


@unittest.skipUnless(RULES, 'VIRTAV_RULES_DIR is not set')
class PublicRulesTest(unittest.TestCase):

    def test_page_forms_and_carriers(self):
        rules = forms = pages = 0
        for path in sorted(pathlib.Path(RULES).rglob('*')):
            if path.suffix not in directory.SUFFIXES:
                continue
            try:
                source = syntax.parse(
                    path.read_bytes().decode(errors='replace'), path.name)
            except exception.RuleError:
                continue
            for rule in source.rules:
                rules += 1
                form = page_form.rewrite(source, rule)
                if not form.text:
                    continue
                forms += 1
                yara.compile(source=form.text)
                alone = syntax.parse(form.text, path.name)
                pages += bool(carrier.make(alone, alone.rules[0]).page)
        self.assertGreater(rules, 0)
        self.assertGreaterEqual(
            pages, 0.99 * forms, f'{rules} rules, {forms} page forms')
