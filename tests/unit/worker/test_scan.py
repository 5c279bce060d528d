# SPDX-License-Identifier: Apache-2.0
"""The loop of a scan process, run in a thread."""

import os
import socket
import threading
import time
from unittest import mock

from tests.unit.worker import base
from tests.unit.worker import engines
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import budget
from virtav_nova.worker import control
from virtav_nova.worker import scan
from virtav_nova.worker import table

KEY = bytes(32)


class TestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.main, self.theirs = control.pair()
        self.main.settimeout(base.PATIENCE)
        self.scanner = self.make(busy_poll_us=100)
        self.thread = threading.Thread(target=self._run)
        self.numbers = iter(range(1, 100))

    def make(self, busy_poll_us, budget=1.0):
        fd = board.Boards.create(2)
        self.boards = board.Boards(fd, 2)
        os.close(fd)
        self.engine = engines.ObedientEngine()
        return scan.Scanner(
            self.theirs, self.boards.board(0), self.engine,
            scan.Settings(8, busy_poll_us, 5000, 1 << 20, budget, {}))

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

    def session(self, slots=0, instance=None, reads=False, table=None,
                scope=0):
        """Open a session.

        :param table: file descriptor of a verdict table
        """
        number = next(self.numbers)
        ours, theirs = socket.socketpair()
        monitor = base.Monitor(ours)
        self.addCleanup(monitor.close)
        monitor.key = KEY
        if slots:
            monitor.fds = [ring.create(slots)]
            monitor.use(slots)
        theirs.setblocking(False)
        fds = [theirs.fileno(), *monitor.fds]
        if table is not None:
            fds.append(table)
        with theirs:
            socket.send_fds(
                self.main,
                [control.pack(
                    'session', session=number, slots=slots,
                    instance=instance or str(number), scope=scope,
                    key=KEY.hex(), table=table is not None,
                    shared=table is not None, read=reads)], fds)
        return monitor

    def counted(self, *names):
        counts = board.totals([self.boards.board(0)])
        return tuple(counts[name] for name in names)

    def told(self):
        return control.unpack(self.main.recv(control.MESSAGE_MAX))

    def ask(self, monitor, page):
        return monitor.ask(page.ljust(4096, b'\0')).result


class ScannerTest(TestCase):

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
                {'type': 'fault', 'session': 1, 'part': None,
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
                                 self.ask(monitor, b'match 16'))
            monitor.close()
            matches = told = 0
            while (message := self.told())['type'] == 'match':
                told += 1
                matches += 1 + message['record']['repeats']
            self.assertEqual('closed', message['type'])
            self.assertGreater(told, 20)
            self.assertGreater(message['counts']['dropped'], 0)
            self.assertEqual(16 * pages,
                             matches + message['counts']['dropped'])

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
        tag = wire.page_tag(KEY, page.ljust(4096, b'\0'))
        self.main.send(control.pack('skip', tags=[tag.hex()]))
        base.wait_for(lambda: self.scanner._skip, 'skip')
        self.assertEqual(wire.Result.UNKNOWN, self.ask(monitor, page))

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
            session = scan.Session(
                1, 'instance', mock.Mock(), mock.Mock(), budget.Budget(1),
                False, False)
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

        def page(number):
            # Each has to be scanned.
            return (b'sleep 0.02%05d' % number).ljust(4096, b'\0')

        for number in range(6):
            monitor.send(page(number))
        monitor.socket.shutdown(socket.SHUT_WR)
        answers = 0
        # There are always some more to come, but they come too late.
        while monitor.frame() is not None:
            answers += 1
            self.assertLess(answers, 100)
            monitor.send(page(answers + 100))
        self.assertGreaterEqual(answers, 6)
        self.assertEqual('peer closed the connection',
                         self.told()['reason'])

    def test_ring_and_socket_take_turns(self):
        monitors = [self.session(slots=8), self.session(), self.session(8)]
        for monitor in monitors:
            for number in range(6):
                monitor.send((b'sleep 0.05%04d%d' % (
                    number, monitors.index(monitor))).ljust(4096, b'\0'))
        self.start()
        for monitor in monitors:
            monitor.frame()
        # By the third answer of one, all have had one.
        heads = [monitor.ring.verdicts._head[0]
                 for monitor in (monitors[0], monitors[2])]
        self.assertLessEqual(max(heads), 3)


