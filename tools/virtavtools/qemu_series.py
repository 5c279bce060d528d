# SPDX-License-Identifier: Apache-2.0
"""The patch series on QEMU: as files, and as commits in a git tree."""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile

import virtavtools
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import qemu_source
from virtavtools import ui

#: Where the series lies in a checkout.
DIRECTORY = virtavtools.ROOT / 'qemu-patches' / 'qemu-10.0'
#: Programs needed, and the packages that have them.
_TOOLS = (('git', 'git'), ('xz', 'xz-utils'))
_MADE_FOR = '# Made for QEMU '
_BRANCH = 'series'
_TAG = 'pristine'
#: Where the tree's commits were when they equalled the series.
_SAVED = 'refs/virtav/saved'
#: What a patch looks like on disk: the same on every machine.
_FORMAT = ('--zero-commit', '--no-signature', '--no-numbered',
           '--no-cover-letter', '--abbrev=12')


class Series:
    """A directory with patches and the file ``series`` that orders them.

    :param directory: its path
    :ivar patches: paths of the patches, in order
    """

    def __init__(self, directory=DIRECTORY):
        self.directory = pathlib.Path(directory)
        self._file = self.directory / 'series'
        self._lines = []
        if self._file.exists():
            self._lines = self._file.read_text().splitlines()
        names = [line.partition('#')[0].strip() for line in self._lines]
        self.patches = [self.directory / name for name in names if name]
        for patch in self.patches:
            if not patch.is_file():
                raise errors.ToolError(
                    '%s lists %s, which is not there'
                    % (self._file, patch.name),
                    'restore the file, or take its line out')

    @property
    def made_for(self):
        """The version of QEMU it was made for, or None."""
        return next((line.removeprefix(_MADE_FOR) for line in self._lines
                     if line.startswith(_MADE_FOR)), None)

    @property
    def option(self):
        """What a command line needs to name it, with a space before."""
        if self.directory == DIRECTORY:
            return ''
        return ' --series %s' % shlex.quote(str(self.directory))

    @property
    def digest(self):
        """Names the patches by content and order; 32 hexadecimal digits."""
        return cache.digest(*(part for patch in self.patches
                              for part in (patch.name, patch)))

    def write(self, patches, version):
        """Put other patches in place of those that are there.

        A cover letter, ``0000-*.patch``, stays.

        :param patches: paths of files, in order
        :param version: of the QEMU they are made for
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        names = [patch.name for patch in patches]
        for old in self.directory.glob('[0-9]*.patch'):
            if old.name not in names and not old.name.startswith('0000-'):
                old.unlink()
        for patch in patches:
            (self.directory / patch.name).write_bytes(patch.read_bytes())
        head = []
        for line in self._lines:
            if not line.startswith('#'):
                break
            if not line.startswith(_MADE_FOR):
                head.append(line)
        lines = [*head, _MADE_FOR + version, *names]
        self._file.write_text(''.join('%s\n' % line for line in lines))


def git_env():
    """An environment in which git does the same for everybody.

    :returns: dict: no configuration of the user's, a fixed identity
    """
    env = {name: value for name, value in os.environ.items()
           if not name.startswith('GIT_')}
    env.update(LC_ALL='C', GIT_CONFIG_GLOBAL='/dev/null',
               GIT_CONFIG_NOSYSTEM='1')
    for role in ('AUTHOR', 'COMMITTER'):
        env['GIT_%s_NAME' % role] = 'VirtAV'
        env['GIT_%s_EMAIL' % role] = 'virtav@localhost'
        env['GIT_%s_DATE' % role] = '2025-01-01T00:00:00Z'
    return env


def _git(tree, *words, check=True, env=None):
    """Ask git something.

    :returns: its output, stripped; None if it fails and `check` is false
    """
    result = subprocess.run(['git', '-C', tree, *words],
                            env=env or git_env(), capture_output=True,
                            text=True, check=False)
    if not result.returncode:
        return result.stdout.strip()
    if check:
        raise errors.ToolError('git %s in %s: %s' % (
            ' '.join(words), tree, result.stderr.strip()))
    return None


def _head(tree, name='HEAD'):
    """The commit of a name, or None."""
    return _git(tree, 'rev-parse', '--verify', '--quiet', name, check=False)


def _log():
    path = cache.root() / 'log' / 'qemu-series.log'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plant(tree, source):
    """Check out a pristine QEMU as a commit of its own.

    In a tree that is there, only files that differ are touched, so that a
    build in it goes on from where it was.

    :param tree: directory of the git tree; made if missing
    :param source: :class:`qemu_source.Source`
    :returns: the source with its version
    :raises errors.ToolError: see :func:`qemu_source.identify`
    """
    packages.install(*(package for program, package in _TOOLS
                       if not shutil.which(program)), why='to unpack QEMU')
    source = qemu_source.identify(source)
    env = git_env()
    with ui.step('unpack %s' % source.tarball.name) as step:
        ui.run(step, ['git', 'init', '--quiet',
                      '--initial-branch=' + _BRANCH, tree], _log(), env=env)
        _git(tree, 'config', 'virtav.source', source.sha256)
        if _head(tree):
            with tempfile.TemporaryDirectory(dir=tree) as beside:
                index = tree / '.git' / 'index.pristine'
                index.unlink(missing_ok=True)
                _commit_pristine(step, tree, source, beside, index)
                index.unlink()
        else:
            _commit_pristine(step, tree, source, tree,
                             tree / '.git' / 'index')
        ui.run(step, ['git', '-C', tree, 'checkout', '--quiet', '--force',
                      '-B', _BRANCH, _TAG], _log(), env=env)
        # What is in no commit; a build, which .gitignore names, stays.
        _git(tree, 'clean', '--quiet', '--force', '-d')
    return source


def _commit_pristine(step, tree, source, place, index):
    """Unpack a QEMU, make a commit of it, and tag that.

    :param place: directory to unpack in
    :param index: git's index to use
    """
    qemu_source.unpack(step, source, place, _log())
    env = git_env() | {'GIT_INDEX_FILE': str(index)}
    # --force: also what .gitignore names, it came with the tarball. The low
    # threshold makes one pack instead of ten thousand small files.
    ui.run(step, ['git', '-c', 'core.bigFileThreshold=1', '--git-dir',
                  tree / '.git', '--work-tree', '.', 'add', '--force', '.'],
           _log(), cwd=place, env=env)
    _git(tree, 'tag', '--force', _TAG,
         _git(tree, 'commit-tree', _git(tree, 'write-tree', env=env),
              '-m', 'QEMU %s' % source.version))


def apply(tree, series):
    """Put a series on the tree's commit, each patch as a commit.

    :param tree: the git tree
    :param series: :class:`Series`
    :raises errors.ToolError: a patch does not apply; git stands at it, and
        the error says which it is
    """
    with ui.step('apply %d patches' % len(series.patches)) as step:
        try:
            ui.run(step, ['git', '-C', tree, 'am', '--quiet',
                          '--keep-non-patch', '--whitespace=nowarn',
                          '--committer-date-is-author-date',
                          *series.patches], _log(), env=git_env())
        except ui.CommandError as error:
            at = _git(tree, 'rev-parse', '--git-path', 'rebase-apply/next')
            at = (tree / at).read_text() if (tree / at).exists() else '1'
            version = (tree / 'VERSION').read_text().strip()
            raise errors.ToolError(
                '%s does not apply to QEMU %s:\n%s'
                % (series.patches[int(at) - 1].name, version,
                   '\n'.join('  | %s' % line
                             for line in error.output.splitlines()
                             if line.startswith(('error:', 'fatal:')))),
                'mend the series in a tree: tools/qemu-series edit%s%s'
                % (series.option,
                   '; or take the QEMU it was made for: tools/build-qemu%s '
                   '--upstream %s --sha256 HEX'
                   % (series.option, series.made_for)
                   if series.made_for not in (None, version) else ''))


def _is_tree(tree):
    """Whether a directory is a tree that :func:`edit` made."""
    return ((tree / '.git').is_dir()
            and _git(tree, 'config', 'virtav.source', check=False))


def _under_way(tree):
    """The git command that stands half done in a tree, or None."""
    for name, command in (('rebase-apply', 'git am'),
                          ('rebase-merge', 'git rebase'),
                          ('CHERRY_PICK_HEAD', 'git cherry-pick')):
        if (tree / '.git' / name).exists():
            return command
    return None


def _unsaved(tree):
    """Why a tree's work would be lost, or None."""
    under_way = _under_way(tree)
    if under_way:
        return 'is in the middle of %s' % under_way
    if _git(tree, 'status', '--porcelain'):
        return 'has changes that are not committed'
    if _head(tree) != _head(tree, _SAVED):
        return 'has commits that are not in the series'
    return None


