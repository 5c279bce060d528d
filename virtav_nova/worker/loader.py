# SPDX-License-Identifier: Apache-2.0
"""A loader: compiles a rule set, and is forked into scan processes.

Run by :mod:`virtav_nova.worker.process` as a program of its own, under limits
of memory and time, so that rules can do no more harm than to fail. Scan
processes share the compiled rules with it, and start in no time.

What it has to load is in memory that it is started with, see :func:`pack`.
"""

import collections.abc
import ctypes
import errno
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
import typing

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory
from virtav_nova.rules import sample
from virtav_nova.worker import board
from virtav_nova.worker import collect
from virtav_nova.worker import control
from virtav_nova.worker import sandbox
from virtav_nova.worker import scan

_PR_SET_PDEATHSIG = 1
_REASON_MAX = 4096
#: The kernel's table of files has to reach up to the highest number.
_FILES_MAX = 16384
#: Bytes that a scan process may take beside the rules: several times what
#: all that it keeps is bounded to.
_GROWTH = 1 << 30
_SEALS = (fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW
          | fcntl.F_SEAL_SHRINK)


def pack(head: dict[str, typing.Any],
         files: collections.abc.Sequence[directory.RuleFile]) -> int:
    """Put what a loader has to load into memory that does not change.

    :param head: ``engine`` (module and class), ``options`` (of the engine),
        ``memory`` (bytes) and ``seconds`` (limits of compiling), ``slots``
        (of boards), and ``settings`` (of scan processes); plain JSON.
    :param files: the rules.
    :returns: a file descriptor, close-on-exec.
    :raises OSError: when there is no memory to be had.
    """
    fd = os.memfd_create(
        'virtav-rules', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), 'wb') as memory:
            index = [(os.fsencode(file.name).hex(), len(file.content))
                     for file in files]
            start = json.dumps(head | {'files': index}).encode()
            memory.write(len(start).to_bytes(8, 'little'))
            memory.write(start)
            for file in files:
                memory.write(file.content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def unpack(fd: int) -> tuple[dict[str, typing.Any], list[directory.RuleFile]]:
    """Take out what :func:`pack` put in.

    :param fd: of the memory. Others may use the same open file.
    """
    at = 8
    size = int.from_bytes(os.pread(fd, at, 0), 'little')
    head = json.loads(os.pread(fd, size, at))
    files = []
    at += size
    for name, size in head['files']:
        files.append(directory.RuleFile(
            os.fsdecode(bytes.fromhex(name)), os.pread(fd, size, at)))
        at += size
    return head, files


def _die_with(parent: int) -> None:
    """Have this process end when its parent does.

    :param parent: process id.
    """
    # A rule may keep this process from noticing that its parent is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _last(fd: int) -> int:
    """Give a file the highest number there is.

    Linux closes the files of a process that dies from the last to the first.
    So the main process knows of it before the instances do, and connect
    again.

    :param fd: closed here.
    :returns: the new number.
    """
    files, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not 0 < files < _FILES_MAX:
        files = _FILES_MAX
    try:
        last = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, files - 1)
    except OSError:
        return fd
    os.close(fd)
    return last


