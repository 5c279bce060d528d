# SPDX-License-Identifier: Apache-2.0
"""What the monitor cannot do is refused, with the reason.

For others who write to guest memory see ``test_outside_writer.py``.
"""

from tests.functional import bare
from tests.functional import base
from virtav_nova.monitor import qmp
from virtavtools import errors

_UUID = '1cd2a0d6-4e0f-4a6c-8a5f-5c2f44e0a5d1'


class TestCase(base.TestCase):

    Machine = bare.Machine

    def monitor(self, **changes):
        """Properties of a monitor whose worker is not there."""
        return {'socket': self.home / 'none', **changes}


class StartTest(TestCase):
    """The emulator does not start."""

    def check(self, message, *extra, accel='tcg', **monitor):
        machine = self.prepare(monitor=self.monitor(**monitor), accel=accel,
                               extra=extra)
        with self.assertRaisesRegex(errors.ToolError, message), machine:
            pass
        # An error, not a crash.
        self.assertEqual(1, machine.process.returncode)

    def test_accelerator(self):
        self.check('works with the TCG accelerator only\nUse -accel tcg',
                   accel='qtest')

    def test_kvm(self):
        # Where KVM cannot start, that is said instead.
        self.check('TCG accelerator only|failed to initialize kvm|'
                   'Could not access KVM', accel='kvm')

    def test_two_monitors(self):
        self.check('There can be only one page-fetch-monitor', '-object',
                   'page-fetch-monitor,id=two,socket=/x,instance=' + _UUID)

    def test_socket_path_too_long(self):
        self.check("socket has 108 bytes\nIt can have 107",
                   socket='/' + 107 * 'x')

    def test_instance(self):
        for wrong in ('instance-00000001', '', _UUID[:-1]):
            self.check("'instance' expects a UUID", instance=wrong)

    def test_missing(self):
        for given, name in (('socket=/x', 'instance'),
                            ('instance=' + _UUID, 'socket')):
            machine = self.prepare(extra=(
                '-object', 'page-fetch-monitor,id=virtav0,' + given))
            with self.assertRaisesRegex(
                    errors.ToolError,
                    "Parameter '%s' is missing" % name), machine:
                pass

    def test_no_deadline(self):
        self.check("'deadline-ms' expects at least 1", **{'deadline-ms': 0})

    def test_record_and_replay(self):
        self.check('does not work with record and replay', '-icount',
                   'shift=7,rr=record,rrfile=%s' % (self.home / 'rr'))


class RunTimeTest(TestCase):
    """QEMU goes on without it."""

    def refused(self, message, command, **arguments):
        with self.assertRaisesRegex(qmp.QMPError, message):
            self.vm.qmp.execute(command, **arguments)

    def test_refusals(self):
        self.vm = self.machine(self.fake_worker())
        self.vm.wait_start()
        self.refused('is in use, can not be deleted', 'object-del',
                     id='virtav0')
        self.refused('There can be only one', 'object-add', id='two',
                     instance=_UUID, socket='/x',
                     **{'qom-type': 'page-fetch-monitor'})
        for name, value in (('policy', 'report'), ('deadline-ms', 0),
                            ('socket', '/x'), ('instance', _UUID),
                            ('on-match', 'alert'), ('require', True),
                            ('on-timeout', 'allow'), ('hot-page-limit', 0),
                            ('hot-page-ms', 1)):
            self.refused('properties are fixed', 'qom-set', property=name,
                         path='/objects/virtav0', value=value)
        self.assertEqual('running', self.vm.status())
        state = self.vm.query()
        self.assertEqual(('enforce', 1000, False), (
            state['policy'], state['deadline-ms'], state['degraded']))
        self.vm.call('spin', 1)


class LateTest(TestCase):

    def test_monitor_at_run_time(self):
        machine = self.machine()
        with self.assertRaisesRegex(
                qmp.QMPError, 'can be created on the command line only'):
            machine.qmp.execute(
                'object-add', id='virtav0', instance=_UUID, socket='/x',
                **{'qom-type': 'page-fetch-monitor'})
