# SPDX-License-Identifier: Apache-2.0
"""Memory of a guest with page tables in it, without a guest."""

import random

from virtav_nova.worker import paging

PAGE = paging.PAGE_SIZE
_PRESENT, _WRITABLE, _USER, _LARGE = 1, 2, 4, 128


class Memory:
    """RAM whose pages are handed out in no order.

    :param seed: of that order
    :param frames: pages of RAM
    :ivar reads: addresses that were read, in order
    """

    def __init__(self, seed=0, frames=1 << 16):
        self.pages = {}
        self.reads = []
        self._random = random.Random(seed)
        self._frames = frames

    def allocate(self, content=b''):
        """Take a page of RAM.

        :returns: its address
        """
        while True:
            gpa = self._random.randrange(1, self._frames) * PAGE
            if gpa not in self.pages:
                self.pages[gpa] = bytearray(content.ljust(PAGE, b'\0'))
                return gpa

    def write(self, gpa, value, width):
        """Write an integer."""
        page = self.pages[gpa & -PAGE]
        page[gpa % PAGE:gpa % PAGE + width] = value.to_bytes(width, 'little')

    def read(self, gpa):
        """A page; None where there is no RAM."""
        assert gpa % PAGE == 0
        self.reads.append(gpa)
        page = self.pages.get(gpa)
        return None if page is None else bytes(page)

    def drive(self, generator):
        """Answer what a generator wants to read.

        :returns: what it returns
        """
        answer = None
        while True:
            try:
                wanted = generator.send(answer)
            except StopIteration as end:
                return end.value
            answer = None if wanted is None else self.read(wanted)


class Space:
    """An address space.

    :param memory: that it lies in
    :param mode: of its page tables
    """

    def __init__(self, memory, mode=paging.Mode.LONG4):
        self.memory = memory
        self.mode = mode
        self.cr3 = memory.allocate() if mode.shifts else 0

    def map(self, gva, content=b'', gpa=None, size=PAGE, user=True,
            writable=True, executable=True):
        """Map a page, in new RAM unless its address is given.

        :param size: of a large page
        :returns: its guest physical address
        """
        if gpa is None:
            gpa = self.memory.allocate(content)
        flags = (_PRESENT | _WRITABLE * writable | _USER * user
                 | (0 if executable else 1 << 63))
        entry = self.entry(gva, size)
        if size > PAGE:
            flags |= _LARGE
            # PSE-36
            self.set(entry, gpa & 0xffffffff | gpa >> 32 << 13 | flags
                     if self.mode is paging.Mode.LEGACY else gpa | flags)
        else:
            self.set(entry, gpa | flags)
        return gpa

    def unmap(self, gva):
        """Unmap a page."""
        self.set(self.entry(gva), 0)

    def set(self, entry, value):
        """Write an entry."""
        self.memory.write(entry, value, self.mode.width)

    def entry(self, gva, size=PAGE):
        """Where the entry is that maps an address; makes the tables."""
        mode = self.mode
        table = self.cr3
        bits = 9 if mode.width == 8 else 10
        for shift in mode.shifts:
            at = table + (gva >> shift & (1 << bits) - 1) * mode.width
            if size == 1 << shift:
                return at
            page = self.memory.pages[at & -PAGE]
            offset = at % PAGE
            value = int.from_bytes(page[offset:offset + mode.width],
                                   'little')
            if not value & _PRESENT:
                inner = self.memory.allocate()
                top = mode is paging.Mode.PAE and shift == 30
                value = inner | _PRESENT | (0 if top else _WRITABLE | _USER)
                self.set(at, value)
            table = value & (1 << 52) - PAGE
        raise AssertionError('no such size')
