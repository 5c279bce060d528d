# SPDX-License-Identifier: Apache-2.0
"""Messages between the main process and a scan process.

They are JSON objects on a UNIX socket that keeps message boundaries. A scan
process works on hostile data, so the main process reads nothing from it that
could be code, and nothing without bound.

To the scan process: ``start`` (engine, scan_timeout_ms, key, max_in_flight,
busy_poll_us, skip), ``session`` (session, slots; the connected socket comes
with it, and the memory of a ring if slots is not 0),
``skip`` (tag) and ``drain`` (seconds). From it: ``ready``, ``match``
(session, record), ``fault`` (session, reason) and ``closed`` (session,
reason, counts).
"""

import json
import socket
import typing

Message: typing.TypeAlias = dict[str, typing.Any]

#: Longest message in bytes.
MESSAGE_MAX = 64 << 10
#: Most file descriptors that come with a message.
FDS_MAX = 2


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
