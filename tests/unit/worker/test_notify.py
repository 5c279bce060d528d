# SPDX-License-Identifier: Apache-2.0

import os
import socket
import time

from tests.unit import base
from virtav_nova.worker import notify


class NotifyTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.manager.close)
        self.manager.settimeout(5)

    def _notifier(self, name=None, **environ):
        path = str(name or self.top / 'notify')
        self.manager.bind(path.replace('@', '\0'))
        environ['NOTIFY_SOCKET'] = path
        told = notify.Notifier(environ)
        self.addCleanup(told.close)
        # No child is to speak for the worker.
        self.assertEqual({}, environ)
        return told

    def _heard(self):
        return self.manager.recv(4096).decode().split('\n')

    def test_life(self):
        told = self._notifier()
        told.ready('Serving, 5 rules')
        self.assertEqual(['READY=1', 'STATUS=Serving, 5 rules'],
                         self._heard())
        told.status('Serving, 5 rules')
        told.status('Degraded')
        self.assertEqual(['STATUS=Degraded'], self._heard())
        before = time.monotonic_ns() // 1000
        told.reloading()
        reloading, when = self._heard()
        self.assertEqual('RELOADING=1', reloading)
        self.assertLessEqual(before, int(when.removeprefix(
            'MONOTONIC_USEC=')))
        told.stopping()
        self.assertEqual(['STOPPING=1', 'STATUS=Stopping'], self._heard())
        self.assertIsNone(told.due())

    def test_status_is_one_line(self):
        self._notifier().status('rule\nREADY=1\r\n' + 'x' * 999)
        line, = self._heard()
        self.assertTrue(line.startswith('STATUS=rule READY=1 xxx'))
        self.assertLess(len(line), 300)

    def test_abstract_socket(self):
        told = self._notifier(f'@virtav-test-{os.getpid()}')
        told.ready('Serving')
        self.assertEqual('READY=1', self._heard()[0])

    def test_watchdog(self):
        told = self._notifier(WATCHDOG_USEC='200000',
                              WATCHDOG_PID=str(os.getpid()))
        self.assertLessEqual(told.due(), time.monotonic())
        told.keep()
        self.assertEqual(['WATCHDOG=1'], self._heard())
        self.assertAlmostEqual(0.1, told.due() - time.monotonic(), delta=0.05)
        told.keep()
        self.manager.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self._heard()
        time.sleep(0.11)
        told.keep()
        self.assertEqual(['WATCHDOG=1'], self._heard())

    def test_watchdog_of_another_process(self):
        self.assertIsNone(self._notifier(
            WATCHDOG_USEC='200000', WATCHDOG_PID='1').due())

    def test_nobody_there(self):
        for environ in ({}, {'NOTIFY_SOCKET': str(self.top / 'none')},
                        {'WATCHDOG_USEC': '1000'}):
            told = notify.Notifier(environ)
            told.ready('Serving')
            told.keep()
            told.stopping()
            self.assertIsNone(told.due())

    def test_manager_that_does_not_read(self):
        told = self._notifier()
        begin = time.monotonic()
        for number in range(5000):
            told.status(str(number))
        self.manager.close()
        told.status('gone')
        self.assertLess(time.monotonic() - begin, 5)
