# SPDX-License-Identifier: Apache-2.0
"""What is this engine's own; that it is exact is in ``test_exact``."""

from tests.unit import base
from virtav_nova import exception
from virtav_nova.engines import base as engines
from virtav_nova.engines import groups
from virtav_nova.engines import sources
from virtav_nova.engines import twostage
from virtav_nova.engines import yara
from virtav_nova.rules import directory


def compiled(*texts, kind=twostage.TwostageEngine, **options):
    """Compile rules given as sources, named ``0.yar`` and so on."""
    return kind.compile(
        [directory.RuleFile(f'{number}.yar', text.encode())
         for number, text in enumerate(texts)],
        engines.EngineOptions(**options))


def rules(count, condition='all of them'):
    """Make rules of two strings each."""
    return '\n'.join(
        f'rule r{number} {{ strings: $a = "{number:05} at first" '
        f'$b = "{number:05} in the end" condition: {condition} }}'
        for number in range(count))


def parts(engine, page):
    """Tell which parts of the rules are evaluated for a page."""
    seen = []
    engine.progress = seen.append
    engine.scan(page)
    engine.progress = None
    return seen


class TwostageTest(base.TestCase):

    def test_evaluates_only_what_may_hold(self):
        engine = compiled(rules(100))
        about = engine.describe()
        self.assertEqual(100, about['rules'])
        self.assertEqual(0, about['rules_always_evaluated'])
        self.assertEqual(7, about['groups'])
        self.assertEqual([], parts(engine, bytes(4096)))
        self.assertEqual([], parts(engine, b'00020 at first'))
        self.assertEqual(
            [1], parts(engine, b'00020 at first 00020 in the end'))
        self.assertEqual(
            [0, 6], parts(engine, b'00099 in the end 00099 at first '
                                  b'00003 at first 00003 in the end'))

    def test_rules_without_a_string_are_always_evaluated(self):
        engine = compiled(
            'rule a { condition: filesize == 7 }' + rules(3),
            'rule b { strings: $a = "ab" condition: $a }')
        self.assertEqual(2, engine.describe()['rules_always_evaluated'])
        self.assertEqual(['0.yar:a', '1.yar:b'],
                         engine.describe()['always_evaluated'])
        self.assertEqual([0], parts(engine, bytes(4096)))
        page = b'00001 at first, 00001 in the end, ab'
        self.assertEqual(['r1', 'b'],
                         [match.rule for match in engine.scan(page)])
        self.assertEqual(['a'], [match.rule for match in engine.scan(
            bytes(7))])

    def test_order_is_that_of_the_rules(self):
        engine = compiled(
            'rule z { strings: $a = "some string" condition: $a }'
            'rule a { condition: true }',
            'rule b { strings: $a = "some other" condition: $a }'
            'rule y { condition: true }')
        self.assertEqual(
            [('0.yar', 'z'), ('0.yar', 'a'), ('1.yar', 'b'), ('1.yar', 'y')],
            [(match.namespace, match.rule) for match in engine.scan(
                b'some other, some string')])

    def test_common_strings(self):
        common = b'common string'
        rule = 'strings: $a = "common string" $b = "rare string" condition:'
        # Half of the pages have it: of no use.
        sample = [common + bytes(4000), bytes(4096)] * 500
        engine = compiled(f'rule a {{ {rule} all of them }}',
                          f'rule b {{ {rule} any of them }}', sample=sample)
        self.assertEqual(['1.yar:b'], engine.describe()['always_evaluated'])
        self.assertEqual((), engine.examine(common).fragments)
        # It counts as found where strings lie apart.
        fragment, = engine.examine(b'rare string').fragments
        self.assertEqual(('0.yar', 'a'), engine.rule_name(fragment.rule))
        self.assertTrue(engine.complete(
            fragment.rule, frozenset({fragment.string})))
        self.assertEqual([0], parts(engine, common))
        self.assertEqual([0, 1], parts(engine, b'rare string'))
        # A few have it: better to look than to evaluate always.
        sample = [common + bytes(4000)] * 10 + [bytes(4096)] * 990
        engine = compiled(f'rule a {{ {rule} any of them }}', sample=sample)
        self.assertEqual([], engine.describe()['always_evaluated'])
        self.assertEqual((), engine.examine(common).fragments)
        self.assertEqual([], parts(engine, bytes(4096)))
        self.assertEqual(1, len(engine.scan(common)))

    def test_takes_another_piece_of_a_common_string(self):
        rule = ('rule a { strings: $a = { 0102030405060708090a0b0c [4] '
                'f1 f2 f3 f4 f5 f6 f7 f8 f9 } condition: $a }')
        sample = [bytes(range(1, 13)) + bytes(4084)] * 500
        engine = compiled(rule, sample=sample)
        self.assertEqual([], engine.describe()['always_evaluated'])
        self.assertEqual([], parts(engine, sample[0]))
        self.assertEqual(1, len(engine.scan(
            bytes(range(1, 13)) + bytes(4) + bytes(range(0xf1, 0xfa)))))

    def test_references_stay_together(self):
        text = """
            private rule p { strings: $a = "private part" condition: $a }
            rule q { condition: p }
            rule r { strings: $a = "another part" condition: $a and q }
            rule s { condition: any of (q, r) }
            """

        class Single(twostage.TwostageEngine):
            group_rules = 1

        engine = compiled(text, kind=Single)
        reference = compiled(text, kind=yara.YaraEngine)
        self.assertEqual(3, engine.describe()['groups'])
        for page in (b'private part', b'another part',
                     b'private part, another part'):
            self.assertEqual(reference.scan(page), engine.scan(page))
        self.assertEqual([], parts(engine, b'another part'))

    def test_a_file_that_cannot_be_cut_is_taken_whole(self):
        # To libyara the first is a module, and to the second a rule.
        text = ('rule math { strings: $a = "first part" condition: $a }'
                'rule b { condition: math }'
                'import "math"'
                'rule c { condition: math.max(1, 2) == 2 }')
        try:
            reference = compiled(text, kind=yara.YaraEngine)
        except exception.RuleError:
            self.skipTest('libyara takes it for an error')
        engine = compiled(text, rules(40))
        self.assertEqual(3, engine.describe()['rules_always_evaluated'])
        for page in (b'first part', bytes(10)):
            self.assertEqual(reference.scan(page), engine.scan(page))

    def test_what_does_not_compile_apart_is_taken_whole(self):
        text = rules(40) + 'rule x { strings: $a = "abcdef" condition: $a }'

        class Careless(groups.Cutter):
            def _text(self, namespace, names):
                found = super()._text(namespace, names)
                return found.replace('rule r0', 'rule r0 r0')

        self.addCleanup(setattr, groups, 'Cutter', groups.Cutter)
        groups.Cutter = Careless
        with self.assertLogs(groups.LOG, 'ERROR'):
            engine = compiled(text)
        page = b'00001 at first, 00001 in the end, abcdef'
        self.assertEqual(['r1', 'x'],
                         [match.rule for match in engine.scan(page)])

    def test_suspects_are_evaluated_one_by_one(self):
        engine = compiled(rules(20), rules(5))
        page = b'00003 at first 00003 in the end'
        before = engine.scan(page)
        self.assertEqual([0, 1], parts(engine, page))
        engine.suspect(0)
        seen = parts(engine, page)
        self.assertEqual(17, len(seen))
        self.assertEqual(1, seen.count(1))
        self.assertEqual(
            [('0.yar', f'r{number}') for number in range(16)],
            [engine.rule_name(part) for part in seen[:16]])
        self.assertEqual(before, engine.scan(page))
        engine.suspect(seen[0])
        self.assertEqual(seen, parts(engine, page))

    def test_fragments(self):
        engine = compiled(
            rules(3, '2 of them') + 'rule one { strings: $a = "at first" '
            '$b = "nothing like it" condition: any of them }')
        self.assertEqual(3, engine.describe()['rules_accumulated'])
        self.assertEqual(
            (engines.Fragment(1, 0), engines.Fragment(2, 1)),
            engine.examine(b'00001 at first 00002 in the end').fragments)
        self.assertEqual(('0.yar', 'r1'), engine.rule_name(1))
        self.assertFalse(engine.complete(1, frozenset({0})))

    def test_fragments_of_one_way_of_several(self):
        engine = compiled('rule a { strings: $a = "enough alone" '
                          '$b = "first part" $c = "second part" '
                          'condition: $a or ($b and $c) }')
        found = [engine.examine(page).fragments
                 for page in (b'first part', b'second part')]
        self.assertEqual([1, 1], [len(each) for each in found])
        strings = frozenset(each.string for each, in found)
        self.assertTrue(engine.complete(0, strings))
        for string in strings:
            self.assertFalse(engine.complete(0, frozenset({string})))

    def test_what_stands_at_a_place_does_not_count_apart(self):
        engine = compiled('rule a { strings: $a = "first part" '
                          '$b = "second part" condition: '
                          'uint16(0) == 0x5A4D and all of them }')
        first, = engine.examine(b'MZ first part').fragments
        second, = engine.examine(b'second part').fragments
        self.assertTrue(engine.complete(
            0, frozenset({first.string, second.string})))
        self.assertIsNotNone(
            engine.confirm(0, b'MZ first part, second part'))
        self.assertIsNone(engine.confirm(0, b'first part, second part'))

    def test_fragments_beside_another_way(self):
        # The other way is evaluated with each page, and never apart.
        for other in ('pe.is_dll()', 'filesize == 5000'):
            engine = compiled(
                'import "pe" rule a { strings: $a = "first part" '
                f'$b = "second part" condition: all of them or {other} }}')
            found = [engine.examine(page).fragments
                     for page in (b'first part', b'second part')]
            if other.startswith('filesize'):
                # All of it is taken as true.
                self.assertEqual([(), ()], found)
                continue
            self.assertEqual([1, 1], [len(each) for each in found])
            self.assertTrue(engine.complete(0, frozenset(
                each.string for each, in found)))

    def test_strings_of_other_rules_count(self):
        engine = compiled(
            'private rule p { strings: $a = "first part" condition: $a }'
            'rule q { strings: $a = "second part" condition: $a and p }')
        found = [engine.examine(page).fragments
                 for page in (b'first part', b'second part')]
        self.assertEqual([1, 1], [len(each) for each in found])
        self.assertTrue(engine.complete(0, frozenset(
            each.string for each, in found)))
        self.assertEqual(
            'q', engine.confirm(0, b'first part second part').rule)

    def test_errors_are_those_of_the_reference(self):
        for text in ('rule a {', 'rule a { condition: x }',
                     'include "x"\nrule a { condition: true }',
                     'rule a { condition: true } rule a {condition: true}'):
            messages = set()
            for kind in (twostage.TwostageEngine, yara.YaraEngine):
                with self.assertRaises(exception.RuleError) as caught:
                    compiled(rules(2), text, kind=kind)
                messages.add(str(caught.exception))
            self.assertEqual(1, len(messages), messages)

    def test_no_rules(self):
        engine = compiled('', '// nothing\n')
        self.assertEqual(0, engine.describe()['rules'])
        self.assertEqual(([], ()), engine.examine(bytes(4096)))


class QuarantineTest(base.TestCase):

    def _left(self, text, *names):
        file = directory.RuleFile('a', text.encode())
        return sources.texts([file], frozenset(
            ('a', name) for name in names))['a']

    def test_leaves_out_rules_and_those_that_refer_to_them(self):
        text = ('rule a { condition: true }\nrule b {\n condition: a }\n'
                'rule c { condition: b or true }\n'
                'rule d { condition: true }')
        self.assertEqual('\n\n\n\nrule d { condition: true }',
                         self._left(text, 'a'))
        self.assertEqual(text, self._left(text, 'x'))
        self.assertEqual(text, sources.texts(
            [directory.RuleFile('a', text.encode())],
            frozenset({('b', 'a')}))['a'])

    def test_a_comment_that_looks_the_same(self):
        rule = 'rule a { condition: true }'
        self.assertEqual(f'/*\n{rule}\n*/\n',
                         self._left(f'/*\n{rule}\n*/\n{rule}', 'a'))
        with self.assertRaisesRegex(exception.RuleError, '^a:1: rule a'):
            self._left(f'/* {rule} */ {rule}', 'a')
