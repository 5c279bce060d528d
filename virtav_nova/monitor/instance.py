# SPDX-License-Identifier: Apache-2.0
"""Who may speak for an instance: its registration with the host's worker.

Whoever starts an instance places two files for it, below a directory that is
his: ``UUID.json`` tells the worker the token and the project, ``UUID.token``
holds the token in base64 for QEMU's ``-object
secret,id=ID,format=base64,file=PATH``. QEMU shows the token when it connects.
So a QEMU that a guest took over, or another process that may reach the socket,
cannot speak for another instance, and the token is on no command line.
"""

import base64
import binascii
import contextlib
import grp
import json
import os
import secrets
import stat
import typing
import uuid

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.monitor import wire

#: Longest name of a project, in characters.
PROJECT_MAX = 255
#: Longest file that is read, in bytes.
_FILE_MAX = 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Registration(typing.NamedTuple):
    """What the host knows of an instance.

    :param token: 32 bytes; never to be shown.
    :param project: that it belongs to.
    """

    token: bytes
    project: str

    def __repr__(self) -> str:
        return f'Registration(project={self.project!r})'


def place(directory: str, instance: uuid.UUID, project: str,
          worker_group: str | None = None, qemu_group: str | None = None
          ) -> str:
    """Register an instance. Registered before, it keeps its token.

    :param directory: belongs to the caller, and nobody else may write to it.
        New files get its group when its set-group-ID bit is set.
    :param project: that the instance belongs to.
    :param worker_group: that may read the file for the worker, by name; None
        for the group that files get in this directory.
    :param qemu_group: that may read the file for QEMU, by name; None when
        QEMU runs as the caller.
    :returns: path of the file for QEMU.
    :raises RegistrationError: when it cannot be done.
    """
    if len(project) > PROJECT_MAX:
        raise exception.RegistrationError(
            _('project of instance %(instance)s: more than %(limit)d '
              'characters') % {'instance': instance, 'limit': PROJECT_MAX},
            _('give its ID'))
    path = os.path.join(directory, f'{instance}.token')
    try:
        with _opened(directory) as top:
            _check_directory(directory, top)
            try:
                token = _read(top, instance).token
            except (FileNotFoundError, ValueError):
                token = secrets.token_bytes(wire.TOKEN_SIZE)
            # First what QEMU needs: a worker that knows the instance then
            # finds that it can answer.
            _write(top, f'{instance}.token', base64.b64encode(token),
                   qemu_group, 0o640 if qemu_group else 0o600)
            _write(top, f'{instance}.json', json.dumps({
                'token': token.hex(), 'project': project}).encode(),
                worker_group, 0o640)
            os.fsync(top)
    except OSError as error:
        raise exception.RegistrationError(
            _('registration of instance %(instance)s in %(directory)s: '
              '%(error)s') % {
                'instance': instance, 'directory': directory,
                'error': error.strerror},
            _('let the directory belong to who starts the instances, who is '
              'a member of the groups of worker and QEMU')) from error
    return path


def remove(directory: str, instance: uuid.UUID) -> None:
    """Take back the registration of an instance, if there is one.

    :param directory: see :func:`place`.
    :raises RegistrationError: when it cannot be done.
    """
    try:
        with _opened(directory) as top:
            for name in (f'{instance}.json', f'{instance}.token'):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=top)
    except FileNotFoundError:
        return
    except OSError as error:
        raise exception.RegistrationError(
            _('registration of instance %(instance)s in %(directory)s: '
              '%(error)s') % {
                'instance': instance, 'directory': directory,
                'error': error.strerror},
            _('remove its two files by hand')) from error


def read(directory: str, instance: uuid.UUID) -> Registration:
    """Read the registration of an instance.

    :param directory: see :func:`place`.
    :raises FileNotFoundError: when there is none.
    :raises OSError: when it cannot be read.
    :raises ValueError: when the file is not what it should be; the message
        does not hold what is in it.
    """
    with _opened(directory) as top:
        return _read(top, instance)


def names(directory: str) -> list[uuid.UUID]:
    """Tell which instances are registered.

    :raises OSError: when the directory cannot be read.
    """
    found = []
    for name in os.listdir(directory):
        if name.endswith('.json'):
            with contextlib.suppress(ValueError):
                found.append(uuid.UUID(name.removesuffix('.json')))
    return found


@contextlib.contextmanager
def _opened(directory: str) -> typing.Iterator[int]:
    fd = os.open(directory, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_directory(path: str, fd: int) -> None:
    """:raises RegistrationError: when others may put files there."""
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()):
        reason = _('belongs to user %d') % status.st_uid
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = _('can be written to by others (mode %04o)') % stat.S_IMODE(
            status.st_mode)
    else:
        return
    raise exception.RegistrationError(
        _('directory %(path)s %(reason)s') % {
            'path': path, 'reason': reason},
        _('let it belong to the user that starts the instances, with mode '
          '2751'))


def _read(top: int, instance: uuid.UUID) -> Registration:
    # O_NONBLOCK: to open a named pipe would wait for its writer.
    fd = os.open(f'{instance}.json', os.O_RDONLY | os.O_NOFOLLOW
                 | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=top)
    with os.fdopen(fd, 'rb') as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('not a regular file')
        # Whoever may write the directory may place registrations.
        if status.st_uid not in (0, os.fstat(top).st_uid):
            raise ValueError(f'belongs to user {status.st_uid}')
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError('can be written to by others')
        content = file.read(_FILE_MAX + 1)
    if len(content) > _FILE_MAX:
        raise ValueError('too long')
    try:
        known = json.loads(content)
        token = binascii.unhexlify(known['token'])
        project = known['project']
    except (ValueError, TypeError, KeyError, RecursionError):
        # Without what it was: it may hold the token.
        raise ValueError('not what place() writes') from None
    if (len(token) != wire.TOKEN_SIZE or token == wire.NO_TOKEN
            or not isinstance(project, str) or len(project) > PROJECT_MAX):
        raise ValueError('not what place() writes')
    return Registration(token, project)


def _write(top: int, name: str, content: bytes, group: str | None, mode: int
           ) -> None:
    """Write a file that is there whole or not at all.

    :raises OSError: when it cannot be written.
    """
    draft = f'.{name}.{secrets.token_hex(8)}'
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                 | os.O_CLOEXEC, 0o600, dir_fd=top)
    try:
        with os.fdopen(fd, 'wb') as file:
            if group is not None:
                os.fchown(fd, -1, _group(group))
            os.fchmod(fd, mode)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(draft, name, src_dir_fd=top, dst_dir_fd=top)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft, dir_fd=top)
        raise


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise exception.RegistrationError(
            _('there is no group %s') % name,
            _('name the group that the worker or QEMU runs as')) from None
