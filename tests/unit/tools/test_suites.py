# SPDX-License-Identifier: Apache-2.0

import os
import pathlib
import signal
import sys
import threading
import time
from unittest import mock

from tests.unit.tools import base
from virtavtools import errors
from virtavtools import suites

HOOKS = '''\
[INFO] Installing environment for local.
ruff.....................................................................Failed
- hook id: ruff

Passed
hacking..............................................(no files to check)Skipped
mypy.....................................................................Passed
'''
TOTALS = '''\
{0} tests.unit.test_a.A.test [0.1s] ... ok

 - Passed: 99

======
Totals
======
Ran: 15 tests in 0.1 sec.
 - Passed: 6
 - Skipped: 1
 - Expected Fail: 3
 - Unexpected Success: 2
 - Failed: 3
Sum of execute time for each test: 1.0 sec.
'''


class TestCounts(base.TestCase):

    def _live(self, status, output):
        """Have commands end in some way; gives back what was started."""
        self._patch(mock.patch('virtavtools.venv.ensure',
                               return_value=pathlib.Path('/nowhere')))
        self._patch(mock.patch('virtavtools.packages.install'))
        return self._patch(mock.patch('virtavtools.suites.live',
                                      return_value=(status, output)))

    def test_hooks(self):
        self._live(1, HOOKS)
        self.assertEqual('1 passed, 1 failed, 1 skipped',
                         str(suites.run_pep8()))

    def test_hooks_that_cannot_be_installed(self):
        self._live(3, 'An unexpected error has occurred\n')
        self.assertEqual('0 passed, 1 failed, 0 skipped',
                         str(suites.run_pep8()))

    def test_tests(self):
        live = self._live(1, TOTALS)
        self.assertEqual('9 passed, 5 failed, 1 skipped',
                         str(suites.run_unit()))
        self.assertEqual('tests/unit', live.call_args[1]['OS_TEST_PATH'])

    def test_tests_that_cannot_be_imported(self):
        self._live(100, 'Failures during discovery\n')
        self.assertEqual('0 passed, 1 failed, 0 skipped',
                         str(suites.run_unit()))


class TestLive(base.TestCase):

    def test_output_is_shown_and_kept(self):
        status, output = suites.live(
            [pathlib.Path(sys.executable), '-c',
             'import os; print(os.environ["VIRTAV_X"], end=""); exit(3)'],
            VIRTAV_X='some text')
        self.assertEqual((3, 'some text'), (status, output))
        # So that the closing line is alone on its line.
        self.assertEqual('some text\n', self.stdout.getvalue())

    def test_ends_with_the_program(self):
        # Who is started in the background by a script ignores it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with self.assertRaises(KeyboardInterrupt):
            suites.live([pathlib.Path('/bin/sh'), '-c',
                         'echo $$; sleep 60; true'])
        group = int(self.stdout.getvalue())
        with self.assertRaises(ProcessLookupError):
            for _try in range(100):
                os.killpg(group, 0)
                time.sleep(0.1)


class TestMain(base.TestCase):

    def setUp(self):
        super().setUp()
        self._patch(mock.patch.dict(suites.SUITES, clear=True))

    def _suite(self, name, **options):
        suites.SUITES[name] = mock.Mock(__doc__=name, **options)

    def _run(self, *argv):
        """:returns: exit status and last line."""
        status = suites.main(argv)
        return status, self.stdout.getvalue().splitlines()[-1]

    def test_all(self):
        self._suite('one', return_value=suites.Tally(3, 0, 1))
        self._suite('two', return_value=suites.Tally(4))
        self.assertEqual((0, '7 passed, 0 failed, 1 skipped'), self._run())

    def test_some(self):
        self._suite('one', side_effect=AssertionError)
        self._suite('two', return_value=suites.Tally(4))
        self.assertEqual((0, '4 passed, 0 failed, 0 skipped'),
                         self._run('two'))

    def test_failures_do_not_end_the_run(self):
        self._suite('tool', side_effect=errors.ToolError('no network'))
        self._suite('part', side_effect=SystemExit(1))
        self._suite('nothing', return_value=suites.Tally(skipped=5))
        self._suite('good', return_value=suites.Tally(4))
        self.assertEqual((1, '4 passed, 3 failed, 5 skipped'), self._run())
        self.assertIn('error: no network', self.stderr.getvalue())
        self.assertIn('the suite nothing ran no test',
                      self.stderr.getvalue())

    def test_signal_ends_the_run(self):
        self._suite('one', side_effect=SystemExit(143))
        self.assertRaises(SystemExit, suites.main, [])

    def test_nightly(self):
        def long_form():
            self.assertEqual('1', os.environ['VIRTAV_NIGHTLY'])
            return suites.Tally(1)

        self._suite('one', side_effect=long_form)
        self.assertEqual(0, self._run('--nightly')[0])

    def test_unknown(self):
        self._suite('one')
        with self.assertRaises(SystemExit):
            suites.main(['three'])
        self.assertIn('no such suite: three', self.stderr.getvalue())
