# SPDX-License-Identifier: Apache-2.0
"""QEMU as Debian packages: the distribution's own, and the series.

The archive's source package with the patches of the series behind its own
is built in a clean installation of that release. What is not for x86 guests
is left out of the build, not of the source package.
"""

import email
import email.policy
import email.utils
import os
import platform
import re
import shlex
import shutil
import string
import subprocess

from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_source
from virtavtools import ui

SUFFIX = '+virtav1'
#: What may follow a version without a change of what it means.
_SUFFIX = re.compile(r'\+[A-Za-z0-9.+~]+')
_PACKAGES = ('mmdebstrap', 'zstd', 'debian-archive-keyring')
#: Debian's own ways to leave things out: build profiles ...
_PROFILES = ('nocheck', 'pkg.qemu.omit-user', 'pkg.qemu.omit-system-xen',
             'pkg.qemu.use-upstream-vdso')
#: ... variables for options of configure ...
_ENVIRONMENT = {
    'QEMU_CONFIGURE_OPTIONS':
        '--target-list=i386-softmmu,x86_64-softmmu --disable-debug-info',
    'QEMU_MICROVM_CONFIGURE_OPTIONS': '--disable-debug-info',
    # ... and packages that debhelper is to leave alone: the other targets'.
    'DH_OPTIONS': ' '.join('-Nqemu-system' + name for name in (
        '', '-arm', '-mips', '-misc', '-ppc', '-riscv', '-s390x', '-sparc')),
}
#: Variables of debian/rules. That the system emulators are built it tells by
#: the package that depends on all of them, which is left out.
_RULES = 'debian/rules system-packages=x86 enable-system=y'

#: A command in the tree "$0", as process 1 of its own. No network: what a
#: build fetches is in no package.
_ENTER = ('mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; '
          'exec chroot "$0" sh -ec "$1"')
#: Makes the source package.
_SOURCE_SCRIPT = string.Template('''\
cd /build
dpkg-source --no-check -x $dsc src
cd src
mkdir debian/patches/virtav
while read -r patch; do
    cp "../series/$$patch" debian/patches/virtav/
    echo "virtav/$$patch" >>debian/patches/series
done <../series/series
cat ../entry debian/changelog >../changelog
cp ../changelog debian/changelog
dpkg-buildpackage --build=source --no-check-builddeps -us -uc -P$profiles
''')
#: Makes the binary packages.
_BINARY_SCRIPT = string.Template('''\
cd /build/src
dpkg-buildpackage --build=any --no-pre-clean -us -uc -P$profiles -R'$rules'
''')
#: Tries them in a Debian that has the archive's packages, as an upgrade. What
#: programs and machine types there are is the same before and after.
_TRY_SCRIPT = string.Template('''\
export DEBIAN_FRONTEND=noninteractive
look () {
    qemu-system-x86_64 -machine help >/debs/machines.$$1
    dpkg -L qemu-system-x86 qemu-utils | sort >/debs/files.$$1
}
look before
apt-get -q -y --no-install-recommends install /debs/*.deb
look after
diff /debs/machines.before /debs/machines.after
diff /debs/files.before /debs/files.after
qemu-system-x86_64 --version | grep -F 'Debian $version)'
qemu-system-x86_64 -object page-fetch-monitor,help | grep -F on-timeout=
qemu-system-x86_64-microvm --version
qemu-img --version
''')


def _headers(patch):
    """The headers of a patch, as of a mail."""
    return email.message_from_bytes(patch.read_bytes(),
                                    policy=email.policy.default)


def dsc_version(dsc):
    """The version that a .dsc is of."""
    return re.search(r'^Version: (\S+)$', dsc.read_text(), re.M)[1]


