# SPDX-License-Identifier: Apache-2.0

import itertools
import unittest

from tests.unit.worker import fragments
from tests.unit.worker import guest
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import accumulate
from virtav_nova.worker import deep
from virtav_nova.worker import paging

PAGE = wire.PAGE_SIZE
A, B, C = b'first-string', b'second-string', b'third-string'
TEXT = 0x7f3a5c7d9000
HIGH = 0xffffffffc0201000


class TestCase(unittest.TestCase):
    """Fetches of a guest that has memory and no processor.

    The clock stands still unless a test moves it.
    """

    rules = (('all of them', A, B),)
    reads = True
    needed = None
    settings = deep.Settings()

    def setUp(self):
        super().setUp()
        self.memory = guest.Memory()
        self.engine = fragments.FragmentEngine(
            *self.rules, needed=self.needed)
        self.accumulator = accumulate.Accumulator(
            self.engine, accumulate.Limits())
        self.counts = deep.Counts()
        self.searches = self.make(1)
        self.now = 1000.0

    def make(self, session):
        return deep.Searches(
            self.engine, self.accumulator, session, self.reads,
            self.settings, self.counts, 64)

    def space(self, mode=paging.Mode.LONG4):
        return guest.Space(self.memory, mode)

    def fetch(self, space, gva, known=True, **fields):
        """Fetch a page, at what is mapped there."""
        leaf = self.memory.drive(paging.Tables(
            space.mode, space.cr3, 99).translate(gva))
        content = bytes(self.memory.pages[leaf.gpa])
        request = fragments.request(
            gva, content, cr3=space.cr3,
            gpa=leaf.gpa if known else wire.UNKNOWN_GPA, **fields)
        found = {fragment for data in (
            content, request.junction_before, request.junction_after)
            for fragment in self.engine.examine(data).fragments}
        return self.searches.consider(request, found, False, self.now)

    def work(self, searches=None):
        """Answer READs until there is nothing to do now."""
        searches = searches or self.searches
        answers = []
        for _ in range(10000):
            if searches.due(self.now) != 0:
                return answers
            wanted = searches.step(self.now)
            if wanted is not None:
                self.assertTrue(searches.feed(
                    wanted, self.memory.read(wanted)))
            answers += searches.answers()
        self.fail('there is no end')

    def idle(self):
        """Let some time pass without a fetch, then do what is due."""
        self.now += 1
        return self.work()

    def answer(self):
        """The answer to the only parked request."""
        [answer] = self.work()
        self.assertTrue(answer.parked)
        self.assertIsNone(answer.error)
        return answer

    def places(self, found):
        """The pages of the only rule that was found."""
        [only] = found
        return [place.gva for place in only.places]


