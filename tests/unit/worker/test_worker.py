# SPDX-License-Identifier: Apache-2.0
"""A real worker's life, and the loss of its parts."""

import os
import resource
import signal
import socket
import threading
import time

from tests.unit.worker import base
from virtav_nova.monitor import wire


class DrainTest(base.TestCase):

    def _drained(self, number):
        self.start()
        idle, busy = self.session(), self.session()
        waiting = self.connect()
        pid, = self.scan_processes()
        with base.stopped(pid):
            for page in (base.CLEAN, base.MATCHING, base.CLEAN):
                busy.send(page)
            busy.begin(busy.request(base.CLEAN).pack()[:100])
            self.process.send_signal(number)
            base.wait_for(lambda: 'Stopping' in self.log(), 'the signal')
        self.assertEqual(
            [wire.Result.CLEAN, wire.Result.MATCH, wire.Result.CLEAN],
            [busy.frame().result for _ in range(3)])
        for monitor in (busy, idle, waiting):
            self.assert_closed(monitor)
        self.assertEqual(0, self.process.wait(base.PATIENCE))
        self.assertFalse(os.path.exists(self.path))
        self.assertFalse(base.alive(pid))
        closed = self.records(2, event='closed', reason='worker drained')
        self.assertEqual([0, 3], sorted(
            record['fetches'] for record in closed))
        self.records(1, type='match')
        self.assertNotRegex(self.log(), 'Traceback|died')

    def test_sigterm(self):
        self._drained(signal.SIGTERM)

    def test_sigint(self):
        self._drained(signal.SIGINT)

    def test_nothing_to_answer(self):
        self.start(drain_timeout=600)
        begin = time.monotonic()
        self.assertEqual(0, self.stop())
        # The main loop would look again after 10 s for other reasons.
        self.assertLess(time.monotonic() - begin, 8)

    def test_under_load(self):
        self.start(processes=2)
        answered = []

        def load():
            monitor = self.session()
            count = 0
            try:
                while monitor.ask(base.MATCHING) is not None:
                    count += 1
            except BrokenPipeError:
                pass
            answered.append(count)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        self.records(4, event='opened')
        time.sleep(0.3)
        self.assertEqual(0, self.stop())
        for thread in threads:
            thread.join()
        closed = self.records(4, event='closed', reason='worker drained')
        # Whatever was answered is in the journal, and all that was scanned
        # was answered.
        self.assertEqual(sorted(answered),
                         sorted(record['fetches'] for record in closed))
        self.assertEqual(
            sum(answered), sum(record['dropped'] for record in closed)
            + sum(1 + record['repeats'] for record in self.journal()
                  if record['type'] == 'match'))

    def test_signal_to_all_processes(self):
        # As a terminal and systemd send it.
        self.start(processes=2)
        monitor = self.session()
        for pid in (*self.scan_processes(), self.process.pid):
            os.kill(pid, signal.SIGTERM)
        self.assert_closed(monitor)
        self.assertEqual(0, self.process.wait(base.PATIENCE))
        self.records(1, event='closed', reason='worker drained')

    def test_takes_no_longer_than_it_may(self):
        self.start(drain_timeout=0.3)
        self.session()
        pid, = self.scan_processes()
        begin = time.monotonic()
        with base.stopped(pid):
            self.assertEqual(0, self.stop())
            self.assertLess(time.monotonic() - begin, 5)
        self.assertFalse(base.alive(pid))
        closed, = self.records(1, event='closed')
        self.assertIsNone(closed['fetches'])
        self.assertIn('Draining took too long', self.log())

    def test_second_signal_ends_at_once(self):
        self.start(drain_timeout=60)
        self.session()
        pid, = self.scan_processes()
        with base.stopped(pid):
            self.process.terminate()
            base.wait_for(lambda: 'Stopping' in self.log(), 'first signal')
            self.assertEqual(1, self.stop())
        base.wait_for(lambda: not base.alive(pid), 'end of scan process')


class RingDrainTest(DrainTest):

    flags = wire.SHARED


