# SPDX-License-Identifier: Apache-2.0
"""Programs that another user runs, wherever they are installed."""

import os
import pathlib
import shlex
import sys

from tests.unit import base

#: There on every system, and never the worker's own.
USER = 'nobody'


def _closed(path):
    """The topmost directory on a path that other users cannot enter."""
    for place in (*reversed(pathlib.Path(path).parents), pathlib.Path(path)):
        if not place.stat().st_mode & 1:
            return place
    return None


def opened(command, scratch):
    """Have other users get at the tests' own program.

    Where it is below a directory of root's alone, that is replaced by one
    that holds nothing else, for this command only: in a mount namespace of
    its own.

    :param command: list of words.
    :param scratch: a directory.
    :returns: the command to run instead; only for root.
    """
    lines = ['set -e']
    moves = []
    covered = set()
    places = {os.path.realpath(place) for place in (
        sys.base_prefix, sys.prefix, base.ROOT)}
    for number, place in enumerate(sorted(places)):
        closed = _closed(place)
        if closed is None:
            continue
        hold = shlex.quote(f'{scratch}/hold-{number}')
        lines += [f'mkdir -p {hold}',
                  f'mount --bind {shlex.quote(place)} {hold}']
        if closed not in covered:
            covered.add(closed)
            moves.insert(0, 'mount -t tmpfs -o mode=755 none '
                         + shlex.quote(str(closed)))
        moves += [f'mkdir -p {shlex.quote(place)}',
                  f'mount --move {hold} {shlex.quote(place)}']
    if not moves:
        return command
    script = '\n'.join([*lines, *moves, 'exec "$@"'])
    return ['unshare', '-m', 'sh', '-c', script, 'sh', *map(str, command)]
