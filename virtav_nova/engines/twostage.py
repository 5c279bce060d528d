# SPDX-License-Identifier: Apache-2.0
"""The default engine: Hyperscan over the strings of rules, then libyara.

One Hyperscan database tells which strings may be in a page, and a formula
for each rule whether it may hold with those. Only then does libyara evaluate
it, in a group of a few rules, so that the answer is libyara's own. Rules of
which that cannot be told are evaluated for every page.

libyara has a fixed cost for each rule, page by page; Hyperscan has next to
none.
"""

import collections.abc
import importlib.metadata
import time
import typing

import yara

from virtav_nova import exception
from virtav_nova.engines import base
from virtav_nova.engines import groups
from virtav_nova.engines import index
from virtav_nova.engines import sources
from virtav_nova.engines import yara as reference
from virtav_nova.i18n import _
from virtav_nova.rules import directory
from virtav_nova.rules import necessary
from virtav_nova.rules import patterns

#: Rules named in the description.
_NAMED_MAX = 20

#: A formula with the numbers of a rule's leaves.
_Formula = int | tuple[int, tuple['_Formula', ...]]


class _Rule(typing.NamedTuple):
    """What is known of a rule that may be found.

    :param formula: that has to hold on a page.
    :param fewest: leaves that it takes to hold, at least.
    :param apart: formula that has to hold for strings that lie apart.
    :param fewest_apart: the same of this one.
    :param strings: leaves with a lower number are strings and rare.
    :param accumulated: may take more than one string, so that they may
        lie apart.
    """

    namespace: str
    name: str
    formula: _Formula
    fewest: int
    apart: _Formula
    fewest_apart: int
    strings: int
    accumulated: bool


