# SPDX-License-Identifier: Apache-2.0
"""Frames between the page-fetch monitor of QEMU and the scan worker.

The protocol is specified in ``docs/interop/page-fetch-monitor.rst`` of the
QEMU series. QEMU is the client on a UNIX stream socket. Integers are
little-endian and nothing is padded. Every frame starts with a header of 16
bytes: magic, u16 version, u16 type, u32 length of what follows, u32 zero.

Frames are named tuples because they are made once for every page that a
guest fetches: a frozen dataclass costs three times as much to fill.
"""

import collections.abc
import enum
import hashlib
import hmac
import mmap
import struct
import typing
import uuid

from virtav_nova import text

MAGIC = b'VAPF'
VERSION = 1
PAGE_SIZE = 4096
KEY_SIZE = 32
TAG_SIZE = 16
TOKEN_SIZE = 32
#: Bytes of a page that a junction takes, from each side.
EDGE_SIZE = 512
#: A junction: the end of a virtual page and the begin of the next.
JUNCTION_SIZE = 2 * EDGE_SIZE
#: A page between the edges of its virtual neighbours.
WINDOW_SIZE = PAGE_SIZE + 2 * EDGE_SIZE
#: Guest physical address of a page whose address is not known.
UNKNOWN_GPA = (1 << 64) - 1

#: HELLO flag: QEMU takes shared memory.
SHARED = 1
#: HELLO flag: QEMU answers READ.
READ = 2
#: WELCOME flag: the verdict table comes along, as a file descriptor.
TABLE = 1
#: WELCOME flag: a ring comes along, as three file descriptors.
RING = 2
#: Fewest and most entries of a verdict table.
TABLE_ENTRIES = (4, 1 << 26)
#: Fewest and most slots of a ring; one is for READ and PAGE.
RING_SLOTS = (2, 1 << 10)

#: Request flag: a vCPU waits for the verdict.
HOLD = 1
#: Request flag: asked before, on a connection that was lost.
RESENT = 2
#: Request flag: the virtual neighbour before the page is mapped to RAM.
BEFORE = 4
#: Request flag: the virtual neighbour after the page is mapped to RAM.
AFTER = 8

#: Tag where there is none, and token of who has none.
NO_TAG = bytes(TAG_SIZE)
NO_TOKEN = bytes(TOKEN_SIZE)

HEADER_SIZE = 16

_HEADER = struct.Struct('<4sHHII')
_HELLO = struct.Struct('<HHI16sQIIIII12s32s')
_WELCOME = struct.Struct('<HHI32s32sQIIQ')
_REQUEST = struct.Struct('<QQQQQQQIBBH16s64s16s16s')
_VERDICT = struct.Struct('<QQ16sII88s')
_REFUSED = struct.Struct('<II120s')
_READ = struct.Struct('<QQQ')
_PAGE = struct.Struct('<QQII')

_FLAGS = HOLD | RESENT | BEFORE | AFTER
_UNUSED = bytes(12)

# One byte less than the field, so that a reader in C finds a NUL.
_RULE_MAX = 87
_REASON_MAX = 119


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


class Policy(enum.IntEnum):
    """What QEMU does with a fetched page until the verdict comes."""

    REPORT = 0
    ENFORCE = 1


class OnMatch(enum.IntEnum):
    """What QEMU does with a page that matched."""

    ALERT = 0
    BLOCK = 1
    PAUSE = 2
    STOP = 3


class OnTimeout(enum.IntEnum):
    """What QEMU does with a page whose verdict does not come in time."""

    ALLOW = 0
    DENY = 1


class Result(enum.IntEnum):
    """What the worker found; UNKNOWN: the scan failed or timed out."""

    CLEAN = 0
    MATCH = 1
    UNKNOWN = 2


class Refusal(enum.IntEnum):
    """Why the worker does not go on with a connection.

    RELOAD: the rules changed, QEMU is to connect again at once. TOKEN: the
    peer is not the instance that it says it is.
    """

    VERSION = 1
    PAGE_SIZE = 2
    OVERLOAD = 3
    PROTOCOL = 4
    RELOAD = 5
    TOKEN = 6


class Status(enum.IntEnum):
    """What came of a READ; ABSENT: there is no RAM."""

    OK = 0
    ABSENT = 1


