# SPDX-License-Identifier: Apache-2.0

import yara

from tests.unit import base
from virtav_nova.rules import clamav

# All signatures here are made up.
HELLO = b'hello brave new world'.hex()


class ConvertTest(base.TestCase):

    def _one(self, line, kind='ndb', **options):
        [converted] = clamav.convert([line + '\n'], kind, **options)
        return converted

    def _matches(self, line, data, kind='ndb'):
        converted = self._one(line, kind)
        self.assertTrue(converted.rule, converted.lost)
        rules = yara.compile(source=converted.rule, includes=False,
                             error_on_warning=False)
        return bool(rules.match(data=data))

    def _assert_refused(self, reason, line, kind='ndb'):
        converted = self._one(line, kind)
        self.assertEqual('', converted.rule)
        self.assertIn(reason, '; '.join(converted.lost))

    def test_plain(self):
        converted = self._one(f'Win.Test.Plain-1:0:*:{HELLO}')
        self.assertEqual(('Win.Test.Plain-1', 1, ()), converted[:2] +
                         converted[3:])
        self.assertIn('rule ClamAV_Win_Test_Plain_1\n', converted.rule)
        self.assertIn('clamav = "Win.Test.Plain-1"', converted.rule)
        self.assertTrue(self._matches(
            f'A:0:*:{HELLO}', b'x hello brave new world'))

    def test_what_a_page_does_not_know_is_said(self):
        converted = self._one(f'A:1:EP+0,64:{HELLO}:51:255')
        self.assertEqual(('type of file: PE', 'offset EP+0,64'),
                         converted.lost)
        self.assertIn(
            'clamav_lost = "type of file: PE; offset EP+0,64"',
            converted.rule)

    def test_wildcards(self):
        for body, good, bad in (
                ('6162??6364', b'abxcd', b'abcd'),
                ('6162*6364', b'ab' + bytes(5000) + b'cd', b'cdab'),
                ('6162{2}6364', b'abxxcd', b'abxcd'),
                ('6162{-2}6364', b'abxcd', b'abxxxcd'),
                ('6162{2-}6364', b'abxxxcd', b'abxcd'),
                ('6162{1-2}6364', b'abxcd', b'abcd'),
                ('6162{1}{1-2}{1}6364', b'abxxxcd', b'abxxcd'),
                ('61624?4?636465', b'abCDcde', b'ab11cde'),
                ('6162?1?26364', b'abA2cd', b'abAAcd'),
                ('6162(3131|3232|33)6364', b'ab22cd', b'ab44cd'),
                ('6162(31(32|33)|34)6364', b'ab13cd', b'ab1cd'),
                ('6162!(31)6364', b'ab2cd', b'ab1cd'),
                ('6162!(31|32)6364', b'ab3cd', b'abcd'),
                ('61[2-4]62636465', b'axxbcde', b'axbcde'),
                ('??{4}6162??', b'ab', b'ac')):
            with self.subTest(body):
                line = f'A:0:*:{body}'
                self.assertTrue(self._matches(line, good))
                self.assertFalse(self._matches(line, bad))

    def test_logic(self):
        bodies = ';'.join(text.encode().hex() for text in (
            'one!', 'two!', 'three!'))
        for logic, good, bad in (
                ('0', 'one!', 'two!'),
                ('0&1', 'one!two!', 'one!'),
                ('0|1', 'two!', 'three!'),
                ('(0&1)|2', 'three!', 'one!'),
                ('0&1=0', 'one!', 'one!two!'),
                ('0>1', 'one!one!', 'one!'),
                ('0=2', 'one!one!', 'one!one!one!'),
                ('0&1<2', 'one!two!', 'one!two!two!'),
                ('(0|1|2)>2', 'one!one!two!', 'one!two!'),
                ('(0|1|2)>2,2', 'one!one!two!', 'one!one!one!one!'),
                ('(0|1|2)>0', 'two!', 'four!'),
                ('((0|1)=0)&2', 'three!', 'three!two!')):
            with self.subTest(logic):
                line = f'A;Target:0;{logic};{bodies}'
                self.assertTrue(self._matches(line, good, 'ldb'))
                self.assertFalse(self._matches(line, bad, 'ldb'))

    def test_forms_of_subsignatures(self):
        for body, data in (
                ('EP+0:' + HELLO, b'hello brave new world'),
                ('0,100:' + HELLO, b'hello brave new world'),
                (HELLO + '::i', b'HELLO brave NEW world'),
                (b'wide text'.hex() + '::w', 'wide text'.encode('utf-16-le')),
                (b'wide'.hex() + '::iw', 'WIDE'.encode('utf-16-le')),
                (b'a b\x01'.hex() + '::i', b'A B\x01'),
                (b'a"b\\c'.hex() + '::iw', 'A"B\\C'.encode('utf-16-le')),
                (HELLO + '::aw', b'hello brave new world'),
                (HELLO + '::f', b'hello brave new world')):
            with self.subTest(body):
                self.assertTrue(self._matches(
                    f'A;Engine:51-255,Target:1;0;{body}', data, 'ldb'))

    def test_bounds_of_words(self):
        for body, what in ((HELLO, ()), (
                HELLO + '00', ('subsignature 0: bounds of the word',))):
            line = f'A;Target:0;0;{body}::f'
            self.assertEqual(what, self._one(line, 'ldb').lost)
        self.assertFalse(self._matches(
            f'A;Target:0;0;{HELLO}::f', b'hello brave new worlds', 'ldb'))

    def test_what_is_lost_of_a_logical_signature(self):
        converted = self._one(
            'A;Engine:81-255,Target:1,FileSize:10-20;0&1&2&3;'
            f'S0+4:{HELLO};0/h.llo/i;0(>>26#ib2#>512);${{6-7}}12$', 'ldb')
        self.assertEqual(
            ('FileSize:10-20', 'type of file: PE',
             'subsignature 0: offset S0+4',
             'subsignature 1: regular expression (PCRE)',
             'subsignature 2: compares bytes or images',
             'subsignature 3: macro'), converted.lost)
        self.assertIn('condition:\n        $s0\n', converted.rule)

    def test_a_count_of_what_is_not_known(self):
        converted = self._one(
            f'A;Target:0;0&((1|2)>3);{HELLO};{HELLO};0/x/', 'ldb')
        self.assertIn('number of matches: >3', converted.lost)
        self.assertIn('condition:\n        $s0\n', converted.rule)

    def test_refused(self):
        for reason, line in (
                ('HTML, which are not executed', f'A:3:*:{HELLO}'),
                ('type 77', f'A:77:*:{HELLO}'),
                ('2 fields', f'A:{HELLO}'),
                ('not understood: zz', 'A:0:*:6162zz'),
                ('not understood: 6', 'A:0:*:61626'),
                ('fewer than 2 known bytes', 'A:0:*:61??62??63'),
                ('fewer than 2 known bytes', 'A:0:*:'),
                ('an open parenthesis', 'A:0:*:6162(63'),
                ('without a parenthesis', 'A:0:*:6162)'),
                ('nested more than 32 deep', 'A:0:*:6162' + '(' * 33),
                ('jump from 4 to 2', 'A:0:*:6162{4-2}6364'),
                ('jump inside an alternative', 'A:0:*:6162(61*62|63)'),
                ('more than', 'A:0:*:' + '61' * clamav.LINE_MAX)):
            with self.subTest(line[:40]):
                self._assert_refused(reason, line)
        for reason, line in (
                ('PCRE', 'A;Target:0;0;0/x/'),
                ('no subsignature 3', f'A;Target:0;0&3;{HELLO}'),
                ('an open parenthesis', f'A;Target:0;(0;{HELLO}'),
                ('not understood', f'A;Target:0;0&;{HELLO}'),
                ('not understood: x', f'A;Target:0;0x;{HELLO}'),
                ('not understood', f'A;Target:0;0 0;{HELLO}'),
                ('nested more than', 'A;Target:0;%s;%s' % ('(' * 99, HELLO)),
                ('3 fields', 'A;Target:0;0')):
            with self.subTest(line[:40]):
                self._assert_refused(reason, line, 'ldb')

    def test_other_targets_when_asked_for(self):
        converted = self._one(f'A:3:*:{HELLO}', all_targets=True)
        self.assertTrue(converted.rule)
        self.assertEqual(('type of file: HTML',), converted.lost)

    def test_names(self):
        converted = list(clamav.convert(
            [f'A-1:0:*:{HELLO}', '# comment', '', f'A.1:0:*:{HELLO}',
             f'\x1b[2J"\\:0:*:{HELLO}'], 'ndb'))
        self.assertEqual([1, 4, 5], [each.line for each in converted])
        source = ''.join(each.rule for each in converted)
        self.assertNotIn('\x1b', source)
        self.assertEqual(
            ['ClamAV_A_1', 'ClamAV_A_1_2', 'ClamAV__x1b_2J___'],
            [rule.identifier for rule in yara.compile(source=source)])
