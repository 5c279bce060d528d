# SPDX-License-Identifier: Apache-2.0
"""Machines without an operating system, which do what a test tells them.

The test has the vCPUs call functions, see ``bare.S``, and drives the devices
itself, over the protocol of QEMU's qtest: so both happen at the very time that
the test chooses.
"""

import functools
import pathlib
import socket
import struct
import subprocess
import tempfile
import time

from virtavtools import lab

PAGE = 4096
#: The pages that the vCPUs have for themselves
MAILBOX = 0x10000
#: Where the firmware copies itself, to be called there
HERE = 0x20000


@functools.cache
def _scratch():
    # Until the process ends
    return tempfile.TemporaryDirectory(prefix='virtav-bare-')


def _build(name, *command):
    """Make a file of a source beside this one.

    :param command: without the options that name the files
    :returns: path of the result
    """
    source = pathlib.Path(__file__).with_name(name)
    result = pathlib.Path(_scratch().name, source.stem)
    subprocess.run(['gcc', *command, '-o', result, source], check=True)
    return result


@functools.cache
def firmware():
    """Path of the firmware."""
    return _build('bare.S', '-nostdlib', '-static', '-no-pie',
                  '-Wl,--build-id=none,--oformat=binary,-Ttext=0,'
                  '--section-start=.names=0xc000,'
                  '--section-start=.tables=0xd000,'
                  '--section-start=.reset=0xfff0')


@functools.cache
def oracle():
    """Path of the plugin that tells which bytes are translated."""
    return _build('oracle.c', '-shared', '-fPIC', '-O2', '-Wall', '-Wextra',
                  '-Werror')


def returns(value):
    """Code that returns a number.

    :param value: of 32 bits
    """
    return b'\xb8' + struct.pack('<I', value) + b'\xc3'


class Devices:
    """A client of QEMU's qtest protocol, as far as it is needed here.

    :param path: of QEMU's socket
    """

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile('r', encoding='ascii')

    def close(self):
        """Close the connection. May be called again."""
        self._stream.close()
        self._socket.close()

    def _command(self, *words):
        line = ' '.join(word if isinstance(word, str) else '%#x' % word
                        for word in words)
        self._socket.sendall(line.encode() + b'\n')
        answer = self._stream.readline().split()
        if answer[:1] != ['OK']:
            raise ValueError('%s: %s' % (line, answer))
        return answer[1:]

    def write(self, address, data):
        """Write guest memory as a device does."""
        self._command('write', address, len(data), '0x' + data.hex())

    def read(self, address, size):
        """Read guest memory."""
        return bytes.fromhex(self._command('read', address, size)[0][2:])

    def store(self, address, value, size=4):
        """Write a register in memory, or an integer to memory."""
        self._command('write' + {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size],
                      address, value)

    def load(self, address, size=4):
        """Read a register in memory."""
        return int(self._command('read' + {
            1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size], address)[0], 0)

    def out(self, port, value, size=4):
        """Write to an I/O port."""
        self._command('out' + {1: 'b', 2: 'w', 4: 'l'}[size], port, value)

    def inp(self, port, size=4):
        """Read from an I/O port."""
        return int(self._command('in' + {1: 'b', 2: 'w', 4: 'l'}[size],
                                 port)[0], 0)


class PCIDevice:
    """A device on the first PCI bus.

    :param devices: :class:`Devices`
    :param slot: where it is
    """

    def __init__(self, devices, slot, function=0):
        self.devices = devices
        self._address = 1 << 31 | slot << 11 | function << 8

    def write_config(self, register, value, size=4):
        """Write to its configuration space."""
        self.devices.out(0xcf8, self._address | register & ~3)
        self.devices.out(0xcfc + register % 4, value, size)

    def read_config(self, register, size=4):
        """Read from its configuration space."""
        self.devices.out(0xcf8, self._address | register & ~3)
        return self.devices.inp(0xcfc + register % 4, size)

    def set_bar(self, number, address):
        """Place one of its regions in memory, and have it do DMA."""
        self.write_config(0x10 + 4 * number, address)
        self.write_config(4, 6, 2)

    def capability(self, number):
        """Offset of a capability in its configuration space."""
        offset = self.read_config(0x34, 1)
        while self.read_config(offset, 1) != number:
            offset = self.read_config(offset + 1, 1)
        return offset


