# SPDX-License-Identifier: Apache-2.0
"""Real scan workers and real guests, for the quickstart, tests and benches.

Runs in the project's environment (:func:`virtavtools.venv.ensure`), as it
uses the project's own QMP client.
"""

import contextlib
import json
import os
import pathlib
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

from virtav_nova.monitor import qmp
import virtavtools
from virtavtools import errors

RULES = virtavtools.ROOT / 'etc' / 'virtav' / 'rules'
_APPEND = 'console=ttyS0 quiet loglevel=3'
_OBJECT = 'virtav-token0'
#: Below the directory of a worker's socket: who may connect to it.
_INSTANCES = 'instances'


@contextlib.contextmanager
def directory():
    """A new directory with a path short enough for UNIX sockets."""
    path = tempfile.mkdtemp(prefix='virtav-')
    try:
        yield pathlib.Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _end(process, timeout=10):
    """End a process, by force if need be, and reap it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Running:
    """Context manager of what has ``start()`` and ``stop()``."""

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exception):
        self.stop()


class Worker(_Running):
    """A scan worker, ``virtav-scan-worker``, with a directory of its own.

    Started by root it stays root, without capabilities: where all this is
    installed may be for root only.

    :param home: directory for its socket, configuration, log and journal
    :param rules: directory of its rules
    :param options: more options of the group ``virtav_worker``
    """

    def __init__(self, home, rules=RULES, **options):
        self.home = home
        self.socket = home / 'worker.sock'
        self.log = home / 'worker.log'
        self.journal = home / 'state' / 'journal.jsonl'
        self.process = None
        settings = {'socket': self.socket, 'state_dir': home / 'state',
                    'journal_path': self.journal, 'rules_dir': rules,
                    'status_socket': home / 'status.sock',
                    'instances_dir': home / _INSTANCES,
                    **({'user': 'root'} if os.geteuid() == 0 else {}),
                    **options}
        self._config = home / 'worker.conf'
        self._config.write_text('[virtav_worker]\n' + ''.join(
            '%s = %s\n' % pair for pair in settings.items()))
        for name in ('state', _INSTANCES):
            (home / name).mkdir(mode=0o750, exist_ok=True)

    def start(self, timeout=30):
        """Start it and wait until it listens.

        :param timeout: in seconds
        :raises errors.ToolError: it ended or does not listen; the message
            has the end of its log
        """
        command = pathlib.Path(sys.executable).with_name('virtav-scan-worker')
        with open(self.log, 'ab') as log:
            self.process = subprocess.Popen(
                [command, '--config-file', self._config],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                process_group=0)
        deadline = time.monotonic() + timeout
        while not self._listens():
            if self.process.poll() is not None or (time.monotonic() >
                                                   deadline):
                self.stop()
                raise errors.ToolError(
                    'the scan worker does not start:\n%s' %
                    self.log.read_text(errors='replace')[-2000:])
            time.sleep(0.02)

    def _listens(self):
        # A socket that a killed worker left behind is of no use: look for
        # one that belongs to a listener. Connecting would open a session.
        path = ' %s\n' % self.socket
        with open('/proc/net/unix', encoding='utf-8',
                  errors='replace') as table:
            return any(line.endswith(path) and line.split()[3] == '00010000'
                       for line in table)

    def stop(self):
        """Have it drain and end."""
        if self.process:
            self.signal(signal.SIGCONT)
            _end(self.process)

    def signal(self, number):
        """Send a signal to it and to its scan processes, if it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def records(self, kind=None):
        """The journal's records, oldest first.

        :param kind: only those of this ``type``
        """
        if not self.journal.exists():
            return []
        # The last line may just be written.
        whole, _, _ = self.journal.read_bytes().rpartition(b'\n')
        records = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records
                if kind in (None, record['type'])]

    def record(self, timeout=10, **wanted):
        """Wait for a record.

        :param timeout: in seconds
        :param wanted: what it is to have, e.g. ``type='match'``
        :returns: the oldest such record
        :raises TimeoutError: there is none
        """
        deadline = time.monotonic() + timeout
        while True:
            late = time.monotonic() > deadline
            for record in self.records():
                if wanted.items() <= record.items():
                    return record
            if late:
                raise TimeoutError('no record %s in the journal' % wanted)
            time.sleep(0.02)


