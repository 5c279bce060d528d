# SPDX-License-Identifier: Apache-2.0

from unittest import mock

from tests.unit.tools import base
from virtavtools import errors
from virtavtools import packages
from virtavtools import ui

_DEB822 = '''\
# A comment
Types: deb deb-src
URIs: https://vendor.example/linux
Suites: bookworm
Components: main

Types: deb
# URIs: http://commented.example/debian
URIs: http://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY865UxYJKwYBBAHaRw8BAQdAd7Z0srwuhlB6JKFkcf4HU4SSS
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://switched-off.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
'''
_ONE_LINE = '''\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] https://vendor.example/linux bookworm main
deb-src [ trusted=yes ] http://mirror.example/debian bookworm main # why
deb http://mirror.example/debian bookworm-updates main
deb http://security.example/debian-security/ bookworm-security main
deb cdrom:[Debian 12]/ bookworm main
deb http://flat.example/ ./
'''


class TestMirror(base.TestCase):

    def setUp(self):
        super().setUp()
        self._patch(mock.patch.object(packages, 'codename',
                                      return_value='bookworm'))
        (self.top / 'sources.list.d').mkdir()

    def _mirrors(self):
        return (packages.mirror(etc=self.top),
                packages.mirror(security=True, etc=self.top))

    def test_deb822(self):
        path = self.top / 'sources.list.d' / 'debian.sources'
        path.write_text(_DEB822)
        self.assertEqual(('http://mirror.example/debian',
                          'http://security.example/debian-security'),
                         self._mirrors())

    def test_one_line(self):
        (self.top / 'sources.list').write_text(_ONE_LINE)
        self.assertEqual(('http://mirror.example/debian',
                          'http://security.example/debian-security'),
                         self._mirrors())

    def test_mirror_file(self):
        (self.top / 'mirrors').write_text(
            '# ours\nhttps://cloud.example/debian/ priority:1\n')
        (self.top / 'sources.list').write_text(
            'deb mirror+file:%s bookworm main\n' % (self.top / 'mirrors'))
        self.assertEqual('https://cloud.example/debian',
                         packages.mirror(etc=self.top))

    def test_none(self):
        (self.top / 'sources.list').write_text('# empty\n')
        path = self.top / 'sources.list.d' / 'debian.sources.disabled'
        path.write_text(_DEB822)
        self.assertEqual((None, None), self._mirrors())


class TestInstall(base.TestCase):

    def setUp(self):
        super().setUp()
        self._patch(mock.patch.object(packages, 'missing', list))
        self.sources = self._patch(mock.patch.object(
            packages, 'sources', return_value=['one']))
        self.geteuid = self._patch(mock.patch('os.geteuid', return_value=0))
        self.run = self._patch(mock.patch.object(ui, 'run'))

    def _fails(self, output):
        self.run.side_effect = ui.CommandError('apt-get: failed', output)
        with self.assertRaises(errors.ToolError) as caught:
            packages.install('gcc', why='to build QEMU')
        return '%s; %s' % (caught.exception, caught.exception.hint)

    def _verbs(self):
        return [call.args[1][len(packages._APT)]
                for call in self.run.mock_calls]

    def test_nothing_to_do(self):
        packages.install(why='for nothing')
        self.run.assert_not_called()

    def test_not_root(self):
        self.geteuid.return_value = 1000
        self.assertEqual(
            'packages are missing to build QEMU: gcc; run as root: '
            'apt-get install --no-install-recommends gcc', self._fails(''))
        self.run.assert_not_called()

    def test_lists_are_updated_once(self):
        self.run.side_effect = [
            ui.CommandError('', 'E: Unable to locate package gcc'),
            ui.CommandError('', 'one source does not answer'), None]
        packages.install('gcc', why='to build QEMU')
        self.assertEqual(['install', 'update', 'install'], self._verbs())

    def test_no_sources(self):
        self.sources.return_value = []
        self.assertIn('apt has no sources', self._fails(
            'E: Unable to locate package gcc'))

    def test_no_such_package(self):
        self.assertIn('none of the sources of apt has the package gcc;',
                      self._fails('E: Unable to locate package gcc'))

    def test_no_network(self):
        self.assertIn(
            'no network: apt cannot reach mirror.example;', self._fails(
                'Err:1 http://mirror.example/debian bookworm InRelease\n'
                '  Temporary failure resolving \'mirror.example\''))
        self.assertEqual(['install'], self._verbs())

    def test_lock_is_waited_for(self):
        self.run.side_effect = [
            ui.CommandError('', 'E: Could not get lock /var/lib/apt/lists'),
            None]
        with mock.patch('time.sleep'):
            packages.install('gcc', why='to build QEMU')
        self.assertEqual(['install', 'install'], self._verbs())

    def test_lock_stays(self):
        with mock.patch.object(packages, '_LOCK_PATIENCE', -1):
            self.assertIn('another program holds the lock', self._fails(
                'E: Could not get lock /var/lib/dpkg/lock-frontend.'))

    def test_other_failure_is_shown(self):
        self.assertIn('apt-get: failed', self._fails('E: something else'))
