# SPDX-License-Identifier: Apache-2.0

import collections
import os
import re
import shutil
import stat
import subprocess
import unittest

from oslo_config import cfg

from tests.unit import base
from virtav_nova import conf as virtav_conf

_ETC = base.ROOT / 'etc'
_UNIT = _ETC / 'systemd' / 'virtav-scan-worker.service'


def _settings():
    """The unit's settings: lists of values by section and name."""
    found = collections.defaultdict(list)
    section = None
    for line in _UNIT.read_text().splitlines():
        if re.fullmatch(r'\[\w+\]', line):
            section = line[1:-1]
        elif line and not line.startswith('#'):
            name, equals, value = line.partition('=')
            assert equals, line
            found[section, name].append(value)
    return found


class UnitTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.settings = _settings()
        self.conf = cfg.ConfigOpts()
        virtav_conf.register_opts(self.conf)
        self.conf([])

    def _assert_setting(self, name, *values):
        self.assertEqual(list(values), self.settings['Service', name], name)

    def test_shut_in(self):
        for name in ('NoNewPrivileges', 'PrivateNetwork', 'PrivateTmp',
                     'PrivateDevices', 'ProtectHome', 'ProtectClock',
                     'ProtectHostname', 'ProtectKernelLogs',
                     'ProtectKernelModules', 'ProtectKernelTunables',
                     'ProtectControlGroups', 'RestrictNamespaces',
                     'RestrictRealtime', 'RestrictSUIDSGID',
                     'LockPersonality', 'MemoryDenyWriteExecute'):
            self._assert_setting(name, 'yes')
        for name in ('CapabilityBoundingSet', 'AmbientCapabilities'):
            self._assert_setting(name, '')
        self._assert_setting('ProtectSystem', 'strict')
        self._assert_setting('RestrictAddressFamilies', 'AF_UNIX')
        self._assert_setting('SystemCallArchitectures', 'native')
        # It would hide who is at the other end of a socket.
        self._assert_setting('PrivateUsers')

    def test_fits_the_options(self):
        options = self.conf.virtav_worker
        self._assert_setting('User', options.user)
        for directory, below, paths in (
                ('RuntimeDirectory', '/run/', (
                    options.socket, options.status_socket)),
                ('StateDirectory', '/var/lib/', (options.journal_path,))):
            value, = self.settings['Service', directory]
            for path in paths:
                self.assertTrue(path.startswith(f'{below}{value}/'), path)
        stop, = self.settings['Service', 'TimeoutStopSec']
        self.assertGreater(int(stop), options.drain_timeout)
        start, = self.settings['Service', 'TimeoutStartSec']
        self.assertGreater(int(start), options.load_timeout)
        files, = self.settings['Service', 'LimitNOFILE']
        self.assertGreaterEqual(int(files), 2 * options.max_sessions + 64)

    def test_told_how_it_is(self):
        self._assert_setting('Type', 'notify')
        self._assert_setting('WatchdogSec', '30')
        self._assert_setting('Restart', 'always')
        self._assert_setting('KillMode', 'mixed')
        reload, = self.settings['Service', 'ExecReload']
        self.assertIn('-HUP', reload)

    @unittest.skipUnless(shutil.which('systemd-analyze'),
                         'systemd-analyze is not installed')
    def test_exposure(self):
        # Version 250 is the first that needs no running systemd for it.
        version = subprocess.run(
            ['systemd-analyze', '--version'], text=True, check=True,
            capture_output=True).stdout
        if int(version.split()[1]) < 250:
            self.skipTest(version.partition('\n')[0])
        ended = subprocess.run(
            ['systemd-analyze', 'security', '--offline=yes', '--no-pager',
             '--threshold=10', str(_UNIT)], text=True, capture_output=True)
        self.assertEqual(0, ended.returncode, ended.stderr + ended.stdout)

    @unittest.skipUnless(shutil.which('systemd-analyze'),
                         'systemd-analyze is not installed')
    def test_understood(self):
        ended = subprocess.run(
            ['systemd-analyze', 'verify', '--recursive-errors=no',
             str(_UNIT)], text=True, capture_output=True)
        lines = [line for line in ended.stderr.splitlines()
                 if 'virtav' in line and 'is not executable' not in line]
        self.assertEqual([], lines)


@unittest.skipIf(os.geteuid(), 'only root makes users and directories')
class HostTest(base.TestCase):
    """The users and directories of a host, made below another root."""

    def _run(self, program, *arguments):
        if not shutil.which(program):
            self.skipTest(f'{program} is not installed')
        subprocess.run([program, f'--root={self.top}', *arguments],
                       check=True, text=True, capture_output=True)

    def test_made(self):
        for directory, name in (('sysusers.d', 'virtav.conf'),
                                ('tmpfiles.d', 'virtav.conf')):
            self.write(f'usr/lib/{directory}/{name}',
                       (_ETC / directory / name).read_bytes())
        self.write('usr/lib/sysusers.d/nova.conf', 'u nova -\n')
        (self.top / 'etc').mkdir()
        self._run('systemd-sysusers')
        users = {line.split(':')[0]: line.split(':') for line in
                 (self.top / 'etc' / 'passwd').read_text().splitlines()}
        self.assertIn('nologin', users['virtav'][6])
        self._run('systemd-tmpfiles', '--create', 'virtav.conf')
        registrations = (self.top / 'var/lib/virtav-instances').stat()
        self.assertEqual(
            (0o2751, int(users['nova'][2]), int(users['virtav'][3])), (
                stat.S_IMODE(registrations.st_mode), registrations.st_uid,
                registrations.st_gid))
        sockets = (self.top / 'run' / 'virtav').stat()
        self.assertEqual((0o755, int(users['virtav'][2])), (
            stat.S_IMODE(sockets.st_mode), sockets.st_uid))
