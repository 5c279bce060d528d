# SPDX-License-Identifier: Apache-2.0
"""Joins accumulation and deep scans to the loop of a scan process."""

import time

from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import accumulate
from virtav_nova.worker import board
from virtav_nova.worker import deep
from virtav_nova.worker import scan

#: Pages with strings of a match that a record names.
_PAGES_MAX = 64
#: Strings of a match that a record names.
_STRINGS_MAX = 32

_COUNTERS = {
    board.Counter.PARKED: 'parked',
    board.Counter.DEEP_SCANS: 'scans',
    board.Counter.ACCUMULATED: 'found',
    board.Counter.LATE: 'late',
    board.Counter.CROWDED: 'crowded',
    board.Counter.CONFIRMS: 'confirms',
}


def make(scanner: scan.Scanner) -> scan.Collector | None:
    """Make what a scan process needs for rules that span pages.

    :returns: None when its engine does not tell, or it is not wanted.
    """
    if (not scanner.engine.accumulates
            or not scanner.settings.accumulate['accumulate']):
        return None
    return Collected(scanner)


class Collected(scan.Collector):
    """The deep scans of all sessions of a scan process.

    :param scanner: the loop.
    """

    def __init__(self, scanner: scan.Scanner) -> None:
        options = scanner.settings.accumulate
        self._scanner = scanner
        self._accumulator = accumulate.Accumulator(
            scanner.engine, accumulate.Limits(
                options['accumulate_pages'], options['accumulate_rules'],
                options['accumulate_spaces'],
                options['accumulate_mib'] << 20))
        self._settings = deep.Settings(
            options['accumulate_wait_ms'] / 1000, options['accumulate_rate'],
            options['accumulate_deep_pages'],
            options['accumulate_fresh_ms'] / 1000)
        self._counts = deep.Counts()
        self._searches: dict[scan.Session, deep.Searches] = {}
        #: Sessions with something to do, and when.
        self._due: dict[scan.Session, float] = {}

    def note(self, session: scan.Session, request: wire.Request,
             units: list[scan.Unit], matched: bool) -> bool:
        """See :meth:`virtav_nova.worker.scan.Collector.note`."""
        searches = self._searches.get(session)
        if searches is None:
            searches = self._searches[session] = deep.Searches(
                self._scanner.engine, self._accumulator, session.number,
                session.reads and session.reason is None, self._settings,
                self._counts, self._scanner.settings.max_in_flight)
        fragments = {
            fragment for unit in units if unit.result
            for fragment in unit.result.fragments}
        # What they hold of the link's buffer does not last, and is not needed
        # of those without a match.
        parts = [unit._replace(data=b'') for unit in units]
        begin = time.monotonic_ns()
        answer = None
        # It is no fault of this page if a rule takes too long over several.
        with self._scanner.guard(session, wire.NO_TAG):
            try:
                found = searches.consider(request, fragments, matched,
                                          begin / 1e9, parts)
            except Exception as error:
                answer = deep.Answer(request, [], True, parts, error)
            else:
                if isinstance(found, list):
                    answer = deep.Answer(request, found, True, parts)
        if answer is not None:
            self._settle(session, answer, begin)
        self._plan(session, searches)
        return answer is not None or found is True

    def page(self, session: scan.Session, answer: wire.Page) -> None:
        """See :meth:`virtav_nova.worker.scan.Collector.page`."""
        searches = self._searches.get(session)
        if searches is not None:
            searches.feed(answer.gpa, answer.content
                          if answer.status == wire.Status.OK else None)
            self._work(session, searches)

    def stop(self, session: scan.Session) -> None:
        """See :meth:`virtav_nova.worker.scan.Collector.stop`."""
        searches = self._searches.get(session)
        if searches is not None:
            with self._scanner.guard(session, wire.NO_TAG):
                begin = time.monotonic_ns()
                searches.give_up(begin / 1e9)
            self._give(session, searches, begin)
            self._due.pop(session, None)

    def close(self, session: scan.Session) -> None:
        """See :meth:`virtav_nova.worker.scan.Collector.close`."""
        self._searches.pop(session, None)
        self._due.pop(session, None)
        self._accumulator.forget(session.number)

    def due(self) -> float | None:
        """See :meth:`virtav_nova.worker.scan.Collector.due`."""
        return min(self._due.values()) if self._due else None

    def keep(self) -> None:
        """See :meth:`virtav_nova.worker.scan.Collector.keep`."""
        now = time.monotonic()
        for session in [session for session, due in self._due.items()
                        if due <= now]:
            if session not in self._due:
                continue
            # A deep scan is paid for like any other.
            if not self._scanner.contended or session.budget.left():
                self._work(session, self._searches[session])

    def _work(self, session: scan.Session, searches: deep.Searches) -> None:
        """Go on with a session's deep scan until it has to read."""
        begin = time.monotonic_ns()
        wanted = None
        if session.reason is None:
            with self._scanner.guard(session, wire.NO_TAG):
                wanted = searches.step(begin / 1e9)
        self._give(session, searches, begin)
        session.budget.spend(time.monotonic_ns() - begin)
        if session.closed:
            return
        if wanted is not None:
            self._scanner.read(session, wanted)
        self._plan(session, searches)

    def _plan(self, session: scan.Session, searches: deep.Searches) -> None:
        """Note when to go on with a session."""
        now = time.monotonic()
        session.wanted = searches.wanted
        due = None if session.closed else searches.due(now)
        if due is None:
            self._due.pop(session, None)
        else:
            self._due[session] = now + due if due else 0.0
        counters = self._scanner.board.counters
        for counter, name in _COUNTERS.items():
            value = getattr(self._counts, name)
            if value:
                counters[counter] += value
                setattr(self._counts, name, 0)
        counters[board.Counter.FORGOTTEN] += self._accumulator.dropped
        self._accumulator.dropped = 0

    def _give(self, session: scan.Session, searches: deep.Searches,
              begin: int) -> None:
        """Answer what is decided.

        :param begin: of the work that decided it.
        """
        for answer in searches.answers():
            self._settle(session, answer, begin)

    def _settle(self, session: scan.Session, answer: deep.Answer, begin: int
                ) -> None:
        # A request that was answered had its matches told.
        units = list(answer.context) if answer.parked else []
        if answer.error is not None:
            self._scanner.fault(session, answer.error, begin)
            units.append(scan.Unit(
                'accumulated', answer.request.gva, answer.request.page, None))
        units += map(_unit, answer.found)
        if answer.parked:
            self._scanner.settle(session, answer.request, units)
        elif answer.found:
            self._scanner.alert(session, answer.request, units)


def _unit(found: deep.Found) -> scan.Unit:
    """:returns: a match over several pages as a part of a request."""
    strings: dict[deep.Place, list[str]] = {}
    for place, (identifier, _offset) in zip(
            found.places[:_STRINGS_MAX], found.match.strings, strict=False):
        strings.setdefault(place, []).append(identifier)
    pages: list[record.Record] = [
        {'gva': place.gva, 'gpa': place.gpa, 'strings': identifiers}
        for place, identifiers in strings.items()]
    return scan.Unit(
        'accumulated', found.start, found.data,
        base.Examined([found.match], ()), pages[:_PAGES_MAX])
