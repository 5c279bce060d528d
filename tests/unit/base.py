# SPDX-License-Identifier: Apache-2.0

import logging
import pathlib
import tempfile
import unittest

# What a test provokes is not for the screen.
logging.getLogger('virtav_nova').addHandler(logging.NullHandler())

#: Top of the checkout.
ROOT = pathlib.Path(__file__).parents[2]
SELFTEST_RULES = ROOT / 'etc' / 'virtav' / 'rules'
SIGNATURE = b'VIRTAV-HARMLESS-SELFTEST-SIGNATURE-7f3c1d8a52e94b60'


class TestCase(unittest.TestCase):
    """A test with a directory of its own."""

    def setUp(self):
        super().setUp()
        top = tempfile.TemporaryDirectory()
        self.addCleanup(top.cleanup)
        self.top = pathlib.Path(top.name)

    def write(self, name, content):
        """Write a file below the test's directory.

        :param content: text or bytes
        :returns: its path
        """
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return path
