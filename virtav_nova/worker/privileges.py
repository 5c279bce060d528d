# SPDX-License-Identifier: Apache-2.0
"""Giving up what the worker may do, once it has what it needs.

Root is needed for nothing but the begin: to make directories and sockets, and
to become somebody else. After :func:`drop` and :func:`lock` the process has no
capability, cannot get any by running a program, and no process of the same
user can look into its memory.
"""

import contextlib
import ctypes
import errno
import grp
import logging
import os
import pwd
import socket
import stat
import sys
import typing

from virtav_nova import exception
from virtav_nova.i18n import _

LOG = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
#: _LINUX_CAPABILITY_VERSION_3 of capget(2): two words of 32 bits each.
_CAPABILITY_VERSION = 0x20080522
_CLONE_NEWNET = 0x40000000
#: More capabilities than any kernel has.
_CAPABILITIES = 64

_libc = ctypes.CDLL(None, use_errno=True)


class Identity(typing.NamedTuple):
    """Who the worker is to be.

    :param name: of the user.
    :param groups: supplementary ones.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


class State(typing.NamedTuple):
    """What a process is, as the kernel tells.

    :param capabilities: effective, permitted, inheritable and ambient ones
        together, a bit each.
    :param bounding: that a program could get if it was let.
    :param no_new_privileges: programs that it runs get no more than it has.
    :param seccomp: 0 for no filter, 2 for a filter.
    """

    user: str
    capabilities: int
    bounding: int
    no_new_privileges: bool
    seccomp: int


def identity(user: str, socket_group: str | None) -> Identity | None:
    """Look up who the worker is to be.

    :param user: by name.
    :param socket_group: group of the socket, by name; needed to give the
        next socket to it.
    :returns: None when there is nothing to change: not started as root.
    :raises PrivilegeError: when there is no such user.
    """
    if os.geteuid():
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise exception.PrivilegeError(
            _('started as root, and there is no user %s to become') % user,
            _('make the user, by systemd-sysusers or by "useradd --system '
              '%s"; or name another one in [virtav_worker] user') % user
        ) from error
    groups = set(os.getgrouplist(user, entry.pw_gid))
    if socket_group:
        # Where there is no such group the socket says so.
        with contextlib.suppress(KeyError):
            groups.add(grp.getgrnam(socket_group).gr_gid)
    return Identity(user, entry.pw_uid, entry.pw_gid, tuple(sorted(groups)))


def make_directory(path: str, owner: Identity | None, mode: int) -> None:
    """Make a directory for the worker, unless it is there.

    One that is there is left as it is: whoever made it may have had reasons.
    Where it cannot be made, what needs it says so.

    :param path: its parent has to exist.
    :param owner: who gets it; None for the own user.
    :param mode: permissions.
    :raises PrivilegeError: when somebody interferes.
    """
    try:
        os.mkdir(path, 0o700)
    except OSError:
        return
    # By a descriptor: the parent may belong to the worker's user, who could
    # put a link there by now.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise exception.PrivilegeError(
                _('directory %s was changed while it was made') % path,
                _('find out who did that'))
        if owner is not None:
            os.fchown(fd, owner.uid, owner.gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def leave_network() -> str | None:
    """Move to a network of the own that has nothing in it.

    Sockets that are there stay where they are, and UNIX sockets are reached
    by their path as before.

    :returns: why it could not be done, or None.
    """
    if _libc.unshare(_CLONE_NEWNET) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def network() -> str:
    """Tell what network this process is in.

    :returns: ``none`` for one that leads nowhere, ``host`` for another.
    """
    try:
        names = [name for _number, name in socket.if_nameindex()]
    except OSError:
        return 'none'  # Not even that may be asked.
    return 'host' if set(names) - {'lo'} else 'none'


def drop(who: Identity) -> None:
    """Become somebody else, for good.

    :param who: may be root, who then has no capability left.
    :raises PrivilegeError: when that cannot be, or the program would not
        find itself any more.
    """
    _empty_bounding_set()
    try:
        os.setgroups(who.groups)
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
    except OSError as error:
        raise exception.PrivilegeError(
            _('cannot become user %(user)s: %(error)s') % {
                'user': who.name, 'error': error.strerror},
            _('start the worker as that user, or let it have CAP_SETUID and '
              'CAP_SETGID')) from error
    if who.uid == 0:
        LOG.warning('Runs as root, as [virtav_worker] user says, with no '
                    'capability. A user of its own would be safer.')
    # Scan processes are started later, and load their code anew.
    for path in (sys.executable, os.__file__, __file__):
        try:
            os.stat(path)
        except OSError as error:
            raise exception.PrivilegeError(
                _('user %(user)s cannot get at the worker\'s own program '
                  '%(path)s: %(error)s') % {
                    'user': who.name, 'path': path,
                    'error': error.strerror},
                _('install the worker where everybody may read it, such as '
                  '/opt; or, to try it, set [virtav_worker] user = root')
            ) from error


def lock() -> None:
    """Give up every capability, and the way to get one back.

    :raises PrivilegeError: when the kernel lets that not be done.
    """
    _empty_bounding_set()
    try:
        # Kernels before 4.3 have no ambient set.
        with contextlib.suppress(OSError):
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        none = (ctypes.c_uint32 * 6)()
        if _libc.capset(header, none):
            _fail('capset')
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise exception.PrivilegeError(
            _('cannot give up privileges: %s') % error,
            _('see which other confinement keeps the worker from it')
        ) from error


def state(pid: int | str = 'self') -> State:
    """Tell what a process may do.

    :param pid: number of the process.
    :raises OSError: when there is no such process.
    """
    fields = {}
    with open(f'/proc/{pid}/status', encoding='ascii',
              errors='replace') as lines:
        for line in lines:
            name, _colon, value = line.partition(':')
            fields[name] = value.strip()
    capabilities = 0
    for name in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb'):
        capabilities |= int(fields.get(name, '0'), 16)
    uid = int(fields['Uid'].split()[1])
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return State(user, capabilities, int(fields.get('CapBnd', '0'), 16),
                 fields.get('NoNewPrivs') == '1',
                 int(fields.get('Seccomp', '0')))


def describe(path: str) -> str:
    """Tell whose a directory is, for an error about it.

    :returns: such as ``/srv belongs to root:root and has mode 0700``; nothing
        when that cannot be told.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ''
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return _('%(path)s belongs to %(user)s:%(group)s and has mode '
             '%(mode)04o') % {
        'path': path, 'user': user, 'group': group,
        'mode': stat.S_IMODE(status.st_mode)}


def _empty_bounding_set() -> None:
    for number in range(_CAPABILITIES):
        try:
            if _prctl(_PR_CAPBSET_READ, number):
                _prctl(_PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return  # The kernel has no more of them.
            # Without CAP_SETPCAP. No program can get one nevertheless:
            # see PR_SET_NO_NEW_PRIVS.
            return


def _prctl(option: int, argument: int) -> int:
    # Of type long each, or the upper half is anything.
    result: int = _libc.prctl(option, *(
        ctypes.c_ulong(value) for value in (argument, 0, 0, 0)))
    if result < 0:
        _fail('prctl')
    return result


def _fail(name: str) -> typing.NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f'{name}: {os.strerror(number)}')
