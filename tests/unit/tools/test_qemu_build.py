# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from unittest import mock

from tests.unit.tools import base
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_build
from virtavtools import qemu_series
from virtavtools import qemu_source


class TestArguments(base.TestCase):

    def _run(self, *words):
        result = subprocess.run(
            [sys.executable, base.TOOLS / 'build-qemu',
             *words], capture_output=True, text=True, check=False)
        self.assertEqual('', result.stdout)
        self.assertNotIn('Traceback', result.stderr)
        return result.returncode, result.stderr

    def test_usage(self):
        for words, message in (
                (['--jobs', '0'], "must be 1 or more, not '0'"),
                (['--nonsense'], 'unrecognized arguments'),
                (['--source', 'a', '--upstream', '10.0.1'], 'not allowed'),
                (['--deb', '--stock'], 'not allowed'),
                (['--deb', '--source', 'a'], 'goes without --source'),
                (['--deb', '--upstream', '10.0.1'], 'goes without')):
            with self.subTest(words=words):
                status, said = self._run(*words)
                self.assertEqual(2, status)
                self.assertIn(message, said)

    def test_no_such_tarball(self):
        status, said = self._run('--stock', '--source', '/no/such.tar.xz')
        self.assertEqual(1, status)
        self.assertEqual('error: there is no file /no/such.tar.xz\n'
                         '  way out: give --source the path of a QEMU '
                         'tarball\n', said)

    def test_wrong_version(self):
        status, said = self._run('--stock', '--source',
                                 self.tarball('9.2.1'))
        self.assertEqual(1, status)
        self.assertIn('is QEMU 9.2.1; this needs a release 10.0.x', said)
        self.assertIn('  way out: ', said)

    def test_empty_series(self):
        status, said = self._run('--series', self.top)
        self.assertEqual(1, status)
        self.assertIn('lists no patches', said)

    def test_no_tarball(self):
        (self.top / 'junk').write_text('junk')
        status, said = self._run('--stock', '--source', self.top / 'junk')
        self.assertEqual(1, status)
        self.assertIn('is no source tarball of QEMU', said)


class TestEnsure(base.TestCase):

    def setUp(self):
        super().setUp()
        self.source = qemu_source.local(self.tarball(
            meson_build='    unpack_edk2_blobs = bzip2.found()\n'))
        self.patches = self.top / 'patches'
        tree = self.top / 'tree'
        qemu_series.edit(tree, self.source, self._series())
        self.commit(tree, '1\ntwo\nthree\n', 'hello: 1')
        qemu_series.refresh(tree, self._series())
        self._patch(mock.patch.object(packages, 'install'))
        self._patch(mock.patch.object(qemu_build, '_FIRMWARE', ()))

    def _series(self):
        return qemu_series.Series(self.patches)

    def _entries(self):
        return [path.name for path in (cache.root() / 'qemu').iterdir()
                if not path.name.endswith('.lock')]

    def test_series_does_not_apply(self):
        other = qemu_source.local(self.tarball('10.0.9', hello_c='other\n'))
        with self.assertRaisesRegex(
                errors.ToolError, r'0001-hello-1\.patch does not apply to '
                r'QEMU 10\.0\.9') as caught:
            qemu_build.ensure(other, self._series())
        option = ' --series %s' % self.patches
        self.assertIn('tools/qemu-series edit%s;' % option,
                      caught.exception.hint)
        self.assertIn('tools/build-qemu%s --upstream 10.0.7 --sha256 HEX'
                      % option, caught.exception.hint)
        self.assertEqual([], self._entries())

    def test_no_firmware(self):
        with (mock.patch.object(qemu_build, '_FIRMWARE', ('/no/bios.bin',)),
              self.assertRaisesRegex(errors.ToolError, '/no/bios.bin')):
            qemu_build.ensure(self.source)

    def _compile(self, emulator):
        """Stands in for the compiler; gives the tree it would compile."""
        def run(_step, argv, _log, cwd=None, **_words):
            if argv[0] == 'ninja':
                self.git(cwd.parent / 'src', 'status')
                self.meson = (cwd.parent / 'src/meson.build').read_text()
                self.hello = (cwd.parent / 'src/hello.c').read_text()
                for name in argv[2:]:
                    (cwd / name).parent.mkdir(parents=True, exist_ok=True)
                    (cwd / name).write_text('#!/bin/sh\n' + emulator)
                    (cwd / name).chmod(0o755)
        return run

    def _ensure(self, emulator, series):
        real = qemu_build.ui.run
        fake = self._compile(emulator)

        def run(step, argv, *words, **more):
            tool = str(argv[0])
            return (fake if tool == 'ninja' or 'configure' in tool
                    else real)(step, argv, *words, **more)

        with (mock.patch.object(qemu_build.ui, 'run', run),
              mock.patch.object(qemu_build.venv, 'plain',
                                return_value=self.top)):
            return qemu_build.ensure(self.source, series)

    def test_built_once_and_found(self):
        emulator = self._ensure('echo page-fetch-monitor', self._series())
        self.assertEqual('1\ntwo\nthree\n', self.hello)
        self.assertIn("get_option('install_blobs') and bzip2.found()",
                      self.meson)
        self.assertEqual({'qemu-system-x86_64', 'qemu-img', 'page-fetch-test',
                          'page-fetch-blob-fuzz', 'page-fetch-peer-fuzz'},
                         set(self.contents(emulator.parent)))
        self.assertEqual([emulator.parents[1].name], self._entries())
        self.hello = None
        self.assertEqual(emulator, self._ensure('', self._series()))
        self.assertIsNone(self.hello)
        stock = self._ensure('', None)
        self.assertEqual('one\ntwo\nthree\n', self.hello)
        self.assertNotEqual(emulator, stock)

    def test_emulator_without_the_monitor(self):
        with self.assertRaisesRegex(errors.ToolError, 'has no object'):
            self._ensure('echo secret tls-creds', self._series())
        self.assertEqual([], self._entries())

    def test_emulator_does_not_start(self):
        with self.assertRaisesRegex(errors.ToolError,
                                    'does not run: could not load BIOS'):
            self._ensure('echo could not load BIOS >&2; exit 1', None)
        self.assertEqual([], self._entries())