def changelog_entry(version, series):
    """The entry of debian/changelog for the series.

    It is as old as the newest patch, so that the packages do not depend on
    when they are built.

    :param version: of the package
    :param series: :class:`qemu_series.Series`
    :returns: string, with the empty line that follows an entry
    :raises errors.ToolError: no patch says when and by whom it was made
    """
    mails = [_headers(patch) for patch in series.patches]
    dated = [mail for mail in mails if mail['Date'] and mail['From']]
    if not dated:
        raise errors.ToolError(
            'no patch of %s has the lines "From:" and "Date:"'
            % series.directory, 'write them with tools/qemu-series refresh')
    newest = max(dated, key=lambda mail: mail['Date'].datetime)
    lines = ['qemu (%s) %s; urgency=medium' % (version, qemu_source.SUITE),
             '', '  * Add the page-fetch monitor of VirtAV, series %s:'
             % series.digest[:12]]
    lines += ['    - %s' % re.sub(r'^\[PATCH[^]]*\] *', '', mail['Subject'])
              for mail in mails]
    lines += ['', ' -- %s  %s' % (
        newest['From'], email.utils.format_datetime(newest['Date'].datetime)),
        '', '']
    return '\n'.join(lines)


def _apt_options():
    """The proxies of this machine's apt, as options of mmdebstrap."""
    found = subprocess.run(
        ['apt-config', 'dump', '--format', '%f "%v";%n', 'Acquire'],
        stdout=subprocess.PIPE, text=True, check=True).stdout
    return ['--aptopt=' + line for line in found.splitlines()
            if re.match(r'Acquire::\w+::Proxy\b', line)]


def _bootstrap(step, log, target, *words):
    """Make a Debian of the release.

    :param target: where to; /dev/null for a look only
    :param words: more options of mmdebstrap
    :raises errors.ToolError: no network, ...
    """
    _main, lines = qemu_source.debian_sources('deb')
    try:
        ui.run(step, ['mmdebstrap', '--mode=root', '--architectures=amd64',
                      '--aptopt=APT::Install-Recommends "false";',
                      *_apt_options(), *words, qemu_source.SUITE, target,
                      *lines.splitlines()], log, env=_env())
    except ui.CommandError as error:
        if 'setup failed' in error.output or 'apt-get update' in error.output:
            raise packages.explain(error)
        raise


def _env(**more):
    """An environment for what is to be the same for everybody."""
    kept = {name: value for name, value in os.environ.items()
            if name.lower().endswith('_proxy')}
    return {**kept, 'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'HOME': '/root',
            'LC_ALL': 'C.UTF-8', **more}


def _hook(text, *words):
    """A hook that mmdebstrap runs in the end."""
    return '--customize-hook=' + ' '.join([text, *map(shlex.quote, map(
        str, words))])


def _build_root(dsc):
    """Find or make the Debian that the packages are built in.

    :param dsc: path of the .dsc that says what a build needs
    :returns: path of its tarball
    """
    build_dep = ('chroot "$1" apt-get -q -y --arch-only -P%s build-dep /%s'
                 % (','.join(_PROFILES), dsc.name))
    key = cache.digest(dsc, build_dep)
    with cache.entry('qemu-deb-root', key) as entry:
        if not entry.ready:
            log = _log('qemu-deb-root-%s' % key[:12])
            with ui.step('install a Debian to build %s in'
                         % dsc.stem) as step:
                _bootstrap(step, log, entry.work / 'root.tar.zst',
                           '--variant=buildd', _hook('copy-in', dsc, '/'),
                           '--customize-hook=' + build_dep)
            entry.publish()
    return entry.path / 'root.tar.zst'


def _log(name):
    path = cache.root() / 'log' / (name + '.log')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _inside(step, root, script, log, **env):
    """Run a script in a tree."""
    ui.run(step, ['unshare', '--mount', '--pid', '--net', '--fork',
                  '--kill-child', 'sh', '-ec', _ENTER, root, script], log,
           env=_env(**env))


def _does_not_apply(series, version, log):
    """The error for a series that the source does not take, or None."""
    said = log.read_text(errors='replace')
    failed = re.search(r'patches/virtav/(\S+) subprocess returned', said)
    if not failed:
        return None
    why, file = [], ''
    for line in said.splitlines():
        if line.startswith('patching file '):
            file = line.removeprefix('patching file ') + ': '
        elif re.match(r'Hunk #\d+ FAILED', line):
            why.append(file + line)
        elif line.startswith(("can't find file", '|+++ ')):
            why.append(line)
    return errors.ToolError(
        '%s does not apply to Debian\'s qemu %s:\n%s'
        % (failed[1], version, '\n'.join('  | %s' % line for line in why)),
        'mend the series in a tree: tools/qemu-series edit%s; if it applies '
        'there, one of Debian\'s own patches, which come first, is in its '
        'way: see %s' % (series.option, log))


