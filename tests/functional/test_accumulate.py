# SPDX-License-Identifier: Apache-2.0
"""Rules whose strings lie on several pages."""

import random
import time

from tests.functional import place

PAGE = place.PAGE
MOST = 8
MARK = place.text('mark')


def strings(number):
    return [place.text('split', number, at) for at in range(number)]


def source(number):
    return place.rule('Split%d' % number, 'all of them', **{
        's%d' % at: each for at, each in enumerate(strings(number))})


class TestCase(place.TestCase):

    rules = ''.join(map(source, range(2, MOST + 1))) + place.rule(
        'Mark', '$mark', mark=MARK)

    def accumulated(self, worker):
        """Records of matches over several pages."""
        return [record for record in worker.records('match')
                if record['form'] == 'accumulated']

    def spread(self, number, seed=0):
        """Strings of a rule on pages of their own.

        :returns: bytes by their offset, and words that run the pages in
            some order
        """
        generator = random.Random(seed)
        pages = generator.sample(range(16), number)
        parts = {page * PAGE + generator.choice((0, 1000, 3900)): each
                 for page, each in zip(pages, strings(number), strict=True)}
        generator.shuffle(pages)
        return parts, ['x%d' % page for page in pages]


class FoundTest(TestCase):

    def check(self, worker, match, number):
        self.assertEqual('Split%d' % number, match['rule'])
        record = self.record(worker, match)
        self.assertEqual(('accumulated', True),
                         (record['form'], record['held']))
        pages = record['pages']
        self.assertEqual(number, len({page['gva'] for page in pages}))
        self.assertEqual(number, len({page['gpa'] for page in pages}))
        self.assertIn(match['gva'] & -PAGE, [page['gva'] for page in pages])
        return pages

    def test_user(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        scattered = False
        for number in range(2, MOST + 1):
            for seed in range(3):
                parts, words = self.spread(number, seed)
                self.place(machine, parts, *words)
                self.placed(machine, False, 'signal:11')
                match = self.match(machine, worker, action='fault', cpl=3)
                pages = self.check(worker, match, number)
                order = sorted(pages, key=lambda page: page['gva'])
                scattered |= order != sorted(
                    pages, key=lambda page: page['gpa'])
        self.assertTrue(scattered)
        self.assertEqual(0, machine.query()['states']['unscanned'])

    def test_kernel(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        for number in (2, 5, MOST):
            parts, words = self.spread(number)
            self.place(machine, parts, *words, where='k')
            match = self.match(machine, worker, action='pause', cpl=0)
            self.check(worker, match, number)
            self.wait_status(machine, 'paused')
            self.release(machine, match, 'run')
            self.placed(machine, True, 'exit:0')

    def test_again(self):
        # Pages of a file run in the next process without being fetched, as
        # they were found clean; only the last one was not.
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        for number in (2, MOST):
            parts, words = self.spread(number)
            self.place(machine, parts, *words, where='f')
            for turn in range(3):
                if turn:
                    self.place(machine, {}, *words, where='f')
                self.placed(machine, False, 'signal:11')
                self.check(worker, self.match(
                    machine, worker, action='fault', cpl=3), number)

    def test_several_processors(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'}, smp=2)
        for seed in range(5):
            parts, words = self.spread(3, seed)
            self.place(machine, parts, *words)
            self.placed(machine, False, 'signal:11')
            self.check(worker, self.match(
                machine, worker, action='fault', cpl=3), 3)

    def test_without_reading(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block',
                                       'deep-scan': 'off'})
        parts, words = self.spread(4)
        self.place(machine, parts, *words)
        self.placed(machine, False, 'signal:11')
        self.check(worker, self.match(
            machine, worker, action='fault', cpl=3), 4)


class NotFoundTest(TestCase):

    def test_two_processes(self):
        # Both are there all the time.
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        for number in (2, 3, 6):
            each = strings(number)
            half = number // 2
            self.place(
                machine,
                {at * PAGE: part for at, part in enumerate(each[:half])},
                *('x%d' % at for at in range(half)), '/',
                place.put({at * PAGE: each[at]
                           for at in range(half, number)}),
                *('x%d' % at for at in range(half, number)), 's500')
            self.placed(machine, True, 'exit:0')
        self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))
        self.assertEqual([], worker.records('match'))

    def test_address_space_that_is_used_again(self):
        # A page that matches by itself tells whose CR3 is whose.
        worker = self.worker(accumulate_wait_ms=900)
        machine = self.booted(worker, {'on-match': 'alert'})
        seen = ({}, {})
        again = 0
        for turn in range(40):
            # Two address spaces take turns.
            half = turn // 2 % 2
            self.place(machine, {
                half * PAGE: strings(2)[half], 9 * PAGE: MARK + bytes([turn])
            }, 'x%d' % half, 'x9')
            self.placed(machine, True, 'exit:0')
            match = self.match(machine, rule='Mark')
            # Within the time that copies count, too.
            again += time.monotonic() - seen[1 - half].get(
                match['cr3'], 0) < 1
            seen[half][match['cr3']] = time.monotonic()
        self.assertGreater(again, 3)
        self.assertEqual([], self.accumulated(worker))


class DeepScanTest(TestCase):

    def test_string_that_is_never_fetched(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        first, second = strings(2)
        self.place(machine, {PAGE: first, 11 * PAGE: second,
                             14 * PAGE: b'harmless'},
                   'r11', 'x1', 's2000', 'x14')
        self.placed(machine, False, 'signal:11')
        found, stopped = self.accumulated(worker)
        self.assertEqual([('Split2', False), ('Split2', True)], [
            (record['rule'], record['held'])
            for record in (found, stopped)])
        self.assertEqual(10 * PAGE, found['pages'][1]['gva']
                         - found['pages'][0]['gva'])
        # It was found too late for the first, and in time for the next.
        self.assertEqual(13 * PAGE, stopped['gva'] // PAGE * PAGE
                         - found['gva'] // PAGE * PAGE)
        self.assertEqual(found['cr3'], stopped['cr3'])
