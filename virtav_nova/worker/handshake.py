# SPDX-License-Identifier: Apache-2.0
"""A connection that has not yet said who it is."""

import contextlib
import hmac
import socket

from virtav_nova.monitor import instance
from virtav_nova.monitor import wire
from virtav_nova.worker import listener


class Refused(Exception):
    """The connection cannot become a session.

    :param code: for the peer.
    :param reason: for people on both sides.
    :param detail: for the log only.
    """

    def __init__(self, code: wire.Refusal, reason: str, detail: str = ''
                 ) -> None:
        super().__init__(reason)
        self.code = code
        self.detail = detail or reason


class Admission:
    """Who may speak for which instance.

    :param peers: users that may connect.
    :param directory: of the registrations.
    :param required: whether a token has to be shown.
    """

    def __init__(self, peers: listener.Peers, directory: str, required: bool
                 ) -> None:
        self._peers = peers
        self._directory = directory
        self._required = required

    def check_peer(self, peer: listener.Credentials) -> None:
        """Look who connected.

        :param peer: as the kernel says.
        :raises Refused: when it is none that may.
        """
        if not self._peers.allow(peer):
            raise Refused(
                wire.Refusal.TOKEN,
                f'user {peer.uid} is not one of [virtav_worker] peer_users')

    def check(self, hello: wire.Hello) -> str:
        """Look whether the peer is the instance that it says it is.

        :param hello: what it says.
        :returns: project of the instance; nothing when that is not known.
        :raises Refused: when it is not, as far as can be told. The peer is
            not told what of it was wrong.
        """
        if not self._required:
            return ''
        try:
            known = instance.read(self._directory, hello.instance)
        except FileNotFoundError:
            detail = f'no registration in {self._directory}'
        except OSError as error:
            detail = (f'the registration in {self._directory} cannot be '
                      f'read: {error.strerror}')
        except ValueError as error:
            detail = f'the registration in {self._directory}: {error}'
        else:
            if hmac.compare_digest(known.token, hello.token):
                return known.project
            detail = ('it showed no token' if hello.token == wire.NO_TOKEN
                      else 'it showed another token')
        raise Refused(
            wire.Refusal.TOKEN,
            f'not known as instance {hello.instance}',
            f'not known as instance {hello.instance}: {detail}')


class Handshake:
    """Waits for HELLO, without waiting.

    :param connection: non-blocking; belongs to the handshake.
    :param deadline: on the monotonic clock, in seconds.
    :param admission: who may connect.
    :ivar project: of the instance, once HELLO is complete; nothing when it
        is not known.
    """

    def __init__(self, connection: socket.socket, deadline: float,
                 admission: Admission) -> None:
        self.connection = connection
        self.deadline = deadline
        self.project = ''
        self._admission = admission
        self.peer = listener.credentials(connection)
        # Holds a HELLO and no byte more: what follows is for the scan
        # process.
        self._decoder = wire.Decoder([wire.Hello])

    def hello(self) -> wire.Hello | None:
        """Receive what has come.

        :returns: HELLO without its token, once it is complete and can be
            served.
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
        self.project = self._admission.check(hello)
        # What is not there is not shown by mistake.
        return hello._replace(token=wire.NO_TOKEN)

    def tell(self, refused: Refused) -> None:
        """Tell the peer why, as far as it listens.

        :param refused: the reason.
        """
        frame = wire.Refused(refused.code, str(refused)).pack()
        with contextlib.suppress(OSError):
            self.connection.send(frame)
