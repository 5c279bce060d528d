# SPDX-License-Identifier: Apache-2.0
"""The main process: accepts connections, keeps time, ends in order.

It serves no page itself: that is for the scan processes. Nothing that it
waits for, such as the disk under the journal, keeps a verdict waiting.
"""

import functools
import itertools
import logging
import os
import selectors
import signal
import socket
import time

from oslo_config import cfg

from virtav_nova.alerts import journal
from virtav_nova.i18n import _
from virtav_nova.monitor import wire
from virtav_nova.worker import generation
from virtav_nova.worker import handshake
from virtav_nova.worker import limit
from virtav_nova.worker import listener
from virtav_nova.worker import operation
from virtav_nova.worker import pool
from virtav_nova.worker import process

LOG = logging.getLogger(__name__)

#: Connections that may be silent at a time; the oldest gives way.
_HANDSHAKES_MAX = 128
#: Connections accepted before others get their turn.
_ACCEPTS_MAX = 16
#: Pause in seconds when there is no room for another open file.
_PAUSE = 1.0
#: Seconds after which a scan process that does not drain is killed.
_GRACE = 0.5


class Server:
    """The worker.

    :param options: the group ``virtav_worker``.
    :param listening: where QEMU connects to; closed when draining.
    :param alerts: the journal.
    :param admission: who may connect.
    :param faces: where it is asked how it is; closed when draining.
    :param confinement: of this process.
    :ivar pool: the rule sets.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 listening: listener.Listener, alerts: journal.Journal,
                 admission: handshake.Admission, faces: operation.Faces,
                 confinement: operation.Confinement) -> None:
        self._options = options
        self._listener = listening
        self._journal = alerts
        self._admission = admission
        self._selector = selectors.DefaultSelector()
        self.pool = pool.Pool(options, alerts, self._selector)
        self._faces = faces
        self._operation = operation.Operation(
            options, faces, confinement, self.pool, alerts, self._selector,
            self.reload)
        self._handshakes: dict[socket.socket, handshake.Handshake] = {}
        self._numbers = itertools.count(1)
        self._listening = False
        self._listen_from = 0.0
        self._stopping = False
        self._reload = False
        self._drain_until: float | None = None
        self._refusals = limit.LogLimit(LOG, 10, 60)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        :raises ConfigurationError: when the first rule set does not load.
        """
        woken, wake = socket.socketpair()
        with woken, wake:
            woken.setblocking(False)
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            for number in process.SIGNALS:
                signal.signal(number, self._signalled)
            self._selector.register(
                woken, selectors.EVENT_READ, lambda: woken.recv(4096))
            try:
                self.pool.load(_('first load'))
                while self._drain_until is None or not self.pool.ended:
                    self._keep()
                    for key, _events in self._selector.select(
                            self._patience()):
                        key.data()
            finally:
                signal.set_wakeup_fd(-1)
                self.pool.kill()
        LOG.info('Stopped')

    def reload(self, why: str) -> None:
        """Load the rules anew; see :attr:`pool.Pool.loading` for the end.

        :param why: for people.
        """
        self.pool.load(why)

    def _signalled(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._reload = True
            return
        if self._stopping:
            # All other processes die with this one, the kernel sees to it.
            os._exit(1)
        self._stopping = True

    def _patience(self) -> float | None:
        """:returns: seconds until :meth:`_keep` has something to do."""
        times = [waiting.deadline for waiting in self._handshakes.values()]
        for moment in (self._drain_until, self.pool.due(),
                       self._journal.sync_due(), self._operation.due()):
            if moment is not None:
                times.append(moment)
        if (self._drain_until is None and self.pool.serving
                and not self._listening):
            times.append(self._listen_from)
        if not times:
            return None
        return max(min(times) - time.monotonic(), 0)

    def _keep(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if self._reload:
            self._reload = False
            self.reload('SIGHUP')
        self.pool.keep()
        if self._drain_until is None:
            if self._stopping:
                self._drain(now)
            elif self.pool.serving and not self._listening:
                self._listen(now)
        elif self._drain_until <= now:
            LOG.warning('Draining took too long')
            self.pool.kill()
        for waiting in list(self._handshakes.values()):
            if waiting.deadline <= now:
                self._refuse(waiting, handshake.Refused(
                    wire.Refusal.PROTOCOL, 'no HELLO came in time'))
        due = self._journal.sync_due()
        if due is not None and due <= now:
            self._journal.sync()
        self._operation.keep(now, self._listening)

    def _drain(self, now: float) -> None:
        LOG.info('Stopping, %s sessions are open', self.pool.sessions)
        seconds = self._options.drain_timeout
        self._drain_until = now + seconds + _GRACE
        if self._listening:
            self._selector.unregister(self._listener.socket)
        self._listener.close()
        self._operation.stopping()
        self._faces.close()
        for waiting in list(self._handshakes.values()):
            self._drop(waiting)
        self.pool.drain(seconds)

    def _listen(self, now: float) -> None:
        if now >= self._listen_from:
            LOG.info('Listening on %s', self._options.socket)
            self._selector.register(
                self._listener.socket, selectors.EVENT_READ, self._accept)
            self._listening = True

    def _accept(self) -> None:
        for _turn in range(_ACCEPTS_MAX):
            try:
                connection, _address = self._listener.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Until something is freed, accept would fail at once again.
                LOG.error('Cannot accept connections: %s', error.strerror)
                self._selector.unregister(self._listener.socket)
                self._listening = False
                self._listen_from = time.monotonic() + _PAUSE
                return
            connection.setblocking(False)
            if len(self._handshakes) >= _HANDSHAKES_MAX:
                self._refuse(
                    next(iter(self._handshakes.values())), handshake.Refused(
                        wire.Refusal.OVERLOAD, 'too many silent connections'))
            waiting = handshake.Handshake(
                connection,
                time.monotonic() + self._options.handshake_timeout,
                self._admission)
            self._handshakes[connection] = waiting
            self._selector.register(
                connection, selectors.EVENT_READ,
                functools.partial(self._greet, waiting))
            try:
                self._admission.check_peer(waiting.peer)
            except handshake.Refused as refused:
                self._refuse(waiting, refused)

    def _greet(self, waiting: handshake.Handshake) -> None:
        if waiting.connection not in self._handshakes:
            return  # Gave way to another one a moment ago.
        try:
            hello = waiting.hello()
            if hello is not None:
                self._open(waiting, hello)
        except handshake.Refused as refused:
            self._refuse(waiting, refused)
        except OSError as error:
            LOG.debug('Process %s went away before it said hello: %s',
                      waiting.peer.pid, error)
            self._drop(waiting)

    def _open(self, waiting: handshake.Handshake, hello: wire.Hello) -> None:
        """Make a session of a connection.

        :param hello: without its token.
        :raises Refused: when there is no room for it.
        :raises OSError: when the peer is gone.
        """
        if self.pool.sessions >= self._options.max_sessions:
            raise handshake.Refused(
                wire.Refusal.OVERLOAD, 'as many sessions as are allowed')
        number = next(self._numbers)
        try:
            opened, ring_fd = self.pool.open(
                number, hello, waiting.connection, waiting.project or None)
        except generation.OverloadError as error:
            raise handshake.Refused(
                wire.Refusal.OVERLOAD, str(error)) from error
        LOG.info('Session %s of instance %s opened by process %s of user %s, '
                 'group %s; policy %s, on match %s; %s; scan process %s of '
                 'epoch %s',
                 number, hello.instance, waiting.peer.pid, waiting.peer.uid,
                 waiting.peer.gid, hello.policy.name.lower(),
                 hello.on_match.name.lower(),
                 'socket' if ring_fd is None else 'ring', opened.slot,
                 opened.epoch)
        fds = []
        entries = slots = 0
        scope = opened.scope
        if hello.flags & wire.SHARED and scope.readable is not None:
            fds.append(scope.readable)
            entries = self._options.table_entries
        if ring_fd is not None:
            fds.append(ring_fd)
            slots = self._options.ring_slots
        try:
            socket.send_fds(waiting.connection, [wire.Welcome(
                wire.VERSION, self._options.max_in_flight, opened.digest,
                scope.key, opened.epoch, entries, slots).pack()], fds)
        finally:
            if ring_fd is not None:
                os.close(ring_fd)
        self._drop(waiting)

    def _refuse(self, waiting: handshake.Handshake,
                refused: handshake.Refused) -> None:
        self._refusals.warning(
            'Connection of process %s of user %s refused: %s',
            waiting.peer.pid, waiting.peer.uid, refused.detail)
        waiting.tell(refused)
        self._drop(waiting)

    def _drop(self, waiting: handshake.Handshake) -> None:
        """Be done with a connection on this side."""
        del self._handshakes[waiting.connection]
        self._selector.unregister(waiting.connection)
        waiting.connection.close()
