# SPDX-License-Identifier: Apache-2.0

import contextlib
import hashlib
import random
import unittest
import uuid

from virtav_nova.monitor import wire

KEY = bytes(range(32))
PAGE = bytes(range(256)) * 16
WINDOW = b'\xbe' * 512 + PAGE + b'\xaf' * 512
HELLO = wire.Hello(
    version_min=1, version_max=3, page_size=4096,
    instance=uuid.UUID('00112233-4455-6677-8899-aabbccddeeff'),
    ram_size=0x20000000, policy=wire.Policy.ENFORCE,
    on_match=wire.OnMatch.PAUSE, on_timeout=wire.OnTimeout.DENY,
    deadline_ms=1000, flags=wire.SHARED | wire.READ, token=b'\x70' * 32)
WELCOME = wire.Welcome(
    version=1, max_in_flight=64, digest=b'\xd1' * 32, key=KEY,
    epoch=0x0102030405060708, table_entries=1 << 20, ring_slots=64)
REQUEST = wire.Request(
    id=1, generation=2, offset=0x3000, gpa=wire.UNKNOWN_GPA,
    gva=0x7fff00001234, rip=0x7fff00001235, cr3=0x1000, vcpu=7, cpl=3,
    flags=wire.HOLD | wire.RESENT | wire.BEFORE | wire.AFTER,
    tag=b'\xa7' * 16, block=b'pc.ram', before_tag=b'\xb7' * 16,
    after_tag=b'\xc7' * 16, window=WINDOW)
VERDICT = wire.Verdict(
    id=1, generation=2, tag=b'\xa7' * 16, result=wire.Result.MATCH,
    rule='VirtAV_SelfTest')
REFUSED = wire.Refused(wire.Refusal.OVERLOAD, 'busy')
READ = wire.Read(id=5, gpa=0x12345000)
ANSWER = wire.Page(id=5, gpa=0x12345000, status=wire.Status.OK, content=PAGE)
FRAMES = (HELLO, WELCOME, REQUEST, VERDICT, REFUSED, READ, ANSWER)
KINDS = tuple(type(frame) for frame in FRAMES)

# Written down from the protocol's tables, not made by the code under test.
GOLDEN = {
    wire.Hello: (
        '56415046 0100 0100 60000000 00000000'
        '0100 0300 00100000 00112233445566778899aabbccddeeff'
        '0000002000000000 01000000 02000000 01000000 e8030000'
        '03000000' + '00' * 12 + '70' * 32),
    wire.Welcome: (
        '56415046 0100 0200 60000000 00000000'
        '0100 0300 40000000' + 'd1' * 32
        + '000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f'
        '0807060504030201 00001000 40000000' + '00' * 8),
    wire.Request: (
        '56415046 0100 0300 b0140000 00000000'
        '0100000000000000 0200000000000000 0030000000000000'
        'ffffffffffffffff 34120000ff7f0000 35120000ff7f0000'
        '0010000000000000 07000000 03 0f 0000' + 'a7' * 16
        + '70632e72616d' + '00' * 58 + 'b7' * 16 + 'c7' * 16
        + 'be' * 512 + PAGE.hex() + 'af' * 512),
    wire.Verdict: (
        '56415046 0100 0400 80000000 00000000'
        '0100000000000000 0200000000000000' + 'a7' * 16
        + '01000000 00000000 5669727441565f53656c6654657374' + '00' * 73),
    wire.Refused: (
        '56415046 0100 0500 80000000 00000000'
        '03000000 00000000 62757379' + '00' * 116),
    wire.Read: (
        '56415046 0100 0600 18000000 00000000'
        '0500000000000000 0050341200000000' + '00' * 8),
    wire.Page: (
        '56415046 0100 0700 18100000 00000000'
        '0500000000000000 0050341200000000 00000000 00000000' + PAGE.hex()),
}
SIZES = {wire.Hello: 96, wire.Welcome: 96, wire.Request: 5296,
         wire.Verdict: 128, wire.Refused: 128, wire.Read: 24,
         wire.Page: 4120}


def decode(data, accepts=KINDS, chunk=None):
    """Decode a stream that comes in pieces.

    :param chunk: bytes in a piece, all at once when None
    :returns: the frames
    """
    decoder = wire.Decoder(accepts)
    frames = []
    while True:
        frame = decoder.frame()
        if frame is not None:
            if isinstance(frame, wire.Request):
                frame = frame._replace(window=bytes(frame.window))
            elif isinstance(frame, wire.Page):
                frame = frame._replace(content=bytes(frame.content))
            frames.append(frame)
            continue
        if not data:
            return frames
        room = decoder.room()
        count = min(len(room), len(data), chunk or len(data))
        room[:count] = data[:count]
        decoder.filled(count)
        data = data[count:]


