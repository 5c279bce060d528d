# SPDX-License-Identifier: Apache-2.0
"""The rule sets: the one in force, the one before it, and the one to come.

Each has a loader and scan processes of its own. A new one is loaded while the
old one serves, and comes into force once it can serve. The sessions of the
old one are then moved, a few a second: their guests have all pages looked at
anew, and not all are to do so at once.
"""

import collections.abc
import errno
import logging
import os
import resource
import selectors
import socket
import time
import typing

from oslo_config import cfg

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.alerts import journal
from virtav_nova.alerts import record
from virtav_nova.i18n import _
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import generation
from virtav_nova.worker import limit
from virtav_nova.worker import listener
from virtav_nova.worker import process
from virtav_nova.worker import ruleset

LOG = logging.getLogger(__name__)

#: Seconds before a rule set whose loader was lost is loaded again.
_PAUSE = 1.0
#: Seconds that sessions have to leave a rule set after they were told to.
_STAY = 60.0
#: Open files of a scan process beside those of its sessions, at most.
_FILES = 64
#: Open files that a ring takes of a scan process.
_RING_FILES = 1
_REASON_MAX = 4096


class LoadError(exception.ConfigurationError):
    """The first rule set cannot be loaded."""


class Loading(typing.NamedTuple):
    """What came of the last attempt to load rules.

    :param time: ISO 8601.
    :param why: it was made.
    :param digest: of the rules as hex, None when they could not be read.
    :param state: ``loading``, ``loaded``, ``unchanged`` or ``failed``.
    :param error: why it failed, else empty.
    """

    time: str
    why: str
    digest: str | None
    state: str
    error: str = ''


