# SPDX-License-Identifier: Apache-2.0
"""Why a rule did or did not match some bytes: which of its strings are there.

Each rule is compiled a second time with its own strings and a condition that
holds as soon as one of them is found. For rules that the operator trusts:
they are parsed in this process.
"""

import collections.abc
import re
import typing

import yara

from virtav_nova import exception
from virtav_nova.i18n import _
from virtav_nova.rules import directory
from virtav_nova.rules import syntax

_PRIVATE = re.compile(r'\bprivate\b(?=[^"/}]*$)')
_OFFSETS_MAX = 8


class Explained(typing.NamedTuple):
    """A rule, seen against some bytes.

    :param seen: offsets of each string that is there, in bytes.
    :param unseen: strings that are not there.
    :param condition: of the rule, as it is written.
    """

    namespace: str
    rule: str
    seen: dict[str, list[int]]
    unseen: list[str]
    condition: str


class Explainer:
    """Looks for the strings of rules.

    :param files: the rules.
    :param names: only rules of these names; all when empty.
    :raises RuleError: when the rules cannot be parsed, or none is named so.
    """

    def __init__(self, files: collections.abc.Sequence[directory.RuleFile],
                 names: collections.abc.Container[str] = ()) -> None:
        self._rules: dict[str, tuple[str, syntax.Rule, list[str]]] = {}
        sources: dict[str, str] = {}
        for file in files:
            parsed = syntax.parse(
                file.content.decode(errors='replace'), file.name)
            for rule in parsed.rules:
                if names and rule.name not in names:
                    continue
                key = f'r{len(self._rules)}'
                known, text = _probe(key, rule)
                self._rules[key] = file.name, rule, known
                if known:
                    sources[key] = text
        if not self._rules:
            raise exception.RuleError(
                _('there is no such rule'),
                _('see the names with virtav-rules list'))
        self._compiled = (yara.compile(sources=sources, includes=False)
                          if sources else None)

    def explain(self, data: bytes, all_of_them: bool = False
                ) -> list[Explained]:
        """Tell which strings of which rules are in some bytes.

        :param data: such as a page.
        :param all_of_them: tell of rules of which nothing is there, too.
        """
        seen: dict[str, dict[str, list[int]]] = {}
        if self._compiled is not None:
            for match in self._compiled.match(data=data, fast=False):
                seen[match.rule] = {
                    string.identifier: [
                        instance.offset
                        for instance in string.instances[:_OFFSETS_MAX]]
                    for string in match.strings}
        return [
            Explained(namespace, rule.name, seen.get(key, {}),
                      [name for name in known
                       if name not in seen.get(key, {})],
                      ' '.join(rule.condition_text.split()))
            for key, (namespace, rule, known) in self._rules.items()
            if all_of_them or key in seen]


def _probe(name: str, rule: syntax.Rule) -> tuple[list[str], str]:
    """:returns: the strings of a rule, and a source that looks for them."""
    known = []
    lines = []
    for number, definition in enumerate(rule.definitions):
        # Anonymous ones are told apart by their place.
        identifier = (definition.identifier if len(definition.identifier) > 1
                      else f'$anonymous_{number}')
        known.append(identifier)
        lines.append('%s = %s' % (
            identifier, _PRIVATE.sub('', definition.text)))
    return known, 'rule %s { strings: %s condition: any of them }' % (
        name, '\n'.join(lines))
