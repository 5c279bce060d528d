# SPDX-License-Identifier: Apache-2.0
"""Rules, from a directory into force, as an operator does it."""

import json
import os
import pathlib
import pty
import pwd
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from tests.unit import base

HOSTILE = b'rule E\x1b[2J { condition: true }\n'


def rule(name, text=None, condition='$a', meta=''):
    return (f'rule {name} {{\n {meta}\n strings:\n'
            f'  $a = "{text or name + " is harmless text"}"\n'
            f' condition:\n  {condition}\n}}\n')


class RulesTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        top = tempfile.TemporaryDirectory()
        self.addCleanup(top.cleanup)
        self.top = pathlib.Path(top.name)
        self.state = self.top / 'state'
        self.current = self.state / 'rules' / 'current'
        self.rules = self.top / 'public'
        self.configuration = self.top / 'virtav.conf'
        self.configuration.write_text(
            '[virtav_worker]\nengine = yara\n'
            f'state_dir = {self.state}\n'
            f'status_socket = {self.top}/status.sock\n')

    def write(self, name, content):
        path = self.rules / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content.encode() if isinstance(content, str) else content)

    def command(self, *words, program='rules'):
        return [sys.executable, '-P', '-m', f'virtav_nova.cmd.{program}',
                '--config-file', str(self.configuration), *map(str, words)]

    def call(self, *words, status=0, program='rules'):
        """Run the program.

        :returns: standard output and standard error
        """
        done = subprocess.run(
            self.command(*words, program=program), capture_output=True,
            text=True, timeout=300, env={**os.environ, 'COLUMNS': '200'})
        self.assertEqual(status, done.returncode, done.stdout + done.stderr)
        self.assertNotIn('Traceback', done.stderr)
        for text in (done.stdout, done.stderr):
            self.assertNotRegex(text, '[\x00-\x08\x0b-\x1f\x7f-\x9f]')
        return done.stdout, done.stderr

    def json(self, *words, status=0):
        return json.loads(self.call(*words, '--json', status=status)[0])

    def fails(self, message, *words, program='rules'):
        _stdout, stderr = self.call(*words, status=2, program=program)
        self.assertRegex(stderr, f'^virtav-[a-z-]+: error: {message}')
        self.assertIn('\n  way out: ', stderr)
        return stderr

    def test_first_steps(self):
        # The error of the worker names the way, and that way leads there.
        # What is installed in /etc is in the checkout here.
        stderr = self.fails('.*/current: No such file', '--check',
                            program='scan_worker')
        self.assertIn('virtav-rules import /etc/virtav/rules', stderr)
        self.fails('no rule set is in force', 'show', 'VirtAV_SelfTest')
        stdout, _stderr = self.call('list')
        self.assertIn('import /etc/virtav/rules', stdout)
        stdout, _stderr = self.call('import', base.SELFTEST_RULES)
        self.assertRegex(stdout, r'as-written +1 ')
        self.assertIn('systemctl reload virtav-scan-worker', stdout)
        stdout, _stderr = self.call('--check', program='scan_worker')
        self.assertIn('rules: 1', stdout)
        stdout, _stderr = self.call('show', 'VirtAV_SelfTest')
        self.assertIn('$signature = "VIRTAV-HARMLESS', stdout)
        stdout, _stderr = self.call('test', '--all')
        self.assertIn('1 of 1 rules', stdout)
        stdout, _stderr = self.call('list')
        self.assertRegex(stdout, r'\n\*  [0-9a-f]{12}  .* 1 +0 +rules')

    def test_import_list_show_diff_rollback(self):
        self.write('a.yar', rule('One') + rule(
            'Two', condition='uint16(0) == 0x5a4d and $a',
            meta='meta: author = "me" license = "MIT" severity = "high" '
                 'mitre = "T1059"') + 'rule Bad { condition: true }')
        self.write('sub/b.yar', HOSTILE + rule('Three').encode())
        first = self.json('import', self.rules)
        self.assertTrue(first['activated'])
        self.assertEqual(
            {'as-written': 2, 'page-form': 1, 'refused': 2},
            {state: number for state, number in first['fresh'].items()
             if number})
        by_name = {each['rule']: each for each in self.json(
            'list', '--rules')}
        two = by_name['public/a.yar:Two']
        self.assertEqual(
            ('page-form', 'me', 'MIT', 'high', ['T1059']),
            tuple(two[key] for key in (
                'state', 'author', 'licence', 'severity', 'mitre')))
        [two] = self.json('show', 'Two')
        self.assertIn('uint16(0)', two['original'])
        self.assertEqual(1, len(two['dropped']))
        stdout, _stderr = self.call('show', 'Two')
        self.assertIn('dropped: uint16(0) == 0x5a4d: ', stdout)
        stdout, _stderr = self.call('list', '--state', 'refused')
        self.assertIn('public/a.yar:Bad', stdout)
        self.fails('no rule of the set is called Nine', 'show', 'Nine')
        # A new state of the same source replaces the old one.
        (self.rules / 'sub' / 'b.yar').unlink()
        self.write('a.yar', rule('One', 'other text of one')
                   + rule('Four'))
        second = self.json('import', self.rules)
        self.assertEqual(
            {'old': first['digest'], 'new': second['digest'],
             'added': ['public/a.yar:Four'],
             'removed': ['public/a.yar:Two', 'public/sub/b.yar:Three'],
             'changed': ['public/a.yar:One']}, self.json('diff'))
        stdout, _stderr = self.call('diff', first['digest'][:8], 'current',
                                    '--text')
        self.assertIn('+  $a = "other text of one"', stdout)
        stdout, _stderr = self.call('rollback')
        self.assertIn(f'set {first["digest"][:12]} is in force', stdout)
        self.assertEqual(f'sets/{first["digest"]}',
                         os.readlink(self.current))
        self.fails('there is no rule set to go back to', 'rollback')
        self.call('rollback', second['digest'])
        self.assertEqual(f'sets/{second["digest"]}',
                         os.readlink(self.current))
        self.assertEqual(
            [True, False], [each['current'] for each in self.json('list')])
        again = self.json('import', self.rules)
        self.assertEqual((second['digest'], False),
                         (again['digest'], again['activated']))

    def test_sources(self):
        self.write('a.yar', rule('One'))
        self.call('import', base.SELFTEST_RULES)
        self.call('import', self.rules)
        self.assertEqual(
            {'rules/selftest.yar', 'public/a.yar'},
            {path.relative_to(self.current).as_posix()
             for path in self.current.rglob('*.yar')})
        other = self.rules.rename(self.top / 'rules')
        self.fails('source rules was imported from', 'import', other)
        self.call('import', other, '--name', 'mine')
        self.call('remove', 'mine', 'public')
        self.fails('no source of the set in force is called mine',
                   'remove', 'mine')
        self.assertEqual(
            ['rules'], list(self.json('show', 'current')['sources']))
        self.call('import', other, '--only')
        self.assertEqual(1, self.json('show', 'current')[
            'counts']['as-written'])
        self.assertIn('One', self.call('list', '--rules')[0])

    def test_nothing_comes_into_force(self):
        self.write('good/a.yar', rule('One'))
        digest = self.json('import', self.rules / 'good')['digest']
        self.write('bad/a.yar', 'rule Bad { condition: true }')
        self.fails('no rule is left: 1 refused',
                   'import', self.rules / 'bad', '--only')
        (self.top / 'nothing').mkdir()
        self.fails('no .* file in', 'import', self.top / 'nothing')
        self.fails('.*: No such file', 'import', self.top / 'missing')
        self.write('two/a.yar', rule('Two'))
        self.assertIsNone(self.json(
            'import', self.rules / 'two', '--dry-run')['digest'])
        stored = self.json('import', self.rules / 'two', '--no-activate')
        self.assertFalse(stored['activated'])
        self.assertEqual(f'sets/{digest}', os.readlink(self.current))
        self.assertEqual(2, len(self.json('list')))
        self.call('rollback', stored['digest'][:8])
        self.assertEqual(f'sets/{stored["digest"]}',
                         os.readlink(self.current))

    def test_a_file_that_is_half_written_takes_nothing_out_of_force(self):
        self.write('one/a.yar', rule('One'))
        self.write('two/a.yar', rule('Two'))
        self.call('import', self.rules / 'one', self.rules / 'two')
        self.write('one/a.yar', rule('One')[:-10])
        self.fails('no rule of source one is left: 1 refused',
                   'import', self.rules / 'one')
        self.assertIn('one/a.yar:One', self.call('list', 'current')[0])
        self.fails('0 rule sets have', 'list', 'zzz')

    def test_output_that_has_no_room(self):
        self.write('a.yar', rule('One'))
        self.call('import', self.rules)
        for words in (('list',), ('list', '--json'), ('show', 'One')):
            with self.subTest(words), open('/dev/full', 'wb') as full:
                done = subprocess.run(
                    self.command(*words), stdout=full, timeout=300,
                    stderr=subprocess.PIPE, text=True)
                self.assertEqual(2, done.returncode)
                self.assertRegex(
                    done.stderr, '^virtav-rules: error: No space left')
                self.assertEqual(2, done.stderr.count('\n'))

    def test_lint(self):
        self.write('a.yar', rule('One'))
        self.assertIn('public/a.yar:One: as-written',
                      self.call('lint', self.rules)[0])
        self.write('b.yar', HOSTILE)
        stdout, _stderr = self.call('lint', self.rules, status=1)
        self.assertIn('public/b.yar:E: refused', stdout)
        self.assertFalse(self.state.exists())
        found = self.json('lint', self.rules, status=1)
        self.assertEqual(1, found['counts']['refused'])

    def test_reload_without_a_worker(self):
        self.write('a.yar', rule('One'))
        self.fails('no answer on .*status.sock', 'import', self.rules,
                   '--reload')
        # It is in force nevertheless, when the worker comes.
        self.assertTrue(self.current.exists())

    def test_reload_of_a_worker(self):
        with self.configuration.open('a') as file:
            file.write(f'socket = {self.top}/worker.sock\n'
                       f'instances_dir = {self.top}/instances\n'
                       'require_token = false\nprocesses = 1\n'
                       f'user = {pwd.getpwuid(os.geteuid()).pw_name}\n')
        self.call('import', base.SELFTEST_RULES)
        self.write('a.yar', rule('One'))
        with subprocess.Popen(
                self.command(program='scan_worker'),
                stderr=subprocess.PIPE, text=True) as worker:
            try:
                for line in worker.stderr:
                    if 'Listening on' in line:
                        break
                stdout, _stderr = self.call('import', self.rules, '--reload')
                self.assertIn('the worker has loaded it', stdout)
                self.assertEqual(2, self._worker()['rules'])
                self.call('rollback', '--reload')
                self.assertEqual(1, self._worker()['rules'])
                # Broken by other means: the worker keeps what it has.
                self.call('import', self.rules)
                (self.current / 'public' / 'a.yar').write_bytes(
                    b'rule Broken {')
                self.call('--reload', '--json', program='status', status=1)
                self.assertEqual(1, self._worker()['rules'])
            finally:
                worker.terminate()
                worker.stderr.read()

    def _worker(self):
        done = subprocess.run(
            self.command('--json', program='status'), capture_output=True,
            text=True, check=False)
        return json.loads(done.stdout)

    @unittest.skipUnless('VIRTAV_RULES_DIR' in os.environ,
                         'VIRTAV_RULES_DIR names no rules')
    def test_public_rules(self):
        rules = os.environ['VIRTAV_RULES_DIR']
        outcome = self.json('import', rules, '--name', 'public')
        for each in outcome['rules']:
            with self.subTest(each['rule']):
                taken = each['state'] in ('as-written', 'page-form')
                self.assertEqual(taken, not each['reason'])
                self.assertEqual(taken, bool(each['namespace']))
        tested = subprocess.run(
            self.command('test', '--all', '--json'), capture_output=True,
            text=True, check=False)
        tested = json.loads(tested.stdout)
        print(outcome['fresh'], tested['rules'], tested['proved'],
              file=sys.stderr)
        self.assertGreater(tested['proved'], 0.98 * tested['rules'])

    def test_another_directory_is_told(self):
        self.configuration.write_text(
            self.configuration.read_text() + 'rules_dir = /elsewhere\n')
        self.write('a.yar', rule('One'))
        self.assertIn('the worker does not use it',
                      self.call('import', self.rules)[0])

    def test_from_clamav(self):
        body = b'made up signature'.hex()
        ndb = self.top / 'own.ndb'
        ndb.write_text(f'Own.Test-1:1:EP+0:{body}\nOwn.Mail:4:*:{body}\n')
        out = self.top / 'own.yar'
        stdout, _stderr = self.call('from-clamav', ndb, '-o', out)
        self.assertIn('Own.Test-1: lost: type of file: PE; offset EP+0',
                      stdout)
        self.assertIn('Own.Mail: not taken: is for files of type mail',
                      stdout)
        self.call('import', out)
        self.assertIn('1 of 1', self.call('test', '--all')[0])
        self.fails('.*not a file of body signatures', 'from-clamav',
                   self.configuration, '-o', out)
        before = out.read_bytes()
        ndb.write_text('nonsense\n')
        self.fails('no signature can be made a rule', 'from-clamav', ndb,
                   '-o', out)
        self.assertEqual(before, out.read_bytes())

    def test_test(self):
        self.write('a.yar', rule('One') + rule('Two'))
        self.call('import', self.rules)
        self.assertIn('1 of 1', self.call('test', 'One')[0])
        self.fails('either rules or --all', 'test')
        self.fails('no rule of the set is called x', 'test', 'x')
        self.assertEqual(2, self.json('test', '--all')['proved'])

    def test_killed_and_interrupted(self):
        # Who is started in the background by a script ignores it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        self.write('a.yar', rule('One'))
        digest = self.json('import', self.rules)['digest']
        self.write('b.yar', ''.join(
            rule(f'R{number}') for number in range(6000)))
        for ending in (signal.SIGKILL, signal.SIGINT):
            for delay in (0, 0.1):
                with subprocess.Popen(
                        self.command('import', self.rules),
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        env={**os.environ, 'PYTHONUNBUFFERED': '1'}
                        ) as process:
                    self.assertIn(b'parse', process.stdout.readline())
                    time.sleep(delay)
                    process.send_signal(ending)
                    stderr = process.stderr.read()
                    process.wait()
                self.assertNotIn(b'Traceback', stderr)
                self.assertEqual(f'sets/{digest}',
                                 os.readlink(self.current))
        self.assertTrue(self.json('import', self.rules)['activated'])
        self.assertEqual(
            [], list((self.state / 'rules' / 'sets').glob('.new-*')))

    def test_two_at_once(self):
        self.write('a.yar', ''.join(
            rule(f'R{number}') for number in range(1000)))
        both = [subprocess.Popen(
            self.command('import', self.rules), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT) for _number in range(2)]
        outputs = [each.communicate()[0] for each in both]
        self.assertEqual([0, 2], sorted(each.returncode for each in both),
                         outputs)
        self.assertTrue(any(
            b'another virtav-rules is changing the rules' in output
            for output in outputs))

    def test_progress_on_a_terminal(self):
        self.write('a.yar', rule('One'))
        main, other = pty.openpty()
        with subprocess.Popen(self.command('import', self.rules),
                              stdout=subprocess.DEVNULL, stderr=other):
            os.close(other)
            shown = b''
            try:
                while read := os.read(main, 4096):
                    shown += read
            except OSError:
                pass
        os.close(main)
        self.assertTrue(re.search(b'parse and rewrite.*1/1', shown), shown)