class TwostageEngine(base.Engine):
    """Rules in groups, and a database that tells which to evaluate."""

    name = 'twostage'
    version = (f'1 yara {yara.YARA_VERSION} '
               f'hyperscan {importlib.metadata.version("hyperscan")}')
    accumulates = True

    #: Rules of a group that is evaluated when one of them may hold.
    group_rules: typing.ClassVar[int] = 16
    #: Rules of a group that is evaluated for every page.
    always_rules: typing.ClassVar[int] = 64

    def __init__(self, files: list[groups.File],
                 options: base.EngineOptions) -> None:
        begin = time.monotonic()
        self._timeout = reference.seconds(options.scan_timeout_ms)
        self._rules: list[_Rule] = []
        #: Rule and number of the leaf, by the number of the expression.
        self._leaves: list[list[tuple[int, int]]] = []
        expressions = self._index(files, options.sample)
        self._database = index.Database(expressions)
        if self._database.broken:
            # They did when they were tried; without them rules were missed.
            raise exception.EngineError(
                _('Hyperscan does not take what it took before: %s')
                % next(iter(self._database.broken)).text[:200],
                _('try again, or set [virtav_worker] engine to yara'))
        self._numbers = {(rule.namespace, rule.name): number
                         for number, rule in enumerate(self._rules)}
        self._groups: list[groups.Group] = []
        self._group_of = [0] * len(self._rules)
        self._group(files)
        self._seconds = round(time.monotonic() - begin, 1)

    @classmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            options: base.EngineOptions) -> typing.Self:
        """See :meth:`virtav_nova.engines.base.Engine.compile`."""
        return cls(groups.read(sources.texts(files, options.quarantine)),
                   options)

    def describe(self) -> dict[str, typing.Any]:
        """See :meth:`virtav_nova.engines.base.Engine.describe`."""
        always = [f'{rule.namespace}:{rule.name}'
                  for rule in self._rules if not rule.fewest]
        return {
            'rules': len(self._rules),
            'rules_always_evaluated': len(always),
            'always_evaluated': always[:_NAMED_MAX],
            'rules_accumulated': sum(
                1 for rule in self._rules if rule.accumulated),
            'groups': len(self._groups),
            'expressions': len(self._leaves),
            'database_bytes': self._database.size,
            'load_seconds': self._seconds,
            'scan_timeout_s': self._timeout,
            'modules': list(yara.modules),
            'cannot': [
                _('find a string by itself that is common in machine code '
                  'or has no fixed part; where strings lie on several pages '
                  'it is taken as found'),
                _('find a rule that needs nothing but one string several '
                  'times, where these lie on several pages')]}

    def scan(self, data: bytes | memoryview) -> list[base.Match]:
        """See :meth:`virtav_nova.engines.base.Engine.scan`."""
        return self._evaluated(data, self._found(data))

    def examine(self, data: bytes | memoryview) -> base.Examined:
        """See :meth:`virtav_nova.engines.base.Engine.examine`."""
        found = self._found(data)
        fragments = tuple(
            base.Fragment(number, leaf)
            for number in sorted(found)
            if self._rules[number].accumulated
            for leaf in sorted(found[number])
            if leaf < self._rules[number].strings)
        return base.Examined(self._evaluated(data, found), fragments)

    def complete(self, rule: int, strings: frozenset[int]) -> bool:
        """See :meth:`virtav_nova.engines.base.Engine.complete`."""
        known = self._rules[rule]
        return (len(strings) >= known.fewest_apart
                and _holds(known.apart, strings))

    def confirm(self, rule: int, data: bytes) -> base.Match | None:
        """See :meth:`virtav_nova.engines.base.Engine.confirm`."""
        group = self._group_of[rule]
        single = dict(self._groups[group].single)
        if rule in single:
            found = self._match(rule | base.RULE, single[rule], data)
        else:
            found = self._match(group, self._groups[group].compiled, data)
        return next((match for number, match in found if number == rule),
                    None)

    def suspect(self, part: int) -> None:
        """See :meth:`virtav_nova.engines.base.Engine.suspect`."""
        if 0 <= part < len(self._groups):
            group = self._groups[part]
            group.split({number: self._name(number)
                         for number in sorted(group.rules)})

    def rule_name(self, part: int) -> tuple[str, str] | None:
        """See :meth:`virtav_nova.engines.base.Engine.rule_name`."""
        number = part & ~base.RULE
        return self._name(number) if 0 <= number < len(self._rules) else None

    def _name(self, number: int) -> tuple[str, str]:
        rule = self._rules[number]
        return rule.namespace, rule.name

    def _found(self, data: bytes | memoryview) -> dict[int, set[int]]:
        """:returns: leaves that may be in the data, by rule."""
        found: dict[int, set[int]] = {}
        for expression in self._database.scan(data):
            for rule, leaf in self._leaves[expression]:
                if rule in found:
                    found[rule].add(leaf)
                else:
                    found[rule] = {leaf}
        return found

    def _evaluated(self, data: bytes | memoryview,
                   found: dict[int, set[int]]) -> list[base.Match]:
        """Evaluate what may hold, and what may always.

        :param found: leaves by rule.
        """
        wanted = set(self._always)
        for number, leaves in found.items():
            rule = self._rules[number]
            if (len(leaves) >= rule.fewest
                    and _holds(rule.formula, leaves)):
                wanted.add(self._group_of[number])
        matches: list[tuple[int, base.Match]] = []
        for part in sorted(wanted):
            group = self._groups[part]
            if group.single:
                for number, rules in group.single:
                    matches += self._match(number | base.RULE, rules, data)
                continue
            matches += [each for each in self._match(
                part, group.compiled, data) if each[0] in group.rules]
        matches.sort(key=_number)
        return [match for _number, match in matches]

    def _match(self, part: int, rules: yara.Rules,
               data: bytes | memoryview) -> list[tuple[int, base.Match]]:
        """:returns: the rules that match, by their number."""
        if self.progress is not None:
            self.progress(part)
        return [(self._numbers[match.namespace, match.rule], match)
                for match in reference.matches(rules, data, self._timeout)]

    def _index(self, files: list[groups.File],
               sample: collections.abc.Sequence[bytes]
               ) -> list[patterns.Expression]:
        """Find out by what each rule is noticed.

        :returns: the expressions for it.
        """
        formulas = []
        for file in files:
            known = necessary.formulas(file.source) if file.source else {}
            formulas += [(file.name, name, known.get(name, necessary.ALWAYS))
                         for name in file.names]
        keys = {_key(namespace, leaf): None
                for namespace, _name, formula in formulas
                for leaf in necessary.leaves(formula)}
        chosen = index.choose(
            {file.name: file.source for file in files}, keys, sample)
        numbers: dict[patterns.Expression, int] = {}
        for number, (namespace, name, formula) in enumerate(formulas):
            rule, leaves = _rule(namespace, name, formula, chosen)
            self._rules.append(rule)
            if not rule.fewest and not rule.accumulated:
                continue
            for leaf, option in enumerate(leaves):
                for expression in option:
                    at = numbers.setdefault(expression, len(numbers))
                    if at == len(self._leaves):
                        self._leaves.append([])
                    self._leaves[at].append((number, leaf))
        return list(numbers)

    def _group(self, files: list[groups.File]) -> None:
        """Compile the rules in groups; the first are always evaluated."""
        cutter = groups.Cutter(files)
        whole = {file.name for file in files if file.source is None}
        for always, size in ((True, self.always_rules),
                             (False, self.group_rules)):
            numbers = [
                number for number, rule in enumerate(self._rules)
                if (not rule.fewest) is always]
            rules: list[int] = []
            for place, number in enumerate(numbers, 1):
                rules.append(number)
                namespace = self._rules[number].namespace
                # A file that is taken as a whole is not taken twice.
                if place < len(numbers) and (
                        namespace == self._rules[numbers[place]].namespace
                        if namespace in whole else len(rules) < size):
                    continue
                for each in rules:
                    self._group_of[each] = len(self._groups)
                self._groups.append(cutter.group(
                    {each: self._name(each) for each in rules}))
                rules = []
            if always:
                self._always = range(len(self._groups))


