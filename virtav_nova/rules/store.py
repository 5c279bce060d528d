# SPDX-License-Identifier: Apache-2.0
"""Rule sets on disk, each named by its content, one of them in force.

::

    sets/<digest>/SOURCE/FILE.yar    what the engine is given
    sets/<digest>/manifest.json      what the set is, on the whole
    sets/<digest>/rules.jsonl.zst    a line for each rule, taken or not
    current -> sets/<digest>         the set in force
    history                          a line for each set brought into force
    lock

A set is written under another name and appears when it is complete and on
the disk; after that its rules never change. Whoever follows ``current`` gets
one set or the other.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import fcntl
import grp
import io
import json
import os
import re
import shutil
import tempfile
import typing

import zstandard

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.rules import directory

FORMAT = 1

_DIGEST = re.compile(r'[0-9a-f]{64}')
#: Of a rule list, against a file that was damaged.
_LIST_MAX = 2 << 30  # characters
_HISTORY_MAX = 1000  # lines
_TEMPORARY = '.new-'


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one rule.

    :ivar source: name of the source that it came with.
    :ivar file: in the source, as it was found.
    :ivar line: in that file; 0 where it is the file itself.
    :ivar rule: name; empty where it is the file itself.
    :ivar state: one of :data:`STATES`.
    :ivar reason: why it is not in force; empty where it is.
    :ivar namespace: file in the set; empty where it is not in force.
    :ivar text: page form; empty where there is none.
    :ivar original: as it was found; empty where that is ``text``.
    :ivar dropped: terms of the condition that were left out, and why.
    :ivar warnings: what need not be a fault; only where it was asked for.
    :ivar about: see :func:`virtav_nova.rules.meta.describe`.
    :ivar us: mean time it adds to the scan of a harmless page, in µs, or
        None. Of quick rules it is the mean of several that ran together.
    :ivar hits: pages of the sample that it matched, or None.
    :ivar key: equal for rules that look for the same.
    """

    source: str
    file: str
    line: int
    rule: str
    state: str
    reason: str = ''
    namespace: str = ''
    text: str = ''
    original: str = ''
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    about: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    us: float | None = None
    hits: int | None = None
    key: str = ''

    @property
    def in_force(self) -> bool:
        """:returns: whether the engine is given the rule."""
        return self.state in IN_FORCE

    @property
    def path(self) -> str:
        """:returns: the rule's name for a user, unique in a set."""
        parts = [self.source, self.file]
        return '/'.join(parts) + (f':{self.rule}' if self.rule else '')


#: What becomes of rules: taken as it is; taken after terms were dropped; left
#: out as noisy or slow; left out as another one looks for the same; private,
#: so a part of those that refer to it; left out as it cannot be compiled or
#: never holds on a page.
STATES = ('as-written', 'page-form', 'quarantined', 'duplicate', 'private',
          'refused')
IN_FORCE = ('as-written', 'page-form')


class Set(typing.NamedTuple):
    """A rule set of the store.

    :param digest: 64 hexadecimal digits.
    :param manifest: what :meth:`Store.add` was given, and its digest.
    :param current: whether it is in force.
    """

    digest: str
    manifest: dict[str, typing.Any]
    current: bool


