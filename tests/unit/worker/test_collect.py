# SPDX-License-Identifier: Apache-2.0
"""Rules over several pages: a real worker, and a guest without processor."""

import signal
import socket
import threading
import time
import unittest
from unittest import mock

from tests.unit.worker import base
from tests.unit.worker import guest
from virtav_nova.monitor import wire
from virtav_nova.worker import collect
from virtav_nova.worker import paging

PAGE = wire.PAGE_SIZE
TEXT = 0x7f3a5c7d9000
A, B, C = b'VIRTAV-FIRST-PART', b'VIRTAV-SECOND-PART', b'VIRTAV-THIRD-PART'
RULES = """
rule Both {
    strings: $a = "%s" $b = "%s"
    condition: all of them
}
rule Never {
    strings: $a = "%s" $c = "%s"
    condition: $a and $c and filesize < 5000
}
""" % (A.decode(), B.decode(), A.decode(), C.decode())


class TestCase(base.TestCase):

    flags = wire.READ
    options = {}
    rules = RULES

    def setUp(self):
        super().setUp()
        self.memory = guest.Memory()
        self.start(self.rules, engine='twostage', **self.options)
        self.monitor = self.connect_reading()

    def connect_reading(self):
        monitor = self.connect()
        self.assertIsInstance(
            monitor.hello(flags=self.flags, deadline_ms=5000), wire.Welcome)
        return monitor

    def send(self, space, gva, monitor=None, **fields):
        """Fetch what is mapped somewhere; does not wait for the verdict."""
        leaf = self.memory.drive(paging.Tables(
            space.mode, space.cr3, 99).translate(gva))
        return (monitor or self.monitor).send(
            bytes(self.memory.pages[leaf.gpa]), gva=gva, gpa=leaf.gpa,
            cr3=space.cr3, **fields)

    def answer(self, read, monitor=None, **changes):
        """Answer a READ."""
        content = self.memory.read(read.gpa)
        page = wire.Page(
            read.id, read.gpa,
            wire.Status.ABSENT if content is None else wire.Status.OK,
            content or bytes(PAGE))._replace(**changes)
        (monitor or self.monitor).publish(page.pack())

    def verdict(self, monitor=None):
        """Answer READs until a verdict comes."""
        monitor = monitor or self.monitor
        while isinstance(frame := monitor.frame(), wire.Read):
            self.answer(frame, monitor)
        return frame

    def fetch(self, space, gva, **fields):
        """Fetch what is mapped somewhere."""
        request = self.send(space, gva, **fields)
        verdict = self.verdict()
        self.assertEqual((request.id, request.generation, request.tag),
                         verdict[:3])
        return verdict

    def two_pages(self):
        space = guest.Space(self.memory)
        space.map(TEXT, A)
        space.map(TEXT + 2 * PAGE, bytes(50) + B)
        return space


