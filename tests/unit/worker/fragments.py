# SPDX-License-Identifier: Apache-2.0
"""An engine whose rules need several strings."""

import yara

from virtav_nova.engines import base
from virtav_nova.monitor import wire


class FragmentEngine(base.Engine):
    """Finds plain strings; libyara decides.

    :param rules: for each its condition and its strings, ``$s0`` and so on
    :param needed: strings of a rule that may complete it; all by default
    """

    name = 'fragment'
    version = '1'
    accumulates = True

    def __init__(self, *rules, needed=None):
        self._needed = needed
        self._rules = [
            (strings, yara.compile(source='rule R%d { strings: %s '
                                   'condition: %s }' % (
                                       number, ' '.join(
                                           '$s%d = { %s }' % (at, value.hex())
                                           for at, value in enumerate(strings)
                                       ), condition)))
            for number, (condition, *strings) in enumerate(rules)]
        #: What was confirmed, or was not.
        self.confirms = []

    @classmethod
    def compile(cls, files, options):
        return cls()

    def describe(self):
        return {'rules': len(self._rules)}

    def scan(self, data):
        return [match for number in range(len(self._rules))
                if (match := self._match(number, data))]

    def examine(self, data):
        data = bytes(data)
        return base.Examined(self.scan(data), tuple(
            base.Fragment(number, at)
            for number, (strings, _) in enumerate(self._rules)
            for at, value in enumerate(strings) if value in data))

    def complete(self, rule, strings):
        return len(strings) >= (
            self._needed or len(self._rules[rule][0]))

    def confirm(self, rule, data):
        match = self._match(rule, data)
        self.confirms.append((rule, match is not None))
        return match

    def _match(self, rule, data):
        for match in self._rules[rule][1].match(data=bytes(data)):
            return base.Match(match.rule, 'test.yar', [], {}, [
                (string.identifier, instance.offset)
                for string in match.strings for instance in string.instances])
        return None


def request(gva, content, **fields):
    """A request for a page.

    :param content: of the page, filled up with zeros
    :param fields: others of the request; ``before`` and ``after``: bytes of
        the neighbours
    """
    window = wire.window(content.ljust(4096, b'\0'),
                         fields.pop('before', b''), fields.pop('after', b''))
    return wire.Request(**{
        'id': 1, 'generation': 1, 'offset': 0, 'gpa': wire.UNKNOWN_GPA,
        'gva': gva, 'rip': gva, 'cr3': 0x1000, 'vcpu': 0, 'cpl': 3,
        'flags': wire.HOLD, 'tag': wire.page_tag(bytes(32), window),
        'block': b'pc.ram', 'before_tag': wire.NO_TAG,
        'after_tag': wire.NO_TAG, 'window': window, **fields})
