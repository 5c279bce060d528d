# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: each target takes some bytes, and raises when it is wrong.

A target may raise what is documented to be raised for bad input, and says so
by taking it. Anything else that comes out is a finding.
"""

import contextlib
import os
import re
import socket
import struct

import yara
import zstandard

from virtav_nova import exception
from virtav_nova.monitor import recording
from virtav_nova.monitor import ring
from virtav_nova.monitor import wire
from virtav_nova.rules import dissect
from virtav_nova.rules import necessary
from virtav_nova.rules import patterns
from virtav_nova.rules import syntax
from virtav_nova.worker import link

#: What either side may send at a time.
_ACCEPTS = (
    [wire.Hello], [wire.Request], [wire.Request, wire.Page],
    [wire.Welcome, wire.Refused], [wire.Verdict, wire.Refused, wire.Read])
_SLOTS = 4


def _check(frame, data):
    """A frame that was taken has to be the one that was sent."""
    if isinstance(frame, wire.Verdict | wire.Refused):
        # Text is escaped when it is packed, a backslash too, and it leaves
        # room for a NUL.
        shown, most = ((frame.rule, 87) if isinstance(frame, wire.Verdict)
                       else (frame.reason, 119))
        if '\\' in shown or len(shown) > most:
            return
    packed = frame.pack()
    assert packed == data, (frame, packed, data)


def wire_target(data):
    """The decoder, fed in pieces; and frames as they come out of a ring."""
    accepts = _ACCEPTS[data[0] % len(_ACCEPTS)] if data else _ACCEPTS[0]
    piece = 1 + (data[1] if len(data) > 1 else 0) * 16
    data = data[2:]
    decoder = wire.Decoder(accepts, 2)
    at = taken = 0
    try:
        while at < len(data):
            room = decoder.room()
            assert room, 'no room, though all frames were taken'
            part = data[at:at + min(piece, len(room))]
            room[:len(part)] = part
            decoder.filled(len(part))
            at += len(part)
            while (frame := decoder.frame()) is not None:
                end = at - decoder.held
                _check(frame, data[taken:end])
                taken = end
    except wire.ProtocolError:
        pass
    with contextlib.suppress(wire.ProtocolError):
        # Out of a slot there always come so many.
        wire.whole(data.ljust(wire.REQUEST_SIZE, b'\0'), *accepts)


def link_target(data):
    """A scan process's end of a session, over a socket or a ring."""
    if not data:
        return
    mine, theirs = socket.socketpair()
    fd = None
    with mine, theirs:
        mine.setblocking(False)
        theirs.setblocking(False)
        if data[0] & 1:
            fd = ring.create(_SLOTS)
            with open(fd, 'r+b', buffering=0, closefd=False) as memory:
                # Indices first, then frames.
                memory.seek(64)
                memory.write(data[1:257])
                memory.seek(4096)
                memory.write(data[257:])
            transport = link.RingLink(mine, fd, _SLOTS, _SLOTS - 1)
            with contextlib.suppress(BlockingIOError):
                theirs.send(data[:16])
            os.close(fd)
        else:
            transport = link.SocketLink(mine, 2)
            with contextlib.suppress(BlockingIOError):
                theirs.send(data[1:])
        try:
            for _ in range(_SLOTS * 2):
                with contextlib.suppress(BlockingIOError):
                    transport.receive()
                frame = transport.take()
                if frame is None:
                    break
                transport.post(bytes(wire.VERDICT_SIZE))
                transport.flush()
        except (wire.ProtocolError, EOFError, OSError):
            pass


def recording_target(data):
    """The reader of recordings, of files and of chunks that are whole."""
    path = '/dev/shm/virtav-fuzz-%d' % os.getpid()
    if data[:1] == b'c':
        packer = zstandard.ZstdCompressor(write_checksum=True)
        chunks = []
        for part in data[1:].split(b'CHUNK'):
            frame = packer.compress(part)
            chunks.append(struct.pack(
                '<4sII', b'\x50\x2a\x4d\x18', 4, len(frame)) + frame)
        data = b''.join(chunks)
    with open(path, 'wb') as file:
        file.write(data)
    try:
        with recording.Recording(path) as read:
            tagger = wire.Tagger(bytes(32))
            for number, fetch in enumerate(read):
                packed = fetch.request(number, tagger).pack()
                wire.whole(packed, wire.Request)
            read.repeats()
    except exception.RecordingError:
        pass
    finally:
        os.unlink(path)


def rules_target(data):
    """What the process apart does with a file of rules.

    The C of yaramod and libyara may crash in it: then the importer has to
    get over it, see :mod:`tests.fuzz.survival`.
    """
    text = data.decode('utf-8', 'surrogateescape')
    job = dissect.Dissect({}, b'')
    for number, result in job.work([{'id': 1, 'file': 'f', 'text': text}]):
        assert number == 1, number
        if result.get('refused') or not result.get('text'):
            continue
        # A page form is a source by itself, and means something.
        source = syntax.parse(result['text'], 'f')
        assert source.rules, result
        necessary.formulas(source)
        for rule in source.rules:
            for string in rule.strings:
                with contextlib.suppress(patterns.UnknownError):
                    patterns.options(string)
        with contextlib.suppress(yara.Error):
            yara.compile(source=result['text'], includes=False)


def planted_target(data):
    """A bug made for the test of the fuzzer: a length that is not checked."""
    decoder = wire.Decoder([wire.Hello])
    room = decoder.room()
    part = data[:len(room)]
    room[:len(part)] = part
    decoder.filled(len(part))
    with contextlib.suppress(wire.ProtocolError):
        frame = decoder.frame()
        if frame is not None and frame.deadline_ms > 0x7fffffff:
            struct.pack('<i', frame.deadline_ms)


def words(corpus):
    """A dictionary for libFuzzer, of what stands in seeds of text.

    :param corpus: paths of seeds
    :returns: its lines
    """
    found = set()
    for path in corpus:
        if path.suffix == '.yar':
            found.update(re.findall(r'[$#@!]?\w+|[^\w\s]+',
                                    path.read_text()))
    return ['"%s"' % ''.join('\\x%02x' % byte for byte in word.encode())
            for word in sorted(found) if len(word) < 30]


TARGETS = {
    'wire': wire_target,
    'link': link_target,
    'recording': recording_target,
    'rules': rules_target,
    'planted': planted_target,
}
