# SPDX-License-Identifier: Apache-2.0
"""The alert journal: JSON lines that are only ever appended to."""

import errno
import fcntl
import json
import logging
import os
import stat
import time

from virtav_nova import exception
from virtav_nova.alerts import record
from virtav_nova.i18n import _

LOG = logging.getLogger(__name__)

#: Least time between two fsync, in seconds.
SYNC_PERIOD = 0.1


class Journal:
    """A file of JSON lines, rotated by size.

    Records are with the kernel when :meth:`append` returns, and on the disk
    after the next :meth:`sync`, at most 100 ms later: a crash of the worker
    loses nothing, a crash of the host at most what was written since. When
    the disk takes no more, records are counted and dropped: verdicts do not
    depend on the journal.

    :param path: of the file; its directory is made when missing.
    :param max_bytes: size at which the file becomes ``path.1``.
    :param keep: how many older files stay, at least 1.
    :raises JournalError: when it cannot be opened, or another worker
        writes it.
    """

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._torn = False
        self._dirty = False
        self._last_sync = 0.0
        self._failing = False
        #: Records that could not be written.
        self.lost = 0
        try:
            os.makedirs(os.path.dirname(path), 0o750, exist_ok=True)
            self._open(path)
            self._sync_directory()
        except BlockingIOError as error:
            raise exception.JournalError(
                _('alert journal %s is being written by another worker')
                % path,
                _('stop that worker, or give each its own '
                  '[virtav_worker] state_dir')) from error
        except OSError as error:
            raise exception.JournalError(
                _('alert journal %(path)s: %(error)s') % {
                    'path': path, 'error': error.strerror},
                _('make the directory writable for the worker, or change '
                  '[virtav_worker] state_dir')) from error

    @property
    def failing(self) -> bool:
        """The last record could not be written."""
        return self._failing

    def append(self, entry: record.Record) -> None:
        """Write one record.

        :param entry: of bounded size.
        """
        # ASCII only: json then escapes control characters and whatever
        # else could start a line of its own.
        line = json.dumps(entry, separators=(',', ':')).encode() + b'\n'
        try:
            if self._size + len(line) > self._max_bytes and self._size:
                self._rotate()
            self._write(line)
        except OSError as error:
            self.lost += 1
            if not self._failing:
                LOG.error('Alert journal %s: %s. Records are lost until it '
                          'can be written again.', self._path, error.strerror)
            self._failing = True
        else:
            if self._failing:
                LOG.warning('Alert journal %s can be written again, %s '
                            'records were lost.', self._path, self.lost)
            self._failing = False

    def sync_due(self) -> float | None:
        """Tell when to call :meth:`sync`.

        :returns: on the monotonic clock in seconds; None while all is on
            the disk.
        """
        return self._last_sync + SYNC_PERIOD if self._dirty else None

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._dirty = False
        try:
            os.fsync(self._fd)
        except OSError as error:
            LOG.error('Alert journal %s: fsync: %s', self._path,
                      error.strerror)
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """Bring all to the disk and close the file."""
        if self._dirty:
            self.sync()
        os.close(self._fd)

    def _open(self, path: str) -> None:
        fd = os.open(
            path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, 'not a regular file')
            # Rotation would tear the file apart under a second writer.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The host may have crashed in the middle of a line.
            torn = (status.st_size > 0
                    and os.pread(fd, 1, status.st_size - 1) != b'\n')
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._size, self._torn = fd, status.st_size, torn

    def _rotate(self) -> None:
        self.sync()
        before = self._fd, self._size, self._torn
        # First what can fail for want of room: nothing is moved then.
        fresh = f'{self._path}.0'
        self._open(fresh)
        try:
            self._move(fresh)
        except BaseException:
            # The next record tries again.
            os.close(self._fd)
            self._fd, self._size, self._torn = before
            raise
        os.close(before[0])
        self._sync_directory()

    def _move(self, fresh: str) -> None:
        """Give all files their new names.

        :param fresh: name of the file that is begun.
        """
        # It is away when an attempt before went no further.
        if os.path.lexists(self._path):
            # As far as the first gap, which that attempt may have left.
            last = next((number for number in range(1, self._keep)
                         if not os.path.lexists(f'{self._path}.{number}')),
                        self._keep)
            for number in range(last, 1, -1):
                os.replace(f'{self._path}.{number - 1}',
                           f'{self._path}.{number}')
            os.replace(self._path, f'{self._path}.1')
        os.replace(fresh, self._path)

    def _sync_directory(self) -> None:
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _write(self, line: bytes) -> None:
        if self._torn:
            line = b'\n' + line
        written = os.write(self._fd, line)
        self._size += written
        self._dirty = True
        self._torn = written < len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
