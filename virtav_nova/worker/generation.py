# SPDX-License-Identifier: Apache-2.0
"""A rule set in force: its loader, its scan processes, their sessions."""

import abc
import collections.abc
import functools
import itertools
import json
import logging
import os
import selectors
import signal
import socket
import time
import typing

from oslo_config import cfg

from virtav_nova import text
from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import limit
from virtav_nova.worker import loader
from virtav_nova.worker import process
from virtav_nova.worker import ruleset
from virtav_nova.worker import sandbox
from virtav_nova.worker import table

LOG = logging.getLogger(__name__)

#: Pages remembered that a scan process hung in or died of.
_SKIP_MAX = 1024
#: Pause in seconds before a process is started that could not be before.
_PAUSE = 1.0
#: Grace in seconds for an engine that ends an over-long scan by itself.
_GRACE = 0.05
#: Longest time in seconds between two looks for scans that take too long.
_LOOK = 0.25
#: Seconds from a scan process closing its socket to its exit status.
_LAST_WORDS = 0.5
#: Seconds that scan processes without sessions have to end.
_LEAVE = 5.0
#: Deaths that tell on the page: the process did it to itself.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL,
            signal.SIGFPE, signal.SIGSYS)
#: Kills from outside within one scan of a page, as by want of memory, after
#: which it is held against the page.
_KILLS = 2
#: Messages taken from a process before others get their turn.
_MESSAGES_MAX = 64
#: Sessions of one instance. It needs two for a moment when it migrates.
_INSTANCE_MAX = 8


class OverloadError(Exception):
    """No scan process takes a session."""


class Scope:
    """Instances that share what is learnt of pages.

    :param number: that it is known by.
    :param entries: of its verdict table, 0 for none.
    :param epoch: of the rule set.
    :ivar key: tag key.
    :ivar writable: file descriptor of the table; None for no table.
    :ivar readable: the same, to be read only.
    :ivar sessions: how many it has.
    """

    def __init__(self, number: int, entries: int, epoch: int) -> None:
        self.number = number
        # One key for all of its sessions: equal pages have equal tags, and
        # what was learnt of a page outlives its session.
        self.key = os.urandom(wire.KEY_SIZE)
        self.writable: int | None = None
        self.readable: int | None = None
        self.sessions = 0
        if not entries:
            return
        try:
            self.writable = table.create(entries, epoch)
            self.readable = table.reader(self.writable)
        except OSError as error:
            self.close()
            LOG.error('There is no verdict table: %s', error.strerror)

    def close(self) -> None:
        """Close its table. Those who have mapped it still have it."""
        for fd in (self.writable, self.readable):
            if fd is not None:
                os.close(fd)
        self.writable = self.readable = None


class Opened(typing.NamedTuple):
    """What a new session is told.

    :param slot: of its scan process.
    :param scope: that it belongs to.
    :param digest: of its rule set.
    :param epoch: of its rule set.
    """

    slot: int
    scope: Scope
    digest: bytes
    epoch: int


class Logs:
    """Log lines that guests can cause, for all rule sets together."""

    def __init__(self) -> None:
        self.matches = limit.LogLimit(LOG, 20, 10)
        self.abuse = limit.LogLimit(LOG, 10, 60)
        self.faults = limit.LogLimit(LOG, 10, 60)
        self.losses = limit.LogLimit(LOG, 20, 60)
        self.spent = limit.LogLimit(LOG, 10, 60)


class Owner(abc.ABC):
    """Who has generations.

    :ivar selector: of the main loop; calls what is registered with it.
    :ivar logs: for what guests cause.
    """

    selector: selectors.BaseSelector
    logs: Logs

    @abc.abstractmethod
    def write(self, entry: record.Record) -> None:
        """Write an entry into the alert journal."""

    @abc.abstractmethod
    def ready(self, of: 'Generation') -> None:
        """A generation can serve."""

    @abc.abstractmethod
    def failed(self, of: 'Generation', reason: str, way_out: str
               ) -> None:
        """A generation that could not serve yet never will."""

    @abc.abstractmethod
    def broken(self, of: 'Generation') -> None:
        """A generation that served lost its loader."""

    @abc.abstractmethod
    def blamed(self, of: 'Generation', name: ruleset.Name) -> None:
        """A rule cost a scan process."""


