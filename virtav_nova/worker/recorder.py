# SPDX-License-Identifier: Apache-2.0
"""``virtav-scan-worker record``: writes down what a guest fetches.

It takes the worker's place for one instance: it answers each page as clean
and gives QEMU no verdict table, so it sees every fetch. Nothing is scanned
meanwhile. To record beside a worker that serves was decided against: most
fetches are answered from its table and never reach it, and what handles the
memory of every guest would have a tap.
"""

import argparse
import contextlib
import importlib.metadata
import os
import select
import signal
import socket
import sys
import time
import types
import typing
import uuid

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire
from virtav_nova.worker import listener

_PROG = 'virtav-scan-worker record'
#: Requests that may be unanswered.
_IN_FLIGHT = 64
#: Seconds within which a connection has to say who it is.
_GREETING = 5.0
#: Longest time in seconds that something recorded is not in the file.
_FLUSH = 1.0
#: Rules that are no rules: nothing matches.
_DIGEST = bytes(32)


class _Gone(Exception):
    """The session that is recorded has ended."""


class Recorder:
    """Records the first session of an instance.

    :param listening: where QEMU connects to.
    :param file: to write to.
    :param instance: its UUID; None for whichever comes first.
    :ivar writer: of the recording, None as long as nobody came.
    """

    def __init__(self, listening: listener.Listener, file: typing.BinaryIO,
                 instance: uuid.UUID | None) -> None:
        self._listener = listening
        self._file = file
        self._instance = instance
        self._key = os.urandom(wire.KEY_SIZE)
        self._tagger = wire.Tagger(self._key)
        self._stopping = False
        self.writer: recording.Writer | None = None

    def stop(self, _number: int = 0, _frame: types.FrameType | None = None
             ) -> None:
        """Have :meth:`run` return soon; a signal handler."""
        self._stopping = True

    def run(self) -> str:
        """Record until the session ends, or it is told to stop.

        :returns: why it ended.
        :raises OSError: when the recording cannot be written.
        """
        poll = select.poll()
        poll.register(self._listener.socket, select.POLLIN)
        while not self._stopping:
            if not poll.poll(200):
                continue
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                connection, _address = self._listener.socket.accept()
                with connection:
                    hello = self._greeted(connection)
                    if hello is not None:
                        return self._record(connection, hello)
        return _('told to stop')

    def _greeted(self, connection: socket.socket) -> wire.Hello | None:
        """:returns: HELLO of the instance that is to be recorded."""
        decoder = wire.Decoder([wire.Hello])
        until = time.monotonic() + _GREETING
        try:
            while (frame := decoder.frame()) is None:
                connection.settimeout(max(until - time.monotonic(), 0.001))
                count = connection.recv_into(decoder.room())
                if not count:
                    return None
                decoder.filled(count)
        except wire.ProtocolError as error:
            _refuse(connection, wire.Refusal.PROTOCOL, str(error))
            return None
        except OSError:
            return None
        assert isinstance(frame, wire.Hello)  # noqa: S101
        if not frame.version_min <= wire.VERSION <= frame.version_max:
            _refuse(connection, wire.Refusal.VERSION, 'another version')
        elif frame.page_size != wire.PAGE_SIZE:
            _refuse(connection, wire.Refusal.PAGE_SIZE, 'another page size')
        elif self._instance not in (None, frame.instance):
            _refuse(connection, wire.Refusal.OVERLOAD,
                    'another instance is being recorded here')
        else:
            return frame
        return None

    def _record(self, connection: socket.socket, hello: wire.Hello) -> str:
        self.writer = writer = recording.Writer(
            self._file, recording.Head.of(hello, _program()))
        decoder = wire.Decoder([wire.Request], _IN_FLIGHT + 1)
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._listener.socket, select.POLLIN)
        flush_from = time.monotonic() + _FLUSH
        try:
            connection.settimeout(_GREETING)
            connection.sendall(wire.Welcome(
                wire.VERSION, _IN_FLIGHT, _DIGEST, self._key, 1).pack())
            while not self._stopping:
                for fd, _events in poll.poll(200):
                    if fd == connection.fileno():
                        self._receive(connection, decoder)
                    else:
                        self._turn_away()
                if time.monotonic() >= flush_from:
                    writer.flush()
                    flush_from = time.monotonic() + _FLUSH
            reason = _('told to stop')
        except _Gone:
            reason = _('the session has ended')
        except recording.FullError:
            reason = _('a recording can hold no more')
        except wire.ProtocolError as error:
            reason = _('the peer broke the protocol: %s') % error
        writer.close()
        return reason

    def _receive(self, connection: socket.socket, decoder: wire.Decoder
                 ) -> None:
        assert self.writer is not None  # noqa: S101
        try:
            count = connection.recv_into(decoder.room())
        except OSError:
            count = 0
        if not count:
            raise _Gone
        decoder.filled(count)
        answers = []
        while isinstance(request := decoder.frame(), wire.Request):
            tag = self._tagger.tag(request.page)
            if tag != request.tag:
                raise wire.ProtocolError('the tag does not fit the page')
            self.writer.add(request)
            answers.append(wire.Verdict(
                request.id, request.generation, tag, wire.Result.CLEAN,
                '').pack())
        try:
            connection.sendall(b''.join(answers))
        except OSError as error:
            raise _Gone from error

    def _turn_away(self) -> None:
        with contextlib.suppress(OSError):
            other, _address = self._listener.socket.accept()
            with other:
                _refuse(other, wire.Refusal.OVERLOAD,
                        'another instance is being recorded here')


