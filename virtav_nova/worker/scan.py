# SPDX-License-Identifier: Apache-2.0
"""A scan process: serves sessions that the main process accepted.

Forked by :mod:`virtav_nova.worker.loader`. One loop does everything, and it
does little: a vCPU waits for each round trip.

What is scanned are *units*: a page, and the junctions with its virtual
neighbours. Each has a tag, by which its result is remembered.
"""

import abc
import collections
import collections.abc
import contextlib
import errno
import os
import select
import socket
import time
import typing

from virtav_nova import text
from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import board as boards
from virtav_nova.worker import budget
from virtav_nova.worker import cache
from virtav_nova.worker import coalesce
from virtav_nova.worker import control
from virtav_nova.worker import link
from virtav_nova.worker import sandbox
from virtav_nova.worker import table

#: Page tags that a process remembers for the counts of its sessions.
DISTINCT_MAX = 262144
#: Messages about matches that may wait for the main process to take them.
_WAITING_MAX = 1024
#: Least time between two reports of failed scans, in seconds.
_FAULT_PERIOD = 1.0
_REASON_MAX = 200
#: Part of the limit of a scan, in ns for each ms, after which one that
#: failed was slow.
_SLOW_NS = 500_000
#: How long a session that ends waits for a peer that takes nothing, in
#: seconds.
_LISTEN = 5.0
#: Requests of a session answered before others get their turn, as long as
#: nothing has to be scanned for them.
_BATCH = 32

#: Part of the time of a busy poll that is spent on it outside of bursts.
_BRIEF = 10
#: How long to look for the end of another process's scan without sleep, in
#: ns, and how often after that, in seconds.
_ASIDE_NS = 2_000_000
_ASIDE = 0.001
#: How long at most, in ns for each ms of the limit of a scan: what is there
#: to be read of other processes is only their word.
_ASIDE_MAX_NS = 2_000_000

_PAGE_MASK = -wire.PAGE_SIZE & (1 << 64) - 1

# Plain numbers: to look one up in the enumeration would take longer than to
# count.
_CLEAN = int(boards.Counter.CLEAN)
_MATCH = int(boards.Counter.MATCH)
_UNKNOWN = int(boards.Counter.UNKNOWN)
_SERVICE_NS = int(boards.Counter.SERVICE_NS)
_UNITS = int(boards.Counter.UNITS)
_CACHED = int(boards.Counter.CACHED)
_TABLED = int(boards.Counter.TABLED)
_JOINED = int(boards.Counter.JOINED)
_SCANS = int(boards.Counter.SCANS)
_SCAN_NS = int(boards.Counter.SCAN_NS)
_FAULTS = int(boards.Counter.FAULTS)
_REPEATS = int(boards.Counter.REPEATS)
_DROPPED = int(boards.Counter.DROPPED)
_DEFERRED = int(boards.Counter.DEFERRED)
_FRAGMENTS = int(boards.Counter.FRAGMENTS)


class Settings(typing.NamedTuple):
    """What a scan process is told by its loader.

    :param max_in_flight: requests of one session that may wait.
    :param busy_poll_us: how long to look for the next request before sleep.
    :param scan_timeout_ms: limit of one scan.
    :param cache_size: bytes for results of scans.
    :param budget: share of a processor that each instance has.
    :param accumulate: options of the same name.
    """

    max_in_flight: int
    busy_poll_us: int
    scan_timeout_ms: int
    cache_size: int
    budget: float
    accumulate: dict[str, typing.Any]


class Unit(typing.NamedTuple):
    """Bytes that were scanned.

    :param form: ``page`` or ``junction``; ``accumulated`` for several pages.
    :param start: guest virtual address of the first of them.
    :param data: the bytes; of several pages the one that was fetched.
    :param result: what was found; None if the scan failed.
    :param pages: see :class:`virtav_nova.alerts.record.Finding`.
    """

    form: str
    start: int
    data: bytes | memoryview
    result: base.Examined | None
    pages: collections.abc.Sequence[record.Record] = ()


class Scope:
    """Sessions that share what is learnt of pages.

    :param key: tag key.
    :param table_fd: of the verdict table, closed here; None for no table.
    :ivar sessions: how many there are.
    """

    def __init__(self, key: bytes, table_fd: int | None) -> None:
        self.tagger = wire.Tagger(key)
        self.table = None
        self.sessions = 0
        if table_fd is not None:
            self.table = table.VerdictTable(table_fd)
            os.close(table_fd)


