# SPDX-License-Identifier: Apache-2.0
"""Whoever could write to guest memory unseen is refused, or is told of."""

import contextlib
import os
import socket
import struct
import threading

from tests.functional import bare
from tests.functional import base
from virtav_nova.monitor import qmp
from virtavtools import errors


class VhostUser:
    """A back end that says just enough to be taken for one.

    :param path: of the socket that QEMU is to connect to
    """

    #: VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES
    FEATURES = 1 << 32 | 1 << 30
    #: VHOST_USER_PROTOCOL_F_CONFIG
    PROTOCOL_FEATURES = 1 << 9
    #: What is answered to requests of these numbers
    ANSWERS = {1: FEATURES, 15: PROTOCOL_FEATURES, 17: 1}
    GET_CONFIG = 24

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = []

    def __enter__(self):
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exception):
        # QEMU has ended by now, and its connections with it.
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                self._spawn(self._serve, self._listener.accept()[0])

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            self._answer(connection)

    def _answer(self, connection):
        stream = connection.makefile('rb')
        while len(header := stream.read(12)) == 12:
            number, _, size = struct.unpack('<III', header)
            payload = stream.read(size)
            if number in self.ANSWERS:
                payload = struct.pack('<Q', self.ANSWERS[number])
            elif number != self.GET_CONFIG:
                continue
            connection.sendall(struct.pack('<III', number, 5, len(payload)) +
                               payload)


class TestCase(base.TestCase):

    Machine = bare.Machine
    # Of vhost-user, which tries again whatever the error is
    harmless = base.TestCase.harmless + (
        '|^(.*: )?warning: |^Reconnecting after |'
        '^Use a back end inside of QEMU')

    def setUp(self):
        super().setUp()
        self.peer = self.home / 'peer'
        self.enterContext(VhostUser(self.peer))
        self.null = os.open('/dev/null', os.O_RDWR)
        self.addCleanup(os.close, self.null)
        (self.home / 'memory').write_bytes(bytes(64 << 20))
        # As a device of the host that has no driver for VFIO
        self.pci = self.home / 'pci'
        self.pci.mkdir()

    def monitor(self, **changes):
        """Properties of a monitor whose worker is not there."""
        return {'socket': self.home / 'none', **changes}


VHOST = ('a vhost device', 'a back end inside of QEMU')
IVSHMEM = ('an ivshmem device', 'no ivshmem device')
VFIO = ('a VFIO device', 'an emulated or virtio device')
VHOST_NET = ('a vhost-user netdev', 'another type of netdev')
ATI = ('an ATI graphics device', 'another graphics device')
NVME = ('an NVMe persistent memory region', 'no pmrdev')
TAP = ('a vhost netdev', 'vhost=off')
MEMORY = ('memory0', 'share=off')


class CommandLineTest(TestCase):
    """What is there at the start."""

    def check(self, writer, *extra, goes_on=True):
        """It is refused by enforce, and told of by report.

        :param writer: who it is, and what to use instead
        :param goes_on: whether it would work here
        """
        who, remedy = writer
        message = '%s lets guest memory be written unseen\nUse %s.*, or ' \
                  'policy=report' % (who, remedy)
        if goes_on:
            # It is not something else that does not work.
            self.machine(extra=extra).stop()
        machine = self.prepare(monitor=self.monitor(), extra=extra,
                               fds=[self.null])
        with self.assertRaisesRegex(errors.ToolError, message), machine:
            pass
        # An error, not a crash.
        self.assertEqual(1, machine.process.returncode)
        if not goes_on:
            return
        machine = self.machine(monitor=self.monitor(policy='report'),
                               extra=extra)
        self.assertEqual(who, machine.query()['outside-writer'])
        with self.assertRaisesRegex(qmp.QMPError, 'Cannot enforce: ' + who):
            machine.set(policy='enforce')
        self.assertEqual('report', machine.query()['policy'])

    def chardev(self, *extra):
        """With a character device that leads to a back end."""
        return '-chardev', 'socket,id=peer,path=%s' % self.peer, *extra

    def test_vhost_user_blk(self):
        self.check(VHOST, *self.chardev(
            '-device', 'vhost-user-blk-pci,chardev=peer'))

    def test_vhost_user_fs(self):
        self.check(VHOST, *self.chardev(
            '-device', 'vhost-user-fs-pci,chardev=peer,tag=tag'))

    def test_vhost_user_net(self):
        self.check(VHOST_NET, *self.chardev(
            '-netdev', 'vhost-user,id=net,chardev=peer'))

    def test_vhost_of_the_kernel(self):
        # Which is not asked.
        self.check(VHOST, '-device',
                   'vhost-vsock-pci,guest-cid=3,vhostfd=%d' % self.null,
                   goes_on=False)

    def test_vfio(self):
        self.check(VFIO, '-device', 'vfio-pci,sysfsdev=%s' % self.pci,
                   goes_on=False)

    def test_ivshmem_plain(self):
        self.check(IVSHMEM, '-object', 'memory-backend-ram,id=memory,size=1M',
                   '-device', 'ivshmem-plain,memdev=memory')

    def test_ivshmem_doorbell(self):
        self.check(IVSHMEM, *self.chardev(
            '-device', 'ivshmem-doorbell,chardev=peer'), goes_on=False)

    def test_ati(self):
        self.check(ATI, '-device', 'ati-vga,romfile=')

    def test_nvme(self):
        self.check(NVME, '-object', 'memory-backend-ram,id=memory,size=1M',
                   '-device', 'nvme,serial=1,pmrdev=memory')

    def check_memory(self, kind, options=''):
        self.check(MEMORY, '-object',
                   'memory-backend-%s,id=memory0,size=64M,share=on%s' %
                   (kind, options), '-machine', 'memory-backend=memory0')

    def test_shared_file(self):
        self.check_memory('file', ',mem-path=%s' % (self.home / 'memory'))

    def test_shared_memfd(self):
        self.check_memory('memfd')

    def test_shared_ram(self):
        self.check_memory('ram')

    def test_shared_shm(self):
        self.check_memory('shm')

    def test_private_memory(self):
        for kind, options in (
                ('file', ',mem-path=%s' % (self.home / 'memory')),
                ('memfd', ''), ('ram', '')):
            machine = self.machine(monitor=self.monitor(), extra=(
                '-object', 'memory-backend-%s,id=memory0,size=64M,share=off%s'
                % (kind, options), '-machine', 'memory-backend=memory0'))
            self.assertNotIn('outside-writer', machine.query())
            machine.stop()

    def test_encrypted_memory(self):
        # Neither policy can do without what it cannot read.
        for policy in ('enforce', 'report'):
            machine = self.prepare(
                monitor=self.monitor(policy=policy), extra=(
                    '-object', 'sev-guest,id=sev0,cbitpos=47,'
                    'reduced-phys-bits=1',
                    '-machine', 'confidential-guest-support=sev0'))
            with self.assertRaisesRegex(
                    errors.ToolError, 'cannot see encrypted guest memory\n'
                    'Remove confidential-guest-support'), machine:
                pass
            self.assertEqual(1, machine.process.returncode)


