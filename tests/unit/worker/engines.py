# SPDX-License-Identifier: Apache-2.0
"""Engines that do what a flaw would make a real one do."""

import os
import signal
import sys
import time

from virtav_nova.engines import base


class ObedientEngine(base.Engine):
    """Does what the page says.

    ``match NUMBER`` gives that many matches, ``raise`` raises, ``sleep N``
    takes so many seconds, ``segfault`` ends the process, ``send REST`` sends
    the rest to the main process, as code that took the process over could do.
    """

    name = 'obedient'
    version = '1'

    @classmethod
    def compile(cls, files, scan_timeout_ms):
        return cls()

    @classmethod
    def restore(cls, image, scan_timeout_ms):
        return cls()

    def image(self):
        return b''

    def describe(self):
        return {'rules': 1}

    def scan(self, page):
        verb, _, rest = bytes(page).rstrip(b'\0').partition(b' ')
        if verb == b'match':
            return [base.Match('R%d' % number, 'r.yar', [], {}, [])
                    for number in range(int(rest))]
        if verb == b'raise':
            raise ValueError('as the page says\n')
        if verb == b'sleep':
            time.sleep(float(rest))
        if verb == b'segfault':
            os.kill(os.getpid(), signal.SIGSEGV)
        if verb == b'send':
            os.write(int(sys.argv[1]), rest)
        return []


class BrokenEngine(ObedientEngine):
    """Can be compiled but not restored."""

    @classmethod
    def restore(cls, image, scan_timeout_ms):
        raise SystemExit(3)
