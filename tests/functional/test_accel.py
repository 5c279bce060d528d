# SPDX-License-Identifier: Apache-2.0
"""The ways in which TCG runs vCPUs."""

from tests.functional import base


class AccelTest(base.TestCase):

    def check(self, accel, smp, *extra):
        """All cases do as they should, and code that changes itself."""
        worker = self.worker()
        machine = self.booted(
            worker, {'on-match': 'block', 'hot-page-limit': 0}, accel=accel,
            smp=smp, extra=extra)
        self.assertEqual(smp, len(machine.qmp.execute('query-cpus-fast')))
        before = machine.query()['fetches']
        # Each of 2000 rewrites has to be seen.
        self.assert_ran(machine, 'smc')
        middle = machine.query()['fetches']
        self.assertGreaterEqual(middle - before, 2000)
        self.assert_ran(machine, 'own')
        self.assertGreaterEqual(machine.query()['fetches'] - middle, 2000)

        self.assert_ran(machine, 'clean')
        self.assert_blocked(machine, worker, *base.USER_CASES)
        machine.begin_case('kernel')
        match = self.match(machine, worker, action='pause', cpl=0)
        self.wait_status(machine, 'paused')
        self.release(machine, match, 'fault')
        self.assert_result(machine, 'kernel', False, 'signal:')
        self.assert_ran(machine, 'clean')
        state = machine.query()
        self.assertEqual((0, False),
                         (state['states']['unscanned'], state['degraded']))

    def test_thread_for_each_vcpu(self):
        self.check('tcg,thread=multi', 2)

    def test_one_thread(self):
        self.check('tcg,thread=single', 1)

    def test_one_thread_for_two_vcpus(self):
        self.check('tcg,thread=single', 2)

    def test_icount(self):
        self.check('tcg', 1, '-icount', 'shift=auto')
