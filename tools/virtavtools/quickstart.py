# SPDX-License-Identifier: Apache-2.0
"""The main job, shown: pages are held, scanned and matched before they run."""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import time

from virtav_nova.monitor import qmp
from virtavtools import errors
from virtavtools import lab
from virtavtools import parts
from virtavtools import venv

#: The one rule of etc/virtav/rules.
RULE = 'VirtAV_SelfTest'
#: What the monitor does with a match: to a process, and to a kernel.
FAULT, PAUSE = 'fault', 'pause'

#: name: as the guest knows it; title: what happens; action: what the monitor
#: is to do
Case = collections.namedtuple('Case', 'name title action')
CASES = (
    Case('user-write', 'a program writes the signature into memory and jumps'
         ' there', FAULT),
    Case('file', 'the signature is in an executable file, read from disk',
         FAULT),
    Case('packed', 'a packed executable decrypts itself, then jumps', FAULT),
    Case('kernel', 'a kernel module carries the signature', PAUSE),
)
#: What an operator is told of a match that was blocked.
_BLOCKED = {
    FAULT: [('blocked', 'the process got a fault instead of the page')],
    PAUSE: [('paused', 'the whole VM stood still'),
            ('released', 'by the operator with action=fault; the VM goes on')],
}
#: Longest waits, in seconds: for a boot, which takes some seconds; for a
#: match; for what comes at once, or never.
_BOOT = 120
_MATCH = 10
_SOON = 5
#: What goes wrong with a guest, a worker or the connection to one of them.
_FAILURES = (EOFError, OSError, qmp.QMPError, subprocess.SubprocessError,
             errors.ToolError)


@dataclasses.dataclass
class Match:
    """What came of one case.

    :ivar event: data of PAGE_FETCH_MATCH, None without a match
    :ivar record: the worker's journal record, None without one
    :ivar paused: whether the VM was found paused
    :ivar outcome: what the guest reported, see :meth:`lab.Machine.end_case`
    """

    case: Case
    event: dict | None
    record: dict | None
    paused: bool
    outcome: dict

    @property
    def blocked(self):
        """Whether the page was held, and then treated as it must be."""
        return bool(self.event and self.record and self.record['held']
                    and self.event['action'] == self.case.action
                    and self.paused == (self.case.action == PAUSE))

    def summary(self):
        """The match as a part of the summary."""
        return {'case': self.case.name,
                'rule': self.event and self.event['rule'],
                'blocked': self.blocked,
                'executed': self.outcome['executed']}

    def problems(self):
        """What is wrong with it, as a list of strings."""
        found = []
        if not self.event:
            found.append('nothing matched')
        elif self.event['rule'] != RULE:
            found.append('matched by %s, not %s' % (self.event['rule'], RULE))
        elif not self.blocked:
            found.append('matched, but not held and blocked')
        if self.outcome['executed']:
            found.append('the guest says that it ran')
        return ['%s: %s' % (self.case.name, text) for text in found]

    def rows(self):
        """What an operator wants to know of it.

        :returns: list of (label, text); lines of at most 64 characters
        """
        rows = []
        if self.event:
            event = self.event
            rows += [
                ('matched', 'rule %s' % event['rule']),
                ('where', 'gva %#x, gpa %s' % (
                    event['gva'], '%#x' % event['gpa'] if 'gpa' in event
                    else 'not known')),
                ('', 'rip %#x, cr3 %#x, cpl %d' % (
                    event['rip'], event['cr3'], event['cpl']))]
        if self.blocked:
            rows += [('held', 'the fetch waited for the verdict'),
                     *_BLOCKED[self.case.action]]
        return [*rows, ('guest', said(self.outcome))]


@dataclasses.dataclass
class Run:
    """What came of one guest.

    :ivar boot_s: from the emulator's start until the guest was ready, in s
    :ivar fetches: first fetches that the monitor counted
    :ivar distinct: pages that differ, of those that the worker was asked for
    :ivar matches: :class:`Match` of each case
    :ivar clean: whether the clean program ran, each time that it was tried
    :ivar failure: what ended the run early, or None
    """

    boot_s: float | None = None
    fetches: int | None = None
    distinct: int | None = None
    matches: list = dataclasses.field(default_factory=list)
    clean: list = dataclasses.field(default_factory=list)
    failure: str | None = None

    def problems(self):
        """Why it is no success, as a list of strings."""
        found = [problem for match in self.matches
                 for problem in match.problems()]
        if not all(self.clean):
            found.append('the clean program did not run')
        if self.failure:
            found.append(self.failure)
        return found


