# SPDX-License-Identifier: Apache-2.0

import io
import json
import os
import random
import struct
import uuid

import zstandard

from tests.unit import base
from virtav_nova import exception
from virtav_nova.monitor import client
from virtav_nova.monitor import recording
from virtav_nova.monitor import wire

KEY = bytes(range(32))


def requests(count, seed=1):
    """Make requests; each page comes three times on the average."""
    rng = random.Random(seed)
    pages = [rng.randbytes(4096) for _ in range(max(count // 3, 1))]
    tagger = wire.Tagger(KEY)
    for number in range(count):
        page = rng.choice(pages)
        before = rng.choice((b'', page[-512:], rng.randbytes(512)))
        after = rng.choice((b'', page[:512], bytes(512)))
        window = wire.window(page, before, after)
        yield wire.Request(
            id=number, generation=number + 7, offset=number << 12,
            gpa=wire.UNKNOWN_GPA if number % 5 == 0 else number << 12,
            gva=0xffffffff81000000 + (number << 12), rip=number, cr3=0x1000,
            vcpu=number % 3, cpl=number % 4,
            flags=wire.HOLD | (wire.BEFORE if before else 0)
            | (wire.AFTER if after else 0),
            tag=tagger.tag(page), block=b'pc.ram',
            before_tag=(tagger.tag(window[:1024]) if before
                        else wire.NO_TAG),
            after_tag=tagger.tag(window[-1024:]) if after else wire.NO_TAG,
            window=window)


class TestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = self.top / 'boot.rec'
        self.hello = client.hello()

    def record(self, count, end=True):
        """Write a recording and give back what is in it."""
        made = list(requests(count))
        with open(self.path, 'wb') as file:
            writer = recording.Writer(
                file, recording.Head.of(self.hello, 'a test'))
            for request in made:
                writer.add(request)
            if end:
                writer.close()
            else:
                writer.flush()
        return made

    def read(self):
        read = recording.Recording(self.path)
        self.addCleanup(read.close)
        return read


class RecordingTest(TestCase):

    def test_what_was_written_is_read(self):
        made = self.record(300)
        read = self.read()
        self.assertIsNone(read.damage)
        self.assertEqual(
            (self.hello.instance, self.hello.ram_size, self.hello.policy,
             'a test'),
            (read.head.instance, read.head.ram_size, read.head.policy,
             read.head.program))
        tagger = wire.Tagger(KEY)
        self.assertEqual(made, [
            fetch.request(number, tagger)
            for number, fetch in enumerate(read)])
        times = [fetch.at for fetch in read]
        self.assertEqual(sorted(times), times)
        self.assertEqual(made[-1].page, read[-1].page)
        self.assertEqual(2, len(read[3:5]))
        self.assertRaises(IndexError, read.__getitem__, 300)

    def test_contents_are_there_once(self):
        made = self.record(300)
        read = self.read()
        pages = {bytes(request.page) for request in made}
        self.assertEqual(len(pages), read.pages)
        self.assertEqual(pages, {
            read.page(number) for number in range(read.pages)})
        self.assertEqual(300 - len(pages), read.repeats())
        # Random bytes: as they are, and not much else.
        self.assertLess(os.path.getsize(self.path), 4096 * read.pages
                        + 300 * (512 + 64))

    def test_no_fetch(self):
        self.record(0)
        self.assertEqual((0, 0, None), (
            len(self.read()), self.read().pages, self.read().damage))

    def test_zstd_reads_it(self):
        self.record(30)
        with open(self.path, 'rb') as file:
            data = zstandard.ZstdDecompressor().stream_reader(
                file, read_across_frames=True).read()
        self.assertEqual(b'H', data[:1])
        self.assertIn(b'"format": 1', data[:100])

    def test_no_token(self):
        token = bytes(range(100, 132))
        self.hello = client.hello(token=token)
        self.record(10)
        with open(self.path, 'rb') as file:
            self.assertNotIn(token, zstandard.ZstdDecompressor(
            ).stream_reader(file, read_across_frames=True).read())


class DamageTest(TestCase):

    def setUp(self):
        super().setUp()
        self.made = self.record(300)
        self.whole = self.path.read_bytes()

    def check(self, data, damage):
        """What stands before the damage is there.

        :returns: the recording
        """
        self.path.write_bytes(data)
        read = self.read()
        self.assertRegex(read.damage or '', damage)
        tagger = wire.Tagger(KEY)
        self.assertEqual(self.made[:len(read)], [
            fetch.request(number, tagger)
            for number, fetch in enumerate(read)])
        return read

    def refuse(self, data, reason):
        self.path.write_bytes(data)
        with self.assertRaisesRegex(exception.RecordingError, reason):
            self.read()

    def test_cut_off(self):
        had = set()
        for size in range(400, len(self.whole), 4099):
            had.add(len(self.check(self.whole[:size], 'cut off')))
        self.assertGreater(len(had), 1)
        self.assertGreater(max(had), 100)

    def test_recorder_killed(self):
        self.record(300, end=False)
        self.assertEqual(300, len(self.check(
            self.path.read_bytes(), 'cut off')))

    def test_bits(self):
        rng = random.Random(1)
        for _ in range(200):
            data = bytearray(self.whole)
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
            self.path.write_bytes(data)
            try:
                read = recording.Recording(self.path)
            except exception.RecordingError:
                # In the head.
                self.assertLess(place, 300)
                continue
            with read:
                self.assertIsNotNone(read.damage, place)

    def test_something_follows(self):
        self.assertEqual(300, len(self.check(
            self.whole + b'x', 'follows its end')))

    def test_nothing_of_it(self):
        self.refuse(b'', 'cut off')
        self.refuse(bytes(1000), 'a chunk is malformed')
        self.refuse(b'rule x { condition: true }', 'a chunk is malformed')
        self.refuse(self.whole[:20], 'cut off')
        os.unlink(self.path)
        with self.assertRaisesRegex(exception.RecordingError, 'No such file'):
            self.read()
        self.path.mkdir()
        with self.assertRaisesRegex(exception.RecordingError,
                                    'Is a directory'):
            self.read()

    def test_heads(self):
        good = {'format': 1, 'instance': str(uuid.uuid4()), 'ram_size': 1,
                'policy': 'enforce', 'begun': 0, 'program': 'x'}
        for changes, reason in (
                ({'format': 2}, 'of another format, 2'),
                ({'format': '\x1b[31m'}, r'another format, .x1b\[31m'),
                ({'instance': 'x'}, 'badly formed|head is malformed'),
                ({'instance': 3}, 'head is malformed'),
                ({'ram_size': -1}, 'head is malformed'),
                ({'ram_size': 'x'}, 'head is malformed'),
                ({'begun': None}, 'head is malformed'),
                ({'policy': 'other'}, 'head is malformed'),
                ({'policy': []}, 'head is malformed')):
            self.refuse(chunk(head({**good, **changes})), reason)
        self.refuse(chunk(head([])), 'head is malformed')
        self.refuse(chunk(head('[' * 9000)), 'malformed|cut off')
        self.refuse(chunk(b'H' + struct.pack('<I', 2) + b'\xff\xff'),
                    'head is malformed')
        self.refuse(chunk(b'H' + struct.pack('<I', 0xffffffff)), 'cut off')
        self.refuse(chunk(b'H'), 'cut off|unknown')
        self.refuse(chunk(b'P' + bytes(4096)), 'no head')


def chunk(data):
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return struct.pack('<4sII', b'\x50\x2a\x4d\x18', 4, len(frame)) + frame


def head(said=None):
    if said is None:
        said = {'format': 1, 'instance': str(uuid.uuid4()), 'ram_size': 1,
                'policy': 'enforce', 'begun': 0, 'program': 'x'}
    data = said if isinstance(said, str) else json.dumps(said)
    return b'H' + struct.pack('<I', len(data)) + data.encode()


def fetch(**changes):
    values = {'at': 5, 'generation': 0, 'offset': 0, 'gpa': 0, 'gva': 0,
              'rip': 0, 'cr3': 0, 'vcpu': 0, 'cpl': 0, 'flags': 1, 'zero': 0,
              'block': b'pc.ram', 'page': 0, 'before': 0xffffffff,
              'after': 0xffffffff} | changes
    return b'F' + struct.pack('<QQQQQQQIBBH64sIII', *values.values())


class HostileTest(TestCase):
    """A recording that somebody made up."""

    page = b'P' + bytes(4096)
    edge = b'E' + bytes(512)

    def check(self, *records, damage, fetches=0):
        self.path.write_bytes(chunk(head()) + b''.join(
            chunk(record) for record in records))
        read = self.read()
        self.assertRegex(read.damage or '', damage)
        self.assertEqual(fetches, len(read))

    def test_good(self):
        self.check(self.page, fetch(), b'Z' + bytes([1] + [0] * 7),
                   damage='^$', fetches=1)

    def test_fetches(self):
        for changes in ({'page': 1}, {'page': 0xffffffff}, {'before': 0},
                        {'flags': 5}, {'flags': 5, 'before': 1},
                        {'flags': 9, 'after': 7}, {'flags': 16},
                        {'zero': 1}, {'cpl': 4}, {'offset': 1},
                        {'at': 4}, {'block': b'a\0b'}):
            with self.subTest(changes):
                self.check(self.page, self.edge, fetch(), fetch(**changes),
                           damage='fetch is malformed', fetches=1)

    def test_records(self):
        self.check(self.page, fetch(), b'Z' + bytes(8), damage='missing',
                   fetches=1)
        self.check(b'Q', damage='unknown kind')
        self.check(self.page[:-1], damage='cut off')
        self.check(head(), damage='two heads')

    def test_chunk_that_grows(self):
        # 4 GiB of zeros, in a frame that says so or does not.
        zeros = zstandard.ZstdCompressor().compress(bytes(8 << 20))
        for frame in (zeros, zstandard.ZstdCompressor(
                write_content_size=False).compress(bytes(1 << 20))):
            self.path.write_bytes(chunk(head()) + struct.pack(
                '<4sII', b'\x50\x2a\x4d\x18', 4, len(frame)) + frame)
            self.assertEqual('a chunk is malformed', self.read().damage)

    def test_frame_longer_than_it_says(self):
        frame = bytearray(zstandard.ZstdCompressor().compress(bytes(300)))
        self.assertEqual(300, zstandard.frame_content_size(bytes(frame)))
        frame[5:7] = (299 - 256).to_bytes(2, 'little')
        self.path.write_bytes(chunk(head()) + struct.pack(
            '<4sII', b'\x50\x2a\x4d\x18', 4, len(frame)) + frame)
        self.assertEqual('a chunk is damaged', self.read().damage)

    def test_too_many(self):
        self.addCleanup(setattr, recording, 'CONTENTS_MAX',
                        recording.CONTENTS_MAX)
        recording.CONTENTS_MAX = 2
        self.check(*[self.page] * 3, damage='more than may be')
        writer = recording.Writer(
            io.BytesIO(), recording.Head.of(self.hello, 'a test'))
        with self.assertRaises(recording.FullError):
            for request in requests(100):
                writer.add(request)
