# SPDX-License-Identifier: Apache-2.0
"""Engines that do what a flaw would make a real one do."""

import os
import signal
import socket
import time

from virtav_nova import exception
from virtav_nova.engines import base


class ObedientEngine(base.Engine):
    """Does what the page says.

    ``match NUMBER`` gives that many matches, ``raise`` raises, ``sleep N``
    takes so many seconds, ``late N PART`` as many before it hangs in a part of
    the rules, ``segfault N`` ends the process in part N of the
    rules, ``send REST`` sends the rest to the main process, as code that took
    the process over could do. ``part`` matches a rule that is named like the
    last part that was suspected.
    """

    name = 'obedient'
    version = '1'
    suspected = None

    @classmethod
    def compile(cls, files, options):
        return cls()

    def describe(self):
        return {'rules': 1}

    def scan(self, data):
        verb, _, rest = bytes(data).rstrip(b'\0').partition(b' ')
        if verb == b'match':
            return [base.Match('R%d' % number, 'r.yar', [], {}, [])
                    for number in range(int(rest))]
        if verb == b'raise':
            raise ValueError('as the page says\n')
        if verb == b'sleep':
            time.sleep(float(rest))
        if verb == b'late':
            before, part = rest.split()
            time.sleep(float(before))
            self.progress(int(part))
            time.sleep(60)
        if verb == b'segfault':
            if rest:
                self.progress(int(rest))
            signal.raise_signal(signal.SIGSEGV)
        if verb == b'kill':
            signal.raise_signal(signal.SIGKILL)
        if verb == b'send':
            end = _main()
            end.send(rest)
            end.detach()
        if verb == b'part':
            return [base.Match('%s' % self.suspected, 'r.yar', [], {}, [])]
        return []

    def suspect(self, part):
        self.suspected = part

    def rule_name(self, part):
        return 'r.yar', 'R%d' % (part & ~base.RULE)


def _main():
    """The socket to the main process."""
    for fd in range(3, 1 << 14):
        try:
            end = socket.socket(fileno=fd)
        except OSError:
            continue
        if end.type == socket.SOCK_SEQPACKET:
            return end
        end.detach()
    raise AssertionError('no socket')


class BrokenEngine(ObedientEngine):
    """Cannot be compiled, for a reason that it does not tell."""

    @classmethod
    def compile(cls, files, options):
        os._exit(3)


class UnruledEngine(ObedientEngine):
    """Has no rules."""

    def describe(self):
        return {'rules': 0}


class RefusingEngine(ObedientEngine):
    """Refuses its rules."""

    @classmethod
    def compile(cls, files, options):
        raise exception.RuleError('a.yar:3: wrong', 'mend it')


class SlowEngine(ObedientEngine):
    """Takes a minute to be compiled."""

    @classmethod
    def compile(cls, files, options):
        time.sleep(60)


class HungryEngine(ObedientEngine):
    """Takes a GiB."""

    @classmethod
    def compile(cls, files, options):
        cls.memory = b'x' * (1 << 30)
        return cls()
