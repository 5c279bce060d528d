# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import json
import os
import selectors
import socket
import threading
import time

from prometheus_client import parser

from tests.unit import base
from virtav_nova import exception
from virtav_nova.cmd import status as command
from virtav_nova.worker import board
from virtav_nova.worker import endpoint
from virtav_nova.worker import listener
from virtav_nova.worker import metrics
from virtav_nova.worker import status

#: Such as a worker gives.
REPORT = {
    'format': status.FORMAT, 'health': 'ok', 'problems': [],
    'version': '0.1', 'pid': 4711, 'uptime_s': 93784.5,
    'engine': 'twostage 1', 'digest': 'ab' * 32, 'epoch': 3, 'rules': 5000,
    'description': {}, 'quarantine': [],
    'reload': {'state': 'idle', 'time': None, 'digest': None, 'why': None,
               'error': None},
    'sessions': 1, 'sessions_max': 256, 'absent': 0, 'over_budget': 0,
    'instances': [{
        'instance': '6f1f2c6e-9a0b-4f6e-8f0e-0d4a5b6c7d8e', 'project': 'p',
        'session': 1, 'epoch': 3, 'digest': 'ab' * 32, 'since_s': 59,
        'transport': 'ring', 'slot': 0, 'problems': []}],
    'processes': [{'slot': 0, 'pid': 4713, 'epoch': 3, 'ready': True,
                   'sessions': 1, 'queue': 0, 'scanning_ms': None}],
    'queue': 0,
    'processes_wanted': 1, 'processes_lost': 0, 'records_lost': 0,
    'confinement': {'user': 'virtav', 'capabilities': False,
                    'no_new_privileges': True, 'seccomp': True,
                    'network': 'none', 'missing': []},
}


class BoardsTestCase(base.TestCase):

    def boards(self, count=2):
        fd = board.Boards.create(count)
        self.addCleanup(os.close, fd)
        boards = board.Boards(fd, count)
        return [boards.board(number) for number in range(count)]


class TallyTest(BoardsTestCase):

    def test_sums_never_get_less(self):
        tally = status.Tally()
        first, second = self.boards(), self.boards(1)
        self.assertEqual(0, tally.sample().counters['clean'])
        tally.watch(1, first)
        first[0].counters[board.Counter.CLEAN] += 5
        first[1].counters[board.Counter.CLEAN] += 7
        first[1].service[40] += 3
        tally.watch(2, second)
        second[0].counters[board.Counter.CLEAN] += 1
        for _turn in range(2):
            sample = tally.sample()
            self.assertEqual(13, sample.counters['clean'])
            self.assertEqual(3, sample.service[40])
            tally.leave(1)
        tally.leave(3)
        second[0].service[40] += 1
        self.assertEqual(4, tally.sample().service[40])


class RecentTest(BoardsTestCase):

    def test_report(self):
        board_, = self.boards(1)
        tally = status.Tally()
        tally.watch(1, [board_])
        recent = status.Recent(tally.sample)
        self.assertIsNone(recent.report()['service_us']['p50'])
        for counter, count in ((board.Counter.CLEAN, 90),
                               (board.Counter.MATCH, 10),
                               (board.Counter.SCANS, 40)):
            board_.counters[counter] += count
        board_.service[board.bucket(20_000)] += 99
        board_.service[board.bucket(900_000)] += 1
        time.sleep(0.1)
        report = recent.report()
        self.assertEqual(90, report['counters']['clean'])
        rates = report['rates']
        self.assertGreater(rates['requests'], 2)
        self.assertLess(rates['requests'], 1000)
        self.assertAlmostEqual(10, rates['requests'] / rates['matches'], 0)
        self.assertAlmostEqual(20, report['service_us']['p50'], delta=5)
        self.assertLess(report['service_us']['p99'], 30)
        self.assertIsNone(report['scan_us']['p99'])

    def test_last_minute_only(self):
        now = [0.0]
        board_, = self.boards(1)

        def take():
            return status.Sample(
                now[0], board.totals([board_]), board.merged(
                    [board_.service]), board.merged([board_.scans]))

        recent = status.Recent(take)
        board_.counters[board.Counter.CLEAN] += 1_000_000
        for _turn in range(20):
            now[0] += status.SAMPLE_PERIOD - 1
            recent.keep(now[0])
            now[0] += 1
            self.assertLessEqual(recent.due(), now[0])
            recent.keep(now[0])
        report = recent.report()
        self.assertEqual(0, report['rates']['requests'])
        self.assertEqual(60, report['period_s'])
        self.assertEqual(1_000_000, report['counters']['clean'])


class ProtocolTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.reloads = []
        self.protocol = status.Protocol(
            lambda: REPORT, lambda: self.reloads.append(1) or {'reload': 1})

    def _answer(self, question):
        return json.loads(self.protocol.answer(question))

    def test_questions(self):
        self.assertEqual(REPORT, self._answer(b'{"ask": "status"}\n'))
        self.assertEqual([], self.reloads)
        self.assertEqual({'reload': 1}, self._answer(b'{"ask":"reload"}\nx'))
        self.assertEqual([1], self.reloads)
        self.assertIsNone(self.protocol.answer(b'{"ask": "status"}'))

    def test_nonsense(self):
        for line in (b'', b'{}', b'7', b'null', b'"status"', b'[' * 3000,
                     b'{"ask": ["status"]}', b'{"ask": "stop"}', b'\xff',
                     b'status'):
            with self.subTest(line):
                self.assertEqual({'error': 'ask for one of: reload, status'},
                                 self._answer(line + b'\n'))
        self.assertEqual([], self.reloads)


class WorstFirstTest(base.TestCase):

    def test_bounded(self):
        many = [{'instance': f'{number:05}', 'problems': []}
                for number in range(3000)]
        many[2500]['problems'] = ['over its budget']
        chosen = status.worst_first(many)
        self.assertEqual(status.INSTANCES_MAX, len(chosen))
        self.assertEqual(['02500', '00000', '00001'],
                         [one['instance'] for one in chosen[:3]])


class _Served(base.TestCase):
    """Something answers on a socket."""

    def serve(self, answer, listening=None):
        if listening is None:
            self.path = str(self.top / 'status.sock')
            opened = listener.Listener(self.path, None, 0o660)
            self.addCleanup(opened.close)
            listening = opened.socket
        selector = selectors.DefaultSelector()
        serving = endpoint.Endpoint(listening, selector, answer)
        ended = threading.Event()

        def loop():
            while not ended.is_set():
                for key, _events in selector.select(0.02):
                    key.data()
            serving.close()
            selector.close()

        thread = threading.Thread(target=loop)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)


class CommandTest(_Served):

    def setUp(self):
        super().setUp()
        self.report = {
            **REPORT, **status.Recent(status.Tally().sample).report()}
        self.loading = 0

    def _status(self):
        if self.loading:
            self.loading -= 1
            return {**self.report, 'reload': {
                **self.report['reload'], 'state': 'loading'}}
        return self.report

    def _reload(self):
        self.loading = 3
        return {}

    def _run(self, *arguments, path=None):
        if path is None:
            self.serve(status.Protocol(self._status, self._reload).answer)
            path = self.path
        config = self.write(
            'virtav.conf', f'[virtav_worker]\nstatus_socket = {path}\n')
        with contextlib.redirect_stdout(io.StringIO()) as stdout, \
                contextlib.redirect_stderr(io.StringIO()) as stderr:
            result = command.main(['--config-file', str(config), *arguments])
        return result, stdout.getvalue(), stderr.getvalue()

    def test_healthy(self):
        result, stdout, stderr = self._run()
        self.assertEqual((0, ''), (result, stderr))
        for text in ('health      ok', 'up 1 d 2 h', '5000 in twostage 1',
                     'user virtav, no capabilities, network none, seccomp on',
                     'INSTANCE', '6f1f2c6e-9a0b-4f6e-8f0e-0d4a5b6c7d8e  p',
                     'p50 none'):
            self.assertIn(text, stdout)
        self.assertLess(max(map(len, stdout.splitlines())), 120)

    def test_json(self):
        result, stdout, _ = self._run('--json')
        self.assertEqual((0, self.report), (result, json.loads(stdout)))

    def test_degraded(self):
        self.report |= {
            'health': 'degraded', 'problems': ['the disk is full'],
            'quarantine': [{'namespace': 'a.yar', 'rule': 'Slow',
                            'why': 'took 3 scan processes',
                            'time': '2026-01-01T00:00:00+00:00'}],
            'confinement': {**REPORT['confinement'], 'seccomp': False,
                            'missing': ['seccomp: no library']}}
        result, stdout, _ = self._run()
        self.assertEqual(1, result)
        for text in ('the disk is full', 'a.yar Slow: took 3 scan processes',
                     'without: seccomp: no library', 'seccomp off'):
            self.assertIn(text, stdout)

    def test_reload(self):
        result, stdout, _ = self._run('--reload', '--json')
        self.assertEqual((0, 0), (result, self.loading))
        self.assertEqual('idle', json.loads(stdout)['reload']['state'])

    def test_reload_that_fails(self):
        self.report['reload'] = {
            **REPORT['reload'], 'time': 'now', 'error': 'a.yar:3: bad'}
        result, stdout, _ = self._run('--reload')
        self.assertEqual(1, result)
        self.assertIn('last now: a.yar:3: bad', stdout)

    def test_names_cannot_deceive(self):
        self.report['instances'] = [{
            **REPORT['instances'][0],
            'project': 'p\nhealth      ok\x1b[2J\u202e'}]
        _, stdout, _ = self._run()
        self.assertIn(r'p\nhealth      ok\x1b[2J\u202e', stdout)
        self.assertNotIn('\x1b', stdout)

    def test_many_instances(self):
        self.report |= {'instances': REPORT['instances'] * 1000,
                        'sessions': 1500}
        _, stdout, _ = self._run()
        self.assertIn('and 1460 more', stdout)

    def _assert_unreachable(self, message, path):
        result, stdout, stderr = self._run(path=path)
        self.assertEqual((2, ''), (result, stdout))
        self.assertIn(f'virtav-status: error: {message}', stderr)
        self.assertIn('\n  way out: ', stderr)

    def test_nobody_there(self):
        path = self.top / 'none'
        self._assert_unreachable(f'no answer on {path}: No such file', path)

    def test_no_socket(self):
        self._assert_unreachable('[virtav_worker] status_socket is empty', '')

    def test_something_else_answers(self):
        for answer in (b'HTTP/1.0 400 Bad Request\r\n\r\n', b'[]\n', b'\n',
                       b'{"error": "no\\u001b"}\n'):
            with self.subTest(answer):
                self.serve(lambda received, answer=answer: answer)
                result, _, stderr = self._run(path=self.path)
                self.assertEqual(2, result)
                self.assertNotIn('\x1b', stderr)
                self.doCleanups()
                super().setUp()

    def test_silent_worker(self):
        self.path = str(self.top / 'silent')
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(self.path)
            silent.listen()
            begin = time.monotonic()
            with self.assertRaisesRegex(exception.StatusError, 'no answer'):
                status.ask(self.path, 'status', 0.2)
            self.assertLess(time.monotonic() - begin, 5)


