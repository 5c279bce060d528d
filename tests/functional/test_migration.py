# SPDX-License-Identifier: Apache-2.0
"""Migration and snapshots: what was scanned here need not be there."""

import contextlib
import random
import subprocess
import threading
import time

from tests.functional import base
from virtav_nova.monitor import qmp

HOPS = 200 if base.NIGHTLY else 50
FLIPS = 1000 if base.NIGHTLY else 100
#: Makes the setup of a migration take as long as a test needs.
SLOW = {'max-bandwidth': 1 << 20}
FAST = {'max-bandwidth': 1 << 33, 'downtime-limit': 300}


class TestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self._paths = 0

    def path(self, suffix):
        """A new path in the test's directory."""
        self._paths += 1
        return self.home / ('%d.%s' % (self._paths, suffix))

    def receiver(self, worker=None, monitor=None, extra=(), **arguments):
        """Start an emulator that waits for ``migrate-incoming``."""
        return self.machine(worker, monitor, **arguments,
                            extra=['-incoming', 'defer', *extra])

    def failing_receiver(self, worker=None, monitor=None, extra=(),
                         **arguments):
        """The same, and that it complains and ends is no failure."""
        return self.enterContext(self.prepare(
            worker, monitor, **arguments,
            extra=['-incoming', 'defer', *extra]))

    def configure(self, machine, capabilities, parameters):
        if capabilities:
            machine.qmp.execute('migrate-set-capabilities', capabilities=[
                {'capability': name, 'state': True}
                for name in capabilities])
        machine.qmp.execute('migrate-set-parameters', **parameters)

    def begin(self, source, target=None, capabilities=(), parameters=FAST,
              uri=None):
        """Begin a migration.

        :param target: None: there is none; the URI is that of a file
        :param parameters: of the source
        """
        uri = uri or 'unix:%s' % self.path('sock')
        self.configure(source, capabilities, parameters)
        if target:
            self.configure(target, capabilities, {})
            target.qmp.execute('migrate-incoming', uri=uri)
        source.qmp.execute('migrate', uri=uri)

    def migration(self, machine):
        """Status of the migration, as a string."""
        return machine.qmp.execute('query-migrate').get('status')

    def wait_migration(self, machine, status, timeout=60):
        def reached():
            seen = self.migration(machine)
            if seen != status:
                self.assertNotIn(seen, ('completed', 'failed', 'cancelled'))
            return seen == status
        self.eventually('migration ' + status, reached, timeout)

    def migrate(self, source, target, capabilities=(), watched=True,
                **arguments):
        """Migrate, and wait until the guest runs at the target.

        :param watched: whether the source has a monitor; no verdict is under
            way then when its states are sent
        """
        self.begin(source, target, ['pause-before-switchover', *capabilities],
                   **arguments)
        self.switch_over(source, watched)
        self.wait_migration(source, 'completed')
        self.eventually('the end of the load', lambda: target.status() not in
                        ('inmigrate', 'restore-vm'))

    def switch_over(self, source, watched=True):
        """Let a migration go on to its end that has stopped the guest."""
        self.wait_migration(source, 'pre-switchover')
        if watched:
            # A verdict that comes later than the states are sent would make
            # the page SCANNED at the source alone.
            self.eventually('the verdicts', lambda: source.query()[
                'states']['held'] == 0)
        source.qmp.execute('migrate-continue', state='pre-switchover')

    def stop(self, machine):
        """Stop a guest and wait until no verdict is under way."""
        machine.qmp.execute('stop')
        self.eventually('the verdicts', lambda: machine.query()[
            'states']['held'] == 0)

    def save(self, machine, **arguments):
        """Stop a guest and save it to a file.

        :returns: path of the file
        """
        path = self.path('state')
        self.stop(machine)
        self.begin(machine, uri='file:%s' % path, **arguments)
        self.wait_migration(machine, 'completed')
        return path

    def restore(self, machine, path, capabilities=()):
        """Load what :meth:`save` has saved and let it run."""
        self.configure(machine, capabilities, {})
        machine.qmp.execute('migrate-incoming', uri='file:%s' % path)
        self.eventually('the end of the load', lambda: machine.status() !=
                        'inmigrate', 60)
        self.assertEqual('paused', machine.status())

    def make_disk(self):
        """Make an image that snapshots can be saved in.

        By an emulator, as ``qemu-img`` need not be there.

        :returns: arguments of the emulator
        """
        disk, path = self.path('qcow2'), self.path('sock')
        process = subprocess.Popen([
            self.emulator, '-machine', 'none', '-nodefaults', '-display',
            'none', '-qmp', 'unix:%s,server=on,wait=off' % path])
        self.addCleanup(process.wait)

        def connect():
            with contextlib.suppress(OSError):
                return qmp.QMPClient(str(path))

        with self.eventually('QMP', connect) as client:
            def create(**options):
                client.execute('blockdev-create', options=options,
                               **{'job-id': 'job'})
                self.eventually('the job', lambda: [
                    job for job in client.execute('query-jobs')
                    if job['status'] == 'concluded'])
                client.execute('job-dismiss', id='job')
            create(driver='file', filename=str(disk), size=0)
            client.execute('blockdev-add', driver='file', filename=str(disk),
                           **{'node-name': 'file'})
            create(driver='qcow2', file='file', size=64 << 20)
            client.execute('quit')
        return ['-blockdev', 'driver=qcow2,node-name=snapshots,'
                'file.driver=file,file.filename=%s' % disk]

    def command(self, machine, line):
        """Run a command of the human monitor, which says nothing if well."""
        self.assertEqual('', machine.qmp.execute(
            'human-monitor-command', **{'command-line': line}))

    def scanned(self, machine):
        return machine.query()['states']['scanned']

    def assert_carried(self, source, target):
        """All that was scanned at the source counts at the target.

        :param source: a machine that has stopped, or its number of pages
        """
        count = source if isinstance(source, int) else self.scanned(source)
        state = target.query()
        self.assertEqual((count, 0, None), (
            state['carried-scanned'], state['carried-dropped'],
            state.get('carried-reason')))
        self.assertGreater(count, 0)
        return state

    def assert_dropped(self, source, target, reason):
        """Nothing of it does, and the reason is told."""
        count = source if isinstance(source, int) else self.scanned(source)
        state = target.query()
        self.assertEqual((0, count, 0, reason), (
            state['carried-scanned'], state['carried-dropped'],
            state['carried-pending'], state.get('carried-reason')))
        return state

    def assert_alive(self, machine, worker=None):
        """The guest works, and what must not run does not run."""
        self.assert_ran(machine, 'clean')
        if worker:
            self.assert_blocked(machine, worker, 'user-write')

    def assert_goes_on(self, machine):
        """After a migration that failed: watched as before."""
        before = machine.query()
        self.assertEqual('running', machine.status())
        self.assertGreater(before['states']['scanned'], 1000)
        self.assert_ran(machine, 'clean')
        self.assertGreater(machine.query()['fetches'], before['fetches'])


