# SPDX-License-Identifier: Apache-2.0
"""How the tools fail: what went wrong, and the way out."""

import os
import select
import signal
import sys


class ToolError(Exception):
    """A failure that the user can do something about.

    :param message: what went wrong, without a full stop at its end
    :param hint: the way out: a command to run, a thing to check
    """

    def __init__(self, message, hint=None):
        super().__init__(message)
        self.hint = hint


def _on_sigterm(signum, _frame):
    sys.exit(128 + signum)


def _reader_gone():
    """Whether nobody reads the output any more, as after ``| head``."""
    poll = select.poll()
    # POLLERR and POLLHUP are told of unasked.
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def run(main):
    """Call ``main()`` and leave the process with its exit status.

    SIGTERM unwinds the stack, so that context managers clean up. What the
    terminal's encoding cannot show is shown as a question mark.

    :param main: function without arguments; its result is the exit status
        (None is 0)
    :raises SystemExit: always; status 1 for :class:`ToolError` and where
        nobody reads the output, 130 for Ctrl-C
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
    try:
        status = main()
        sys.stdout.flush()
    except ToolError as error:
        print('error: %s' % error, file=sys.stderr)
        if error.hint:
            print('  way out: %s' % error.hint, file=sys.stderr)
        status = 1
    except BrokenPipeError:
        # Or it is a connection of main's own.
        if not _reader_gone():
            raise
        # The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
