# SPDX-License-Identifier: Apache-2.0

import unittest

from virtav_nova.rules import meta


class DescribeTest(unittest.TestCase):

    def test_nothing(self):
        self.assertEqual(
            {'author': None, 'licence': None, 'reference': None,
             'severity': None, 'mitre': []}, meta.describe({}))

    def test_spellings(self):
        for name, key in (
                ('author', 'author'), ('author', 'Author'),
                ('author', 'authors'), ('author', 'rule_author'),
                ('author', 'created_by'), ('licence', 'license'),
                ('licence', 'Licence'), ('licence', 'license_id'),
                ('reference', 'reference'), ('reference', 'Ref'),
                ('reference', 'reference1'), ('reference', 'url'),
                ('reference', 'source_url')):
            with self.subTest(key):
                self.assertEqual('x', meta.describe({key: 'x'})[name])
        self.assertEqual(
            'a, b', meta.describe({'author': ['a', ' ', 'b']})['author'])
        self.assertEqual('first', meta.describe(
            {'url': 'last', 'reference': 'first'})['reference'])

    def test_severity(self):
        for value, level in (
                ('Critical', 'critical'), ('HIGH', 'high'),
                ('moderate', 'medium'), ('low', 'low'), ('test', 'info'),
                (100, 'critical'), (75, 'high'), (50, 'medium'),
                (20, 'low'), (10, 'critical'), (5, 'critical'),
                (3, 'medium'), ('7/10', 'high'), ('60%', 'medium'),
                (0, 'info'), ('whatever', None), (-1, None), ('', None),
                (10 ** 30, None), (True, None)):
            with self.subTest(value):
                self.assertEqual(
                    level, meta.describe({'severity': value})['severity'])
        for key in ('Severity', 'threat_level', 'score', 'risk', 'impact'):
            with self.subTest(key):
                self.assertEqual(
                    'high', meta.describe({key: 'high'})['severity'])

    def test_mitre(self):
        for fields, tags, expected in (
                ({'mitre_attack': 'T1059.003, T1027'}, (),
                 ['T1059.003', 'T1027']),
                ({'mitre_att': 'S0534'}, (), ['S0534']),
                ({'ATT&CK': 't1055'}, (), ['T1055']),
                ({'technique': 'https://attack.mitre.org/techniques/'
                  'T1003/001/'}, (), ['T1003.001']),
                ({'reference': 'https://attack.mitre.org/techniques/T1003'},
                 (), ['T1003']),
                ({'ttp': ['T1003', 'T1003', 'TA0002', 'G0016']}, (),
                 ['T1003', 'TA0002', 'G0016']),
                ({}, ('T1059_003', 'S1234'), ['T1059.003']),
                ({'description': 'T1000 tractor'}, (), []),
                ({'mitre': 'XT10599 T105 T10591'}, (), [])):
            with self.subTest(fields, tags=tags):
                self.assertEqual(
                    expected, meta.describe(fields, tags)['mitre'])

    def test_hostile_values_are_bounded_and_printable(self):
        found = meta.describe(
            {'author': '\x1b[2J\u202e' + 'a' * 10000,
             'mitre': ' '.join(f'T{number}' for number in range(1000, 9999)),
             'severity': '1' * 100000, 'url': b'\xff\0', 'x\0' * 999: 1,
             'license': None}, ['T1000'] * 10000)
        self.assertLessEqual(len(found['author']), 256)
        self.assertTrue(found['author'].startswith('\\x1b[2J\\u202e'))
        self.assertLessEqual(len(found['mitre']), 8)
        self.assertIsNone(found['severity'])
        for name in ('author', 'reference', 'licence'):
            self.assertTrue(found[name].isascii())
            self.assertTrue(found[name].isprintable())
