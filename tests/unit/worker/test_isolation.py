# SPDX-License-Identifier: Apache-2.0
"""A real worker: who it is, who may connect to it, what it tells."""

import contextlib
import json
import os
import pwd
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import unittest
import uuid

from tests.unit import base as unit_base
from tests.unit.engines import clamd
from tests.unit.worker import base
from tests.unit.worker import places
from virtav_nova.monitor import instance
from virtav_nova.monitor import wire
from virtav_nova.worker import privileges

_ROOT = os.geteuid() == 0
#: Asks as another user; prints the code of the refusal.
_ASK = '''
import os, socket, sys
from tests.unit.worker import base
from virtav_nova.monitor import wire
os.setgroups([])
os.setresuid({uid}, {uid}, {uid})
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(20)
    connection.connect({path!r})
    with __import__('contextlib').suppress(BrokenPipeError):
        connection.sendall(base.hello().pack())
    decoder = wire.Decoder([wire.Welcome, wire.Refused])
    room = decoder.room()
    decoder.filled(connection.recv_into(room))
    frame = decoder.frame()
    print(type(frame).__name__, getattr(frame, 'code', ''))
'''


class TestCase(base.TestCase):

    def launch_by(self, wrap, environ=None, **options):
        """Start a worker by another command.

        :param wrap: turns the command into that
        """
        with open(self.top / 'log', 'w') as log:
            self.process = subprocess.Popen(
                wrap([*base.COMMAND, '--config-file',
                      self.configure(**options)]), cwd=unit_base.ROOT,
                stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})})
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        base.wait_for(lambda: 'Listening on' in self.log()
                      or self.process.poll() is not None, 'start')
        self.assertIsNone(self.process.poll(), self.log())

    def ask(self, *arguments):
        """Run virtav-status."""
        return subprocess.run(
            [sys.executable, '-m', 'virtav_nova.cmd.status', '--config-file',
             str(self.top / 'virtav.conf'), *arguments],
            cwd=unit_base.ROOT, text=True, capture_output=True, timeout=60)

    def status(self, *arguments):
        """What virtav-status --json prints."""
        ended = self.ask('--json', *arguments)
        self.assertEqual('', ended.stderr)
        return json.loads(ended.stdout)

    def everybody(self):
        """Process ids of main process, loader and scan processes."""
        loader, = self.loaders()
        return [self.process.pid, loader, *self.scan_processes()]


