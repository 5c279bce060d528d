# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import types
from unittest import mock
from urllib import error as urllib_error

from tests.unit.tools import base
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_source


def _args(**words):
    return types.SimpleNamespace(**{
        'source': None, 'upstream': None, 'sha256': None,
        'refresh': False} | words)


class TestVersion(base.TestCase):

    def test_wanted(self):
        for version in ('10.0.0', '10.0.13', '10.0.49'):
            qemu_source.check_version(version, 'it')

    def test_refused(self):
        for version in ('9.2.1', '10.0', '10.0.50', '10.1.0', '110.0.1',
                        '10.0.1-rc1', ''):
            with (self.subTest(version),
                  self.assertRaisesRegex(errors.ToolError,
                                         'needs a release 10.0.x')):
                qemu_source.check_version(version, 'it')


class TestLocal(base.TestCase):

    def test_checksum(self):
        tarball = self.tarball()
        sha256 = hashlib.sha256(tarball.read_bytes()).hexdigest()
        source = qemu_source.resolve(_args(source=str(tarball),
                                           sha256=sha256.upper()))
        self.assertEqual((None, sha256, tarball), source)

    def test_wrong_checksum(self):
        with self.assertRaisesRegex(errors.ToolError, 'has the SHA-256'):
            qemu_source.resolve(_args(source=str(self.tarball()),
                                      sha256='00'))

    def test_missing(self):
        with self.assertRaisesRegex(errors.ToolError, 'there is no file'):
            qemu_source.resolve(_args(source='/no/such.tar'))

    def test_checksum_of_nothing(self):
        with self.assertRaisesRegex(errors.ToolError, '--sha256 goes with'):
            qemu_source.resolve(_args(sha256='00'))


class TestUpstream(base.TestCase):

    def setUp(self):
        super().setUp()
        self.install = self._patch(mock.patch.object(packages, 'install'))

    def _answer(self, **words):
        return self._patch(mock.patch('urllib.request.urlopen', **words))

    def test_other_version_asks_nobody(self):
        urlopen = self._answer()
        with self.assertRaisesRegex(errors.ToolError, 'names QEMU 9.2.0'):
            qemu_source.resolve(_args(upstream='9.2.0'))
        urlopen.assert_not_called()

    def test_no_network(self):
        self._answer(side_effect=urllib_error.URLError('no route'))
        with self.assertRaisesRegex(errors.ToolError, 'no route') as caught:
            qemu_source.upstream('10.0.3', '00')
        self.assertIn('--source', caught.exception.hint)

    def test_without_checksum_asks_nobody(self):
        urlopen = self._answer()
        with self.assertRaisesRegex(errors.ToolError,
                                    'checksum of QEMU 10.0.3') as caught:
            qemu_source.resolve(_args(upstream='10.0.3'))
        self.assertIn('--sha256', caught.exception.hint)
        urlopen.assert_not_called()
        self.install.assert_not_called()

    def test_wrong_checksum(self):
        with open(self.tarball(), 'rb') as stream:
            stream.headers = {}
            self._answer(return_value=stream)
            with self.assertRaisesRegex(errors.ToolError, 'has the SHA-256'):
                qemu_source.upstream('10.0.7', '00')
        self.assertFalse((cache.root() / 'source').exists())

    def test_certificates_come_first(self):
        urlopen = self._answer()
        self.install.side_effect = errors.ToolError('not root')
        with self.assertRaisesRegex(errors.ToolError, 'not root'):
            qemu_source.upstream('10.0.3', '00')
        self.assertEqual('ca-certificates', self.install.call_args[0][0])
        urlopen.assert_not_called()

    def test_fetched_once(self):
        tarball = self.tarball()
        sha256 = hashlib.sha256(tarball.read_bytes()).hexdigest()
        with open(tarball, 'rb') as stream:
            stream.headers = {}
            urlopen = self._answer(return_value=stream)
            first = qemu_source.upstream('10.0.7', sha256)
        self.assertEqual(tarball.read_bytes(), first.tarball.read_bytes())
        self.assertEqual(first, qemu_source.upstream('10.0.7', sha256))
        urlopen.assert_called_once()
        with self.assertRaisesRegex(errors.ToolError, 'has the SHA-256'):
            qemu_source.upstream('10.0.7', '00')


