# SPDX-License-Identifier: Apache-2.0
"""No scan worker when the guest starts, and then there is one."""

from tests.functional import base

#: Long enough for a worker that is well, on a host that is busy.
DEADLINE_MS = 1000
DENY = {'on-timeout': 'deny', 'deadline-ms': DEADLINE_MS,
        'on-match': 'block'}
ALLOW = {'on-timeout': 'allow', 'deadline-ms': DEADLINE_MS,
         'on-match': 'block'}


class WaitTest(base.TestCase):
    """A vCPU waits, long before the deadline."""

    def check(self, on_timeout):
        machine = self.machine(self.worker(start=False), {
            'on-timeout': on_timeout, 'deadline-ms': 30000})
        self.eventually('the first fetch', lambda: machine.query()[
            'fetches'] == 1)
        self.check_waiting(machine)

    def test_allow(self):
        self.check('allow')

    def test_deny(self):
        self.check('deny')


class AllowTest(base.TestCase):
    """on-timeout=allow"""

    def test_boots_degraded_and_recovers(self):
        worker = self.worker(start=False)
        machine = self.booted(worker, ALLOW)
        state = machine.query()
        self.assertTrue(state['degraded'])
        self.assertEqual('disconnected', state['degraded-reason'])
        self.assertFalse(state['connected'])
        self.assertEqual('connect: No such file or directory',
                         state['last-error'])
        self.assertNotIn('digest', state)
        self.assertGreater(state['states']['unscanned'], 1000)
        self.assertEqual(0, state['states']['scanned'])
        # One wait for all: it does not go on at one deadline a page.
        self.assertEqual(1, state['timeouts'])
        self.assert_ran(machine, 'clean', 'user-write')

        worker.start()
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        self.eventually('all to be scanned', lambda: machine.query()[
            'states']['unscanned'] == 0)
        self.assert_ran(machine, 'clean')
        self.assert_blocked(machine, worker, 'user-write')
        state = machine.query()
        self.assertEqual((True, False),
                         (state['connected'], state['degraded']))
        self.assertNotIn('last-error', state)
        self.assertNotIn('degraded-reason', state)
        self.assertGreater(state['states']['scanned'], 0)
        self.assertEqual(0, state['states']['unscanned'])


class DenyTest(base.TestCase):
    """on-timeout=deny"""

    def start(self):
        """Start worker and guest, and have the guest paused for want of it.

        :returns: the worker, which does not run, and the machine
        """
        worker = self.worker(start=False)
        machine = self.machine(worker, DENY)
        machine.qmp.wait_event('STOP', 10)
        return worker, machine

    def check_boots(self, machine, worker):
        machine.wait_ready()
        state = machine.query()
        self.assertEqual(0, state['states']['unscanned'])
        self.assertFalse(state['degraded'])
        self.assert_blocked(machine, worker, 'user-write')

    def test_pauses_until_the_worker_comes(self):
        worker, machine = self.start()
        self.assertEqual('paused', machine.status())
        self.assert_nothing_runs(machine)
        state = machine.query()
        self.assertEqual((1, 1, True), (
            state['fetches'], state['timeouts'], state['degraded']))
        worker.start()
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        machine.qmp.wait_event('RESUME', 10)
        self.check_boots(machine, worker)

    def test_operator_is_served(self):
        worker, machine = self.start()
        for _ in range(3):
            self.prompt(machine, 'stop')
            self.assert_nothing_runs(machine, 0.2)
            self.prompt(machine, 'cont')
            self.assert_nothing_runs(machine, 0.5)
        self.assertEqual(1, machine.query()['fetches'])
        self.assertEqual(0, machine.query()['states']['unscanned'])
        worker.start()
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        self.check_boots(machine, worker)

    def test_quit(self):
        _, machine = self.start()
        self.prompt(machine, 'quit')
        machine.process.wait(2)

    def test_stop_by_the_user_stays(self):
        worker, machine = self.start()
        machine.qmp.execute('stop')
        self.check_stays_stopped(worker, machine)

    def test_stop_before_the_deadline_stays(self):
        worker = self.worker(start=False)
        machine = self.machine(worker, {**DENY, 'deadline-ms': 3000})
        self.prompt(machine, 'stop')
        self.eventually('the deadline', lambda: machine.query()['timeouts'])
        self.check_stays_stopped(worker, machine)

    def check_stays_stopped(self, worker, machine):
        worker.start()
        self.eventually('connection', lambda: machine.query()['connected'])
        self.assert_nothing_runs(machine)
        self.assertEqual('paused', machine.status())
        machine.qmp.execute('cont')
        machine.wait_ready()

    def test_allowed_meanwhile(self):
        _, machine = self.start()
        machine.set(on_timeout='allow')
        machine.qmp.wait_event('RESUME', 10)
        machine.wait_ready()
        self.assertTrue(machine.query()['degraded'])
        # And back.
        machine.set(on_timeout='deny')
        machine.send('run clean')
        machine.qmp.wait_event('STOP', 10)
        self.assertTrue(machine.query()['degraded'])

    def test_reported_meanwhile(self):
        _, machine = self.start()
        machine.set(policy='report')
        machine.qmp.wait_event('RESUME', 10)
        machine.wait_ready()

    def test_reset(self):
        worker, machine = self.start()
        self.prompt(machine, 'system_reset')
        machine.qmp.wait_event('RESET', 10)
        self.assert_nothing_runs(machine)
        self.prompt(machine, 'cont')
        self.assertIsNone(machine.line(1))
        self.assert_prompt(machine)
        self.assertEqual(0, machine.query()['states']['unscanned'])
        worker.start()
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        self.check_boots(machine, worker)

    def test_reset_before_the_deadline(self):
        worker = self.worker(start=False)
        machine = self.machine(worker, {**DENY, 'deadline-ms': 3000})
        for _ in range(3):
            self.prompt(machine, 'system_reset')
            machine.qmp.wait_event('RESET', 10)
        self.assertEqual(0, machine.query()['states']['unscanned'])
        self.assertIsNone(machine.line(1))
        worker.start()
        self.check_boots(machine, worker)


class RequireTest(base.TestCase):
    """require=on"""

    def check(self, monitor):
        worker = self.worker(start=False)
        machine = self.machine(worker, {**monitor, 'require': 'on'})
        self.assertTrue(machine.query()['require'])
        self.eventually('the first fetch', lambda: machine.query()[
            'fetches'])
        self.assert_nothing_runs(machine, 2 * DEADLINE_MS / 1000)
        state = machine.query()
        self.assertEqual((1, 0, 0), (
            state['fetches'], state['timeouts'],
            state['states']['unscanned']))
        worker.start()
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        machine.wait_ready()
        return worker, machine

    def test_enforce_allow(self):
        worker, machine = self.check(ALLOW)
        self.assert_blocked(machine, worker, 'user-write')
        # It is required at the start only.
        worker.stop()
        machine.set(on_match='alert')
        self.assert_ran(machine, 'clean')

    def test_enforce_deny(self):
        worker, machine = self.check(DENY)
        self.assert_blocked(machine, worker, 'user-write')

    def test_report(self):
        worker, machine = self.check({'policy': 'report',
                                      'deadline-ms': DEADLINE_MS})
        self.assert_ran(machine, 'user-write')
        self.match(machine, worker, action='alert')

    def test_is_not_required(self):
        # The first fetch of a guest without require=on does not wait.
        machine = self.machine(self.worker(start=False),
                               {'policy': 'report'})
        self.eventually('many fetches', lambda: machine.query()[
            'fetches'] > 10)