class HotplugTest(TestCase):
    """What comes later."""

    def start(self, policy):
        """Start a machine with room for devices."""
        ports = (port for number in range(4) for port in (
            '-device', 'pcie-root-port,id=port%d,chassis=%d' %
            (number, number)))
        self.ports = 0
        self.vm = self.machine(
            self.fake_worker(), {'policy': policy},
            extra=(*ports, '-chardev', 'socket,id=peer,path=%s' % self.peer,
                   '-chardev', 'socket,id=other,path=%s' % self.peer,
                   '-object', 'memory-backend-ram,id=private,size=1M'),
            fds=[self.null])
        self.vm.wait_start()

    def device(self, driver, **options):
        """A command that adds a device, where there is still room."""
        self.ports += 1
        return 'device_add', {'driver': driver, 'bus': 'port%d' % (
            self.ports - 1), **options}

    @staticmethod
    def memory(kind, **options):
        """A command that adds shared memory."""
        return 'object-add', {
            'qom-type': 'memory-backend-' + kind, 'id': 'memory0',
            'size': 64 << 20, 'share': True, **options}

    def commands(self):
        """All commands, with the writer, and whether they work here."""
        return (
            (VHOST, True, self.device('vhost-user-blk-pci', chardev='peer')),
            (VHOST_NET, True, ('netdev_add', {
                'type': 'vhost-user', 'id': 'net', 'chardev': 'other'})),
            (VHOST, False, self.device(
                'vhost-vsock-pci', vhostfd=str(self.null),
                **{'guest-cid': 3})),
            # No such device is needed for it to be refused.
            (TAP, False, ('netdev_add', {
                'type': 'tap', 'id': 'tap', 'fd': str(self.null),
                'vhost': True})),
            (VFIO, False, self.device('vfio-pci', sysfsdev=str(self.pci))),
            (IVSHMEM, True, self.device('ivshmem-plain', memdev='private')),
            (MEMORY, True, self.memory('memfd')),
            (MEMORY, True, self.memory('ram')),
            (MEMORY, True, self.memory('shm')),
            (MEMORY, True, self.memory(
                'file', **{'mem-path': str(self.home / 'memory')})))

    def test_enforce(self):
        self.start('enforce')
        for (who, _), _, (command, arguments) in self.commands():
            with self.subTest(command, **arguments):
                with self.assertRaisesRegex(
                        qmp.QMPError, who + ' lets guest memory be written '
                        'unseen'):
                    self.vm.qmp.execute(command, **arguments)
                self.assertNotIn('outside-writer', self.vm.query())
        self.assertEqual([], self.events(self.vm, 'PAGE_FETCH_DEGRADED'))
        self.vm.call('spin', 1)

    def test_report(self):
        self.start('report')
        for (who, _), works, (command, arguments) in self.commands():
            with self.subTest(command, **arguments):
                if works:
                    self.vm.qmp.execute(command, **arguments)
                else:
                    # But for another reason.
                    with self.assertRaises(qmp.QMPError) as caught:
                        self.vm.qmp.execute(command, **arguments)
                    self.assertNotIn('unseen', str(caught.exception))
                data = self.event(self.vm, 'PAGE_FETCH_DEGRADED')
                self.assertEqual(('outside-writer',
                                  who + ' lets guest memory be written '
                                  'unseen'), (data['reason'], data['detail']))
                # vhost-user is told of by its netdev, and by vhost.
                self.events(self.vm, 'PAGE_FETCH_DEGRADED')
                if works and command == 'object-add':
                    self.vm.qmp.execute('object-del', id='memory0')
        self.assertEqual(VHOST[0], self.vm.query()['outside-writer'])
