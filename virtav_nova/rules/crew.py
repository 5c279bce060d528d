# SPDX-License-Identifier: Apache-2.0
"""Processes apart that take rules of unknown origin to pieces.

Parsers and compilers of rules are written in C, and rules come from
everywhere. So the work is done by processes that have limits, no rights, and
nothing to lose. One that dies is replaced, and what it was at is the result:
one bad rule never costs the others.

A process gets units of work, a line of JSON each, and answers with lines of
JSON: ``begin`` before it works on one unit or several together, a ``result``
for each, and ``end``.
"""

import collections
import collections.abc
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import typing

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.i18n import _

Unit: typing.TypeAlias = dict[str, typing.Any]
Result: typing.TypeAlias = dict[str, typing.Any]

#: Longest line that a process may answer with, in bytes. A rule is sent as
#: it was and as it became, and a byte may take six.
_LINE_MAX = 256 << 20
_READ = 1 << 16
#: Bytes that it may answer with, for each byte that it was given; and more.
_ANSWER_RATIO = 32
_ANSWER_MORE = 64 << 20
#: Time on the clock that a process gets for a second of processor time.
_PATIENCE = 10
_START = 30  # seconds, to begin with
#: Units that a process gets at a time. To start one takes 0.3 s.
_BATCH_BYTES = 2 << 20
_BATCH_UNITS = 512
_WORKERS_MAX = 8
#: Processes in a row that do not get ready, after which there is no hope.
_UNREADY_MAX = 3
_ERRORS_MAX = 2000


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a process may take.

    :ivar memory: address space, in bytes.
    :ivar seconds: processor time for units that it works on together.
    """

    memory: int
    seconds: int


class Crew:
    """Runs units of one kind.

    :param job: name of it, for :mod:`virtav_nova.rules.apart`.
    :param limits: of each process.
    :param settings: plain JSON, for the job.
    :param data: bytes that all processes can read, such as pages.
    :param workers: processes at a time; None for one on each processor.
    :param batch: units that a process gets at a time.
    :ivar notes: why processes are not shut in as they should be.
    """

    def __init__(self, job: str, limits: Limits,
                 settings: Unit | None = None, data: bytes = b'',
                 workers: int | None = None,
                 batch: int = _BATCH_UNITS) -> None:
        self.notes: set[str] = set()
        self._job = job
        self._limits = limits
        self._settings = settings or {}
        self._data = data
        self._workers = workers or min(
            len(os.sched_getaffinity(0)), _WORKERS_MAX)
        self._batch = batch
        self._unready = 0
        self._todo: collections.deque[list[Unit]] = collections.deque()

    def run(self, units: collections.abc.Iterable[Unit]
            ) -> collections.abc.Iterator[tuple[int, list[Result]]]:
        """Work on units.

        :param units: each with an ``id``. All their results are kept apart
            until a unit ends.
        :returns: id and results of each unit, as they end. A unit that a
            process died of has one result with ``died``, the reason.
        :raises RuleError: when processes cannot be had.
        """
        source = _batches(units, self._batch)
        self._todo.clear()
        self._unready = 0
        selector = selectors.DefaultSelector()
        running: set[_Process] = set()
        with tempfile.TemporaryFile() as data:
            data.write(self._data)
            data.flush()
            try:
                while True:
                    while len(running) < self._workers:
                        batch = (self._todo.popleft() if self._todo
                                 else next(source, None))
                        if not batch:
                            break
                        process = _Process(self._job, self._limits,
                                           self._settings, batch, data)
                        running.add(process)
                        selector.register(process.output,
                                          selectors.EVENT_READ, process)
                    if not running:
                        return
                    now = time.monotonic()
                    wait = min(each.deadline for each in running) - now
                    for key, _events in selector.select(max(wait, 0)):
                        yield from key.data.receive()
                    for process in list(running):
                        if time.monotonic() > process.deadline:
                            process.kill()
                        if process.ended:
                            selector.unregister(process.output)
                            running.remove(process)
                            yield from self._bury(process)
            finally:
                selector.close()
                for process in running:
                    process.kill()
                    process.close()

    def _bury(self, process: '_Process'
              ) -> collections.abc.Iterator[tuple[int, list[Result]]]:
        """See what is left of a process's work, and who is to blame."""
        reason = process.close()
        self.notes |= process.notes
        self._unready = 0 if process.ready else self._unready + 1
        if self._unready == _UNREADY_MAX:
            raise exception.RuleError(
                _('the process that tries rules does not start: %s')
                % reason,
                _('see whether [virtav_rules] memory_mib is enough'))
        left = [unit for unit in process.units
                if unit['id'] not in process.done]
        if not left:
            return
        blamed = [unit for unit in left if unit['id'] in process.working]
        rest = [unit for unit in left if unit['id'] not in process.working]
        if not process.ready:
            pass
        elif not blamed:
            # It died between two: not for a unit that it had not seen,
            # unless that happens again.
            first = rest[0]
            if first.get('tried'):
                rest = rest[1:]
                yield first['id'], [{'died': reason}]
            else:
                first['tried'] = True
        elif len(blamed) == 1:
            yield blamed[0]['id'], [{'died': reason}]
        else:
            for unit in blamed:
                self._todo.append([{**unit, 'alone': True}])
        if rest:
            self._todo.append(rest)