class Session:
    """One connection of a QEMU.

    :param number: that the main process knows it by.
    :param instance: UUID of the instance.
    :param transport: to QEMU.
    :param scope: that it belongs to.
    :param spending: budget of its instance.
    :param shared: QEMU looks into the verdict table.
    :param reads: QEMU answers READ.
    :ivar table: the one that QEMU looks into, or None.
    """

    __slots__ = (
        'aside', 'aside_since', 'budget', 'closed', 'deferred', 'dropped',
        'fetches', 'instance', 'link', 'matches', 'number', 'parked',
        'queued', 'reading', 'reads', 'reason', 'refusal', 'scope', 'table',
        'tags', 'unknown', 'wanted')

    def __init__(self, number: int, instance: str, transport: link.Link,
                 scope: Scope, spending: budget.Budget, shared: bool,
                 reads: bool) -> None:
        self.number = number
        self.instance = instance
        self.link = transport
        self.scope = scope
        self.budget = spending
        self.table = scope.table if shared else None
        self.reads = reads
        #: The READ that is not answered yet.
        self.reading: wire.Read | None = None
        #: Stands in a queue of sessions with something to serve.
        self.queued = False
        #: Was told of to be over its budget.
        self.deferred = 0.0
        #: A request for what another process is scanning, and since when.
        self.aside: wire.Request | None = None
        self.aside_since = 0
        #: Requests whose verdict comes later.
        self.parked = 0
        #: The collector has to see all its requests.
        self.wanted = False
        #: Why it ends; nothing more is received once this is set.
        self.reason: str | None = None
        #: What to tell QEMU at the end.
        self.refusal: wire.Refusal | None = None
        self.closed = False
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


class Collector(abc.ABC):
    """Puts together what lies on several pages.

    It may keep a request waiting: the request is *parked*, and answered by
    :meth:`Scanner.settle` later.
    """

    @abc.abstractmethod
    def note(self, session: Session, request: wire.Request,
             units: list[Unit], matched: bool) -> bool:
        """Take parts of rules that were found.

        :param request: its window lasts.
        :param units: at least one has fragments, unless the session is
            ``wanted``.
        :param matched: there is a match, so it cannot be parked.
        :returns: whether the request is parked.
        """

    @abc.abstractmethod
    def page(self, session: Session, answer: wire.Page) -> None:
        """Take the answer to the READ.

        :param answer: its content does not last.
        """

    @abc.abstractmethod
    def stop(self, session: Session) -> None:
        """Settle what is parked, for READ will not be answered any more."""

    @abc.abstractmethod
    def close(self, session: Session) -> None:
        """Forget a session."""

    @abc.abstractmethod
    def due(self) -> float | None:
        """Tell when to call :meth:`keep`.

        :returns: on the monotonic clock in seconds; None while there is
            nothing to do.
        """

    @abc.abstractmethod
    def keep(self) -> None:
        """Do what is due, but not for long."""


class _ElsewhereError(Exception):
    """Another process is scanning this."""


