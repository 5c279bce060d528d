# SPDX-License-Identifier: Apache-2.0
"""The loop of a scan process, run in a thread."""

import os
import socket
import threading
from unittest import mock

from tests.unit.worker import base
from tests.unit.worker import engines
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import scan

KEY = bytes(32)


class ScannerTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.main, self.theirs = control.pair()
        self.main.settimeout(base.PATIENCE)
        self.scanner = self.make(busy_poll_us=100)
        self.thread = threading.Thread(target=self._run)
        self.numbers = iter(range(1, 100))

    def make(self, busy_poll_us):
        fd = board.Board.create()
        scans = board.Board(fd)
        os.close(fd)
        return scan.Scanner(self.theirs, scans, engines.ObedientEngine(), KEY,
                            8, busy_poll_us, set(), None)

    def _run(self):
        with self.theirs:
            try:
                self.scanner.run()
            except EOFError:
                self.ended = True
            for session in self.scanner._sessions.values():
                session.link.close()

    def start(self):
        self.thread.start()
        self.addCleanup(self.thread.join, base.PATIENCE)
        self.addCleanup(self.main.close)
        self.assertEqual({'type': 'ready'}, self.told())

    def session(self, slots=0):
        ours, theirs = socket.socketpair()
        monitor = base.Monitor(ours)
        self.addCleanup(monitor.close)
        monitor.key = KEY
        if slots:
            monitor.fds = [ring.create(slots)]
            monitor.use(slots)
        theirs.setblocking(False)
        with theirs:
            socket.send_fds(
                self.main,
                [control.pack('session', session=next(self.numbers),
                              slots=slots)],
                [theirs.fileno(), *monitor.fds])
        return monitor

    def told(self):
        return control.unpack(self.main.recv(control.MESSAGE_MAX))

    def ask(self, monitor, page):
        return monitor.ask(page.ljust(4096, b'\0')).result

    def test_ends_with_the_main_process(self):
        self.start()
        monitor = self.session()
        self.ask(monitor, b'')
        self.main.close()
        self.thread.join(base.PATIENCE)
        self.assertTrue(self.ended)

    def test_failures_are_told_now_and_then(self):
        with mock.patch.object(scan, '_FAULT_PERIOD', 60):
            self.start()
            monitor = self.session()
            for _ in range(5):
                self.assertEqual(wire.Result.UNKNOWN,
                                 self.ask(monitor, b'raise'))
            monitor.close()
            self.assertEqual(
                {'type': 'fault', 'session': 1,
                 'reason': r'ValueError: as the page says\n'}, self.told())
            closed = self.told()
            self.assertEqual('closed', closed['type'])
            self.assertEqual(5, closed['counts']['unknown'])

    def test_distinct_is_bounded_at_the_cost_of_the_largest(self):
        with mock.patch.object(scan, 'DISTINCT_MAX', 10):
            self.start()
            small, large = self.session(), self.session()
            for number in range(3):
                self.ask(small, b'small %d' % (number % 2))
            for number in range(9):
                self.ask(large, b'large %d' % number)
            # The large one gave up, which leaves room again.
            for number in range(8):
                self.ask(small, b'more %d' % number)
            counts = {}
            for monitor in (small, large):
                monitor.close()
                closed = self.told()
                counts[closed['session']] = closed['counts']
            self.assertEqual((10, 11),
                             (counts[1]['distinct'], counts[1]['fetches']))
            self.assertEqual((None, 9),
                             (counts[2]['distinct'], counts[2]['fetches']))

    def test_verdicts_do_not_wait_for_the_main_process(self):
        with mock.patch.object(scan, '_WAITING_MAX', 20):
            self.start()
            monitor = self.session()
            pages = 1000
            for _ in range(pages):
                self.assertEqual(wire.Result.MATCH,
                                 self.ask(monitor, b'match 1'))
            monitor.close()
            matches = 0
            while (message := self.told())['type'] == 'match':
                matches += 1
            self.assertEqual('closed', message['type'])
            self.assertGreater(matches, 20)
            self.assertGreater(message['counts']['dropped'], 0)
            self.assertEqual(pages, matches + message['counts']['dropped'])

    def test_matches_of_one_page_are_bounded(self):
        self.start()
        monitor = self.session()
        self.assertEqual(wire.Result.MATCH, self.ask(monitor, b'match 1000'))
        monitor.close()
        for number in range(16):
            told = self.told()
            self.assertEqual((f'R{number}', 1000),
                             (told['record']['rule'],
                              told['record']['rules_matched']))
        self.assertEqual('closed', self.told()['type'])

    def test_skip(self):
        self.start()
        monitor = self.session()
        page = b'match 1'
        self.assertEqual(wire.Result.MATCH, self.ask(monitor, page))
        tag = wire.page_tag(KEY, page.ljust(4096, b'\0'))
        self.main.send(control.pack('skip', tag=tag.hex()))
        base.wait_for(lambda: self.ask(monitor, page) == wire.Result.UNKNOWN,
                      'skip')

    def test_looks_before_it_sleeps(self):
        for sessions, busy_poll_us, waits in (
                ({}, 2000, {None}),
                ({1: None}, 0, {None}),
                ({1: None}, 2000, {0, None})):
            with (self.subTest(sessions=sessions, busy_poll_us=busy_poll_us),
                  mock.patch.object(scan.select, 'epoll') as epoll):
                poll = epoll.return_value.poll
                poll.return_value = []
                scanner = self.make(busy_poll_us)
                scanner._sessions = sessions
                self.assertEqual([], scanner._events())
                self.assertEqual(
                    waits, {call.args[0] for call in poll.call_args_list})

    def test_looks_no_longer_than_it_must(self):
        with mock.patch.object(scan.select, 'epoll') as epoll:
            poll = epoll.return_value.poll
            poll.side_effect = [[], [], ['event']]
            scanner = self.make(10_000_000)
            scanner._sessions = {1: None}
            self.assertEqual(['event'], scanner._events())
        self.assertEqual([mock.call(0)] * 3, poll.call_args_list)

    def test_looks_into_the_ring_that_was_busy(self):
        with mock.patch.object(scan.select, 'epoll') as epoll:
            poll = epoll.return_value.poll
            scanner = self.make(10_000_000)
            session = scan.Session(1, mock.Mock())
            scanner._sessions = {1: session}
            scanner._recent = session
            # Whatever is in it, others have their chance.
            poll.side_effect = [['event']]
            self.assertEqual(['event'], scanner._events())
            session.link.waiting.side_effect = [False, False, True]
            poll.side_effect = [[], [], []]
            self.assertEqual([], scanner._events())
        self.assertEqual([mock.call(0)] * 4, poll.call_args_list)
        self.assertEqual([session], list(scanner._queue))

    def test_ring_that_is_filled_after_the_end(self):
        self.start()
        monitor = self.session(slots=8)
        page = b'sleep 0.02'.ljust(4096, b'\0')
        for _ in range(6):
            monitor.send(page)
        monitor.socket.shutdown(socket.SHUT_WR)
        answers = 0
        # There are always some more to come, but they come too late.
        while monitor.frame() is not None:
            answers += 1
            self.assertLess(answers, 100)
            monitor.send(page)
        self.assertGreaterEqual(answers, 6)
        self.assertEqual('peer closed the connection',
                         self.told()['reason'])

    def test_ring_and_socket_take_turns(self):
        monitors = [self.session(slots=8), self.session(), self.session(8)]
        page = b'sleep 0.05'.ljust(4096, b'\0')
        for monitor in monitors:
            for _ in range(6):
                monitor.send(page)
        self.start()
        for monitor in monitors:
            monitor.frame()
        # By the third answer of one, all have had one.
        heads = [monitor.ring.verdicts._head[0]
                 for monitor in (monitors[0], monitors[2])]
        self.assertLessEqual(max(heads), 3)