_Enum = typing.TypeVar('_Enum', bound=enum.IntEnum)


def _choice(kind: type[_Enum], value: int) -> _Enum:
    try:
        return kind(value)
    except ValueError:
        raise ProtocolError(
            f'{value} is not a value of {kind.__name__}') from None


def _zero(reserved: int) -> None:
    if reserved:
        raise ProtocolError('reserved bytes are not zero')


def _unpad(field: bytes) -> bytes:
    """Take the NUL padding off a text field.

    :param field: all bytes of the field.
    :returns: the text, without any NUL.
    :raises ProtocolError: when something follows the first NUL.
    """
    content = field.rstrip(b'\0')
    if 0 in content:
        raise ProtocolError('text field holds bytes after its end')
    return content


def _ascii(field: bytes) -> str:
    content = _unpad(field).decode('latin-1')
    if not content.isascii() or not content.isprintable():
        raise ProtocolError('text field is not printable ASCII')
    return content


def _size_of(name: str, value: int, given: int, bounds: tuple[int, int]
             ) -> None:
    """Check the size of shared memory.

    :param given: not zero when there is any.
    :raises ProtocolError: when it is not a power of two within the bounds;
        without memory it has to be zero.
    """
    least, most = bounds
    if (value & (value - 1) or not least <= value <= most) if given else value:
        raise ProtocolError(f'{value} is no number of {name}')


def page_tag(key: bytes, page: bytes | memoryview) -> bytes:
    """Compute the keyed tag that names a page or a junction by its content.

    :param key: the tag key of the connection's WELCOME, 32 bytes.
    :param page: the bytes of the page, or of the junction.
    :returns: the first 16 bytes of HMAC-SHA-256.
    """
    return hmac.digest(key, page, 'sha256')[:TAG_SIZE]


class Tagger:
    """Computes :func:`page_tag` of many pages with one key, in less time.

    The two SHA-256 of HMAC (RFC 2104) begin with a block made of the key.
    They are begun here once.

    :param key: as in :func:`page_tag`.
    """

    def __init__(self, key: bytes) -> None:
        block = key.ljust(hashlib.sha256().block_size, b'\0')
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5c for byte in block))

    def tag(self, page: bytes | memoryview) -> bytes:
        """:returns: what :func:`page_tag` gives for the page."""
        inner = self._inner.copy()
        inner.update(page)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()[:TAG_SIZE]


def window(page: bytes, before: bytes = b'', after: bytes = b'') -> bytes:
    """Put the window of a request together.

    :param page: 4096 bytes.
    :param before: the last 512 bytes of the virtual page before, or nothing.
    :param after: the first 512 bytes of the virtual page after, or nothing.
    """
    return (before.ljust(EDGE_SIZE, b'\0') + page
            + after.ljust(EDGE_SIZE, b'\0'))


class Hello(typing.NamedTuple):
    """QEMU names itself, the instance and its policy.

    :param instance: UUID of the Nova instance.
    :param page_size: bytes; the worker takes 4096 only.
    :param ram_size: bytes of guest RAM.
    :param deadline_ms: longest hold of one fetch, in ms.
    :param flags: :data:`SHARED` and :data:`READ`.
    :param token: secret of the instance, 32 bytes; :data:`NO_TOKEN` for
        none. Never to be shown.
    """

    version_min: int
    version_max: int
    page_size: int
    instance: uuid.UUID
    ram_size: int
    policy: Policy
    on_match: OnMatch
    on_timeout: OnTimeout
    deadline_ms: int
    flags: int = 0
    token: bytes = NO_TOKEN

    def pack(self) -> bytes:
        """:returns: the frame, header included."""
        return _HEADS[Hello] + _HELLO.pack(
            self.version_min, self.version_max, self.page_size,
            self.instance.bytes, self.ram_size, self.policy, self.on_match,
            self.on_timeout, self.deadline_ms, self.flags, _UNUSED,
            self.token)

    @classmethod
    def unpack(cls, data: memoryview) -> 'Hello':
        """:raises ProtocolError: on a value that is not allowed."""
        (low, high, page_size, instance, ram_size, policy, on_match,
         on_timeout, deadline_ms, flags, reserved, token) = (
             _HELLO.unpack(data))
        _zero(any(reserved))
        if flags > SHARED | READ:
            raise ProtocolError('flags of HELLO out of range')
        if not 1 <= low <= high:
            raise ProtocolError(f'versions {low} to {high} are no range')
        return cls(low, high, page_size, uuid.UUID(bytes=instance), ram_size,
                   _choice(Policy, policy), _choice(OnMatch, on_match),
                   _choice(OnTimeout, on_timeout), deadline_ms, flags, token)


