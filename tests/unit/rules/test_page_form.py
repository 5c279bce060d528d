# SPDX-License-Identifier: Apache-2.0

import unittest

import hypothesis
from hypothesis import strategies
import yara

from virtav_nova.rules import page_form
from virtav_nova.rules import syntax

PAGE = 4096
STRINGS = {
    'a': 'alphaalpha', 'b': 'bravobravo', 'c': 'charlie', 'mz': 'MZ',
    'ab': 'abbaabba'}
PRELUDE = '''
import "pe"
import "math"
private rule Helper {
    strings:
        $ = "helper text"
        $a = "alphaalpha"
    condition: uint16(0) == 0x5a4d and any of them
}
rule Large { condition: filesize > 1KB }
rule Long { strings: $a = "charlie" condition: #a > 1 }
'''


def written(condition, strings=None, prelude=PRELUDE):
    strings = ' '.join('$%s = "%s"' % item
                       for item in (strings or STRINGS).items())
    # Every string has to be used.
    return (f'{prelude}rule Tested : tag {{ meta: author = "me" strings: '
            f'{strings} condition: ({condition}) and (true or any of them) }}')


def rewritten(condition, prelude=PRELUDE):
    text = (f'{prelude}rule Tested : tag other {{ meta: author = "me" '
            'strings: %s condition: %s }' % (' '.join(
                '$%s = "%s"' % item for item in STRINGS.items()), condition))
    source = syntax.parse(text, 'test.yar')
    rule = source.rules[-1]
    assert not rule.unparsed, rule.unparsed
    return page_form.rewrite(source, rule)


def condition_of(form):
    return ' '.join(form.text.split('condition:')[-1].split())[:-1].strip()


