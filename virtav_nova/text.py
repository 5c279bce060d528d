# SPDX-License-Identifier: Apache-2.0
"""Text from guests, peers and rules, made fit to be shown."""

import codecs

# Loaded now: when it is needed there may be no file left to open.
codecs.lookup('unicode_escape')


def printable(value: bytes | str, limit: int) -> str:
    r"""Turn hostile text into printable ASCII of bounded length.

    Whatever could end a line, move a cursor or be taken for other text is
    written as an escape (``\n``, ``\x1b``, ``\u202e``), a backslash as two.

    :param value: the text; bytes are taken one character each.
    :param limit: longest result in characters; the rest is cut off.
    :returns: printable ASCII only.
    """
    if isinstance(value, bytes):
        value = value[:limit].decode('latin-1')
    escaped = value[:limit].encode('unicode_escape', 'backslashreplace')
    return escaped.decode('ascii')[:limit]
