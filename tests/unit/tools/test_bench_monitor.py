# SPDX-License-Identifier: Apache-2.0

import contextlib
from unittest import mock

from tests.unit.tools import base
from virtavtools import bench
from virtavtools import bench_monitor
from virtavtools import errors
from virtavtools import lab
from virtavtools import parts

_STATE = {'fetches': 1000, 'table-hits': 900, 'waits': 100,
          'wait-ns': 3_000_000, 'hold-ns': 2_000_000, 'copy-ns': 500_000,
          'tag-ns': 2_500_000, 'hot-pages': 3}


def _taken(*walls, users=None, state=None):
    return [bench_monitor.Taken(wall, user, state or {})
            for wall, user in zip(walls, users or walls, strict=True)]


def _results(results):
    return {result.name: result for result in results}


class TestWorkload(base.TestCase):

    def _results(self, limits=(), workload='boot', **changes):
        taken = {'stock': _taken(2.0, 4.0, 2.0),
                 'off': _taken(2.0, 4.0, 2.0),
                 'warm': _taken(2.2, 4.0, 2.2, state=_STATE), **changes}
        return _results(bench_monitor.workload_results(
            workload, taken, dict(limits)))

    def test_ratio_is_that_of_a_round(self):
        # A round in which the machine was slow is as good as another.
        results = self._results()
        self.assertAlmostEqual(1.1, results['boot_warm_wall'].value)
        self.assertEqual('of stock, median of 3',
                         results['boot_warm_wall'].unit)
        self.assertAlmostEqual(1.0, results['boot_off_user'].value)

    def test_stock(self):
        results = self._results()
        self.assertEqual((2.0, 's'), results['boot_stock_wall'][1:3])
        self.assertEqual((2.0, 's user'), results['boot_stock_user'][1:3])
        self.assertEqual(1.0, results['boot_stock_wall_noise'].value)

    def test_clocks_are_apart(self):
        results = self._results(warm=_taken(
            2.0, 4.0, 2.0, users=(3.0, 6.0, 3.0), state=_STATE))
        self.assertEqual(1.0, results['boot_warm_wall'].value)
        self.assertEqual(1.5, results['boot_warm_user'].value)

    def test_counters(self):
        results = self._results()
        self.assertEqual(1000, results['boot_warm_fetches'].value)
        self.assertEqual(3, results['boot_warm_hot_pages'].value)

    def test_short_cases_have_no_cpu_time(self):
        short = _taken(0.4, 0.4, 0.4)
        results = self._results(stock=short)
        self.assertIn('boot_warm_wall', results)
        self.assertNotIn('boot_warm_user', results)
        self.assertNotIn('boot_stock_user', results)

    def _limited(self, stock, warm, limit):
        return self._results(
            {('boot', 'warm', 'wall'): limit}, stock=_taken(*stock),
            warm=_taken(*warm, state=_STATE))['boot_warm_wall']

    def test_limit(self):
        for warm, short in ((1.01, False), (1.04, True)):
            result = self._limited((1.0, 1.0, 1.01), (warm,) * 3, 1.02)
            self.assertEqual((1.02, short), (result.limit, result.short))
            self.assertEqual('of stock, median of 3', result.unit)

    def test_noise_beyond_the_limit_takes_the_least(self):
        # The median of the ratios would be 1.2 / 1.0.
        result = self._limited((1.0, 1.0, 1.3), (1.01, 1.2, 1.56), 1.02)
        self.assertEqual('of stock, least of 3', result.unit)
        self.assertAlmostEqual(1.01, result.value)
        self.assertFalse(result.short)
        # And what is slow in its best run is told.
        self.assertTrue(self._limited((1.0, 1.0, 1.3), (1.1, 1.1, 1.1),
                                      1.02).short)

    def test_noise_within_a_wide_limit(self):
        result = self._limited((1.0, 1.0, 1.3), (1.0, 9.0, 11.7), 10)
        self.assertEqual('of stock, median of 3', result.unit)
        self.assertAlmostEqual(9.0, result.value)

    def test_limits_are_of_what_is_measured(self):
        clocks = {'wall', 'user'}
        for workload, mode, clock in bench_monitor.LIMITS:
            self.assertIn(workload, bench_monitor.WORKLOADS)
            self.assertIn(mode, bench_monitor.MODES)
            self.assertIn(clock, clocks)