def said(outcome):
    """What the guest reported of a case, in words."""
    how, _, number = outcome['status'].partition(':')
    if how == 'signal':
        ended = 'killed by %s' % signal.Signals(int(number)).name
    else:
        ended = 'exit status %s' % number
    return '%s; the code %s' % (
        ended, 'left its mark: it ran' if outcome['executed']
        else 'left no mark: it never ran')


def summarize(runs, stock_boot_s):
    """The object that ``--json`` prints.

    :param runs: list of :class:`Run`; of several, figures are the medians
    :param stock_boot_s: in seconds
    """
    def median(name):
        values = [getattr(run, name) for run in runs]
        values = [value for value in values if value is not None]
        return statistics.median_low(values) if values else None

    summary = {
        'fetches': median('fetches'),
        'distinct': median('distinct'),
        'matches': [match.summary() for run in runs for match in run.matches],
        'clean_ran': all(run.clean and all(run.clean) for run in runs),
        'boot_s': median('boot_s'),
        'stock_boot_s': stock_boot_s}
    if len(runs) > 1:
        summary['runs'] = len(runs)
        summary['runs_good'] = sum(not run.problems() for run in runs)
    return summary


class _Guest:
    """One watched guest, from its boot to its end."""

    def __init__(self, machine, worker, show):
        self.machine = machine
        self.worker = worker
        self.show = show
        self.run = Run()

    def everything(self):
        """Boot, run the cases and power off; fills :attr:`run`."""
        self.boot()
        self.show.heading('Cases')
        self.clean('a program without the signature')
        for case in CASES:
            self.case(case)
        self.clean('the same program again, after all this')
        self.run.fetches = self.machine.query()['fetches']
        self.machine.power_off()
        self.run.distinct = self.worker.record(
            type='session', event='closed',
            instance=self.machine.instance)['distinct']

    def boot(self):
        with self.show.live() as update:
            def waiting():
                update('booting, watched: %.1f s, %s first fetches' % (
                    time.monotonic() - self.machine.started,
                    format(self.machine.query()['fetches'], ',')))
            self.run.boot_s = round(
                self.machine.wait_ready(_BOOT, waiting), 3)
        state = self.machine.query()
        self.show.result(True, 'watched', '%.2f s   %s' % (
            self.run.boot_s, version(self.machine)), [
            ('policy', 'enforce, on-match=block'),
            ('fetches', '%s pages, each held: %s until the verdict came,'
             % (format(state['fetches'], ','), format(state['waits'], ','))),
            ('', 'the others were known to be clean'),
            ('', 'a hold took %.0f µs on average, %.1f ms at most' % (
                state['wait-ns'] / max(state['waits'], 1) / 1e3,
                state['max-wait-ns'] / 1e6)),
            ('rules', 'digest %s' % state.get('digest', 'not known')[:32])])

    def clean(self, title):
        with self.show.live() as update:
            update('clean: %s' % title)
            outcome = self.machine.run_case('clean')
        ran = outcome['executed'] and outcome['status'] == 'exit:0'
        self.run.clean.append(ran)
        self.show.result(ran, 'clean', title, [('guest', said(outcome))])

    def case(self, case):
        with self.show.live() as update:
            update('%s: %s' % (case.name, case.title))
            self.machine.begin_case(case.name)
            event = self._match()
            paused = event is not None and event['action'] == PAUSE
            if paused:
                self.machine.qmp.wait_event('STOP', _SOON)
                paused = self.machine.status() == 'paused'
                update('%s: the VM is paused' % case.name)
                self.machine.set(release={
                    'block': event['block'], 'offset': event['offset'],
                    'action': 'fault'})
            outcome = self.machine.end_case(case.name)
            record = event and self._record(event)
        match = Match(case, event, record, paused, outcome)
        self.run.matches.append(match)
        self.show.result(not match.problems(), case.name, case.title,
                         match.rows(), match.problems())

    def _match(self):
        try:
            return self.machine.qmp.wait_event('PAGE_FETCH_MATCH',
                                               _MATCH)['data']
        except qmp.QMPTimeout:
            return None

    def _record(self, event):
        # The worker answers first and writes then.
        try:
            return self.worker.record(_SOON, type='match', **{
                name: event[name] for name in (
                    'instance', 'rule', 'block', 'offset', 'gva', 'tag')})
        except TimeoutError:
            return None


