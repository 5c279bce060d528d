# SPDX-License-Identifier: Apache-2.0
"""The parts that a guest runs on: built, found, or given by the user."""

import os
import pathlib
import subprocess
import sys

import virtavtools
from virtavtools import errors

#: For the help of the tools that use this.
HELP = '''\
environment:
  VIRTAV_QEMU          emulator to use instead of what tools/build-qemu builds
  VIRTAV_QEMU_STOCK    the same for tools/build-qemu --stock
  VIRTAV_GUEST         directory of the guest instead of tools/build-guest's
  VIRTAV_GUEST_DEBIAN  the same for tools/build-guest --debian
'''


def _build(tool, *options):
    """Run one of the tools that print a path last.

    Its progress and its errors are shown as they come.

    :raises SystemExit: it failed, and has said why
    """
    with subprocess.Popen([virtavtools.ROOT / 'tools' / tool, *options],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            output = process.stdout.read()
        except BaseException:
            # Not killed: it has compilers of its own to end.
            process.terminate()
            raise
    if process.returncode:
        sys.exit(1)
    return pathlib.Path(output.splitlines()[-1])


def _given(variable, holds=''):
    """What the user named in the environment, or None.

    :param holds: name of a file that a directory must have
    """
    value = os.environ.get(variable)
    if not value:
        return None
    path = pathlib.Path(value).absolute()
    if not (path / holds).exists():
        raise errors.ToolError(
            '%s is %s, but there is no %s' % (variable, value, path / holds),
            'unset %s to have it built, or name another' % variable)
    return path


def emulator():
    """The patched emulator.

    :returns: path of ``qemu-system-x86_64``
    :raises errors.ToolError: what the user named is not there
    :raises SystemExit: it cannot be built; the reason was shown
    """
    return _given('VIRTAV_QEMU') or _build('build-qemu')


def stock_emulator():
    """The emulator without the series, see :func:`emulator`."""
    return _given('VIRTAV_QEMU_STOCK') or _build('build-qemu', '--stock')


def guest():
    """The directory of the guest, see :func:`emulator`."""
    return _given('VIRTAV_GUEST', 'manifest.json') or _build('build-guest')


def debian_guest():
    """The directory of the guest with a Debian, see :func:`emulator`."""
    return (_given('VIRTAV_GUEST_DEBIAN', 'manifest.json')
            or _build('build-guest', '--debian'))
