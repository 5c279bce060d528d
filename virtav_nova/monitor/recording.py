# SPDX-License-Identifier: Apache-2.0
"""Recordings of the pages that a guest fetched, with what lay beside them.

A recording is a file of zstd, which ``zstd -dc`` reads. It is made of chunks
as those of pzstd: a skippable frame of 12 bytes that tells the length of the
frame that follows, and that frame, with its content size and a checksum
(RFC 8878, 3.1). A chunk holds whole records, at most 1 MiB of them, so what
stands before damage can be used. Integers are little-endian. A record begins
with a byte that tells its kind:

``H``
    The first one: u32 length and a JSON object, see :class:`Head`.
``P``
    The 4096 bytes of a page; ``E``: 512 bytes of a page beside one. Each
    content is there once. They are numbered from 0 by their order, each kind
    by itself.
``F``
    A fetch, see :class:`Fetch`: u64 time in µs since the begin; u64
    generation, offset, gpa, gva, rip, cr3; u32 vcpu; u8 cpl; u8 flags; u16
    zero; block name, 64 bytes; u32 number of the page, and of the bytes
    before and after it, 0xffffffff for none.
``Z``
    The last one: u64 number of fetches.

Tags are not in it: they belong to a key that is gone. Nor is a token.

A recording holds what a guest had in its memory, and whoever hands one over
may have made it up: nothing in it is trusted, and what is in memory for it is
bounded. Its contents lie in unnamed files of the directory for temporary
files, at most 4.2 GiB.
"""

import array
import collections.abc
import contextlib
import hashlib
import io
import json
import mmap
import os
import struct
import tempfile
import time
import typing
import uuid

import zstandard

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.i18n import _
from virtav_nova.monitor import wire

FORMAT = 1
#: Most contents of each kind in a recording.
CONTENTS_MAX = 1 << 20
#: Most fetches in a recording.
FETCHES_MAX = 1 << 22

_SKIPPABLE = struct.Struct('<4sII')
_SKIPPABLE_MAGIC = b'\x50\x2a\x4d\x18'
_CHUNK_MAX = 1 << 20
#: What zstd needs at most for a chunk.
_FRAME_MAX = _CHUNK_MAX + (_CHUNK_MAX >> 8) + 1024
#: Records are gathered for so many bytes before they are packed.
_GATHER = 256 << 10
_LEVEL = 3
_LENGTH = struct.Struct('<I')
_HEAD_MAX = 16 << 10
_FETCH = struct.Struct('<QQQQQQQIBBH64sIII')
_END = struct.Struct('<Q')
_NONE = 0xffffffff
_NAME_MAX = 128
_FLAGS = wire.HOLD | wire.RESENT | wire.BEFORE | wire.AFTER


class Head(typing.NamedTuple):
    """Whose fetches they are.

    :param instance: UUID of the Nova instance.
    :param ram_size: bytes of guest RAM.
    :param policy: of the monitor while it was recorded.
    :param begun: seconds since 1970.
    :param program: what recorded it, with its version.
    """

    instance: uuid.UUID
    ram_size: int
    policy: wire.Policy
    begun: float
    program: str

    @classmethod
    def of(cls, hello: wire.Hello, program: str) -> 'Head':
        """Make the head of a recording that begins now.

        :param hello: of the session.
        :param program: that records it.
        """
        return cls(hello.instance, hello.ram_size, hello.policy, time.time(),
                   program)

    def pack(self) -> bytes:
        """:returns: the record."""
        data = json.dumps({
            'format': FORMAT, 'wire': wire.VERSION,
            'instance': str(self.instance), 'ram_size': self.ram_size,
            'policy': self.policy.name.lower(), 'begun': self.begun,
            'program': self.program}).encode()
        return b'H' + _LENGTH.pack(len(data)) + data

    @classmethod
    def unpack(cls, data: bytes) -> 'Head':
        """:raises ValueError: when it is none."""
        try:
            said = json.loads(data)
            if said['format'] != FORMAT:
                # The number is a stranger's.
                raise ValueError('it is of another format, %s' % (
                    text.printable(str(said['format']), _NAME_MAX)))
            ram_size, begun = said['ram_size'], said['begun']
            if not (isinstance(ram_size, int) and 0 <= ram_size < 1 << 64
                    and isinstance(begun, int | float)):
                raise TypeError
            return cls(
                uuid.UUID(said['instance']), ram_size,
                wire.Policy[said['policy'].upper()], float(begun),
                text.printable(str(said['program']), _NAME_MAX))
        except (KeyError, TypeError, AttributeError, OverflowError,
                RecursionError, UnicodeError,
                json.JSONDecodeError) as error:
            raise ValueError('its head is malformed') from error


