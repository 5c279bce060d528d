# SPDX-License-Identifier: Apache-2.0
"""A stand-in for QEMU: asks a running worker for verdicts, as QEMU would.

For replays of recordings, for tests and for benches. What cannot be answered
without a guest is not offered: the worker is told that READ is not answered.
"""

import collections.abc
import contextlib
import mmap
import os
import select
import socket
import time
import typing
import uuid

from virtav_nova import text
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire

_DOORBELLS = 4096
#: Frames that are received at once.
_FRAMES = 64
_FDS_MAX = 4
# Of the verdict table; see docs/interop/page-fetch-monitor.rst.
_TABLE_HEADER = 4096
_WAYS = 4

#: What the worker sends once it has welcomed a session.
Answer: typing.TypeAlias = wire.Verdict | wire.Refused


class ClientError(Exception):
    """The worker does not serve, or no longer.

    :ivar refused: what it said, None when it said nothing.
    """

    def __init__(self, message: str, refused: wire.Refused | None = None
                 ) -> None:
        super().__init__(message)
        self.refused = refused


def hello(instance: uuid.UUID | None = None, ring_wanted: bool = True,
          token: bytes = wire.NO_TOKEN, ram_size: int = 512 << 20
          ) -> wire.Hello:
    """Make a HELLO.

    :param instance: UUID, a new one when None.
    :param ring_wanted: whether to ask for shared memory.
    :param token: secret of the instance.
    :param ram_size: in bytes.
    """
    return wire.Hello(
        wire.VERSION, wire.VERSION, wire.PAGE_SIZE, instance or uuid.uuid4(),
        ram_size, wire.Policy.ENFORCE, wire.OnMatch.ALERT,
        wire.OnTimeout.ALLOW, 1000, wire.SHARED if ring_wanted else 0, token)