class FwCfg:
    """The device that gives files of the host to a guest.

    :param devices: :class:`Devices`
    :param buffer: RAM that is free, a page
    """

    READ = 8 | 2

    def __init__(self, devices, buffer):
        self._devices = devices
        self._buffer = buffer
        self.transfer(self.command(0x19, PAGE - 64, buffer + 64))
        listing = devices.read(buffer + 68, 64 * 40)
        self._keys = {
            name.rstrip(b'\0').decode(): key for key, name in
            struct.iter_unpack('>4xHxx56s', listing)}

    def command(self, key, size, address):
        """What the device takes, to read an item into memory."""
        return struct.pack('>IIQ', key << 16 | self.READ, size, address)

    def read(self, name, size, address):
        """The same for a file."""
        return self.command(self._keys[name], size, address)

    def transfer(self, command):
        """Have the device do it, which it does at once."""
        self._devices.write(self._buffer, command)
        self._devices.out(0x514, 0)
        self._devices.out(0x518, int.from_bytes(struct.pack(
            '>I', self._buffer), 'little'))
        if self._devices.load(self._buffer):
            raise ValueError('the transfer fails')


class VirtioDevice(PCIDevice):
    """A virtio device without legacy, as QEMU lays it out.

    It has one chain of descriptors at a time in each queue.

    :param registers: free place in memory for its registers
    :param rings: RAM for its queues, a page each
    :param features: features to take, but for VIRTIO_F_VERSION_1
    """

    QUEUE_SIZE = 16
    AVAIL = 0x200
    USED = 0x400

    def __init__(self, devices, slot, registers, rings, features=0):
        super().__init__(devices, slot)
        self.registers = registers
        self.config = registers + 0x2000
        self._rings = rings
        self._used = {}
        self.set_bar(4, registers)
        self._status(0)
        self._status(3)
        for select, value in ((0, features), (1, 1)):
            devices.store(registers + 8, select)
            devices.store(registers + 12, value)
        self._status(11)
        if not devices.load(registers + 0x14, 1) & 8:
            raise ValueError('the device does not take the features')

    def _status(self, value):
        self.devices.store(self.registers + 0x14, value, 1)

    def add_queue(self, number, used=None, vector=None):
        """Set up a queue.

        :param used: address of the ring of used descriptors
        :param vector: of MSI-X
        """
        store = self.devices.store
        base = self._rings + number * PAGE
        used = used or base + self.USED
        self._used[number] = used, 0
        self.devices.write(base, bytes(PAGE))
        store(self.registers + 0x16, number, 2)
        store(self.registers + 0x18, self.QUEUE_SIZE, 2)
        if vector is not None:
            store(self.registers + 0x1a, vector, 2)
        for register, address in ((0x20, base), (0x28, base + self.AVAIL),
                                  (0x30, used)):
            store(self.registers + register, address & 0xffffffff)
            store(self.registers + register + 4, address >> 32)
        store(self.registers + 0x1c, 1, 2)

    def go(self):
        """Have the device work, once its queues are set up."""
        self._status(15)

    def begin(self, queue, *buffers):
        """Give the device buffers.

        :param buffers: of address, size, and whether the device writes
        """
        base = self._rings + queue * PAGE
        last = len(buffers) - 1
        self.devices.write(base, b''.join(
            struct.pack('<QIHH', address, size, (
                (index < last) + 2 * writes), index + 1)
            for index, (address, size, writes) in enumerate(buffers)))
        used, count = self._used[queue]
        # Always the descriptors from the first one on.
        self.devices.store(base + self.AVAIL + 2, (count + 1) % 65536, 2)
        self._used[queue] = used, (count + 1) % 65536
        self.devices.store(self.registers + 0x3000 + 4 * queue, queue, 2)

    def done(self, queue):
        """Whether the device has used the buffers."""
        used, count = self._used[queue]
        return self.devices.load(used + 2, 2) == count

    def do(self, queue, *buffers):
        """Give the device buffers and wait until it has used them."""
        self.begin(queue, *buffers)
        self.wait(queue)

    def wait(self, queue, timeout=20):
        """Wait until the device has used the buffers."""
        deadline = time.monotonic() + timeout
        while not self.done(queue):
            if time.monotonic() > deadline:
                raise TimeoutError('the device uses no buffer')
            time.sleep(0.001)


