# SPDX-License-Identifier: Apache-2.0
"""Trying rules: does it compile, what does it cost, what does it match?

Runs in the process apart. Rules are tried several at a time, because each
compiled set has a cost of its own that is many times that of most rules; when
several are slow together they are halved until the slow one is alone.
"""

import collections.abc
import importlib
import json
import resource
import statistics
import time
import typing

import yara

from virtav_nova import exception
from virtav_nova.engines import base
from virtav_nova.rules import directory
from virtav_nova.rules import sample

Unit: typing.TypeAlias = dict[str, typing.Any]
Results: typing.TypeAlias = collections.abc.Iterator[tuple[int, Unit]]

#: A rule set that costs what any does.
_NOTHING = '''rule nothing {
    strings: $a = "this is text that stands nowhere"
    condition: $a }'''
_TIMEOUT = 1  # seconds, of libyara, which counts no less
#: µs for a page after which there is no need to look again.
_HOPELESS = 500_000
#: Part of the limit that rules may take for all pages together.
_SHARE = 8


class Measured(typing.NamedTuple):
    """What rules took.

    :param mean: µs of processor time for a page of the sample.
    :param worst: µs for the slowest page of all.
    :param hits: pages of the sample that each namespace matched.
    """

    mean: float
    worst: float
    hits: dict[str, int]


class Try:
    """Compiles rules and runs them over the sample.

    A unit has the ``text`` of a rule with all that it needs; its result has
    ``error``, or ``us``, ``worst_us`` and ``hits``.

    :param settings: ``seconds``, ``slow_us`` and ``slowest_page_us``.
    :param data: pages of the sample.
    """

    several = 32

    def __init__(self, settings: Unit, data: bytes) -> None:
        self._slow = settings['slow_us']
        self._slowest = settings['slowest_page_us']
        self._budget = settings['seconds'] / _SHARE
        self._pages = [data[at:at + sample.PAGE]
                       for at in range(0, len(data), sample.PAGE)]
        self._made = sample.made()
        nothing = yara.compile(source=_NOTHING)
        self._base = min(self._run(nothing).mean for _time in range(3))

    def work(self, units: list[Unit]) -> Results:
        """See :mod:`virtav_nova.rules.apart`."""
        try:
            rules = yara.compile(
                sources={str(unit['id']): unit['text'] for unit in units},
                includes=False)
            measured = self._run(rules)
            if len(units) == 1 and self._bad(measured) and (
                    measured.worst < _HOPELESS):
                # Whatever else the machine does makes it no faster.
                again = [measured] + [self._run(rules) for _time in range(2)]
                measured = measured._replace(
                    mean=min(each.mean for each in again),
                    worst=min(each.worst for each in again))
        except yara.Error as error:
            if len(units) == 1:
                yield units[0]['id'], {'error': f'libyara: {error}'}
                return
            measured = None
        if len(units) > 1 and (measured is None or self._bad(measured)):
            middle = len(units) // 2
            yield from self.work(units[:middle])
            yield from self.work(units[middle:])
            return
        assert measured is not None  # noqa: S101
        for unit in units:
            yield unit['id'], {
                'us': round(max(0, measured.mean - self._base)
                            / len(units), 3),
                'worst_us': round(measured.worst, 1),
                'hits': measured.hits.get(str(unit['id']), 0)}

    def _bad(self, measured: Measured) -> bool:
        return bool(measured.mean - self._base > self._slow
                    or measured.worst > self._slowest)

    def _run(self, rules: yara.Rules) -> Measured:
        times: list[float] = []
        hits: dict[str, int] = {}
        begin = time.thread_time()
        for page in self._pages:
            taken, found = self._scan(rules, page)
            times.append(taken)
            for namespace in found:
                hits[namespace] = hits.get(namespace, 0) + 1
            if (taken > _HOPELESS
                    or time.thread_time() - begin > self._budget):
                break
        mean = statistics.fmean(times) if times else 0
        for page in self._made:
            if (times[-1:] > [_HOPELESS]
                    or time.thread_time() - begin > 2 * self._budget):
                break
            times.append(self._scan(rules, page)[0])
        return Measured(mean, max(times), hits)

    def _scan(self, rules: yara.Rules, page: bytes
              ) -> tuple[float, set[str]]:
        """:returns: µs, and namespaces that matched."""
        begin = time.thread_time_ns()
        try:
            found = rules.match(data=page, fast=True, timeout=_TIMEOUT,
                                console_callback=_silent)
        except yara.TimeoutError:
            found = []
        taken = (time.thread_time_ns() - begin) / 1000
        return taken, {match.namespace for match in found}


class Prove:
    """Loads a whole rule set into the engine of the worker, and scans.

    A unit has a ``page`` in hexadecimal and gets the ``matches``, or it has
    none and gets what the engine says of itself.

    :param settings: ``engine`` (module and class), ``scan_timeout_ms`` and
        ``clamd_socket``.
    :param data: JSON, a list of names and texts of files.
    """

    several = 1

    def __init__(self, settings: Unit, data: bytes) -> None:
        module, _colon, name = settings['engine'].partition(':')
        self.kind: type[base.Engine] = getattr(
            importlib.import_module(module), name)
        self._options = base.EngineOptions(
            scan_timeout_ms=settings['scan_timeout_ms'],
            clamd_socket=settings['clamd_socket'], sample=sample.pages())
        self._files = [directory.RuleFile(name, content.encode())
                       for name, content in json.loads(data)]
        self._engine: base.Engine | None = None

    def work(self, units: list[Unit]) -> Results:
        """See :mod:`virtav_nova.rules.apart`."""
        [unit] = units
        begin = time.monotonic()
        try:
            if self._engine is None:
                self._engine = self.kind.compile(self._files, self._options)
            if 'page' in unit:
                yield unit['id'], {'matches': [
                    [match.namespace, match.rule] for match in
                    self._engine.scan(bytes.fromhex(unit['page']))]}
            else:
                yield unit['id'], {
                    'describe': self._engine.describe(),
                    'seconds': round(time.monotonic() - begin, 2),
                    'mib': resource.getrusage(
                        resource.RUSAGE_SELF).ru_maxrss >> 10}
        except exception.ConfigurationError as error:
            yield unit['id'], {'error': str(error)}


def _silent(_text: str) -> None:
    """Drop what a rule prints."""
