# SPDX-License-Identifier: Apache-2.0
"""What a scan process remembers of pages and junctions that it scanned."""

from virtav_nova.engines import base

#: Result of what is clean and holds no part of a rule.
CLEAN = base.Examined([], ())

# Bytes that an entry takes at most: one that is CLEAN (tag, two words and
# the hash in a dictionary that is a third full), and each match, string of a
# match and fragment of another one.
_ENTRY = 256
_MATCH = 4096
_STRING = 160
_FRAGMENT = 128


class Cache:
    """Results by tag; those that were not asked for of late give way.

    There are two generations. What is looked up goes to the younger one, and
    once that holds half of the bytes the older one is forgotten. That costs
    much less at each look than to keep all in the order of their use.

    :param size: in bytes, about.
    """

    def __init__(self, size: int) -> None:
        self._half = size // 2
        self._young: dict[bytes, base.Examined] = {}
        self._old: dict[bytes, base.Examined] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def get(self, tag: bytes) -> base.Examined | None:
        """Look a result up.

        :param tag: of the page or junction.
        """
        found = self._young.get(tag)
        if found is None:
            found = self._old.get(tag)
            if found is not None:
                self.add(tag, found)
        return found

    def add(self, tag: bytes, result: base.Examined) -> None:
        """Remember a result.

        :param tag: of the page or junction.
        """
        self._young[tag] = result
        self._held += _ENTRY
        if result is not CLEAN:
            self._held += (_MATCH * len(result.matches)
                           + _STRING * sum(len(match.strings)
                                           for match in result.matches)
                           + _FRAGMENT * len(result.fragments))
        if self._held > self._half:
            self._old = self._young
            self._young = {}
            self._held = 0


def result(examined: base.Examined) -> base.Examined:
    """Have one object stand for all results that are empty.

    :param examined: from an engine.
    """
    if examined.matches or examined.fragments:
        return examined
    return CLEAN
