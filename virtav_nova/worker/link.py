# SPDX-License-Identifier: Apache-2.0
"""How a session's requests come to a scan process, and its verdicts go."""

import abc
import contextlib
import socket

from virtav_nova.monitor import ring
from virtav_nova.monitor import wire

#: Bytes of doorbells received at once.
_DOORBELLS = 4096


class Link(abc.ABC):
    """Takes requests and sends verdicts, without waiting.

    :param connection: to the peer, non-blocking; closed with the link.
    :ivar fd: of the connection.
    :ivar shared: a request can be seen before anything is received.
    :ivar unsent: the rest of a verdict that the peer does not take yet.
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
    def take(self) -> wire.Request | None:
        """Take the next request.

        :returns: a request, good until the next one is received; None when
            none is complete.
        :raises ProtocolError: when the peer sent what it may not.
        """

    @abc.abstractmethod
    def send(self, data: bytes) -> None:
        """Send a verdict.

        :param data: the frame, or what is left of it. What cannot be sent
            now is kept in ``unsent``.
        :raises OSError: when the connection is broken.
        :raises ProtocolError: when the peer does not let it be sent.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Take no more requests than have come by now."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class SocketLink(Link):
    """All frames go over the connection.

    :param connection: to the peer, non-blocking.
    :param max_in_flight: requests that may wait.
    """

    def __init__(self, connection: socket.socket, max_in_flight: int) -> None:
        super().__init__(connection)
        self._max_in_flight = max_in_flight
        # Room for one request too many, so that it can be seen.
        self._decoder = wire.Decoder([wire.Request], max_in_flight + 1)

    def receive(self) -> bool:
        """See :meth:`Link.receive`."""
        decoder = self._decoder
        count = self._connection.recv_into(decoder.room())
        if not count:
            raise EOFError
        decoder.filled(count)
        if decoder.held // wire.REQUEST_SIZE > self._max_in_flight:
            raise wire.ProtocolError('more requests in flight than allowed')
        return True

    def waiting(self) -> bool:
        """See :meth:`Link.waiting`."""
        return bool(self._decoder.held)

    def take(self) -> wire.Request | None:
        """See :meth:`Link.take`."""
        frame = self._decoder.frame()
        # The decoder accepts nothing else.
        return frame if isinstance(frame, wire.Request) else None

    def send(self, data: bytes) -> None:
        """See :meth:`Link.send`."""
        self.unsent = b''
        try:
            self.unsent = data[self._connection.send(data):]
        except BlockingIOError:
            self.unsent = data

    def stop(self) -> None:
        """See :meth:`Link.stop`; nothing comes that is not received."""


class RingLink(Link):
    """Frames go through shared memory, doorbells over the connection.

    :param connection: to the peer, non-blocking.
    :param fd: of the memory; may be closed afterwards.
    :param slots: of the ring.
    :param max_in_flight: requests that may wait.
    :raises OSError: when the memory cannot be mapped.
    """

    shared = True

    def __init__(self, connection: socket.socket, fd: int, slots: int,
                 max_in_flight: int) -> None:
        super().__init__(connection)
        end = ring.WorkerEnd(fd, slots, max_in_flight)
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

    def take(self) -> wire.Request | None:
        """See :meth:`Link.take`."""
        data = self._requests.take()
        return None if data is None else wire.whole(wire.Request, data)

    def send(self, data: bytes) -> None:
        """See :meth:`Link.send`."""
        self._verdicts.put(data)
        # When it is full there is a doorbell on its way.
        with contextlib.suppress(BlockingIOError):
            self._connection.send(ring.DOORBELL, socket.MSG_DONTWAIT)

    def stop(self) -> None:
        """See :meth:`Link.stop`."""
        self._requests.stop()