class Generation:
    """A rule set, and as many scan processes for it as are wanted.

    :param epoch: that its rule set is known by.
    :param rules: the rule set.
    :param options: the group ``virtav_worker``.
    :param owner: is told what becomes of it.
    :raises OSError: when no loader can be started.
    :ivar description: what the engine says of itself, once it is loaded.
    :ivar seccomp: whether its processes are shut in by seccomp.
    :ivar unconfined: why they are not.
    :ivar processes: the scan processes by slot; None for one that is
        missing.
    :ivar lost: scan processes that died or were killed.
    """

    def __init__(self, epoch: int, rules: ruleset.Ruleset,
                 options: cfg.ConfigOpts.GroupAttr, owner: Owner) -> None:
        self.epoch = epoch
        self.digest = rules.digest
        self.description: dict[str, typing.Any] = {}
        self.seccomp = False
        self.unconfined = ''
        self.lost = 0
        #: Some process serves, or did.
        self.ready = False
        #: It is over: there is nothing left of it.
        self.ended = False
        self._owner = owner
        self._options = options
        self._kind = rules.kind
        self._entries = options.table_entries
        self._projects = options.table_scope == 'project'
        self._scan_limit = options.scan_timeout_ms / 1000 + _GRACE
        self._load_until: float | None = (
            time.monotonic() + options.load_timeout)
        self._loaded = False
        self._draining = False
        self._leave_until: float | None = None
        self._spawn_from = 0.0
        self._skip: dict[bytes, None] = {}
        self._kills: dict[bytes, int] = {}
        self._scopes: dict[str | None, Scope] = {}
        self._numbers = itertools.count()
        wanted = options.processes or len(os.sched_getaffinity(0))
        boards_fd = board.Boards.create(wanted)
        try:
            boards = board.Boards(boards_fd, wanted)
            self.boards = [boards.board(number) for number in range(wanted)]
            rules_fd = loader.pack(self._head(rules, wanted), rules.files)
            try:
                self._loader = process.Loader(rules_fd, boards_fd)
            finally:
                os.close(rules_fd)
        finally:
            os.close(boards_fd)
        self.processes: list[process.ScanProcess | None] = [None] * wanted
        owner.selector.register(
            self._loader.channel, selectors.EVENT_READ, self._attend_loader)

    def _head(self, rules: ruleset.Ruleset, slots: int
              ) -> dict[str, typing.Any]:
        options = self._options
        kind = rules.kind
        return {
            'engine': f'{kind.__module__}:{kind.__qualname__}',
            'options': rules.options._asdict() | {
                'quarantine': sorted(rules.options.quarantine)},
            'memory': options.rules_memory_mib << 20,
            'seconds': int(options.load_timeout) + 1,
            'slots': slots,
            'settings': {
                'max_in_flight': options.max_in_flight,
                'busy_poll_us': options.busy_poll_us,
                'scan_timeout_ms': options.scan_timeout_ms,
                'cache_size': options.cache_mib << 20,
                'budget': options.budget_percent / 100,
                'accumulate': {
                    name: options[name] for name in options
                    if name.startswith('accumulate')},
            },
        }

    @property
    def sessions(self) -> collections.abc.Iterator[process.Client]:
        """The sessions being served."""
        for scanning in self._running():
            yield from scanning.sessions.values()

    @property
    def engine(self) -> str:
        """Name and version of the engine."""
        return f'{self._kind.name} {self._kind.version}'

    @property
    def loader_pid(self) -> int:
        """Process id of the loader."""
        return self._loader.pid

    def _running(self) -> collections.abc.Iterator[process.ScanProcess]:
        for scanning in self.processes:
            if scanning is not None:
                yield scanning

    def scope(self, project: str | None) -> Scope:
        """Find the scope of an instance.

        :param project: of the instance.
        """
        key = project if self._projects else None
        scope = self._scopes.get(key)
        if scope is None:
            scope = self._scopes[key] = Scope(
                next(self._numbers), self._entries, self.epoch)
        return scope

    def open(self, client: process.Client, connection: socket.socket,
             ring_fd: int | None, slots: int) -> Opened:
        """Have a session served.

        :param client: the session.
        :param connection: that HELLO came from; stays open here.
        :param ring_fd: memory for its frames, stays open here; None when
            they go over the connection.
        :param slots: of the ring, 0 without one.
        :raises OverloadError: when no process takes it.
        """
        # One that died has to be known to be dead.
        for scanning in list(self._running()):
            if scanning.speaks(0):
                self._attend(scanning)
        scanning = self._choose(client)
        scope = self.scope(client.project)
        fds = [fd for fd in (ring_fd, scope.writable) if fd is not None]
        try:
            scanning.hand_over(
                client, connection, fds, scope=scope.number,
                key=scope.key.hex(), slots=slots,
                table=scope.writable is not None,
                shared=bool(client.hello.flags & wire.SHARED),
                read=bool(client.hello.flags & wire.READ))
        except OSError as error:
            self._leave_scope(client)
            raise OverloadError('the scan process is stuck') from error
        scope.sessions += 1
        self._owner.write(record.session(
            'opened', client.hello, self.digest))
        return Opened(scanning.slot, scope, self.digest, self.epoch)

    def load(self, client: process.Client) -> int:
        """:returns: sessions of the process that would serve one more.

        :raises OverloadError: when there is none.
        """
        return len(self._choose(client).sessions)

    def _choose(self, client: process.Client) -> process.ScanProcess:
        """Choose a scan process for a session."""
        same = {scanning: sum(other.instance == client.instance
                              for other in scanning.sessions.values())
                for scanning in self._running() if scanning.leaving is None}
        if not same:
            raise OverloadError('no scan process is running')
        if sum(same.values()) >= _INSTANCE_MAX:
            raise OverloadError('as many sessions as one instance may have')
        # All of an instance go to one, so that they share its budget. One
        # that was only asked for is soon there; a session stays where it is
        # for long.
        return min(same, key=lambda scanning: (
            -same[scanning], len(scanning.sessions), not scanning.ready))

    def due(self) -> float | None:
        """Tell when to call :meth:`keep` at the latest.

        :returns: on the monotonic clock in seconds; None while nothing is
            to be done.
        """
        times = [scanning.leaving for scanning in self._running()
                 if scanning.leaving is not None]
        if self._load_until is not None:
            times.append(self._load_until)
        if self._leave_until is not None:
            times.append(self._leave_until)
        if self._loaded and not self._draining and None in self.processes:
            times.append(self._spawn_from)
        if any(scanning.sessions for scanning in self._running()):
            times.append(time.monotonic() + min(self._scan_limit / 8, _LOOK))
        return min(times, default=None)

    def keep(self) -> None:
        """Replace what hangs or is dead."""
        now = time.monotonic()
        if self.ended:
            return
        if self._load_until is not None and now >= self._load_until:
            self._fail(_('loading took more than %g s')
                       % self._options.load_timeout,
                       _('take out rules, or raise [virtav_worker] '
                         'load_timeout'))
            return
        for scanning in self._running():
            if scanning.leaving is not None:
                if now >= scanning.leaving:
                    scanning.leaving = now + _PAUSE
                    scanning.kill()
                continue
            scan = scanning.overdue(self._scan_limit)
            if scan:
                scanning.killed_for = scan
                self._leave(scanning, 0)
        if self._leave_until is not None and now >= self._leave_until:
            self._leave_until = None
            LOG.warning('Draining took too long')
            for scanning in self._running():
                scanning.kill()
        self._fill()

    def drain(self, seconds: float) -> None:
        """Let the processes answer what came, and end.

        :param seconds: that they have for it.
        """
        if self._draining:
            return
        self._draining = True
        self._load_until = None
        self._leave_until = time.monotonic() + seconds
        for scanning in self._running():
            scanning.tell('drain', seconds=seconds)
        self._settle()

    def retire(self) -> None:
        """Let it end; it has no sessions any more."""
        self.drain(_LEAVE)

    def move(self) -> bool:
        """Have one session connect anew, under the rules of today.

        :returns: whether there was one.
        """
        for scanning in self._running():
            for number in scanning.sessions:
                if number not in scanning.moving:
                    scanning.moving.add(number)
                    scanning.tell('move', session=number)
                    return True
        return False

    def kill(self) -> None:
        """End it at once, for good."""
        if self.ended:
            return
        self._draining = True
        for scanning in self._running():
            scanning.kill()
        for scanning in list(self._running()):
            scanning.gone(_LAST_WORDS)
            self._bury(scanning, None)
        self._settle()

    def _fill(self) -> None:
        """Start the processes that are missing, unless it is too soon."""
        if (not self._loaded or self._draining
                or time.monotonic() < self._spawn_from):
            return
        for number, scanning in enumerate(self.processes):
            if scanning is not None:
                continue
            try:
                scanning = process.ScanProcess(
                    self._loader, self.boards[number])
            except OSError as error:
                self._refused(str(error.strerror))
                return
            self.processes[number] = scanning
            if self._skip:
                scanning.tell('skip', tags=[tag.hex() for tag in self._skip])
            self._owner.selector.register(
                scanning.channel, selectors.EVENT_READ,
                functools.partial(self._attend, scanning))

    def _refused(self, reason: str) -> None:
        LOG.error('Cannot start a scan process: %s', reason)
        self._spawn_from = time.monotonic() + _PAUSE

    def _attend_loader(self) -> None:
        if self.ended:
            return
        try:
            for message, fds in itertools.islice(
                    self._loader.messages(), _MESSAGES_MAX):
                try:
                    self._take_loader(message, fds)
                finally:
                    control.close(fds)
        except EOFError:
            self._lose_loader()
        except (AttributeError, KeyError, TypeError, ValueError,
                IndexError, RecursionError, OverflowError):
            LOG.exception('Loader %s sent nonsense', self._loader.pid)
            self._lose_loader()

    def _take_loader(self, message: control.Message, fds: list[int]) -> None:
        kind = message['type']
        if kind == 'loaded' and not self._loaded:
            self._take_loaded(message)
        elif kind == 'failed' and not self._loaded:
            reason = str(message['reason'])
            if message['rule']:
                reason = ruleset.located(self._options, reason)
            self._fail(reason, str(message['way_out']))
        elif kind == 'named':
            self._owner.blamed(
                self, (str(message['namespace']), str(message['rule'])))
        elif kind in ('forked', 'refused', 'exited'):
            scanning = self.processes[int(message['slot'])]
            if scanning is None:
                return
            if kind == 'forked' and not scanning.pid:
                scanning.forked(int(message['pid']), fds.pop())
            elif kind == 'refused' and not scanning.pid:
                self._refused(text.printable(str(message['reason']), 128))
                self._bury(scanning, None)
            elif kind == 'exited' and scanning.pid == message['pid']:
                self._bury(scanning, int(message['status']))

    def _take_loaded(self, message: control.Message) -> None:
        self.description = dict(message['description'])
        self.seccomp = bool(message['seccomp'])
        self.unconfined = text.printable(str(message['reason']), 256)
        if self.description['rules'] == 0:
            self._fail(_('the files in rule directory %s hold no rule')
                       % self._options.rules_dir, _('put rules into them'))
            return
        LOG.info('Engine %s, digest %s: %s', self.engine, self.digest.hex(),
                 text.printable(json.dumps(self.description), 1024))
        if not self.seccomp:
            LOG.warning('Scan processes are not shut in by seccomp: %s',
                        self.unconfined)
        self._loaded = True
        if not self._projects:
            # Now, while there are memory and files for it.
            self.scope(None)
        self._fill()

    def _lose_loader(self) -> None:
        if self.ended:
            return
        if self._draining:
            self.kill()
            return
        if self.ready:
            LOG.error('Loader %s is gone, and its scan processes with it',
                      self._loader.pid)
            self.kill()
            self._owner.broken(self)
            return
        status = self._loader.end()
        how = (_('exit status %d') % status if status >= 0
               else signal.strsignal(-status))
        self._fail(_('the loader died, %s') % how,
                   _('see what it wrote above; it may have taken more '
                     'memory than [virtav_worker] rules_memory_mib allows'))

    def _fail(self, reason: str, way_out: str) -> None:
        self.kill()
        self._owner.failed(self, reason, way_out)

    def _attend(self, scanning: process.ScanProcess) -> None:
        if self.processes[scanning.slot] is not scanning:
            return  # It ended a moment ago.
        if scanning.leaving is None and not self._hear(
                scanning, _MESSAGES_MAX):
            self._leave(scanning, _LAST_WORDS)

    def _hear(self, scanning: process.ScanProcess, most: int | None = None
              ) -> bool:
        """Take the messages of a scan process.

        :param most: take no more than that.
        :returns: False when there will be no more.
        """
        try:
            for message, fds in itertools.islice(scanning.messages(), most):
                control.close(fds)
                self._take(scanning, message)
        except EOFError:
            return False
        except (AttributeError, KeyError, TypeError, ValueError,
                RecursionError):
            LOG.exception('Scan process %s sent nonsense', scanning.pid)
            return False
        return True

    def _take(self, scanning: process.ScanProcess, message: control.Message
              ) -> None:
        kind = message['type']
        if kind == 'ready':
            scanning.ready = True
            if not self.ready:
                self.ready = True
                self._load_until = None
                self._owner.ready(self)
            return
        # A scan process speaks only for sessions that it was given.
        number = message['session']
        client = scanning.sessions[number]
        if kind == 'match':
            found = message['record']
            self._owner.write(record.match(client.hello, self.digest, found))
            self._owner.logs.matches.warning(
                'Instance %s: rule %s matched (%s), block %s, offset %s, '
                'CPL %s', client.instance, *(
                    text.printable(str(found.get(name)), 128)
                    for name in ('rule', 'form', 'block', 'offset', 'cpl')))
        elif kind == 'fault':
            self._owner.logs.faults.warning(
                'Instance %s: a scan failed: %s', client.instance,
                text.printable(str(message['reason']), 256))
            self._blame(message['part'])
        elif kind == 'spent':
            scanning.spent[number] = time.monotonic()
            self._owner.logs.spent.warning(
                'Instance %s spent its share of scan time; others go first',
                client.instance)
        elif kind == 'closed':
            reason, counts = str(message['reason']), message['counts']
            if not isinstance(counts, dict | None):
                raise TypeError('counts are no object')
            del scanning.sessions[number]
            scanning.spent.pop(number, None)
            self._closed(client, reason, counts)

    def _closed(self, client: process.Client, reason: str,
                counts: record.Record | None) -> None:
        entry = record.session(
            'closed', client.hello, self.digest, reason, counts)
        self._owner.write(entry)
        say = (self._owner.logs.abuse.warning
               if reason.startswith('protocol') else LOG.info)
        say('Session %s of instance %s closed: %s (%s)', client.number,
            client.instance, entry['reason'], ', '.join(
                f'{name} {entry[name]}' for name in record.COUNTS))
        self.scope(client.project).sessions -= 1
        self._leave_scope(client)

    def _leave_scope(self, client: process.Client) -> None:
        """Forget the scope of a project that has no session any more."""
        scope = self.scope(client.project)
        if self._projects and not scope.sessions:
            scope.close()
            del self._scopes[client.project]

    def _leave(self, scanning: process.ScanProcess, patience: float) -> None:
        """Give a scan process up.

        Its exit status is waited for, as long as that does not take too
        long: the instances connect again at once, and by then it has to be
        known what it died of.

        :param patience: seconds it is given to end by itself.
        """
        self._owner.selector.unregister(scanning.channel)
        scanning.leaving = time.monotonic() + _PAUSE
        if not patience or not scanning.gone(patience):
            scanning.kill()
            scanning.gone(_LAST_WORDS)
        until = time.monotonic() + _LAST_WORDS
        while (self.processes[scanning.slot] is scanning
               and not self.ended
               and self._loader.speaks(until - time.monotonic())):
            self._attend_loader()

    def _bury(self, scanning: process.ScanProcess, status: int | None
              ) -> None:
        """Be done with a scan process that is dead.

        :param status: exit status, or the signal that ended it as a negative
            number; None for one that never was, or is ended for good.
        """
        scan = scanning.board.scan()
        self._hear(scanning)  # What it had to say before.
        if scanning.leaving is None:
            self._owner.selector.unregister(scanning.channel)
        scanning.close()
        self.processes[scanning.slot] = None
        for client in scanning.sessions.values():
            self._closed(client, 'scan process died', None)
        if status is not None and not (self._draining and status == 0):
            self._lost(scanning, status)
            if scan and not self._draining:
                self._hold_against(scanning, scan, status)
        # Those who wait for what it scanned need not any more. They were
        # told by now if they are not to scan it.
        scanning.board.end()
        if not scanning.ready and not self._draining and status is not None:
            if not self.ready:
                self._fail(_('scan processes do not start'),
                           _('see what they wrote above'))
                return
            self._spawn_from = time.monotonic() + _PAUSE
        # At once: the instances are about to connect again.
        self._fill()
        self._settle()

    def _lost(self, scanning: process.ScanProcess, status: int) -> None:
        if scanning.killed_for:
            how = f'killed, a scan took more than {self._scan_limit:g} s'
        elif sandbox.died_of_it(status):
            how = 'died, it made a system call that its sandbox forbids'
        elif status >= 0:
            how = f'died, exit status {status}'
        else:
            how = f'died, {signal.strsignal(-status)}'
        self.lost += 1
        self._owner.logs.losses.warning(
            'Scan process %s %s; %s sessions closed; %s lost so far',
            scanning.pid, how, len(scanning.sessions), self.lost)

    def _hold_against(self, scanning: process.ScanProcess, scan: board.Scan,
                      status: int) -> None:
        """See whether it was the page's fault; if not it gets another try.

        :param scan: that the process was at when it ended.
        """
        killed_for = scanning.killed_for
        if killed_for:
            guilty = scan.started == killed_for.started
        elif -status in _CRASHES:
            guilty = True
        else:
            kills = self._kills.pop(scan.tag, 0) + 1
            self._kills[scan.tag] = kills
            if len(self._kills) > _SKIP_MAX:
                del self._kills[next(iter(self._kills))]
            guilty = -status == signal.SIGKILL and kills >= _KILLS
        if not guilty:
            return
        client = scanning.sessions.get(scan.session)
        self._pass_over(scan, client)
        # A guest could time its page so that the limit strikes in a rule that
        # it would be rid of: one that came late in a slow scan is not blamed.
        if not killed_for or scan.before < self._scan_limit * 5e8:
            self._blame(scan.part)

    def _pass_over(self, scan: board.Scan, client: process.Client | None
                   ) -> None:
        """Have a page answered as unknown from now on.

        QEMU asks for it again as soon as it is connected again, and without
        this the next process would go the same way.
        """
        if scan.tag == wire.NO_TAG:
            return  # It was at several pages, which nobody asks for again.
        self._skip[scan.tag] = None
        if len(self._skip) > _SKIP_MAX:
            del self._skip[next(iter(self._skip))]
        for other in self._running():
            other.tell('skip', tags=[scan.tag.hex()])
        self._owner.logs.losses.warning(
            'Page %s of instance %s is answered as unknown from now on',
            scan.tag.hex(), client and client.instance)

    def _blame(self, part: object) -> None:
        """Hold a lost process against the rules that were being evaluated.

        :param part: as the engine numbers them; None if it did not say.
        """
        # It is the word of a process that works on hostile data.
        if type(part) is not int or not 0 <= part < board.NO_PART:
            return
        if part & base.RULE:
            self._loader.tell('name', part=part)
            return
        LOG.warning('Rules of group %s are evaluated one by one from now on',
                    part)
        self._loader.tell('suspect', part=part)
        for scanning in self._running():
            scanning.tell('suspect', part=part)

    def _settle(self) -> None:
        """End the loader when there is nothing left for it."""
        if not self._draining or self.ended or any(self._running()):
            return
        self.ended = True
        self._leave_until = None
        self._owner.selector.unregister(self._loader.channel)
        self._loader.end()
        for scope in self._scopes.values():
            scope.close()
        self._scopes.clear()
