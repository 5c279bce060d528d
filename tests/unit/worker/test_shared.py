# SPDX-License-Identifier: Apache-2.0
"""What a real worker does with the memory that it shares with a QEMU."""

import contextlib
import errno
import gc
import mmap
import os
import random
import resource
import socket
import threading
import time
import types
from unittest import mock

from tests.unit.worker import base
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import pool

#: Of the indices in the ring.
REQUEST_HEAD, REQUEST_TAIL, VERDICT_HEAD, VERDICT_TAIL = 64, 128, 192, 256


def files(pid):
    """How many files a process has open."""
    return len(os.listdir(f'/proc/{pid}/fd'))


def lookup(table, tag, entries):
    """Look a tag up as QEMU does, written down from the layout."""
    number = int.from_bytes(tag[:4], 'little') % (entries // 4)
    line = os.pread(table, 64, 4096 + number * 64)
    return tag in [line[at:at + 16] for at in range(0, 64, 16)]


class WelcomeTest(base.TestCase):

    def _hello(self, **changes):
        monitor = self.connect()
        return monitor, monitor.hello(flags=wire.SHARED, **changes)

    def test_table_and_ring(self):
        self.start(table_entries=4096, ring_slots=16)
        monitor, welcome = self._hello()
        self.assertEqual((4096, 16), (
            welcome.table_entries, welcome.ring_slots))
        self.assertEqual(4096 + 16 * 4096, os.fstat(monitor.table).st_size)
        self.assertEqual(
            b'VAPT\1\0\0\0' + welcome.epoch.to_bytes(8, 'little'),
            os.pread(monitor.table, 16, 0))
        self.assertEqual(b'VAPR\1\0\0\0\x10\0\0\0',
                         os.pread(monitor.fds[0], 12, 0))
        self.assert_serves(monitor)
        self.assertIn('; ring; scan process', self.log())

    def test_defaults(self):
        self.start()
        _, welcome = self._hello()
        self.assertEqual((1 << 20, 64), (
            welcome.table_entries, welcome.ring_slots))

    def test_parts(self):
        for table, slots in ((0, 0), (4, 0), (0, 2)):
            self.start(table_entries=table, ring_slots=slots)
            monitor, welcome = self._hello()
            self.assertEqual((table, slots), (
                welcome.table_entries, welcome.ring_slots))
            self.assert_serves(monitor)
            self.stop()

    def test_qemu_that_takes_none(self):
        self.start()
        monitor = self.connect()
        welcome = monitor.hello()
        self.assertEqual((0, 0, []), (
            welcome.table_entries, welcome.ring_slots, monitor.fds))
        self.assert_serves(monitor)
        self.assertIn('; socket; scan process', self.log())

    def test_socket_where_there_is_no_memory(self):
        self.start()
        pid = self.process.pid
        idle = files(pid)
        first, _ = self._hello()
        self.assert_serves(first)
        base.wait_for(lambda: files(pid) == idle, 'end of the handshake')
        for _ in range(2):
            # For the connection.
            limits = base.no_more_files(pid, but=1)
            monitor, welcome = self._hello()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            self.assertEqual(0, welcome.ring_slots)
            self.assertIsNotNone(monitor.table)
            self.assert_serves(monitor)
        base.wait_for(lambda: files(pid) == idle, 'nothing left open')
        self.assertEqual(1, self.log().count(
            'it uses its socket: Too many open files'))
        self.assertEqual(64, self._hello()[1].ring_slots)

    def test_nothing_is_left_of_those_who_come_and_go(self):
        self.start()
        pids = (self.process.pid, *self.scan_processes())
        monitor, _ = self._hello()
        self.assert_serves(monitor)
        monitor.close()
        self.records(1, event='closed')
        before = [files(pid) for pid in pids]
        # What other tests of this process have left goes at any time.
        gc.collect()
        ours = files(os.getpid())
        for number in range(300):
            monitor, _ = self._hello()
            if number % 2:
                monitor.ask(base.CLEAN)
            monitor.close()
        self.records(301, event='closed')
        base.wait_for(lambda: [files(pid) for pid in pids] == before,
                      f'{before} files again')
        gc.collect()
        self.assertLessEqual(files(os.getpid()), ours)


class FilesTest(base.TestCase):

    def _rings(self, sessions, soft, hard):
        with (mock.patch.object(pool.resource, 'getrlimit',
                                return_value=(soft, hard)),
              mock.patch.object(pool.resource, 'setrlimit') as setrlimit):
            rings = pool._rings_max(sessions)
        return rings, [call.args[1] for call in setrlimit.call_args_list]

    def test_limit_is_raised_as_far_as_it_must(self):
        infinite = resource.RLIM_INFINITY
        self.assertEqual((256, [(576, 4096)]), self._rings(256, 256, 4096))
        self.assertEqual((256, [(576, infinite)]),
                         self._rings(256, 256, infinite))
        self.assertEqual((256, []), self._rings(256, 576, 576))
        self.assertEqual((256, []), self._rings(256, infinite, infinite))

    def test_as_many_rings_as_there_is_room_for(self):
        for hard, rings in ((575, 255), (574, 254), (321, 1), (320, 0),
                            (64, 0)):
            with (self.subTest(hard),
                  self.assertLogs(pool.LOG, 'WARNING') as logs):
                self.assertEqual(rings, self._rings(256, 32, hard)[0])
            self.assertIn(f'enough for {rings} rings', logs.output[0])

    def test_worker_under_a_low_limit(self):
        with mock.patch.object(
                base, 'COMMAND', ('prlimit', '--nofile=71:71', *base.COMMAND)):
            self.start(max_sessions=5, processes=1)
        slots = []
        for _ in range(5):
            monitor = self.connect()
            slots.append(monitor.hello(flags=wire.SHARED).ring_slots)
            self.assert_serves(monitor)
        self.assertEqual([64, 64, 0, 0, 0], slots)


class TableTest(base.TestCase):

    flags = wire.SHARED

    def test_only_clean_pages_are_in_it(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=1800, table_entries=4096)
        monitor, other = self.session(), self.session(flags=0)
        rng = random.Random(2018)
        clean = [rng.randbytes(4096) for _ in range(20)]
        for number, page in enumerate(clean):
            self.assertFalse(lookup(
                monitor.table, wire.page_tag(monitor.key, page), 4096))
            # Whoever asks.
            self.assertEqual(wire.Result.CLEAN, (
                other, monitor)[number % 2].ask(page).result)
        self.assertEqual(wire.Result.MATCH,
                         monitor.ask(base.MATCHING).result)
        self.assertEqual(wire.Result.UNKNOWN, monitor.ask(base.SLOW).result)
        monitor.ask(base.CLEAN)  # What was asked before is done by then.

        def found(page):
            return lookup(monitor.table, wire.page_tag(monitor.key, page),
                          4096)

        base.wait_for(lambda: all(map(found, clean)), 'clean pages')
        self.assertFalse(found(base.MATCHING))
        self.assertFalse(found(base.SLOW))

    def test_all_scan_processes_write_it(self):
        self.start(processes=2)
        for number in range(2):
            monitor = self.session()
            page = b'%d' % number + bytes(4095)
            monitor.ask(page)
            base.wait_for(lambda page=page, monitor=monitor: lookup(
                monitor.table, wire.page_tag(monitor.key, page), 1 << 20),
                'the page')

    def test_it_survives_scan_processes(self):
        self.start()
        monitor = self.session()
        monitor.ask(base.CLEAN)
        tag = wire.page_tag(monitor.key, base.CLEAN)
        base.wait_for(lambda: lookup(monitor.table, tag, 1 << 20), 'page')
        pid, = self.scan_processes()
        os.kill(pid, 9)
        self.assert_closed(monitor)
        again = self.session()
        self.assertEqual(monitor.key, again.key)
        self.assertTrue(lookup(again.table, tag, 1 << 20))

    def test_a_false_tag_is_not_put_in(self):
        self.start()
        monitor, bad = self.session(), self.session()
        tag = wire.page_tag(bad.key, base.MATCHING)
        bad.send(base.CLEAN, tag=tag)
        self.assert_closed(bad)
        self.assertFalse(lookup(monitor.table, tag, 1 << 20))

    def test_peer_cannot_write_it(self):
        self.start()
        monitor = self.session()
        for write in (lambda: os.pwrite(monitor.table, b'x', 4096),
                      lambda: mmap.mmap(monitor.table, 0),
                      lambda: os.ftruncate(monitor.table, 0)):
            with self.assertRaises(OSError) as caught:
                write()
            self.assertIn(caught.exception.errno, (
                errno.EACCES, errno.EBADF, errno.EINVAL))


class HostileTest(base.TestCase):
    """A peer with the ring ends its own session, and nothing else."""

    flags = wire.SHARED

    def setUp(self):
        super().setUp()
        # One process, so that it serves them all.
        self.start(max_in_flight=8, ring_slots=16)
        self.good = self.session()
        self.bad = self.session()
        self.assert_serves(self.bad)
        self.memory = mmap.mmap(self.bad.fds[0], 0)

    def write(self, offset, value):
        if isinstance(offset, str):
            return super().write(offset, value)
        self.memory[offset:offset + len(value)] = value
        return None

    def assert_only_it_ends(self, reason):
        self.assert_closed(self.bad)
        closed, = self.records(1, event='closed')
        self.assertRegex(closed['reason'], reason)
        self.assert_serves(self.good)

    def test_index_out_of_range(self):
        for number, head in enumerate((
                2 + 9, 2 + 17, 0, 1, 0x80000000, 0xffffffff)):
            with self.subTest(head):
                bad = self.session()
                self.assert_serves(bad)
                memory = mmap.mmap(bad.fds[0], 0)
                memory[64:68] = head.to_bytes(4, 'little')
                bad.tell()
                self.assert_closed(bad)
                self.assert_serves(self.good)
                closed = self.records(number + 1, event='closed')
                self.assertEqual(
                    {'protocol: more frames wait in the ring than may'},
                    {record['reason'] for record in closed})

    def test_index_of_verdicts_out_of_range(self):
        self.write(VERDICT_TAIL, (3).to_bytes(4, 'little'))
        self.bad.send(base.CLEAN)
        self.assert_only_it_ends('^protocol: the ring is full')

    def test_verdicts_are_not_taken(self):
        for number in range(16):
            self.bad.send(base.CLEAN)
            base.wait_for(lambda number=number: self.memory[
                VERDICT_HEAD] == 2 + number + 1, 'the verdict')
        self.bad.send(base.CLEAN)
        self.bad.ring.verdicts._count = 2 + 16
        self.assert_only_it_ends('^protocol: the ring is full')

    def test_indices_of_the_worker_are_not_read(self):
        for offset in (REQUEST_TAIL, VERDICT_HEAD):
            self.write(offset, b'\xff' * 4)
            # It is for QEMU to see where the verdict is.
            self.bad.send(base.CLEAN)
            base.wait_for(lambda: self.memory[VERDICT_HEAD] in (3, 4), 'it')
        self.assertEqual((4, 4), (
            self.memory[REQUEST_TAIL], self.memory[VERDICT_HEAD]))
        self.bad.close()
        self.records(1, event='closed', reason='peer closed the connection')

    def test_bad_frames(self):
        for name, change in (
                ('magic', (0, b'X')), ('version', (4, b'\2')),
                ('type', (6, b'\4')), ('length', (8, b'\0')),
                ('reserved', (12, b'\1')), ('offset', (16 + 16, b'\1')),
                ('cpl', (16 + 60, b'\4')), ('flags', (16 + 61, b'\x80')),
                ('tag', (16 + 64, b'some other tag!!')),
                ('name', (16 + 80, b'a\0b')),
                ('page', (16 + 176 + 512 + 4095, b'\1'))):
            with self.subTest(name):
                bad = self.session()
                self.assert_serves(bad)
                data = bytearray(bad.request(
                    name.encode().ljust(4096, b'\0')).pack())
                offset, value = change
                data[offset:offset + len(value)] = value
                bad.publish(bytes(data))
                self.assert_closed(bad)
                self.assert_serves(self.good)
        for record in self.records(11, event='closed'):
            self.assertRegex(record['reason'], '^protocol: ')
            self.assertEqual(2, record['fetches'])

    def test_frames_beside_the_ring_are_doorbells(self):
        self.bad.socket.sendall(self.bad.request(base.MATCHING).pack() * 3)
        self.assertEqual(wire.Result.CLEAN, self.bad.ask(base.CLEAN).result)
        self.bad.close()
        closed, = self.records(1, event='closed')
        self.assertEqual(('peer closed the connection', 3),
                         (closed['reason'], closed['fetches']))

    def test_too_many_in_flight(self):
        pid, = self.scan_processes()
        with base.stopped(pid):
            for _ in range(8):
                self.good.send(base.CLEAN)
            for _ in range(9):
                self.bad.send(base.CLEAN)
        for _ in range(8):
            self.assertEqual(wire.Result.CLEAN, self.good.frame().result)
        self.assert_only_it_ends('^protocol: more frames wait')

    def test_slots_change_after_they_were_published(self):
        stop = threading.Event()
        start = 4096 + 16 + 176 + 512
        contents = bytes(100), base.base.SIGNATURE.ljust(100, b'\0')

        def flip():
            while not stop.is_set():
                for content in contents:
                    for slot in range(16):
                        at = start + slot * 5376
                        self.memory[at:at + 100] = content

        thread = threading.Thread(target=flip)
        thread.start()
        matching = []
        ended = 0
        try:
            for number in range(300):
                # Each is new: its tag has to be looked at.
                rest = number.to_bytes(8, 'little')
                matching.append(base.base.SIGNATURE.ljust(4088, b'\0') + rest)
                verdict = self.bad.ask(bytes(4088) + rest)
                if verdict is None:
                    # A mixture, or not what the tag says.
                    ended += 1
                    self.bad.close()
                    self.bad = self.session()
                    self.memory = mmap.mmap(self.bad.fds[0], 0)
                else:
                    self.assertEqual(wire.Result.CLEAN, verdict.result)
        finally:
            stop.set()
            thread.join()
        # It was fast enough, or the test shows nothing.
        self.assertGreater(ended, 3)
        for page in matching:
            self.assertFalse(lookup(
                self.good.table, wire.page_tag(self.good.key, page), 1 << 20))
            self.assertEqual(wire.Result.MATCH, self.good.ask(page).result)

    def test_doorbells_are_not_taken(self):
        # So many that the socket is full, and then some.
        for _ in range(3000):
            self.bad.send(base.CLEAN)
            data = None
            deadline = time.monotonic() + base.PATIENCE
            while data is None and time.monotonic() < deadline:
                data = self.bad.ring.verdicts.take()
            self.assertIsNotNone(data)
        self.assert_serves(self.good)
        self.assert_serves(self.bad)

    def test_storm_of_doorbells(self):
        stop = threading.Event()

        def storm():
            while not stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    self.bad.socket.send(bytes(999), socket.MSG_DONTWAIT)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(20):
                self.assert_serves(self.good)
        finally:
            stop.set()
            thread.join()
        self.assert_serves(self.bad)

    def test_no_doorbell(self):
        # The busy poll may see it, but then nothing does.
        time.sleep(0.05)
        self.bad.ring.requests.put(self.bad.request(base.CLEAN).pack())
        self.assert_serves(self.good)
        self.bad.tell()
        self.assertEqual(wire.Result.CLEAN, self.bad.frame().result)

    def test_memory_cannot_be_taken_away(self):
        for size in (0, 4096, 1 << 30):
            with self.assertRaises(PermissionError):
                os.truncate(self.bad.fds[0], size)
        # A hole reads as zeros.
        self.write(4096, bytes(16 * (5376 + 256)))
        self.write(REQUEST_HEAD, (3).to_bytes(4, 'little'))
        self.bad.tell()
        self.assert_only_it_ends('^protocol: magic is 00000000')

    def test_requests_of_one_that_is_gone_are_scanned(self):
        pid, = self.scan_processes()
        with base.stopped(pid):
            for page in (base.CLEAN, base.MATCHING, base.CLEAN):
                self.bad.send(page)
            self.bad.close()
        closed, = self.records(1, event='closed')
        self.assertEqual((5, 2), (closed['fetches'], closed['matches']))

    def test_busy_ring_leaves_the_others_their_turn(self):
        other = self.session(flags=0)
        stop = threading.Event()

        def keep_busy():
            while not stop.is_set():
                for _ in range(8):
                    self.bad.send(base.CLEAN)
                for _ in range(8):
                    self.bad.frame()

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            for monitor in (self.good, other) * 20:
                begin = time.monotonic()
                self.assert_serves(monitor)
                self.assertLess(time.monotonic() - begin, 5)
        finally:
            stop.set()
            thread.join()

    def test_garbage(self):
        rng = random.Random(20178)
        for _ in range(60):
            bad = self.session()
            memory = mmap.mmap(bad.fds[0], 0)
            data = bytearray(bad.request(base.CLEAN).pack())
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            memory[4096:4096 + len(data)] = data
            memory[64:68] = rng.randrange(1, 5).to_bytes(4, 'little')
            bad.tell()
            for _ in range(20):
                at = rng.choice((
                    rng.randrange(4096), rng.randrange(len(memory))))
                memory[at] = rng.randrange(256)
            bad.tell()
            bad.close()
        self.records(60, event='closed')
        self.assert_serves(self.good)


class MachineTest(base.TestCase):

    def test_other_machines_have_no_ring(self):
        options = types.SimpleNamespace(
            max_sessions=1, ring_slots=8, state_dir=str(self.top))
        for supported, slots in ((True, 8), (False, 0)):
            with mock.patch.object(ring, 'SUPPORTED', supported):
                made = pool.Pool(options, None, None)
            self.assertEqual(slots, made._ring_slots)
