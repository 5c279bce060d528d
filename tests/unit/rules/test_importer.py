# SPDX-License-Identifier: Apache-2.0

import os
import resource

from oslo_config import cfg
import yara

from tests.unit import base
from tests.unit.rules import test_sample
from virtav_nova import conf as virtav_conf
from virtav_nova import exception
from virtav_nova.engines import yara as yara_engine
from virtav_nova.rules import importer


def rule(name, strings='$a = "%s is harmless text"', condition='$a',
         head='', meta=''):
    strings = strings % name if '%s' in strings else strings
    return (f'{head}rule {name} {{ {meta} strings: {strings} '
            f'condition: {condition} }}\n')


class TestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.conf = cfg.ConfigOpts()
        virtav_conf.register_opts(self.conf)
        self.conf([])
        self.stages = []
        self.rules = self.top / 'rules'
        self.rules.mkdir()

    def set(self, **options):
        for name, value in options.items():
            self.conf.set_override(name, value, 'virtav_rules')
            self.addCleanup(self.conf.clear_override, name, 'virtav_rules')

    def importer(self):
        return importer.Importer(
            self.conf.virtav_rules, self.conf.virtav_worker,
            yara_engine.YaraEngine,
            lambda stage, done, total: self.stages.append(
                (stage, done, total)))

    def lint(self, **files):
        """Try files.

        :param files: name with ``_`` for ``.`` -> content
        :returns: state and reason of each rule by its name, by that of the
            file where there is no rule
        """
        for name, content in files.items():
            self.write(f'rules/{name.replace("_", ".")}', content)
        entries = self.importer().lint(importer.gather([str(self.rules)]))
        return {entry.rule or entry.file: entry for entry in entries}

    def run_import(self, *paths, name=None, others=(), origins=None):
        return self.importer().run(
            importer.gather([str(path) for path in paths] or
                            [str(self.rules)], name), others, origins)

    def assert_states(self, expected, entries):
        self.assertEqual(expected, {
            name: entry.state for name, entry in entries.items()})


