# SPDX-License-Identifier: Apache-2.0
"""Load for a real worker, without guests."""

import contextlib
import os
import pathlib
import selectors
import threading
import time

from tests.unit import base as unit_base
from tests.unit.worker import base
from virtav_nova.monitor import client
from virtav_nova.monitor import wire
from virtav_nova.worker import status
from virtavtools import lab

#: Ends in bytes that no other page has.
_UNIQUE = 16


def page(number, begin=b'', filler=b'\x90'):
    """A page that no other number has.

    :param begin: of the page
    """
    return (begin.ljust(wire.PAGE_SIZE - _UNIQUE, filler)
            + number.to_bytes(_UNIQUE, 'little'))


def request(session, number, content, **changes):
    """Ask for a page without neighbours, as a packed frame."""
    return wire.Request(
        number, 1, (number % (1 << 20)) << 12, 0x1000, 0x400000, 0x400010,
        0x1000, 0, 3, wire.HOLD, session.tagger.tag(content), b'pc.ram',
        wire.NO_TAG, wire.NO_TAG, wire.window(content))._replace(
            **changes).pack()


class Asker(threading.Thread):
    """A client that asks for pages, each different, until it is stopped.

    :param path: of the worker's socket
    :param first: number of its first page
    :param depth: how many it asks for at a time
    :param pause: seconds between verdict and next request
    :ivar taken: seconds that each verdict took
    :ivar error: what ended it before it was stopped
    """

    def __init__(self, path, first, depth=1, pause=0.0, begin=b''):
        super().__init__(daemon=True)
        self.session = client.Client(str(path), client.hello(), 60)
        self.taken = []
        self.error = None
        self._next = first
        self._depth = min(depth, self.session.most)
        self._pause = pause
        self._begin = begin
        self._sent = {}
        self._stopping = False

    def run(self):
        try:
            while not self._stopping:
                while len(self._sent) < self._depth:
                    self._ask()
                for verdict in self.session.wait():
                    self.taken.append(
                        time.perf_counter() - self._sent.pop(verdict.id))
                if self._pause:
                    time.sleep(self._pause)
        except Exception as error:
            self.error = error

    def _ask(self):
        self._next += 1
        frame = request(self.session, self._next,
                        page(self._next, self._begin))
        self._sent[self._next] = time.perf_counter()
        self.session.send(frame)

    def stop(self):
        """End it, and see that all went well."""
        self._stopping = True
        self.join(30)
        self.session.close()
        assert self.error is None, self.error

    def quantile(self, share):
        """Seconds that this share of the verdicts took at most."""
        ordered = sorted(self.taken)
        return ordered[int(len(ordered) * share)]


class TestCase(unit_base.TestCase):
    """A test with a real worker."""

    def setUp(self):
        super().setUp()
        self.top = self.enterContext(lab.directory())

    def worker(self, **options):
        """Start a worker that takes everybody.

        :returns: :class:`lab.Worker` that serves
        """
        options = {'require_token': False, 'max_sessions': 300, **options}
        worker = self.enterContext(lab.Worker(self.top, **options))
        self.enterContext(client.Client(
            str(worker.socket), client.hello(), 60)).close()
        return worker

    def tree(self, worker):
        """Process ids of all processes of the worker."""
        found = [worker.process.pid]
        for pid in found:
            found += base.children(pid)
        return found

    def scan_processes(self, worker):
        """Process ids of its scan processes: what has no child, but main."""
        return [pid for loader in base.children(worker.process.pid)
                for pid in base.children(loader)]

    def counters(self, worker):
        """What its scan processes have counted."""
        return status.ask(str(self.top / 'status.sock'), 'status')[
            'counters']


def memory(pids):
    """Memory that processes have together, in MiB, shared memory once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = pathlib.Path('/proc/%d/smaps_rollup' % pid).read_text()
            total += int(text.partition('\nPss:')[2].split()[0])
    return total / 1024


def open_files(pids):
    """Open files of processes, each by itself."""
    return [len(os.listdir('/proc/%d/fd' % pid)) for pid in pids]


def threads(pids):
    """Threads of processes, each by itself."""
    return [len(os.listdir('/proc/%d/task' % pid)) for pid in pids]


def readable(sessions, seconds):
    """Wait until one of several sessions has something."""
    with selectors.DefaultSelector() as selector:
        for one in sessions:
            selector.register(one.fd, selectors.EVENT_READ, one)
        return [key.data for key, _events in selector.select(seconds)]
