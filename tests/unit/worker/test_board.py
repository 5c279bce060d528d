# SPDX-License-Identifier: Apache-2.0

import os
import time
import unittest

from virtav_nova.worker import board


class BoardTest(unittest.TestCase):

    def test_scan_is_seen_from_the_other_side(self):
        fd = board.Board.create()
        here, there = board.Board(fd), board.Board(fd)
        os.close(fd)
        self.assertIsNone(there.scan())
        begin = time.monotonic_ns()
        here.begin(7, b'0123456789abcdef')
        started, session, tag = there.scan()
        self.assertTrue(begin <= started <= time.monotonic_ns())
        self.assertEqual((7, b'0123456789abcdef'), (session, tag))
        here.end()
        self.assertIsNone(there.scan())
