# SPDX-License-Identifier: Apache-2.0
"""Guest addresses as the guest's own page tables map them (x86).

The formats are those of the Intel SDM, volume 3A, chapter 4. The tables are
read out of the guest's RAM page by page, so everything here is a generator:
it yields the guest physical address of a page that it wants to see, and is
sent the bytes of that page, or None when there is no RAM.

The tables belong to the guest and may be anything. Each walk goes down a
fixed number of levels, so a loop in them ends like every walk does, and a
table is read once however many entries point to it; how many pages are read
at all is bounded by the caller.

What cannot be known from outside is which format is in force, as the control
registers are not told. It follows from an address whose translation *is*
known: the one of the fetch. See :func:`find_mode`.
"""

import collections.abc
import enum
import typing

PAGE_SIZE = 4096

_T = typing.TypeVar('_T')

#: Yields guest physical addresses, is sent pages, returns something.
Reads: typing.TypeAlias = collections.abc.Generator[
    int, bytes | memoryview | None, _T]

_PRESENT = 1
_WRITABLE = 1 << 1
_USER = 1 << 2
_LARGE = 1 << 7
_NO_EXECUTE = 1 << 63
#: Bits of an entry of eight bytes that hold an address.
_ADDRESS = (1 << 52) - PAGE_SIZE
_LOW_ADDRESS = (1 << 32) - PAGE_SIZE


class Mode(enum.Enum):
    """A format of page tables.

    A value holds, from the root to the leaves, the lowest address bit that
    each level decodes; and the bytes of an entry.
    """

    #: 64-bit, four levels.
    LONG4 = ((39, 30, 21, 12), 8)
    #: 64-bit, five levels.
    LONG5 = ((48, 39, 30, 21, 12), 8)
    #: 32-bit with entries of eight bytes; the root has four of them.
    PAE = ((30, 21, 12), 8)
    #: 32-bit with entries of four bytes.
    LEGACY = ((22, 12), 4)
    #: No paging.
    FLAT = ((), 0)

    def __init__(self, shifts: tuple[int, ...], width: int) -> None:
        self.shifts = shifts
        self.width = width
        self.address_bits = {4: 48, 5: 57}.get(len(shifts), 32)

    def covers(self, gva: int) -> bool:
        """:returns: whether an address can be one of this mode's."""
        if self.address_bits == 32:
            return gva < 1 << 32
        return gva == canonical(gva, self.address_bits)

    def half(self, gva: int) -> tuple[int, int]:
        """:returns: first and last of all addresses of the same sign."""
        if self.address_bits == 32:
            return 0, (1 << 32) - 1
        size = 1 << (self.address_bits - 1)
        return ((1 << 64) - size, (1 << 64) - 1) if gva >> 63 else (
            0, size - 1)


class Leaf(typing.NamedTuple):
    """One page of 4096 bytes that is mapped, maybe as part of a larger one.

    :param gva: page aligned.
    :param gpa: page aligned.
    :param user: user mode can reach it.
    :param executable: as far as the tables tell: what EFER and CR4 switch
        off is not known here.
    """

    gva: int
    gpa: int
    user: bool
    writable: bool
    executable: bool


class ExhaustedError(Exception):
    """More pages would have to be read than allowed."""


def canonical(address: int, bits: int = 48) -> int:
    """Extend the sign of an address to 64 bits.

    :param bits: that count.
    """
    address &= (1 << bits) - 1
    if address >> (bits - 1):
        address |= (1 << 64) - (1 << bits)
    return address


