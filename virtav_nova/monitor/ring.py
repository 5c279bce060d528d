# SPDX-License-Identifier: Apache-2.0
"""Requests and verdicts in memory shared with QEMU.

The layout is specified in ``docs/interop/page-fetch-monitor.rst`` of the
QEMU series. There is one queue for each direction: slots of a fixed size and
two indices that run freely, one of which each side writes. A frame is written
into its slot before the index, and after that the other side is told of it by
a byte on the socket. x86 keeps this order of stores; elsewhere Python has no
means to ask for it.

Whatever is in the memory can change at any time: an own index is never read
back, and a frame is copied before it is looked at.
"""

import mmap
import os
import platform
import struct

from virtav_nova.monitor import memory
from virtav_nova.monitor import wire

MAGIC = b'VAPR'
LAYOUT = 1
#: Whether rings can be used on this machine.
SUPPORTED = platform.machine() == 'x86_64'

_HEADER = struct.Struct('<4sII')
_HEADER_SIZE = 4096
# The indices, each in a cache line of its own.
_REQUEST_HEAD = 64
_REQUEST_TAIL = 128
_VERDICT_HEAD = 192
_VERDICT_TAIL = 256
_REQUEST_STRIDE = 5376
_VERDICT_STRIDE = 256
_MASK = 0xffffffff

#: Tells the other side, by the socket, to look into the ring.
DOORBELL = b'\0'


def size(slots: int) -> int:
    """Compute the bytes that a ring takes.

    :param slots: a power of two.
    """
    bare = _HEADER_SIZE + slots * (_REQUEST_STRIDE + _VERDICT_STRIDE)
    return bare + -bare % 4096


def create(slots: int) -> int:
    """Make a ring.

    :param slots: a power of two.
    :returns: a file descriptor of its memory, close-on-exec.
    :raises OSError: when there is no memory to be had.
    """
    return memory.create(
        'virtav-ring', size(slots), _HEADER.pack(MAGIC, LAYOUT, slots))


class Producer:
    """The writing end of a queue.

    :param memory: of the ring.
    :param head: where this end's index is.
    :param tail: where the other end's index is.
    :param start: where the first slot is.
    :param stride: from one slot to the next.
    :param slots: number of slots.
    """

    def __init__(self, memory: mmap.mmap, head: int, tail: int, start: int,
                 stride: int, slots: int) -> None:
        self._memory = memory
        self._head = _index(memory, head)
        self._tail = _index(memory, tail)
        self._start = start
        self._stride = stride
        self._slots = slots
        self._count = 0

    def put(self, frame: bytes) -> None:
        """Hand over a frame.

        :param frame: with its header.
        :raises ProtocolError: when there is no room, or the other end's
            index is out of range.
        """
        count = self._count
        if (count - self._tail[0]) & _MASK >= self._slots:
            raise wire.ProtocolError('the ring is full')
        start = self._start + count % self._slots * self._stride
        self._memory[start:start + len(frame)] = frame
        self._count = self._head[0] = (count + 1) & _MASK


class Consumer:
    """The reading end of a queue.

    :param memory: of the ring.
    :param head: where the other end's index is.
    :param tail: where this end's index is.
    :param start: where the first slot is.
    :param stride: from one slot to the next.
    :param slots: number of slots.
    :param length: of a frame, in bytes.
    :param most: frames that may wait at a time.
    """

    def __init__(self, memory: mmap.mmap, head: int, tail: int, start: int,
                 stride: int, slots: int, length: int, most: int) -> None:
        self._memory = memory
        self._head = _index(memory, head)
        self._tail = _index(memory, tail)
        self._start = start
        self._stride = stride
        self._slots = slots
        self._length = length
        self._most = most
        self._count = 0

    def waiting(self) -> bool:
        """:returns: whether there is something to take."""
        return bool(self._head[0] != self._count)

    def take(self) -> bytes | None:
        """Take the next frame.

        :returns: a copy of the frame, header included; None when there is
            none.
        :raises ProtocolError: when the other end's index is out of range.
        """
        count = self._count
        held = (self._head[0] - count) & _MASK
        if not held:
            return None
        if held > self._most:
            raise wire.ProtocolError('more frames wait in the ring than may')
        start = self._start + count % self._slots * self._stride
        frame = self._memory[start:start + self._length]
        self._count = self._tail[0] = (count + 1) & _MASK
        return frame

    def stop(self) -> None:
        """Take no more than what is there by now."""
        self._head = memoryview(bytes(self._head)).cast('I')


def _index(memory: mmap.mmap, offset: int) -> memoryview:
    # An item of it is read and written at once, unlike a slice of bytes.
    return memoryview(memory)[offset:offset + 4].cast('I')


class WorkerEnd:
    """The worker's end of a ring.

    :param fd: of the memory; may be closed afterwards.
    :param slots: number of slots.
    :param most: requests that may wait at a time.
    :ivar requests: to be taken.
    :ivar verdicts: to be put.
    """

    def __init__(self, fd: int, slots: int, most: int) -> None:
        shared = memory.attach(fd)
        self.requests = Consumer(
            shared, _REQUEST_HEAD, _REQUEST_TAIL, _HEADER_SIZE,
            _REQUEST_STRIDE, slots, wire.REQUEST_SIZE, min(most, slots))
        self.verdicts = Producer(
            shared, _VERDICT_HEAD, _VERDICT_TAIL,
            _HEADER_SIZE + slots * _REQUEST_STRIDE, _VERDICT_STRIDE, slots)


class MonitorEnd:
    """QEMU's end of a ring, for those who stand in for it.

    :param fd: of the memory; may be closed afterwards.
    :param slots: number of slots.
    :ivar requests: to be put.
    :ivar verdicts: to be taken.
    """

    def __init__(self, fd: int, slots: int) -> None:
        if os.fstat(fd).st_size != size(slots):
            raise wire.ProtocolError('the ring has the wrong size')
        shared = mmap.mmap(fd, size(slots))
        if _HEADER.unpack_from(shared) != (MAGIC, LAYOUT, slots):
            raise wire.ProtocolError('the ring has the wrong header')
        self.requests = Producer(
            shared, _REQUEST_HEAD, _REQUEST_TAIL, _HEADER_SIZE,
            _REQUEST_STRIDE, slots)
        self.verdicts = Consumer(
            shared, _VERDICT_HEAD, _VERDICT_TAIL,
            _HEADER_SIZE + slots * _REQUEST_STRIDE, _VERDICT_STRIDE, slots,
            wire.VERDICT_SIZE, slots)
