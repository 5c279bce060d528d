# SPDX-License-Identifier: Apache-2.0
"""The scan worker is lost while the guest runs, and comes back."""

import signal

from tests.functional import base

#: Long enough for a worker that is well, on a host that is busy.
DEADLINE_MS = 1500


class LossTest(base.TestCase):

    def start(self, on_timeout, deadline_ms=DEADLINE_MS):
        """Start worker and guest; the guest is booting then."""
        worker = self.worker()
        machine = self.machine(worker, {
            'on-timeout': on_timeout, 'deadline-ms': deadline_ms,
            'on-match': 'block'})
        self.eventually('a part of the boot', lambda: machine.query()[
            'fetches'] > 1000)
        return worker, machine

    def kill(self, worker):
        """Kill its first process; the others have to end by themselves."""
        worker.process.kill()
        worker.process.wait()

    def check_recovered(self, machine, worker):
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        self.eventually('all to be scanned', lambda: machine.query()[
            'states']['unscanned'] == 0)
        self.assert_ran(machine, 'clean')
        self.assert_blocked(machine, worker, 'user-write')
        state = machine.query()
        self.assertEqual((True, False, 0), (
            state['connected'], state['degraded'],
            state['states']['unscanned']))

    def check_goes_on(self, machine, reason):
        """Under allow, without a worker."""
        data = self.event(machine, 'PAGE_FETCH_DEGRADED')
        self.assertEqual(reason, data['reason'])
        machine.wait_ready()
        self.assert_ran(machine, 'user-write')
        state = machine.query()
        self.assertTrue(state['degraded'])
        self.assertGreater(state['states']['unscanned'], 0)
        self.assertGreater(state['states']['scanned'], 0)
        self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))

    def check_is_held(self, machine):
        """Under deny, without a worker."""
        data = self.event(machine, 'PAGE_FETCH_DEGRADED')
        machine.qmp.wait_event('STOP', 10)
        self.assert_nothing_runs(machine)
        self.assertEqual(0, machine.query()['states']['unscanned'])
        self.assertEqual('paused', machine.status())
        return data['reason']

    def test_killed_allow(self):
        worker, machine = self.start('allow')
        self.kill(worker)
        self.check_goes_on(machine, 'disconnected')
        self.assertFalse(machine.query()['connected'])
        worker.start()
        self.check_recovered(machine, worker)

    def test_killed_deny(self):
        worker, machine = self.start('deny')
        self.kill(worker)
        self.assertEqual('disconnected', self.check_is_held(machine))
        self.assertIn(machine.query()['last-error'], (
            'connect: Connection refused', 'the worker has gone'))
        worker.start()
        machine.wait_ready()
        self.check_recovered(machine, worker)

    def check_killed_long_before_the_deadline(self, on_timeout):
        worker, machine = self.start(on_timeout, 30000)
        self.kill(worker)
        self.eventually('the loss', lambda: not machine.query()['connected'])
        self.eventually('a fetch that waits', lambda: machine.query()[
            'states']['held'])
        self.check_waiting(machine)

    def test_killed_long_before_the_deadline_allow(self):
        self.check_killed_long_before_the_deadline('allow')

    def test_killed_long_before_the_deadline_deny(self):
        self.check_killed_long_before_the_deadline('deny')

    def test_stopped_allow(self):
        worker, machine = self.start('allow')
        worker.signal(signal.SIGSTOP)
        self.check_goes_on(machine, 'timeout')
        self.assertTrue(machine.query()['connected'])
        worker.signal(signal.SIGCONT)
        self.check_recovered(machine, worker)

    def test_stopped_deny(self):
        worker, machine = self.start('deny')
        worker.signal(signal.SIGSTOP)
        self.assertEqual('timeout', self.check_is_held(machine))
        worker.signal(signal.SIGCONT)
        machine.wait_ready()
        self.check_recovered(machine, worker)

    def test_killed_with_a_vcpu_waiting(self):
        worker, machine = self.start('deny')
        worker.signal(signal.SIGSTOP)
        self.check_is_held(machine)
        self.kill(worker)
        self.eventually('the loss', lambda: not machine.query()['connected'])
        self.assert_nothing_runs(machine)
        worker.start()
        # What was asked for is asked for again.
        self.eventually('the same again', lambda: machine.query()['resent'])
        machine.wait_ready()
        self.check_recovered(machine, worker)

    def test_within_the_deadline(self):
        worker = self.worker()
        machine = self.machine(worker, {
            'on-timeout': 'deny', 'deadline-ms': 20000})
        for step in range(3):
            self.eventually('a part of the boot', lambda step=step: (
                machine.query()['fetches'] > 1000 * step))
            self.kill(worker)
            worker.start()
        machine.wait_ready()
        state = machine.query()
        self.assertEqual((0, 0, False), (
            state['timeouts'], state['states']['unscanned'],
            state['degraded']))
        # Nobody had to pause it.
        self.assertEqual([], self.events(machine, 'STOP'))

    def test_what_ran_unscanned_is_found(self):
        worker = self.worker()
        machine = self.booted(worker, {'deadline-ms': DEADLINE_MS})
        self.kill(worker)
        self.event(machine, 'PAGE_FETCH_DEGRADED')
        self.assert_ran(machine, 'user-write')
        self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))
        worker.start()
        self.match(machine, worker, action='alert', cpl=3, rule=base.RULE)

    def test_new_rules(self):
        rules = self.home / 'rules'
        rules.mkdir()
        (rules / 'none.yar').write_text('rule no_page { condition: false }\n')
        worker = self.worker(rules=rules)
        machine = self.booted(worker, {'on-match': 'block'})
        self.assert_ran(machine, 'file')
        before = machine.query()
        self.assertEqual(0, before['matches'])
        worker.stop()
        worker = self.worker()
        self.eventually('the new rules', lambda: machine.query().get(
            'digest') not in (None, before['digest']))
        self.assertGreater(machine.query()['rearms'], before['rearms'])
        # The guest has it in its page cache: no page of it is written, and
        # yet it is scanned again.
        self.assert_blocked(machine, worker, 'file')