class LossTest(base.TestCase):

    def test_scan_process_killed(self):
        self.start(processes=2)
        first, second = self.session(), self.session()
        for monitor in (first, second):
            self.assert_serves(monitor)
        before = self.scan_processes()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for monitor in (first, second):
            self.assert_closed(monitor)
        closed = self.records(
            2, event='closed', reason='scan process died', fetches=None,
            distinct=None, matches=None, unknown=None)
        self.assertEqual(2, len(closed))
        self.assert_serves(self.session())
        after = base.wait_for(
            lambda: self.scan_processes()
            if len(self.scan_processes()) == 2 else None, 'replacement')
        self.assertFalse(set(before) & set(after))
        self.assertIn('died, Killed; 1 sessions closed; 2 lost so far',
                      self.log())

    def test_kill_from_outside_is_not_held_against_the_page(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=60000)
        monitor = self.session()
        monitor.send(base.SLOW)
        pid, = self.scan_processes()
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        self.assert_closed(monitor)
        self.records(1, event='closed')
        self.assertNotIn('answered as unknown', self.log())

    def test_slow_page_costs_its_process_once(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=200, processes=2)
        for number in range(3):
            monitor, other = self.session(), self.session()
            begin = time.monotonic()
            verdict = monitor.ask(base.SLOW)
            if number == 0:
                self.assertIsNone(verdict)
                # 200 ms, 50 ms grace, and two looks at it.
                self.assertLess(time.monotonic() - begin, 3)
            else:
                self.assertEqual(wire.Result.UNKNOWN, verdict.result)
                self.assert_serves(monitor)
            self.assert_serves(other)
            monitor.close()
            other.close()
        log = self.log()
        self.assertEqual(1, log.count('a scan took more than 0.25 s'))
        self.assertEqual(1, log.count('is answered as unknown from now on'))

    def test_crash_is_held_against_the_page(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=60000)
        monitor = self.session()
        monitor.send(base.SLOW)
        pid, = self.scan_processes()
        time.sleep(0.3)
        # What a flaw in the engine would do.
        os.kill(pid, signal.SIGSEGV)
        self.assert_closed(monitor)
        self.assertEqual(wire.Result.UNKNOWN,
                         self.session().ask(base.SLOW).result)

    def test_scan_process_without_a_file_left(self):
        self.start()
        good = self.session()
        self.assert_serves(good)
        pid, = self.scan_processes()
        base.no_more_files(pid)
        refused = self.session()
        self.assert_closed(refused)
        self.assert_serves(good)
        closed, = self.records(1, event='closed')
        self.assertEqual('the scan process has no file left',
                         closed['reason'])

    def test_main_process_without_a_file_left(self):
        self.start()

        def files():
            return len(os.listdir(f'/proc/{self.process.pid}/fd'))

        before = files()
        good = self.session()
        base.wait_for(lambda: files() == before, 'end of the handshake')
        limits = base.no_more_files(self.process.pid)
        waiting = self.connect()
        waiting.socket.sendall(base.hello().pack())
        base.wait_for(lambda: 'Cannot accept' in self.log(), 'failed accept')
        self.assert_serves(good)
        base.wait_for(lambda: 'SelfTest matched' in self.log(), 'the match')
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, limits)
        self.assertIsInstance(waiting.frame(), wire.Welcome)

    def test_no_orphans(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=60000, processes=2)
        busy, idle = self.session(), self.session()
        busy.send(base.SLOW)
        time.sleep(0.2)
        pids = self.scan_processes()
        self.assertEqual(2, len(pids))
        self.process.kill()
        self.process.wait()
        for monitor in (busy, idle):
            self.assert_closed(monitor)
        base.wait_for(lambda: not any(map(base.alive, pids)), 'orphans')
        # The socket that was left behind does not stop the next worker.
        self.assertTrue(os.path.exists(self.path))
        self.start()
        self.assert_serves(self.session())


class RingLossTest(LossTest):

    flags = wire.SHARED


class StartTest(base.TestCase):

    def _fails(self, status, *messages, **options):
        process = self.launch(**options)
        self.assertEqual(status, process.wait(base.PATIENCE))
        self.assertNotIn('Traceback', self.log())
        for message in ('virtav-scan-worker: error: ', '\n  way out: ',
                        *messages):
            self.assertIn(message, self.log())

    def test_second_worker(self):
        self.start()
        pid = self.process.pid
        self._fails(2, f'process {pid} is listening on socket {self.path}')
        self.assert_serves(self.session())

    def test_second_worker_with_the_same_journal(self):
        self.start()
        path = str(self.top / 'other.sock')
        self._fails(2, 'is being written by another worker', socket=path)
        self.assertFalse(os.path.exists(path))

    def test_stale_socket(self):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(self.path)
        self.start()
        self.assert_serves(self.session())

    def test_socket_path_too_long(self):
        self._fails(2, 'the kernel takes 107', socket='/tmp/' + 'x' * 103)

    def test_state_directory_not_writable(self):
        self._fails(2, 'alert journal /proc/', state_dir='/proc/virtav')