class ParkedTest(TestCase):

    def test_two_pages(self):
        for mode, text in ((paging.Mode.LONG4, TEXT),
                           (paging.Mode.LONG5, TEXT | 3 << 50),
                           (paging.Mode.PAE, 0x8048000),
                           (paging.Mode.LEGACY, 0x8048000)):
            with self.subTest(mode):
                self.setUp()
                space = self.space(mode)
                space.map(text, A)
                gpa = space.map(text + 5 * PAGE, bytes(100) + B)
                self.assertIs(False, self.fetch(space, text))
                self.assertIs(True, self.fetch(space, text + 5 * PAGE))
                self.assertEqual(1, self.searches.parked)
                answer = self.answer()
                self.assertEqual(text + 5 * PAGE, answer.request.gva)
                self.assertEqual(PAGE, len(answer.request.page))
                self.assertEqual([('$s0', 0), ('$s1', 100)],
                                 answer.found[0].match.strings)
                self.assertEqual(A.ljust(PAGE, b'\0'), answer.found[0].data)
                self.assertEqual([text, text + 5 * PAGE],
                                 self.places(answer.found))
                self.assertEqual(gpa, answer.found[0].places[1].gpa)
                self.assertEqual(0, self.searches.parked)
                self.assertEqual((1, 1, 1), (
                    self.counts.scans, self.counts.parked,
                    self.counts.found))

    def test_kernel(self):
        # Two processes run it; both map it.
        one, two = self.space(), self.space()
        for number, content in enumerate((A, B)):
            gpa = one.map(HIGH + number * 9 * PAGE, content, user=False)
            two.map(HIGH + number * 9 * PAGE, gpa=gpa, user=False)
        self.assertIs(False, self.fetch(one, HIGH, cpl=0))
        self.assertIs(True, self.fetch(two, HIGH + 9 * PAGE, cpl=0))
        self.assertTrue(self.answer().found)

    def test_kernel_seen_by_a_process_that_is_gone(self):
        # Its tables are no more, and that tells nothing.
        one, two = self.space(), self.space()
        for number, content in enumerate((A, B)):
            gpa = one.map(HIGH + number * 9 * PAGE, content, user=False)
            two.map(HIGH + number * 9 * PAGE, gpa=gpa, user=False)
        self.fetch(one, HIGH, cpl=0)
        self.memory.pages[one.cr3][:] = bytes(PAGE)
        self.assertEqual([], self.idle())
        self.assertIs(True, self.fetch(two, HIGH + 9 * PAGE, cpl=0))
        self.assertTrue(self.answer().found)

    def test_more_tables_than_may_be_read(self):
        # All that is needed is read before the rest of what is remembered.
        space = self.space()
        space.map(TEXT, A)
        self.fetch(space, TEXT)
        self.answers = self.idle()
        for number in range(60):
            gva = number + 1 << 39
            space.map(gva, C + bytes([number]))
            request = fragments.request(gva, C, cr3=space.cr3)
            self.accumulator.add(1, request, [
                self.engine.examine(A).fragments[0]], self.now)
        space.map(TEXT + PAGE, B)
        self.fetch(space, TEXT + PAGE)
        [answer] = [answer for answer in self.work() if answer.parked]
        self.assertTrue(answer.found)

    def test_two_processes(self):
        one, two = self.space(), self.space()
        one.map(TEXT, A)
        two.map(TEXT + PAGE, B)
        self.fetch(one, TEXT)
        # It is looked for, in the second alone.
        self.assertIs(True, self.fetch(two, TEXT + PAGE))
        self.assertFalse(self.answer().found)
        self.assertEqual([], self.engine.confirms)
        self.assertIs(False, self.fetch(two, TEXT + PAGE))

    def test_two_processes_that_share_a_page(self):
        # It is fetched once only, by the first of them.
        for offset in (0, 7 << 30):
            with self.subTest(offset):
                self.setUp()
                one, two = self.space(), self.space()
                gpa = one.map(TEXT, A)
                two.map(TEXT + offset, gpa=gpa)
                two.map(TEXT + offset + 3 * PAGE, B)
                self.fetch(one, TEXT)
                self.assertIs(True, self.fetch(two, TEXT + offset + 3 * PAGE))
                self.assertEqual([TEXT + offset, TEXT + offset + 3 * PAGE],
                                 self.places(self.answer().found))

    def test_address_space_that_is_used_again(self):
        space = self.space()
        space.map(TEXT, A)
        self.fetch(space, TEXT)
        # The next process has the CR3, and other pages.
        for _ in range(2):
            space.unmap(TEXT)
            space.map(TEXT + PAGE, B)
            self.fetch(space, TEXT + PAGE)
            self.assertEqual([], [
                answer for answer in self.work() if answer.found])
        self.assertEqual([], self.engine.confirms)
        # Nothing of the first is left.
        self.assertEqual([TEXT + PAGE], [
            page.gva for page in self.accumulator.pages(
                self.accumulator.space(1, fragments.request(
                    TEXT, b'', cr3=space.cr3)), 0)])

    def test_page_that_was_written_since(self):
        space = self.space()
        gpa = space.map(TEXT, A)
        space.map(TEXT + PAGE, B)
        self.fetch(space, TEXT)
        self.memory.pages[gpa][:] = bytes(PAGE)
        self.fetch(space, TEXT + PAGE)
        self.assertFalse(self.answer().found)

    def test_page_that_moved(self):
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + PAGE, B)
        self.fetch(space, TEXT)
        space.map(TEXT, A)
        self.fetch(space, TEXT + PAGE)
        self.assertTrue(self.answer().found)

    def test_unknown_physical_address(self):
        space = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            space.map(gva, content)
            self.fetch(space, gva, known=False)
        # The format of the tables is not known: from copies.
        self.assertTrue(self.answer().found)

    def test_candidate_that_is_none(self):
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + PAGE, B)
        self.engine._rules[0] = self.engine._rules[0][0], (
            fragments.FragmentEngine(('$s0 and not $s1', A, B))._rules[0][1])
        self.fetch(space, TEXT)
        self.fetch(space, TEXT + PAGE)
        self.assertFalse(self.answer().found)
        self.assertIn((0, False), self.engine.confirms)
        # Not asked again before there is something new.
        self.assertIs(False, self.fetch(space, TEXT + PAGE))
        space.map(TEXT + 2 * PAGE, B + A)
        self.assertIs(True, self.fetch(space, TEXT + 2 * PAGE))

    def test_engine_that_fails(self):
        space = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            space.map(gva, content)
            self.fetch(space, gva)
        error = ValueError()
        self.engine.confirm = lambda rule, data: (_ for _ in ()).throw(error)
        [answer] = self.work()
        self.assertEqual(([], True, (), error), answer[1:])
        self.assertEqual(0, self.searches.parked)

    def test_string_across_pages(self):
        # The other half lies in a page that was never fetched.
        space = self.space()
        space.map(TEXT, A.rjust(PAGE - 4, b'\xcc') + B[:4])
        space.map(TEXT + PAGE, B[4:])
        self.assertIs(True, self.fetch(space, TEXT, after=B[4:].ljust(
            512, b'\0')))
        self.assertEqual([TEXT, TEXT], self.places(self.answer().found))

    def test_no_string_across_a_hole(self):
        self.rules = ('all of them', A, B), ('all of them', A + B)
        self.setUp()
        space = self.space()
        space.map(TEXT, A.rjust(PAGE, b'\xcc'))
        space.map(TEXT + 2 * PAGE, B)
        self.fetch(space, TEXT)
        self.fetch(space, TEXT + 2 * PAGE)
        self.assertEqual('R0', self.answer().found[0].match.rule)
        image = deep.Image()
        image.add(TEXT, A.rjust(PAGE, b'\xcc'))
        image.add(TEXT + 2 * PAGE, B.ljust(PAGE, b'\0'))
        self.assertIsNone(self.engine.confirm(1, image.data()))

    def test_waits_no_longer_than_it_may(self):
        space = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            space.map(gva, content)
            self.fetch(space, gva)
        # QEMU does not answer.
        self.assertIsNotNone(self.searches.step(self.now))
        self.assertAlmostEqual(0.2, self.searches.due(self.now))
        self.now += 0.1
        self.assertIsNone(self.searches.step(self.now))
        self.assertEqual([], self.searches.answers())
        self.now += 0.11
        self.assertEqual(0, self.searches.due(self.now))
        self.assertIsNone(self.searches.step(self.now))
        [answer] = self.searches.answers()
        self.assertTrue(answer.parked)
        self.assertEqual([TEXT, TEXT + PAGE], self.places(answer.found))
        self.assertEqual(1, self.counts.late)
        self.assertIsNone(self.searches.due(self.now))

    def test_ends_later_though_nobody_waits(self):
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + 3 * PAGE, B)
        self.fetch(space, TEXT)
        self.now += 3
        self.fetch(space, TEXT + 3 * PAGE)
        wanted = self.searches.step(self.now)
        self.now += 1
        self.searches.step(self.now)
        # What was seen too long ago does not count any more by itself.
        [answer] = self.searches.answers()
        self.assertEqual(([], True), answer[1:3])
        self.assertTrue(self.searches.feed(wanted, self.memory.read(wanted)))
        [answer] = self.work()
        self.assertTrue(answer.found)
        self.assertFalse(answer.parked)
        # And its next fetch is its last.
        space.map(TEXT + 9 * PAGE, b'harmless')
        self.assertIs(True, self.fetch(space, TEXT + 9 * PAGE))
        self.assertTrue(self.answer().found)
        self.assertIs(False, self.fetch(space, TEXT + 9 * PAGE))

    def test_answer_that_was_not_asked_for(self):
        self.assertFalse(self.searches.feed(0, bytes(PAGE)))
        space = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            space.map(gva, content)
            self.fetch(space, gva)
        wanted = self.searches.step(self.now)
        self.assertFalse(self.searches.feed(wanted + PAGE, bytes(PAGE)))
        self.assertTrue(self.searches.feed(wanted, bytes(PAGE)))
        self.assertFalse(self.searches.feed(wanted, bytes(PAGE)))

    def test_several_in_turn(self):
        spaces = [self.space() for _ in range(3)]
        for space in spaces:
            space.map(TEXT, A)
            space.map(TEXT + PAGE, B)
        for offset in (0, PAGE):
            for space in spaces:
                self.fetch(space, TEXT + offset)
        self.assertEqual([True] * 3, [
            bool(answer.found) for answer in self.work()
            if answer.parked])

    def test_too_many_because_of_others(self):
        # Each second string waits, and not each first one.
        results = []
        for number in range(20):
            space = self.space()
            for at, content in enumerate((A, B)):
                space.map(TEXT + at * PAGE, content + bytes([number]))
                results.append(self.fetch(space, TEXT + at * PAGE))
        self.assertEqual([True] * 20, results[1::2])
        self.assertEqual([False] + [True] * 10 + [False] * 9, results[::2])
        self.assertEqual(9, self.counts.crowded)
        answers = [answer for answer in self.work() if answer.parked]
        self.assertEqual(30, len(answers))
        self.assertTrue(all(answer.found for answer in answers))

    def test_no_more_parked_than_requests(self):
        self.searches._parked_max = 3
        results = []
        for _ in range(5):
            space = self.space()
            for at, content in enumerate((A, B)):
                space.map(TEXT + at * PAGE, content)
                result = self.fetch(space, TEXT + at * PAGE)
            results.append(result)
        self.assertEqual(3, self.searches.parked)
        # In a process of its own it is found in any case.
        self.assertTrue(all(results))

    def test_give_up(self):
        space = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            space.map(gva, content)
            self.fetch(space, gva)
        self.searches.step(self.now)
        self.searches.give_up(self.now)
        [answer] = self.searches.answers()
        self.assertTrue(answer.found)
        self.assertIsNone(self.searches.due(self.now + 9))
        # Nothing will be read, so nothing waits for it.
        other = self.space()
        for gva, content in ((TEXT, A), (TEXT + PAGE, B)):
            other.map(gva, content + b'2')
            decided = self.fetch(other, gva)
        self.assertEqual([0], [found.rule for found in decided])
        self.assertIsNone(self.searches.due(self.now + 9))


