# SPDX-License-Identifier: Apache-2.0
"""What every engine of the entry points has to keep to."""

import json
import os
import pickle

from stevedore import extension

from tests.unit import base
from tests.unit.engines import clamd
from virtav_nova.engines import base as engines
from virtav_nova.rules import directory

_RULES = [
    directory.RuleFile('a.yar', b"""
rule Selftest : one two { meta: author = "x" strings: $a = "VIRTAV-CONTRACT"
  condition: $a }
rule Apart { strings: $a = "the first part" $b = "the second part"
  condition: all of them }"""),
    directory.RuleFile('b/a.yar', b"""
rule Selftest { strings: $a = "VIRTAV-CONTRACT" wide condition: $a }""")]
_BAD = b'VIRTAV-CONTRACT'
_SIZES = (0, 1, 7, 100, 1024, 4096, 5120)


class ContractTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.options = engines.EngineOptions(
            scan_timeout_ms=10000, clamd_socket=str(self.top / 'clamd'))
        peer = clamd.Clamd(self.top / 'clamd', _BAD)
        self.addCleanup(peer.close)
        self.kinds = {
            entry.name: entry.plugin
            for entry in extension.ExtensionManager('virtav.engines')}

    def each(self):
        """Give every engine, compiled, as a sub-test."""
        for name, kind in self.kinds.items():
            with self.subTest(engine=name):
                yield kind.compile(_RULES, self.options)

    def test_engines_are_known(self):
        self.assertEqual({'clamav', 'noop', 'twostage', 'yara'},
                         set(self.kinds))
        for name, kind in self.kinds.items():
            self.assertTrue(issubclass(kind, engines.Engine))
            self.assertEqual(name, kind.name)
            self.assertTrue(kind.version)
            release = kind.release(self.options)
            self.assertIn(kind.version, release)
            self.assertEqual(release, kind.release(self.options))

    def test_describes_itself(self):
        for engine in self.each():
            about = engine.describe()
            self.assertEqual(about, json.loads(json.dumps(about)))
            self.assertIn(about['rules'], (None, 3))
            self.assertTrue(about['cannot'])
            for line in about['cannot']:
                self.assertIsInstance(line, str)

    def test_scans_whatever_comes(self):
        for engine in self.each():
            for size in _SIZES:
                self.assertEqual([], engine.scan(bytes(size)))
                page = os.urandom(size)
                self.assertEqual([], engine.scan(memoryview(page)))
                self.assertEqual(([], ()), engine.examine(page))

    def test_finds_wherever_it_is(self):
        for engine in self.each():
            if engine.name == 'noop':
                continue
            for size in _SIZES[3:]:
                for offset in (0, 50, size - len(_BAD)):
                    page = bytearray(size)
                    page[offset:offset + len(_BAD)] = _BAD
                    match, = engine.scan(memoryview(page))
                    self._assert_match(match, size)
                    self.assertEqual([match],
                                     engine.examine(bytes(page)).matches)

    def _assert_match(self, match, size):
        self.assertIsInstance(match.rule, str)
        self.assertIsInstance(match.namespace, str)
        json.dumps(match)
        for name, offset in match.strings:
            self.assertEqual('$', name[0])
            self.assertIn(offset, range(size))

    def test_order_and_namespaces(self):
        page = _BAD + b''.join(bytes((byte, 0)) for byte in _BAD)
        for engine in self.each():
            if engine.describe()['rules']:
                self.assertEqual(
                    [('a.yar', 'Selftest', ['one', 'two'], {'author': 'x'}),
                     ('b/a.yar', 'Selftest', [], {})],
                    [(match.namespace, match.rule, match.tags, match.meta)
                     for match in engine.scan(page)])

    def test_children_scan_at_the_same_time(self):
        for engine in self.each():
            expected = engine.scan(_BAD)
            children = []
            for _ in range(4):
                reader, writer = os.pipe()
                if not os.fork():
                    status = 1
                    try:
                        found = [engine.scan(_BAD) for _ in range(50)]
                        os.write(writer, pickle.dumps(
                            all(each == expected for each in found)))
                        status = 0
                    finally:
                        os._exit(status)
                os.close(writer)
                children.append(reader)
            for reader in children:
                with os.fdopen(reader, 'rb') as file:
                    self.assertIs(True, pickle.loads(file.read()))
                self.assertEqual(0, os.wait()[1])

    def test_progress_and_suspects(self):
        for engine in self.each():
            parts = []
            engine.progress = parts.append
            expected = engine.scan(_BAD)
            for part in set(parts):
                engine.suspect(part)
            for part in (12345, -12345):
                engine.suspect(part)
            del parts[:]
            self.assertEqual(expected, engine.scan(_BAD))
            for part in parts:
                if part & engines.RULE:
                    self.assertEqual(2, len(engine.rule_name(part)))

    def test_quarantine(self):
        page = _BAD + b''.join(bytes((byte, 0)) for byte in _BAD)
        options = self.options._replace(
            quarantine=frozenset({('a.yar', 'Selftest'), ('c', 'x')}))
        for kind in self.kinds.values():
            engine = kind.compile(_RULES, options)
            if engine.describe()['rules']:
                self.assertEqual(2, engine.describe()['rules'])
                match, = engine.scan(page)
                self.assertEqual('b/a.yar', match.namespace)

    def test_accumulates(self):
        first, second = b'..the first part..', b'..the second part..'
        for engine in self.each():
            fragments = [engine.examine(page).fragments
                         for page in (first, second, first + second)]
            if not engine.accumulates:
                self.assertEqual([(), (), ()], fragments)
                self.assertFalse(engine.complete(0, frozenset({0, 1})))
                self.assertIsNone(engine.confirm(0, first + second))
                continue
            one, other = fragments[0][0], fragments[1][0]
            self.assertEqual((one, other), fragments[2])
            self.assertEqual(('a.yar', 'Apart'), engine.rule_name(one.rule))
            self.assertEqual(one.rule, other.rule)
            for strings, expected in (
                    ((one,), False), ((other,), False), ((one, other), True),
                    ((), False)):
                self.assertIs(expected, engine.complete(
                    one.rule, frozenset(each.string for each in strings)))
            self.assertIsNone(engine.confirm(one.rule, first))
            match = engine.confirm(one.rule, first + second)
            self.assertEqual('Apart', match.rule)
            self.assertEqual(
                engine.scan(first + second), [match])
