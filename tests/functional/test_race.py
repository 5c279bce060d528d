# SPDX-License-Identifier: Apache-2.0
"""Many who write to a few pages, and many who run them, all at once.

The worker approves of some of the code and not of the rest. Two oracles that
know nothing of the monitor say what became of it: one tells which bytes QEMU
has translated, see ``oracle.c``, and the code itself returns whether it is of
those that may run.
"""

import hashlib
import os
import pathlib
import time

from tests.functional import bare
from tests.functional import base
from tests.functional import fake
from virtav_nova.monitor import wire

PAGE = bare.PAGE
PAGES = 8
TARGET = 0x300000
COMMANDS = 0x280000
STOP = 0x281000
BUFFER = 0x282000
RINGS = 0x290000
REGISTERS = 0xe0000000
FILES = 16
SECONDS = 150 if base.NIGHTLY else 10


class TestCase(base.TestCase):

    Machine = bare.Machine

    def setUp(self):
        super().setUp()
        self.oracle = self.home / 'oracle'
        self.approved = set()
        self.offers = {}

    def script(self, session):
        """Keep the digests of what is approved."""
        session.greet(**self.offers)
        while True:
            request = session.receive()
            if TARGET <= request.gpa < TARGET + PAGES * PAGE and (
                    request.page[2] & 1):
                session.answer(request, wire.Result.MATCH, fake.RULE)
            else:
                self.approved.add(hashlib.sha256(request.page).hexdigest())
                if session.table:
                    for tag in (request.tag, request.before_tag,
                                request.after_tag):
                        session.table.add(tag)
                session.answer(request)

    @staticmethod
    def code(number):
        """A page of code; if the number is odd, it must not run.

        All have the same end, so that junctions repeat as pages do.
        """
        return bare.returns((number << 8) + number) + os.urandom(
            PAGE - 6 - wire.EDGE_SIZE) + bytes(wire.EDGE_SIZE)

    def files(self):
        """Arguments for files of fw_cfg, each a page of code."""
        arguments = []
        for number in range(FILES):
            path = self.home / ('file%d' % number)
            path.write_bytes(self.code(number))
            arguments += ['-fw_cfg', 'name=opt/%d,file=%s' % (number, path)]
        return arguments

    def disk(self):
        """Arguments for a disk of pages of code."""
        path = self.home / 'disk'
        path.write_bytes(b''.join(map(self.code, range(256))))
        return ('-drive', 'if=none,id=disk,format=raw,readonly=on,file=%s' %
                path, '-device', 'virtio-blk-pci,drive=disk,addr=5')

    def start(self, smp, *extra, **monitor):
        """Start a machine with the oracle, and all of its vCPUs."""
        vm = self.machine(
            self.fake_worker(self.script),
            {'deadline-ms': 60000, **monitor}, smp=smp,
            accel='tcg,thread=multi', extra=(*extra, '-plugin', (
                'file=%s,out=%s' % (bare.oracle(), self.oracle))))
        vm.wait_start()
        vm.start_others(smp)
        for page in range(PAGES):
            vm.devices.write(TARGET + page * PAGE, self.code(0))
        return vm

    def stop(self, vm, *vcpus):
        """End what the vCPUs run, and then the machine.

        :returns: what each of them returned
        """
        vm.devices.store(STOP, 1, 1)
        results = [vm.result(vcpu, 60) for vcpu in vcpus]
        self.state = vm.query()
        self.more = [vm.more(2, vcpu) for vcpu in vcpus]
        vm.stop()
        return results

    def translated(self):
        """Digests of the pages that were translated."""
        return set(self.oracle.read_text().split())


