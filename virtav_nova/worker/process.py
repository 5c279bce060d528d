# SPDX-License-Identifier: Apache-2.0
"""The main process's side of a scan process."""

import collections.abc
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control

#: Signals that only the main process acts on. A terminal and systemd send
#: them to all processes of the worker.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Least time in ns between the two looks at a scan that takes too long.
_CONFIRM_NS = 50_000_000

_SEALS = (fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW
          | fcntl.F_SEAL_SHRINK)


class Setup:
    """What every scan process is started with.

    :param engine: whose compiled rules they get, in sealed memory.
    :param key: tag key.
    :param scan_timeout_ms: limit of one scan.
    :param max_in_flight: requests of one session that may wait.
    :param busy_poll_us: how long to look for the next request before sleep.
    :param table_fd: of the verdict table, writable; None for no table.
    """

    def __init__(self, engine: base.Engine, key: bytes, scan_timeout_ms: int,
                 max_in_flight: int, busy_poll_us: int,
                 table_fd: int | None) -> None:
        kind = type(engine)
        self._start = {
            'engine': f'{kind.__module__}:{kind.__qualname__}',
            'key': key.hex(),
            'scan_timeout_ms': scan_timeout_ms,
            'max_in_flight': max_in_flight,
            'busy_poll_us': busy_poll_us,
        }
        self.table_fd = table_fd
        self.rules_fd = os.memfd_create(
            'virtav-rules', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(self.rules_fd), 'wb') as rules:
            rules.write(engine.image())
        fcntl.fcntl(self.rules_fd, fcntl.F_ADD_SEALS, _SEALS)

    def message(self, skip: collections.abc.Iterable[bytes]) -> bytes:
        """:returns: the first message to a process."""
        return control.pack(
            'start', **self._start, skip=[tag.hex() for tag in skip])


class ScanProcess:
    """A running scan process.

    :param setup: what it is started with.
    :param skip: tags of pages that it is not to scan.
    :raises OSError: when it cannot be started.
    """

    def __init__(self, setup: Setup,
                 skip: collections.abc.Iterable[bytes]) -> None:
        #: The sessions that it serves, by number.
        self.sessions: dict[int, wire.Hello] = {}
        #: It has loaded its rules.
        self.ready = False
        #: When the scan started that was found to take too long.
        self._suspected = 0
        self._confirm_from = 0
        board_fd = board.Board.create()
        try:
            self._board = board.Board(board_fd)
            self.control, theirs = control.pair()
            with theirs:
                self.control.send(setup.message(skip))
                self._process = _spawn(
                    theirs.fileno(), board_fd, setup.rules_fd,
                    setup.table_fd)
        finally:
            os.close(board_fd)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def hand_over(self, number: int, hello: wire.Hello,
                  connection: socket.socket, ring_fd: int | None,
                  slots: int) -> None:
        """Let it serve a session.

        :param number: that the session is known by.
        :param connection: that HELLO came from; stays open here.
        :param ring_fd: memory for its frames, stays open here; None when
            they go over the connection.
        :param slots: of the ring, 0 without one.
        :raises OSError: when it takes no session.
        """
        fds = [connection.fileno()]
        if ring_fd is not None:
            fds.append(ring_fd)
        socket.send_fds(self.control, [control.pack(
            'session', session=number, slots=slots)], fds)
        self.sessions[number] = hello

    def tell(self, kind: str, **content: object) -> None:
        """Send a message, as far as the process takes any.

        One that does not is dead or hangs, and will be replaced.
        """
        with contextlib.suppress(OSError):
            self.control.send(control.pack(kind, **content))

    def messages(self) -> collections.abc.Iterator[control.Message]:
        """Take the messages that have come.

        :raises EOFError: when it is dead, or sends what it should not.
        """
        while True:
            try:
                data = self.control.recv(control.MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                raise EOFError from error
            yield control.unpack(data)

    def overdue(self, limit: float) -> board.Scan | None:
        """Tell whether a scan takes too long.

        It has to be found so twice. When all processes were stopped in the
        middle of a scan, by a signal or with their control group, the first
        look after that says nothing.

        :param limit: of one scan, in seconds.
        :returns: that scan.
        """
        scan = self._board.scan()
        now = time.monotonic_ns()
        if scan is None or now - scan.started < limit * 1e9:
            return None
        if scan.started != self._suspected:
            self._suspected = scan.started
            self._confirm_from = now + _CONFIRM_NS
            return None
        return scan if now >= self._confirm_from else None

    def end(self, patience: float) -> tuple[int, board.Scan | None]:
        """See it gone. What it sent before can still be taken.

        :param patience: seconds to wait before it is killed.
        :returns: exit status, or the signal that ended it as a negative
            number; and the scan that it was at.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        return self._process.wait(), self._board.scan()


def _spawn(control_fd: int, board_fd: int, rules_fd: int,
           table_fd: int | None) -> subprocess.Popen[bytes]:
    fds = [control_fd, board_fd, rules_fd]
    if table_fd is not None:
        fds.append(table_fd)
    # The mask is inherited, so these signals never reach the new process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # -P: the working directory is nothing to load code from.
        return subprocess.Popen(
            [sys.executable, '-P', '-m', 'virtav_nova.worker.scan',
             str(control_fd), str(board_fd), str(rules_fd),
             str(-1 if table_fd is None else table_fd), str(os.getpid())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=fds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
