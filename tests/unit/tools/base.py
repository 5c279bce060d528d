# SPDX-License-Identifier: Apache-2.0

import io
import os
import pathlib
import subprocess
import tarfile
import tempfile
import unittest
from unittest import mock

from virtavtools import qemu_series

#: The scripts under test.
TOOLS = pathlib.Path(__file__).parents[3] / 'tools'


class TestCase(unittest.TestCase):
    """A test with a directory, a cache and an stderr of its own."""

    def setUp(self):
        super().setUp()
        top = tempfile.TemporaryDirectory()
        self.addCleanup(top.cleanup)
        self.top = pathlib.Path(top.name)
        self._patch(mock.patch.dict(
            os.environ, {'XDG_CACHE_HOME': str(self.top / 'cache')}))
        self.stderr = self._patch(mock.patch('sys.stderr', io.StringIO()))
        self.stdout = self._patch(mock.patch('sys.stdout', io.StringIO()))

    def _patch(self, patcher):
        self.addCleanup(patcher.stop)
        return patcher.start()

    def tarball(self, version='10.0.7', **files):
        """Make a tarball that looks like QEMU from afar.

        :param files: name with ``_`` for ``.`` -> text
        :returns: its path
        """
        files = {'VERSION': version + '\n',
                 'hello.c': 'one\ntwo\nthree\n',
                 'left.patch': 'named by .gitignore\n',
                 '.gitignore': '*.patch\n/build/\n'} | {
                     name.replace('_', '.'): text
                     for name, text in files.items()}
        path = self.top / ('qemu-%s.tar.gz' % version)
        with tarfile.open(path, 'w:gz') as archive:
            for name, text in files.items():
                entry = tarfile.TarInfo('qemu-%s/%s' % (version, name))
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        return path

    def git(self, tree, *words):
        """Run git; gives back what it prints."""
        return subprocess.run(
            ['git', '-C', tree, *words], env=qemu_series.git_env(),
            check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, tree, text, subject):
        """Commit a change of hello.c."""
        (tree / 'hello.c').write_text(text)
        self.git(tree, 'commit', '--all', '-m', subject)

    def contents(self, directory):
        """Names and bytes of a directory's files."""
        return {path.name: path.read_bytes()
                for path in directory.iterdir()}
