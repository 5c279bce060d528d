# SPDX-License-Identifier: Apache-2.0
"""What an import of rules takes, and whether rules raise false alarms."""

import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from virtav_nova.engines import base
from virtav_nova.rules import directory
from virtav_nova.rules import sample
from virtav_nova.worker import ruleset
from virtavtools import errors
from virtavtools import figures
from virtavtools import ui

Result = figures.Result

SHIPPED = pathlib.Path(__file__).parents[2] / 'etc' / 'virtav' / 'rules'
_QUICK = 20000  # pages
#: Matches that are shown, each rule once.
_SHOWN = 20


def rules(args):
    """See :func:`virtavtools.bench.rules`."""
    source = pathlib.Path(args.rules or SHIPPED)
    with tempfile.TemporaryDirectory(prefix='virtav-') as scratch:
        results, current = _imported(source, pathlib.Path(scratch))
        kind = ruleset.engine('twostage')
        engine = kind.compile(directory.read(current), base.EngineOptions(
            sample=sample.pages()))
    limit = _QUICK if args.quick else None
    pages = matched = 0
    seen = set()
    begin = time.monotonic()
    with ui.step('scan the code of the packages of this host') as step:
        for page in itertools.islice(sample.installed(), limit):
            pages += 1
            found = engine.scan(page)
            matched += bool(found)
            for match in found:
                name = '%s:%s' % (match.namespace, match.rule)
                if name not in seen and len(seen) < _SHOWN:
                    seen.add(name)
                    step.note(name)
    return [*results,
            Result('host_pages', pages, ''),
            Result('host_scan_s', time.monotonic() - begin, 's'),
            # Rules of others may have false alarms; those shipped may not.
            Result('host_pages_matched', matched, '',
                   None if args.rules else 0)]


def _imported(source, home):
    """Import rules into a store of the bench's own.

    :returns: results, and the directory of the set
    """
    configuration = home / 'virtav.conf'
    configuration.write_text(
        '[virtav_worker]\nstate_dir = %s\n' % home)
    begin = time.monotonic()
    with ui.step('import %s' % source):
        done = subprocess.run(
            [sys.executable, '-P', '-m', 'virtav_nova.cmd.rules',
             '--config-file', configuration, 'import', source, '--name',
             'bench', '--json'], check=False, capture_output=True,
            text=True)
    if done.returncode:
        raise errors.ToolError('the rules cannot be imported: %s'
                               % done.stderr.strip())
    taken = time.monotonic() - begin
    counts = json.loads(done.stdout)['counts']
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return [
        Result('import_s', taken, 's'),
        Result('import_mib', memory / 1024, 'MiB'),
        *(Result('rules_' + state.replace('-', '_'), number, '')
          for state, number in counts.items()),
    ], os.path.join(home, 'rules', 'current')
