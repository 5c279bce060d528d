# SPDX-License-Identifier: Apache-2.0
"""What the tests with guests share."""

import contextlib
import json
import os
import pathlib
import re
import tempfile
import time

import testtools
from testtools import content

from tests.functional import fake
from virtav_nova.monitor import qmp
from virtavtools import lab

NIGHTLY = os.environ.get('VIRTAV_NIGHTLY') == '1'
USER_CASES = ('user-write', 'file', 'packed')
RULE = 'VirtAV_SelfTest'


def _required(name):
    try:
        return pathlib.Path(os.environ[name])
    except KeyError:
        # Not a reason to skip: nothing would be tested.
        raise RuntimeError('%s is not set; use tools/test functional' %
                           name) from None


class TestCase(testtools.TestCase):
    """A test with workers and guests, which end with it.

    What they printed is shown when it fails. An emulator that crashed or
    complained fails it.

    :cvar Machine: kind of the guests
    :cvar harmless: regular expression of what an emulator may print
    """

    Machine = lab.Machine
    harmless = ': info: |: terminating on'

    def setUp(self):
        super().setUp()
        self.emulator = _required('VIRTAV_QEMU')
        self.guest = _required('VIRTAV_GUEST')
        self.home = self.enterContext(lab.directory())

    @property
    def signature(self):
        """The signature that the guest's cases carry, as bytes."""
        manifest = (self.guest / 'manifest.json').read_bytes()
        return json.loads(manifest)['signature'].encode()

    def worker(self, start=True, **options):
        """A real scan worker.

        :param start: whether to start it
        """
        worker = lab.Worker(self.home, **options)
        self.addOnException(lambda _: self._show(
            'worker', worker.log.read_text(errors='replace')
            if worker.log.exists() else ''))
        self.addCleanup(worker.stop)
        if start:
            worker.start()
        return worker

    def fake_worker(self, script=fake.honest):
        """A scan worker that does what a script says."""
        worker = self.enterContext(fake.Worker(self.home, script))
        self.addCleanup(lambda: self.assertEqual([], worker.failures))
        return worker

    def prepare(self, worker=None, monitor=None, **arguments):
        """A guest that is not started yet.

        :param worker: its scan worker; None for a guest without a monitor
        :param monitor: the monitor's properties, as a mapping
        :param arguments: for :class:`lab.Machine`
        """
        home = pathlib.Path(tempfile.mkdtemp(dir=self.home))
        if worker:
            monitor = {'socket': worker.socket, **(monitor or {})}
        return self.Machine(self.emulator, self.guest, home, monitor,
                            **arguments)

    def machine(self, worker=None, monitor=None, **arguments):
        """Start a guest, see :meth:`prepare`."""
        machine = self.prepare(worker, monitor, **arguments)
        self.addOnException(lambda _: self._show_machine(machine))
        # Once it has been stopped, which is done by then:
        self.addCleanup(self._check_end, machine)
        return self.enterContext(machine)

    def booted(self, *arguments, **keywords):
        """Start a guest and wait until it has booted."""
        machine = self.machine(*arguments, **keywords)
        machine.wait_ready()
        return machine

    def _check_end(self, machine):
        self.assertEqual(0, machine.process.returncode, machine.messages())
        self.assertEqual([], [
            line for line in machine.messages().splitlines()
            if not re.search(self.harmless, line)])

    def _show(self, name, text):
        self.addDetail('%s-%d' % (name, len(self.getDetails())),
                       content.text_content(text))

    def _show_machine(self, machine):
        self._show('console', '\n'.join(machine.lines))
        self._show('qemu', machine.messages())
        if machine.process and machine.process.poll() is None:
            with contextlib.suppress(qmp.QMPError):
                self._show('state', '%s\n%s' % (
                    machine.status(), machine.query()))

    def eventually(self, what, check, timeout=20):
        """Wait until a function gives something true.

        :param what: is waited for, for the failure
        :returns: what it gave
        """
        deadline = time.monotonic() + timeout
        while True:
            # Not missed however slow this is: look once more at the end.
            late = time.monotonic() > deadline
            result = check()
            if result:
                return result
            if late:
                self.fail('not within %g s: %s' % (timeout, what))
            time.sleep(0.05)

    def wait_status(self, machine, status, timeout=20):
        """Wait until QEMU is in a run state."""
        self.eventually('status ' + status,
                        lambda: machine.status() == status, timeout)

    def prompt(self, machine, command, **arguments):
        """Run a QMP command that must be answered within a second."""
        begin = time.monotonic()
        result = machine.qmp.execute(command, **arguments)
        self.assertLess(time.monotonic() - begin, 1, command)
        return result

    def assert_prompt(self, machine):
        """QMP answers at once."""
        self.prompt(machine, 'query-status')
        self.prompt(machine, 'query-page-fetch-monitor')

    def check_waiting(self, machine):
        """All is answered at once while a vCPU waits, to the end of QEMU.

        :param machine: one of whose vCPUs waits for a verdict that does not
            come before this is over
        """
        for status in ('paused', 'running'):
            self.prompt(machine, 'stop' if status == 'paused' else 'cont')
            self.assert_prompt(machine)
            self.assertEqual(status, machine.status())
        state = machine.query()
        self.assertEqual((1, 0), (state['states']['held'],
                                  state['timeouts']))
        self.prompt(machine, 'quit')
        machine.process.wait(2)

    def assert_nothing_runs(self, machine, seconds=1):
        """The guest makes no step, and QMP answers, for a while."""
        before = machine.query()['fetches']
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.assert_prompt(machine)
            self.assertIsNone(machine.line(0.1))
        self.assertEqual(before, machine.query()['fetches'])

    def events(self, machine, name):
        """The data of the events of a name that have come by now."""
        found = []
        with contextlib.suppress(qmp.QMPTimeout):
            while True:
                found.append(machine.qmp.wait_event(name, 0)['data'])
        return found

    def event(self, machine, name, timeout=20):
        """Wait for an event and take its data; checks whose it is."""
        data = machine.qmp.wait_event(name, timeout)['data']
        self.assertEqual(('virtav0', machine.instance),
                         (data['id'], data['instance']))
        return data

    def match(self, machine, worker=None, **expected):
        """Wait for a match; event and journal have to tell the same.

        :param worker: the worker with the journal; None: do not look there
        :param expected: what the event has to tell
        :returns: the event's data
        """
        data = self.event(machine, 'PAGE_FETCH_MATCH')
        self.assertEqual(expected, {
            name: data.get(name) for name in expected})
        if worker:
            same = {name: data[name] for name in (
                'instance', 'rule', 'block', 'offset', 'gpa', 'gva', 'rip',
                'cr3', 'cpl', 'tag')}
            same['vcpu'] = data['cpu-index']
            self.eventually('one journal record of %s' % data, lambda: [
                record for record in worker.records('match')
                if same == {name: record[name] for name in same}])
        return data

    def release(self, machine, match, action):
        """Release the page of a match.

        :param match: data of the event
        :param action: ``run`` or ``fault``
        """
        machine.set(release={'block': match['block'],
                             'offset': match['offset'], 'action': action})

    def assert_result(self, machine, case, executed, status):
        """Wait for the end of a case, and check what the guest says."""
        result = machine.end_case(case)
        self.assertEqual((case, executed), (case, result['executed']))
        self.assertRegex(result['status'], status)

    def assert_ran(self, machine, *cases):
        """Cases run to a good end."""
        for case in cases:
            machine.begin_case(case)
            self.assert_result(machine, case, True, 'exit:0')

    def assert_blocked(self, machine, worker, *cases):
        """User-mode cases are killed before their code runs."""
        for case in cases:
            machine.begin_case(case)
            self.assert_result(machine, case, False, 'signal:11')
            self.match(machine, worker, action='fault', cpl=3)
