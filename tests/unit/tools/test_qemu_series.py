# SPDX-License-Identifier: Apache-2.0

import subprocess

from tests.unit.tools import base
from virtavtools import errors
from virtavtools import qemu_series
from virtavtools import qemu_source


class TestSeries(base.TestCase):

    def test_missing_patch(self):
        (self.top / 'series').write_text('0001-a.patch # first\n')
        with self.assertRaisesRegex(errors.ToolError, 'lists 0001-a.patch'):
            qemu_series.Series(self.top)

    def test_digest_is_of_patches(self):
        for name in ('a.patch', 'b.patch'):
            (self.top / name).write_text(name)
        (self.top / 'series').write_text('a.patch\nb.patch\n')
        first = qemu_series.Series(self.top).digest
        (self.top / 'series').write_text('# why\n\na.patch # one\nb.patch\n')
        self.assertEqual(first, qemu_series.Series(self.top).digest)
        (self.top / 'series').write_text('b.patch\na.patch\n')
        self.assertNotEqual(first, qemu_series.Series(self.top).digest)

    def test_option(self):
        self.assertEqual('', qemu_series.Series().option)
        self.assertEqual(" --series '/a b'",
                         qemu_series.Series('/a b').option)


class TestTree(base.TestCase):

    def setUp(self):
        super().setUp()
        self.patches = self.top / 'patches'
        self.tree = self.top / 'tree'
        self.source = qemu_source.local(self.tarball())
        # A series made by hand, of two commits.
        self._edit()
        self.commit(self.tree, 'one\ntwo\n3\n', 'hello: 3, häh')
        self.commit(self.tree, '1\ntwo\n3\n', 'hello: [1]\n\nBody.\n')
        qemu_series.refresh(self.tree, self._series())

    def _series(self):
        return qemu_series.Series(self.patches)

    def _edit(self, tree=None, **words):
        qemu_series.edit(tree or self.tree, self.source, self._series(),
                         **words)

    def test_what_is_written(self):
        self.assertEqual(
            '# Made for QEMU 10.0.7\n0001-hello-3-h-h.patch\n'
            '0002-hello-1.patch\n',
            (self.patches / 'series').read_text())
        self.assertEqual('10.0.7', self._series().made_for)
        patch = (self.patches / '0002-hello-1.patch').read_text()
        self.assertTrue(patch.startswith('From 0000000000'))
        self.assertIn('\nSubject: [PATCH] hello: [1]\n', patch)
        self.assertTrue(patch.endswith('\n 3\n'), patch)

    def test_round_trip_leaves_no_difference(self):
        before = self.contents(self.patches)
        other = self.top / 'other'
        self._edit(other)
        self.assertEqual('hello: [1]\nhello: 3, häh\nQEMU 10.0.7',
                         self.git(other, 'log', '--format=%s'))
        self.assertEqual('QEMU 10.0.7', self.git(
            other, 'log', '-1', '--format=%s', 'pristine'))
        self.assertEqual('named by .gitignore',
                         self.git(other, 'show', 'pristine:left.patch'))
        qemu_series.refresh(other, self._series())
        self.assertEqual(before, self.contents(self.patches))

    def test_removed_commit_removes_its_patch(self):
        (self.patches / '0000-cover-letter.patch').write_text('dear')
        (self.patches / 'series').write_text(
            '# Of VirtAV\n' + (self.patches / 'series').read_text())
        self.git(self.tree, 'reset', '--hard', 'HEAD~1')
        qemu_series.refresh(self.tree, self._series())
        self.assertEqual({'0000-cover-letter.patch', 'series',
                          '0001-hello-3-h-h.patch'},
                         set(self.contents(self.patches)))
        self.assertEqual('# Of VirtAV\n# Made for QEMU 10.0.7\n'
                         '0001-hello-3-h-h.patch\n',
                         (self.patches / 'series').read_text())

    def test_edit_again_keeps_the_tree(self):
        before = (self.tree / 'hello.c').stat()
        self._edit()
        self.assertEqual(before, (self.tree / 'hello.c').stat())

    def test_edit_refuses_to_lose_work(self):
        head = self.git(self.tree, 'rev-parse', 'HEAD')
        (self.tree / 'hello.c').write_text('x')
        (self.tree / 'new.c').write_text('x')
        (self.tree / 'build').mkdir()
        with self.assertRaisesRegex(errors.ToolError, 'not committed'):
            self._edit()
        self.git(self.tree, 'add', 'hello.c')
        self.git(self.tree, 'commit', '-m', 'x')
        (self.tree / 'new.c').unlink()
        with self.assertRaisesRegex(errors.ToolError, 'not in the series'):
            self._edit()
        self._edit(force=True)
        self.assertEqual(head, self.git(self.tree, 'rev-parse', 'HEAD'))
        # A build goes on from where it was.
        self.assertTrue((self.tree / 'build').exists())

    def test_edit_follows_the_series_and_the_source(self):
        other = self.top / 'other'
        self._edit(other)
        self.git(other, 'reset', '--hard', 'HEAD~1')
        qemu_series.refresh(other, self._series())
        self.source = qemu_source.local(self.tarball(
            '10.0.8', more_c='new\n'))
        self._edit()
        self.assertEqual('one\ntwo\n3\n',
                         (self.tree / 'hello.c').read_text())
        self.assertEqual('new\n', (self.tree / 'more.c').read_text())
        self.assertEqual('10.0.8\n', (self.tree / 'VERSION').read_text())

    def test_edit_refuses_what_it_did_not_make(self):
        (self.top / 'mine').mkdir()
        (self.top / 'mine' / 'file').write_text('x')
        for force in (False, True):
            with self.assertRaisesRegex(errors.ToolError, 'is not empty'):
                self._edit(self.top / 'mine', force=force)
        self.assertEqual({'file': b'x'}, self.contents(self.top / 'mine'))

    def test_failed_edit_leaves_git_at_the_patch(self):
        self.source = qemu_source.local(self.tarball(
            '10.0.8', hello_c='1st\ntwo\nthree\n'))
        other = self.top / 'other'
        with self.assertRaisesRegex(
                errors.ToolError,
                r'0001-hello-3-h-h.patch does not apply to QEMU 10\.0\.8:\n'
                r'  \| error: patch failed: hello\.c:1') as caught:
            self._edit(other)
        self.assertIn('git am --continue', caught.exception.hint)
        with self.assertRaisesRegex(errors.ToolError, 'middle of git am'):
            qemu_series.refresh(other, self._series())
        with self.assertRaisesRegex(errors.ToolError, 'middle of git am'):
            self._edit(other)
        # The way out that the error names.
        (other / 'hello.c').write_text('1st\ntwo\n3\n')
        self.git(other, 'add', 'hello.c')
        with self.assertRaises(subprocess.CalledProcessError):
            self.git(other, 'am', '--continue')
        (other / 'hello.c').write_text('1\ntwo\n3\n')
        self.git(other, 'add', 'hello.c')
        self.git(other, 'am', '--continue')
        qemu_series.refresh(other, self._series())
        self.assertEqual('10.0.8', self._series().made_for)
        self.assertEqual(2, len(self._series().patches))

    def test_hints_name_the_series(self):
        option = ' --series %s ' % self.patches

        def hinted(call, *commands):
            with self.assertRaises(errors.ToolError) as caught:
                call()
            for command in commands:
                self.assertIn('tools/qemu-series ' + command + option,
                              caught.exception.hint)

        hinted(lambda: qemu_series.refresh(self.top, self._series()), 'edit')
        self.commit(self.tree, '1\n2\n3\n', 'hello: 2')
        hinted(self._edit, 'refresh', 'edit')
        last = self._series().patches[-1]
        last.write_text(last.read_text().replace('Body', 'Changed'))
        hinted(lambda: qemu_series.refresh(self.tree, self._series()),
               'refresh')
        self.source = qemu_source.local(self.tarball(
            '10.0.8', hello_c='other\n'))
        hinted(lambda: self._edit(self.top / 'other'), 'refresh')

    def test_refresh_refuses(self):
        before = self.contents(self.patches)

        def refused(pattern, tree=self.tree):
            with self.assertRaisesRegex(errors.ToolError, pattern):
                qemu_series.refresh(tree, self._series())
            self.assertEqual(before, self.contents(self.patches))

        refused('is no tree', self.top)
        refused('is no tree', self.top / 'nowhere')
        (self.tree / 'new.c').write_text('x')
        refused('not committed')
        (self.tree / 'new.c').unlink()
        self.git(self.tree, 'checkout', 'pristine')
        refused('no line that begins')
        self.git(self.tree, 'checkout', '--orphan', 'elsewhere')
        self.git(self.tree, 'commit', '-m', 'x')
        refused('no line that begins')

    def test_refresh_refuses_a_series_that_changed(self):
        last = self._series().patches[-1]
        last.write_text(last.read_text().replace('Body', 'Changed'))
        before = self.contents(self.patches)
        with self.assertRaisesRegex(errors.ToolError, 'has changed since'):
            qemu_series.refresh(self.tree, self._series())
        self.assertEqual(before, self.contents(self.patches))
        qemu_series.refresh(self.tree, self._series(), force=True)
        self.assertNotEqual(before, self.contents(self.patches))

    def test_main(self):
        other = self.top / 'other'
        common = [str(other), '--series', str(self.patches)]
        qemu_series.main(['edit', *common, '--source',
                          str(self.source.tarball)])
        qemu_series.main(['refresh', *common])
        self.assertEqual(
            [str(other), *map(str, self._series().patches)],
            self.stdout.getvalue().splitlines())