def _make(top, files, version, series, jobs, log):
    """Build in a directory.

    :param top: empty directory
    :param files: what :func:`qemu_source.debian_package` gave
    :param version: of the package to build
    :returns: directory with what is to be kept
    """
    root, result = top / 'root', top / 'result'
    place = root / 'build'
    tarball = _build_root(files[0])
    words = {'dsc': files[0].name, 'profiles': ','.join(_PROFILES),
             'rules': _RULES}
    with ui.step('add the series: qemu %s' % version) as step:
        root.mkdir()
        ui.run(step, ['tar', '--zstd', '-xpf', tarball, '--numeric-owner',
                      '-C', root], log)
        (place / 'series').mkdir(parents=True)
        for path in files:
            shutil.copy(path, place)
        for path in series.patches:
            shutil.copy(path, place / 'series')
        (place / 'series' / 'series').write_text(
            ''.join('%s\n' % path.name for path in series.patches))
        (place / 'entry').write_text(changelog_entry(version, series))
        try:
            _inside(step, root, _SOURCE_SCRIPT.substitute(words), log)
        except ui.CommandError as error:
            raise _does_not_apply(series, dsc_version(files[0]), log) or error
    with ui.step('build the packages of qemu %s' % version) as step:
        _inside(step, root, _BINARY_SCRIPT.substitute(words), log,
                DEB_BUILD_OPTIONS='nocheck noautodbgsym terse parallel=%d'
                % jobs, **_ENVIRONMENT)
    result.mkdir()
    # Whoever is given the packages has a right to their source.
    for path in place.iterdir():
        if version.partition(':')[2] in path.name or path == (
                place / files[1].name):
            path.replace(result / path.name)
    return result


def _try(debs, version, log):
    """Install packages over the archive's, and look at them.

    :param debs: their paths
    :param version: what theirs is
    :raises errors.ToolError: one does not install, or something is missing
    """
    with ui.step('install them in a clean Debian') as step:
        _bootstrap(
            step, log, '/dev/null', '--variant=apt', '--format=null',
            '--include=qemu-system-x86,qemu-utils',
            '--customize-hook=mkdir "$1/debs"',
            _hook('copy-in', *debs, '/debs'),
            _hook('chroot "$1" sh -exc',
                  _TRY_SCRIPT.substitute(version=version)))


def ensure(files, series, suffix=SUFFIX, jobs=None):
    """Find or build the packages.

    :param files: what :func:`qemu_source.debian_package` gave
    :param series: :class:`qemu_series.Series`
    :param suffix: what the version gets
    :param jobs: compilers at a time; default one a processor
    :returns: sorted list of the paths of the .deb files; the source package
        is beside them
    :raises errors.ToolError: the series does not apply; not root, no
        network; it does not build, or does not work when installed
    """
    if not _SUFFIX.fullmatch(suffix):
        raise errors.ToolError(
            'the suffix %r would not make a version that follows Debian\'s'
            % suffix, 'begin it with "+", and use letters, digits, "+", "~" '
            'and "." only')
    if platform.machine() != 'x86_64':
        raise errors.ToolError(
            'the packages are built for x86_64 only, this machine is %s'
            % platform.machine(), 'build them on an x86_64 machine')
    dsc = files[0]
    version = dsc_version(dsc) + suffix
    key = cache.digest(
        dsc, series.digest, version, ' '.join(_PROFILES), str(_ENVIRONMENT),
        _RULES, _SOURCE_SCRIPT.template, _BINARY_SCRIPT.template)
    with cache.entry('qemu-deb', key) as entry:
        if not entry.ready:
            if os.geteuid():
                raise errors.ToolError(
                    'the packages are built in a chroot, and only root can '
                    'make one', 'run this as root')
            packages.install(*_PACKAGES, why='to build Debian packages')
            log = _log('qemu-deb-%s' % key[:12])
            result = _make(entry.work, files, version, series,
                           jobs or len(os.sched_getaffinity(0)), log)
            _try(sorted(result.glob('*.deb')), version, log)
            entry.publish(result)
    return sorted(entry.path.glob('*.deb'))
