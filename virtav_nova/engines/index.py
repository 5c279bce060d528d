# SPDX-License-Identifier: Apache-2.0
"""Which expressions tell what is in a page, and the database of them."""

import collections
import collections.abc
import typing

import hyperscan

from virtav_nova.rules import necessary
from virtav_nova.rules import patterns
from virtav_nova.rules import syntax

#: Part of the sample's pages in which an expression may be at most, to be
#: told of; and to be used where a rule has no better one.
_RARE = 0.002
_USABLE = 0.05
#: An expression that is in fewer pages of the sample is rare in any case.
_PAGES = 2
#: Expressions of the database, at most.
_EXPRESSIONS_MAX = 500_000
_FLAGS = hyperscan.HS_FLAG_DOTALL | hyperscan.HS_FLAG_SINGLEMATCH


class Key(typing.NamedTuple):
    """What is looked for.

    :param namespace: of a string; empty for what is at a fixed offset.
    """

    namespace: str
    leaf: necessary.Leaf


class Chosen(typing.NamedTuple):
    """How something is noticed.

    :param rare: seldom enough that to find it means something.
    """

    option: patterns.Option
    rare: bool


class Database:
    """Expressions that are looked for together.

    :param expressions: each once.
    :ivar broken: those that Hyperscan does not take; they are left out.
    :ivar size: bytes that are scanned with.
    """

    def __init__(self, expressions: collections.abc.Sequence[
            patterns.Expression]) -> None:
        self.broken: set[patterns.Expression] = set()
        numbers: dict[bool, list[int]] = {False: [], True: []}
        for number, expression in enumerate(expressions):
            numbers[expression.differs].append(number)
        self._plain = self._compiled(expressions, numbers[False])
        self._differs = self._compiled(expressions, numbers[True])
        self.size = sum(database.size()
                        for database in (self._plain, self._differs)
                        if database)

    def scan(self, data: bytes | memoryview) -> list[int]:
        """:returns: numbers of the expressions that are in the data."""
        found: list[int] = []
        if self._plain:
            self._plain.scan(bytes(data), match_event_handler=_add,
                             context=found)
        if self._differs:
            self._differs.scan(patterns.differences(data),
                               match_event_handler=_add, context=found)
        return found

    def _compiled(self, expressions: collections.abc.Sequence[
            patterns.Expression], numbers: list[int]
            ) -> hyperscan.Database | None:
        flags = {number: _flags(expressions[number]) for number in numbers}
        try:
            return _compiled(expressions, flags)
        except hyperscan.error:
            return _compiled(expressions, self._mended(expressions, flags))

    def _mended(self, expressions: collections.abc.Sequence[
            patterns.Expression], flags: dict[int, int]) -> dict[int, int]:
        """:returns: flags of what compiles alone."""
        mended = {}
        for number, wanted in flags.items():
            # Hyperscan may find more of what is too large for it.
            for each in (wanted, wanted | hyperscan.HS_FLAG_PREFILTER):
                try:
                    if not expressions[number].literal:
                        _compiled(expressions, {number: each})
                except hyperscan.error:
                    continue
                mended[number] = each
                break
            else:
                self.broken.add(expressions[number])
        return mended


def choose(sources: collections.abc.Mapping[str, syntax.Source | None],
           keys: collections.abc.Iterable[Key],
           sample: collections.abc.Sequence[bytes]
           ) -> dict[Key, Chosen]:
    """Choose by which expressions strings are noticed.

    :param sources: by namespace.
    :param keys: what is to be noticed, each once.
    :param sample: harmless pages.
    :returns: what can be noticed.
    """
    options = {key: _options(sources, key) for key in keys}
    return _Chooser(options, sample).chosen()


def _options(sources: collections.abc.Mapping[str, syntax.Source | None],
             key: Key) -> list[patterns.Option]:
    leaf = key.leaf
    if isinstance(leaf, necessary.Fixed):
        return [(patterns.at(leaf.offset, leaf.value),)]
    source = sources[key.namespace]
    if source is None:
        return []
    return patterns.options(source.by_name[leaf.rule].strings[leaf.number])


class _Chooser:

    def __init__(self, options: dict[Key, list[patterns.Option]],
                 sample: collections.abc.Sequence[bytes]) -> None:
        self._options = options
        self._sample = sample
        #: Part of the pages in which an expression is.
        self._rates: dict[patterns.Expression, float] = {}

    def chosen(self) -> dict[Key, Chosen]:
        chosen: dict[Key, Chosen] = {}
        room = _EXPRESSIONS_MAX
        open_ = {key: 0 for key, options in self._options.items() if options}
        while open_:
            self._try({expression for key, index in open_.items()
                       for expression in self._options[key][index]})
            for key, index in list(open_.items()):
                option = self._options[key][index]
                if self._rate(option) <= _RARE:
                    del open_[key]
                    room -= len(option)
                    if room >= 0:
                        chosen[key] = Chosen(option, True)
                elif index + 1 < len(self._options[key]):
                    open_[key] = index + 1
                else:
                    del open_[key]
                    best = min(self._options[key], key=self._rate)
                    if self._rate(best) <= _USABLE:
                        chosen[key] = Chosen(best, False)
        return chosen

    def _rate(self, option: patterns.Option) -> float:
        return sum(self._rates[expression] for expression in option)

    def _try(self, expressions: set[patterns.Expression]) -> None:
        """Look how often expressions are in the sample."""
        new = sorted(expressions.difference(self._rates))
        database = Database(new)
        pages: collections.Counter[int] = collections.Counter()
        for page in self._sample:
            pages.update(database.scan(page))
        for number, expression in enumerate(new):
            count = pages[number]
            self._rates[expression] = (
                0 if count < _PAGES else count / len(self._sample))
        for expression in database.broken:
            self._rates[expression] = 1


def _flags(expression: patterns.Expression) -> int:
    return _FLAGS | (hyperscan.HS_FLAG_CASELESS if expression.caseless
                     else 0)


def _compiled(expressions: collections.abc.Sequence[patterns.Expression],
              flags: dict[int, int]) -> hyperscan.Database | None:
    """:param flags: by the number of the expression."""
    if not flags:
        return None
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(
        expressions=[expressions[number].text.encode() for number in flags],
        ids=list(flags), flags=list(flags.values()))
    return database


def _add(number: int, _begin: int, _end: int, _flags: int,
         found: typing.Any) -> None:
    found.append(number)