class FrameTest(unittest.TestCase):

    def test_golden(self):
        for frame in FRAMES:
            with self.subTest(type(frame).__name__):
                golden = bytes.fromhex(GOLDEN[type(frame)])
                self.assertEqual(16 + SIZES[type(frame)], len(golden))
                self.assertEqual(golden, frame.pack())
                self.assertEqual([frame], decode(golden))

    def test_round_trip_in_pieces(self):
        stream = b''.join(frame.pack() for frame in FRAMES * 3)
        for chunk in (1, 7, 16, 17, 4095, 5312, None):
            with self.subTest(chunk):
                self.assertEqual(list(FRAMES) * 3,
                                 decode(stream, chunk=chunk))

    def test_truncated_at_every_byte(self):
        for frame in FRAMES:
            data = frame.pack()
            for end in range(len(data)):
                self.assertEqual([], decode(data[:end]))

    def test_garbage(self):
        rng = random.Random(20171)
        for _ in range(20000):
            data = bytearray(rng.choice(FRAMES).pack())
            for _ in range(rng.randrange(1, 9)):
                # Most of what is checked lies in the first bytes.
                data[rng.randrange(rng.choice((16, 80, len(data))))
                     % len(data)] = rng.randrange(256)
            data = data[:rng.randrange(len(data) + 1)] + rng.randbytes(
                rng.choice((0, 0, 3, 200)))
            with contextlib.suppress(wire.ProtocolError):
                decode(data)

    def test_random_bytes(self):
        rng = random.Random(20172)
        for _ in range(2000):
            with self.assertRaises(wire.ProtocolError):
                decode(rng.randbytes(rng.randrange(16, 6000)))

    def test_bad_headers(self):
        for offset, value, message in (
                (0, 0, 'magic'), (3, 0xff, 'magic'),
                (4, 2, 'version 2'), (5, 1, 'version 257'),
                (6, 0, 'type 0'), (6, 8, 'type 8'), (7, 1, 'type 259'),
                (8, 0xb1, 'length 5297'), (11, 0xff, 'length'),
                (12, 1, 'reserved'), (15, 0x80, 'reserved')):
            data = bytearray(REQUEST.pack())
            data[offset] = value
            with self.subTest(offset=offset), self.assertRaisesRegex(
                    wire.ProtocolError, message):
                # The header alone is enough to tell.
                decode(data[:16])

    def test_frame_of_the_other_side(self):
        for frame in (WELCOME, VERDICT, REFUSED, READ, ANSWER):
            with self.assertRaisesRegex(wire.ProtocolError, 'not allowed'):
                decode(frame.pack(), (wire.Hello, wire.Request))

    def _assert_bad(self, frame, offset, value):
        data = bytearray(frame.pack())
        data[16 + offset:16 + offset + len(value)] = value
        with self.subTest(type(frame).__name__, offset=offset), \
                self.assertRaises(wire.ProtocolError):
            decode(data)

    def test_bad_values(self):
        for frame, offset, value in (
                (HELLO, 0, b'\x00\x00'),         # version_min 0
                (HELLO, 0, b'\x04\x00'),         # more than version_max
                (HELLO, 32, b'\x02'),            # policy
                (HELLO, 36, b'\x04'),            # on_match
                (HELLO, 40, b'\x02'),            # on_timeout
                (HELLO, 48, b'\x04'),            # flags
                (HELLO, 52, b'\x01'),            # reserved
                (HELLO, 63, b'\x01'),
                (WELCOME, 0, b'\x02'),           # version
                (WELCOME, 2, b'\x07'),           # flags
                (WELCOME, 2, b'\x02'),           # entries, but no table
                (WELCOME, 2, b'\x01'),           # slots, but no ring
                (WELCOME, 80, bytes(4)),         # a table, but no entries
                (WELCOME, 80, b'\x02\0\0\0'),    # too few
                (WELCOME, 80, b'\0\0\0\x08'),    # too many
                (WELCOME, 80, b'\x01'),          # no power of two
                (WELCOME, 84, bytes(4)),         # a ring, but no slots
                (WELCOME, 84, b'\0\x08\0\0'),    # too many
                (WELCOME, 84, b'\x41'),          # no power of two
                (WELCOME, 88, b'\x01'),          # reserved
                (WELCOME, 4, b'\x00\x00\x00\x00'),  # max_in_flight
                (REQUEST, 16, b'\x01'),          # offset within a page
                (REQUEST, 60, b'\x04'),          # cpl
                (REQUEST, 61, b'\x10'),          # flags
                (REQUEST, 61, b'\x0b'),          # junction that is not there
                (REQUEST, 61, b'\x07'),
                (REQUEST, 62, b'\x01'),          # reserved
                (REQUEST, 90, b'x'),             # bytes after the NUL
                (VERDICT, 32, b'\x03'),          # verdict
                (VERDICT, 32, b'\x00'),          # a rule, but clean
                (VERDICT, 36, b'\x01'),          # reserved
                (VERDICT, 41, b'\n'),            # rule not printable
                (VERDICT, 41, b'\xe9'),
                (REFUSED, 0, b'\x00'),           # code
                (REFUSED, 0, b'\x07'),
                (REFUSED, 4, b'\x01'),           # reserved
                (REFUSED, 9, b'\x1b'),           # reason not printable
                (READ, 8, b'\x01'),              # address within a page
                (READ, 16, b'\x01'),             # reserved
                (ANSWER, 16, b'\x02'),           # status
                (ANSWER, 20, b'\x01')):          # reserved
            self._assert_bad(frame, offset, value)

    def test_welcome_without_shared_memory(self):
        for table, ring, flags in ((0, 0, 0), (4, 0, 1), (0, 1024, 2)):
            welcome = WELCOME._replace(table_entries=table, ring_slots=ring)
            data = welcome.pack()
            self.assertEqual(flags, data[18])
            self.assertEqual([welcome], decode(data))

    def test_whole(self):
        for frame in FRAMES:
            # A slot of the ring may be longer than the frame.
            self.assertEqual(frame, wire.whole(
                frame.pack() + b'rest', wire.Request, type(frame)))
        for data, message in (
                (VERDICT.pack().ljust(wire.REQUEST_SIZE), 'type 4'),
                (b'\0' + REQUEST.pack()[1:], 'magic'),
                (REQUEST.pack()[:8] + b'\0' + REQUEST.pack()[9:], 'length')):
            with self.assertRaisesRegex(wire.ProtocolError, message):
                wire.whole(data, wire.Request, wire.Page)

    def test_parts_of_the_window(self):
        self.assertEqual(PAGE, REQUEST.page)
        self.assertEqual(b'\xbe' * 512 + PAGE[:512], REQUEST.junction_before)
        self.assertEqual(PAGE[-512:] + b'\xaf' * 512, REQUEST.junction_after)
        self.assertEqual(WINDOW, wire.window(
            PAGE, b'\xbe' * 512, b'\xaf' * 512))
        self.assertEqual(bytes(512) + PAGE + bytes(512), wire.window(PAGE))

    def test_longest_block_name(self):
        request = REQUEST._replace(block=b'\xff' * 64)
        self.assertEqual([request], decode(request.pack()))

    def test_names_are_made_printable_and_cut(self):
        verdict = VERDICT._replace(rule='a\n\x1b[2J\u202eé' + 'x' * 100)
        decoded, = decode(verdict.pack())
        self.assertEqual(r'a\n\x1b[2J\u202e\xe9' + 'x' * 67, decoded.rule)
        self.assertEqual(87, len(decoded.rule))
        refused, = decode(REFUSED._replace(reason='\r' * 200).pack())
        self.assertEqual(119, len(refused.reason))

    def test_tag(self):
        inner = hashlib.sha256(
            bytes(byte ^ 0x36 for byte in KEY.ljust(64, b'\0')) + PAGE)
        outer = hashlib.sha256(
            bytes(byte ^ 0x5c for byte in KEY.ljust(64, b'\0'))
            + inner.digest())
        self.assertEqual(outer.digest()[:16], wire.page_tag(KEY, PAGE))
        self.assertEqual('08bd5e1d9577699b6f63ce0fa8371a8b',
                         wire.page_tag(KEY, memoryview(PAGE)).hex())

    def test_tagger(self):
        for key in (KEY, bytes(32)):
            tagger = wire.Tagger(key)
            for page in (PAGE, bytes(4096), memoryview(PAGE)):
                self.assertEqual(wire.page_tag(key, page), tagger.tag(page))