class LiveTest(TestCase):
    """Between two running emulators."""

    MONITOR = {'on-match': 'block', 'on-timeout': 'deny',
               'deadline-ms': 10000}

    def check(self, **arguments):
        worker = self.worker()
        source = self.booted(worker, self.MONITOR)
        target = self.receiver(worker, self.MONITOR)
        self.migrate(source, target, **arguments)
        state = self.assert_carried(source, target)
        # What it was about to run was scanned: it needs few pages more.
        self.assertLess(state['fetches'], source.query()['fetches'] / 10)
        self.assert_alive(target, worker)
        self.assertEqual(0, target.query()['timeouts'])
        return source, target

    def test_precopy(self):
        self.check()

    def test_return_path(self):
        self.check(capabilities=['return-path'])

    def test_multifd(self):
        self.check(capabilities=['multifd'])

    def test_auto_converge(self):
        self.check(capabilities=['auto-converge', 'xbzrle'])

    def test_smp(self):
        worker = self.worker()
        source = self.booted(worker, self.MONITOR, smp=2)
        target = self.receiver(worker, self.MONITOR, smp=2)
        source.begin_case('exec500')
        self.migrate(source, target)
        self.assert_carried(source, target)
        self.assertTrue(target.end_case('exec500')['executed'])
        self.assert_alive(target, worker)

    def follow(self, source, target):
        """Take over what the console has had of a line.

        :returns: the lines that the source has printed to its end
        """
        lines = []
        while (line := source.line(0.05)) is not None:
            lines.append(line)
        target.continue_console(source)
        return lines

    def test_hops(self):
        """Many in a row, of a guest that keeps running new code."""
        worker = self.worker()
        small = ['-m', '160']
        machine = self.booted(worker, self.MONITOR, extra=small)
        running, rounds, fetches = False, 0, 0
        for hop in range(HOPS):
            target = self.receiver(worker, self.MONITOR, extra=small)
            if not running:
                machine.begin_case('smc')
                running = True
            self.migrate(machine, target)
            state = self.assert_carried(machine, target)
            fetches += machine.query()['fetches']
            for line in self.follow(machine, target):
                self.assertEqual('VIRTAV-CASE smc executed=1 status=exit:0',
                                 line.partition(' seconds')[0], hop)
                running = False
                rounds += 1
            machine.stop()
            machine = target
        if running:
            result = machine.end_case('smc')
            self.assertEqual((True, 'exit:0'),
                             (result['executed'], result['status']))
            rounds += 1
        fetches += machine.query()['fetches']
        # Each rewrite of each round was a fetch, wherever it was run.
        self.assertGreaterEqual(fetches, 2000 * rounds)
        self.assertGreater(rounds, 0)
        self.assertGreater(state['carried-scanned'], 1000)
        self.assertEqual(0, machine.query()['timeouts'])
        self.assert_alive(machine, worker)

    def test_postcopy(self):
        # Open to root, or by this; QEMU says what it lacks.
        worker = self.worker()
        source = self.booted(worker, self.MONITOR)
        target = self.receiver(worker, self.MONITOR)
        source.begin_case('exec500')
        self.begin(source, target, capabilities=[
            'postcopy-ram', 'pause-before-switchover'], parameters=SLOW)
        self.wait_migration(source, 'active')
        source.qmp.execute('migrate-start-postcopy')
        self.switch_over(source)
        self.wait_migration(source, 'postcopy-active')
        self.configure(source, (), {'max-postcopy-bandwidth': 0})
        self.wait_migration(source, 'completed')
        self.assert_carried(source, target)
        self.assertTrue(target.end_case('exec500')['executed'])
        self.assert_alive(target, worker)

    def test_match_stays_blocked(self):
        """A page that may not run here may not there."""
        worker = self.worker()
        source = self.booted(worker, {**self.MONITOR, 'on-match': 'pause'})
        target = self.receiver(worker, {**self.MONITOR, 'on-match': 'pause'})
        source.begin_case('user-write')
        self.match(source, worker, action='pause')
        self.wait_status(source, 'paused')
        self.migrate(source, target, watched=False)
        self.assert_carried(source, target)
        self.assertEqual('paused', target.status())
        target.qmp.execute('cont')
        match = self.match(target, worker, action='pause')
        self.wait_status(target, 'paused')
        self.release(target, match, 'fault')
        self.assert_result(target, 'user-write', False, 'signal:11')

    def test_other_policy(self):
        """Source reports, target enforces: verdicts count all the same."""
        worker = self.worker()
        source = self.booted(worker, {'policy': 'report'})
        target = self.receiver(worker, self.MONITOR)
        self.eventually('all to be scanned', lambda: source.query()[
            'states']['unscanned'] == 0)
        self.migrate(source, target)
        self.assert_carried(source, target)
        self.assert_alive(target, worker)

    def test_held_without_a_verdict(self):
        """Paused for want of a verdict; the target asks again."""
        silent = threading.Event()

        def script(session):
            session.greet()
            while True:
                request = session.receive()
                if not silent.is_set():
                    session.answer(request)

        source = self.booted(self.fake_worker(script),
                             {**self.MONITOR, 'deadline-ms': 1500})
        silent.set()
        source.send('run clean')
        source.qmp.wait_event('STOP', 20)
        target = self.receiver(self.worker(), self.MONITOR)
        self.migrate(source, target, watched=False)
        self.assertEqual((1, 'paused'), (
            source.query()['states']['held'], target.status()))
        self.assertEqual(0, target.query()['fetches'])
        target.qmp.execute('cont')
        target.wait_line('VIRTAV-CASE clean executed=1')


