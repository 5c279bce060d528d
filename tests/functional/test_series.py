# SPDX-License-Identifier: Apache-2.0
"""The series' own tests, which need no guest."""

import os
import random
import subprocess

from tests.functional import base


class SeriesTest(base.TestCase):

    def _run(self, name, timeout, *words):
        # tools/build-qemu puts it there.
        program = self.emulator.with_name(name)
        self.assertTrue(program.exists(), 'no %s beside %s: what '
                        'tools/build-qemu builds has it' % (
                            name, self.emulator))
        result = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors='replace', timeout=timeout, check=False, env={
                **os.environ, 'QTEST_QEMU_BINARY': str(self.emulator),
                'TMPDIR': str(self.home)})
        self.assertEqual(0, result.returncode, result.stdout)

    def _fuzz(self, name):
        # What it finds is printed, to be added to the corpus.
        seconds, seed = ((600, random.randrange(1 << 31)) if base.NIGHTLY
                         else (10, 1))
        self._run(name, seconds + 60, '--seconds=%d' % seconds,
                  '--seed=%d' % seed,
                  self.emulator.with_name(name + '.txt'))

    def test_qtest(self):
        self._run('page-fetch-test', 240)

    def test_fuzz_peer(self):
        self._fuzz('page-fetch-peer-fuzz')

    def test_fuzz_blob(self):
        self._fuzz('page-fetch-blob-fuzz')