class PartialTest(TestCase):
    """No fetch waits."""

    rules = (('all of them', A, B),)

    def test_string_that_is_never_fetched(self):
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + 60 * PAGE, B, executable=False, writable=False)
        self.assertIs(False, self.fetch(space, TEXT))
        self.assertEqual([], self.work())
        [answer] = self.idle()
        self.assertFalse(answer.parked)
        self.assertEqual([TEXT, TEXT + 60 * PAGE], self.places(answer.found))
        # Told once, as long as there is nothing new.
        self.fetch(space, TEXT)
        self.assertEqual([], [answer for answer in self.idle()
                              if not answer.parked])

    def test_string_across_pages_that_are_never_fetched(self):
        space = self.space()
        space.map(TEXT, A)
        for cut in range(1, len(B)):
            space.map(TEXT + 2 * PAGE, B[:cut].rjust(PAGE))
            space.map(TEXT + 3 * PAGE, B[cut:])
            self.fetch(space, TEXT)
            space.map(TEXT, A + bytes([cut]))
            self.fetch(space, TEXT)
            self.assertIn(True, [
                bool(answer.found) for answer in self.idle()], cut)

    def test_what_nobody_executes_is_no_match(self):
        self.rules = ('all of them', A, B), ('all of them', B, C)
        self.setUp()
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + PAGE, B + C)
        self.fetch(space, TEXT)
        [answer] = self.idle()
        self.assertEqual('R0', answer.found[0].match.rule)
        self.assertEqual([(0, True)], self.engine.confirms)

    def test_pages_that_programs_cannot_reach(self):
        space = self.space()
        space.map(TEXT, A)
        space.map(TEXT + PAGE, B, user=False)
        self.fetch(space, TEXT)
        self.assertEqual([], self.idle())

    def test_as_many_pages_as_allowed(self):
        self.settings = deep.Settings(pages=5)
        self.setUp()
        space = self.space()
        space.map(TEXT, A)
        gpas = [space.map(TEXT + number * PAGE, b'\1')
                for number in range(1, 9)]
        self.fetch(space, TEXT)
        del self.memory.reads[:]
        self.idle()
        self.assertEqual(gpas[:5], [
            gpa for gpa in self.memory.reads if gpa in gpas])
        self.assertEqual(1, self.counts.cut)

    def test_process_that_is_gone(self):
        space = self.space()
        space.map(TEXT, A)
        self.fetch(space, TEXT)
        self.memory.pages[space.cr3][:] = bytes(PAGE)
        self.assertEqual([], self.idle())
        other = self.space()
        other.map(TEXT, A)
        self.fetch(other, TEXT)
        self.assertEqual([], self.idle())

    def test_not_before_it_is_quiet(self):
        space = self.space()
        for number in range(5):
            space.map(TEXT + number * PAGE, A + bytes([number]))
            self.fetch(space, TEXT + number * PAGE)
            self.now += 0.04
            self.assertIsNone(self.searches.step(self.now))
        self.assertEqual([], self.idle())
        self.assertEqual(1, self.counts.scans)

    def test_no_more_often_than_allowed(self):
        for _ in range(50):
            space = self.space()
            space.map(TEXT, A)
            self.fetch(space, TEXT)
        begin = self.now
        while (due := self.searches.due(self.now)) is not None:
            self.now += due
            self.work()
        self.assertEqual(50, self.counts.scans)
        self.assertGreater(self.now - begin, 4.8)

    def test_many_address_spaces(self):
        for number in range(300):
            request = fragments.request(
                TEXT, A.ljust(PAGE, b'\0'), cr3=number << 12, gpa=0x1000)
            self.searches.consider(
                request, {base.Fragment(0, 0)}, False, self.now)
        self.assertEqual(64, len(self.searches._pending))
        self.assertEqual(300 - 64, self.accumulator.dropped)

    def test_parked_goes_first(self):
        one, two = self.space(), self.space()
        one.map(TEXT, A)
        for number in range(1, 200):
            one.map(TEXT + number * PAGE, b'\1')
        self.fetch(one, TEXT)
        self.now += 1
        for _ in range(9):
            wanted = self.searches.step(self.now)
            self.searches.feed(wanted, self.memory.read(wanted))
        two.map(TEXT, A)
        two.map(TEXT + PAGE, B)
        self.fetch(two, TEXT)
        self.fetch(two, TEXT + PAGE)
        reads = len(self.memory.reads)
        while not (answers := self.searches.answers()):
            wanted = self.searches.step(self.now)
            if wanted is not None:
                self.searches.feed(wanted, self.memory.read(wanted))
        self.assertTrue(answers[0].parked)
        self.assertLess(len(self.memory.reads) - reads, 20)

    def test_hostile_tables(self):
        # Tables that are one page: every address is mapped, to that page.
        space = self.space()
        space.map(TEXT, A)
        self.fetch(space, TEXT)
        root = self.memory.pages[space.cr3]
        root[:] = (space.cr3 | 7).to_bytes(8, 'little') * 512
        self.assertEqual([], self.idle())
        self.assertLess(self.counts.pages, 400)