class RulesTest(TestCase):
    """What decides whether the source's verdicts count."""

    def digest(self, byte):
        def script(session):
            session.receive()
            session.send(session.welcome(digest=bytes([byte]) * 32).pack())
            while True:
                session.answer(session.receive())
        return script

    def check(self, reason, source_digest=1, target_digest=1, source=None,
              target=None, script=None):
        """Migrate to a target that takes over nothing.

        :param source: properties of the monitor there
        :param script: of the target's worker, in place of a digest
        """
        worker = self.fake_worker(self.digest(source_digest))
        machine = self.booted(worker, source)
        worker.script = script or self.digest(target_digest)
        there = self.receiver(worker, target)
        self.migrate(machine, there)
        self.assert_dropped(machine, there, reason)
        return machine, there

    def test_other_digest(self):
        _, target = self.check('digest', target_digest=2)
        self.assert_alive(target)
        self.assertGreater(target.query()['fetches'], 50)

    def test_ignored(self):
        _, target = self.check('ignored', target={'carried-state': 'ignore'})
        self.assert_alive(target)

    def test_no_tags(self):
        _, target = self.check('no-tags', target={'carried-state': 'verify'})
        self.assert_alive(target)

    def test_no_digest(self):
        """The target's worker is silent; the load does not wait for it."""
        def silent(session):
            session.receive()
            session.receive()
        begin = time.monotonic()
        _, target = self.check('no-digest', script=silent,
                               target={'deadline-ms': 200})
        self.assertLess(time.monotonic() - begin, 60)
        self.assertFalse(target.query()['connected'])

    def test_late_digest(self):
        """It is waited for a moment."""
        def late(session):
            hello = session.receive()
            time.sleep(0.5)
            session.hello = hello
            session.send(session.welcome(digest=bytes([1]) * 32).pack())
            while True:
                session.answer(session.receive())
        worker = self.fake_worker(self.digest(1))
        machine = self.booted(worker)
        path = self.save(machine)
        worker.script = late
        there = self.receiver(worker)
        self.restore(there, path)
        self.assert_carried(machine, there)

    def test_absent(self):
        """From a guest that was not watched, to one that is."""
        worker = self.worker()
        source = self.booted()
        target = self.receiver(worker, {'on-match': 'block'})
        self.migrate(source, target, watched=False)
        state = target.query()
        self.assertEqual((0, 0, 'absent'), (
            state['carried-scanned'], state['carried-dropped'],
            state['carried-reason']))
        self.assert_alive(target, worker)

    def test_optional(self):
        """To a target without a monitor."""
        worker = self.worker()
        source = self.booted(worker, {'optional': 'on'})
        target = self.receiver()
        self.migrate(source, target)
        self.assert_alive(target)

    def test_optional_to_watched(self):
        worker = self.worker()
        source = self.booted(worker, {'optional': 'on'})
        target = self.receiver(worker, {'optional': 'on'})
        self.migrate(source, target)
        self.assertEqual('absent', target.query()['carried-reason'])
        self.assert_alive(target)

    def test_outside_writer(self):
        """What a source reports that did not see all writes counts not."""
        worker = self.fake_worker()
        shared = ['-object', 'memory-backend-memfd,id=ram,size=512M,share=on',
                  '-machine', 'memory-backend=ram']
        source = self.booted(worker, {'policy': 'report'}, extra=shared)
        target = self.receiver(worker, extra=[
            '-object', 'memory-backend-memfd,id=ram,size=512M,share=off',
            '-machine', 'memory-backend=ram'])
        self.eventually('verdicts', lambda: source.query()[
            'states']['unscanned'] == 0)
        self.migrate(source, target)
        self.assert_dropped(source, target, 'outside-writer')

    def test_verify(self):
        """Each page is what it was: none is asked for."""
        worker = self.worker()
        monitor = {'carried-state': 'verify', 'on-match': 'block'}
        source = self.booted(worker, monitor)
        path = self.save(source)
        target = self.receiver(worker, monitor)
        self.restore(target, path)
        count = self.scanned(source)
        state = target.query()
        self.assertEqual((0, 0, count, 0), (
            state['carried-scanned'], state['carried-dropped'],
            state['carried-pending'], state['states']['scanned']))
        target.qmp.execute('cont')
        self.assert_alive(target, worker)
        state = target.query()
        self.assertGreater(state['carried-scanned'], 50)
        self.assertEqual(count, sum(state['carried-' + name] for name in (
            'scanned', 'pending', 'dropped')))
        # Each fetch was known from here, from the source, or asked for.
        self.assertEqual(state['fetches'], state['table-hits'] +
                         state['requests'] + state['carried-scanned'])
        # And on: what was verified is carried as what was scanned.
        again = self.receiver(worker, monitor)
        self.migrate(target, again)
        self.assertEqual(self.scanned(target), sum(
            again.query()['carried-' + name]
            for name in ('scanned', 'pending', 'dropped')))
        self.assert_alive(again, worker)


