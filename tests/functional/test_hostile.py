# SPDX-License-Identifier: Apache-2.0
"""Scan workers that do what the protocol does not allow.

Whatever they send, QEMU goes on, drops the connection, says why, connects
again, answers QMP at once, and under ``on-timeout=deny`` nothing runs. The
check is made at the first page that the guest wants to run.
"""

import os
import random
import re
import time

from tests.functional import base
from tests.functional import fake
from virtav_nova.monitor import wire

DEADLINE_MS = 300


def _frame(number, length, magic=b'VAPF', version=1, reserved=0):
    """A header with a payload of zeros."""
    return (magic + version.to_bytes(2, 'little') +
            number.to_bytes(2, 'little') + length.to_bytes(4, 'little') +
            reserved.to_bytes(4, 'little') + bytes(min(length, 4096)))


def _greeting(data):
    """A script that answers the HELLO with some bytes."""
    def script(session):
        session.receive()
        session.send(data)
        session.receive()
    return script


def _welcome(**changes):
    def script(session):
        session.receive()
        session.send(session.welcome(**changes).pack())
        session.receive()
    return script


def _then(data):
    """A script that greets, takes a request, and sends some bytes."""
    def script(session):
        session.greet()
        session.receive()
        session.send(data)
        while True:
            session.receive()
    return script


def _greeting_and(data):
    """A script that greets and at once sends some bytes."""
    def script(session):
        session.greet()
        session.send(data)
        while True:
            session.receive()
    return script


def _answer(change):
    """A script that changes each verdict: from frame to bytes."""
    def script(session):
        session.greet()
        while True:
            session.send(change(session.verdict(session.receive())))
    return script


