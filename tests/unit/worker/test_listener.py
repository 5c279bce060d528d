# SPDX-License-Identifier: Apache-2.0

import contextlib
import grp
import os
import socket
import stat
import subprocess
import sys
import unittest

from tests.unit import base
from tests.unit.worker import places
from virtav_nova import exception
from virtav_nova.worker import listener


class ListenerTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = str(self.top / 'worker.sock')

    def _listen(self, path=None, group=None, mode=0o660):
        opened = listener.Listener(path or self.path, group, mode)
        self.addCleanup(opened.close)
        return opened

    def _assert_refused(self, message, **arguments):
        with self.assertRaisesRegex(exception.SocketError, message) as caught:
            self._listen(**arguments)
        self.assertTrue(caught.exception.way_out)

    def _connect(self):
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.connect(self.path)

    def test_listens_with_mode_and_group(self):
        for mode in (0o600, 0o660, 0o666):
            group = grp.getgrgid(os.getgid()).gr_name
            opened = self._listen(group=group, mode=mode)
            self._connect()
            status = os.stat(self.path)
            self.assertEqual(mode, stat.S_IMODE(status.st_mode))
            self.assertEqual(os.getgid(), status.st_gid)
            opened.close()
            self.assertFalse(os.path.exists(self.path))
            opened.close()

    def test_mask_of_the_process_is_kept(self):
        mask = os.umask(0o027)
        self.addCleanup(os.umask, mask)
        self._listen()
        self.assertEqual(0o027, os.umask(0o027))

    def test_credentials(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.assertEqual((os.getpid(), os.getuid(), os.getgid()),
                             listener.credentials(ours))

    def test_stale_socket_is_replaced(self):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
            dead.listen()
        self._listen()
        self._connect()

    def test_live_socket_is_left_alone(self):
        self._listen()
        self._assert_refused(
            f'process {os.getpid()} is listening on socket {self.path}')
        self._connect()

    def test_live_socket_with_a_full_backlog(self):
        with socket.socket(socket.AF_UNIX) as busy:
            busy.bind(self.path)
            busy.listen(0)
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        client = stack.enter_context(
                            socket.socket(socket.AF_UNIX))
                        client.setblocking(False)
                        client.connect(self.path)
                self._assert_refused('a process is listening')

    def test_file_is_left_alone(self):
        self.write('worker.sock', 'precious')
        self._assert_refused('exists and is not a socket')
        self.assertEqual('precious', (self.top / 'worker.sock').read_text())

    def test_link_is_left_alone(self):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self.top / 'other'))
        os.symlink('other', self.path)
        self._assert_refused('exists and is not a socket')

    def test_path_length(self):
        directory = str(self.top)
        longest = os.path.join(directory, 'x' * (106 - len(directory)))
        self._listen(longest)
        self._assert_refused('is 108 bytes long, the kernel takes 107',
                             path=longest + 'x')
        # Bytes count, not characters.
        self._assert_refused('is 108 bytes long', path=longest[:-1] + 'é')

    def test_missing_directory(self):
        path = str(self.top / 'missing' / 's')
        self._assert_refused(f'socket {path}: No such file', path=path)

    def test_unknown_group(self):
        self._assert_refused('group no-such-group: no such group',
                             group='no-such-group')
        self.assertFalse(os.path.exists(self.path))

    def test_removes_only_its_own(self):
        first = self._listen()
        os.unlink(self.path)
        self._listen()
        first.close()
        self._connect()

    def test_other_option(self):
        with self.assertRaises(exception.SocketError) as caught:
            listener.Listener('/' + 'x' * 107, None, 0o660,
                              option='status_socket')
        self.assertIn('[virtav_worker] status_socket',
                      caught.exception.way_out)

    @unittest.skipIf(os.geteuid(), 'only root gives a socket away')
    def test_owner(self):
        listener.Listener(self.path, None, 0o660, (12345, 12346)).close()
        opened = listener.Listener(self.path, 'tty', 0o660, (12345, 12346))
        self.addCleanup(opened.close)
        status = os.stat(self.path)
        self.assertEqual((12345, grp.getgrnam('tty').gr_gid, 0o660), (
            status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))

    def _denied(self, mode):
        """Try it as another user, who is told what to do."""
        os.chmod(self.top, mode)
        code = f'''
import os
from virtav_nova import exception
from virtav_nova.worker import listener
if os.geteuid() == 0:
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
try:
    listener.Listener({self.path!r}, None, 0o660)
except exception.SocketError as error:
    print(error, error.way_out, sep='|')
'''
        ended = subprocess.run(
            places.opened([sys.executable, '-c', code], self.top)
            if os.geteuid() == 0 else [sys.executable, '-c', code],
            cwd=base.ROOT, text=True, capture_output=True)
        self.assertEqual('', ended.stderr)
        return ended.stdout.strip().split('|')

    def test_directory_of_another_owner(self):
        message, way_out = self._denied(0o555)
        self.assertEqual(f'socket {self.path}: Permission denied', message)
        self.assertRegex(way_out, f'^{self.top} belongs to .* and has mode '
                                  '0555: give it to user ')

    def test_denied_by_a_security_module(self):
        # As AppArmor does it: permissions say yes, the kernel says EACCES.
        # Landlock can be had without being root.
        code = f'''
import ctypes, sys
from virtav_nova import exception
from virtav_nova.worker import listener
call = ctypes.CDLL(None).syscall
make_sock = ctypes.c_uint64(1 << 9)
rules = call(444, ctypes.byref(make_sock), 8, 0)
if rules < 0:
    sys.exit(77)
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
if call(446, rules, 0):
    sys.exit(77)
try:
    listener.Listener({self.path!r}, None, 0o660)
except exception.SocketError as error:
    print(error, error.way_out, sep='|')
'''
        ended = subprocess.run(
            [sys.executable, '-c', code], cwd=base.ROOT, text=True,
            capture_output=True)
        if ended.returncode == 77:
            self.skipTest('this kernel has no Landlock')
        self.assertEqual(
            f'socket {self.path}: Permission denied|AppArmor or SELinux '
            'keeps the worker from it, see the log of the kernel: allow it '
            'there, or change [virtav_worker] socket\n', ended.stdout,
            ended.stderr)
