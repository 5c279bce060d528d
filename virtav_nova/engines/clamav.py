# SPDX-License-Identifier: Apache-2.0
"""ClamAV: each page is a stream that clamd scans with its own signatures.

The protocol is that of clamd(8): one session for each process, commands and
answers end with NUL, answers begin with the number of their command.
"""

import collections.abc
import errno
import os
import re
import socket
import struct
import time
import typing

from virtav_nova import exception
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory

#: Bytes of an answer.
_ANSWER_MAX = 4096
_FOUND = re.compile(r'stream: (.+) FOUND')
_SIZE = struct.Struct('>I')
#: A connection that clamd closed for being idle is made again once.
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class ClamdError(Exception):
    """clamd gave no answer, or none that can be understood."""


class _Session:
    """A connection to clamd, over which one command goes after another.

    :param path: of its socket.
    :param timeout: seconds for an answer.
    :raises OSError: when there is no connection.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._timeout = timeout
        self._commands = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._socket.sendall(b'zIDSESSION\0')
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, command: bytes, data: bytes = b'') -> str:
        """Send a command.

        :param command: its name.
        :param data: what follows it.
        :returns: the answer without its number.
        :raises OSError: when the connection broke or time is up.
        :raises ClamdError: when the answer is none.
        """
        self._commands += 1
        end = time.monotonic() + self._timeout
        self._socket.settimeout(self._timeout)
        self._socket.sendall(b'z%s\0%s' % (command, data))
        answer = b''
        while not answer.endswith(b'\0'):
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT,
                                   os.strerror(errno.ETIMEDOUT))
            self._socket.settimeout(left)
            part = self._socket.recv(_ANSWER_MAX + 1 - len(answer))
            if not part:
                raise ConnectionResetError(
                    errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            answer += part
            if len(answer) > _ANSWER_MAX:
                raise ClamdError('answer of more than %d bytes'
                                 % _ANSWER_MAX)
        number, colon, text = answer[:-1].decode(
            'utf-8', 'replace').partition(': ')
        if not colon or number != str(self._commands) or '\0' in text:
            raise ClamdError(f'unexpected answer {answer[:100]!r}')
        return text


class ClamavEngine(base.Engine):
    """Asks clamd, which knows signatures that this worker does not."""

    name = 'clamav'
    version = '1'
    local_socket = True

    def __init__(self, options: base.EngineOptions) -> None:
        self._path = options.clamd_socket
        self._timeout = options.scan_timeout_ms / 1000
        self._session: _Session | None = None
        self._process = 0
        self._release = self.release(options)

    @classmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            options: base.EngineOptions) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.compile`.

        :param files: not used: clamd has signatures of its own.
        """
        return cls(options)

    @classmethod
    def release(cls, options: base.EngineOptions) -> str:
        """See :meth:`virtav_nova.engines.base.Engine.release`.

        :returns: versions of clamd and of its official signatures; it has
            none for others.
        """
        try:
            # It answers late while it loads signatures.
            session = _Session(options.clamd_socket,
                               max(5, options.scan_timeout_ms / 1000))
            try:
                return f'{cls.version} {session.ask(b"VERSION")}'
            finally:
                session.close()
        except (OSError, ClamdError) as error:
            reason = getattr(error, 'strerror', None) or str(error)
            raise exception.EngineError(
                _('clamd does not answer on %(path)s: %(reason)s') % {
                    'path': options.clamd_socket, 'reason': reason},
                _('start clamd, let the worker connect to its LocalSocket, '
                  'and set [virtav_worker] clamd_socket to it')) from error

    def describe(self) -> dict[str, typing.Any]:
        """See :meth:`virtav_nova.engines.base.Engine.describe`."""
        return {
            'rules': None,
            'release': self._release,
            'socket': self._path,
            'cannot': [
                _('use signatures by a hash of a whole file'),
                _('tell the type of a file from one of its pages, so most '
                  'signatures for a type (target) do not apply'),
                _('use signatures for an offset, an entry point, a section '
                  'or an import table'),
                _('unpack archives, documents or packed programs'),
                _('find signatures that lie across more than two pages, or '
                  'whose parts lie on several'),
                _('name more than one signature in a page'),
                _('use the rules of the rule directory'),
                _('tell when signatures change that are not those of '
                  'ClamAV')]}

    def scan(self, data: bytes | memoryview) -> list[base.Match]:
        """See :meth:`virtav_nova.engines.base.Engine.scan`.

        :raises OSError: when clamd cannot be reached or takes too long.
        :raises ClamdError: when it cannot scan.
        """
        if self.progress is not None:
            self.progress(0)
        size = len(data)
        # A chunk of no bytes would be the end, which has to come once.
        chunk = _SIZE.pack(size) + bytes(data) if size else b''
        answer = self._ask(b'INSTREAM', chunk + _SIZE.pack(0))
        if answer == 'stream: OK':
            return []
        found = _FOUND.fullmatch(answer)
        if found is None:
            raise ClamdError(f'clamd says: {answer[:100]!r}')
        return [base.Match(found[1], self.name, [], {}, [])]

    def _ask(self, command: bytes, data: bytes) -> str:
        # A session belongs to one process: forks would share it.
        if self._process != os.getpid():
            self._session = None
            self._process = os.getpid()
        if self._session is not None:
            try:
                return self._session.ask(command, data)
            except OSError as error:
                self._drop()
                if error.errno not in _GONE:
                    raise
            except ClamdError:
                self._drop()
                raise
        self._session = _Session(self._path, self._timeout)
        try:
            return self._session.ask(command, data)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
