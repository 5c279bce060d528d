# SPDX-License-Identifier: Apache-2.0

import pathlib
from unittest import mock

from tests.unit.tools import base
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_build
from virtavtools import qemu_deb
from virtavtools import qemu_series
from virtavtools import qemu_source
from virtavtools import ui

_PATCH = '''\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: %s
Date: %s
Subject: [PATCH] %s

Why.

---
diff --git a/hello.c b/hello.c
'''
_VERSION = '1:10.0.7+ds-1+deb13u2'
#: What dpkg-source says of a patch that does not apply.
_REJECTED = '''\
dpkg-source: info: applying qemu-img-options.patch
patching file good.c
dpkg-source: info: using patch list from debian/patches/series
dpkg-source: info: applying virtav/0001-hello.patch
dpkg-source: info: applying virtav/0002-world.patch
patching file good.c
Hunk #1 succeeded at 12 (offset 2 lines).
patching file hello.c
Hunk #2 FAILED at 1.
1 out of 2 hunks FAILED
dpkg-source: error: LC_ALL=C patch -t -F 0 -N -p1 -u -V never -E -b -B \
.pc/virtav/0002-world.patch/ --reject-file=- < src/debian/patches/virtav/\
0002-world.patch subprocess returned exit status 1
'''


class _SeriesCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.patches = self.top / 'patches'
        self.patches.mkdir()
        self._add('0001-hello.patch', 'A <a@example.org>',
                  'Sun, 22 Nov 2026 12:00:00 +0100', 'hello: say more')
        self._add('0002-world.patch', '=?utf-8?q?B=C3=A4?= <b@example.org>',
                  'Sun, 22 Nov 2026 11:30:00 +0000',
                  'world: a subject so long that\n it goes on below')

    def _add(self, name, author, date, subject):
        (self.patches / name).write_text(_PATCH % (author, date, subject))
        with open(self.patches / 'series', 'a') as series:
            series.write(name + '\n')

    def _series(self):
        return qemu_series.Series(self.patches)


class TestChangelog(_SeriesCase):

    def test_entry(self):
        # The second patch is the newer one, though its clock shows less.
        self.assertEqual('''\
qemu (1:2-3+virtav1) trixie; urgency=medium

  * Add the page-fetch monitor of VirtAV, series %s:
    - hello: say more
    - world: a subject so long that it goes on below

 -- Bä <b@example.org>  Sun, 22 Nov 2026 11:30:00 +0000

''' % self._series().digest[:12], qemu_deb.changelog_entry(
            '1:2-3+virtav1', self._series()))

    def test_no_date(self):
        for patch in self._series().patches:
            patch.write_text(patch.read_text().replace('Date: ', 'Day: '))
        with self.assertRaisesRegex(errors.ToolError, 'no patch of .* has'):
            qemu_deb.changelog_entry('1', self._series())


