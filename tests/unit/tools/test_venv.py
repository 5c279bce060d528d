# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from unittest import mock

from tests.unit.tools import base
import virtavtools
from virtavtools import venv


class TestEnter(base.TestCase):

    def _enter(self, prefix):
        home = self.top / 'home'
        (home / 'bin').mkdir(parents=True)
        with (mock.patch.object(venv, 'ensure', return_value=home / 'bin'),
              mock.patch.object(sys, 'prefix', str(prefix)),
              mock.patch.object(sys, 'argv', ['tools/x', '--json']),
              mock.patch('os.execv') as execv):
            venv.enter()
        return execv

    def test_outside(self):
        python = self.top / 'home/bin/python'
        self._enter(self.top).assert_called_once_with(
            python, [python, 'tools/x', '--json'])

    def test_inside(self):
        # However it is spelt.
        self._enter(self.top / 'home/bin/..').assert_not_called()


class TestTrust(base.TestCase):

    def _trusted(self):
        return subprocess.run(
            ['git', 'config', '--get-all', 'safe.directory'], cwd=self.top,
            env=dict(os.environ, GIT_CONFIG_GLOBAL='/dev/null',
                     GIT_CONFIG_NOSYSTEM='1'),
            capture_output=True, text=True, check=False).stdout.split()

    def test_before_anything_is_installed(self):
        def build(*_arguments):
            self.assertEqual([str(virtavtools.ROOT)], self._trusted())

        with mock.patch.object(venv, '_build', side_effect=build) as asked:
            venv.ensure()
        asked.assert_called_once()

    def test_once(self):
        os.environ.update(GIT_CONFIG_COUNT='1',
                          GIT_CONFIG_KEY_0='safe.directory',
                          GIT_CONFIG_VALUE_0='/other')
        venv.trust_checkout()
        venv.trust_checkout()
        self.assertEqual(['/other', str(virtavtools.ROOT)], self._trusted())