class RaceTest(TestCase):

    def prepare_transfers(self, vm):
        """Have transfers to each page from each file ready in memory."""
        device = bare.FwCfg(vm.devices, BUFFER)
        commands = [
            device.read('opt/%d' % ((number + page) % FILES), PAGE // 2,
                        TARGET + page * PAGE)
            for number in range(FILES) for page in range(PAGES)]
        vm.devices.write(COMMANDS, b''.join(
            (command + command[:4]).ljust(32, b'\0')
            for command in commands))
        return len(commands)

    def use_disk(self, vm):
        """Read from the disk to the pages for a while.

        The disk writes its interrupts to one of the pages, too, and what it
        has done to another.
        """
        disk = bare.Disk(vm.devices, 5, REGISTERS, RINGS, BUFFER)
        disk.interrupt(TARGET + 0xc00, 0)
        disk.add_queue(0, used=TARGET + PAGE + 0xc00, vector=0)
        disk.go()
        count = 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            page = 2 + count % (PAGES - 2)
            disk.read(count % 256, TARGET + page * PAGE)
            disk.interrupt(TARGET + 0xc00, count)
            count += 1
        return count

    def check(self):
        vm = self.start(4, *self.files(), *self.disk(),
                        **{'on-timeout': 'deny', 'on-match': 'block'})
        arguments = TARGET, PAGES, STOP
        vm.begin('fetch', *arguments, vcpu=1)
        vm.begin('fetch', *arguments, vcpu=2)
        vm.begin('transfer', COMMANDS, self.prepare_transfers(vm), STOP, 5,
                 vcpu=3)
        vm.begin('rewrite', *arguments, 3)
        reads = self.use_disk(vm)
        rewrites, *fetches, transfers = self.stop(vm, 0, 1, 2, 3)
        # All of them had their share.
        self.assertGreater(rewrites, 10**6)
        self.assertGreater(min(fetches), 100)
        self.assertGreater(min(transfers, reads), 100)
        # Verdicts came too late for what was there by then.
        self.assertGreater(self.state['stale'], 50)
        self.assertGreater(self.state['requests'], 1000)
        self.assertEqual((0, 0), (self.state['timeouts'],
                                  self.state['dropped']))
        for blocked, wrong in self.more[1:3]:
            self.assertGreater(blocked, 100)
            self.assertEqual(0, wrong)
        translated = self.translated()
        self.assertGreater(len(translated), 100)
        self.assertEqual(set(), translated - self.approved)

    def test_socket(self):
        self.check()

    def test_shared_memory(self):
        self.offers = {'table_entries': 1024, 'ring_slots': 16}
        self.check()
        self.assertGreater(self.state['table-hits'], 10)
        self.assertEqual('ring', self.state['transport'])


class OracleTest(TestCase):
    """The oracles find what was not approved."""

    def test_report(self):
        # This policy lets everything run.
        vm = self.start(2, policy='report')
        vm.begin('fetch', TARGET, PAGES, STOP, vcpu=1)
        vm.begin('rewrite', TARGET, PAGES, STOP, 3)
        time.sleep(1)
        self.stop(vm, 0, 1)
        blocked, wrong = self.more[1]
        self.assertEqual(0, blocked)
        self.assertGreater(wrong, 100)
        translated = self.translated()
        self.assertGreater(len(translated & self.approved), 10)
        self.assertGreater(len(translated - self.approved), 10)


class StormTest(TestCase):
    """One vCPU that rewrites page after page does not stop the others."""

    TURNS = 2 * 10**8

    def loop(self, vm):
        """How long a loop takes on the first vCPU, in seconds.

        Without the time that the host gave to others.
        """
        [status] = [task / 'schedstat' for task in pathlib.Path(
            '/proc/%d/task' % vm.process.pid).iterdir()
            if (task / 'comm').read_text().startswith('CPU 0')]
        waited = int(status.read_text().split()[1])
        start = time.monotonic()
        vm.call('spin', self.TURNS, timeout=120)
        return (time.monotonic() - start -
                (int(status.read_text().split()[1]) - waited) / 1e9)

    def check(self, **monitor):
        vm = self.start(2, '-name', 'debug-threads=on', **monitor)
        self.loop(vm)
        alone = self.loop(vm)
        vm.begin('storm', TARGET, 400, STOP, vcpu=1)
        # At first, many at once are taken for normal; where fetches take
        # long, they stay below the limit.
        end = time.monotonic() + 5
        while time.monotonic() < end and not vm.query()['throttled']:
            time.sleep(0.1)
        before = vm.query()['fetches']
        together = self.loop(vm)
        self.assertGreater(vm.query()['fetches'] - before, 100)
        self.stop(vm, 1)
        self.assertLess(together / alone, 3)

    def test_enforce(self):
        self.check()

    def test_report(self):
        self.check(policy='report')
