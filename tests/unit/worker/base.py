# SPDX-License-Identifier: Apache-2.0
"""A real worker, and a stand-in for QEMU that talks to it."""

import contextlib
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
import unittest
import uuid

from tests.unit import base
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire

#: Longest wait for anything, in seconds; the machine may be busy.
PATIENCE = 20

COMMAND = (sys.executable, '-m', 'virtav_nova.cmd.scan_worker')

CLEAN = bytes(4096)
MATCHING = base.SIGNATURE.ljust(4096, b'\xcc')
SLOW = b'SLOW-PAGE'.ljust(4096, b'\xcc')
#: Never ends by itself on a page that begins like SLOW.
SLOW_RULE = """
rule Slow {
    strings: $slow = "SLOW-PAGE"
    condition: $slow at 0 and for any i in (0..1000000000000) : (i * 3 == 1)
}
"""


def wait_for(condition, what):
    """Wait until something holds.

    :param condition: called until it gives something true
    :param what: is waited for, for the error
    :returns: what the condition gave
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError('%s: not within %s s' % (what, PATIENCE))
        time.sleep(0.005)


def alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        status = pathlib.Path('/proc', str(pid), 'stat').read_text()
    except OSError:
        return False
    return status.rpartition(')')[2].split()[0] != 'Z'


def children(pid):
    """Process ids of the children of a process."""
    with contextlib.suppress(OSError):
        return [int(child) for child in pathlib.Path(
            f'/proc/{pid}/task/{pid}/children').read_text().split()]
    return []


class Monitor:
    """Plays QEMU's page-fetch monitor.

    :param connection: to the worker
    :ivar table: file descriptor of the verdict table, or None
    :ivar ring: :class:`ring.MonitorEnd`, or None
    :ivar fds: of the ring's memory
    :ivar hello_answer: WELCOME or REFUSED
    """

    def __init__(self, connection):
        connection.settimeout(PATIENCE)
        self.socket = connection
        self.table = self.ring = None
        self.fds = []
        self._decoder = wire.Decoder(
            [wire.Welcome, wire.Verdict, wire.Refused, wire.Read])
        self._ids = 0

    def close(self):
        self.socket.close()
        self.ring = None
        if self.table is not None:
            self.fds.append(self.table)
            self.table = None
        while self.fds:
            os.close(self.fds.pop())

    def frame(self):
        """Wait for a frame; None at the end of the session."""
        if self.ring:
            return self._ring_frame()
        while True:
            frame = self._decoder.frame()
            if frame is not None:
                return frame
            room = self._decoder.room()
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, len(room), 9)
            except ConnectionResetError:
                return None
            self.fds += fds
            if not data:
                return None
            room[:len(data)] = data
            self._decoder.filled(len(data))

    def _ring_frame(self):
        ended = False
        while True:
            data = self.ring.verdicts.take()
            if data is not None:
                return wire.whole(
                    data, wire.Verdict, wire.Refused, wire.Read)
            if ended:
                return None
            ended = True
            with contextlib.suppress(ConnectionResetError):
                doorbells = self.socket.recv(99)
                assert not doorbells.strip(ring.DOORBELL), doorbells
                ended = not doorbells

    def hello(self, **changes):
        """Say hello and wait for the answer."""
        self.socket.sendall(hello(**changes).pack())
        self.hello_answer = answer = self.frame()
        if isinstance(answer, wire.Welcome):
            self.key = answer.key
            if answer.table_entries:
                self.table = self.fds.pop(0)
            if answer.ring_slots:
                self.use(answer.ring_slots)
            assert len(self.fds) == bool(answer.ring_slots)
        return answer

    def use(self, slots):
        """Send and receive by the ring from now on."""
        self.ring = ring.MonitorEnd(self.fds[0], slots)

    def publish(self, data):
        """Send what is or is not a frame."""
        if not self.ring:
            self.socket.sendall(data)
            return
        self.ring.requests.put(data)
        self.tell()

    def begin(self, data):
        """Send the begin of a frame that is not completed."""
        if self.ring:
            # It is not there before the index says so.
            self.ring.requests._memory[4096:4096 + len(data)] = data
        else:
            self.socket.sendall(data)

    def tell(self):
        """Ring the worker's doorbell."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self.socket.send(ring.DOORBELL, socket.MSG_DONTWAIT)

    def request(self, page, before=b'', after=b'', **changes):
        """Make a request for a page.

        :param before: last bytes of the virtual page before, if there is one
        :param after: first bytes of the virtual page after, if there is one
        """
        self._ids += 1
        flags = wire.HOLD
        before_tag = after_tag = wire.NO_TAG
        before = before and before.rjust(512, b'\0')
        after = after and after.ljust(512, b'\0')
        window = wire.window(page, before, after)
        if before:
            flags |= wire.BEFORE
            before_tag = wire.page_tag(self.key, window[:1024])
        if after:
            flags |= wire.AFTER
            after_tag = wire.page_tag(self.key, window[-1024:])
        return wire.Request(
            id=self._ids, generation=self._ids + 7, offset=self._ids << 12,
            gpa=self._ids << 12, gva=0x400000, rip=0x400010, cr3=0x1000,
            vcpu=0, cpl=3, flags=flags, tag=wire.page_tag(self.key, page),
            block=b'pc.ram', before_tag=before_tag, after_tag=after_tag,
            window=window)._replace(**changes)

    def send(self, page, *edges, **changes):
        """Ask for a verdict."""
        request = self.request(page, *edges, **changes)
        self.publish(request.pack())
        return request

    def ask(self, page, *edges, **changes):
        """Ask for a verdict and wait for it."""
        request = self.send(page, *edges, **changes)
        verdict = self.frame()
        if verdict is None or isinstance(verdict, wire.Refused):
            return verdict
        assert (request.id, request.generation, request.tag) == (
            verdict.id, verdict.generation, verdict.tag), verdict
        return verdict


