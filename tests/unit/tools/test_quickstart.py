# SPDX-License-Identifier: Apache-2.0

from unittest import mock

from tests.unit.tools import base
from virtavtools import errors
from virtavtools import parts
from virtavtools import quickstart
from virtavtools import show

_HIGHEST = 2 ** 64 - 1


def _match(case, event=None, **changes):
    """A match as it must be, but for some changes.

    :param event: what is different in the event; False for no event
    """
    kernel = case.action == quickstart.PAUSE
    if event is not False:
        # The widest values there are.
        event = {'rule': quickstart.RULE, 'action': case.action,
                 'gva': _HIGHEST, 'gpa': _HIGHEST, 'rip': _HIGHEST,
                 'cr3': _HIGHEST, 'cpl': 0 if kernel else 3, **(event or {})}
    return quickstart.Match(**{
        'case': case, 'event': event or None, 'record': {'held': True},
        'paused': kernel,
        'outcome': {'executed': False, 'status': 'signal:11',
                    'seconds': None}, **changes})


def _run(**changes):
    return quickstart.Run(**{
        'boot_s': 2.5, 'fetches': 3600, 'distinct': 3500,
        'matches': list(map(_match, quickstart.CASES)),
        'clean': [True, True], **changes})


class TestMatch(base.TestCase):

    USER = quickstart.CASES[0]
    KERNEL = quickstart.CASES[-1]

    def test_good(self):
        for case in quickstart.CASES:
            match = _match(case)
            self.assertEqual([], match.problems())
            self.assertEqual(
                {'case': case.name, 'rule': quickstart.RULE, 'blocked': True,
                 'executed': False}, match.summary())

    def _check_blocked(self, expected, *arguments, **changes):
        self.assertIs(expected, _match(*arguments, **changes).blocked)

    def test_not_blocked(self):
        self._check_blocked(False, self.USER, False)
        self._check_blocked(False, self.USER, {'action': 'alert'})
        self._check_blocked(False, self.USER, paused=True)
        self._check_blocked(False, self.USER, record=None)
        self._check_blocked(False, self.USER, record={'held': False})
        self._check_blocked(False, self.KERNEL, paused=False)
        self._check_blocked(False, self.KERNEL, {'action': 'fault'})

    def test_problems(self):
        ran = {'executed': True, 'status': 'exit:0', 'seconds': None}
        match = _match(self.USER, False, outcome=ran)
        self.assertEqual(['user-write: nothing matched',
                          'user-write: the guest says that it ran'],
                         match.problems())
        self.assertIsNone(match.summary()['rule'])
        self.assertEqual(
            ['kernel: matched by Other, not VirtAV_SelfTest'],
            _match(self.KERNEL, {'rule': 'Other'}).problems())
        self.assertEqual(
            ['kernel: matched, but not held and blocked'],
            _match(self.KERNEL, paused=False).problems())

    def test_said(self):
        self.assertEqual(
            'killed by SIGSEGV; the code left no mark: it never ran',
            quickstart.said({'executed': False, 'status': 'signal:11'}))
        self.assertEqual(
            'exit status 0; the code left its mark: it ran',
            quickstart.said({'executed': True, 'status': 'exit:0'}))

    def test_unknown_address(self):
        match = _match(self.USER)
        del match.event['gpa']
        self.assertIn('gpa not known', match.rows()[1][1])


class TestSummary(base.TestCase):

    def test_one_run(self):
        summary = quickstart.summarize([_run()], 2.0)
        self.assertEqual(['user-write', 'file', 'packed', 'kernel'],
                         [match['case'] for match in summary.pop('matches')])
        self.assertEqual(
            {'fetches': 3600, 'distinct': 3500, 'clean_ran': True,
             'boot_s': 2.5, 'stock_boot_s': 2.0}, summary)

    def test_runs(self):
        runs = [_run(boot_s=3.0, clean=[True, False]), _run(boot_s=9.0),
                quickstart.Run(failure='the emulator ended')]
        summary = quickstart.summarize(runs, 2.0)
        self.assertEqual(8, len(summary.pop('matches')))
        self.assertEqual(
            {'fetches': 3600, 'distinct': 3500, 'clean_ran': False,
             'boot_s': 3.0, 'stock_boot_s': 2.0, 'runs': 3, 'runs_good': 1},
            summary)

    def test_problems(self):
        self.assertEqual([], _run().problems())
        self.assertEqual(['the clean program did not run'],
                         _run(clean=[True, False]).problems())
        self.assertEqual(['the emulator ended'],
                         quickstart.Run(failure='the emulator ended')
                         .problems())
        self.assertEqual(
            ['file: nothing matched'],
            _run(matches=[_match(quickstart.CASES[1], False)]).problems())


