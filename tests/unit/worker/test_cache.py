# SPDX-License-Identifier: Apache-2.0

import tracemalloc
import unittest

from virtav_nova.engines import base
from virtav_nova.worker import cache


def tag(number):
    return number.to_bytes(16, 'little')


class CacheTest(unittest.TestCase):

    def test_remembers(self):
        made = cache.Cache(1 << 20)
        self.assertIsNone(made.get(tag(1)))
        other = base.Examined([], (base.Fragment(1, 2),))
        made.add(tag(1), cache.CLEAN)
        made.add(tag(2), other)
        self.assertIs(cache.CLEAN, made.get(tag(1)))
        self.assertIs(other, made.get(tag(2)))
        self.assertEqual(2, len(made))

    def test_empty_results_are_one(self):
        self.assertIs(cache.CLEAN, cache.result(base.Examined([], ())))
        other = base.Examined([], (base.Fragment(1, 2),))
        self.assertIs(other, cache.result(other))

    def test_bounded_in_bytes(self):
        made = cache.Cache(1 << 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(100000):
            made.add(tag(number), cache.CLEAN)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1.1 * (1 << 20))
        self.assertGreater(len(made), 1500)

    def test_large_results_count_for_more(self):
        made = cache.Cache(1 << 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(10000):
            made.add(tag(number), base.Examined(
                [base.Match('rule %d' % number, 'file', ['tag'],
                            {'author': 'A' * 100 + str(number)},
                            [('$a', 1)] * 16)],
                tuple(base.Fragment(number, string) for string in range(9))))
        self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)

    def test_matches_of_many_strings_count_for_more(self):
        made = cache.Cache(1 << 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(1000):
            made.add(tag(number), base.Examined([base.Match(
                'rule', 'file', [], {},
                [('$%d' % offset, 1000 + offset)
                 for offset in range(1000)])], ()))
        self.assertLess(tracemalloc.get_traced_memory()[1], 1.4 * (1 << 20))

    def test_what_is_in_use_stays(self):
        made = cache.Cache(1 << 16)
        for number in range(10000):
            made.add(tag(number), cache.CLEAN)
            made.add(tag(1 << 60), cache.CLEAN) if number == 0 else None
            self.assertIsNotNone(made.get(tag(1 << 60)))
        self.assertIsNone(made.get(tag(1)))
