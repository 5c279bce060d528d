# SPDX-License-Identifier: Apache-2.0
"""From files of unknown origin to a rule set that may come into force.

Every rule goes through the same gate: parsed, made fit for pages, compiled,
run over harmless pages. What does not pass is left out with the reason; what
passes is loaded once by the scan engine itself, under the limits that it has
in the worker. Nothing but reading is done in this process: see
:mod:`virtav_nova.rules.crew`.
"""

import collections
import collections.abc
import dataclasses
import importlib.metadata
import json
import os
import re
import typing

from oslo_config import cfg

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import crew
from virtav_nova.rules import directory
from virtav_nova.rules import dissect
from virtav_nova.rules import meta
from virtav_nova.rules import sample
from virtav_nova.rules import store

#: Told how far it is: what is being done, units done, units in all.
Progress: typing.TypeAlias = collections.abc.Callable[[str, int, int], None]

# Not those of a set's own files.
_NAME = re.compile(
    r'(?!manifest\.json$|rules\.jsonl\.zst$)[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}')
_UNFIT = re.compile(r'[^A-Za-z0-9._+-]')
_PART_MAX = 80
_REASON_MAX = 300
#: What the compiler of libyara writes.
_COMPILED = b'YARA'


@dataclasses.dataclass
class Source:
    """Rules that came together and are replaced together.

    :ivar name: within the rule set.
    :ivar path: where they came from.
    :ivar refused: name and reason of files that could not be read.
    """

    name: str
    path: str
    files: list[directory.RuleFile]
    refused: list[tuple[str, str]]


@dataclasses.dataclass
class Outcome:
    """What an import came to.

    :ivar entries: all rules of the set.
    :ivar fresh: those of them that were tried by this import.
    :ivar files: what the engine is given.
    :ivar manifest: see :meth:`virtav_nova.rules.store.Store.add`.
    :ivar notes: what an operator should know, such as a missing sandbox.
    """

    entries: list[store.Entry]
    fresh: list[store.Entry]
    files: list[directory.RuleFile]
    manifest: dict[str, typing.Any]
    notes: list[str]


def gather(paths: collections.abc.Sequence[str], name: str | None = None
           ) -> list[Source]:
    """Read the files of one or more sources.

    :param paths: directories and files.
    :param name: of the source; None to have one for each path, named by it.
    :raises RuleError: when a path cannot be read, or there is nothing.
    """
    sources: dict[str, Source] = {}
    for path in paths:
        here = os.path.abspath(path)
        called = name or _default_name(here)
        if not _NAME.fullmatch(called):
            raise exception.RuleError(
                _('%s is no name for a source of rules')
                % text.printable(called, 100),
                _('give --name with letters, digits, dots and dashes'))
        if called in sources and name is None:
            raise exception.RuleError(
                _('%(one)s and %(other)s would both be called %(name)s') % {
                    'one': sources[called].path, 'other': here,
                    'name': called},
                _('import them one by one, each with --name'))
        source = sources.setdefault(called, Source(called, here, [], []))
        if os.path.isdir(here):
            def refused(file: str, error: exception.RuleError,
                        source: Source = source) -> None:
                source.refused.append((file, str(error)))

            source.files += directory.gather(here, refused)
        else:
            source.files.append(directory.read_file(here))
    if not any(source.files or source.refused
               for source in sources.values()):
        raise exception.RuleError(
            _('no *.yar or *.yara file in %s') % ', '.join(paths),
            _('name a directory that has rules, or the files themselves'))
    return list(sources.values())


def _default_name(path: str) -> str:
    name = os.path.basename(path)
    for suffix in directory.SUFFIXES:
        name = name.removesuffix(suffix)
    return _UNFIT.sub('_', name).lstrip('.+-')[:64]


