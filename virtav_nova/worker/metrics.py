# SPDX-License-Identifier: Apache-2.0
"""The worker's figures for Prometheus.

One page, ``/metrics``, over just as much HTTP as that takes: the rest of it
would need a thread. No metric has the name of an instance, a project or a rule
as a label, so that their number does not depend on what guests do.
"""

import collections.abc
import socket

import prometheus_client
from prometheus_client import core
from prometheus_client import registry

from virtav_nova import exception
from virtav_nova.conf import worker as conf
from virtav_nova.i18n import _
from virtav_nova.worker import board
from virtav_nova.worker import listener
from virtav_nova.worker import status

_BACKLOG = 16
#: Upper bounds of the buckets that are told, in µs.
_BOUNDS = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000,
           50_000, 100_000, 1_000_000)
_HELP = {
    board.Counter.UNITS: 'Pages and junctions that verdicts were given on.',
    board.Counter.CACHED: 'Units whose result the scan process remembered.',
    board.Counter.TABLED: 'Units that were in the verdict table.',
    board.Counter.JOINED: 'Units that another process was scanning already.',
    board.Counter.SCANS: 'Units that an engine scanned.',
    board.Counter.FAULTS: 'Scans that failed.',
    board.Counter.REPEATS: 'Matches that were not told one by one.',
    board.Counter.DROPPED: 'Matches that could not be told.',
    board.Counter.DEFERRED: 'Times that a session over its budget waited.',
    board.Counter.READS: 'Pages of guests that were asked for.',
    board.Counter.DEEP_SCANS: 'Scans of several pages of an address space.',
    board.Counter.ACCUMULATED: 'Matches over several pages.',
}


class Collector(registry.Collector):
    """Makes metrics of what the worker tells of itself.

    :param report: see :func:`virtav_nova.worker.server.Server.report`.
    :param sample: what was counted so far.
    """

    def __init__(self, report: collections.abc.Callable[[], status.Report],
                 sample: collections.abc.Callable[[], status.Sample]) -> None:
        self._report = report
        self._sample = sample

    def collect(self) -> collections.abc.Iterator[core.Metric]:
        """:returns: all metrics, with their values of this moment."""
        report, sample = self._report(), self._sample()
        yield core.InfoMetricFamily(
            'virtav_worker_rules', 'The rule set in force.', {
                'engine': report['engine'], 'digest': report['digest']})
        for name, explanation, value in (
                ('healthy', 'Whether the worker finds nothing wrong.',
                 report['health'] == 'ok'),
                ('sessions', 'Connections of instances.',
                 report['sessions']),
                ('queue', 'Sessions whose next page waits for others.',
                 report['queue']),
                ('instances_absent',
                 'Instances that are registered and not connected.',
                 report['absent']),
                ('instances_over_budget',
                 'Instances that had to wait because of their budget.',
                 report['over_budget']),
                ('processes', 'Scan processes that serve.',
                 sum(one['ready'] for one in report['processes'])),
                ('processes_wanted', 'Scan processes that there should be.',
                 report['processes_wanted']),
                ('rules', 'Rules in force; 0 for an engine without.',
                 report['rules'] or 0),
                ('rules_quarantined', 'Rules left out for what they cost.',
                 len(report['quarantine'])),
                ('epoch', 'Rule sets loaded since the start.',
                 report['epoch']),
                ('reload_failed', 'Whether the last reload failed.',
                 report['reload']['error'] is not None)):
            yield core.GaugeMetricFamily(
                f'virtav_worker_{name}', explanation, float(value))
        verdicts = core.CounterMetricFamily(
            'virtav_worker_verdicts', 'Verdicts given.', labels=['result'])
        for counter in (board.Counter.CLEAN, board.Counter.MATCH,
                        board.Counter.UNKNOWN):
            name = counter.name.lower()
            verdicts.add_metric([name], sample.counters[name])
        yield verdicts
        for counter, explanation in _HELP.items():
            name = counter.name.lower()
            yield core.CounterMetricFamily(
                f'virtav_worker_{name}', explanation, sample.counters[name])
        for name, explanation, value in (
                ('processes_lost', 'Scan processes that died or were killed.',
                 report['processes_lost']),
                ('records_lost', 'Journal records that were not written.',
                 report['records_lost'])):
            yield core.CounterMetricFamily(
                f'virtav_worker_{name}', explanation, value)
        for name, explanation, histogram, total in (
                ('service', 'From taking a request to answering it.',
                 sample.service, 'service_ns'),
                ('scan', 'Time of one scan.', sample.scans, 'scan_ns')):
            yield core.HistogramMetricFamily(
                f'virtav_worker_{name}_seconds', explanation,
                _buckets(histogram), sample.counters[total] / 1e9)


class Page:
    """Answers the questions of Prometheus.

    :param collector: of the metrics.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def answer(self, received: bytes) -> bytes | None:
        """Answer a request.

        :param received: what came by now.
        :returns: None when the head is not complete.
        """
        head, end, _rest = received.partition(b'\r\n\r\n')
        if not end:
            return None
        words = head.partition(b'\r\n')[0].split(b' ')
        if len(words) != 3 or not words[2].startswith(b'HTTP/1.'):
            return _response('400 Bad Request', b'')
        if words[0] != b'GET':
            return _response('405 Method Not Allowed', b'')
        if words[1].partition(b'?')[0] != b'/metrics':
            return _response('404 Not Found', b'see /metrics\n')
        return _response('200 OK', prometheus_client.generate_latest(
            self._collector))


def listen(address: str, owner: tuple[int, int] | None
           ) -> listener.Listener | socket.socket:
    """Open the socket for Prometheus.

    :param address: HOST:PORT or ``unix:PATH``.
    :param owner: user and group of a socket at a path; None for the own.
    :returns: what has ``close()``; see :func:`opened`.
    :raises SocketError: when it cannot be opened.
    """
    if address.startswith('unix:'):
        return listener.Listener(address.removeprefix('unix:'), None, 0o660,
                                 owner, 'metrics')
    host, port = conf.loopback(address)
    listening = socket.socket(
        socket.AF_INET6 if ':' in host else socket.AF_INET,
        socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise exception.SocketError(
            _('metrics address %(address)s: %(error)s') % {
                'address': address, 'error': error.strerror},
            _('choose another port in [virtav_worker] metrics, or unix:PATH')
        ) from error
    return listening


def opened(listening: listener.Listener | socket.socket) -> socket.socket:
    """:returns: the socket itself."""
    return (listening if isinstance(listening, socket.socket)
            else listening.socket)


def _buckets(histogram: collections.abc.Sequence[int]
             ) -> list[tuple[str, float]]:
    """Put the fine buckets of a board together.

    :param histogram: by :func:`board.bucket`.
    :returns: upper bound in seconds, and how many were not longer.
    """
    found: list[tuple[str, float]] = []
    total = number = 0
    for bound in _BOUNDS:
        while number < len(histogram) and board.upper(number) <= bound * 1000:
            total += histogram[number]
            number += 1
        found.append((f'{bound / 1e6:g}', total))
    return [*found, ('+Inf', sum(histogram))]


def _response(result: str, content: bytes) -> bytes:
    return (f'HTTP/1.0 {result}\r\n'
            f'Content-Type: {prometheus_client.CONTENT_TYPE_LATEST}\r\n'
            f'Content-Length: {len(content)}\r\n'
            f'Connection: close\r\n\r\n').encode() + content