class Fetch(typing.NamedTuple):
    """A page that was fetched; see :class:`wire.Request`.

    :param at: µs since the begin of the recording.
    :param block: name of the RAM block, at most 64 bytes.
    :param page: its bytes.
    :param before: the last 512 bytes of the page before, None for none.
    :param after: the first 512 bytes of the page after, None for none.
    :param number: of the page among the different ones, from 0.
    """

    at: int
    generation: int
    offset: int
    gpa: int
    gva: int
    rip: int
    cr3: int
    vcpu: int
    cpl: int
    flags: int
    block: bytes
    page: bytes
    before: bytes | None
    after: bytes | None
    number: int

    def request(self, number: int, tagger: wire.Tagger) -> wire.Request:
        """Ask for it again.

        :param number: the request's.
        :param tagger: with the key of the connection.
        """
        window = wire.window(self.page, self.before or b'', self.after or b'')
        return wire.Request(
            id=number, generation=self.generation, offset=self.offset,
            gpa=self.gpa, gva=self.gva, rip=self.rip, cr3=self.cr3,
            vcpu=self.vcpu, cpl=self.cpl, flags=self.flags & ~wire.RESENT,
            tag=tagger.tag(self.page), block=self.block,
            before_tag=wire.NO_TAG if self.before is None else tagger.tag(
                window[:wire.JUNCTION_SIZE]),
            after_tag=wire.NO_TAG if self.after is None else tagger.tag(
                window[-wire.JUNCTION_SIZE:]),
            window=window)


class FullError(Exception):
    """A recording takes no more."""


class Writer:
    """Writes a recording.

    :param file: to write to.
    :param head: of the recording.
    """

    def __init__(self, file: typing.BinaryIO, head: Head) -> None:
        self._file = file
        self._begun = time.monotonic_ns()
        self._packer = zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=True, write_content_size=True)
        self._gathered = io.BytesIO()
        # By hash: two pages with the same are made by nobody.
        self._pages: dict[bytes, int] = {}
        self._edges: dict[bytes, int] = {}
        #: How many there are by now.
        self.fetches = 0
        self._put(head.pack())
        self.flush()

    @property
    def pages(self) -> int:
        """How many different pages there are by now."""
        return len(self._pages)

    def add(self, request: wire.Request) -> None:
        """Write down a fetch.

        :param request: as it came.
        :raises FullError: when the recording has as many as it may have.
        :raises OSError: when it cannot be written.
        """
        if self.fetches >= FETCHES_MAX:
            raise FullError
        window = request.window
        at = (time.monotonic_ns() - self._begun) // 1000
        before = after = _NONE
        if request.flags & wire.BEFORE:
            before = self._content(b'E', self._edges, window[:wire.EDGE_SIZE])
        if request.flags & wire.AFTER:
            after = self._content(b'E', self._edges, window[-wire.EDGE_SIZE:])
        page = self._content(b'P', self._pages, request.page)
        self._put(b'F' + _FETCH.pack(
            at, request.generation, request.offset, request.gpa, request.gva,
            request.rip, request.cr3, request.vcpu, request.cpl,
            request.flags, 0, request.block, page, before, after))
        self.fetches += 1

    def flush(self) -> None:
        """Hand all that there is to the file.

        :raises OSError: when it cannot be written.
        """
        data = self._gathered.getvalue()
        if data:
            frame = self._packer.compress(data)
            self._file.write(
                _SKIPPABLE.pack(_SKIPPABLE_MAGIC, 4, len(frame)) + frame)
            self._gathered = io.BytesIO()
        self._file.flush()

    def close(self) -> None:
        """Write the end. The file stays open.

        :raises OSError: when it cannot be written.
        """
        self._put(b'Z' + _END.pack(self.fetches))
        self.flush()

    def _content(self, kind: bytes, known: dict[bytes, int],
                 content: bytes | memoryview) -> int:
        name = hashlib.sha256(content).digest()[:wire.TAG_SIZE]
        number = known.get(name)
        if number is None:
            number = len(known)
            if number >= CONTENTS_MAX:
                raise FullError
            known[name] = number
            self._put(kind + content)
        return number

    def _put(self, record: bytes) -> None:
        if self._gathered.tell() + len(record) > _GATHER:
            self.flush()
        self._gathered.write(record)


