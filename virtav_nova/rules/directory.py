# SPDX-License-Identifier: Apache-2.0
"""Reading a directory of rules, once, so that what was read is what counts.

The bytes that are compiled are the bytes that are digested: nothing is
opened a second time by name.
"""

import collections.abc
import errno
import hashlib
import os
import stat
import typing

from virtav_nova import exception
from virtav_nova.i18n import _

SUFFIXES = ('.yar', '.yara')
#: Bytes of one file, and of all files of a rule set.
FILE_MAX = 16 << 20
TOTAL_MAX = 256 << 20

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

Refused = collections.abc.Callable[[str, exception.RuleError], None]


class RuleFile(typing.NamedTuple):
    """One file of rules.

    :param name: relative to the rule directory.
    """

    name: str
    content: bytes


def read(directory: str) -> list[RuleFile]:
    """Read all rule files below a directory.

    Names that start with a dot are passed over, such as the ``.git`` of a
    cloned rule repository. Links inside the directory are refused: whoever
    may write one could have any file of the host read as rules.

    :param directory: may itself be a link, so that sets can be switched.
    :returns: the files, sorted by name.
    :raises RuleError: when there is none, or one cannot be taken.
    """
    if not os.path.lexists(directory):
        raise exception.RuleError(
            _('%(path)s: %(error)s') % {
                'path': directory, 'error': os.strerror(errno.ENOENT)},
            _('bring rules into force, such as by "virtav-rules import '
              '/etc/virtav/rules", or change [virtav_worker] rules_dir'))
    files = gather(directory, _raise)
    if not files:
        raise exception.RuleError(
            _('no *.yar or *.yara file in rule directory %s') % directory,
            _('bring rules into force by "virtav-rules import", or change '
              '[virtav_worker] rules_dir'))
    return files


def gather(directory: str, refused: Refused) -> list[RuleFile]:
    """Read what can be read below a directory; may be nothing.

    :param directory: as in :func:`read`.
    :param refused: called for each file that cannot be taken, with its
        name and the reason; may raise it.
    :returns: the files, sorted by name.
    :raises RuleError: when the directory itself cannot be read, or the
        files are too much together.
    """
    try:
        top = os.open(directory, _DIRECTORY)
    except OSError as error:
        raise _unreadable(directory, error) from error
    files: list[RuleFile] = []
    total = 0

    def name(path: str) -> str:
        return os.path.relpath(path, directory)

    try:
        for path, content in _walk(
                top, directory,
                lambda path, error: refused(name(path), error)):
            files.append(RuleFile(name(path), content))
            total += len(content)
            if total > TOTAL_MAX:
                raise _oversized(path, TOTAL_MAX)
    finally:
        os.close(top)
    return sorted(files)


def read_file(path: str) -> RuleFile:
    """Read one file of rules, whatever its name ends with.

    :param path: must not be a link.
    :returns: the file, named by the last part of the path.
    :raises RuleError: when it cannot be taken.
    """
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise _refused(path)
        return RuleFile(os.path.basename(path), _content(None, path, path))
    except OSError as error:
        raise _unreadable(path, error) from error


def digest(engine: str, files: collections.abc.Iterable[RuleFile]) -> bytes:
    """Name a rule set by its content.

    :param engine: name and version of what gives the verdicts.
    :param files: sorted by name.
    :returns: 32 bytes; equal on two hosts means equal verdicts.
    """
    total = hashlib.sha256()
    parts = [engine.encode()]
    for file in files:
        parts += (os.fsencode(file.name), file.content)
    for part in parts:
        total.update(len(part).to_bytes(8, 'little'))
        total.update(part)
    return total.digest()


def _raise(_name: str, error: exception.RuleError) -> None:
    raise error


def _walk(directory: int, path: str, refused: Refused
          ) -> collections.abc.Iterator[tuple[str, bytes]]:
    """Read the rule files below a directory.

    :param directory: file descriptor.
    :param path: of the directory.
    :param refused: called with path and reason of what cannot be taken.
    :returns: path and content of each.
    """
    for name in os.listdir(directory):
        if name.startswith('.'):
            continue
        below = os.path.join(path, name)
        try:
            mode = os.stat(
                name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                refused(below, _refused(below))
                continue
            if stat.S_ISDIR(mode):
                inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW,
                                dir_fd=directory)
                try:
                    yield from _walk(inner, below, refused)
                finally:
                    os.close(inner)
            elif name.endswith(SUFFIXES):
                yield below, _content(directory, name, below)
        except exception.RuleError as error:
            refused(below, error)
        except OSError as error:
            refused(below, _unreadable(below, error))


def _content(directory: int | None, name: str, path: str) -> bytes:
    # What stat said does not count any more: the file may be another one
    # now. O_NONBLOCK: to open a named pipe would wait for its writer.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK,
                 dir_fd=directory)
    with os.fdopen(fd, 'rb') as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _refused(path)
        content = file.read(FILE_MAX + 1)
    if len(content) > FILE_MAX:
        raise _oversized(path, FILE_MAX)
    return content


def _oversized(path: str, limit: int) -> exception.RuleError:
    return exception.RuleError(
        _('%(path)s: more than %(limit)d MiB of rules') % {
            'path': path, 'limit': limit >> 20},
        _('take out what is not a rule, or split the file'))


def _refused(path: str) -> exception.RuleError:
    return exception.RuleError(
        _('%s: not a regular file') % path,
        _('put the file itself there; links and devices are refused'))


def _unreadable(path: str, error: OSError) -> exception.RuleError:
    return exception.RuleError(
        _('%(path)s: %(error)s') % {'path': path, 'error': error.strerror},
        _('have it there, and readable; the worker reads what [virtav_worker] '
          'rules_dir names'))

