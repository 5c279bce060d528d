# SPDX-License-Identifier: Apache-2.0
"""The main process's side of a loader, and of a scan process."""

import collections.abc
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import typing
import uuid

from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import listener

#: Signals that only the main process acts on. A terminal and systemd send
#: them to all processes of the worker.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Least time in ns between the two looks at a scan that takes too long.
_CONFIRM_NS = 50_000_000


class Client(typing.NamedTuple):
    """A session, as the main process knows it.

    :param number: that it is known by.
    :param hello: without its token.
    :param peer: who is at the other end.
    :param project: of the instance, None when it is not known.
    :param opened: on the monotonic clock, in seconds.
    :param ring: whether it has one.
    """

    number: int
    hello: wire.Hello
    peer: listener.Credentials
    project: str | None
    opened: float
    ring: bool

    @property
    def instance(self) -> uuid.UUID:
        """UUID of the instance."""
        return self.hello.instance


class _End:
    """A process at the other end of a control socket.

    :ivar channel: the socket, non-blocking.
    """

    channel: socket.socket

    def tell(self, kind: str, **content: object) -> None:
        """Send a message, as far as the process takes any.

        One that does not is dead or hangs, and will be replaced.
        """
        with contextlib.suppress(OSError):
            self.channel.send(control.pack(kind, **content))

    def messages(self) -> collections.abc.Iterator[
            tuple[control.Message, list[int]]]:
        """Take the messages that have come.

        :returns: each with its file descriptors.
        :raises EOFError: when it is dead, or sends what it should not.
        """
        while True:
            try:
                yield control.receive(self.channel)
            except BlockingIOError:
                return

    def speaks(self, patience: float) -> bool:
        """Wait for a message, or for the other end to be closed.

        :param patience: in seconds.
        """
        return patience >= 0 and _readable(self.channel.fileno(), patience)


class Loader(_End):
    """A running loader.

    :param rules_fd: see :func:`virtav_nova.worker.loader.pack`; stays open.
    :param boards_fd: of the boards; stays open.
    :raises OSError: when it cannot be started.
    """

    def __init__(self, rules_fd: int, boards_fd: int) -> None:
        self.channel, theirs = control.pair()
        # The loader waits for what it is told, and for its words to be
        # taken.
        theirs.setblocking(True)
        fds = [theirs.fileno(), rules_fd, boards_fd]
        # The mask is inherited, so these signals never reach it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with theirs:
                # -P: the working directory is nothing to load code from.
                self._process = subprocess.Popen(
                    [sys.executable, '-P', '-m', 'virtav_nova.worker.loader',
                     *map(str, fds), str(os.getpid())],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    pass_fds=fds)
        except BaseException:
            self.channel.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fork(self, slot: int, end: socket.socket) -> None:
        """Have it fork a scan process.

        :param slot: of the boards.
        :param end: for the scan process; stays open here.
        :raises OSError: when the loader takes no message.
        """
        socket.send_fds(self.channel, [control.pack('fork', slot=slot)],
                        [end.fileno()])

    def end(self) -> int:
        """End it, and with it all scan processes that are left.

        :returns: exit status, or the signal that ended it as a negative
            number.
        """
        self.channel.close()
        self._process.kill()
        return self._process.wait()


def _readable(fd: int, patience: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(patience * 1000))


class ScanProcess(_End):
    """A scan process, from the moment that it is asked for.

    :param loader: to fork it.
    :param slot: its part of the boards.
    :raises OSError: when it cannot be asked for.
    """

    def __init__(self, loader: Loader, slot: board.Board) -> None:
        #: The sessions that it serves, by number.
        self.sessions: dict[int, Client] = {}
        #: Numbers of those that were told to connect anew.
        self.moving: set[int] = set()
        #: When those were last over their budget, on the monotonic clock.
        self.spent: dict[int, float] = {}
        self.board = slot
        #: Process id; 0 as long as it is not known.
        self.pid = 0
        #: It serves.
        self.ready = False
        #: When it is killed if it has not ended by itself.
        self.leaving: float | None = None
        #: The scan that it was killed for.
        self.killed_for: board.Scan | None = None
        self._pidfd: int | None = None
        self._killed = False
        #: When the scan started that was found to take too long.
        self._suspected = 0
        self._confirm_from = 0
        self.channel, theirs = control.pair()
        with theirs:
            try:
                loader.fork(slot.number, theirs)
            except OSError:
                self.channel.close()
                raise

    @property
    def slot(self) -> int:
        """Number of its board."""
        return self.board.number

    def forked(self, pid: int, pidfd: int) -> None:
        """Note that it exists.

        :param pidfd: closed by :meth:`close`.
        """
        self.pid, self._pidfd = pid, pidfd
        if self._killed:
            self.kill()

    def hand_over(self, client: Client, connection: socket.socket,
                  fds: collections.abc.Sequence[int], **content: object
                  ) -> None:
        """Let it serve a session.

        :param client: the session.
        :param connection: that HELLO came from; stays open here.
        :param fds: of the memory that goes with it; stay open here.
        :param content: the rest of the message.
        :raises OSError: when it takes no session.
        """
        socket.send_fds(self.channel, [control.pack(
            'session', session=client.number, instance=str(client.instance),
            **content)], [connection.fileno(), *fds])
        self.sessions[client.number] = client

    def overdue(self, limit: float) -> board.Scan | None:
        """Tell whether a scan takes too long.

        It has to be found so twice. When all processes were stopped in the
        middle of a scan, by a signal or with their control group, the first
        look after that says nothing.

        :param limit: of one scan, in seconds.
        :returns: that scan.
        """
        scan = self.board.scan()
        now = time.monotonic_ns()
        if scan is None or now - scan.started < limit * 1e9:
            return None
        if scan.started != self._suspected:
            self._suspected = scan.started
            self._confirm_from = now + _CONFIRM_NS
            return None
        return scan if now >= self._confirm_from else None

    def kill(self) -> None:
        """Kill it, at once or as soon as it exists."""
        self._killed = True
        if self._pidfd is not None:
            # It is dead; or the loader sent something else.
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def gone(self, patience: float) -> bool:
        """Wait for its end.

        :param patience: in seconds.
        """
        return self._pidfd is None or _readable(self._pidfd, patience)

    def close(self) -> None:
        """Be done with it."""
        self.channel.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