class _Store:
    """Items of one size, in a file without a name."""

    def __init__(self, size: int, most: int) -> None:
        self._size = size
        self._most = most
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._map: mmap.mmap | None = None
        self.count = 0

    def add(self, item: bytes) -> None:
        """:raises ValueError: when there are too many."""
        if self.count >= self._most:
            raise ValueError('it holds more than may be in a recording')
        self._file.write(item)
        self.count += 1

    def done(self) -> None:
        """Add no more."""
        self._file.flush()
        if self.count:
            self._map = mmap.mmap(self._file.fileno(), 0,
                                  access=mmap.ACCESS_READ)

    def get(self, number: int) -> bytes:
        """:param number: less than ``count``."""
        assert self._map is not None  # noqa: S101
        return self._map[number * self._size:(number + 1) * self._size]

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._file.close()


class Recording(collections.abc.Sequence[Fetch]):
    """A recording, its fetches in their order.

    :param path: of the file.
    :ivar head: :class:`Head`.
    :ivar damage: why it ends before its end, None when it is whole.
    :raises RecordingError: when nothing of it can be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.damage: str | None = None
        self._pages = _Store(wire.PAGE_SIZE, CONTENTS_MAX)
        self._edges = _Store(wire.EDGE_SIZE, CONTENTS_MAX)
        self._fetches = _Store(_FETCH.size, FETCHES_MAX)
        self._last = 0
        head = None
        try:
            with open(path, 'rb') as file:
                for record in _records(file):
                    if head is None:
                        if record[:1] != b'H':
                            raise ValueError('it has no head')
                        head = Head.unpack(record[1:])
                    elif not self._take(record):
                        break
                else:
                    raise ValueError('it was cut off')
                if file.read(1):
                    raise ValueError('something follows its end')
        except OSError as error:
            self.close()
            raise exception.RecordingError(
                _('%(path)s: %(error)s') % {
                    'path': path, 'error': error.strerror},
                _('name a recording that can be read')) from error
        except ValueError as error:
            self.damage = str(error)
        if head is None:
            self.close()
            raise exception.RecordingError(
                _('%(path)s: this is no recording: %(reason)s') % {
                    'path': path, 'reason': self.damage},
                _('name a file made by virtav-scan-worker record'))
        self.head = head
        for store in (self._pages, self._edges, self._fetches):
            store.done()

    def __len__(self) -> int:
        return self._fetches.count

    @typing.overload
    def __getitem__(self, number: int) -> Fetch: ...

    @typing.overload
    def __getitem__(self, number: slice) -> list[Fetch]: ...

    def __getitem__(self, number: int | slice) -> Fetch | list[Fetch]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        (at, generation, offset, gpa, gva, rip, cr3, vcpu, cpl, flags, _zero,
         block, page, before, after) = _FETCH.unpack(
             self._fetches.get(range(len(self))[number]))
        return Fetch(
            at, generation, offset, gpa, gva, rip, cr3, vcpu, cpl, flags,
            block.rstrip(b'\0'), self._pages.get(page),
            None if before == _NONE else self._edges.get(before),
            None if after == _NONE else self._edges.get(after), page)

    @property
    def pages(self) -> int:
        """How many different pages there are."""
        return self._pages.count

    def page(self, number: int) -> bytes:
        """Take one of the different pages.

        :param number: less than :attr:`pages`.
        """
        return self._pages.get(number)

    def repeats(self) -> int:
        """:returns: fetches of a page that had been fetched before."""
        seen = array.array('B', bytes(self._pages.count))
        for fetch in self:
            seen[fetch.number] = 1
        return len(self) - sum(seen)

    def close(self) -> None:
        """Give back what it takes."""
        for store in (self._pages, self._edges, self._fetches):
            store.close()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _take(self, record: bytes) -> bool:
        """Take a record but for the head.

        :returns: False when it is the end.
        :raises ValueError: when it is malformed.
        """
        kind, body = record[:1], record[1:]
        if kind == b'P':
            self._pages.add(body)
        elif kind == b'E':
            self._edges.add(body)
        elif kind == b'F':
            self._check(body)
            self._fetches.add(body)
        elif kind == b'Z':
            if _END.unpack(body)[0] != len(self):
                raise ValueError('fetches are missing')
            return False
        else:
            raise ValueError('it has two heads')
        return True

    def _check(self, body: bytes) -> None:
        """:raises ValueError: when no monitor would ask for that."""
        (at, _generation, offset, _gpa, _gva, _rip, _cr3, _vcpu, cpl, flags,
         zero, block, page, before, after) = _FETCH.unpack(body)
        if (zero or cpl > 3 or flags & ~_FLAGS or offset % wire.PAGE_SIZE
                or at < self._last or 0 in block.rstrip(b'\0')
                or page >= self._pages.count):
            raise ValueError('a fetch is malformed')
        for flag, number in ((wire.BEFORE, before), (wire.AFTER, after)):
            if number >= self._edges.count if flags & flag else (
                    number != _NONE):
                raise ValueError('a fetch is malformed')
        self._last = at


def _chunks(file: typing.BinaryIO) -> collections.abc.Iterator[bytes]:
    """Read the chunks of a recording.

    :raises ValueError: at damage.
    """
    unpacker = zstandard.ZstdDecompressor()
    while data := file.read(_SKIPPABLE.size):
        if len(data) < _SKIPPABLE.size:
            raise ValueError('it was cut off')
        magic, length, size = _SKIPPABLE.unpack(data)
        if magic != _SKIPPABLE_MAGIC or length != 4 or size > _FRAME_MAX:
            raise ValueError('a chunk is malformed')
        frame = file.read(size)
        if len(frame) < size:
            raise ValueError('it was cut off')
        try:
            # As many bytes are asked for as a frame says that it holds.
            said = zstandard.frame_content_size(frame)
            if not 0 < said <= _CHUNK_MAX:
                raise ValueError('a chunk is malformed')
            yield unpacker.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError('a chunk is damaged') from error


def _records(file: typing.BinaryIO) -> collections.abc.Iterator[bytes]:
    """Read the records of a recording up to the last one.

    :returns: each with the byte for its kind; a head without its length.
    :raises ValueError: at damage.
    """
    sizes = {b'P': wire.PAGE_SIZE, b'E': wire.EDGE_SIZE, b'F': _FETCH.size,
             b'Z': _END.size}
    for chunk in _chunks(file):
        start = 0
        while start < len(chunk):
            kind = chunk[start:start + 1]
            start += 1
            if kind == b'H':
                with contextlib.suppress(struct.error):
                    length, = _LENGTH.unpack_from(chunk, start)
                    sizes[kind] = min(length, _HEAD_MAX)
                start += _LENGTH.size
            if kind not in sizes:
                raise ValueError('a record is of an unknown kind')
            end = start + sizes[kind]
            if end > len(chunk):
                raise ValueError('a record is cut off')
            yield kind + chunk[start:end]
            start = end
