# SPDX-License-Identifier: Apache-2.0
"""What scan processes do, in memory that they share with the main process.

A process that hangs in a rule cannot say so. Its main process reads it here,
and finds here the page that a process died of, and the part of the rules that
was being evaluated. The other scan processes see here which pages are being
scanned, so that none is scanned twice at a time. What is counted is here too:
to ask for it by messages would cost the loop of the scan process.

There is a slot for each scan process. A slot goes on to the process that
takes the place of a lost one, so that its counts only grow.
"""

import collections.abc
import enum
import mmap
import time
import typing

from virtav_nova.monitor import memory
from virtav_nova.monitor import wire

_SLOT_SIZE = mmap.PAGESIZE
# Within a slot, in bytes. When the scan started and for which session:
_SCAN = 0
_PART = 16
_WAITING = 24
# When this part began, on the monotonic clock in ns.
_SINCE = 32
_COUNTERS = 64
_SERVICE = 512
#: Of a histogram.
BUCKETS = 176
_SCANS = _SERVICE + 8 * BUCKETS
#: No part of the rules is being evaluated.
NO_PART = 0xffffffff


class Counter(enum.IntEnum):
    """What scan processes count.

    Times are in ns. UNITS are pages and junctions: each is in the cache of
    the process (CACHED), in the table (TABLED), or scanned; JOINED were being
    scanned by another process. REPEATS are matches that were not told one by
    one, DROPPED ones that could not be told. DEFERRED: a session over its
    budget had to wait. READS and what follows: see
    :mod:`virtav_nova.worker.collect`.
    """

    CLEAN = 0
    MATCH = 1
    UNKNOWN = 2
    SERVICE_NS = 3
    UNITS = 4
    CACHED = 5
    TABLED = 6
    JOINED = 7
    SCANS = 8
    SCAN_NS = 9
    FAULTS = 10
    REPEATS = 11
    DROPPED = 12
    DEFERRED = 13
    FRAGMENTS = 14
    READS = 15
    PARKED = 16
    DEEP_SCANS = 17
    CONFIRMS = 18
    ACCUMULATED = 19
    LATE = 20
    CROWDED = 21
    FORGOTTEN = 22


class Scan(typing.NamedTuple):
    """A scan that is under way.

    :param started: on the monotonic clock, in ns.
    :param session: number of the session.
    :param tag: of the page or junction.
    :param part: of the rules, as the engine numbers them; None if the engine
        did not say.
    :param before: what the scan took before this part, in ns.
    """

    started: int
    session: int
    tag: bytes
    part: int | None
    before: int


def bucket(duration: int) -> int:
    """Find the bucket of a histogram; there are four to a power of two.

    :param duration: in ns.
    """
    if duration < 8:
        return 0
    shift = duration.bit_length() - 3
    found = (shift << 2) + (duration >> shift & 3)
    return found if found < BUCKETS else BUCKETS - 1


def upper(number: int) -> int:
    """:returns: what durations in a bucket are less than, in ns."""
    shift, rest = divmod(number, 4)
    return (5 + rest) << shift if shift else 8


def quantile(histogram: collections.abc.Sequence[int], share: float
             ) -> int | None:
    """Tell what share of the durations is not longer than.

    :param histogram: counts by :func:`bucket`.
    :param share: 0.5 for the median.
    :returns: in ns, at most a quarter too long; None when there is none.
    """
    wanted = sum(histogram) * share
    if not wanted:
        return None
    for number, count in enumerate(histogram):
        wanted -= count
        if wanted <= 0:
            return upper(number)
    return None


