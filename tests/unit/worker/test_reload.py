# SPDX-License-Identifier: Apache-2.0
"""A real worker gets other rules while it serves."""

import contextlib
import json
import os
import signal
import threading
import time
import types
import unittest
from unittest import mock

from tests.unit.worker import base
from virtav_nova.monitor import wire
from virtav_nova.worker import pool

OTHER = b'OTHER-RULE'.ljust(4096, b'\0')
OTHER_RULE = 'rule Other { strings: $a = "OTHER-RULE" condition: $a }'


class TestCase(base.TestCase):

    def start(self, rules=None, **options):
        super().start(rules, **{'reload_rate': 1000} | options)

    def reload(self):
        self.process.send_signal(signal.SIGHUP)

    def wait_log(self, *wanted, count=1):
        """Wait for text in the log."""
        base.wait_for(lambda: all(
            self.log().count(text) >= count for text in wanted), str(wanted))

    def assert_moved(self, monitor):
        """A session is told to connect again."""
        refused = monitor.frame()
        self.assertIsInstance(refused, wire.Refused)
        self.assertEqual(wire.Refusal.RELOAD, refused.code)
        self.assertIsNone(monitor.frame())


class ReloadTest(TestCase):

    def test_new_rules(self):
        self.start()
        monitor = self.session()
        self.assertEqual(wire.Result.CLEAN, monitor.ask(OTHER).result)
        before = monitor.hello_answer
        old, = self.loaders()
        self.write('rules/other.yar', OTHER_RULE)
        self.reload()
        self.assert_moved(monitor)
        again = self.session()
        after = again.hello_answer
        self.assertEqual((1, 2), (before.epoch, after.epoch))
        self.assertNotEqual(before.digest, after.digest)
        self.assertNotEqual(before.key, after.key)
        self.assertEqual('Other', again.ask(OTHER).rule)
        self.assert_serves(again)
        # Of the old ones nothing is left.
        base.wait_for(lambda: not base.alive(old), 'end of the old loader')
        self.assertEqual(1, len(self.loaders()))
        closed, = self.records(1, event='closed')
        self.assertEqual((before.digest.hex(), 'the rules changed'),
                         (closed['digest'], closed['reason']))
        self.wait_log('nobody is left under digest')

    def test_rules_that_did_not_change(self):
        self.start()
        monitor = self.session()
        self.reload()
        self.wait_log('is in force already, nothing is done')
        self.assert_serves(monitor)
        self.assertEqual(1, self.session().hello_answer.epoch)

    def test_old_rules_serve_meanwhile(self):
        self.start()
        monitor = self.session()
        stop = threading.Event()
        seen = []

        def load():
            # It ends with REFUSED, which may be followed by the end sooner
            # than the next page is sent.
            with contextlib.suppress(BrokenPipeError):
                while not stop.is_set():
                    frame = monitor.ask(base.MATCHING)
                    if isinstance(frame, wire.Refused):
                        break
                    seen.append(frame.result)

        thread = threading.Thread(target=load)
        thread.start()
        self.write('rules/many.yar', '\n'.join(
            f'rule R{number} {{ strings: $a = "needle-{number:06}" '
            'condition: $a }' for number in range(3000)))
        self.reload()
        self.wait_log('epoch 2')
        thread.join(base.PATIENCE)
        stop.set()
        self.assertFalse(thread.is_alive())
        self.assertEqual({wire.Result.MATCH}, set(seen))
        self.assertGreater(len(seen), 10)

    def test_moved_a_few_at_a_time(self):
        self.start(reload_rate=4)
        monitors = [self.session() for _ in range(4)]
        self.write('rules/other.yar', OTHER_RULE)
        self.reload()
        self.assert_moved(monitors[0])
        begin = time.monotonic()
        # The others are served in the meantime, and by the old rules.
        self.assertEqual(wire.Result.CLEAN, monitors[3].ask(OTHER).result)
        for monitor in monitors[1:]:
            self.assert_moved(monitor)
        self.assertGreater(time.monotonic() - begin, 0.5)

    def test_two_reloads_at_once(self):
        self.start(reload_rate=2)
        monitors = [self.session() for _ in range(3)]
        self.write('rules/other.yar', OTHER_RULE)
        self.reload()
        self.wait_log('epoch 2')
        self.write('rules/other.yar', OTHER_RULE.replace('Other', 'Third'))
        self.reload()
        for monitor in monitors:
            self.assert_moved(monitor)
        self.wait_log('epoch 3')
        self.assertEqual('Third', self.session().ask(OTHER).rule)
        base.wait_for(lambda: len(self.loaders()) == 1, 'one loader')

    def test_stop_while_loading(self):
        self.start()
        monitor = self.session()
        self.write('rules/other.yar', OTHER_RULE)
        self.reload()
        self.assertEqual(0, self.stop())
        self.assertIn(type(monitor.frame()), (type(None), wire.Refused))

    def test_lost_loader_is_made_up_for(self):
        self.start()
        monitor = self.session()
        loader, = self.loaders()
        os.kill(loader, signal.SIGKILL)
        self.assert_closed(monitor)
        self.wait_log('epoch 2')
        self.assert_serves(self.session())


