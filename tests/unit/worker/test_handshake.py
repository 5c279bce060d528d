# SPDX-License-Identifier: Apache-2.0

import os
import socket
import time
import uuid

from tests.unit import base
from tests.unit.worker import base as worker_base
from virtav_nova.monitor import instance
from virtav_nova.monitor import wire
from virtav_nova.worker import handshake
from virtav_nova.worker import listener

UUID = uuid.UUID('6f1f2c6e-9a0b-4f6e-8f0e-0d4a5b6c7d8e')


class AdmissionTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.directory = str(self.top / 'instances')
        os.mkdir(self.directory, 0o751)

    def _handshake(self, required=True, users=(), **changes):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.setblocking(False)
        theirs.sendall(worker_base.hello(**changes).pack())
        return handshake.Handshake(
            ours, time.monotonic() + 5, handshake.Admission(
                listener.Peers(users), self.directory, required))

    def _refused(self, **changes):
        with self.assertRaises(handshake.Refused) as caught:
            self._handshake(**changes).hello()
        refused = caught.exception
        self.assertEqual(wire.Refusal.TOKEN, refused.code)
        # The peer does not learn what of it was wrong.
        self.assertEqual(
            f'not known as instance {changes["instance"]}', str(refused))
        return refused.detail

    def test_right_token(self):
        instance.place(self.directory, UUID, 'demo')
        token = instance.read(self.directory, UUID).token
        waiting = self._handshake(instance=UUID, token=token)
        hello = waiting.hello()
        self.assertEqual(('demo', UUID), (waiting.project, hello.instance))
        # Nobody behind this can show it.
        self.assertEqual(wire.NO_TOKEN, hello.token)

    def test_wrong_token(self):
        other = uuid.uuid4()
        for known in (UUID, other):
            instance.place(self.directory, known, 'demo')
        token = instance.read(self.directory, other).token
        right = instance.read(self.directory, UUID).token
        for wrong in (token, right[:-1] + b'\0', os.urandom(32)):
            detail = self._refused(instance=UUID, token=wrong)
            self.assertIn('it showed another token', detail)
            for shown in (wrong, right):
                self.assertNotIn(shown.hex(), detail)

    def test_no_token(self):
        instance.place(self.directory, UUID, 'demo')
        self.assertIn('it showed no token', self._refused(instance=UUID))

    def test_no_registration(self):
        self.assertIn(f'no registration in {self.directory}',
                      self._refused(instance=UUID, token=bytes(32)))

    def test_no_directory(self):
        os.rmdir(self.directory)
        self.assertIn('no registration', self._refused(instance=UUID))

    def test_broken_registration(self):
        (self.top / 'instances' / f'{UUID}.json').write_text('{}')
        self.assertIn('not what place() writes',
                      self._refused(instance=UUID, token=b'x' * 32))

    def test_link_as_registration(self):
        os.symlink('/etc/passwd', f'{self.directory}/{UUID}.json')
        self.assertIn('cannot be read: Too many levels of symbolic links',
                      self._refused(instance=UUID))

    def test_taken_back(self):
        instance.place(self.directory, UUID, 'demo')
        token = instance.read(self.directory, UUID).token
        instance.remove(self.directory, UUID)
        self.assertIn('no registration',
                      self._refused(instance=UUID, token=token))

    def test_not_required(self):
        for token in (wire.NO_TOKEN, b'x' * 32):
            waiting = self._handshake(required=False, instance=UUID,
                                      token=token)
            self.assertEqual(wire.NO_TOKEN, waiting.hello().token)
            self.assertEqual('', waiting.project)


class PeersTest(base.TestCase):

    def _peer(self, uid):
        return listener.Credentials(1, uid, 0)

    def test_users(self):
        peers = listener.Peers(['nobody', 'virtav-none', '1234'])
        for uid in (os.geteuid(), 1234, 65534):
            self.assertTrue(peers.allow(self._peer(uid)))
        for uid in (1, 1235):
            self.assertFalse(peers.allow(self._peer(uid)))

    def test_refusal(self):
        admission = handshake.Admission(listener.Peers([]), '', True)
        admission.check_peer(self._peer(os.geteuid()))
        with self.assertRaisesRegex(handshake.Refused,
                                    'user 4711 is not one of') as caught:
            admission.check_peer(self._peer(4711))
        self.assertEqual(wire.Refusal.TOKEN, caught.exception.code)
