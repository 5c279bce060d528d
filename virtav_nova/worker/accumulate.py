# SPDX-License-Identifier: Apache-2.0
"""What was seen of rules whose strings lie on several pages.

An engine tells which strings of such a rule, its *fragments*, are on a page.
They are kept here for each address space of each session, with copies of the
pages. Once the fragments of an address space could make a rule hold, it is
time for :mod:`virtav_nova.worker.deep` to have a look at its memory.

An address space is known by CR3 alone, and the next process may get the CR3
of one that is gone. So nothing here proves anything: what is kept only says
what to look for.

A page that is mapped into several processes is fetched, as far as QEMU can
tell, by the first of them only. So fragments of other address spaces of the
session count when it is asked whether to look, and never for the answer.

The guest decides how much there is to be kept, so everything is bounded.
What is dropped is counted.
"""

import collections
import collections.abc
import typing

from virtav_nova.engines import base
from virtav_nova.monitor import wire

#: Bytes that a fragment, and a page beside its copy, take by and large.
_FRAGMENT_SIZE = 160
_PAGE_SIZE = 512
#: Bits of CR3 that are an address in 64-bit mode, and outside of it.
_ROOT = (1 << 52) - wire.PAGE_SIZE
_ROOT_32 = (1 << 32) - 32

_Strings: typing.TypeAlias = frozenset[int]


class Limits(typing.NamedTuple):
    """Bounds of what is kept.

    :param pages: of one address space.
    :param rules: of one address space.
    :param spaces: address spaces of all sessions.
    :param size: of everything, in bytes, by and large.
    """

    pages: int = 64
    rules: int = 1000
    spaces: int = 1024
    size: int = 32 << 20


class Page:
    """A page with fragments, as it was when it was fetched.

    :param space: that it was fetched in.
    :param gva: page aligned.
    :param gpa: page aligned; :data:`wire.UNKNOWN_GPA` if it is not known.
    :param window: the page between the edges of its neighbours.
    :param seen: when, on the monotonic clock.
    :param fragments: strings by rule, at least one.
    """

    __slots__ = ('fragments', 'gpa', 'gva', 'seen', 'size', 'space', 'tag',
                 'window')

    def __init__(self, space: 'Space', gva: int, gpa: int, tag: bytes,
                 window: bytes, seen: float,
                 fragments: dict[int, _Strings]) -> None:
        self.space = space
        self.gva = gva
        self.gpa = gpa
        self.tag = tag
        self.window = window
        self.seen = seen
        self.fragments = fragments
        self.size = (_PAGE_SIZE + len(window) + _FRAGMENT_SIZE
                     * sum(map(len, fragments.values())))

    @property
    def content(self) -> bytes:
        """The page alone."""
        return self.window[wire.EDGE_SIZE:wire.EDGE_SIZE + wire.PAGE_SIZE]


class Space:
    """An address space, or the kernel's part of all of a session's.

    :param session: number of the session.
    :param root: CR3 without the bits that are no address; None for the
        kernel.
    :ivar pages: by address, those longest not seen first.
    :ivar tried: for a rule that was looked for, the state of its evidence
        at that time.
    :ivar told: the same for a rule that was found.
    :ivar found: rules that were found while nothing waited for the answer.
    :ivar fresh: there is evidence that nobody looked at yet.
    """

    __slots__ = ('found', 'fresh', 'pages', 'root', 'rules', 'session',
                 'told', 'tried')

    def __init__(self, session: int, root: int | None) -> None:
        self.session = session
        self.root = root
        self.pages: collections.OrderedDict[int, Page] = (
            collections.OrderedDict())
        #: How many of the pages have fragments of a rule.
        self.rules: dict[int, int] = {}
        self.tried: dict[int, int] = {}
        self.told: dict[int, int] = {}
        self.found: set[int] = set()
        self.fresh = False