class Welcome(typing.NamedTuple):
    """The worker takes the session.

    :param version: the protocol version of all that follows.
    :param max_in_flight: most requests that may be unanswered at a time.
    :param digest: rule-set digest, 32 bytes.
    :param key: tag key, 32 bytes; see :func:`page_tag`.
    :param epoch: grows with each rule set that comes into force.
    :param table_entries: of the verdict table that comes along, 0 for none.
    :param ring_slots: of the ring that comes along, 0 for none.
    """

    version: int
    max_in_flight: int
    digest: bytes
    key: bytes
    epoch: int
    table_entries: int = 0
    ring_slots: int = 0

    def pack(self) -> bytes:
        """:returns: the frame, header included."""
        return _HEADS[Welcome] + _WELCOME.pack(
            self.version,
            bool(self.table_entries) * TABLE | bool(self.ring_slots) * RING,
            self.max_in_flight, self.digest, self.key, self.epoch,
            self.table_entries, self.ring_slots, 0)

    @classmethod
    def unpack(cls, data: memoryview) -> 'Welcome':
        """:raises ProtocolError: on a value that is not allowed."""
        (version, flags, in_flight, digest, key, epoch, entries, slots,
         reserved) = _WELCOME.unpack(data)
        _zero(reserved)
        if version != VERSION or not in_flight or flags > TABLE | RING:
            raise ProtocolError(
                'version, flags or max_in_flight of WELCOME out of range')
        _size_of('table entries', entries, flags & TABLE, TABLE_ENTRIES)
        _size_of('ring slots', slots, flags & RING, RING_SLOTS)
        return cls(version, in_flight, digest, key, epoch, entries, slots)


class Request(typing.NamedTuple):
    """A verdict is asked for, with the bytes of the page.

    :param generation: of the page, given back in the verdict.
    :param offset: of the page in its RAM block, in bytes.
    :param gpa: guest physical address, :data:`UNKNOWN_GPA` if not known.
    :param cpl: privilege level of the fetch, 0 to 3.
    :param flags: :data:`HOLD`, :data:`RESENT`, :data:`BEFORE` and
        :data:`AFTER`.
    :param block: name of the RAM block, at most 64 bytes, without NUL.
    :param before_tag: tag of the junction before; :data:`NO_TAG` without one.
    :param after_tag: tag of the junction after; :data:`NO_TAG` without one.
    :param window: 5120 bytes, see :func:`window`. A decoder gives a view of
        its own buffer, which holds them until more is received.
    """

    id: int
    generation: int
    offset: int
    gpa: int
    gva: int
    rip: int
    cr3: int
    vcpu: int
    cpl: int
    flags: int
    tag: bytes
    block: bytes
    before_tag: bytes
    after_tag: bytes
    window: bytes | memoryview

    @property
    def page(self) -> bytes | memoryview:
        """The page alone, 4096 bytes."""
        return self.window[EDGE_SIZE:EDGE_SIZE + PAGE_SIZE]

    @property
    def junction_before(self) -> bytes | memoryview:
        """The junction with the virtual page before, 1024 bytes."""
        return self.window[:JUNCTION_SIZE]

    @property
    def junction_after(self) -> bytes | memoryview:
        """The junction with the virtual page after, 1024 bytes."""
        return self.window[PAGE_SIZE:]

    def pack(self) -> bytes:
        """:returns: the frame, header included."""
        return b''.join((_HEADS[Request], _REQUEST.pack(
            self.id, self.generation, self.offset, self.gpa, self.gva,
            self.rip, self.cr3, self.vcpu, self.cpl, self.flags, 0, self.tag,
            self.block, self.before_tag, self.after_tag), self.window))

    @classmethod
    def unpack(cls, data: memoryview) -> 'Request':
        """:raises ProtocolError: on a value that is not allowed."""
        (number, generation, offset, gpa, gva, rip, cr3, vcpu, cpl, flags,
         reserved, tag, block, before_tag, after_tag) = (
             _REQUEST.unpack_from(data))
        if reserved or cpl > 3 or flags > _FLAGS or offset % PAGE_SIZE:
            raise ProtocolError(
                'reserved, cpl, flags or offset of a request out of range')
        if ((before_tag != NO_TAG and not flags & BEFORE)
                or (after_tag != NO_TAG and not flags & AFTER)):
            raise ProtocolError('a tag of a junction that is not there')
        return cls(number, generation, offset, gpa, gva, rip, cr3, vcpu, cpl,
                   flags, tag, _unpad(block), before_tag, after_tag,
                   data[_REQUEST.size:])