class RewriteTest(unittest.TestCase):

    def _assert_form(self, expected, condition, dropped=None):
        form = rewritten(condition)
        self.assertEqual('', form.refused, condition)
        self.assertEqual(expected, condition_of(form), condition)
        if dropped is not None:
            self.assertEqual(dropped, [each.text for each in form.dropped])
        if form.dropped:
            yara.compile(source=form.text)

    def _assert_refused(self, why, condition):
        form = rewritten(condition)
        self.assertEqual('', form.text)
        self.assertRegex(form.refused, why)

    def test_what_means_the_same_stays_as_it_is(self):
        for condition in (
                '$a', 'all of them', '$a and not $b',
                '#a > 2 and @a[1] < @b[1]', '$a at @b + 4',
                '$a in (@b..@b + 100)', 'uint16(@a + 3) == 3 and $a',
                'for any i in (1..#a) : (@b[i] - @a[i] < 10)',
                'for all of ($a, $b) : (# > 2)', '2 of ($a*) or !a == 3'):
            if condition == 'all of them':
                # A magic number is one of them.
                self._assert_form('all of them', condition, ['$mz'])
                continue
            with self.subTest(condition):
                form = rewritten(condition, '')
                self.assertEqual(((), ''), (form.dropped, form.refused))
                self.assertTrue(form.text.startswith('rule Tested : tag'))
                self.assertEqual(condition, condition_of(form))

    def test_headers_and_sizes_are_dropped(self):
        for neutral in (
                'uint16(0) == 0x5A4D', 'filesize < 2MB', 'pe.is_pe',
                'uint32(uint32(0x3C)) == 0x4550', '$mz at 0', '$mz',
                'pe.sections[0].name == ".text"', 'entrypoint > 3',
                'math.entropy(0, filesize) > 7.0', 'filename == "x"',
                'for any s in pe.sections : (s.name == ".text")',
                'for any i in (0..filesize) : (uint8(i) == 3)',
                'not pe.is_dll()', 'not filesize > 3', 'Large',
                '(filesize < 3 or pe.is_pe)', 'defined pe.is_pe',
                'not $b at 3', 'filesize > #b', 'for none of them : ($ at 3)',
                'not (filesize < 3 and $b)', '#b < filesize',
                'pe.imphash() == "x"', '$mz in (0..100)'):
            with self.subTest(neutral):
                self._assert_form('$a', f'{neutral} and $a')
                self._assert_form('$a', f'$a and {neutral}')
                if '$b' not in neutral:
                    self._assert_form('$a', f'$a or ({neutral})')
                    self._assert_refused('no string', neutral)

    def test_cases(self):
        for expected, condition in (
                ('$b', '($a or filesize < 3) and $b'),
                ('$a or $b', '(filesize < 3 or $a) and (pe.is_pe or $b)'),
                ('$a and ($b or $c)', 'Large and $a and ($b or $c)'),
                ('($a and $b) or $c', '($a and $b and Large) or $c'),
                ('$b and (not ($a) or $c)',
                 'Large and $b and (not $a or $c)'),
                ('#a == 0 and $b', 'Large and #a == 0 and $b'),
                ('$b', 'not (filesize < 3 or not $b)'),
                ('$b', '$b and not (@a < @c and filesize > 1)'),
                ('$b', '$b and not ($a at 3 and $c)'),
                ('not ($a) and $b', 'not ($a or filesize < 3) and $b')):
            with self.subTest(condition):
                self._assert_form(expected, condition)

    def test_anchors(self):
        for expected, condition in (
                ('$a', '$a at 0'), ('$a', '$a in (0..1024)'),
                ('$a', '$a at pe.entry_point'), ('$a', '@a < 0x200'),
                ('$a and $b', '@a + @b < 300'),
                ('$a', '@a[2] == filesize - 10'),
                ('#a > 3', '#a in (0..100) > 3'),
                ('any of ($a, $ab)', 'any of ($a, $ab) at 0'),
                ('2 of ($a, $b, $c)', '2 of ($a, $b, $c) in (0..50)'),
                ('all of ($a, $b)', 'for all of ($a, $b) : ($ at 100)'),
                ('any of ($a, $b)', 'for any of ($a, $b) : (@ < 100)'),
                ('for all of ($a, $b) : ($ and # > 2)',
                 'for all of ($a, $b) : (@ < 100 and # > 2)'),
                ('for any i in (1 .. #a) : ($a and @b < @a[i])',
                 'for any i in (1..#a) : (@a[i] < 9 and @b < @a[i])'),
                ('$a', 'for any s in pe.sections : ($a in '
                       '(s.raw_data_offset..100))')):
            with self.subTest(condition):
                self._check_anchor(expected, condition)

    def _check_anchor(self, expected, condition):
        form = rewritten(condition)
        self.assertEqual('', form.refused)
        found = condition_of(form)
        # All strings that are left are "them".
        for names in ('($a, $b, $c)', '($a, $b)', '($a, $ab)'):
            expected = expected.replace(f'of {names}', 'of them')
        self.assertEqual(expected, found)
        self.assertTrue(form.dropped)
        yara.compile(source=form.text)

    def test_sets_shrink(self):
        for expected, condition in (
                ('any of them', '2 of ($mz, $a, $b)'),
                ('2 of them', '3 of ($mz, $a, $b, $c)'),
                ('all of them', 'all of ($mz, $a, $b)'),
                ('all of them', '100% of ($mz, $a, $b)'),
                ('any of them', '50% of ($mz, $a, $b)'),
                ('all of ($a, $a)', '3 of ($mz, $a, $a)'),
                ('$c', 'any of ($mz, $a, $b) and $c'),
                ('any of ($a, $b) and $c', '2 of ($mz, $a, $b) and $c'),
                ('none of ($a) and $c', 'none of ($mz, $a) and $c'),
                ('$c', 'not any of ($mz, $a) and $c'),
                ('#a == 1', '#a == 1 and #mz == 1')):
            with self.subTest(condition):
                self._assert_form(expected, f'Large and {condition}')

    def test_referred_rules_are_taken_in(self):
        self._assert_form(
            'any of ($Helper_anonymous_0, $Helper_a) and $b',
            'Helper and $b')
        self._assert_form('#Long_a > 1', 'Large and Long')
        self._assert_form('not (#Long_a > 1) and $a', 'not Long and $a')
        self._assert_form('#Long_a > 1 and $a',
                          'all of (La*, Lo*) and $a')
        form = rewritten('$a', 'global rule G { strings: $a = "ggg" '
                               'condition: $a and filesize > 3 } ')
        self.assertEqual('$a and $G_a', condition_of(form))
        self.assertTrue(yara.compile(source=form.text).match(
            data='ggg alphaalpha'))

    def test_private_rules_are_refused(self):
        source = syntax.parse(PRELUDE, 'test.yar')
        self.assertRegex(page_form.rewrite(
            source, source.by_name['Helper']).refused, 'private')

    def test_rules_that_cannot_be_understood_are_refused(self):
        source = syntax.parse(
            'rule A { condition: nothing.here } rule B { strings: $a = '
            '"abc" condition: A and $a }', 'test.yar')
        for rule in source.rules:
            self.assertRegex(page_form.rewrite(source, rule).refused,
                             'Unrecognized identifier')

    def test_no_string_logic(self):
        for condition in ('true', 'filesize > 3', 'not $a', 'none of them',
                          '#a < 3 and Large', 'pe.is_pe', 'not Long',
                          '$mz at 0 and filesize < 3MB', 'false'):
            with self.subTest(condition):
                self._assert_refused('no string', condition)

    def test_meta_tags_and_names_are_kept(self):
        form = rewritten('$a and filename == "\\"x\\\\\\n\\xff" and '
                         'filesize < 3')
        match = yara.compile(source=form.text).match(data='alphaalpha')[0]
        self.assertEqual(('Tested', ['tag', 'other'], 'me'),
                         (match.rule, match.tags, match.meta['author']))
        self.assertEqual(
            'filename == "\\"x\\\\\\n\\xff"; filesize < 3',
            match.meta[page_form.META])

    def test_long_meta_is_cut(self):
        form = rewritten('$a and ' + ' and '.join(
            f'filesize > {number}' for number in range(500)))
        meta = yara.compile(source=form.text).match(
            data='alphaalpha')[0].meta[page_form.META]
        self.assertLess(len(meta), 500)

    def test_what_would_grow_without_end_is_refused(self):
        term = '$a'
        for _turn in range(40):
            term = f'(({term} or not $b) and ($c or not $ab))'
        form = rewritten(f'{term} and filesize > 1')
        self.assertRegex(form.refused, 'too involved')
        rules = 'rule R0 { strings: $a = "abcd" condition: $a and #a > 1 }\n'
        for number in range(1, 60):
            rules += ('rule R%d { strings: $a = "abcd" condition: '
                      '(R%d and #a > %d) or (R%d and #a < %d) }\n' % (
                          number, number - 1, number, number - 1, number))
        source = syntax.parse(rules, 'test.yar')
        form = page_form.rewrite(source, source.rules[-1])
        self.assertRegex(form.refused, 'too involved')


