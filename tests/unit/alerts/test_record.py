# SPDX-License-Identifier: Apache-2.0

import json
import unittest
import uuid

from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.worker import control

PAGE = bytes(range(256)) * 16
HELLO = wire.Hello(
    1, 1, 4096, uuid.UUID(int=1), 1 << 30, wire.Policy.REPORT,
    wire.OnMatch.ALERT, wire.OnTimeout.ALLOW, 1000)


def request(**changes):
    return wire.Request(
        id=1, generation=2, offset=0x3000, gpa=0x3000, gva=0xffffffff81000000,
        rip=0xffffffff81000010, cr3=0x1000, vcpu=1, cpl=0, flags=wire.HOLD,
        tag=bytes(16), block=b'pc.ram', before_tag=wire.NO_TAG,
        after_tag=wire.NO_TAG, window=wire.window(PAGE))._replace(**changes)


def match(**changes):
    return base.Match('R', 'a.yar', ['t'], {'author': 'A'},
                      [('$a', 100)])._replace(**changes)


def finding(found, **changes):
    return record.Finding(
        'page', found, 0xffffffff81000000, PAGE)._replace(**changes)


class RecordTest(unittest.TestCase):

    def _details(self, found, **changes):
        one, = record.details(request(**changes), [finding(found)])
        return one

    def test_match(self):
        known = self._details(match())
        entry = record.match(HELLO, b'\xd1' * 32, known | {'repeats': 2})
        self.assertRegex(entry.pop('time'),
                         r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00$')
        self.assertEqual({
            'type': 'match', 'instance': str(HELLO.instance), 'rule': 'R',
            'rule_author': 'A', 'rule_licence': None,
            'rule_reference': None, 'severity': None, 'mitre': [],
            'tags': ['t'], 'meta': {'author': 'A'}, 'form': 'page',
            'start': 0xffffffff81000000, 'pages': [], 'repeats': 2,
            'namespace': 'a.yar',
            'strings': [{'identifier': '$a', 'offset': 100}],
            'rules_matched': 1, 'block': 'pc.ram', 'offset': 0x3000,
            'gpa': 0x3000, 'gva': 0xffffffff81000000,
            'rip': 0xffffffff81000010, 'cr3': 0x1000, 'cpl': 0, 'vcpu': 1,
            'tag': '00' * 16, 'bytes': PAGE[36:36 + 256].hex(),
            'held': True, 'resent': False, 'digest': 'd1' * 32,
            'policy': 'report', 'on_match': 'alert'}, entry)

    def test_what_a_rule_says_of_itself(self):
        known = self._details(match(meta={
            'Author': 'A', 'license': 'MIT', 'url': 'https://example.org',
            'severity': 'Critical', 'attack': 'T1059.003'}))
        self.assertEqual(
            ('A', 'MIT', 'https://example.org', 'critical', ['T1059.003']),
            tuple(known[name] for name in (
                'rule_author', 'rule_licence', 'rule_reference', 'severity',
                'mitre')))

    def test_junction(self):
        data = b'x' * 512 + PAGE[:512]
        found = match(strings=[('$a', 500)])
        known, = record.details(request(), [finding(
            found, form='junction', start=0xffffffff80fffe00, data=data)])
        self.assertEqual(
            ('junction', 0xffffffff80fffe00, data[436:692].hex()),
            (known['form'], known['start'], known['bytes']))

    def test_unknown_address(self):
        self.assertIsNone(
            self._details(match(), gpa=wire.UNKNOWN_GPA)['gpa'])

    def test_excerpt_stays_in_the_page(self):
        for offset, begin in ((0, 0), (63, 0), (64, 0), (65, 1),
                              (4000, 3840), (4095, 3840)):
            known = self._details(match(strings=[('$b', 4095),
                                                 ('$a', offset)]))
            self.assertEqual(PAGE[begin:begin + 256].hex(), known['bytes'])
        self.assertEqual(PAGE[:256].hex(),
                         self._details(match(strings=[]))['bytes'])

    def test_hostile_names(self):
        known = self._details(
            match(rule='R\n{}', namespace='a\x1b.yar', tags=['\u202e'],
                  meta={'author': 'A\r\n', 'n': -1 << 70, 'ok': True,
                        'k\n': 7}),
            block=b'pc\n\xff\x00ram')
        self.assertEqual(r'R\n{}', known['rule'])
        self.assertEqual(r'a\x1b.yar', known['namespace'])
        self.assertEqual([r'\u202e'], known['tags'])
        self.assertEqual('A', known['rule_author'])
        self.assertEqual({'author': r'A\r\n', 'n': str(-1 << 70), 'ok': True,
                          r'k\n': 7}, known['meta'])
        self.assertEqual(r'pc\n\xff\x00ram', known['block'])

    def test_bounded(self):
        huge = '"\\' * 100000
        found = match(
            rule=huge, namespace=huge, tags=[huge] * 1000,
            meta={f'{number}{huge}': huge for number in range(1000)},
            strings=[(huge, 1)] * 1000)
        pages = [{'gva': 1 << 63, 'gpa': 1 << 63,
                  'strings': ['$' + 'x' * 30]}] * 1000
        all_known = list(record.details(
            request(), [finding(found, pages=pages)] * 100))
        self.assertEqual(record.MATCHES_MAX, len(all_known))
        for known in all_known:
            self.assertEqual(100, known['rules_matched'])
            message = control.pack('match', session=1 << 63, record=known)
            self.assertLess(len(message), control.MESSAGE_MAX)

    def test_only_known_parts_are_taken_from_a_scan_process(self):
        forged = {'type': 'session', 'instance': 'other', 'digest': 'other',
                  'more': 1, 'rule': 'R'}
        entry = record.match(HELLO, bytes(32), forged)
        self.assertEqual('match', entry['type'])
        self.assertEqual(str(HELLO.instance), entry['instance'])
        self.assertEqual('00' * 32, entry['digest'])
        self.assertNotIn('more', entry)

    def test_session(self):
        opened = record.session('opened', HELLO, bytes(32))
        self.assertEqual('session', opened['type'])
        self.assertIsNone(opened['reason'])
        self.assertIsNone(opened['fetches'])
        closed = record.session(
            'closed', HELLO, bytes(32), 'gone\n', {
                'fetches': 9, 'distinct': None, 'matches': 'x' * 100,
                'unknown': 0, 'dropped': 1, 'more': 1})
        self.assertEqual(r'gone\n', closed['reason'])
        self.assertEqual([9, None, None, 0, 1],
                         [closed[name] for name in record.COUNTS])
        self.assertNotIn('more', closed)
        json.dumps(closed)