class Verdict(typing.NamedTuple):
    """The answer to one request.

    :param id: of the request.
    :param generation: of the request.
    :param tag: computed by the worker from the bytes that it scanned.
    :param rule: what matched, printable ASCII; empty unless matched.
    """

    id: int
    generation: int
    tag: bytes
    result: int
    rule: str

    def pack(self) -> bytes:
        """:returns: the frame, header included; a long name is cut."""
        rule = (text.printable(self.rule, _RULE_MAX).encode()
                if self.rule else b'')
        return _HEADS[Verdict] + _VERDICT.pack(
            self.id, self.generation, self.tag, self.result, 0, rule)

    @classmethod
    def unpack(cls, data: memoryview) -> 'Verdict':
        """:raises ProtocolError: on a value that is not allowed."""
        number, generation, tag, value, reserved, rule = _VERDICT.unpack(data)
        _zero(reserved)
        result = _choice(Result, value)
        name = _ascii(rule)
        if name and result != Result.MATCH:
            raise ProtocolError('a rule is named but nothing matched')
        return cls(number, generation, tag, result, name)


def clean(number: int, generation: int, tag: bytes) -> bytes:
    """Pack what most verdicts are, in less time.

    :param number: of the request.
    :param generation: of the request.
    :param tag: of the page, which is clean.
    :returns: the frame, header included.
    """
    return _CLEAN_HEAD + _VERDICT.pack(number, generation, tag, 0, 0, b'')


class Refused(typing.NamedTuple):
    """The worker ends the connection.

    :param reason: for people, printable ASCII.
    """

    code: Refusal
    reason: str

    def pack(self) -> bytes:
        """:returns: the frame, header included; a long reason is cut."""
        return _HEADS[Refused] + _REFUSED.pack(
            self.code, 0, text.printable(self.reason, _REASON_MAX).encode())

    @classmethod
    def unpack(cls, data: memoryview) -> 'Refused':
        """:raises ProtocolError: on a value that is not allowed."""
        code, reserved, reason = _REFUSED.unpack(data)
        _zero(reserved)
        return cls(_choice(Refusal, code), _ascii(reason))


class Read(typing.NamedTuple):
    """The worker asks for a page of guest RAM.

    :param id: given back in the answer.
    :param gpa: guest physical address, a multiple of 4096.
    """

    id: int
    gpa: int

    def pack(self) -> bytes:
        """:returns: the frame, header included."""
        return _HEADS[Read] + _READ.pack(self.id, self.gpa, 0)

    @classmethod
    def unpack(cls, data: memoryview) -> 'Read':
        """:raises ProtocolError: on a value that is not allowed."""
        number, gpa, reserved = _READ.unpack(data)
        _zero(reserved)
        if gpa % PAGE_SIZE:
            raise ProtocolError('address of READ within a page')
        return cls(number, gpa)


class Page(typing.NamedTuple):
    """The answer to one READ.

    :param id: of the READ.
    :param gpa: of the READ.
    :param content: 4096 bytes; zeros unless the status is OK. A decoder
        gives a view of its own buffer.
    """

    id: int
    gpa: int
    status: Status
    content: bytes | memoryview

    def pack(self) -> bytes:
        """:returns: the frame, header included."""
        return b''.join((_HEADS[Page], _PAGE.pack(
            self.id, self.gpa, self.status, 0), self.content))

    @classmethod
    def unpack(cls, data: memoryview) -> 'Page':
        """:raises ProtocolError: on a value that is not allowed."""
        number, gpa, status, reserved = _PAGE.unpack_from(data)
        _zero(reserved)
        return cls(number, gpa, _choice(Status, status), data[_PAGE.size:])


