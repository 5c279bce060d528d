# SPDX-License-Identifier: Apache-2.0
"""Pages that are written to while the verdict is awaited.

The writer here is a debugger, which writes guest memory by its physical
address as a device does, at the very time that the test chooses.
"""

import queue
import socket

from tests.functional import base
from tests.functional import fake
from virtav_nova.monitor import wire


class Debugger:
    """A client of QEMU's gdb server, which stops the VM while it is there.

    :param path: of the server's socket
    """

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile('rb')

    def __enter__(self):
        self._command('?')
        self._command('Qqemu.PhyMemMode:1')
        return self

    def __exit__(self, *_exception):
        self._command('D')
        self._stream.close()
        self._socket.close()

    def _command(self, text):
        self._socket.sendall(b'$%s#%02x' % (
            text.encode(), sum(text.encode()) % 256))
        while self._stream.read(1) != b'$':
            pass
        answer = b''
        while (byte := self._stream.read(1)) != b'#':
            answer += byte
        self._stream.read(2)
        self._socket.sendall(b'+')
        if answer.startswith(b'E'):
            raise ValueError('%s: %s' % (text, answer.decode()))

    def write(self, address, data):
        """Write guest memory.

        :param address: physical
        """
        self._command('M%x,%x:%s' % (address, len(data), data.hex()))


class HeldPageTest(base.TestCase):
    """A page is written between the fetch and the verdict."""

    def start(self, **monitor):
        """Start a guest whose worker answers only what it is told to.

        :returns: machine, the session, the first request
        """
        ready = queue.Queue()
        requests = queue.Queue()

        def script(session):
            session.greet()
            ready.put(session)
            while True:
                requests.put(session.receive())

        gdb = self.home / 'gdb.sock'
        machine = self.machine(
            self.fake_worker(script),
            {'deadline-ms': 30000, 'on-timeout': 'deny', **monitor},
            extra=('-chardev', 'socket,id=gdb,path=%s,server=on,wait=off' %
                   gdb, '-gdb', 'chardev:gdb'))
        self.debugger = lambda: Debugger(gdb)
        self.requests = requests
        return machine, ready.get(timeout=20), requests.get(timeout=20)

    def go_past_firmware(self, session, request):
        """Answer until the guest runs a page of its RAM proper."""
        while request.block != b'pc.ram':
            session.answer(request)
            request = self.requests.get(timeout=20)
        return request

    def check_not_approved(self, machine, session, request, *writes):
        """The verdict on the old bytes lets nothing run.

        :param writes: of the first bytes of the page, one after the other
        :returns: the request that is made instead
        """
        before = machine.query()
        with self.debugger() as debugger:
            for data in writes:
                debugger.write(request.gpa, data)
        self.assertEqual(before['states']['scanned'],
                         machine.query()['states']['scanned'])
        session.answer(request)
        again = self.requests.get(timeout=20)
        state = machine.query()
        self.assertEqual(before['stale'] + 1, state['stale'])
        self.assertEqual(before['states']['scanned'],
                         state['states']['scanned'])
        self.assertEqual(before['fetches'] + 1, state['fetches'])
        self.assertEqual((request.block, request.offset, request.gva),
                         (again.block, again.offset, again.gva))
        self.assertGreater(again.generation, request.generation)
        self.assertNotEqual(request.id, again.id)
        self.assertEqual(writes[-1], again.page[:len(writes[-1])])
        return again

    def test_other_bytes(self):
        machine, session, request = self.start()
        request = self.go_past_firmware(session, request)
        # Of a page of code that is fetched somewhere behind its start.
        other = bytes(byte ^ 0xff for byte in request.page[:8])
        again = self.check_not_approved(machine, session, request, other)
        self.assertEqual(request.page[8:], again.page[8:])
        self.assertNotEqual(request.tag, again.tag)

    def test_same_bytes_again(self):
        # ABA: the tag fits, but something else might have been scanned.
        machine, session, request = self.start()
        request = self.go_past_firmware(session, request)
        same = request.page[:8]
        other = bytes(byte ^ 0xff for byte in same)
        again = self.check_not_approved(machine, session, request, other,
                                        same)
        self.assertEqual(request.page, again.page)
        self.assertEqual(request.tag, again.tag)
        # This one counts.
        session.answer(again)
        self.requests.get(timeout=20)
        self.assertEqual(request.generation + 1, again.generation)

    def test_match_of_bytes_that_are_gone(self):
        # Told, though there is nothing to be held any more.
        machine, session, request = self.start(**{'on-match': 'block'})
        request = self.go_past_firmware(session, request)
        with self.debugger() as debugger:
            debugger.write(request.gpa, b'\xf4\xf4')
        session.answer(request, wire.Result.MATCH, fake.RULE)
        self.match(machine, action='alert', rule=fake.RULE,
                   offset=request.offset)
        again = self.requests.get(timeout=20)
        self.assertEqual(request.offset, again.offset)
        self.assertEqual('running', machine.status())

    def test_scanned_page(self):
        machine, session, request = self.start()
        request = self.go_past_firmware(session, request)
        session.answer(request)
        following = self.requests.get(timeout=20)
        before = machine.query()['states']['scanned']
        with self.debugger() as debugger:
            debugger.write(request.gpa, request.page[:1])
        # The vCPU waits for the other one, so nothing else has happened.
        self.assertEqual(before - 1, machine.query()['states']['scanned'])
        self.assertNotEqual(request.offset, following.offset)


class SelfModifyingTest(base.TestCase):

    def test_slow_worker(self):
        # policy=report: the guest writes on while the verdict is awaited.
        worker = self.fake_worker(
            lambda session: fake.honest(session, self.signature, 0.0002))
        machine = self.booted(
            worker, {'policy': 'report', 'hot-page-limit': 0}, smp=2)
        before = machine.query()
        self.assert_ran(machine, 'smc', 'own')
        after = machine.query()
        # Either asked for or, with the queue full, known to be unscanned.
        self.assertGreaterEqual(after['fetches'] - before['fetches'], 4000)
        self.assertGreater(after['stale'], before['stale'])
        self.eventually('all scanned', lambda: (
            machine.query()['states']['unscanned'] == 0), 60)