class AbortTest(TestCase):
    """What fails at any phase leaves the source watching."""

    def setUp(self):
        super().setUp()
        self.scanner = self.worker()
        self.source = self.booted(self.scanner, {'on-match': 'block'})

    def _check_end(self, machine):
        # It complains of the connection, each time in other words.
        self.assertEqual(0, machine.process.returncode, machine.messages())

    def check_cancel(self, status, capabilities=(), parameters=FAST):
        target = self.failing_receiver(self.scanner)
        self.begin(self.source, target, capabilities, parameters)
        self.wait_migration(self.source, status)
        self.source.qmp.execute('migrate_cancel')
        self.wait_migration(self.source, 'cancelled')
        self.eventually('the guest to go on',
                        lambda: self.source.status() == 'running')
        self.assert_goes_on(self.source)
        # And it can be migrated later, with all that was scanned.
        self.configure(self.source, (), FAST)
        self.source.qmp.execute('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': False} for name in capabilities])
        target = self.receiver(self.scanner, {'on-match': 'block'})
        self.migrate(self.source, target)
        self.assert_carried(self.source, target)
        self.assert_alive(target, self.scanner)

    def test_cancel_active(self):
        self.check_cancel('active', parameters=SLOW)

    def test_cancel_before_switchover(self):
        self.check_cancel('pre-switchover',
                          capabilities=['pause-before-switchover'])

    def test_cancel_setup(self):
        """There is nobody who takes the stream."""
        target = self.failing_receiver(self.scanner)
        self.begin(self.source, target, parameters={'max-bandwidth': 1})
        self.source.qmp.execute('migrate_cancel')
        self.wait_migration(self.source, 'cancelled')
        self.assert_goes_on(self.source)

    def test_target_killed(self):
        target = self.failing_receiver(self.scanner)
        self.begin(self.source, target, parameters=SLOW)
        self.wait_migration(self.source, 'active')
        target.process.kill()
        self.wait_migration(self.source, 'failed')
        self.assert_goes_on(self.source)

    def test_target_killed_at_the_end(self):
        target = self.failing_receiver(self.scanner)
        self.begin(self.source, target,
                   capabilities=['pause-before-switchover', 'return-path'])
        self.wait_migration(self.source, 'pre-switchover')
        target.process.kill()
        target.process.wait()
        self.source.qmp.execute('migrate-continue', state='pre-switchover')
        self.wait_migration(self.source, 'failed')
        self.eventually('the guest to go on',
                        lambda: self.source.status() == 'running')
        self.assert_goes_on(self.source)

    def test_target_without_a_monitor(self):
        """Told before the guest stops."""
        target = self.failing_receiver()
        self.begin(self.source, target, capabilities=['return-path'],
                   parameters=SLOW)
        self.wait_migration(self.source, 'failed')
        target.process.wait(10)
        self.assertIn("'page-fetch-monitor' 0", target.messages())
        self.assertEqual([], self.events(self.source, 'STOP'))
        self.assert_goes_on(self.source)

    def test_colo(self):
        """The peer's RAM would be loaded again and again."""
        try:
            self.configure(self.source, ['x-colo'], {})
        except qmp.QMPError as error:
            self.assertIn('COLO', str(error))
            return
        error = self.assertRaises(qmp.QMPError, self.begin, self.source,
                                  uri='unix:%s' % self.path('sock'))
        self.assertEqual('page-fetch-monitor does not support COLO',
                         str(error))
        self.assert_goes_on(self.source)


