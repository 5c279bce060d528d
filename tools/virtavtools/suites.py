# SPDX-License-Identifier: Apache-2.0
"""The test suites, run with the installs that they need."""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import virtavtools
from virtavtools import cache
from virtavtools import errors
from virtavtools import packages
from virtavtools import parts
from virtavtools import ui
from virtavtools import venv

ROOT = virtavtools.ROOT
DOC_REQUIREMENTS = ROOT / 'doc' / 'requirements.txt'
#: A hook's line in the output of pre-commit.
HOOK = re.compile(r'^\S.*?\.{3,}(?:\(.*\))?(Passed|Failed|Skipped)$', re.M)
#: A line of the totals that stestr closes with.
TOTAL = re.compile(r'^ - (\w[\w ]+): (\d+)$', re.M)
#: Imports each module of the installed package.
IMPORT_ALL = """
import importlib
import pkgutil
import virtav_nova
for module in pkgutil.walk_packages(virtav_nova.__path__, 'virtav_nova.'):
    importlib.import_module(module.name)
"""
LOAD_ENGINE = """
from stevedore import driver
driver.DriverManager('virtav.engines', 'yara')
"""


class Tally:
    """How many checks of a suite passed, failed and were skipped."""

    def __init__(self, passed=0, failed=0, skipped=0):
        self.passed = passed
        self.failed = failed
        self.skipped = skipped

    def __str__(self):
        return '%d passed, %d failed, %d skipped' % (
            self.passed, self.failed, self.skipped)

    def add(self, other):
        """Count what another tally counted."""
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    @contextlib.contextmanager
    def check(self, text):
        """Count one check: what is done within, passed unless it raises.

        :param text: what is checked, shown as a step
        :returns: context manager that gives the :class:`ui.Step`
        """
        try:
            with ui.step(text) as step:
                yield step
        except errors.ToolError as error:
            complain(error)
            self.failed += 1
        else:
            self.passed += 1

    def skip(self, text, reason):
        """Count one check that is not made, and say why."""
        print('skipped: %s: %s' % (text, reason), file=sys.stderr)
        self.skipped += 1


def complain(error):
    """Show a failure that does not end the run."""
    print('error: %s' % error, file=sys.stderr)
    if error.hint:
        print('  way out: %s' % error.hint, file=sys.stderr)


def live(argv, **env):
    """Run a command and show its output as it comes.

    :param argv: program and arguments
    :param env: what to add to the environment
    :returns: exit status, and all that it printed
    """
    env = dict(os.environ, PYTHONUNBUFFERED='1',
               PATH='%s:%s' % (argv[0].parent, os.environ['PATH']), **env)
    lines = []
    # A group of its own, so that whatever it starts ends with this program.
    with subprocess.Popen(argv, cwd=ROOT, env=env, text=True,
                          errors='replace', stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          process_group=0) as process:
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                lines.append(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)
            raise
    if lines and not lines[-1].endswith('\n'):
        print()
    return process.returncode, ''.join(lines)


def stestr(path, *options, **env):
    """Run the tests below a directory.

    :param path: directory, from the top of the checkout
    :param options: for ``stestr run``
    :param env: what to add to the environment
    :returns: :class:`Tally`
    """
    status, output = live([venv.ensure() / 'stestr', 'run', *options],
                          OS_TEST_PATH=path, **env)
    totals = {name: int(count) for name, count in
              TOTAL.findall(output.rpartition('Totals')[2])}
    tally = Tally(
        totals.get('Passed', 0) + totals.get('Expected Fail', 0),
        totals.get('Failed', 0) + totals.get('Unexpected Success', 0),
        totals.get('Skipped', 0))
    # It also fails without a test that did, as when none can be imported.
    if status and not tally.failed:
        tally.failed = 1
    return tally


def run_pep8():
    """Style and types: each hook of pre-commit counts."""
    packages.install('git', why='to list the files of the project')
    status, output = live([venv.ensure() / 'pre-commit', 'run',
                           '--all-files', '--color=never'])
    results = HOOK.findall(output)
    tally = Tally(*map(results.count, ('Passed', 'Failed', 'Skipped')))
    if status and not tally.failed:
        tally.failed = 1
    return tally


def run_unit():
    """Unit tests."""
    return stestr('tests/unit')


def run_functional():
    """Tests with guests that run under the patched QEMU."""
    packages.install('binutils', 'gcc', 'libc6-dev',
                     why='to build what the tests run without a kernel')
    packages.install('libfaketime', why='to have the clock jump')
    # The tests run a clamd of their own.
    packages.install('clamav-daemon', why='to try the engine clamav')
    return stestr('tests/functional', '--serial',
                  VIRTAV_QEMU=str(parts.emulator()),
                  VIRTAV_GUEST=str(parts.guest()))


def run_fuzz():
    """What strangers send: 30 s for each target, 10 minutes at night."""
    return stestr('tests/fuzz')


