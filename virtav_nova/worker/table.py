# SPDX-License-Identifier: Apache-2.0
"""The verdict table: tags of clean pages, in memory that QEMU reads itself.

The layout is specified in ``docs/interop/page-fetch-monitor.rst`` of the
QEMU series. Only clean pages are in it, so that a page that matches always
comes to the worker. Scan processes write it without a lock: an entry that two
of them wrote at once is a tag that no page has.
"""

import os
import struct

from virtav_nova.monitor import memory
from virtav_nova.monitor import wire

MAGIC = b'VAPT'
LAYOUT = 1

_HEADER = struct.Struct('<4sIQ')
_HEADER_SIZE = 4096
_EPOCH = 8
_WAYS = 4
_SET_SIZE = _WAYS * wire.TAG_SIZE
_EMPTY = bytes(wire.TAG_SIZE)


def size(entries: int) -> int:
    """Compute the bytes that a table takes.

    :param entries: a power of two, 4 or more.
    """
    return _HEADER_SIZE + entries * wire.TAG_SIZE


def create(entries: int, epoch: int) -> int:
    """Make an empty table.

    :param entries: a power of two, 4 or more.
    :param epoch: of the rule set.
    :returns: a writable file descriptor, close-on-exec. The file's mode
        lets its owner read and nobody write, so that no QEMU can open its
        own descriptor anew for writing.
    :raises OSError: when there is no memory to be had.
    """
    fd = memory.create(
        'virtav-table', size(entries), _HEADER.pack(MAGIC, LAYOUT, epoch))
    try:
        os.fchmod(fd, 0o400)
    except OSError:
        os.close(fd)
        raise
    return fd


def reader(fd: int) -> int:
    """Open a table for reading only.

    :param fd: from :func:`create`.
    :returns: a file descriptor for QEMU, close-on-exec.
    :raises OSError: when it cannot be opened.
    """
    return os.open(f'/proc/self/fd/{fd}', os.O_RDONLY | os.O_CLOEXEC)


class VerdictTable:
    """A table to be written.

    :param fd: from :func:`create`; may be closed afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._memory = memory.attach(fd)
        self._epoch = memoryview(self._memory)[_EPOCH:_EPOCH + 8].cast('Q')
        # Of the sets, which are as many as a power of two.
        self._mask = (len(self._memory) - _HEADER_SIZE) // _SET_SIZE - 1

    @property
    def epoch(self) -> int:
        """Epoch of the rule set; QEMU takes no hit under another one."""
        return self._epoch[0]

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def add(self, tag: bytes) -> None:
        """Note that a page is clean.

        :param tag: computed from the bytes that were scanned.
        """
        start = self._set(tag)
        if self._find(tag, start) >= 0:
            return
        at = self._find(_EMPTY, start)
        if at < 0:
            at = start + tag[4] % _WAYS * wire.TAG_SIZE
        self._memory[at:at + wire.TAG_SIZE] = tag

    def contains(self, tag: bytes) -> bool:
        """Look a page up as QEMU does, but for the epoch.

        :param tag: of the page.
        """
        return tag != _EMPTY and self._find(tag, self._set(tag)) >= 0

    def _set(self, tag: bytes) -> int:
        """:returns: where the set of a tag begins."""
        number = int.from_bytes(tag[:4], 'little') & self._mask
        return _HEADER_SIZE + number * _SET_SIZE

    def _find(self, entry: bytes, start: int) -> int:
        """Find an entry in a set.

        :param start: of the set.
        :returns: where it is; -1 if it is not there.
        """
        end = start + _SET_SIZE
        at = self._memory.find(entry, start, end)
        while at >= 0 and at % wire.TAG_SIZE:
            # Parts of two others, by chance.
            at = self._memory.find(entry, at + 1, end)
        return at