class CopiesTest(TestCase):
    """QEMU that lets nothing be read."""

    reads = False

    def test_while_they_are_fresh(self):
        for later, found in ((1.9, True), (2.1, False)):
            self.setUp()
            space = self.space()
            space.map(TEXT, A)
            space.map(TEXT + PAGE, B)
            self.assertIs(False, self.fetch(space, TEXT))
            self.now += later
            result = self.fetch(space, TEXT + PAGE)
            self.assertEqual(found, bool(result))
            self.assertEqual([], self.idle())
        self.assertEqual([], self.memory.reads[8:])

    def test_not_of_another_process(self):
        one, two = self.space(), self.space()
        gpa = one.map(TEXT, A)
        two.map(TEXT, gpa=gpa)
        two.map(TEXT + PAGE, B)
        self.fetch(one, TEXT)
        self.assertIs(False, self.fetch(two, TEXT + PAGE))

    def test_strings_across_pages(self):
        string = bytes(range(1, 201))
        self.rules = (('all of them', A, string),)
        for cut, whole in itertools.product((1, 100, 199), (True, False)):
            with self.subTest(cut=cut, whole=whole):
                self.setUp()
                space = self.space()
                space.map(TEXT, A)
                space.map(TEXT + 4 * PAGE, string[:cut].rjust(PAGE))
                space.map(TEXT + 5 * PAGE, string[cut:])
                self.fetch(space, TEXT)
                result = self.fetch(space, TEXT + 4 * PAGE,
                                    after=string[cut:].ljust(512, b'\0'))
                self.assertEqual([TEXT, TEXT + 4 * PAGE],
                                 self.places(result))
