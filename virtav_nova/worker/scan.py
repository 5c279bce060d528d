# SPDX-License-Identifier: Apache-2.0
"""A scan process: serves sessions that the main process accepted.

Run by :mod:`virtav_nova.worker.process` as a program of its own. One loop
does everything, and it does little: a vCPU waits for each round trip.
"""

import collections
import ctypes
import errno
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time

from virtav_nova import text
from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import link
from virtav_nova.worker import table

#: Page tags that a process remembers for the counts of its sessions.
DISTINCT_MAX = 262144
#: Messages about matches that may wait for the main process to take them.
_WAITING_MAX = 1024
#: Least time between two reports of failed scans, in seconds.
_FAULT_PERIOD = 1.0
_REASON_MAX = 200

#: Part of the time of a busy poll that is spent on it outside of bursts.
_BRIEF = 10

_PR_SET_PDEATHSIG = 1


class Session:
    """One connection of a QEMU.

    :param number: that the main process knows it by.
    :param transport: to QEMU.
    """

    __slots__ = (
        'dropped', 'fetches', 'link', 'matches', 'number', 'queued',
        'reason', 'tags', 'unknown')

    def __init__(self, number: int, transport: link.Link) -> None:
        self.number = number
        self.link = transport
        #: Stands in the queue of sessions with something to serve.
        self.queued = False
        #: Why it ends; nothing more is received once this is set.
        self.reason: str | None = None
        self.fetches = 0
        self.matches = 0
        self.unknown = 0
        self.dropped = 0
        #: Of the pages asked for; None when they became too many.
        self.tags: set[bytes] | None = set()

    def counts(self) -> record.Record:
        """:returns: see :data:`virtav_nova.alerts.record.COUNTS`."""
        return {
            'fetches': self.fetches,
            'distinct': None if self.tags is None else len(self.tags),
            'matches': self.matches,
            'unknown': self.unknown,
            'dropped': self.dropped,
        }