class ReadTest(TestCase):

    def test_two_pages(self):
        space = self.two_pages()
        self.assertEqual(wire.Result.CLEAN, self.fetch(space, TEXT).result)
        verdict = self.fetch(space, TEXT + 2 * PAGE)
        self.assertEqual((wire.Result.MATCH, 'Both'), verdict[3:])
        [record] = self.records(1, type='match')
        self.assertEqual(('accumulated', 'Both', TEXT + 2 * PAGE, True), (
            record['form'], record['rule'], record['gva'], record['held']))
        self.assertEqual([TEXT, TEXT + 2 * PAGE], [
            page['gva'] for page in record['pages']])
        self.assertEqual([['$a'], ['$b']], [
            page['strings'] for page in record['pages']])
        self.assertEqual([0, 50], [
            string['offset'] for string in record['strings']])
        self.assertEqual(TEXT, record['start'])
        self.assertIn(A.hex(), record['bytes'])

    def test_the_page_comes_back_for_others(self):
        # It is neither in the table nor known to be clean once and for all.
        space = self.two_pages()
        for _ in range(2):
            self.assertEqual(wire.Result.CLEAN,
                             self.fetch(space, TEXT).result)
            self.assertEqual(wire.Result.MATCH,
                             self.fetch(space, TEXT + 2 * PAGE).result)
            space = self.two_pages()
            self.monitor = self.connect_reading()

    def test_two_processes(self):
        one, two = guest.Space(self.memory), guest.Space(self.memory)
        one.map(TEXT, A)
        two.map(TEXT + 2 * PAGE, B)
        self.fetch(one, TEXT)
        self.assertEqual(wire.Result.CLEAN,
                         self.fetch(two, TEXT + 2 * PAGE).result)

    def test_others_are_served_meanwhile(self):
        space = self.two_pages()
        other = self.connect_reading()
        self.fetch(space, TEXT)
        parked = self.send(space, TEXT + 2 * PAGE)
        read = self.monitor.frame()
        self.assert_serves(other)
        # So are those of the same guest.
        self.monitor.send(base.CLEAN)
        self.assertEqual(wire.Result.CLEAN, self.monitor.frame().result)
        self.answer(read)
        verdict = self.verdict()
        self.assertEqual((parked.id, wire.Result.MATCH),
                         (verdict.id, verdict.result))

    def test_data_that_is_never_fetched(self):
        space = guest.Space(self.memory)
        space.map(TEXT, A)
        space.map(TEXT + 9 * PAGE, B, executable=False)
        space.map(TEXT + 20 * PAGE, b'harmless')
        self.assertEqual(wire.Result.CLEAN, self.fetch(space, TEXT).result)
        reading = threading.Thread(target=self.verdict)
        reading.start()
        [record] = self.records(1, type='match')
        self.assertEqual(('accumulated', TEXT, False), (
            record['form'], record['gva'], record['held']))
        self.assertEqual([TEXT, TEXT + 9 * PAGE], [
            page['gva'] for page in record['pages']])
        # What comes next of this process is not to run.
        self.monitor.socket.settimeout(9)
        time.sleep(0.1)
        self.send(space, TEXT + 20 * PAGE)
        reading.join(base.PATIENCE)
        self.assertFalse(reading.is_alive())
        record = self.records(2, type='match')[1]
        self.assertEqual(TEXT + 20 * PAGE, record['gva'])

    def test_rule_that_holds_in_parts_only(self):
        space = guest.Space(self.memory)
        space.map(TEXT, A)
        space.map(TEXT + 2 * PAGE, C)
        self.fetch(space, TEXT)
        self.assertEqual(wire.Result.CLEAN,
                         self.fetch(space, TEXT + 2 * PAGE).result)

    def test_wrong_answers(self):
        for changes in ({'id': 77}, {'gpa': 0x1000}):
            space = self.two_pages()
            monitor = self.connect_reading()
            self.send(space, TEXT, monitor)
            self.assertEqual(wire.Result.CLEAN, self.verdict(monitor).result)
            self.send(space, TEXT + 2 * PAGE, monitor)
            self.answer(monitor.frame(), monitor, **changes)
            self.assert_closed(monitor)
        monitor = self.connect_reading()
        monitor.publish(wire.Page(
            1, 0x1000, wire.Status.OK, bytes(PAGE)).pack())
        self.assert_closed(monitor)
        self.assert_serves(self.connect_reading())

    def test_drain(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        self.send(space, TEXT + 2 * PAGE)
        self.assertIsInstance(self.monitor.frame(), wire.Read)
        self.assertEqual(0, self.stop())
        # By what was seen.
        self.assertEqual(wire.Result.MATCH, self.monitor.frame().result)

    def test_end_of_a_session_with_a_parked_request(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        self.send(space, TEXT + 2 * PAGE)
        self.assertIsInstance(self.monitor.frame(), wire.Read)
        self.monitor.close()
        self.records(1, type='session', event='closed')
        self.assert_serves(self.connect_reading())

    def stopped_before_the_last(self, space):
        """Ask for more than is answered at a time; the last one is parked."""
        for number in range(3):
            self.monitor.send((b'other%d' % number).ljust(PAGE, b'\x90'))
        self.send(space, TEXT + 2 * PAGE)

    def test_end_of_a_session_before_a_request_is_parked(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        [scanning] = self.scan_processes()
        with base.stopped(scanning):
            self.stopped_before_the_last(space)
            self.monitor.socket.shutdown(socket.SHUT_WR)
        self.records(1, type='session', event='closed')
        self.records(1, type='match', rule='Both')
        self.assertEqual([scanning], self.scan_processes())

    def test_move_before_a_request_is_parked(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        self.write('rules/more.yar',
                   'rule More { strings: $m = "more-more" condition: $m }')
        [scanning] = self.scan_processes()
        with base.stopped(scanning):
            self.stopped_before_the_last(space)
            self.process.send_signal(signal.SIGHUP)
            base.wait_for(lambda: 'is in force, epoch 2' in self.log(),
                          'other rules')
            # Until it was told to have the session connect anew.
            time.sleep(0.5)
        # A deep scan may have begun before.
        *verdicts, refused = [
            frame for frame in iter(self.monitor.frame, None)
            if not isinstance(frame, wire.Read)]
        self.assertEqual([wire.Result.CLEAN] * 3 + [wire.Result.MATCH],
                         [verdict.result for verdict in verdicts])
        self.assertEqual(wire.Refusal.RELOAD, refused.code)

    def test_no_answer(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        begin = time.monotonic()
        self.send(space, TEXT + 2 * PAGE)
        self.assertIsInstance(self.monitor.frame(), wire.Read)
        self.assertEqual(wire.Result.MATCH, self.monitor.frame().result)
        self.assertGreater(time.monotonic() - begin, 0.15)


class RingTest(ReadTest):

    flags = wire.READ | wire.SHARED

    def test_end_while_the_verdicts_have_no_room(self):
        space = self.two_pages()
        self.fetch(space, TEXT)
        [scanning] = self.scan_processes()
        self.send(space, TEXT + 2 * PAGE)
        self.assertIsInstance(self.monitor.frame(), wire.Read)
        self.monitor.ring.verdicts._tail[0] = 12345
        self.monitor.socket.shutdown(socket.SHUT_RDWR)
        self.records(1, type='session', event='closed',
                     reason='protocol: the ring is full')
        self.assert_serves(self.connect_reading())
        self.assertEqual([scanning], self.scan_processes())


class BudgetTest(unittest.TestCase):

    def test_deep_scan_waits_for_others(self):
        made = collect.Collected.__new__(collect.Collected)
        made._scanner = mock.Mock(contended=True)
        session = mock.Mock()
        session.budget.left.return_value = False
        made._due, made._searches = {session: 0.0}, {session: mock.Mock()}
        with mock.patch.object(made, '_work') as work:
            made.keep()
            work.assert_not_called()
            self.assertEqual(0.0, made.due())
            made._scanner.contended = False
            made.keep()
            work.assert_called_once()
            made._scanner.contended = True
            session.budget.left.return_value = True
            made.keep()
        self.assertEqual(2, work.call_count)


class SlowTest(TestCase):
    """A rule that takes for ever, but only over several pages."""

    rules = RULES.replace('condition: all of them', '''
        condition: all of them and
        for any i in (0..1000000000000) : (i * 3 == 1)''')
    options = {'scan_timeout_ms': 200}

    def test_process_is_replaced(self):
        space = self.two_pages()
        [before] = self.scan_processes()
        self.fetch(space, TEXT)
        request = self.send(space, TEXT + 2 * PAGE)
        self.assertIsNone(self.verdict())
        base.wait_for(lambda: before not in self.scan_processes()
                      and self.scan_processes(), 'another process')
        # QEMU asks again. Nobody knows of the first page any more.
        self.monitor = self.connect_reading()
        self.assertEqual(wire.Result.CLEAN, self.fetch(
            space, request.gva, flags=wire.HOLD | wire.RESENT).result)
        self.assert_serves(self.monitor)


class CopiesTest(TestCase):

    flags = 0

    def test_two_pages(self):
        space = self.two_pages()
        self.assertEqual(wire.Result.CLEAN, self.fetch(space, TEXT).result)
        verdict = self.fetch(space, TEXT + 2 * PAGE)
        self.assertEqual((wire.Result.MATCH, 'Both'), verdict[3:])


class OffTest(TestCase):

    options = {'accumulate': False}

    def test_two_pages(self):
        space = self.two_pages()
        for gva in (TEXT, TEXT + 2 * PAGE):
            self.assertEqual(wire.Result.CLEAN,
                             self.fetch(space, gva).result)