class Scanner:
    """The loop of a scan process.

    :param main: socket to the main process.
    :param scans: its part of the boards.
    :param engine: with the compiled rules.
    :param settings: see there.
    :ivar collector: None for an engine that gives no fragments.
    """

    def __init__(self, main: socket.socket, scans: boards.Board,
                 engine: base.Engine, settings: Settings) -> None:
        self.board = scans
        self.engine = engine
        self.settings = settings
        self.collector: Collector | None = None
        self._main = main
        self._count = scans.counters
        self._busy_poll = settings.busy_poll_us * 1000
        #: Whether the last event came soon after the one before.
        self._burst = False
        #: Tags of what is not to be scanned again.
        self._skip: set[bytes] = set()
        self._cache = cache.Cache(settings.cache_size)
        self._budgets = budget.Budgets(settings.budget)
        self._matches = coalesce.Coalescer(self._tell_match)
        self._poll = select.epoll()
        self._poll.register(main, select.EPOLLIN)
        self._sessions: dict[int, Session] = {}
        self._numbers: dict[int, Session] = {}
        self._scopes: dict[int, Scope] = {}
        #: The one with a ring that was served last.
        self._recent: Session | None = None
        self._queue: collections.deque[Session] = collections.deque()
        #: Those over their budget.
        self._spent: collections.deque[Session] = collections.deque()
        #: Those with a request that is put aside.
        self._aside: list[Session] = []
        #: What others are scanning is scanned here, too.
        self._alone = False
        #: Sessions that end, and when to see whether the peer listens.
        self._ending: dict[Session, float] = {}
        self._waiting: collections.deque[bytes] = collections.deque()
        #: Tags of clean units, and the tables that they belong into.
        self._found: list[tuple[table.VerdictTable, bytes]] = []
        self._reads = 0
        self._remembered = 0
        self._next_fault = 0.0
        self._drain_until: float | None = None
        engine.progress = scans.at

    @property
    def contended(self) -> bool:
        """Sessions within their budget wait for their turn."""
        return bool(self._queue)

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
            self._keep()
            # A few requests of each session in turn: a busy session keeps
            # the others waiting for no more than one scan.
            for _turn in range(len(self._queue)):
                session = self._queue.popleft()
                session.queued = False
                self.board.wait(len(self._queue) + len(self._spent)
                                + len(self._aside))
                self._serve(session)
            # What is left is for those who had more than their share.
            if self._spent:
                self._serve_spent()

    def _keep(self) -> None:
        """Do what is due."""
        if self._aside:
            self._look_aside()
        if self._ending:
            self._look_at_ending()
        now = None
        due = self._matches.due()
        if due is not None:
            now = time.monotonic()
            if due <= now:
                self._matches.keep()
        if self.collector is not None:
            due = self.collector.due()
            if due is not None and due <= (now or time.monotonic()):
                self.collector.keep()

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
        if self._queue or self._spent:
            return 0
        times = []
        if self._aside:
            since = min(session.aside_since for session in self._aside)
            if time.monotonic_ns() - since < _ASIDE_NS:
                return 0
            times.append(time.monotonic() + _ASIDE)
        times += self._ending.values()
        due = self._matches.due()
        if due is not None:
            times.append(due)
        if self.collector is not None:
            due = self.collector.due()
            if due is not None:
                times.append(due)
        if self._drain_until is not None:
            if self._drain_until <= time.monotonic():
                for session in list(self._sessions.values()):
                    self._close(session)
                return 0
            times.append(self._drain_until)
        if not times:
            return None
        return max(min(times) - time.monotonic(), 0)

    def _attend(self, session: Session) -> None:
        if session.link.unsent:
            self._flush(session)
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

    def _serve_spent(self) -> None:
        """Serve one that is over its budget, if nobody else wants to be."""
        session = self._spent[0]
        if not self._queue or session.budget.left():
            self._spent.popleft()
            session.queued = False
            self._serve(session)
        else:
            self._count[_DEFERRED] += 1
            self._spent.rotate(-1)
            now = time.monotonic()
            if now - session.deferred >= _FAULT_PERIOD:
                session.deferred = now
                self._tell('spent', _WAITING_MAX, session=session.number)

    def _serve(self, session: Session) -> None:
        """Answer what a session asks: a few requests, or one scan."""
        transport = session.link
        if transport.unsent or session.aside is not None:
            return
        begin = start = time.monotonic_ns()
        known = self._cache.get
        clean = cache.CLEAN
        empty = False
        try:
            for _turn in range(_BATCH):
                frame = transport.take()
                if frame is None:
                    empty = True
                    break
                if not isinstance(frame, wire.Request):
                    self._take_page(session, frame)
                    continue
                flags = frame.flags
                # What is known to be clean is not looked at: its tag is the
                # peer's word. Whoever lies about it is told nothing but that
                # the page that has this tag is clean, and has it so.
                if (session.wanted or known(frame.tag) is not clean
                        or (flags & wire.BEFORE
                            and known(frame.before_tag) is not clean)
                        or (flags & wire.AFTER
                            and known(frame.after_tag) is not clean)):
                    # Those before it need not wait for this one.
                    self._flush(session)
                    if not session.closed:
                        self._answer(session, frame, start)
                    break
                transport.post(wire.clean(
                    frame.id, frame.generation, frame.tag))
                self._count_known(session, frame)
                now = time.monotonic_ns()
                self.board.service[boards.bucket(now - start)] += 1
                start = now
        except wire.ProtocolError as error:
            # Or what was scanned for it would be for nothing.
            session.budget.spend(time.monotonic_ns() - begin)
            self._break(session, str(error))
            return
        if not session.closed:
            self._finish(session, begin, empty)

    def _count_known(self, session: Session, request: wire.Request) -> None:
        """Count a request for what was known to be clean."""
        count = self._count
        flags = request.flags
        units = 1 + (flags >> 2 & 1) + (flags >> 3 & 1)
        count[_UNITS] += units
        count[_CACHED] += units
        count[_CLEAN] += 1
        session.fetches += 1
        self._remember(session, request.tag)
        # QEMU did not find it in the table, which has no room for all.
        if session.table is not None:
            found = self._found
            found.append((session.table, request.tag))
            if flags & wire.BEFORE:
                found.append((session.table, request.before_tag))
            if flags & wire.AFTER:
                found.append((session.table, request.after_tag))

    def _finish(self, session: Session, begin: int, empty: bool) -> None:
        """Do after a few verdicts what can wait, other than the vCPU.

        :param begin: of their service, on the monotonic clock in ns.
        :param empty: there was no request left.
        """
        transport = session.link
        self._flush(session)
        if transport.shared:
            self._recent = session
        if self._found:
            for into, tag in self._found:
                into.add(tag)
            self._found.clear()
        taken = time.monotonic_ns() - begin
        self._count[_SERVICE_NS] += taken
        session.budget.spend(taken)
        if empty:
            if (session.reason is not None and not session.parked
                    and not transport.unsent):
                self._close(session)
        elif transport.waiting() or session.reason is not None:
            self._enqueue(session)

    def _answer(self, session: Session, request: wire.Request, start: int
                ) -> None:
        """Answer a request for which something may have to be scanned.

        :param start: of its service, on the monotonic clock in ns.
        :raises ProtocolError: when a tag does not fit.
        """
        try:
            units = self._units(session, request)
        except _ElsewhereError:
            # What it holds of the link's buffer would not last.
            session.aside = request._replace(window=bytes(request.window))
            session.aside_since = time.monotonic_ns()
            self._aside.append(session)
            return
        session.fetches += 1
        self._remember(session, request.tag)
        if self._park(session, request, units):
            session.parked += 1
            return
        self._verdict(session, request, units)
        self.board.service[boards.bucket(
            time.monotonic_ns() - start)] += 1

    def _park(self, session: Session, request: wire.Request,
              units: list[Unit]) -> bool:
        """Give parts of rules to those who put them together."""
        parts = session.wanted
        matched = False
        for unit in units:
            if unit.result is None:
                return False
            if unit.result.matches:
                matched = True
            if unit.result.fragments:
                parts = True
        if not parts:
            return False
        self._count[_FRAGMENTS] += 1
        if self.collector is None:
            return False
        return self.collector.note(session, request._replace(
            window=bytes(request.window)), units, matched)

    def _verdict(self, session: Session, request: wire.Request,
                 units: list[Unit]) -> None:
        """Send the verdict on a request."""
        findings = self._findings(units)
        rule = ''
        if findings:
            session.matches += 1
            self._count[_MATCH] += 1
            result = wire.Result.MATCH
            rule = findings[0].match.rule
            # Before the verdict: it may make QEMU do what the guest notices,
            # and by then the match has to be out of this process.
            self._alert(session, request, findings)
        elif any(unit.result is None for unit in units):
            session.unknown += 1
            self._count[_UNKNOWN] += 1
            result = wire.Result.UNKNOWN
        else:
            self._count[_CLEAN] += 1
            result = wire.Result.CLEAN
        session.link.post(wire.Verdict(
            request.id, request.generation, request.tag, result,
            rule).pack())

    @staticmethod
    def _findings(units: list[Unit]) -> list[record.Finding]:
        """List the matches; what a page has its junctions may have too."""
        findings: dict[tuple[str, str], record.Finding] = {}
        for unit in units:
            for match in unit.result.matches if unit.result else ():
                findings.setdefault(
                    (match.namespace, match.rule), record.Finding(
                        unit.form, match, unit.start, unit.data, unit.pages))
        return list(findings.values())

    def _alert(self, session: Session, request: wire.Request,
               findings: list[record.Finding]) -> None:
        for known in record.details(request, findings):
            kind = (session.instance, known['namespace'], known['rule'],
                    known['form'])
            if not self._matches.add(kind, session.number, known):
                self._count[_REPEATS] += 1

    def _tell_match(self, number: int, known: record.Record) -> None:
        session = self._numbers.get(number)
        if session is None:
            return
        if not self._tell('match', _WAITING_MAX, session=number,
                          record=known):
            session.dropped += 1 + known['repeats']
            self._count[_DROPPED] += 1 + known['repeats']

    def _units(self, session: Session, request: wire.Request) -> list[Unit]:
        """Find out about the page, and the junctions that there are.

        :raises ProtocolError: when a tag does not fit.
        :raises _ElsewhereError: when another process is about to know.
        """
        start = request.gva & _PAGE_MASK
        flags = request.flags
        wanted = [('page', start, request.tag, request.page)]
        if flags & wire.BEFORE:
            wanted.append(('junction', start - wire.EDGE_SIZE,
                           request.before_tag, request.junction_before))
        if flags & wire.AFTER:
            wanted.append(('junction', start + wire.PAGE_SIZE
                           - wire.EDGE_SIZE, request.after_tag,
                           request.junction_after))
        return [Unit(form, at, data, self._examine(session, tag, data))
                for form, at, tag, data in wanted]

    def _examine(self, session: Session, tag: bytes, data: bytes | memoryview
                 ) -> base.Examined | None:
        """:returns: what is in a unit, None when it cannot be told."""
        count = self._count
        count[_UNITS] += 1
        scope = session.scope
        known = self._cache.get(tag)
        if known is cache.CLEAN:
            count[_CACHED] += 1
            return known
        if scope.tagger.tag(data) != tag:
            raise wire.ProtocolError('the tag does not fit the bytes')
        if known is not None:
            count[_CACHED] += 1
            return known
        if tag in self._skip:
            return None
        if scope.table is not None and scope.table.contains(tag):
            count[_TABLED] += 1
            self._cache.add(tag, cache.CLEAN)
            return cache.CLEAN
        if not self._alone and self.board.elsewhere(tag):
            count[_UNITS] -= 1
            raise _ElsewhereError
        result = self._scan(session, tag, data)
        if result is not None:
            result = cache.result(result)
            self._cache.add(tag, result)
            if result is cache.CLEAN and scope.table is not None:
                self._found.append((scope.table, tag))
        return result

    def _scan(self, session: Session, tag: bytes, data: bytes | memoryview
              ) -> base.Examined | None:
        """:returns: what was found, None when the scan failed."""
        board = self.board
        begin = board.begin(session.number, tag)
        try:
            return self.engine.examine(data)
        except Exception as error:
            self.fault(session, error, begin)
            return None
        finally:
            taken = time.monotonic_ns() - begin
            board.end()
            board.scans[boards.bucket(taken)] += 1
            self._count[_SCANS] += 1
            self._count[_SCAN_NS] += taken

    def fault(self, session: Session, error: Exception, begin: int) -> None:
        """Tell that an engine failed.

        :param begin: of what it did, on the monotonic clock in ns.
        """
        self._count[_FAULTS] += 1
        # An engine that gave up for want of time was spared the end of its
        # process, its rule is not.
        slow = (time.monotonic_ns() - begin
                >= self.settings.scan_timeout_ms * _SLOW_NS)
        # One that came late in a slow scan is not the one that is slow.
        to_blame = slow and self.board.before(begin) < (
            self.settings.scan_timeout_ms * _SLOW_NS // 2)
        now = time.monotonic()
        if slow or now >= self._next_fault:
            self._next_fault = now + _FAULT_PERIOD
            reason = f'{type(error).__name__}: {error}'
            self._tell('fault', _WAITING_MAX, session=session.number,
                       reason=text.printable(reason, _REASON_MAX),
                       part=self.board.part() if to_blame else None)

    @contextlib.contextmanager
    def guard(self, session: Session, tag: bytes
              ) -> collections.abc.Iterator[None]:
        """Let what hangs within be found, and held against page and rule.

        :param tag: of the page that is the reason.
        """
        self.board.begin(session.number, tag)
        try:
            yield
        finally:
            self.board.end()

    def _remember(self, session: Session, tag: bytes) -> None:
        """Note which page was asked for."""
        if session.tags is not None and tag not in session.tags:
            session.tags.add(tag)
            self._remembered += 1
            if self._remembered > DISTINCT_MAX:
                self._forget_most()

    def _look_aside(self) -> None:
        """See whether the scans of others have ended."""
        most = self.settings.scan_timeout_ms * _ASIDE_MAX_NS
        for session in list(self._aside):
            request = session.aside
            late = time.monotonic_ns() - session.aside_since >= most
            if request is None or (
                    not late and self._still_elsewhere(request)):
                continue
            self._aside.remove(session)
            session.aside = None
            self._count[_JOINED] += 1
            begin = time.monotonic_ns()
            self._alone = late
            try:
                self._answer(session, request, session.aside_since)
            except wire.ProtocolError as error:
                session.budget.spend(time.monotonic_ns() - begin)
                self._break(session, str(error))
                continue
            finally:
                self._alone = False
            if not session.closed:
                self._finish(session, begin, False)

    def _look_at_ending(self) -> None:
        """Close sessions whose peer does not take the last verdicts.

        Nobody else would: a move has no end of its own.
        """
        now = time.monotonic()
        for session, until in list(self._ending.items()):
            if until > now:
                continue
            if session.link.unsent:
                self._close(session)
            else:
                self._ending[session] = now + _LISTEN

    def _still_elsewhere(self, request: wire.Request) -> bool:
        elsewhere = self.board.elsewhere
        return (elsewhere(request.tag)
                or (request.before_tag != wire.NO_TAG
                    and elsewhere(request.before_tag))
                or (request.after_tag != wire.NO_TAG
                    and elsewhere(request.after_tag)))

    def read(self, session: Session, gpa: int) -> None:
        """Ask for a page of guest RAM; one at a time.

        :param session: that has ``reads`` set and ``reading`` not.
        :param gpa: page aligned.
        """
        self._reads += 1
        session.reading = wire.Read(self._reads, gpa)
        self._count[boards.Counter.READS] += 1
        self._post(session, session.reading.pack())

    def _take_page(self, session: Session, answer: wire.Page) -> None:
        reading = session.reading
        if (reading is None or self.collector is None
                or (answer.id, answer.gpa) != reading):
            raise wire.ProtocolError('an answer to what was not asked')
        session.reading = None
        self.collector.page(session, answer)

    def settle(self, session: Session, request: wire.Request,
               units: list[Unit]) -> None:
        """Answer a request that was parked.

        :param units: what was found, by now.
        """
        if session.closed:
            return
        session.parked -= 1
        try:
            self._verdict(session, request, units)
        except wire.ProtocolError as error:
            self._break(session, str(error))
            return
        self._flush(session)
        self._enqueue(session)

    def alert(self, session: Session, request: wire.Request,
              units: list[Unit]) -> None:
        """Tell of matches for which no request waits.

        :param request: that was the reason to look.
        """
        if not session.closed:
            self._alert(session, request, self._findings(units))

    def _post(self, session: Session, data: bytes) -> None:
        """Send what nobody waits for with other frames."""
        try:
            session.link.post(data)
        except wire.ProtocolError as error:
            self._break(session, str(error))
            return
        self._flush(session)

    def _forget_most(self) -> None:
        """Give up the count of the session that takes most of the memory."""
        largest = max(self._sessions.values(),
                      key=lambda session: len(session.tags or ()))
        self._remembered -= len(largest.tags or ())
        largest.tags = None

    def _flush(self, session: Session) -> None:
        """Send what was posted, or the rest of it."""
        stalled = bool(session.link.unsent)
        try:
            session.link.flush()
        except OSError as error:
            # What was received is scanned all the same: it may match.
            session.link.unsent = b''
            self._end(session, f'sending failed: {error.strerror}')
            if session.closed:
                return
        if stalled or session.link.unsent:
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
        if not session.queued and not session.closed:
            session.queued = True
            if session.budget.left():
                self._queue.append(session)
            else:
                self._spent.append(session)

    def _end(self, session: Session, reason: str,
             refusal: wire.Refusal | None = None) -> None:
        """Receive no more; close when all that came is answered.

        :param refusal: to tell the peer then.
        """
        if session.reason is not None:
            return
        session.reason = reason
        session.refusal = refusal
        self._ending[session] = time.monotonic() + _LISTEN
        session.link.stop()
        if self.collector is not None:
            self.collector.stop(session)
            if session.closed:
                return  # The peer did not let the last verdicts be sent.
        self._watch(session)
        self._enqueue(session)

    def _break(self, session: Session, reason: str) -> None:
        """Close at once, because the peer broke the protocol."""
        session.reason = f'protocol: {reason}'
        self._close(session)

    def _close(self, session: Session) -> None:
        if session.closed:
            return
        if session.refusal is not None:
            with contextlib.suppress(OSError, wire.ProtocolError):
                session.link.post(wire.Refused(
                    session.refusal, str(session.reason)).pack())
                session.link.flush()
        self._matches.close(session.number)
        session.closed = True
        self._ending.pop(session, None)
        del self._sessions[session.link.fd]
        del self._numbers[session.number]
        if session.queued:
            with contextlib.suppress(ValueError):
                self._queue.remove(session)
            with contextlib.suppress(ValueError):
                self._spent.remove(session)
        if session.aside is not None:
            self._aside.remove(session)
        if session is self._recent:
            self._recent = None
        if self.collector is not None:
            self.collector.close(session)
        self._remembered -= len(session.tags or ())
        self._poll.unregister(session.link.fd)
        session.link.close()
        session.budget.sessions -= 1
        session.scope.sessions -= 1
        # But for the first, which may be the one of all instances: to map a
        # table takes long.
        self._scopes = {number: scope
                        for number, scope in self._scopes.items()
                        if scope.sessions or number == 0}
        self._tell('closed', session=session.number, reason=session.reason,
                   counts=session.counts())

    def _obey(self, events: int) -> None:
        """Take what the main process sends, give it what waits."""
        if events & select.EPOLLOUT:
            self._tell_waiting()
        if not events & ~select.EPOLLOUT:
            return
        message, fds = control.receive(self._main)
        kind = message['type']
        if kind == 'session':
            self._open(message, fds)
        elif kind == 'move':
            session = self._numbers.get(message['session'])
            if session is not None:
                while self._receive(session):
                    pass
                self._end(session, 'the rules changed', wire.Refusal.RELOAD)
        elif kind == 'skip':
            self._skip.update(map(bytes.fromhex, message['tags']))
        elif kind == 'suspect':
            self.engine.suspect(message['part'])
        elif kind == 'drain':
            self._drain_until = time.monotonic() + message['seconds']
            for session in list(self._sessions.values()):
                while self._receive(session):
                    pass
                self._end(session, 'worker drained')

    def _open(self, message: control.Message, fds: list[int]) -> None:
        number = message['session']
        left = list(fds)
        try:
            if len(fds) < 1 + bool(message['slots']) + message['table']:
                # The kernel drops what does not fit into the table of files.
                raise OSError(errno.EMFILE, 'no file left')
            scope = self._scopes.get(message['scope'])
            if message['table']:
                table_fd = left.pop()
                if scope is None:
                    scope = Scope(bytes.fromhex(message['key']), table_fd)
                else:
                    os.close(table_fd)
            elif scope is None:
                scope = Scope(bytes.fromhex(message['key']), None)
            transport = self._link(message, left)
        except OSError as error:
            control.close(left)
            self._tell('closed', session=number, counts=None,
                       reason=f'the scan process has {error.strerror}')
            return
        self._scopes[message['scope']] = scope
        scope.sessions += 1
        session = Session(
            number, message['instance'], transport, scope,
            self._budgets.open(message['instance']), message['shared'],
            message['read'])
        self._sessions[transport.fd] = self._numbers[number] = session
        self._poll.register(transport.fd, select.EPOLLIN)

    def _link(self, message: control.Message, fds: list[int]) -> link.Link:
        """:raises OSError: the file descriptors are all still open."""
        connection = socket.socket(fileno=fds[0])
        most = self.settings.max_in_flight
        if not message['slots']:
            return link.SocketLink(connection, most, message['read'])
        try:
            transport = link.RingLink(
                connection, fds[1], message['slots'], most, message['read'])
        except OSError as error:
            connection.detach()
            raise OSError(error.errno, 'no room for the ring') from error
        os.close(fds[1])
        return transport

    def _tell(self, kind: str, most: int | None = None, **content: object
              ) -> bool:
        """Send a message to the main process, now or later.

        :param most: drop the message when so many wait already.
        :returns: False when it was dropped.
        """
        if most is not None and len(self._waiting) >= most:
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


def serve(main: socket.socket, scans: boards.Board, engine: base.Engine,
          settings: Settings, collector: collections.abc.Callable[
              [Scanner], Collector | None]) -> int:
    """Be a scan process.

    :param main: socket to the main process.
    :param scans: its part of the boards.
    :param engine: with the compiled rules.
    :param settings: see there.
    :param collector: makes one.
    :returns: exit status.
    """
    sandbox.enter_scanner(engine.local_socket)
    try:
        scanner = Scanner(main, scans, engine, settings)
        scanner.collector = collector(scanner)
        scanner.run()
    except EOFError:
        return 1
    return 0
