# SPDX-License-Identifier: Apache-2.0

import re
import statistics

import yara

from tests.unit.tools import base
from virtav_nova.rules import sample
from virtavtools import generated_rules

COUNT = 1500


class GeneratedRulesTest(base.TestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.source = generated_rules.rules(COUNT)

    def test_same_everywhere(self):
        self.assertEqual(self.source, generated_rules.rules(COUNT))
        self.assertNotEqual(self.source, generated_rules.rules(COUNT, 2))
        # A set begins like every larger one.
        self.assertTrue(self.source.startswith(generated_rules.rules(100)))

    def test_shape(self):
        strings = re.findall(r'^ {8}\$\w+ = (.*)', self.source, re.M)
        self.assertTrue(5.5 < len(strings) / COUNT < 7.5, len(strings))
        hexadecimal = [one for one in strings if one.startswith('{')]
        self.assertTrue(.3 < len(hexadecimal) / len(strings) < .5)
        self.assertTrue(.4 < sum('??' in one for one in hexadecimal)
                        / len(hexadecimal) < .7)
        self.assertTrue(12 < statistics.median(
            len(one.split()) - 2 for one in hexadecimal) < 30)
        self.assertTrue(.005 < sum(one.startswith('/') for one in strings)
                        / len(strings) < .04)

    def test_they_compile_and_are_quiet(self):
        compiled = yara.compile(source=self.source)
        self.assertEqual(COUNT, len(list(compiled)))
        for page in sample.pages()[:200]:
            self.assertEqual([], compiled.match(data=page))
        probe, = compiled.match(data=generated_rules.PROBE)
        self.assertEqual(generated_rules.PROBE_RULE, probe.rule)

    def test_files(self):
        generated_rules.write(self.top / 'rules', 100, files=4)
        files = sorted((self.top / 'rules').iterdir())
        self.assertEqual(4, len(files))
        compiled = yara.compile(filepaths={
            file.name: str(file) for file in files})
        self.assertEqual(
            sorted(rule.identifier for rule in yara.compile(
                source=generated_rules.rules(100))),
            sorted(rule.identifier for rule in compiled))
