# SPDX-License-Identifier: Apache-2.0

import os
import signal
import threading

from tests.unit.monitor import test_recording
from tests.unit.worker import base
from virtav_nova.monitor import client
from virtav_nova.monitor import player
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire

FETCHES = 1200


class PlayerTest(base.TestCase):

    def setUp(self):
        super().setUp()
        path = self.top / 'boot.rec'
        with open(path, 'wb') as file:
            writer = recording.Writer(
                file, recording.Head.of(client.hello(), 'a test'))
            for number, request in enumerate(
                    test_recording.requests(FETCHES)):
                if number % 100 == 50:
                    request = request._replace(flags=0, window=wire.window(
                        base.MATCHING))
                writer.add(request)
            writer.close()
        self.played = self.enterContext(recording.Recording(path))

    def player(self, guests=1, ring_wanted=True, **options):
        return player.Player(
            self.played, lambda _number: client.Client(
                self.path, client.hello(ring_wanted=ring_wanted), 20),
            guests, **options)

    def check(self, outcome, guests):
        """Every fetch had its verdict."""
        self.assertEqual(guests * FETCHES, outcome.asked + outcome.hits)
        self.assertEqual(guests * 12, outcome.results[wire.Result.MATCH])
        self.assertEqual(0, outcome.results[wire.Result.UNKNOWN])
        self.assertEqual(outcome.asked, len(outcome.latencies))

    def test_ring_and_socket(self):
        self.start(table_entries=0)
        for ring_wanted in (True, False):
            outcome = self.player(3, ring_wanted, depth=8).play()
            self.check(outcome, 3)
            self.assertEqual((0, 0), (outcome.hits, outcome.moved))
            self.assertEqual({'VirtAV_SelfTest'}, set(outcome.rules))
            self.assertEqual(
                {number for number in range(FETCHES) if number % 100 == 50},
                {found.fetch for found in outcome.matches})
            self.assertGreater(outcome.quantile(.99), outcome.quantile(.5))

    def test_table(self):
        self.start()
        self.assertLess(self.player().play().hits, FETCHES)
        outcome = self.player().play()
        # What matched is never in it.
        self.assertEqual((12, FETCHES - 12), (outcome.asked, outcome.hits))
        self.assertEqual(FETCHES, self.player(table=False).play().asked)

    def test_scan_process_is_lost(self):
        self.start(processes=2, table_entries=0)
        timer = threading.Timer(.2, lambda: os.kill(
            self.scan_processes()[0], signal.SIGKILL))
        self.addCleanup(timer.join)
        timer.start()
        outcome = self.player(4).play()
        self.assertGreater(outcome.moved, 0)
        self.check(outcome, 4)

    def test_worker_is_gone(self):
        self.start()
        self.stop()
        with self.assertRaisesRegex(client.ClientError, 'No such file'):
            self.player().play()

    def test_refused(self):
        self.start(max_sessions=1)
        with self.assertRaisesRegex(client.ClientError, 'refuses'):
            self.player(2).play()
