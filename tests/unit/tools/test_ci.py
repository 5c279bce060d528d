# SPDX-License-Identifier: Apache-2.0

import shutil
import subprocess

from tests.unit.tools import base

RUN = base.TOOLS.parent / '.ci' / 'run'


class TestRun(base.TestCase):

    lost = False

    def setUp(self):
        super().setUp()
        self.origin = self.top / 'origin'
        (self.origin / '.ci').mkdir(parents=True)
        (self.origin / 'tools').mkdir()
        shutil.copy(RUN, self.origin / '.ci')
        tool = self.origin / 'tools' / 'test'
        tool.write_text('#!/bin/sh\necho "$@"; git rev-list --count HEAD\n')
        tool.chmod(0o755)
        self.git(self.origin, 'init', '--quiet')
        self.git(self.origin, 'add', '.')
        for subject in ('one', 'two', 'three'):
            self.git(self.origin, 'commit', '--allow-empty', '-m', subject)

    def _run(self, *options):
        """Run it in a clone; gives back how many commits that has then."""
        clone = self.top / 'clone'
        self.git(self.top, 'clone', '--quiet', *options,
                 'file://%s' % self.origin, clone)
        if self.lost:
            shutil.rmtree(self.origin)
        result = subprocess.run(
            [clone / '.ci' / 'run', 'unit'], capture_output=True, text=True,
            check=True)
        self.assertEqual('', result.stderr)
        name, count = result.stdout.split()
        self.assertEqual('unit', name)
        return int(count)

    def test_full(self):
        self.assertEqual(3, self._run())

    def test_shallow(self):
        self.assertEqual(3, self._run('--depth=1'))

    def test_shallow_without_network(self):
        self.lost = True
        self.assertEqual(1, self._run('--depth=1'))
