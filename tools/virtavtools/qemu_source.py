# SPDX-License-Identifier: Apache-2.0
"""Pristine source of QEMU 10.0: found, checked, unpacked."""

import collections
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import string
import subprocess
import tempfile
import urllib.error
import urllib.request

from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import ui

#: The releases that the series is for; 10.0.50 and later lead to 10.1.
_WANTED = re.compile(r'10\.0\.[0-4]?[0-9]')
_DEBIAN = 'http://deb.debian.org/debian'
#: Debian 13, which has QEMU 10.0.
SUITE = 'trixie'
#: What the cache knows the source of Debian by.
_DEBIAN_NAME = 'debian-' + SUITE
_KEYRINGS = ('/usr/share/keyrings/debian-archive-keyring.gpg',
             '/usr/share/keyrings/debian-archive-keyring.pgp')
_UPSTREAM = 'https://download.qemu.org/qemu-%s.tar.xz'

#: An apt of its own: nothing of the system's is written, its proxies and
#: credentials hold.
_APT_CONF = string.Template('''\
Dir::Etc::sourcelist "$top/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$top/state";
Dir::Cache "$top/cache";
Acquire::Languages "none";
APT::Default-Release "";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
''')

#: version: as in the file VERSION; sha256: of the tarball, hexadecimal;
#: tarball: its path
Source = collections.namedtuple('Source', 'version sha256 tarball')


def check_version(version, where):
    """Refuse what the series is not for.

    :param version: content of QEMU's file VERSION
    :param where: what has that version, for the message: "FILE is"
    :raises errors.ToolError: it is no 10.0.x
    """
    if not _WANTED.fullmatch(version):
        raise errors.ToolError(
            '%s QEMU %s; this needs a release 10.0.x' % (where, version),
            'leave --source and --upstream away to take the one of Debian '
            '13, or give another')


def identify(source):
    """See which QEMU a tarball holds, without unpacking it.

    :param source: :class:`Source`; its version may be None
    :returns: the source with its version
    :raises errors.ToolError: no tarball of QEMU, or of another version
    """
    # Stops at the first match, which stands near the beginning.
    found = subprocess.run(
        ['tar', '-xOf', source.tarball, '--anchored', '--wildcards',
         '--no-wildcards-match-slash', '--occurrence=1', '*/VERSION'],
        capture_output=True, text=True, check=False)
    if found.returncode:
        raise errors.ToolError(
            '%s is no source tarball of QEMU: %s'
            % (source.tarball, found.stderr.strip().partition('\n')[0]),
            'give one as download.qemu.org or Debian has it')
    version = found.stdout.strip()
    check_version(version, '%s is' % source.tarball)
    return source._replace(version=version)


def unpack(step, source, into, log):
    """Unpack a tarball.

    :param step: the step it belongs to
    :param source: :class:`Source`
    :param into: directory for what the tarball's top directory holds
    :param log: file for messages
    :raises ui.CommandError: it is damaged, or the disk is full
    """
    # Without --no-same-owner the files belong to whoever packed them, and
    # git refuses. The sources of the boot ROMs are two thirds of the files;
    # nothing here is built from them.
    ui.run(step, ['tar', '-xf', source.tarball, '--no-same-owner',
                  '--strip-components=1', '--anchored',
                  '--no-wildcards-match-slash', '--exclude=*/roms',
                  '-C', into], log)


def _sha256(path):
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _checked(path, wanted):
    """SHA-256 of a file, which must be the wanted one if there is one."""
    found = _sha256(path)
    if wanted and found != wanted.lower():
        raise errors.ToolError(
            '%s has the SHA-256 %s, not %s' % (path, found, wanted),
            'it is damaged or another file: get it again')
    return found


def _remember(name, version, sha256, tarball, *others):
    """Keep files in the cache, and under a name which they are.

    :param tarball: path of the source
    :param others: paths of files that go with it
    """
    top = cache.root() / 'source'
    top.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=top) as fresh:
        fresh = pathlib.Path(fresh)
        record = {'version': version, 'sha256': sha256, 'file': tarball.name,
                  'others': [path.name for path in others]}
        (fresh / 'record').write_text(json.dumps(record))
        # The record last: what it names is there.
        for path in (tarball, *others):
            # A copy belongs to this user, not to apt's.
            shutil.copy(path, fresh)
            (fresh / path.name).replace(top / path.name)
        (fresh / 'record').replace(top / (name + '.json'))
    return _recall(name)


