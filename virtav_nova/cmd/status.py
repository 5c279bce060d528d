# SPDX-License-Identifier: Apache-2.0
"""The console script ``virtav-status``."""

import collections.abc
import importlib.metadata
import json
import sys
import time

from oslo_config import cfg

from virtav_nova import conf as virtav_conf
from virtav_nova import exception
from virtav_nova import text
from virtav_nova.i18n import _
from virtav_nova.worker import status

_PROG = 'virtav-status'
#: Seconds between two looks whether a reload is over.
_LOOK = 0.2
#: Instances that are shown; ``--json`` has more.
_SHOWN = 40

_CLI_OPTS = [
    cfg.BoolOpt('json', default=False,
                help='Print what the worker answers, as one JSON object.'),
    cfg.BoolOpt('reload', default=False,
                help='Have the rules loaded anew, and wait for the outcome.'),
]


def main(argv: list[str] | None = None) -> int:
    """Show how the scan worker of this host is.

    :param argv: arguments; those of the command line when None.
    :returns: exit status: 0 when it finds nothing wrong, 1 when it does or a
        reload failed, 2 when it does not answer.
    """
    conf = cfg.ConfigOpts()
    conf.register_cli_opts(_CLI_OPTS)
    virtav_conf.register_opts(conf)
    try:
        conf(argv, project='virtav', prog=_PROG,
             version=importlib.metadata.version('virtav-nova'))
        path = conf.virtav_worker.status_socket
        if not path:
            raise exception.StatusError(
                _('[virtav_worker] status_socket is empty'),
                _('name a socket there, and restart the worker'))
        if conf.reload:
            status.ask(path, 'reload')
        report = status.ask(path, 'status')
        while conf.reload and report['reload']['state'] == 'loading':
            time.sleep(_LOOK)
            report = status.ask(path, 'status')
    except exception.ConfigurationError as error:
        return _failed(str(error), error.way_out)
    except cfg.Error as error:
        return _failed(str(error), _('mend the configuration file'))
    if conf.json:
        print(json.dumps(report))
    else:
        print('\n'.join(_lines(report)))
    if conf.reload:
        return 1 if report['reload']['error'] else 0
    return 0 if report['health'] == 'ok' else 1


def _failed(message: str, way_out: str) -> int:
    print(f'{_PROG}: error: {message}\n  way out: {way_out}',
          file=sys.stderr)
    return 2


def _lines(report: status.Report) -> collections.abc.Iterator[str]:
    """Write a report for people.

    :returns: the lines; nothing of what others chose can end one.
    """
    yield _row(_('health'), report['health'])
    for problem in report['problems']:
        yield _row('', problem)
    yield _row(_('worker'), f'{report["version"]}, process {report["pid"]}, '
               f'up {_duration(report["uptime_s"])}')
    yield _row(_('rules'), f'{report["rules"]} in {report["engine"]}, epoch '
               f'{report["epoch"]}, digest {report["digest"][:16]}')
    reload = report['reload']
    if reload['state'] != 'idle' or reload['time']:
        yield _row(_('reload'), f'{reload["state"]}, last '
                   f'{reload["time"] or "none"}: '
                   f'{reload["error"] or "went well"}')
    for entry in report['quarantine'][:_SHOWN]:
        yield _row(_('quarantine'), f'{entry["namespace"]} {entry["rule"]}: '
                   f'{entry["why"]}')
    counters, rates = report['counters'], report['rates']
    yield _row(_('verdicts'), f'{counters["clean"]} clean, '
               f'{counters["match"]} match, {counters["unknown"]} unknown')
    yield _row('', f'{rates["requests"]}/s, {rates["scans"]} scans/s over '
               f'the last {report["period_s"]:.0f} s')
    for name, times in ((_('service'), report['service_us']),
                        (_('scan'), report['scan_us'])):
        yield _row(name, ', '.join(
            f'{share} {"none" if value is None else f"{value:.0f} µs"}'
            for share, value in times.items()))
    confined = report['confinement']
    yield _row(_('confined'), f'user {confined["user"]}, '
               f'{"with" if confined["capabilities"] else "no"} '
               f'capabilities, network {confined["network"]}, seccomp '
               f'{"on" if confined["seccomp"] else "off"}')
    for missing in confined['missing']:
        yield _row('', f'without: {missing}')
    yield ''
    yield from _table(
        ('SLOT', 'PROCESS', 'EPOCH', 'SESSIONS', 'QUEUE', 'SCANNING'),
        ((one['slot'], one['pid'] or '-', one['epoch'], one['sessions'],
          one['queue'], '-' if one['scanning_ms'] is None else
          f'{one["scanning_ms"]:.1f} ms') for one in report['processes']))
    yield ''
    yield from _table(
        ('INSTANCE', 'PROJECT', 'EPOCH', 'OPEN', 'BY', 'PROBLEMS'),
        ((one['instance'], one['project'] or '-', one['epoch'],
          _duration(one['since_s']), one['transport'],
          '; '.join(one['problems']) or '-')
         for one in report['instances'][:_SHOWN]))
    left = report['sessions'] - min(len(report['instances']), _SHOWN)
    if left > 0:
        yield _('… and %d more; see --json') % left


def _row(name: str, value: object) -> str:
    return f'{name:<11} {_fit(value)}'


def _table(head: tuple[str, ...],
           rows: collections.abc.Iterable[tuple[object, ...]]
           ) -> collections.abc.Iterator[str]:
    cells = [head, *(tuple(map(_fit, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield '  '.join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()


def _fit(value: object) -> str:
    shown = str(value)
    return shown if shown.replace('µ', 'u').isascii() and \
        shown.isprintable() else text.printable(shown, 256)


def _duration(seconds: float) -> str:
    """:returns: such as ``2 d 5 h``: the two largest units."""
    left = int(seconds)
    parts = []
    for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min'), (1, 's')):
        count, left = divmod(left, size)
        if count or unit == 's':
            parts.append(f'{count} {unit}')
    return ' '.join(parts[:2])


if __name__ == '__main__':
    sys.exit(main())
