# SPDX-License-Identifier: Apache-2.0
"""Does the engine ``twostage`` give exactly what ``yara`` gives?

With ``VIRTAV_EXACT_PAGES`` for the number of pages, and ``VIRTAV_RULES_DIR``
for a directory of rules to try beside those that are made up.
"""

import itertools
import os
import random
import unittest

import hypothesis
from hypothesis import strategies
import yara as libyara

from tests.unit import base
from tests.unit.engines import generated
from virtav_nova import exception
from virtav_nova.engines import base as engines
from virtav_nova.engines import twostage
from virtav_nova.engines import yara
from virtav_nova.rules import carrier
from virtav_nova.rules import directory
from virtav_nova.rules import patterns
from virtav_nova.rules import sample
from virtav_nova.rules import syntax

_PAGES = int(os.environ.get('VIRTAV_EXACT_PAGES', '4000'))
_PAGES_OF_RULES = 40
_OPTIONS = engines.EngineOptions(scan_timeout_ms=5000)


def _carriers(files):
    """Give pages that rules match, and halves of them."""
    for file in files:
        source = syntax.parse(file.content.decode(), file.name)
        for rule in source.rules:
            page = carrier.make(source, rule).page
            if page:
                yield from (page, page[:1024], page[512:])


class AloneEngine(twostage.TwostageEngine):
    """Nobody is evaluated only because a neighbour is."""

    group_rules = 1
    always_rules = 3


class ExactTest(base.TestCase):

    def _assert_exact(self, files, reference, engine, pages):
        # A rule's number is its place among those that can be reported.
        numbers = {engine.rule_name(number): number
                   for number in range(engine.describe()['rules'])}
        for page in pages:
            try:
                expected = reference.scan(page)
            except libyara.Error:
                # It takes for ever, or more memory than libyara has for one
                # expression. There is nothing to compare with.
                return
            examined = engine.examine(page)
            if expected != examined.matches or expected != engine.scan(page):
                self.fail('\n'.join((
                    *(file.content.decode() for file in files), repr(page),
                    f'yara: {expected}', f'twostage: {examined.matches}')))
            for match in expected:
                number = numbers[match.namespace, match.rule]
                strings = frozenset(
                    fragment.string for fragment in examined.fragments
                    if fragment.rule == number)
                if not strings:
                    continue
                self.assertEqual(match, engine.confirm(number, page))
                rule = engine._rules[number]
                # Otherwise it may hold by what is not looked for apart.
                if rule.formula == rule.apart:
                    self.assertTrue(engine.complete(number, strings))

    def _assert_generated(self, chance, pages):
        files, pieces = generated.files(chance, 12)
        reference = yara.YaraEngine.compile(files, _OPTIONS)
        engine = AloneEngine.compile(files, _OPTIONS)
        self._assert_exact(files, reference, engine, (
            generated.page(chance, pieces) for _ in range(pages)))

    @hypothesis.settings(
        max_examples=_PAGES // _PAGES_OF_RULES // 2, deadline=None,
        database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategies.integers(0, 1 << 32))
    def test_generated(self, seed):
        self._assert_generated(random.Random(seed), _PAGES_OF_RULES)

    def test_generated_with_expressions_for_all(self):
        # With what is short and common looked for too, nearly every string
        # has an expression that can be wrong.
        for name, value in (('BITS_MIN', 4), ('LITERAL_MIN', 1)):
            self.addCleanup(setattr, patterns, name,
                            getattr(patterns, name))
            setattr(patterns, name, value)
        for seed in range(_PAGES // _PAGES_OF_RULES // 2):
            with self.subTest(seed=seed):
                self._assert_generated(random.Random(seed), _PAGES_OF_RULES)

    @unittest.skipUnless(os.environ.get('VIRTAV_RULES_DIR'),
                         'VIRTAV_RULES_DIR is not set')
    def test_given_rules(self):
        top = os.environ['VIRTAV_RULES_DIR']
        pages = sample.pages()
        for name in sorted(os.listdir(top)):
            path = os.path.join(top, name)
            if not os.path.isdir(path):
                continue
            files = []
            for file in directory.read(path):
                try:
                    yara.YaraEngine.compile([file], _OPTIONS)
                except exception.RuleError:
                    continue
                files.append(file)
            with self.subTest(rules=name):
                options = _OPTIONS._replace(sample=pages)
                self._assert_exact(
                    (), yara.YaraEngine.compile(files, options),
                    AloneEngine.compile(files, options),
                    itertools.chain(pages, _carriers(files)))