class GateTest(TestCase):

    def test_good_rules(self):
        outcome_of = self.lint(a_yar=rule('A', meta=(
            'meta: author = "me" severity = 80 mitre = "T1059"')))
        entry = outcome_of['A']
        self.assertEqual(('as-written', '', 0, 'rules', 'a.yar', 1), (
            entry.state, entry.reason, entry.hits, entry.source,
            entry.file, entry.line))
        self.assertEqual('rules/a.yar', entry.namespace)
        self.assertEqual(('me', 'high', ['T1059']), (
            entry.about['author'], entry.about['severity'],
            entry.about['mitre']))
        self.assertLess(entry.us, 50)
        self.assertEqual('', entry.original)

    def test_page_form(self):
        found = self.lint(a_yar='import "pe"\n' + rule(
            'A', condition='uint16(0) == 0x5a4d and $a and pe.is_dll()'))
        entry = found['A']
        self.assertEqual('page-form', entry.state)
        self.assertEqual(2, len(entry.dropped))
        self.assertIn('pe.is_dll', entry.original)
        self.assertNotIn('pe.is_dll()\n', entry.text.split('condition')[-1])
        rules = yara.compile(source=entry.text)
        self.assertTrue(rules.match(data='A is harmless text'))

    def test_one_bad_rule_never_costs_the_others(self):
        good = rule('Good1') + '%s' + rule('Good2')
        for name, bad in (
                ('unended', 'rule Bad { strings: $a = "no end\n'
                            ' condition: $a }\n'),
                ('unknown', rule('Bad', condition='$a and $b')),
                ('include', 'include "/etc/passwd"\n'),
                ('nul', 'rule Bad { strings: $a = "x\0y" condition: $a }\n'),
                ('latin', b'rule Bad { strings: $a = "caf\xe9" '
                          b'condition: $a }\n'.decode('latin-1')),
                ('name', 'rule \x1b[31mBad { condition: true }\n'),
                ('twice', rule('Good1', '$a = "another text"')),
                ('regex', rule('Bad', '$a = /a(/')),
                ('cert', rule('Bad', condition='filesize > 10'))):
            with self.subTest(name):
                content = (good % bad).encode(
                    'latin-1' if name == 'latin' else 'utf-8')
                entries = self.lint(a_yar=content)
                self.assertEqual('as-written', entries['Good2'].state)
                refused = [entry for entry in entries.values()
                           if entry.state == 'refused']
                self.assertEqual(1, len(refused) or name == 'twice')
                for entry in refused:
                    self.assertTrue(entry.reason)

    def test_lines_are_those_of_the_file(self):
        entries = self.lint(a_yar='\n\n' + rule('A') + 'rule B { junk }\n\n'
                            + rule('C'))
        self.assertEqual([3, 4, 6],
                         [entry.line for entry in entries.values()])

    def test_noisy(self):
        entries = self.lint(a_yar=rule('Bad', '$a = { 48 89 e5 }')
                            + rule('Good'))
        self.assertEqual('quarantined', entries['Bad'].state)
        self.assertRegex(entries['Bad'].reason,
                         r'^noisy: matches \d+ of 1000 harmless pages$')
        self.assertGreater(entries['Bad'].hits, 50)
        self.assertEqual('as-written', entries['Good'].state)

    def test_slow(self):
        entries = self.lint(a_yar=''.join(
            rule(f'Good{number}') for number in range(50))
            + rule('Bad', '$a = /[0-9a-fA-F]{256}/'))
        self.assertEqual('quarantined', entries['Bad'].state)
        self.assertIn('slow: ', entries['Bad'].reason)
        self.assertEqual(
            {'as-written'},
            {entry.state for name, entry in entries.items()
             if name != 'Bad'})

    def test_slow_for_one_page_that_a_guest_may_make(self):
        self.set(slow_us=1000000, noisy_pages=1000)
        entries = self.lint(
            a_yar=rule('Loop', '$a = { 00 }',
                       '$a and for all i in (1..1000000000) : (#a + i != 5)'),
            b_yar=rule('Good'))
        self.assertIn('for one page', entries['Loop'].reason)
        self.assertEqual('quarantined', entries['Loop'].state)
        self.assertEqual('as-written', entries['Good'].state)

    def test_own_sample(self):
        text = b'text of a program of the operator'
        head = test_sample.elf((1, 5, 4096, 4096)).ljust(4096)
        self.write('own/program', head + text.ljust(4096))
        rules = rule('A', '$a = "of the operator"')
        self.assert_states({'A': 'as-written'}, self.lint(a_yar=rules))
        self.set(sample=[str(self.top / 'own')])
        self.assert_states({'A': 'quarantined'}, self.lint(a_yar=rules))

    def test_duplicates(self):
        entries = self.lint(
            a_yar=rule('A', '$a = "some text"'),
            b_yar=rule('B', '$a  =  "some text" // the same\n',
                       meta='meta: author = "b"'))
        self.assert_states({'A': 'as-written', 'B': 'duplicate'}, entries)
        self.assertEqual('the same as rules/a.yar:A', entries['B'].reason)

    def test_private_rules_are_taken_in(self):
        entries = self.lint(a_yar=rule('P', head='private ')
                            + rule('A', condition='$a and P'))
        self.assertEqual('private', entries['P'].state)
        self.assertTrue(entries['A'].in_force)
        rules = yara.compile(source=entries['A'].text)
        self.assertFalse(rules.match(data='A is harmless text'))
        self.assertTrue(rules.match(
            data='A is harmless text, P is harmless text'))

    def test_warnings(self):
        entries = self.lint(a_yar=rule('A', '$a = { 11 22 ?? 33 }')
                            + rule('B') + rule('C', '$a = "%s"' % (
                                'long ' * 1000)))
        self.assertRegex(entries['A'].warnings[0], '^short: ')
        self.assertEqual((), entries['B'].warnings)
        self.assertRegex(entries['C'].warnings[0], '^never on one page: ')

    def test_hostile_text_is_made_printable(self):
        entries = self.lint(a_yar=rule('A', meta=(
            'meta: author = "\x1b[2J\u202eevil"')))
        self.assertEqual('\\x1b[2J\\u202eevil', entries['A'].about['author'])