def _registered(properties):
    """Register an instance with its worker.

    :param properties: of its monitor; gets what the emulator needs for it
    :returns: more arguments of the emulator
    """
    directory = pathlib.Path(properties['socket']).parent / _INSTANCES
    if 'token-secret' in properties or not directory.is_dir():
        return []
    # It needs what only the environment has.
    from virtav_nova.monitor import instance
    path = instance.place(
        directory, uuid.UUID(str(properties['instance'])), 'lab')
    properties['token-secret'] = _OBJECT
    return ['-object', 'secret,id=%s,format=base64,file=%s' % (_OBJECT, path)]


class Recorder(_Running):
    """``virtav-scan-worker record``, which takes a worker's place.

    :param home: directory for its socket, its log and the recording
    """

    def __init__(self, home):
        self.socket = home / 'recorder.sock'
        self.path = home / 'boot.rec'
        self.log = home / 'recorder.log'
        self.process = None

    def start(self, timeout=30):
        """Start it and wait until it listens.

        :param timeout: in seconds
        :raises errors.ToolError: it ended or does not listen
        """
        command = pathlib.Path(sys.executable).with_name('virtav-scan-worker')
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [command, 'record', '--socket', self.socket, self.path],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout
        while not self.socket.exists():
            if self.process.poll() is not None or (time.monotonic() >
                                                   deadline):
                raise errors.ToolError('the recorder does not start:\n%s' %
                                       self.log.read_text(errors='replace'))
            time.sleep(0.02)

    def finish(self, timeout=30):
        """Wait for its end, which is that of the session.

        :param timeout: in seconds
        :returns: path of the recording
        :raises errors.ToolError: there is none
        """
        if self.process.wait(timeout):
            raise errors.ToolError('nothing was recorded:\n%s' %
                                   self.log.read_text(errors='replace'))
        return self.path

    def stop(self):
        """Have it end."""
        if self.process:
            _end(self.process)


