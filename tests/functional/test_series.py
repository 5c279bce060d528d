# SPDX-License-Identifier: Apache-2.0
"""The series' own test, which needs no guest."""

import os
import subprocess

from tests.functional import base


class SeriesTest(base.TestCase):

    def test_qtest(self):
        # tools/build-qemu puts it there.
        program = self.emulator.with_name('page-fetch-test')
        if not program.exists():
            self.skipTest('no %s beside %s' % (program.name, self.emulator))
        result = subprocess.run(
            [program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors='replace',
            timeout=120, check=False, env={
                **os.environ, 'QTEST_QEMU_BINARY': str(self.emulator),
                'TMPDIR': str(self.home)})
        self.assertEqual(0, result.returncode, result.stdout)
