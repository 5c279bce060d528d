# SPDX-License-Identifier: Apache-2.0

import json
import pathlib
from unittest import mock

from tests.unit.tools import base
from virtav_nova.monitor import wire
from virtavtools import bench
from virtavtools import bench_scan
from virtavtools import errors
from virtavtools import generated_rules
from virtavtools import lab
from virtavtools import venv


class PartsTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self._patch(mock.patch.object(venv, 'enter'))
        self.ran = []

    def _part(self, name):
        def part(home, quick):
            self.ran.append((name, quick))
            return [bench_scan.Result(name, 2.0, 's', 1.0)]
        return part

    def _run(self, *argv):
        parts = {name: self._part(name) for name in bench_scan.PARTS}
        self._patch(mock.patch.dict(bench_scan.PARTS, parts))
        return bench.main(['scan', *argv])

    def test_names(self):
        self.assertEqual(bench.SCAN_PARTS, tuple(bench_scan.PARTS))

    def test_all(self):
        self.assertEqual(1, self._run('--json'))
        self.assertEqual([(name, False) for name in bench_scan.PARTS],
                         self.ran)
        summary = json.loads(self.stdout.getvalue().splitlines()[-1])
        self.assertEqual(['bench', 'results', 'short', 'ok'],
                         list(summary))
        self.assertFalse(summary['ok'])
        self.assertEqual(list(bench_scan.PARTS), summary['short'])

    def test_some(self):
        self._run('--only', 'table,storm', '--quick')
        self.assertEqual([('table', True), ('storm', True)], self.ran)

    def test_quick(self):
        self._run('--quick')
        self.assertNotIn('engines15000', [name for name, _ in self.ran])

    def test_parts_of_another_bench(self):
        for argv in (('scan', '--only', 'loop'), ('boot', '--only', 'table'),
                     ('monitor', '--only', 'table')):
            with self.assertRaises(SystemExit):
                bench.main(list(argv))
        self.assertIn('has other workloads', self.stderr.getvalue())


class EngineTest(base.TestCase):

    def test_measured(self):
        rules = self.top / 'rules'
        generated_rules.write(rules, 40)
        found = bench_scan.measure('yara', rules, .5)
        self.assertEqual(([generated_rules.PROBE_RULE], 40, 0), (
            found['probe'], found['rules'], found['matches']))
        self.assertGreater(found['p99_us'], found['median_us'])

    def test_results(self):
        def measured(name, rules, seconds):
            return {'median_us': {'noop': .1, 'yara': 360.0,
                                  'twostage': 61.0}[name],
                    'p99_us': 300.0, 'mean_us': 100.0, 'memory_mib': 3.0,
                    'load_s': 1.0, 'matches': 0,
                    'probe': [generated_rules.PROBE_RULE]}
        self._patch(mock.patch.object(bench_scan, '_measured', measured))
        self._patch(mock.patch.object(bench_scan, '_CLAMD', '/nowhere'))
        results = {result.name: result for result in bench_scan.engines(
            self.top, '5000', None, False)}
        self.assertEqual(
            {'twostage_5000_p99_us', 'twostage_5000_of_yara'},
            {name for name, result in results.items() if result.short})
        self.assertEqual(10000, results['yara_5000_pages_s'].value)

    def test_an_engine_that_finds_nothing(self):
        self._patch(mock.patch.object(
            bench_scan, '_measured', lambda *_arguments: {
                'probe': [], 'median_us': 1, 'p99_us': 1, 'mean_us': 1,
                'memory_mib': 1, 'load_s': 1, 'matches': 0}))
        with self.assertRaisesRegex(errors.ToolError, 'did not find'):
            bench_scan.engines(self.top, '100', None, True)


class WorkerTest(base.TestCase):
    """With a real worker, as little as can be."""

    def setUp(self):
        super().setUp()
        self.home = self.enterContext(lab.directory())

    def test_table(self):
        results = {result.name: result for result in bench_scan.table(
            self.home, True)}
        self.assertGreater(results['table_hit_us'].value, 0)
        self.assertFalse(results['table_hit_worker_cpu'].short)

    def test_reload(self):
        results = {result.name: result.value for result in bench_scan.reload(
            self.home, True)}
        self.assertEqual(0, results['reload_wrong'])
        self.assertGreaterEqual(results['reload_moved'], 8)

    def test_a_wrong_verdict_is_counted(self):
        with bench_scan._worker(self.home) as worker:
            one = bench_scan._Checked(
                str(worker.socket), [(b'', wire.Result.MATCH)], 1)
            try:
                one.ask()
                while one.take() is None:
                    pass
            finally:
                one.session.close()
        self.assertEqual([wire.Result.CLEAN],
                         [verdict.result for verdict in one.wrong])

    def test_wrong_verdicts_in_batches(self):
        frame = wire.Verdict(1, 1, bytes(16), wire.Result.MATCH, 'R').pack()
        self.assertNotEqual(bench_scan._CLEAN, frame[bench_scan._RESULT])
        frame = wire.Verdict(1, 1, bytes(16), wire.Result.CLEAN, '').pack()
        self.assertEqual(bench_scan._CLEAN, frame[bench_scan._RESULT])

    def test_cached(self):
        results = {result.name: result.value for result in bench_scan.cached(
            self.home, True)}
        for name in ('cached_1', 'cached_8', 'cached_64', 'cached_alone_8'):
            self.assertGreater(results[name + '_per_s'], 100)

    def test_processor_time(self):
        with bench_scan._worker(self.home) as worker:
            pids = bench_scan._descendants(worker.process.pid)
            self.assertGreaterEqual(len(pids), 3)
            self.assertGreater(bench_scan._cpu(worker.process.pid), .1)
            self.assertTrue(all(
                pathlib.Path('/proc', str(pid)).exists() for pid in pids))
