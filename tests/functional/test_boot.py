# SPDX-License-Identifier: Apache-2.0
"""What the guest notices of the monitor: nothing."""

import re

from tests.functional import base

#: How the kernel measures its clocks depends on the load of the host.
_CLOCKS = re.compile(r'tsc|apic|clock|calibrat|delay loop|rtc|hpet|random',
                     re.I)
_NUMBER = re.compile(r'0x[0-9a-f]+|\b[0-9a-f]{8,}\b|[0-9]+')
_STAMP = re.compile(r'^\[ *[0-9.]+\] ')


class BootTest(base.TestCase):

    def boot(self, *arguments):
        """Boot with all that the kernel has to say.

        :returns: the machine, and its console's lines as a set, without
            times and addresses
        """
        machine = self.booted(*arguments, extra=(
            '-append', 'console=ttyS0 loglevel=7'))
        lines = {_NUMBER.sub('N', _STAMP.sub('', line))
                 for line in machine.lines if not _CLOCKS.search(line)}
        return machine, lines

    def test_same_state(self):
        machine, expected = self.boot()
        self.assertGreater(len(expected), 200)
        self.assert_ran(machine, *base.USER_CASES, 'clean')
        machine.stop()

        worker = self.worker()
        for policy in ('enforce', 'report'):
            machine, lines = self.boot(worker, {'policy': policy})
            self.assertEqual(set(), expected ^ lines, policy)
            state = machine.query()
            self.assertEqual((True, False),
                             (state['connected'], state['degraded']))
            self.assertGreater(state['fetches'], 1000)
            self.assert_ran(machine, 'clean')
            machine.stop()
        self.assertEqual([], worker.records('match'))

    def test_runs_at_boot_and_powers_off(self):
        worker = self.worker()
        machine = self.machine(worker, {'on-match': 'block'},
                               run=('clean', 'user-write'))
        self.assert_result(machine, 'clean', True, 'exit:0')
        self.assert_result(machine, 'user-write', False, 'signal:11')
        data = machine.qmp.wait_event('SHUTDOWN', 20)['data']
        self.assertEqual('guest-shutdown', data['reason'])
        machine.process.wait(20)
        closed = self.eventually('the end of the session', lambda: [
            record for record in worker.records('session')
            if record['event'] == 'closed'])
        self.assertEqual(1, closed[0]['matches'])

    def test_two_guests(self):
        worker = self.worker()
        first = self.machine(worker, {'on-match': 'block'})
        second = self.machine(worker, {'on-match': 'alert'})
        first.wait_ready()
        second.wait_ready()
        self.assert_blocked(first, worker, 'user-write')
        self.assertEqual([], self.events(second, 'PAGE_FETCH_MATCH'))
        self.assert_ran(second, 'user-write')
        self.match(second, worker, action='alert')
        self.assert_blocked(first, worker, 'packed')


class ReportTest(base.TestCase):
    """policy=report"""

    def test_code_runs_and_is_told(self):
        worker = self.worker()
        # Too late to block what runs already.
        machine = self.booted(worker, {'policy': 'report',
                                       'on-match': 'block'})
        for case in (*base.USER_CASES, 'kernel'):
            self.assert_ran(machine, case)
            self.match(machine, worker, action='alert', rule=base.RULE,
                       cpl=0 if case == 'kernel' else 3)
        state = machine.query()
        self.assertEqual((0, 0, False), (state['waits'], state['timeouts'],
                                         state['degraded']))
        for record in worker.records('match'):
            self.assertFalse(record['held'])
            self.assertEqual('report', record['policy'])
        self.eventually('all scanned', lambda: machine.query()['states'][
            'unscanned'] == 0)