Frame: typing.TypeAlias = (
    Hello | Welcome | Request | Verdict | Refused | Read | Page)

_TYPES: dict[type[Frame], tuple[int, int]] = {
    Hello: (1, _HELLO.size),
    Welcome: (2, _WELCOME.size),
    Request: (3, _REQUEST.size + WINDOW_SIZE),
    Verdict: (4, _VERDICT.size),
    Refused: (5, _REFUSED.size),
    Read: (6, _READ.size),
    Page: (7, _PAGE.size + PAGE_SIZE),
}
_HEADS = {kind: _HEADER.pack(MAGIC, VERSION, number, length, 0)
          for kind, (number, length) in _TYPES.items()}

_CLEAN_HEAD = _HEADS[Verdict]

#: Bytes of a REQUEST, header included.
REQUEST_SIZE = HEADER_SIZE + _TYPES[Request][1]
#: Bytes of a VERDICT, header included.
VERDICT_SIZE = HEADER_SIZE + _TYPES[Verdict][1]

def _blame(header: bytes, accepts: collections.abc.Iterable[type[Frame]]
           ) -> str:
    """:returns: what is wrong with a header that is not as expected."""
    magic, version, number, length, reserved = _HEADER.unpack(header)
    if magic != MAGIC:
        return f'magic is {magic.hex()}'
    if version != VERSION:
        return f'version {version} was not agreed on'
    accepted = dict(_TYPES[kind] for kind in accepts)
    if number not in accepted:
        return f'frame type {number} is not allowed here'
    if length != accepted[number]:
        return f'length {length} does not fit frame type {number}'
    return f'reserved header field is {reserved}'


def whole(data: bytes, *kinds: type[Frame]) -> Frame:
    """Decode a frame that is there as a whole, as out of a ring.

    :param data: at least as many bytes as the frame has, header included.
    :param kinds: that it may be of, the likely one first.
    :raises ProtocolError: when it is malformed, or of another kind.
    """
    for kind in kinds:
        if data.startswith(_HEADS[kind]):
            return kind.unpack(memoryview(data)[
                HEADER_SIZE:HEADER_SIZE + _TYPES[kind][1]])
    raise ProtocolError(_blame(data[:HEADER_SIZE], kinds))


class Decoder:
    """Turns the bytes of a stream into frames, in a buffer of fixed size.

    The owner receives into :meth:`room`, says how much it was with
    :meth:`filled` and then takes frames until there is none.

    :param accepts: the kinds of frame that the peer may send now.
    :param frames: how many frames of the largest kind the buffer holds.
    """

    def __init__(self, accepts: collections.abc.Iterable[type[Frame]],
                 frames: int = 1) -> None:
        # All of a header follows from the type, so a good one is one of a
        # few known strings and needs no parsing.
        self._kinds = {
            _HEADS[kind]: (kind, HEADER_SIZE + _TYPES[kind][1])
            for kind in accepts}
        self._largest = max(size for _, size in self._kinds.values())
        # Memory that is never received into is never used.
        self._view = memoryview(mmap.mmap(-1, frames * self._largest))
        self._start = 0
        self._end = 0

    @property
    def held(self) -> int:
        """Bytes received and not yet taken as frames."""
        return self._end - self._start

    def room(self) -> memoryview:
        """Give the free part of the buffer.

        :returns: where the next received bytes go, empty when full; good
            until the next call. Pages of earlier requests are lost.
        """
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._view) - self._end < self._largest:
            held = self.held
            self._view[:held] = self._view[self._start:self._end]
            self._start, self._end = 0, held
        return self._view[self._end:]

    def filled(self, count: int) -> None:
        """Count bytes that were received into :meth:`room`.

        :param count: how many.
        """
        self._end += count

    def frame(self) -> Frame | None:
        """Take the next frame.

        :returns: the frame, or None while it is not complete.
        :raises ProtocolError: when the stream is malformed. It cannot be
            used further.
        """
        start = self._start
        body = start + HEADER_SIZE
        if self._end < body:
            return None
        header = bytes(self._view[start:body])
        found = self._kinds.get(header)
        if found is None:
            raise ProtocolError(_blame(
                header, (kind for kind, _size in self._kinds.values())))
        kind, size = found
        end = start + size
        if self._end < end:
            return None
        self._start = end
        return kind.unpack(self._view[body:end])