class _Process:
    """A process at work on some units."""

    def __init__(self, job: str, limits: Limits, settings: Unit,
                 units: list[Unit], data: typing.BinaryIO) -> None:
        self.units = units
        self.done: set[int] = set()
        self.working: set[int] = set()
        self.ended = False
        self.ready = False
        self.notes: set[str] = set()
        self._limits = limits
        self._killed = ''
        self._results: dict[int, list[Result]] = {}
        self._line = bytearray()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as source:
            source.write(json.dumps(
                {'job': job, 'memory': limits.memory,
                 'seconds': limits.seconds, 'data': data.fileno(),
                 'settings': settings}).encode() + b'\n')
            for unit in units:
                source.write(json.dumps(unit).encode() + b'\n')
            self._left = _ANSWER_RATIO * source.tell() + _ANSWER_MORE
            source.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, '-P', '-m', 'virtav_nova.rules.apart'],
                stdin=source, stdout=subprocess.PIPE, stderr=self._errors,
                pass_fds=[data.fileno()], start_new_session=True,
                env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
        assert self._process.stdout is not None  # noqa: S101
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.deadline = 0.0
        self._wait(_START + limits.seconds)

    def receive(self) -> collections.abc.Iterator[tuple[int, list[Result]]]:
        """:returns: units that have ended."""
        try:
            read = os.read(self.output.fileno(), _READ)
        except BlockingIOError:
            return
        if not read:
            self.ended = True
        *lines, rest = read.split(b'\n')
        for line in lines:
            self._line += line
            message = bytes(self._line)
            self._line.clear()
            try:
                yield from self._take(json.loads(message))
            except (ValueError, KeyError, TypeError, RecursionError):
                # It may not be itself any more.
                self._killed = _('gave answers that make no sense')
                self.kill()
                return
        self._line += rest
        self._left -= len(read)
        if len(self._line) > _LINE_MAX or self._left < 0:
            self._killed = _('gave an answer without end')
            self.kill()

    def _take(self, message: dict[str, typing.Any]
              ) -> collections.abc.Iterator[tuple[int, list[Result]]]:
        self._wait(self._limits.seconds)
        mine = {unit['id'] for unit in self.units} - self.done
        if 'begin' in message:
            self.working = {int(each) for each in message['begin']} & mine
            self._results = {each: [] for each in self.working}
        elif 'result' in message:
            self._results[int(message['id'])].append(dict(message['result']))
        elif 'end' in message:
            self.done |= self.working
            results, self._results = self._results, {}
            self.working = set()
            yield from results.items()
        elif 'ready' in message:
            self.ready = True
        elif 'note' in message:
            self.notes.add(text.printable(str(message['note']), 200))
        else:
            raise ValueError

    def _wait(self, seconds: float) -> None:
        self.deadline = time.monotonic() + _PATIENCE * seconds

    def kill(self) -> None:
        """End the process."""
        self._killed = self._killed or _(
            'takes more than %d s') % (_PATIENCE * self._limits.seconds)
        # It may have no children; who is in its place may.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.ended = True

    def close(self) -> str:
        """Forget the process, which has ended or is about to.

        :returns: why it ended, as it says of the unit it was at.
        """
        self.output.close()
        status = self._process.wait()
        with self._errors:
            end = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, end - _ERRORS_MAX))
            errors = self._errors.read()
        if self._killed:
            return self._killed
        if status == -signal.SIGXCPU:
            return _('takes more than %d s of processor time'
                     ) % self._limits.seconds
        if status == -signal.SIGSYS:
            return _('makes the parser do what only an attacker would')
        if b'MemoryError' in errors or b'bad_alloc' in errors:
            return _('takes more than %d MiB of memory') % (
                self._limits.memory >> 20)
        if status < 0:
            return _('makes the parser crash by signal %d') % -status
        last = errors.decode('utf-8', 'replace').strip().splitlines()
        return text.printable(last[-1] if last else _(
            'ended with status %d') % status, 400)


def _batches(units: collections.abc.Iterable[Unit], most: int
             ) -> collections.abc.Iterator[list[Unit]]:
    batch: list[Unit] = []
    size = 0
    for unit in units:
        batch.append(unit)
        size += sum(len(value) for value in unit.values()
                    if isinstance(value, str))
        if len(batch) >= most or (
                size > _BATCH_BYTES and most == _BATCH_UNITS):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
