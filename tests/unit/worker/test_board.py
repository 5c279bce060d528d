# SPDX-License-Identifier: Apache-2.0

import os
import time
import unittest

from virtav_nova.worker import board

TAG = b'0123456789abcdef'


def make(slots, ends=2):
    """The same boards as seen by several processes."""
    fd = board.Boards.create(slots)
    try:
        return [board.Boards(fd, slots) for _ in range(ends)]
    finally:
        os.close(fd)


class BoardTest(unittest.TestCase):

    def test_scan_is_seen_from_the_other_side(self):
        ours, theirs = make(3)
        here, there = ours.board(2), theirs.board(2)
        self.assertIsNone(there.scan())
        begin = time.monotonic_ns()
        here.begin(7, TAG)
        started, session, tag, part, _before = there.scan()
        self.assertTrue(begin <= started <= time.monotonic_ns())
        self.assertEqual((7, TAG, None), (session, tag, part))
        for part in (0, 5, 1 << 31 | 5):
            here.at(part)
            self.assertEqual(part, there.scan().part)
        self.assertTrue(0 <= there.scan().before
                        <= time.monotonic_ns() - started)
        here.end()
        self.assertIsNone(there.scan())
        here.begin(7, TAG)
        self.assertIsNone(there.scan().part)

    def test_others_see_what_is_being_scanned(self):
        for slots in (2, 64, 1024):
            ours, theirs = make(slots)
            first, last = ours.board(0), theirs.board(slots - 1)
            last.begin(1, TAG)
            self.assertTrue(first.elsewhere(TAG))
            self.assertFalse(last.elsewhere(TAG))
            self.assertFalse(first.elsewhere(TAG[::-1]))
            last.end()
            self.assertFalse(first.elsewhere(TAG))

    def test_tag_across_two_slots_is_not_found(self):
        ours, = make(3, 1)
        ours.board(0).begin(1, bytes(8) + TAG[:8])
        ours.board(1).begin(1, TAG[8:] + bytes(8))
        self.assertFalse(ours.board(2).elsewhere(TAG))

    def test_nobody_changes_its_size(self):
        # Others would die of it, by SIGBUS.
        fd = board.Boards.create(2)
        self.addCleanup(os.close, fd)
        for size in (0, 1 << 20):
            with self.assertRaises(PermissionError):
                os.truncate(fd, size)

    def test_slots_do_not_overlap(self):
        ours, theirs = make(3)
        for number in range(3):
            slot = ours.board(number)
            slot.begin(number, bytes([number + 1]) * 16)
            for counter in board.Counter:
                slot.counters[counter] = number * 100 + counter
            for histogram in (slot.service, slot.scans):
                histogram[0] = histogram[board.BUCKETS - 1] = number
        for number in range(3):
            slot = theirs.board(number)
            self.assertEqual(
                (number, bytes([number + 1]) * 16),
                (slot.scan().session, slot.scan().tag))
            self.assertEqual([number * 100 + counter
                              for counter in board.Counter],
                             list(slot.counters))
            for histogram in (slot.service, slot.scans):
                self.assertEqual([number] + [0] * (board.BUCKETS - 2)
                                 + [number], list(histogram))

    def test_totals(self):
        ours, = make(2, 1)
        slots = [ours.board(number) for number in range(2)]
        for slot in slots:
            slot.counters[board.Counter.SCANS] = 3
            slot.scans[5] = 2
        totals = board.totals(slots)
        self.assertEqual(6, totals['scans'])
        self.assertEqual(0, totals['clean'])
        self.assertEqual(4, board.merged(
            slot.scans for slot in slots)[5])


class HistogramTest(unittest.TestCase):

    def test_buckets_follow_each_other(self):
        self.assertEqual(0, board.bucket(0))
        before = 0
        for duration in range(1, 5000):
            number = board.bucket(duration)
            self.assertIn(number - before, (0, 1, 4))
            before = number
            if number:
                self.assertLess(duration, board.upper(number))
                self.assertGreaterEqual(duration * 1.26 + 1,
                                        board.upper(number))

    def test_longest(self):
        for duration in (1 << 40, 1 << 46, 1 << 62):
            self.assertLess(board.bucket(duration), board.BUCKETS)
        self.assertEqual(board.BUCKETS - 1, board.bucket(1 << 62))

    def test_quantile(self):
        counts = [0] * board.BUCKETS
        self.assertIsNone(board.quantile(counts, 0.5))
        for duration in range(1000, 101000, 1000):
            counts[board.bucket(duration)] += 1
        for share in (0.5, 0.9, 0.99):
            self.assertLess(share * 100000, board.quantile(counts, share))
            self.assertGreater(share * 126000, board.quantile(counts, share))
