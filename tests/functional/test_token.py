# SPDX-License-Identifier: Apache-2.0
"""Who speaks for an instance has to show its token, or is not listened to."""

import base64
import os
import pathlib
import uuid

from tests.functional import base
from virtav_nova.monitor import instance
from virtav_nova.worker import status


class TokenTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.vm_worker = self.worker()
        self.directory = str(self.home / 'instances')

    def _secret(self, content):
        """Arguments for a secret object that holds this."""
        path = self.home / 'secret'
        path.write_bytes(base64.b64encode(content))
        return ('-object', 'secret,id=other,format=base64,file=%s' % path)

    def _status(self):
        return status.ask(str(self.home / 'status.sock'), 'status')

    def _log(self):
        return self.vm_worker.log.read_text()

    def test_right_token(self):
        machine = self.booted(self.vm_worker, {'on-match': 'block'})
        self.assertTrue(machine.query()['connected'])
        self.assert_blocked(machine, self.vm_worker, 'user-write')
        one, = self._status()['instances']
        self.assertEqual((machine.instance, 'lab'),
                         (one['instance'], one['project']))
        # It is nowhere to be seen.
        token = instance.read(
            self.directory, uuid.UUID(machine.instance)).token
        shown = pathlib.Path('/proc/%d/cmdline' % machine.process.pid
                             ).read_bytes() + self._log().encode() + repr(
            [machine.query(), machine.qmp.execute(
                'qom-list-properties', typename='page-fetch-monitor'),
             machine.qmp.execute('qom-get', path='/objects/virtav0',
                                 property='token-secret')]).encode() + (
            self.vm_worker.journal.read_bytes())
        for form in (token, token.hex().encode(), base64.b64encode(token)):
            self.assertNotIn(form, shown)

    def _assert_refused(self, machine, reason):
        machine.wait_ready()
        state = machine.query()
        self.assertEqual((False, True),
                         (state['connected'], state['degraded']))
        self.assertIn(reason, self._log())
        self.assertEqual(0, self._status()['sessions'])
        self.assertEqual([], self.vm_worker.records())

    def test_wrong_token(self):
        known = uuid.uuid4()
        instance.place(self.directory, known, 'lab')
        machine = self.machine(
            self.vm_worker, {'instance': known, 'token-secret': 'other'},
            extra=self._secret(os.urandom(32)))
        self._assert_refused(machine, 'it showed another token')

    def test_token_of_another_instance(self):
        mine, other = uuid.uuid4(), uuid.uuid4()
        for known in (mine, other):
            instance.place(self.directory, known, 'lab')
        machine = self.machine(
            self.vm_worker, {'instance': mine, 'token-secret': 'other'},
            extra=self._secret(instance.read(self.directory, other).token))
        self._assert_refused(machine, 'it showed another token')

    def test_no_token(self):
        machine = self.prepare(self.vm_worker)
        machine.arguments = [
            argument.replace(',token-secret=virtav-token0', '')
            for argument in machine.arguments]
        self.enterContext(machine)
        self._assert_refused(machine, 'it showed no token')

    def test_no_registration(self):
        machine = self.prepare(self.vm_worker)
        instance.remove(self.directory, uuid.UUID(machine.instance))
        # QEMU reads its file all the same.
        with open(os.path.join(self.directory, '%s.token' %
                               machine.instance), 'wb') as file:
            file.write(base64.b64encode(os.urandom(32)))
        self.enterContext(machine)
        self._assert_refused(machine, 'no registration in')

    def test_worker_that_comes_back(self):
        machine = self.booted(self.vm_worker, {'on-match': 'block'})
        self.vm_worker.stop()
        self.vm_worker.start()
        self.eventually('the connection',
                        lambda: machine.query()['connected'])
        self.assert_blocked(machine, self.vm_worker, 'user-write')


class ConfinedTest(base.TestCase):
    """A guest under a worker that is shut in as it should be."""

    def test_all_of_it(self):
        worker = self.worker(engine='twostage')
        machine = self.booted(worker, {'on-match': 'block'})
        self.assert_blocked(machine, worker, *base.USER_CASES)
        self.assert_ran(machine, 'clean')
        report = status.ask(str(self.home / 'status.sock'), 'status')
        self.assertEqual('ok', report['health'], report['problems'])
        self.assertEqual(0, report['processes_lost'])
        self.assertEqual((False, True, True), tuple(
            report['confinement'][name] for name in (
                'capabilities', 'no_new_privileges', 'seccomp')))
        self.assertGreater(report['counters']['clean'], 1000)
