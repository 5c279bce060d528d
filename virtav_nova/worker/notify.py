# SPDX-License-Identifier: Apache-2.0
"""Telling systemd, or what stands for it, how the worker is.

The protocol of sd_notify(3): datagrams of ``NAME=value`` lines to the socket
that the environment names. Where it names none, nothing is told.
"""

import contextlib
import logging
import os
import socket
import time
import typing

LOG = logging.getLogger(__name__)

#: Longest text for people, in characters.
_STATUS_MAX = 256


class Notifier:
    """Speaks to the service manager.

    The socket is connected at once: later the worker may be in another
    network, where a name that is no path leads nowhere.

    :param environ: of the process; what is read is taken out, so that no
        child speaks for the worker.
    """

    def __init__(self, environ: typing.MutableMapping[str, str]) -> None:
        self._socket: socket.socket | None = None
        self._period = 0.0
        self._next = 0.0
        self._status = ''
        path = environ.pop('NOTIFY_SOCKET', '')
        period = environ.pop('WATCHDOG_USEC', '')
        watched = environ.pop('WATCHDOG_PID', '')
        if not path:
            return
        if path.startswith('@'):
            path = '\0' + path[1:]
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(path)
        except OSError as error:
            LOG.warning('The service manager does not listen on %s: %s',
                        path.replace('\0', '@'), error.strerror)
            self.close()
            return
        if period.isdecimal() and watched in ('', str(os.getpid())):
            # Twice in the time that it waits, as systemd advises.
            self._period = int(period) / 2e6

    def ready(self, status: str) -> None:
        """Tell that the worker serves.

        :param status: for people.
        """
        self._tell('READY=1', self._line(status))
        self.keep()

    def reloading(self) -> None:
        """Tell that other rules are being loaded; :meth:`ready` ends it."""
        self._tell('RELOADING=1',
                   f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')

    def stopping(self) -> None:
        """Tell that the worker drains."""
        self._tell('STOPPING=1', self._line('Stopping'))

    def status(self, text: str) -> None:
        """Tell how the worker is, if that is news.

        :param text: for people.
        """
        if text != self._status:
            self._tell(self._line(text))

    def due(self) -> float | None:
        """Tell when to call :meth:`keep` at the latest.

        :returns: on the monotonic clock in seconds; None for never.
        """
        return self._next if self._period else None

    def keep(self) -> None:
        """Tell that the worker is alive, when that is due."""
        now = time.monotonic()
        if self._period and now >= self._next:
            self._next = now + self._period
            self._tell('WATCHDOG=1')

    def close(self) -> None:
        """Close the socket. May be called again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._period = 0.0

    def _line(self, status: str) -> str:
        self._status = status
        # A line's end would begin another assignment.
        return 'STATUS=' + ' '.join(status.split())[:_STATUS_MAX]

    def _tell(self, *assignments: str) -> None:
        if self._socket is not None:
            # Who does not listen now is not waited for.
            with contextlib.suppress(OSError):
                self._socket.send('\n'.join(assignments).encode())
