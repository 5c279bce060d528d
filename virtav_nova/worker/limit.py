# SPDX-License-Identifier: Apache-2.0
"""Log lines that a guest or a peer can cause, bounded in number."""

import logging
import time


class LogLimit:
    """Lets some lines through in each period and counts the others.

    :param log: the logger.
    :param burst: lines let through in a period.
    :param period: in seconds.
    """

    def __init__(self, log: logging.Logger, burst: int, period: float
                 ) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._begin = time.monotonic()
        self._lines = 0

    def warning(self, message: str, *args: object) -> None:
        """Log a warning, unless there were too many.

        :param message: with ``%s`` for each argument.
        :param args: fit to be shown; see
            :func:`virtav_nova.text.printable`.
        """
        now = time.monotonic()
        if now - self._begin >= self._period:
            if self._lines > self._burst:
                self._log.warning(
                    '%s more lines like the next one were left out in %.0f s',
                    self._lines - self._burst, now - self._begin)
            self._begin, self._lines = now, 0
        self._lines += 1
        if self._lines <= self._burst:
            self._log.warning(message, *args)
