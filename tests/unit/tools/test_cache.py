# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys

from tests.unit.tools import base
from virtavtools import cache

#: Builds an entry that counts how often it was built.
_BUILDER = '''
import pathlib, sys, time
sys.path.insert(0, %r)
from virtavtools import cache
with cache.entry('thing', 'key') as entry:
    if not entry.ready:
        print('built', flush=True)
        time.sleep(0.5)
        (entry.work / 'file').write_text('whole')
        entry.publish()
assert (entry.path / 'file').read_text() == 'whole'
'''


class TestRoot(base.TestCase):

    def test_relative_home_is_ignored(self):
        os.environ.update(XDG_CACHE_HOME='here', HOME='/home/someone')
        self.assertEqual('/home/someone/.cache/virtav', str(cache.root()))


class TestDigest(base.TestCase):

    def test_parts_are_kept_apart(self):
        self.assertNotEqual(cache.digest('ab', 'c'), cache.digest('a', 'bc'))
        self.assertNotEqual(cache.digest('a'), cache.digest(b'a'))
        self.assertRegex(cache.digest('a'), '^[0-9a-f]{32}$')

    def _tree(self, name):
        tree = self.top / name
        (tree / 'sub').mkdir(parents=True)
        (tree / 'sub' / 'file').write_text('text')
        (tree / 'link').symlink_to('sub')
        return tree

    def test_tree_counts_by_content(self):
        tree = self._tree('a')
        first = cache.digest(tree)
        self.assertEqual(first, cache.digest(self._tree('elsewhere')))
        # Neither the user's umask nor Python's leavings count.
        (tree / 'sub' / 'file').chmod(0o600)
        (tree / '__pycache__').mkdir()
        self.assertEqual(first, cache.digest(tree))

    def test_tree_changes(self):
        first = cache.digest(self._tree('first'))
        changes = {
            'text': lambda tree: (tree / 'sub/file').write_text('other'),
            'mode': lambda tree: (tree / 'sub/file').chmod(0o755),
            'name': lambda tree: (tree / 'sub').rename(tree / 'new'),
            'more': lambda tree: (tree / 'sub/empty').mkdir(),
            'link': lambda tree: (tree / 'link').unlink(),
        }
        for name, change in changes.items():
            with self.subTest(name):
                tree = self._tree(name)
                change(tree)
                self.assertNotEqual(first, cache.digest(tree))


class TestEntry(base.TestCase):

    def test_half_built_is_not_there(self):
        with (self.assertRaises(ZeroDivisionError),
              cache.entry('thing', 'key') as entry):
            self.assertFalse(entry.ready)
            (entry.work / 'file').write_text('half')
            self.assertFalse(entry.path.exists())
            raise ZeroDivisionError
        self.assertFalse(entry.work.exists() and any(entry.work.iterdir()))
        with cache.entry('thing', 'key') as entry:
            self.assertFalse(entry.ready)
            self.assertEqual([], list(entry.work.iterdir()))

    def test_leavings_of_a_killed_run_are_removed(self):
        with cache.entry('thing', 'key') as entry:
            work = entry.work
        work.mkdir()
        (work / 'file').write_text('half')
        with cache.entry('thing', 'key') as entry:
            self.assertEqual([], list(entry.work.iterdir()))

    def test_leavings_of_other_keys_too(self):
        with cache.entry('thing', 'used') as used:
            (used.work / 'file').write_text('half')
            with cache.entry('thing', 'lost') as lost:
                pass
            lost._work.mkdir()
            with cache.entry('thing', 'key') as entry:
                self.assertTrue(entry.work.exists())
            self.assertFalse(lost._work.exists())
            self.assertTrue((used.work / 'file').exists())

    def test_part_is_published(self):
        with cache.entry('thing', 'key') as entry:
            (entry.work / 'build').mkdir()
            (entry.work / 'prefix').mkdir()
            (entry.work / 'prefix' / 'file').write_text('kept')
            entry.publish(entry.work / 'prefix')
            self.assertTrue(entry.ready)
        self.assertEqual({'file': b'kept'}, self.contents(entry.path))

    def test_two_runs_build_once(self):
        script = _BUILDER % str(base.TOOLS)
        runs = [subprocess.Popen([sys.executable, '-c', script], text=True,
                                 stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE) for _ in range(3)]
        said = [run.communicate() for run in runs]
        self.assertEqual([0, 0, 0], [run.returncode for run in runs], said)
        self.assertEqual(['', '', 'built\n'], sorted(out for out, _ in said))
        self.assertIn('waiting for another run that builds thing/key',
                      ''.join(err for _, err in said))
