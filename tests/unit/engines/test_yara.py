# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import time

from stevedore import driver
import yara as libyara

from tests.unit import base
from virtav_nova import exception
from virtav_nova.engines import base as engines
from virtav_nova.engines import yara
from virtav_nova.rules import directory


def compiled(scan_timeout_ms=1000, **sources):
    """Compile rules given as file name (without ending) -> source."""
    files = sorted(
        directory.RuleFile(f'{name}.yar', source if isinstance(source, bytes)
                           else source.encode())
        for name, source in sources.items())
    return yara.YaraEngine.compile(
        files, engines.EngineOptions(scan_timeout_ms))


class YaraTest(base.TestCase):

    def _assert_broken(self, message, **sources):
        with self.assertRaisesRegex(
                exception.RuleError, message) as caught:
            compiled(**sources)
        self.assertTrue(caught.exception.way_out)

    def test_is_an_entry_point(self):
        self.assertIs(yara.YaraEngine,
                      driver.DriverManager('virtav.engines', 'yara').driver)

    def test_selftest_rule(self):
        engine = yara.YaraEngine.compile(
            directory.read(str(base.SELFTEST_RULES)),
            engines.EngineOptions())
        self.assertEqual(1, engine.describe()['rules'])
        self.assertEqual([], engine.scan(bytes(4096)))
        for offset in (0, 1000, 4096 - len(base.SIGNATURE)):
            page = bytearray(4096)
            page[offset:offset + len(base.SIGNATURE)] = base.SIGNATURE
            match, = engine.scan(memoryview(page))
            self.assertEqual('VirtAV_SelfTest', match.rule)
            self.assertEqual('selftest.yar', match.namespace)
            self.assertEqual(['selftest'], match.tags)
            self.assertEqual('VirtAV contributors', match.meta['author'])
            self.assertEqual('test', match.meta['severity'])
            self.assertEqual([('$signature', offset)], match.strings)

    def test_found_strings_are_bounded(self):
        engine = compiled(a='rule A { strings: $a = "a" condition: #a > 5 }')
        match, = engine.scan(b'a' * 4096)
        self.assertEqual([('$a', offset) for offset in range(16)],
                         match.strings)

    def test_error_names_file_and_line(self):
        good = 'rule G { condition: true }'
        self._assert_broken(
            r'^b\.yar:3: undefined identifier "foo"$', a=good, c=good,
            b='rule B {\n  condition:\n    foo\n}')
        self._assert_broken(
            r'^b\.yar:2: .*duplicated identifier', a=good,
            b='rule B { condition: true }\nrule B { condition: true }')

    def test_include_is_refused(self):
        self.write('x', 'rule X { condition: true }')
        self._assert_broken(
            r'^a\.yar:1: includes are disabled',
            a=f'include "{self.top / "x"}"\nrule A {{ condition: true }}')

    def test_what_is_no_text_is_refused(self):
        self._assert_broken(r'^a\.yar:2: not UTF-8', a=b'//\n// \xe9\n')
        self._assert_broken(r'^a\.yar:3: holds a NUL', a='//\n\n//\0')
        image = io.BytesIO()
        libyara.compile(source='rule A { condition: true }').save(file=image)
        self._assert_broken(r'^a\.yar:\d+: ', a=image.getvalue())

    def test_no_rule(self):
        engine = compiled(a='// nothing yet\n', b='')
        self.assertEqual(0, engine.describe()['rules'])

    def test_same_identifier_in_two_files(self):
        rule = 'rule R { condition: true }'
        engine = compiled(a=rule, b=rule)
        self.assertEqual(2, engine.describe()['rules'])

    def test_rules_do_not_print(self):
        engine = compiled(
            a='import "console"\n'
              'rule A { condition: console.log("\\x1b[2J") }')
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            self.assertEqual(1, len(engine.scan(b'a')))
        self.assertEqual('', stdout.getvalue())

    def test_slow_rule_is_ended(self):
        engine = compiled(
            scan_timeout_ms=1500,
            a='rule A { condition: for any i in (0..100000000000) :'
              ' (i * 3 == 1) }')
        begin = time.monotonic()
        with self.assertRaises(libyara.TimeoutError):
            engine.scan(bytes(4096))
        self.assertLess(time.monotonic() - begin, 5)