NAMES = strategies.sampled_from(['a', 'b', 'c', 'ab', 'mz'])
SETS = strategies.sampled_from([
    'them', '($a*)', '($a, $b)', '($mz, $a)', '($a, $b, $c, $mz)', '($c)'])
QUANTIFIERS = strategies.sampled_from([
    'any', 'all', 'none', '1', '2', '3', '50%', '67%'])
NUMBERS = strategies.sampled_from([0, 1, 2, 3, 100, 4096, 4112, 4200, 8191])
SIGNS = strategies.sampled_from(['<', '<=', '>', '>=', '==', '!='])


def _terms():
    def term(template, *parts):
        return strategies.tuples(*parts).map(lambda each: template % each)

    return strategies.one_of(
        term('$%s', NAMES), term('$%s', NAMES), term('$%s', NAMES),
        term('#%s %s %d', NAMES, SIGNS, strategies.integers(0, 3)),
        term('%s of %s', QUANTIFIERS, SETS),
        term('%s of %s', QUANTIFIERS, SETS),
        term('$%s at %d', NAMES, NUMBERS),
        term('$%s at @%s + %d', NAMES, NAMES, strategies.sampled_from(
            [16, 32, 48])),
        term('$%s in (%d..%d)', NAMES, NUMBERS, NUMBERS),
        term('$%s in (@%s..@%s + 64)', NAMES, NAMES, NAMES),
        term('#%s in (0..%d) %s %d', NAMES, NUMBERS, SIGNS,
             strategies.integers(0, 2)),
        term('@%s %s @%s', NAMES, SIGNS, NAMES),
        term('@%s[%d] %s %d', NAMES, strategies.integers(1, 2), SIGNS,
             NUMBERS),
        term('@%s + 8 %s filesize', NAMES, SIGNS),
        term('%s of %s in (%d..%d)', strategies.sampled_from(
            ['any', 'all', '1', '2']), SETS, NUMBERS, NUMBERS),
        term('for %s of %s : ($ at %d)', QUANTIFIERS, SETS, NUMBERS),
        term('for %s of %s : (# %s 1)', QUANTIFIERS, SETS, SIGNS),
        term('for %s of %s : (@ %s %d and # >= %d)', QUANTIFIERS, SETS,
             SIGNS, NUMBERS, strategies.integers(0, 2)),
        term('for %s i in (1..#%s) : (@%s[i] %s @%s)',
             strategies.sampled_from(['any', 'all', '1', '2']), NAMES,
             NAMES, SIGNS, NAMES),
        term('for %s i in (0..2) : (#%s %s i and filesize %s %d)',
             strategies.sampled_from(['any', 'all', 'none', '2']), NAMES,
             SIGNS, SIGNS, NUMBERS),
        term('uint8(@%s + 1) %s 0x6c', NAMES, SIGNS),
        term('filesize %s %d', SIGNS, NUMBERS),
        strategies.sampled_from([
            'uint16(0) == 0x5a4d', 'uint16(0) != 0x5a4d', 'pe.is_pe',
            'true', 'false', 'Helper', 'Large', 'Long', 'any of (L*)',
            'all of (Large, Helper)', 'pe.number_of_sections > 3',
            'not pe.is_dll()', 'defined pe.number_of_sections',
            'filename == "x"', 'filename matches /y/',
            'uint8(@a + 3) == 0x68', '!a == 10']))