class FaultTest(TestCase):
    """What is refused, and that nothing else suffers for it."""

    def _assert_refused(self, reason, content, name='bad.yar', **options):
        self.set(**options)
        self.write('rules/good.yar', rule('Good'))
        if content is not None:
            self.write(f'rules/{name}', content)
        entries = self.importer().lint(importer.gather([str(self.rules)]))
        bad = [entry for entry in entries if entry.rule != 'Good']
        self.assertEqual(
            ['refused'], sorted({entry.state for entry in bad}))
        for entry in bad:
            self.assertRegex(entry.reason, reason)
        self.assertEqual(['as-written'], [
            entry.state for entry in entries if entry.rule == 'Good'])

    def test_empty_file(self):
        self._assert_refused('^empty$', b'')

    def test_blank_file(self):
        self._assert_refused('^empty$', b' \n\n')

    def test_file_of_500_mb(self):
        with open(self.rules / 'bad.yar', 'wb') as file:
            file.truncate(500 << 20)
        self._assert_refused('more than 16 MiB of rules', None)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.assertLess(used, 400 << 10)

    def test_link(self):
        (self.rules / 'bad.yar').symlink_to('/etc/passwd')
        self._assert_refused('not a regular file', None)

    def test_linked_directory(self):
        (self.rules / 'bad').symlink_to('/etc')
        self._assert_refused('not a regular file', None)

    def test_pipe(self):
        os.mkfifo(self.rules / 'bad.yar')
        self._assert_refused('not a regular file', None)

    def test_include_of_a_file_of_the_host(self):
        self._assert_refused(
            'include is refused', 'include "/etc/passwd"\n')

    def test_compiled_file(self):
        yara.compile(source='rule C { condition: true }').save(
            str(self.rules / 'bad.yar'))
        self._assert_refused('compiled rules are refused', None)

    def test_noise(self):
        self._assert_refused('.', os.urandom(100000))

    def test_not_utf_8(self):
        self._assert_refused(
            'not UTF-8', b'rule Bad { strings: $a = "\xff" condition: $a }')

    def test_deep_nesting(self):
        for number, content in enumerate((
                rule('Bad', condition='(' * 50000 + '$a' + ')' * 50000),
                rule('Bad', condition='not ' * 50000 + '$a'),
                rule('Bad', '$a = /%s/' % ('(' * 30000 + 'x' + ')' * 30000)),
                rule('Bad', '$a = { 11 22 %s }' % (
                    '(11 | ' * 9000 + '22' + ')' * 9000)),
                rule('Bad', condition='$a' + ' and $a' * 100000))):
            with self.subTest(number):
                self._assert_refused('.', content)

    def test_regular_expression_that_blows_up(self):
        blown = 'a'
        for _level in range(6):
            blown = f'({blown}){{1,900}}'
        self._assert_refused('.', rule('Bad', f'$a = /{blown}b/'))

    def test_too_many_strings(self):
        self._assert_refused('too many strings', rule(
            'Bad', ' '.join(f'$s{number} = "string number {number}"'
                            for number in range(10100)), 'any of them'))

    def test_more_memory_than_allowed(self):
        self._assert_refused(
            'takes more than 256 MiB of memory',
            rule('Bad', '$a = "xy" ' * 600000), memory_mib=256)

    def test_more_time_than_allowed(self):
        # 38 KB that libyara takes half a minute to compile.
        self._assert_refused(
            'takes more than 1 s of processor time',
            rule('Bad', ' '.join(
                f'$s{number} = "{number:05} string" xor wide ascii'
                for number in range(1000)), 'any of them'), rule_seconds=1)

    def test_100_000_rules(self):
        self.write('rules/bad.yar', ''.join(
            rule(f'R{number}') for number in range(100000)))
        with self.assertRaisesRegex(
                exception.RuleError,
                '^100000 rules, and at most 30000 are allowed') as caught:
            self.run_import()
        self.assertIn('max_rules', caught.exception.way_out)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.assertLess(used, 400 << 10)

    def test_a_rule_too_many(self):
        self.write('rules/a.yar', rule('A') + rule('B') + rule('C'))
        self.set(max_rules=2)
        with self.assertRaisesRegex(exception.RuleError, '^3 rules, and at'):
            self.run_import()


