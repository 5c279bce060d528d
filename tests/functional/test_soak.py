# SPDX-License-Identifier: Apache-2.0
"""Clients come and go, and ask; nothing is left of them.

At night 10,000 connections and 10 million verdicts, else what goes into a
minute.
"""

import os
import time

from tests.functional import load
from virtav_nova.monitor import client
from virtav_nova.monitor import wire

NIGHTLY = os.environ.get('VIRTAV_NIGHTLY') == '1'
CONNECTS = 10000 if NIGHTLY else 600
#: Of each connection.
VERDICTS = 1000 if NIGHTLY else 150
#: What may be spent if it is not night, in seconds.
SECONDS = None if NIGHTLY else 50
#: Pages that nobody asked for before, of each connection.
_NEW = 20
_KNOWN = 64
_DEPTH = 32
#: MiB beside the rules and the verdict table.
LIMIT = 150
_ENTRIES = 1 << 20


class SoakTest(load.TestCase):

    def connect(self, worker, number, frames):
        """One connection from its begin to its end.

        :param frames: requests for known pages, filled by the first one
        """
        with client.Client(str(worker.socket), client.hello(
                ring_wanted=number % 4 > 0), 60) as session:
            if not frames:
                frames += [load.request(session, one, load.page(one))
                           for one in range(_KNOWN)]
            asked = answered = 0
            while answered < VERDICTS:
                while asked < VERDICTS and asked - answered < min(
                        _DEPTH, session.most):
                    if asked < _NEW:
                        one = (number << 16) + 1000 + asked
                        frame = load.request(
                            session, one, load.page(one),
                            cr3=number << 12)
                    else:
                        frame = frames[asked % _KNOWN]
                    session.send(frame)
                    asked += 1
                for verdict in session.wait():
                    self.assertEqual(wire.Result.CLEAN, verdict.result)
                    answered += 1

    def settled(self, worker):
        """Processes, open files and threads, once no session is open."""
        deadline = time.monotonic() + 20
        before = None
        while time.monotonic() < deadline:
            pids = self.tree(worker)
            now = pids, load.open_files(pids), load.threads(pids)
            if now == before:
                break
            before = now
            time.sleep(1)
        return before

    def test_nothing_is_left(self):
        worker = self.worker(processes=2, table_entries=_ENTRIES,
                             journal_max_mib=4)
        frames = []
        for number in range(40):
            self.connect(worker, number, frames)
        before = self.settled(worker)
        first = load.memory(before[0])
        begin = time.monotonic()
        for number in range(40, CONNECTS):
            self.connect(worker, number, frames)
            if SECONDS and time.monotonic() > begin + SECONDS:
                break
        self.assertGreater(number, 100)
        self.assertEqual(before, self.settled(worker))
        memory = load.memory(before[0])
        print('%d connections, %d verdicts: %.1f MiB, %.1f at first' % (
            number + 1, (number + 1) * VERDICTS, memory, first))
        # The rules of this worker are one rule.
        self.assertLess(memory, LIMIT + (_ENTRIES * 16 >> 20))
        counters = self.counters(worker)
        self.assertEqual((number + 1) * VERDICTS, counters['clean'])
        self.assertEqual((0, 0), (counters['unknown'], counters['faults']))
        self.assertNotRegex(worker.log.read_text(), 'Traceback|died|killed')
