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
from virtavtools import lab
from virtavtools import parts
from virtavtools import ui

Result = figures.Result

SHIPPED = pathlib.Path(__file__).parents[2] / 'etc' / 'virtav' / 'rules'
_QUICK = 20000  # pages
#: Matches that are shown, each rule once.
_SHOWN = 20
_BOOT = 240  # longest wait for a boot, in seconds
_LOAD = 180  # and for the worker


def rules(args):
    """See :func:`virtavtools.bench.rules`."""
    source = pathlib.Path(args.rules or SHIPPED)
    with tempfile.TemporaryDirectory(prefix='virtav-') as scratch:
        home = pathlib.Path(scratch)
        results, current = _imported(source, home)
        # Rules of others may have false alarms; those shipped may not.
        limit = None if args.rules else 0
        results += _booted(current, home, limit)
        kind = ruleset.engine('twostage')
        engine = kind.compile(directory.read(current), base.EngineOptions(
            sample=sample.pages()))
    most = _QUICK if args.quick else None
    pages = matched = 0
    seen = set()
    begin = time.monotonic()
    with ui.step('scan the code of the packages of this host') as step:
        for page in itertools.islice(sample.installed(), most):
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
            Result('host_pages_matched', matched, '', limit)]


def _booted(current, home, limit):
    """Boot a guest with a Debian under the rules of a set.

    :param current: directory of the set
    :param limit: of the matches
    :returns: results
    """
    emulator, guest = parts.emulator(), parts.debian_guest()
    worker = lab.Worker(home, current)
    try:
        with ui.step('boot a guest with a Debian'):
            # Many rules take their time to load.
            worker.start(_LOAD)
            monitor = {'socket': worker.socket, 'policy': 'enforce'}
            with lab.Machine(emulator, guest, home, monitor,
                             snapshot=True) as machine:
                machine.wait_ready(_BOOT)
                fetches = machine.query()['fetches']
    finally:
        worker.stop()
    names = {record['rule'] for record in worker.records('match')}
    for name in sorted(names)[:_SHOWN]:
        print('matched in the guest: %s' % name, file=sys.stderr)
    return [Result('guest_fetches', fetches, ''),
            Result('guest_rules_matched', len(names), '', limit)]


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
