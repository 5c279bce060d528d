# SPDX-License-Identifier: Apache-2.0

import random
import unittest

from virtav_nova import text


class PrintableTest(unittest.TestCase):

    def test_plain_text_stays(self):
        for plain in ('pc.ram', '0000:00:02.0/vga.vram', '[0] "a"'):
            self.assertEqual(plain, text.printable(plain, 99))
            self.assertEqual(plain, text.printable(plain.encode(), 99))

    def test_everything_else_is_escaped(self):
        for hostile, shown in (
                ('a\nb\r\t\0', r'a\nb\r\t\x00'), ('\x1b[2J', r'\x1b[2J'),
                ('\x7f', r'\x7f'), ('\u202etxt', r'\u202etxt'),
                ('\ud800', r'\ud800'), ('a\\n', r'a\\n'), ('é', r'\xe9'),
                (b'\xff\n', r'\xff\n'), ('\U0001f600', r'\U0001f600')):
            self.assertEqual(shown, text.printable(hostile, 99))

    def test_bounded(self):
        rng = random.Random(1)
        for _ in range(500):
            hostile = rng.randbytes(rng.randrange(100))
            for value in (hostile, hostile.decode('utf-16', 'replace')):
                shown = text.printable(value, 20)
                self.assertLessEqual(len(shown), 20)
                self.assertTrue(shown.isascii() and shown.isprintable())