def _recall(name):
    """The source remembered under a name, or None."""
    top = cache.root() / 'source'
    try:
        record = json.loads((top / (name + '.json')).read_text())
        found = Source(record['version'], record['sha256'],
                       top / record['file'])
    except (OSError, ValueError, KeyError):
        return None
    return found if found.tarball.exists() else None


def local(path, sha256=None):
    """A tarball that is already here.

    :param path: the file
    :param sha256: what it must have, or None
    :returns: :class:`Source`, the version not known yet
    :raises errors.ToolError: no such file, wrong checksum
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.ToolError('there is no file %s' % path,
                               'give --source the path of a QEMU tarball')
    return Source(None, _checked(path, sha256), path.absolute())


def upstream(version, sha256):
    """A release from download.qemu.org.

    :param version: e.g. ``10.0.3``
    :param sha256: what it must have
    :returns: :class:`Source`
    :raises errors.ToolError: another version, no network, no such release,
        no or a wrong checksum
    """
    check_version(version, '--upstream names')
    url = _UPSTREAM % version
    if not sha256:
        raise errors.ToolError(
            'the checksum of QEMU %s from download.qemu.org is not known '
            'here' % version,
            'give it with --sha256: that of a file which gpg has checked '
            'with the signature beside it, %s.sig' % url)
    name = 'upstream-' + version
    found = _recall(name)
    if found:
        _checked(found.tarball, sha256)
        return found
    packages.install('ca-certificates', why='to fetch QEMU')
    with (tempfile.TemporaryDirectory(dir='/var/tmp') as top,
          ui.step('download %s' % url) as step):
        tarball = pathlib.Path(top) / url.rpartition('/')[2]
        try:
            with (urllib.request.urlopen(url, timeout=30) as answer,
                  open(tarball, 'wb') as file):
                size = int(answer.headers.get('Content-Length', 0))
                while piece := answer.read(1 << 18):
                    file.write(piece)
                    step.progress(file.tell() >> 10, size >> 10)
        except urllib.error.HTTPError as error:
            raise errors.ToolError(
                '%s: %s %s' % (url, error.code, error.reason),
                'see https://download.qemu.org for what there is')
        except (OSError, http.client.HTTPException) as error:
            raise errors.ToolError(
                'cannot fetch %s: %s' % (url, getattr(error, 'reason', error)),
                'check the network or set a proxy in https_proxy; or get the '
                'file elsewhere and give it with --source')
        found = _checked(tarball, sha256)
        step.note('SHA-256 %s' % found)
        return _remember(name, version, found, tarball)


def debian_sources(kind='deb-src'):
    """The lines for sources.list that name Debian 13.

    :param kind: ``deb-src``, or ``deb`` for what is built
    :returns: the mirror's address, and the lines as one string
    :raises errors.ToolError: apt is set up with no mirror
    """
    if packages.os_release()['ID'] == 'debian':
        main = packages.mirror()
        if not main:
            raise packages.no_sources()
        security = packages.mirror(security=True)
    else:
        main, security = _DEBIAN, _DEBIAN + '-security'
    archives = [(main, SUITE), (main, SUITE + '-updates')]
    if security:
        archives.append((security, SUITE + '-security'))
    keyring = next(filter(os.path.exists, _KEYRINGS), _KEYRINGS[0])
    return main, ''.join('%s [signed-by=%s] %s %s main\n'
                         % (kind, keyring, *archive) for archive in archives)


def _debian_fetch(step, top):
    """Fetch the source package with an apt of its own.

    :param step: the step it belongs to
    :param top: empty directory for all that apt writes
    :returns: path of the .dsc
    """
    main, lines = debian_sources()
    (top / 'sources.list').write_text(lines)
    (top / 'apt.conf').write_text(_APT_CONF.substitute(top=top))
    for name in ('state/lists/partial', 'cache/archives/partial', 'package'):
        (top / name).mkdir(parents=True)
    # apt fetches as the user _apt where it is started by root.
    top.chmod(0o755)
    if not os.geteuid():
        # Where there is no such user, apt fetches as root.
        with contextlib.suppress(LookupError):
            shutil.chown(top / 'package', '_apt')
    config = ('-c', str(top / 'apt.conf'))
    try:
        packages.apt(step, *config, 'update')
        packages.apt(step, *config, 'source', '--only-source',
                     '--download-only', 'qemu', cwd=top / 'package')
    except ui.CommandError as error:
        if 'does not have a Release file' in error.output:
            raise errors.ToolError(
                'the mirror %s does not carry Debian 13 (%s)'
                % (main, SUITE),
                'get a source tarball of QEMU 10.0.x elsewhere and give it '
                'with --source')
        if 'NO_PUBKEY' in error.output:
            raise errors.ToolError(
                'the installed debian-archive-keyring does not know the '
                'keys of Debian 13',
                'install a newer one, or give a tarball with --source')
        raise packages.explain(error)
    return next((top / 'package').glob('qemu_*.dsc'))


def debian(refresh=False):
    """The source package of Debian 13, of the newest point release.

    What was fetched once is taken again without asking the network.

    :param refresh: ask whether there is a newer one
    :returns: :class:`Source`
    :raises errors.ToolError: no network, no sources, wrong checksum
    """
    found = None if refresh else _recall(_DEBIAN_NAME)
    if found:
        return found
    packages.install('debian-archive-keyring', why='to check what Debian '
                     'signed')
    # Not $TMPDIR: that may be closed to the user _apt.
    with (tempfile.TemporaryDirectory(dir='/var/tmp') as top,
          ui.step('fetch the source of QEMU from Debian 13') as step):
        # apt has checked the .dsc against the signed index; it names the
        # tarball's checksum.
        dsc = _debian_fetch(step, pathlib.Path(top))
        listed = {dsc.with_name(name): sha256 for sha256, name in re.findall(
            r'^ ([0-9a-f]{64}) \d+ (qemu_\S+)$', dsc.read_text(), re.M)}
        tarball = next((path for path in listed if '.orig.tar.' in path.name),
                       None)
        if not tarball:
            raise errors.ToolError('%s lists no original tarball' % dsc.name,
                                   'give a tarball with --source')
        for path, sha256 in listed.items():
            _checked(path, sha256)
        step.note('%s, SHA-256 %s' % (tarball.name, listed[tarball]))
        version = re.match(r'qemu_([\d.]+)', tarball.name)[1].rstrip('.')
        others = [path for path in listed if path != tarball]
        return _remember(_DEBIAN_NAME, version, listed[tarball], tarball, dsc,
                         *others)


def debian_package(refresh=False):
    """The files of Debian 13's source package.

    :param refresh: ask whether there is a newer one
    :returns: their paths: the .dsc, then what it lists
    :raises errors.ToolError: see :func:`debian`
    """
    tarball = debian(refresh).tarball

    def files():
        record = tarball.with_name(_DEBIAN_NAME + '.json')
        names = json.loads(record.read_text()).get('others', ())
        return [tarball.with_name(name) for name in names]

    # Earlier versions of this kept the tarball alone.
    if not files() or not all(path.exists() for path in files()):
        tarball = debian(refresh=True).tarball
    dsc, *others = files()
    return [dsc, tarball, *others]


def add_arguments(parser):
    """Add the options that say which source to take.

    :param parser: :class:`argparse.ArgumentParser`
    """
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        '--source', metavar='TARBALL',
        help='take this source tarball of QEMU 10.0.x')
    origin.add_argument(
        '--upstream', metavar='VERSION',
        help='take this release from download.qemu.org, e.g. 10.0.3; needs '
        '--sha256')
    origin.add_argument(
        '--refresh', action='store_true',
        help='ask whether Debian 13 has a newer point release than the one '
        'in the cache')
    parser.add_argument(
        '--sha256', metavar='HEX',
        help='checksum that the tarball of --source or --upstream must have')


def resolve(args):
    """Get the source that the options name.

    :param args: parsed :func:`add_arguments`
    :returns: :class:`Source`
    :raises errors.ToolError: see :func:`local`, :func:`upstream`,
        :func:`debian`
    """
    if args.sha256 and not (args.source or args.upstream):
        raise errors.ToolError(
            '--sha256 goes with --source or --upstream',
            'leave it away: apt checks what comes from Debian')
    if args.source:
        return local(args.source, args.sha256)
    if args.upstream:
        return upstream(args.upstream, args.sha256)
    return debian(args.refresh)
