# SPDX-License-Identifier: Apache-2.0
"""What the monitor cannot watch is refused, with the reason."""

import socket

from tests.functional import base
from virtav_nova.monitor import qmp
from virtavtools import errors

_SHARED = ('-object', 'memory-backend-memfd,id=shared,share=on,size=%s')
_UUID = '1cd2a0d6-4e0f-4a6c-8a5f-5c2f44e0a5d1'
_NO_MIGRATION = 'page-fetch-monitor does not support migration and snapshots'


class _TestCase(base.TestCase):

    def monitor(self, **changes):
        """Properties of a monitor whose worker is not there."""
        return {'socket': self.home / 'none', **changes}

    def vhost_user(self):
        """Arguments for a vhost-user device with somebody to talk to."""
        listener = self.enterContext(socket.socket(socket.AF_UNIX))
        listener.bind(str(self.home / 'vhost'))
        listener.listen(16)
        return ('-chardev', 'socket,id=peer,path=%s' % (self.home / 'vhost'),
                '-device', 'vhost-user-blk-pci,chardev=peer')

    def ivshmem(self, share):
        """Arguments for an ivshmem device."""
        return ('-object',
                'memory-backend-memfd,id=shared,share=%s,size=1M' % share,
                '-device', 'ivshmem-plain,memdev=shared')


class StartTest(_TestCase):
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

    def test_only_migratable(self):
        self.check(_NO_MIGRATION, '-only-migratable')

    def test_shared_memory(self):
        self.check('shared.*lets guest memory be written unseen\n'
                   'Use share=off, or policy=report',
                   _SHARED[0], _SHARED[1] % '512M',
                   '-machine', 'memory-backend=shared')

    def test_ivshmem(self):
        self.check('an ivshmem device lets guest memory be written unseen\n'
                   'Use no ivshmem device, or policy=report',
                   *self.ivshmem('off'))

    def test_vhost_user(self):
        self.check('a vhost device lets guest memory be written unseen',
                   *self.vhost_user())


class RunTimeTest(_TestCase):
    """QEMU goes on without it."""

    def setUp(self):
        super().setUp()
        self.vm = self.booted(self.worker(), extra=(
            '-device', 'pcie-root-port,id=rp0'))

    def refused(self, message, command, **arguments):
        with self.assertRaisesRegex(qmp.QMPError, message):
            self.vm.qmp.execute(command, **arguments)

    def monitor_command(self, line):
        return self.vm.qmp.execute('human-monitor-command',
                                   **{'command-line': line})

    def test_refusals(self):
        self.refused('is in use, can not be deleted', 'object-del',
                     id='virtav0')
        self.refused('There can be only one', 'object-add', id='two',
                     instance=_UUID, socket='/x',
                     **{'qom-type': 'page-fetch-monitor'})
        for name, value in (('policy', 'report'), ('deadline-ms', 0),
                            ('socket', '/x'), ('instance', _UUID),
                            ('on-match', 'alert'), ('require', True),
                            ('on-timeout', 'allow')):
            self.refused('properties are fixed', 'qom-set', property=name,
                         path='/objects/virtav0', value=value)
        self.refused('unseen', 'object-add', id='late', size=1 << 20,
                     share=True, **{'qom-type': 'memory-backend-memfd'})
        self.vm.qmp.execute('object-add', id='private', size=1 << 20, **{
            'qom-type': 'memory-backend-ram'})
        self.refused('an ivshmem device lets guest memory be written',
                     'device_add', driver='ivshmem-plain', bus='rp0',
                     memdev='private')
        self.refused(_NO_MIGRATION, 'migrate',
                     uri='file:%s' % (self.home / 'state'))
        self.assertIn(_NO_MIGRATION, self.monitor_command('savevm a'))
        self.assertIn('page-fetch-monitor', self.monitor_command('loadvm a'))
        self.assertEqual('running', self.vm.status())
        state = self.vm.query()
        self.assertEqual(('enforce', 1000, False), (
            state['policy'], state['deadline-ms'], state['degraded']))
        self.assert_ran(self.vm, 'clean')


class LateTest(_TestCase):

    def test_monitor_at_run_time(self):
        machine = self.machine()
        with self.assertRaisesRegex(
                qmp.QMPError, 'can be created on the command line only'):
            machine.qmp.execute(
                'object-add', id='virtav0', instance=_UUID, socket='/x',
                **{'qom-type': 'page-fetch-monitor'})


class ReportTest(_TestCase):
    """policy=report: taken, and told."""

    def check(self, what, *extra):
        machine = self.machine(monitor=self.monitor(policy='report'),
                               extra=extra)
        self.assertRegex(machine.query()['outside-writer'], what)
        # What enforce would have refused at the start:
        with self.assertRaisesRegex(qmp.QMPError, 'unseen'):
            machine.set(policy='enforce')
        self.assertEqual('report', machine.query()['policy'])

    def test_shared_memory(self):
        self.check('shared', _SHARED[0], _SHARED[1] % '512M',
                   '-machine', 'memory-backend=shared')

    def test_ivshmem(self):
        self.check('ivshmem', *self.ivshmem('off'))

    def test_at_run_time(self):
        machine = self.booted(self.worker(), {'policy': 'report'})
        self.assertNotIn('outside-writer', machine.query())
        machine.qmp.execute(
            'object-add', id='late', size=1 << 20, share=True,
            **{'qom-type': 'memory-backend-memfd'})
        data = self.event(machine, 'PAGE_FETCH_DEGRADED')
        self.assertEqual('outside-writer', data['reason'])
        self.assertRegex(data['detail'], 'late.*unseen')
        self.assertRegex(machine.query()['outside-writer'], 'late')
