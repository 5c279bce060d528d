# SPDX-License-Identifier: Apache-2.0
"""Results that are built once: ``~/.cache/virtav/KIND/KEY``."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import stat
import sys


def root():
    """The directory that holds all that the tools keep.

    :returns: absolute path; it need not exist
    """
    home = os.environ.get('XDG_CACHE_HOME', '')
    # The XDG specification has relative paths ignored.
    if not os.path.isabs(home):
        home = os.path.expanduser('~/.cache')
    return pathlib.Path(home) / 'virtav'


def _feed(digest, tag, data):
    # With its length, so that ('ab', 'c') and ('a', 'bc') differ.
    digest.update(b'%s %d\n' % (tag, len(data)))
    digest.update(data)


def _feed_path(digest, path):
    if path.is_symlink():
        _feed(digest, b'link', os.fsencode(os.readlink(path)))
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if child.name != '__pycache__':
                _feed(digest, b'name', os.fsencode(child.name))
                _feed_path(digest, child)
        _feed(digest, b'end', b'')
    else:
        # Of the mode only what git keeps: the rest is the user's umask.
        runs = path.stat().st_mode & stat.S_IXUSR
        _feed(digest, b'program' if runs else b'file', path.read_bytes())


def digest(*parts):
    """Name some content.

    :param parts: bytes, strings and paths; of a path the content counts: a
        file's bytes and whether it may be executed, or the same for all of
        a tree, with the names. Where it lies does not count.
    :returns: 32 hexadecimal digits
    :raises OSError: a path cannot be read
    """
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            _feed(result, b'bytes', part)
        elif isinstance(part, str):
            _feed(result, b'text', part.encode())
        else:
            _feed_path(result, part)
    return result.hexdigest()[:32]


class Entry:
    """A place in the cache, locked by this process.

    :ivar path: where the entry is once it is published
    """

    def __init__(self, directory, key):
        self.path = directory / key
        self._work = directory / ('.%s.work' % key)

    @property
    def ready(self):
        """Whether the entry is there, whole."""
        return self.path.exists()

    @property
    def work(self):
        """An empty directory to build in; gone with the entry's lock."""
        if not self._work.exists():
            _sweep(self._work.parent)
            self._work.mkdir()
        return self._work

    def publish(self, tree=None):
        """Make the entry ready, at one stroke.

        :param tree: the part of :attr:`work` to keep; default all
        """
        os.rename(tree or self.work, self.path)

    def clear(self):
        """Remove what was built and not published."""
        if self._work.exists():
            shutil.rmtree(self._work)


def _sweep(directory):
    """Remove what killed runs left under keys that may never come again."""
    for work in directory.glob('.*.work'):
        with open(work.with_suffix('.lock'), 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # not left: in use
            shutil.rmtree(work)


@contextlib.contextmanager
def entry(kind, key):
    """Lock one entry of the cache; waits for another run that has it.

    ::

        with cache.entry('guest', key) as entry:
            if not entry.ready:
                build_in(entry.work)
                entry.publish()
        return entry.path

    :param kind: directory of its kind, e.g. ``qemu``
    :param key: name in it, see :func:`digest`
    :returns: context manager that gives an :class:`Entry`
    """
    directory = root() / kind
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ('.%s.lock' % key), 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('  waiting for another run that builds %s/%s'
                  % (kind, key), file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = Entry(directory, key)
        found.clear()  # left by a run that was killed
        try:
            yield found
        finally:
            found.clear()
