# SPDX-License-Identifier: Apache-2.0
"""What one guest, the clock or the host does must not reach other guests."""

import contextlib
import datetime
import itertools
import os
import pathlib
import resource
import signal
import time
from unittest import mock

from tests.functional import load
from tests.unit import base as unit_base
from tests.unit.worker import base
from virtav_nova.monitor import client
from virtav_nova.monitor import wire

#: Takes about a ms for a page that begins so.
SLOW_RULE = """
rule Costly {
    strings: $costly = "COSTLY-PAGE"
    condition: $costly at 0 and for any i in (0..%d) : (i * 3 == 1)
}
"""
_LOOPS = 12000
_FAKETIME = '/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1'
_DAY = 86400


class TestCase(load.TestCase):

    def own_rules(self, source):
        """A rule directory with the project's own rules and another."""
        for file in unit_base.SELFTEST_RULES.iterdir():
            self.write(f'rules/{file.name}', file.read_bytes())
        return self.write('rules/test.yar', source).parent

    def asker(self, worker, number, **options):
        """A client in a thread of its own."""
        asker = load.Asker(worker.socket, number << 40, **options)
        self.addCleanup(asker.stop)
        return asker

    def ask(self, session, number, content=None):
        """Ask for one page.

        :returns: the result
        """
        content = load.page(number) if content is None else content
        session.send(load.request(session, number, content))
        verdict, = session.wait()
        self.assertEqual(number, verdict.id)
        return verdict.result


class FloodTest(TestCase):

    def test_one_floods(self):
        # With a scan of a ms, as many as may be in flight would take the
        # others' time if it went in the order in which they come.
        rules = self.own_rules(SLOW_RULE % _LOOPS)
        worker = self.worker(rules=rules, processes=1, table_entries=0,
                             engine='yara')
        others = [self.asker(worker, 1 + number, pause=.005,
                             begin=b'COSTLY-PAGE') for number in range(3)]
        flood = self.asker(worker, 100, depth=60, begin=b'COSTLY-PAGE')
        for one in others:
            one.start()
        time.sleep(4)
        alone = [list(one.taken) for one in others]
        for one in others:
            one.taken = []
        flood.start()
        time.sleep(6)
        after = [one.quantile(.99) for one in others]
        backlog = flood.quantile(.5)
        before = [sorted(taken)[int(len(taken) * .99)] for taken in alone]
        print('p99 alone %s ms, beside a flood %s ms; the flood itself '
              'waits %.1f ms' % (
                  *([round(1000 * one, 1) for one in each]
                    for each in (before, after)), 1000 * backlog))
        self.assertGreater(len(flood.taken), 500)
        # It waits for itself, and the others for a scan or two of it.
        self.assertGreater(backlog, .02)
        self.assertLess(sorted(after)[1], max(
            3 * sorted(before)[1], backlog / 4))

    def test_the_same_match_on_10000_pages(self):
        worker = self.worker(processes=1, table_entries=0)
        pids = self.tree(worker)
        with client.Client(str(worker.socket), client.hello()) as session:
            before = load.memory(pids)
            asked = answered = 0
            while answered < 10000:
                while asked < 10000 and asked - answered < 16:
                    session.send(load.request(
                        session, asked,
                        load.page(asked, unit_base.SIGNATURE)))
                    asked += 1
                for verdict in session.wait():
                    self.assertEqual(wire.Result.MATCH, verdict.result)
                    answered += 1
            grown = load.memory(pids) - before
        worker.record(type='session', event='closed', matches=10000,
                      timeout=20)
        matches = worker.records('match')
        print('10000 matches: %d records, %.1f MiB more' % (
            len(matches), grown))
        self.assertLess(len(matches), 200)
        # None of them is lost from the count.
        self.assertEqual(10000, sum(
            1 + record.get('repeats', 0) for record in matches))
        self.assertLess(grown, 30)


class ClockTest(TestCase):

    def test_a_day_more_or_less(self):
        self.assertTrue(os.path.exists(_FAKETIME), 'install libfaketime')
        offset = self.write('offset', '+0d\n')
        with mock.patch.dict(os.environ, {
                'LD_PRELOAD': _FAKETIME, 'FAKETIME_NO_CACHE': '1',
                'FAKETIME_TIMESTAMP_FILE': str(offset),
                'DONT_FAKE_MONOTONIC': '1'}):
            worker = self.worker(processes=2, handshake_timeout=2)
        numbers = itertools.count(1)
        sessions = [self.enterContext(client.Client(
            str(worker.socket), client.hello())) for _ in range(4)]
        busy = self.asker(worker, 7)
        busy.start()
        pids = self.tree(worker)
        for days in (1, -1, 0):
            offset.write_text('%+dd\n' % days)
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                for session in sessions:
                    self.assertEqual(wire.Result.CLEAN, self.ask(
                        session, next(numbers)))
            # Who comes now has as long as ever to say hello.
            hello = client.hello()
            with client.Client(str(worker.socket), hello) as session:
                self.assertEqual(wire.Result.CLEAN, self.ask(
                    session, next(numbers)))
            # It did jump: the journal has the time of day.
            last = datetime.datetime.fromisoformat(worker.record(
                type='session', event='closed', timeout=10,
                instance=str(hello.instance))['time']).timestamp()
            self.assertLess(abs(last - time.time() - days * _DAY), 600)
        busy.stop()
        self.assertGreater(len(busy.taken), 100)
        self.assertLess(max(busy.taken), 5)
        self.assertEqual(pids, self.tree(worker))
        self.assertEqual(0, self.counters(worker)['unknown'])
        self.assertNotRegex(worker.log.read_text(),
                            'Traceback|died|killed|in time')


