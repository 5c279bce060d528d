# SPDX-License-Identifier: Apache-2.0

import json
from unittest import mock

from tests.unit.tools import base
from virtav_nova.monitor import wire
from virtavtools import bench


def _boots(*walls, user=1.0, **rest):
    return [bench.Sample(wall, user, 0.5, **rest) for wall in walls]


def _samples(**changes):
    return {
        'stock': _boots(2.0, 4.0, 2.0),
        'off': _boots(2.0, 4.0, 2.0),
        'report': _boots(2.2, 4.0, 2.2, fetches=30, distinct=20),
        'enforce': _boots(2.4, 4.4, 2.4, fetches=30, distinct=20,
                          wait=150.0),
        **changes}


class TestBoot(base.TestCase):

    def _results(self, **changes):
        return {result.name: result
                for result in bench.boot_results(_samples(**changes))}

    def test_good(self):
        results = self._results()
        self.assertEqual([], [name for name, result in results.items()
                              if result.short])
        self.assertEqual(2.4, results['enforce_s'].value)
        self.assertEqual(1.5, results['enforce_cpu_s'].value)
        self.assertEqual(30, results['fetches'].value)
        self.assertEqual(20, results['distinct'].value)
        self.assertEqual(150.0, results['wait_mean_us'].value)

    def test_ratio_is_that_of_a_round(self):
        # A round in which the machine was slow is as good as another.
        self.assertAlmostEqual(1.2, self._results()['enforce_ratio'].value)

    def test_enforce_is_limited(self):
        result = self._results(enforce=_boots(
            2.6, 4.0, 2.6, fetches=30, distinct=20))['enforce_ratio']
        self.assertEqual((1.25, True), (result.limit, result.short))

    def test_off_is_limited_by_noise(self):
        result = self._results(
            off=_boots(2.0, 4.0, 2.0, user=1.02))['off_user_ratio']
        self.assertAlmostEqual(1.01, result.limit)
        self.assertTrue(result.short)

    def test_off_is_limited_by_spread(self):
        stock = [*_boots(2.0, 4.0, user=1.0), *_boots(2.0, user=1.04)]
        result = self._results(
            stock=stock, off=_boots(2.0, 4.0, 2.0, user=1.02))[
                'off_user_ratio']
        self.assertAlmostEqual(1.04, result.limit)
        self.assertFalse(result.short)

    def test_wild_stock_does_not_excuse_off(self):
        stock = [*_boots(2.0, 4.0, user=1.0), *_boots(2.0, user=1.3)]
        result = self._results(
            stock=stock, off=_boots(2.0, 4.0, 2.0, user=1.06))[
                'off_user_ratio']
        self.assertAlmostEqual(1.05, result.limit)
        self.assertTrue(result.short)


class TestRoundtrip(base.TestCase):

    def test_pages(self):
        # More than the interpreter has.
        pages = set(bench._pages(10000))
        self.assertEqual(10000, len(pages))
        self.assertEqual({wire.PAGE_SIZE}, set(map(len, pages)))


class TestMain(base.TestCase):

    load = 0.0

    def _main(self, *results):
        with (mock.patch('virtavtools.venv.enter'),
              mock.patch('os.getloadavg', return_value=(self.load, 0, 0)),
              mock.patch.dict(bench.BENCHES, boot=lambda args: results)):
            return bench.main(['boot', '--json'])

    def test_good(self):
        self.assertEqual(0, self._main(
            bench.Result('a', 1.25, 's', 1.25), bench.Result('b', 2, 'µs')))
        self.assertEqual(
            {'bench': 'boot', 'results': [
                {'name': 'a', 'value': 1.25, 'unit': 's', 'limit': 1.25},
                {'name': 'b', 'value': 2, 'unit': 'µs', 'limit': None}],
             'short': [], 'ok': True}, json.loads(self.stdout.getvalue()))
        self.assertEqual(
            'a                            1.25 s         limit 1.25\n'
            'b                               2 µs\n', self.stderr.getvalue())

    def test_short(self):
        self.assertEqual(1, self._main(bench.Result('a', 1.3, 's', 1.25)))
        summary = json.loads(self.stdout.getvalue())
        self.assertEqual((['a'], False), (summary['short'], summary['ok']))
        self.assertIn('MISSES the limit 1.25', self.stderr.getvalue())

    def test_busy_machine(self):
        self.load = 1000.0
        self._main(bench.Result('a', 1, 's'))
        self.assertIn('note: the load average is 1000.0',
                      self.stderr.getvalue())

    def test_help_tells_of_each(self):
        with self.assertRaises(SystemExit):
            bench.main(['--help'])
        for name in bench.BENCHES:
            self.assertIn('\n%s: ' % name, self.stdout.getvalue())