class UnitTest(TestCase):
    """Pages and junctions."""

    def test_junction_matches(self):
        self.start()
        monitor = self.session()
        # The junction begins with what the engine obeys.
        verdict = monitor.ask(bytes(4096), b'match 1'.ljust(512, b'\0'))
        self.assertEqual(wire.Result.MATCH, verdict.result)
        told = self.told()['record']
        self.assertEqual(('junction', 0x400000 - 512),
                         (told['form'], told['start']))
        page = bytes(3584) + b'match 1'.ljust(512, b'\0')
        verdict = monitor.ask(page, after=b'\0')
        self.assertEqual(wire.Result.MATCH, verdict.result)
        told = self.told()['record']
        self.assertEqual(('junction', 0x400000 + 3584),
                         (told['form'], told['start']))
        # The same page beside nothing.
        self.assertEqual(wire.Result.CLEAN, monitor.ask(page).result)

    def test_a_rule_is_told_once(self):
        self.start()
        monitor = self.session()
        # In the page, and in the junction with it.
        page = b'match 1'.ljust(3584, b'\0') + b'match 2'.ljust(512, b'\0')
        self.engine.scan = lambda data: [
            engines.base.Match('R', 'r.yar', [], {}, [])]
        self.assertEqual(wire.Result.MATCH,
                         monitor.ask(page, after=b'x').result)
        monitor.close()
        self.assertEqual('page', self.told()['record']['form'])
        self.assertEqual('closed', self.told()['type'])

    def test_junction_that_cannot_be_scanned(self):
        self.start()
        monitor = self.session()
        self.assertEqual(wire.Result.UNKNOWN, monitor.ask(
            bytes(4096), b'raise'.ljust(512, b'\0')).result)

    def test_tags_have_to_fit(self):
        self.start()
        other = wire.page_tag(KEY, b'other')
        for name in ('tag', 'before_tag', 'after_tag'):
            with self.subTest(name):
                monitor = self.session()
                monitor.send(name.encode().ljust(4096, b'\0'), b'x', b'x',
                             **{name: other})
                self.assertIsNone(monitor.frame())
                self.assertEqual('protocol: the tag does not fit the bytes',
                                 self.told()['reason'])

    def test_each_is_scanned_once(self):
        self.start()
        monitor = self.session()
        for _ in range(3):
            monitor.ask(bytes(4096), b'a', b'b')
        self.assertEqual((9, 6, 3), self.counted('units', 'cached', 'scans'))
        # Of another page with the same edge, only the page is new.
        monitor.ask(bytes(2048) + b'x' + bytes(2047), b'a', b'b')
        self.assertEqual((12, 8, 4), self.counted('units', 'cached', 'scans'))

    def test_clean_units_go_into_the_table(self):
        fd = table.create(64, 1)
        self.addCleanup(os.close, fd)
        noted = table.VerdictTable(fd)
        self.start()
        monitor = self.session(table=fd)
        request = monitor.send(bytes(4096), b'match 1'.ljust(512, b'\0'),
                               b'after')
        self.assertEqual(wire.Result.MATCH, monitor.frame().result)
        self.ask(monitor, b'next')
        self.assertEqual(
            (True, False, True), tuple(map(noted.contains, (
                request.tag, request.before_tag, request.after_tag))))
        # One that lost its place comes again, and is put in again.
        os.pwrite(fd, bytes(64 * 16), 4096)
        monitor.ask(bytes(4096), after=b'after')
        self.ask(monitor, b'next')
        self.assertTrue(noted.contains(request.tag))
        self.assertTrue(noted.contains(request.after_tag))

    def test_what_is_in_the_table_is_not_scanned(self):
        fd = table.create(64, 1)
        self.addCleanup(os.close, fd)
        page = b'match 1'.ljust(4096, b'\0')
        table.VerdictTable(fd).add(wire.page_tag(KEY, page))
        self.start()
        monitor = self.session(table=fd)
        # As another process found it clean.
        self.assertEqual(wire.Result.CLEAN, monitor.ask(page).result)
        self.assertEqual((1, 0), self.counted('tabled', 'scans'))

    def test_page_with_parts_is_not_in_the_table(self):
        fd = table.create(64, 1)
        self.addCleanup(os.close, fd)
        noted = table.VerdictTable(fd)
        self.engine.examine = lambda data: engines.base.Examined(
            [], (engines.base.Fragment(1, 2),))
        self.start()
        monitor = self.session(table=fd)
        for _ in range(2):
            verdict = monitor.ask(base.CLEAN)
            self.assertEqual(wire.Result.CLEAN, verdict.result)
        self.ask(monitor, b'match 1')
        self.assertFalse(noted.contains(verdict.tag))
        self.assertEqual((2, 3), self.counted('scans', 'fragments'))


