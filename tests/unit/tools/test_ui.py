# SPDX-License-Identifier: Apache-2.0

import os
import pty
import time
from unittest import mock

from tests.unit.tools import base
from virtavtools import ui


class TestStep(base.TestCase):

    def test_plain(self):
        with ui.step('outer') as step:
            step.note('so far')
            with ui.step('inner'):
                pass
        self.assertRegex(
            self.stderr.getvalue(),
            r'^… outer\n  so far\n… inner\n✓ inner \(0\.\d s\)\n'
            r'✓ outer \(0\.\d s\)\n$')

    def test_failure_is_marked(self):
        with self.assertRaises(ZeroDivisionError), ui.step('it'):
            raise ZeroDivisionError
        self.assertIn('✗ it', self.stderr.getvalue())

    def test_terminal(self):
        here, there = pty.openpty()
        self.addCleanup(os.close, here)
        with (open(there, 'w') as terminal,
              mock.patch('sys.stderr', terminal),
              mock.patch.object(ui, '_REDRAW', 0.01),
              ui.step('build') as step):
            step.progress(3, 12)
            shown = ''
            while '3/12 (25 %)' not in shown:
                shown += os.read(here, 1000).decode(errors='replace')
        # One line, drawn again and again.
        self.assertNotIn('\n', shown)


class TestRun(base.TestCase):

    def setUp(self):
        super().setUp()
        self.log = self.top / 'log'

    def _run(self, script):
        with ui.step('it') as step:
            step.progress = mock.Mock()
            ui.run(step, ['sh', '-c', script], self.log, cwd=self.top)
        return step.progress

    def test_output_goes_to_the_log(self):
        self._run('echo one; echo two >&2; pwd')
        lines = self.log.read_text().splitlines()
        self.assertEqual(['one', 'two', str(self.top)], lines[1:])

    def test_ninja_moves_progress(self):
        progress = self._run('echo "[1/7] CC a.o"; echo "x [2/7]"')
        progress.assert_called_once_with(1, 7)

    def test_failure_shows_the_end(self):
        with self.assertRaises(ui.CommandError) as caught:
            self._run('seq 100; exit 3')
        message = str(caught.exception)
        self.assertIn('exit status 3', message)
        self.assertIn('  | 100', message)
        self.assertIn('  | 81', message)
        self.assertNotIn('  | 80', message)
        self.assertIn(str(self.log), caught.exception.hint)

    def test_no_such_program(self):
        with self.assertRaisesRegex(ui.CommandError, 'cannot run /no/such'):
            ui.run(None, ['/no/such'], self.log)

    def _interrupt(self, script):
        """Interrupt a command at its first progress; gives back its pid."""
        with self.assertRaises(KeyboardInterrupt), ui.step('it') as step:
            step.progress = mock.Mock(side_effect=KeyboardInterrupt)
            ui.run(step, ['sh', '-c', script], self.log, cwd=self.top)
        return int((self.top / 'pid').read_text())

    def _assert_ends(self, pid):
        # Orphans are reaped by another process, when it comes to that.
        for _attempt in range(200):
            try:
                with open('/proc/%d/stat' % pid) as stat:
                    if stat.read().rsplit(') ', 1)[1][0] == 'Z':
                        return
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(0.05)
        self.fail('process %d is still running' % pid)

    def test_interrupt_ends_what_was_started(self):
        self._assert_ends(self._interrupt(
            'sleep 60 & echo $! >pid; echo "[1/2]"; wait'))

    def test_deaf_command_is_ended(self):
        with mock.patch.object(ui, '_PATIENCE', 0.1):
            self._assert_ends(self._interrupt(
                'trap "" INT TERM; echo $$ >pid; echo "[1/2]";'
                ' while :; do sleep 60; done'))
