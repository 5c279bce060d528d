# SPDX-License-Identifier: Apache-2.0
"""The worker as seen by who runs it: status, metrics, service manager."""

import collections.abc
import contextlib
import importlib.metadata
import logging
import os
import selectors
import socket
import time
import typing

from oslo_config import cfg

from virtav_nova.alerts import journal
from virtav_nova.i18n import _
from virtav_nova.monitor import instance
from virtav_nova.worker import endpoint
from virtav_nova.worker import generation
from virtav_nova.worker import listener
from virtav_nova.worker import metrics
from virtav_nova.worker import notify
from virtav_nova.worker import pool
from virtav_nova.worker import privileges
from virtav_nova.worker import process
from virtav_nova.worker import status

LOG = logging.getLogger(__name__)

#: Seconds that an instance counts as over its budget after it was.
_SPENT = 60.0


class Faces:
    """What is opened before privileges are given up.

    :param options: the group ``virtav_worker``.
    :param owner: user and group that get the sockets; None for the own.
    :raises SocketError: when a socket cannot be opened.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 owner: tuple[int, int] | None) -> None:
        self.status: listener.Listener | None = None
        self.metrics: listener.Listener | socket.socket | None = None
        self.notifier = notify.Notifier(os.environ)
        try:
            if options.status_socket:
                self.status = listener.Listener(
                    options.status_socket, None, 0o660, owner,
                    'status_socket')
            if options.metrics:
                self.metrics = metrics.listen(options.metrics, owner)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all of it."""
        for one in (self.status, self.metrics, self.notifier):
            if one is not None:
                one.close()


class Confinement(typing.NamedTuple):
    """How well the main process is shut in.

    :param user: that it runs as.
    :param capabilities: whether it has any.
    :param no_new_privileges: whether programs get no more than it has.
    :param network: ``none`` for one that leads nowhere, ``host``.
    :param missing: what could not be had, for people.
    """

    user: str
    capabilities: bool
    no_new_privileges: bool
    network: str
    missing: tuple[str, ...]


def confine(who: privileges.Identity | None) -> Confinement:
    """Give up what is not needed any more.

    :param who: to become; None to stay.
    :raises PrivilegeError: when that cannot be.
    """
    missing = []
    if who is None:
        reason: str | None = _('not started as root')
    else:
        reason = privileges.leave_network()
        privileges.drop(who)
    privileges.lock()
    network = privileges.network()
    if network != 'none' and reason:
        missing.append(_('a network of its own: %s') % reason)
        LOG.info('Scan processes are in the network of the host: %s. They '
                 'can make no socket.', reason)
    state = privileges.state()
    return Confinement(state.user, state.capabilities != 0,
                       state.no_new_privileges, network, tuple(missing))


