# SPDX-License-Identifier: Apache-2.0

import json
import unittest

from virtav_nova.rules import lint
from virtav_nova.rules import syntax


def examined(condition, strings='$a = "alphaalpha" $b = "bravobravo"'):
    source = syntax.parse(
        f'import "pe" rule Tested {{ strings: {strings} condition: '
        f'{condition} }}', 'test.yar')
    return lint.examine(source, source.rules[-1])


def kinds(string):
    return sorted({each.kind for each in examined(
        '$s', f'$s = {string}').warnings})


class VerdictTest(unittest.TestCase):

    def test_as_written(self):
        for condition in ('all of them', 'filesize < 1MB and any of them',
                          'any of them or pe.is_pe',
                          'any of them and not (pe.is_pe and $a)'):
            found = examined(condition)
            self.assertEqual((lint.AS_WRITTEN, ''), found[2:4], condition)

    def test_after_dropping(self):
        for condition in ('uint16(0) == 0x5a4d and all of them',
                          'filesize > 1MB and any of them',
                          'pe.is_pe and any of them', '$a at 0 and $b',
                          'extension == ".exe" and any of them'):
            found = examined(condition)
            self.assertEqual((lint.DROPPED, ''), found[2:4], condition)
            self.assertTrue(found.dropped)

    def test_never(self):
        for why, condition, strings in (
                ('no string', 'pe.is_pe and not any of them', None),
                ('contradict', '$a and $b and not $a', None),
                ('longer than a page', '$l', '$l = { 41 [5000] 42 43 }'),
                ('pages together', 'all of them',
                 '$a = { 41 42 43 [3000] 44 45 46 } '
                 '$b = { 51 52 53 [3000] 54 55 56 }')):
            found = examined(condition, *([strings] if strings else []))
            self.assertEqual(lint.NEVER, found.verdict)
            self.assertRegex(found.why, why)

    def test_unknown(self):
        found = examined('nothing.here and any of them')
        self.assertEqual(lint.UNKNOWN, found.verdict)
        self.assertIn('nothing', found.why)

    def test_what_it_asks_for(self):
        found = examined('all of them')
        self.assertEqual((2, 28), (found.strings, found.size))


class WarningTest(unittest.TestCase):

    def test_kinds(self):
        for expected, string in (
                ([], '"long enough"'), ([], '{ 01 02 03 04 05 06 07 08 }'),
                (['short', 'thin'], '"abc"'),
                ([], '"abcdefghijk" wide'),
                (['short'], '{ 01 02 ?? 03 04 ?? 05 06 ?? 07 08 }'),
                (['short'], '{ 01 02 ( 03 | 04 05 ) 06 07 ~08 09 0A 0B }'),
                ([], '{ ( 01 02 03 04 | 05 06 07 08 09 ) ?? ?? ?? ?? ?? }'),
                (['unbounded'], '{ 01 02 03 04 05 [2-] 06 07 08 }'),
                (['unbounded'], '/abcdefgh.*i/'),
                (['unbounded'], '/abcdefgh[0-9]+/'),
                (['unbounded'], '/abcdefgh\\d{3,}/'),
                ([], '/abcdefgh\\d{3,30}/'),
                ([], '/abcd(efgh|ijkl)/'),
                (['short'], '/(abcdefgh|a).{9}/'),
                (['short'], '/[a-z]{9}ab\\d{3}/'),
                ([], '/a{9}bcd/'),
                (['long'], '{ 01 02 03 04 [600] 05 06 07 08 }')):
            with self.subTest(string):
                # What libyara says is its own affair.
                self.assertEqual(expected, [
                    kind for kind in kinds(string) if kind != 'libyara'])

    def test_libyara_is_asked(self):
        self.assertIn('libyara', kinds('{ 01 ?? 02 ?? 03 ?? 04 ?? 05 }'))

    def test_plain(self):
        found = examined('uint16(0) == 0x5a4d and $a and $b',
                         '$a = "abc" $b = /abcde.*/')
        plain = json.loads(json.dumps(found.plain()))
        self.assertEqual('dropped', plain['verdict'])
        self.assertEqual('uint16(0) == 0x5a4d', plain['dropped'][0]['text'])
        self.assertEqual({'short', 'unbounded'}, {
            each['kind'] for each in plain['warnings']} - {'libyara'})