class JoinTest(TestCase):

    def test_waits_for_another_process(self):
        self.start()
        monitor = self.session()
        other = self.boards.board(1)
        page = b'match 1'.ljust(4096, b'\0')
        other.begin(1, wire.page_tag(KEY, page))
        request = monitor.send(page)
        # Others are served meanwhile.
        self.assertEqual(wire.Result.CLEAN,
                         self.ask(self.session(), b''))
        self.assertEqual((1, 0), self.counted('scans', 'joined'))
        other.end()
        verdict = monitor.frame()
        self.assertEqual((request.id, wire.Result.MATCH),
                         (verdict.id, verdict.result))
        self.assertEqual((1,), self.counted('joined'))

    def test_takes_what_the_other_found(self):
        fd = table.create(64, 1)
        self.addCleanup(os.close, fd)
        self.start()
        monitor = self.session(table=fd)
        other = self.boards.board(1)
        page = b'match 1'.ljust(4096, b'\0')
        tag = wire.page_tag(KEY, page)
        other.begin(1, tag)
        monitor.send(page)
        base.wait_for(lambda: self.scanner._aside, 'wait')
        table.VerdictTable(fd).add(tag)
        other.end()
        self.assertEqual(wire.Result.CLEAN, monitor.frame().result)
        self.assertEqual((0,), self.counted('scans'))

    def test_other_process_dies(self):
        self.start()
        monitor = self.session()
        other = self.boards.board(1)
        page = b'match 1'.ljust(4096, b'\0')
        tag = wire.page_tag(KEY, page)
        other.begin(1, tag)
        monitor.send(page)
        base.wait_for(lambda: self.scanner._aside, 'wait')
        self.main.send(control.pack('skip', tags=[tag.hex()]))
        base.wait_for(lambda: self.scanner._skip, 'skip')
        other.end()
        self.assertEqual(wire.Result.UNKNOWN, monitor.frame().result)

    def test_session_ends_meanwhile(self):
        self.start()
        monitor = self.session()
        other = self.boards.board(1)
        page = b'match 1'.ljust(4096, b'\0')
        other.begin(1, wire.page_tag(KEY, page))
        monitor.send(page)
        base.wait_for(lambda: self.scanner._aside, 'wait')
        monitor.close()
        other.end()
        self.assertEqual('match', self.told()['type'])
        self.assertEqual('closed', self.told()['type'])


    def test_other_process_that_never_ends(self):
        # As one that was taken over could make this one believe.
        self.scanner.settings = self.scanner.settings._replace(
            scan_timeout_ms=50)
        self.start()
        page = b'match 1'.ljust(4096, b'\0')
        self.boards.board(1).begin(1, wire.page_tag(KEY, page))
        self.assertEqual(wire.Result.MATCH, self.session().ask(page).result)


class MoveTest(TestCase):

    def _moved(self, slots):
        self.start()
        monitor, other = self.session(slots), self.session(slots)
        for page in (b'match 1', b'', b''):
            monitor.send(page.ljust(4096, b'\0'))
        base.wait_for(lambda: self.counted('clean', 'match') == (2, 1),
                      'verdicts')
        self.main.send(control.pack('move', session=1))
        self.assertEqual(
            [wire.Result.MATCH, wire.Result.CLEAN, wire.Result.CLEAN],
            [monitor.frame().result for _ in range(3)])
        refused = monitor.frame()
        self.assertEqual((wire.Refusal.RELOAD, 'the rules changed'),
                         (refused.code, refused.reason))
        self.assertIsNone(monitor.frame())
        self.assertEqual('match', self.told()['type'])
        self.assertEqual('the rules changed', self.told()['reason'])
        self.assertEqual(wire.Result.CLEAN, self.ask(other, b''))
        # One that is gone.
        self.main.send(control.pack('move', session=1))
        self.assertEqual(wire.Result.CLEAN, self.ask(other, b''))

    def test_socket(self):
        self._moved(0)

    def test_ring(self):
        self._moved(8)

    def test_peer_that_does_not_listen(self):
        # Or it would keep the rules of before, and with them the worker
        # from loading others.
        self.start()
        monitor = self.session()
        # A verdict is counted and then sent.
        sent = waited = 0
        while waited < 200:
            if self.counted('clean') == (sent,):
                monitor.send(bytes(4096))
                sent += 1
                waited = 0
            else:
                waited += 1
                time.sleep(0.001)
        with mock.patch.object(scan, '_LISTEN', 0.1):
            self.main.send(control.pack('move', session=1))
            self.assertEqual('the rules changed', self.told()['reason'])