@unittest.skipUnless(_ROOT, 'only root can become another user')
class DropTest(TestCase):

    def setUp(self):
        super().setUp()
        os.chmod(self.top, 0o755)

    def _launch(self, **options):
        self.run_dir = self.top / 'run'
        self.path = str(self.run_dir / 'worker.sock')
        self.launch_by(
            lambda command: places.opened(command, self.top),
            **{'user': places.USER, 'socket_group': 'tty',
               'status_socket': self.run_dir / 'status.sock'} | options)

    def test_all_processes(self):
        self._launch()
        monitor = self.session()
        self.assert_serves(monitor)
        network = os.stat('/proc/self/ns/net').st_ino
        for number, pid in enumerate(self.everybody()):
            with self.subTest(number):
                state = privileges.state(pid)
                self.assertEqual((places.USER, 0, 0, True), state[:4])
                self.assertEqual(2 if number else 0, state.seccomp)
                self.assertNotEqual(
                    network, os.stat(f'/proc/{pid}/ns/net').st_ino)
                with open(f'/proc/{pid}/status') as lines:
                    fields = dict(line.rstrip('\n').split(':\t', 1)
                                  for line in lines)
                self.assertNotIn('0', fields['Groups'].split())
                # No process of the same user can look into it.
                self.assertEqual(0, os.stat(f'/proc/{pid}/mem').st_uid)
        self.assertEqual(3, len(self.everybody()))

    def test_its_files_are_its_own(self):
        self._launch()
        self.assert_serves(self.session())
        uid = pwd.getpwnam(places.USER).pw_uid
        for path, mode in (
                (self.path, 0o660), (self.run_dir, 0o755),
                (self.run_dir / 'status.sock', 0o660),
                (self.top / 'state', 0o750),
                (self.top / 'state/alerts/journal.jsonl', 0o640)):
            with self.subTest(path):
                status = os.stat(path)
                self.assertEqual((uid, mode), (
                    status.st_uid, stat.S_IMODE(status.st_mode)))
        self.assertEqual(0, self.stop())
        self.assertEqual([], os.listdir(self.run_dir))
        # The next one finds its way.
        self._launch()
        self.assert_serves(self.session())

    def test_status(self):
        self._launch()
        self.assertEqual(
            {'user': places.USER, 'capabilities': False,
             'no_new_privileges': True, 'seccomp': True, 'network': 'none',
             'missing': []}, self.status()['confinement'])

    def test_port_for_metrics(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self._launch(metrics=f'127.0.0.1:{port}')
        with socket.create_connection(('127.0.0.1', port), 20) as client:
            client.sendall(b'GET /metrics HTTP/1.0\r\n\r\n')
            page = b''.join(iter(lambda: client.recv(1 << 16), b''))
        self.assertIn(b'\nvirtav_worker_healthy 1.0\n', page)

    def test_file_of_before(self):
        # Left by a worker that ran as root.
        self.write('state/alerts/journal.jsonl', '')
        with self.assertRaises(AssertionError):
            self._launch()
        self.assertIn('journal.jsonl: Permission denied', self.log())
        self.assertEqual(2, self.process.wait())

    def test_without_namespaces(self):
        # As in a container: no right to make a network of its own.
        def wrap(command):
            return places.opened([
                'setpriv', '--bounding-set', '-sys_admin', *command],
                self.top)

        self.run_dir = self.top / 'run'
        self.path = str(self.run_dir / 'worker.sock')
        self.launch_by(wrap, user=places.USER,
                       status_socket=self.run_dir / 'status.sock')
        self.assert_serves(self.session())
        confinement = self.status()['confinement']
        self.assertEqual(('host', True, False), (
            confinement['network'], confinement['seccomp'],
            confinement['capabilities']))
        missing, = confinement['missing']
        self.assertIn('a network of its own: Operation not permitted',
                      missing)
        self.assertEqual(1, self.log().count('in the network of the host'))

    def test_missing_user(self):
        process = self.launch(user='virtav-none')
        self.assertEqual(2, process.wait(base.PATIENCE))
        self.assertRegex(self.log(), 'error: started as root, and there is '
                         'no user virtav-none to become\n  way out: make')

    def test_program_out_of_reach(self):
        if all(places._closed(place) is None for place in (
                sys.base_prefix, sys.prefix, unit_base.ROOT)):
            self.skipTest('everybody can reach it')
        self.path = str(self.top / 'run' / 'worker.sock')
        process = self.launch(user=places.USER)
        self.assertEqual(2, process.wait(base.PATIENCE))
        self.assertIn(f"user {places.USER} cannot get at the worker's own "
                      'program', self.log())
        self.assertFalse(os.path.exists(self.path))


class ConfinementTest(TestCase):
    """Whoever starts it."""

    def test_every_process(self):
        self.start(status_socket=self.top / 'status.sock')
        self.assert_serves(self.session())
        for number, pid in enumerate(self.everybody()):
            state = privileges.state(pid)
            self.assertEqual((0, 0, True, 2 if number else 0), (
                state.capabilities, state.bounding, state.no_new_privileges,
                state.seccomp))
        for pid in self.scan_processes():
            soft, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
            self.assertEqual(soft, hard)
            self.assertGreater(8 << 30, hard % (1 << 64))

    def test_forbidden_call(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=60000)
        monitor = self.session()
        monitor.send(base.SLOW)
        pid, = self.scan_processes()
        time.sleep(0.3)
        # As seccomp does it.
        os.kill(pid, signal.SIGSYS)
        self.assert_closed(monitor)
        base.wait_for(lambda: 'it made a system call that its sandbox '
                      'forbids' in self.log(), 'the reason')
        base.wait_for(self.scan_processes, 'another process')
        self.assertEqual(wire.Result.UNKNOWN,
                         self.session().ask(base.SLOW).result)

    def test_memory_that_never_gets_executable(self):
        # MemoryDenyWriteExecute= of systemd, as the kernel has it itself.
        code = ('import ctypes, os, sys; '
                'sys.exit(77) if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) '
                'else os.execv(sys.argv[1], sys.argv[1:])')
        if subprocess.run([sys.executable, '-c', code, '/bin/true'
                           ]).returncode:
            self.skipTest('this kernel has no PR_SET_MDWE')
        for engine in ('yara', 'twostage'):
            with self.subTest(engine):
                self.launch_by(
                    lambda command: [sys.executable, '-c', code, *command],
                    engine=engine)
                self.assert_serves(self.session())
                self.assertEqual(0, self.stop())


class TokenTest(TestCase):

    def setUp(self):
        super().setUp()
        self.directory = self.top / 'instances'
        self.directory.mkdir(0o751)

    def _start(self, **options):
        self.start(require_token=True, instances_dir=self.directory,
                   **options)

    def _token(self, known):
        return instance.read(str(self.directory), known).token

    def test_right_and_wrong(self):
        self._start()
        mine, other, unknown = (uuid.uuid4() for _ in range(3))
        for known in (mine, other):
            instance.place(str(self.directory), known, 'demo')
        shown = []
        for whose, token in ((mine, self._token(other)),
                             (mine, wire.NO_TOKEN), (mine, os.urandom(32)),
                             (unknown, self._token(mine))):
            monitor = self.connect()
            refused = monitor.hello(instance=whose, token=token)
            self.assertIsInstance(refused, wire.Refused)
            self.assertEqual(wire.Refusal.TOKEN, refused.code)
            self.assert_closed(monitor)
            shown.append(token)
        monitor = self.session(instance=mine, token=self._token(mine))
        self.assert_serves(monitor)
        monitor.close()
        self.records(1, event='closed')
        # Taken back, it is worth nothing.
        token = self._token(mine)
        instance.remove(str(self.directory), mine)
        self.assertIsInstance(
            self.connect().hello(instance=mine, token=token), wire.Refused)
        self.assertEqual(0, self.stop())
        written = self.log() + (
            self.top / 'state/alerts/journal.jsonl').read_text()
        for secret in {*shown, self._token(other), token} - {wire.NO_TOKEN}:
            for form in (secret.hex(), repr(secret)[2:-1]):
                self.assertNotIn(form, written)
        self.assertIn('it showed another token', written)
        self.assertIn('it showed no token', written)

    def test_project_is_known(self):
        self._start(status_socket=self.top / 'status.sock')
        known = uuid.uuid4()
        instance.place(str(self.directory), known, 'demo')
        self.session(instance=known, token=self._token(known))
        one, = self.status()['instances']
        self.assertEqual((str(known), 'demo', 'socket'), (
            one['instance'], one['project'], one['transport']))

    def test_guessing_is_bounded_in_the_log(self):
        self._start()
        for _turn in range(40):
            self.connect().hello(token=os.urandom(32))
        self.assertLess(self.log().count('refused'), 15)

    @unittest.skipUnless(_ROOT, 'only root can be several users')
    def test_peers(self):
        os.chmod(self.top, 0o755)
        uid = pwd.getpwnam('daemon').pw_uid
        for users, answer in (('libvirt-qemu,virtav-none', 'Refused 6'),
                              ('daemon', 'Welcome'), (uid, 'Welcome')):
            self.start(peer_users=users, socket_mode='0666')
            asked = subprocess.run(
                places.opened([sys.executable, '-c', _ASK.format(
                    uid=uid, path=self.path)], self.top),
                cwd=unit_base.ROOT, text=True, capture_output=True)
            self.assertEqual(answer, asked.stdout.strip(), asked.stderr)
            # The worker's own user always may.
            self.session()
            self.assertEqual(0, self.stop())
            if answer != 'Welcome':
                self.assertRegex(self.log(), f'user {uid} is not one of')


class OperationTest(TestCase):

    def setUp(self):
        super().setUp()
        self.options = {'status_socket': self.top / 'status.sock',
                        'metrics': f'unix:{self.top}/metrics.sock'}

    def test_status(self):
        self.start(**self.options)
        monitor = self.session()
        for _turn in range(3):
            self.assert_serves(monitor)
        report = self.status()
        for name, value in (
                ('health', 'ok'), ('problems', []), ('rules', 1),
                ('epoch', 1), ('sessions', 1), ('processes_wanted', 1),
                ('processes_lost', 0), ('records_lost', 0),
                ('quarantine', []), ('pid', self.process.pid)):
            self.assertEqual(value, report[name], name)
        self.assertEqual(
            (3, 3, 0), tuple(report['counters'][name] for name in (
                'clean', 'match', 'unknown')))
        self.assertGreater(report['rates']['requests'], 0)
        self.assertGreater(report['service_us']['p99'],
                           report['service_us']['p50'] - 1)
        ended = self.ask()
        self.assertEqual(0, ended.returncode)
        self.assertIn('health      ok', ended.stdout)

    def test_degraded(self):
        self.start(**self.options)
        self.write('rules/bad.yar', 'rule Bad { condition: nonsense }')
        ended = self.ask('--reload')
        self.assertEqual(1, ended.returncode, ended.stderr)
        self.assertIn('bad.yar:1', ended.stdout)
        report = self.status()
        self.assertEqual('degraded', report['health'])
        self.assertEqual(1, report['epoch'])
        (self.top / 'rules' / 'bad.yar').unlink()
        self.assertEqual(0, self.ask('--reload').returncode)
        self.assertEqual('ok', self.status()['health'])

    def test_reload(self):
        self.start(**self.options)
        monitor = self.session()
        self.assert_serves(monitor)
        self.write('rules/more.yar', 'rule More { condition: false }')
        report = self.status('--reload')
        self.assertEqual((2, 2), (report['rules'], report['epoch']))
        self.assert_serves(self.session())
        # Nothing that was counted is lost with its rule set.
        monitor.close()
        base.wait_for(lambda: self.status()['reload']['state'] == 'idle',
                      'the end of the old set')
        self.assertEqual(2, self.status()['counters']['clean'])

    def test_gone(self):
        self.start(**self.options)
        self.assertEqual(0, self.stop())
        ended = self.ask()
        self.assertEqual(2, ended.returncode)
        self.assertIn('way out: start the worker', ended.stderr)
        self.assertEqual([], [path for path in self.top.iterdir()
                              if path.suffix == '.sock'])

    def test_metrics(self):
        self.start(**self.options)
        self.assert_serves(self.session())
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(f'{self.top}/metrics.sock')
            client.sendall(b'GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n')
            page = b''.join(iter(lambda: client.recv(1 << 16), b''))
        for line in (b'virtav_worker_verdicts_total{result="match"} 1.0',
                     b'virtav_worker_sessions 1.0'):
            self.assertIn(b'\n' + line + b'\n', page)

    def test_nobody_who_asks_keeps_it_from_work(self):
        self.start(**self.options)
        with contextlib.ExitStack() as stack:
            for number in range(40):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(20)
                client.connect(str(
                    self.top / ('status.sock', 'metrics.sock')[number % 2]))
                with contextlib.suppress(BrokenPipeError):
                    client.sendall(b'{"ask": '[:number % 9])
            begin = time.monotonic()
            self.assert_serves(self.session())
            self.assertLess(time.monotonic() - begin, 3)
            self.assertEqual('ok', self.status()['health'])

    def test_service_manager(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(self.top / 'notify'))
            manager.settimeout(base.PATIENCE)
            self.launch_by(
                lambda command: ['sh', '-c', 'export WATCHDOG_PID=$$; '
                                 'exec "$@"', 'sh', *map(str, command)],
                {'NOTIFY_SOCKET': str(self.top / 'notify'),
                 'WATCHDOG_USEC': '400000'}, **self.options)

            def heard(name):
                while True:
                    lines = manager.recv(4096).decode().split('\n')
                    if lines[0].startswith(name):
                        return lines

            self.assertEqual(['READY=1', 'STATUS=Serving'], heard('READY'))
            for _turn in range(3):
                heard('WATCHDOG=1')
            self.write('rules/more.yar', 'rule More { condition: false }')
            self.process.send_signal(signal.SIGHUP)
            heard('RELOADING=1')
            heard('READY=1')
            self.stop()
            heard('STOPPING=1')
            # No other process spoke for it.
            with open(self.top / 'log') as log:
                self.assertNotIn('Traceback', log.read())


class UnconfinedTest(TestCase):

    def test_without_seccomp(self):
        # As where the library is missing.
        self.write('without/pyseccomp.py',
                   'raise RuntimeError("Unable to find libseccomp")')
        self.launch_by(
            lambda command: command,
            {'PYTHONPATH': os.pathsep.join(filter(None, (
                f'{self.top}/without', os.environ.get('PYTHONPATH'))))},
            status_socket=self.top / 'status.sock')
        self.assert_serves(self.session())
        self.assertEqual(1, self.log().count(
            'not shut in by seccomp: Unable to find libseccomp'))
        report = self.status()
        self.assertEqual('degraded', report['health'])
        self.assertFalse(report['confinement']['seccomp'])
        self.assertIn('seccomp: Unable to find libseccomp',
                      report['confinement']['missing'])
        self.assertEqual(1, self.ask().returncode)


class QueueTest(TestCase):

    def test_those_who_wait(self):
        self.start(base.SLOW_RULE, scan_timeout_ms=60000,
                   status_socket=self.top / 'status.sock')
        monitors = [self.session() for _ in range(4)]
        for monitor in monitors:
            # The scan process knows of it.
            self.assert_serves(monitor)
        pid, = self.scan_processes()
        with base.stopped(pid):
            for monitor in monitors:
                monitor.send(base.SLOW)
        base.wait_for(lambda: self.status()['queue'] == 3, 'the queue')
        one, = self.status()['processes']
        self.assertEqual((3, 4), (one['queue'], one['sessions']))
        self.assertGreater(one['scanning_ms'], 0)


class LocalSocketTest(TestCase):

    def test_engine_that_asks_another_process(self):
        peer = clamd.Clamd(self.top / 'clamd.sock', unit_base.SIGNATURE)
        self.addCleanup(peer.close)
        self.start(engine='clamav', clamd_socket=self.top / 'clamd.sock')
        monitor = self.session()
        for _turn in range(2):
            self.assert_serves(monitor)
            # It connects anew from within the sandbox.
            peer.hang_up()
            monitor.close()
            monitor = self.session()
        pid, = self.scan_processes()
        self.assertEqual(2, privileges.state(pid).seccomp)
        self.assertGreater(peer.connections, 1)
        self.assertNotIn('died', self.log())
