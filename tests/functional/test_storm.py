# SPDX-License-Identifier: Apache-2.0
"""Guests of one image boot at once: what is the same is scanned once."""

from tests.functional import base
from virtav_nova.monitor import client
from virtav_nova.monitor import player
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire
from virtav_nova.worker import status
from virtavtools import lab

GUESTS = 100 if base.NIGHTLY else 16


class StormTest(base.TestCase):

    def setUp(self):
        super().setUp()
        home = self.home / 'recorded'
        home.mkdir()
        with lab.Recorder(home) as recorder:
            with lab.Machine(self.emulator, self.guest, home, {
                    'socket': recorder.socket}) as machine:
                machine.wait_ready()
            self.played = self.enterContext(
                recording.Recording(recorder.finish()))

    def storm(self, guests, **options):
        """Have guests boot at once, against a new worker.

        :returns: what came of it, and how many scans it took
        """
        with self.worker(start=False, require_token=False, processes=2,
                         max_sessions=300, **options) as worker:
            outcome = player.Player(
                self.played, lambda _number: client.Client(
                    str(worker.socket), client.hello(), 60), guests).play()
            counters = status.ask(
                str(self.home / 'status.sock'), 'status')['counters']
        self.assertEqual(guests * len(self.played),
                         outcome.asked + outcome.hits)
        self.assertEqual({wire.Result.CLEAN}, set(outcome.results))
        return outcome, counters['scans']

    def test_one_scan_for_all(self):
        _one, scans = self.storm(1)
        outcome, all_scans = self.storm(GUESTS)
        self.assertGreater(outcome.hits, len(self.played))
        self.assertLessEqual(all_scans, 1.2 * scans)

    def test_without_a_table(self):
        # Each process has its own memory of results then.
        _one, scans = self.storm(1, table_entries=0)
        _outcome, all_scans = self.storm(GUESTS, table_entries=0)
        self.assertLessEqual(all_scans, 2.2 * scans)
