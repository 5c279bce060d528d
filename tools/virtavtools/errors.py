# SPDX-License-Identifier: Apache-2.0
"""How the tools fail: what went wrong, and the way out."""

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


def run(main):
    """Call ``main()`` and leave the process with its exit status.

    SIGTERM unwinds the stack, so that context managers clean up.

    :param main: function without arguments; its result is the exit status
        (None is 0)
    :raises SystemExit: always; status 1 for :class:`ToolError`, 130 for
        Ctrl-C
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        status = main()
    except ToolError as error:
        print('error: %s' % error, file=sys.stderr)
        if error.hint:
            print('  way out: %s' % error.hint, file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