class SavedFileTest(TestCase):
    """Saved to a file, and restored from it."""

    def check(self, **arguments):
        worker = self.worker()
        source = self.booted(worker, {'on-match': 'block'})
        path = self.save(source, **arguments)
        target = self.receiver(worker, {'on-match': 'block'})
        self.restore(target, path, arguments.get('capabilities', ()))
        self.assert_carried(source, target)
        target.qmp.execute('cont')
        self.assert_alive(target, worker)
        self.assertLess(target.query()['fetches'], 500)

    def test_file(self):
        self.check()

    def test_mapped_ram(self):
        self.check(capabilities=['mapped-ram'])

    def test_mapped_ram_multifd(self):
        self.check(capabilities=['mapped-ram', 'multifd'])

    def test_running(self):
        """The guest runs while its RAM is saved (libvirt: --live)."""
        worker = self.worker()
        source = self.booted(worker)
        path = self.path('state')
        self.begin(source, uri='file:%s' % path, capabilities=[
            'mapped-ram', 'pause-before-switchover'])
        self.switch_over(source)
        self.wait_migration(source, 'completed')
        target = self.receiver(worker)
        self.configure(target, ['mapped-ram'], {})
        target.qmp.execute('migrate-incoming', uri='file:%s' % path)
        self.wait_status(target, 'running', 60)
        self.assert_carried(source, target)
        self.assert_alive(target)

    def test_background_snapshot(self):
        """It is of the moment when it began."""
        worker = self.worker()
        source = self.booted(worker, {'on-match': 'block'})
        path = self.path('state')
        self.begin(source, uri='file:%s' % path,
                   capabilities=['background-snapshot'])
        self.wait_migration(source, 'completed')
        self.assert_alive(source)
        target = self.receiver(worker, {'on-match': 'block'})
        target.qmp.execute('migrate-incoming', uri='file:%s' % path)
        self.wait_status(target, 'running', 60)
        state = target.query()
        self.assertGreater(state['carried-scanned'], 1000)
        self.assertEqual(0, state['carried-dropped'])
        self.assert_alive(target, worker)


