# SPDX-License-Identifier: Apache-2.0
"""A guest's fetches are recorded, and played as if it booted again."""

import json
import pathlib
import subprocess
import sys
import uuid

from tests.functional import base
from virtav_nova.monitor import instance
from virtav_nova.monitor import recording
from virtavtools import lab

#: A share of the boot's pages that is there in any case.
_FETCHES = 1000


class ReplayTest(base.TestCase):

    def record(self, *cases):
        """Boot a guest and run cases while it is recorded.

        :returns: path of the recording
        """
        home = self.home / 'recorded'
        home.mkdir()
        with lab.Recorder(home) as recorder:
            with lab.Machine(self.emulator, self.guest, home, {
                    'socket': recorder.socket}) as machine:
                machine.wait_ready()
                for case in cases:
                    # The recorder lets everything run.
                    self.assert_result(machine.begin_case(case) or machine,
                                       case, True, 'exit:0')
                self.fetches = machine.query()['fetches']
                self.instance = machine.instance
            return recorder.finish()

    def replay(self, path, *arguments, status=0):
        """Run virtav-replay.

        :returns: what it prints, read as JSON, or its complaint
        """
        command = pathlib.Path(sys.executable).with_name('virtav-replay')
        done = subprocess.run([command, path, '--json', *arguments],
                              capture_output=True, text=True)
        self.assertEqual(status, done.returncode, done.stderr)
        if status:
            return done.stderr
        return json.loads(done.stdout)

    def test_real_boot(self):
        path = self.record('user-write', 'file')
        with recording.Recording(path) as played:
            self.assertIsNone(played.damage)
            self.assertEqual(self.instance, str(played.head.instance))
            self.assertGreaterEqual(len(played), self.fetches)
            self.assertGreater(len(played), _FETCHES)
            neighbours = sum(fetch.before is not None for fetch in played)
            # A page without one before it is at the begin of its mapping.
            self.assertGreater(neighbours, len(played) / 2)
            fetches, pages = len(played), played.pages
        # The signature came by, and nobody scanned it. It is in there.
        report = self.replay(path, '--engine', 'yara', '--rules', lab.RULES)
        self.assertIn(base.RULE, report['rules'])
        self.assertEqual(pages, report['units']['page'])
        found = [match for match in report['matches']
                 if match['rule'] == base.RULE and match['form'] == 'page']
        self.assertIn(3, [match['cpl'] for match in found])
        report = self.replay(
            path, '--engine', 'yara', '--rules', lab.RULES, '--explain',
            '--rule', base.RULE, '--page', str(found[0]['page']))
        self.assertTrue(report['explained'][0]['matched'])
        self.assertTrue(report['explained'][0]['seen'])
        # A worker says the same, by whatever way it is asked.
        for options in ({}, {'table_entries': 0}):
            worker = self.worker(start=False, require_token=False, **options)
            with worker:
                for transport in ('ring', 'socket'):
                    report = self.replay(
                        path, '--socket', worker.socket, '--transport',
                        transport, '--clients', '2', '--depth', '4')
                    self.assertEqual(
                        2 * fetches, report['answers']
                        + report['table_hits'])
                    self.assertEqual(0, report['unknown'])
                    self.assertIn(base.RULE, report['rules'])
                    self.assertEqual(
                        {match['page'] for match in found},
                        {match['page'] for match in report['matches']
                         if match['rule'] == base.RULE}
                        & {match['page'] for match in found})
                if options:
                    self.assertEqual(0, report['table_hits'])
            self.assertTrue(worker.records('match'))
        # One that asks who is there.
        worker = self.worker()
        path_of_token = instance.place(
            self.home / 'instances', uuid.UUID(self.instance), 'lab')
        arguments = ('--socket', worker.socket, '--depth', '8')
        report = self.replay(path, *arguments, '--token-file', path_of_token)
        self.assertEqual(fetches, report['answers'] + report['table_hits'])
        self.assertIn('the worker refuses', self.replay(
            path, *arguments, status=1))
