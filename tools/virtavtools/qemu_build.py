# SPDX-License-Identifier: Apache-2.0
"""QEMU built from source, with the series or without."""

import argparse
import os
import platform
import shutil
import subprocess

from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_deb
from virtavtools import qemu_series
from virtavtools import qemu_source
from virtavtools import ui
from virtavtools import venv

_PACKAGES = (
    'gcc', 'libc6-dev', 'make', 'git', 'ca-certificates', 'xz-utils',
    'ninja-build', 'pkg-config', 'flex', 'bison', 'libglib2.0-dev',
    'libpixman-1-dev', 'libfdt-dev', 'libslirp-dev', 'libseccomp-dev',
    'zlib1g-dev', 'libcap-ng-dev', 'libnuma-dev', 'liburing-dev',
    'libgnutls28-dev', 'libzstd-dev', 'libaio-dev')
#: Older than the emulator, and good for it: the boot ROMs' interfaces last.
_FIRMWARE_PACKAGES = ('seabios', 'ipxe-qemu', 'qemu-system-data')
_FIRMWARE = (
    '/usr/share/seabios/bios-256k.bin',
    '/usr/share/seabios/vgabios-stdvga.bin',
    '/usr/lib/ipxe/qemu/efi-virtio.rom',
    '/usr/share/qemu/kvmvapic.bin',
    # Without it the emulator loads kernels byte by byte and boots ten times
    # slower, without a word.
    '/usr/share/qemu/linuxboot_dma.bin',
    '/usr/share/qemu/keymaps/en-us',
)
#: Debian 12 has meson 1.0, QEMU 10.0 needs 1.5.
_MESON = ('meson==1.8.*', 'pycotap==1.3.*')
_FLAGS = (
    '--target-list=x86_64-softmmu', '--without-default-features',
    '--disable-download', '--disable-debug-info', '--disable-install-blobs',
    '--firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu',
    *('--enable-' + name for name in (
        'system', 'tools', 'tcg', 'kvm', 'fdt=system', 'slirp', 'vnc',
        'seccomp', 'numa', 'cap-ng', 'linux-aio', 'linux-io-uring',
        'gnutls', 'zstd', 'pixman', 'vhost-user', 'vhost-net',
        'vhost-kernel', 'attr', 'replication', 'tpm', 'plugins', 'membarrier',
        'malloc-trim')))
#: Debian's tarball lacks the firmware that this would unpack; upstream
#: unpacks it even where it is not to be installed.
_EDK2 = ('unpack_edk2_blobs = bzip2.found()',
         "unpack_edk2_blobs = get_option('install_blobs') and bzip2.found()")
_PROGRAMS = ('qemu-system-x86_64', 'qemu-img')
#: The series' own tests, which the functional tests run.
_TESTS = ('tests/qtest/page-fetch-test', 'tests/fuzz/page-fetch-blob-fuzz',
          'tests/fuzz/page-fetch-peer-fuzz')
_OBJECT = 'page-fetch-monitor'


def _ask(emulator, *words, text=''):
    """Start an emulator and give back what it prints."""
    try:
        return subprocess.run(
            [emulator, *words], input=text, capture_output=True, text=True,
            check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, 'stderr', None) or str(error)).strip()
        raise errors.ToolError('%s does not run: %s' % (emulator, said),
                               'remove %s, then run this again'
                               % emulator.parents[1])


def _check(emulator, series):
    """See that an emulator starts with its firmware, and has the monitor."""
    _ask(emulator, '-accel', 'tcg', '-machine', 'q35', '-S', '-display',
         'none', '-qmp', 'stdio',
         text='{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n')
    if series and _OBJECT not in _ask(emulator, '-object', 'help').split():
        raise errors.ToolError(
            'the patched QEMU has no object %s' % _OBJECT,
            'the series is not complete: tools/qemu-series edit%s'
            % series.option)


def _install_firmware():
    packages.install(*_FIRMWARE_PACKAGES, why='to run QEMU')
    for path in _FIRMWARE:
        if not os.path.exists(path):
            raise errors.ToolError(
                'there is no firmware %s, though %s are installed'
                % (path, ' '.join(_FIRMWARE_PACKAGES)),
                'install them anew: apt-get install --reinstall %s'
                % ' '.join(_FIRMWARE_PACKAGES))


def _mend_edk2(tree):
    path = tree / 'meson.build'
    text = path.read_text() if path.exists() else ''
    if _EDK2[0] in text:
        path.write_text(text.replace(*_EDK2))
        subprocess.run(['git', '-C', tree, 'commit', '--quiet', '--all',
                        '-m', 'build: do not unpack blobs that are not '
                        'installed'], env=qemu_series.git_env(), check=True)