class StayTest(unittest.TestCase):

    def test_sessions_that_do_not_leave(self):
        # A scan process that was taken over need not do what it is told.
        made = pool.Pool.__new__(pool.Pool)
        made._options = types.SimpleNamespace(reload_rate=5)
        made._next_move, made._told_all = 0.0, None
        made.old = mock.Mock(
            digest=bytes(32), sessions=[1], move=mock.Mock(
                side_effect=[True, False, False, False, False]))
        for now in (10, 20, 79):
            made._move(now)
            made.old.retire.assert_not_called()
        with self.assertLogs(pool.LOG, 'WARNING'):
            made._move(81)
        made.old.retire.assert_called_once_with()


class BadRulesTest(TestCase):
    """Whatever comes, the old set stays."""

    def setUp(self):
        super().setUp()
        self.start(rules_memory_mib=2048, load_timeout=20)
        self.monitor = self.session()
        self.assert_serves(self.monitor)

    def assert_stays(self, reason):
        self.reload()
        self.wait_log('the set in force stays')
        self.assertRegex(self.log().rpartition('set in force stays: ')[2],
                         reason)
        self.assert_serves(self.monitor)
        self.assertEqual(1, self.session().hello_answer.epoch)
        # And the next good one comes into force.
        for path in (self.top / 'rules').iterdir():
            if path.name != 'selftest.yar':
                path.unlink()
        self.write('rules/selftest.yar', self.good + b'\n')
        self.reload()
        self.assert_moved(self.monitor)
        self.assert_serves(self.session())

    @property
    def good(self):
        return next(base.base.SELFTEST_RULES.iterdir()).read_bytes()

    def test_broken(self):
        self.write('rules/b.yar', 'rule B {\n condition: foo }')
        self.assert_stays(r'b\.yar:2: undefined identifier')

    def test_half_written(self):
        self.write('rules/selftest.yar', self.good[:len(self.good) // 2])
        self.assert_stays(r'selftest\.yar:\d+: ')

    def test_nothing_in_it(self):
        self.write('rules/selftest.yar', '')
        self.assert_stays('hold no rule')

    def test_no_file(self):
        (self.top / 'rules' / 'selftest.yar').unlink()
        self.assert_stays(r'no \*\.yar')

    def test_oversized(self):
        path = self.write('rules/huge.yar', '')
        os.truncate(path, 500 << 20)
        self.assert_stays('more than 16 MiB')

    def test_link(self):
        (self.top / 'rules' / 'link.yar').symlink_to('/etc/passwd')
        self.assert_stays('not a regular file')

    def test_compiled(self):
        self.write('rules/c.yar', b'YARA\1\2\3' + bytes(100))
        self.assert_stays(r'c\.yar:1: ')

    def test_include(self):
        self.write('rules/i.yar', 'include "/etc/passwd"\nrule I { condition: '
                   'true }')
        self.assert_stays(r'i\.yar')

    def test_nested_too_deeply(self):
        self.write('rules/d.yar', 'rule D { condition: %strue%s }' % (
            '(' * 100000, ')' * 100000))
        self.assert_stays(r'd\.yar:1: ')


class BlameTest(TestCase):

    def test_rule_goes_into_quarantine(self):
        slow = base.SLOW_RULE + OTHER_RULE
        self.start(slow, engine='twostage', scan_timeout_ms=200,
                   blame_after=2)
        first = self.session()
        digest = first.hello_answer.digest
        number = 0
        while 'is in quarantine' not in self.log():
            number += 1
            self.assertLess(number, 6, self.log())
            monitor = self.session()
            # Another page each time: one that was slow is not tried again.
            monitor.send(base.SLOW[:4000] + b'%096d' % number)
            while monitor.frame() is not None:
                pass
            monitor.close()
            time.sleep(0.1)
        self.wait_log('epoch 2')
        entry, = json.loads(
            (self.top / 'state' / 'quarantine.json').read_text())
        self.assertEqual(('test.yar', 'Slow'),
                         (entry['namespace'], entry['rule']))
        monitor = self.session()
        self.assertNotEqual(digest, monitor.hello_answer.digest)
        # The page runs unhindered, other rules of the file are in force.
        self.assertEqual(wire.Result.CLEAN, monitor.ask(base.SLOW).result)
        self.assertEqual('Other', monitor.ask(OTHER).rule)
        self.assert_serves(monitor)
        # So it stays after a restart.
        self.assertEqual(0, self.stop())
        self.start(slow, engine='twostage')
        self.assertEqual(monitor.hello_answer.digest,
                         self.session().hello_answer.digest)
