# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a tool works: everything goes to stderr."""

import collections
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

from virtavtools import errors

#: Seconds between two redraws of the live line on a terminal.
_REDRAW = 0.5
#: Seconds between two signs of life where there is no terminal.
_HEARTBEAT = 60
#: Seconds that a command has to end when it is told to.
_PATIENCE = 10
_TAIL = 20
_NINJA = re.compile(rb'\[(\d+)/(\d+)\]')


class CommandError(errors.ToolError):
    """A command failed.

    :param output: the last lines that it printed, one string
    """

    def __init__(self, message, output, hint=None):
        super().__init__(message, hint)
        self.output = output


class Step:
    """One thing that takes time, shown as one line."""

    _lock = threading.RLock()
    _open = []  # innermost last; only that one owns the live line

    def __init__(self, text, stream):
        self.text = text
        self._stream = stream
        self._live = stream.isatty()
        self._done = self._total = 0
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        with self._lock:
            self._open.append(self)
            if not self._live:
                self._print('… %s' % self.text)
        self._draw()
        self._ticker.start()
        return self

    def __exit__(self, kind, _value, _traceback):
        self._ended.set()
        self._ticker.join()
        with self._lock:
            self._open.remove(self)
            self._print('%s %s (%s)' % ('✗' if kind else '✓', self.text,
                                        self._elapsed()))

    def progress(self, done, total):
        """Say how far the step is.

        :param done: units done
        :param total: units in all; 0 when not known
        """
        self._done, self._total = done, total

    def note(self, text):
        """Print a line that stays."""
        with self._lock:
            self._print('  %s' % text)
        self._draw()

    def _elapsed(self):
        seconds = time.monotonic() - self._started
        if seconds < 60:
            return '%.1f s' % seconds
        return '%d min %02d s' % divmod(int(seconds), 60)

    def _tick(self):
        while not self._ended.wait(_REDRAW if self._live else _HEARTBEAT):
            self._draw(beat=True)

    def _line(self):
        line = '… %s  %s' % (self.text, self._elapsed())
        if self._total:
            line += '  %d/%d (%d %%)' % (self._done, self._total,
                                         100 * self._done // self._total)
        return line

    def _draw(self, beat=False):
        with self._lock:
            if self._open[-1:] != [self]:
                return
            if self._live:
                columns = os.get_terminal_size(self._stream.fileno()).columns
                # A terminal that does not know its width says 0.
                line = self._line()[:(columns or 80) - 1]
                self._write('\r\x1b[K' + line)
            elif beat:
                self._print(self._line())

    def _print(self, line):
        self._write('%s%s\n' % ('\r\x1b[K' if self._live else '', line))

    def _write(self, text):
        self._stream.write(text)
        self._stream.flush()


def step(text):
    """Show that something is under way.

    :param text: what is done, e.g. ``build QEMU 10.0.13``
    :returns: context manager that gives a :class:`Step`
    """
    return Step(text, sys.stderr)


def _end_group(process):
    """End a command, by force if need be, and what it has started."""
    # An interrupt first: most clean up after that, pip does so only then.
    # What was started with "&" ignores it.
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
                break
        os.killpg(process.pid, signal.SIGTERM)


def run(step, argv, log, cwd=None, env=None):
    """Run a command as part of a step.

    Lines that begin with ``[n/m]``, as ninja's do, move the step's progress.

    :param step: the :class:`Step` it belongs to
    :param argv: program and arguments
    :param log: file that the command and all it prints is appended to
    :param cwd: directory to run it in
    :param env: its whole environment; None for this process's own
    :raises CommandError: it cannot be started, or fails; carries the last
        lines of its output
    """
    argv = [os.fspath(word) for word in argv]
    shown = shlex.join(argv)
    if len(shown) > 100:
        shown = shown[:97] + '...'
    tail = collections.deque(maxlen=_TAIL)
    with open(log, 'ab') as output:
        output.write(('$ %s\n' % shlex.join(argv)).encode())
        output.flush()
        try:
            process = subprocess.Popen(argv, cwd=cwd, env=env,
                                       stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT,
                                       process_group=0)
        except OSError as error:
            raise CommandError('cannot run %s: %s' % (argv[0],
                                                      error.strerror), '')
        try:
            for line in process.stdout:
                output.write(line)
                output.flush()
                tail.append(line)
                position = _NINJA.match(line)
                if position:
                    step.progress(*map(int, position.groups()))
            status = process.wait()
        except BaseException:
            _end_group(process)
            raise
        finally:
            process.stdout.close()
    if status:
        text = b''.join(tail).decode(errors='replace').rstrip()
        raise CommandError(
            '%s: %s\n%s' % (shown,
                            'exit status %d' % status if status > 0
                            else 'killed by signal %d' % -status,
                            '\n'.join('  | %s' % line
                                      for line in text.splitlines())),
            text, hint='see the whole output in %s' % log)
