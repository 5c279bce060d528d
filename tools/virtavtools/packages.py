# SPDX-License-Identifier: Apache-2.0
"""Debian packages: installed, downloaded, and where they come from."""

import collections
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import time

from virtavtools import cache
from virtavtools import errors
from virtavtools import ui

_APT = ('apt-get', '-q', '-y')
#: Seconds to wait for the locks of apt and dpkg; apt itself waits for one of
#: them only, and without a word.
_LOCK_PATIENCE = 300
_LOCKED = re.compile(r'Could not get lock|Unable to lock')
#: What apt says when its package lists are missing or out of date.
_STALE = re.compile(r'Unable to locate package|no installation candidate'
                    r'|404 +Not Found|Hash Sum mismatch'
                    r'|Unable to find a source package|Couldn.t find any'
                    r'|Can.t find a source|Unable to correct problems')
_UNREACHABLE = re.compile(
    r'Temporary failure resolving|Could not resolve|Could not connect'
    r'|Connection (?:failed|timed out|refused)|Network is unreachable'
    r'|Cannot initiate the connection')

Source = collections.namedtuple('Source', 'types uris suites components')


def os_release():
    """The operating system by name.

    :returns: dict as in ``/etc/os-release``; at least ``ID`` and
        ``VERSION_CODENAME``, perhaps empty
    """
    try:
        found = platform.freedesktop_os_release()
    except OSError:
        found = {}
    return {'ID': '', 'VERSION_CODENAME': ''} | found


def codename():
    """Code name of this machine's release, e.g. ``bookworm``."""
    return os_release()['VERSION_CODENAME']


def _one_line(text):
    """Sources of a file in the one-line format, sources.list(5)."""
    for line in text.splitlines():
        line = re.sub(r'\[[^]]*\]', ' ', line.partition('#')[0])
        words = line.split()
        if len(words) >= 3 and words[0] in ('deb', 'deb-src'):
            yield Source([words[0]], [words[1]], [words[2]], words[3:])


def _deb822(text):
    """Sources of a file in the deb822 format, sources.list(5)."""
    lines = [line for line in text.splitlines()
             if not line.startswith('#')]
    for stanza in re.split(r'\n\s*\n', '\n'.join(lines)):
        # A line that begins with a blank goes on with the field before.
        fields = re.findall(r'^([\w-]+):((?:.|\n[ \t])*)', stanza, re.M)
        fields = {name.lower(): value.split() for name, value in fields}
        if fields.get('enabled', ['yes'])[0].lower() in ('no', 'false', '0'):
            continue
        if 'types' in fields:
            yield Source(*(fields.get(name, []) for name in
                           ('types', 'uris', 'suites', 'components')))


def sources(etc=pathlib.Path('/etc/apt')):
    """What apt on this machine is set up to fetch from.

    :param etc: apt's configuration directory
    :returns: list of :class:`Source`, each a tuple of lists of words
    """
    found = []
    for path in [etc / 'sources.list',
                 *sorted((etc / 'sources.list.d').glob('*'))]:
        if path.suffix not in ('.list', '.sources') or not path.is_file():
            continue
        parse = _deb822 if path.suffix == '.sources' else _one_line
        found.extend(parse(path.read_text(errors='replace')))
    return found


def _resolve(uri):
    """The web address behind a URI of apt, or None.

    :param uri: as in a source; ``mirror+file:`` names a file of mirrors, as
        the cloud images of Debian have it
    """
    scheme, _, rest = uri.partition(':')
    if scheme == 'mirror+file':
        try:
            lines = pathlib.Path('/' + rest.lstrip('/')).read_text()
        except OSError:
            return None
        uri = next((line.split()[0] for line in lines.splitlines()
                    if line.startswith('http')), '')
    return uri.rstrip('/') if re.match(r'https?://', uri) else None


def mirror(security=False, etc=pathlib.Path('/etc/apt')):
    """The mirror of the distribution that this machine uses.

    :param security: of the security archive instead
    :param etc: apt's configuration directory
    :returns: address as ``http://deb.debian.org/debian``, None if apt is
        set up with none
    """
    name = codename()
    suites = ({name + '-security', name + '/updates'} if security
              else {name, 'stable', 'testing', 'unstable', 'sid'})
    found = []
    for source in sources(etc):
        if suites.intersection(source.suites) and 'main' in source.components:
            found += filter(None, map(_resolve, source.uris))
    # Other vendors name their suites after the release, too.
    found.sort(key=lambda uri: not re.search(r'/(debian|ubuntu)', uri))
    return found[0] if found else None


def missing(names):
    """Those of some packages that are not installed.

    :param names: package names
    :returns: list of names, in order
    """
    if not names:
        return []
    if not shutil.which('dpkg-query'):
        raise errors.ToolError(
            'this needs the packages %s, and there is no dpkg to ask for '
            'them' % ' '.join(names), 'use Debian 12 or later, or Ubuntu')
    found = subprocess.run(
        ['dpkg-query', '--show', '--showformat',
         '${Package} ${db:Status-Status}\n', *names],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        check=False)
    there = {line.split()[0] for line in found.stdout.splitlines()
             if line.endswith(' installed')}
    return [name for name in names if name not in there]