class Board:
    """The slot of one scan process.

    :param memory: of all slots.
    :param number: of the slot.
    :param slots: how many there are.
    :ivar counters: by :class:`Counter`.
    :ivar service: histogram of what requests take, from being taken to
        being answered.
    :ivar scans: histogram of what scans take.
    """

    def __init__(self, memory: mmap.mmap, number: int, slots: int) -> None:
        self.number = number
        self._memory = memory
        self._slots = slots
        self._tag = number * wire.TAG_SIZE
        start = _head_size(slots) + number * _SLOT_SIZE
        view = memoryview(memory)

        def words(offset: int, count: int) -> memoryview:
            return view[start + offset:start + offset + 8 * count].cast('Q')

        self._scan = words(_SCAN, 2)
        self._part = view[start + _PART:start + _PART + 4].cast('I')
        self._waiting = words(_WAITING, 1)
        self._since = words(_SINCE, 1)
        self.counters = words(_COUNTERS, len(Counter))
        self.service = words(_SERVICE, BUCKETS)
        self.scans = words(_SCANS, BUCKETS)

    def begin(self, session: int, tag: bytes) -> int:
        """Note that a scan starts.

        :param session: number of the session.
        :param tag: of the page or junction, 16 bytes.
        :returns: when, on the monotonic clock in ns.
        """
        self._part[0] = NO_PART
        self._memory[self._tag:self._tag + wire.TAG_SIZE] = tag
        self._scan[1] = session
        now = time.monotonic_ns()
        self._scan[0] = now
        return now

    def at(self, part: int) -> None:
        """Note which part of the rules is evaluated from now on.

        :param part: as the engine numbers them.
        """
        self._since[0] = time.monotonic_ns()
        self._part[0] = part

    def end(self) -> None:
        """Note that the scan ended, or that its process is no more."""
        self._scan[0] = 0
        self._memory[self._tag:self._tag + wire.TAG_SIZE] = wire.NO_TAG

    def part(self) -> int | None:
        """:returns: the part of the rules that was evaluated last."""
        part = self._part[0]
        return None if part == NO_PART else part

    def before(self, begin: int) -> int:
        """Tell what a scan took before the part that was evaluated last.

        :param begin: of the scan, on the monotonic clock in ns.
        :returns: in ns.
        """
        return self._since[0] - begin

    def wait(self, sessions: int) -> None:
        """Note how many sessions wait for their turn.

        :param sessions: the one that is being served not counted.
        """
        self._waiting[0] = sessions

    def waiting(self) -> int:
        """:returns: how many sessions wait for their turn."""
        return self._waiting[0]

    def elsewhere(self, tag: bytes) -> bool:
        """Tell whether another process is scanning the same.

        :param tag: of the page or junction.
        """
        size = wire.TAG_SIZE
        found = self._memory.find(tag, 0, self._slots * size)
        return found >= 0 and found % size == 0 and found != self._tag

    def scan(self) -> Scan | None:
        """Tell the scan that is under way.

        :returns: None when there is none. All but the start are certain only
            once the process is dead.
        """
        started, session = self._scan
        if not started:
            return None
        return Scan(started, session,
                    self._memory[self._tag:self._tag + wire.TAG_SIZE],
                    self.part(), self.before(started))


class Boards:
    """The slots of all scan processes of a rule set.

    :param fd: of the memory, from :meth:`create`; may be closed afterwards.
    :param slots: number of them.
    """

    def __init__(self, fd: int, slots: int) -> None:
        self._memory = mmap.mmap(fd, _size(slots))
        self._slots = slots

    @classmethod
    def create(cls, slots: int) -> int:
        """Make the memory.

        :param slots: number of them.
        :returns: a file descriptor, close-on-exec.
        :raises OSError: when there is no memory to be had.
        """
        # Of a size that no scan process can change: the main process and
        # the others would die of it.
        return memory.create('virtav-boards', _size(slots), b'')

    def __len__(self) -> int:
        return self._slots

    def board(self, number: int) -> Board:
        """:returns: a slot."""
        return Board(self._memory, number, self._slots)


def totals(boards: collections.abc.Iterable[Board]) -> dict[str, int]:
    """Sum up what was counted.

    :returns: by name of the counter.
    """
    sums = [0] * len(Counter)
    for board in boards:
        for number, count in enumerate(board.counters):
            sums[number] += count
    return {counter.name.lower(): sums[counter] for counter in Counter}


def merged(histograms: collections.abc.Iterable[
        collections.abc.Iterable[int]]) -> list[int]:
    """:returns: the histogram of all."""
    sums = [0] * BUCKETS
    for histogram in histograms:
        for number, count in enumerate(histogram):
            sums[number] += count
    return sums


def _head_size(slots: int) -> int:
    size = slots * wire.TAG_SIZE
    return size + -size % mmap.PAGESIZE


def _size(slots: int) -> int:
    return _head_size(slots) + slots * _SLOT_SIZE
