# SPDX-License-Identifier: Apache-2.0

from tests.unit import base
from virtav_nova.engines import index
from virtav_nova.rules import necessary
from virtav_nova.rules import patterns
from virtav_nova.rules import syntax

E = patterns.Expression


class DatabaseTest(base.TestCase):

    def test_finds_each_once(self):
        database = index.Database([E('abc'), E('ABC', caseless=True),
                                   E('^b.c'), E('\\x00\\xff')])
        self.assertEqual([0, 1], sorted(database.scan(b'b\n abc abc')))
        self.assertEqual([1, 2], sorted(database.scan(
            memoryview(b'b\ncABC'))))
        self.assertEqual([3], database.scan(b'\0\xff'))
        self.assertEqual([], database.scan(b''))
        self.assertLess(0, database.size)

    def test_differences(self):
        # That of "ab" and "bc" is the same: each is the other, coded.
        database = index.Database([E('ab'), E('\\x03\\x01\\x07',
                                              differs=True)])
        for key in range(256):
            page = bytes(byte ^ key for byte in b'abcd')
            self.assertEqual([0, 1] if not key else [1],
                             database.scan(page))

    def test_nothing_to_find(self):
        database = index.Database([])
        self.assertEqual([], database.scan(b'abc'))
        self.assertEqual(0, database.size)

    def test_what_hyperscan_does_not_take(self):
        # It finds more than a back reference means, and no half of a group.
        bad = E('(abc')
        database = index.Database([E('xyz'), bad, E('(a|b)\\1'), E('z')])
        self.assertEqual({bad}, database.broken)
        self.assertEqual([0, 3], sorted(database.scan(b'xyz')))
        self.assertIn(2, database.scan(b'aa'))


class ChooseTest(base.TestCase):

    def test_of_many_pages(self):
        source = syntax.parse(
            'rule r { strings: $a = "common one" $b = "rare one" '
            '$c = "ab" $d = "seen at times" condition: all of them }', 'x')
        keys = [index.Key('x', necessary.String('r', number))
                for number in range(4)]
        fixed = index.Key('', necessary.Fixed(0, b'MZ'))
        sample = ([b'common one'] * 100 + [b'seen at times'] * 10
                  + [b'rare one'] + [bytes(10)] * 889)
        chosen = index.choose({'x': source}, [*keys, fixed], sample)
        self.assertEqual({keys[1]: True, keys[3]: False, fixed: True},
                         {key: how.rare for key, how in chosen.items()})

    def test_file_that_is_taken_whole(self):
        key = index.Key('x', necessary.String('r', 0))
        self.assertEqual({}, index.choose({'x': None}, [key], []))
