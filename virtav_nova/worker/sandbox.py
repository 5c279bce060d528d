# SPDX-License-Identifier: Apache-2.0
"""What the processes that work on hostile data may ask the kernel for.

The loader compiles rules of others, a scan process reads what guests wrote.
Either may fall to a flaw in an engine; what remains to it then is what stands
here. System calls are filtered by seccomp, with libseccomp by way of
pyseccomp: the library knows the numbers of the calls for every architecture
and writes filters that the kernel checks fast, and it is installed wherever
systemd or apt is. Filters add up and cannot be taken off, so a scan process
has that of the loader that forked it, and its own.

What is not allowed ends in one of two ways. What the interpreter or the C
library does by the way, and can do without, gets an error. Anything else
raises SIGSYS: the place in the program is written to standard error, and the
process dies. Nothing that reaches the kernel by another table of calls, such
as that of 32-bit programs, gets through at all.

Neither a path nor a name is looked up by these processes: all that they work
on was open before, or is sent to them.
"""

import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import socket
import sys
import termios
import typing

from virtav_nova.worker import privileges

try:
    import pyseccomp
    _missing = ''
except (ImportError, RuntimeError, AttributeError, OSError) as _error:
    # Either the module is not there, or its library.
    pyseccomp = None
    _missing = str(_error)

#: Bytes that a process may write into a file at most; what it inherits is
#: its standard error.
FILE_MAX = 64 << 20

_CLONE_THREAD = 0x00010000
#: Of clone(2): new namespaces of any kind.
_CLONE_NEW = 0x7e020080
_PR_GET_DUMPABLE = 3
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_GET_SECCOMP = 21
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39
_PR_SET_VMA = 0x53564d41
_AT_EMPTY_PATH = 0x1000

#: May be called with any argument. Calls that come with each page stand here
#: alone: the kernel then need not look at the filter.
_ALWAYS = (
    'brk', 'clock_getres', 'clock_gettime', 'clock_nanosleep', 'close', 'dup',
    'epoll_create1', 'epoll_ctl', 'epoll_pwait', 'epoll_pwait2', 'epoll_wait',
    'exit', 'exit_group', 'fstat', 'futex', 'getcwd', 'getegid',
    'geteuid', 'getgid', 'getpeername', 'getpid', 'getppid', 'getrandom',
    'getrusage', 'getsockname', 'getsockopt', 'gettid', 'gettimeofday',
    'getuid', 'lseek', 'madvise', 'membarrier', 'mremap', 'munmap',
    'nanosleep', 'poll', 'ppoll', 'pread64', 'read', 'readv', 'recvfrom',
    'recvmsg', 'restart_syscall', 'rseq', 'rt_sigaction', 'rt_sigprocmask',
    'rt_sigreturn', 'sched_getaffinity', 'sched_yield', 'sendmsg', 'sendto',
    'set_robust_list', 'setsockopt', 'shutdown', 'sigaltstack', 'sysinfo',
    'time', 'times', 'uname', 'write', 'writev')

#: For the loader alone, which starts scan processes.
_LOADING = (
    'dup2', 'dup3', 'fork', 'pidfd_open', 'pipe2', 'seccomp',
    'set_tid_address', 'wait4', 'waitid')

#: What is done by the way: to look for a file that is not needed, or to
#: learn something of the machine. All can do without.
_DENIED = (
    'access', 'arch_prctl', 'chdir', 'faccessat', 'faccessat2', 'fadvise64',
    'fchmod', 'flock', 'fsync', 'ftruncate', 'getcpu', 'getdents',
    'getdents64', 'getpgrp', 'getpriority', 'getxattr', 'get_mempolicy',
    'landlock_add_rule', 'landlock_create_ruleset', 'landlock_restrict_self',
    'lstat', 'mbind', 'memfd_create', 'mincore', 'mkdir', 'mkdirat', 'mlock',
    'open', 'openat', 'openat2', 'readlink', 'readlinkat', 'rename',
    'renameat', 'renameat2', 'rmdir', 'sched_getparam', 'sched_getscheduler',
    'sched_setaffinity', 'sched_setscheduler', 'set_mempolicy', 'setpriority',
    'stat', 'statfs', 'statx', 'umask', 'unlink', 'unlinkat', 'utimensat')

#: What the C library tries first, and then does in the old way.
_UNKNOWN = ('clone3', 'futex_waitv', 'mseal')

_FCNTL = (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL,
          fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GET_SEALS)

Comparison: typing.TypeAlias = typing.Any


class State(typing.NamedTuple):
    """How well a process is shut in.

    :param seccomp: whether there is a filter.
    :param reason: why there is none; nothing when there is.
    """

    seccomp: bool
    reason: str = ''


def enter_loader(local_socket: bool = False) -> State:
    """Shut in the loader, after it has imported what it needs.

    It may still have children, and nothing else that a scan process may not.

    :param local_socket: let it connect to UNIX sockets.
    """
    # The main process has done so too, unless it only tries the rules.
    privileges.lock()
    return _enter(local_socket, True)


def enter_scanner(local_socket: bool = False) -> State:
    """Shut in a scan process, after it was forked.

    :param local_socket: let it connect to UNIX sockets, for an engine that
        says so.
    """
    _limit(resource.RLIMIT_NPROC, 0)
    files, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit(resource.RLIMIT_NOFILE, files)
    return _enter(local_socket, False)


