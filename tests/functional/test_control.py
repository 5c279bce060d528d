# SPDX-License-Identifier: Apache-2.0
"""The monitor's QMP commands, and those of QEMU that touch it."""

from tests.functional import base
from virtav_nova.monitor import qmp

RAM_BYTES = 512 << 20


class ControlTest(base.TestCase):

    def reset(self, machine):
        """Reset the VM and wait until it has booted again."""
        machine.qmp.execute('system_reset')
        machine.qmp.wait_event('RESET', 10)
        machine.wait_ready()

    def test_counters_add_up(self):
        worker = self.worker()
        machine = self.booted(worker, {'hot-page-limit': 0}, smp=2)
        self.assert_ran(machine, 'smc', *base.USER_CASES)
        machine.qmp.execute('stop')
        state = machine.query()
        self.assertEqual(
            (machine.instance, 'enforce', 'allow', 'alert', 1000, False,
             'virtav0'),
            (state['instance'], state['policy'], state['on-timeout'],
             state['on-match'], state['deadline-ms'], state['require'],
             state['id']))
        self.assertGreater(state['fetches'], 4000)
        self.assertEqual(
            state['fetches'],
            state['requests'] + state['table-hits'] + state['dropped'])
        # All were waited for, and all were answered.
        self.assertEqual(state['requests'], state['waits'])
        self.assertEqual(3, state['matches'])
        self.assertLessEqual(state['max-wait-ns'], state['wait-ns'])
        self.assertLess(state['wait-ns'] / state['waits'],
                        state['max-wait-ns'])
        for name in ('resent', 'timeouts', 'dropped', 'unknown', 'rearms'):
            self.assertEqual((name, 0), (name, state[name]))
        states = state['states']
        self.assertEqual((0, 0), (states['held'], states['unscanned']))
        self.assertLessEqual(states['scanned'], state['requests'])
        # The guest's RAM, and some of ROMs and graphics memory.
        pages = sum(states.values())
        self.assertGreaterEqual(pages, RAM_BYTES // 4096)
        self.assertLess(pages, (RAM_BYTES + (32 << 20)) // 4096)
        machine.stop()
        closed = self.eventually('the end of the session', lambda: [
            record for record in worker.records('session')
            if record['event'] == 'closed'])[0]
        self.assertEqual((state['requests'], 3, 0), (
            closed['fetches'], closed['matches'], closed['unknown']))

    def test_change_at_run_time(self):
        worker = self.worker()
        machine = self.booted(worker)
        self.assert_ran(machine, 'user-write')
        self.match(machine, worker, action='alert')
        machine.set(on_match='block')
        self.assertEqual('block', machine.query()['on-match'])
        self.assert_blocked(machine, worker, 'user-write', 'packed')

        waits = machine.query()['waits']
        machine.set(policy='report')
        self.assertEqual('report', machine.query()['policy'])
        self.assert_ran(machine, 'user-write')
        self.match(machine, worker, action='alert')
        self.assertEqual(waits, machine.query()['waits'])

        machine.set(policy='enforce', on_match='pause', on_timeout='deny')
        state = machine.query()
        self.assertEqual(('enforce', 'pause', 'deny'), (
            state['policy'], state['on-match'], state['on-timeout']))
        machine.begin_case('file')
        match = self.match(machine, worker, action='pause')
        # What it is paused for does not go away with the policy.
        self.wait_status(machine, 'paused')
        machine.set(on_match='alert')
        self.assertIsNone(machine.line(0.5))
        self.release(machine, match, 'run')
        self.assert_result(machine, 'file', True, 'exit:0')
        # Nothing given, nothing changed.
        machine.set()
        self.assertEqual('enforce', machine.query()['policy'])

    def test_rearm(self):
        machine = self.booted(self.worker(), smp=2)
        self.assert_ran(machine, 'clean')
        idle = self.fetches_of(machine)
        scanned = machine.query()['states']['scanned']
        for count in range(1, 4):
            machine.set(rearm=True)
            self.assertEqual(count, machine.query()['rearms'])
            # Far more than without: all that it runs is scanned again.
            self.assertGreater(self.fetches_of(machine), idle + 100)
            self.assertLessEqual(machine.query()['states']['scanned'],
                                 scanned + idle)
        machine.set(rearm=False)
        self.assertEqual(3, machine.query()['rearms'])

    def fetches_of(self, machine):
        """How many fetches a case makes that has run before."""
        before = machine.query()['fetches']
        self.assert_ran(machine, 'clean')
        return machine.query()['fetches'] - before

    def test_rearm_forgets_exempt_pages(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'pause'})
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause')
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'run')
        self.assert_result(machine, 'kernel', True, 'exit:0')
        machine.set(rearm=True)
        self.assert_ran(machine, 'clean')
        self.assertEqual(0, machine.query()['states']['exempt'])

    def test_wrong_release(self):
        machine = self.booted(self.worker(), {'on-match': 'block'})
        for block, offset in (('pc.ram', 0), ('pc.ram', 4097),
                              ('pc.ram', RAM_BYTES), ('pc.ram', 1 << 63),
                              ('no-such-block', 0), ('', 0)):
            with self.assertRaisesRegex(qmp.QMPError, 'was not paused'):
                # Nor is anything else of the command done.
                machine.set(policy='report', rearm=True, release={
                    'block': block, 'offset': offset, 'action': 'run'})
        state = machine.query()
        self.assertEqual(('enforce', 0), (state['policy'], state['rearms']))
        # Only once.
        machine.begin_case('kernel')
        match = self.event(machine, 'PAGE_FETCH_MATCH')
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'fault')
        self.assert_result(machine, 'kernel', False, 'signal:')
        with self.assertRaisesRegex(qmp.QMPError, 'was not paused'):
            self.release(machine, match, 'run')

    def test_without_a_monitor(self):
        machine = self.machine()
        for command in ('query-page-fetch-monitor', 'page-fetch-monitor-set'):
            with self.assertRaisesRegex(qmp.QMPError, 'no page-fetch-monit'):
                machine.qmp.execute(command)

    def test_reset(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'}, smp=2)
        before = machine.query()['fetches']
        self.reset(machine)
        # A boot is a boot: what was scanned has been written anew.
        self.assertGreater(machine.query()['fetches'], before * 1.8)
        self.assert_blocked(machine, worker, 'user-write')
        self.assertEqual(0, machine.query()['states']['unscanned'])

    def test_reset_while_paused_for_a_match(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause')
        self.wait_status(machine, 'paused')
        machine.qmp.execute('system_reset')
        machine.qmp.wait_event('RESET', 10)
        with self.assertRaisesRegex(qmp.QMPError, 'was not paused'):
            self.release(machine, match, 'run')
        machine.qmp.execute('cont')
        machine.wait_ready()
        # As after any other boot.
        self.assert_ran(machine, 'clean')
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause')
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'fault')
        self.assert_result(machine, 'kernel', False, 'signal:')

    def test_stop_and_cont_at_any_time(self):
        machine = self.machine(self.worker(), smp=2)

        def interrupt():
            self.prompt(machine, 'stop')
            self.prompt(machine, 'cont')

        machine.wait_ready(waiting=interrupt)
        self.assert_ran(machine, 'clean')
        self.assertEqual(0, machine.query()['timeouts'])

    def test_poweroff(self):
        machine = self.booted(self.worker())
        machine.send('poweroff')
        machine.process.wait(20)
