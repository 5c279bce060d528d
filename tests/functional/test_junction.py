# SPDX-License-Identifier: Apache-2.0
"""Signatures that lie across the boundary of two pages."""

import hashlib

from tests.functional import base
from tests.functional import place

#: Virtual neighbours, which are none physically: see tests/guest/place.c.
FIRST, SECOND = 4, 5
BOUNDARY = SECOND * place.PAGE
LENGTHS = (2, 3, 5, 16, 64, 255, 511, 512)
#: Shorter ones would be found everywhere without this beside them.
MARK = place.text('beside')
MARKED = 16


def signature(length):
    return hashlib.shake_128(b'junction %d' % length).digest(length)


def cuts(length):
    """How many bytes may lie on the first page."""
    if base.NIGHTLY and length < 100:
        return range(1, length)
    return sorted({1, 2, length // 2, length - 2, length - 1} & set(
        range(1, length)))


def source(length):
    if length >= MARKED:
        return place.rule('J%d' % length, '$s', s=signature(length))
    return place.rule(
        'J%d' % length, '$mark and $s in (%d..511)' % (513 - length),
        s=signature(length), mark=MARK)


class JunctionTest(place.TestCase):

    rules = ''.join(map(source, LENGTHS))

    def parts(self, length, cut):
        parts = {BOUNDARY - cut: signature(length)}
        if length < MARKED:
            parts[BOUNDARY + 100] = MARK
        return parts

    def check(self, worker, match, length, cut):
        """Event and journal tell of a signature at the boundary."""
        self.assertEqual('J%d' % length, match['rule'])
        record = self.record(worker, match)
        self.assertEqual(('junction', True),
                         (record['form'], record['held']))
        [offset] = [each['offset'] for each in record['strings']
                    if each['identifier'] == '$s']
        self.assertEqual(-cut % place.PAGE,
                         (record['start'] + offset) % place.PAGE)
        self.assertIn(signature(length)[:64].hex(), record['bytes'])

    def test_user(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        cases = 0
        for length in LENGTHS:
            for cut in cuts(length):
                for page in (FIRST, SECOND):
                    self.place(machine, self.parts(length, cut),
                               'x%d' % page, 'x%d' % (
                                   FIRST + SECOND - page))
                    self.placed(machine, False, 'signal:11')
                    match = self.match(machine, worker, action='fault', cpl=3)
                    self.check(worker, match, length, cut)
                    cases += 1
        self.assertEqual(cases, machine.query()['matches'])
        # Neither half is one.
        for length in LENGTHS:
            half = length // 2
            for parts in ({BOUNDARY - half: signature(length)[:half]},
                          {BOUNDARY: signature(length)[half:],
                           BOUNDARY + 600: MARK}):
                self.place(machine, parts, 'x%d' % FIRST, 'x%d' % SECOND)
                self.placed(machine, True, 'exit:0')
        self.assertEqual(cases, len(worker.records('match')))

    def test_kernel(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        for length in LENGTHS:
            for cut in {1, length // 2, length - 1}:
                for page in (FIRST, SECOND):
                    self.place(machine, self.parts(length, cut),
                               'x%d' % page, where='k')
                    match = self.match(machine, worker, action='pause',
                                       cpl=0)
                    self.check(worker, match, length, cut)
                    self.wait_status(machine, 'paused')
                    self.release(machine, match, 'run')
                    self.placed(machine, True, 'exit:0')
        self.assertEqual([], self.events(machine, 'PAGE_FETCH_MATCH'))

    def test_neighbour_that_comes_later(self):
        # When its first page ran there was nothing behind it.
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'})
        for cut in (1, 256, 511):
            whole = signature(512)
            self.place(machine, {BOUNDARY - cut: whole[:cut]},
                       'x%d' % FIRST,
                       place.put({BOUNDARY: whole[cut:]}), 'x%d' % SECOND)
            self.placed(machine, False, 'signal:11')
            self.check(worker, self.match(machine, worker, action='fault'),
                       512, cut)