def main(argv: list[str]) -> int:
    """Record.

    :param argv: arguments after ``record``.
    :returns: exit status: 0 when there is a recording, 1 when nobody came,
        2 when something has to be mended first.
    """
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except exception.ConfigurationError as error:
        print(f'{_PROG}: error: {error}\n  way out: {error.way_out}',
              file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    listening = listener.Listener(
        options.socket, options.group, 0o660 if options.group else 0o600)
    with contextlib.closing(listening), _open(options.file) as file:
        recorder = Recorder(listening, file, options.instance)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, recorder.stop)
        print(_('Recording at %s. NOTHING IS SCANNED here meanwhile.')
              % options.socket, file=sys.stderr, flush=True)
        try:
            reason = recorder.run()
        except OSError as error:
            raise exception.RecordingError(
                _('%(path)s: %(error)s') % {
                    'path': options.file, 'error': error.strerror},
                _('make room, or name another file')) from error
        size = file.tell()
    writer = recorder.writer
    if writer is None:
        os.unlink(options.file)
        print(_('Nobody came.'), file=sys.stderr)
        return 1
    print(_('%(reason)s: %(fetches)d fetches of %(pages)d different pages, '
            '%(size).1f MiB') % {
                'reason': reason[:1].upper() + reason[1:],
                'fetches': writer.fetches, 'pages': writer.pages,
                'size': size / (1 << 20)}, file=sys.stderr)
    return 0


def _open(path: str) -> typing.BinaryIO:
    """Make the file, for nobody else to read: it is a guest's memory.

    :raises RecordingError: when it is there, or cannot be made.
    """
    try:
        return os.fdopen(os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb')
    except OSError as error:
        raise exception.RecordingError(
            _('%(path)s: %(error)s') % {
                'path': path, 'error': error.strerror},
            _('name a file that is not there yet, in a directory that may '
              'be written to')) from error


def _refuse(connection: socket.socket, code: wire.Refusal, reason: str
            ) -> None:
    with contextlib.suppress(OSError):
        connection.send(wire.Refused(code, reason).pack())


def _program() -> str:
    return 'virtav-nova %s' % importlib.metadata.version('virtav-nova')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=_(
            'Take the place of the scan worker for one instance, answer '
            'every page as clean, and write down the pages that it fetches. '
            'Nothing is scanned meanwhile. Ends with the session, or by '
            'SIGINT or SIGTERM. virtav-replay plays it. The file holds '
            "what was in the guest's memory: keep it as such."))
    parser.add_argument('file', metavar='FILE', help=_('to be made'))
    parser.add_argument(
        '--socket', metavar='PATH', required=True,
        help=_('to listen on; QEMU has to be started with it, or a worker '
               'that listens there has to be stopped first'))
    parser.add_argument(
        '--instance', metavar='UUID', type=uuid.UUID,
        help=_('refuse others (default: record the one that comes first)'))
    parser.add_argument(
        '--group', metavar='NAME',
        help=_('group that the socket is given to, such as that of QEMU'))
    return parser
