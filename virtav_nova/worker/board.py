# SPDX-License-Identifier: Apache-2.0
"""What a scan process is scanning, in memory shared with the main process.

A process that hangs in a rule cannot say so. Its main process reads it here,
and finds here the page that a process died of.
"""

import mmap
import os
import struct
import time
import typing

from virtav_nova.monitor import wire

_SIZE = mmap.PAGESIZE
_SCAN = struct.Struct(f'<QQ{wire.TAG_SIZE}s')


class Scan(typing.NamedTuple):
    """A scan that is under way.

    :param started: on the monotonic clock, in ns.
    :param session: number of the session.
    :param tag: of the page.
    """

    started: int
    session: int
    tag: bytes


class Board:
    """The shared memory of one scan process.

    :param fd: of the memory, from :meth:`create`; may be closed afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _SIZE)
        self._started = memoryview(self._map)[:8].cast('Q')

    @classmethod
    def create(cls) -> int:
        """:returns: a file descriptor of new memory, close-on-exec."""
        fd = os.memfd_create('virtav-board')
        os.truncate(fd, _SIZE)
        return fd

    def begin(self, session: int, tag: bytes) -> None:
        """Note that a scan starts.

        :param session: number of the session.
        :param tag: of the page, 16 bytes.
        """
        _SCAN.pack_into(self._map, 0, time.monotonic_ns(), session, tag)

    def end(self) -> None:
        """Note that the scan ended."""
        self._started[0] = 0

    def scan(self) -> Scan | None:
        """Tell the scan that is under way.

        :returns: None when there is none. Session and tag are certain only
            once the process is dead.
        """
        scan = Scan._make(_SCAN.unpack_from(self._map))
        return scan if scan.started else None
