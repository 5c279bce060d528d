# SPDX-License-Identifier: Apache-2.0
"""What a scan engine is: bytes in, matches out.

Engines are found by their name in the entry points ``virtav.engines``. The
loader of a rule set compiles the rules once; its scan processes are forked
from it and share the compiled rules.
"""

import abc
import collections.abc
import typing

from virtav_nova.rules import directory

#: In a number given to :attr:`Engine.progress`: it is a rule's, not that of
#: a group of rules.
RULE = 1 << 31

Parts = collections.abc.Callable[[int], None]


class Match(typing.NamedTuple):
    """A rule found in a page.

    :param namespace: the rule's file, relative to the rule directory.
    :param meta: what the rule says about itself (author, licence, ...).
    :param strings: identifier and offset in the page, in bytes, of what
        was found; may be empty.
    """

    rule: str
    namespace: str
    tags: list[str]
    meta: dict[str, typing.Any]
    strings: list[tuple[str, int]]


class Fragment(typing.NamedTuple):
    """A string of a rule that needs others beside it.

    :param rule: in the engine's own numbering.
    :param string: index among the rule's strings.
    """

    rule: int
    string: int


class Examined(typing.NamedTuple):
    """What is in a page.

    :param matches: as :meth:`Engine.scan` gives them.
    :param fragments: sorted, each once.
    """

    matches: list[Match]
    fragments: tuple[Fragment, ...]


class EngineOptions(typing.NamedTuple):
    """What engines are told beside the rules; each takes what it needs.

    :param scan_timeout_ms: limit of one scan. An engine that cannot keep it
        leaves that to the worker, which ends the process.
    :param clamd_socket: path of the UNIX socket of clamd.
    :param sample: harmless pages, in which strings are looked for that are
        too common to be of use.
    :param quarantine: namespace and name of rules that are left out, and
        with them the rules that refer to them.
    """

    scan_timeout_ms: int = 500
    clamd_socket: str = '/run/clamav/clamd.ctl'
    sample: collections.abc.Sequence[bytes] = ()
    quarantine: frozenset[tuple[str, str]] = frozenset()


class Engine(abc.ABC):
    """A compiled rule set that pages are scanned with.

    :ivar progress: called with the number of a part of the rules before
        that part is evaluated; the number has the bit :data:`RULE` set when
        the part is a single rule. Has to be fast and must not raise.
    """

    #: Name in the entry points.
    name: typing.ClassVar[str]
    #: Of the program that decides what matches; see :meth:`release`.
    version: typing.ClassVar[str]
    #: Gives fragments, and can say what they come to.
    accumulates: typing.ClassVar[bool] = False
    #: Connects to a UNIX socket whenever it has to, so it must be let.
    local_socket: typing.ClassVar[bool] = False

    progress: Parts | None = None

    @classmethod
    @abc.abstractmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            options: EngineOptions) -> typing.Self:
        """Compile rules.

        What is compiled serves processes that are forked afterwards, one
        thread in each.

        :param files: sorted by name.
        :param options: see there.
        :raises RuleError: with a message that begins with the file's name,
            and the line where it is known.
        :raises EngineError: when the engine cannot work here.
        """

    @classmethod
    def release(cls, options: EngineOptions) -> str:
        """Name what decides, beside the rules, what matches.

        Part of the rule-set digest. May change while the engine is in use,
        for one that has signatures of its own; a rule set that was loaded
        before is then to be loaded again.

        :raises EngineError: when the engine cannot work here.
        """
        return cls.version

    @abc.abstractmethod
    def describe(self) -> dict[str, typing.Any]:
        """Say what the engine is and can do.

        :returns: plain JSON: ``rules`` (how many are in force; None for an
            engine that takes no heed of the rules), ``cannot`` (a list of
            what it does not see in a page, for a reader) and whatever else
            an operator should know.
        """

    @abc.abstractmethod
    def scan(self, data: bytes | memoryview) -> list[Match]:
        """Scan one unit.

        :param data: a page, or any other number of bytes; not kept.
        :returns: the matches in the order of the rules.
        :raises Exception: any; the unit is then answered as unknown.
        """

    def examine(self, data: bytes | memoryview) -> Examined:
        """Scan one unit, and see which parts of rules are in it.

        :param data: as in :meth:`scan`.
        :raises Exception: any; the unit is then answered as unknown.
        """
        return Examined(self.scan(data), ())

    def complete(self, rule: int, strings: frozenset[int]) -> bool:
        """Tell whether strings that were found apart may be a match.

        :param rule: see :class:`Fragment`.
        :param strings: of the rule that were found.
        :returns: whether the rule could hold where all of them are, so that
            :meth:`confirm` is worth its time.
        """
        return False

    def confirm(self, rule: int, data: bytes) -> Match | None:
        """Evaluate one rule.

        :param rule: see :class:`Fragment`.
        :param data: several pages one after the other.
        :raises Exception: any; nothing is then known.
        """
        return None

    def suspect(self, part: int) -> None:  # noqa: B027
        """Tell a bad rule from its group: evaluate them one by one.

        :param part: a number that :attr:`progress` was called with. One that
            is not known is passed over.
        """

    def rule_name(self, part: int) -> tuple[str, str] | None:
        """Name a rule.

        :param part: a number that :attr:`progress` was called with, or one
            of a :class:`Fragment`, which may lack the bit :data:`RULE`.
        :returns: namespace and name; None when it is no single rule's.
        """
        return None
