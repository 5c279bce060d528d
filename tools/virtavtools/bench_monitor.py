# SPDX-License-Identifier: Apache-2.0
"""What the page-fetch monitor costs a guest: a bench of tools/bench."""

import os
import statistics
import typing

from virtavtools import errors
from virtavtools import figures
from virtavtools import lab
from virtavtools import parts
from virtavtools import ui


class Mode(typing.NamedTuple):
    """What a guest is booted with.

    :param policy: of the monitor, None for none
    :param worker: name in :data:`_WORKERS`
    :param transport: what the monitor has to say that it used
    """

    policy: str | None = None
    worker: str | None = None
    transport: str = 'none'


MODES = {
    'stock': Mode(),
    'off': Mode(),
    'report': Mode('report', 'warm', 'ring'),
    'warm': Mode('enforce', 'warm', 'ring'),
    'cold': Mode('enforce', 'cold', 'ring'),
    'socket': Mode('enforce', 'socket', 'socket'),
}
#: Scan workers with their options.
_WORKERS = {
    'warm': {},
    'cold': {'table_entries': 0},
    'socket': {'table_entries': 0, 'ring_slots': 0},
}


class Guest(typing.NamedTuple):
    """A guest.

    :param boot: what its boot is called as a workload
    :param cases: for each other workload the guest's name of it, and how
        often it is run in each boot
    :param modes: what it is booted with
    :param machine: more arguments of :class:`lab.Machine`
    """

    boot: str
    cases: dict
    modes: tuple
    machine: dict

    @property
    def workloads(self):
        return (self.boot, *self.cases)


_GUESTS = {
    'guest': Guest('boot', {'exec500': ('exec500', 1), 'loop': ('loop', 1),
                            'smc': ('smc', 5), 'own': ('own', 5)},
                   tuple(MODES), {}),
    'debian_guest': Guest('debian-boot', {'debian-exec500': ('exec500', 1),
                                          'debian-jit': ('jit', 1)},
                          ('stock', 'off', 'report', 'warm', 'cold'),
                          {'snapshot': True}),
}
WORKLOADS = tuple(workload for guest in _GUESTS.values()
                  for workload in guest.workloads)

_BOOT = 240  # longest wait for a boot, in seconds
_CASE = 240  # and for a case
#: With KASLR the pages of the kernel are others in each boot.
_APPEND = 'nokaslr'
#: CPU time is told in hundredths of a second: what takes less than this in
#: all is not told in it.
_LEAST_USER = 0.5

#: Largest ratio to stock for a workload, a mode and a clock.
LIMITS = {
    **{(workload, 'off', 'user'): 1.01
       for workload in ('boot', 'exec500', 'loop')},
    **{(workload, mode, 'user'): 1.02
       for workload in ('exec500', 'loop') for mode in ('warm', 'cold')},
    **{('boot', mode, clock): limit for clock in ('wall', 'user')
       for mode, limit in (('warm', 1.03), ('cold', 1.10))},
    **{(workload, mode, 'wall'): limit for mode in ('warm', 'cold')
       for workload, limit in (('own', 10), ('debian-jit', 1.5))},
}
#: For modes the name of one event, and how long it may hold a vCPU beyond
#: the exit, in µs.
EVENTS = {'warm': ('hit', 10), 'cold': ('miss', 50), 'socket': ('socket',
                                                              None)}


class Taken(typing.NamedTuple):
    """What a workload took in one boot.

    :param wall: in s; for a boot since the emulator's start, else by the
        guest's clock
    :param user: CPU time of the emulator in user mode, in s
    :param state: what the monitor counted meanwhile; empty without monitor
    """

    wall: float
    user: float
    state: dict = {}


def _user(machine):
    """CPU time of the emulator in user mode so far, in s."""
    with open('/proc/%d/stat' % machine.process.pid) as stat:
        # The name may hold anything, even a parenthesis.
        fields = stat.read().rpartition(')')[2].split()
    return int(fields[11]) / os.sysconf('SC_CLK_TCK')


def _counters(machine, mode):
    if not mode.policy:
        return {}
    return {name: value for name, value in machine.query().items()
            if type(value) is int}


def _since(after, before):
    return {name: value - before[name] for name, value in after.items()}


