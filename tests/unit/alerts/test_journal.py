# SPDX-License-Identifier: Apache-2.0

import errno
import itertools
import json
import os
import resource
import signal
import stat
import time
from unittest import mock

from tests.unit import base
from virtav_nova import exception
from virtav_nova.alerts import journal


class JournalTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = self.top / 'alerts' / 'journal.jsonl'

    def _open(self, max_bytes=1 << 20, keep=2):
        opened = journal.Journal(str(self.path), max_bytes, keep)
        self.addCleanup(opened.close)
        return opened

    def _records(self, suffix=''):
        path = self.path.with_name(self.path.name + suffix)
        lines = path.read_bytes().split(b'\n')
        self.assertEqual(b'', lines.pop())
        return [json.loads(line) for line in lines]

    def test_append(self):
        alerts = self._open()
        alerts.append({'n': 1})
        alerts.append({'n': 2})
        self.assertEqual([{'n': 1}, {'n': 2}], self._records())
        mode = stat.S_IMODE(self.path.stat().st_mode)
        self.assertEqual(0o640, mode & ~0o022)
        self.assertEqual(0, mode & 0o137)

    def test_goes_on_where_it_ended(self):
        first = journal.Journal(str(self.path), 1 << 20, 2)
        first.append({'n': 1})
        first.close()
        self._open().append({'n': 2})
        self.assertEqual([{'n': 1}, {'n': 2}], self._records())

    def test_one_line_whatever_it_holds(self):
        hostile = {'a': 'x\n{"type":"match"}\r\u2028\x85\x1b\ud800', 'b"\n': 1}
        self._open().append(hostile)
        data = self.path.read_bytes()
        self.assertEqual(1, len(data.decode('ascii').splitlines()))
        self.assertEqual([hostile], self._records())

    def test_broken_line_stays_alone(self):
        self.path.parent.mkdir()
        self.path.write_bytes(b'{"n": 1}\n{"n": 2')
        self._open().append({'n': 3})
        self.assertEqual(b'{"n": 1}\n{"n": 2\n{"n":3}\n',
                         self.path.read_bytes())

    def test_rotation(self):
        alerts = self._open(max_bytes=30, keep=2)
        for number in range(11):
            alerts.append({'number': number})
        self.assertEqual([{'number': 10}], self._records())
        self.assertEqual([{'number': 8}, {'number': 9}], self._records('.1'))
        self.assertEqual([{'number': 6}, {'number': 7}], self._records('.2'))
        self.assertEqual(
            ['journal.jsonl', 'journal.jsonl.1', 'journal.jsonl.2'],
            sorted(os.listdir(self.path.parent)))
        self.assertEqual(0, alerts.lost)

    def test_record_longer_than_the_file(self):
        alerts = self._open(max_bytes=10)
        alerts.append({'number': 'one'})
        alerts.append({'number': 'two'})
        self.assertEqual([{'number': 'two'}], self._records())
        self.assertEqual([{'number': 'one'}], self._records('.1'))

    def test_sync_is_due_at_most_every_100_ms(self):
        alerts = self._open()
        self.assertIsNone(alerts.sync_due())
        alerts.append({'n': 1})
        self.assertLessEqual(alerts.sync_due(), time.monotonic())
        alerts.sync()
        self.assertIsNone(alerts.sync_due())
        alerts.append({'n': 2})
        self.assertGreater(alerts.sync_due(), time.monotonic())
        self.assertLess(alerts.sync_due(), time.monotonic() + 0.1)

    def test_full_disk(self):
        alerts = self._open()
        alerts.append({'n': 1})
        # A limit on the file's size fails a write as a full disk does, in
        # the middle of a line too.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12, limits[1]))
        try:
            with self.assertLogs(journal.LOG, 'ERROR') as logs:
                alerts.append({'n': 2})
                alerts.append({'n': 3})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(1, len(logs.output))
        self.assertEqual(2, alerts.lost)
        with self.assertLogs(journal.LOG, 'WARNING') as logs:
            alerts.append({'n': 4})
        self.assertIn('2 records were lost', logs.output[0])
        self.assertEqual(b'{"n":1}\n{"n"\n{"n":4}\n', self.path.read_bytes())

    def test_rotation_that_fails_moves_nothing(self):
        alerts = self._open(max_bytes=10)
        alerts.append({'n': 1})
        (self.path.parent / 'journal.jsonl.0').mkdir()
        with self.assertLogs(journal.LOG, 'ERROR'):
            for number in range(5):
                alerts.append({'n': number})
        self.assertEqual([{'n': 1}], self._records())
        self.assertEqual(5, alerts.lost)
        (self.path.parent / 'journal.jsonl.0').rmdir()
        with self.assertLogs(journal.LOG, 'WARNING'):
            alerts.append({'n': 6})
        self.assertEqual([{'n': 6}], self._records())
        self.assertEqual([{'n': 1}], self._records('.1'))

    def test_rotation_that_fails_half_way(self):
        alerts = self._open(max_bytes=50, keep=3)
        for number in range(4):
            alerts.append({'n': number, 'p': 'x' * 20})
        really = os.replace
        for fails in range(4):
            with self.subTest(fails):
                calls = itertools.count()

                def replace(source, target, calls=calls, fails=fails):
                    if next(calls) >= fails:
                        raise OSError(errno.EIO, 'broken')
                    really(source, target)

                lost = alerts.lost
                with mock.patch.object(os, 'replace', replace):
                    for _ in range(3):
                        alerts.append({'n': 'lost', 'p': 'x' * 20})
                self.assertGreater(alerts.lost, lost)
                lost = alerts.lost
                number += 1
                alerts.append({'n': number, 'p': 'x' * 20})
                self.assertEqual(lost, alerts.lost)
                self.assertEqual([number - 3, number - 2, number - 1, number],
                                 [record['n'] for suffix in (
                                     '.3', '.2', '.1', '')
                                  for record in self._records(suffix)])

    def _assert_refused(self, message):
        with self.assertRaisesRegex(
                exception.JournalError, message) as caught:
            self._open()
        self.assertTrue(caught.exception.way_out)

    def test_second_writer_is_refused(self):
        self._open()
        self._assert_refused('being written by another worker')

    def test_second_writer_is_refused_after_rotation(self):
        alerts = self._open(max_bytes=10)
        alerts.append({'n': 1})
        alerts.append({'n': 2})
        self._assert_refused('being written by another worker')

    def test_link_is_refused(self):
        target = self.write('target', '')
        self.path.parent.mkdir()
        self.path.symlink_to(target)
        self._assert_refused('symbolic links')
        self.assertEqual('', target.read_text())

    def test_what_is_no_file_is_refused(self):
        self.path.parent.mkdir()
        os.mkfifo(self.path)
        self._assert_refused('not a regular file')
        self.path.unlink()
        self.path.mkdir()
        self._assert_refused('Is a directory')

    def test_directory_that_cannot_be_made(self):
        self.write('alerts', 'a file')
        self._assert_refused(f'alert journal {self.path}: ')
