# SPDX-License-Identifier: Apache-2.0
"""Python environments, kept in the cache."""

import importlib.util
import os
import pathlib
import re
import shutil
import sys

import virtavtools
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import ui

_PROJECT_FILES = ('setup.py', 'setup.cfg', 'pyproject.toml',
                  'requirements.txt', 'test-requirements.txt')
_UNREACHABLE = re.compile(r'NewConnectionError|Name or service not known'
                          r'|Temporary failure in name|ConnectTimeout'
                          r'|ProxyError|Network is unreachable')


def _pip_install(step, python, arguments, log):
    try:
        ui.run(step, [python, '-I', '-m', 'pip', 'install',
                      '--disable-pip-version-check', *arguments], log,
               cwd=virtavtools.ROOT)
    except ui.CommandError as error:
        if _UNREACHABLE.search(error.output):
            raise errors.ToolError(
                'no network: pip cannot reach its package index',
                'check the connection, or set a proxy in https_proxy or an '
                'index in PIP_INDEX_URL; details in %s' % log)
        raise


def _build(text, key, *installs):
    """Find or make an environment.

    :param text: what it is for
    :param key: the cache's key
    :param installs: lists of arguments to ``pip install``, in order
    :returns: path of its bin directory
    """
    with cache.entry('venv', key) as entry:
        if not entry.ready:
            if not importlib.util.find_spec('ensurepip'):
                packages.install('python%d.%d-venv' % sys.version_info[:2],
                                 why='for Python environments')
            # An environment cannot be moved: it is made in its place, and
            # the entry that says where comes last.
            home = cache.root() / 'venv-home' / key
            shutil.rmtree(home, ignore_errors=True)
            home.parent.mkdir(parents=True, exist_ok=True)
            log = cache.root() / 'log' / ('venv-%s.log' % key[:8])
            log.parent.mkdir(parents=True, exist_ok=True)
            with ui.step('set up Python for %s' % text) as step:
                ui.run(step, [sys.executable, '-I', '-m', 'venv', home], log)
                for arguments in installs:
                    _pip_install(step, home / 'bin' / 'python', arguments,
                                 log)
            (entry.work / 'bin').symlink_to(home / 'bin')
            entry.publish()
    return pathlib.Path(os.readlink(entry.path / 'bin'))


def _identity():
    """The interpreter that environments are made from."""
    return '%s %s' % (os.path.realpath(sys.executable), sys.version)


def plain(*requirements):
    """An environment with some packages from PyPI alone.

    :param requirements: as pip takes them, e.g. ``meson>=1.5``
    :returns: path of its bin directory
    :raises errors.ToolError: no network, not root where a package is missing
    """
    return _build(' '.join(requirements),
                  cache.digest(_identity(), *requirements), requirements)


def trust_checkout():
    """Have git work in a checkout that belongs to another user.

    Root may install and test what a user, or the mount of a container, owns;
    whoever runs this program trusts the checkout anyway. Holds for all
    programs that are started from here on.
    """
    count = int(os.environ.get('GIT_CONFIG_COUNT', '0'))
    last = [os.environ.get('GIT_CONFIG_%s_%d' % (part, count - 1))
            for part in ('KEY', 'VALUE')]
    trusted = ['safe.directory', str(virtavtools.ROOT)]
    if last != trusted:
        os.environ.update({'GIT_CONFIG_COUNT': str(count + 1),
                           'GIT_CONFIG_KEY_%d' % count: trusted[0],
                           'GIT_CONFIG_VALUE_%d' % count: trusted[1]})


def ensure(extras=()):
    """An environment with this checkout installed editable.

    It holds the console scripts and what the tests need. Quick when it is
    there; made anew when the project's metadata or requirements change.

    :param extras: what to install besides: requirement strings as pip takes
        them, or paths of requirement files
    :returns: path of its bin directory
    :raises errors.ToolError: no network, not root where a package is missing
    """
    # To be installed, it is asked for its version by git.
    trust_checkout()
    root = virtavtools.ROOT
    files = [path for path in map(root.joinpath, _PROJECT_FILES)
             if path.exists()]
    arguments = []
    for extra in extras:
        arguments += (['-r', str(extra)] if isinstance(extra, pathlib.Path)
                      else [extra])
    wanted = root / 'test-requirements.txt'
    if wanted.exists():
        arguments += ['-r', str(wanted)]
    key = cache.digest(_identity(), str(root),
                       *(word for path in files
                         for word in (path.name, path)), *extras)
    return _build('the project', key, [*arguments, '--editable', str(root)])


def enter():
    """Go on in the environment of :func:`ensure`.

    Outside of it, the program is begun anew there: call this before anything
    else is done.

    :raises errors.ToolError: see :func:`ensure`
    """
    python = ensure() / 'python'
    if not os.path.samefile(sys.prefix, python.parents[1]):
        sys.stdout.flush()
        os.execv(python, [python, *sys.argv])  # noqa: S606
