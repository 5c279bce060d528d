# SPDX-License-Identifier: Apache-2.0
"""What a QEMU, or something that says it is one, gets from a real worker."""

import array
import os
import pathlib
import random
import socket
import subprocess
import threading
import time
import uuid

from tests.unit.worker import base
from virtav_nova.monitor import wire

NIGHTLY = os.environ.get('VIRTAV_NIGHTLY') == '1'
INSTANCE = uuid.UUID('11111111-2222-3333-4444-555555555555')


class HandshakeTest(base.TestCase):

    def test_welcome(self):
        self.start(max_in_flight=17)
        check = subprocess.run(
            [*base.COMMAND, '--config-file', self.configure(), '--check'],
            check=True, capture_output=True, cwd=base.base.ROOT, text=True)
        first, second = (self.connect().hello(version_max=9)
                         for _ in range(2))
        self.assertEqual((1, 17, 1),
                         (first.version, first.max_in_flight, first.epoch))
        self.assertIn(f'digest: {first.digest.hex()}\n', check.stdout)
        self.assertNotEqual(bytes(32), first.key)
        # One key for all: what was learnt of a page goes for all sessions.
        self.assertEqual(first, second)
        self.assertEqual(0, self.stop())
        self.start(max_in_flight=17)
        again = self.connect().hello()
        self.assertEqual(first.digest, again.digest)
        self.assertNotEqual(first.key, again.key)

    def test_in_pieces(self):
        self.start()
        monitor = self.connect()
        for byte in base.hello().pack():
            monitor.socket.sendall(bytes([byte]))
            time.sleep(0.0005)
        monitor.key = monitor.frame().key
        self.assert_serves(monitor)

    def test_refusals(self):
        self.start()
        good = self.session()
        request = good.request(base.CLEAN).pack()
        hello = base.hello().pack()
        for name, data, code in (
                ('version', base.hello(
                    version_min=2, version_max=3).pack(), 1),
                ('page size', base.hello(page_size=65536).pack(), 2),
                ('magic', b'GET / HTTP/1.1\r\n', 4),
                ('header version', hello[:4] + b'\2' + hello[5:], 4),
                ('length', hello[:8] + b'\x61' + hello[9:], 4),
                ('huge length', hello[:8] + b'\xff' * 4 + hello[12:], 4),
                ('reserved', hello[:68] + b'\1' + hello[69:], 4),
                ('policy', hello[:48] + b'\2' + hello[49:], 4),
                ('REQUEST first', request, 4),
                ('WELCOME', wire.Welcome(
                    1, 1, bytes(32), bytes(32), 1).pack(), 4),
                ('HELLO twice at once', hello * 2, 4),
                ('REQUEST before WELCOME', hello + request, 4)):
            with self.subTest(name):
                monitor = self.connect()
                monitor.socket.sendall(data)
                self.assert_closed(monitor, code)
        self.assert_serves(good)
        # Rate-limited: ten of them, however many more.
        self.assertEqual(10, self.log().count('refused'))

    def test_silence_ends_and_holds_nobody_up(self):
        self.start(handshake_timeout=2)
        begin = time.monotonic()
        silent = [self.connect() for _ in range(200)]
        half = self.connect()
        half.socket.sendall(base.hello().pack()[:111])
        self.assert_serves(self.session())
        self.assertLess(time.monotonic() - begin, 2)
        for monitor in (*silent[-5:], half):
            self.assert_closed(monitor, wire.Refusal.PROTOCOL)
        self.assertGreaterEqual(time.monotonic() - begin, 2)
        # These had to give way to newer ones.
        self.assert_closed(silent[0], wire.Refusal.OVERLOAD)

    def test_gone_before_hello(self):
        self.start()
        for _ in range(20):
            monitor = self.connect()
            monitor.socket.sendall(
                base.hello().pack()[:random.randrange(112)])
            monitor.close()
        self.assert_serves(self.session())

    def test_max_sessions(self):
        self.start(max_sessions=2)
        first, second = self.session(), self.session()
        third = self.connect()
        third.socket.sendall(base.hello().pack())
        self.assert_closed(third, wire.Refusal.OVERLOAD)
        first.close()
        self.records(1, event='closed')
        self.assert_serves(self.session())
        self.assert_serves(second)

    def test_sessions_are_spread(self):
        self.start(processes=2)
        for _ in range(4):
            self.session()
        sessions = [line.rpartition('scan process ')[2]
                    for line in self.log().splitlines() if 'opened by' in line]
        self.assertEqual(['0 of epoch 1', '0 of epoch 1', '1 of epoch 1',
                          '1 of epoch 1'], sorted(sessions))

    def test_sessions_of_an_instance_stay_together(self):
        self.start(processes=2)
        for _ in range(3):
            self.session(instance=INSTANCE)
            self.session()
        slots = {line.rpartition('scan process ')[2]
                 for line in self.log().splitlines()
                 if f'instance {INSTANCE} opened by' in line}
        self.assertEqual(1, len(slots))

    def test_sessions_of_an_instance_are_bounded(self):
        self.start()
        for _ in range(8):
            self.session(instance=INSTANCE)
        more = self.connect()
        more.socket.sendall(base.hello(instance=INSTANCE).pack())
        self.assert_closed(more, wire.Refusal.OVERLOAD)
        self.assert_serves(self.session())