def _mark_saved(tree, series):
    _git(tree, 'update-ref', _SAVED, 'HEAD')
    _git(tree, 'config', 'virtav.series', series.digest)


def edit(tree, source, series, force=False):
    """Make a git tree with the series as commits on the tag ``pristine``.

    :param tree: directory; an earlier tree of this kind is brought up to
        date
    :param source: :class:`qemu_source.Source`
    :param series: :class:`Series`
    :param force: throw away what the tree has and the series has not
    :raises errors.ToolError: the directory holds something else, or work
        that is not saved; a patch does not apply
    """
    if tree.exists() and any(tree.iterdir()):
        if not _is_tree(tree):
            raise errors.ToolError(
                '%s is not empty, and no tree of tools/qemu-series' % tree,
                'name another directory')
        unsaved = _unsaved(tree)
        if unsaved and not force:
            raise errors.ToolError(
                '%s %s' % (tree, unsaved),
                'save them: tools/qemu-series refresh%s %s; or throw them '
                'away: tools/qemu-series edit%s --force %s'
                % (series.option, tree, series.option, tree))
        if _under_way(tree):
            for command in ('am', 'rebase', 'cherry-pick'):
                _git(tree, command, '--quit', check=False)
        if (not unsaved
                and _git(tree, 'config', 'virtav.source') == source.sha256
                and _git(tree, 'config', 'virtav.series') == series.digest):
            return
    plant(tree, source)
    _git(tree, 'config', 'virtav.series', series.digest)
    if series.patches:
        try:
            apply(tree, series)
        except errors.ToolError as error:
            error.hint = (
                'in %s: git am --show-current-patch=diff | git apply '
                '--reject; mend what was rejected; git add; git am '
                '--continue; then tools/qemu-series refresh%s %s'
                % (tree, series.option, tree))
            raise
    _mark_saved(tree, series)


