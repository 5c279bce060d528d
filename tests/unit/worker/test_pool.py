# SPDX-License-Identifier: Apache-2.0
"""The main process's dealings with scan processes that are not well."""

import os
import selectors
import socket
import time
import types
from unittest import mock

from tests.unit import base as unit_base
from tests.unit.worker import base
from tests.unit.worker import engines
from virtav_nova.alerts import journal
from virtav_nova.monitor import wire
from virtav_nova.worker import control
from virtav_nova.worker import pool

KEY = bytes(32)


class PoolTest(base.TestCase):

    def setUp(self):
        super().setUp()
        # Scan processes do not look for code in the working directory.
        patch = mock.patch.dict(
            os.environ, {'PYTHONPATH': str(unit_base.ROOT)})
        patch.start()
        self.addCleanup(patch.stop)
        self.alerts = journal.Journal(
            str(self.top / 'state' / 'alerts' / 'journal.jsonl'), 1 << 20, 1)
        self.addCleanup(self.alerts.close)
        self.selector = selectors.DefaultSelector()
        self.addCleanup(self.selector.close)

    def make(self, engine, processes=1, scan_timeout_ms=5000):
        options = types.SimpleNamespace(
            scan_timeout_ms=scan_timeout_ms, max_in_flight=8,
            busy_poll_us=100, processes=processes, max_sessions=256,
            table_entries=1024, ring_slots=8)
        self.pool = pool.Pool(options, engine, bytes(32), KEY, 1, self.alerts,
                              self.selector)
        self.addCleanup(self.pool.kill)

    def turn(self):
        """Let the main loop go round once."""
        self.pool.keep()
        for key, _ in self.selector.select(0.01):
            key.data()

    def turn_until(self, condition, what):
        def turned():
            self.turn()
            return condition()
        return base.wait_for(turned, what)

    def open(self, number):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        theirs.setblocking(False)
        with theirs:
            self.pool.open(number, base.hello(), theirs)
        monitor = base.Monitor(ours)
        monitor.key = KEY
        return monitor

    def ask(self, monitor, page):
        return monitor.ask(page.ljust(4096, b'\0'))

    def test_engine_that_cannot_be_restored(self):
        self.make(engines.BrokenEngine())
        with self.assertRaisesRegex(pool.StartError, 'exit status 3'):
            self.turn_until(lambda: self.pool.ready, 'readiness')

    def test_engine_that_can(self):
        self.make(engines.ObedientEngine(), processes=3)
        self.turn_until(lambda: self.pool.ready, 'readiness')
        self.assertEqual(3, len(self.pool))
        self.assertEqual(0, self.pool.sessions)
        self.assertIsNone(self.pool.due())

    def test_no_process_can_be_started(self):
        self.make(engines.ObedientEngine())
        with mock.patch.object(pool.process, 'ScanProcess',
                               side_effect=OSError(11, 'try again')), \
                self.assertLogs(pool.LOG, 'ERROR'):
            self.turn()
            # Not again at once.
            self.turn()
            self.assertIsNotNone(self.pool.due())
            with self.assertRaisesRegex(pool.OverloadError, 'no scan process'):
                self.open(1)
        self.turn_until(lambda: self.pool.ready, 'readiness')
        self.ask(self.open(2), b'')

    def test_process_that_was_taken_over(self):
        self.make(engines.ObedientEngine(), processes=2)
        self.turn_until(lambda: self.pool.ready, 'readiness')
        good = self.open(1000)
        for number, message in enumerate((
                b'no JSON', b'\xff', b'[]', b'null', b'{}',
                b'[' * 4000,
                control.pack('closed', reason='x', counts=None),
                # Not its own session.
                control.pack('closed', session=1000, reason='x', counts=None),
                control.pack('match', session=1000, record={'rule': 'X'}),
                control.pack('match', session=[], record={}),
                control.pack('match', session=None, record={})), 1):
            with self.subTest(message[:40]):
                bad = self.open(number)
                with self.assertLogs(pool.LOG, 'WARNING'):
                    self.ask(bad, b'send ' + message)
                    self.turn_until(lambda: self.pool.sessions == 1, 'end')
                self.assert_closed(bad)
                self.ask(good, b'')
        self.assertEqual(
            {'scan process died'},
            {entry['reason'] for entry in self.journal()
             if entry['event'] == 'closed'})

    def test_words_of_a_process_that_was_taken_over(self):
        self.make(engines.ObedientEngine())
        self.turn_until(lambda: self.pool.ready, 'readiness')
        monitor = self.open(1)
        number = '\n{"type":"match"}'
        with self.assertLogs(pool.LOG) as logs:
            for message in (
                    control.pack('match', session=1, record={
                        'rule': number, 'instance': number, 'offset': number,
                        'meta': {number: number}}),
                    control.pack('fault', session=1, reason=number),
                    control.pack('whatever', session=1),
                    control.pack('closed', session=1, reason=number,
                                 counts={'fetches': number, 'x': number})):
                self.ask(monitor, b'send ' + message)
            self.turn_until(lambda: not self.pool.sessions, 'closed')
        for line in logs.output:
            self.assertTrue(line.isprintable(), line)
        opened, match, closed = self.journal()
        self.assertEqual('match', match['type'])
        self.assertEqual(opened['instance'], match['instance'])
        self.assertEqual((r'\n{"type":"match"}', None),
                         (closed['reason'], closed['fetches']))

    def test_pause_of_all_is_not_held_against_the_page(self):
        self.make(engines.ObedientEngine(), scan_timeout_ms=200)
        self.turn_until(lambda: self.pool.ready, 'readiness')
        monitor = self.open(1)
        self.ask(monitor, b'')
        request = monitor.send(b'sleep 0.1'.ljust(4096, b'\0'))
        scanning, = self.pool._processes
        base.wait_for(scanning._board.scan, 'scan')
        with base.stopped(scanning.pid):
            time.sleep(0.5)
        self.turn()
        self.assertEqual(request.id, monitor.frame().id)
        self.turn()
        self.assertEqual(1, self.pool.sessions)

    def test_slow_page(self):
        self.make(engines.ObedientEngine(), scan_timeout_ms=200)
        self.turn_until(lambda: self.pool.ready, 'readiness')
        monitor = self.open(1)
        monitor.send(b'sleep 60'.ljust(4096, b'\0'))
        begin = time.monotonic()
        self.turn_until(lambda: not self.pool.sessions, 'end of the process')
        self.assertGreater(time.monotonic() - begin, 0.25)
        self.assertEqual(wire.Result.UNKNOWN,
                         self.ask(self.open(2), b'sleep 60').result)

    def test_pages_passed_over_are_bounded(self):
        self.make(engines.ObedientEngine())
        self.turn_until(lambda: self.pool.ready, 'readiness')
        with mock.patch.object(pool, '_SKIP_MAX', 2):
            for number in range(4):
                monitor = self.open(number)
                monitor.send((b'segfault %d' % number).ljust(4096, b'\0'))
                self.turn_until(lambda: not self.pool.sessions, 'crash')
        monitor = self.open(9)
        for number in (2, 3):
            self.assertEqual(
                wire.Result.UNKNOWN,
                self.ask(monitor, b'segfault %d' % number).result)