class VerdictTest(base.TestCase):

    def deliver(self, monitor, requests, rng):
        stream = b''.join(request.pack() for request in requests)
        while stream:
            count = rng.randrange(1, 9000)
            monitor.socket.sendall(stream[:count])
            stream = stream[count:]

    def test_clean_and_match(self):
        self.start()
        monitor = self.session(instance=INSTANCE, policy=wire.Policy.REPORT,
                               on_match=wire.OnMatch.PAUSE)
        clean = monitor.ask(base.CLEAN)
        self.assertEqual((wire.Result.CLEAN, ''), (clean.result, clean.rule))
        match = monitor.ask(
            base.MATCHING, gpa=wire.UNKNOWN_GPA, gva=0xffffffff81000000,
            rip=0xffffffff81000123, cr3=0x2000, vcpu=3, cpl=0,
            flags=wire.RESENT, offset=0x5000)
        self.assertEqual((wire.Result.MATCH, 'VirtAV_SelfTest'),
                         (match.result, match.rule))
        monitor.close()
        record, = self.records(1, type='match')
        self.assertRegex(record.pop('time'), r'^\d{4}-.*T.*\.\d{6}\+00:00$')
        self.assertEqual(base.base.SIGNATURE, bytes.fromhex(
            record.pop('bytes'))[:len(base.base.SIGNATURE)])
        digest = record.pop('digest')
        self.assertEqual(64, len(digest))
        meta = record.pop('meta')
        self.assertEqual('test', meta['severity'])
        self.assertEqual({
            'type': 'match', 'instance': str(INSTANCE),
            'rule': 'VirtAV_SelfTest', 'rule_author': 'VirtAV contributors',
            'rule_licence': 'Apache-2.0', 'rule_reference': None,
            'severity': 'info', 'mitre': [], 'form': 'page',
            'start': 0xffffffff81000000, 'pages': [], 'repeats': 0,
            'tags': ['selftest'], 'namespace': 'selftest.yar',
            'strings': [{'identifier': '$signature', 'offset': 0}],
            'rules_matched': 1, 'block': 'pc.ram', 'offset': 0x5000,
            'gpa': None, 'gva': 0xffffffff81000000,
            'rip': 0xffffffff81000123, 'cr3': 0x2000, 'cpl': 0, 'vcpu': 3,
            'tag': match.tag.hex(), 'held': False, 'resent': True,
            'policy': 'report', 'on_match': 'pause'}, record)
        opened, = self.records(1, event='opened')
        closed, = self.records(1, event='closed')
        for record in (opened, closed):
            self.assertEqual(
                ('session', str(INSTANCE), digest),
                (record['type'], record['instance'], record['digest']))
        self.assertEqual(
            {'fetches': 2, 'distinct': 2, 'matches': 1, 'unknown': 0,
             'dropped': 0, 'reason': 'peer closed the connection'},
            {name: closed[name] for name in (
                'fetches', 'distinct', 'matches', 'unknown', 'dropped',
                'reason')})
        log = self.log()
        self.assertIn(f'of user {os.getuid()}, group {os.getgid()}', log)
        self.assertIn(f'{INSTANCE}: rule VirtAV_SelfTest matched', log)

    def test_many_in_order_however_they_come(self):
        self.start(max_in_flight=64)
        monitor = self.session()
        rng = random.Random(2017)
        pages = [rng.choice((base.CLEAN, base.MATCHING, rng.randbytes(4096)))
                 for _ in range(64)]
        requests = [monitor.request(page) for page in pages]
        sender = threading.Thread(
            target=self.deliver, args=(monitor, requests, rng))
        sender.start()
        for request in requests:
            verdict = monitor.frame()
            self.assertEqual(
                (request.id, request.generation, request.tag),
                (verdict.id, verdict.generation, verdict.tag))
            self.assertEqual(request.page == base.MATCHING,
                             verdict.result == wire.Result.MATCH)
        sender.join()
        monitor.close()
        closed, = self.records(1, event='closed')
        self.assertEqual((64, len(set(pages))),
                         (closed['fetches'], closed['distinct']))

    def test_scan_that_fails_is_unknown(self):
        # libyara gives up after one second, before the worker does.
        self.start(base.SLOW_RULE, scan_timeout_ms=1800)
        monitor = self.session()
        verdict = monitor.ask(base.SLOW)
        self.assertEqual((wire.Result.UNKNOWN, ''),
                         (verdict.result, verdict.rule))
        self.assert_serves(monitor)
        monitor.close()
        closed, = self.records(1, event='closed')
        self.assertEqual((3, 1), (closed['fetches'], closed['unknown']))
        self.assertIn('a scan failed: TimeoutError', self.log())

    def test_several_rules(self):
        self.start('rule Second : b { strings: $a = "VIRTAV" condition: $a }')
        verdict = self.session().ask(base.MATCHING)
        self.assertEqual('VirtAV_SelfTest', verdict.rule)
        records = self.records(2, type='match')
        self.assertEqual(['VirtAV_SelfTest', 'Second'],
                         [record['rule'] for record in records])
        self.assertEqual([2, 2],
                         [record['rules_matched'] for record in records])

    def test_names_cannot_inject(self):
        block = b'pc\n{"type":"match"}\r\x1b[2J\xff\xe2\x80\xae'
        self.start(
            'rule Hostile {\n'
            '  meta: author = "A\\n2026 ERROR forged\\x1b[31m\u202e"\n'
            '  strings: $a = "VIRTAV" condition: $a }')
        os.rename(self.top / 'rules' / 'test.yar',
                  self.top / 'rules' / 'test\n{}.yar')
        self.assertEqual(0, self.stop())
        self.start()
        self.session().ask(base.MATCHING, block=block)
        self.records(2, type='match')
        for line in self.journal():
            for value in line.values():
                if isinstance(value, str):
                    self.assertTrue(value.isprintable(), value)
        self.assertTrue(all(
            line.isprintable() and line[:2] == '20'
            for line in self.log().splitlines()), self.log())


