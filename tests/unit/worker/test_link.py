# SPDX-License-Identifier: Apache-2.0

import mmap
import os
import socket
import unittest

from tests.unit.monitor import test_wire
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import link


class RingLinkTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        fd = ring.create(4)
        self.addCleanup(os.close, fd)
        self.peer, ours = socket.socketpair()
        self.addCleanup(self.peer.close)
        ours.setblocking(False)
        self.link = link.RingLink(ours, fd, 4, 64)
        self.addCleanup(self.link.close)
        self.memory = mmap.mmap(fd, 0)
        self.end = ring.MonitorEnd(fd, 4)

    def test_doorbells(self):
        with self.assertRaises(BlockingIOError):
            self.link.receive()
        self.peer.send(bytes(50000))
        # Whoever sends them without end gets one look at a time.
        for _ in range(3):
            self.assertFalse(self.link.receive())
        self.peer.shutdown(socket.SHUT_WR)
        with self.assertRaises(EOFError):
            for _ in range(100):
                self.link.receive()

    def test_closed_with_doorbells_unheard(self):
        self.link.send(test_wire.VERDICT.pack())
        self.peer.close()
        with self.assertRaises(EOFError):
            self.link.receive()

    def test_frames(self):
        self.assertFalse(self.link.waiting())
        self.assertIsNone(self.link.take())
        self.end.requests.put(test_wire.REQUEST.pack())
        self.assertTrue(self.link.waiting())
        request = self.link.take()
        self.memory[4096:8192] = bytes(4096)
        self.assertEqual(test_wire.REQUEST, request)
        self.link.send(test_wire.VERDICT.pack())
        self.assertEqual(b'\0', self.peer.recv(99))
        self.assertEqual(test_wire.VERDICT.pack(), self.end.verdicts.take())

    def test_doorbell_that_does_not_fit(self):
        for _ in range(10000):
            self.link.send(test_wire.VERDICT.pack())
            self.end.verdicts.take()
        with self.assertRaises(BlockingIOError):
            self.peer.setblocking(False)
            self.assertGreater(len(self.peer.recv(1 << 20)), 0)
            while self.peer.recv(1 << 20):
                pass

    def test_bad_frame(self):
        self.end.requests.put(b'VAPX' + test_wire.REQUEST.pack()[4:])
        with self.assertRaisesRegex(wire.ProtocolError, 'magic'):
            self.link.take()

    def test_stop(self):
        self.end.requests.put(test_wire.REQUEST.pack())
        self.link.stop()
        self.end.requests.put(test_wire.REQUEST.pack())
        self.assertIsNotNone(self.link.take())
        self.assertFalse(self.link.waiting())
        self.assertIsNone(self.link.take())
