# SPDX-License-Identifier: Apache-2.0
"""Each target for a while: 30 s, or 10 minutes at night."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).parents[2]
NIGHTLY = os.environ.get('VIRTAV_NIGHTLY') == '1'
SECONDS = 600 if NIGHTLY else 30
#: What the planted bug may take at most.
PLANTED = 120


class FuzzTest(unittest.TestCase):

    def fuzz(self, name, seconds=SECONDS):
        """Run a target.

        :returns: the process that has ended
        """
        done = subprocess.run(
            [sys.executable, '-m', 'tests.fuzz', name, '--seconds',
             str(seconds), '--seed', '0' if NIGHTLY else '1'],
            cwd=ROOT, capture_output=True, text=True,
            timeout=4 * seconds + 300)
        print(done.stdout, done.stderr)
        return done

    def check(self, name):
        done = self.fuzz(name)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertIn('no finding', done.stdout)

    def test_wire(self):
        self.check('wire')

    def test_link(self):
        self.check('link')

    def test_recording(self):
        self.check('recording')

    def test_rules(self):
        self.check('rules')

    def test_a_planted_bug_is_found(self):
        done = self.fuzz('planted', PLANTED)
        self.assertEqual(1, done.returncode, done.stdout + done.stderr)
        self.assertIn('format requires', done.stdout)
        self.assertRegex(done.stdout, r'found-\S+, [0-9]+ bytes: 56415046')


class SurvivalTest(unittest.TestCase):
    """What the fuzzer takes for survived."""

    def survive(self, *contents):
        with tempfile.TemporaryDirectory() as home:
            for number, content in enumerate(contents):
                (pathlib.Path(home) / ('%03d' % number)).write_bytes(content)
            return subprocess.run(
                [sys.executable, '-m', 'tests.fuzz', 'survival', '--home',
                 home], cwd=ROOT, capture_output=True, text=True)

    def test_garbage_beside_a_good_rule(self):
        done = self.survive(b'', b'\0\xff', b'rule x {', b'include "/etc/p"',
                            b'rule nothing { condition: filesize > 1 }')
        self.assertEqual(0, done.returncode, done.stderr)

    def test_a_failure_is_told(self):
        # A store that cannot be written.
        done = subprocess.run(
            [sys.executable, '-m', 'tests.fuzz', 'survival', '--home',
             '/proc/nowhere'], cwd=ROOT, capture_output=True, text=True)
        self.assertNotEqual(0, done.returncode)
