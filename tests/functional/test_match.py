# SPDX-License-Identifier: Apache-2.0
"""What becomes of code that a rule matches."""

from tests.functional import base
from virtav_nova.monitor import qmp


class BlockTest(base.TestCase):
    """on-match=block"""

    def test_no_case_runs(self):
        worker = self.worker()
        for _ in range(20 if base.NIGHTLY else 2):
            machine = self.booted(worker, {'on-match': 'block'})
            self.assert_ran(machine, 'clean')
            self.assert_blocked(machine, worker, *base.USER_CASES)

            machine.begin_case('kernel')
            match = self.match(machine, worker, action='pause', cpl=0,
                               rule=base.RULE)
            self.wait_status(machine, 'paused')
            self.assert_nothing_runs(machine)
            self.release(machine, match, 'fault')
            self.assert_result(machine, 'kernel', False, 'signal:')

            # The guest has survived it.
            self.assertEqual('running', machine.status())
            self.assert_ran(machine, 'clean')
            state = machine.query()
            self.assertEqual(4, state['matches'])
            self.assertEqual(0, state['states']['exempt'])
            self.assertEqual(0, state['states']['unscanned'])
            self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))
            records = [record for record in worker.records('match')
                       if record['instance'] == machine.instance]
            self.assertEqual(4, len(records))
            for record in records:
                self.assertTrue(record['held'])
                self.assertEqual(('enforce', 'block'),
                                 (record['policy'], record['on_match']))
                self.assertEqual(state['digest'], record['digest'])
                self.assertIn(self.signature.hex(), record['bytes'])
            machine.stop()

    def test_kernel_page_released_to_run(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause', cpl=0)
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'run')
        self.assert_result(machine, 'kernel', True, 'exit:0')
        self.assertEqual('running', machine.status())
        # The permission was for those bytes, not for the place.
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause', cpl=0)
        self.release(machine, match, 'fault')
        self.assert_result(machine, 'kernel', False, 'signal:')

    def test_kernel_page_not_released(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause')
        for _ in range(2):
            self.wait_status(machine, 'paused')
            machine.qmp.execute('cont')
        self.wait_status(machine, 'paused')
        self.assert_nothing_runs(machine)
        self.release(machine, match, 'fault')
        self.assert_result(machine, 'kernel', False, 'signal:')

    def test_stop_by_the_user_stays(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause')
        self.wait_status(machine, 'paused')
        machine.qmp.execute('stop')
        self.release(machine, match, 'fault')
        self.assert_nothing_runs(machine)
        self.assertEqual('paused', machine.status())
        machine.qmp.execute('cont')
        self.assert_result(machine, 'kernel', False, 'signal:')


class AlertTest(base.TestCase):
    """on-match=alert"""

    def test_all_run_and_are_told(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'alert'})
        for case in (*base.USER_CASES, 'kernel'):
            self.assert_ran(machine, case)
            self.match(machine, worker, action='alert', rule=base.RULE,
                       cpl=0 if case == 'kernel' else 3)
        self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))
        self.assertEqual('running', machine.status())
        state = machine.query()
        self.assertEqual(4, state['matches'])
        self.assertEqual(0, state['states']['unscanned'])
        self.assertEqual(4, len(worker.records('match')))
        for record in worker.records('match'):
            self.assertEqual('alert', record['on_match'])
            self.assertTrue(record['held'])


class PauseTest(base.TestCase):
    """on-match=pause"""

    def test_user_page(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'pause'})
        for action, *result in (('fault', False, 'signal:11'),
                                ('run', True, 'exit:0'),
                                ('fault', False, 'signal:11')):
            machine.begin_case('user-write')
            match = self.match(machine, worker, action='pause', cpl=3)
            self.wait_status(machine, 'paused')
            self.assert_nothing_runs(machine, seconds=0.5)
            self.release(machine, match, action)
            self.assert_result(machine, 'user-write', *result)
        self.assert_ran(machine, 'clean')

    def test_match_of_a_page_that_runs(self):
        # policy=report: too late to hold it, but not to pause the VM.
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'pause',
                                       'policy': 'report'})
        machine.begin_case('user-write')
        match = self.match(machine, worker, action='pause')
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'run')
        self.assert_result(machine, 'user-write', True, 'exit:0')
        self.eventually('all scanned', lambda: machine.query()['states'][
            'unscanned'] == 0)


class StopTest(base.TestCase):
    """on-match=stop"""

    def test_vm_shuts_down(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'stop'})
        machine.begin_case('user-write')
        self.match(machine, worker, action='stop')
        data = machine.qmp.wait_event('SHUTDOWN', 20)['data']
        self.assertEqual({'guest': False, 'reason': 'host-error'}, data)
        machine.process.wait(20)
        self.assertRaises(EOFError, machine.end_case, 'user-write')

    def test_vm_that_is_kept(self):
        # libvirt's way: -no-shutdown; nothing of the guest may go on.
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'stop'},
                              extra=('-no-shutdown',))
        machine.begin_case('user-write')
        self.match(machine, worker, action='stop')
        self.wait_status(machine, 'shutdown')
        self.assert_nothing_runs(machine)
        with self.assertRaises(qmp.QMPError):
            machine.qmp.execute('cont')
        machine.qmp.execute('quit')
        machine.process.wait(20)