class Importer:
    """Brings rules through the gate.

    :param options: the group ``virtav_rules``.
    :param worker: the group ``virtav_worker``.
    :param kind: engine of the worker.
    :param progress: told how far it is.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 worker: cfg.ConfigOpts.GroupAttr, kind: type[base.Engine],
                 progress: Progress) -> None:
        self._options = options
        self._worker = worker
        self._kind = kind
        self._progress = progress
        self._limits = crew.Limits(
            options.memory_mib << 20, options.rule_seconds)
        self._notes: set[str] = set()

    def run(self, sources: collections.abc.Sequence[Source],
            others: collections.abc.Sequence[store.Entry] = (),
            origins: dict[str, typing.Any] | None = None) -> Outcome:
        """Try sources, and make a set of them and what is there already.

        :param sources: tried from the beginning.
        :param others: rules of other sources, tried before.
        :param origins: the manifest's ``sources`` of those.
        :raises RuleError: when no rule is left, in all or of one of the
            sources, there are too many, or the engine does not take them.
        """
        entries = self._dissect(sources)
        self._bound(sum(bool(entry.text) for entry in (*entries, *others)))
        pages = self.pages()
        entries = self._try(entries, pages)
        whole = _assembled([*others, *entries])
        names = {source.name for source in sources}
        fresh = [entry for entry in whole if entry.source in names]
        files = _files(whole)
        if not files:
            raise exception.RuleError(
                _('no rule is left: %s') % _summary(fresh),
                _('see virtav-rules lint for the reasons'))
        _check_sources(sources, fresh)
        proof = self.prove(files)
        manifest = {
            'created': store.now(),
            'release': importlib.metadata.version('virtav-nova'),
            'counts': counts(whole),
            'sources': {
                **(origins or {}),
                **{source.name: {
                    'path': text.printable(source.path, 1024),
                    'imported': store.now(),
                    'files': len(source.files),
                    'counts': counts(entry for entry in fresh
                                     if entry.source == source.name)}
                   for source in sources}},
            'engine': {'name': self._kind.name,
                       'version': self._kind.version, **proof},
            'tried': {'pages': len(pages),
                      'slow_us': self._options.slow_us,
                      'noisy_pages': self._options.noisy_pages}}
        return Outcome(whole, fresh, files, manifest, sorted(self._notes))

    def lint(self, sources: collections.abc.Sequence[Source]
             ) -> list[store.Entry]:
        """Try sources, and say what is to be said of each rule.

        :returns: all rules, in order.
        """
        entries = self._dissect(sources, {'lint': True})
        return _assembled(self._try(entries, self.pages()))

    def pages(self) -> list[bytes]:
        """:returns: the pages that rules are tried on."""
        found = dict.fromkeys(sample.pages())
        found.update(dict.fromkeys(sample.of_paths(
            self._options.sample, self._options.sample_pages)))
        return list(found)

    def prove(self, files: collections.abc.Sequence[directory.RuleFile],
              pages: collections.abc.Iterable[str] = ()
              ) -> dict[str, typing.Any]:
        """Have the engine load a rule set, and perhaps scan.

        :param files: of the set.
        :param pages: in hexadecimal.
        :returns: ``describe``, ``seconds``, ``mib``; with ``pages`` also
            ``found``: namespace and rule of the matches of each, or the
            reason why there is no answer.
        :raises RuleError: when it cannot load them.
        """
        team = crew.Crew(
            'prove', crew.Limits(
                self._worker.rules_memory_mib << 20,
                int(self._worker.load_timeout)),
            {'engine': f'{self._kind.__module__}:{self._kind.__qualname__}',
             'scan_timeout_ms': self._worker.scan_timeout_ms,
             'clamd_socket': self._worker.clamd_socket},
            json.dumps([[file.name, file.content.decode()]
                        for file in files]).encode(),
            workers=1, batch=1 << 30)
        units: list[crew.Unit] = [
            {'id': 0}, *({'id': number, 'page': page}
                         for number, page in enumerate(pages, 1))]
        proof: dict[str, typing.Any] = {}
        found: list[typing.Any] = [_('no answer')] * (len(units) - 1)
        stage = _('load the set into the engine')
        self._progress(stage, 0, len(units))
        for done, (number, results) in enumerate(team.run(units), 1):
            self._progress(stage, done, len(units))
            [result] = results or [{'died': _('no answer')}]
            reason = result.get('died') or result.get('error')
            if number:
                found[number - 1] = str(reason) if reason else {
                    (str(namespace), str(rule))
                    for namespace, rule in result['matches']}
            elif reason:
                raise exception.RuleError(
                    _('engine %(engine)s does not take the rules: '
                      '%(reason)s') % {
                        'engine': self._kind.name,
                        'reason': text.printable(str(reason), _REASON_MAX)},
                    _('import fewer rules at a time to find which it is, or '
                      'raise the limits of [virtav_worker]'))
            else:
                proof = {key: result[key]
                         for key in ('describe', 'seconds', 'mib')}
        self._notes |= team.notes
        return {**proof, 'found': found} if len(units) > 1 else proof

    def carry(self, entries: collections.abc.Sequence[store.Entry]
              ) -> list[dict[str, str]]:
        """Make a page for each rule.

        :returns: for each, ``page`` in hexadecimal or ``reason``.
        """
        team = crew.Crew('carry', self._limits)
        pages: list[dict[str, str]] = [{'reason': ''}] * len(entries)
        stage = _('make pages')
        units = ({'id': number, 'text': entry.text}
                 for number, entry in enumerate(entries))
        for done, (number, results) in enumerate(team.run(units), 1):
            self._progress(stage, done, len(entries))
            [result] = results or [{'died': _('no answer')}]
            pages[number] = (
                {'page': str(result['page'])} if 'page' in result else
                {'reason': str(result.get('died') or result.get('reason'))})
        self._notes |= team.notes
        return pages

    def _bound(self, number: int, slack: int = 1) -> None:
        if number > self._options.max_rules * slack:
            raise exception.RuleError(
                _('%(number)d rules, and at most %(most)d are allowed') % {
                    'number': number, 'most': self._options.max_rules},
                _('import fewer, or raise [virtav_rules] max_rules'))

    def _dissect(self, sources: collections.abc.Sequence[Source],
                 settings: crew.Unit | None = None) -> list[store.Entry]:
        """Give all rules in order; those to be tried have their text."""
        places: list[tuple[str, str]] = []
        units: list[crew.Unit] = []
        found: dict[int, list[store.Entry]] = {}
        for source in sources:
            for name, reason in source.refused:
                found[len(places)] = [_refused(source.name, name, reason)]
                places.append((source.name, name))
            for file in source.files:
                place = source.name, file.name
                reason = _unreadable(file.content)
                if reason:
                    found[len(places)] = [_refused(*place, reason)]
                else:
                    units.append({
                        'id': len(places), 'file': _shown(file.name),
                        'text': file.content.decode(
                            'utf-8', 'surrogateescape')})
                places.append(place)
        # Not all that looks like a rule is one, and some are not fit.
        self._bound(sum(len(dissect.pieces(unit['text']))
                        for unit in units), 2)
        again: list[crew.Unit] = []
        by_id = {unit['id']: unit for unit in units}
        stage = _('parse and rewrite')
        team = crew.Crew('dissect', self._limits, settings)
        self._progress(stage, 0, len(units))
        for done, (number, results) in enumerate(team.run(units), 1):
            self._progress(stage, done, len(units))
            died = [each['died'] for each in results if 'died' in each]
            parts = dissect.pieces(by_id[number]['text']) if died else []
            if len(parts) > 1:
                again += ({**by_id[number], 'piece': part} for part in parts)
                found[number] = []
            elif died:
                found[number] = [_refused(*places[number], died[0])]
            else:
                whence, name = places[number]
                found[number] = [_entry(whence, name, each)
                                 for each in results]
        self._notes |= team.notes
        if again:
            self._pieces(again, places, found, settings)
        entries = [entry for number in range(len(places))
                   for entry in sorted(found.get(number, ()),
                                       key=lambda each: each.line)]
        return _settled(entries)

    def _pieces(self, units: list[crew.Unit],
                places: list[tuple[str, str]],
                found: dict[int, list[store.Entry]],
                settings: crew.Unit | None) -> None:
        """Take files to pieces that could not be parsed as a whole.

        Rules that refer to others of their file are lost with it.
        """
        pieces: list[dissect.Piece] = [unit['piece'] for unit in units]
        files = [unit['id'] for unit in units]
        team = crew.Crew('dissect', self._limits, settings)
        parts = ({'id': number, 'file': unit['file'],
                  'text': unit['text'][piece.start:piece.end]}
                 for number, (unit, piece) in enumerate(
                     zip(units, pieces, strict=True)))
        stage = _('parse one by one')
        for done, (number, results) in enumerate(team.run(parts), 1):
            self._progress(stage, done, len(units))
            piece = pieces[number]
            source, file = places[files[number]]
            for each in results:
                if 'died' in each:
                    each = {'name': piece.name, 'line': 1,
                            'refused': each['died']}
                entry = _entry(source, file, each)
                found[files[number]].append(dataclasses.replace(
                    entry, line=entry.line + piece.line - 1))

    def _try(self, entries: list[store.Entry], pages: list[bytes]
             ) -> list[store.Entry]:
        """Give the rules; those that are not fit have no place in it."""
        # Equal rules are tried once.
        by_key: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            if entry.text:
                by_key.setdefault(entry.key, []).append(number)
        team = crew.Crew(
            'try', self._limits,
            {'seconds': self._options.rule_seconds,
             'slow_us': self._options.slow_us,
             'slowest_page_us': self._options.slowest_page_us},
            b''.join(pages))
        units = ({'id': numbers[0], 'several': True,
                  'text': entries[numbers[0]].text}
                 for numbers in by_key.values())
        tried = list(entries)
        stage = _('compile and try on harmless pages')
        self._progress(stage, 0, len(by_key))
        for done, (number, results) in enumerate(team.run(units), 1):
            self._progress(stage, done, len(by_key))
            [result] = results or [{'died': _('no answer')}]
            for twin in by_key[entries[number].key]:
                tried[twin] = self._judged(entries[twin], result, len(pages))
        self._notes |= team.notes
        return tried

    def _judged(self, entry: store.Entry, result: crew.Result,
                pages: int) -> store.Entry:
        reason = result.get('died') or result.get('error')
        if reason:
            return dataclasses.replace(
                entry, state='refused',
                reason=text.printable(str(reason), _REASON_MAX))
        us, worst = float(result['us']), float(result['worst_us'])
        hits = int(result['hits'])
        reason = ''
        if hits > self._options.noisy_pages:
            reason = _('noisy: matches %(hits)d of %(pages)d harmless '
                       'pages') % {'hits': hits, 'pages': pages}
        elif us > self._options.slow_us:
            reason = _('slow: adds %d µs to the scan of a page') % us
        elif worst > self._options.slowest_page_us:
            reason = _('slow: takes %d µs for one page') % worst
        return dataclasses.replace(
            entry, us=us, hits=hits, reason=reason,
            state='quarantined' if reason else entry.state)


def counts(entries: collections.abc.Iterable[store.Entry]
           ) -> dict[str, int]:
    """:returns: number of rules in each state."""
    number = collections.Counter(entry.state for entry in entries)
    return {state: number[state] for state in store.STATES}


def _unreadable(content: bytes) -> str:
    """:returns: why a file is none of rules, or nothing."""
    if not content.strip():
        return _('empty')
    if content.startswith(_COMPILED) and b'\0' in content[:64]:
        return _('compiled rules are refused: nobody can tell what is in '
                 'them, and to load them is not safe')
    return ''


def _refused(source: str, file: str, reason: str) -> store.Entry:
    return store.Entry(source, _shown(file), 0, '', 'refused',
                       text.printable(reason, _REASON_MAX))


def _shown(name: str) -> str:
    return text.printable(os.fsencode(name), 1024)


def _entry(source: str, file: str, result: crew.Result) -> store.Entry:
    """Take over what a process apart has said of a rule."""
    form = str(result.get('text', ''))
    original = str(result.get('original', ''))
    dropped = tuple(text.printable(str(each), _REASON_MAX)
                    for each in result.get('dropped', ()))
    # Nothing else can be written, nor compiled.
    if re.search('[\ud800-\udfff]', form):
        form, result = '', {**result, 'refused': _('not UTF-8')}
    if result.get('private'):
        state = 'private'
    elif not form:
        state = 'refused'
    else:
        state = 'page-form' if dropped else 'as-written'
    refused = result.get('refused', '')
    return store.Entry(
        source=source, file=_shown(file), line=int(result.get('line', 0)),
        rule=text.printable(str(result.get('name', '')), 128), state=state,
        reason=text.printable(str(refused), _REASON_MAX),
        text=form, original='' if original == form else original,
        dropped=dropped,
        warnings=tuple(text.printable(str(each), _REASON_MAX)
                       for each in result.get('warnings', ())),
        about=dict(meta.describe(dict(result.get('metas', {})),
                                 [str(tag) for tag in
                                  result.get('tags', ())])),
        key=str(result.get('key', '')))


def _settled(entries: list[store.Entry]) -> list[store.Entry]:
    """See that a name stands for one rule only."""
    seen: set[str] = set()
    settled = []
    for entry in entries:
        if entry.rule and entry.text and entry.path in seen:
            entry = dataclasses.replace(
                entry, state='refused', text='',
                reason=_('a second rule %s') % entry.rule)
        if entry.text:
            seen.add(entry.path)
        settled.append(entry)
    return settled


def _assembled(entries: collections.abc.Iterable[store.Entry]
               ) -> list[store.Entry]:
    """Decide which of equal rules counts, and give each its place."""
    first: dict[str, store.Entry] = {}
    names: dict[tuple[str, str], str] = {}
    used: set[str] = set()
    whole = []
    for entry in entries:
        fit = entry.in_force or entry.state == 'duplicate'
        if fit and entry.key in first:
            entry = dataclasses.replace(
                entry, state='duplicate', namespace='',
                reason=_('the same as %s') % first[entry.key].path)
        elif fit:
            place = entry.source, entry.file
            if place not in names:
                names[place] = _namespace(*place, used)
                used.add(names[place])
            entry = dataclasses.replace(
                entry, state='page-form' if entry.dropped else 'as-written',
                reason='', namespace=names[place])
            first[entry.key] = entry
        whole.append(entry)
    return whole


def _namespace(source: str, file: str, used: set[str]) -> str:
    """:returns: a name for a file in the set, whatever it was called."""
    parts = [_UNFIT.sub('_', part)[-_PART_MAX:].lstrip('.') or '_'
             for part in file.split('/') if part not in ('', '.', '..')]
    # A directory must not be called as a file is.
    parts[:-1] = [re.sub(r'\.(yara?)$', r'_\1', part) for part in parts[:-1]]
    stem = re.sub(r'\.yara?$', '', '/'.join([source, *parts[-8:]]))
    name, number = f'{stem}.yar', 1
    while name in used:
        number += 1
        name = f'{stem}-{number}.yar'
    return name


def _files(entries: collections.abc.Iterable[store.Entry]
           ) -> list[directory.RuleFile]:
    parts: dict[str, list[str]] = {}
    for entry in entries:
        if entry.in_force:
            parts.setdefault(entry.namespace, []).append(entry.text)
    return sorted(
        directory.RuleFile(
            name, ('\n\n'.join(texts) + '\n').encode())
        for name, texts in parts.items())


def _check_sources(sources: collections.abc.Iterable[Source],
                   entries: collections.abc.Sequence[store.Entry]) -> None:
    """See that no source is lost by a file that is empty or half written.

    :param entries: what became of the rules of the sources.
    :raises RuleError: when there is no rule of one any more.
    """
    for source in sources:
        found = [entry for entry in entries if entry.source == source.name]
        if not any(entry.in_force or entry.state == 'duplicate'
                   for entry in found):
            raise exception.RuleError(
                _('no rule of source %(name)s is left: %(found)s') % {
                    'name': source.name, 'found': _summary(found) or _(
                        'it has no *.yar or *.yara file')},
                _('see virtav-rules lint for the reasons; to have no rules '
                  'of this source, virtav-rules remove %s') % source.name)


def _summary(entries: collections.abc.Iterable[store.Entry]) -> str:
    found = counts(entries)
    return ', '.join(f'{number} {state}'
                     for state, number in found.items() if number)