class DecoderTest(unittest.TestCase):

    def _feed(self, decoder, data):
        room = decoder.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        decoder.filled(count)
        return count

    def test_takes_no_more_than_the_buffer_holds(self):
        decoder = wire.Decoder([wire.Hello])
        self.assertEqual(112, len(decoder.room()))
        self.assertEqual(112, self._feed(decoder, HELLO.pack() * 2))
        self.assertEqual(0, len(decoder.room()))
        self.assertEqual(HELLO, decoder.frame())
        self.assertEqual(112, len(decoder.room()))

    def test_window_is_not_copied(self):
        decoder = wire.Decoder([wire.Request])
        self._feed(decoder, REQUEST.pack())
        request = decoder.frame()
        self.assertIsInstance(request.window, memoryview)
        self.assertEqual(WINDOW, request.window)

    def test_always_room_until_full(self):
        rng = random.Random(20173)
        decoder = wire.Decoder([wire.Request], 3)
        stream = b''.join(REQUEST._replace(id=number).pack()
                          for number in range(200))
        taken = []
        while len(taken) < 200:
            if decoder.held < 3 * wire.REQUEST_SIZE:
                self.assertGreater(len(decoder.room()), 0)
            fed = self._feed(decoder, stream[:rng.randrange(1, 9000)])
            stream = stream[fed:]
            for _ in range(rng.randrange(3)):
                request = decoder.frame()
                if request is not None:
                    self.assertEqual(PAGE, bytes(request.page))
                    taken.append(request.id)
        self.assertEqual(list(range(200)), taken)
