# SPDX-License-Identifier: Apache-2.0

import contextlib
import selectors
import socket
import time

from tests.unit import base
from virtav_nova.worker import endpoint
from virtav_nova.worker import listener


class EndpointTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = str(self.top / 'socket')
        self.listening = listener.Listener(self.path, None, 0o660)
        self.addCleanup(self.listening.close)
        self.selector = selectors.DefaultSelector()
        self.addCleanup(self.selector.close)
        self.answers = []
        self.endpoint = endpoint.Endpoint(
            self.listening.socket, self.selector, self._answer)

    def _answer(self, received):
        if not received.endswith(b'\n'):
            return None
        return received * 3

    def _spin(self, seconds=0.0):
        """Do what the main loop does, until nothing happens."""
        while events := self.selector.select(seconds):
            for key, _events in events:
                key.data()

    def _client(self, data=b''):
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(20)
        client.connect(self.path)
        client.sendall(data)
        return client

    def _received(self, client):
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(1 << 20):
                data += more
        return bytes(data)

    def test_answer(self):
        clients = [self._client(b'question %d\n' % number)
                   for number in range(5)]
        self._spin()
        for number, client in enumerate(clients):
            self.assertEqual(b'question %d\n' % number * 3,
                             self._received(client))
        self.assertIsNone(self.endpoint.due())

    def test_question_in_pieces(self):
        client = self._client()
        for byte in b'what?\n':
            client.sendall(bytes([byte]))
            self._spin()
        self.assertEqual(b'what?\n' * 3, self._received(client))

    def test_long_answer_to_a_slow_reader(self):
        self.endpoint._answer = lambda received: bytes(8 << 20)
        slow, quick = self._client(b'x'), self._client(b'y')
        self._spin()
        # Nobody waited for him.
        self.assertIsNotNone(self.endpoint.due())
        total = 0
        for client in (quick, slow):
            client.setblocking(False)
            ended = False
            while not ended:
                with contextlib.suppress(BlockingIOError):
                    while data := client.recv(1 << 20):
                        total += len(data)
                    ended = True
                self._spin()
        self.assertEqual(16 << 20, total)
        self.assertIsNone(self.endpoint.due())

    def test_too_long_question(self):
        client = self._client(b'x' * endpoint.QUESTION_MAX)
        self._spin()
        client.sendall(b'x\n')
        self._spin()
        self.assertEqual(b'', self._received(client))

    def test_silent_ones_lose_the_connection(self):
        client = self._client()
        self._spin()
        due = self.endpoint.due()
        self.assertAlmostEqual(endpoint.PATIENCE, due - time.monotonic(),
                               delta=1)
        self.endpoint.keep(due - 0.1)
        self.assertIsNotNone(self.endpoint.due())
        self.endpoint.keep(due)
        self.assertEqual(b'', self._received(client))
        self.assertIsNone(self.endpoint.due())

    def test_oldest_gives_way(self):
        clients = [self._client()
                   for _ in range(endpoint.CONNECTIONS_MAX + 3)]
        self._spin()
        for client in clients[:3]:
            self.assertEqual(b'', self._received(client))
        for client in clients[3:]:
            client.sendall(b'?\n')
        self._spin()
        for client in clients[3:]:
            self.assertEqual(b'?\n' * 3, self._received(client))

    def test_gone_meanwhile(self):
        for data in (b'', b'?', b'?\n'):
            self._client(data).close()
        self._spin()
        self.assertIsNone(self.endpoint.due())

    def test_closed(self):
        client = self._client()
        self._spin()
        for _turn in range(2):
            self.endpoint.close()
        self.assertEqual(b'', self._received(client))
        self.assertEqual({}, dict(self.selector.get_map()))
