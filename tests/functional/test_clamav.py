# SPDX-License-Identifier: Apache-2.0
"""The engine ``clamav`` and a real clamd, which is this test's own."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import testtools
from testtools import content

from virtav_nova import exception
from virtav_nova.engines import base as engines
from virtav_nova.engines import clamav

_FIRST = b'VIRTAV-CLAMD-FIRST-SIGNATURE'
_SECOND = b'VIRTAV-CLAMD-OTHER-SIGNATURE'
_CONFIGURATION = """\
LocalSocket {top}/clamd.sock
DatabaseDirectory {top}/db
LogFile {top}/log
TemporaryDirectory {top}
Foreground yes
SelfCheck 0
IdleTimeout 2
CommandReadTimeout 5
MaxThreads 4
"""


class ClamavTest(testtools.TestCase):

    def setUp(self):
        super().setUp()
        program = shutil.which('clamd')
        if program is None:
            # Not a reason to skip: nothing would be tested.
            raise RuntimeError('there is no clamd; use tools/test functional')
        self.top = pathlib.Path(
            self.enterContext(tempfile.TemporaryDirectory()))
        (self.top / 'db').mkdir()
        self._signatures(First=_FIRST)
        (self.top / 'clamd.conf').write_text(
            _CONFIGURATION.format(top=self.top))
        if not os.geteuid():
            with (self.top / 'clamd.conf').open('a') as file:
                file.write('User root\n')
        self.clamd = subprocess.Popen(
            [program, '--config-file', self.top / 'clamd.conf'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(self._end)
        self.addOnException(self._show)
        self.options = engines.EngineOptions(
            scan_timeout_ms=2000, clamd_socket=str(self.top / 'clamd.sock'))
        self._wait()
        self.engine = clamav.ClamavEngine.compile([], self.options)

    def _signatures(self, **signatures):
        # Made at once: clamd may look at any time.
        fresh = self.top / 'fresh'
        fresh.write_text(''.join(
            f'Test.{name}:0:*:{data.hex()}\n'
            for name, data in signatures.items()))
        fresh.replace(self.top / 'db' / 'test.ndb')

    def _wait(self):
        give_up = time.monotonic() + 60
        while True:
            self.assertIsNone(self.clamd.poll(), 'clamd has ended')
            self.assertLess(time.monotonic(), give_up)
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(self.options.clamd_socket)
                return
            except OSError:
                time.sleep(.1)

    def _end(self):
        self.clamd.send_signal(signal.SIGCONT)
        self.clamd.kill()
        self.clamd.wait()

    def _show(self, _error):
        path = self.top / 'log'
        if path.exists():
            self.addDetail('clamd', content.text_content(path.read_text()))

    def _names(self, data):
        return [match.rule for match in self.engine.scan(data)]

    def test_finds_what_clamd_knows(self):
        self.assertIn('ClamAV', self.engine.describe()['release'])
        for size in (0, 1, 100, 1024, 4096, 5120):
            self.assertEqual([], self.engine.scan(bytes(size)))
            if size < 100:
                continue
            for offset in (0, 40, size - len(_FIRST)):
                page = bytearray(size)
                page[offset:offset + len(_FIRST)] = _FIRST
                self.assertEqual(
                    [engines.Match('Test.First.UNOFFICIAL', 'clamav', [], {},
                                   [])], self.engine.scan(memoryview(page)))

    def test_new_signatures(self):
        before = clamav.ClamavEngine.release(self.options)
        self.assertEqual([], self._names(_SECOND + bytes(4000)))
        self._signatures(First=_FIRST, Second=_SECOND)
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(self.options.clamd_socket)
            control.sendall(b'zRELOAD\0')
            self.assertEqual(b'RELOADING\0', control.recv(100))
        give_up = time.monotonic() + 30
        while not self._names(_SECOND + bytes(4000)):
            self.assertLess(time.monotonic(), give_up)
            time.sleep(.1)
        # Only official signatures have a version.
        self.assertEqual(before, clamav.ClamavEngine.release(self.options))

    def test_is_idle_for_long(self):
        self.assertEqual([], self._names(bytes(4096)))
        time.sleep(3)
        self.assertEqual(['Test.First.UNOFFICIAL'],
                         self._names(_FIRST + bytes(4000)))

    def test_children_have_their_own_sessions(self):
        self.assertEqual([], self._names(bytes(4096)))
        children = []
        for number in range(4):
            page = (_FIRST if number % 2 else bytes(28)) + bytes(4000)
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    status = int(any(len(self._names(page)) != number % 2
                                     for _ in range(100)))
                finally:
                    os._exit(status)
            children.append(pid)
        for pid in children:
            self.assertEqual(0, os.waitpid(pid, 0)[1])

    def test_silent_clamd(self):
        self.clamd.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        self.assertRaises(TimeoutError, self._names, bytes(4096))
        self.assertLess(time.monotonic() - begin, 5)
        self.clamd.send_signal(signal.SIGCONT)
        self.assertEqual(['Test.First.UNOFFICIAL'],
                         self._names(_FIRST + bytes(4000)))

    def test_clamd_goes(self):
        self.assertEqual([], self._names(bytes(4096)))
        self._end()
        self.assertRaises(OSError, self._names, bytes(4096))
        self.assertRaises(
            exception.EngineError,
            clamav.ClamavEngine.compile, [], self.options)