class TestEvents(base.TestCase):

    def _results(self, **state):
        return _results(bench_monitor.event_results(
            {mode: _taken(1, 2, state={**_STATE, **state})
             for mode in ('warm', 'cold', 'socket')}))

    def test_split(self):
        results = self._results()
        self.assertEqual(0.9, results['hit_share'].value)
        for event in ('hit', 'miss', 'socket'):
            for part, value in (('exit', 2), ('copy', 0.5), ('tag', 2.5)):
                self.assertAlmostEqual(
                    value, results['%s_%s_us' % (event, part)].value)
        self.assertAlmostEqual(30, results['miss_wait_us'].value)
        # A hit waits for nobody.
        self.assertNotIn('hit_wait_us', results)

    def test_exit_does_not_count(self):
        results = self._results(**{'hold-ns': 10 ** 12})
        for name, value, limit in (('hit', 3, 10), ('miss', 33, 50),
                                   ('socket', 33, None)):
            result = results[name + '_beyond_exit_us']
            self.assertAlmostEqual(value, result.value)
            self.assertEqual((limit, False), (result.limit, result.short))

    def test_slow(self):
        results = self._results(**{'tag-ns': 50_000_000})
        self.assertTrue(results['hit_beyond_exit_us'].short)
        self.assertTrue(results['miss_beyond_exit_us'].short)

    def test_no_event(self):
        results = self._results(**dict.fromkeys(_STATE, 0))
        self.assertEqual(0, results['hit_share'].value)
        self.assertEqual(0, results['miss_beyond_exit_us'].value)


class _Machine(contextlib.AbstractContextManager):
    """Stands in for lab.Machine; each fetches 10 pages in a case."""

    booted = []
    executed = True
    transport = 'ring'

    def __init__(self, emulator, guest, home, monitor, append, **more):
        self.booted.append((emulator.name, monitor, more))
        self.monitor = monitor
        self.state = {**_STATE, 'epoch': 'text', 'active': True}

    def __exit__(self, *_exception):
        pass

    def wait_ready(self, _timeout):
        return 2.0

    def begin_case(self, _case):
        self.state['fetches'] += 10

    def end_case(self, _case, _timeout):
        return {'executed': self.executed, 'status': 'exit:0',
                'seconds': 0.5}

    def query(self):
        transport = self.transport
        if 'socket' in str(self.monitor['socket'].parent):
            transport = 'socket'
        return {**self.state, 'transport': transport}


class TestMonitor(base.TestCase):

    def setUp(self):
        super().setUp()
        self.options = []
        for target, name, value in (
                (lab, 'Machine', _Machine), (lab, 'Worker', self._worker),
                (bench_monitor, '_user', lambda machine: 1.0),
                (parts, 'emulator', lambda: self.top / 'patched'),
                (parts, 'stock_emulator', lambda: self.top / 'stock'),
                (parts, 'guest', lambda: self.top),
                (parts, 'debian_guest', lambda: self.top)):
            self._patch(mock.patch.object(target, name, value))
        self._patch(mock.patch.object(_Machine, 'booted', []))

    def _worker(self, home, **options):
        self.options.append((home.name, options))
        running = contextlib.nullcontext()
        running.socket = home / 'worker.sock'
        running.log = home / 'worker.log'
        return running

    def _monitor(self, *words):
        args = bench._parser().parse_args(['monitor', *words])
        return _results(bench_monitor.monitor(args))

    def test_rounds(self):
        self._monitor('--pairs', '3', '--only', 'loop')
        self.assertEqual([('warm', {}), ('cold', {'table_entries': 0}),
                          ('socket', {'table_entries': 0, 'ring_slots': 0})],
                         self.options)
        modes = [(emulator, monitor and (monitor['policy'],
                                         monitor['socket'].parent.name))
                 for emulator, monitor, _ in _Machine.booted]
        stock, off = ('stock', None), ('patched', None)
        report, warm, cold, by_socket = [
            ('patched', pair) for pair in (
                ('report', 'warm'), ('enforce', 'warm'), ('enforce', 'cold'),
                ('enforce', 'socket'))]
        first = [stock, off, report, warm, cold, by_socket]
        # The table is filled before the first round; then the order turns.
        self.assertEqual([stock, warm, *first, *first[1:], *first[:1],
                          *first[2:], *first[:2]], modes)

    def test_only(self):
        results = self._monitor('--pairs', '1', '--only', 'own,debian-jit')
        self.assertEqual({'own', 'debian-jit'},
                         {name.partition('_')[0] for name in results})
        self.assertEqual({(), ('snapshot',)},
                         {tuple(more) for _, _, more in _Machine.booted})
        # Five times, in each of which ten pages are fetched.
        self.assertEqual(50, results['own_warm_fetches'].value)
        self.assertEqual(2.5, results['own_stock_wall'].value)

    def test_all(self):
        results = self._monitor('--pairs', '1')
        for workload in bench_monitor.WORKLOADS:
            self.assertIn(workload + '_cold_wall', results)
        self.assertIn('hit_beyond_exit_us', results)

    def test_failed_case(self):
        with (mock.patch.object(_Machine, 'executed', False),
              self.assertRaisesRegex(errors.ToolError, 'loop failed')):
            self._monitor('--pairs', '1', '--only', 'loop')

    def test_a_ring_that_is_none(self):
        with (mock.patch.object(_Machine, 'transport', 'socket'),
              self.assertRaisesRegex(errors.ToolError,
                                     'by way of "socket", not "ring"')):
            self._monitor('--pairs', '1', '--only', 'boot')

    def test_unknown_workload(self):
        with self.assertRaises(SystemExit):
            bench._parser().parse_args(['monitor', '--only', 'loop,x'])
        self.assertIn("no workload 'x', but boot, ", self.stderr.getvalue())