class SetTest(TestCase):

    def test_set(self):
        self.write('rules/sub/a.yar', rule('A') + rule('B'))
        self.write('rules/b.yara', rule('C'))
        outcome = self.run_import()
        self.assertEqual(
            ['rules/b.yar', 'rules/sub/a.yar'],
            [file.name for file in outcome.files])
        self.assertEqual(3, outcome.manifest['counts']['as-written'])
        self.assertEqual({'rules'}, set(outcome.manifest['sources']))
        self.assertEqual(
            3, outcome.manifest['engine']['describe']['rules'])
        self.assertEqual([], outcome.notes)
        done = {stage: (count, total) for stage, count, total in self.stages}
        self.assertTrue(done)
        for stage, (count, total) in done.items():
            self.assertEqual(count, total, stage)

    def test_nothing_is_left(self):
        self.write('rules/a.yar', 'rule A { condition: true }')
        with self.assertRaisesRegex(
                exception.RuleError, '^no rule is left: 1 refused'):
            self.run_import()

    def test_nothing_is_left_of_a_source(self):
        # A file that is half written must not take its rules out of force.
        self.write('rules/a.yar', rule('A'))
        before = self.run_import()
        path = self.write('other/b.yar', '')
        for content, reason in (
                ('', '1 refused'), (rule('B')[:-20], '1 refused'),
                ('private ' + rule('B'), '1 private')):
            path.write_text(content)
            with self.subTest(content), self.assertRaisesRegex(
                    exception.RuleError,
                    f'^no rule of source other is left: {reason}$'):
                self.run_import(self.top / 'other', others=before.entries)
        path.unlink()
        with self.assertRaisesRegex(
                exception.RuleError, '^no rule of source other .* no .*yar'):
            self.run_import(self.rules, self.top / 'other')
        # That another one has them all is no loss.
        path.write_text(rule('A'))
        self.assertEqual(1, len(self.run_import(
            self.top / 'other', others=before.entries).files))

    def test_nothing_there(self):
        for path in (self.rules, self.top / 'missing'):
            with self.subTest(path), \
                    self.assertRaises(exception.RuleError) as caught:
                self.run_import(path)
            self.assertTrue(caught.exception.way_out)

    def test_the_engine_has_the_last_word(self):
        self.write('rules/a.yar', rule('A'))
        work = self.importer()
        files = [file._replace(content=b'rule A { condition: x }')
                 for file in self.run_import().files]
        with self.assertRaisesRegex(
                exception.RuleError,
                '^engine yara does not take the rules: .*undefined'):
            work.prove(files)

    def test_rules_of_other_sources(self):
        self.write('rules/a.yar', rule('A', '$a = "some text"'))
        self.write('other/b.yar', rule('B', '$a = "some text"')
                   + rule('C'))
        before = self.run_import()
        outcome = self.run_import(
            self.top / 'other', others=before.entries,
            origins=before.manifest['sources'])
        self.assertEqual({'rules', 'other'},
                         set(outcome.manifest['sources']))
        self.assertEqual(
            {'A': 'as-written', 'B': 'duplicate', 'C': 'as-written'},
            {entry.rule: entry.state for entry in outcome.entries})
        self.assertEqual(['B', 'C'],
                         [entry.rule for entry in outcome.fresh])
        # When the first one goes, the other one counts.
        without = self.importer().run([], outcome.fresh)
        self.assertEqual(
            {'B': 'as-written', 'C': 'as-written'},
            {entry.rule: entry.state for entry in without.entries})

    def test_names_of_files_and_sources(self):
        self.write('rules/odd.. \x1b name\n/\udcff.yar'.encode(
            'utf-8', 'surrogateescape').decode('utf-8', 'surrogateescape'),
            rule('A'))
        self.write('rules/odd.. _ name_/_.yar', rule('B'))
        self.write('rules/%s/c.yar' % '/'.join('d' * 20), rule('C'))
        # In the set the one would be both a file and a directory.
        self.write('rules/e.yar/d.yar', rule('D'))
        self.write('rules/e.yara', rule('E'))
        outcome = self.run_import()
        self.assertEqual(5, len(outcome.files))
        names = {file.name for file in outcome.files}
        self.assertFalse([name for name in names if any(
            other.startswith(f'{name}/') for other in names)])
        for file in outcome.files:
            self.assertRegex(file.name, r'^rules/[A-Za-z0-9._+/-]+\.yar$')
            self.assertNotIn('..', file.name.split('/'))
        path = self.write('one.rule', rule('A'))
        self.assertEqual('one.rule',
                         importer.gather([str(path)])[0].name)
        path = self.write('few.yar', rule('A'))
        self.assertEqual('few', importer.gather([str(path)])[0].name)
        for name in ('', '../x', 'a/b', '-x', 'x' * 65, 'a b',
                     'manifest.json', 'rules.jsonl.zst'):
            with self.subTest(name), self.assertRaises(
                    exception.RuleError):
                importer.gather([str(path)], name or '..')
        with self.assertRaisesRegex(exception.RuleError, 'both be called'):
            importer.gather([str(path), str(self.write(
                'sub/few.yar', rule('B')))])

    def test_carriers(self):
        self.write('rules/a.yar', rule('A') + rule('B', '$a = "x1" $b = "y1"',
                                                   'all of them'))
        outcome = self.run_import()
        work = self.importer()
        pages = work.carry(outcome.entries)
        proof = work.prove(outcome.files, [page['page'] for page in pages])
        self.assertEqual(
            [{('rules/a.yar', 'A')}, {('rules/a.yar', 'B')}],
            proof['found'])
