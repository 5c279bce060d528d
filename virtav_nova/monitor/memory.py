# SPDX-License-Identifier: Apache-2.0
"""Memory shared between the worker and QEMU."""

import fcntl
import mmap
import os

#: Larger memory would take too long to be filled at a time.
_POPULATE_MAX = 64 << 20

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(name: str, size: int, begin: bytes) -> int:
    """Make memory whose size nobody can change.

    A reader of memory that was cut short under it would die of SIGBUS.

    :param name: for people.
    :param size: in bytes.
    :param begin: its first bytes; the others are zero.
    :returns: a file descriptor, writable and close-on-exec.
    :raises OSError: when there is none to be had.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size)
        os.pwrite(fd, begin, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def attach(fd: int) -> mmap.mmap:
    """Map memory for reading and writing, all of it.

    It is filled at once, as a page fault takes as long as what is done with
    the memory.

    :param fd: from :func:`create`; may be closed afterwards.
    :raises OSError: when it cannot be mapped.
    """
    size = os.fstat(fd).st_size
    flags = mmap.MAP_SHARED
    if size <= _POPULATE_MAX:
        flags |= mmap.MAP_POPULATE
    return mmap.mmap(fd, size, flags=flags)
