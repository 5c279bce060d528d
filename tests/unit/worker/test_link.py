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
        self.link.post(test_wire.VERDICT.pack())
        self.link.flush()
        self.peer.close()
        with self.assertRaises(EOFError):
            self.link.receive()

    def test_frames(self):
        self.assertFalse(self.link.waiting())
        self.assertIsNone(self.link.take())
        self.end.requests.put(test_wire.REQUEST.pack())
        self.assertTrue(self.link.waiting())
        request = self.link.take()
        self.memory[4096:10000] = bytes(5904)
        self.assertEqual(test_wire.REQUEST, request)
        for _ in range(2):
            self.link.post(test_wire.VERDICT.pack())
            # Whoever looks need not wait for the doorbell.
            self.assertEqual(test_wire.VERDICT.pack(),
                             self.end.verdicts.take())
        self.link.flush()
        self.assertEqual(b'\0', self.peer.recv(99))

    def test_doorbell_that_does_not_fit(self):
        for _ in range(10000):
            self.link.post(test_wire.VERDICT.pack())
            self.link.flush()
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

    def test_page_only_where_it_may_come(self):
        self.end.requests.put(test_wire.ANSWER.pack())
        with self.assertRaisesRegex(wire.ProtocolError, 'type 7'):
            self.link.take()

    def test_page(self):
        fd = ring.create(4)
        self.addCleanup(os.close, fd)
        peer, ours = socket.socketpair()
        self.addCleanup(peer.close)
        reading = link.RingLink(ours, fd, 4, 64, reads=True)
        self.addCleanup(reading.close)
        end = ring.MonitorEnd(fd, 4)
        end.requests.put(test_wire.ANSWER.pack())
        end.requests.put(test_wire.REQUEST.pack())
        self.assertEqual(test_wire.ANSWER, reading.take())
        self.assertEqual(test_wire.REQUEST, reading.take())


class SocketLinkTest(unittest.TestCase):

    def make(self, most=2, reads=False):
        self.peer, ours = socket.socketpair()
        self.addCleanup(self.peer.close)
        ours.setblocking(False)
        self.link = link.SocketLink(ours, most, reads)
        self.addCleanup(self.link.close)

    def test_frames(self):
        self.make(reads=True)
        for frame in (test_wire.REQUEST, test_wire.ANSWER):
            self.peer.sendall(frame.pack())
            self.link.receive()
            self.assertEqual(frame, self.link.take())
        self.assertFalse(self.link.waiting())

    def test_page_only_where_it_may_come(self):
        self.make()
        self.peer.sendall(test_wire.ANSWER.pack())
        self.link.receive()
        with self.assertRaisesRegex(wire.ProtocolError, 'type 7'):
            self.link.take()

    def test_more_than_may_wait(self):
        self.make(most=2)
        self.peer.sendall(test_wire.REQUEST.pack() * 3)
        with self.assertRaisesRegex(wire.ProtocolError, 'in flight'):
            while True:
                self.link.receive()

    def test_what_is_posted_goes_out_at_once(self):
        self.make()
        for _ in range(3):
            self.link.post(test_wire.VERDICT.pack())
        self.peer.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.peer.recv(1)
        self.link.flush()
        self.assertEqual(test_wire.VERDICT.pack() * 3, self.peer.recv(9999))
        self.assertFalse(self.link.unsent)
        self.link.flush()

    def test_what_is_not_taken_waits(self):
        self.make()
        sent = 0
        while not self.link.unsent:
            self.link.post(test_wire.VERDICT.pack())
            self.link.flush()
            sent += 1
        received = b''
        while len(received) < sent * len(test_wire.VERDICT.pack()):
            received += self.peer.recv(99999)
            self.link.flush()
        self.assertEqual(test_wire.VERDICT.pack() * sent, received)
