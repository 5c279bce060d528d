# SPDX-License-Identifier: Apache-2.0

import errno
import fcntl
import mmap
import os
import unittest

from tests.unit.monitor import test_wire
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire

REQUEST = test_wire.REQUEST.pack()
VERDICT = test_wire.VERDICT.pack()


class RingTest(unittest.TestCase):

    def make(self, slots, most=1024):
        fd = ring.create(slots)
        self.addCleanup(os.close, fd)
        self.memory = mmap.mmap(fd, 0)
        self.worker = ring.WorkerEnd(fd, slots, most)
        self.monitor = ring.MonitorEnd(fd, slots)
        return fd

    def index(self, offset, value=None):
        """Read or write an index as the other side's C would."""
        if value is not None:
            self.memory[offset:offset + 4] = value.to_bytes(4, 'little')
        return int.from_bytes(self.memory[offset:offset + 4], 'little')

    def test_golden(self):
        # Written down from the layout's tables, as the offsets below.
        for slots, size, verdicts in (
                (2, 16384, 14848), (4, 28672, 25600), (64, 364544, 348160),
                (1024, 5771264, 5509120)):
            with self.subTest(slots):
                self.make(slots)
                self.assertEqual(size, len(self.memory))
                golden = bytearray(size)
                golden[:12] = b'VAPR\1\0\0\0' + slots.to_bytes(4, 'little')
                self.assertEqual(golden, self.memory[:])
                self.monitor.requests.put(REQUEST)
                golden[64] = 1
                golden[4096:4096 + 5312] = REQUEST
                self.assertEqual(golden, self.memory[:])
                self.assertEqual(REQUEST, self.worker.requests.take())
                golden[128] = 1
                self.assertEqual(golden, self.memory[:])
                self.worker.verdicts.put(VERDICT)
                golden[192] = 1
                golden[verdicts:verdicts + 144] = VERDICT
                self.assertEqual(golden, self.memory[:])
                self.assertEqual(VERDICT, self.monitor.verdicts.take())
                golden[256] = 1
                self.assertEqual(golden, self.memory[:])
        # The last slot of 1024 is within the memory.
        self.assertLess(verdicts + 1023 * 256 + 144, size)

    def test_slots_are_used_in_turn(self):
        self.make(4)
        for number in range(11):
            self.monitor.requests.put(
                test_wire.REQUEST._replace(id=number).pack())
            self.assertEqual(
                number, wire.whole(
                    self.worker.requests.take(), wire.Request).id)
            start = 4096 + number % 4 * 5376
            self.assertEqual(number, self.memory[start + 16])

    def test_indices_wrap(self):
        self.make(4)
        for end in (self.monitor.requests, self.worker.requests):
            end._count = 0xfffffffe
        for offset in (64, 128):
            self.index(offset, 0xfffffffe)
        for _ in range(2):
            for _ in range(4):
                self.monitor.requests.put(REQUEST)
            for _ in range(4):
                self.assertTrue(self.worker.requests.waiting())
                self.assertEqual(REQUEST, self.worker.requests.take())
            self.assertFalse(self.worker.requests.waiting())
            self.assertIsNone(self.worker.requests.take())
        self.assertEqual((6, 6), (self.index(64), self.index(128)))

    def test_full(self):
        self.make(4)
        for _ in range(4):
            self.worker.verdicts.put(VERDICT)
        with self.assertRaisesRegex(wire.ProtocolError, 'full'):
            self.worker.verdicts.put(VERDICT)
        self.monitor.verdicts.take()
        self.worker.verdicts.put(VERDICT)

    def test_head_out_of_range(self):
        for head in (5, 0x7fffffff, 0x80000000, 0xffffffff):
            self.make(4)
            self.index(64, head)
            with self.subTest(head), self.assertRaises(wire.ProtocolError):
                self.worker.requests.take()

    def test_tail_out_of_range(self):
        for tail in (1, 5, 0x80000000, 0xfffffffb, 0xfffffffc):
            self.make(4)
            self.index(256, tail)
            with self.subTest(tail), self.assertRaises(wire.ProtocolError):
                self.worker.verdicts.put(VERDICT)

    def test_fewer_than_the_slots_may_wait(self):
        self.make(8, most=2)
        for _ in range(3):
            self.monitor.requests.put(REQUEST)
        with self.assertRaises(wire.ProtocolError):
            self.worker.requests.take()

    def test_own_index_is_not_read_back(self):
        self.make(4)
        self.monitor.requests.put(REQUEST)
        self.worker.requests.take()
        self.worker.verdicts.put(VERDICT)
        for offset in (128, 192):
            self.index(offset, 77)
        self.assertIsNone(self.worker.requests.take())
        self.worker.verdicts.put(VERDICT)
        self.assertEqual(2, self.index(192))

    def test_a_frame_is_a_copy(self):
        self.make(4)
        self.monitor.requests.put(REQUEST)
        frame = self.worker.requests.take()
        self.memory[4096:4096 + 5312] = bytes(5312)
        self.assertEqual(REQUEST, frame)

    def test_nothing_comes_after_stop(self):
        self.make(4)
        self.monitor.requests.put(REQUEST)
        self.worker.requests.stop()
        self.monitor.requests.put(REQUEST)
        self.assertEqual(REQUEST, self.worker.requests.take())
        self.assertIsNone(self.worker.requests.take())
        self.assertFalse(self.worker.requests.waiting())

    def test_size_is_sealed(self):
        fd = self.make(4)
        size = os.fstat(fd).st_size
        for other in (0, size - 1, size + 4096):
            with self.assertRaises(PermissionError):
                os.truncate(fd, other)
        with self.assertRaises(OSError) as caught:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        self.assertEqual(errno.EPERM, caught.exception.errno)

    def test_monitor_checks_size_and_header(self):
        fd = self.make(4)
        with self.assertRaisesRegex(wire.ProtocolError, 'size'):
            ring.MonitorEnd(fd, 8)
        for offset in (0, 4, 8):
            before = self.memory[offset]
            self.memory[offset] = 99
            with self.assertRaisesRegex(wire.ProtocolError, 'header'):
                ring.MonitorEnd(fd, 4)
            self.memory[offset] = before

    def test_nothing_is_left_open(self):
        before = os.listdir('/proc/self/fd')
        fd = ring.create(4)
        self.assertFalse(os.get_inheritable(fd))
        os.close(fd)
        self.assertEqual(before, os.listdir('/proc/self/fd'))
