# SPDX-License-Identifier: Apache-2.0
"""Each thing that must not be done is tried, by a real process."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pyseccomp

from tests.unit import base
from virtav_nova.worker import privileges
from virtav_nova.worker import sandbox

#: Ends by SIGSYS.
KILLED = None
EVERYWHERE = {
    'socket': KILLED, 'netlink': KILLED, 'exec': KILLED, 'ptrace': KILLED,
    'kill': KILLED, 'pidfd': KILLED, 'peek': KILLED, 'prlimit': KILLED,
    'mount': KILLED, 'unshare': KILLED, 'setuid': KILLED, 'bpf': KILLED,
    'io_uring': KILLED, 'keyctl': KILLED, 'old': KILLED, 'write': 'EPERM',
    'append': 'EPERM', 'read': 'EPERM', 'memory': 'EPERM', 'list': 'EPERM',
    'stat': 'EPERM', 'unlink': 'EPERM', 'program': 'EPERM',
}


class SandboxTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.file = self.write('precious', 'precious')

    def _try(self, how, what, argument=None, **options):
        return subprocess.run(
            [sys.executable, '-m', 'tests.unit.worker.probe', how, what,
             str(argument or self.file)], cwd=base.ROOT, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
            **options)

    def _assert_denied(self, how, denied):
        for what, error in denied.items():
            with self.subTest(how, what=what):
                ended = self._try(how, what)
                self.assertTrue(ended.stdout.startswith('True\n'),
                                ended.stderr)
                if error is KILLED:
                    self.assertTrue(sandbox.died_of_it(ended.returncode),
                                    (ended, what))
                    self.assertEqual('True\n', ended.stdout)
                else:
                    self.assertEqual(f'True\nerror {error}\n', ended.stdout)
                    self.assertEqual(0, ended.returncode)
        self.assertEqual('precious', self.file.read_text())

    def test_what_is_tried_can_be_done_without(self):
        # Or nothing would be shown by what follows.
        for what in ('socket', 'netlink', 'fork', 'thread', 'read', 'list',
                     'stat', 'program', 'work', 'append', 'memory'):
            with self.subTest(what):
                self.assertEqual('None\ndone\n',
                                 self._try('none', what).stdout)

    def test_scan_process(self):
        self._assert_denied('scan', {**EVERYWHERE, 'fork': KILLED,
                                     'thread': KILLED, 'unix': KILLED})

    def test_scan_process_of_an_engine_with_a_socket(self):
        self._assert_denied('scan local', {**EVERYWHERE, 'fork': KILLED})

    def test_loader(self):
        self._assert_denied('loader', {**EVERYWHERE, 'unix': KILLED,
                                       'thread': KILLED})

    def test_only_one_engine_may_connect(self):
        path = str(self.top / 'socket')
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            listening.settimeout(20)
            with subprocess.Popen(
                    [sys.executable, '-m', 'tests.unit.worker.probe',
                     'scan local', 'unix', path], cwd=base.ROOT,
                    stdout=subprocess.PIPE, text=True) as process:
                connection, _address = listening.accept()
                connection.sendall(b'hello')
                connection.close()
                self.assertEqual('True\ndone\n', process.stdout.read())

    def test_work_goes_on(self):
        for how in ('loader', 'scan', 'scan local'):
            with self.subTest(how):
                ended = self._try(how, 'work')
                self.assertEqual(('True\ndone\n', '', 0), (
                    ended.stdout, ended.stderr, ended.returncode))

    def test_loader_makes_scan_processes(self):
        ended = self._try('loader', 'fork work')
        self.assertEqual(('', 0), (ended.stderr, ended.returncode))
        # Both write at a time.
        self.assertEqual([2, 2], [ended.stdout.count(word)
                                  for word in ('True', 'done')])
        self.assertEqual('True\ndone\n', self._try('loader', 'fork').stdout)

    def test_place_is_told(self):
        ended = self._try('scan', 'socket')
        self.assertRegex(ended.stderr, r'probe.py", line \d+ in <lambda>')

    def test_seen_from_outside(self):
        with subprocess.Popen(
                [sys.executable, '-m', 'tests.unit.worker.probe',
                 'wait', 'work', '-'], cwd=base.ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.readline()
            state = privileges.state(process.pid)
            self.assertTrue(state.no_new_privileges)
            self.assertEqual(2, state.seccomp)
            for kind, limit in ((resource.RLIMIT_CORE, 0),
                                (resource.RLIMIT_NPROC, 0),
                                (resource.RLIMIT_FSIZE, sandbox.FILE_MAX)):
                self.assertEqual((limit, limit),
                                 resource.prlimit(process.pid, kind))
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            self.assertEqual(soft, hard)

    def test_without_the_library(self):
        self.write('pyseccomp.py', 'raise RuntimeError("Unable to find it")')
        ended = subprocess.run(
            [sys.executable, '-c',
             'from virtav_nova.worker import sandbox; '
             'print(sandbox.enter_loader())'],
            cwd=self.top, text=True, capture_output=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join([
                str(self.top), str(base.ROOT),
                os.environ.get('PYTHONPATH', '')])})
        self.assertEqual(
            "State(seccomp=False, reason='Unable to find it')\n",
            ended.stdout, ended.stderr)


class LimitTest(base.TestCase):

    def _run(self, code):
        begin = time.monotonic()
        ended = subprocess.run(
            [sys.executable, '-c',
             f'from virtav_nova.worker import sandbox\n{code}'],
            cwd=base.ROOT, text=True, capture_output=True, timeout=60)
        return ended, time.monotonic() - begin

    def test_memory(self):
        ended, _ = self._run('''
sandbox.limit_memory(1 << 30)
try:
    bytearray(2 << 30)
except MemoryError:
    print("bounded")
sandbox.limit_memory(None)
bytearray(2 << 30)
print("lifted")''')
        self.assertEqual('bounded\nlifted\n', ended.stdout, ended.stderr)

    def test_growth(self):
        ended, _ = self._run('''
import mmap
bytearray(128 << 20)
sandbox.limit_growth(64 << 20)
bytearray(128 << 20)
mmap.mmap(-1, 512 << 20)
try:
    bytearray(512 << 20)
except MemoryError:
    print("bounded")''')
        self.assertEqual('bounded\n', ended.stdout, ended.stderr)

    def test_time(self):
        ended, seconds = self._run('''
sandbox.limit_time(1)
while True:
    pass''')
        self.assertEqual(-signal.SIGXCPU, ended.returncode)
        self.assertLess(seconds, 20)
        ended, _ = self._run('''
import time
sandbox.limit_time(1)
sandbox.limit_time(None)
while time.process_time() < 3:
    pass
print("lifted")''')
        self.assertEqual('lifted\n', ended.stdout)

    def test_no_more_than_there_is(self):
        ended, _ = self._run('''
import resource
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
sandbox.limit_memory(16 << 30)
print(resource.getrlimit(resource.RLIMIT_AS)[0] >> 30)
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
sandbox.limit_time(100)
print(resource.getrlimit(resource.RLIMIT_CPU)[0])''')
        self.assertEqual('8\n5\n', ended.stdout, ended.stderr)


class ProgramTest(base.TestCase):

    def test_every_call_is_known(self):
        # A name that is misspelt would be passed over.
        for name in (*sandbox._ALWAYS, *sandbox._LOADING, *sandbox._DENIED):
            with self.subTest(name):
                self.assertNotEqual(-1, pyseccomp.resolve_syscall(
                    pyseccomp.Arch.X86_64, name))

    def test_no_call_is_allowed_and_denied(self):
        names = [*sandbox._ALWAYS, *sandbox._LOADING, *sandbox._DENIED,
                 *sandbox._UNKNOWN]
        self.assertEqual(len(names), len(set(names)))
