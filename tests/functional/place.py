# SPDX-License-Identifier: Apache-2.0
"""Tests that put signatures where they want them in a guest's pages."""

from tests.functional import base

PAGE = 4096


def text(*words):
    """A string for rules that is nowhere else."""
    return ('VIRTAV-PLACED-%s-5b1e' % '-'.join(map(str, words))).encode()


def rule(name, condition, **strings):
    """Source of a rule.

    :param strings: bytes by the identifier without its ``$``
    """
    return 'rule %s { strings: %s condition: %s }\n' % (
        name, ' '.join('$%s = { %s }' % (identifier, value.hex(' '))
                       for identifier, value in strings.items()), condition)


class TestCase(base.TestCase):
    """A test with rules of its own.

    :cvar rules: their source
    """

    rules = ''

    def worker(self, **options):
        rules = self.home / 'rules'
        rules.mkdir(exist_ok=True)
        (rules / 'placed.yar').write_text(self.rules)
        return super().worker(rules=rules, **{'engine': 'twostage', **options})

    def place(self, machine, parts, *words, where=''):
        """Put bytes into pages and have pages run, without waiting.

        :param parts: bytes by their offset in the pages
        :param words: what then happens; see ``tests/guest/place.c``
        :param where: ``k`` for pages of the kernel, ``f`` for those of a
            file
        """
        machine.send(' '.join(('place', where, put(parts), *words)))
        machine.wait_line('VIRTAV-CASE place begin', 30)

    def placed(self, machine, executed, status):
        """Wait for the end, and check what the guest says."""
        self.assert_result(machine, 'place', executed, status)

    def record(self, worker, match):
        """The record in the journal of a match that was told by an event."""
        return worker.record(type='match', instance=match['instance'],
                             **{name: match[name] for name in (
                                 'tag', 'rule', 'gva', 'cr3', 'offset')})


def put(parts):
    """Words that put bytes into pages.

    :param parts: bytes by their offset in the pages
    """
    return ' '.join('p%d:%s' % (offset, content.hex())
                    for offset, content in parts.items())
