# SPDX-License-Identifier: Apache-2.0

import os
import pathlib
import stat
import sys
import threading
import time
from unittest import mock

from tests.unit import base
from virtav_nova import exception
from virtav_nova.rules import crew

GOOD = 'rule Good { strings: $a = "harmless" condition: $a }'
#: Keeps libyara busy for a second on each of many pages.
LOOP = ('rule Loop { strings: $a = { 00 } condition: for all i in '
        '(1..1000000000) : (#a + i != 5) or $a }')
SETTINGS = {'seconds': 60, 'slow_us': 50, 'slowest_page_us': 5000}


class CrewTest(base.TestCase):

    def _crew(self, job='dissect', seconds=5, **options):
        return crew.Crew(job, crew.Limits(1 << 30, seconds), **options)

    def _units(self, *texts):
        return [{'id': number, 'file': 'a.yar', 'text': text}
                for number, text in enumerate(texts)]

    def _program(self, script):
        """Have another program work."""
        path = self.write('program', f'#!/bin/sh\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        patcher = mock.patch.object(sys, 'executable', str(path))
        patcher.start()
        self.addCleanup(patcher.stop)

    def _assert_died(self, reason, crew_of, number=2):
        begin = time.monotonic()
        found = dict(crew_of.run(self._units(*[GOOD] * number)))
        self.assertEqual(set(range(number)), set(found))
        for results in found.values():
            [result] = results
            self.assertRegex(result['died'], reason)
        self.assertLess(time.monotonic() - begin, 60)

    def test_all_units_end_once(self):
        found = list(self._crew(batch=3).run(self._units(*[GOOD] * 10)))
        self.assertEqual(list(range(10)),
                         sorted(number for number, _results in found))
        for _number, [result] in found:
            self.assertEqual('Good', result['name'])

    def test_nothing_to_do(self):
        self.assertEqual([], list(self._crew().run([])))

    def test_process_that_does_not_start(self):
        for script, reason in (('echo no good >&2; exit 3', 'no good'),
                               ('exit 3', 'ended with status 3'),
                               ('sleep 600', 'takes more than 1 s')):
            self._program(script)
            with self.subTest(script), \
                    mock.patch.multiple(crew, _START=0, _PATIENCE=1), \
                    self.assertRaisesRegex(
                        exception.RuleError,
                        f'does not start: {reason}') as caught:
                list(self._crew(seconds=1).run(self._units(*[GOOD] * 100)))
            self.assertTrue(caught.exception.way_out)

    def test_process_that_dies_without_a_word(self):
        self._program('echo \'{"ready": 1}\'; kill -SEGV $$')
        self._assert_died('crash by signal 11', self._crew())

    def test_process_that_makes_no_sense(self):
        for answer in ('nonsense', '[]', '{}', '{"begin": 5}',
                       '{"id": 99, "result": {}}', '{"id": 0, "result": 1}',
                       '[' * 100000):
            with self.subTest(answer[:20]):
                self._program('echo \'{"ready": 1}\';'
                              f" echo '{answer}'; sleep 60")
                self._assert_died('make no sense', self._crew(), 1)

    def test_process_that_answers_for_others(self):
        # It ends what it was never given.
        self._program('echo \'{"ready": 1}\'; echo \'{"begin": [7]}\';'
                      ' echo \'{"end": true}\'')
        self._assert_died('ended with status 0', self._crew(), 1)

    def test_process_that_answers_without_end(self):
        self._program('echo \'{"ready": 1}\'; exec cat /dev/zero')
        with mock.patch.object(crew, '_ANSWER_MORE', 1 << 20):
            self._assert_died('without end', self._crew(), 1)

    def test_process_that_is_silent(self):
        self._program('echo \'{"ready": 1}\'; sleep 600')
        with mock.patch.multiple(crew, _START=0, _PATIENCE=1):
            self._assert_died('takes more than 1 s', self._crew(seconds=1),
                              1)

    def test_processes_end_when_nobody_waits_for_them(self):
        running = self._crew('try', settings=SETTINGS,
                             data=bytes(4096 * 100)).run(
            [{'id': 0, 'text': GOOD}, {'id': 1, 'text': LOOP},
             {'id': 2, 'text': GOOD}])
        seen = []
        timer = threading.Timer(0.5, lambda: seen.extend(_children()))
        timer.start()
        next(running)
        running.close()
        timer.join()
        self.assertTrue(seen)
        self.assertEqual([], [pid for pid in seen
                              if pid in _children()])

    def test_what_a_process_may_do(self):
        found = []

        def look():
            for _time in range(300):
                for pid in _children():
                    status = _status(pid)
                    if status.get('Seccomp') == '2':
                        status['files'] = [
                            os.readlink(path) for path in pathlib.Path(
                                '/proc', str(pid), 'fd').iterdir()]
                        status['net'] = os.readlink(f'/proc/{pid}/ns/net')
                        found.append(status)
                        return
                time.sleep(0.05)

        looking = threading.Thread(target=look)
        looking.start()
        team = self._crew('try', settings=SETTINGS, data=bytes(4096 * 100))
        list(team.run([{'id': 0, 'text': LOOP}]))
        looking.join()
        [status] = found
        self.assertEqual(set(), team.notes)
        self.assertEqual('1', status['NoNewPrivs'])
        for name in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb'):
            self.assertEqual(0, int(status[name], 16), name)
        if os.geteuid() == 0:
            self.assertEqual({'65534'}, set(status['Uid'].split()))
            self.assertEqual('', status['Groups'])
            self.assertNotEqual(os.readlink('/proc/self/ns/net'),
                                status['net'])
        # What it was to do, its answers, and its errors.
        self.assertEqual(3, len(status['files']), status['files'])


def _children():
    path = pathlib.Path(f'/proc/self/task/{os.getpid()}/children')
    return [int(pid) for pid in path.read_text().split()]


def _status(pid):
    try:
        lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _colon, value in (
        line.partition(':') for line in lines)}
