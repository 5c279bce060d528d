# SPDX-License-Identifier: Apache-2.0
"""Whoever writes to a page, the page is asked for again.

Code is put on a page and run, so that the page is SCANNED; it runs again and
nobody is asked. Then somebody writes to it, and it is run once more.
"""

import queue
import struct

from tests.functional import bare
from tests.functional import base

PAGE = bare.PAGE
#: Page under test, below it what others need
TARGET = 0x300000
SOURCE = 0x280000
RINGS = 0x290000
BUFFER = 0x2a0000
#: Where devices get their registers
REGISTERS = 0xe0000000
#: Second mapping of what is below 8 GiB
ALIAS = 8 << 30


class TestCase(base.TestCase):
    """A bare machine, whose worker tells what it is asked."""

    Machine = bare.Machine

    def setUp(self):
        super().setUp()
        self.requests = queue.Queue()
        self.withheld = False
        self.session = None

    def script(self, session):
        """Approve all that is asked, unless it is withheld."""
        session.greet()
        self.session = session
        while True:
            request = session.receive()
            self.requests.put(request)
            if not self.withheld:
                session.answer(request)

    def run_bare(self, *extra, monitor=None, **arguments):
        """Start a machine, and wait until it takes calls."""
        # Too long to be reached on any machine, unless wanted.
        monitor = {'deadline-ms': 60000, 'on-timeout': 'deny',
                   **(monitor or {})}
        vm = self.machine(self.fake_worker(self.script), monitor,
                          extra=extra, **arguments)
        vm.wait_start()
        return vm

    def file(self, name, data):
        """Path of a new file."""
        path = self.home / name
        path.write_bytes(data)
        return path

    def drain(self):
        """The requests that have come since this was last done."""
        return [self.requests.get() for _ in range(self.requests.qsize())]

    def asked(self, vm, address, **where):
        """Run the code at an address.

        :returns: the requests that this made, and what the code returned
        """
        self.drain()
        result = vm.call(address, **where)
        return self.drain(), result

    def put(self, vm, address=TARGET, value=1, gpa=None):
        """Put code at an address and have it scanned.

        :param gpa: where it is physically
        :returns: the request
        """
        gpa = gpa or address
        vm.devices.write(gpa, bare.returns(value))
        return self.scan(vm, address, value)

    def scan(self, vm, address=TARGET, value=1):
        """Run code that has not been scanned, see :meth:`put`."""
        [request], result = self.asked(vm, address)
        self.assertEqual(value, result)
        self.assertEqual(bare.returns(value), self.code_of(request, address))
        self.assertEqual(([], value), self.asked(vm, address))
        return request

    @staticmethod
    def code_of(request, address):
        """The bytes of :func:`bare.returns` in a request."""
        return request.page[address % PAGE:][:6]

    def check_again(self, vm, before, value, address=TARGET):
        """The page is asked for again, and runs what was asked.

        :param before: request for the page before it was written
        :param value: that the new code returns
        :returns: the request
        """
        [request], result = self.asked(vm, address)
        self.check_other(request, before)
        self.assertEqual(value, result)
        self.assertEqual(bare.returns(value), self.code_of(request, address))
        # That is all.
        self.assertEqual(([], value), self.asked(vm, address))
        return request

    def check_other(self, request, before):
        """A request is about other bytes of the same page."""
        self.assertEqual((before.block, before.offset),
                         (request.block, request.offset))
        self.assertGreater(request.generation, before.generation)
        self.assertNotEqual(before.page, request.page)

    def check_held(self, vm, before, address=TARGET):
        """The page is asked for again; it is not run.

        :returns: the request
        """
        self.drain()
        self.withheld = True
        vm.begin(address)
        request = self.requests.get(timeout=20)
        self.check_other(request, before)
        self.assertFalse(vm.returned())
        return request

    def check_write_while_held(self, vm, write):
        """The verdict on what was there before lets nothing run."""
        vm.devices.write(TARGET, bare.returns(1))
        self.withheld = True
        self.drain()
        vm.begin(TARGET)
        before = self.requests.get(timeout=20)
        write()
        self.session.answer(before)
        request = self.requests.get(timeout=20)
        self.check_other(request, before)
        self.assertEqual(before.generation + 1, request.generation)
        self.assertEqual(bare.returns(2), request.page[:6])
        self.assertFalse(vm.returned())
        state = vm.query()
        self.assertEqual((1, 1), (state['stale'], state['states']['held']))
        self.session.answer(request)
        self.assertEqual(2, vm.result())