def log_path():
    """The file that apt's output is appended to."""
    path = cache.root() / 'log' / 'apt.log'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def apt(step, *words, cwd=None):
    """Run apt-get; waits for its locks.

    :param step: the step it belongs to
    :param words: arguments
    :param cwd: directory to run it in
    :returns: None
    :raises ui.CommandError: it fails, see :func:`explain`
    """
    env = dict(os.environ, LC_ALL='C', DEBIAN_FRONTEND='noninteractive')
    give_up = time.monotonic() + _LOCK_PATIENCE
    waiting = False
    while True:
        try:
            return ui.run(step, [*_APT, *words], log_path(), cwd, env)
        except ui.CommandError as error:
            if (not _LOCKED.search(error.output) or os.geteuid()
                    or time.monotonic() > give_up):
                raise
        if not waiting:
            step.note('waiting for another apt or dpkg to end')
            waiting = True
        time.sleep(2)


def no_sources():
    """The error for an apt that is set up with nothing to fetch from."""
    return errors.ToolError(
        'apt has no sources: neither /etc/apt/sources.list nor a file in '
        '/etc/apt/sources.list.d names one for %s'
        % (codename() or 'this release'),
        'add one, e.g. "deb http://deb.debian.org/debian %s main" to '
        '/etc/apt/sources.list' % (codename() or 'bookworm'))


def explain(error):
    """Say what a failure of apt means.

    :param error: :class:`ui.CommandError` from :func:`apt`
    :returns: a :class:`errors.ToolError` that reads better, or the same
    """
    output = error.output
    if _LOCKED.search(output):
        return errors.ToolError(
            'another program holds the lock of apt or dpkg',
            'wait until it has ended (see: ps -C apt-get,apt,dpkg), then run '
            'this again')
    if not sources():
        return no_sources()
    if _UNREACHABLE.search(output):
        where = sorted(set(re.findall(r'https?://[^/\s]*?([\w.:-]+)/',
                                      output)))
        return errors.ToolError(
            'no network: apt cannot reach %s'
            % (', '.join(where) or 'its sources'),
            'check the connection, or set a proxy in http_proxy or in '
            '/etc/apt/apt.conf.d; details in %s' % log_path())
    unknown = re.search(r'Unable to locate package (\S+)'
                        r'|Package (\S+) has no installation', output)
    if unknown:
        return errors.ToolError(
            'none of the sources of apt has the package %s'
            % (unknown[1] or unknown[2]).strip("'"),
            'add the "main" archive of %s to the sources of apt'
            % (codename() or 'the release'))
    if 'dpkg was interrupted' in output:
        return errors.ToolError(
            'an earlier installation was interrupted',
            'run: dpkg --configure -a')
    return error


def _with_fresh_lists(step, *words, cwd=None):
    """Run apt-get, if need be once more after ``apt-get update``."""
    try:
        return apt(step, *words, cwd=cwd)
    except ui.CommandError as error:
        if not _STALE.search(error.output):
            raise explain(error)
        if os.geteuid():
            raise errors.ToolError(
                'the package lists of apt are missing or out of date',
                'run as root: apt-get update')
    try:
        # Sources that do not answer fail the update only if no other source
        # has what is asked for.
        apt(step, 'update', '-o', 'APT::Update::Error-Mode=any', cwd=cwd)
        update_error = None
    except ui.CommandError as error:
        update_error = error
    try:
        apt(step, *words, cwd=cwd)
    except ui.CommandError as error:
        raise explain(update_error or error)


def install(*names, why):
    """Install those of some packages that are missing.

    :param names: package names
    :param why: what they are for, e.g. ``to build QEMU``
    :raises errors.ToolError: not root; no sources, no network, no such
        package, a lock that stays held
    """
    names = missing(names)
    if not names:
        return
    if os.geteuid():
        raise errors.ToolError(
            'packages are missing %s: %s' % (why, ' '.join(names)),
            'run as root: apt-get install --no-install-recommends %s'
            % ' '.join(names))
    with ui.step('install packages %s (%d)' % (why, len(names))) as step:
        _with_fresh_lists(step, 'install', '--no-install-recommends', *names)


def download(names, into):
    """Download packages without installing them; root is not needed.

    :param names: package names; ``name=version`` and ``name:arch`` as apt
        knows them
    :param into: directory for the .deb files
    :returns: list of the files' paths
    :raises errors.ToolError: no sources, no network, no such package
    """
    into = pathlib.Path(into)
    into.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory(dir=into) as fresh,
          ui.step('download %s' % ' '.join(names)) as step):
        _with_fresh_lists(step, 'download', *names, cwd=fresh)
        return [path.replace(into / path.name)
                for path in sorted(pathlib.Path(fresh).glob('*.deb'))]
