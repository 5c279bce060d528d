# SPDX-License-Identifier: Apache-2.0
"""The scan processes and what they tell of their sessions."""

import errno
import functools
import itertools
import logging
import os
import resource
import selectors
import signal
import socket
import time

from oslo_config import cfg

from virtav_nova import text
from virtav_nova.alerts import journal
from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.worker import board
from virtav_nova.worker import control
from virtav_nova.worker import limit
from virtav_nova.worker import process
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
#: Deaths that tell on the page: the process did it to itself.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL,
            signal.SIGFPE)
#: Messages taken from a scan process before others get their turn.
_MESSAGES_MAX = 64
#: Open files of a scan process beside those of its sessions, at most.
_FILES = 64
#: Open files that a ring takes of a scan process.
_RING_FILES = 1


class StartError(Exception):
    """No scan process can be brought up."""


class OverloadError(Exception):
    """No scan process takes a session."""


class Pool:
    """As many scan processes as are wanted, replaced as they are lost.

    :param options: the group ``virtav_worker``.
    :param engine: with the compiled rules.
    :param digest: of the rule set.
    :param key: tag key.
    :param epoch: of the rule set.
    :param alerts: the journal.
    :param selector: of the main loop; calls what is registered with it.
    :ivar table_fd: of the verdict table, to be read only; None for no table.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr, engine: base.Engine,
                 digest: bytes, key: bytes, epoch: int,
                 alerts: journal.Journal, selector: selectors.BaseSelector
                 ) -> None:
        self._digest = digest
        self._journal = alerts
        self._selector = selector
        table_fd, self.table_fd = _table(options.table_entries, epoch)
        self._setup = process.Setup(
            engine, key, options.scan_timeout_ms, options.max_in_flight,
            options.busy_poll_us, table_fd)
        self._ring_slots = options.ring_slots if ring.SUPPORTED else 0
        self._rings_max = (_rings_max(options.max_sessions)
                           if self._ring_slots else 0)
        self._scan_limit = options.scan_timeout_ms / 1000 + _GRACE
        #: How many there are to be.
        self._wanted = options.processes or len(os.sched_getaffinity(0))
        self._processes: list[process.ScanProcess] = []
        self._spawn_from = 0.0
        self._skip: dict[bytes, None] = {}
        self._lost = 0
        #: Some process has loaded its rules.
        self.ready = False
        self._draining = False
        self._matches = limit.LogLimit(LOG, 20, 10)
        self._abuse = limit.LogLimit(LOG, 10, 60)
        self._faults = limit.LogLimit(LOG, 10, 60)
        self._losses = limit.LogLimit(LOG, 20, 60)
        self._ringless = limit.LogLimit(LOG, 1, 60)

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def sessions(self) -> int:
        """Number of sessions being served."""
        return sum(len(scanning.sessions) for scanning in self._processes)

    def open(self, number: int, hello: wire.Hello, connection: socket.socket
             ) -> tuple[int, int | None]:
        """Have a session served.

        :param number: that the session is known by from now on.
        :param connection: that HELLO came from; stays open here.
        :returns: process id of the scan process; and a file descriptor of
            the ring for its frames, to be closed by the caller, or None.
        :raises OverloadError: when no process takes it.
        """
        # One that is still loading its rules is soon done; a session stays
        # where it is for long.
        scanning = min(
            self._processes, default=None,
            key=lambda one: (len(one.sessions), not one.ready))
        if scanning is None:
            raise OverloadError('no scan process is running')
        ring_fd = None
        if hello.flags & wire.SHARED and self._ring_slots:
            ring_fd = self._ring(len(scanning.sessions))
        try:
            scanning.hand_over(
                number, hello, connection, ring_fd,
                0 if ring_fd is None else self._ring_slots)
        except OSError as error:
            if ring_fd is not None:
                os.close(ring_fd)
            raise OverloadError('the scan process is stuck') from error
        self._journal.append(record.session('opened', hello, self._digest))
        return scanning.pid, ring_fd

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
        times = []
        if not self._draining and len(self._processes) < self._wanted:
            times.append(self._spawn_from)
        if self.sessions:
            times.append(time.monotonic() + min(self._scan_limit / 8, _LOOK))
        return min(times, default=None)

    def keep(self) -> None:
        """Replace what hangs or is dead.

        :raises StartError: when none was ever ready.
        """
        for scanning in list(self._processes):
            scan = scanning.overdue(self._scan_limit)
            if scan:
                self._bury(scanning, scan, patience=0)
        self._fill()

    def drain(self, seconds: float) -> None:
        """Let the processes answer what came, and end.

        :param seconds: that they have for it.
        """
        self._draining = True
        for scanning in self._processes:
            scanning.tell('drain', seconds=seconds)

    def kill(self) -> None:
        """End the processes at once, for good."""
        self._draining = True
        for scanning in list(self._processes):
            self._bury(scanning, patience=0)

    def _fill(self) -> None:
        """Start the processes that are missing, unless it is too soon."""
        if self._draining or time.monotonic() < self._spawn_from:
            return
        while len(self._processes) < self._wanted:
            try:
                scanning = process.ScanProcess(self._setup, self._skip)
            except OSError as error:
                LOG.error('Cannot start a scan process: %s', error.strerror)
                self._spawn_from = time.monotonic() + _PAUSE
                return
            self._processes.append(scanning)
            self._selector.register(
                scanning.control, selectors.EVENT_READ,
                functools.partial(self._attend, scanning))

    def _attend(self, scanning: process.ScanProcess) -> None:
        if not self._hear(scanning, _MESSAGES_MAX):
            self._bury(scanning)

    def _hear(self, scanning: process.ScanProcess, most: int | None = None
              ) -> bool:
        """Take the messages of a scan process.

        :param most: take no more than that.
        :returns: False when there will be no more.
        """
        try:
            for message in itertools.islice(scanning.messages(), most):
                self._take(scanning, message)
        except EOFError:
            return False
        except (AttributeError, KeyError, TypeError):
            LOG.exception('Scan process %s sent nonsense', scanning.pid)
            return False
        return True

    def _take(self, scanning: process.ScanProcess, message: control.Message
              ) -> None:
        kind = message['type']
        if kind == 'ready':
            scanning.ready = True
            self.ready = True
            return
        # A scan process speaks only for sessions that it was given.
        number = message['session']
        hello = scanning.sessions[number]
        if kind == 'match':
            found = message['record']
            self._journal.append(record.match(hello, self._digest, found))
            self._matches.warning(
                'Instance %s: rule %s matched, block %s, offset %s, CPL %s',
                hello.instance, *(
                    text.printable(str(found.get(name)), 128)
                    for name in ('rule', 'block', 'offset', 'cpl')))
        elif kind == 'fault':
            self._faults.warning(
                'Instance %s: a scan failed: %s', hello.instance,
                text.printable(str(message['reason']), 256))
        elif kind == 'closed':
            del scanning.sessions[number]
            self._closed(number, hello, str(message['reason']),
                         message['counts'])

    def _closed(self, number: int, hello: wire.Hello, reason: str,
                counts: record.Record | None) -> None:
        entry = record.session('closed', hello, self._digest, reason, counts)
        self._journal.append(entry)
        say = (self._abuse.warning if reason.startswith('protocol')
               else LOG.info)
        say('Session %s of instance %s closed: %s (%s)', number,
            hello.instance, entry['reason'], ', '.join(
                f'{name} {entry[name]}' for name in record.COUNTS))

    def _bury(self, scanning: process.ScanProcess,
              overdue: board.Scan | None = None,
              patience: float = _LAST_WORDS) -> None:
        """Be done with a scan process that is dead, or has to be.

        :param overdue: the scan that it is killed for.
        :param patience: seconds it is given to end by itself.
        :raises StartError: when none was ever ready.
        """
        status, scan = scanning.end(patience)
        self._hear(scanning)  # What it had to say before.
        self._selector.unregister(scanning.control)
        scanning.control.close()
        self._processes.remove(scanning)
        for number, hello in scanning.sessions.items():
            self._closed(number, hello, 'scan process died', None)
        if self._draining and status == 0:
            return
        how = (f'killed, a scan took more than {self._scan_limit:g} s'
               if overdue else f'died, exit status {status}'
               if status >= 0 else f'died, {signal.strsignal(-status)}')
        self._lost += 1
        self._losses.warning(
            'Scan process %s %s; %s sessions closed; %s lost so far',
            scanning.pid, how, len(scanning.sessions), self._lost)
        if self._draining:
            return
        if not self.ready:
            raise StartError(how)
        # When it was not the page's fault the page gets another try.
        if scan and (-status in _CRASHES if overdue is None
                     else scan.started == overdue.started):
            self._pass_over(scan, scanning.sessions.get(scan.session))
        if not scanning.ready:
            self._spawn_from = time.monotonic() + _PAUSE
        # At once: the instances are about to connect again.
        self._fill()

    def _pass_over(self, scan: board.Scan, hello: wire.Hello | None) -> None:
        """Have a page answered as unknown from now on.

        QEMU asks for it again as soon as it is connected again, and without
        this the next process would go the same way.
        """
        self._skip[scan.tag] = None
        if len(self._skip) > _SKIP_MAX:
            del self._skip[next(iter(self._skip))]
        for other in self._processes:
            other.tell('skip', tag=scan.tag.hex())
        self._losses.warning(
            'Page %s of instance %s is answered as unknown from now on',
            scan.tag.hex(), hello and hello.instance)


def _table(entries: int, epoch: int) -> tuple[int | None, int | None]:
    """Make the verdict table.

    :param entries: 0 for no table.
    :returns: a file descriptor to write it and one to read it only; None
        and None when there is no table.
    """
    if not entries:
        return None, None
    writable = None
    try:
        writable = table.create(entries, epoch)
        return writable, table.reader(writable)
    except OSError as error:
        if writable is not None:
            os.close(writable)
        LOG.error('There is no verdict table: %s', error.strerror)
        return None, None


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