class StoreTest(TestCase):
    """Stores of a vCPU."""

    #: Code that stores to (%rdi), with what it needs behind
    STORES = {
        'mov': '89 77 01 c3',                   # mov %esi, 1(%rdi)
        'atomic': 'f0 01 77 10 c3',             # lock add %esi, 16(%rdi)
        'unaligned': 'f0 01 77 01 c3',          # lock add %esi, 1(%rdi)
        'byte': '40 88 77 01 c3',               # mov %sil, 1(%rdi)
        'vector': '66 0f 6e c6 66 0f 7e 47 01 c3',  # movd %xmm0, 1(%rdi)
        'push': '48 89 e0 48 8d 67 09 56 48 89 c4 c3',
        'string': '48 ff c7 89 f0 aa c3',       # stosb
        'long': 'f3 0f 7f 47 10 c3',            # movdqu %xmm0, 16(%rdi)
        'state': '0f ae 47 10 c3',              # fxsave 16(%rdi)
    }
    #: Code that adds %esi to the operand of the instruction behind it, and
    #: its place on the page
    OWN = (('own', '01 35 01 00 00 00', 3),
           ('own, atomic', 'f0 01 35 01 00 00 00', 0),
           ('own, unaligned', 'f0 01 35 01 00 00 00', 1))

    def check(self, accel, smp, *extra):
        vm = self.run_bare(*extra, accel=accel, smp=smp)
        if smp > 1:
            vm.start_others(smp)
        for number, (name, code) in enumerate(self.STORES.items()):
            writer = SOURCE + number * PAGE
            vm.devices.write(writer, bytes.fromhex(code))
            # The first one has run the page, the others have not.
            for vcpu in range(smp):
                for offset in (0, ALIAS):
                    with self.subTest(name, vcpu=vcpu, alias=bool(offset)):
                        self.check_store(vm, name, writer, vcpu, offset)
        for vcpu in range(smp):
            for name, code, offset in self.OWN:
                with self.subTest(name, vcpu=vcpu):
                    self.check_own(vm, bytes.fromhex(code), vcpu,
                                   TARGET + offset)

    def check_store(self, vm, name, writer, vcpu, offset):
        vm.devices.write(TARGET, bytes(PAGE))
        before = self.put(vm, value=0)
        # As much of it as there is room for; the rest is the "ret".
        vm.call(writer, TARGET + offset, 0xc300000007, vcpu=vcpu)
        [request], result = self.asked(vm, TARGET)
        self.assertEqual(0 if name in ('atomic', 'long', 'state') else 7,
                         result)
        self.check_other(request, before)
        self.assertEqual(vm.devices.read(TARGET, PAGE), request.page)

    def check_own(self, vm, code, vcpu, address):
        vm.devices.write(TARGET, bytes(PAGE))
        vm.devices.write(address, code + bare.returns(0))
        self.drain()
        for count in range(1, 21):
            self.assertEqual(7 * count, vm.call(address, 0, 7, vcpu=vcpu))
            asked = self.drain()
            # As it was found, and as it was changed
            self.assertEqual(2 if count == 1 else 1, len(asked))
            self.assertEqual(bare.returns(7 * count), asked[-1].page[
                address % PAGE + len(code):][:6])

    def test_thread_for_each_vcpu(self):
        self.check('tcg,thread=multi', 2)

    def test_one_thread(self):
        self.check('tcg,thread=single', 2)

    def test_icount(self):
        self.check('tcg', 1, '-icount', 'shift=auto')

    def test_across_two_pages(self):
        vm = self.run_bare()
        vm.devices.write(SOURCE, bytes.fromhex('48 89 37 c3'))
        first, second = TARGET, TARGET + PAGE
        for address in (first, second):
            vm.devices.write(address, bare.returns(1))
        before = [self.scan(vm, address) for address in (first, second)]
        # Of eight bytes, two in front of the border
        code = bare.returns(5)
        vm.call(SOURCE, second - 2,
                int.from_bytes(b'\x90\x90' + code, 'little'))
        [request], result = self.asked(vm, first)
        self.assertEqual((1, b'\x90\x90'), (result, request.page[-2:]))
        self.check_other(request, before[0])
        self.check_again(vm, before[1], 5, second)

    def test_held_page(self):
        vm = self.run_bare(smp=2)
        vm.start_others(2)
        vm.devices.write(SOURCE, bare.returns(2))
        vm.call('copy', BUFFER, SOURCE, 6, vcpu=1)
        self.check_write_while_held(vm, lambda: vm.call(
            'copy', TARGET, SOURCE, 6, vcpu=1))

    def test_code_across_two_pages(self):
        vm = self.run_bare()
        second = TARGET + PAGE
        address = second - 3
        vm.devices.write(address, bare.returns(1))
        asked, result = self.asked(vm, address)
        self.assertEqual((1, [TARGET, second]),
                         (result, [request.gpa for request in asked]))
        vm.devices.write(SOURCE, bytes.fromhex('40 88 37 c3'))
        for page, place, value in ((second, second, 0x0301),
                                   (TARGET, second - 2, 0x0302)):
            vm.call(SOURCE, place, value & 0xff)
            asked, result = self.asked(vm, address)
            self.assertEqual([page], [request.gpa for request in asked])
        self.assertEqual(0x10002, result)

    def test_page_walk(self):
        # The CPU sets the accessed bit of an entry, on a page with code.
        vm = self.run_bare()
        tables, entries = SOURCE, TARGET
        top = vm.devices.read(vm.page_table, PAGE)
        vm.devices.write(tables, top[:8] + struct.pack('<Q', entries | 0x63) +
                         top[16:])
        vm.devices.write(entries, struct.pack('<Q', 0x83))
        # mov %rdi, %cr3; ret, and: mov (%rdi), %eax; ret
        vm.devices.write(BUFFER, bytes.fromhex('0f 22 df c3 8b 07 c3'))
        vm.call(BUFFER, tables)
        before = self.put(vm, TARGET + 0x800, 1)
        self.assertEqual(0x83, before.page[0])
        vm.call(BUFFER + 4, (512 << 30) + TARGET)
        request = self.asked(vm, TARGET + 0x800)[0][0]
        self.check_other(request, before)
        self.assertEqual(0xa3, request.page[0])


