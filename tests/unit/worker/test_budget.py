# SPDX-License-Identifier: Apache-2.0

import time
import unittest
from unittest import mock

from virtav_nova.worker import budget

SECOND = 1_000_000_000


class BudgetTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.now = 10 * SECOND
        patch = mock.patch.object(
            time, 'monotonic_ns', side_effect=lambda: self.now)
        patch.start()
        self.addCleanup(patch.stop)

    def test_spent_and_filled_again(self):
        one = budget.Budget(0.25)
        self.assertTrue(one.left())
        one.spend(SECOND - 1)
        self.assertTrue(one.left())
        one.spend(SECOND // 2)
        self.assertFalse(one.left())
        # What is owed has to be earned first, at a quarter of a second each.
        self.now += SECOND
        self.assertFalse(one.left())
        self.now += SECOND + 1000
        self.assertTrue(one.left())

    def test_no_more_than_a_second_is_saved(self):
        one = budget.Budget(1)
        one.spend(2 * SECOND)
        self.now += 3600 * SECOND
        self.assertTrue(one.full())
        one.spend(SECOND + 1)
        self.assertFalse(one.left())

    def test_what_comes_in_while_it_is_full_is_lost(self):
        one = budget.Budget(0.25)
        self.now += 3600 * SECOND
        one.spend(SECOND)
        self.assertFalse(one.left())

    def test_clock_of_the_day_does_not_matter(self):
        with mock.patch.object(time, 'time', side_effect=AssertionError):
            one = budget.Budget(1)
            one.spend(SECOND)
            self.assertFalse(one.left())


class BudgetsTest(unittest.TestCase):

    def test_sessions_of_an_instance_share_it(self):
        made = budget.Budgets(0.5)
        first = made.open('a')
        self.assertIs(first, made.open('a'))
        self.assertIsNot(first, made.open('b'))
        self.assertEqual(2, first.sessions)

    def test_who_connects_again_has_no_new_one(self):
        made = budget.Budgets(0.001)
        first = made.open('a')
        first.spend(5 * SECOND)
        first.sessions -= 1
        self.assertIs(first, made.open('a'))

    def test_bounded(self):
        made = budget.Budgets(0.5)
        busy = made.open('busy')
        for number in range(5000):
            made.open(str(number)).sessions -= 1
        self.assertLessEqual(len(made._budgets), 1025)
        self.assertIs(busy, made.open('busy'))