class Tables:
    """The tables of one address space, as they are read.

    What was read is kept, so that pages near to each other cost one look. It
    is a snapshot of no certain moment: the guest goes on meanwhile.

    :param mode: their format.
    :param cr3: where they begin; low bits that are no address are ignored.
    :param reads: most tables to be read.
    """

    def __init__(self, mode: Mode, cr3: int, reads: int) -> None:
        self.mode = mode
        self._left = reads
        self._pages: dict[int, bytes | memoryview | None] = {}
        if mode is Mode.PAE:
            self._root = cr3 & (1 << 32) - 32
        elif mode is Mode.LEGACY:
            self._root = cr3 & _LOW_ADDRESS
        else:
            self._root = cr3 & _ADDRESS

    def translate(self, gva: int) -> Reads[Leaf | None]:
        """Find the page at an address.

        :param gva: any address.
        :returns: None when nothing is mapped there.
        :raises ExhaustedError: when too many tables were read.
        """
        gva &= -PAGE_SIZE
        found = yield from self.mapped(gva, gva, 1)
        return found[0] if found else None

    def mapped(self, first: int, last: int, most: int) -> Reads[list[Leaf]]:
        """List the mapped pages of a range.

        :param first: lowest address.
        :param last: highest address.
        :param most: pages to be listed.
        :returns: in the order of their addresses.
        :raises ExhaustedError: when too many tables were read.
        """
        first &= -PAGE_SIZE
        found: list[Leaf] = []
        if not self.mode.shifts:
            return [Leaf(gva, gva, True, True, True) for gva in range(
                first, last + 1, PAGE_SIZE)[:most]]
        if not self.mode.covers(first) or not self.mode.covers(last):
            return found
        # Compared without the sign that fills the upper bits.
        mask = (1 << self.mode.address_bits) - 1
        yield from self._list(self._root, 0, 0, first & mask, last & mask,
                              most, _USER | _WRITABLE, found)
        return found

    def _list(self, table: int, level: int, base: int, first: int, last: int,
              most: int, rights: int, found: list[Leaf]) -> Reads[None]:
        """List the pages that one table leads to.

        :param table: its guest physical address.
        :param base: of the addresses that it decodes.
        :param rights: that all levels above give; the bit of no-execute is
            set once one of them sets it.
        """
        shift = self.mode.shifts[level]
        entries = self._entries(level)
        lowest = max(first - base, 0) >> shift
        highest = min((last - base) >> shift, entries - 1)
        page = yield from self._read(table)
        if page is None:
            return
        width = self.mode.width
        start = table % PAGE_SIZE
        for index in range(lowest, highest + 1):
            at = start + index * width
            entry = int.from_bytes(page[at:at + width], 'little')
            if not entry & _PRESENT:
                continue
            below = base + (index << shift)
            if self.mode is Mode.PAE and not level:
                inner = rights  # These entries hold no rights.
            else:
                inner = (rights & entry & (_USER | _WRITABLE)
                         | (rights | entry) & _NO_EXECUTE)
            if shift == 12 or self._large(level, entry):
                self._leaves(entry, shift, below, first, last, most, inner,
                             found)
            else:
                yield from self._list(
                    self._address(entry), level + 1, below, first, last,
                    most, inner, found)
            if len(found) >= most:
                return

    def _entries(self, level: int) -> int:
        if self.mode is Mode.PAE and not level:
            return 4
        return PAGE_SIZE // self.mode.width

    def _large(self, level: int, entry: int) -> bool:
        """:returns: whether an entry above the last level maps a page."""
        if not entry & _LARGE:
            return False
        # CR4.PSE is not known; every system of the last decades sets it.
        return self.mode.shifts[level] in (
            (22,) if self.mode is Mode.LEGACY else
            (21,) if self.mode is Mode.PAE else (21, 30))

    def _address(self, entry: int) -> int:
        return entry & (_LOW_ADDRESS if self.mode is Mode.LEGACY
                        else _ADDRESS)

    def _leaves(self, entry: int, shift: int, base: int, first: int,
                last: int, most: int, rights: int, found: list[Leaf]) -> None:
        """Add the pages that an entry maps, as far as they are wanted."""
        gpa = self._address(entry) & -(1 << shift)
        if shift == 22:
            gpa |= (entry >> 13 & 0xff) << 32  # PSE-36
        size = 1 << shift
        lowest = max(first, base)
        for gva in range(lowest, min(last + 1, base + size), PAGE_SIZE):
            if len(found) >= most:
                return
            bits = self.mode.address_bits
            found.append(Leaf(
                gva if bits == 32 else canonical(gva, bits),
                gpa + gva - base, bool(rights & _USER),
                bool(rights & _WRITABLE), not rights & _NO_EXECUTE))

    def _read(self, table: int) -> Reads[bytes | memoryview | None]:
        """:returns: the page that a table is in."""
        gpa = table & -PAGE_SIZE
        if gpa not in self._pages:
            if not self._left:
                raise ExhaustedError
            self._left -= 1
            self._pages[gpa] = yield gpa
        return self._pages[gpa]


def find_mode(cr3: int, gva: int, gpa: int, reads: int,
              likely: Mode | None = None) -> Reads[Tables | None]:
    """Find out which format of page tables is in force.

    :param cr3: of the processor.
    :param gva: an address that is mapped now.
    :param gpa: where it is mapped to, page aligned.
    :param reads: most tables to be read for each mode.
    :param likely: the mode to try first.
    :returns: tables of the first mode that maps the address so; None when
        none does.
    """
    modes = [mode for mode in Mode if mode.covers(gva) or mode is Mode.FLAT]
    if likely in modes:
        modes.remove(likely)
        modes.insert(0, likely)
    for mode in modes:
        tables = Tables(mode, cr3, reads)
        try:
            leaf = yield from tables.translate(gva)
        except ExhaustedError:
            continue
        if leaf is not None and leaf.gpa == gpa:
            return tables
    return None