class _Loader:
    """Forks scan processes, and tells what becomes of them.

    :param main: socket to the main process.
    :param engine: with the compiled rules.
    :param boards: of the scan processes.
    :param settings: of the scan processes.
    :ivar pid: of this process; a child has it from before it was forked.
    """

    def __init__(self, main: socket.socket, engine: base.Engine,
                 boards: board.Boards, settings: scan.Settings) -> None:
        self.pid = os.getpid()
        self._main = main
        self._engine = engine
        self._boards = boards
        self._settings = settings
        #: Slot and process id of each child, by pidfd.
        self._children: dict[int, tuple[int, int]] = {}
        self._poll = select.epoll()
        self._poll.register(main, select.EPOLLIN)

    def run(self) -> None:
        """Serve until the main process closes the socket."""
        while True:
            for fd, _events in self._poll.poll():
                if fd == self._main.fileno():
                    message, fds = control.receive(self._main)
                    self._obey(message, fds)
                else:
                    self._reap(fd)

    def _obey(self, message: control.Message, fds: list[int]) -> None:
        if message['type'] == 'fork':
            slot = message['slot']
            try:
                self._fork(slot, fds)
            except OSError as error:
                self._tell('refused', slot=slot, reason=error.strerror)
            finally:
                control.close(fds)
        elif message['type'] == 'suspect':
            # Those that are forked from now on know it from the beginning.
            self._engine.suspect(message['part'])
        elif message['type'] == 'name':
            name = self._engine.rule_name(message['part'])
            if name:
                self._tell('named', part=message['part'], namespace=name[0],
                           rule=name[1])

    def _fork(self, slot: int, fds: list[int]) -> None:
        if not fds:
            # The kernel drops what does not fit into the table of files.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pid = os.fork()
        if not pid:
            self._become(slot, fds[0])
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            # It ends by itself: nobody sends it anything.
            os.waitpid(pid, 0)
            raise
        self._children[pidfd] = slot, pid
        self._poll.register(pidfd, select.EPOLLIN)
        self._tell('forked', [pidfd], slot=slot, pid=pid)

    def _become(self, slot: int, fd: int) -> typing.NoReturn:
        """Be a scan process from now on."""
        status = 1
        try:
            _die_with(self.pid)
            self._main.close()
            self._poll.close()
            control.close(self._children)
            sandbox.limit_growth(_GROWTH)
            status = scan.serve(
                socket.socket(fileno=_last(fd)), self._boards.board(slot),
                self._engine, self._settings, collect.make)
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def _reap(self, pidfd: int) -> None:
        slot, pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _pid, status = os.waitpid(pid, 0)
        self._tell('exited', slot=slot, pid=pid,
                   status=os.waitstatus_to_exitcode(status))

    def _tell(self, kind: str, fds: typing.Sequence[int] = (),
              **content: object) -> None:
        socket.send_fds(self._main, [control.pack(kind, **content)], fds)


def _compile(head: control.Message, files: list[directory.RuleFile]
             ) -> tuple[base.Engine, dict[str, typing.Any]]:
    """Compile the rules, within the limits.

    :param head: see :func:`pack`.
    :returns: the engine, and what to tell of it.
    :raises Exception: any.
    """
    module, _colon, name = head['engine'].partition(':')
    kind: type[base.Engine] = getattr(importlib.import_module(module), name)
    options = base.EngineOptions(**head['options'])._replace(
        sample=sample.pages(), quarantine=frozenset(
            (namespace, rule)
            for namespace, rule in head['options']['quarantine']))
    confined = sandbox.enter_loader(kind.local_socket)
    sandbox.limit_memory(head['memory'])
    sandbox.limit_time(head['seconds'])
    try:
        engine = kind.compile(files, options)
        description = engine.describe()
    finally:
        # They are for compiling alone.
        sandbox.limit_memory(None)
        sandbox.limit_time(None)
    return engine, {'description': description, **confined._asdict()}


def main() -> int:
    """Run a loader.

    Arguments: file descriptors of the socket to the main process, the rules
    and the boards; process id of the main process.
    """
    control_fd, rules_fd, boards_fd, parent = map(int, sys.argv[1:])
    _die_with(parent)
    main_process = socket.socket(fileno=control_fd)
    head, files = unpack(rules_fd)
    os.close(rules_fd)
    boards = board.Boards(boards_fd, head['slots'])
    os.close(boards_fd)
    failure = None
    try:
        engine, told = _compile(head, files)
    except exception.ConfigurationError as error:
        failure = str(error), error.way_out, isinstance(
            error, exception.RuleError)
    except MemoryError:
        failure = (
            _('the rules take more memory than [virtav_worker] '
              'rules_memory_mib allows'),
            _('take out rules, or raise rules_memory_mib'), False)
    except Exception as error:
        traceback.print_exc()
        failure = (f'{type(error).__name__}: {error}',
                   _('see what the loader wrote above'), False)
    if failure:
        reason, way_out, rule = failure
        main_process.send(control.pack(
            'failed', reason=text.printable(reason, _REASON_MAX),
            way_out=way_out, rule=rule))
        return 1
    del files
    gc.collect()
    # To compile takes several times the memory of what was compiled, and the
    # C library keeps it.
    ctypes.CDLL(None).malloc_trim(0)
    # What exists now stays for good: no need to look through it again, and
    # to write to it, in any of the processes.
    gc.freeze()
    message = control.pack('loaded', **told)
    if len(message) > control.MESSAGE_MAX:
        message = control.pack('loaded', **told | {
            'description': {'rules': told['description']['rules']}})
    main_process.send(message)
    try:
        _Loader(main_process, engine, boards, scan.Settings(
            **head['settings'])).run()
    except EOFError:
        return 0
    return 1


if __name__ == '__main__':
    sys.exit(main())
