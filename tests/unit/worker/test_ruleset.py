# SPDX-License-Identifier: Apache-2.0

import json
import os
import types

from tests.unit import base
from virtav_nova import exception
from virtav_nova.engines import yara
from virtav_nova.worker import loader
from virtav_nova.worker import ruleset


class RulesetTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.write('rules/a.yar', 'rule A { condition: true }')
        self.write('rules/b\udcff.yar', 'rule B { condition: true }')
        (self.top / 'state').mkdir()
        self.options = types.SimpleNamespace(
            engine='yara', rules_dir=str(self.top / 'rules'),
            state_dir=str(self.top / 'state'), scan_timeout_ms=321,
            clamd_socket='/clamd')

    def test_read(self):
        rules = ruleset.read(self.options)
        self.assertIs(yara.YaraEngine, rules.kind)
        self.assertEqual((321, '/clamd', frozenset()), (
            rules.options.scan_timeout_ms, rules.options.clamd_socket,
            rules.options.quarantine))
        self.assertEqual(2, len(rules.files))
        self.assertEqual(rules, ruleset.read(self.options))

    def test_unknown_engine(self):
        self.options.engine = 'av'
        with self.assertRaisesRegex(exception.EngineError, 'is called av'):
            ruleset.read(self.options)

    def test_quarantine_is_part_of_the_digest(self):
        before = ruleset.read(self.options)
        quarantine = ruleset.Quarantine(self.options.state_dir)
        self.assertTrue(quarantine.add(('a.yar', 'A'), 'slow\n'))
        after = ruleset.read(self.options)
        self.assertEqual(frozenset({('a.yar', 'A')}),
                         after.options.quarantine)
        self.assertNotEqual(before.digest, after.digest)
        entry, = ruleset.Quarantine(self.options.state_dir).entries
        self.assertEqual('slow\\n', entry['why'])
        # Twice is once.
        self.assertTrue(quarantine.add(('a.yar', 'A'), 'slow'))
        self.assertEqual(after.digest, ruleset.read(self.options).digest)

    def test_quarantine_that_cannot_be_read(self):
        for content in ('', '{', '{}', '[1]', '[{"rule": 1}]', '[' * 10000):
            self.write('state/quarantine.json', content)
            with self.subTest(content[:9]), self.assertLogs(
                    ruleset.LOG, 'ERROR'):
                ruleset.Quarantine(self.options.state_dir)

    def test_quarantine_that_cannot_be_written(self):
        quarantine = ruleset.Quarantine(str(self.top / 'missing'))
        with self.assertLogs(ruleset.LOG, 'ERROR'):
            self.assertFalse(quarantine.add(('a.yar', 'A'), 'slow'))

    def test_quarantine_is_bounded(self):
        self.write('state/quarantine.json', json.dumps([
            {'namespace': 'a', 'rule': str(number), 'why': '', 'time': ''}
            for number in range(2000)]))
        quarantine = ruleset.Quarantine(self.options.state_dir)
        self.assertEqual(1000, len(quarantine.entries))
        with self.assertLogs(ruleset.LOG, 'ERROR'):
            self.assertFalse(quarantine.add(('b', 'B'), ''))

    def test_what_a_loader_gets(self):
        rules = ruleset.read(self.options)
        fd = loader.pack({'x': 1}, rules.files)
        self.addCleanup(os.close, fd)
        head, files = loader.unpack(fd)
        self.assertEqual(1, head['x'])
        self.assertEqual(rules.files, files)
