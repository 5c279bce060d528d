# SPDX-License-Identifier: Apache-2.0

import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import uuid

from tests.unit import base as unit_base
from tests.unit.monitor import test_recording
from tests.unit.worker import base
from virtav_nova.monitor import client
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire


class RecorderTest(unit_base.TestCase):

    def setUp(self):
        super().setUp()
        self.socket = str(self.top / 's')
        self.file = self.top / 'boot.rec'

    def start(self, *arguments):
        """Start a recorder and wait until it listens."""
        process = subprocess.Popen(
            [sys.executable, '-m', 'virtav_nova.cmd.scan_worker', 'record',
             '--socket', self.socket, str(self.file), *arguments],
            cwd=unit_base.ROOT, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        line = process.stderr.readline()
        self.assertIn('NOTHING IS SCANNED', line)
        return process

    def ended(self, process, pattern, status=0):
        _out, said = process.communicate(timeout=base.PATIENCE)
        self.assertRegex(said, pattern)
        self.assertEqual(status, process.returncode)
        self.assertFalse(os.path.exists(self.socket))

    def test_records(self):
        process = self.start()
        hello = client.hello(token=random.Random(1).randbytes(32))
        with client.Client(self.socket, hello) as asking:
            self.assertFalse(asking.shared)
            self.assertEqual(0, asking.welcome.table_entries)
            made = []
            for request in test_recording.requests(200):
                fetch = request._replace(
                    tag=asking.tagger.tag(request.page),
                    before_tag=asking.tagger.tag(request.junction_before)
                    if request.flags & wire.BEFORE else wire.NO_TAG,
                    after_tag=asking.tagger.tag(request.junction_after)
                    if request.flags & wire.AFTER else wire.NO_TAG)
                verdict = asking.ask(fetch)
                self.assertEqual(
                    (wire.Result.CLEAN, fetch.tag, fetch.generation),
                    (verdict.result, verdict.tag, verdict.generation))
                made.append(fetch)
            key = asking.tagger
        self.ended(process, 'session has ended: 200 fetches of [0-9]+ diff')
        self.assertEqual(0o600, stat.S_IMODE(self.file.stat().st_mode))
        with recording.Recording(self.file) as read:
            self.assertEqual((None, hello.instance), (
                read.damage, read.head.instance))
            self.assertEqual(made, [
                fetch.request(number, key)
                for number, fetch in enumerate(read)])

    def test_one_instance(self):
        wanted = uuid.uuid4()
        process = self.start('--instance', str(wanted))
        with self.assertRaisesRegex(client.ClientError, 'another instance'):
            client.Client(self.socket, client.hello())
        with (client.Client(self.socket, client.hello(wanted)),
              self.assertRaisesRegex(client.ClientError,
                                     'another instance')):
            client.Client(self.socket, client.hello(wanted))
        self.ended(process, '0 fetches')

    def test_told_to_stop(self):
        process = self.start()
        request = next(test_recording.requests(1))
        with client.Client(self.socket, client.hello()) as asking:
            asking.ask(request._replace(
                flags=0, tag=asking.tagger.tag(request.page),
                before_tag=wire.NO_TAG, after_tag=wire.NO_TAG))
            process.send_signal(signal.SIGTERM)
            self.ended(process, 'Told to stop: 1 fetches')
        with recording.Recording(self.file) as read:
            self.assertIsNone(read.damage)

    def test_killed(self):
        process = self.start()
        with client.Client(self.socket, client.hello()) as asking:
            for request in test_recording.requests(300):
                asking.ask(request._replace(
                    flags=0, tag=asking.tagger.tag(request.page),
                    before_tag=wire.NO_TAG, after_tag=wire.NO_TAG))
            size = self.file.stat().st_size
            base.wait_for(lambda: self.file.stat().st_size > size,
                          'the part that waits')
            process.kill()
        process.wait()
        with recording.Recording(self.file) as read:
            self.assertEqual(('it was cut off', 300), (
                read.damage, len(read)))

    def test_nobody_came(self):
        process = self.start()
        process.terminate()
        self.ended(process, 'Nobody came', 1)
        self.assertFalse(self.file.exists())

    def test_false_tag(self):
        process = self.start()
        request = next(test_recording.requests(1))
        with (client.Client(self.socket, client.hello()) as asking,
              self.assertRaises(client.ClientError)):
            asking.ask(request)
        self.ended(process, 'the tag does not fit')

    def test_file_that_is_there(self):
        self.file.write_bytes(b'mine')
        done = subprocess.run(
            [sys.executable, '-m', 'virtav_nova.cmd.scan_worker', 'record',
             '--socket', self.socket, str(self.file)],
            cwd=unit_base.ROOT, stderr=subprocess.PIPE, text=True)
        self.assertEqual(2, done.returncode)
        self.assertIn('File exists', done.stderr)
        self.assertIn('way out', done.stderr)
        self.assertEqual(b'mine', pathlib.Path(self.file).read_bytes())