def run_docs():
    """The documentation and the release notes, free of warnings."""
    tally = Tally()
    binaries = venv.ensure(extras=[DOC_REQUIREMENTS])
    log = log_of('docs')
    with tally.check('sample configuration') as step:
        ui.run(step, [binaries / 'oslo-config-generator', '--config-file',
                      'etc/virtav/virtav-config-generator.conf'], log, ROOT)
    sphinx = [binaries / 'sphinx-build', '-W', '--keep-going', '-E', '-b',
              'html']
    with tally.check('documentation') as step:
        ui.run(step, [*sphinx, 'doc/source', 'doc/build/html'], log, ROOT)
    if (ROOT / '.git' / 'shallow').exists():
        tally.skip('release notes', 'they need the history, and this clone '
                   'is shallow: git fetch --unshallow')
        return tally
    with tally.check('release notes') as step:
        ui.run(step, [*sphinx, 'releasenotes/source',
                      'releasenotes/build/html'], log, ROOT)
    return tally


def run_build():
    """The wheel: built, installed by itself and tried there."""
    tally = Tally()
    binaries = venv.ensure()
    log = log_of('build')
    with tempfile.TemporaryDirectory(prefix='virtav-build-') as directory:
        scratch = pathlib.Path(directory)
        with tally.check('build source tarball, and wheel from it') as step:
            ui.run(step, [binaries / 'python', '-m', 'build', '--outdir',
                          scratch, ROOT], log, scratch)
        with tally.check('install the wheel') as step:
            ui.run(step, [sys.executable, '-m', 'venv', scratch / 'venv'],
                   log)
            ui.run(step, [scratch / 'venv/bin/pip', 'install',
                          *scratch.glob('*.whl')], log, scratch)
        if tally.failed:
            return tally
        rules = scratch / 'venv/etc/virtav/rules'
        configuration = scratch / 'virtav.conf'
        configuration.write_text('[virtav_worker]\nrules_dir = %s\n' % rules)
        python = [scratch / 'venv/bin/python', '-I', '-c']
        worker = [scratch / 'venv/bin/virtav-scan-worker']
        for text, argv in (
                ('import each module', [*python, IMPORT_ALL]),
                ('load the engine by name', [*python, LOAD_ENGINE]),
                ('worker shows its help', [*worker, '--help']),
                ('rules are installed',
                 ['diff', '-r', ROOT / 'etc/virtav/rules', rules]),
                ('worker takes the rules',
                 [*worker, '--config-file', configuration, '--check'])):
            with tally.check(text) as step:
                ui.run(step, argv, log, scratch)
    return tally


#: Name of each suite and what runs it. All of them belong into CI.
SUITES = {
    'pep8': run_pep8,
    'unit': run_unit,
    'functional': run_functional,
    'fuzz': run_fuzz,
    'docs': run_docs,
    'build': run_build,
}
QUICK = ('pep8', 'unit')


def log_of(suite):
    """The file for what a suite's commands print, emptied.

    :param suite: name of the suite
    :returns: path
    """
    path = cache.root() / 'log' / ('test-%s.log' % suite)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'')
    return path


def run_suite(name):
    """Run one suite.

    :param name: its name in :data:`SUITES`
    :returns: :class:`Tally`
    """
    print('== %s' % name, flush=True)
    started = time.monotonic()
    try:
        tally = SUITES[name]()
    except errors.ToolError as error:
        complain(error)
        tally = Tally(failed=1)
    except SystemExit as ended:
        if ended.code != 1:
            raise
        # A tool failed, and has said why.
        tally = Tally(failed=1)
    if not tally.passed and not tally.failed:
        complain(errors.ToolError('the suite %s ran no test' % name))
        tally.failed = 1
    print('== %s: %s (%d s)\n' % (name, tally, time.monotonic() - started),
          flush=True)
    return tally


def main(argv=None):
    """tools/test."""
    parser = argparse.ArgumentParser(
        prog='tools/test',
        description='Run test suites; what they need is installed. The last '
        'line\ntells how many tests passed, failed and were skipped.',
        formatter_class=argparse.RawTextHelpFormatter,
        epilog='suites:\n%s\n%s' % (''.join(
            '  %-12s %s\n' % (name, function.__doc__)
            for name, function in SUITES.items()), parts.HELP))
    parser.add_argument('names', nargs='*', metavar='NAME',
                        help='suites to run; default: all')
    parser.add_argument('--quick', action='store_true',
                        help='only %s' % ' and '.join(QUICK))
    parser.add_argument('--nightly', action='store_true',
                        help='the long forms of the tests')
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names).difference(SUITES))
    if unknown:
        parser.error('no such suite: %s' % ', '.join(unknown))
    if options.quick and (options.names or options.nightly):
        parser.error('--quick goes with nothing else')
    if options.nightly:
        os.environ['VIRTAV_NIGHTLY'] = '1'
    venv.trust_checkout()
    total = Tally()
    for name in QUICK if options.quick else options.names or SUITES:
        total.add(run_suite(name))
    print(total)
    return 1 if total.failed else 0