class Machine(_Running):
    """A guest of ``tools/build-guest`` under an emulator.

    :param emulator: path of ``qemu-system-x86_64``
    :param guest: directory that ``tools/build-guest`` printed
    :param home: directory for its QMP socket
    :param monitor: properties of the page-fetch monitor, as a mapping, or
        None for no monitor; ``id`` and ``instance`` have defaults, and the
        token is given to a :class:`Worker` at ``socket``
    :param accel: the accelerator with its options
    :param smp: number of vCPUs
    :param run: cases to run at boot, after which the guest powers off
    :param append: more words for the kernel's command line
    :param snapshot: let the guest write to its disk, and forget that
    :param extra: more arguments of the emulator
    :param fds: file descriptors that it inherits
    :ivar lines: what has been read of the guest's console
    """

    def __init__(self, emulator, guest, home, monitor=None, accel='tcg',
                 smp=1, run=(), append='', snapshot=False, extra=(), fds=()):
        guest = pathlib.Path(guest)
        self.instance = str(uuid.uuid4())
        self.stderr = home / 'qemu.log'
        self._qmp_path = home / 'qmp.sock'
        append = ' '.join(filter(None, [_APPEND, append]))
        if run:
            append += ' virtav.run=' + ','.join(run)
        self.arguments = [
            os.fspath(emulator), '-nodefaults', '-no-user-config',
            '-machine', 'q35', '-accel', accel, '-cpu', 'max', '-m', '512',
            '-smp', str(smp), '-display', 'none', '-serial', 'stdio',
            '-qmp', 'unix:%s,server=on,wait=on' % self._qmp_path,
            *self.boot_arguments(guest, append, snapshot)]
        if monitor is not None:
            properties = {'id': 'virtav0', 'instance': self.instance,
                          **monitor}
            self.instance = properties['instance']
            self.arguments += _registered(properties)
            self.arguments += ['-object', 'page-fetch-monitor,' + ','.join(
                '%s=%s' % pair for pair in properties.items())]
        self.arguments += extra
        self._fds = fds
        self.process = self.qmp = None
        self.started = None
        self.lines = []
        self._console = b''

    @staticmethod
    def boot_arguments(guest, append, snapshot):
        """Arguments of the emulator that name what it boots."""
        return ['-kernel', str(guest / 'vmlinuz'),
                '-initrd', str(guest / 'initrd.gz'), '-append', append,
                '-drive', 'file=%s,format=raw,if=virtio,%s=on' %
                (guest / 'disk.img', 'snapshot' if snapshot else 'readonly')]

    def start(self):
        """Start the emulator and connect to its QMP socket.

        :raises errors.ToolError: the emulator ended; the message has what
            it printed
        """
        self.started = time.monotonic()
        with open(self.stderr, 'wb') as log:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, pass_fds=self._fds)
        os.set_blocking(self.process.stdout.fileno(), False)
        while self.qmp is None:
            if self.process.poll() is not None:
                raise errors.ToolError('the emulator does not start:\n%s' %
                                       self.messages())
            with contextlib.suppress(FileNotFoundError,
                                     ConnectionRefusedError, qmp.QMPClosed):
                self.qmp = qmp.QMPClient(str(self._qmp_path))
            time.sleep(0.005)

    def messages(self):
        """What the emulator has printed to stderr."""
        return self.stderr.read_text(errors='replace')

    def stop(self):
        """End the emulator, by force if need be."""
        if self.qmp:
            self.qmp.close()
        elif self.process:
            # As long as it waits for us to connect it takes no SIGTERM.
            self.process.kill()
        if self.process:
            _end(self.process)
            self.process.stdin.close()
            self.process.stdout.close()

    def line(self, timeout):
        """The next whole line of the guest's console.

        :param timeout: in seconds
        :returns: the line without its end, or None if there is none in time
        :raises EOFError: the emulator ended
        """
        deadline = time.monotonic() + timeout
        while b'\n' not in self._console:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                left = deadline - time.monotonic()
                if not selector.select(max(left, 0)):
                    return None
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise EOFError('the emulator ended:\n%s' % self.messages())
            self._console += data
        line, self._console = self._console.split(b'\n', 1)
        self.lines.append(line.decode(errors='replace').rstrip('\r'))
        return self.lines[-1]

    def continue_console(self, source):
        """Go on with the line that the guest was printing elsewhere.

        :param source: the machine that the guest was migrated from
        """
        self._console = source._console + self._console

    def wait_line(self, pattern, timeout=60, waiting=lambda: None):
        """Wait for a line on the guest's console.

        :param pattern: regular expression that is to match at its start
        :param timeout: in seconds
        :param waiting: called every 0.1 s and at each line
        :returns: the match object
        :raises TimeoutError: no such line came
        :raises EOFError: the emulator ended
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            line = self.line(0.1)
            match = line is not None and re.match(pattern, line)
            if match:
                return match
            waiting()
        raise TimeoutError('no line %r on the console within %g s' %
                           (pattern, timeout))

    def wait_ready(self, timeout=60, waiting=lambda: None):
        """Wait until the guest has booted.

        :returns: time since the emulator was started, in seconds
        """
        self.wait_line('VIRTAV-GUEST ready', timeout, waiting)
        return time.monotonic() - self.started

    def send(self, line):
        """Type a line on the guest's console."""
        self.process.stdin.write(line.encode() + b'\n')
        self.process.stdin.flush()

    def begin_case(self, case, timeout=30):
        """Have the guest begin a case."""
        self.send('run %s' % case)
        self.wait_line('VIRTAV-CASE %s begin' % case, timeout)

    def end_case(self, case, timeout=60):
        """Wait for the end of a case.

        :returns: what the guest says of it: ``executed`` (bool, the mark
            that the code itself left), ``status`` and, where it measures
            them, ``seconds`` (float)
        """
        result = self.wait_line(r'VIRTAV-CASE %s executed=([01]) status=(\S+)'
                                r'(?: seconds=([0-9.]+))?' % case, timeout)
        return {'executed': result[1] == '1', 'status': result[2],
                'seconds': float(result[3]) if result[3] else None}

    def run_case(self, case, timeout=60):
        """Run a case in the guest to its end, see :meth:`end_case`."""
        self.begin_case(case)
        return self.end_case(case, timeout)

    def power_off(self, timeout=30):
        """Have the guest switch itself off.

        :param timeout: in seconds
        :raises subprocess.TimeoutExpired: it did not
        """
        self.send('poweroff')
        self.process.wait(timeout)

    def query(self):
        """Ask the monitor for its state."""
        return self.qmp.execute('query-page-fetch-monitor')

    def set(self, **arguments):
        """Change the monitor; underscores stand for hyphens."""
        self.qmp.execute('page-fetch-monitor-set', **{
            name.replace('_', '-'): value
            for name, value in arguments.items()})

    def status(self):
        """QEMU's run state, such as ``running`` or ``paused``."""
        return self.qmp.execute('query-status')['status']