def _compile(top, name, source, series, jobs, log):
    """Build in a directory.

    :param top: empty directory
    :param name: what the emulator's version says it is
    :param source: :class:`qemu_source.Source`
    :param series: :class:`qemu_series.Series`, None for QEMU as it is
    :param jobs: compilers at a time
    :param log: file for all output
    :returns: directory with what is to be kept
    """
    # The series first: what fails for sure shall fail soon.
    tree = top / 'src'
    source = qemu_series.plant(tree, source)
    if series:
        qemu_series.apply(tree, series)
    _mend_edk2(tree)
    packages.install(*_PACKAGES, *_FIRMWARE_PACKAGES, why='to build QEMU')
    _install_firmware()
    python = venv.plain(*_MESON) / 'python'
    build = top / 'build'
    build.mkdir()
    with ui.step('configure QEMU %s' % source.version) as step:
        ui.run(step, [tree / 'configure', '--python=%s' % python,
                      '--with-pkgversion=VirtAV %s' % name,
                      # It is on where there is a .git; a newer compiler
                      # that warns of more shall not stop the build.
                      '--disable-werror', *_FLAGS], log, cwd=build)
    programs = [*_PROGRAMS, *_TESTS] if series else _PROGRAMS
    with ui.step('build QEMU %s (%s)' % (source.version, name)) as step:
        ui.run(step, ['ninja', '-j%d' % jobs, *programs], log, cwd=build)
    # Not "ninja install": that builds a thousand files more. These find the
    # firmware by absolute paths, and run wherever they are.
    prefix = top / 'prefix'
    (prefix / 'bin').mkdir(parents=True)
    for program in programs:
        shutil.copy2(build / program, prefix / 'bin')
    for corpus in (tree / 'tests/fuzz/corpus').glob('*.txt'):
        shutil.copy2(corpus, prefix / 'bin')
    return prefix


def ensure(source, series=None, jobs=None):
    """Find or build an emulator.

    :param source: :class:`qemu_source.Source`
    :param series: :class:`qemu_series.Series`, None for QEMU as it is
    :param jobs: compilers at a time; default one a processor
    :returns: path of ``qemu-system-x86_64``; ``qemu-img`` is beside it
    :raises errors.ToolError: another version of QEMU; the series does not
        apply; not root, no network; it does not build or run
    """
    system = packages.os_release()
    name = 'series ' + series.digest[:12] if series else 'stock'
    key = cache.digest(
        source.sha256, name, series.digest if series else '', *_FLAGS,
        *_EDK2, system['ID'], system['VERSION_CODENAME'],
        platform.machine())
    with cache.entry('qemu', key) as entry:
        emulator = entry.path / 'bin' / _PROGRAMS[0]
        if entry.ready:
            _install_firmware()
            _ask(emulator, '--version')
        else:
            log = cache.root() / 'log' / ('qemu-%s.log' % key[:12])
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
            prefix = _compile(entry.work, name, source, series,
                              jobs or len(os.sched_getaffinity(0)), log)
            _check(prefix / 'bin' / _PROGRAMS[0], series)
            entry.publish(prefix)
    return emulator


def _jobs(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError('must be 1 or more, not %r' % text)
    return int(text)


def main(argv=None):
    """tools/build-qemu."""
    parser = argparse.ArgumentParser(
        prog='tools/build-qemu',
        description='Build QEMU 10.0 with the page-fetch monitor, or find '
        'what was built before. The last line of the output is the path of '
        'the emulator; with --deb, each line is the path of a package.',
        epilog='All is kept in %s.' % cache.root())
    qemu_source.add_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--stock', action='store_true',
        help='build QEMU as it is, the same way, to measure against')
    what.add_argument(
        '--deb', action='store_true',
        help='make Debian packages: the source package of Debian 13 with the '
        'series added, of which what x86 guests need is built in a chroot '
        'of that release and tried there; needs root, 4 GB of disk for the '
        'time, and about 20 minutes on two cores')
    parser.add_argument(
        '--deb-suffix', metavar='TEXT', default=qemu_deb.SUFFIX,
        help='with --deb, what the version of the packages gets behind '
        'Debian\'s (default: %(default)s)')
    parser.add_argument(
        '--series', metavar='DIR', default=qemu_series.DIRECTORY,
        help='take the patches of this directory (default: %(default)s)')
    parser.add_argument(
        '--jobs', '-j', metavar='N', type=_jobs,
        help='compilers at a time (default: one a processor)')
    args = parser.parse_args(argv)
    series = None
    if not args.stock:
        series = qemu_series.Series(args.series)
        if not series.patches:
            raise errors.ToolError(
                '%s/series lists no patches' % series.directory,
                'restore it from git; or build QEMU without: '
                'tools/build-qemu --stock')
    if not args.deb:
        print(ensure(qemu_source.resolve(args), series, args.jobs))
        return
    if args.source or args.upstream or args.sha256:
        parser.error('--deb takes the source package of Debian: it goes '
                     'without --source, --upstream and --sha256')
    for path in qemu_deb.ensure(qemu_source.debian_package(args.refresh),
                                series, args.deb_suffix, args.jobs):
        print(path)
