# SPDX-License-Identifier: Apache-2.0
"""Run one target for a while.

The fuzzer is a process of its own, begun anew when native code that it
called is dead. Such a death is a finding unless the target has a way to be
survived. The exit status is 1 after a finding; what led to it is printed.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import atheris

ROOT = pathlib.Path(__file__).parents[2]
CORPUS = pathlib.Path(__file__).parent / 'corpus'
#: Targets whose native code may die, as long as the importer lives on.
SURVIVED = ('rules',)
#: Files of the corpus that are imported together at the end.
_IMPORTED = 40
_PAUSE = 0.5
#: Says that this is the process of the fuzzer.
_FUZZ = '--fuzz'
_NATIVE = 'ERROR: libFuzzer: '
_PYTHON = 'Uncaught Python exception'


def seeds(name):
    """Seeds of a target.

    ``.hex`` has lines of hexadecimal digits, ``00*512`` for a byte so many
    times, and comments. Anything else is taken as it is.

    :returns: pairs of path and bytes
    """
    for path in sorted((CORPUS / name).glob('*')):
        content = path.read_bytes()
        if path.suffix == '.hex':
            content = b''
            for line in path.read_text().splitlines():
                digits, _, times = line.partition('#')[0].partition('*')
                content += bytes.fromhex(digits) * int(times or 1)
        yield path, content


def fuzz(name, options):
    """The fuzzer's own process; does not return."""
    with atheris.instrument_imports(include=['virtav_nova']):
        from tests.fuzz import targets
    atheris.Setup([sys.argv[0], *options], targets.TARGETS[name])
    atheris.Fuzz()


def _import(contents):
    """Have the importer take files, in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        for number, content in enumerate(contents):
            (pathlib.Path(home) / ('%03d' % number)).write_bytes(content)
        done = subprocess.run(
            [sys.executable, '-m', 'tests.fuzz', 'survival', '--home', home],
            cwd=ROOT, capture_output=True, text=True)
    return '' if done.returncode == 0 else done.stdout + done.stderr


def survival(home):
    """See whether the importer takes the files of a directory."""
    from tests.fuzz import survival as importing
    place = pathlib.Path(home)
    contents = [path.read_bytes() for path in sorted(place.glob('[0-9]*'))]
    importing.check(contents, home)


def run(name, seconds, seed):
    """Run a target.

    :returns: exit status
    """
    until = time.monotonic() + seconds
    deaths = runs = 0
    with tempfile.TemporaryDirectory(prefix='virtav-fuzz-') as directory:
        home = pathlib.Path(directory)
        corpus = home / 'corpus'
        corpus.mkdir()
        for path, content in seeds(name):
            (corpus / path.name).write_bytes(content)
        options = ['-timeout=20', '-rss_limit_mb=3072', '-max_len=24576',
                   '-print_final_stats=1', '-verbosity=1',
                   '-artifact_prefix=%s/found-' % home]
        texts = [path for path, _content in seeds(name)]
        if any(path.suffix == '.yar' for path in texts):
            from tests.fuzz import targets
            (home / 'words').write_text('\n'.join(targets.words(texts)))
            options.append('-dict=%s' % (home / 'words'))
        while (left := until - time.monotonic()) > 1:
            done = subprocess.run(
                [sys.executable, '-m', 'tests.fuzz', _FUZZ, name,
                 str(corpus), *options, '-max_total_time=%d' % max(left, 1),
                 '-seed=%d' % (seed + deaths)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors='replace')
            said = done.stdout
            for line in said.splitlines():
                if 'number_of_executed_units' in line:
                    runs += int(line.split()[-1])
            if done.returncode == 0:
                continue
            found = sorted(home.glob('found-*'))
            if _PYTHON in said or name not in SURVIVED or not found:
                return _finding(name, said, found)
            deaths += 1
            for path in found:
                trouble = _import([path.read_bytes()])
                if trouble:
                    return _finding(name, trouble, [path])
                path.unlink()
            time.sleep(_PAUSE)
        if name in SURVIVED:
            # The way that rules really go, with what turned out to be odd.
            paths = sorted(corpus.iterdir())
            random.Random(seed).shuffle(paths)
            trouble = _import([path.read_bytes()
                               for path in paths[:_IMPORTED]])
            if trouble:
                return _finding(name, trouble, paths[:0])
    print('%s: %d runs in %d s, no finding%s' % (
        name, runs, seconds, '; native code died %d times, survived'
        % deaths if deaths else ''))
    # It has to have done something.
    return 0 if runs > 10 else 1


def _finding(name, said, paths):
    begin = max(said.find(_PYTHON if _PYTHON in said else _NATIVE), 0)
    print('%s: FOUND\n%s' % (name, said[begin:begin + 6000]))
    for path in paths:
        data = path.read_bytes()
        print('%s, %d bytes: %s' % (path.name, len(data),
                                    data[:8192].hex()))
    return 1


def main():
    """python -m tests.fuzz."""
    if sys.argv[1:2] == [_FUZZ]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz')
    parser.add_argument('target')
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--seed', type=int, default=1,
                        help='0: another one each time')
    parser.add_argument('--home', help='for survival: files to import')
    options = parser.parse_args()
    if options.target == 'survival':
        survival(options.home)
        return 0
    return run(options.target, options.seconds, options.seed
               or random.SystemRandom().randrange(1, 1 << 30))


if __name__ == '__main__':
    sys.exit(main())
