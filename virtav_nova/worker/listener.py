# SPDX-License-Identifier: Apache-2.0
"""The UNIX socket that the worker listens on."""

import collections.abc
import contextlib
import fcntl
import grp
import os
import pwd
import socket
import stat
import struct
import typing

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.worker import privileges

#: sun_path of Linux, less the NUL at its end.
PATH_MAX = 107

# All instances of the host connect at once when a worker starts.
_BACKLOG = 1024
_CREDENTIALS = struct.Struct('3i')


class Credentials(typing.NamedTuple):
    """Who is at the other end of a connection, as the kernel says."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Credentials:
    """:returns: who made the connection, or listens at its other end."""
    return Credentials._make(_CREDENTIALS.unpack(connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


class Peers:
    """Which users may connect.

    :param users: names or numbers; those that do not exist are passed over.
    """

    def __init__(self, users: collections.abc.Iterable[str]) -> None:
        self._uids = {os.geteuid()}
        for user in users:
            if user.isdecimal():
                self._uids.add(int(user))
                continue
            with contextlib.suppress(KeyError):
                self._uids.add(pwd.getpwnam(user).pw_uid)

    def allow(self, peer: Credentials) -> bool:
        """Tell whether a peer may connect.

        :param peer: as the kernel says.
        """
        return peer.uid in self._uids


class Listener:
    """A listening socket that owns its path.

    :param path: of the socket.
    :param group: that gets the socket, by name; None for the own.
    :param mode: permissions.
    :param owner: user and group that get the socket; None for the own.
    :param option: of the group ``virtav_worker`` that has the path.
    :raises SocketError: when it cannot listen there.
    """

    def __init__(self, path: str, group: str | None, mode: int,
                 owner: tuple[int, int] | None = None,
                 option: str = 'socket') -> None:
        self._option = f'[virtav_worker] {option}'
        size = len(os.fsencode(path))
        if size > PATH_MAX:
            raise exception.SocketError(
                _('socket path %(path)s is %(size)d bytes long, the kernel '
                  'takes %(limit)d') % {
                    'path': path, 'size': size, 'limit': PATH_MAX},
                _('choose a shorter path in %s') % self._option)
        self._path = path
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with self._directory():
                self._make_way()
                self._bind(group, mode, owner)
                self.socket.listen(_BACKLOG)
                self._inode = self._status()
        except exception.SocketError:
            self.socket.close()
            raise
        except OSError as error:
            self.socket.close()
            raise exception.SocketError(
                _('socket %(path)s: %(error)s') % {
                    'path': path, 'error': error.strerror},
                self._way_out(error)) from error

    def close(self) -> None:
        """Stop listening; remove the socket if it is still this one.

        May be called again.
        """
        if self.socket.fileno() < 0:
            return
        with contextlib.suppress(OSError), self._directory():
            if self._status() == self._inode:
                os.unlink(self._path)
        self.socket.close()

    @contextlib.contextmanager
    def _directory(self) -> typing.Iterator[None]:
        """Keep other workers from changing the path meanwhile."""
        directory = os.open(os.path.dirname(self._path) or '.', os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)

    def _status(self) -> tuple[int, int]:
        status = os.lstat(self._path)
        return status.st_dev, status.st_ino

    def _make_way(self) -> None:
        """Remove a socket on which nobody listens any more."""
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise exception.SocketError(
                _('%s exists and is not a socket') % self._path,
                _('move it away, or change %s') % self._option)
        with socket.socket(
                socket.AF_UNIX,
                socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
            except BlockingIOError:
                owner = _('a process')  # Its backlog is full.
            else:
                owner = _('process %d') % credentials(probe).pid
        raise exception.SocketError(
            _('%(owner)s is listening on socket %(path)s') % {
                'owner': owner, 'path': self._path},
            _('stop that worker, or change %s') % self._option)

    def _way_out(self, error: OSError) -> str:
        directory = os.path.dirname(self._path) or '.'
        if not isinstance(error, PermissionError):
            return _('make sure that the directory exists and the worker may '
                     'write to it, or change %s') % self._option
        if os.access(directory, os.W_OK | os.X_OK):
            # What follows is asked for where permissions say yes.
            return _('AppArmor or SELinux keeps the worker from it, see the '
                     'log of the kernel: allow it there, or change '
                     '%s') % self._option
        return _('%(directory)s: give it to user %(user)s, or change '
                 '%(option)s') % {
            'directory': privileges.describe(directory) or directory,
            'user': privileges.state().user, 'option': self._option}

    def _bind(self, group: str | None, mode: int,
              owner: tuple[int, int] | None) -> None:
        # By the mask the socket has its permissions from the beginning.
        mask = os.umask(0o777 & ~mode)
        try:
            self.socket.bind(self._path)
        finally:
            os.umask(mask)
        if owner is not None:
            os.chown(self._path, *owner, follow_symlinks=False)
        if group is None:
            return
        try:
            os.chown(self._path, -1, grp.getgrnam(group).gr_gid,
                     follow_symlinks=False)
        except (KeyError, PermissionError) as error:
            os.unlink(self._path)
            raise exception.SocketError(
                _('socket %(path)s cannot be given to group %(group)s: '
                  '%(error)s') % {
                    'path': self._path, 'group': group,
                    'error': _('no such group') if isinstance(error, KeyError)
                    else error.strerror},
                _('make the worker a member of that group, or change '
                  '[virtav_worker] socket_group')) from error
