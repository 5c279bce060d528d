# SPDX-License-Identifier: Apache-2.0

import json
import os
import pathlib
import unittest

from tests.unit import base
from tests.unit.worker import split

CONDITIONS = (
    'all of them', '2 of them', '3 of them', '$a and $b', '$c and ($a or $d)',
    'any of ($a, $b) and any of ($c, $d)', '#a > 1 and $a and $b',
    '$a and not $missing and $d', 'for all of ($a, $b, $c): (# > 0)',
    '@a < @b and $a and $b', '$hex and $a', '$regex and $a', '$wide and $d',
)


def rules():
    """Rules of most shapes that need several strings."""
    for number, condition in enumerate(CONDITIONS):
        yield 'rule Shape%d { strings: %s condition: %s }\n' % (
            number, ' '.join(
                '%s = %s' % (identifier, text % number)
                for identifier, text in (
                    ('$a', '"first-%02d-of-them"'),
                    ('$b', '"second-%02d-of-them" nocase'),
                    ('$c', '"third-%02d-of-them"'),
                    ('$d', '"fourth-%02d-of-them" fullword'),
                    ('$missing', '"missing-%02d-of-them"'),
                    ('$hex', '{ 8b 44 24 ?? 0f af c1 [2-6] 33 d2 f7 f1 %02d }'
                     ),
                    ('$regex', '/regular-%02d-[a-f]{4,8}/'),
                    ('$wide', '"wide-%02d-of-them" wide'))
                if identifier in condition or condition.endswith('of them')),
            condition)


class SplitTest(base.TestCase):
    """At least 95 % are found of what yara finds over all pages at once."""

    def check(self, paths):
        result = split.measure(paths)
        # For who runs it for the figures.
        print(json.dumps(result, indent=1))
        self.assertGreater(result['split'], 10)
        self.assertGreaterEqual(result['share'], 0.95, result['missed'])
        return result

    def test_shapes(self):
        path = self.write('rules/shapes.yar', ''.join(rules()))
        result = self.check([path])
        self.assertEqual(len(CONDITIONS), result['rules'])
        self.assertEqual({}, result['missed'])

    @unittest.skipUnless('VIRTAV_RULES_DIR' in os.environ,
                         'VIRTAV_RULES_DIR names no rules')
    def test_rules_of_others(self):
        self.check([
            path for top in os.environ['VIRTAV_RULES_DIR'].split(':')
            for pattern in ('*.yar', '*.yara')
            for path in pathlib.Path(top).rglob(pattern)])