class Operation:
    """Answers who asks how the worker is, and tells the service manager.

    :param options: the group ``virtav_worker``.
    :param faces: where they ask; stays the caller's.
    :param confinement: of this process.
    :param rules: the rule sets.
    :param alerts: the journal.
    :param selector: of the main loop; calls what is registered with it.
    :param reload: has the rules loaded anew; is told why.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr, faces: Faces,
                 confinement: Confinement, rules: pool.Pool,
                 alerts: journal.Journal, selector: selectors.BaseSelector,
                 reload: collections.abc.Callable[[str], None]) -> None:
        self._options = options
        self._confinement = confinement
        self._pool = rules
        self._journal = alerts
        self._reload = reload
        self._notifier = faces.notifier
        self._begin = time.monotonic()
        self._version = importlib.metadata.version('virtav-nova')
        #: By epoch; also those that are no more, until they were counted.
        self._seen: dict[int, generation.Generation] = {}
        self._lost = 0
        self._tally = status.Tally()
        self._recent = status.Recent(self._tally.sample)
        #: The service manager was told that the worker serves.
        self._ready = False
        self._loading = False
        self._endpoints = []
        if faces.status is not None:
            self._endpoints.append(endpoint.Endpoint(
                faces.status.socket, selector,
                status.Protocol(self.report, self._asked_to_reload).answer))
        if faces.metrics is not None:
            self._endpoints.append(endpoint.Endpoint(
                metrics.opened(faces.metrics), selector,
                metrics.Page(metrics.Collector(
                    self.report, self._tally.sample)).answer))

    def due(self) -> float | None:
        """Tell when to call :meth:`keep` at the latest.

        :returns: on the monotonic clock in seconds.
        """
        return min((moment for moment in (
            self._recent.due(), self._notifier.due(),
            *(one.due() for one in self._endpoints)) if moment is not None),
            default=None)

    def keep(self, now: float, listening: bool) -> None:
        """Do what is due.

        :param now: on the monotonic clock in seconds.
        :param listening: whether QEMU can connect.
        """
        self._count()
        self._recent.keep(now)
        for one in self._endpoints:
            one.keep(now)
        self._notifier.keep()
        loading = self._pool.coming is not None
        if listening and not self._ready:
            self._ready = True
            self._notifier.ready(self._summary())
        elif self._ready and loading != self._loading:
            if loading:
                self._notifier.reloading()
            else:
                self._notifier.ready(self._summary())
        self._loading = loading

    def stopping(self) -> None:
        """Tell that the worker drains, and answer nobody any more."""
        self._notifier.stopping()
        for one in self._endpoints:
            one.close()
        self._endpoints.clear()

    def _summary(self) -> str:
        problems = self._problems(self._recent.report())
        return problems[0] if problems else _('Serving')

    def _asked_to_reload(self) -> status.Report:
        self._reload('virtav-status')
        self._count()
        return {'reload': self._reload_state()}

    def _count(self) -> None:
        """Go on counting where rule sets came or went."""
        present = {one.epoch: one for one in self._pool.generations}
        for epoch in self._seen.keys() - present.keys():
            self._lost += self._seen.pop(epoch).lost
            self._tally.leave(epoch)
        for epoch in present.keys() - self._seen.keys():
            self._seen[epoch] = present[epoch]
            self._tally.watch(epoch, present[epoch].boards)

    def report(self) -> status.Report:
        """Tell how the worker is.

        :returns: a JSON object; see ``doc/source/admin/status.rst``.
        """
        self._count()
        recent = self._recent.report()
        problems = self._problems(recent)
        current = self._pool.current
        scanning = [(one, each) for one in self._pool.generations
                    for each in one.processes if each is not None]
        instances = [
            self._instance(one, each, client) for one, each in scanning
            for client in each.sessions.values()]
        told = status.worst_first(instances)
        return {
            'format': status.FORMAT,
            'health': 'degraded' if problems else 'ok',
            'problems': problems,
            'version': self._version,
            'pid': os.getpid(),
            'uptime_s': round(time.monotonic() - self._begin, 1),
            'engine': current.engine if current else '',
            'digest': current.digest.hex() if current else '',
            'epoch': current.epoch if current else 0,
            'rules': current.description['rules'] if current else 0,
            'description': current.description if current else {},
            'quarantine': self._pool.quarantine.entries,
            'reload': self._reload_state(),
            'sessions': len(instances),
            'sessions_max': self._options.max_sessions,
            'over_budget': sum(one['over_budget'] for one in instances),
            'absent': self._absent({one['instance'] for one in instances}),
            'instances': told,
            'queue': sum(each.board.waiting() for _one, each in scanning),
            'processes': [{
                'slot': each.slot, 'pid': each.pid, 'epoch': one.epoch,
                'ready': each.ready, 'sessions': len(each.sessions),
                'queue': each.board.waiting(),
                'scanning_ms': _scanning(each),
            } for one, each in scanning],
            'processes_wanted': len(current.processes) if current else 0,
            'processes_lost': self._lost + sum(
                one.lost for one in self._pool.generations),
            'records_lost': self._journal.lost,
            'confinement': self._confined(current),
            **recent,
        }

    def _confined(self, current: generation.Generation | None
                  ) -> status.Report:
        missing = list(self._confinement.missing)
        if current is not None and not current.seccomp:
            missing.append(f'seccomp: {current.unconfined}')
        return {
            **self._confinement._asdict(),
            'seccomp': current is not None and current.seccomp,
            'missing': missing,
        }

    def _instance(self, of: generation.Generation,
                  scanning: process.ScanProcess, client: process.Client
                  ) -> status.Report:
        now = time.monotonic()
        spent = scanning.spent.get(client.number)
        over_budget = spent is not None and now - spent < _SPENT
        problems = []
        if over_budget:
            problems.append(_('over its budget'))
        if of is not self._pool.current:
            problems.append(_('under rules of before'))
        return {
            'instance': str(client.instance),
            'project': client.project,
            'session': client.number,
            'epoch': of.epoch,
            'digest': of.digest.hex(),
            'since_s': round(now - client.opened, 1),
            'transport': 'ring' if client.ring else 'socket',
            'slot': scanning.slot,
            'over_budget': over_budget,
            'problems': problems,
        }

    def _problems(self, recent: status.Report) -> list[str]:
        """:returns: what an operator has to see to."""
        found = []
        current, loading = self._pool.current, self._pool.loading
        if current is None:
            found.append(_('no rules are in force'))
        else:
            ready = sum(each is not None and each.ready
                        for each in current.processes)
            if ready < len(current.processes):
                found.append(_('%(ready)d of %(wanted)d scan processes '
                               'serve') % {
                    'ready': ready, 'wanted': len(current.processes)})
            if not current.seccomp:
                found.append(_('scan processes are not shut in by seccomp'))
        if loading is not None and loading.state == 'failed':
            found.append(_('the rules were not loaded: %s') % loading.error)
        if self._journal.failing:
            found.append(_('alert records are being lost, %d so far')
                         % self._journal.lost)
        if self._pool.quarantine.entries:
            found.append(_('%d rules are in quarantine')
                         % len(self._pool.quarantine.entries))
        if recent['rates']['unknown']:
            found.append(_('pages that could not be scanned: %s a second')
                         % recent['rates']['unknown'])
        if self._options.require_token:
            try:
                os.stat(self._options.instances_dir)
            except OSError as error:
                found.append(_('no instance can connect: %(path)s: '
                               '%(error)s') % {
                    'path': self._options.instances_dir,
                    'error': error.strerror})
        return found

    def _reload_state(self) -> status.Report:
        loading = self._pool.loading
        if self._pool.coming is not None:
            state = 'loading'
        elif self._pool.waits:
            state = 'waiting'
        elif self._pool.old is not None:
            state = 'moving'
        else:
            state = 'idle'
        return {
            'state': state,
            'outcome': loading and loading.state,
            'time': loading and loading.time,
            'why': loading and loading.why,
            'digest': loading and loading.digest,
            'error': (loading.error if loading
                      and loading.state == 'failed' else None),
        }

    def _absent(self, present: set[str]) -> int:
        """:returns: how many are registered and not connected."""
        with contextlib.suppress(OSError):
            return sum(
                str(known) not in present for known in
                instance.names(self._options.instances_dir))
        return 0


def _scanning(of: process.ScanProcess) -> float | None:
    scan = of.board.scan()
    if scan is None:
        return None
    return round(max(time.monotonic_ns() - scan.started, 0) / 1e6, 3)
