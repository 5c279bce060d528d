# SPDX-License-Identifier: Apache-2.0

import contextlib
import json
import socket
import threading
import time

from tests.unit import base
from virtav_nova.monitor import qmp

GREETING = {'QMP': {'version': {'qemu': {'major': 10}}, 'capabilities': []}}
MATCH = {'event': 'PAGE_FETCH_MATCH', 'data': {'rule': 'R'},
         'timestamp': {'seconds': 1, 'microseconds': 2}}


class Peer(threading.Thread):
    """Plays QEMU: sends each answer after the command it belongs to.

    :param answers: lists of what to send, one list a command
    :param greeting: what to send first
    """

    def __init__(self, connection, answers, greeting=GREETING):
        super().__init__()
        self._connection = connection
        self._answers = list(answers)
        self._greeting = greeting
        self.commands = []

    def run(self):
        with self._connection, self._connection.makefile('rb') as lines:
            self._send([self._greeting])
            while self._answers:
                line = lines.readline()
                if not line:
                    return
                self.commands.append(json.loads(line))
                self._send(self._answers.pop(0))

    def _send(self, messages):
        for message in messages:
            if not isinstance(message, bytes):
                message = json.dumps(message).encode() + b'\r\n'
            # In two pieces: a line is not a packet.
            with contextlib.suppress(BrokenPipeError):
                self._connection.sendall(message[:5])
                self._connection.sendall(message[5:])


class QMPTest(base.TestCase):

    def _client(self, *answers, greeting=GREETING, timeout=5.0):
        ours, theirs = socket.socketpair()
        self.peer = Peer(theirs, [[{'return': {}}], *answers], greeting)
        self.peer.start()
        self.addCleanup(self.peer.join)
        self.addCleanup(ours.close)
        client = qmp.QMPClient(ours, timeout)
        self.addCleanup(client.close)
        return client

    def test_execute(self):
        client = self._client([{'return': {'connected': True}}])
        self.assertEqual(
            {'connected': True},
            client.execute('page-fetch-monitor-set',
                           **{'on-match': 'block', 'rearm': True}))
        self.assertEqual([
            {'execute': 'qmp_capabilities', 'arguments': {}},
            {'execute': 'page-fetch-monitor-set',
             'arguments': {'on-match': 'block', 'rearm': True}}],
            self.peer.commands)

    def test_error(self):
        client = self._client(
            [{'error': {'class': 'GenericError', 'desc': 'no such block'}}],
            [{'return': 1}])
        with self.assertRaisesRegex(qmp.QMPError, 'no such block') as caught:
            client.execute('stop')
        self.assertEqual('GenericError', caught.exception.kind)
        self.assertEqual(1, client.execute('query-status'))

    def test_events_between_answers_are_kept(self):
        resume = {'event': 'RESUME', 'timestamp': {}}
        client = self._client([resume, MATCH, {'return': {}}, MATCH])
        client.execute('cont')
        self.assertEqual(MATCH, client.wait_event('PAGE_FETCH_MATCH', 1))
        self.assertEqual(MATCH, client.wait_event('PAGE_FETCH_MATCH', 1))
        self.assertEqual(resume, client.wait_event('RESUME', 0))

    def test_event_that_does_not_come(self):
        client = self._client([{'return': {}}], [{'return': {}}])
        client.execute('stop')
        begin = time.monotonic()
        with self.assertRaisesRegex(
                qmp.QMPTimeout, 'no event RESUME within 0.2 s'):
            client.wait_event('RESUME', 0.2)
        self.assertLess(time.monotonic() - begin, 2)
        client.execute('cont')

    def test_answer_that_does_not_come(self):
        client = self._client([MATCH], [], timeout=0.2)
        with self.assertRaisesRegex(qmp.QMPTimeout, 'answer to stop'):
            client.execute('stop')
        # The late answer would be taken for this one's.
        with self.assertRaises(qmp.QMPClosed):
            client.execute('cont')

    def test_command_that_is_not_taken(self):
        ours, theirs = socket.socketpair()
        with theirs:
            for line in (GREETING, {'return': {}}):
                theirs.sendall(json.dumps(line).encode() + b'\n')
            client = qmp.QMPClient(ours, 0.2)
            with self.assertRaisesRegex(qmp.QMPTimeout, 'answer to big'):
                client.execute('big', data='x' * (1 << 22))
            with self.assertRaises(qmp.QMPClosed):
                client.wait_event('STOP', 0)

    def test_peer_that_goes_away(self):
        client = self._client()
        with self.assertRaises(qmp.QMPClosed):
            client.execute('stop')
        with self.assertRaises(qmp.QMPClosed):
            client.wait_event('STOP', 1)

    def test_peer_that_is_not_qmp(self):
        for greeting in ({'hello': 1}, b'SSH-2.0-OpenSSH\r\n', [1],
                         b'\xff\n'):
            with self.subTest(greeting), self.assertRaises(qmp.QMPError):
                self._client(greeting=greeting)

    def test_line_without_end(self):
        client = self._client([b'{' * (qmp._LINE_MAX + qmp._CHUNK + 2)])
        with self.assertRaisesRegex(qmp.QMPError, 'over-long'):
            client.execute('stop')
        client.close()

    def test_connects_by_path(self):
        path = str(self.top / 'qmp')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with self.assertRaises(qmp.QMPTimeout):
                qmp.QMPClient(path, 0.1)
            accepted, _ = listener.accept()
            accepted.close()
        with self.assertRaises(OSError):
            qmp.QMPClient(path)