class TestEnsure(_SeriesCase):

    def setUp(self):
        super().setUp()
        self.files = [self.top / name for name in (
            'qemu_10.0.7+ds-1+deb13u2.dsc', 'qemu_10.0.7+ds.orig.tar.xz',
            'qemu_10.0.7+ds-1+deb13u2.debian.tar.xz')]
        for path in self.files:
            path.write_text('Version: %s\n' % _VERSION)
        self.ran = []
        self.failing = None
        self.output = ''
        for target, name, value in (
                (packages, 'install', mock.DEFAULT),
                (qemu_deb, '_apt_options', lambda: ['--aptopt=proxy']),
                (qemu_source, 'debian_sources',
                 lambda kind: ('m', '%s m trixie main\n' % kind)),
                (ui, 'run', self._run)):
            self._patch(mock.patch.object(target, name, value))
        self.geteuid = self._patch(mock.patch('os.geteuid', return_value=0))

    def _run(self, _step, argv, log, env=None, **_words):
        """Stands in for the commands; what it is given is in self.ran."""
        argv = [str(word) for word in argv]
        self.ran.append((argv, env))
        if self.failing and self.failing in ' '.join(argv):
            log.write_text(self.output)
            raise ui.CommandError('it failed', self.output)
        if argv[0] == 'tar':
            self.root = pathlib.Path(argv[-1])
            (self.root / 'dev').mkdir()
        if argv[0] == 'mmdebstrap' and '--variant=buildd' in argv:
            pathlib.Path(argv[-2]).write_text('a tarball')
        if argv[0] == 'unshare' and '--build=source' in argv[-1]:
            self.place = self.contents_of(self.root / 'build')
            self._make('.dsc', '.debian.tar.xz', 'virtav1_source.changes')
        if argv[0] == 'unshare' and '--build=any' in argv[-1]:
            for name in ('qemu-utils', 'qemu-system-x86'):
                path = self.root / 'build' / (
                    '%s_10.0.7+ds-1+deb13u2+virtav1_amd64.deb' % name)
                path.write_text(name)

    def _make(self, *ends):
        for end in ends:
            (self.root / 'build' / (
                'qemu_10.0.7+ds-1+deb13u2+virtav1' + end)).write_text(end)

    def contents_of(self, directory):
        return {str(path.relative_to(directory)): path.read_text()
                for path in directory.rglob('*') if path.is_file()}

    def _ensure(self, **words):
        return qemu_deb.ensure(self.files, self._series(), **words)

    def _entries(self):
        return [path.name for path in (cache.root() / 'qemu-deb').iterdir()
                if not path.name.endswith('.lock')]

    def test_built_once_and_found(self):
        debs = self._ensure(jobs=3)
        self.assertEqual(['qemu-system-x86', 'qemu-utils'],
                         [path.read_text() for path in debs])
        # The source is beside the packages, complete.
        self.assertLessEqual(
            {'qemu_10.0.7+ds-1+deb13u2+virtav1.dsc',
             'qemu_10.0.7+ds-1+deb13u2+virtav1.debian.tar.xz',
             'qemu_10.0.7+ds.orig.tar.xz'},
            set(self.contents(debs[0].parent)))
        self.assertNotIn('entry', self.contents(debs[0].parent))
        del self.ran[:]
        self.assertEqual(debs, self._ensure())
        self.assertEqual([], self.ran)

    def test_what_is_built(self):
        self._ensure(jobs=3)
        self.assertEqual('0001-hello.patch\n0002-world.patch\n',
                         self.place['series/series'])
        self.assertEqual((self.patches / '0002-world.patch').read_text(),
                         self.place['series/0002-world.patch'])
        self.assertIn('qemu (%s+virtav1) trixie' % _VERSION,
                      self.place['entry'])
        for path in self.files:
            self.assertIn(path.name, self.place)
        [(argv, env)] = [ran for ran in self.ran if '--build=any' in
                         ran[0][-1]]
        self.assertIn('--net', argv)
        self.assertIn('parallel=3', env['DEB_BUILD_OPTIONS'])
        self.assertIn('--target-list=i386-softmmu,x86_64-softmmu',
                      env['QEMU_CONFIGURE_OPTIONS'])
        self.assertNotIn('XDG_CACHE_HOME', env)

    def test_tried_before_they_are_kept(self):
        self.failing = '--variant=apt'
        with self.assertRaisesRegex(errors.ToolError, 'it failed'):
            self._ensure()
        self.assertEqual([], self._entries())
        # What they are built in is kept.
        self.failing = None
        del self.ran[:]
        self._ensure()
        self.assertNotIn('--variant=buildd', str(self.ran))

    def test_another_series_or_suffix_is_another_package(self):
        first = self._ensure()
        patch = self.patches / '0001-hello.patch'
        patch.write_text(patch.read_text() + ' \n')
        second = self._ensure()
        self.assertNotEqual(first, second)
        self.assertIn('+virtav1', first[0].name)
        self.assertFalse(self._ensure(suffix='+virtav2'))

    def test_series_does_not_apply(self):
        self.failing, self.output = '--build=source', _REJECTED
        with self.assertRaises(errors.ToolError) as caught:
            self._ensure()
        self.assertEqual(
            '0002-world.patch does not apply to Debian\'s qemu %s:\n'
            '  | hello.c: Hunk #2 FAILED at 1.' % _VERSION,
            str(caught.exception))
        self.assertIn('tools/qemu-series edit --series %s;' % self.patches,
                      caught.exception.hint)
        self.assertEqual([], self._entries())

    def test_source_package_fails_otherwise(self):
        self.failing, self.output = '--build=source', 'no space left\n'
        with self.assertRaisesRegex(errors.ToolError, 'it failed'):
            self._ensure()

    def test_bad_suffix(self):
        for suffix in ('', 'virtav1', '-1', '+a-1', '+', '+a b'):
            with (self.subTest(suffix),
                  self.assertRaisesRegex(errors.ToolError, 'the suffix')):
                self._ensure(suffix=suffix)
        self.assertEqual([], self.ran)

    def test_not_root(self):
        self.geteuid.return_value = 1000
        with self.assertRaisesRegex(errors.ToolError, 'only root'):
            self._ensure()

    def test_main_prints_the_packages(self):
        with mock.patch.object(qemu_source, 'debian_package',
                               return_value=self.files) as package:
            qemu_build.main(['--deb', '--series', str(self.patches)])
        package.assert_called_once_with(False)
        self.assertEqual([str(path) for path in self._ensure()],
                         self.stdout.getvalue().splitlines())


class TestAptOptions(base.TestCase):

    def test_proxies_only(self):
        said = ('Acquire "";\nAcquire::http "";\n'
                'Acquire::http::Proxy "http://p:8080";\n'
                'Acquire::Languages "none";\n')
        with mock.patch('subprocess.run') as run:
            run.return_value.stdout = said
            self.assertEqual(
                ['--aptopt=Acquire::http::Proxy "http://p:8080";'],
                qemu_deb._apt_options())
