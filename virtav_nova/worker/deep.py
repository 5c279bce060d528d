# SPDX-License-Identifier: Apache-2.0
"""The deep scan: looks for a rule in the memory of one address space.

What :mod:`virtav_nova.worker.accumulate` remembers is only a reason to look.
A deep scan reads through the guest's page tables what is mapped now at the
addresses of the remembered pages, then what lies round them, and evaluates
the rules over all of it, in the order of the addresses. So what a process
left behind whose CR3 another one has now does not count: it is not mapped.

It is a generator that yields the guest physical address of a page to be read
and is sent the bytes, or None when there is no RAM; or yields None where it
has worked for a while and others should have their turn.
"""

import bisect
import collections.abc
import time
import typing

from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import accumulate
from virtav_nova.worker import paging

#: Bytes put between pages that are not neighbours, so that no string is
#: found that begins in one and ends in the other: as many as a string may
#: have that goes across a real boundary.
GAP = bytes(wire.EDGE_SIZE)

#: Tables read at most, for each of the formats that may be in force.
_TABLES_MAX = 256
#: How far from a fragment other pages are looked for, in bytes.
_REACH = 1 << 21
#: Mapped pages listed to choose the nearest from.
_LISTED_MAX = 4096
#: Rules evaluated over the whole, those with most strings first.
_CONFIRM_MAX = 64
#: Pages looked through before others have their turn.
_TURN = 16
#: Pages of other address spaces that are looked for in this one.
_OTHERS_MAX = 64
_ADDRESS_MAX = (1 << 64) - 1
#: Seconds without new evidence after which a session counts as quiet.
_QUIET = 0.05
#: Seconds that a deep scan may take that no fetch waits for.
_PATIENCE = 5.0
#: Address spaces of a session that may wait for a deep scan.
_PENDING_MAX = 64
#: Seconds for which all fetches are looked at for those of a process in
#: whose memory a rule was found.
_WANTED = 30.0


class Place(typing.NamedTuple):
    """A page that a match lies on.

    :param gva: guest virtual address.
    :param gpa: guest physical address; None when it is not known.
    """

    gva: int
    gpa: int | None


class Found(typing.NamedTuple):
    """A rule that holds over several pages.

    :param rule: in the engine's numbering.
    :param match: offsets of its strings are those within their pages.
    :param places: the page of each of its strings, in the same order.
    :param start: of the page with the string that is nearest to the begin
        of its page.
    :param data: what is there.
    """

    rule: int
    match: base.Match
    places: list[Place]
    start: int
    data: bytes


class Outcome:
    """What a deep scan came to.

    :ivar found: rules that hold.
    :ivar mode: format of the page tables, if one fits.
    :ivar gone: remembered pages of this address space that are no more.
    :ivar pages: read, beside tables.
    :ivar confirms: rules evaluated.
    :ivar cut: there was more than could be looked at.
    """

    __slots__ = ('confirms', 'cut', 'found', 'gone', 'mode', 'pages')

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.mode: paging.Mode | None = None
        self.gone: list[accumulate.Page] = []
        self.pages = 0
        self.confirms = 0
        self.cut = False


Steps: typing.TypeAlias = collections.abc.Generator[
    int | None, bytes | memoryview | None, Outcome]


