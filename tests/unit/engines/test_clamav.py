# SPDX-License-Identifier: Apache-2.0
"""What a clamd does is in the functional tests; here is what it should not."""

import time

from tests.unit import base
from tests.unit.engines import clamd
from virtav_nova import exception
from virtav_nova.engines import base as engines
from virtav_nova.engines import clamav


class ClamavTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.path = self.top / 'clamd'
        self.clamd = clamd.Clamd(self.path, b'bad')
        self.addCleanup(self.clamd.close)
        self.options = engines.EngineOptions(
            scan_timeout_ms=300, clamd_socket=str(self.path))
        self.engine = clamav.ClamavEngine.compile([], self.options)

    def _assert_broken(self, answer, error=clamav.ClamdError):
        """What clamd says is refused, and the next scan is fine."""
        self.assertEqual([], self.engine.scan(b'good'))
        self.clamd.answer = answer
        self.assertRaises(error, self.engine.scan, b'bad')
        self.clamd.answer = self.clamd.judge
        self.assertEqual(1, len(self.engine.scan(b'bad')))

    def test_one_session_for_many_scans(self):
        before = self.clamd.connections
        for _ in range(10):
            self.assertEqual([], self.engine.scan(bytes(4096)))
            self.assertEqual(
                [engines.Match('Test.Signature', 'clamav', [], {}, [])],
                self.engine.scan(memoryview(b'bad' * 1000)))
        self.assertEqual(before + 1, self.clamd.connections)

    def test_nothing_is_kept_open_before_the_fork(self):
        self.assertEqual(1, self.clamd.connections)
        self.assertIsNone(self.engine._session)

    def test_connects_again_when_it_was_idle(self):
        for _ in range(3):
            self.assertEqual(1, len(self.engine.scan(b'bad')))
            self.clamd.hang_up()

    def test_digest_follows_the_signatures(self):
        first = clamav.ClamavEngine.release(self.options)
        self.clamd.version = 'ClamAV 1.4.6/2'
        self.assertNotEqual(
            first, clamav.ClamavEngine.release(self.options))

    def test_answer_to_another_command(self):
        self._assert_broken(lambda number, _data:
                            b'%d: stream: OK\0' % (number - 1))

    def test_two_answers_at_once(self):
        self._assert_broken(lambda number, _data:
                            b'%d: stream: OK\0%d: stream: OK\0' % (
                                number, number + 1))

    def test_error(self):
        self._assert_broken(lambda number, _data: (
            b'%d: INSTREAM size limit exceeded. ERROR\0' % number))

    def test_name_is_missing(self):
        self._assert_broken(lambda number, _data:
                            b'%d: stream:  FOUND\0' % number)

    def test_endless_answer(self):
        self._assert_broken(lambda _number, _data: b'1: ' + b'x' * 10000)

    def test_closes_instead_of_an_answer(self):
        self._assert_broken(lambda _number, _data: None,
                            ConnectionResetError)

    def test_silence(self):
        begin = time.monotonic()
        self._assert_broken(lambda _number, _data: b'', TimeoutError)
        self.assertLess(time.monotonic() - begin, 2)

    def test_slow_drops(self):
        def drip(_number, _data):
            connection = self.clamd.open[-1]
            for _ in range(20):
                time.sleep(.1)
                try:
                    connection.sendall(b'1')
                except OSError:
                    break

        begin = time.monotonic()
        self._assert_broken(drip, TimeoutError)
        self.assertLess(time.monotonic() - begin, 2)

    def test_is_not_there(self):
        for path in (self.top / 'none', '/x' * 100):
            options = self.options._replace(clamd_socket=str(path))
            with self.assertRaisesRegex(
                    exception.EngineError, str(path)) as caught:
                clamav.ClamavEngine.compile([], options)
            self.assertIn('clamd_socket', caught.exception.way_out)
        self.engine.scan(b'')
        self.clamd.close()
        self.assertRaises(OSError, self.engine.scan, b'')
