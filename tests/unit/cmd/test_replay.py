# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import json
import subprocess
import sys

from tests.unit import base
from tests.unit.monitor import test_recording
from tests.unit.worker import base as worker_base
from virtav_nova.cmd import replay
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire

RULES = """
rule Both : tag { strings: $a = "FIRST-HALF" $b = "SECOND-HALF" $ = "THIRD"
    condition: 2 of them }
rule Split { strings: $s = "ACROSS-THE-BORDER" private condition: $s }
"""


class TestCase(test_recording.TestCase):

    def setUp(self):
        super().setUp()
        self.rules = str(self.write('rules/r.yar', RULES).parent)

    def record_pages(self, *windows):
        """Record fetches of what is given as page, before and after."""
        tagger = wire.Tagger(test_recording.KEY)
        with open(self.path, 'wb') as file:
            writer = recording.Writer(
                file, recording.Head.of(self.hello, 'a test'))
            for number, (page, before, after) in enumerate(windows):
                window = wire.window(page, before or b'', after or b'')
                writer.add(wire.Request(
                    number, 1, number << 12, 0, 0x400000 + (number << 12),
                    0, 0, 0, 3, wire.HOLD | ((before and wire.BEFORE) or 0)
                    | ((after and wire.AFTER) or 0), tagger.tag(page),
                    b'pc.ram', wire.NO_TAG, wire.NO_TAG, window))
            writer.close()

    def replay(self, *arguments, status=0):
        """Run it.

        :returns: what it prints
        """
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.assertEqual(status, replay.main(
                [str(self.path), *arguments]), err.getvalue())
        return out.getvalue() + err.getvalue()


class OfflineTest(TestCase):

    def setUp(self):
        super().setUp()
        first = b'FIRST-HALF'.ljust(4096, b'\x90')
        both = b'THIRD'.ljust(600) + b'SECOND-HALF'.ljust(3496, b'\x90')
        clean = bytes(4096 - 6) + b'ACROSS'
        self.record_pages(
            (first, None, None), (both, first[-512:], None),
            (clean, None, b'-THE-BORDER'.ljust(512, b'\0')),
            (first, None, None))

    def test_about(self):
        said = self.replay()
        self.assertIn('4 fetches of 3 different pages', said)
        self.assertIn(str(self.hello.instance), said)

    def test_scan(self):
        report = json.loads(self.replay(
            '--engine', 'yara', '--rules', self.rules, '--json'))
        self.assertEqual({'page': 3, 'junction': 2}, report['units'])
        self.assertEqual({'Both': 1, 'Split': 1}, report['rules'])
        self.assertEqual(
            [('Both', 'page', 1, 0x401000), ('Split', 'junction', 2, 0x402000
                                             )],
            [(match['rule'], match['form'], match['page'], match['gva'])
             for match in report['matches']])

    def test_explain(self):
        said = self.replay('--engine', 'yara', '--rules', self.rules,
                           '--explain')
        self.assertIn('page 0 of fetch 0, gva 0x400000', said)
        self.assertIn('Both did not match\n    seen: $a at 0x0\n    '
                      'not seen: $b, $anonymous_2\n    condition: 2 of them',
                      said)
        self.assertIn('Both matched\n    seen: $b at 0x258, $anonymous_2 at '
                      '0x0\n    not seen: $a\n', said)
        self.assertIn('Split matched\n    seen: $s at 0x1fa', said)

    def test_why_not(self):
        arguments = ('--engine', 'yara', '--rules', self.rules, '--explain',
                     '--json')
        report = json.loads(self.replay(
            *arguments, '--rule', 'Split', '--gva', '0x402123'))
        self.assertEqual(
            [('page', False, {}, ['$s']),
             ('junction', True, {'$s': [506]}, [])],
            [(one['form'], one['matched'], one['seen'], one['unseen'])
             for one in report['explained']])
        report = json.loads(self.replay(*arguments, '--page', '0'))
        self.assertEqual(['Both'], [
            one['rule'] for one in report['explained']])
        self.assertIn('there is no such rule', self.replay(
            *arguments, '--rule', 'Other', status=2))

    def test_mistakes(self):
        self.assertIn('no scan engine is called x', self.replay(
            '--engine', 'x', '--rules', self.rules, status=2))
        self.path.write_bytes(self.path.read_bytes()[:-20])
        self.assertIn('what stands before is used', self.replay(status=1))
        self.path.write_bytes(b'')
        self.assertIn('this is no recording', self.replay(status=2))


class LiveTest(TestCase):
    """Played to a recorder, which is a worker of a kind."""

    def setUp(self):
        super().setUp()
        self.made = self.record(120)
        self.socket = str(self.top / 's')
        self.copy = self.top / 'copy.rec'
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'virtav_nova.cmd.scan_worker', 'record',
             '--socket', self.socket, str(self.copy)],
            cwd=base.ROOT, stderr=subprocess.PIPE, text=True)
        self.addCleanup(self.process.stderr.close)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        self.assertIn('Recording', self.process.stderr.readline())

    def test_copy(self):
        report = json.loads(self.replay(
            '--socket', self.socket, '--transport', 'socket', '--depth', '5',
            '--json'))
        self.assertEqual((120, 120, 0, 0), (
            report['answers'], report['clean'], report['matched'],
            report['table_hits']))
        self.assertGreater(report['p99_us'], report['p50_us'])
        self.assertEqual(0, self.process.wait(worker_base.PATIENCE))
        tagger = wire.Tagger(test_recording.KEY)
        with recording.Recording(self.copy) as copy:
            again = [fetch.request(number, tagger)
                     for number, fetch in enumerate(copy)]
        self.assertEqual(self.made, again)

    def test_as_fast_as_it_was(self):
        with recording.Recording(self.path) as played:
            last = played[-1].at / 1e6
        report = json.loads(self.replay(
            '--socket', self.socket, '--transport', 'socket', '--speed',
            'recorded', '--json'))
        self.assertGreaterEqual(report['took_s'], last)

    def test_no_ring(self):
        self.assertIn('gives no shared memory', self.replay(
            '--socket', self.socket, status=1))

    def test_nobody_listens(self):
        self.assertIn('No such file', self.replay(
            '--socket', str(self.top / 'none'), status=1))