class TestDebian(base.TestCase):

    def setUp(self):
        super().setUp()
        self.tar = self.tarball()
        self.sha256 = hashlib.sha256(self.tar.read_bytes()).hexdigest()
        self._patch(mock.patch.object(packages, 'install'))
        self.real_fetch = qemu_source._debian_fetch
        self.fetch = self._patch(mock.patch.object(
            qemu_source, '_debian_fetch', self._fetch))
        self.fetched = 0
        self.debian = 'packaging'

    def _fetch(self, _step, top):
        self.fetched += 1
        name = 'qemu_10.0.7+ds.orig.tar.gz'
        (top / name).write_bytes(self.tar.read_bytes())
        debian = 'qemu_10.0.7+ds-1.debian.tar.xz'
        (top / debian).write_text(self.debian)
        dsc = top / 'qemu_10.0.7+ds-1.dsc'
        dsc.write_text(
            'Checksums-Sha1:\n %s 1 %s\nChecksums-Sha256:\n %s 1 %s\n %s 1 '
            '%s\n' % ('1' * 40, name, self.sha256, name,
                      hashlib.sha256(b'packaging').hexdigest(), debian))
        return dsc

    def test_fetched_once(self):
        first = qemu_source.debian()
        self.assertEqual(('10.0.7', self.sha256),
                         (first.version, first.sha256))
        self.assertEqual(first, qemu_source.debian())
        self.assertEqual(1, self.fetched)
        qemu_source.debian(refresh=True)
        self.assertEqual(2, self.fetched)

    def test_lost_tarball_is_fetched_again(self):
        qemu_source.debian().tarball.unlink()
        self.assertTrue(qemu_source.debian().tarball.exists())

    def test_wrong_checksum(self):
        self.sha256 = '1' * 64
        with self.assertRaisesRegex(errors.ToolError, 'has the SHA-256'):
            qemu_source.debian()

    def test_package(self):
        names = ['qemu_10.0.7+ds-1.dsc', 'qemu_10.0.7+ds.orig.tar.gz',
                 'qemu_10.0.7+ds-1.debian.tar.xz']
        files = qemu_source.debian_package()
        self.assertEqual(names, [path.name for path in files])
        self.assertEqual('packaging', files[2].read_text())
        self.assertEqual(files, qemu_source.debian_package())
        self.assertEqual(1, self.fetched)
        files[0].unlink()
        self.assertEqual(files, qemu_source.debian_package())
        self.assertTrue(files[0].exists())
        self.assertEqual(2, self.fetched)
        qemu_source.debian_package(refresh=True)
        self.assertEqual(3, self.fetched)

    def test_package_where_the_tarball_alone_was_kept(self):
        qemu_source.debian()
        path = cache.root() / 'source' / 'debian-trixie.json'
        record = json.loads(path.read_text())
        del record['others']
        path.write_text(json.dumps(record))
        self.assertEqual(3, len(qemu_source.debian_package()))
        self.assertEqual(2, self.fetched)

    def test_wrong_packaging(self):
        self.debian = 'other packaging'
        with self.assertRaisesRegex(errors.ToolError,
                                    'debian.tar.xz has the SHA-256'):
            qemu_source.debian()

    def test_no_user_apt(self):
        top = self.top / 'apt'
        top.mkdir()

        def apt(_step, *words, cwd=None):
            if cwd:
                (cwd / 'qemu_10.0.7+ds-1.dsc').write_text('it')

        with (mock.patch.object(qemu_source, 'debian_sources',
                                return_value=('http://a', '')),
              mock.patch.object(packages, 'apt', apt),
              mock.patch('os.geteuid', return_value=0),
              mock.patch('shutil.chown', side_effect=LookupError) as chown):
            self.assertEqual('it', self.real_fetch(None, top).read_text())
        chown.assert_called_once()


class TestDebianSources(base.TestCase):

    def _lines(self, os_id, main, security):
        with (mock.patch.object(packages, 'os_release',
                                return_value={'ID': os_id,
                                              'VERSION_CODENAME': 'x'}),
              mock.patch.object(packages, 'mirror', lambda security=False:
                                mirrors[security])):
            mirrors = {False: main, True: security}
            return [line.split()[2:] for line in
                    qemu_source.debian_sources()[1].splitlines()]

    def test_own_mirror(self):
        self.assertEqual([['http://a/debian', 'trixie', 'main'],
                          ['http://a/debian', 'trixie-updates', 'main'],
                          ['http://a/sec', 'trixie-security', 'main']],
                         self._lines('debian', 'http://a/debian',
                                     'http://a/sec'))

    def test_packages(self):
        with (mock.patch.object(packages, 'os_release', return_value={
                'ID': 'ubuntu', 'VERSION_CODENAME': 'x'})):
            lines = qemu_source.debian_sources('deb')[1].splitlines()
        self.assertEqual({'deb'}, {line.split()[0] for line in lines})

    def test_no_security_mirror(self):
        self.assertEqual(2, len(self._lines('debian', 'http://a', None)))

    def test_no_mirror(self):
        with self.assertRaisesRegex(errors.ToolError, 'apt has no sources'):
            self._lines('debian', None, None)

    def test_ubuntu(self):
        self.assertEqual('http://deb.debian.org/debian-security',
                         self._lines('ubuntu', 'http://u', 'http://u')[2][0])