class DeviceTest(TestCase):
    """What device models write."""

    def start(self):
        path = self.file('page', bare.returns(2))
        vm = self.run_bare('-fw_cfg', 'name=opt/page,file=%s' % path)
        device = bare.FwCfg(vm.devices, BUFFER)
        return vm, lambda: device.transfer(device.read('opt/page', 6, TARGET))

    def test_fw_cfg(self):
        vm, write = self.start()
        before = self.put(vm)
        write()
        self.check_again(vm, before, 2)

    def test_fw_cfg_and_held_page(self):
        self.check_write_while_held(*self.start())

    def disk(self, *extra, options='', **arguments):
        """A machine with a virtio disk that has code, and the disk."""
        path = self.file('disk', bare.returns(2).ljust(PAGE, b'\xf4') +
                         bytes(PAGE))
        vm = self.run_bare(
            '-drive', 'if=none,id=disk,format=raw,file=%s%s' % (
                path, options), '-device',
            'virtio-blk-pci,drive=disk,addr=5', *extra, **arguments)
        return vm, bare.Disk(vm.devices, 5, REGISTERS, RINGS, BUFFER)

    def test_disk(self):
        vm, disk = self.disk()
        disk.add_queue(0)
        disk.go()
        before = self.put(vm)
        disk.read(0, TARGET)
        request = self.check_again(vm, before, 2)
        self.assertEqual(b'\xf4', request.page[-1:])

    def test_disk_and_held_page(self):
        vm, disk = self.disk()
        disk.add_queue(0)
        disk.go()
        self.check_write_while_held(vm,
                                    lambda: disk.read(0, TARGET))

    def test_while_a_disk_writes(self):
        # The page is mapped for half a second, and is asked for then.
        vm, disk = self.disk(options=',throttling.iops-total=2')
        disk.add_queue(0)
        disk.go()
        disk.read(0, SOURCE)
        before = self.put(vm)
        disk.begin_read(0, TARGET)
        self.assertEqual(([], False), (list(self.requests.queue),
                                       disk.done(0)))
        self.check_again(vm, before, 2)
        self.assertTrue(disk.done(0))
        state = vm.query()
        self.assertGreater(state['writer-busy'], 10)
        self.assertEqual(0, state['timeouts'])

    def test_ring(self):
        # The disk writes what it has done to the page.
        vm, disk = self.disk()
        disk.add_queue(0, used=TARGET + 0x100)
        disk.go()
        before = self.put(vm)
        disk.read(0, SOURCE)
        [request], _ = self.asked(vm, TARGET)
        self.check_other(request, before)
        self.assertEqual(1, request.page[0x102])

    def test_message_signaled_interrupt(self):
        vm, disk = self.disk()
        disk.interrupt(TARGET, 0x12345678)
        disk.add_queue(0, vector=0)
        disk.go()
        before = self.put(vm, TARGET + 0x80)
        disk.read(0, SOURCE)
        self.eventually('the interrupt',
                        lambda: vm.devices.load(TARGET) == 0x12345678)
        [request], _ = self.asked(vm, TARGET + 0x80)
        self.check_other(request, before)
        self.assertEqual(0x12345678, int.from_bytes(request.page[:4],
                                                    'little'))


    def check_graphics_memory(self, mode, page, address):
        """The device writes for who writes to the old window at 0xa0000.

        :param mode: the sequencer's memory mode
        :param page: of the graphics memory
        :param address: in the window, that stands for the page's second byte
        """
        vm = self.run_bare('-device', 'VGA,romfile=,addr=5')
        bare.PCIDevice(vm.devices, 5).set_bar(0, REGISTERS)
        page = REGISTERS + page * PAGE
        before = self.put(vm, page)
        self.assertIn(b'vga.vram', before.block)
        # Only plane 1, that is each fourth byte; all bits of it
        for port, index, value in ((0x3c4, 2, 2), (0x3c4, 4, mode),
                                   (0x3ce, 8, 0xff)):
            vm.devices.out(port, value << 8 | index, 2)
        vm.devices.store(0xa0000 + address, 2, 1)
        self.assertEqual(bare.returns(2), vm.devices.read(page, 6))
        self.check_again(vm, before, 2, page)

    def test_graphics_memory(self):
        self.check_graphics_memory(4, 1, PAGE // 4)

    def test_graphics_memory_in_chain_4_mode(self):
        self.check_graphics_memory(12, 4, PAGE + 1)


    def test_graphics_mode(self):
        # With a new mode, the device clears the screen.
        vm = self.run_bare('-device', 'VGA,romfile=,addr=5')
        bare.PCIDevice(vm.devices, 5).set_bar(0, REGISTERS)
        before = self.put(vm, REGISTERS + PAGE)
        for index, value in ((1, 640), (2, 480), (3, 32), (4, 0x41)):
            vm.devices.out(0x1ce, index, 2)
            vm.devices.out(0x1d0, value, 2)
        request = self.check_held(vm, before, REGISTERS + PAGE)
        self.assertEqual(bytes(PAGE), request.page)

    def test_graphics_accelerator(self):
        vm = self.run_bare('-device', 'vmware-svga,addr=5')
        card = bare.PCIDevice(vm.devices, 5)
        memory, fifo, port = REGISTERS, REGISTERS + (64 << 20), 0xc000
        card.set_bar(1, memory)
        card.set_bar(2, fifo)
        card.set_bar(0, port)
        card.write_config(4, 7, 2)

        def set_register(number, value):
            vm.devices.out(port, number)
            vm.devices.out(port + 1, value)

        # A pixel from the start of the screen to that of a page: 4 bytes
        line = 640 * 4
        y, x = divmod(8 * PAGE, line)
        vm.devices.write(memory, bare.returns(2))
        before = self.put(vm, memory + 8 * PAGE)
        vm.devices.write(fifo, struct.pack(
            '<4I7I', 16, 0x10000, 16 + 28, 16, 3, 0, 0, x // 4, y, 1, 1))
        control = self.put(vm, fifo + 0x800)
        for number, value in ((1, 1), (20, 1), (21, 1)):
            set_register(number, value)
        self.assertEqual(bare.returns(2),
                         vm.devices.read(memory + 8 * PAGE, 6))
        self.check_again(vm, before, 2, memory + 8 * PAGE)
        # It has counted on, too.
        [request], _ = self.asked(vm, fifo + 0x800)
        self.check_other(request, control)

    def test_record_store(self):
        vm = self.run_bare(
            '-object', 'memory-backend-ram,id=store,size=64K',
            '-device', 'acpi-erst,memdev=store,addr=5')
        device = bare.PCIDevice(vm.devices, 5)
        exchange = REGISTERS + 0x10000
        device.set_bar(0, REGISTERS)
        device.set_bar(1, exchange)

        def execute(operation, *actions):
            for action, value in ((operation, 0), *actions, (5, 0x9c)):
                vm.devices.store(REGISTERS + 8, value, 8)
                vm.devices.store(REGISTERS, action, 8)
            vm.devices.store(REGISTERS, 7, 8)
            self.assertEqual(0, vm.devices.load(REGISTERS + 8, 8))

        # Of an error record: its length, at 20, and its name, at 96
        vm.devices.write(exchange, bare.returns(2).ljust(20, b'\0') +
                         struct.pack('<I72xQ24x', 128, 1))
        execute(0, (4, 0))
        before = self.put(vm, exchange)
        execute(1, (9, 1))
        self.assertEqual(bare.returns(2), vm.devices.read(exchange, 6))
        self.check_again(vm, before, 2, exchange)


class LongMappingTest(TestCase):
    """A page that a device keeps mapped for writing as long as it runs."""

    def start(self, **monitor):
        vm = self.run_bare(monitor={'deadline-ms': 300, **monitor})
        ahci = bare.PCIDevice(vm.devices, 31, 2)
        ahci.set_bar(5, REGISTERS)
        port = REGISTERS + 0x100
        before = self.put(vm, TARGET + 0x800)
        vm.devices.store(port + 8, TARGET)
        vm.devices.store(port + 12, 0)
        # FRE: here it stores what it receives.
        vm.devices.store(port + 0x18, 0x10)
        self.assertTrue(vm.devices.load(port + 0x18) & 0x4000)
        return vm, before

    def test_allow(self):
        vm, before = self.start(**{'on-timeout': 'allow'})
        asked, result = self.asked(vm, TARGET + 0x800)
        self.assertEqual(1, result)
        self.assertGreater(asked[0].generation, before.generation)
        data = self.event(vm, 'PAGE_FETCH_DEGRADED')
        self.assertEqual('timeout', data['reason'])
        state = vm.query()
        # Scanned, but the verdict does not hold.
        self.assertEqual((1, 1), (state['timeouts'],
                                  state['states']['unscanned']))

    def test_deny(self):
        vm, _ = self.start()
        vm.begin(TARGET + 0x800)
        self.wait_status(vm, 'paused')
        self.assertFalse(vm.returned())
        self.assertEqual('timeout',
                         self.event(vm, 'PAGE_FETCH_DEGRADED')['reason'])
        # The device lets go of it.
        vm.devices.store(REGISTERS + 0x118, 0)
        vm.qmp.execute('cont')
        self.assertEqual(1, vm.result())
        self.assertEqual(0, vm.query()['states']['unscanned'])


class BalloonTest(TestCase):
    """Pages that the guest gives back."""

    def start(self):
        vm = self.run_bare(
            '-device', 'virtio-balloon-pci,free-page-reporting=on,addr=5')
        balloon = bare.VirtioDevice(vm.devices, 5, REGISTERS, RINGS, 1 << 5)
        for number in (0, 1, 3):
            balloon.add_queue(number)
        balloon.go()
        vm.devices.store(BUFFER, TARGET // PAGE)
        return vm, balloon

    def test_inflate(self):
        vm, balloon = self.start()
        before = self.put(vm)
        balloon.do(0, (BUFFER, 4, False))
        request = self.check_held(vm, before)
        self.assertEqual(bytes(PAGE), request.page)

    def test_deflate(self):
        vm, balloon = self.start()
        before = self.put(vm)
        balloon.do(0, (BUFFER, 4, False))
        balloon.do(1, (BUFFER, 4, False))
        request = self.check_held(vm, before)
        self.assertEqual(bytes(PAGE), request.page)

    def test_report(self):
        vm, balloon = self.start()
        before = self.put(vm)
        balloon.do(3, (TARGET, PAGE, True))
        request = self.check_held(vm, before)
        self.assertEqual(bytes(PAGE), request.page)


class HotplugTest(TestCase):
    """Memory that comes and goes."""

    MORE = '64M,slots=2,maxmem=1G'

    def test_dimm(self):
        vm = self.run_bare('-m', self.MORE)
        before = None
        for value in (1, 2):
            path = self.file('dimm%d' % value, bare.returns(value).ljust(
                128 << 20, b'\0'))
            vm.qmp.execute('object-add', id='memory', size=128 << 20, **{
                'qom-type': 'memory-backend-file', 'mem-path': str(path),
                'share': False})
            vm.qmp.execute('device_add', driver='pc-dimm', id='dimm',
                           memdev='memory')
            [memory] = vm.qmp.execute('query-memory-devices')
            address = memory['data']['addr']
            request = self.scan(vm, address, value)
            self.assertEqual(0, request.offset)
            if before:
                self.assertGreater(request.generation, before.generation)
            before = request
            vm.qmp.execute('device_del', id='dimm')
            # What an operating system does: the slot's EJ0
            slot = memory['data']['slot']
            vm.devices.out(0xa00, slot)
            vm.devices.out(0xa14, 8, 1)
            vm.qmp.wait_event('DEVICE_DELETED', 10)
            vm.qmp.execute('object-del', id='memory')
            self.assertLess(vm.query()['states']['scanned'], 10)

    def test_virtio_mem(self):
        vm = self.run_bare(
            '-m', self.MORE, '-object', 'memory-backend-ram,id=m,size=128M',
            '-device', 'virtio-mem-pci,id=vm,memdev=m,addr=5,'
            'requested-size=64M')
        device = bare.VirtioDevice(vm.devices, 5, REGISTERS, RINGS, 2)
        device.add_queue(0)
        device.go()
        start = vm.devices.load(device.config + 16, 8)
        size = vm.devices.load(device.config, 8)

        def change(kind):
            vm.devices.write(BUFFER, struct.pack('<HxxxxxxQHxxxxxx', kind,
                                                 start, 1))
            device.do(0, (BUFFER, 24, False), (BUFFER + 64, 10, True))
            self.assertEqual(0, vm.devices.load(BUFFER + 64, 2))

        change(0)
        before = self.put(vm, start + size - PAGE)
        for kind in (1, 0):
            change(kind)
        request = self.check_held(vm, before, start + size - PAGE)
        self.assertEqual(bytes(PAGE), request.page)


class ROMTest(TestCase):
    """Firmware, and what is loaded when the machine is reset."""

    def reset(self, vm):
        vm.qmp.execute('system_reset')
        vm.wait_start(starts=2)

    def test_loaded_at_reset(self):
        path = self.file('code', bare.returns(2))
        vm = self.run_bare('-device', 'loader,file=%s,addr=%#x,force-raw=on'
                           % (path, TARGET))
        first = self.scan(vm, TARGET, 2)
        other = self.put(vm, TARGET + PAGE, 3)
        firmware = vm.functions['copy']
        self.asked(vm, firmware)
        self.reset(vm)
        # Loaded again, with the same bytes: who knows?
        [again], result = self.asked(vm, TARGET)
        self.assertEqual(2, result)
        self.assertGreater(again.generation, first.generation)
        # A reset by itself writes to no RAM, nor to the firmware.
        self.assertEqual(([], 3), self.asked(vm, TARGET + PAGE))
        self.assertEqual(other.page, vm.devices.read(TARGET + PAGE, PAGE))

    def test_flash(self):
        vm = self.run_bare(flash=True)
        base_address = 0xffff0000 + 0x8000
        code = bare.returns(2)

        def program(store):
            for offset, byte in enumerate(code):
                store(base_address + offset, 0x40)
                store(base_address + offset, byte)
            store(base_address, 0xff)

        program(lambda address, value: vm.devices.store(address, value, 1))
        before = self.scan(vm, base_address, 2)
        self.assertEqual(b'system.flash0', before.block)
        # Now by the vCPU: mov %sil, (%rdi); ret
        vm.devices.write(SOURCE, bytes.fromhex('40 88 37 c3'))
        code = bare.returns(4)
        program(lambda address, value: vm.call(SOURCE, address, value))
        self.check_again(vm, before, 4, base_address)

    def test_two_addresses_of_the_firmware(self):
        vm = self.run_bare()
        offset = vm.functions['copy'] - bare.HERE
        [request], _ = self.asked(vm, 0xf0000 + offset)
        self.assertEqual(b'pc.bios', request.block)
        self.assertEqual([], self.asked(vm, 0xffff0000 + offset)[0])


class AliasTest(TestCase):
    """RAM that is seen in more than one place."""

    def test_two_virtual_addresses(self):
        vm = self.run_bare()
        before = self.put(vm)
        self.assertEqual(([], 1), self.asked(vm, TARGET + ALIAS))
        vm.devices.write(SOURCE, bare.returns(9))
        vm.call('copy', TARGET + ALIAS, SOURCE, 6)
        self.check_again(vm, before, 9)
        self.assertEqual(([], 9), self.asked(vm, TARGET + ALIAS))

    def test_shadow_ram(self):
        # The chipset shows the RAM below 1 MiB as such, or read-only.
        vm = self.run_bare()
        chipset = bare.PCIDevice(vm.devices, 0)
        shadow = 0xc8000

        def show(mode):
            chipset.write_config(0x92, mode, 1)

        show(3)
        before = self.put(vm, shadow)
        show(1)
        vm.devices.write(SOURCE, bare.returns(9))
        vm.call('copy', shadow, SOURCE, 6)
        self.assertEqual(([], 1), self.asked(vm, shadow))
        show(3)
        self.assertEqual(([], 1), self.asked(vm, shadow))
        vm.call('copy', shadow, SOURCE, 6)
        show(1)
        self.check_again(vm, before, 9, shadow)
