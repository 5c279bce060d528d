# SPDX-License-Identifier: Apache-2.0
"""How many rules are found whose strings lie on different pages.

For each rule of some folder that needs more than one string, pages are made
that match it only together. A process of a guest without processor has them,
between pages of ordinary programs, and fetches them in any order::

    python -m tests.unit.worker.split DIRECTORY
"""

import collections
import json
import pathlib
import random
import sys
import time

import yara

from tests.unit.worker import fragments
from tests.unit.worker import guest
from virtav_nova.engines import base
from virtav_nova.engines import twostage
from virtav_nova.rules import carrier
from virtav_nova.rules import directory
from virtav_nova.rules import page_form
from virtav_nova.rules import sample
from virtav_nova.rules import syntax
from virtav_nova.worker import accumulate
from virtav_nova.worker import deep

PAGE = guest.PAGE
TEXT = 0x400000
#: Pages of the process beside those of the rule.
OTHERS = 40


def forms(paths):
    """The page forms of all rules that have one.

    :param paths: of files
    :returns: rule files of one rule each, and its source and rule
    """
    seen = set()
    for path in sorted(paths):
        try:
            source = syntax.parse(
                path.read_bytes().decode('utf-8', 'ignore'), path.name)
        except Exception:
            continue
        for number, rule in enumerate(source.rules):
            try:
                text = page_form.rewrite(source, rule).text
                # The same rule under two names would be two to be found.
                if not text or text in seen:
                    continue
                yara.compile(source=text)
                form = syntax.parse(text, path.name)
                [single] = form.rules
            except Exception:
                continue
            seen.add(text)
            yield (directory.RuleFile('%s:%d' % (path.name, number),
                                      text.encode()), form, single)


def measure(paths, seed=0, engine=None):
    """Count the rules that are found.

    :param paths: of files of rules
    :param engine: makes one of rule files; the default engine if None
    :returns: counts, and for each rule that is not found the reason
    """
    begin = time.monotonic()
    cases = []
    files = []
    untold = collections.Counter()
    for number, (file, form, rule) in enumerate(forms(paths)):
        file = file._replace(name='%05d/%s' % (number, file.name))
        files.append(file)
        split = carrier.split(form, rule)
        if split.pages:
            cases.append((file.name, rule.name, [
                bytes(each.page) for each in split.pages]))
        else:
            untold[split.why] += 1
    made = (engine or twostage.TwostageEngine.compile)(
        files, base.EngineOptions(scan_timeout_ms=5000,
                                  sample=sample.pages()))
    ordinary = random.Random(seed).sample(sample.pages(), OTHERS)
    missed = {}
    parked = 0
    slowest = 0.0
    for number, (namespace, name, pages) in enumerate(cases):
        process = _Process(made, pages, ordinary, seed + number)
        start = time.monotonic()
        found = process.run((namespace, name))
        slowest = max(slowest, time.monotonic() - start)
        if not found:
            missed[namespace + ' ' + name] = process.why()
        parked += process.parked
    return {
        'rules': len(files), 'split': len(cases),
        'found': len(cases) - len(missed), 'before_it_ran': parked,
        'share': 1 - len(missed) / max(len(cases), 1),
        'not_split': dict(untold.most_common()), 'missed': missed,
        'slowest_s': round(slowest, 3),
        'seconds': round(time.monotonic() - begin, 1)}


class _Process:
    """A process with the pages of a rule."""

    def __init__(self, engine, pages, ordinary, seed):
        self.parked = False
        self._engine = engine
        self._pages = pages
        generator = random.Random(seed)
        self._memory = guest.Memory(seed)
        self._space = guest.Space(self._memory)
        # In order, but with others between some of them.
        addresses = []
        gva = TEXT
        left = list(ordinary)
        for page in pages:
            for _ in range(generator.choice((0, 0, 1, 3))):
                if left:
                    self._map(gva, left.pop())
                    gva += PAGE
            gva += PAGE * generator.choice((0, 0, 2))
            self._map(gva, page)
            addresses.append(gva)
            gva += PAGE
        for page in left:
            self._map(gva, page)
            gva += PAGE
        generator.shuffle(addresses)
        self._addresses = addresses
        self._contents = {}

    def _map(self, gva, content):
        self._space.map(gva, content)

    def run(self, wanted):
        """Fetch the pages; returns whether the rule was found."""
        self._accumulator = accumulate.Accumulator(
            self._engine, accumulate.Limits())
        searches = deep.Searches(
            self._engine, self._accumulator, 1, True, deep.Settings(wait=10),
            deep.Counts(), 64)
        now = time.monotonic()
        found = []
        for gva in self._addresses:
            content = self._content(gva)
            before = self._content(gva - PAGE)
            after = self._content(gva + PAGE)
            request = fragments.request(
                gva, content, gpa=self._gpa(gva), cr3=self._space.cr3,
                before=(before or b'')[-512:], after=(after or b'')[:512])
            units = [content]
            if before:
                units.append(request.junction_before)
            if after:
                units.append(request.junction_after)
            examined = [self._engine.examine(unit) for unit in units]
            strings = {each for one in examined for each in one.fragments}
            matched = any(one.matches for one in examined)
            searches.consider(request, strings, matched, now)
            found += self._work(searches, now)
        now += 1
        found += self._work(searches, now)
        names = {}
        for answer in found:
            for each in answer.found:
                name = each.match.namespace, each.match.rule
                names[name] = names.get(name) or answer.parked
        self.parked = bool(names.get(wanted))
        self._wanted = wanted
        return wanted in names

    def _work(self, searches, now):
        answers = []
        while searches.due(now) == 0:
            gpa = searches.step(now)
            if gpa is not None:
                searches.feed(gpa, self._memory.read(gpa))
            answers += searches.answers()
        return answers

    def _gpa(self, gva):
        entry = self._space.entry(gva)
        page = self._memory.pages[entry & -PAGE]
        at = entry % PAGE
        return int.from_bytes(page[at:at + 8], 'little') & -PAGE

    def _content(self, gva):
        gpa = self._gpa(gva)
        return bytes(self._memory.pages[gpa]) if gpa else None

    def why(self):
        """Why it was not found, as far as that can be told."""
        number = self._engine._numbers[self._wanted]
        strings = set()
        for page in self._pages:
            strings.update(each.string for each in self._engine.examine(
                page).fragments if each.rule == number)
        if not strings:
            return 'no fragment of it is told by the engine'
        if not self._engine.complete(number, frozenset(strings)):
            return 'its fragments do not complete it: %s' % sorted(strings)
        if not self._engine.confirm(number, b''.join(self._pages)):
            return 'the engine does not confirm it'
        return 'other pages between: distances, counts or what must not be'


def main():
    """Measure the folders that are named on the command line."""
    paths = [path for name in sys.argv[1:]
             for pattern in ('*.yar', '*.yara')
             for path in pathlib.Path(name).rglob(pattern)]
    json.dump(measure(paths), sys.stdout, indent=1)


if __name__ == '__main__':
    main()
