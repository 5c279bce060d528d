# SPDX-License-Identifier: Apache-2.0

import logging
import time
import unittest

from virtav_nova.worker import limit


class LogLimitTest(unittest.TestCase):

    def test_burst_then_a_count(self):
        log = logging.getLogger('test.limit')
        limited = limit.LogLimit(log, 2, 0.1)
        with self.assertLogs(log) as logs:
            for number in range(5):
                limited.warning('line %s', number)
            time.sleep(0.11)
            limited.warning('line %s', 5)
        self.assertEqual([
            'line 0', 'line 1',
            '3 more lines like the next one were left out in 0 s',
            'line 5'], [entry.getMessage() for entry in logs.records])
