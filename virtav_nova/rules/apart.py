# SPDX-License-Identifier: Apache-2.0
"""The process apart: takes rules to pieces, compiles and tries them.

Run by :mod:`virtav_nova.rules.crew`. A line of JSON on standard input says
what is to be done and within which limits, each further line is a unit of
work. Nothing that is said here is to be believed without need: by then the
process may belong to whoever wrote the rules.
"""

import collections.abc
import contextlib
import ctypes
import itertools
import json
import os
import resource
import signal
import sys
import typing

from virtav_nova.rules import dissect
from virtav_nova.rules import trial
from virtav_nova.worker import privileges
from virtav_nova.worker import sandbox

_PR_SET_PDEATHSIG = 1
_NOBODY = 65534
#: Characters of rules that take a second to parse, on a very slow machine.
_SPEED = 200_000

_JOBS: dict[str, typing.Any] = {
    'carry': dissect.Carry, 'dissect': dissect.Dissect,
    'prove': trial.Prove, 'try': trial.Try}


def main() -> None:
    """Work until there is nothing more on standard input."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    lines = iter(sys.stdin.buffer.readline, b'')
    head = json.loads(next(lines))
    with os.fdopen(head['data'], 'rb') as file:
        # Others read it by the same descriptor.
        data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    job = _JOBS[head['job']](head['settings'], data)
    del data
    local_socket = getattr(getattr(job, 'kind', None), 'local_socket', False)
    confined = _confine(head['memory'], local_socket)
    if not confined.seccomp:
        _say(note=confined.reason)
    _say(ready=True)
    for units in _grouped(lines, job.several):
        size = sum(len(unit.get('text', '')) for unit in units)
        sandbox.limit_time(head['seconds'] + size // _SPEED)
        _say(begin=[unit['id'] for unit in units])
        for number, result in job.work(units):
            _say(id=number, result=result)
        _say(end=True)


def _confine(memory: int, local_socket: bool) -> sandbox.State:
    """Give up what is not needed.

    :param memory: address space from now on, in bytes.
    :param local_socket: whether UNIX sockets are needed.
    """
    if os.geteuid() == 0:
        privileges.leave_network()
        # A container may have no such user.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    privileges.lock()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    return sandbox.enter_scanner(local_socket)


def _grouped(lines: collections.abc.Iterator[bytes], several: int
             ) -> collections.abc.Iterator[list[dict[str, typing.Any]]]:
    """:returns: units that are worked on together."""
    units = map(json.loads, lines)
    while group := list(itertools.islice(units, several)):
        # Those that a process died of are tried one by one.
        if any(unit.get('alone') for unit in group):
            yield from ([unit] for unit in group)
        else:
            yield group


def _say(**message: typing.Any) -> None:
    sys.stdout.write(json.dumps(message) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