class Scanner:
    """The loop of a scan process.

    :param main: socket to the main process.
    :param scans: where the scan under way is shown.
    :param engine: with the compiled rules.
    :param key: tag key.
    :param max_in_flight: requests of one session that may wait.
    :param busy_poll_us: how long to look for the next request before sleep.
    :param skip: tags of pages that are not to be scanned again.
    :param verdicts: where clean pages are noted, or None.
    """

    def __init__(self, main: socket.socket, scans: board.Board,
                 engine: base.Engine, key: bytes, max_in_flight: int,
                 busy_poll_us: int, skip: set[bytes],
                 verdicts: table.VerdictTable | None) -> None:
        self._main = main
        self._scans = scans
        self._engine = engine
        self._tagger = wire.Tagger(key)
        self._max_in_flight = max_in_flight
        self._busy_poll = busy_poll_us * 1000
        #: Whether the last event came soon after the one before.
        self._burst = False
        self._skip = skip
        self._table = verdicts
        self._poll = select.epoll()
        self._poll.register(main, select.EPOLLIN)
        self._sessions: dict[int, Session] = {}
        #: The one with a ring that was served last.
        self._recent: Session | None = None
        self._queue: collections.deque[Session] = collections.deque()
        self._waiting: collections.deque[bytes] = collections.deque()
        self._remembered = 0
        self._next_fault = 0.0
        self._drain_until: float | None = None

    def run(self) -> None:
        """Serve until told to drain.

        :raises EOFError: when the main process is gone.
        """
        self._tell('ready')
        while self._drain_until is None or self._sessions or self._waiting:
            for fd, events in self._events():
                session = self._sessions.get(fd)
                if session is not None:
                    self._attend(session)
                elif fd == self._main.fileno():
                    self._obey(events)
            # One request of each session in turn: a busy session keeps the
            # others waiting for no more than one scan.
            for _turn in range(len(self._queue)):
                session = self._queue.popleft()
                session.queued = False
                self._serve(session)

    def _events(self) -> list[tuple[int, int]]:
        """Look for events for a moment, then sleep until there are some."""
        patience = self._patience()
        if not self._busy_poll or patience == 0 or not self._sessions:
            return self._poll.poll(patience)
        begin = time.monotonic_ns()
        # Long only within a burst: who comes rarely can be waited for asleep.
        end = begin + (self._busy_poll if self._burst
                       else self._busy_poll // _BRIEF)
        recent = self._recent
        while time.monotonic_ns() < end:
            if events := self._poll.poll(0):
                break
            # Its memory tells sooner than its doorbell. Not before the
            # others had their chance.
            if recent is not None and recent.link.waiting():
                self._enqueue(recent)
                events = []
                break
        else:
            events = self._poll.poll(patience)
        self._burst = time.monotonic_ns() - begin < self._busy_poll
        return events

    def _patience(self) -> float | None:
        """:returns: seconds that may be slept, None without limit."""
        if self._queue:
            return 0
        if self._drain_until is None:
            return None
        left = self._drain_until - time.monotonic()
        if left <= 0:
            for session in list(self._sessions.values()):
                self._close(session)
        return max(left, 0)

    def _attend(self, session: Session) -> None:
        if session.link.unsent:
            self._send(session, session.link.unsent)
        self._receive(session)

    def _receive(self, session: Session) -> bool:
        """Receive what has come.

        :returns: whether there may be more.
        """
        if session.reason is not None:
            return False
        try:
            more = session.link.receive()
        except BlockingIOError:
            return False
        except EOFError:
            self._end(session, 'peer closed the connection')
            return False
        except OSError as error:
            self._end(session, f'receiving failed: {error.strerror}')
            return False
        except wire.ProtocolError as error:
            self._break(session, str(error))
            return False
        self._enqueue(session)
        return more

    def _serve(self, session: Session) -> None:
        """Answer the next request of a session, if it is complete."""
        transport = session.link
        if transport.unsent:
            return
        try:
            request = transport.take()
            if request is None:
                if session.reason is not None:
                    self._close(session)
                return
            verdict = self._verdict(session, request)
            self._send(session, verdict.pack())
        except wire.ProtocolError as error:
            self._break(session, str(error))
            return
        # The rest can wait, other than the vCPU.
        if transport.shared:
            self._recent = session
        if transport.waiting() or session.reason is not None:
            self._enqueue(session)
        self._remember(session, verdict)

    def _verdict(self, session: Session, request: wire.Request
                 ) -> wire.Verdict:
        tag = self._tagger.tag(request.page)
        if tag != request.tag:
            raise wire.ProtocolError('the tag does not fit the page')
        session.fetches += 1
        if tag in self._skip:
            matches = None
        else:
            matches = self._scan(session, tag, request.page)
        rule = ''
        if matches is None:
            session.unknown += 1
            result = wire.Result.UNKNOWN
        elif matches:
            session.matches += 1
            result = wire.Result.MATCH
            rule = matches[0].rule
            # Before the verdict: it may make QEMU do what the guest notices,
            # and by then the match has to be out of this process.
            for known in record.details(request, matches):
                if not self._tell('match', _WAITING_MAX,
                                  session=session.number, record=known):
                    session.dropped += 1
        else:
            result = wire.Result.CLEAN
        return wire.Verdict(
            request.id, request.generation, tag, result, rule)

    def _remember(self, session: Session, verdict: wire.Verdict) -> None:
        """Note what a verdict said, after it went out."""
        tag = verdict.tag
        if self._table is not None and verdict.result == wire.Result.CLEAN:
            self._table.add(tag)
        if session.tags is not None and tag not in session.tags:
            session.tags.add(tag)
            self._remembered += 1
            if self._remembered > DISTINCT_MAX:
                self._forget_most()

    def _scan(self, session: Session, tag: bytes, page: bytes | memoryview
              ) -> list[base.Match] | None:
        """:returns: the matches, None when the scan failed."""
        self._scans.begin(session.number, tag)
        try:
            return self._engine.scan(page)
        except Exception as error:
            now = time.monotonic()
            if now >= self._next_fault:
                self._next_fault = now + _FAULT_PERIOD
                reason = f'{type(error).__name__}: {error}'
                self._tell('fault', _WAITING_MAX, session=session.number,
                           reason=text.printable(reason, _REASON_MAX))
            return None
        finally:
            self._scans.end()

    def _forget_most(self) -> None:
        """Give up the count of the session that takes most of the memory."""
        largest = max(self._sessions.values(),
                      key=lambda session: len(session.tags or ()))
        self._remembered -= len(largest.tags or ())
        largest.tags = None

    def _send(self, session: Session, data: bytes) -> None:
        """Send a verdict, or the rest of one.

        :raises ProtocolError: when the peer does not let it be sent.
        """
        stalled = bool(session.link.unsent)
        try:
            session.link.send(data)
        except OSError as error:
            # What was received is scanned all the same: it may match.
            self._end(session, f'sending failed: {error.strerror}')
        if stalled != bool(session.link.unsent):
            self._watch(session)
            self._enqueue(session)

    def _watch(self, session: Session) -> None:
        events = 0
        if session.reason is None:
            events |= select.EPOLLIN
        if session.link.unsent:
            events |= select.EPOLLOUT
        self._poll.modify(session.link.fd, events)

    def _enqueue(self, session: Session) -> None:
        if not session.queued:
            session.queued = True
            self._queue.append(session)

    def _end(self, session: Session, reason: str) -> None:
        """Receive no more; close when all that came is answered."""
        if session.reason is None:
            session.reason = reason
            session.link.stop()
            self._watch(session)
            self._enqueue(session)

    def _break(self, session: Session, reason: str) -> None:
        """Close at once, because the peer broke the protocol."""
        session.reason = f'protocol: {reason}'
        self._close(session)

    def _close(self, session: Session) -> None:
        del self._sessions[session.link.fd]
        if session.queued:
            self._queue.remove(session)
        if session is self._recent:
            self._recent = None
        self._remembered -= len(session.tags or ())
        self._poll.unregister(session.link.fd)
        session.link.close()
        self._tell('closed', session=session.number, reason=session.reason,
                   counts=session.counts())

    def _obey(self, events: int) -> None:
        """Take what the main process sends, give it what waits."""
        if events & select.EPOLLOUT:
            self._tell_waiting()
        if not events & ~select.EPOLLOUT:
            return
        try:
            data, fds, _flags, _address = socket.recv_fds(
                self._main, control.MESSAGE_MAX, control.FDS_MAX)
        except OSError as error:
            raise EOFError from error
        message = control.unpack(data)
        if message['type'] == 'session':
            self._open(message['session'], message['slots'], fds)
        elif message['type'] == 'skip':
            self._skip.add(bytes.fromhex(message['tag']))
        elif message['type'] == 'drain':
            self._drain_until = time.monotonic() + message['seconds']
            for session in list(self._sessions.values()):
                while self._receive(session):
                    pass
                self._end(session, 'worker drained')

    def _open(self, number: int, slots: int, fds: list[int]) -> None:
        try:
            transport = self._link(slots, fds)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self._tell('closed', session=number, counts=None,
                       reason=f'the scan process has {error.strerror}')
            return
        self._sessions[transport.fd] = Session(number, transport)
        self._poll.register(transport.fd, select.EPOLLIN)

    def _link(self, slots: int, fds: list[int]) -> link.Link:
        """:raises OSError: the file descriptors are all still open."""
        if len(fds) < 1 + bool(slots):
            # The kernel drops what does not fit into the table of files.
            raise OSError(errno.EMFILE, 'no file left')
        connection = socket.socket(fileno=fds[0])
        if not slots:
            return link.SocketLink(connection, self._max_in_flight)
        try:
            transport = link.RingLink(
                connection, fds[1], slots, self._max_in_flight)
        except OSError as error:
            connection.detach()
            raise OSError(error.errno, 'no room for the ring') from error
        os.close(fds[1])
        return transport

    def _tell(self, kind: str, limit: int | None = None, **content: object
              ) -> bool:
        """Send a message to the main process, now or later.

        :param limit: drop the message when so many wait already.
        :returns: False when it was dropped.
        """
        if limit is not None and len(self._waiting) >= limit:
            return False
        self._waiting.append(control.pack(kind, **content))
        self._tell_waiting()
        return True

    def _tell_waiting(self) -> None:
        events = select.EPOLLIN
        while self._waiting:
            try:
                self._main.send(self._waiting[0])
            except BlockingIOError:
                events |= select.EPOLLOUT
                break
            except OSError as error:
                raise EOFError from error
            self._waiting.popleft()
        self._poll.modify(self._main, events)


def main() -> int:
    """Run a scan process.

    Arguments: file descriptors of the socket to the main process, the board,
    the compiled rules and the verdict table (-1: there is none); process id
    of the main process.
    """
    control_fd, board_fd, rules_fd, table_fd, parent = map(int, sys.argv[1:])
    # A rule may keep this process from noticing that its parent is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    main_process = socket.socket(fileno=control_fd)
    start = control.unpack(main_process.recv(control.MESSAGE_MAX))
    module, _, name = start['engine'].partition(':')
    kind: type[base.Engine] = getattr(importlib.import_module(module), name)
    with os.fdopen(rules_fd, 'rb') as rules:
        image = os.pread(rules_fd, os.fstat(rules_fd).st_size, 0)
        engine = kind.restore(image, start['scan_timeout_ms'])
    del image, rules
    scans = board.Board(board_fd)
    os.close(board_fd)
    verdicts = None
    if table_fd >= 0:
        verdicts = table.VerdictTable(table_fd)
        os.close(table_fd)
    scanner = Scanner(
        main_process, scans, engine,
        bytes.fromhex(start['key']), start['max_in_flight'],
        start['busy_poll_us'],
        {bytes.fromhex(tag) for tag in start['skip']}, verdicts)
    # What exists now stays for good: no need to look through it again.
    gc.freeze()
    try:
        scanner.run()
    except EOFError:
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