class Image:
    """Parts of an address space, one after the other."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[bytes, int | None]] = {}
        self._starts: list[tuple[int, int]] = []

    def __contains__(self, gva: int) -> bool:
        return gva in self._parts

    def add(self, gva: int, content: bytes, gpa: int | None = None) -> None:
        """Add a part.

        :param gva: where it begins; nothing may overlap.
        :param gpa: the same, physical.
        """
        self._parts[gva] = content, gpa

    def part(self, gva: int) -> bytes:
        """:returns: the part that begins there, empty if there is none."""
        return self._parts.get(gva, (b'', None))[0]

    def data(self) -> bytes:
        """Put the parts together, in the order of their addresses."""
        pieces: list[bytes] = []
        self._starts = []
        length = 0
        end = None
        for gva in sorted(self._parts):
            content = self._parts[gva][0]
            if end is not None and end != gva:
                pieces.append(GAP)
                length += len(GAP)
            self._starts.append((length, gva))
            pieces.append(content)
            length += len(content)
            end = gva + len(content)
        return b''.join(pieces)

    def found(self, rule: int, match: base.Match) -> Found:
        """Tell offsets in :meth:`data` as places in the address space."""
        strings = []
        places = []
        for identifier, offset in match.strings:
            index = bisect.bisect_right(self._starts, (offset, _ADDRESS_MAX))
            start, gva = self._starts[index - 1]
            gpa = self._parts[gva][1]
            at = gva + offset - start
            page = at & -wire.PAGE_SIZE
            strings.append((identifier, at - page))
            places.append(Place(
                page, None if gpa is None else gpa + page - gva))
        start, data = 0, b''
        if strings:
            _, first = min(zip(
                (offset for _, offset in strings), match.strings,
                strict=True))
            _, start = self._starts[bisect.bisect_right(
                self._starts, (first[1], _ADDRESS_MAX)) - 1]
            data = self._parts[start][0]
        return Found(rule, match._replace(strings=strings), places, start,
                     data)


def _edges(image: Image, page: accumulate.Page) -> None:
    """Add what is known of the neighbours of a page, unless they are there.

    :param image: with all whole pages.
    """
    size = wire.EDGE_SIZE
    before, after = page.window[:size], page.window[-size:]
    if any(before) and page.gva - wire.PAGE_SIZE not in image:
        image.add(page.gva - size, before)
    if any(after) and page.gva + wire.PAGE_SIZE not in image:
        image.add(page.gva + wire.PAGE_SIZE, after)


def confirm_copies(engine: base.Engine, accumulator: accumulate.Accumulator,
                   page: accumulate.Page,
                   rules: collections.abc.Iterable[int], since: float
                   ) -> list[Found]:
    """Evaluate rules over what is remembered of an address space.

    For want of anything better: nothing tells whether the pages are still
    there.

    :param page: the one that was fetched now.
    :param since: what was not seen after that does not count.
    :returns: the rules that hold.
    """
    found: list[Found] = []
    for rule in rules:
        pages = [other for other in accumulator.pages(page.space, rule, True)
                 if other.seen >= since]
        if page not in pages:
            pages.append(page)
        if not engine.complete(rule, accumulator.strings(pages, rule)):
            continue
        image = Image()
        for other in pages:
            image.add(other.gva, other.content, _known(other.gpa))
        for other in pages:
            _edges(image, other)
        match = engine.confirm(rule, image.data())
        if match is not None:
            found.append(image.found(rule, match))
    return found


class Search:
    """A deep scan of one address space.

    :param engine: with the rules.
    :param accumulator: with what is remembered.
    :param page: the one that was fetched and is the reason.
    :param cr3: of that fetch.
    :param rules: to look for first.
    :param skip: rules not to look for.
    :param held: the fetch still waits, so the page is what it was.
    :param likely: format of the page tables, as far as it is known.
    :param pages: most pages to be read beside those remembered.
    :param seconds: longest time it may take.
    """

    def __init__(self, engine: base.Engine,
                 accumulator: accumulate.Accumulator,
                 page: accumulate.Page, cr3: int,
                 rules: collections.abc.Sequence[int],
                 skip: collections.abc.Set[int], held: bool,
                 likely: paging.Mode | None, pages: int, seconds: float
                 ) -> None:
        self._engine = engine
        self._accumulator = accumulator
        self._page = page
        self._cr3 = cr3
        self._rules = list(rules)
        self._skip = skip
        self._held = held
        self._likely = likely
        self._pages_max = pages
        self._until = time.monotonic() + seconds
        self._image = Image()
        #: Addresses of remembered pages that were looked at.
        self._seen: set[int] = set()
        #: Strings by rule that are in the address space for certain.
        self._strings: dict[int, set[int]] = {}
        self.outcome = Outcome()

    def steps(self) -> Steps:
        """Do it.

        :raises Exception: whatever the engine raises.
        """
        outcome = self.outcome
        try:
            tables = yield from self._tables()
            if tables is None:
                return outcome
            outcome.mode = tables.mode
            if self._held:
                page = self._page
                self._image.add(page.gva, page.content, _known(page.gpa))
                self._note(page.fragments)
            if self._rules:
                yield from self._verify(tables, self._remembered())
                yield from self._evaluate(self._rules)
            if not outcome.found:
                yield from self._verify(tables, {
                    page.gva: [page]
                    for page in self._page.space.pages.values()})
                yield from self._widen(tables)
                yield from self._evaluate(self._candidates())
        except paging.ExhaustedError:
            outcome.cut = True
        return outcome

    def _late(self) -> bool:
        if time.monotonic() < self._until:
            return False
        self.outcome.cut = True
        return True

    def _tables(self) -> collections.abc.Generator[
            int | None, bytes | memoryview | None, paging.Tables | None]:
        """Find out the format of the tables by the page of the fetch."""
        page = self._page
        if page.gpa != wire.UNKNOWN_GPA:
            tables = yield from paging.find_mode(
                self._cr3, page.gva, page.gpa, _TABLES_MAX, self._likely)
            if tables is not None:
                return tables
        # It is mapped elsewhere by now, or not at all; other pages may be.
        # Other than a program the kernel may have left this CR3 alone.
        if self._likely is None or page.space.root is None:
            return None
        return paging.Tables(self._likely, self._cr3, _TABLES_MAX)

    def _remembered(self) -> dict[int, list[accumulate.Page]]:
        """List the pages with fragments of the rules, by address.

        :returns: first those of this address space, then those of others,
            which may be a part of this one, too.
        """
        space = self._page.space
        wanted: dict[int, list[accumulate.Page]] = {}
        for own in (True, False):
            most = len(wanted) + _OTHERS_MAX
            for rule in self._rules:
                for page in self._accumulator.pages(space, rule, own):
                    pages = wanted.setdefault(page.gva, [])
                    if page not in pages:
                        pages.append(page)
                    if len(wanted) >= most:
                        break
        return wanted

    def _verify(self, tables: paging.Tables,
                wanted: dict[int, list[accumulate.Page]]
                ) -> collections.abc.Generator[
                    int | None, bytes | memoryview | None, None]:
        """Read what is at the addresses of remembered pages now.

        :param wanted: those that are remembered, by address.
        """
        space = self._page.space
        for gva, pages in wanted.items():
            if gva in self._seen or gva in self._image:
                continue
            if self._late():
                return
            self._seen.add(gva)
            leaf = yield from tables.translate(gva)
            content = None if leaf is None else (yield from self._read(leaf))
            same = [page for page in pages if page.content == content]
            own = [page for page in pages if page.space is space]
            self.outcome.gone += [page for page in own if page not in same]
            if leaf is None or content is None or not (same or own):
                continue
            self._image.add(gva, content, leaf.gpa)
            if same:
                self._note(same[0].fragments)
            else:
                self._look(gva)

    def _widen(self, tables: paging.Tables) -> collections.abc.Generator[
            int | None, bytes | memoryview | None, None]:
        """Read what lies round the pages with fragments, nearest first."""
        centres = sorted({
            gva for page in self._page.space.pages.values()
            if (gva := page.gva) in self._image} | (
                {self._page.gva} if self._held else set()))
        leaves: dict[int, paging.Leaf] = {}
        for first, last in _ranges(centres, tables.mode):
            if self._late():
                break
            try:
                listed = yield from tables.mapped(
                    first, last, _LISTED_MAX - len(leaves))
            except paging.ExhaustedError:
                self.outcome.cut = True
                break
            kernel = self._page.space.root is None
            leaves |= {leaf.gva: leaf for leaf in listed
                       if leaf.user or kernel
                       or tables.mode is paging.Mode.FLAT}
        near = sorted((leaf for leaf in leaves.values()
                       if leaf.gva not in self._image),
                      key=lambda leaf: _distance(centres, leaf.gva))
        if len(near) > self._pages_max:
            self.outcome.cut = True
        added = []
        for leaf in near[:self._pages_max]:
            if self._late():
                break
            content = yield from self._read(leaf)
            if content is not None and any(content):
                self._image.add(leaf.gva, content, leaf.gpa)
                added.append(leaf.gva)
        for number, gva in enumerate(added):
            if self._late():
                break
            self._look(gva)
            if number % _TURN == _TURN - 1:
                yield None

    def _read(self, leaf: paging.Leaf) -> collections.abc.Generator[
            int | None, bytes | memoryview | None, bytes | None]:
        self.outcome.pages += 1
        found = yield leaf.gpa
        return None if found is None else bytes(found)

    def _look(self, gva: int) -> None:
        """Look for fragments in a page that was read."""
        image = self._image
        # With the begin of the next, for strings across the boundary.
        content = (image.part(gva)
                   + image.part(gva + wire.PAGE_SIZE)[:wire.EDGE_SIZE])
        before = image.part(gva - wire.PAGE_SIZE)
        if before:
            content = before[-wire.EDGE_SIZE:] + content
        for rule, string in self._engine.examine(content).fragments:
            self._strings.setdefault(rule, set()).add(string)

    def _note(self, fragments: dict[int, frozenset[int]]) -> None:
        for rule, strings in fragments.items():
            self._strings.setdefault(rule, set()).update(strings)

    def _candidates(self) -> list[int]:
        """:returns: rules of which something was executed."""
        rules = {*self._rules, *self._page.space.rules} - self._skip
        return sorted(rules, key=lambda rule: (
            rule not in self._rules, -len(self._strings.get(rule, ())), rule))

    def _evaluate(self, rules: collections.abc.Iterable[int]
                  ) -> collections.abc.Generator[
                      int | None, bytes | memoryview | None, None]:
        """Evaluate the rules that may hold over all that was read."""
        data = None
        left = _CONFIRM_MAX
        for rule in rules:
            if not self._engine.complete(
                    rule, frozenset(self._strings.get(rule, ()))):
                continue
            if not left or self._late():
                self.outcome.cut = True
                return
            left -= 1
            if data is None:
                data = self._image.data()
            self.outcome.confirms += 1
            match = self._engine.confirm(rule, data)
            if match is not None:
                self.outcome.found.append(self._image.found(rule, match))
            yield None


def _known(gpa: int) -> int | None:
    return None if gpa == wire.UNKNOWN_GPA else gpa


def _distance(centres: list[int], gva: int) -> int:
    """:returns: bytes to the nearest of sorted addresses."""
    index = bisect.bisect(centres, gva)
    return min(abs(gva - centre)
               for centre in centres[max(index - 1, 0):index + 1])


def _ranges(centres: list[int], mode: paging.Mode
            ) -> list[tuple[int, int]]:
    """Find what is near to addresses.

    :param centres: sorted.
    :returns: first and last address of ranges that do not overlap.
    """
    ranges: list[tuple[int, int]] = []
    for centre in centres:
        lowest, highest = mode.half(centre)
        first = max(centre - _REACH, lowest)
        last = min(centre + _REACH, highest)
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], last
        else:
            ranges.append((first, last))
    return ranges


class Settings(typing.NamedTuple):
    """How deep scans are done; see the options ``accumulate_*``.

    :param wait: longest time that a fetch waits for one, in seconds.
    :param rate: deep scans of a session in a second, for fetches that wait
        because of what other address spaces have, and for fetches that do
        not wait, each.
    :param pages: most pages to be read beside those remembered.
    :param fresh: how long a copy counts where nothing can be read, in
        seconds.
    """

    wait: float = 0.2
    rate: float = 10
    pages: int = 256
    fresh: float = 2


class Counts:
    """What came of deep scans, since the process started.

    :ivar scans: begun.
    :ivar parked: fetches that waited for one.
    :ivar confirms: rules evaluated over several pages.
    :ivar found: rules that were found.
    :ivar cut: ended by a bound.
    :ivar late: fetches that waited too long, and were answered from copies.
    :ivar crowded: fetches that did not wait as there were too many deep
        scans, and were answered from copies.
    :ivar pages: read.
    """

    __slots__ = ('confirms', 'crowded', 'cut', 'found', 'late', 'pages',
                 'parked', 'scans')

    def __init__(self) -> None:
        self.scans = 0
        self.parked = 0
        self.confirms = 0
        self.found = 0
        self.cut = 0
        self.late = 0
        self.crowded = 0
        self.pages = 0


class Answer(typing.NamedTuple):
    """A request that was parked can be answered, or a rule was found late.

    :param request: good for as long as it is wanted.
    :param found: rules that hold.
    :param parked: its verdict is still to be given.
    :param context: as it was given with the request.
    :param error: that kept the deep scan from its end, or None.
    """

    request: wire.Request
    found: list[Found]
    parked: bool
    context: collections.abc.Iterable[typing.Any]
    error: Exception | None = None


class _Job:
    """A deep scan of a session that is under way, or about to be.

    :ivar until: when the request has to be answered at the latest.
    :ivar parked: the request still waits.
    :ivar steps: None until it is begun.
    :ivar answer: what the last READ brought.
    """

    __slots__ = ('answer', 'context', 'page', 'parked', 'request', 'rules',
                 'search', 'steps', 'until')

    def __init__(self, request: wire.Request,
                 context: collections.abc.Iterable[typing.Any],
                 page: accumulate.Page, rules: list[int], until: float,
                 parked: bool) -> None:
        self.request = request
        self.context = context
        self.page = page
        self.rules = rules
        self.until = until
        self.parked = parked
        self.search: Search | None = None
        self.steps: Steps | None = None
        self.answer: bytes | memoryview | None = None

    def answered(self, found: list[Found], parked: bool,
                 error: Exception | None = None) -> Answer:
        """:returns: the answer to its request."""
        request = self.request
        if not parked:
            # Whatever it was, it does not wait any more.
            request = request._replace(flags=request.flags & ~wire.HOLD)
        return Answer(request, found, parked, self.context, error)


class Searches:
    """The deep scans of one session: one at a time, one READ at a time.

    A fetch that may complete a rule is *parked*: its verdict waits for the
    deep scan. Where less was found, a deep scan follows once the session is
    quiet: strings may lie in pages that are never fetched.

    :param engine: with the rules.
    :param accumulator: of the scan process.
    :param session: number of the session.
    :param reads: QEMU answers READ.
    :param settings: how to do it.
    :param counts: of the scan process.
    :param parked_max: fetches that may wait.
    :ivar wanted: :meth:`consider` has to see each fetch.
    """

    def __init__(self, engine: base.Engine,
                 accumulator: accumulate.Accumulator, session: int,
                 reads: bool, settings: Settings, counts: Counts,
                 parked_max: int) -> None:
        self._engine = engine
        self._accumulator = accumulator
        self._session = session
        self._reads = reads
        self._settings = settings
        self._counts = counts
        self._parked_max = parked_max
        self._mode: paging.Mode | None = None
        self._parked: collections.deque[_Job] = collections.deque()
        #: Address spaces with evidence that nobody looked at.
        self._pending: dict[accumulate.Space, _Job] = {}
        self._quiet: _Job | None = None
        #: Whose READ is unanswered, and its address.
        self._reading: _Job | None = None
        self._wanted = 0
        self._answers: list[Answer] = []
        #: Deep scans that may be begun because of other address spaces.
        self._tokens = settings.rate
        self._filled = 0.0
        self._next_quiet = 0.0
        self._last = 0.0
        #: Until when a fetch may be one of a process that was found bad.
        self._wanted_until = 0.0
        self.wanted = False

    @property
    def parked(self) -> int:
        """Requests whose verdict is still to come."""
        return len(self._parked) + sum(
            answer.parked for answer in self._answers)

    def consider(self, request: wire.Request,
                 fragments: collections.abc.Collection[base.Fragment],
                 matched: bool, now: float,
                 context: collections.abc.Iterable[typing.Any] = ()
                 ) -> list[Found] | bool:
        """Decide what a fetch means for its address space.

        :param fragments: on its page and its junctions; may be none.
        :param matched: its verdict is certain already.
        :param now: on the monotonic clock, in seconds.
        :param context: of the request, to be given back with an answer.
        :returns: rules that hold; or whether the request is parked, so
            that its verdict comes as an :class:`Answer`.
        :raises Exception: whatever the engine raises.
        """
        if fragments:
            page, rules = self._accumulator.add(
                self._session, request, fragments, now)
            if not page.fragments:
                return False
        elif self.wanted:
            if now > self._wanted_until:
                self.wanted = False
                return False
            space = self._accumulator.space(self._session, request)
            if space is None or not space.found:
                return False
            page = accumulate.Page(
                space, request.gva & -wire.PAGE_SIZE, request.gpa,
                request.tag, bytes(request.window), now, {})
            rules = []
        else:
            return False
        space = page.space
        rules += sorted(space.found.difference(rules))
        request = request._replace(window=page.window)
        if space.fresh and self._reads:
            self._pending[space] = _Job(
                request, context, page, [], 0, False)
            self._last = now
            if len(self._pending) > _PENDING_MAX:
                # A guest makes address spaces faster than they are looked at.
                del self._pending[next(iter(self._pending))]
                self._accumulator.dropped += 1
        if matched or not rules:
            return False
        self._accumulator.tried(space, rules)
        own = self._accumulator.complete(page, rules)
        if self._reads and self._token(own, now):
            self._counts.parked += 1
            self._parked.append(_Job(
                request, context, page, rules, now + self._settings.wait,
                True))
            return True
        if self._reads:
            self._counts.crowded += 1
        return self._copies(page, rules, now) or False

    def _token(self, own: bool, now: float) -> bool:
        """Tell whether one more fetch may wait.

        :param own: its own address space has all that it takes.
        """
        if len(self._parked) >= self._parked_max:
            return False
        # Nothing else tells such a rule from the rests of a process that is
        # gone. It is the guest's own time that is spent.
        if own:
            return True
        rate = self._settings.rate
        self._tokens = min(rate, self._tokens + (now - self._filled) * rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _copies(self, page: accumulate.Page, rules: list[int], now: float
                ) -> list[Found]:
        found = confirm_copies(self._engine, self._accumulator, page, rules,
                               now - self._settings.fresh)
        self._counts.found += len(found)
        return found

    def step(self, now: float) -> int | None:
        """Work for a moment.

        :param now: on the monotonic clock, in seconds.
        :returns: guest physical address of a page that is to be read now
            and given to :meth:`feed`; None when there is none.
        """
        self._expire(now)
        if self._reading is not None:
            return None
        job = self._next(now)
        if job is None:
            return None
        try:
            wanted = self._advance(job)
        except StopIteration:
            self._finish(job, now)
            return None
        except Exception as error:
            self._remove(job)
            self._answers.append(job.answered([], job.parked, error))
            return None
        if wanted is not None:
            self._reading = job
            self._wanted = wanted
        return wanted

    def feed(self, gpa: int, content: bytes | memoryview | None) -> bool:
        """Take the answer to a READ.

        :param content: of the page; None when there is no RAM.
        :returns: False when this page was not asked for.
        """
        job = self._reading
        if job is None or gpa != self._wanted:
            return False
        self._reading = None
        job.answer = None if content is None else bytes(content)
        return True

    def answers(self) -> list[Answer]:
        """Take what is decided by now."""
        answers, self._answers = self._answers, []
        return answers

    def due(self, now: float) -> float | None:
        """Tell when :meth:`step` has something to do.

        :returns: in how many seconds; None: when something else happens.
        """
        if self._answers:
            return 0
        times = [job.until for job in self._parked]
        if self._reading is None:
            if self._parked or self._quiet is not None:
                return 0
            if self._pending:
                times.append(max(self._next_quiet, self._last + _QUIET))
        return max(min(times) - now, 0) if times else None

    def give_up(self, now: float) -> None:
        """Decide about all that is parked, as nothing can be read now.

        What is considered after that does not wait.
        """
        self._reads = False
        while self._parked:
            self._answer_late(self._parked.popleft(), now)
        self._pending.clear()
        self._quiet = None

    def _next(self, now: float) -> _Job | None:
        """:returns: the deep scan to go on with."""
        if self._parked:
            return self._parked[0]
        if (self._quiet is None and self._pending
                and now >= max(self._next_quiet, self._last + _QUIET)):
            space = next(iter(self._pending))
            self._quiet = self._pending.pop(space)
            self._next_quiet = now + 1 / self._settings.rate
        return self._quiet

    def _advance(self, job: _Job) -> int | None:
        """Go on with a deep scan until it has to read or did enough.

        :returns: the address to be read, None when there is none.
        :raises StopIteration: at its end.
        """
        if job.steps is None:
            space = job.page.space
            space.fresh = False
            self._pending.pop(space, None)
            self._counts.scans += 1
            job.search = Search(
                self._engine, self._accumulator, job.page, job.request.cr3,
                job.rules, set() if job.parked else self._accumulator.told(
                    space), job.parked, self._mode, self._settings.pages,
                max(_PATIENCE, self._settings.wait))
            job.steps = job.search.steps()
        answer, job.answer = job.answer, None
        return job.steps.send(answer)

    def _finish(self, job: _Job, now: float) -> None:
        """Take what a deep scan came to."""
        self._remove(job)
        if job.search is None:
            return
        outcome = job.search.outcome
        space = job.page.space
        self._mode = outcome.mode or self._mode
        self._counts.pages += outcome.pages
        self._counts.cut += outcome.cut
        self._counts.confirms += outcome.confirms
        for page in outcome.gone:
            self._accumulator.drop(page)
        found = outcome.found
        if job.parked and outcome.mode is None:
            # Nothing can be read through tables of an unknown format.
            self._answers.append(job.answered(
                self._copies(job.page, job.rules, now), True))
            return
        self._counts.found += len(found)
        for each in found:
            self._accumulator.tell(space, each.rule)
        if job.parked:
            space.found.difference_update(job.rules)
            self._answers.append(job.answered(found, True))
        elif found:
            # What it did is done. It is not to go on: its next fetch waits
            # for a look whether it is still there.
            if space.root is not None:
                space.found.update(each.rule for each in found)
                self.wanted = True
                self._wanted_until = now + _WANTED
            self._answers.append(job.answered(found, False))

    def _expire(self, now: float) -> None:
        """Answer those that have waited too long."""
        while self._parked and self._parked[0].until <= now:
            job = self._parked.popleft()
            self._answer_late(job, now)
            if job.steps is not None and self._quiet is None:
                self._quiet = job

    def _answer_late(self, job: _Job, now: float) -> None:
        self._counts.late += 1
        job.parked = False
        try:
            found = self._copies(job.page, job.rules, now)
        except Exception as error:
            self._answers.append(job.answered([], True, error))
        else:
            self._answers.append(job.answered(found, True))

    def _remove(self, job: _Job) -> None:
        if job.parked:
            self._parked.remove(job)
        if self._quiet is job:
            self._quiet = None