def _composed(terms):
    pairs = strategies.tuples(
        terms, strategies.sampled_from(['and', 'or']), terms)
    return strategies.one_of(
        pairs.map(lambda each: '(%s %s %s)' % each),
        pairs.map(lambda each: '(%s %s %s)' % each),
        terms.map(lambda each: f'not ({each})'))


CONDITIONS = strategies.recursive(_terms(), _composed, max_leaves=8)


#: A header, pages up to the one with the strings, what is in which of its
#: slots of 16 bytes, bytes after it.
FILES = strategies.tuples(
    strategies.sampled_from(['MZ', '']), strategies.integers(1, 2),
    strategies.dictionaries(
        strategies.sampled_from([0, 1, 2, 3, 6, 7, 245, 255]),
        strategies.sampled_from([
            'alphaalpha', 'bravobravo', 'charlie', 'abbaabba',
            'helper text']), max_size=6),
    strategies.sampled_from([0, 4096]))


def _page(slots):
    page = bytearray(PAGE)
    for slot, text in slots.items():
        page[slot * 16:slot * 16 + len(text)] = text.encode()
    return bytes(page)


class SoundTest(unittest.TestCase):

    @hypothesis.settings(
        max_examples=200, deadline=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(CONDITIONS, strategies.lists(FILES, min_size=8))
    def test_what_matched_for_the_strings_of_a_page(self, condition, files):
        text = written(condition)
        externals = {'filename': 'x'}
        try:
            original = yara.compile(source=text, externals=externals)
        except yara.SyntaxError:
            hypothesis.assume(False)
        source = syntax.parse(text, 'test.yar')
        rule = source.by_name['Tested']
        self.assertEqual('', rule.unparsed)
        form = page_form.rewrite(source, rule)
        compiled = yara.compile(source=form.text) if form.text else None

        def matched(rules, data):
            return any(match.rule == 'Tested'
                       for match in rules.match(data=data))

        for header, pages, slots, rest in files:
            before = header.encode().ljust(PAGE * pages, b'\0')
            page, after = _page(slots), bytes(rest)
            if matched(original, before + page + after) and not matched(
                    original, before + bytes(PAGE) + after):
                hypothesis.event('matched for its strings')
                self.assertTrue(form.text, form.refused)
                self.assertTrue(matched(compiled, page), form.text)
            if compiled and rule.text == form.text:
                self.assertEqual(matched(original, page),
                                 matched(compiled, page))
