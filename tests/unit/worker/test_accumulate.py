# SPDX-License-Identifier: Apache-2.0

import random
import unittest

from tests.unit.worker import fragments
from virtav_nova.engines import base
from virtav_nova.worker import accumulate

A, B, C = b'first-string', b'second-string', b'third-string'
HIGH = 0xffffffff81000000


class AccumulatorTest(unittest.TestCase):

    def make(self, *rules, **limits):
        self.engine = fragments.FragmentEngine(
            *(rules or [('all of them', A, B)]))
        return accumulate.Accumulator(
            self.engine, accumulate.Limits(**limits))

    def add(self, made, gva, content, session=1, now=0.0, **fields):
        request = fragments.request(gva, content, **fields)
        found = self.engine.examine(content).fragments
        return made.add(session, request, found, now)

    def test_two_pages(self):
        made = self.make()
        page, rules = self.add(made, 0x401234, A)
        self.assertEqual([], rules)
        self.assertEqual(0x401000, page.gva)
        self.assertEqual({0: {0}}, page.fragments)
        other, rules = self.add(made, 0x403000, B)
        self.assertEqual([0], rules)
        self.assertIs(page.space, other.space)
        self.assertEqual([page, other], made.pages(page.space, 0))
        self.assertEqual({0, 1}, made.strings([page, other], 0))

    def test_strings_are_counted(self):
        made = self.make(('2 of them', A, B, C), ('all of them', A, C),
                         pages=4, spaces=3)
        chance = random.Random(5)
        for number in range(2000):
            page, rules = self.add(
                made, chance.randrange(6) << 12, b''.join(chance.choices(
                    (A, B, C, b'harmless'), k=2)),
                cr3=chance.randrange(5) << 12)
            if not page.fragments:
                continue
            self.assertEqual(
                [rule for rule in page.fragments if self.engine.complete(
                    rule, made.strings(made.pages(page.space, rule), rule))],
                rules)
            if number % 7 == 0:
                made.drop(page)
        made.forget(1)
        self.assertEqual(0, made.size)

    def test_what_was_tried_needs_something_new(self):
        made = self.make(('2 of them', A, B, C))
        self.add(made, 0x401000, A)
        page, rules = self.add(made, 0x402000, B + C)
        self.assertEqual([0], rules)
        self.assertEqual([0], self.add(made, 0x402000, B + C)[1])
        made.tried(page.space, [0])
        self.assertEqual([], self.add(made, 0x402000, B + C)[1])
        self.assertEqual([], self.add(made, 0x401000, A)[1])
        self.assertEqual([0], self.add(made, 0x402000, B + C + A)[1])
        made.tried(page.space, [0])
        self.assertEqual([0], self.add(made, 0x404000, C)[1])

    def test_told_until_something_is_new(self):
        made = self.make()
        space = self.add(made, 0x401000, A)[0].space
        made.tell(space, 0)
        self.assertEqual({0}, made.told(space))
        self.add(made, 0x402000, B)
        self.assertEqual(set(), made.told(space))

    def test_another_page_at_the_address(self):
        made = self.make()
        self.add(made, 0x401000, A)
        page, rules = self.add(made, 0x401000, B)
        self.assertEqual([], rules)
        self.assertEqual([page], made.pages(page.space, 0))

    def test_address_spaces(self):
        made = self.make(('all of them', A, B, C))
        one = self.add(made, 0x401000, A, cr3=0x1000)[0].space
        two = self.add(made, 0x401000, B, cr3=0x2000)[0].space
        self.assertIsNot(one, two)
        # It is worth a look all the same.
        self.assertEqual([0], self.add(made, 0x402000, C, cr3=0x2000)[1])
        self.assertEqual([B + C], [b''.join(
            page.content.rstrip(b'\0')
            for page in made.pages(two, 0, own=True))])
        self.assertEqual(3, len(made.pages(two, 0)))

    def test_sessions_have_nothing_in_common(self):
        made = self.make()
        self.add(made, 0x401000, A, session=1)
        self.assertEqual([], self.add(made, 0x402000, B, session=2)[1])

    def test_process_context_identifiers(self):
        made = self.make()
        wide = 0x7f0000001000
        one = self.add(made, wide, A, cr3=0x1000)[0].space
        self.assertIs(one, self.add(made, 0x1000, B, cr3=0x1805)[0].space)
        # Without 64 bits these may be two tables.
        one = self.add(made, 0x1000, A, session=2, cr3=0x1000)[0].space
        two = self.add(made, 0x1000, A, session=2, cr3=0x1020)[0].space
        self.assertIsNot(one, two)
        self.assertIs(one, self.add(made, 0x2000, B, session=2,
                                    cr3=0x1018)[0].space)

    def test_kernel(self):
        made = self.make()
        one = self.add(made, HIGH, A, cr3=0x1000, cpl=0)[0]
        self.assertIsNone(one.space.root)
        two, rules = self.add(made, HIGH + 0x5000, B, cr3=0x2000, cpl=0)
        self.assertIs(one.space, two.space)
        self.assertEqual([0], rules)
        # A program at the same address is no part of it.
        low = self.add(made, 0xc0100000, A, cr3=0x1000, cpl=3)[0]
        self.assertIsNot(one.space, low.space)

    def test_32_bit_kernel(self):
        made = self.make()
        one = self.add(made, 0xc0100000, A, cr3=0x1000, cpl=0)[0].space
        self.assertIsNone(one.root)
        self.assertIs(one, self.add(made, 0xc0200000, B, cr3=0x2000,
                                    cpl=0)[0].space)
        low = self.add(made, 0x8048000, A, cr3=0x1000)[0].space
        self.assertIsNot(one, low)

    def test_space_of_a_fetch(self):
        made = self.make()
        request = fragments.request(0x409000, b'')
        self.assertIsNone(made.space(1, request))
        space = self.add(made, 0x401000, A)[0].space
        self.assertIs(space, made.space(1, request))
        self.assertIsNone(made.space(2, request))
        self.assertIsNone(made.space(1, request._replace(cr3=0x7000)))

    def test_drop(self):
        made = self.make()
        page, _ = self.add(made, 0x401000, A)
        made.drop(page)
        made.drop(page)
        self.assertEqual(0, made.size)
        self.assertEqual([], made.pages(page.space, 0))
        self.assertEqual([], self.add(made, 0x402000, B)[1])

    def test_drop_of_what_was_replaced(self):
        made = self.make()
        old, _ = self.add(made, 0x401000, A)
        new, _ = self.add(made, 0x401000, B)
        made.drop(old)
        self.assertEqual([new], made.pages(new.space, 0))

    def test_forget(self):
        made = self.make()
        self.add(made, 0x401000, A)
        self.add(made, 0x401000, A, session=2)
        size = made.size
        made.forget(1)
        made.forget(3)
        self.assertEqual(size / 2, made.size)
        self.assertEqual([], self.add(made, 0x402000, B)[1])
        self.assertEqual([0], self.add(made, 0x402000, B, session=2)[1])

    def test_pages_are_bounded(self):
        made = self.make(pages=3)
        space = self.add(made, 0x401000, A)[0].space
        for number in range(5):
            self.add(made, 0x402000 + number * 0x1000, B)
        self.assertEqual(3, len(space.pages))
        self.assertEqual(3, made.dropped)
        self.assertEqual([{1}] * 3, [
            page.fragments[0] for page in made.pages(space, 0)])

    def test_rules_are_bounded(self):
        made = self.make(*[('all of them', A, B)] * 8, rules=2)
        request = fragments.request(0x401000, A)
        page, _ = made.add(1, request, [
            base.Fragment(rule, 0) for rule in range(5)], 0)
        self.assertEqual({0, 1}, set(page.fragments))
        self.assertEqual(3, made.dropped)
        # Others on another page do not count, the same do.
        page, _ = made.add(1, request._replace(gva=0x402000), [
            base.Fragment(7, 0)], 0)
        self.assertEqual({}, page.fragments)
        page, _ = made.add(1, request._replace(gva=0x402000), [
            base.Fragment(1, 4)], 0)
        self.assertEqual({1: {4}}, page.fragments)
        self.assertEqual(2, len(page.space.pages))

    def test_spaces_are_bounded(self):
        made = self.make(spaces=3)
        spaces = [self.add(made, 0x401000, A, cr3=number << 12)[0].space
                  for number in range(4)]
        self.assertEqual(1, made.dropped)
        self.assertEqual(0, len(spaces[0].pages))
        self.assertEqual(3, len(made.pages(spaces[3], 0)))

    def test_spaces_longest_not_seen_go_first(self):
        made = self.make(spaces=2)
        one = self.add(made, 0x401000, A, cr3=0x1000)[0].space
        two = self.add(made, 0x401000, A, cr3=0x2000)[0].space
        self.add(made, 0x401000, A, cr3=0x1000)
        self.add(made, 0x401000, A, cr3=0x3000, session=2)
        self.assertEqual((1, 0), (len(one.pages), len(two.pages)))

    def test_size_is_bounded(self):
        made = self.make(size=100000)
        for number in range(1000):
            self.add(made, 0x401000 + (number % 7) * 0x1000, A,
                     cr3=number // 7 << 12)
            self.assertLessEqual(made.size, 100000)
        self.assertGreater(made.size, 50000)
        for session in (1, 2):
            made.forget(session)
        self.assertEqual(0, made.size)