def version(machine):
    """The version of a running emulator, in words."""
    answer = machine.qmp.execute('query-version')
    return 'QEMU %(major)d.%(minor)d.%(micro)d' % answer['qemu'] + (
        ' %s' % answer['package'].strip() if answer['package'] else '')


def _run(emulator, guest, home, worker, show):
    """Boot a watched guest and run the cases in it.

    :returns: :class:`Run`
    """
    machine = lab.Machine(emulator, guest, home, {
        'socket': worker.socket, 'policy': 'enforce', 'on-match': 'block'})
    watched = _Guest(machine, worker, show)
    try:
        with machine:
            watched.everything()
    except _FAILURES as error:
        watched.run.failure = str(error)
        show.result(False, 'failed', 'this run ended early',
                    problems=[watched.run.failure])
    return watched.run


def _boot_stock(emulator, guest, home, show):
    """Boot the guest unwatched; gives back the time in seconds."""
    try:
        with show.live() as update, lab.Machine(emulator, guest,
                                                home) as machine:
            seconds = round(machine.wait_ready(_BOOT, lambda: update(
                'booting, not watched: %.1f s'
                % (time.monotonic() - machine.started))), 3)
            name = version(machine)
    except _FAILURES as error:
        raise errors.ToolError('the guest does not boot under %s: %s'
                               % (emulator, error))
    show.result(True, 'stock', '%.2f s   %s' % (seconds, name))
    return seconds


@contextlib.contextmanager
def _kept(home, directory):
    """Keep what was written to a directory that will go."""
    try:
        yield
    finally:
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            for path in (*home.glob('*.log'), *home.glob('state/*.jsonl')):
                shutil.copy(path, directory)


def _warm(*paths):
    """Read files, so that no boot has to wait for the disk."""
    for path in paths:
        path.read_bytes()


def _show_all(args, show):
    """Run everything.

    :returns: list of :class:`Run`, and the stock boot's time in seconds
    """
    emulator, stock = parts.emulator(), parts.stock_emulator()
    guest = parts.guest()
    manifest = json.loads((guest / 'manifest.json').read_text())
    show.heading('VirtAV quickstart')
    show.rows([('guest', 'Linux %s, 512 MiB, one vCPU, TCG'
                % manifest['kernel']),
               ('worker', 'virtav-scan-worker with etc/virtav/rules'),
               *([('', 'as root, without capabilities: others may not '
                  'reach it')] if os.geteuid() == 0 else [])])
    _warm(stock, emulator, *guest.iterdir())
    runs = []
    with (lab.directory() as home, _kept(home, args.keep),
          lab.Worker(home) as worker):
        show.heading('Boot')
        stock_boot_s = _boot_stock(stock, guest, home, show)
        for number in range(1, args.runs + 1):
            # The first is shown at length.
            with show.hushed(number > 1):
                runs.append(_run(emulator, guest, home, worker, show))
            if args.runs > 1:
                show.count(number, args.runs, runs[-1])
    return runs, stock_boot_s


def _parser():
    parser = argparse.ArgumentParser(
        prog='tools/quickstart',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='''\
Shows the main job on real parts: boots a Linux guest under the patched QEMU
with a scan worker beside it, and runs four programs in it that carry a
harmless test signature. Each is to be held, matched and stopped before it
runs. What is missing is installed and built first, which takes some minutes;
later runs take some seconds.

The exit status is 0 only if all four are stopped and a clean program runs.''',
        epilog=parts.HELP)
    parser.add_argument(
        '--json', action='store_true',
        help='show on stderr what happens, and print one JSON object')
    parser.add_argument(
        '--runs', metavar='N', type=int, default=1,
        help='do it with N guests, one after the other')
    parser.add_argument(
        '--keep', metavar='DIR', type=pathlib.Path,
        help='leave the alert journal and the logs in DIR')
    return parser


def main(argv=None):
    """tools/quickstart."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error('--runs must be 1 or more')
    venv.enter()
    # Only there are the packages that it takes.
    from virtavtools import show
    screen = show.Show(args.json)
    runs, stock_boot_s = _show_all(args, screen)
    summary = summarize(runs, stock_boot_s)
    screen.close(runs, summary)
    if args.json:
        print(json.dumps(summary), flush=True)
    return 1 if any(run.problems() for run in runs) else 0
