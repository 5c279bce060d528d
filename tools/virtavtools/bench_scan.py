# SPDX-License-Identifier: Apache-2.0
"""What scanning costs: engines, the worker under load, storms and reloads."""

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import random
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid

from stevedore import driver

from virtav_nova import exception
from virtav_nova.engines import base
from virtav_nova.monitor import client
from virtav_nova.monitor import player
from virtav_nova.monitor import recording
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.rules import directory
from virtav_nova.rules import sample
from virtav_nova.worker import status
import virtavtools
from virtavtools import errors
from virtavtools import figures
from virtavtools import generated_rules
from virtavtools import lab
from virtavtools import parts
from virtavtools import ui

Result = figures.Result

#: Rules of the sets that engines are measured with.
COUNTS = (100, 1000, 5000, 15000)
#: The one that limits are for.
_JUDGED = 5000
_ENGINES = ('noop', 'yara', 'twostage')
_CLAMD = '/run/clamav/clamd.ctl'
#: Pages that are scanned, and what may be spent on it, in seconds.
_PAGES, _SCAN_TIME = 4000, 8.0
_ENGINE_TIME = 900  # longest load of an engine, in seconds

_CLIENTS = (1, 8, 64)
#: Different pages of the load that is cached.
_CACHED = 64
_DEPTH = 32
#: Where a packed verdict has its result, and what is right.
_RESULT = slice(wire.HEADER_SIZE + 32, wire.HEADER_SIZE + 36)
_CLEAN = wire.Result.CLEAN.to_bytes(4, 'little')
_GUESTS = 100  # of a storm
_BOOT = 120
_PATIENCE = 60


def _times(samples):
    """Median and 99th percentile."""
    cuts = statistics.quantiles(samples, n=100, method='inclusive')
    return cuts[49], cuts[98]


def _pss(pid):
    """Memory of a process in MiB, shared memory by its share."""
    text = pathlib.Path('/proc/%d/smaps_rollup' % pid).read_text()
    return int(text.partition('\nPss:')[2].split()[0]) / 1024


