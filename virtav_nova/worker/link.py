# SPDX-License-Identifier: Apache-2.0
"""How a session's requests come to a scan process, and its verdicts go."""

import abc
import contextlib
import socket
import typing

from virtav_nova.monitor import ring
from virtav_nova.monitor import wire

#: Bytes of doorbells received at once.
_DOORBELLS = 4096


class Link(abc.ABC):
    """Takes requests and sends verdicts, without waiting.

    :param connection: to the peer, non-blocking; closed with the link.
    :ivar fd: of the connection.
    :ivar shared: a request can be seen before anything is received.
    :ivar unsent: the rest of what the peer does not take yet.
    """

    shared = False
    unsent = b''

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.fd = connection.fileno()

    @abc.abstractmethod
    def receive(self) -> bool:
        """Receive what has come on the connection.

        :returns: whether there may be more requests to be received.
        :raises BlockingIOError: when there is nothing.
        :raises EOFError: when the peer closed it.
        :raises OSError: when it is broken.
        :raises ProtocolError: when the peer sent what it may not.
        """

    @abc.abstractmethod
    def waiting(self) -> bool:
        """:returns: whether to look for a request."""

    @abc.abstractmethod
    def take(self) -> wire.Request | wire.Page | None:
        """Take the next frame.

        :returns: a frame, good until the next one is received; None when
            none is complete.
        :raises ProtocolError: when the peer sent what it may not.
        """

    @abc.abstractmethod
    def post(self, data: bytes) -> None:
        """Put a frame on its way; :meth:`flush` has to follow.

        :param data: the frame.
        :raises ProtocolError: when the peer does not let it be sent.
        """

    @abc.abstractmethod
    def flush(self) -> None:
        """Have the peer see what was posted.

        What cannot be sent now is kept in ``unsent``, for the next time.

        :raises OSError: when the connection is broken.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Take no more requests than have come by now."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _kinds(reads: bool) -> tuple[type[wire.Frame], ...]:
    return (wire.Request, wire.Page) if reads else (wire.Request,)


class SocketLink(Link):
    """All frames go over the connection.

    :param connection: to the peer, non-blocking.
    :param max_in_flight: requests that may wait.
    :param reads: answers to READ may come, one at a time.
    """

    def __init__(self, connection: socket.socket, max_in_flight: int,
                 reads: bool = False) -> None:
        super().__init__(connection)
        self._most = max_in_flight + reads
        # Room for one request too many, so that it can be seen.
        self._decoder = wire.Decoder(_kinds(reads), self._most + 1)

    def receive(self) -> bool:
        """See :meth:`Link.receive`."""
        decoder = self._decoder
        count = self._connection.recv_into(decoder.room())
        if not count:
            raise EOFError
        decoder.filled(count)
        if decoder.held // wire.REQUEST_SIZE > self._most:
            raise wire.ProtocolError('more requests in flight than allowed')
        return True

    def waiting(self) -> bool:
        """See :meth:`Link.waiting`."""
        return bool(self._decoder.held)

    def take(self) -> wire.Request | wire.Page | None:
        """See :meth:`Link.take`."""
        # The decoder accepts nothing else.
        return typing.cast(
            wire.Request | wire.Page | None, self._decoder.frame())

    def post(self, data: bytes) -> None:
        """See :meth:`Link.post`."""
        self.unsent += data

    def flush(self) -> None:
        """See :meth:`Link.flush`."""
        if not self.unsent:
            return
        with contextlib.suppress(BlockingIOError):
            self.unsent = self.unsent[self._connection.send(self.unsent):]

    def stop(self) -> None:
        """See :meth:`Link.stop`; nothing comes that is not received."""


class RingLink(Link):
    """Frames go through shared memory, doorbells over the connection.

    :param connection: to the peer, non-blocking.
    :param fd: of the memory; may be closed afterwards.
    :param slots: of the ring.
    :param max_in_flight: requests that may wait.
    :param reads: answers to READ may come, one at a time.
    :raises OSError: when the memory cannot be mapped.
    """

    shared = True

    def __init__(self, connection: socket.socket, fd: int, slots: int,
                 max_in_flight: int, reads: bool = False) -> None:
        super().__init__(connection)
        self._kinds = _kinds(reads)
        self._posted = False
        end = ring.WorkerEnd(fd, slots, max_in_flight + reads)
        self._requests = end.requests
        self._verdicts = end.verdicts

    def receive(self) -> bool:
        """See :meth:`Link.receive`."""
        # However many doorbells there are, they say no more than one.
        try:
            doorbells = self._connection.recv(_DOORBELLS)
        except ConnectionResetError:
            doorbells = b''  # Closed before it heard all of ours.
        if not doorbells:
            raise EOFError
        return False

    def waiting(self) -> bool:
        """See :meth:`Link.waiting`."""
        return self._requests.waiting()

    def take(self) -> wire.Request | wire.Page | None:
        """See :meth:`Link.take`."""
        data = self._requests.take()
        if data is None:
            return None
        return typing.cast(wire.Request | wire.Page,
                           wire.whole(data, *self._kinds))

    def post(self, data: bytes) -> None:
        """See :meth:`Link.post`; a peer that looks sees it at once."""
        self._verdicts.put(data)
        self._posted = True

    def flush(self) -> None:
        """See :meth:`Link.flush`."""
        if not self._posted:
            return
        self._posted = False
        # When it is full there is a doorbell on its way. That a peer is gone
        # is seen by receiving.
        with contextlib.suppress(BlockingIOError, BrokenPipeError,
                                 ConnectionResetError):
            self._connection.send(ring.DOORBELL, socket.MSG_DONTWAIT)

    def stop(self) -> None:
        """See :meth:`Link.stop`."""
        self._requests.stop()
