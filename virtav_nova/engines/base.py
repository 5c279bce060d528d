# SPDX-License-Identifier: Apache-2.0
"""What a scan engine is: bytes in, matches out.

Engines are found by their name in the entry points ``virtav.engines``. The
worker compiles the rules once and hands the image of the compiled set to
its scan processes.
"""

import abc
import collections.abc
import typing

from virtav_nova.rules import directory


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


class Engine(abc.ABC):
    """A compiled rule set that pages are scanned with."""

    #: Name in the entry points.
    name: typing.ClassVar[str]
    #: Of whatever decides what matches; part of the rule-set digest.
    version: typing.ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def compile(
            cls, files: collections.abc.Sequence[directory.RuleFile],
            scan_timeout_ms: int) -> typing.Self:
        """Compile rules.

        :param files: sorted by name.
        :param scan_timeout_ms: limit of one scan. An engine that cannot
            keep it leaves that to the worker, which ends the process.
        :raises RuleError: with a message that begins with the file's name,
            and the line where it is known.
        """

    @classmethod
    @abc.abstractmethod
    def restore(cls, image: bytes, scan_timeout_ms: int) -> typing.Self:
        """Take over a set compiled by this same version in this worker.

        :param image: made by :meth:`image`; trusted.
        :param scan_timeout_ms: as in :meth:`compile`.
        """

    @abc.abstractmethod
    def image(self) -> bytes:
        """:returns: the compiled set, for :meth:`restore`."""

    @abc.abstractmethod
    def describe(self) -> dict[str, typing.Any]:
        """Say what the engine is and can do.

        :returns: ``rules`` (how many are in force) and whatever else an
            operator should know.
        """

    @abc.abstractmethod
    def scan(self, page: bytes | memoryview) -> list[Match]:
        """Scan one page.

        :param page: 4096 bytes, not kept.
        :returns: the matches in the order of the rules.
        :raises Exception: any; the page is then answered as unknown.
        """
