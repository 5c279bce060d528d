# SPDX-License-Identifier: Apache-2.0
"""The console script ``virtav-replay``.

Against a worker it is the worker that names what matches. Without one the
units of each fetch are scanned here: the page, and the junctions with its
neighbours. What only matches over several pages of a process is found by a
worker alone.
"""

import argparse
import binascii
import collections
import collections.abc
import json
import sys
import time
import typing
import uuid

from stevedore import driver
from stevedore import exception as stevedore_exception
from stevedore import extension

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.monitor import client
from virtav_nova.monitor import player
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire
from virtav_nova.rules import directory
from virtav_nova.rules import explain

_PROG = 'virtav-replay'
_NAME_MAX = 128
_SHOWN = 100

_Report: typing.TypeAlias = dict[str, typing.Any]


def main(argv: list[str] | None = None) -> int:
    """Play a recording.

    :param argv: arguments; those of the command line when None.
    :returns: exit status: 0 when all was played, 1 when the recording or
        the worker ended before, 2 when something has to be mended first.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.explain or options.rule) and options.socket:
        parser.error('--explain and --rule go with --rules')
    try:
        with recording.Recording(options.file) as played:
            report = _about(options.file, played)
            if options.socket:
                _play(played, options, report)
            elif options.rules:
                _scan(played, options, report)
            if options.json:
                print(json.dumps(report))
            else:
                _show(report)
            return 1 if played.damage else 0
    except exception.ConfigurationError as error:
        return _failed(2, str(error), error.way_out)
    except client.ClientError as error:
        return _failed(1, f'{options.socket}: {error}',
                       _('see whether the worker runs, and what it logs'))
    except KeyboardInterrupt:
        return 130


def _failed(status: int, message: str, way_out: str) -> int:
    print(f'{_PROG}: error: {message}\n  way out: {way_out}',
          file=sys.stderr)
    return status


def _about(path: str, played: recording.Recording) -> _Report:
    head = played.head
    if played.damage:
        print(f'{_PROG}: warning: {path}: {played.damage}; what stands '
              'before is used', file=sys.stderr)
    return {
        'file': path, 'instance': str(head.instance),
        'ram_mib': head.ram_size >> 20,
        'policy': head.policy.name.lower(), 'program': head.program,
        'fetches': len(played), 'pages': played.pages,
        'seconds': played[-1].at / 1e6 if len(played) else 0.0,
        'damage': played.damage}


# Against a worker


def _play(played: recording.Recording, options: argparse.Namespace,
          report: _Report) -> None:
    token = _token(options.token_file)
    instance = options.instance or (
        played.head.instance if token != wire.NO_TOKEN else None)

    def connect(_number: int) -> client.Client:
        session = client.Client(options.socket, client.hello(
            instance, options.transport == 'ring', token,
            played.head.ram_size))
        if options.transport == 'ring' and not session.shared:
            session.close()
            raise client.ClientError(_('the worker gives no shared memory'))
        return session

    outcome = player.Player(
        played, connect, options.clients, options.depth,
        options.speed == 'recorded', not options.no_table).play()
    report.update({
        'clients': options.clients, 'transport': options.transport,
        'answers': outcome.asked, 'table_hits': outcome.hits,
        'clean': outcome.results[wire.Result.CLEAN],
        'matched': outcome.results[wire.Result.MATCH],
        'unknown': outcome.results[wire.Result.UNKNOWN],
        'moved': outcome.moved,
        'p50_us': outcome.quantile(.5) * 1e6,
        'p99_us': outcome.quantile(.99) * 1e6,
        'took_s': outcome.seconds,
        'rules': dict(outcome.rules.most_common()),
        'matches': [{'client': found.guest, 'rule': found.rule,
                     **_where(played[found.fetch], found.fetch)}
                    for found in outcome.matches]})


def _token(path: str | None) -> bytes:
    """Read a token as it is placed for QEMU.

    :raises RecordingError: when there is none in the file.
    """
    if path is None:
        return wire.NO_TOKEN
    try:
        with open(path, 'rb') as file:
            said = file.read(256)
        token = said if len(said) == wire.TOKEN_SIZE else binascii.a2b_base64(
            said, strict_mode=False)
    except (OSError, ValueError) as error:
        raise exception.RecordingError(
            f'{path}: {error}',
            _('name the file with the token of the instance')) from error
    if len(token) != wire.TOKEN_SIZE:
        raise exception.RecordingError(
            _('%s: this is no token') % path,
            _('name the file with the token of the instance'))
    return token


def _where(fetch: recording.Fetch, number: int) -> _Report:
    return {'fetch': number, 'page': fetch.number,
            'block': text.printable(fetch.block, 64), 'offset': fetch.offset,
            'gva': fetch.gva, 'cr3': fetch.cr3, 'cpl': fetch.cpl}


# Without a worker


class _Unit(typing.NamedTuple):
    """What is scanned at once.

    :param form: ``page`` or ``junction``.
    :param fetch: the first fetch that it came with.
    """

    form: str
    data: bytes
    fetch: int


def _units(played: recording.Recording, wanted: argparse.Namespace
           ) -> collections.abc.Iterator[_Unit]:
    """:returns: the units of the chosen fetches, each content once."""
    seen: set[int] = set()
    for place, fetch in enumerate(played):
        if wanted.page not in (None, fetch.number):
            continue
        if wanted.gva is not None and (
                fetch.gva ^ wanted.gva) // wire.PAGE_SIZE:
            continue
        units = [('page', fetch.page)]
        if fetch.before is not None:
            units.append((
                'junction', fetch.before + fetch.page[:wire.EDGE_SIZE]))
        if fetch.after is not None:
            units.append((
                'junction', fetch.page[-wire.EDGE_SIZE:] + fetch.after))
        for form, data in units:
            # Of a recording that was made up to be hard on this set, the
            # hash would have to be another one.
            name = hash(data)
            if name not in seen:
                seen.add(name)
                yield _Unit(form, data, place)


def _scan(played: recording.Recording, options: argparse.Namespace,
          report: _Report) -> None:
    files = directory.read(options.rules)
    began = time.monotonic()
    engine = _engine(options.engine, files)
    report['engine'] = f'{engine.name} {engine.version}'
    report['load_s'] = time.monotonic() - began
    explainer = (explain.Explainer(files, options.rule)
                 if options.explain or options.rule else None)
    taken: list[float] = []
    counts: collections.Counter[str] = collections.Counter()
    rules: collections.Counter[str] = collections.Counter()
    matches: list[_Report] = []
    explained: list[_Report] = []
    for unit in _units(played, options):
        begin = time.thread_time_ns()
        found = engine.scan(unit.data)
        taken.append((time.thread_time_ns() - begin) / 1e3)
        counts[unit.form] += 1
        where = {'form': unit.form,
                 **_where(played[unit.fetch], unit.fetch)}
        for match in found:
            rules[match.rule] += 1
            matches.append({'rule': match.rule, 'namespace': match.namespace,
                            'strings': match.strings, **where})
        if explainer is not None:
            names = {(match.namespace, match.rule) for match in found}
            explained += [
                {**where, **one._asdict(),
                 'matched': (one.namespace, one.rule) in names}
                for one in explainer.explain(unit.data, bool(
                    options.rule and options.explain))]
    taken.sort()
    report.update({
        'units': dict(counts),
        'p50_us': taken[len(taken) // 2] if taken else 0.0,
        'p99_us': taken[len(taken) * 99 // 100] if taken else 0.0,
        'matched': sum(rules.values()), 'rules': dict(rules.most_common()),
        'matches': matches})
    if explainer is not None:
        report['explained'] = explained


def _engine(name: str, files: list[directory.RuleFile]) -> base.Engine:
    try:
        kind = typing.cast(type[base.Engine], driver.DriverManager(
            'virtav.engines', name).driver)
    except stevedore_exception.NoMatches as error:
        known = extension.ExtensionManager('virtav.engines').names()
        raise exception.EngineError(
            _('no scan engine is called %s') % name,
            _('choose one of: %s') % ', '.join(sorted(known))) from error
    return kind.compile(files, base.EngineOptions(scan_timeout_ms=60000))


# What is shown


def _show(report: _Report) -> None:
    """Show what came of it to people."""
    print('%(file)s: instance %(instance)s, %(ram_mib)d MiB of RAM, '
          '%(fetches)d fetches of %(pages)d different pages in '
          '%(seconds).1f s, recorded by %(program)s' % report)
    if 'answers' in report:
        print('%(clients)d clients by %(transport)s: %(answers)d answers in '
              '%(took_s).1f s, p50 %(p50_us).0f µs, p99 %(p99_us).0f µs; '
              '%(table_hits)d more by the verdict table' % report)
        print('%(clean)d clean, %(matched)d matched, %(unknown)d unknown; '
              '%(moved)d sessions were sent elsewhere' % report)
    elif 'engine' in report:
        print('%s, loaded in %.1f s: %s scanned, p50 %.0f µs, p99 %.0f µs of '
              'processor time; %d matches' % (
                  report['engine'], report['load_s'], ', '.join(
                      '%d %ss' % (count, form)
                      for form, count in report['units'].items()) or 'none',
                  report['p50_us'], report['p99_us'], report['matched']))
    for match in report.get('matches', ())[:_SHOWN]:
        print('match: %s in %s' % (
            text.printable(match['rule'], _NAME_MAX), _place(match)))
    left = len(report.get('matches', ())) - _SHOWN
    if left > 0:
        print('and %d more' % left)
    for one in report.get('explained', ()):
        print('%s: %s %s' % (
            _place(one), text.printable(one['rule'], _NAME_MAX),
            'matched' if one['matched'] else 'did not match'))
        print('    seen: %s' % (', '.join(
            '%s at %s' % (name, ' '.join(map(hex, offsets)))
            for name, offsets in one['seen'].items()) or 'nothing'))
        print('    not seen: %s' % (', '.join(one['unseen']) or 'nothing'))
        print('    condition: %s' % text.printable(one['condition'], 2000))


def _place(match: _Report) -> str:
    return '%s %d of fetch %d, gva %#x, %s offset %#x, CPL %d' % (
        match.get('form', 'page'), match['page'], match['fetch'],
        match['gva'], match['block'], match['offset'], match['cpl'])


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError('%d is less than 1' % number)
    return number


def _number(value: str) -> int:
    return int(value, 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=_(
            'Play what virtav-scan-worker record wrote: to a running worker '
            '(--socket), or to an engine in this process (--rules), or just '
            'tell what is in the file.'))
    parser.add_argument('file', metavar='FILE', help=_('the recording'))
    parser.add_argument('--json', action='store_true',
                        help=_('print one JSON object'))
    way = parser.add_mutually_exclusive_group()
    way.add_argument('--socket', metavar='PATH',
                     help=_('socket of the worker'))
    way.add_argument('--rules', metavar='DIR', help=_('directory of rules'))
    live = parser.add_argument_group(_('with --socket'))
    live.add_argument('--clients', metavar='N', type=_positive, default=1,
                      help=_('guests that play it at once'))
    live.add_argument('--depth', metavar='N', type=_positive, default=1,
                      help=_('pages that each asks for at a time'))
    live.add_argument('--speed', choices=('max', 'recorded'), default='max',
                      help=_('ask at once, or at the times of the recording'))
    live.add_argument('--transport', choices=('ring', 'socket'),
                      default='ring', help=_('how pages go to the worker'))
    live.add_argument('--no-table', action='store_true',
                      help=_('ask also for pages that are in the table'))
    live.add_argument('--instance', metavar='UUID', type=uuid.UUID,
                      help=_('instance to be named (default: a new one for '
                             'each client, with a token the recorded one)'))
    live.add_argument('--token-file', metavar='PATH',
                      help=_('file with the token of the instance, as it is '
                             'placed for QEMU'))
    offline = parser.add_argument_group(_('with --rules'))
    offline.add_argument('--engine', default='twostage',
                         help=_('what scans (default: %(default)s)'))
    offline.add_argument('--page', metavar='N', type=_number,
                         help=_('only this one of the different pages'))
    offline.add_argument('--gva', metavar='ADDRESS', type=_number,
                         help=_('only pages fetched at this guest virtual '
                                'address'))
    offline.add_argument('--explain', action='store_true', help=_(
        'tell which strings of the rules are in each page and which are '
        'not; with --rule also where there is none'))
    offline.add_argument('--rule', metavar='NAME', action='append',
                         default=[], help=_('explain only this rule; may be '
                                            'given again'))
    return parser


if __name__ == '__main__':
    sys.exit(main())