class Store:
    """The rule sets below a directory.

    :param path: need not exist.
    :param group: name of the group that may read, None for everybody.
    """

    def __init__(self, path: str, group: str | None = None) -> None:
        self.path = path
        self._sets = os.path.join(path, 'sets')
        self._current = os.path.join(path, 'current')
        self._history = os.path.join(path, 'history')
        self._gid = -1
        if group is not None:
            try:
                self._gid = grp.getgrnam(group).gr_gid
            except KeyError as error:
                raise exception.RuleError(
                    _('no group is called %s') % group,
                    _('change [virtav_rules] group')) from error

    @contextlib.contextmanager
    def locked(self) -> collections.abc.Iterator[None]:
        """Keep others from changing the store.

        :raises RuleError: at once, when another one is at it.
        """
        with self._writing():
            for path in (self.path, self._sets):
                os.makedirs(path, exist_ok=True)
                self._own(path)
            fd = os.open(os.path.join(self.path, 'lock'),
                         os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise exception.RuleError(
                    _('another virtav-rules is changing the rules in %s')
                    % self.path, _('wait until it is done')) from error
            self._sweep()
            yield
        finally:
            os.close(fd)

    def sets(self) -> list[Set]:
        """:returns: all sets, that brought into force last first."""
        last = {record['digest']: number
                for number, record in enumerate(self.history())}
        try:
            names = os.listdir(self._sets)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from error
        found = [self.get(name) for name in names if _DIGEST.fullmatch(name)]
        return sorted(found, key=lambda each: (
            last.get(each.digest, -1), each.manifest.get('created', '')),
            reverse=True)

    def current(self) -> str | None:
        """:returns: the digest of the set in force, None if there is none.

        :raises RuleError: when that cannot be told.
        """
        try:
            name = os.path.basename(os.readlink(self._current))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        return name if _DIGEST.fullmatch(name) else None

    def find(self, name: str) -> Set:
        """Find a set.

        :param name: its digest or the first digits of it; ``current``; or
            ``previous``.
        :raises RuleError: when there is none, or several.
        """
        if name == 'current':
            digest = self.current()
            if digest is None:
                raise exception.RuleError(
                    _('no rule set is in force in %s') % self.path,
                    _('run virtav-rules import /etc/virtav/rules'))
            return self.get(digest)
        if name == 'previous':
            return self.get(self._previous())
        found = [each for each in self.sets()
                 if each.digest.startswith(name)]
        if len(found) != 1 or not name:
            raise exception.RuleError(
                _('%(number)d rule sets have a digest that begins with '
                  '%(name)s') % {'number': len(found), 'name': name},
                _('see virtav-rules list'))
        return found[0]

    def get(self, digest: str) -> Set:
        """:raises RuleError: when there is no such set, or it is damaged."""
        path = os.path.join(self._sets, digest, 'manifest.json')
        try:
            with open(path, encoding='utf-8') as file:
                manifest = json.load(file)
            if not isinstance(manifest, dict):
                raise ValueError
        except OSError as error:
            raise exception.RuleError(
                f'{path}: {error.strerror}',
                _('see virtav-rules list for the sets that are kept')
            ) from error
        except ValueError as error:
            raise self._damaged(path) from error
        if manifest.get('format') != FORMAT:
            raise exception.RuleError(
                _('%(path)s: format %(format)r is not known') % {
                    'path': path, 'format': manifest.get('format')},
                _('use the release of virtav-rules that wrote it'))
        return Set(digest, manifest, digest == self.current())

    def entries(self, digest: str) -> list[Entry]:
        """:returns: what became of each rule, in order.

        :raises RuleError: when the set is damaged.
        """
        path = os.path.join(self._sets, digest, 'rules.jsonl.zst')
        found = []
        total = 0
        try:
            with open(path, 'rb') as packed, \
                    zstandard.ZstdDecompressor().stream_reader(
                        packed) as reader:
                for line in io.TextIOWrapper(reader, encoding='utf-8'):
                    total += len(line)
                    if total > _LIST_MAX:
                        raise ValueError
                    fields = json.loads(line)
                    for name in ('dropped', 'warnings'):
                        fields[name] = tuple(fields[name])
                    found.append(Entry(**fields))
        except OSError as error:
            raise self._unusable(error) from error
        except (KeyError, TypeError, ValueError,
                zstandard.ZstdError) as error:
            raise self._damaged(path) from error
        return found

    def files(self, digest: str) -> list[directory.RuleFile]:
        """:returns: what the engine is given.

        :raises RuleError: when the set is not there.
        """
        return directory.read(os.path.join(self._sets, digest))

    def add(self, files: collections.abc.Sequence[directory.RuleFile],
            entries: collections.abc.Iterable[Entry],
            manifest: dict[str, typing.Any]) -> str:
        """Write a set; it is not in force by that. Needs the lock.

        The same rules are the same set; what is said of them is replaced.

        :param files: sorted by name; the names are parts of paths.
        :param manifest: plain JSON.
        :returns: its digest.
        :raises RuleError: when it cannot be written.
        """
        name = digest(files)
        manifest = {**manifest, 'format': FORMAT, 'digest': name}
        final = os.path.join(self._sets, name)
        with self._writing():
            work = tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._sets)
            try:
                for file in files:
                    self._write(work, file.name, file.content)
                self._write(work, 'rules.jsonl.zst', _packed(entries))
                self._write(work, 'manifest.json', json.dumps(
                    manifest, indent=1, sort_keys=True).encode() + b'\n')
                self._settle(work)
                if os.path.isdir(final):
                    for about in ('rules.jsonl.zst', 'manifest.json'):
                        os.rename(os.path.join(work, about),
                                  os.path.join(final, about))
                    _sync(final)
                else:
                    os.rename(work, final)
                _sync(self._sets)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return name

    def activate(self, digest: str, action: str) -> None:
        """Bring a set into force. Needs the lock.

        :param action: ``import`` or ``rollback``.
        :raises RuleError: when there is no such set, or nothing can be
            written; the set in force then stays.
        """
        self.get(digest)
        record = {'time': now(), 'action': action, 'digest': digest}
        with self._writing():
            # Written first, as there has to be room for it, and in force
            # last: a set that never was in force is none to go back to.
            self._prepare_history(record)
            # A name of its own: one that is left behind is no hindrance.
            link = f'{self._current}.{os.getpid()}'
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(os.path.join('sets', digest), link)
            os.rename(link, self._current)
            os.rename(f'{self._history}.new', self._history)
            _sync(self.path)

    def history(self) -> list[dict[str, typing.Any]]:
        """:returns: the sets that were brought into force, oldest first."""
        records = []
        try:
            with open(self._history, encoding='utf-8',
                      errors='replace') as file:
                for line in file:
                    # A crash can leave a broken line.
                    with contextlib.suppress(ValueError):
                        record = json.loads(line)
                        if isinstance(record, dict) and _DIGEST.fullmatch(
                                str(record.get('digest'))):
                            records.append(record)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unusable(error) from error
        return records

    def collect(self, keep: int) -> list[str]:
        """Remove old sets. Needs the lock.

        :param keep: sets that stay; that in force is one of them, and that
            before it another.
        :returns: digests of those removed.
        """
        removed = []
        in_order = sorted(self.sets(), key=lambda each: not each.current)
        for each in in_order[max(keep, 2):]:
            # Out of sight first, then file by file.
            path = os.path.join(self._sets, each.digest)
            aside = os.path.join(
                self._sets, f'{_TEMPORARY}old-{each.digest}')
            with self._writing():
                os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
            removed.append(each.digest)
        return removed

    def _previous(self) -> str:
        """:returns: the set to go back to.

        Going back twice goes back two sets, not to and fro.
        """
        stack: list[str] = []
        for record in self.history():
            name = record['digest']
            if record.get('action') == 'rollback' and name in stack:
                del stack[stack.index(name):]
            if name in stack:
                stack.remove(name)
            stack.append(name)
        current = self.current()
        for name in reversed(stack):
            if name != current and os.path.isdir(
                    os.path.join(self._sets, name)):
                return name
        raise exception.RuleError(
            _('there is no rule set to go back to'),
            _('name one that virtav-rules list shows, or import rules'))

    def _prepare_history(self, record: dict[str, typing.Any]) -> None:
        records = [*self.history(), record]
        if len(records) > _HISTORY_MAX:
            records = records[-_HISTORY_MAX // 2:]
        lines = ''.join(json.dumps(each) + '\n' for each in records)
        self._write(self.path, 'history.new', lines.encode())

    def _write(self, top: str, name: str, content: bytes) -> None:
        path = os.path.join(top, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(content)
            self._permit(file.fileno(), folder=False)
            file.flush()
            os.fsync(file.fileno())

    def _settle(self, top: str) -> None:
        """Have directories on disk, with their modes."""
        for path, _names, _files in os.walk(top, topdown=False):
            self._permit(path, folder=True)
            _sync(path)

    def _own(self, path: str) -> None:
        """See that a directory is nobody else's, and give it its mode."""
        # By a descriptor: the parent may belong to the worker's user, who
        # could put a link there, or a directory with links in it.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise exception.RuleError(
                    _('%s belongs to another user') % path,
                    _('run virtav-rules as its owner, who should not be the '
                      'user of the worker; to make it that of root again: '
                      'chown -R root %s') % self.path)
            self._permit(fd, folder=True)
        finally:
            os.close(fd)

    def _permit(self, path: str | int, *, folder: bool) -> None:
        # Whatever the umask: the worker has to be able to read it, and
        # nobody but the owner may write.
        os.chown(path, -1, self._gid)
        everybody = self._gid == -1
        if folder:
            os.chmod(path, 0o755 if everybody else 0o750)
        else:
            os.chmod(path, 0o644 if everybody else 0o640)

    def _sweep(self) -> None:
        """Remove what an importer left that did not come to its end."""
        for name in os.listdir(self._sets):
            if name.startswith(_TEMPORARY):
                shutil.rmtree(os.path.join(self._sets, name),
                              ignore_errors=True)
        for name in os.listdir(self.path):
            if name.startswith('current.'):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.path, name))

    @contextlib.contextmanager
    def _writing(self) -> collections.abc.Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> exception.RuleError:
        return exception.RuleError(
            f'{error.filename or self.path}: {error.strerror}',
            _('run virtav-rules as the owner of the rule store, which is '
              'below [virtav_worker] state_dir, with room on the disk'))

    def _damaged(self, path: str) -> exception.RuleError:
        return exception.RuleError(
            _('%s is damaged') % path,
            _('go back to another set, or import the rules again with '
              '--only'))


def digest(files: collections.abc.Iterable[directory.RuleFile]) -> str:
    """:returns: the name of a set with these files."""
    return directory.digest(f'virtav-rules {FORMAT}', files).hex()


def now() -> str:
    """:returns: the time, ISO 8601 in UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _packed(entries: collections.abc.Iterable[Entry]) -> bytes:
    lines = bytearray()
    packer = zstandard.ZstdCompressor(level=6).compressobj()
    for entry in entries:
        lines += packer.compress(
            json.dumps(vars(entry), sort_keys=True).encode() + b'\n')
    return bytes(lines + packer.flush())


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
