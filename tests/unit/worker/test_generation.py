# SPDX-License-Identifier: Apache-2.0
"""The main process's dealings with loaders and scan processes."""

import os
import selectors
import signal
import socket
import time
import types
from unittest import mock

from tests.unit import base as unit_base
from tests.unit.worker import base
from tests.unit.worker import engines
from virtav_nova.engines import base as engines_base
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import generation
from virtav_nova.worker import listener
from virtav_nova.worker import process
from virtav_nova.worker import ruleset


class Owner(generation.Owner):
    """Notes what it is told."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.logs = generation.Logs()
        self.entries = []
        self.failure = self.is_broken = None
        self.is_ready = False
        self.blames = []

    def write(self, entry):
        self.entries.append(entry)

    def ready(self, of):
        self.is_ready = True

    def failed(self, of, reason, way_out):
        self.failure = reason, way_out

    def broken(self, of):
        self.is_broken = True

    def blamed(self, of, name):
        self.blames.append(name)


class TestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        # Loaders do not look for code in the working directory.
        patch = mock.patch.dict(
            os.environ, {'PYTHONPATH': str(unit_base.ROOT)})
        patch.start()
        self.addCleanup(patch.stop)
        self.owner = Owner()
        self.addCleanup(self.owner.selector.close)

    def make(self, kind=engines.ObedientEngine, **changes):
        values = {
            'scan_timeout_ms': 5000, 'max_in_flight': 8, 'busy_poll_us': 100,
            'processes': 1, 'table_entries': 1024, 'table_scope': 'node',
            'load_timeout': 20, 'rules_memory_mib': 4096, 'cache_mib': 1,
            'budget_percent': 100, 'accumulate': False,
            'rules_dir': '/rules'} | changes
        # Like an option group: both by name and as attributes.
        options = types.SimpleNamespace(**values)
        group = mock.MagicMock(wraps=options, **values)
        group.__iter__.side_effect = lambda: iter(values)
        group.__getitem__.side_effect = values.__getitem__
        rules = ruleset.Ruleset(
            kind, engines_base.EngineOptions(), [], b'\xd1' * 32)
        self.made = generation.Generation(7, rules, group, self.owner)
        self.addCleanup(self.made.kill)

    def turn(self):
        """Let the main loop go round once."""
        self.made.keep()
        for key, _ in self.owner.selector.select(0.01):
            key.data()

    def turn_until(self, condition, what):
        def turned():
            self.turn()
            return condition()
        return base.wait_for(turned, what)

    def serve(self, kind=engines.ObedientEngine, **changes):
        self.make(kind, **changes)
        self.turn_until(
            lambda: self.made.processes.count(None) == 0
            and all(one.ready and one.pid for one in self.made.processes),
            'readiness')

    def sessions(self):
        return len(list(self.made.sessions))

    def open(self, number, project=None, **changes):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        theirs.setblocking(False)
        with theirs:
            self.opened = self.made.open(process.Client(
                number, base.hello(**changes), listener.credentials(theirs),
                project, 0.0, False), theirs, None, 0)
        monitor = base.Monitor(ours)
        monitor.key = self.opened.scope.key
        return monitor

    def ask(self, monitor, page):
        return monitor.ask(page.ljust(4096, b'\0'))


class LoadTest(TestCase):

    def test_serves(self):
        self.serve(processes=3)
        self.assertTrue(self.owner.is_ready)
        self.assertEqual({'rules': 1}, self.made.description)
        self.assertEqual(3, len({one.pid for one in self.made.processes}))
        self.assertEqual(0, self.sessions())
        self.assertIsNone(self.made.due())
        self.ask(self.open(1), b'')
        self.assertEqual((7, b'\xd1' * 32),
                         (self.opened.epoch, self.opened.digest))

    def _fails(self, kind, reason, **changes):
        self.make(kind, **changes)
        pid = self.made.loader_pid
        self.turn_until(lambda: self.owner.failure, 'failure')
        self.assertRegex(self.owner.failure[0], reason)
        self.assertTrue(self.owner.failure[1])
        self.assertTrue(self.made.ended)
        self.assertFalse(base.alive(pid))
        self.assertFalse(self.owner.is_ready)
        self.assertFalse(self.owner.selector.get_map())

    def test_loader_that_dies(self):
        self._fails(engines.BrokenEngine, '^the loader died, exit status 3')

    def test_rules_that_are_refused(self):
        self._fails(engines.RefusingEngine, r'^/rules/a\.yar:3: wrong$')

    def test_no_rules(self):
        self._fails(engines.UnruledEngine, 'hold no rule$')

    def test_loading_takes_too_long(self):
        begin = time.monotonic()
        self._fails(engines.SlowEngine, 'more than 1 s', load_timeout=1)
        self.assertLess(time.monotonic() - begin, 10)

    def test_loading_takes_too_much_memory(self):
        self._fails(engines.HungryEngine, 'more memory than',
                    rules_memory_mib=1000)

    def test_loader_that_is_killed(self):
        self.serve(processes=2)
        monitors = [self.open(1), self.open(2)]
        os.kill(self.made.loader_pid, signal.SIGKILL)
        self.turn_until(lambda: self.made.ended, 'end')
        for monitor in monitors:
            self.assert_closed(monitor)
        self.assertTrue(self.owner.is_broken)
        self.assertFalse(self.owner.selector.get_map())

    def test_nothing_is_left(self):
        before = len(os.listdir('/proc/self/fd'))
        for _ in range(2):
            self.serve(processes=2)
            self.open(1).close()
            self.turn_until(lambda: not self.sessions(), 'end of the session')
            pids = [one.pid for one in self.made.processes]
            self.made.retire()
            self.turn_until(lambda: self.made.ended, 'end')
            self.assertFalse(any(map(base.alive, pids)))
        # Each has its boards for as long as somebody may ask for counts.
        self.assertEqual(before + 2, len(os.listdir('/proc/self/fd')))

    def test_drain_that_takes_too_long(self):
        self.serve()
        self.open(1)
        pid = self.made.processes[0].pid
        with base.stopped(pid):
            self.made.drain(0.2)
            self.turn_until(lambda: self.made.ended, 'end')
        self.assertFalse(base.alive(pid))


class LossTest(TestCase):

    def test_no_process_can_be_started(self):
        with mock.patch.object(generation.process, 'ScanProcess',
                               side_effect=OSError(11, 'try again')), \
                self.assertLogs(generation.LOG, 'ERROR'):
            self.make()
            self.turn_until(lambda: self.made._loaded, 'rules')
            # Not again at once.
            self.turn()
            self.assertIsNotNone(self.made.due())
            with self.assertRaisesRegex(
                    generation.OverloadError, 'no scan process'):
                self.open(1)
        self.turn_until(lambda: self.owner.is_ready, 'readiness')
        self.ask(self.open(2), b'')

    def test_fork_fails(self):
        self.serve()
        # No further file: the loader cannot take the socket.
        base.no_more_files(self.made.loader_pid)
        scanning = self.made.processes[0]
        with self.assertLogs(generation.LOG, 'ERROR') as logs:
            os.kill(scanning.pid, signal.SIGKILL)
            self.turn_until(lambda: logs.output, 'refusal')
        self.assertIn('Cannot start a scan process: Too many open files',
                      logs.output[-1])

    def test_process_that_was_taken_over(self):
        self.serve(processes=2)
        good = self.open(1000)
        for number, message in enumerate((
                b'no JSON', b'\xff', b'[]', b'null', b'{}',
                b'[' * 4000,
                control.pack('closed', reason='x', counts=None),
                # Not its own session.
                control.pack('closed', session=1000, reason='x', counts=None),
                control.pack('match', session=1000, record={'rule': 'X'}),
                control.pack('closed', session=10, counts=None),
                control.pack('closed', session=11, reason='x', counts=[1]),
                control.pack('match', session=[], record={}),
                control.pack('match', session=None, record={})), 1):
            with self.subTest(message[:40]):
                bad = self.open(number)
                with self.assertLogs(generation.LOG, 'WARNING'):
                    self.ask(bad, b'send ' + message)
                    self.turn_until(lambda: self.sessions() == 1, 'end')
                self.assert_closed(bad)
                self.ask(good, b'')
        self.assertEqual(
            {'scan process died'},
            {entry['reason'] for entry in self.owner.entries
             if entry['event'] == 'closed'})

    def test_parts_that_there_are_not(self):
        self.serve(processes=2)
        bad = self.open(1)
        for part in (-1 << 40, -1, 1 << 32, (1 << 32) - 1, 1 << 99, True,
                     1.5, '1', [], None):
            self.ask(bad, b'send ' + control.pack(
                'fault', session=1, reason='x', part=part))
        self.ask(bad, b'send ' + control.pack(
            'fault', session=1, reason='x', part=1 << 31 | 7))
        self.turn_until(lambda: self.owner.blames, 'blame')
        self.assertEqual([('r.yar', 'R7')], self.owner.blames)
        self.assertEqual(1, self.sessions())

    def test_words_of_a_process_that_was_taken_over(self):
        self.serve()
        monitor = self.open(1)
        number = '\n{"type":"match"}'
        with self.assertLogs(generation.LOG) as logs:
            for message in (
                    control.pack('match', session=1, record={
                        'rule': number, 'instance': number, 'offset': number,
                        'meta': {number: number}}),
                    control.pack('fault', session=1, reason=number,
                                 part=number),
                    control.pack('whatever', session=1),
                    control.pack('closed', session=1, reason=number,
                                 counts={'fetches': number, 'x': number})):
                self.ask(monitor, b'send ' + message)
            self.turn_until(lambda: not self.sessions(), 'closed')
        for line in logs.output:
            self.assertTrue(line.isprintable(), line)
        opened, match, closed = self.owner.entries
        self.assertEqual('match', match['type'])
        self.assertEqual(opened['instance'], match['instance'])
        self.assertEqual((r'\n{"type":"match"}', None),
                         (closed['reason'], closed['fetches']))

    def test_pause_of_all_is_not_held_against_the_page(self):
        self.serve(scan_timeout_ms=200)
        monitor = self.open(1)
        self.ask(monitor, b'')
        request = monitor.send(b'sleep 0.1'.ljust(4096, b'\0'))
        scanning, = self.made.processes
        base.wait_for(scanning.board.scan, 'scan')
        with base.stopped(scanning.pid):
            time.sleep(0.5)
        self.turn()
        self.assertEqual(request.id, monitor.frame().id)
        self.turn()
        self.assertEqual(1, self.sessions())

    def test_slow_page(self):
        self.serve(scan_timeout_ms=200)
        monitor = self.open(1)
        monitor.send(b'sleep 60'.ljust(4096, b'\0'))
        self.turn_until(lambda: not self.sessions(), 'kill')
        self.assert_closed(monitor)
        self.assertEqual(wire.Result.UNKNOWN,
                         self.ask(self.open(2), b'sleep 60').result)
        self.assertEqual(1, self.made.lost)

    def test_crash_is_passed_over_from_then_on(self):
        self.serve(processes=2)
        monitor = self.open(1)
        monitor.send(b'segfault'.ljust(4096, b'\0'))
        self.turn_until(lambda: not self.sessions(), 'crash')
        # By the process that takes its place, and by the other one.
        for number in (2, 3):
            self.assertEqual(wire.Result.UNKNOWN,
                             self.ask(self.open(number), b'segfault').result)

    def test_pages_passed_over_are_bounded(self):
        self.serve()
        with mock.patch.object(generation, '_SKIP_MAX', 2):
            for number in range(4):
                monitor = self.open(number)
                monitor.send((b'segfault %d' % number).ljust(4096, b'\0'))
                self.turn_until(lambda: not self.sessions(), 'crash')
        monitor = self.open(9)
        for number in (2, 3):
            self.assertEqual(
                wire.Result.UNKNOWN,
                self.ask(monitor, b'segfault %d' % number).result)

    def test_kill_from_outside_counts_the_second_time(self):
        self.serve()
        for number in range(2):
            monitor = self.open(number)
            monitor.send(b'kill'.ljust(4096, b'\0'))
            self.turn_until(lambda: not self.sessions(), 'end')
        self.assertEqual(wire.Result.UNKNOWN,
                         self.ask(self.open(9), b'kill').result)


class BlameTest(TestCase):

    def _crash(self, number, part):
        monitor = self.open(number)
        monitor.send((b'segfault %d' % part).ljust(4096, b'\0'))
        self.turn_until(lambda: not self.sessions(), 'crash')

    def test_group_becomes_suspect_then_a_rule_is_blamed(self):
        self.serve(processes=2)
        self._crash(1, 5)
        self.assertFalse(self.owner.blames)
        # The process that was there, and the one that was forked since.
        for number in (2, 3):
            monitor = self.open(number)
            self.assertEqual('5', self.ask(monitor, b'part').rule)
            monitor.close()
        self.turn_until(lambda: not self.sessions(), 'end of sessions')
        self._crash(4, 7 | engines_base.RULE)
        self.turn_until(lambda: self.owner.blames, 'blame')
        self.assertEqual([('r.yar', 'R7')], self.owner.blames)

    def test_only_what_took_the_time(self):
        self.serve(scan_timeout_ms=1000)
        for number, before in enumerate((0.8, 0), 1):
            self.assertFalse(self.owner.blames)
            monitor = self.open(number)
            monitor.send((b'late %f %d' % (
                before, 7 | engines_base.RULE)).ljust(4096, b'\0'))
            self.turn_until(lambda: not self.sessions(), 'kill')
        self.turn_until(lambda: self.owner.blames, 'blame')
        self.assertEqual([('r.yar', 'R7')], self.owner.blames)

    def test_engine_that_does_not_say(self):
        self.serve()
        monitor = self.open(1)
        monitor.send(b'segfault'.ljust(4096, b'\0'))
        self.turn_until(lambda: not self.sessions(), 'crash')
        self.turn()
        self.assertFalse(self.owner.blames)


class ScopeTest(TestCase):

    def test_node(self):
        self.serve()
        keys = set()
        for number, project in enumerate(('a', 'b', None)):
            self.open(number, project)
            keys.add(self.opened.scope.key)
        self.assertEqual(1, len(keys))

    def test_project(self):
        self.serve(table_scope='project')
        first = self.open(1, 'a')
        scope = self.opened.scope
        second = self.open(2, 'b')
        other = self.opened.scope
        self.assertNotEqual(scope.key, other.key)
        third = self.open(3, 'a')
        self.assertIs(scope, self.opened.scope)
        for monitor in (first, second, third):
            self.ask(monitor, b'match 1')
        for monitor in (first, third):
            monitor.close()
        self.turn_until(lambda: self.sessions() == 1, 'end')
        self.assertIsNone(scope.writable)
        self.ask(second, b'')
        self.ask(self.open(4, 'a'), b'')
        self.assertNotEqual(scope.key, self.opened.scope.key)

    def test_clean_pages_of_a_project_are_in_its_table_alone(self):
        self.serve(table_scope='project')
        tables = {}
        for project in ('a', 'b'):
            monitor = self.open(len(tables) + 1, project, flags=wire.SHARED)
            self.ask(monitor, b'page of ' + project.encode())
            # The table is written after the verdict went out.
            self.ask(monitor, b'match 1')
            tables[project] = (os.pread(
                self.opened.scope.readable, 1 << 20, 4096), monitor)
            self.assertEqual(1, sum(
                any(tables[project][0][at:at + 16])
                for at in range(0, len(tables[project][0]), 16)))


class CountTest(TestCase):

    def test_boards(self):
        self.serve(processes=2)
        for number in range(2):
            monitor = self.open(number)
            for page in (b'', b'', b'match 2', b'raise'):
                self.ask(monitor, page)
            monitor.close()
        self.turn_until(lambda: not self.sessions(), 'end')
        counts = board.totals(self.made.boards)
        self.assertEqual(
            {'clean': 4, 'match': 2, 'unknown': 2, 'units': 8, 'cached': 2,
             'tabled': 1, 'scans': 5, 'faults': 2},
            {name: counts[name] for name in (
                'clean', 'match', 'unknown', 'units', 'cached', 'tabled',
                'scans', 'faults')})
        self.assertEqual(8, sum(board.merged(
            one.service for one in self.made.boards)))
        self.assertEqual(5, sum(board.merged(
            one.scans for one in self.made.boards)))