class Disk(VirtioDevice):
    """A virtio disk; its registers and rings are to be set up first.

    :param buffer: RAM that is free, for the requests
    """

    def __init__(self, devices, slot, registers, rings, buffer):
        super().__init__(devices, slot, registers, rings)
        self._buffer = buffer

    def interrupt(self, address, data):
        """Have vector 0 write to memory."""
        table = self.registers + 0x10000
        self.set_bar(1, table)
        for offset, value in ((0, address), (4, 0), (8, data), (12, 0)):
            self.devices.store(table + offset, value)
        self.write_config(self.capability(0x11) + 2, 0x8000, 2)

    def begin_read(self, page, address, size=PAGE):
        """Begin to read.

        :param page: number of the page on the disk
        """
        self.devices.write(self._buffer, struct.pack(
            '<IIQB', 0, 0, page * PAGE // 512, 0xff))
        self.begin(0, (self._buffer, 16, False), (address, size, True),
                   (self._buffer + 16, 1, True))

    def read(self, page, address, size=PAGE):
        """Read, and wait until it has been done."""
        self.begin_read(page, address, size)
        self.wait(0)
        if self.devices.load(self._buffer + 16, 1):
            raise ValueError('the disk cannot read')


class Machine(lab.Machine):
    """A machine with the firmware and nothing else.

    :param flash: whether the firmware is in a flash memory
    :param arguments: see :class:`lab.Machine`
    :ivar functions: addresses of the firmware's functions, by their names
    :ivar page_table: address of the topmost one
    :ivar devices: :class:`Devices`, once it is started
    """

    def __init__(self, emulator, guest, home, monitor=None, flash=False,
                 **arguments):
        self._qtest_path = home / 'qtest.sock'
        self._flash = flash
        super().__init__(emulator, guest, home, monitor, **arguments)
        image = firmware().read_bytes()
        self.functions = {}
        for name, address in struct.iter_unpack(
                '<16sQ', image[0xc000:0xc000 + 24 * 64]):
            if not address:
                break
            self.functions[name.rstrip(b'\0').decode()] = address
        self.page_table = HERE + 0xd000
        self.devices = None

    def boot_arguments(self, guest, append, snapshot):
        """Arguments of the emulator that name what it boots."""
        return ['-m', '64', '-qtest',
                'unix:%s,server=on,wait=off' % self._qtest_path,
                '-qtest-log', 'none', *(
                    ('-drive', 'if=pflash,format=raw,snapshot=on,file=%s' %
                     firmware()) if self._flash else
                    ('-bios', str(firmware())))]

    def start(self):
        """Start the emulator, connect to it, and wait for the firmware."""
        super().start()
        self.devices = Devices(self._qtest_path)

    def stop(self):
        """End the emulator, by force if need be."""
        if self.devices:
            self.devices.close()
        super().stop()

    def _mailbox(self, vcpu):
        return MAILBOX + vcpu * PAGE

    def starts(self, vcpu=0):
        """How often a vCPU has started."""
        return self.devices.load(self._mailbox(vcpu) + 48)

    def wait_start(self, vcpu=0, starts=1, timeout=20):
        """Wait until a vCPU has started so many times."""
        deadline = time.monotonic() + timeout
        while self.starts(vcpu) < starts:
            if time.monotonic() > deadline:
                raise TimeoutError('vCPU %d does not start' % vcpu)
            time.sleep(0.002)

    def begin(self, function, *arguments, vcpu=0):
        """Have a vCPU call a function.

        :param function: name or address
        :param arguments: up to four integers
        """
        address = self.functions.get(function, function)
        arguments += (0,) * (4 - len(arguments))
        self.devices.write(self._mailbox(vcpu) + 8,
                           struct.pack('<4Q', *arguments))
        self.devices.store(self._mailbox(vcpu), address, 8)

    def returned(self, vcpu=0):
        """Whether the function has returned."""
        return not self.devices.load(self._mailbox(vcpu), 8)

    def result(self, vcpu=0, timeout=20):
        """Wait until the function returns.

        :returns: what it returned; :meth:`more` has what else it tells
        """
        deadline = time.monotonic() + timeout
        while not self.returned(vcpu):
            if time.monotonic() > deadline:
                raise TimeoutError('vCPU %d does not return' % vcpu)
            time.sleep(0.001)
        return self.devices.load(self._mailbox(vcpu) + 40, 8)

    def more(self, count, vcpu=0):
        """What the function tells beside what it returned.

        :param count: of numbers
        """
        return struct.unpack('<%dQ' % count, self.devices.read(
            self._mailbox(vcpu) + 56, 8 * count))

    def call(self, function, *arguments, vcpu=0, timeout=20):
        """Have a vCPU call a function, and wait for what it returns."""
        self.begin(function, *arguments, vcpu=vcpu)
        return self.result(vcpu, timeout)

    def start_others(self, smp):
        """Start the other vCPUs.

        :param smp: number of all vCPUs
        """
        self.call('start_others')
        for vcpu in range(1, smp):
            self.wait_start(vcpu)