class _Session:
    """All address spaces of a session.

    :ivar wide: addresses beyond 32 bits were seen.
    :ivar pages: those with fragments of a rule.
    :ivar strings: by rule, on how many pages each string is.
    :ivar states: count, for each rule, the changes of its evidence.
    """

    __slots__ = ('pages', 'spaces', 'states', 'strings', 'wide')

    def __init__(self) -> None:
        self.wide = False
        self.spaces: dict[int | None, Space] = {}
        self.pages: dict[int, dict[Page, None]] = {}
        self.strings: dict[int, collections.Counter[int]] = {}
        self.states: dict[int, int] = {}


class Accumulator:
    """The evidence of all sessions of a scan process.

    :param engine: whose fragments they are.
    :param limits: what to keep at most.
    """

    def __init__(self, engine: base.Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._sessions: dict[int, _Session] = {}
        #: All address spaces, those longest not seen first.
        self._spaces: collections.OrderedDict[
            tuple[int, int | None], Space] = collections.OrderedDict()
        #: Pages, fragments and address spaces that were too many.
        self.dropped = 0
        #: Of all that is kept, in bytes, by and large.
        self.size = 0

    def space(self, session: int, request: wire.Request) -> Space | None:
        """Find the address space of a fetch, if there is any evidence of it.

        :param session: number of the session.
        """
        known = self._sessions.get(session)
        if known is None:
            return None
        return known.spaces.get(_root(request, known.wide))

    def add(self, session: int, request: wire.Request,
            fragments: collections.abc.Iterable[base.Fragment], now: float
            ) -> tuple[Page, list[int]]:
        """Keep what was found on a page.

        :param session: number of the session.
        :param request: with the page.
        :param fragments: of the page and of its junctions, at least one.
        :param now: on the monotonic clock, in seconds.
        :returns: the page as it is kept, and the rules of its fragments
            that may hold by now, in which something is new.
        """
        known = self._sessions.setdefault(session, _Session())
        known.wide = known.wide or request.gva >= 1 << 32
        space = self._space(known, session, _root(request, known.wide))
        gva = request.gva & -wire.PAGE_SIZE
        grouped: dict[int, set[int]] = {}
        for rule, string in fragments:
            if (rule in grouped or rule in space.rules
                    or len(space.rules) + len(grouped) < self._limits.rules):
                grouped.setdefault(rule, set()).add(string)
            else:
                self.dropped += 1
        page = Page(space, gva, request.gpa, request.tag,
                    bytes(request.window), now, {
                        rule: frozenset(strings)
                        for rule, strings in grouped.items()})
        if not grouped:
            return page, []
        before = space.pages.get(gva)
        if (before is not None and before.tag == page.tag
                and before.fragments == page.fragments):
            self._renew(before, page)
            page = before
        else:
            self._keep(known, page)
            space.fresh = True
            for rule in page.fragments:
                known.states[rule] = known.states.get(rule, 0) + 1
        self._bound(space)
        return page, [
            rule for rule in page.fragments
            if space.tried.get(rule) != known.states[rule]
            and self._engine.complete(rule, frozenset(known.strings[rule]))]

    def pages(self, space: Space, rule: int, own: bool = False
              ) -> list[Page]:
        """List the pages that have fragments of a rule.

        :param space: whose session is meant.
        :param own: only of this address space.
        """
        if own:
            return [page for page in space.pages.values()
                    if rule in page.fragments]
        known = self._sessions.get(space.session)
        return [] if known is None else list(known.pages.get(rule, ()))

    def complete(self, page: Page, rules: collections.abc.Iterable[int]
                 ) -> bool:
        """Tell whether a rule may hold by what is of one address space.

        :param page: the one that was fetched last.
        """
        return any(self._engine.complete(rule, self.strings(
            self.pages(page.space, rule, own=True), rule)) for rule in rules)

    @staticmethod
    def strings(pages: collections.abc.Iterable[Page], rule: int
                ) -> _Strings:
        """:returns: the strings of a rule that are on some pages."""
        return frozenset().union(
            *(page.fragments.get(rule, ()) for page in pages))

    def tried(self, space: Space, rules: collections.abc.Iterable[int]
              ) -> None:
        """Note that rules are looked for, with the evidence there is."""
        known = self._sessions.get(space.session)
        for rule in rules if known else ():
            space.tried[rule] = known.states.get(rule, 0) if known else 0

    def tell(self, space: Space, rule: int) -> None:
        """Note that it was told that a rule holds."""
        known = self._sessions.get(space.session)
        if known is not None:
            space.told[rule] = known.states.get(rule, 0)

    def told(self, space: Space) -> set[int]:
        """:returns: rules of which nothing new was seen since then."""
        known = self._sessions.get(space.session)
        states = known.states if known is not None else {}
        return {rule for rule, state in space.told.items()
                if state == states.get(rule, 0)}

    def drop(self, page: Page) -> None:
        """Forget a page that is not what it was any more."""
        known = self._sessions.get(page.space.session)
        if known is not None and page.space.pages.get(page.gva) is page:
            self._remove(known, page)

    def forget(self, session: int) -> None:
        """Forget a session."""
        known = self._sessions.get(session)
        if known is not None:
            for space in list(known.spaces.values()):
                self._remove_space(known, space)
            del self._sessions[session]

    def _space(self, known: _Session, session: int, root: int | None
               ) -> Space:
        space = known.spaces.get(root)
        if space is None:
            space = known.spaces[root] = Space(session, root)
            self._spaces[session, root] = space
        self._spaces.move_to_end((session, root))
        return space

    @staticmethod
    def _renew(page: Page, again: Page) -> None:
        """Take over what may differ of the same page, seen again."""
        page.gpa = again.gpa
        page.window = again.window
        page.seen = again.seen
        page.space.pages.move_to_end(page.gva)

    def _keep(self, known: _Session, page: Page) -> None:
        space = page.space
        before = space.pages.get(page.gva)
        if before is not None:
            self._remove(known, before)
        space.pages[page.gva] = page
        self.size += page.size
        for rule, strings in page.fragments.items():
            space.rules[rule] = space.rules.get(rule, 0) + 1
            known.pages.setdefault(rule, {})[page] = None
            # Counted here: to look through all pages for each rule of each
            # fetch would take longer than a scan may.
            counts = known.strings.setdefault(rule, collections.Counter())
            for string in strings:
                counts[string] += 1
        if len(space.pages) > self._limits.pages:
            self._remove(known, next(iter(space.pages.values())))
            self.dropped += 1

    def _remove(self, known: _Session, page: Page) -> None:
        space = page.space
        del space.pages[page.gva]
        self.size -= page.size
        for rule, strings in page.fragments.items():
            space.rules[rule] -= 1
            if not space.rules[rule]:
                del space.rules[rule]
                space.tried.pop(rule, None)
                space.told.pop(rule, None)
            pages = known.pages[rule]
            del pages[page]
            if not pages:
                del known.pages[rule], known.strings[rule]
                continue
            counts = known.strings[rule]
            for string in strings:
                counts[string] -= 1
                if not counts[string]:
                    del counts[string]

    def _bound(self, recent: Space) -> None:
        """Forget the address spaces longest not seen, but never the last."""
        while (len(self._spaces) > self._limits.spaces
               or self.size > self._limits.size):
            space = next(iter(self._spaces.values()))
            if space is recent:
                return
            self._remove_space(self._sessions[space.session], space)
            self.dropped += 1

    def _remove_space(self, known: _Session, space: Space) -> None:
        for page in list(space.pages.values()):
            self._remove(known, page)
        del known.spaces[space.root]
        del self._spaces[space.session, space.root]


def _root(request: wire.Request, wide: bool) -> int | None:
    """:returns: what an address space is known by, None for the kernel.

    :param wide: the guest is known to run in 64-bit mode.
    """
    if request.gva >> 63:
        return None
    if wide or request.gva >= 1 << 32:
        # The low bits may be a process-context identifier, which changes.
        return request.cr3 & _ROOT
    if request.cpl == 0 and request.gva >> 31:
        return None  # Of a 32-bit kernel.
    return request.cr3 & _ROOT_32
