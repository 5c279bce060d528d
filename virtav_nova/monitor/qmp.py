# SPDX-License-Identifier: Apache-2.0
"""A small blocking client of QEMU's machine protocol (QMP).

It uses no thread: events are collected while an answer or an event is
waited for. QEMU is not trusted with memory: lines and the number of events
kept are bounded.
"""

import collections
import json
import socket
import time
import typing

_LINE_MAX = 16 << 20
_EVENTS_MAX = 10000
_CHUNK = 1 << 16

Message: typing.TypeAlias = dict[str, typing.Any]


class QMPError(Exception):
    """QEMU answered a command with an error, or broke the protocol.

    :param kind: QEMU's error class, such as ``GenericError``.
    :param description: for people.
    """

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


class QMPTimeout(QMPError):
    """No answer or event came in time."""

    def __init__(self, what: str, timeout: float) -> None:
        super().__init__('Timeout', f'no {what} within {timeout:g} s')


class QMPClosed(QMPError):
    """QEMU closed the connection."""

    def __init__(self) -> None:
        super().__init__('Closed', 'QEMU closed the QMP connection')


class QMPClient:
    """A QMP connection with the capabilities negotiated.

    :param peer: path of QEMU's QMP socket, or a connected socket, which
        then belongs to the client.
    :param timeout: longest wait for the answer to a command, in seconds.
    :raises OSError: when the socket cannot be connected to.
    :raises QMPError: when the peer does not speak QMP.
    """

    def __init__(self, peer: str | socket.socket,
                 timeout: float = 30.0) -> None:
        if isinstance(peer, str):
            self._socket = socket.socket(socket.AF_UNIX)
        else:
            self._socket = peer
        self._timeout = timeout
        self._received = bytearray()
        self._events: collections.deque[Message] = collections.deque(
            maxlen=_EVENTS_MAX)
        try:
            if isinstance(peer, str):
                self._socket.settimeout(timeout)
                self._socket.connect(peer)
            greeting = self._message('greeting', timeout, self._deadline())
            if 'QMP' not in greeting:
                raise QMPError('Protocol', 'the peer does not greet as QMP')
            self.execute('qmp_capabilities')
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> 'QMPClient':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> typing.Any:
        """Run a command and wait for its answer.

        :param command: as QEMU names it.
        :param arguments: as QEMU names them; those with a hyphen are given
            as ``**{'on-match': 'block'}``.
        :returns: what QEMU returns.
        :raises QMPError: when QEMU answers with an error.
        :raises QMPTimeout: when no answer comes; the connection is closed,
            as a late answer would be taken for that of the next command.
        :raises QMPClosed: when QEMU closes the connection.
        """
        line = json.dumps({'execute': command, 'arguments': arguments})
        deadline = self._deadline()
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(line.encode() + b'\n')
            while True:
                answer = self._message(
                    f'answer to {command}', self._timeout, deadline)
                if 'return' in answer:
                    return answer['return']
                if 'error' in answer:
                    error = answer['error']
                    raise QMPError(str(error.get('class')),
                                   str(error.get('desc')))
                self._events.append(answer)
        except QMPTimeout:
            self.close()
            raise
        except TimeoutError:
            self.close()
            raise QMPTimeout(f'answer to {command}', self._timeout) from None
        except OSError:
            raise QMPClosed() from None

    def wait_event(self, name: str, timeout: float) -> Message:
        """Take the oldest event of a name, or wait for it.

        Events of other names are kept, the newest 10,000 of them.

        :param name: as QEMU names it.
        :param timeout: in seconds; 0 to look only at what has come.
        :returns: the whole event, with ``data`` and ``timestamp``.
        :raises QMPTimeout: when there is none in time.
        :raises QMPClosed: when QEMU closes the connection.
        """
        for event in self._events:
            if event.get('event') == name:
                self._events.remove(event)
                return event
        deadline = time.monotonic() + timeout
        while True:
            event = self._message(f'event {name}', timeout, deadline)
            if event.get('event') == name:
                return event
            self._events.append(event)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _message(self, what: str, timeout: float, deadline: float) -> Message:
        """Receive one JSON object.

        :param what: is waited for, for the error.
        :param timeout: that the deadline was made of, for the error.
        :param deadline: on the monotonic clock, in seconds.
        """
        while (end := self._received.find(b'\n')) < 0:
            if len(self._received) > _LINE_MAX:
                raise QMPError('Protocol', 'QEMU sent an over-long line')
            left = deadline - time.monotonic()
            try:
                # 0 would be taken for a non-blocking socket.
                self._socket.settimeout(max(left, 1e-6))
                received = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise QMPTimeout(what, timeout) from None
            except OSError:
                raise QMPClosed() from None
            if not received:
                raise QMPClosed()
            self._received += received
        line = bytes(self._received[:end])
        del self._received[:end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise QMPError('Protocol', 'QEMU sent something that is no JSON')
        return message
