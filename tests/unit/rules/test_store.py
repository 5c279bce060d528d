# SPDX-License-Identifier: Apache-2.0

import grp
import json
import os
import stat
import subprocess
import sys
import threading
from unittest import mock

from tests.unit import base
from virtav_nova import exception
from virtav_nova.rules import directory
from virtav_nova.rules import store


def rule_file(number, name='a/b.yar'):
    return directory.RuleFile(
        name, f'rule R{number} {{ condition: true }}'.encode())


def entry(number, **fields):
    return store.Entry(**{
        'source': 'a', 'file': 'b.yar', 'line': 1, 'rule': f'R{number}',
        'state': 'as-written', 'namespace': 'a/b.yar',
        'text': f'rule R{number} {{ condition: true }}', **fields})


class StoreTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = self.top / 'rules'
        self.store = store.Store(str(self.path))

    def _add(self, number, activate='import', **fields):
        with self.store.locked():
            digest = self.store.add(
                [rule_file(number)], [entry(number, **fields)],
                {'created': store.now(), 'counts': {}, 'sources': {}})
            if activate:
                self.store.activate(digest, activate)
        return digest

    def _read(self):
        [file] = directory.read(str(self.path / 'current'))
        return file.content

    def _assert_refused(self, message, method, *arguments):
        with self.assertRaisesRegex(exception.RuleError, message) as caught:
            method(*arguments)
        self.assertTrue(caught.exception.way_out)

    def test_a_set_comes_into_force(self):
        digest = self._add(1, dropped=('filesize < 1: none',), us=1.5)
        self.assertEqual(rule_file(1).content, self._read())
        self.assertEqual(digest, self.store.current())
        found = self.store.find('current')
        self.assertTrue(found.current)
        self.assertEqual(digest, found.manifest['digest'])
        self.assertEqual(
            [entry(1, dropped=('filesize < 1: none',), us=1.5)],
            self.store.entries(digest))
        self.assertEqual([rule_file(1)], self.store.files(digest))
        self.assertEqual(f'sets/{digest}',
                         os.readlink(self.path / 'current'))

    def test_named_by_content(self):
        first = self._add(1)
        second = self._add(2)
        self.assertNotEqual(first, second)
        self.assertEqual(first, self._add(1, us=7.0))
        self.assertEqual(7.0, self.store.entries(first)[0].us)
        self.assertEqual(2, len(self.store.sets()))

    def test_without_activation(self):
        first = self._add(1)
        second = self._add(2, activate=None)
        self.assertEqual(first, self.store.current())
        self.assertEqual([first, second],
                         [each.digest for each in self.store.sets()])

    def test_find(self):
        first, second = self._add(1), self._add(2)
        self.assertEqual(first, self.store.find(first[:6]).digest)
        self.assertEqual(first, self.store.find('previous').digest)
        self.assertEqual(second, self.store.find('current').digest)
        for name in ('', 'zz', '../../etc'):
            self._assert_refused('rule sets have a digest',
                                 self.store.find, name)

    def test_rollback_goes_back_step_by_step(self):
        first, second, third = (self._add(number) for number in range(3))
        for expected in (second, first):
            back = self.store.find('previous').digest
            self.assertEqual(expected, back)
            with self.store.locked():
                self.store.activate(back, 'rollback')
        self._assert_refused('no rule set to go back to',
                             self.store.find, 'previous')
        # After a new one, that before it is meant.
        self._add(4)
        self.assertEqual(first, self.store.find('previous').digest)
        self.assertNotEqual(third, self.store.current())

    def test_who_may_not(self):
        self._add(1)
        if os.geteuid() == 0:
            os.chmod(self.top, 0o755)
            self.addCleanup(os.seteuid, 0)
            os.seteuid(65534)
        else:
            self.path.chmod(0o500)
            self.addCleanup(self.path.chmod, 0o700)
        self.assertIsNotNone(self.store.current())
        self.assertEqual([rule_file(1)],
                         self.store.files(self.store.current()))
        self._assert_refused(
            'Permission denied|not permitted|another user',
            self.store.locked().__enter__)

    def test_who_may_not_even_look(self):
        if os.geteuid() == 0:
            os.chmod(self.top, 0o700)
            self.addCleanup(os.seteuid, 0)
            os.seteuid(65534)
        else:
            self.path.mkdir()
            self.path.chmod(0)
            self.addCleanup(self.path.chmod, 0o700)
        self._assert_refused('Permission denied', self.store.current)
        self._assert_refused('Permission denied', self.store.sets)

    def test_what_another_user_may_change_is_not_written(self):
        # Whoever owns the parent could otherwise have root write anywhere.
        away = self.top / 'away'
        away.mkdir(mode=0o700)
        self.path.symlink_to(away)
        self._assert_refused('Not a directory|symbolic', self._add, 1)
        self.path.unlink()
        self.path.mkdir()
        (self.path / 'sets').symlink_to(away)
        self._assert_refused('Not a directory|symbolic', self._add, 1)
        self.assertEqual([], list(away.iterdir()))
        self.assertEqual(0o700, stat.S_IMODE(away.stat().st_mode))
        (self.path / 'sets').unlink()
        with mock.patch('os.geteuid', return_value=os.geteuid() + 1):
            self._assert_refused('belongs to another user', self._add, 1)
        self._add(1)

    def test_nothing_there(self):
        self.assertIsNone(self.store.current())
        self.assertEqual([], self.store.sets())
        self._assert_refused('no rule set is in force',
                             self.store.find, 'current')

    def test_old_sets_are_removed(self):
        digests = [self._add(number) for number in range(6)]
        with self.store.locked():
            self.assertEqual(set(digests[:3]), set(self.store.collect(3)))
        self.assertEqual(set(digests[3:]),
                         {each.digest for each in self.store.sets()})
        # That in force stays, and that before it.
        with self.store.locked():
            self.store.activate(digests[3], 'rollback')
            self.store.collect(1)
        self.assertEqual(
            [digests[3], digests[5]],
            [each.digest for each in self.store.sets()])

    def test_modes_whatever_the_umask(self):
        before = os.umask(0o077)
        self.addCleanup(os.umask, before)
        digest = self._add(1)
        os.umask(0)
        self._add(2)
        for path in (self.path, *self.path.rglob('*')):
            mode = stat.S_IMODE(path.lstat().st_mode)
            with self.subTest(path):
                if path.is_symlink() or path.name == 'lock':
                    continue
                self.assertEqual(0o755 if path.is_dir() else 0o644, mode)
        self.assertTrue(digest)

    def test_group(self):
        group = os.getgid()
        name = grp.getgrgid(group).gr_name
        self.store = store.Store(str(self.path), name)
        digest = self._add(1)
        path = self.path / 'sets' / digest / 'a' / 'b.yar'
        self.assertEqual(0o640, stat.S_IMODE(path.stat().st_mode))
        self.assertEqual(0o750, stat.S_IMODE(path.parent.stat().st_mode))
        self.assertEqual(group, path.stat().st_gid)
        self._assert_refused('no group is called', store.Store, '/x',
                             'no such group')

    def test_a_second_importer_is_refused(self):
        with self.store.locked():
            other = store.Store(str(self.path))
            with self.assertRaisesRegex(
                    exception.RuleError, 'another virtav-rules'):
                other.locked().__enter__()
        self._add(1)

    def test_what_was_left_half_written_is_never_seen(self):
        digest = self._add(1)
        half = self.path / 'sets' / '.new-abc'
        (half / 'a').mkdir(parents=True)
        (half / 'a' / 'b.yar').write_text('rule')
        (self.path / 'current.123').symlink_to('sets/.new-abc')
        self.assertEqual([digest],
                         [each.digest for each in self.store.sets()])
        self._add(2)
        self.assertFalse(half.exists())
        self.assertFalse((self.path / 'current.123').is_symlink())

    def test_a_write_that_fails_changes_nothing(self):
        digest = self._add(1)
        for name in ('fsync', 'rename', 'symlink'):
            with self.subTest(name), mock.patch.object(
                    store.os, name, side_effect=OSError(28, 'No space')):
                self._assert_refused('No space', self._add, 2)
            self.assertEqual(digest, self.store.current())
            self.assertEqual(rule_file(1).content, self._read())
        self._add(2)
        self.assertEqual(rule_file(2).content, self._read())

    def test_readers_see_whole_sets_while_others_come_into_force(self):
        digests = []
        for number in range(2):
            with self.store.locked():
                files = [rule_file(number, f'a/{name}.yar')
                         for name in range(5)]
                digests.append(self.store.add(files, [], {
                    'created': store.now(), 'counts': {}, 'sources': {}}))
                self.store.activate(digests[-1], 'import')
        done = threading.Event()
        seen, wrong = set(), []

        def read():
            while not done.is_set():
                contents = {file.content for file in directory.read(
                    str(self.path / 'current'))}
                seen.update(contents)
                if len(contents) != 1:
                    wrong.append(contents)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(100):
            with self.store.locked():
                self.store.activate(digests[number % 2], 'import')
        done.set()
        reader.join()
        self.assertEqual([], wrong)
        self.assertEqual(2, len(seen))

    def test_killed_at_any_moment(self):
        digest = self._add(1)
        program = (
            'import sys\n'
            'from tests.unit.rules import test_store\n'
            'from virtav_nova.rules import store\n'
            'one = store.Store(sys.argv[1])\n'
            'print("ready", flush=True)\n'
            'for number in range(10 ** 6):\n'
            '    with one.locked():\n'
            '        digest = one.add(\n'
            '            [test_store.rule_file(number)], [],\n'
            '            {"created": "", "counts": {}, "sources": {}})\n'
            '        one.activate(digest, "import")\n'
            '        one.collect(3)\n')
        for delay in (0.0, 0.01, 0.02, 0.05, 0.1):
            with subprocess.Popen(
                    [sys.executable, '-c', program, str(self.path)],
                    cwd=base.ROOT, stdout=subprocess.PIPE) as process:
                process.stdout.readline()
                threading.Event().wait(delay)
                process.kill()
            current = self.store.find('current')
            self.assertEqual(
                store.digest(self.store.files(current.digest)),
                current.digest)
            for each in self.store.sets():
                self.store.entries(each.digest)
        self._add(2)
        self.assertNotEqual(digest, self.store.current())

    def test_history_is_bounded_and_survives_broken_lines(self):
        digest = self._add(1)
        path = self.path / 'history'
        path.write_text(
            (json.dumps({'digest': digest, 'action': 'import'}) + '\n')
            * 1500 + '{"broken\n\xff\nnull\n[]\n{"digest": "../x"}\n')
        self._add(2)
        self.assertEqual(500, len(self.store.history()))
        self.assertEqual(digest, self.store.find('previous').digest)

    def test_damage_is_told(self):
        digest = self._add(1)
        top = self.path / 'sets' / digest
        for name, content in (
                ('rules.jsonl.zst', b'no zstd'), ('manifest.json', b'{'),
                ('manifest.json', b'[]'),
                ('manifest.json', b'{"format": 99}')):
            with self.subTest(name, content=content):
                good = (top / name).read_bytes()
                (top / name).write_bytes(content)
                with self.assertRaises(exception.RuleError) as caught:
                    self.store.entries(self.store.find('current').digest)
                self.assertTrue(caught.exception.way_out)
                (top / name).write_bytes(good)
