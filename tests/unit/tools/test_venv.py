# SPDX-License-Identifier: Apache-2.0

import sys
from unittest import mock

from tests.unit.tools import base
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