class Pool(generation.Owner):
    """All generations.

    :param options: the group ``virtav_worker``.
    :param alerts: the journal.
    :param selector: of the main loop; calls what is registered with it.
    :ivar current: the generation in force; None until one can serve.
    :ivar old: the one before, as long as it has sessions.
    :ivar coming: the one that is being loaded.
    :ivar quarantine: rules that were found guilty.
    :ivar loading: what came of the last attempt to load rules.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 alerts: journal.Journal, selector: selectors.BaseSelector
                 ) -> None:
        self.selector = selector
        self.logs = generation.Logs()
        self.current: generation.Generation | None = None
        self.old: generation.Generation | None = None
        self.coming: generation.Generation | None = None
        self.quarantine = ruleset.Quarantine(options.state_dir)
        self.loading: Loading | None = None
        self._options = options
        self._journal = alerts
        self._epoch = 0
        self._ring_slots = options.ring_slots if ring.SUPPORTED else 0
        self._rings_max = (_rings_max(options.max_sessions)
                           if self._ring_slots else 0)
        #: Why to load the rules, once there is room for another set.
        self._wanted: str | None = None
        self._load_from = 0.0
        self._next_move = 0.0
        #: When there was nobody left to be told to leave the old set.
        self._told_all: float | None = None
        self._draining = False
        #: Some rule set was in force.
        self._served = False
        self._hits: dict[ruleset.Name, int] = {}
        self._ringless = limit.LogLimit(LOG, 1, 60)

    @property
    def generations(self) -> collections.abc.Iterator[
            generation.Generation]:
        """All that there are."""
        for one in (self.old, self.current, self.coming):
            if one is not None:
                yield one

    @property
    def ended(self) -> bool:
        """There is no process left."""
        return all(one.ended for one in self.generations)

    @property
    def serving(self) -> bool:
        """A rule set is in force."""
        return self.current is not None

    @property
    def waits(self) -> bool:
        """Rules are to be loaded once there is room for another set."""
        return self._wanted is not None

    @property
    def sessions(self) -> int:
        """Number of sessions being served."""
        return sum(1 for one in self.generations for _each in one.sessions)

    def load(self, why: str) -> None:
        """Load the rules anew; for the first time, or while others serve.

        :param why: for people.
        :raises ConfigurationError: the first time, when they cannot be read.
        """
        if self._draining:
            return
        if self.coming is not None:
            LOG.info('Rules: what is being loaded is dropped, %s', why)
            self._drop_coming()
        # Two sets take twice the memory, so there are never three.
        if self.old is not None:
            LOG.info('Rules: %s; they are loaded once the last session has '
                     'left the set before', why)
            self._wanted = why
            return
        self._wanted = None
        self._load(why)

    def _load(self, why: str) -> None:
        try:
            rules = ruleset.read(self._options)
        except exception.ConfigurationError as error:
            if not self._served:
                raise
            self._give_up(why, None, str(error))
            return
        if self.current is not None and self.current.digest == rules.digest:
            LOG.info('Rules: %s; digest %s is in force already, nothing is '
                     'done', why, rules.digest.hex())
            self._note(why, rules.digest, 'unchanged')
            return
        LOG.info('Rules: %s; loading digest %s', why, rules.digest.hex())
        self._epoch += 1
        try:
            self.coming = generation.Generation(
                self._epoch, rules, self._options, self)
        except OSError as error:
            reason = _('no loader can be started: %s') % error.strerror
            if not self._served:
                raise LoadError(reason, _('see that the host has processes, '
                                          'files and memory left')) from error
            self._give_up(why, rules.digest, reason)
            return
        self._note(why, rules.digest, 'loading')

    def _give_up(self, why: str, digest: bytes | None, error: str) -> None:
        self._note(why, digest, 'failed', error)
        if self.current is None:
            # Nothing is served, so there is nothing to lose by another try.
            self._wanted = why
            self._load_from = time.monotonic() + _PAUSE

    def _note(self, why: str, digest: bytes | None, state: str,
              error: str = '') -> None:
        if error:
            error = text.printable(error, _REASON_MAX)
            LOG.error('Rules: %s: %s',
                      'no set is in force' if self.current is None
                      else 'the set in force stays', error)
        self.loading = Loading(
            record.now(), why, digest.hex() if digest else None, state, error)

    def open(self, number: int, hello: wire.Hello,
             connection: socket.socket, project: str | None = None
             ) -> tuple[generation.Opened, int | None]:
        """Have a session served.

        :param number: that the session is known by from now on.
        :param hello: without its token.
        :param connection: that HELLO came from; stays open here.
        :param project: of the instance, None when it is not known.
        :returns: what to tell the peer; and a file descriptor of the ring
            for its frames, to be closed by the caller, or None.
        :raises OverloadError: when no process takes it.
        """
        if self.current is None:
            raise generation.OverloadError('no rules are loaded')
        client = process.Client(
            number, hello, listener.credentials(connection), project,
            time.monotonic(), False)
        ring_fd = None
        if hello.flags & wire.SHARED and self._ring_slots:
            ring_fd = self._ring(self.current.load(client))
        try:
            return self.current.open(
                client._replace(ring=ring_fd is not None), connection,
                ring_fd, 0 if ring_fd is None else self._ring_slots), ring_fd
        except generation.OverloadError:
            if ring_fd is not None:
                os.close(ring_fd)
            raise

    def _ring(self, sessions: int) -> int | None:
        """Make a ring, if that can be.

        :param sessions: of the scan process by now.
        """
        try:
            if sessions >= self._rings_max:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return ring.create(self._ring_slots)
        except OSError as error:
            self._ringless.warning(
                'No shared memory for a session, it uses its socket: %s',
                error.strerror)
            return None

    def due(self) -> float | None:
        """Tell when to call :meth:`keep` at the latest.

        :returns: on the monotonic clock in seconds; None while nothing is
            to be done.
        """
        times = [moment for one in self.generations
                 if (moment := one.due()) is not None]
        if self.old is not None and not self._draining:
            times.append(self._next_move)
        if self._wanted is not None and self.old is None:
            times.append(self._load_from)
        return min(times, default=None)

    def keep(self) -> None:
        """Do what is due.

        :raises ConfigurationError: when the first rule set does not load.
        """
        for one in list(self.generations):
            one.keep()
        self._forget_ended()
        now = time.monotonic()
        if self.old is not None and not self._draining:
            self._move(now)
        if (self._wanted is not None and self.old is None
                and now >= self._load_from and not self._draining):
            self.load(self._wanted)

    def _move(self, now: float) -> None:
        old = typing.cast(generation.Generation, self.old)
        if not any(True for _each in old.sessions):
            old.retire()
            self._forget_ended()
            return
        if now < self._next_move:
            return
        if old.move():
            self._told_all = None
        elif self._told_all is None:
            self._told_all = now
        elif now - self._told_all > _STAY:
            # As long as they stay no other rules can be loaded.
            LOG.warning('Rules: sessions do not leave digest %s, they are '
                        'closed', old.digest.hex())
            self._told_all = now
            old.retire()
        self._next_move = max(
            self._next_move, now - 1) + 1 / self._options.reload_rate

    def _forget_ended(self) -> None:
        if self.old is not None and self.old.ended:
            LOG.info('Rules: nobody is left under digest %s',
                     self.old.digest.hex())
            self.old = None
        if self.current is not None and self.current.ended:
            self.current = None
        if self.coming is not None and self.coming.ended:
            self.coming = None

    def drain(self, seconds: float) -> None:
        """Let the processes answer what came, and end.

        :param seconds: that they have for it.
        """
        self._draining = True
        if self.coming is not None:
            self._drop_coming()
        for one in list(self.generations):
            one.drain(seconds)
        self._forget_ended()

    def kill(self) -> None:
        """End the processes at once, for good."""
        self._draining = True
        for one in list(self.generations):
            one.kill()
        self._forget_ended()

    def _drop_coming(self) -> None:
        coming = typing.cast(generation.Generation, self.coming)
        self.coming = None
        coming.kill()

    def write(self, entry: record.Record) -> None:
        """See :meth:`generation.Owner.write`."""
        self._journal.append(entry)

    def ready(self, of: generation.Generation) -> None:
        """See :meth:`generation.Owner.ready`."""
        if of is not self.coming:
            return
        self.coming = None
        self.old, self.current = self.current, of
        self._served = True
        self._next_move = time.monotonic()
        self._told_all = None
        loading = typing.cast(Loading, self.loading)
        self.loading = loading._replace(time=record.now(), state='loaded')
        LOG.info('Rules: digest %s is in force, epoch %s',
                 of.digest.hex(), of.epoch)

    def failed(self, of: generation.Generation, reason: str,
               way_out: str) -> None:
        """See :meth:`generation.Owner.failed`.

        :raises LoadError: for the first rule set.
        """
        if of is not self.coming:
            return
        self.coming = None
        if not self._served:
            raise LoadError(reason, way_out)
        loading = typing.cast(Loading, self.loading)
        self._give_up(loading.why, of.digest, reason)

    def broken(self, of: generation.Generation) -> None:
        """See :meth:`generation.Owner.broken`."""
        if of is self.current:
            self.current = None
            if self.coming is None:
                self._wanted = _('its loader was lost')
                self._load_from = time.monotonic() + _PAUSE

    def blamed(self, of: generation.Generation, name: ruleset.Name
               ) -> None:
        """See :meth:`generation.Owner.blamed`."""
        hits = self._hits[name] = self._hits.get(name, 0) + 1
        shown = text.printable(f'{name[0]}: {name[1]}', 256)
        LOG.warning('Rule %s cost a scan process, %s times so far', shown,
                    hits)
        if hits < self._options.blame_after:
            return
        del self._hits[name]
        if self.quarantine.add(name, _(
                'cost %d scan processes') % self._options.blame_after):
            self.load(_('rule %s is in quarantine') % shown)


class _Attempt(generation.Owner):
    """Loads a rule set to see whether it can serve."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.logs = generation.Logs()
        self.done = False

    def write(self, entry: record.Record) -> None:
        """See :meth:`generation.Owner.write`; there is nothing to write."""

    def ready(self, of: generation.Generation) -> None:
        """See :meth:`generation.Owner.ready`."""
        self.done = True

    def failed(self, of: generation.Generation, reason: str, way_out: str
               ) -> None:
        """See :meth:`generation.Owner.failed`.

        :raises LoadError: always.
        """
        raise LoadError(reason, way_out)

    def broken(self, of: generation.Generation) -> None:
        """See :meth:`generation.Owner.broken`; it served, that is enough."""

    def blamed(self, of: generation.Generation, name: ruleset.Name) -> None:
        """See :meth:`generation.Owner.blamed`; nothing is scanned."""


