# SPDX-License-Identifier: Apache-2.0

import os
import signal
import subprocess
import sys

from tests.unit.tools import base
from virtavtools import errors

_SLEEPER = '''
import sys, time
sys.path.insert(0, %r)
from virtavtools import errors

def main():
    try:
        print('up', flush=True)
        time.sleep(60)
    finally:
        print('cleaned up', flush=True)

errors.run(main)
'''


_PRINTER = '''
import sys
sys.path.insert(0, %r)
from virtavtools import errors

def main():
    %s

errors.run(main)
'''


class TestRun(base.TestCase):

    def _run(self, main):
        handler = signal.getsignal(signal.SIGTERM)
        self.addCleanup(signal.signal, signal.SIGTERM, handler)
        with self.assertRaises(SystemExit) as caught:
            errors.run(main)
        return caught.exception.code

    def test_error_and_way_out(self):
        def main():
            raise errors.ToolError('it broke', 'mend it')

        self.assertEqual(1, self._run(main))
        self.assertEqual('error: it broke\n  way out: mend it\n',
                         self.stderr.getvalue())

    def test_interrupt(self):
        def main():
            raise KeyboardInterrupt

        self.assertEqual(130, self._run(main))
        self.assertEqual('', self.stderr.getvalue())

    def test_result(self):
        self.assertEqual(3, self._run(lambda: 3))

    def _start(self, statement, **options):
        return subprocess.Popen(
            [sys.executable, '-c', _PRINTER % (str(base.TOOLS), statement)],
            stderr=subprocess.PIPE, text=True, **options)

    def test_encoding_that_lacks_a_character(self):
        process = self._start(
            r'print("\u2713 5 \xb5s")', stdout=subprocess.PIPE,
            env={'PYTHONIOENCODING': 'ascii'})
        self.assertEqual(('? 5 ?s\n', ''), process.communicate())
        self.assertEqual(0, process.returncode)

    def test_nobody_reads(self):
        for flush, unbuffered in ((True, ''), (False, ''), (False, '1')):
            with self.subTest(flush=flush, unbuffered=unbuffered):
                ours, theirs = os.pipe()
                os.close(ours)
                process = self._start('print("x", flush=%r)' % flush,
                                      stdout=theirs,
                                      env={'PYTHONUNBUFFERED': unbuffered})
                os.close(theirs)
                self.assertEqual('', process.communicate()[1])
                self.assertEqual(1, process.returncode)

    def test_other_broken_pipe_is_not_hushed(self):
        process = self._start('raise BrokenPipeError("of a socket")',
                              stdout=subprocess.PIPE)
        self.assertIn('of a socket', process.communicate()[1])
        self.assertEqual(1, process.returncode)

    def test_sigterm_cleans_up(self):
        process = subprocess.Popen(
            [sys.executable, '-c',
             _SLEEPER % str(base.TOOLS)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.assertEqual('up\n', process.stdout.readline())
        process.terminate()
        self.assertEqual(('cleaned up\n', ''), process.communicate())
        self.assertEqual(143, process.returncode)