class RingVerdictTest(VerdictTest):

    flags = wire.SHARED

    def deliver(self, monitor, requests, rng):
        for request in requests:
            monitor.ring.requests.put(request.pack())
            # However many of these come.
            for _ in range(rng.randrange(3)):
                monitor.tell()
        monitor.tell()


class HostileTest(base.TestCase):

    def test_violations_close_that_session_alone(self):
        self.start()
        good = self.session()
        for name, change in (
                ('magic', (0, b'X')), ('version', (4, b'\2')),
                ('type', (6, b'\4')), ('unknown type', (6, b'\x63')),
                ('length', (8, b'\0')), ('huge length', (8, b'\xff' * 4)),
                ('reserved', (12, b'\1')), ('offset', (16 + 16, b'\1')),
                ('cpl', (16 + 60, b'\4')), ('flags', (16 + 61, b'\x80')),
                ('reserved in request', (16 + 62, b'\1')),
                ('tag', (16 + 64, b'some other tag!!')),
                ('name', (16 + 80, b'a\0b')),
                ('page', (16 + 176 + 512 + 4095, b'\1'))):
            with self.subTest(name):
                monitor = self.session()
                self.assert_serves(monitor)
                # A page that is not known: its tag has to fit.
                data = bytearray(monitor.request(
                    name.encode().ljust(4096, b'\0')).pack())
                offset, value = change
                data[offset:offset + len(value)] = value
                monitor.socket.sendall(data)
                self.assert_closed(monitor)
                self.assert_serves(good)
        closed = self.records(14, event='closed')
        for record in closed:
            self.assertRegex(record['reason'], '^protocol: ')
            self.assertEqual(2, record['fetches'])

    def test_frames_of_the_wrong_kind(self):
        self.start()
        good = self.session()
        for frame in (base.hello(), wire.Refused(wire.Refusal.OVERLOAD, ''),
                      wire.Verdict(1, 1, bytes(16), 0, ''),
                      wire.Welcome(1, 1, bytes(32), bytes(32), 1)):
            monitor = self.session()
            monitor.socket.sendall(frame.pack())
            self.assert_closed(monitor)
        self.assert_serves(good)

    def test_too_many_in_flight(self):
        self.start(max_in_flight=4)
        good, bad = self.session(), self.session()
        pid, = self.scan_processes()
        with base.stopped(pid):
            for _ in range(4):
                good.send(base.CLEAN)
            for _ in range(5):
                bad.send(base.CLEAN)
        for _ in range(4):
            self.assertEqual(wire.Result.CLEAN, good.frame().result)
        self.assert_closed(bad)
        self.assert_serves(good)
        closed, = self.records(1, event='closed')
        self.assertEqual('protocol: more requests in flight than allowed',
                         closed['reason'])

    def test_cut_off_in_the_middle(self):
        self.start()
        for end in (1, 15, 16, 17, 192, 5311):
            monitor = self.session()
            monitor.socket.sendall(monitor.request(base.CLEAN).pack()[:end])
            monitor.close()
        closed = self.records(6, event='closed')
        self.assertEqual({0}, {record['fetches'] for record in closed})
        self.assert_serves(self.session())

    def test_requests_of_one_that_is_gone_are_scanned(self):
        self.start()
        monitor = self.session()
        pid, = self.scan_processes()
        with base.stopped(pid):
            for page in (base.CLEAN, base.MATCHING, base.CLEAN):
                monitor.send(page)
            monitor.close()
        self.records(1, type='match')
        closed, = self.records(1, event='closed')
        self.assertEqual((3, 1), (closed['fetches'], closed['matches']))

    def test_half_closed(self):
        self.start()
        monitor = self.session()
        for _ in range(3):
            monitor.send(base.MATCHING)
        monitor.socket.shutdown(socket.SHUT_WR)
        for _ in range(3):
            self.assertEqual(wire.Result.MATCH, monitor.frame().result)
        self.assert_closed(monitor)

    def test_one_that_does_not_listen_holds_nobody_up(self):
        self.start(max_in_flight=4096)
        good, deaf = self.session(), self.session()
        stop = threading.Event()
        sent = []

        def send():
            deaf.socket.settimeout(1)
            try:
                while len(sent) < 4000:
                    sent.append(deaf.send(base.CLEAN).id)
            except TimeoutError:
                stop.set()

        sender = threading.Thread(target=send)
        sender.start()
        while sender.is_alive():
            self.assert_serves(good)
        # It was slowed down, or the test shows nothing.
        self.assertTrue(stop.is_set() or len(sent) == 4000)
        deaf.socket.settimeout(base.PATIENCE)
        self.assertEqual(sent, [deaf.frame().id for _ in sent])

    def test_file_descriptors_are_not_taken(self):
        self.start()
        monitor = self.session()
        self.assert_serves(monitor)
        pid, = self.scan_processes()
        before = len(os.listdir(f'/proc/{pid}/fd'))
        for _ in range(10):
            monitor.socket.sendmsg(
                [monitor.request(base.MATCHING).pack()],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                  array.array('i', [0, 1, 2]))])
            self.assertEqual(wire.Result.MATCH, monitor.frame().result)
        self.assertEqual(before, len(os.listdir(f'/proc/{pid}/fd')))

    def test_garbage(self):
        self.start()
        good = self.session()
        rng = random.Random(20174)
        for _ in range(60):
            monitor = self.session()
            data = bytearray(
                monitor.request(base.CLEAN).pack() * rng.randrange(1, 4))
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            monitor.socket.sendall(data[:rng.randrange(len(data))])
            monitor.close()
        self.records(60, event='closed')
        self.assert_serves(good)

    def test_nothing_is_left_of_those_who_come_and_go(self):
        self.start(processes=2)
        pids = (self.process.pid, *self.loaders(), *self.scan_processes())

        def files():
            return sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in pids)

        first, second = self.session(), self.session()
        for monitor in (first, second):
            self.assert_serves(monitor)
            monitor.close()
        self.records(2, event='closed')
        before = files()
        count = 10000 if NIGHTLY else 300
        memory = self.memory(pids)
        for number in range(count):
            monitor = base.Monitor(socket.socket(socket.AF_UNIX))
            monitor.socket.connect(self.path)
            if number % 3:
                monitor.hello()
            if number % 3 > 1:
                monitor.ask(base.CLEAN)
            monitor.close()
        base.wait_for(lambda: files() <= before, f'{before} files again')
        if NIGHTLY:
            self.assertLess(self.memory(pids), memory + 4096)
        else:
            self.records(202, event='closed')

    @staticmethod
    def memory(pids):
        """Memory that processes take, in KiB."""
        return sum(
            int(line.split()[1]) for pid in pids
            for line in pathlib.Path(
                f'/proc/{pid}/smaps_rollup').read_text().splitlines()
            if line.startswith('Pss:'))
