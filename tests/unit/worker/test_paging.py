# SPDX-License-Identifier: Apache-2.0

import random
import unittest

from tests.unit.worker import guest
from virtav_nova.worker import paging

PAGE = paging.PAGE_SIZE
LONG4, LONG5, PAE, LEGACY, FLAT = paging.Mode
#: An address of each mode that makes every level's index another one.
ADDRESSES = {
    LONG4: 0x00007f3a5c7d9000,
    LONG5: 0x00a57f3a5c7d9000,
    PAE: 0xb5d7c000,
    LEGACY: 0xb5d7c000,
}
#: Sizes of large pages.
LARGE = {
    LONG4: (1 << 21, 1 << 30),
    LONG5: (1 << 21, 1 << 30),
    PAE: (1 << 21,),
    LEGACY: (1 << 22,),
}


class PagingTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.memory = guest.Memory()

    def translate(self, space, gva, reads=99):
        tables = paging.Tables(space.mode, space.cr3, reads)
        return self.memory.drive(tables.translate(gva))

    def mapped(self, space, first, last, most=1 << 20, reads=99):
        tables = paging.Tables(space.mode, space.cr3, reads)
        return self.memory.drive(tables.mapped(first, last, most))

    def test_golden(self):
        # Entries written down by hand: indexes 0xfe, 0xe9, 0xe3, 0x1d9.
        for table, index, entry in (
                (0x1000, 0xfe, 0x8000000000002067),
                (0x2000, 0xe9, 0x0000000000003067),
                (0x3000, 0x0e3, 0x0000000000004067),
                (0x4000, 0x1d9, 0x000000012345e025)):
            self.memory.pages.setdefault(table, bytearray(PAGE))
            self.memory.write(table + index * 8, entry, 8)
        tables = paging.Tables(LONG4, 0x1fff, 4)
        leaf = self.memory.drive(tables.translate(0x7f3a5c7d9abc))
        self.assertEqual(paging.Leaf(0x7f3a5c7d9000, 0x12345e000, True,
                                     False, False), leaf)
        self.assertEqual([0x1000, 0x2000, 0x3000, 0x4000],
                         self.memory.reads)

    def test_each_mode(self):
        for mode, gva in ADDRESSES.items():
            with self.subTest(mode):
                space = guest.Space(self.memory, mode)
                gpa = space.map(gva)
                leaf = paging.Leaf(gva, gpa, True, True, True)
                self.assertEqual(leaf, self.translate(space, gva))
                self.assertEqual(leaf, self.translate(space, gva + 4095))
                for other in (gva - PAGE, gva + PAGE, 0, gva ^ 1 << 31,
                              gva ^ 1 << 38, gva ^ 1 << 56):
                    self.assertIsNone(self.translate(space, other))

    def test_large_pages(self):
        for mode, sizes in LARGE.items():
            for size in sizes:
                with self.subTest(mode, size=size):
                    space = guest.Space(self.memory, mode)
                    gva = ADDRESSES[mode] & -size
                    space.map(gva, gpa=3 << 30, size=size)
                    for offset in (0, 5 * PAGE, size - PAGE):
                        leaf = self.translate(space, gva + offset)
                        self.assertEqual((gva + offset, (3 << 30) + offset),
                                         leaf[:2])
                    self.assertIsNone(self.translate(space, gva - 1))

    def test_address_beyond_4_gib_of_a_large_page(self):
        space = guest.Space(self.memory, LEGACY)
        space.map(0x400000, gpa=0x12_3400_0000, size=1 << 22)
        self.assertEqual(0x12_3400_1000,
                         self.translate(space, 0x401000).gpa)

    def test_kernel_addresses(self):
        for mode, gva in ((LONG4, 0xffffffff81234000),
                          (LONG5, 0xff11000012345000)):
            space = guest.Space(self.memory, mode)
            gpa = space.map(gva, user=False)
            self.assertEqual(paging.Leaf(gva, gpa, False, True, True),
                             self.translate(space, gva))
            # The same without its upper bits is no address.
            self.assertIsNone(self.translate(space, gva & (1 << 57) - 1))

    def test_rights_of_all_levels_count(self):
        space = guest.Space(self.memory)
        gva = ADDRESSES[LONG4]
        space.map(gva)
        upper = space.entry(gva, 1 << 30)
        for clear, given in ((4, 'user'), (2, 'writable')):
            page = self.memory.pages[upper & -PAGE]
            page[upper % PAGE] &= ~clear
            self.assertFalse(getattr(self.translate(space, gva), given))
            page[upper % PAGE] |= clear
        page[upper % PAGE + 7] |= 0x80
        self.assertFalse(self.translate(space, gva).executable)

    def test_no_paging(self):
        tables = paging.Tables(FLAT, 0xdead, 0)
        self.assertEqual((0xf000, 0xf000),
                         self.memory.drive(tables.translate(0xffff))[:2])

    def test_list(self):
        for mode, gva in ADDRESSES.items():
            with self.subTest(mode):
                space = guest.Space(self.memory, mode)
                gvas = [gva + offset * PAGE for offset in (
                    -700, -3, 0, 1, 2, 9, 1200)]
                for each in gvas:
                    space.map(each)
                found = self.mapped(space, gva - 3 * PAGE, gva + 9 * PAGE)
                self.assertEqual(gvas[1:-1], [leaf.gva for leaf in found])
                found = self.mapped(space, gva - 999 * PAGE,
                                    gva + 2000 * PAGE)
                self.assertEqual(gvas, [leaf.gva for leaf in found])
                found = self.mapped(space, gva - 999 * PAGE,
                                    gva + 2000 * PAGE, most=4)
                self.assertEqual(gvas[:4], [leaf.gva for leaf in found])

    def test_list_with_a_large_page(self):
        space = guest.Space(self.memory)
        space.map(1 << 30, gpa=7 << 21, size=1 << 21)
        space.map((1 << 30) + (1 << 21))
        first = (1 << 30) + (1 << 21) - 2 * PAGE
        found = self.mapped(space, first, first + 5 * PAGE)
        self.assertEqual([first, first + PAGE, first + 2 * PAGE],
                         [leaf.gva for leaf in found])
        self.assertEqual((8 << 21) - 2 * PAGE, found[0].gpa)

    def test_tables_are_read_once(self):
        space = guest.Space(self.memory)
        for number in range(20):
            space.map(0x400000 + number * PAGE)
        tables = paging.Tables(LONG4, space.cr3, 4)
        for number in range(20):
            self.assertTrue(self.memory.drive(
                tables.translate(0x400000 + number * PAGE)))
        self.assertEqual(4, len(self.memory.reads))

    def test_no_more_reads_than_allowed(self):
        space = guest.Space(self.memory)
        space.map(0x400000)
        with self.assertRaises(paging.ExhaustedError):
            self.translate(space, 0x400000, reads=3)
        self.assertEqual(3, len(self.memory.reads))

    def test_table_where_is_no_ram(self):
        space = guest.Space(self.memory)
        space.set(space.entry(0x400000, 1 << 21), 1 << 45 | 7)
        self.assertIsNone(self.translate(space, 0x400000))

    def test_tables_that_lead_back(self):
        # Every entry points to the root: all of it is one page.
        for mode in ADDRESSES:
            space = guest.Space(self.memory, mode)
            root = space.cr3 & -PAGE
            for at in range(0, PAGE, mode.width):
                self.memory.write(root + at, root | 0x27, mode.width)
            del self.memory.reads[:]
            found = self.mapped(space, 0x10000000, 0x10000000 + (4 << 20))
            self.assertEqual({root}, {leaf.gpa for leaf in found})
            self.assertEqual([root], self.memory.reads)

    def test_random_tables(self):
        # Whatever they hold, a walk ends and stays within what was asked.
        generator = random.Random(4)
        for turn in range(200):
            mode = generator.choice(list(ADDRESSES))
            for gpa in range(0, 64 * PAGE, PAGE):
                self.memory.pages[gpa] = bytearray(
                    generator.choice((b'\0' * 8, generator.randbytes(6)
                                      + b'\0\0', (generator.randrange(64)
                                      * PAGE | 7).to_bytes(8, 'little')))
                    * (PAGE // 8))
            space = guest.Space(self.memory, mode)
            space.cr3 = generator.randrange(64) * PAGE
            first = ADDRESSES[mode] & -PAGE
            del self.memory.reads[:]
            found = self.mapped(space, first, first + (1 << 21), most=300,
                                reads=50)
            self.assertLessEqual(len(self.memory.reads), 50, turn)
            self.assertLessEqual(len(found), 300)
            for leaf in found:
                self.assertLessEqual(first, leaf.gva)
                self.assertLessEqual(leaf.gva, first + (1 << 21))
                self.assertEqual(0, leaf.gpa % PAGE)


class FindModeTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.memory = guest.Memory()

    def find(self, cr3, gva, gpa, likely=None):
        tables = self.memory.drive(
            paging.find_mode(cr3, gva, gpa, 9, likely))
        return tables and tables.mode

    def test_each(self):
        for mode, gva in ADDRESSES.items():
            for likely in (None, *paging.Mode):
                space = guest.Space(self.memory, mode)
                gpa = space.map(gva)
                self.assertIs(mode, self.find(space.cr3, gva, gpa, likely))

    def test_kernel(self):
        for mode, gva in ((LONG4, 0xffffffff81234000),
                          (LONG5, 0xff11000012345000)):
            space = guest.Space(self.memory, mode)
            gpa = space.map(gva)
            self.assertIs(mode, self.find(space.cr3, gva, gpa))

    def test_flat(self):
        self.assertIs(FLAT, self.find(0, 0x7000, 0x7000))
        self.assertIsNone(self.find(0, 0x7000, 0x8000))

    def test_pcid(self):
        space = guest.Space(self.memory)
        gpa = space.map(0x400000)
        self.assertIs(LONG4, self.find(space.cr3 | 0x806, 0x400000, gpa))

    def test_likely_mode_costs_one_walk(self):
        space = guest.Space(self.memory, LEGACY)
        gpa = space.map(0x400000)
        del self.memory.reads[:]
        self.assertIs(LEGACY, self.find(space.cr3, 0x400000, gpa, LEGACY))
        self.assertEqual(2, len(self.memory.reads))

    def test_nothing_fits(self):
        space = guest.Space(self.memory)
        gpa = space.map(0x400000)
        self.assertIsNone(self.find(space.cr3, 0x400000, gpa + PAGE))