def limit_memory(size: int | None) -> None:
    """Bound the address space for a while.

    :param size: in bytes; None for no other bound than the hard one.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if size is None or (hard != resource.RLIM_INFINITY and size > hard):
        size = hard
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def limit_growth(size: int) -> None:
    """Bound for good what memory is taken beside the most there was so far.

    Memory that is shared with other programs does not count.

    :param size: in bytes.
    """
    size += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    _soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or size < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def limit_time(seconds: int | None) -> None:
    """Bound the processor time from now on. SIGXCPU follows.

    :param seconds: None for no other bound than the hard one.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_SELF)
    if seconds is None:
        end = hard
    else:
        end = int(used.ru_utime + used.ru_stime) + 1 + seconds
        if hard != resource.RLIM_INFINITY:
            end = min(end, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (end, hard))


def died_of_it(status: int) -> bool:
    """Tell whether a process was ended by its sandbox.

    :param status: exit status, or the signal as a negative number.
    """
    return status == -signal.SIGSYS


def _limit(kind: int, value: int) -> None:
    _soft, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _enter(local_socket: bool, loading: bool) -> State:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, FILE_MAX)
    if pyseccomp is None:
        return State(False, _missing)
    # Tells the place in the program, at once and without any of its code,
    # and then lets the signal do what it does.
    faulthandler.register(signal.SIGSYS, sys.__stderr__ or 2, chain=True)
    try:
        rules = _filter(local_socket, loading)
        rules.load()
    except OSError as error:
        return State(False, f'the kernel takes no filter: {error.strerror}')
    return State(True)


def _filter(local_socket: bool, loading: bool) -> typing.Any:
    """:returns: the filter, not yet in force."""
    rules = pyseccomp.SyscallFilter(pyseccomp.TRAP)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    allow = pyseccomp.ALLOW
    for name in _ALWAYS:
        _add(rules, allow, name)
    for name in _DENIED:
        _add(rules, pyseccomp.ERRNO(errno.EPERM), name)
    for name in _UNKNOWN:
        _add(rules, pyseccomp.ERRNO(errno.ENOSYS), name)
    # Memory is never both data and program.
    for name in ('mmap', 'mprotect', 'pkey_mprotect'):
        _add(rules, allow, name, _masked(2, mmap.PROT_EXEC, 0))
        _add(rules, pyseccomp.ERRNO(errno.EPERM), name,
             _masked(2, mmap.PROT_EXEC, mmap.PROT_EXEC))
    for command in _FCNTL:
        _add(rules, allow, 'fcntl', _equal(1, command))
    # Whether a socket waits is set by it; whether this is a terminal is
    # asked by it.
    _add(rules, allow, 'ioctl', _equal(1, termios.FIONBIO))
    _add(rules, pyseccomp.ERRNO(errno.ENOTTY), 'ioctl',
         _equal(1, termios.TCGETS))
    # The new form of fstat: of an open file, without a path. The path itself
    # cannot be seen from here, so that of another file can be asked for its
    # size and dates, as by stat; not for what is in it.
    _add(rules, allow, 'newfstatat', _masked(3, _AT_EMPTY_PATH,
                                             _AT_EMPTY_PATH))
    _add(rules, pyseccomp.ERRNO(errno.EPERM), 'newfstatat',
         _masked(3, _AT_EMPTY_PATH, 0))
    # Of no other process.
    _add(rules, allow, 'prlimit64', _equal(0, 0))
    for option in (_PR_SET_NAME, _PR_GET_DUMPABLE, _PR_GET_SECCOMP,
                   _PR_GET_NO_NEW_PRIVS):
        _add(rules, allow, 'prctl', _equal(0, option))
    # Names for memory; Python gives some.
    _add(rules, pyseccomp.ERRNO(errno.EINVAL), 'prctl',
         _equal(0, _PR_SET_VMA))
    if local_socket:
        _add(rules, allow, 'socket', _equal(0, socket.AF_UNIX))
        # There is no socket of another kind.
        _add(rules, allow, 'connect')
    if loading:
        for name in _LOADING:
            _add(rules, allow, name)
        _add(rules, allow, 'clone', _masked(0, _CLONE_NEW | _CLONE_THREAD, 0))
        for option in (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP,
                       _PR_SET_NO_NEW_PRIVS):
            _add(rules, allow, 'prctl', _equal(0, option))
        _add(rules, allow, 'socketpair', _equal(0, socket.AF_UNIX))
        # A scan process's own filter bounds it further.
        _add(rules, allow, 'tgkill')
    else:
        # To itself, as abort() does.
        _add(rules, allow, 'tgkill', _equal(0, os.getpid()))
    return rules


def _add(rules: typing.Any, action: int, name: str, *comparisons: Comparison
         ) -> None:
    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except (OSError, ValueError):
        return  # A newer one than the library knows.
    if number >= 0:  # Negative where this architecture has none.
        rules.add_rule(action, number, *comparisons)


def _equal(number: int, value: int) -> Comparison:
    # As wide as the kernel takes it: an int.
    return pyseccomp.Arg(number, pyseccomp.MASKED_EQ, 0xffffffff, value)


def _masked(number: int, mask: int, value: int) -> Comparison:
    return pyseccomp.Arg(number, pyseccomp.MASKED_EQ, mask, value)
