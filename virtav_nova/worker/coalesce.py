# SPDX-License-Identifier: Apache-2.0
"""The same match on page after page, told as one."""

import collections.abc
import time
import typing

from virtav_nova.alerts import record

#: Records of one kind that are told each by itself.
_FULL = 16
#: Seconds from one record to the next after that.
_PERIOD = 1.0
#: Kinds that are remembered.
_KINDS = 4096

#: Instance, namespace of the rule, rule, form.
Kind: typing.TypeAlias = tuple[str, str, str, str]


class _Tally:
    """What came of one kind.

    :ivar told: records that were told in full.
    :ivar next: when the next one is told, on the monotonic clock.
    :ivar waiting: session and record of the last one that was not told.
    :ivar repeats: how many were not told before that.
    """

    __slots__ = ('next', 'repeats', 'told', 'waiting')

    def __init__(self) -> None:
        self.told = 0
        self.next = 0.0
        self.waiting: tuple[int, record.Record] | None = None
        self.repeats = 0


class Coalescer:
    """Lets the first records of a kind through, then one a second.

    :param tell: called with the number of a session and a record. Its
        ``repeats`` tells how many more there were since the last one.
    """

    def __init__(self, tell: collections.abc.Callable[
            [int, record.Record], None]) -> None:
        self._tell = tell
        self._tallies: dict[Kind, _Tally] = {}
        #: Those with a record that waits.
        self._waiting: dict[Kind, None] = {}

    def add(self, kind: Kind, session: int, known: record.Record) -> bool:
        """Tell a record, now or later.

        :param kind: that it is of.
        :param session: number of the session.
        :param known: the record.
        :returns: whether it was told at once.
        """
        tally = self._tallies.get(kind)
        if tally is None:
            if len(self._tallies) >= _KINDS:
                self._forget()
            tally = self._tallies[kind] = _Tally()
        if tally.told < _FULL:
            tally.told += 1
            self._tell(session, known | {'repeats': 0})
            return True
        now = time.monotonic()
        if tally.waiting is not None:
            tally.repeats += 1
        tally.waiting = session, known
        if now >= tally.next:
            self._flush(kind, tally, now)
            return True
        self._waiting[kind] = None
        return False

    def due(self) -> float | None:
        """Tell when to call :meth:`keep`.

        :returns: on the monotonic clock in seconds; None while nothing
            waits.
        """
        # They are in the order in which they began to wait, and wait for
        # no more than the period: near enough.
        for kind in self._waiting:
            return self._tallies[kind].next
        return None

    def keep(self) -> None:
        """Tell what is due."""
        now = time.monotonic()
        for kind in list(self._waiting):
            tally = self._tallies[kind]
            if now >= tally.next:
                self._flush(kind, tally, now)

    def close(self, session: int) -> None:
        """Tell what waits of a session.

        :param session: its number.
        """
        now = time.monotonic()
        for kind in list(self._waiting):
            tally = self._tallies[kind]
            if tally.waiting and tally.waiting[0] == session:
                self._flush(kind, tally, now)

    def _flush(self, kind: Kind, tally: _Tally, now: float) -> None:
        if tally.waiting is None:
            return
        session, known = tally.waiting
        self._tell(session, known | {'repeats': tally.repeats})
        tally.waiting = None
        tally.repeats = 0
        tally.next = now + _PERIOD
        self._waiting.pop(kind, None)

    def _forget(self) -> None:
        """Forget the kind that came up first."""
        kind = next(iter(self._tallies))
        self._flush(kind, self._tallies[kind], time.monotonic())
        del self._tallies[kind]