def refresh(tree, series, force=False):
    """Write the series back from a tree's commits.

    :param tree: directory that :func:`edit` made
    :param series: :class:`Series` to write
    :param force: write even if the series is not the one that the tree was
        made from
    :raises errors.ToolError: not such a tree; changes that are not
        committed; commits that are no series
    """
    if not _is_tree(tree):
        raise errors.ToolError(
            '%s is no tree of tools/qemu-series' % tree,
            'make one: tools/qemu-series edit%s %s' % (series.option, tree))
    under_way = _under_way(tree)
    if under_way:
        raise errors.ToolError('%s is in the middle of %s'
                               % (tree, under_way),
                               'end it: %s --continue' % under_way)
    if _git(tree, 'status', '--porcelain'):
        raise errors.ToolError('%s has changes that are not committed'
                               % tree, 'commit them: git -C %s commit' % tree)
    commits = _TAG + '..HEAD'
    if (_git(tree, 'merge-base', '--is-ancestor', _TAG, 'HEAD',
             check=False) is None
            or _git(tree, 'rev-list', '--merges', commits)
            or not _git(tree, 'rev-list', commits)):
        raise errors.ToolError(
            'the commits of %s are no line that begins at the tag %s'
            % (tree, _TAG),
            'bring them into one: git -C %s rebase %s' % (tree, _TAG))
    if (series.digest != _git(tree, 'config', 'virtav.series')
            and not force):
        raise errors.ToolError(
            '%s has changed since %s was made from it'
            % (series.directory, tree),
            'make a tree of it in another directory and bring your commits '
            'over; or write over it: tools/qemu-series refresh%s --force %s'
            % (series.option, tree))
    version = _git(tree, 'show', _TAG + ':VERSION')
    with tempfile.TemporaryDirectory() as fresh:
        _git(tree, 'format-patch', *_FORMAT, '--output-directory', fresh,
             commits)
        series.write(sorted(pathlib.Path(fresh).iterdir()), version)
    _mark_saved(tree, Series(series.directory))


def main(argv=None):
    """tools/qemu-series."""
    parser = argparse.ArgumentParser(
        prog='tools/qemu-series',
        description='Edit the patch series on QEMU as commits.',
        epilog='Edit with git as you like (commit --amend, rebase -i): what '
        'follows the tag "pristine" is the series.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (
            ('edit', 'make a git tree with the series as commits; prints '
             'its path'),
            ('refresh', 'write the series back from the commits')):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            'tree', metavar='DIR', nargs='?', type=pathlib.Path,
            default=cache.root() / 'qemu-series',
            help='the git tree (default: %(default)s)')
        command.add_argument(
            '--series', metavar='DIR', default=DIRECTORY,
            help='where the patches are (default: %(default)s)')
        command.add_argument(
            '--force', action='store_true',
            help={'edit': 'throw away work in DIR that is not saved',
                  'refresh': 'write over a series that has changed since '
                  'the tree was made'}[name])
        if name == 'edit':
            qemu_source.add_arguments(command)
    args = parser.parse_args(argv)
    tree = args.tree.absolute()
    series = Series(args.series)
    if args.command == 'edit':
        edit(tree, qemu_source.resolve(args), series, args.force)
        print(tree)
    else:
        refresh(tree, series, args.force)
        for patch in Series(args.series).patches:
            print(patch)
