# SPDX-License-Identifier: Apache-2.0
"""What the project costs, measured.

A bench is a function that takes the parsed arguments and gives back a list
of :class:`figures.Result`. :data:`BENCHES` names it; its docstring is its
help.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import pathlib
import resource
import socket
import statistics
import sys
import time
import typing
import uuid

from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtavtools import bench_monitor
from virtavtools import errors
from virtavtools import figures
from virtavtools import lab
from virtavtools import parts
from virtavtools import ui
from virtavtools import venv

Result = figures.Result

#: What a guest is booted with; policies of the monitor, but for the first
#: two: the emulator without the series, and the patched one without monitor.
_MODES = ('stock', 'off', 'report', 'enforce')
_BOOT = 120  # longest wait for a boot, in seconds
#: A difference in CPU time that a quiet machine shows between equal boots.
_NOISE = 0.01
#: The largest that is taken for noise, however busy the machine is.
_NOISE_MAX = 0.05


class Sample(typing.NamedTuple):
    """One boot.

    :param wall: from the emulator's start until the guest was ready, in s
    :param user: CPU time of the emulator in user mode, in s
    :param system: CPU time of the emulator in the kernel, in s
    :param fetches: pages that the monitor asked about; 0 without monitor
    :param wait: mean hold of a fetch in µs; 0 where none is held
    :param distinct: pages that differ, of those that the worker was asked for
    """

    wall: float
    user: float
    system: float
    fetches: int = 0
    wait: float = 0
    distinct: int | None = None


def _boot_once(emulator, guest, home, worker, policy):
    """Boot the guest and end it.

    :param policy: of the monitor, None for no monitor
    :returns: :class:`Sample`
    """
    monitor = policy and {'socket': worker.socket, 'policy': policy}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with lab.Machine(emulator, guest, home, monitor) as machine:
        wall = machine.wait_ready(_BOOT)
        state = monitor and machine.query()
    # Of children that have ended: between the two it is the emulator alone.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample = Sample(wall, after.ru_utime - before.ru_utime,
                    after.ru_stime - before.ru_stime)
    if not monitor:
        return sample
    return sample._replace(
        fetches=state['fetches'],
        wait=state['wait-ns'] / max(state['waits'], 1) / 1e3,
        distinct=worker.record(type='session', event='closed',
                               instance=machine.instance)['distinct'])


def boot_results(samples):
    """What boots took.

    :param samples: for each mode the list of its :class:`Sample`; those at
        the same place are of the same round
    :returns: list of :class:`Result`
    """
    def medians(mode, field):
        return statistics.median(getattr(one, field) for one in samples[mode])

    def ratio(mode, measure):
        return statistics.median(
            measure(one) / measure(stock) for one, stock
            in zip(samples[mode], samples['stock'], strict=True))

    def cpu(sample):
        return sample.user + sample.system

    results = [Result('%s_s' % mode, medians(mode, 'wall'), 's')
               for mode in _MODES]
    results += [Result('%s_cpu_s' % mode, statistics.median(
        map(cpu, samples[mode])), 's') for mode in _MODES]
    for mode, limit in (('off', None), ('report', None), ('enforce', 1.25)):
        results += [
            Result('%s_ratio' % mode, ratio(mode, lambda one: one.wall),
                   'of stock', limit),
            Result('%s_cpu_ratio' % mode, ratio(mode, cpu), 'of stock')]
    stock = [one.user for one in samples['stock']]
    spread = (max(stock) - min(stock)) / statistics.median(stock)
    return [
        *results,
        Result('enforce_best_ratio',
               min(one.wall for one in samples['enforce'])
               / min(one.wall for one in samples['stock']), 'of stock'),
        Result('off_user_ratio', medians('off', 'user')
               / medians('stock', 'user'), 'of stock',
               1 + min(max(spread, _NOISE), _NOISE_MAX)),
        Result('fetches', medians('enforce', 'fetches'), 'pages'),
        Result('distinct', medians('enforce', 'distinct'), 'pages'),
        Result('wait_mean_us', medians('enforce', 'wait'), 'µs')]


def boot(args):
    """The guest's boot, side by side with that of stock QEMU.

    Rounds of four boots, in changing order: the emulator without the series
    (stock), the patched one without monitor (off), and with it under both
    policies, with a real worker and the self-test rule. NAME_s is the time
    from the emulator's start until the guest is ready, NAME_cpu_s what the
    emulator took of the CPU until it was ended: medians. NAME_ratio and
    NAME_cpu_ratio are medians of the ratio to stock of the same round;
    enforce_best_ratio is that of the quickest boots, for a busy machine.

    Limits: enforce_ratio 1.25. off_user_ratio, median against median of the
    CPU time in user mode, is to show no cost: its limit is the spread of
    stock's own runs, largest less smallest, but at least 1 % and at most 5 %.
    """
    patched, stock = parts.emulator(), parts.stock_emulator()
    guest = parts.guest()
    samples = {mode: [] for mode in _MODES}
    plan = [mode for index in range(args.pairs)
            for mode in _MODES[index % 4:] + _MODES[:index % 4]]
    with (lab.directory() as home, lab.Worker(home) as worker,
          ui.step('boot %d guests' % (len(plan) + 1)) as step):
        # One for nothing: it waits for the disk.
        _boot_once(stock, guest, home, worker, None)
        patched.read_bytes()
        for number, mode in enumerate(plan):
            step.progress(number, len(plan))
            samples[mode].append(_boot_once(
                stock if mode == 'stock' else patched, guest, home,
                worker, None if mode in ('stock', 'off') else mode))
    return boot_results(samples)


_REQUESTS = 5000
_WARMUP = 500
#: How long QEMU looks for a verdict before it sleeps, in seconds.
_LOOK = 0.0002
_PATIENCE = 10  # longest wait for the worker, in seconds


def _pages(count):
    """Real code: pages of the interpreter, each different."""
    code = pathlib.Path(sys.executable).read_bytes()
    starts = itertools.cycle(range(0, len(code) - wire.PAGE_SIZE,
                                   wire.PAGE_SIZE))
    for number in range(count):
        start = next(starts)
        yield (number.to_bytes(8, 'little')
               + code[start + 8:start + wire.PAGE_SIZE])


class _Client:
    """QEMU's end of a session, as fast as Python can be one.

    :param path: of the worker's socket
    :param flags: of the HELLO
    """

    def __init__(self, path, flags):
        self._socket = socket.socket(socket.AF_UNIX)
        self._decoder = wire.Decoder([wire.Welcome, wire.Verdict])
        self._ring = None
        self._fds = []
        self._socket.settimeout(_PATIENCE)
        self._socket.connect(str(path))
        self._socket.sendall(wire.Hello(
            wire.VERSION, wire.VERSION, wire.PAGE_SIZE, uuid.uuid4(),
            512 << 20, wire.Policy.ENFORCE, wire.OnMatch.ALERT,
            wire.OnTimeout.ALLOW, 1000, flags).pack())
        room = self._decoder.room()
        data, self._fds, _, _ = socket.recv_fds(self._socket, len(room), 4)
        room[:len(data)] = data
        self._decoder.filled(len(data))
        self.welcome = self._receive()
        if self.welcome.ring_slots:
            self._ring = ring.MonitorEnd(
                self._fds[-1], self.welcome.ring_slots)
        if bool(flags) != bool(self._ring):
            self.close()
            raise errors.ToolError('the worker gives no shared memory')

    def close(self):
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def _receive(self):
        while (frame := self._decoder.frame()) is None:
            count = self._socket.recv_into(self._decoder.room())
            if not count:
                raise errors.ToolError('the worker closed the connection')
            self._decoder.filled(count)
        return frame

    def _look(self):
        """Look for a verdict for a while and then sleep, as a vCPU does."""
        asleep = time.perf_counter() + _LOOK
        while (data := self._ring.verdicts.take()) is None:
            if time.perf_counter() < asleep:
                continue
            if not self._socket.recv(99):
                raise errors.ToolError('the worker closed the connection')
        return wire.whole(data, wire.Verdict)

    def ask(self, number, page):
        """Ask for a page.

        :returns: the verdict, and the time that it took in seconds
        """
        request = wire.Request(
            number, 1, number * wire.PAGE_SIZE, number * wire.PAGE_SIZE,
            0, 0, 0, 0, 0, wire.HOLD,
            wire.page_tag(self.welcome.key, page), b'pc.ram', wire.NO_TAG,
            wire.NO_TAG, wire.window(page)).pack()
        began = time.perf_counter()
        if self._ring:
            self._ring.requests.put(request)
            with contextlib.suppress(BlockingIOError):
                self._socket.send(ring.DOORBELL, socket.MSG_DONTWAIT)
            verdict = self._look()
        else:
            self._socket.sendall(request)
            verdict = self._receive()
        return verdict, time.perf_counter() - began


def roundtrip(args):
    """A page's way to the worker and back: by its socket, and by a ring.

    A session of each kind asks for one page at a time, 5000 times: pages of
    real code, no two alike, without a match. The time is that from sending
    the request until the verdict is decoded. No limit.
    """
    results = []
    with (lab.directory() as home,
          lab.Worker(home, require_token=False) as worker,
          ui.step('ask for %d verdicts' % (2 * _REQUESTS)) as step):
        for name, flags in (('', 0), ('ring_', wire.SHARED)):
            taken = []
            with contextlib.closing(_Client(worker.socket, flags)) as client:
                for number, page in enumerate(_pages(_WARMUP + _REQUESTS)):
                    verdict, seconds = client.ask(number, page)
                    if (verdict.id, verdict.result) != (
                            number, wire.Result.CLEAN):
                        raise errors.ToolError(
                            'a wrong verdict: %s' % (verdict,))
                    taken.append(seconds)
                    step.progress(number + bool(flags) * _REQUESTS,
                                  2 * _REQUESTS + _WARMUP)
            cuts = statistics.quantiles(taken[_WARMUP:], n=100)
            results += [
                Result(name + 'roundtrip_median_us', cuts[49] * 1e6, 'µs'),
                Result(name + 'roundtrip_p99_us', cuts[98] * 1e6, 'µs')]
    return results


#: Of the bench scan.
SCAN_PARTS = ('engines100', 'engines1000', 'engines5000', 'engines15000',
              'cached', 'roundtrips', 'table', 'storm', 'reload')


def scan(args):
    """What a verdict costs the worker, part by part (--only).

    engines100, engines1000, engines5000, engines15000: each engine over the
    executable pages that are shipped, with so many made-up rules of the
    shape of public ones, or with those of --rules (engines): processor time
    of a page, pages per second and processor, memory and time that the rule
    set takes. cached: verdicts on pages that the worker knows, from full
    rings. roundtrips: clients that wait for one verdict each. table: pages
    that QEMU finds in the verdict table itself. storm: a boot is recorded,
    and played by one guest and by 100 at once. reload: the rules change
    under load, and each verdict is checked.

    Limits: twostage with 5000 rules 70 µs median, 250 µs p99, a sixth of
    yara's median; 10 µs of processor time for a cached verdict; table hits
    without the worker; a storm 1.2 times the scans of one boot; no wrong
    verdict in a reload. --quick: shorter, and no 15000 rules.
    """
    # What it imports is in the environment only.
    from virtavtools import bench_scan
    return bench_scan.scan(args)


def rules(args):
    """What an import of rules takes, and whether they raise false alarms.

    Imports the rules that are shipped, or those of --rules, into a store of
    its own, boots a guest with a Debian under them, and scans all executable
    pages of the packages of this host with them.

    Limit: the shipped rules match none. --quick: 20,000 pages.
    """
    # What it imports is in the environment only.
    from virtavtools import bench_rules
    return bench_rules.rules(args)


BENCHES = {
    'boot': boot,
    'monitor': bench_monitor.monitor,
    'roundtrip': roundtrip,
    'rules': rules,
    'scan': scan,
}


def summarize(name, results):
    """The object that ``--json`` prints.

    :param name: of the bench
    :param results: list of :class:`Result`
    """
    short = [result.name for result in results if result.short]
    return {'bench': name, 'results': [
        {**result._asdict(), 'value': round(result.value, 4)}
        for result in results], 'short': short, 'ok': not short}


def table(results):
    """Results for people, as one string."""
    lines = []
    width = max([20, *(len(result.name) for result in results)])
    for result in results:
        line = '%-*s %12s %-9s' % (width, result.name, '%.5g' % result.value,
                                   result.unit)
        if result.limit is not None:
            line += ' %s %.4g' % (
                'MISSES the limit' if result.short else 'limit', result.limit)
        lines.append(line.rstrip())
    return '\n'.join(lines)


def _workloads(text):
    names = text.split(',')
    known = (*bench_monitor.WORKLOADS, *SCAN_PARTS)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                'there is no workload %r, but %s' % (name, ', '.join(known)))
    return names


def _parser():
    parser = argparse.ArgumentParser(
        prog='tools/bench',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Measure what the project costs. The exit status is 0 '
        'if no limit is missed.\nLet the machine do nothing else meanwhile.',
        epilog='benches:\n%s\n\n%s' % ('\n\n'.join(
            '%s: %s' % (name, inspect.getdoc(function))
            for name, function in BENCHES.items()), parts.HELP))
    parser.add_argument('name', metavar='NAME', choices=BENCHES,
                        help='the bench to run: %s' % ', '.join(BENCHES))
    parser.add_argument(
        '--json', action='store_true',
        help='show the table on stderr, and print one JSON object')
    parser.add_argument(
        '--pairs', metavar='N', type=int, default=5,
        help='for boot and monitor: how many rounds (default: %(default)s)')
    parser.add_argument(
        '--only', metavar='WORKLOAD[,...]', type=_workloads,
        help='for monitor and scan: some of their workloads')
    parser.add_argument(
        '--rules', metavar='DIR',
        help='for rules and scan: these rules instead')
    parser.add_argument(
        '--quick', action='store_true',
        help='for rules and scan: less of it')
    return parser


def main(argv=None):
    """tools/bench."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error('--pairs must be 1 or more')
    fit = {'monitor': bench_monitor.WORKLOADS, 'scan': SCAN_PARTS}
    if args.only and not set(args.only).issubset(fit.get(args.name, ())):
        parser.error('%s has other workloads' % args.name)
    venv.enter()
    load, processors = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > processors / 2:
        print('note: the load average is %.1f on %d processors: times mean '
              'little' % (load, processors), file=sys.stderr)
    results = BENCHES[args.name](args)
    print(table(results), file=sys.stderr if args.json else sys.stdout)
    summary = summarize(args.name, results)
    if args.json:
        print(json.dumps(summary), flush=True)
    return 0 if summary['ok'] else 1
