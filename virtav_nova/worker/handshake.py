# SPDX-License-Identifier: Apache-2.0
"""A connection that has not yet said who it is."""

import contextlib
import socket

from virtav_nova.monitor import wire
from virtav_nova.worker import listener


class Refused(Exception):
    """The connection cannot become a session.

    :param code: for the peer.
    :param reason: for people on both sides.
    """

    def __init__(self, code: wire.Refusal, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Handshake:
    """Waits for HELLO, without waiting.

    :param connection: non-blocking; belongs to the handshake.
    :param deadline: on the monotonic clock, in seconds.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.peer = listener.credentials(connection)
        # Holds a HELLO and no byte more: what follows is for the scan
        # process.
        self._decoder = wire.Decoder([wire.Hello])

    def hello(self) -> wire.Hello | None:
        """Receive what has come.

        :returns: HELLO once it is complete and can be served.
        :raises Refused: when it cannot be served.
        :raises OSError: when the peer is gone.
        """
        try:
            received = self.connection.recv_into(self._decoder.room())
        except BlockingIOError:
            return None
        if not received:
            raise ConnectionResetError
        self._decoder.filled(received)
        try:
            hello = self._decoder.frame()
        except wire.ProtocolError as error:
            raise Refused(wire.Refusal.PROTOCOL, str(error)) from error
        if not isinstance(hello, wire.Hello):
            return None
        if not hello.version_min <= wire.VERSION <= hello.version_max:
            raise Refused(
                wire.Refusal.VERSION,
                f'version {wire.VERSION} is spoken here, not '
                f'{hello.version_min} to {hello.version_max}')
        if hello.page_size != wire.PAGE_SIZE:
            raise Refused(
                wire.Refusal.PAGE_SIZE,
                f'pages of {wire.PAGE_SIZE} bytes are scanned here, not of '
                f'{hello.page_size}')
        with contextlib.suppress(BlockingIOError):
            if self.connection.recv(1, socket.MSG_PEEK):
                raise Refused(
                    wire.Refusal.PROTOCOL, 'more was sent before WELCOME')
        return hello

    def tell(self, refused: Refused) -> None:
        """Tell the peer why, as far as it listens.

        :param refused: the reason.
        """
        frame = wire.Refused(refused.code, str(refused)).pack()
        with contextlib.suppress(OSError):
            self.connection.send(frame)
