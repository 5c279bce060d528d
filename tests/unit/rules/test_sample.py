# SPDX-License-Identifier: Apache-2.0

import io
import os
import struct
import sys

from tests.unit import base
from virtav_nova import exception
from virtav_nova.rules import sample


def elf(*segments, wide=True):
    """A file with segments, each (type, flags, offset, length)."""
    size = 56 if wide else 32
    head = bytearray(64 if wide else 52)
    head[:6] = b'\x7fELF' + bytes((2 if wide else 1, 1))
    struct.pack_into('<Q' if wide else '<I', head, 32 if wide else 28,
                     len(head))
    struct.pack_into('<HH', head, 54 if wide else 42, size, len(segments))
    for kind, flags, offset, length in segments:
        if wide:
            head += struct.pack('<IIQQQQQQ', kind, flags, offset, 0, 0,
                                length, length, 4096)
        else:
            head += struct.pack('<IIIIIIII', kind, offset, 0, 0, length,
                                length, flags, 4096)
    return bytes(head)


class ExecutableTest(base.TestCase):

    def _pages(self, content):
        return list(sample.executable(io.BytesIO(content)))

    def test_only_what_may_run(self):
        for wide in (True, False):
            with self.subTest(wide):
                content = elf((1, 4, 0, 4096), (1, 5, 4096, 5000),
                              (1, 6, 12288, 4096), (2, 5, 4096, 4096),
                              wide=wide).ljust(4096, b'h')
                content += b'a' * 4096 + b'b' * 4096 + b'c' * 4096
                self.assertEqual([b'a' * 4096, b'b' * 4096],
                                 self._pages(content))

    def test_pages_are_those_that_are_mapped(self):
        content = elf((1, 5, 4000, 200)).ljust(4000, b'h') + b'x' * 150
        first, second = self._pages(content)
        self.assertEqual(b'x' * 96, first[4000:])
        self.assertEqual(b'x' * 54 + bytes(4042), second)

    def test_what_is_no_program(self):
        huge = elf((1, 5, 1 << 62, 1 << 62))
        for content in (
                b'', b'\x7fELF', b'#!/bin/sh\n', bytes(4096),
                elf((1, 5, 0, 100))[:60], huge,
                elf((1, 5, 1 << 63, 2)),
                elf()[:32] + b'\xff' * 32,
                os.urandom(5000), b'\x7fELF\2\1' + os.urandom(5000)):
            with self.subTest(content[:20]):
                self.assertEqual([], self._pages(content))

    def test_a_segment_longer_than_the_file(self):
        self.assertEqual(1, len(self._pages(elf((1, 5, 0, 1 << 60)))))


class PathsTest(base.TestCase):

    def test_each_page_once(self):
        content = elf((1, 5, 4096, 4096)).ljust(4096) + b'a' * 4096
        self.write('bin/one', content)
        self.write('bin/two', content)
        self.write('bin/three', content[:-4096] + b'b' * 4096)
        self.write('bin/text', 'text')
        (self.top / 'bin' / 'link').symlink_to('/bin/sh')
        os.mkfifo(self.top / 'bin' / 'pipe')
        found = list(sample.of_paths([str(self.top / 'bin')]))
        self.assertEqual([b'a' * 4096, b'b' * 4096], sorted(found))
        self.assertEqual(1, len(list(sample.of_paths(
            [str(self.top / 'bin' / 'one'), str(self.top)], 1))))

    def test_a_real_program(self):
        self.assertTrue(
            list(sample.of_paths([os.path.realpath(sys.executable)])))

    def test_missing(self):
        with self.assertRaisesRegex(exception.RuleError, 'No such file'):
            list(sample.of_paths([str(self.top / 'missing')]))


class ShippedTest(base.TestCase):

    def test_pages(self):
        pages = sample.pages()
        self.assertEqual(1000, len(set(pages)))
        self.assertEqual({4096}, set(map(len, pages)))

    def test_each_package_has_its_licence(self):
        data = base.ROOT / 'virtav_nova' / 'rules' / 'data'
        self.assertLess((data / 'pages.zst').stat().st_size, 2 << 20)
        told = (data / 'pages.txt').read_text()
        head, *notices = told.split('\n' + '=' * 78 + '\n')
        lines = [line.split(None, 4) for line in head.splitlines()
                 if ' pages  ' in line]
        self.assertEqual(1000, sum(int(line[2]) for line in lines))
        for line in lines:
            with self.subTest(line[0]):
                self.assertTrue(line[4].strip())
                self.assertIn(line[0], notices)
        self.assertNotRegex(head, r'  L?GPL')

    def test_made_pages(self):
        self.assertEqual({4096}, set(map(len, sample.made())))

    def test_of_this_host(self):
        found = sample.installed()
        self.assertEqual(4096, len(next(found)))