def _run_case(machine, mode, case, times):
    """Run a case of the guest.

    :returns: :class:`Taken`, of all the times
    :raises errors.ToolError: it did not do what it should
    """
    wall = user = 0
    before = _counters(machine, mode)
    for _ in range(times):
        machine.begin_case(case)
        began = _user(machine)
        result = machine.end_case(case, _CASE)
        user += _user(machine) - began
        if not result['executed'] or result['status'] != 'exit:0':
            raise errors.ToolError('the guest\'s %s failed: %s'
                                   % (case, result['status']))
        wall += result['seconds']
    return Taken(wall, user, _since(_counters(machine, mode), before))


def _run(emulator, guest, place, home, name, workers):
    """Boot a guest, run its cases, and end it.

    :param guest: :class:`Guest`
    :param place: its directory
    :param name: of the mode
    :returns: for each workload a :class:`Taken`
    :raises errors.ToolError: the monitor did not do what the mode is for
    """
    mode = MODES[name]
    monitor = mode.policy and {'socket': workers[mode.worker].socket,
                               'policy': mode.policy}
    with lab.Machine(emulator, place, home, monitor, append=_APPEND,
                     **guest.machine) as machine:
        wall = machine.wait_ready(_BOOT)
        taken = {guest.boot: Taken(wall, _user(machine),
                                   _counters(machine, mode))}
        if monitor and machine.query()['transport'] != mode.transport:
            raise errors.ToolError(
                'the monitor asked the worker by way of "%s", not "%s"'
                % (machine.query()['transport'], mode.transport),
                'see whether this system has memfd_create, and what %s says'
                % workers[mode.worker].log)
        for workload, (case, times) in guest.cases.items():
            taken[workload] = _run_case(machine, mode, case, times)
    return taken


def _noise(values):
    """How far runs of the same are apart, as a part of what they took."""
    return (max(values) - min(values)) / statistics.median(values)


def _ratio(name, takes, stock, limit):
    """A mode against stock.

    As a rule that is the median of the ratios of each round. Where stock
    differs from itself by more than the limit leaves, the least of all runs
    is set against the least of stock: what disturbs a run never makes it
    shorter.

    :param takes: what the mode took, in s, a value a round
    :param stock: the same of stock
    :returns: :class:`figures.Result`; its unit tells which of the two it is
    """
    if limit is not None and _noise(stock) > limit - 1:
        return figures.Result(name, min(takes) / min(stock),
                              'of stock, least of %d' % len(takes), limit)
    return figures.Result(name, statistics.median(
        one / other for one, other in zip(takes, stock, strict=True)),
        'of stock, median of %d' % len(takes), limit)


def workload_results(workload, taken, limits=LIMITS):
    """Results of one workload.

    :param workload: its name
    :param taken: for each mode the list of its :class:`Taken`; those at the
        same place are of the same round
    :param limits: as :data:`LIMITS`
    :returns: list of :class:`figures.Result`
    """
    results = []
    for clock, unit in (('wall', 's'), ('user', 's user')):
        stock = [getattr(one, clock) for one in taken['stock']]
        if clock == 'user' and statistics.median(stock) < _LEAST_USER:
            continue
        results += [
            figures.Result('%s_stock_%s' % (workload, clock),
                           statistics.median(stock), unit),
            figures.Result('%s_stock_%s_noise' % (workload, clock),
                           _noise(stock), 'of median')]
        results += [
            _ratio('%s_%s_%s' % (workload, mode, clock),
                   [getattr(one, clock) for one in takes], stock,
                   limits.get((workload, mode, clock)))
            for mode, takes in taken.items() if mode != 'stock']
    for counter, unit in (('fetches', 'fetches'), ('hot-pages', 'times hot')):
        results.append(figures.Result(
            '%s_warm_%s' % (workload, counter.replace('-', '_')),
            statistics.median(one.state[counter] for one in taken['warm']),
            unit))
    return results