def _descendants(pid):
    """Process ids of a process and of all that it started."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, pathlib.Path(
                '/proc/%d/task/%d/children' % (one, one)).read_text().split())
    return found


def _cpu(pid):
    """Processor time of a process and its descendants, in seconds.

    They have one thread each.
    """
    total = 0
    for one in _descendants(pid):
        with contextlib.suppress(OSError):
            total += int(pathlib.Path(
                '/proc/%d/schedstat' % one).read_text().split()[0])
    return total / 1e9


# Engines. Each is measured in a process of its own, for its memory.


def measure(name, rules, seconds=_SCAN_TIME):
    """Measure an engine, in this process.

    :param name: of the engine
    :param rules: directory, None for an engine that takes none
    :param seconds: what may be spent on scans
    :returns: mapping for JSON
    """
    pages = sample.pages()
    files = directory.read(str(rules)) if rules else []
    options = base.EngineOptions(sample=pages)
    kind = driver.DriverManager('virtav.engines', name).driver
    before = _pss(os.getpid())
    began = time.monotonic()
    engine = kind.compile(files, options)
    load = time.monotonic() - began
    # As the loader of a rule set does.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = _pss(os.getpid()) - before
    own = list(pages)
    random.Random(1).shuffle(own)  # noqa: S311
    for page in own[:50]:
        engine.scan(page)
    taken, matches = [], 0
    until = time.monotonic() + seconds
    while len(taken) < _PAGES and time.monotonic() < until:
        page = own[len(taken) % len(own)]
        begin = time.thread_time_ns()
        found = engine.scan(page)
        taken.append(time.thread_time_ns() - begin)
        matches += bool(found) and len(taken) <= len(own)
    probe = generated_rules.PROBE.ljust(wire.PAGE_SIZE, b'\xcc')
    median, p99 = _times(taken)
    return {'load_s': load, 'memory_mib': memory, 'median_us': median / 1e3,
            'p99_us': p99 / 1e3, 'pages': len(taken), 'matches': matches,
            'mean_us': statistics.fmean(taken) / 1e3,
            'rules': engine.describe()['rules'],
            'probe': [match.rule for match in engine.scan(probe)]}


def _measured(name, rules, seconds):
    # Its entry is at the end of this file.
    command = [sys.executable, '-m', 'virtavtools.bench_scan', name,
               str(rules or ''), str(seconds)]
    with subprocess.Popen(
            command, cwd=virtavtools.ROOT / 'tools', stdout=subprocess.PIPE,
            text=True) as process:
        try:
            said, _ = process.communicate(timeout=_ENGINE_TIME)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise errors.ToolError('the engine %s cannot be measured' % name)
    return json.loads(said.splitlines()[-1])


def engines(home, label, rules, quick, generated=True):
    """Measure all engines with the same rules.

    :param label: for names of results
    :param rules: directory
    :param generated: whether the probe has to match
    :returns: list of :class:`Result`
    """
    names = list(_ENGINES)
    if os.path.exists(_CLAMD):
        names.append('clamav')
    results, medians = [], {}
    for name in names:
        with ui.step('scan with %s and %s rules' % (name, label)):
            found = _measured(name, rules, _SCAN_TIME / (4 if quick else 1))
        if (generated and name in ('yara', 'twostage')
                and found['probe'] != [generated_rules.PROBE_RULE]):
            raise errors.ToolError(
                '%s did not find what it has to: %s' % (name, found))
        prefix = '%s_%s_' % (name, label)
        limits = ((70, 250) if name == 'twostage' and label == str(_JUDGED)
                  else (None, None))
        medians[name] = found['median_us']
        results += [
            Result(prefix + 'median_us', found['median_us'], 'µs', limits[0]),
            Result(prefix + 'p99_us', found['p99_us'], 'µs', limits[1]),
            Result(prefix + 'pages_s', 1e6 / max(found['mean_us'], .01),
                   'pages/s/core'),
            Result(prefix + 'memory', found['memory_mib'], 'MiB'),
            Result(prefix + 'load', found['load_s'], 's')]
        if found['matches']:
            results.append(Result(prefix + 'matches', found['matches'],
                                  'pages'))
    judged = label == str(_JUDGED)
    results.append(Result(
        'twostage_%s_of_yara' % label, medians['twostage'] / medians['yara'],
        'of yara', 1 / 6 if judged else None))
    return results


# The worker


@contextlib.contextmanager
def _worker(home, rules=lab.RULES, **options):
    """A worker that takes everybody, with one scan process."""
    place = home / uuid.uuid4().hex[:8]
    place.mkdir()
    options = {'require_token': False, 'processes': 1, 'max_sessions': 300,
               **options}
    with lab.Worker(place, rules, **options) as worker:
        worker.status = str(place / 'status.sock')
        # It may still be loading its rules.
        client.Client(str(worker.socket), client.hello(), _BOOT).close()
        yield worker


def _counters(worker):
    return status.ask(worker.status, 'status')['counters']


def _windows(count, neighbours):
    """Windows of real code, no two alike.

    :param neighbours: whether there are pages before and after
    """
    pages = sample.pages()
    for number in range(count):
        page = number.to_bytes(8, 'little') + pages[number % len(pages)][8:]
        edge = pages[(number + 1) % len(pages)][:wire.EDGE_SIZE]
        yield (wire.window(page, edge, edge) if neighbours
               else wire.window(page))


def _request(window, number, tagger, neighbours):
    page = window[wire.EDGE_SIZE:-wire.EDGE_SIZE]
    return wire.Request(
        number, 1, number << 12, number << 12, 0x400000, 0x400000, 0x1000, 0,
        3, wire.HOLD | (wire.BEFORE | wire.AFTER if neighbours else 0),
        tagger.tag(page), b'pc.ram',
        tagger.tag(window[:wire.JUNCTION_SIZE]) if neighbours
        else wire.NO_TAG,
        tagger.tag(window[-wire.JUNCTION_SIZE:]) if neighbours
        else wire.NO_TAG, window).pack()


class _Batches:
    """A client that keeps its ring full, as fast as Python can.

    It asks for the same pages over and over; their frames are ready.
    """

    def __init__(self, path, frames=None, neighbours=True):
        self.session = client.Client(path, client.hello())
        if not self.session.shared:
            self.session.close()
            raise errors.ToolError('the worker gives no shared memory')
        self.frames = frames or [
            _request(window, number, self.session.tagger, neighbours)
            for number, window in enumerate(_windows(_CACHED, neighbours))]
        # What only this bench does: to look past the frames.
        self._requests = self.session._ring.requests
        self._verdicts = self.session._ring.verdicts
        self._depth = min(_DEPTH, self.session.most)
        self._doorbell = self.session._socket
        self._next = 0
        self.waiting = 0
        self.answered = 0

    def turn(self):
        """Ask for as many as may be, take what is there.

        :returns: how many verdicts came
        """
        came = 0
        take = self._verdicts.take
        while (data := take()) is not None:
            if data[_RESULT] != _CLEAN:
                raise errors.ToolError('a wrong verdict: %r' % wire.whole(
                    data, wire.Verdict, wire.Refused))
            came += 1
        self.waiting -= came
        self.answered += came
        # Half a ring at a time: who refills it one by one is told of each.
        if self.waiting <= self._depth // 2:
            frames, put = self.frames, self._requests.put
            for _ in range(self._depth - self.waiting):
                put(frames[self._next % _CACHED])
                self._next += 1
            self.waiting = self._depth
            with contextlib.suppress(BlockingIOError):
                self._doorbell.send(ring.DOORBELL, socket.MSG_DONTWAIT)
        return came


def _sustained(clients, worker, seconds):
    """Have clients ask for what is cached, all the time.

    :returns: verdicts, processor time of the worker and wall time in s
    """
    poll = select.poll()
    for one in clients:
        poll.register(one.session.fd, select.POLLIN)
    for stage in (min(.5, seconds / 2), seconds):
        before = sum(one.answered for one in clients)
        cpu, begin = _cpu(worker.process.pid), time.monotonic()
        while time.monotonic() < begin + stage:
            if not sum(one.turn() for one in clients):
                poll.poll(5)
                for one in clients:
                    one.session._doorbells()
    return (sum(one.answered for one in clients) - before,
            _cpu(worker.process.pid) - cpu, time.monotonic() - begin)


def cached(home, quick):
    """Verdicts of pages that the worker knows, by rings that are full."""
    results = []
    with (_worker(home, table_entries=0, budget_percent=100) as worker,
          ui.step('ask for cached verdicts')):
        for neighbours in (True, False):
            for count in _CLIENTS if neighbours else _CLIENTS[1:2]:
                with contextlib.ExitStack() as stack:
                    clients = []
                    for _ in range(count):
                        one = _Batches(
                            str(worker.socket), clients and clients[0].frames,
                            neighbours)
                        stack.callback(one.session.close)
                        clients.append(one)
                    verdicts, cpu, wall = _sustained(
                        clients, worker, .5 if quick else 2)
                name = 'cached%s_%d_' % ('' if neighbours else '_alone',
                                         count)
                results += [
                    Result(name + 'core_us', cpu / verdicts * 1e6,
                           'µs/verdict', 10),
                    Result(name + 'per_core', verdicts / cpu,
                           'verdicts/s/core'),
                    Result(name + 'per_s', verdicts / wall, 'verdicts/s')]
    return results


def roundtrips(home, quick):
    """Round trips of clients that each wait for one verdict."""
    results = []
    with (_worker(home, table_entries=0, budget_percent=100) as worker,
          ui.step('ask for one verdict at a time')):
        for count in _CLIENTS:
            taken = []
            with contextlib.ExitStack() as stack:
                poll = select.epoll()
                stack.callback(poll.close)
                clients = {}
                frames = None
                for _ in range(count):
                    one = stack.enter_context(client.Client(
                        str(worker.socket), client.hello()))
                    frames = frames or [
                        _request(window, number, one.tagger, True)
                        for number, window in enumerate(
                            _windows(_CACHED, True))]
                    clients[one.fd] = one
                    poll.register(one.fd, select.EPOLLIN)
                sent = {}
                wanted = (500 if quick else 5000) * (1 + (count > 1))
                place = 0
                for fd, one in clients.items():
                    sent[fd] = time.perf_counter()
                    one.send(frames[place % _CACHED])
                    place += 1
                while len(taken) < wanted:
                    ready = poll.poll(_PATIENCE)
                    if not ready:
                        raise errors.ToolError('the worker does not answer')
                    for fd, _events in ready:
                        for _answer in clients[fd].take():
                            taken.append(time.perf_counter() - sent[fd])
                            sent[fd] = time.perf_counter()
                            clients[fd].send(frames[place % _CACHED])
                            place += 1
            median, p99 = _times(taken[wanted // 10:])
            results += [
                Result('trip_%d_median_us' % count, median * 1e6, 'µs'),
                Result('trip_%d_p99_us' % count, p99 * 1e6, 'µs')]
    return results


def table(home, quick):
    """Pages that the verdict table knows: tagged, looked up, not asked."""
    lookups = 2000 if quick else 20000
    with (_worker(home) as worker, ui.step('look verdicts up'),
          client.Client(str(worker.socket), client.hello()) as session):
        windows = list(_windows(_CACHED, True))
        for number, window in enumerate(windows):
            request = _request(window, number, session.tagger, True)
            session.send(request)
            session.wait()
        page = slice(wire.EDGE_SIZE, -wire.EDGE_SIZE)
        deadline = time.monotonic() + 10
        while not all(session.known(session.tagger.tag(window[page]))
                      for window in windows):
            if time.monotonic() > deadline:
                raise errors.ToolError('clean pages are not in the table')
        time.sleep(.2)
        cpu, begin = _cpu(worker.process.pid), time.perf_counter()
        for number in range(lookups):
            window = windows[number % _CACHED]
            if not (session.known(session.tagger.tag(window[page]))
                    and session.known(session.tagger.tag(
                        window[:wire.JUNCTION_SIZE]))
                    and session.known(session.tagger.tag(
                        window[-wire.JUNCTION_SIZE:]))):
                raise errors.ToolError('a page is no longer in the table')
        wall = time.perf_counter() - begin
        cpu = _cpu(worker.process.pid) - cpu
    return [Result('table_hit_us', wall / lookups * 1e6, 'µs'),
            # A tick may fall on its timers.
            Result('table_hit_worker_cpu', cpu, 's', .02)]


def record_boot(home, name):
    """Record a boot of the test guest.

    :returns: path of the recording
    """
    place = home / name
    place.mkdir()
    with lab.Recorder(place) as recorder:
        with lab.Machine(parts.emulator(), parts.guest(), place, {
                'socket': recorder.socket, 'policy': 'enforce'}) as machine:
            machine.wait_ready(_BOOT)
        return recorder.finish()


def _playing(worker, played, guests, table_wanted=True):
    return player.Player(
        played, lambda _number: client.Client(
            str(worker.socket), client.hello(), _PATIENCE), guests,
        table=table_wanted).play()


def storm(home, quick):
    """A hundred guests boot from one recording at once."""
    guests = 20 if quick else _GUESTS
    with ui.step('record two boots'):
        paths = [record_boot(home, 'boot%d' % number) for number in (1, 2)]
    results, scans = [], {}
    with (recording.Recording(paths[0]) as first,
          recording.Recording(paths[1]) as second):
        pages = [{one.page(number) for number in range(one.pages)}
                 for one in (first, second)]
        results += [
            Result('boot_fetches', len(first), 'pages'),
            Result('boot_pages', first.pages, 'pages'),
            Result('boot_repeated', first.repeats() / max(len(first), 1),
                   'of fetches'),
            Result('boots_shared', len(pages[1] & pages[0])
                   / max(len(pages[1]), 1), 'of pages')]
        for count in (1, guests):
            with (_worker(home, processes=2) as worker,
                  ui.step('%d guests boot' % count)):
                cpu = _cpu(worker.process.pid)
                outcome = _playing(worker, first, count)
                cpu = _cpu(worker.process.pid) - cpu
                scans[count] = _counters(worker)['scans']
            if outcome.results[wire.Result.UNKNOWN]:
                raise errors.ToolError('there are pages without a verdict')
            results += [
                Result('storm_%d_scans' % count, scans[count], 'scans'),
                Result('storm_%d_asked' % count, outcome.asked, 'pages'),
                Result('storm_%d_hits' % count, outcome.hits, 'pages'),
                Result('storm_%d_cpu' % count, cpu, 's'),
                Result('storm_%d_s' % count, outcome.seconds, 's'),
                Result('storm_%d_p99_us' % count,
                       outcome.quantile(.99) * 1e6, 'µs')]
    results.append(Result('storm_scans_ratio', scans[guests] / scans[1],
                          'of one', 1.2))
    return results


class _Checked:
    """A client that knows what the verdicts have to be.

    :param verdicts: for each rule-set digest seen, page to expected result
    """

    def __init__(self, path, kinds, number):
        self.path, self.kinds = path, kinds
        self.number = number
        self.session = None
        self.wrong = []
        self.moved = -1
        self.digests = []
        self.place = number
        self._expected = {}
        self.sent = 0.0
        self.connect()

    def connect(self):
        if self.session:
            self.session.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                self.session = client.Client(self.path, client.hello())
                break
            except client.ClientError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(.01)
        self.moved += 1
        if self.session.welcome.digest not in self.digests:
            self.digests.append(self.session.welcome.digest)

    def ask(self):
        """Ask for the next page, which the worker has not seen before."""
        self.place += 1000
        kind = self.kinds[self.place // 1000 % len(self.kinds)]
        page = kind[0].ljust(wire.PAGE_SIZE - 8, b'\x90') + (
            self.place.to_bytes(8, 'little'))
        self._expected = {self.place: kind[len(self.digests)]}
        self.sent = time.perf_counter()
        self.session.send(_request(
            wire.window(page), self.place, self.session.tagger, False))

    def take(self):
        """:returns: seconds that a verdict took, None when there is none."""
        for answer in self.session.take():
            if isinstance(answer, wire.Refused):
                raise client.ClientError(answer.reason)
            if answer.result != self._expected.pop(answer.id):
                self.wrong.append(answer)
            return time.perf_counter() - self.sent
        return None


def reload(home, quick):
    """The rules change while clients wait for verdicts."""
    count = 200 if quick else 1000
    both, new = generated_rules.PROBE, b'VIRTAV-ONLY-IN-THE-NEW-SET'
    clean, match = wire.Result.CLEAN, wire.Result.MATCH
    kinds = [(b'', clean, clean), (both, match, match), (b'', clean, clean),
             (new, clean, match)]
    rules = home / 'reloaded'
    generated_rules.write(rules, count)
    taken = {'before': [], 'during': []}
    with (_worker(home, rules, budget_percent=100, reload_rate=50) as worker,
          contextlib.ExitStack() as stack):
        clients = [_Checked(str(worker.socket), kinds, number)
                   for number in range(8)]
        for one in clients:
            stack.callback(lambda one=one: one.session.close())
            one.ask()
        began = time.monotonic()
        told = done = None
        with ui.step('change the rules under load'):
            while done is None or time.monotonic() < done + 1:
                now = time.monotonic()
                if told is None and now > began + (1 if quick else 3):
                    (rules / 'new.yar').write_text(
                        'rule only_new { strings: $a = "%s" condition: $a }\n'
                        % new.decode())
                    # To the main process alone, as systemctl reload does.
                    os.kill(worker.process.pid, signal.SIGHUP)
                    told = now
                if told and now > told + 120:
                    raise errors.ToolError(
                        'the new rules do not come into force:\n%s' %
                        worker.log.read_text()[-2000:])
                if done is None and all(
                        len(one.digests) == 2 for one in clients):
                    done = now
                for one in clients:
                    try:
                        seconds = one.take()
                        if seconds is not None:
                            taken['during' if told else 'before'].append(
                                seconds)
                            one.ask()
                    except client.ClientError:
                        began_move = time.perf_counter()
                        one.connect()
                        one.ask()
                        one.sent = began_move
        wrong = [one for each in clients for one in each.wrong]
        moved = sum(one.moved for one in clients)
    before, during = (_times(taken[name]) for name in ('before', 'during'))
    return [
        Result('reload_wrong', len(wrong), 'verdicts', 0),
        Result('reload_moved', moved, 'sessions'),
        Result('reload_s', done - told, 's'),
        Result('reload_before_p99_us', before[1] * 1e6, 'µs'),
        Result('reload_p99_us', during[1] * 1e6, 'µs'),
        Result('reload_max_us', max(taken['during']) * 1e6, 'µs'),
        Result('reload_p99_ratio', during[1] / before[1], 'of before')]


#: What --only chooses from.
PARTS = {
    **{'engines%d' % count: count for count in COUNTS},
    'cached': cached,
    'roundtrips': roundtrips,
    'table': table,
    'storm': storm,
    'reload': reload,
}


def scan(args):
    """See :func:`virtavtools.bench.scan`."""
    names = args.only or [
        name for name in PARTS
        if not (args.rules and isinstance(PARTS[name], int))
        and not (args.quick and name == 'engines%d' % COUNTS[-1])]
    results = []
    with lab.directory() as home:
        if args.rules:
            if not pathlib.Path(args.rules).is_dir():
                raise errors.ToolError('%s is no directory' % args.rules)
            results += engines(home, 'own', args.rules, args.quick, False)
        for name in names:
            part = PARTS[name]
            if isinstance(part, int):
                rules = home / name
                generated_rules.write(rules, part)
                results += engines(home, str(part), rules, args.quick)
                shutil.rmtree(rules)
                continue
            try:
                results += part(home, args.quick)
            except (client.ClientError, exception.ConfigurationError
                    ) as error:
                raise errors.ToolError('%s: %s' % (name, error)) from error
    return results


if __name__ == '__main__':
    print(json.dumps(measure(sys.argv[1], sys.argv[2] or None,
                             float(sys.argv[3]))))
