# SPDX-License-Identifier: Apache-2.0
"""Small services for people and their tools, beside the real work.

One question and one answer a connection, served by the selector of the main
process, which never waits for a peer: whoever is slow loses the connection.
"""

import collections.abc
import contextlib
import functools
import logging
import selectors
import socket
import time
import typing

LOG = logging.getLogger(__name__)

#: Longest question in bytes.
QUESTION_MAX = 4096
#: Connections at a time; the oldest gives way.
CONNECTIONS_MAX = 16
#: Seconds within which a connection has to be over.
PATIENCE = 5.0
#: Connections accepted before others get their turn.
_ACCEPTS_MAX = 4
#: Pause in seconds when there is no room for another open file.
_PAUSE = 1.0

#: Is given what was received, and gives the answer once that is a question.
Answer: typing.TypeAlias = collections.abc.Callable[[bytes], bytes | None]


class _Connection:
    """Somebody who asks.

    :ivar received: of the question.
    :ivar rest: of the answer; None while the question is not complete.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.deadline = time.monotonic() + PATIENCE
        self.received = b''
        self.rest: memoryview | None = None


class Endpoint:
    """Answers whoever connects to a socket.

    :param listening: non-blocking; stays the caller's.
    :param selector: of the main loop; calls what is registered with it.
    :param answer: to a question.
    """

    def __init__(self, listening: socket.socket,
                 selector: selectors.BaseSelector, answer: Answer) -> None:
        self._listening = listening
        self._selector = selector
        self._answer = answer
        self._connections: dict[socket.socket, _Connection] = {}
        self._accept_from: float | None = None
        self._accepting(True)

    def due(self) -> float | None:
        """Tell when to call :meth:`keep` at the latest.

        :returns: on the monotonic clock in seconds; None while nothing is
            to be done.
        """
        times = [one.deadline for one in self._connections.values()]
        if self._accept_from is not None:
            times.append(self._accept_from)
        return min(times, default=None)

    def keep(self, now: float) -> None:
        """Drop who is too slow.

        :param now: on the monotonic clock in seconds.
        """
        for one in list(self._connections.values()):
            if one.deadline <= now:
                self._drop(one)
        if self._accept_from is not None and self._accept_from <= now:
            self._accept_from = None
            self._accepting(True)

    def close(self) -> None:
        """Drop all connections and accept no more. May be called again."""
        if self._listening.fileno() >= 0 and self._accept_from is None:
            with contextlib.suppress(KeyError):
                self._accepting(False)
        self._accept_from = None
        for one in list(self._connections.values()):
            self._drop(one)

    def _accepting(self, begin: bool) -> None:
        if begin:
            self._selector.register(
                self._listening, selectors.EVENT_READ, self._accept)
        else:
            self._selector.unregister(self._listening)

    def _accept(self) -> None:
        for _turn in range(_ACCEPTS_MAX):
            try:
                connection, _address = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Until something is freed, accept would fail at once again.
                LOG.error('Cannot accept a question: %s', error.strerror)
                self._accepting(False)
                self._accept_from = time.monotonic() + _PAUSE
                return
            connection.setblocking(False)
            if len(self._connections) >= CONNECTIONS_MAX:
                self._drop(next(iter(self._connections.values())))
            one = _Connection(connection)
            self._connections[connection] = one
            self._selector.register(
                connection, selectors.EVENT_READ,
                functools.partial(self._attend, one))

    def _attend(self, one: _Connection) -> None:
        if one.socket not in self._connections:
            return  # Gave way to another one a moment ago.
        try:
            if one.rest is None and not self._receive(one):
                return
            self._send(one)
        except BlockingIOError:
            return
        except OSError:
            self._drop(one)

    def _receive(self, one: _Connection) -> bool:
        """:returns: whether there is something to send."""
        data = one.socket.recv(QUESTION_MAX + 1 - len(one.received))
        one.received += data
        if not data or len(one.received) > QUESTION_MAX:
            self._drop(one)
            return False
        answer = self._answer(one.received)
        if answer is None:
            return False
        one.rest = memoryview(answer)
        self._selector.modify(one.socket, selectors.EVENT_WRITE,
                              functools.partial(self._attend, one))
        return True

    def _send(self, one: _Connection) -> None:
        if one.rest:
            one.rest = one.rest[one.socket.send(one.rest):]
        if not one.rest:
            self._drop(one)

    def _drop(self, one: _Connection) -> None:
        del self._connections[one.socket]
        self._selector.unregister(one.socket)
        one.socket.close()