class SnapshotTest(TestCase):
    """savevm and loadvm, in one emulator and in two."""

    def setUp(self):
        super().setUp()
        self.drive = [*self.make_disk(),
                      '-device', 'virtio-blk-pci,drive=snapshots']

    def test_loadvm(self):
        worker = self.worker()
        machine = self.booted(worker, {'on-match': 'block'},
                              extra=self.drive)
        self.stop(machine)
        count = self.scanned(machine)
        self.command(machine, 'savevm one')
        machine.qmp.execute('cont')
        self.assert_alive(machine, worker)
        # Into a guest that runs:
        self.command(machine, 'loadvm one')
        self.assert_carried(count, machine)
        self.assertEqual('running', machine.status())
        self.assert_alive(machine, worker)
        # And into a stopped one:
        machine.qmp.execute('stop')
        self.command(machine, 'loadvm one')
        state = self.assert_carried(count, machine)
        self.assertEqual(count, state['states']['scanned'])
        machine.qmp.execute('cont')
        self.assert_alive(machine, worker)

    def test_other_process(self):
        worker = self.worker()
        machine = self.booted(worker, extra=self.drive)
        self.stop(machine)
        self.command(machine, 'savevm one')
        count = self.scanned(machine)
        machine.qmp.execute('quit')
        machine.process.wait(10)
        again = self.machine(worker, {'on-match': 'block'},
                             extra=[*self.drive, '-loadvm', 'one'])
        self.assert_carried(count, again)
        if again.status() == 'paused':
            again.qmp.execute('cont')
        self.assert_alive(again, worker)

    def test_old_rules(self):
        """A snapshot of the time when the rules were others."""
        def script(byte):
            def serve(session):
                session.receive()
                session.send(session.welcome(
                    digest=bytes([byte]) * 32).pack())
                while True:
                    session.answer(session.receive())
            return serve
        worker = self.fake_worker(script(1))
        machine = self.booted(worker, extra=self.drive)
        self.stop(machine)
        self.command(machine, 'savevm one')
        count = self.scanned(machine)
        worker.script = script(2)
        worker.disconnect()
        self.eventually('the new rules', lambda: machine.query().get(
            'digest') == '02' * 32)
        self.command(machine, 'loadvm one')
        state = self.assert_dropped(count, machine, 'digest')
        self.assertEqual(0, state['states']['scanned'])
        machine.qmp.execute('cont')
        self.assert_alive(machine)


class FirmwareTestCase(TestCase):
    """The guest is a firmware image of 64 KiB."""

    #: Offset in the image -> code; the one at 0 runs first.
    CODE = {}
    # At f000:fff0: ljmp f000:0000
    RESET = bytes([0xea, 0x00, 0x00, 0x00, 0xf0])

    def setUp(self):
        super().setUp()
        image = bytearray(1 << 16)
        for offset, code in {**self.CODE, 0xfff0: self.RESET}.items():
            image[offset:offset + len(code)] = code
        self.bios = self.home / 'bios.bin'
        self.bios.write_bytes(image)
        self.requests = []
        self.scanner = self.fake_worker(self.script)

    def script(self, session):
        session.greet()
        while True:
            request = session.receive()
            self.requests.append(request)
            session.answer(request)

    def firmware(self, monitor=None, extra=()):
        """A machine that runs the image and nothing else."""
        machine = self.prepare(self.scanner, monitor)
        keep = machine.arguments
        machine.arguments = [
            keep[0], '-nodefaults', '-no-user-config', '-machine',
            'pc,vmport=off', '-m', '4', '-accel', 'tcg', '-display', 'none',
            '-serial', 'stdio', '-bios', str(self.bios),
            '-qmp', keep[keep.index('-qmp') + 1],
            '-object', keep[keep.index('-object') + 1], *extra]
        return machine