class LimitTest(TestCase):
    """Limits of the host: new work is refused, old work is kept."""

    def group(self, controller, limit, *values):
        """A control group.

        :param controller: such as ``pids``
        :param limit: name of the file with the limit, by version of cgroups
        :param values: to write there
        :returns: its directory
        """
        for top, name in (('/sys/fs/cgroup/%s' % controller, limit[0]),
                          ('/sys/fs/cgroup', limit[1])):
            path = pathlib.Path(top, 'virtav-test-%d' % os.getpid())
            with contextlib.suppress(OSError):
                path.mkdir()
                self.addCleanup(self._remove, path)
                if (path / name).exists():
                    (path / name).write_text(values[0])
                    return path
        self.skipTest('no control groups to be had here')

    def _remove(self, path):
        # What was in there has to be gone first.
        base.wait_for(lambda: not (path / 'cgroup.procs').read_text(),
                      'the end of what is in %s' % path)
        path.rmdir()

    def killed_one(self, worker):
        """Kill a scan process that serves, and tell which one lives on.

        :returns: sessions of the one and of the other
        """
        sessions = [self.enterContext(client.Client(
            str(worker.socket), client.hello())) for _ in range(4)]
        for number, session in enumerate(sessions):
            self.ask(session, 1000 + number)
        os.kill(self.scan_processes(worker)[0], signal.SIGKILL)
        base.wait_for(lambda: ' died, ' in worker.log.read_text(), 'a loss')
        lost = self.gone(sessions)
        return lost, [one for one in sessions if one not in lost]

    def gone(self, sessions):
        """Those that the worker has closed."""
        lost = []
        for session in load.readable(sessions, .2):
            try:
                session.take()
            except client.ClientError:
                lost.append(session)
        return lost

    def test_no_process_can_be_started(self):
        group = self.group('pids', ('pids.max', 'pids.max'), 'max')
        worker = self.worker(processes=2)
        pids = self.tree(worker)
        for pid in pids:
            (group / 'cgroup.procs').write_text(str(pid))
        (group / 'pids.max').write_text(str(len(pids) - 1))
        lost, kept = self.killed_one(worker)
        self.assertTrue(lost)
        self.assertTrue(kept)
        # What is served goes on, and others are let in.
        until = time.monotonic() + 3
        number = 2000
        while time.monotonic() < until:
            for session in kept:
                number += 1
                self.assertEqual(wire.Result.CLEAN, self.ask(
                    session, number))
        with client.Client(str(worker.socket), client.hello()) as session:
            self.assertEqual(wire.Result.CLEAN, self.ask(session, 1))
        self.assertEqual(len(pids) - 1, len(self.tree(worker)))
        (group / 'pids.max').write_text('max')
        base.wait_for(lambda: len(self.tree(worker)) == len(pids),
                      'the process that was missing')
        self.assertEqual(wire.Result.CLEAN, self.ask(kept[0], 5))

    def test_scan_process_without_memory(self):
        worker = self.worker(processes=1, table_entries=0)
        with client.Client(str(worker.socket), client.hello()) as session:
            self.assertEqual(wire.Result.CLEAN, self.ask(session, 1))
            pid, = self.scan_processes(worker)
            size = int(pathlib.Path('/proc/%d/statm' % pid).read_text(
                ).split()[0]) * resource.getpagesize()
            before = resource.prlimit(pid, resource.RLIMIT_AS)
            resource.prlimit(pid, resource.RLIMIT_AS, (size, before[1]))
            # Either it can be scanned all the same, or it is said that it
            # could not; it is never clean without a scan.
            matching = load.page(2, unit_base.SIGNATURE)
            results = set()
            with contextlib.suppress(client.ClientError):
                for number in range(2, 300):
                    results.add(self.ask(session, number, load.page(
                        number, unit_base.SIGNATURE)))
            self.assertNotIn(wire.Result.CLEAN, results)
        base.wait_for(lambda: self.scan_processes(worker), 'a process')
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, before)
        with client.Client(str(worker.socket), client.hello(), 60
                           ) as session:
            self.assertEqual(wire.Result.CLEAN, self.ask(session, 1))
            self.assertEqual(wire.Result.MATCH, self.ask(
                session, 2, matching))

    def test_out_of_memory(self):
        # By the kernel's own killer, in a control group.
        group = self.group(
            'memory', ('memory.limit_in_bytes', 'memory.max'),
            str(128 << 10))
        worker = self.worker(processes=2)
        sessions = [self.enterContext(client.Client(
            str(worker.socket), client.hello())) for _ in range(4)]
        victim = self.scan_processes(worker)[0]
        (group / 'cgroup.procs').write_text(str(victim))
        numbers = itertools.count(1)
        live = list(sessions)
        until = time.monotonic() + 60
        while base.alive(victim):
            self.assertLess(time.monotonic(), until, 'it is not killed')
            for session in list(live):
                try:
                    self.assertEqual(wire.Result.CLEAN, self.ask(
                        session, next(numbers)))
                except client.ClientError:
                    live.remove(session)
        self.assertTrue(live)
        base.wait_for(lambda: len(self.scan_processes(worker)) == 2
                      and victim not in self.scan_processes(worker),
                      'another process')
        self.assertIn('died, Killed', worker.log.read_text())
        for session in live:
            self.assertEqual(wire.Result.CLEAN, self.ask(
                session, next(numbers)))
        # The page was not to blame.
        with client.Client(str(worker.socket), client.hello()) as session:
            for number in range(1, 10):
                self.assertEqual(wire.Result.CLEAN, self.ask(
                    session, number))
