# SPDX-License-Identifier: Apache-2.0
"""Executable pages that are known to be harmless.

Rules are tried on them before they come into force: one that matches here is
noisy, one that is slow here is slow everywhere. ``data/pages.zst`` is shipped;
``data/pages.txt`` says what it was made from.
"""

import collections.abc
import glob
import hashlib
import importlib.resources
import io
import os
import stat
import struct
import typing

import zstandard

from virtav_nova import exception
from virtav_nova.i18n import _

PAGE = 4096

#: Of what is shipped; a damaged file must not fill the memory.
_SHIPPED_MAX = 16 << 20

_PT_LOAD = 1
_PF_X = 1
#: More program headers than any real file has.
_HEADERS_MAX = 1024
#: Lists of the files of each package, where dpkg keeps them.
_DPKG = '/var/lib/dpkg/info/*.list'


def pages() -> list[bytes]:
    """:returns: the shipped pages, 4096 bytes each."""
    packed = importlib.resources.files('virtav_nova.rules').joinpath(
        'data', 'pages.zst').read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(
            io.BytesIO(packed)) as reader:
        data = reader.read(_SHIPPED_MAX)
    return [data[at:at + PAGE] for at in range(0, len(data), PAGE)]


def made() -> list[bytes]:
    """Pages that no compiler makes, but a guest may.

    Slow rules are slow on text of their alphabet, and a guest that wants to
    slow down its host has all the time to find it.

    :returns: 4096 bytes each.
    """
    counting = ' '.join(str(number) for number in range(2000))
    texts = [
        b'\0', b'\xff', b'\x90', b'\xcc', b'a', b'A', b'0', b'f', b' ',
        b'ab', b'a ', b'%20', b'A\0', b'0\0', b'\\x41', b'../', b'a.b-c_',
        b'0123456789abcdef', b'0123456789ABCDEF', b'0\x001\x00a\x00f\x00',
        b'QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=', b'http://a.b/c?d=e&',
        b'user@example.org ', b'<a href="http://example.org/">', b'1.2.3.4 ',
        b'MZ\x90\0PE\0\0', b'\x7fELF', b'PK\x03\x04', counting.encode(),
        bytes(range(256))]
    return [(text * (PAGE // len(text) + 1))[:PAGE] for text in texts]


def executable(
        file: typing.BinaryIO) -> collections.abc.Iterator[bytes]:
    """Yield the pages that a system maps as executable from an ELF file.

    :param file: where ``seek`` works; need not be an ELF file.
    :returns: whole pages of the file, as ``mmap`` would have them, so that
        what stands beside the code on its first and last page counts too.
    """
    head = file.read(64)
    if len(head) < 52 or head[:4] != b'\x7fELF' or head[4] not in (1, 2) \
            or head[5] != 1:
        return
    wide = head[4] == 2
    if wide and len(head) < 64:
        return
    table, size, count = (
        (*struct.unpack_from('<Q', head, 32),
         *struct.unpack_from('<HH', head, 54)) if wide else
        (*struct.unpack_from('<I', head, 28),
         *struct.unpack_from('<HH', head, 42)))
    if size < (56 if wide else 32) or count > _HEADERS_MAX:
        return
    end = file.seek(0, io.SEEK_END)
    if table > end:
        return
    file.seek(table)
    headers = file.read(size * count)
    for at in range(0, len(headers) - size + 1, size):
        if wide:
            kind, flags, offset = struct.unpack_from('<IIQ', headers, at)
            length, = struct.unpack_from('<Q', headers, at + 32)
        else:
            kind, offset = struct.unpack_from('<II', headers, at)
            length, = struct.unpack_from('<I', headers, at + 16)
            flags, = struct.unpack_from('<I', headers, at + 24)
        if kind != _PT_LOAD or not flags & _PF_X:
            continue
        for begin in range(offset - offset % PAGE,
                           min(offset + length, end), PAGE):
            file.seek(begin)
            yield file.read(PAGE).ljust(PAGE, b'\0')


def of_paths(paths: collections.abc.Iterable[str],
             limit: int | None = None) -> collections.abc.Iterator[bytes]:
    """Yield the executable pages of files, each page once.

    What is no ELF file is passed over, and so are links.

    :param paths: files, and directories with all that is below them.
    :param limit: pages to give at most.
    :raises RuleError: when one of the paths cannot be read.
    """
    seen: set[bytes] = set()
    for path in paths:
        for name in _files(path):
            for page in _pages(name):
                key = hashlib.blake2b(page, digest_size=16).digest()
                if key not in seen:
                    if limit is not None and len(seen) >= limit:
                        return
                    seen.add(key)
                    yield page


def installed() -> collections.abc.Iterator[bytes]:
    """Give the executable pages of this host's packages, each once.

    :returns: those of all files below ``/usr`` where there is no dpkg.
    """
    lists = sorted(glob.glob(_DPKG))
    return of_paths(_packaged(lists) if lists else ['/usr'])


def _packaged(lists: list[str]) -> collections.abc.Iterator[str]:
    for name in lists:
        with open(name, encoding='utf-8', errors='surrogateescape') as file:
            for path in file.read().splitlines():
                if os.path.isfile(path) and not os.path.islink(path):
                    yield path


def _files(path: str) -> collections.abc.Iterator[str]:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise exception.RuleError(
            _('%(path)s: %(error)s') % {'path': path,
                                        'error': error.strerror},
            _('name files or directories that can be read')) from error
    if not stat.S_ISDIR(mode):
        yield path
        return
    for top, directories, names in os.walk(path):
        directories.sort()
        for name in sorted(names):
            yield os.path.join(top, name)


def _pages(path: str) -> collections.abc.Iterator[bytes]:
    try:
        # A named pipe must not keep it waiting.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    with os.fdopen(fd, 'rb') as file:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            yield from executable(file)