class StreamTest(FirmwareTestCase):
    """A saved state that somebody or something has changed."""

    # mov dx,0x3f8; mov al,'T'; out dx,al; jmp .
    BEGIN = bytes.fromhex('ba f8 03 b0 54 ee eb fe')
    #: In the same page, and in no other of a saved state.
    PADDING = b'virtav-padding!!'
    CODE = {0: BEGIN, 256: PADDING}

    def saved(self, monitor=None):
        """The saved state of that machine, as mutable bytes."""
        with self.firmware(monitor) as machine:
            self.eventually('two pages', lambda: self.scanned(machine) == 2)
            return bytearray(self.save(machine).read_bytes())

    def load(self, state, monitor=None):
        """Load it.

        :returns: what the monitor tells, or the messages of an emulator
            that has refused it
        """
        path = self.path('state')
        path.write_bytes(state)
        with self.firmware(monitor, ['-incoming', 'defer']) as machine:
            with contextlib.suppress(qmp.QMPClosed):
                machine.qmp.execute('migrate-incoming', uri='file:%s' % path)
                while machine.status() == 'inmigrate':
                    time.sleep(0.005)
                result = machine.query()
                machine.qmp.execute('quit')
            messages = machine.messages
            status = machine.process.wait(10)
        path.unlink()
        if status == 0:
            return result
        # Refused cleanly: an exit of its own, and the cause.
        self.assertEqual(1, status, messages())
        return messages()

    def assert_refused(self, state, reason):
        self.assertIn('page-fetch-monitor: ' + reason, self.load(state))

    def blob(self, state):
        """Where the page states are: begin and end."""
        begin = state.index(b'VAPS')
        size = int.from_bytes(state[begin - 8:begin], 'big')
        return begin, begin + size

    def test_unchanged(self):
        state = self.load(self.saved())
        self.assertEqual((2, 0), (state['carried-scanned'],
                                  state['carried-dropped']))

    def test_refused(self):
        state = self.saved()
        begin, end = self.blob(state)
        setup = state.index(b'VAPM')

        def changed(offset, data):
            copy = bytearray(state)
            copy[offset:offset + len(data)] = data
            return copy

        for offset, data, reason in (
                (setup, b'X', 'setup: not what this is'),
                (setup + 7, b'\2', 'setup: unknown version'),
                (setup + 22, b'\x20', 'setup: pages are of another size'),
                (setup + 63, b'\1', 'setup: unknown flags'),
                (begin, b'X', 'page states: not what this is'),
                (begin + 7, b'\2', 'page states: unknown version'),
                (begin + 15, bytes([state[begin + 15] ^ 64]),
                 'page states: '),
                (begin - 8, b'\xff', 'page states: longer than'),
                (begin - 4, (end - begin - 4).to_bytes(4, 'big'),
                 'page states: truncated'),
                (begin + 105, b'\1', 'page states of RAM block'),
                (end - 1, b'X', 'page states: the end')):
            with self.subTest(reason):
                self.assert_refused(changed(offset, data), reason)

    def test_truncated(self):
        state = self.saved()
        begin, end = self.blob(state)
        for size in (begin - 9, begin, begin + 50, end - 1):
            self.assertIsInstance(self.load(state[:size]), str)

    def test_without_setup(self):
        """States out of nowhere."""
        state = self.saved()
        setup = state.index(b'VAPM')
        name = b'page-fetch-monitor'
        begin = state.rindex(bytes([len(name)]) + name, 0, setup) - 5
        # A section has a footer of 5 bytes.
        del state[begin:setup + 64 + 5]
        self.assert_refused(state, 'page states: out of place')

    def test_flips(self):
        """Refused, or what is taken is what there is."""
        state = self.saved()
        begin, end = self.blob(state)
        setup = state.index(b'VAPM')
        places = [*range(begin - 8, end), *range(setup, setup + 64)]
        generator = random.Random(1)
        taken = 0
        for _ in range(FLIPS):
            place, bit = generator.choice(places), generator.randrange(8)
            state[place] ^= 1 << bit
            result = self.load(state)
            state[place] ^= 1 << bit
            if isinstance(result, str):
                self.assertIn('page-fetch-monitor', result)
            else:
                taken += 1
                self.assertLessEqual(result['states']['scanned'], 2)
                self.assertEqual(result['states']['scanned'],
                                 result['carried-scanned'])
        # Counters and digest: flips there are no error.
        self.assertGreater(taken, 0)
        self.assertLess(taken, FLIPS)

    def check_verify(self, change):
        """Restore a state under ``verify`` and let it run.

        :param change: whether a page in it is changed
        :returns: what the monitor tells, pages that were asked for
        """
        monitor = {'carried-state': 'verify'}
        state = self.saved(monitor)
        if change:
            offset = state.index(self.PADDING)
            state[offset:offset + 6] = b'VIRTAV'
            self.assertEqual(-1, state.find(self.PADDING))
        path = self.path('state')
        path.write_bytes(state)
        self.requests.clear()
        machine = self.enterContext(self.firmware(
            monitor, ['-incoming', 'defer']))
        self.restore(machine, path)
        self.assertEqual(2, machine.query()['carried-pending'])
        self.assertEqual([], self.requests)
        machine.qmp.execute('cont')
        self.eventually('the page', lambda: machine.query()[
            'carried-pending'] == 1)
        self.eventually('the verdict', lambda: self.scanned(machine) == 1)
        return machine.query(), self.requests

    def test_verify(self):
        state, requests = self.check_verify(False)
        self.assertEqual((1, 0, 0), (state['carried-scanned'],
                                     state['carried-dropped'],
                                     len(requests)))

    def test_verify_changed(self):
        state, requests = self.check_verify(True)
        self.assertEqual((0, 1, 'changed'), (
            state['carried-scanned'], state['carried-dropped'],
            state['carried-reason']))
        self.assertEqual([self.BEGIN], [
            request.page[:len(self.BEGIN)] for request in requests])
        self.assertIn(b'VIRTAV', requests[0].page)


