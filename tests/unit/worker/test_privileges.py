# SPDX-License-Identifier: Apache-2.0

import ast
import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
import unittest

from tests.unit import base
from tests.unit.worker import places
from virtav_nova import exception
from virtav_nova.worker import privileges

_ROOT = os.geteuid() == 0
_HEAD = '''
import os, socket, sys
from virtav_nova import exception
from virtav_nova.worker import privileges
'''


class StateTest(base.TestCase):

    def test_of_this_process(self):
        state = privileges.state()
        self.assertEqual(pwd.getpwuid(os.geteuid()).pw_name, state.user)
        self.assertEqual(0, state.seccomp)

    def test_of_none(self):
        with self.assertRaises(OSError):
            privileges.state(4194304 + 1)

    def test_description(self):
        os.chmod(self.top, 0o711)
        user = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(os.stat(self.top).st_gid).gr_name
        self.assertEqual(
            f'{self.top} belongs to {user}:{group} and has mode 0711',
            privileges.describe(str(self.top)))
        self.assertEqual('', privileges.describe(str(self.top / 'none')))


class ProcessTest(base.TestCase):
    """Things that a process cannot take back."""

    def setUp(self):
        super().setUp()
        os.chmod(self.top, 0o755)

    def _run(self, code, opened=False):
        command = [sys.executable, '-c', _HEAD + code]
        if opened:
            command = places.opened(command, self.top)
        ended = subprocess.run(command, cwd=base.ROOT, text=True,
                               capture_output=True, timeout=60)
        self.assertEqual(0, ended.returncode, ended.stderr)
        return ended

    def _last(self, ended):
        return ast.literal_eval(ended.stdout.splitlines()[-1])

    def test_lock(self):
        ended = self._run('''
before = privileges.state().user
privileges.lock()
state = privileges.state()
with open('/proc/self/status') as lines:
    effective = [line.split()[1] for line in lines
                 if line.startswith(('CapEff', 'CapPrm', 'CapAmb'))]
import ctypes
print((state.user == before, state.no_new_privileges, effective,
       ctypes.CDLL(None).prctl(3)))''')
        self.assertEqual((True, True, ['0' * 16] * 3, 0), self._last(ended))

    @unittest.skipUnless(_ROOT, 'only root can become another user')
    def test_drop(self):
        ended = self._run(f'''
who = privileges.identity({places.USER!r}, 'tty')
privileges.drop(who)
privileges.lock()
try:
    os.setuid(0)
except PermissionError:
    print('stays')
try:
    open('/proc/1/environ')
except PermissionError:
    print('no file')
print((tuple(privileges.state()), os.getresuid(), os.getresgid(),
       os.getgroups(), tuple(who)))''', opened=True)
        state, uids, gids, groups, who = self._last(ended)
        entry = pwd.getpwnam(places.USER)
        self.assertEqual((places.USER, 0, 0, True, 0), state)
        self.assertEqual((entry.pw_uid,) * 3, uids)
        self.assertEqual((entry.pw_gid,) * 3, gids)
        self.assertIn(grp.getgrnam('tty').gr_gid, groups)
        self.assertNotIn(0, groups)
        self.assertEqual(who, (places.USER, entry.pw_uid, entry.pw_gid,
                               tuple(sorted(groups))))
        self.assertEqual(['stays', 'no file'],
                         ended.stdout.splitlines()[:2])

    @unittest.skipUnless(_ROOT, 'only root stays root')
    def test_root_without_capabilities(self):
        ended = self._run('''
privileges.drop(privileges.identity('root', None))
privileges.lock()
try:
    os.chown('/etc/passwd', 1, 1)
except PermissionError:
    print('no chown')
child = os.popen('grep Cap /proc/self/status | cut -f 2 | sort -u').read()
print((tuple(privileges.state()), child.split()))''')
        self.assertEqual((('root', 0, 0, True, 0), ['0' * 16]),
                         self._last(ended))
        self.assertIn('no chown', ended.stdout)
        self.assertIn('Runs as root', ended.stderr)

    @unittest.skipUnless(_ROOT, 'only root can become another user')
    def test_program_out_of_reach(self):
        private = self.top / 'private'
        private.mkdir(0o700)
        ended = self._run(f'''
sys.executable = '{private}/python'
try:
    privileges.drop(privileges.identity({places.USER!r}, None))
except exception.PrivilegeError as error:
    print(str(error), error.way_out, sep='|')''')
        message, way_out = ended.stdout.strip().split('|')
        self.assertIn(f"{places.USER} cannot get at the worker's own program "
                      f'{private}/python: Permission denied', message)
        self.assertIn('user = root', way_out)

    @unittest.skipUnless(_ROOT, 'only root can leave the network')
    def test_leave_network(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        path = self.top / 'socket'
        with socket.socket(socket.AF_UNIX) as outside:
            outside.bind(str(path))
            outside.listen()
            code = _HEAD + f'''
kept = socket.create_server(('127.0.0.1', {port}))
print(privileges.leave_network(), privileges.network(), flush=True)
try:
    socket.create_connection(('127.0.0.1', {port}), 1)
except OSError:
    print('nowhere', flush=True)
connection, _address = kept.accept()
connection.sendall(b'kept')
local = socket.socket(socket.AF_UNIX)
local.connect('{path}')
'''
            with subprocess.Popen(
                    [sys.executable, '-c', code], cwd=base.ROOT, text=True,
                    stdout=subprocess.PIPE) as process:
                self.assertEqual('None none\n', process.stdout.readline())
                self.assertEqual('nowhere\n', process.stdout.readline())
                # What was open before is reached from the old network.
                with socket.create_connection(('127.0.0.1', port), 20) as one:
                    self.assertEqual(b'kept', one.recv(4))
                outside.settimeout(20)
                outside.accept()[0].close()
                self.assertEqual(0, process.wait(20))

    def test_network_that_cannot_be_left(self):
        ended = self._run('''
privileges.lock()
print((privileges.leave_network(),))''')
        self.assertEqual(('Operation not permitted',), self._last(ended))

    @unittest.skipUnless(_ROOT, 'only root makes directories of others')
    def test_directory(self):
        who = privileges.identity(places.USER, None)
        path = self.top / 'state'
        privileges.make_directory(str(path), who, 0o750)
        status = path.stat()
        self.assertEqual((who.uid, who.gid, 0o750), (
            status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))
        # One that is there is nobody's business.
        os.chmod(path, 0o700)
        os.chown(path, 0, 0)
        privileges.make_directory(str(path), who, 0o750)
        self.assertEqual(0, path.stat().st_uid)

    def test_directory_that_cannot_be(self):
        # What needs it says so.
        privileges.make_directory(
            str(self.top / 'missing' / 'state'), None, 0o750)
        self.assertEqual([], os.listdir(self.top))


class IdentityTest(base.TestCase):

    @unittest.skipUnless(_ROOT, 'others stay who they are')
    def test_missing_user(self):
        with self.assertRaisesRegex(
                exception.PrivilegeError, 'there is no user virtav-none to '
                'become') as caught:
            privileges.identity('virtav-none', None)
        self.assertIn('useradd --system virtav-none',
                      caught.exception.way_out)

    @unittest.skipUnless(_ROOT, 'others stay who they are')
    def test_missing_group(self):
        # The socket says so.
        privileges.identity(places.USER, 'virtav-none')

    @unittest.skipIf(_ROOT, 'root becomes somebody else')
    def test_nobody_else(self):
        self.assertIsNone(privileges.identity('virtav-none', None))
