# SPDX-License-Identifier: Apache-2.0
"""What the quickstart shows: coloured and moving on a terminal, else plain.

Lines are at most 80 columns wide.
"""

import contextlib
import textwrap

from rich import console
from rich import text

_INDENT = 6
_LABEL = 9  # columns


def _count(number):
    """A number for people; None is one that is not known."""
    return '?' if number is None else format(number, ',')


class Show:
    """A screen, or a log.

    :param aside: write to stderr, and leave stdout to others
    """

    def __init__(self, aside):
        self._console = console.Console(stderr=aside, soft_wrap=True,
                                        highlight=False)

    def _print(self, *pieces):
        # Pieces, not markup: some of the text comes from elsewhere.
        self._console.print(text.Text.assemble(*pieces))

    def heading(self, title):
        """Begin a part."""
        self._print('\n', (title, 'bold'))

    def rows(self, rows):
        """Print facts.

        :param rows: list of (label, text)
        """
        for label, words in rows:
            self._print(' ' * _INDENT, (label.ljust(_LABEL), 'dim'), ' ',
                        words)

    def result(self, good, name, title, rows=(), problems=()):
        """Print what came of something.

        :param good: whether it is as it must be
        :param name: of the thing
        :param title: what it is
        :param rows: list of (label, text)
        :param problems: list of strings
        """
        self._print('  ', ('✓', 'bold green') if good else ('✗', 'bold red'),
                    ' ', (name.ljust(12), 'bold'), title)
        self.rows(rows)
        for problem in problems:
            self._print((textwrap.indent(problem.rstrip(), ' ' * _INDENT),
                         'red'))

    @contextlib.contextmanager
    def live(self):
        """A line that moves while something is under way.

        :returns: context manager that gives the function to set its text
        """
        with self._console.status('', spinner='dots') as status:
            yield lambda words: status.update(text.Text(words))

    @contextlib.contextmanager
    def hushed(self, yes):
        """Show nothing for a while, if so."""
        self._console.quiet = yes
        try:
            yield
        finally:
            self._console.quiet = False

    def count(self, number, total, run):
        """Print what came of one of several runs.

        :param number: of the run, from 1
        :param total: how many there are
        :param run: :class:`quickstart.Run`
        """
        problems = run.problems()
        if number == 1:
            self.heading('Runs')
        self.result(not problems, '%d of %d' % (number, total), (
            '%d stopped of %d' % (
                sum(not match.problems() for match in run.matches),
                len(run.matches)) + (
                ', boot %.2f s' % run.boot_s if run.boot_s else '')),
            problems=problems)

    def close(self, runs, summary):
        """Print how it all ended.

        :param runs: list of :class:`quickstart.Run`
        :param summary: see :func:`quickstart.summarize`
        """
        good = not any(run.problems() for run in runs)
        stopped = sum(match['blocked'] and not match['executed']
                      for match in summary['matches'])
        self.heading('Summary')
        self.result(good, 'stopped', '%d of %d; the clean program %s'
                    % (stopped, len(summary['matches']),
                       'ran' if summary['clean_ran'] else 'did not run'))
        if not good:
            self.rows([('look', 'tools/quickstart --keep DIR keeps the logs')])
            return
        self.rows([
            ('boot', '%(boot_s).2f s watched, %(stock_boot_s).2f s stock'
             % summary),
            ('fetches', '%s; the worker scanned %s distinct pages' % (
                _count(summary['fetches']), _count(summary['distinct'])))])
        self.heading('Next')
        self.rows([
            ('read', 'README.rst and doc/source: what it sees, and what not'),
            ('measure', 'tools/bench boot: what it costs'),
            ('look', 'tools/quickstart --keep DIR: the alert journal')])