class ProtectionTest(FirmwareTestCase):
    """A page that was carried as SCANNED is watched as any other."""

    CODE = {
        # xor ax,ax; mov es,ax; mov ax,cs; mov ds,ax; mov si,0x100;
        # mov di,0x2000; mov cx,0x40; cld; rep movsb; jmp 0:0x2000
        0: bytes.fromhex('31 c0 8e c0 8c c8 8e d8 be 00 01 bf 00 20 b9 40 00'
                         'fc f3 a4 ea 00 20 00 00'),
        # jmp 0xf000:0x200
        0x100: bytes.fromhex('ea 00 02 00 f0'),
        # Wait for a byte on the serial port; incb es:0x2fff; jmp 0:0x2000
        0x200: bytes.fromhex('ba fd 03 ec a8 01 74 fb ba f8 03 ec'
                             '26 fe 06 ff 2f ea 00 20 00 00'),
    }

    def rewrite(self, machine, value):
        """Have the guest store into a page and then run it.

        :param value: of the byte then
        """
        machine.process.stdin.write(b'x')
        machine.process.stdin.flush()
        self.eventually('the page of value %d' % value, lambda: [
            request for request in self.requests
            if request.offset == 0x2000 and request.page[-1] == value])

    def check(self, restore, extra=()):
        machine = self.enterContext(self.firmware(extra=extra))
        self.eventually('three pages', lambda: self.scanned(machine) == 3)
        self.rewrite(machine, 1)
        self.eventually('three pages', lambda: self.scanned(machine) == 3)
        self.requests.clear()
        machine = restore(machine)
        self.assert_carried(3, machine)
        self.assertEqual(3, self.scanned(machine))
        machine.qmp.execute('cont')
        time.sleep(0.2)
        self.assertEqual([], self.requests)
        self.rewrite(machine, 2)
        self.eventually('three pages', lambda: self.scanned(machine) == 3)
        # Asked for once, and only the page that was written.
        self.assertEqual([0x2000], [
            request.offset for request in self.requests])

    def test_other_process(self):
        def restore(machine):
            path = self.save(machine)
            other = self.enterContext(self.firmware(
                extra=['-incoming', 'defer']))
            self.restore(other, path)
            return other
        self.check(restore)

    def test_discarded(self):
        """RAM that is not migrated, as virtio-mem has not plugged it."""
        extra = ['-m', '4M,maxmem=1G,slots=1',
                 '-object', 'memory-backend-ram,id=more,size=128M',
                 '-device', 'virtio-mem-pci,memdev=more,requested-size=0']

        def restore(machine):
            path = self.save(machine)
            other = self.enterContext(self.firmware(
                extra=['-incoming', 'defer', *extra]))
            self.restore(other, path)
            return other
        self.check(restore, extra)

    def test_loadvm(self):
        """In the emulator that has run, and changed, the page."""
        def restore(machine):
            self.stop(machine)
            self.command(machine, 'savevm one')
            machine.qmp.execute('cont')
            self.rewrite(machine, 2)
            self.eventually('three pages', lambda: self.scanned(
                machine) == 3)
            self.stop(machine)
            self.requests.clear()
            self.command(machine, 'loadvm one')
            return machine
        self.check(restore, self.make_disk())
