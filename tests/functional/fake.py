# SPDX-License-Identifier: Apache-2.0
"""A scan worker that does what a script says, right or wrong."""

import contextlib
import functools
import os
import socket
import threading
import time

from virtav_nova.monitor import wire

RULE = 'VirtAV_Fake'


class Session:
    """A connection, for a script.

    :param connection: connected socket
    """

    def __init__(self, connection):
        self.hello = None
        self.key = os.urandom(wire.KEY_SIZE)
        self._connection = connection
        self._decoder = wire.Decoder((wire.Hello, wire.Request))

    def receive(self):
        """The next frame of QEMU's.

        :raises EOFError: QEMU closed the connection
        """
        while (frame := self._decoder.frame()) is None:
            count = self._connection.recv_into(self._decoder.room())
            if not count:
                raise EOFError
            self._decoder.filled(count)
        if isinstance(frame, wire.Request):
            # What it holds of the decoder's buffer would not last.
            frame = frame._replace(page=bytes(frame.page))
        return frame

    def send(self, data):
        """Send bytes, whether they are a frame or not."""
        self._connection.sendall(data)

    def welcome(self, **changes):
        """A good WELCOME but for the changes.

        :returns: :class:`wire.Welcome`
        """
        return wire.Welcome(wire.VERSION, 64, bytes(32), self.key,
                            1)._replace(**changes)

    def greet(self):
        """Take the HELLO and answer it."""
        self.hello = self.receive()
        self.send(self.welcome().pack())

    def verdict(self, request, result=wire.Result.CLEAN, rule='', **changes):
        """A good VERDICT but for the changes.

        :returns: :class:`wire.Verdict`
        """
        return wire.Verdict(
            request.id, request.generation,
            wire.page_tag(self.key, request.page), result,
            rule)._replace(**changes)

    def answer(self, request, *arguments, **changes):
        """Send what :meth:`verdict` gives."""
        self.send(self.verdict(request, *arguments, **changes).pack())


def honest(session, signature=None, delay=0):
    """A script that answers as a worker should.

    :param signature: bytes that a page must not have
    :param delay: of each answer, in seconds
    """
    session.greet()
    while True:
        request = session.receive()
        time.sleep(delay)
        if signature and signature in request.page:
            session.answer(request, wire.Result.MATCH, RULE)
        else:
            session.answer(request)


class Worker:
    """Listens, and runs the script for each connection.

    :param home: directory for its socket
    :param script: called with a :class:`Session`; the connection is closed
        when it returns or raises OSError or EOFError. It can be changed at
        any time, for the next connection
    :ivar connections: number of them so far
    :ivar failures: other exceptions of the script
    """

    def __init__(self, home, script=honest):
        self.socket = home / 'fake.sock'
        self.script = script
        self.connections = 0
        self.failures = []
        self._listener = None
        self._open = set()
        self._threads = []

    def __enter__(self):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen()
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exception):
        # Wakes the thread; close would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self.disconnect()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, target):
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.add(connection)
                self._spawn(functools.partial(self._serve, connection))

    def _serve(self, connection):
        with connection:
            try:
                self.script(Session(connection))
            except (OSError, EOFError):
                pass
            except Exception as error:
                self.failures.append(error)
            self._open.discard(connection)

    def disconnect(self):
        """Close the connections there are."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
