# SPDX-License-Identifier: Apache-2.0

import contextlib
import io

from tests.unit import base
from virtav_nova.cmd import scan_worker


class CheckTest(base.TestCase):

    def _run(self, options='', *arguments):
        path = self.write(
            'virtav.conf',
            f'[virtav_worker]\nrules_dir = {self.top}/rules\n{options}\n')
        with contextlib.redirect_stdout(io.StringIO()) as stdout, \
                contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = scan_worker.main(
                ['--config-file', str(path), '--check', *arguments])
        return status, stdout.getvalue(), stderr.getvalue()

    def _assert_fails(self, message, options=''):
        status, stdout, stderr = self._run(options)
        self.assertEqual((2, ''), (status, stdout))
        self.assertIn(f'virtav-scan-worker: error: {message}', stderr)
        self.assertIn('\n  way out: ', stderr)

    def test_good_rules(self):
        status, stdout, stderr = self._run(
            f'rules_dir = {base.SELFTEST_RULES}')
        self.assertEqual((0, ''), (status, stderr))
        self.assertRegex(stdout, r'^engine: twostage .*\nrules: 1\n'
                                 r'digest: [0-9a-f]{64}\n$')

    def test_missing_directory(self):
        self._assert_fails(f'{self.top}/rules: No such file')

    def test_empty_directory(self):
        self.write('rules/README', 'nothing')
        self._assert_fails('no *.yar or *.yara file in rule directory '
                           f'{self.top}/rules')

    def test_broken_rule(self):
        self.write('rules/good.yar', 'rule G { condition: true }')
        self.write('rules/sub/bad.yar', 'rule B {\n condition: foo\n}')
        self._assert_fails(
            f'{self.top}/rules/sub/bad.yar:2: undefined identifier "foo"')

    def test_refused_file(self):
        self.write('rules/sub/good.yar', 'rule G { condition: true }')
        (self.top / 'rules/sub/link.yar').symlink_to('good.yar')
        self._assert_fails(f'{self.top}/rules/sub/link.yar: not a regular')

    def test_no_rule(self):
        self.write('rules/a.yar', '// nothing yet\n')
        self.write('rules/b.yar', '')
        self._assert_fails(
            f'the files in rule directory {self.top}/rules hold no rule')

    def test_unknown_engine(self):
        self._assert_fails('no scan engine is called av',
                           'engine = av')

    def test_bad_values(self):
        self.write('rules/good.yar', 'rule G { condition: true }')
        for options, message in (
                ('scan_timeout_ms = fast', 'scan_timeout_ms: invalid'),
                ('scan_timeout_ms = 1', 'scan_timeout_ms: '),
                ('socket_mode = rw', "socket_mode: Value 'rw'"),
                ('processes = -1', 'processes: '),
                ('table_entries = 3', 'table_entries: 3 is neither 0 nor a '
                 'power of two from 4 to 67108864'),
                ('ring_slots = 2048', 'ring_slots: '),
                ('max_sessions = 0', 'max_sessions: ')):
            with self.subTest(options):
                self._assert_fails(f'[virtav_worker] {message}', options)

    def test_missing_configuration_file(self):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = scan_worker.main(['--config-file', '/no/such/file'])
        self.assertEqual(2, status)
        self.assertIn('/no/such/file', stderr.getvalue())
        self.assertIn('way out', stderr.getvalue())

    def test_broken_configuration_file(self):
        status, _, stderr = self._run('][')
        self.assertEqual(2, status)
        self.assertIn('way out', stderr)
