# SPDX-License-Identifier: Apache-2.0
"""Messages between the main process, loaders and scan processes.

They are JSON objects on a UNIX socket that keeps message boundaries. Loaders
work on rules of others and scan processes on what guests wrote, so the main
process reads nothing from them that could be code, and nothing without bound.

To a loader: ``load`` (see :mod:`virtav_nova.worker.loader`), ``fork``
(slot; the socket of the new scan process comes with it), ``suspect`` (part)
and ``name`` (part). From it: ``loaded`` (description, sandbox), ``failed``
(reason, way_out, rule), ``forked`` (slot, pid; its pidfd comes with it),
``refused`` (slot, reason), ``exited`` (slot, pid, status) and ``named``
(part, namespace, rule).

To a scan process: ``session`` (session, instance, scope, key, slots, table,
shared, read; the connected socket comes with it, then the memory of a ring if
slots
is not 0, then that of the verdict table if there is one), ``move`` (session),
``skip`` (tags), ``suspect`` (part) and ``drain`` (seconds). From it:
``ready``, ``match`` (session, record), ``fault`` (session, reason, part),
``spent`` (session) and ``closed`` (session, reason, counts).
"""

import collections.abc
import json
import os
import socket
import typing

Message: typing.TypeAlias = dict[str, typing.Any]

#: Longest message in bytes.
MESSAGE_MAX = 64 << 10
#: Most file descriptors that come with a message.
FDS_MAX = 3


def pair() -> tuple[socket.socket, socket.socket]:
    """:returns: the two ends, both non-blocking."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def pack(kind: str, **content: object) -> bytes:
    """Write a message.

    :param kind: see the module.
    :param content: small enough for :data:`MESSAGE_MAX`.
    """
    return json.dumps({'type': kind, **content}).encode()


def unpack(data: bytes) -> Message:
    """Read a message.

    :param data: as received; nothing when the other end is gone.
    :raises EOFError: when the other end is gone, or sends what it should
        not.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise EOFError(len(data))
    return message


def receive(end: socket.socket) -> tuple[Message, list[int]]:
    """Receive a message.

    :param end: of a pair.
    :returns: the message, and the file descriptors that came with it.
    :raises BlockingIOError: when there is none.
    :raises EOFError: as :func:`unpack`, or when the socket is broken.
    """
    try:
        data, fds, _flags, _address = socket.recv_fds(
            end, MESSAGE_MAX, FDS_MAX)
    except BlockingIOError:
        raise
    except OSError as error:
        raise EOFError from error
    try:
        return unpack(data), fds
    except EOFError:
        close(fds)
        raise


def close(fds: collections.abc.Iterable[int]) -> None:
    """Close file descriptors."""
    for fd in fds:
        os.close(fd)
