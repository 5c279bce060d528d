# SPDX-License-Identifier: Apache-2.0

import os
import socket
import time
from unittest import mock

from tests.unit import base
from virtav_nova import exception
from virtav_nova.rules import directory

RULE = 'rule R { condition: true }'


class DirectoryTest(base.TestCase):

    def _assert_refused(self, message):
        with self.assertRaisesRegex(
                exception.RuleError, message) as caught:
            directory.read(str(self.top))
        self.assertTrue(caught.exception.way_out)

    def test_reads_what_is_a_rule_file(self):
        self.write('b.yar', 'b')
        self.write('a/deep/c.yara', b'\xff')
        self.write('a.txt', 'not this')
        self.write('.git/d.yar', 'nor this')
        self.write('.hidden.yar', 'nor this')
        self.assertEqual(
            [('a/deep/c.yara', b'\xff'), ('b.yar', b'b')],
            directory.read(str(self.top)))

    def test_directory_may_be_a_link(self):
        self.write('set-1/a.yar', RULE)
        (self.top / 'active').symlink_to('set-1')
        self.assertEqual([('a.yar', RULE.encode())],
                         directory.read(str(self.top / 'active')))

    def test_empty(self):
        self.write('README', 'no rules here')
        self._assert_refused(r'no \*.yar or \*.yara file in rule directory '
                             + str(self.top))

    def test_missing(self):
        with self.assertRaisesRegex(
                exception.RuleError, '/missing: No such file'):
            directory.read(str(self.top / 'missing'))

    def test_a_file_in_place_of_the_directory(self):
        path = self.write('file', RULE)
        with self.assertRaisesRegex(
                exception.RuleError, '/file: Not a directory'):
            directory.read(str(path))

    def test_links_are_refused(self):
        self.write('good.yar', RULE)
        (self.top / 'sub').mkdir()
        for name, target in (('sub/a.yar', '/etc/passwd'),
                             ('b.yar', 'good.yar'), ('c.yar', 'missing')):
            link = self.top / name
            link.symlink_to(target)
            self._assert_refused(f'^{self.top}/{name}: not a regular file')
            link.unlink()
        (self.top / 'linked').symlink_to('/etc')
        self._assert_refused(f'^{self.top}/linked: not a regular file')

    def test_what_is_no_file_is_refused_at_once(self):
        begin = time.monotonic()
        path = self.top / 'a.yar'
        os.mkfifo(path)
        self._assert_refused(f'^{self.top}/a.yar: not a regular file')
        path.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            self._assert_refused(
                f'^{self.top}/a.yar: No such device or address')
        path.unlink()
        path.mkdir()
        self._assert_refused('no .* file in rule directory')
        self.assertLess(time.monotonic() - begin, 2)

    def test_sizes_are_bounded(self):
        self.write('a.yar', bytes(60))
        self.write('b.yar', bytes(60))
        with mock.patch.object(directory, 'FILE_MAX', 59):
            self._assert_refused(f'^{self.top}/a.yar: more than 0 MiB')
        with mock.patch.object(directory, 'TOTAL_MAX', 119):
            self._assert_refused(f'^{self.top}/b.yar: more than 0 MiB')
        self.assertEqual(2, len(directory.read(str(self.top))))


class DigestTest(base.TestCase):

    def test_golden(self):
        # Hosts of different releases compare digests: it must not change.
        self.assertEqual(
            '78a8666df6a95480e1ae0f12fc8e2116fe15ae10d23978fe426b082588f9871f',
            directory.digest('yara 4.5.4', [
                directory.RuleFile('a.yar', RULE.encode())]).hex())

    def test_depends_on_everything(self):
        a = directory.RuleFile('a', b'x')
        b = directory.RuleFile('b', b'x')
        sets = (('yara 1', []), ('yara 1', [a]), ('yara 2', [a]),
                ('yara 1', [b]), ('yara 1', [a, b]),
                ('yara 1', [directory.RuleFile('a', b'y')]),
                ('yara 1', [directory.RuleFile('ax', b'')]),
                ('yara 1a', [directory.RuleFile('', b'x')]))
        digests = {directory.digest(*one) for one in sets}
        self.assertEqual(len(sets), len(digests))
        self.assertEqual({32}, set(map(len, digests)))
