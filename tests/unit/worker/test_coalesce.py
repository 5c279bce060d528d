# SPDX-License-Identifier: Apache-2.0

import time
import unittest
from unittest import mock

from virtav_nova.worker import coalesce

KIND = 'instance', 'a.yar', 'R', 'page'


class CoalescerTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.now = 1000.0
        patch = mock.patch.object(
            time, 'monotonic', side_effect=lambda: self.now)
        patch.start()
        self.addCleanup(patch.stop)
        self.told = []
        self.made = coalesce.Coalescer(
            lambda session, known: self.told.append((session, known)))

    def add(self, number, session=1, kind=KIND):
        return self.made.add(kind, session, {'number': number})

    def numbers(self):
        return [(known['number'], known['repeats'])
                for _session, known in self.told]

    def test_first_ones_then_one_a_second(self):
        for number in range(100):
            self.add(number)
        # One more at once, for nothing came of late.
        self.assertEqual([(number, 0) for number in range(17)],
                         self.numbers())
        self.assertEqual(1001.0, self.made.due())
        self.made.keep()
        self.assertEqual(17, len(self.told))
        self.now = 1001.0
        self.made.keep()
        # The last one of 83.
        self.assertEqual((99, 82), self.numbers()[-1])
        self.assertIsNone(self.made.due())
        self.now = 1001.5
        self.assertFalse(self.add(100))
        self.now = 1003.0
        self.assertTrue(self.add(101))
        self.assertEqual((101, 1), self.numbers()[-1])

    def test_kinds_are_apart(self):
        for number in range(20):
            for kind in (KIND, ('other', *KIND[1:]), (*KIND[:3], 'junction')):
                self.add(number, kind=kind)
        self.assertEqual(3 * 17, len(self.told))

    def test_what_waits_of_a_session_is_told_at_its_end(self):
        for number in range(30):
            self.add(number, session=number % 2)
        self.made.close(0)
        self.assertEqual(17, len(self.told))
        self.made.close(1)
        self.assertEqual((1, (29, 12)), (
            self.told[-1][0], self.numbers()[-1]))
        self.assertEqual(30, sum(1 + repeats
                                 for _number, repeats in self.numbers()))

    def test_bounded(self):
        for number in range(5000):
            for _ in range(18):
                self.add(number, kind=(*KIND[:2], str(number), 'page'))
        self.assertLessEqual(len(self.made._tallies), 4096)
        self.assertLessEqual(len(self.made._waiting), 4096)
        self.made.close(1)
        self.assertEqual(5000 * 18, sum(
            1 + repeats for _number, repeats in self.numbers()))