def hello(**changes):
    """Make a HELLO."""
    return wire.Hello(
        version_min=1, version_max=1, page_size=4096, instance=uuid.uuid4(),
        ram_size=512 << 20, policy=wire.Policy.ENFORCE,
        on_match=wire.OnMatch.BLOCK, on_timeout=wire.OnTimeout.ALLOW,
        deadline_ms=1000)._replace(**changes)


class TestCase(base.TestCase):
    """A test that starts workers of its own."""

    #: Of the HELLO of its sessions.
    flags = 0

    def setUp(self):
        super().setUp()
        self.path = str(self.top / 'worker.sock')
        self.process = None

    def configure(self, rules=None, **options):
        """Write a configuration file.

        :param rules: source of a second rule file
        :param options: of the group virtav_worker
        :returns: its path
        """
        if 'rules_dir' not in options:
            for file in base.SELFTEST_RULES.iterdir():
                self.write(f'rules/{file.name}', file.read_bytes())
            if rules:
                self.write('rules/test.yar', rules)
        options = {'socket': self.path, 'state_dir': self.top / 'state',
                   'rules_dir': self.top / 'rules', 'processes': 1,
                   'scan_timeout_ms': 5000, 'engine': 'yara',
                   'require_token': False, 'user': 'root',
                   'status_socket': ''} | options
        return self.write('virtav.conf', '[virtav_worker]\n' + ''.join(
            f'{name} = {value}\n' for name, value in options.items()))

    def launch(self, **options):
        """Start a worker and do not wait for it."""
        with open(self.top / 'log', 'w') as log:
            process = subprocess.Popen(
                [*COMMAND, '--config-file', self.configure(**options)],
                cwd=base.ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def start(self, rules=None, **options):
        """Start a worker and wait until it serves."""
        self.process = self.launch(rules=rules, **options)
        wait_for(lambda: 'Listening on' in self.log()
                 or self.process.poll() is not None, 'start of the worker')
        self.assertIsNone(self.process.poll(), self.log())

    def stop(self, number=signal.SIGTERM):
        """Stop the worker.

        :returns: exit status
        """
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def log(self):
        """What the worker has logged."""
        return (self.top / 'log').read_text()

    def connect(self):
        """Connect to the worker."""
        connection = socket.socket(socket.AF_UNIX)
        monitor = Monitor(connection)
        self.addCleanup(monitor.close)
        connection.connect(self.path)
        return monitor

    def session(self, **changes):
        """Connect to the worker and say hello."""
        monitor = self.connect()
        changes.setdefault('flags', self.flags)
        self.assertIsInstance(monitor.hello(**changes), wire.Welcome)
        self.assertEqual(bool(changes['flags']), monitor.ring is not None)
        return monitor

    def loaders(self):
        """Process ids of the loaders."""
        return children(self.process.pid)

    def scan_processes(self):
        """Process ids of the scan processes."""
        return [pid for loader in self.loaders() for pid in children(loader)]

    def journal(self):
        """The records of the alert journal."""
        path = self.top / 'state' / 'alerts' / 'journal.jsonl'
        # The last line may just be written.
        whole, _, _ = path.read_bytes().rpartition(b'\n')
        return [json.loads(line) for line in whole.splitlines()]

    def records(self, count, **wanted):
        """Wait for records in the journal.

        :param count: how many
        :param wanted: what they hold
        :returns: the records
        """
        def found():
            matching = [record for record in self.journal()
                        if wanted.items() <= record.items()]
            return matching if len(matching) >= count else None

        matching = wait_for(found, f'{count} records with {wanted}')
        self.assertEqual(count, len(matching))
        return matching

    def assert_closed(self, monitor, code=None):
        """The worker closes this connection.

        :param code: that it refuses it with
        """
        frame = monitor.frame()
        if code is not None:
            self.assertIsInstance(frame, wire.Refused)
            self.assertEqual(code, frame.code)
            frame = monitor.frame()
        self.assertIsNone(frame)

    def assert_serves(self, monitor):
        """A session gets the right verdicts."""
        self.assertEqual(wire.Result.CLEAN, monitor.ask(CLEAN).result)
        self.assertEqual(wire.Result.MATCH, monitor.ask(MATCHING).result)


@contextlib.contextmanager
def stopped(pid):
    """Keep a process from running."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def no_more_files(pid, but=0):
    """Let a process open no more files.

    :param but: so many after all
    :returns: the limits before
    """
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    free = 0
    if but:
        # The limit is one on numbers, and there may be gaps.
        try:
            taken = {int(name) for name in os.listdir(f'/proc/{pid}/fd')}
        except PermissionError:
            raise unittest.SkipTest(
                'only root looks into a worker') from None
        free = sorted(set(range(len(taken) + but + 1)) - taken)[but]
    return resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, hard))
