# SPDX-License-Identifier: Apache-2.0
"""A scan worker that does what a script says, right or wrong."""

import contextlib
import functools
import mmap
import os
import socket
import threading
import time

from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import table

RULE = 'VirtAV_Fake'


class Session:
    """A connection, for a script.

    :param connection: connected socket
    :ivar hello: the HELLO, once it was received
    :ivar table: :class:`table.VerdictTable`, once one was offered
    :ivar end: :class:`ring.WorkerEnd`, once a ring was offered
    :ivar memory: of the ring, as ``mmap``, to be written at will
    """

    def __init__(self, connection):
        self.hello = None
        self.key = os.urandom(wire.KEY_SIZE)
        self.table = self.end = self.memory = None
        self._fds = []
        self._connection = connection
        self._decoder = wire.Decoder((wire.Hello, wire.Request, wire.Page))
        self._reads = 0

    def close(self):
        """Close what it opened."""
        while self._fds:
            os.close(self._fds.pop())

    def receive(self):
        """The next frame of QEMU's, from wherever it sends them.

        :raises EOFError: QEMU closed the connection
        """
        if self.end:
            return self._take()
        while (frame := self._decoder.frame()) is None:
            count = self._connection.recv_into(self._decoder.room())
            if not count:
                raise EOFError
            self._decoder.filled(count)
        if isinstance(frame, wire.Request):
            # What it holds of the decoder's buffer would not last.
            frame = frame._replace(window=bytes(frame.window))
        elif isinstance(frame, wire.Page):
            frame = frame._replace(content=bytes(frame.content))
        elif isinstance(frame, wire.Hello):
            self.hello = frame
        return frame

    def _take(self):
        while (data := self.end.requests.take()) is None:
            if not self._connection.recv(99):
                raise EOFError
        return wire.whole(data, wire.Request, wire.Page)

    def send(self, data, fds=()):
        """Send bytes over the socket, whether they are a frame or not.

        :param fds: file descriptors to send along; they stay open here
        """
        if fds:
            data = data[socket.send_fds(self._connection, [data], fds):]
        self._connection.sendall(data)

    def put(self, data):
        """Send a verdict to where QEMU looks for it.

        :param data: at most 256 bytes, whether they are a frame or not
        """
        if self.end:
            self.end.verdicts.put(data)
            self.tell()
        else:
            self.send(data)

    def tell(self):
        """Ring QEMU's doorbell."""
        with contextlib.suppress(BlockingIOError):
            self._connection.send(ring.DOORBELL, socket.MSG_DONTWAIT)

    def welcome(self, **changes):
        """A good WELCOME but for the changes.

        :returns: :class:`wire.Welcome`
        """
        return wire.Welcome(wire.VERSION, 64, bytes(32), self.key,
                            1)._replace(**changes)

    def make_table(self, entries, epoch=1):
        """Make :attr:`table`.

        :returns: the file descriptor for QEMU
        """
        fd = table.create(entries, epoch)
        self._fds += [fd, table.reader(fd)]
        self.table = table.VerdictTable(fd)
        return self._fds[-1]

    def make_ring(self, slots):
        """Make a ring, and use it from now on.

        :returns: the file descriptor for QEMU
        """
        self._fds.append(ring.create(slots))
        self.end = ring.WorkerEnd(self._fds[-1], slots, slots)
        self.memory = mmap.mmap(self._fds[-1], 0)
        return self._fds[-1]

    def greet(self, table_entries=0, ring_slots=0, **changes):
        """Take the HELLO and answer it.

        :param table_entries: of a verdict table to offer; 0 for none
        :param ring_slots: of a ring to offer and to use; 0 for none
        :param changes: see :meth:`welcome`
        """
        self.receive()
        fds = []
        if table_entries:
            fds.append(self.make_table(table_entries))
        if ring_slots:
            fds.append(self.make_ring(ring_slots))
        self.send(self.welcome(
            table_entries=table_entries, ring_slots=ring_slots,
            **changes).pack(), fds)

    def verdict(self, request, result=wire.Result.CLEAN, rule='', **changes):
        """A good VERDICT but for the changes.

        :returns: :class:`wire.Verdict`
        """
        return wire.Verdict(
            request.id, request.generation,
            wire.page_tag(self.key, request.page), result,
            rule)._replace(**changes)

    def read(self, gpa):
        """Ask for a page of the guest.

        :param gpa: guest physical address, page aligned
        :returns: :class:`wire.Read`; the answer is the next PAGE frame
        """
        self._reads += 1
        asked = wire.Read(self._reads, gpa)
        self.put(asked.pack())
        return asked

    def answer(self, request, *arguments, **changes):
        """Send what :meth:`verdict` gives."""
        self.put(self.verdict(request, *arguments, **changes).pack())


def honest(session, signature=None, delay=0, **offers):
    """A script that answers as a worker should.

    :param signature: bytes that a page must not have
    :param delay: of each answer, in seconds
    :param offers: see :meth:`Session.greet`
    """
    session.greet(**offers)
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
        session = Session(connection)
        with connection, contextlib.closing(session):
            try:
                self.script(session)
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