class Client:
    """A session of a worker.

    :param path: of the worker's socket.
    :param said: HELLO.
    :param timeout: longest wait for the worker in seconds.
    :ivar welcome: what the worker said.
    :ivar tagger: with its key.
    :ivar most: requests that may be unanswered at a time.
    :raises ClientError: when there is no session to be had.
    """

    def __init__(self, path: str, said: wire.Hello, timeout: float = 10
                 ) -> None:
        self._timeout = timeout
        self._socket = socket.socket(socket.AF_UNIX)
        self._decoder = wire.Decoder(
            [wire.Welcome, wire.Verdict, wire.Refused], _FRAMES)
        self._ring: ring.MonitorEnd | None = None
        self._table: mmap.mmap | None = None
        self._fds: list[int] = []
        self._ended = False
        self._poll = select.poll()
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._socket.sendall(said.pack())
            self.welcome = self._welcomed()
            self._share()
        except wire.ProtocolError as error:
            self.close()
            raise ClientError(f'what the worker sends is wrong: {error}'
                              ) from error
        except OSError as error:
            self.close()
            raise ClientError(error.strerror or str(error)) from error
        except ClientError:
            self.close()
            raise
        self.tagger = wire.Tagger(self.welcome.key)
        self.most = self.welcome.max_in_flight
        if self._ring is not None:
            self.most = min(self.most, self.welcome.ring_slots - 1)
        self._poll.register(self._socket, select.POLLIN)

    @property
    def fd(self) -> int:
        """To be polled for what comes."""
        return self._socket.fileno()

    @property
    def shared(self) -> bool:
        """Whether it goes through a ring."""
        return self._ring is not None

    def known(self, tag: bytes) -> bool:
        """Look a tag up in the verdict table.

        :param tag: of a page or of a junction.
        :returns: False, too, when there is no table.
        """
        if self._table is None:
            return False
        size = _WAYS * wire.TAG_SIZE
        sets = (len(self._table) - _TABLE_HEADER) // size
        start = _TABLE_HEADER + size * (
            int.from_bytes(tag[:4], 'little') & (sets - 1))
        line = self._table[start:start + size]
        return any(line[at:at + wire.TAG_SIZE] == tag
                   for at in range(0, size, wire.TAG_SIZE))

    def send(self, frame: bytes) -> None:
        """Send a request.

        :param frame: packed; no more than ``most`` may be unanswered.
        :raises ClientError: when the worker is gone.
        """
        try:
            if self._ring is None:
                self._socket.sendall(frame)
                return
            self._ring.requests.put(frame)
            # When no doorbell goes in, there are some in it.
            with contextlib.suppress(BlockingIOError):
                self._socket.send(ring.DOORBELL, socket.MSG_DONTWAIT)
        except wire.ProtocolError as error:
            raise ClientError(str(error)) from error
        except OSError as error:
            raise ClientError('the worker has gone') from error

    def take(self) -> list[Answer]:
        """Take what has come, without waiting.

        :raises ClientError: when the worker is gone and all is taken, or
            when it sends what it may not.
        """
        try:
            return self._take()
        except wire.ProtocolError as error:
            raise ClientError(f'what the worker sends is wrong: {error}'
                              ) from error

    def wait(self, seconds: float | None = None) -> list[Answer]:
        """Take what has come, or comes soon.

        :param seconds: to wait for it; None for the timeout of the session.
        :raises ClientError: as :meth:`take`, and when nothing comes within
            the timeout.
        """
        until = time.monotonic() + (
            self._timeout if seconds is None else seconds)
        while not (found := self.take()):
            left = until - time.monotonic()
            # What comes may be no more than a doorbell for what is taken.
            if left <= 0 or not self._poll.poll(left * 1000):
                if seconds is None:
                    raise ClientError('the worker does not answer')
                break
        return found

    def ask(self, request: wire.Request) -> wire.Verdict:
        """Ask for one verdict, while there is nothing else on its way.

        :raises ClientError: when none comes.
        """
        self.send(request.pack())
        while True:
            for answer in self.wait():
                if isinstance(answer, wire.Refused):
                    raise _refused(answer)
                if answer.id == request.id:
                    return answer

    def close(self) -> None:
        """End the session."""
        self._socket.close()
        # Views of it may still be about; then it goes with them.
        self._ring = None
        if self._table is not None:
            self._table.close()
            self._table = None
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _welcomed(self) -> wire.Welcome:
        while True:
            frame = self._decoder.frame()
            if isinstance(frame, wire.Welcome):
                return frame
            if isinstance(frame, wire.Refused):
                raise _refused(frame)
            if frame is not None:
                raise wire.ProtocolError('an answer before WELCOME')
            room = self._decoder.room()
            data, fds, _flags, _address = socket.recv_fds(
                self._socket, len(room), _FDS_MAX)
            self._fds += fds
            if not data:
                raise ClientError('the worker closed the connection')
            room[:len(data)] = data
            self._decoder.filled(len(data))

    def _share(self) -> None:
        """Map what came with WELCOME."""
        entries, slots = self.welcome.table_entries, self.welcome.ring_slots
        if len(self._fds) != bool(entries) + bool(slots):
            raise wire.ProtocolError('memory that was not announced')
        if entries:
            fd = self._fds[0]
            size = _TABLE_HEADER + entries * wire.TAG_SIZE
            if os.fstat(fd).st_size != size:
                raise wire.ProtocolError('the table has the wrong size')
            self._table = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        if slots:
            self._ring = ring.MonitorEnd(self._fds[-1], slots)
        while self._fds:
            os.close(self._fds.pop())

    def _take(self) -> list[Answer]:
        found: list[Answer] = []
        if self._ring is not None:
            self._doorbells()
            while (data := self._ring.verdicts.take()) is not None:
                found.append(_answer(wire.whole(
                    data, wire.Verdict, wire.Refused)))
        else:
            self._receive()
            while (frame := self._decoder.frame()) is not None:
                found.append(_answer(frame))
        if self._ended and not found:
            raise ClientError('the worker has gone')
        return found

    def _doorbells(self) -> None:
        try:
            if not self._socket.recv(_DOORBELLS, socket.MSG_DONTWAIT):
                self._ended = True
        except BlockingIOError:
            pass
        except OSError:
            self._ended = True

    def _receive(self) -> None:
        room = self._decoder.room()
        try:
            count = self._socket.recv_into(
                room, len(room), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        self._ended = not count
        self._decoder.filled(count)


def together(clients: collections.abc.Iterable[Client],
             seconds: float) -> list[Client]:
    """Wait until something comes to one of several.

    :param clients: their sessions.
    :param seconds: longest wait.
    :returns: those to which something has come.
    """
    by_fd = {client.fd: client for client in clients}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _events in poll.poll(seconds * 1000)]


def _answer(frame: wire.Frame) -> Answer:
    if isinstance(frame, wire.Verdict | wire.Refused):
        return frame
    raise wire.ProtocolError('a frame that does not belong here')


def _refused(frame: wire.Refused) -> ClientError:
    return ClientError('the worker refuses: %s' % text.printable(
        frame.reason, 120), frame)