def attempt(options: cfg.ConfigOpts.GroupAttr, rules: ruleset.Ruleset
            ) -> dict[str, typing.Any]:
    """Load a rule set as for serving, and end.

    :param options: the group ``virtav_worker``.
    :param rules: the rule set.
    :returns: what the engine says of itself.
    :raises LoadError: when it does not load.
    """
    owner = _Attempt()
    one = generation.Generation(1, rules, options, owner)
    try:
        while not owner.done:
            one.keep()
            due = one.due()
            for key, _events in owner.selector.select(
                    None if due is None
                    else max(due - time.monotonic(), 0)):
                key.data()
        return one.description
    finally:
        one.kill()
        owner.selector.close()


def _rings_max(sessions: int) -> int:
    """Have scan processes open as many files as they may need.

    :param sessions: most sessions; one scan process may have them all.
    :returns: how many of them may have a ring.
    """
    wanted = _FILES + (1 + _RING_FILES) * sessions
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return sessions
    if files < wanted:
        files = (wanted if hard == resource.RLIM_INFINITY
                 else min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    rings = max(min(files, wanted) - _FILES - sessions, 0) // _RING_FILES
    if rings < sessions:
        LOG.warning('A scan process may open %s files, enough for %s rings; '
                    'with %s all sessions could have one', files, rings,
                    wanted)
    return rings