class HostileTest(base.TestCase):

    def start(self, script):
        worker = self.fake_worker(script)
        machine = self.machine(worker, {
            'on-timeout': 'deny', 'deadline-ms': DEADLINE_MS})
        return worker, machine

    def check(self, script, error, connections=3):
        """The connection is dropped, over and over.

        :param error: regular expression of ``last-error``
        :param connections: how many to wait for
        """
        worker, machine = self.start(script)
        machine.qmp.wait_event('STOP', 10)
        files = '/proc/%d/fd' % machine.process.pid
        opened = len(os.listdir(files))
        self.eventually('connection %d' % connections, lambda: (
            self.assert_prompt(machine) or
            worker.connections >= connections))
        self.assert_nothing_runs(machine, 0.3)
        # It changes between this and the next attempt to connect.
        self.eventually('error %r' % error, lambda: re.search(
            error, machine.query().get('last-error', '')))
        state = machine.query()
        self.assertEqual((1, 0, 0, True, 0), (
            state['fetches'], state['states']['scanned'],
            state['states']['unscanned'], state['degraded'],
            state['matches']))
        # One more or less may just be there.
        self.assertLess(len(os.listdir(files)), opened + 2)
        self.check_recovers(worker, machine)

    def check_recovers(self, worker, machine):
        """With a good worker all is well again."""
        worker.script = fake.honest
        worker.disconnect()
        machine.qmp.wait_event('RESUME', 20)
        self.eventually('more fetches', lambda: machine.query()[
            'fetches'] > 50)
        self.event(machine, 'PAGE_FETCH_RECOVERED')
        state = machine.query()
        self.assertEqual((True, False), (
            state['connected'], state['degraded']))
        self.assertNotIn('last-error', state)

    # In place of a WELCOME

    def test_no_welcome(self):
        self.check(lambda session: [session.receive(), session.receive()],
                   'the worker does not answer', 2)

    def test_closes_at_once(self):
        # What of the HELLO was not read makes it a reset.
        self.check(lambda session: None,
                   'the worker has gone|Connection reset by peer')

    def test_garbage(self):
        noise = random.Random(1).randbytes(100000)
        self.check(_greeting(noise), 'a frame is malformed')

    def test_truncated_welcome(self):
        def script(session):
            session.receive()
            session.send(session.welcome().pack()[:-1])
        self.check(script, 'the worker has gone')

    def test_over_long_welcome(self):
        self.check(_greeting(_frame(2, 0xffffffff)), 'a frame is malformed')

    def test_short_welcome(self):
        self.check(_greeting(_frame(2, 79)), 'a frame is malformed')

    def test_wrong_magic(self):
        self.check(_greeting(_frame(2, 80, magic=b'VAPE')),
                   'a frame is malformed')

    def test_wrong_header_version(self):
        self.check(_greeting(_frame(2, 80, version=2)),
                   'a frame is malformed')

    def test_reserved_bytes(self):
        self.check(_greeting(_frame(2, 80, reserved=1)),
                   'a frame is malformed')

    def test_wrong_type(self):
        for_hello = _frame(1, 64)
        self.check(_greeting(for_hello), 'a frame is malformed')

    def test_unknown_type(self):
        self.check(_greeting(_frame(77, 80)), 'a frame is malformed')

    def test_verdict_before_welcome(self):
        self.check(_greeting(_frame(4, 128)), 'a frame is malformed')

    def test_version_not_offered(self):
        self.check(_welcome(version=2), "the worker's welcome is malformed",
                   1)

    def test_nothing_in_flight(self):
        self.check(_welcome(max_in_flight=0),
                   "the worker's welcome is malformed", 1)

    def test_refused(self):
        frame = wire.Refused(wire.Refusal.OVERLOAD, 'too many').pack()
        self.check(_greeting(frame),
                   r'the worker refused \(code 3\): too many', 1)

    def test_refused_with_control_characters(self):
        frame = bytearray(wire.Refused(wire.Refusal.PROTOCOL, '').pack())
        frame[-120:] = b'\x1b[31m"\n' + b'\xff' * 113
        self.check(_greeting(bytes(frame)),
                   r'the worker refused \(code 4\): \?\[31m"\?\?+$', 1)

    # In place of a VERDICT

    def test_silence(self):
        worker, machine = self.start(_then(b''))
        machine.qmp.wait_event('STOP', 10)
        self.assert_nothing_runs(machine)
        state = machine.query()
        self.assertEqual((True, True, 'timeout', 1, 1), (
            state['connected'], state['degraded'], state['degraded-reason'],
            state['fetches'], worker.connections))
        self.check_recovers(worker, machine)

    def test_half_a_verdict(self):
        worker, machine = self.start(_answer(lambda v: v.pack()[:70]))
        machine.qmp.wait_event('STOP', 10)
        self.assert_nothing_runs(machine)
        self.check_recovers(worker, machine)

    def test_disconnect_within_a_verdict(self):
        def script(session):
            session.greet()
            session.send(session.verdict(session.receive()).pack()[:70])
        self.check(script, 'the worker has gone')

    def test_wrong_id(self):
        self.check(_answer(lambda v: v._replace(id=v.id + 1).pack()),
                   'a verdict that was not asked for')

    def test_wrong_generation(self):
        self.check(
            _answer(lambda v: v._replace(generation=v.generation + 1).pack()),
            'a verdict that was not asked for')

    def test_wrong_tag(self):
        self.check(_answer(lambda v: v._replace(tag=bytes(16)).pack()),
                   'a verdict that was not asked for')

    def test_unknown_result(self):
        self.check(_answer(lambda v: v._replace(result=3).pack()),
                   'a verdict that was not asked for')

    def test_reserved_bytes_of_verdict(self):
        def change(verdict):
            frame = bytearray(verdict.pack())
            frame[16 + 36] = 1
            return bytes(frame)
        self.check(_answer(change), 'a verdict that was not asked for')

    def test_unsolicited(self):
        self.check(_greeting_and(_frame(4, 128)),
                   'a verdict that was not asked for')

    def test_over_long_verdict(self):
        self.check(_then(_frame(4, 129)), 'a frame is malformed')

    def test_second_welcome(self):
        self.check(_then(_frame(2, 80)), 'a frame is malformed')

    def test_request_from_worker(self):
        self.check(_then(_frame(3, 5296)), 'a frame is malformed')

    def test_refused_after_welcome(self):
        frame = wire.Refused(wire.Refusal.OVERLOAD, 'too many').pack()
        self.check(_then(frame), r'the worker refused \(code 3\): too many')

    def test_verdict_twice(self):
        worker, machine = self.start(
            _answer(lambda verdict: 2 * verdict.pack()))
        # The first one is good, so the guest makes a step each time.
        self.eventually('connections', lambda: worker.connections >= 4)
        state = machine.query()
        self.assertLessEqual(state['states']['scanned'], worker.connections)
        self.assertEqual(0, state['states']['unscanned'])
        self.assert_prompt(machine)
        worker.script = fake.honest
        self.eventually('more fetches', lambda: machine.query()[
            'fetches'] > 50)

    def test_scan_failed(self):
        worker, machine = self.start(_answer(
            lambda v: v._replace(result=wire.Result.UNKNOWN).pack()))
        # The event may come before anyone listens.
        self.wait_status(machine, 'paused')
        self.assertEqual('scan-failed', machine.query()['degraded-reason'])
        self.assert_nothing_runs(machine)
        state = machine.query()
        self.assertEqual((1, 1, 0), (
            state['fetches'], state['unknown'],
            state['states']['unscanned']))
        self.assertEqual(1, worker.connections)
        # It is asked for anew, and fails anew.
        machine.qmp.execute('cont')
        self.eventually('a second failure', lambda: machine.query()[
            'unknown'] == 2)
        self.wait_status(machine, 'paused')
        worker.script = fake.honest
        worker.disconnect()
        self.eventually('a connection', lambda: worker.connections == 2)
        machine.qmp.execute('cont')
        self.eventually('more fetches', lambda: machine.query()[
            'fetches'] > 50)

    def test_rule_name_with_control_characters(self):
        name = b'a\x1b[31m"\n\\\xff' + b'x' * 78

        def script(session):
            session.greet()
            while True:
                verdict = session.verdict(session.receive(),
                                          wire.Result.MATCH)
                session.send(verdict.pack()[:-88] + name)
        _, machine = self.start(script)
        data = self.event(machine, 'PAGE_FETCH_MATCH')
        self.assertEqual('a?[31m"?\\?' + 'x' * 77, data['rule'])


