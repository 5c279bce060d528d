# SPDX-License-Identifier: Apache-2.0
"""What the worker tells of itself, and how it is asked.

On a UNIX socket: one line with a JSON object, ``{"ask": "status"}`` or
``{"ask": "reload"}``, is answered by one line with a JSON object, and the
connection is closed. An answer with ``error`` says what was wrong with the
question.
"""

import collections
import collections.abc
import json
import socket
import time
import typing

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.i18n import _
from virtav_nova.worker import board

#: A JSON object.
Report: typing.TypeAlias = dict[str, typing.Any]
#: Of the answer; grows when a field is taken away or means something else.
FORMAT = 1
#: Instances that an answer tells of one by one, those with problems first.
INSTANCES_MAX = 1000
#: Longest answer that is taken, in bytes.
ANSWER_MAX = 16 << 20

#: Seconds between two samples, and how many are kept: a minute.
SAMPLE_PERIOD = 10.0
_SAMPLES = 7


class Sample(typing.NamedTuple):
    """What was counted up to a moment.

    :param time: on the monotonic clock in seconds.
    :param counters: by name, see :class:`board.Counter`.
    :param service: histogram by :func:`board.bucket`.
    :param scans: the same for scans.
    """

    time: float
    counters: dict[str, int]
    service: list[int]
    scans: list[int]


class Tally:
    """Adds up what scan processes count, also those that are gone.

    So a sum never gets less: not when a process is replaced, whose slot goes
    on to the next, and not when its rule set is.
    """

    def __init__(self) -> None:
        self._past = self._add([])
        self._boards: dict[int, collections.abc.Sequence[board.Board]] = {}

    def watch(self, number: int,
              boards: collections.abc.Sequence[board.Board]) -> None:
        """Count these too.

        :param number: that they are known by.
        :param boards: of a rule set.
        """
        self._boards[number] = boards

    def leave(self, number: int) -> None:
        """Count no further what nobody changes any more.

        :param number: see :meth:`watch`; may be not known.
        """
        boards = self._boards.pop(number, None)
        if boards is not None:
            self._past = self._add(boards, self._past)

    def sample(self) -> Sample:
        """:returns: what was counted by now."""
        return self._add([one for boards in self._boards.values()
                          for one in boards], self._past)

    @staticmethod
    def _add(boards: collections.abc.Sequence[board.Board],
             past: Sample | None = None) -> Sample:
        counters = board.totals(boards)
        service = [one.service for one in boards]
        scans = [one.scans for one in boards]
        if past is None:
            return Sample(time.monotonic(), counters, board.merged(service),
                          board.merged(scans))
        return Sample(
            time.monotonic(),
            {name: count + past.counters[name]
             for name, count in counters.items()},
            board.merged([*service, past.service]),
            board.merged([*scans, past.scans]))


class Recent:
    """What happened of late: rates and times over the last minute.

    :param take: gives a sample.
    """

    def __init__(self, take: collections.abc.Callable[[], Sample]) -> None:
        self._take = take
        self._samples = collections.deque([take()], _SAMPLES)

    def due(self) -> float:
        """:returns: when to call :meth:`keep`, on the monotonic clock."""
        return self._samples[-1].time + SAMPLE_PERIOD

    def keep(self, now: float) -> None:
        """Take a sample when it is time for one.

        :param now: on the monotonic clock in seconds.
        """
        if now >= self.due():
            self._samples.append(self._take())

    def report(self) -> Report:
        """Tell it.

        :returns: ``counters`` since the start, ``rates`` a second, and
            ``service_us`` and ``scan_us``, each with ``p50`` and ``p99``
            (None where nothing was measured).
        """
        now, before = self._take(), self._samples[0]
        period = max(now.time - before.time, 1e-3)

        def rate(*names: str) -> float:
            return round(sum(now.counters[name] - before.counters[name]
                             for name in names) / period, 1)

        return {
            'counters': now.counters,
            'period_s': round(period, 1),
            'rates': {
                'requests': rate('clean', 'match', 'unknown'),
                'scans': rate('scans'),
                'matches': rate('match'),
                'unknown': rate('unknown'),
            },
            'service_us': _times(now.service, before.service),
            'scan_us': _times(now.scans, before.scans),
        }


class Protocol:
    """Answers questions; see the module.

    :param report: gives the status.
    :param reload: begins to load the rules anew; gives what to answer.
    """

    def __init__(self, report: collections.abc.Callable[[], Report],
                 reload: collections.abc.Callable[[], Report]) -> None:
        self._answers = {'status': report, 'reload': reload}

    def answer(self, received: bytes) -> bytes | None:
        """Answer a question.

        :param received: what came by now.
        :returns: None when the line is not complete.
        """
        line, end, _rest = received.partition(b'\n')
        if not end:
            return None
        try:
            question = json.loads(line)
            wanted = self._answers[question['ask']]
        except (ValueError, TypeError, KeyError, RecursionError):
            return _line({'error': 'ask for one of: '
                          + ', '.join(sorted(self._answers))})
        return _line(wanted())


def ask(path: str, question: str, patience: float = 10) -> Report:
    """Ask a worker.

    :param path: of its status socket.
    :param question: ``status`` or ``reload``.
    :param patience: in seconds.
    :returns: the answer.
    :raises StatusError: when there is none.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(patience)
            connection.connect(path)
            connection.sendall(_line({'ask': question}))
            received = bytearray()
            while not received.endswith(b'\n'):
                data = connection.recv(1 << 16)
                if not data or len(received) > ANSWER_MAX:
                    break
                received += data
    except OSError as error:
        raise exception.StatusError(
            _('no answer on %(path)s: %(error)s') % {
                'path': path, 'error': error.strerror or error},
            _way_out(error)) from error
    try:
        answer = json.loads(received)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise exception.StatusError(
            _('what answers on %s is no worker of this version') % path,
            _('see who listens there, or change [virtav_worker] '
              'status_socket'))
    if 'error' in answer:
        raise exception.StatusError(
            text.printable(str(answer['error']), 256),
            _('use the virtav-status of the same release'))
    return answer


def worst_first(instances: collections.abc.Iterable[Report]
                ) -> list[Report]:
    """Choose which instances to tell of.

    :param instances: each with ``problems``.
    :returns: at most :data:`INSTANCES_MAX`.
    """
    return sorted(instances, key=lambda one: (
        -len(one['problems']), one['instance']))[:INSTANCES_MAX]


def _way_out(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return _('run it as root, or as a member of the group of the worker')
    if isinstance(error, TimeoutError):
        return _('see what the worker writes to its log; it may be stopped')
    return _('start the worker, or name its socket in [virtav_worker] '
             'status_socket')


def _line(content: Report) -> bytes:
    return json.dumps(content, separators=(',', ':')).encode() + b'\n'


def _times(now: list[int], before: list[int]) -> Report:
    passed = [new - old for new, old in zip(now, before, strict=True)]
    return {f'p{share * 100:.0f}': nanoseconds and nanoseconds / 1000
            for share, nanoseconds in (
                (share, board.quantile(passed, share))
                for share in (0.5, 0.99))}
