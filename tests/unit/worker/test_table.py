# SPDX-License-Identifier: Apache-2.0

import errno
import mmap
import os
import stat
import unittest

from virtav_nova.worker import table


class TableTest(unittest.TestCase):

    def make(self, entries=16, epoch=1):
        self.fd = table.create(entries, epoch)
        self.addCleanup(os.close, self.fd)
        return table.VerdictTable(self.fd)

    def tag(self, number, rest=b'\1'):
        """A tag whose first word is a number."""
        return number.to_bytes(4, 'little') + rest.ljust(12, b'\1')

    def content(self):
        return os.pread(self.fd, 1 << 20, 0)

    def test_golden(self):
        # Written down from the layout's tables.
        made = self.make(16, 0x0102030405060708)
        golden = bytearray(4096 + 16 * 16)
        golden[:16] = bytes.fromhex('56415054 01000000 0807060504030201')
        self.assertEqual(golden, self.content())
        first = bytes.fromhex('a1a2a3a6 a5a6a7a8 a9aaabac adaeafb0')
        made.add(first)  # 0xa6a3a2a1 & 3: set 1
        golden[4096 + 64:4096 + 80] = first
        self.assertEqual(golden, self.content())
        second = bytes.fromhex('a5000000 a5a6a7a8 a9aaabac adaeafb0')
        made.add(second)  # Set 1 again.
        golden[4096 + 80:4096 + 96] = second
        third = bytes.fromhex('ffffffff a5a6a7a8 a9aaabac adaeafb0')
        made.add(third)  # Set 3
        golden[4096 + 192:4096 + 208] = third
        self.assertEqual(golden, self.content())
        made.epoch = 2
        golden[8:16] = b'\2' + bytes(7)
        self.assertEqual(golden, self.content())
        self.assertEqual(2, made.epoch)

    def test_sizes(self):
        for entries in (4, 1 << 10, 1 << 26):
            made = self.make(entries)
            self.assertEqual(4096 + 16 * entries, os.fstat(self.fd).st_size)
            made.add(self.tag(0xffffffff))
            self.assertTrue(made.contains(self.tag(0xffffffff)))

    def test_contains_what_was_added(self):
        made = self.make()
        tags = [self.tag(number) for number in range(8)]
        for tag in tags:
            self.assertFalse(made.contains(tag))
            made.add(tag)
            made.add(tag)
        self.assertTrue(all(map(made.contains, tags)))
        self.assertEqual(8, sum(
            any(self.content()[start:start + 16])
            for start in range(4096, 4096 + 256, 16)))

    def test_full_set_gives_up_the_entry_that_the_tag_names(self):
        for way in range(8):
            made = self.make()
            old = [self.tag(2, bytes([0, number + 1])) for number in range(4)]
            for tag in old:
                made.add(tag)
            new = self.tag(6, bytes([way, 9]))
            made.add(new)
            self.assertTrue(made.contains(new))
            self.assertEqual(
                [number != way % 4 for number in range(4)],
                [made.contains(tag) for tag in old])

    def test_tag_across_entries_is_not_found(self):
        made = self.make()
        os.pwrite(self.fd, bytes(8) + self.tag(0) + bytes(8), 4096)
        self.assertFalse(made.contains(self.tag(0)))

    def test_zero_is_never_found(self):
        made = self.make()
        made.add(bytes(16))
        self.assertFalse(made.contains(bytes(16)))

    def test_several_writers(self):
        made = self.make()
        other = table.VerdictTable(self.fd)
        made.add(self.tag(1))
        self.assertTrue(other.contains(self.tag(1)))

    def test_reader_cannot_write(self):
        made = self.make()
        reader = table.reader(self.fd)
        self.addCleanup(os.close, reader)
        made.add(self.tag(0))
        self.assertEqual(self.tag(0), os.pread(reader, 16, 4096))
        for write in (lambda: os.pwrite(reader, b'x', 4096),
                      lambda: os.ftruncate(reader, 0),
                      lambda: os.posix_fallocate(reader, 0, 1 << 20),
                      lambda: mmap.mmap(reader, 0)):
            with self.assertRaises(OSError) as caught:
                write()
            self.assertIn(caught.exception.errno, (
                errno.EACCES, errno.EBADF, errno.EINVAL))
        # Nor can another user open it anew for that.
        self.assertEqual(0o400, stat.S_IMODE(os.fstat(reader).st_mode))

    def test_size_is_sealed(self):
        self.make()
        for size in (0, 1 << 20):
            with self.assertRaises(PermissionError):
                os.truncate(self.fd, size)

    def test_nothing_is_left_open(self):
        before = os.listdir('/proc/self/fd')
        os.close(table.create(16, 1))
        self.assertEqual(before, os.listdir('/proc/self/fd'))