class BootTest(base.TestCase):
    """A whole boot with a worker that breaks off time and again."""

    def test_boots(self):
        chance = random.Random(1)

        def script(session):
            session.greet()
            for _ in range(chance.randrange(100, 600)):
                session.answer(session.receive())
            # The last one in part.
            frame = session.verdict(session.receive()).pack()
            session.send(frame[:chance.randrange(len(frame))])

        worker = self.fake_worker(script)
        machine = self.booted(worker, {'on-timeout': 'deny',
                                       'deadline-ms': 10000}, smp=2)
        self.assertGreater(worker.connections, 4)
        state = machine.query()
        self.assertEqual((0, 0), (state['timeouts'],
                                  state['states']['unscanned']))
        self.assertGreater(state['resent'], 0)
        self.assert_ran(machine, 'clean', 'smc')

    def test_answers_late(self):
        # Later than the deadline, each time: as good as none.
        def script(session):
            session.greet()
            while True:
                request = session.receive()
                time.sleep(0.1)
                session.answer(request)

        machine = self.machine(self.fake_worker(script),
                               {'deadline-ms': 50})
        data = self.event(machine, 'PAGE_FETCH_DEGRADED')
        self.assertEqual('timeout', data['reason'])
        machine.wait_ready(120)
        self.assert_prompt(machine)