def _rule(namespace: str, name: str, formula: necessary.Formula,
          chosen: dict[index.Key, index.Chosen]
          ) -> tuple[_Rule, list[patterns.Option]]:
    """:returns: the rule, and by what each of its leaves is noticed."""
    unseen, common, fixed = set(), set(), set()
    for leaf in necessary.leaves(formula):
        how = chosen.get(_key(namespace, leaf))
        if how is None:
            unseen.add(leaf)
        elif not how.rare:
            common.add(leaf)
        if isinstance(leaf, necessary.Fixed):
            fixed.add(leaf)
    here = necessary.assuming(formula, unseen | common)
    if here == necessary.ALWAYS:
        # Better to be noticed too often than always.
        here = necessary.assuming(formula, unseen)
    apart = necessary.apart(formula, unseen | common | fixed)
    strings = necessary.leaves(apart)
    leaves = list(dict.fromkeys([*strings, *necessary.leaves(here)]))
    numbers = {leaf: number for number, leaf in enumerate(leaves)}
    rule = _Rule(
        namespace, name, _numbered(here, numbers), necessary.fewest(here),
        _numbered(apart, numbers), necessary.fewest(apart), len(strings),
        bool(strings)
        and necessary.joins(necessary.apart(formula, fixed)))
    return rule, [chosen[_key(namespace, leaf)].option for leaf in leaves]


def _key(namespace: str, leaf: necessary.Leaf) -> index.Key:
    return index.Key(
        '' if isinstance(leaf, necessary.Fixed) else namespace, leaf)


def _numbered(formula: necessary.Formula,
              numbers: dict[necessary.Leaf, int]) -> _Formula:
    if isinstance(formula, necessary.AtLeast):
        return formula.least, tuple(
            _numbered(part, numbers) for part in formula.parts)
    return numbers[formula]


def _holds(formula: _Formula,
           found: collections.abc.Container[int]) -> bool:
    if isinstance(formula, int):
        return formula in found
    missing, parts = formula
    if missing:
        for part in parts:
            if (part in found if isinstance(part, int)
                    else _holds(part, found)):
                missing -= 1
                if not missing:
                    break
    return not missing


def _number(match: tuple[int, base.Match]) -> int:
    return match[0]
