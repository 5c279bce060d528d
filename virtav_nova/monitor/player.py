# SPDX-License-Identifier: Apache-2.0
"""Plays a recording to a running worker, as one guest or as many at once."""

import array
import collections
import collections.abc
import select
import time
import typing

from virtav_nova.monitor import client
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire

#: Requests kept ready for the guests that are still to ask the same.
_READY_MAX = 16384
#: Matches that are told one by one.
_MATCHES_MAX = 10000
#: How long the worker may be away, in seconds.
_AWAY = 10.0
_PAUSE = 0.05

Connect: typing.TypeAlias = collections.abc.Callable[[int], client.Client]


class Found(typing.NamedTuple):
    """A match.

    :param guest: number of the guest.
    :param fetch: its place in the recording.
    :param rule: as the verdict names it.
    """

    guest: int
    fetch: int
    rule: str


class Outcome:
    """What came of it.

    :ivar asked: requests that were answered.
    :ivar hits: fetches that the verdict table answered.
    :ivar results: answers by :class:`wire.Result`.
    :ivar rules: matches by rule.
    :ivar matches: the first of them.
    :ivar moved: sessions that had to connect again.
    :ivar latencies: of the answers, in seconds.
    :ivar seconds: that all of it took.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.hits = 0
        self.results: collections.Counter[wire.Result] = (
            collections.Counter())
        self.rules: collections.Counter[str] = collections.Counter()
        self.matches: list[Found] = []
        self.moved = 0
        self.latencies = array.array('f')
        self.seconds = 0.0

    def quantile(self, share: float) -> float:
        """Tell how long answers took.

        :param share: of the answers that took no longer.
        :returns: seconds, 0 when there was no answer.
        """
        if not self.latencies:
            return 0.0
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Player:
    """Plays a recording.

    :param played: the recording.
    :param connect: makes the session of a guest, by the guest's number.
    :param guests: how many there are at once.
    :param depth: most pages that a guest asks for at a time; each vCPU
        waits for one.
    :param recorded_speed: ask at the times of the recording, not at once.
    :param table: look into the verdict table before asking, as QEMU does.
    """

    def __init__(self, played: recording.Recording, connect: Connect,
                 guests: int = 1, depth: int = 1,
                 recorded_speed: bool = False, table: bool = True) -> None:
        self.played = played
        self.connect = connect
        self.depth = depth
        self.recorded_speed = recorded_speed
        self.table = table
        self.outcome = Outcome()
        self.began = 0.0
        self._guests = guests
        # Packed requests. Sessions of one rule set have one key.
        self._key = b''
        self._ready: dict[int, tuple[bytes, tuple[bytes, ...]]] = {}

    def play(self) -> Outcome:
        """Play all of it.

        :raises ClientError: when the worker does not serve.
        """
        poll = select.epoll()
        guests: dict[int, _Guest] = {}
        try:
            for number in range(self._guests):
                guest = _Guest(number, self)
                guests[guest.session.fd] = guest
                poll.register(guest.session.fd, select.EPOLLIN)
            self.began = time.monotonic()
            while guests:
                due = self._turn(poll, guests)
                for fd, _events in poll.poll(due):
                    if fd in guests:
                        guests[fd].take()
            self.outcome.seconds = time.monotonic() - self.began
        finally:
            for guest in guests.values():
                guest.session.close()
            poll.close()
        return self.outcome

    def request(self, place: int, session: client.Client
                ) -> tuple[bytes, tuple[bytes, ...]]:
        """Make a request.

        :param place: of the fetch in the recording.
        :param session: it is for.
        :returns: the frame, and all tags in it.
        """
        if session.welcome.key != self._key:
            self._key = session.welcome.key
            self._ready = {}
        ready = self._ready.get(place)
        if ready is None:
            request = self.played[place].request(place, session.tagger)
            ready = request.pack(), tuple(
                tag for tag in (request.tag, request.before_tag,
                                request.after_tag) if tag != wire.NO_TAG)
            if len(self._ready) < _READY_MAX:
                self._ready[place] = ready
        return ready

    def _turn(self, poll: select.epoll, guests: 'dict[int, _Guest]'
              ) -> float:
        """Have every guest ask for what it may.

        :returns: seconds until one of them has more to ask for.
        """
        due = 1.0
        for fd, guest in list(guests.items()):
            due = min(due, guest.ask())
            if guest.moved:
                # The number may be the same, but not the connection.
                guest.moved = False
                del guests[fd]
                guests[guest.session.fd] = guest
                poll.register(guest.session.fd, select.EPOLLIN)
            if guest.done:
                poll.unregister(guest.session.fd)
                del guests[guest.session.fd]
                guest.session.close()
        return due


class _Guest:
    """One guest.

    :param number: of the guest.
    :param player: whose it is.
    :ivar moved: its session is another one.
    """

    def __init__(self, number: int, player: Player) -> None:
        self.moved = False
        self._number = number
        self._player = player
        self._outcome = player.outcome
        self._next = 0
        self._waiting: dict[int, float] = {}
        self._again: list[int] = []
        self._lost = False
        self.session = player.connect(number)

    @property
    def done(self) -> bool:
        """All is answered."""
        return not (self._waiting or self._again
                    or self._next < len(self._player.played))

    def ask(self) -> float:
        """Ask for what may be asked for now.

        :returns: seconds until there may be more, unless an answer comes.
        :raises ClientError: when there is no worker any more.
        """
        if self._lost:
            self._move()
        player = self._player
        most = min(player.depth, self.session.most)
        try:
            while len(self._waiting) < most:
                if self._again:
                    place = self._again.pop()
                elif self._next < len(player.played):
                    place = self._next
                    if player.recorded_speed:
                        left = (player.played[place].at / 1e6
                                - (time.monotonic() - player.began))
                        if left > 0:
                            return left
                    self._next += 1
                else:
                    break
                self._ask(place)
        except client.ClientError:
            self._lost = True
            return 0.0
        return 1.0

    def take(self) -> None:
        """Take the answers that have come."""
        try:
            for answer in self.session.take():
                if isinstance(answer, wire.Refused):
                    self._lost = True
                    if answer.code != wire.Refusal.RELOAD:
                        raise client.ClientError(
                            f'the worker refuses: {answer.reason}', answer)
                else:
                    self._note(answer)
        except client.ClientError as error:
            if error.refused is not None:
                raise
            self._lost = True

    def _ask(self, place: int) -> None:
        player = self._player
        frame, tags = player.request(place, self.session)
        if player.table and all(map(self.session.known, tags)):
            self._outcome.hits += 1
            return
        self._waiting[place] = time.perf_counter()
        self.session.send(frame)

    def _note(self, verdict: wire.Verdict) -> None:
        try:
            began = self._waiting.pop(verdict.id)
        except KeyError:
            raise client.ClientError(
                'a verdict that was not asked for') from None
        outcome = self._outcome
        outcome.asked += 1
        outcome.latencies.append(time.perf_counter() - began)
        result = wire.Result(verdict.result)
        outcome.results[result] += 1
        if result == wire.Result.MATCH:
            outcome.rules[verdict.rule] += 1
            if len(outcome.matches) < _MATCHES_MAX:
                outcome.matches.append(Found(
                    self._number, verdict.id, verdict.rule))

    def _move(self) -> None:
        """Connect again, as QEMU does, and ask again."""
        self.session.close()
        self._again += self._waiting
        self._waiting.clear()
        until = time.monotonic() + _AWAY
        while True:
            try:
                self.session = self._player.connect(self._number)
                break
            except client.ClientError:
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE)
        self._lost = False
        self.moved = True
        self._outcome.moved += 1
