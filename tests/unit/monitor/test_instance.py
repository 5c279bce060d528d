# SPDX-License-Identifier: Apache-2.0

import base64
import grp
import json
import os
import stat
import unittest
import uuid

from tests.unit import base
from virtav_nova import exception
from virtav_nova.monitor import instance
from virtav_nova.monitor import wire

UUID = uuid.UUID('6f1f2c6e-9a0b-4f6e-8f0e-0d4a5b6c7d8e')


class InstanceTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.directory = str(self.top / 'instances')
        os.mkdir(self.directory, 0o751)
        self.file = self.top / 'instances' / f'{UUID}.json'

    def test_both_sides_get_the_same(self):
        path = instance.place(self.directory, UUID, 'demo')
        self.assertEqual(f'{self.directory}/{UUID}.token', path)
        known = instance.read(self.directory, UUID)
        self.assertEqual('demo', known.project)
        self.assertEqual(wire.TOKEN_SIZE, len(known.token))
        with open(path, 'rb') as file:
            self.assertEqual(known.token, base64.b64decode(file.read()))
        self.assertEqual([UUID], instance.names(self.directory))
        self.assertEqual({f'{UUID}.token', f'{UUID}.json'},
                         set(os.listdir(self.directory)))

    def test_instances_differ_and_keep_theirs(self):
        other = uuid.uuid4()
        for known in (UUID, other):
            instance.place(self.directory, known, 'demo')
        before = instance.read(self.directory, UUID)
        self.assertNotEqual(before.token,
                            instance.read(self.directory, other).token)
        # A QEMU that runs has read it, and shows it again.
        instance.place(self.directory, UUID, 'other')
        self.assertEqual((before.token, 'other'),
                         instance.read(self.directory, UUID))

    def test_never_shown(self):
        instance.place(self.directory, UUID, 'demo')
        known = instance.read(self.directory, UUID)
        for text in (repr(known), str(known), f'{known}'):
            self.assertNotIn(known.token.hex(), text)
            self.assertNotIn(repr(known.token), text)

    def test_permissions(self):
        mask = os.umask(0)
        self.addCleanup(os.umask, mask)
        group = grp.getgrgid(os.getgid()).gr_name
        path = instance.place(self.directory, UUID, 'demo')
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        self.assertEqual(0o640, stat.S_IMODE(self.file.stat().st_mode))
        instance.place(self.directory, UUID, 'demo', group, group)
        self.assertEqual(0o640, stat.S_IMODE(os.stat(path).st_mode))
        self.assertEqual(os.getgid(), os.stat(path).st_gid)

    @unittest.skipIf(os.geteuid(), 'only root gives files to any group')
    def test_groups(self):
        for entry in grp.getgrall()[:3]:
            path = instance.place(self.directory, UUID, 'demo',
                                  entry.gr_name, entry.gr_name)
            self.assertEqual(entry.gr_gid, os.stat(path).st_gid)
            self.assertEqual(entry.gr_gid, self.file.stat().st_gid)

    def test_unknown_group(self):
        with self.assertRaisesRegex(exception.RegistrationError,
                                    'there is no group virtav-none'):
            instance.place(self.directory, UUID, 'p', 'virtav-none')
        self.assertEqual([f'{UUID}.token'], os.listdir(self.directory))

    def test_removed(self):
        instance.place(self.directory, UUID, 'demo')
        for _turn in range(2):
            instance.remove(self.directory, UUID)
            self.assertEqual([], os.listdir(self.directory))
        with self.assertRaises(FileNotFoundError):
            instance.read(self.directory, UUID)
        instance.remove(str(self.top / 'missing'), UUID)

    def test_directory_of_others(self):
        for mode in (0o777, 0o771, 0o753):
            os.chmod(self.directory, mode)
            with self.assertRaisesRegex(
                    exception.RegistrationError,
                    f'can be written to by others .mode 0{mode:o}') as caught:
                instance.place(self.directory, UUID, 'demo')
            self.assertIn('2751', caught.exception.way_out)
        self.assertEqual([], os.listdir(self.directory))

    @unittest.skipIf(os.geteuid(), 'only root gives directories away')
    def test_directory_of_another_user(self):
        os.chown(self.directory, 12345, -1)
        with self.assertRaisesRegex(exception.RegistrationError,
                                    'belongs to user 12345'):
            instance.place(self.directory, UUID, 'demo')

    def test_missing_directory(self):
        with self.assertRaisesRegex(
                exception.RegistrationError,
                f'{UUID} in .*/missing: No such file') as caught:
            instance.place(str(self.top / 'missing'), UUID, 'demo')
        self.assertTrue(caught.exception.way_out)

    def test_links_are_not_followed(self):
        precious = self.write('precious', 'precious')
        for name in (f'{UUID}.token', f'{UUID}.json'):
            os.symlink(precious, f'{self.directory}/{name}')
        with self.assertRaises(OSError):
            instance.read(self.directory, UUID)
        os.unlink(self.file)
        path = instance.place(self.directory, UUID, 'demo')
        # The link was replaced, not written through.
        self.assertFalse(os.path.islink(path))
        self.assertEqual('precious', precious.read_text())

    def test_link_in_place_of_the_registration(self):
        real = self.write('elsewhere', json.dumps(
            {'token': '11' * 32, 'project': ''}))
        os.symlink(real, self.file)
        with self.assertRaises(OSError):
            instance.read(self.directory, UUID)
        with self.assertRaises(exception.RegistrationError):
            instance.place(self.directory, UUID, 'demo')

    def test_pipe_in_place_of_the_registration(self):
        os.mkfifo(self.file, 0o600)
        with self.assertRaisesRegex(ValueError, 'not a regular file'):
            instance.read(self.directory, UUID)

    def test_registration_of_others(self):
        instance.place(self.directory, UUID, 'demo')
        for mode in (0o660, 0o646):
            os.chmod(self.file, mode)
            with self.assertRaisesRegex(ValueError, 'by others'):
                instance.read(self.directory, UUID)
        os.chmod(self.file, 0o600)
        if os.geteuid() == 0:
            os.chown(self.file, 12345, -1)
            with self.assertRaisesRegex(ValueError, 'belongs to user 12345'):
                instance.read(self.directory, UUID)

    def test_broken_registrations(self):
        good = {'token': '11' * 32, 'project': 'demo'}
        for content in (
                b'', b'{', b'[]', b'7', b'\xff', b'[' * 4000, b'x' * 4097,
                *(json.dumps({**good, **change}).encode() for change in (
                    {'token': None}, {'token': '11' * 31},
                    {'token': '11' * 33}, {'token': 'zz' * 32},
                    {'token': '00' * 32}, {'token': 5}, {'project': None},
                    {'project': 'x' * 256}))):
            with self.subTest(content[:40]):
                self.file.write_bytes(content)
                with self.assertRaises(ValueError) as caught:
                    instance.read(self.directory, UUID)
                self.assertNotIn('11', str(caught.exception))
        # It is replaced by one that is whole.
        instance.place(self.directory, UUID, 'demo')
        instance.read(self.directory, UUID)

    def test_project_of_any_length(self):
        instance.place(self.directory, UUID, 'é' * 255)
        self.assertEqual('é' * 255,
                         instance.read(self.directory, UUID).project)
        with self.assertRaisesRegex(exception.RegistrationError, '255'):
            instance.place(self.directory, UUID, 'x' * 256)

    def test_full_disk_leaves_the_old_one(self):
        instance.place(self.directory, UUID, 'demo')
        before = self.file.read_bytes()
        os.chmod(self.directory, 0o551)
        if os.geteuid() == 0:
            self.skipTest('root writes everywhere')
        with self.assertRaises(exception.RegistrationError):
            instance.place(self.directory, UUID, 'other')
        self.assertEqual(before, self.file.read_bytes())