class MetricsTest(_Served, BoardsTestCase):

    def setUp(self):
        super().setUp()
        self.board, = self.boards(1)
        tally = status.Tally()
        tally.watch(1, [self.board])
        self.page = metrics.Page(metrics.Collector(
            lambda: REPORT, tally.sample))

    def _get(self, request=b'GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n',
             address=None):
        if address is None:
            return self.page.answer(request)
        family = (socket.AF_UNIX if isinstance(address, str)
                  else socket.AF_INET)
        with socket.socket(family) as client:
            client.settimeout(20)
            client.connect(address)
            client.sendall(request)
            return b''.join(iter(lambda: client.recv(1 << 16), b''))

    def _samples(self, response):
        head, _, body = response.partition(b'\r\n\r\n')
        self.assertTrue(head.startswith(b'HTTP/1.0 200 OK\r\n'), head)
        self.assertIn(b'Content-Length: %d\r\n' % len(body), head)
        return {(sample.name, *(value for _, value in sorted(
                    sample.labels.items()))): sample.value
                for family in parser.text_string_to_metric_families(
                    body.decode())
                for sample in family.samples}

    def test_page(self):
        self.board.counters[board.Counter.CLEAN] += 5
        self.board.counters[board.Counter.SERVICE_NS] += 3_000_000
        self.board.service[board.bucket(15_000)] += 4
        self.board.service[board.bucket(3_000_000)] += 1
        samples = self._samples(self._get())
        for name, value in (
                (('virtav_worker_verdicts_total', 'clean'), 5),
                (('virtav_worker_verdicts_total', 'match'), 0),
                (('virtav_worker_healthy',), 1),
                (('virtav_worker_rules',), 5000),
                (('virtav_worker_rules_info', 'ab' * 32, 'twostage 1'), 1),
                (('virtav_worker_service_seconds_bucket', '1e-05'), 0),
                (('virtav_worker_service_seconds_bucket', '2e-05'), 4),
                (('virtav_worker_service_seconds_bucket', '0.002'), 4),
                (('virtav_worker_service_seconds_bucket', '0.005'), 5),
                (('virtav_worker_service_seconds_bucket', '+Inf'), 5),
                (('virtav_worker_service_seconds_count',), 5),
                (('virtav_worker_service_seconds_sum',), 0.003)):
            with self.subTest(name):
                self.assertEqual(value, samples[name])

    def test_no_names_of_guests(self):
        page = self._get()
        for text in (REPORT['instances'][0]['instance'], 'project="'):
            self.assertNotIn(text.encode(), page)

    def test_other_requests(self):
        for request, result in (
                (b'GET / HTTP/1.0\r\n\r\n', b'404'),
                (b'GET /metrics?x=1 HTTP/1.0\r\n\r\n', b'200'),
                (b'POST /metrics HTTP/1.1\r\n\r\n', b'405'),
                (b'GET /metrics\r\n\r\n', b'400'),
                (b'\r\n\r\n', b'400'), (b'\0' * 40 + b'\r\n\r\n', b'400')):
            self.assertEqual(result, self._get(request).split()[1])
        self.assertIsNone(self.page.answer(b'GET /metrics HTTP/1.1\r\n'))

    def test_addresses(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        path = f'{self.top}/metrics.sock'
        for given, address in (
                (f'unix:{path}', path),
                (f'127.0.0.1:{port}', ('127.0.0.1', port))):
            with self.subTest(given):
                listening = metrics.listen(given, None)
                self.addCleanup(listening.close)
                self.serve(self.page.answer, metrics.opened(listening))
                self.assertIn(('virtav_worker_healthy',),
                              self._samples(self._get(address=address)))

    def test_address_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen()
            given = '127.0.0.1:%d' % taken.getsockname()[1]
            with self.assertRaisesRegex(
                    exception.SocketError, 'Address already in use'):
                metrics.listen(given, None)