def event_results(taken):
    """What one event took, split up.

    The counters hold sums, so these are means of a boot, and of these the
    medians.

    :param taken: as for :func:`workload_results`, of a boot
    :returns: list of :class:`figures.Result`
    """
    def median(mode, part, whole, scale=1.0):
        return statistics.median(
            scale * one.state[part] / max(one.state[whole], 1)
            for one in taken[mode])

    results = []
    for mode, (event, limit) in EVENTS.items():
        if mode not in taken:
            continue
        parts_of = {'exit': median(mode, 'hold-ns', 'fetches', 1e-3),
                    'copy': median(mode, 'copy-ns', 'fetches', 1e-3),
                    'tag': median(mode, 'tag-ns', 'fetches', 1e-3)}
        beyond = parts_of['copy'] + parts_of['tag']
        if event == 'hit':
            results.append(figures.Result(
                'hit_share', median(mode, 'table-hits', 'fetches'),
                'of fetches'))
        else:
            parts_of['wait'] = median(mode, 'wait-ns', 'waits', 1e-3)
            beyond += parts_of['wait']
        results += [figures.Result('%s_%s_us' % (event, part), value, 'µs')
                    for part, value in parts_of.items()]
        results.append(figures.Result('%s_beyond_exit_us' % event, beyond,
                                      'µs', limit))
    return results


def _bench(guest, place, emulators, rounds, home, workers):
    """Boot one guest in all its modes.

    :param emulators: the patched one and stock
    :returns: for each workload and mode the list of :class:`Taken`
    """
    patched, stock = emulators
    taken = {workload: {mode: [] for mode in guest.modes}
             for workload in guest.workloads}

    def run(mode):
        return _run(stock if mode == 'stock' else patched, guest, place, home,
                    mode, workers)

    plan = []
    for number in range(rounds):
        first = number % len(guest.modes)
        plan += guest.modes[first:] + guest.modes[:first]
    with ui.step('boot %d guests, for %s' % (
            len(plan) + 2, ', '.join(guest.workloads))) as step:
        # For nothing, but that the disk has been read and the table is full.
        run('stock')
        run('warm')
        for number, mode in enumerate(plan):
            step.progress(number, len(plan))
            for workload, one in run(mode).items():
                taken[workload][mode].append(one)
    return taken


def monitor(args):
    """What the page-fetch monitor costs, in each of its modes.

    Rounds of boots, in changing order, each with all its workloads: the
    emulator without the series (stock), the patched one without monitor
    (off), with it under policy=report (report), and under policy=enforce
    with a worker whose verdict table knows the pages from an earlier boot
    (warm), with one that has no table, so that each page goes over the ring
    (cold), and with one that has no ring either (socket). All boot with
    nokaslr, or each boot would have other pages.

    Workloads: boot, exec500, loop, smc, own in the guest with busybox, and
    debian-boot, debian-exec500, debian-jit (LuaJIT) in the one with Debian
    and systemd; --only takes some of them.

    WORKLOAD_MODE_wall is the ratio of the time to that of stock, by the
    guest's own clock but for boots; WORKLOAD_MODE_user that of the
    emulator's CPU time in user mode. The unit tells how it was found: from
    the median of the ratios within the rounds, or, where stock differs from
    itself by more than a limit leaves, from the least of all runs. hit_*,
    miss_* and socket_* split up what one fetch took in a boot: exit, copy,
    tag, wait.

    Limits, as ratios to stock: boot 1.03 warm and 1.10 cold; exec500 and
    loop 1.02 user, warm and cold; off 1.01 user for these three; own 10 and
    debian-jit 1.5, warm and cold. Beyond the exit, a fetch that the table
    answers may take 10 µs, and one that the ring answers 50 µs.
    """
    only = args.only or WORKLOADS
    wanted = {name: guest._replace(cases={
        workload: case for workload, case in guest.cases.items()
        if workload in only}) for name, guest in _GUESTS.items()
        if set(only).intersection(guest.workloads)}
    emulators = parts.emulator(), parts.stock_emulator()
    places = {name: getattr(parts, name)() for name in wanted}
    results = []
    with lab.directory() as home:
        workers = {}
        for name, options in _WORKERS.items():
            (home / name).mkdir()
            workers[name] = lab.Worker(home / name, **options)
        with workers['warm'], workers['cold'], workers['socket']:
            for name, guest in wanted.items():
                taken = _bench(guest, places[name], emulators, args.pairs,
                               home, workers)
                for workload in guest.workloads:
                    if workload in only:
                        results += workload_results(workload, taken[workload])
                if guest.boot == 'boot' and guest.boot in only:
                    results += event_results(taken[guest.boot])
    return results