class TestShow(base.TestCase):

    def _shown(self, *runs):
        summary = quickstart.summarize(runs, 2.0)
        screen = show.Show(False)
        for number, run in enumerate(runs, 1):
            for match in run.matches:
                screen.result(not match.problems(), match.case.name,
                              match.case.title, match.rows(),
                              match.problems())
            screen.count(number, len(runs), run)
        screen.close(runs, summary)
        return self.stdout.getvalue()

    def test_width(self):
        for line in self._shown(_run(), _run()).splitlines():
            self.assertLessEqual(len(line), 80, line)

    def test_plain(self):
        text = self._shown(_run())
        self.assertNotIn('\x1b', text)
        self.assertIn('✓ stopped     4 of 4; the clean program ran\n', text)

    def test_numbers(self):
        text = 'fetches   3,600; the worker scanned %s distinct pages\n'
        self.assertIn(text % '3,500', self._shown(_run()))
        self.assertIn(text % '?', self._shown(_run(distinct=None)))

    def test_failure(self):
        text = self._shown(quickstart.Run(
            failure='the emulator ended\nwith a trace\n'))
        self.assertIn('✗ 1 of 1      0 stopped of 0\n'
                      '      the emulator ended\n'
                      '      with a trace\n', text)
        self.assertIn('✗ stopped     0 of 0; the clean program did not run\n',
                      text)

    def test_brackets_are_text(self):
        # They are markup to rich.
        text = self._shown(_run(matches=[
            _match(quickstart.CASES[0], {'rule': '[bold]x[/nothing]'})]))
        self.assertIn('rule [bold]x[/nothing]\n', text)

    def test_hushed(self):
        screen = show.Show(False)
        with screen.hushed(True):
            screen.heading('nothing')
        with screen.hushed(False):
            screen.heading('something')
        self.assertEqual('\nsomething\n', self.stdout.getvalue())

    def test_aside(self):
        show.Show(True).heading('Boot')
        self.assertEqual('', self.stdout.getvalue())
        self.assertIn('Boot', self.stderr.getvalue())


class TestMain(base.TestCase):

    def _main(self, *arguments, runs=()):
        with (mock.patch('virtavtools.venv.enter'),
              mock.patch.object(quickstart, '_show_all',
                                return_value=(list(runs), 2.0))):
            return quickstart.main(list(arguments))

    def test_json_is_all_of_stdout(self):
        self.assertEqual(0, self._main('--json', runs=[_run()]))
        self.assertEqual(1, self.stdout.getvalue().count('\n'))
        self.assertTrue(self.stdout.getvalue().startswith('{"fetches": 3600'))

    def test_status(self):
        self.assertEqual(0, self._main(runs=[_run(), _run()]))
        self.assertEqual(1, self._main(runs=[_run(), _run(clean=[False])]))

    def test_runs_are_counted(self):
        for words in (['0'], ['-1'], ['x'], ['']):
            with self.assertRaises(SystemExit) as caught:
                self._main('--runs', *words)
            self.assertEqual(2, caught.exception.code)


class TestParts(base.TestCase):

    def _tool(self, script):
        tool = self.top / 'tools' / 'build-qemu'
        tool.parent.mkdir()
        tool.write_text('#!/bin/sh\n' + script)
        tool.chmod(0o755)
        self._patch(mock.patch('virtavtools.ROOT', self.top))

    def setUp(self):
        super().setUp()
        self._patch(mock.patch.dict('os.environ', VIRTAV_QEMU='',
                                    VIRTAV_QEMU_STOCK=''))

    def test_built(self):
        self._tool('echo "built"\necho "/path/of $*"\n')
        self.assertEqual('/path/of ', str(parts.emulator()))
        self.assertEqual('/path/of --stock', str(parts.stock_emulator()))

    def test_failed(self):
        self._tool('exit 3')
        with self.assertRaises(SystemExit) as caught:
            parts.emulator()
        self.assertEqual(1, caught.exception.code)

    def test_given(self):
        with mock.patch.dict('os.environ', VIRTAV_QEMU=str(self.top)):
            self.assertEqual(self.top, parts.emulator())

    def test_given_is_missing(self):
        with (mock.patch.dict('os.environ', VIRTAV_QEMU='/no/such'),
              self.assertRaisesRegex(errors.ToolError, '/no/such')):
            parts.emulator()

    def test_given_is_no_guest(self):
        with (mock.patch.dict('os.environ', VIRTAV_GUEST=str(self.top)),
              self.assertRaisesRegex(errors.ToolError, 'no .*manifest.json')):
            parts.guest()