class ReadTest(TestCase):

    def session(self, *arguments, **changes):
        return super().session(*arguments, reads=True, **changes)

    def _collect(self):
        """Have each page with parts asked for again, and believed then."""
        scanner = self.scanner
        told = self.collected = []

        class Collector(scan.Collector):

            def __init__(self):
                self.parked = []

            def note(self, session, request, units, matched):
                self.parked.append((session, request, units))
                if not session.reading:
                    scanner.read(session, request.gpa)
                return True

            def page(self, session, answer):
                told.append((answer.gpa, answer.status,
                             bytes(answer.content)))
                self.stop(session)

            def stop(self, session):
                for one in self.parked:
                    scanner.settle(*one)
                self.parked = []

            def close(self, session):
                told.append('closed')

            def due(self):
                return None

            def keep(self):
                pass

        scanner.collector = Collector()
        self.engine.examine = lambda data: engines.base.Examined(
            [], (engines.base.Fragment(1, 2),))

    def _read(self, slots):
        self._collect()
        self.start()
        monitor = self.session(slots)
        request = monitor.send(base.CLEAN)
        asked = monitor.frame()
        self.assertEqual(request.gpa, asked.gpa)
        # Not parked for ever, but no verdict before that.
        second = monitor.send(base.CLEAN)
        monitor.publish(wire.Page(asked.id, asked.gpa, wire.Status.OK,
                                  base.MATCHING).pack())
        verdicts = [monitor.frame() for _ in range(2)]
        self.assertEqual(
            [(request.id, 0), (second.id, 0)],
            [(verdict.id, verdict.result) for verdict in verdicts])
        self.assertEqual((request.gpa, 0, base.MATCHING), self.collected[0])
        monitor.close()
        self.assertEqual(2, self.told()['counts']['fetches'])
        self.assertEqual('closed', self.collected[-1])

    def test_socket(self):
        self._read(0)

    def test_ring(self):
        self._read(8)

    def test_page_that_was_not_asked_for(self):
        self._collect()
        self.start()
        for changes in ({'id': 2}, {'gpa': 1 << 40}):
            monitor = self.session()
            monitor.send(base.CLEAN)
            asked = monitor.frame()
            answer = wire.Page(asked.id, asked.gpa, wire.Status.ABSENT,
                               bytes(4096))
            monitor.publish(answer._replace(**changes).pack())
            self.assertIsNone(monitor.frame())
            self.assertRegex(self.told()['reason'], 'not asked')
        monitor = self.session()
        monitor.publish(answer.pack())
        self.assertIsNone(monitor.frame())
        self.assertRegex(self.told()['reason'], 'not asked')

    def test_end_settles_what_is_parked(self):
        self._collect()
        self.start()
        monitor = self.session(8)
        monitor.send(base.CLEAN)
        monitor.frame()
        self.main.send(control.pack('drain', seconds=9))
        self.assertEqual(0, monitor.frame().result)
        self.assertIsNone(monitor.frame())


class BudgetTest(TestCase):

    def setUp(self):
        super().setUp()
        self.scanner = self.make(100, budget=0.05)

    def test_flood_is_served_after_the_others(self):
        with mock.patch.object(budget, '_SAVED', 0.06):
            greedy = self.session(instance='greedy')
            for number in range(8):
                greedy.send((b'sleep 0.05%04d' % number).ljust(4096, b'\0'))
            modest = self.session()
            pages = [(b'sleep 0.001%04d' % number).ljust(4096, b'\0')
                     for number in range(40)]
            for page in pages[:8]:
                modest.send(page)
            self.start()
            for page in pages[8:]:
                modest.frame()
                modest.send(page)
            left = self.scanner._count[board.Counter.DEFERRED]
        self.assertGreater(left, 0)
        # It is not served less for that in the end.
        for _ in range(8):
            self.assertEqual(wire.Result.CLEAN, greedy.frame().result)
        self.assertEqual({'type': 'spent', 'session': 1}, self.told())


    def test_session_that_breaks_the_protocol_pays(self):
        greedy = self.session(instance='greedy')
        greedy.send(b'sleep 0.05'.ljust(4096, b'\0'), b'x',
                    before_tag=wire.page_tag(KEY, b'other'))
        self.start()
        self.assertIsNone(greedy.frame())
        left = self.scanner._budgets._budgets['greedy']._left
        self.assertLess(left, (budget._SAVED - 0.04) * 1e9)


class RepeatTest(TestCase):

    def test_same_match_on_many_pages(self):
        self.start()
        monitor = self.session()
        for number in range(300):
            self.ask(monitor, b'match 1' + b' ' * number)
        monitor.close()
        told = []
        while (message := self.told())['type'] == 'match':
            told.append(message['record'])
        self.assertEqual(300, len(told) + sum(
            record['repeats'] for record in told))
        self.assertLess(len(told), 25)
        self.assertEqual([0] * 16, [
            record['repeats'] for record in told[:16]])
