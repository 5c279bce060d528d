# SPDX-License-Identifier: Apache-2.0
"""The console script ``virtav-rules``."""

import argparse
import collections
import collections.abc
import contextlib
import difflib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import typing

from oslo_config import cfg
from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table
from rich import text as rich_text

from virtav_nova import conf as virtav_conf
from virtav_nova import exception
from virtav_nova import text
from virtav_nova.i18n import _
from virtav_nova.rules import clamav
from virtav_nova.rules import directory
from virtav_nova.rules import importer
from virtav_nova.rules import store
from virtav_nova.worker import privileges
from virtav_nova.worker import ruleset
from virtav_nova.worker import status

_PROG = 'virtav-rules'

#: What the states mean, for the table.
_MEANING = {
    'as-written': _('in force as written'),
    'page-form': _('in force after terms were dropped'),
    'quarantined': _('left out: noisy or slow'),
    'duplicate': _('left out: another rule looks for the same'),
    'private': _('taken into the rules that refer to it'),
    'refused': _('left out: cannot be compiled, or never holds on a page'),
}
#: Most frequent reasons that the table of an import has.
_REASONS = 12
_SHOWN_MAX = 20
_REASON_SHOWN = 160
_LOOK = 0.2  # seconds between two looks whether a reload is over


def main(argv: list[str] | None = None) -> int:
    """Import, look at and switch rules.

    :param argv: arguments; those of the command line when None.
    :returns: exit status: 0 when all is well, 1 when ``lint`` or ``test``
        found a rule that is not, 2 when something has to be mended first.
    """
    conf = cfg.ConfigOpts()
    conf.register_cli_opts([cfg.SubCommandOpt(
        'command', title=_('commands'), handler=_commands)])
    virtav_conf.register_opts(conf)
    try:
        conf(argv, project='virtav', prog=_PROG,
             version=importlib.metadata.version('virtav-nova'))
        code = _Command(conf).run()
        sys.stdout.flush()
        return code
    except exception.ConfigurationError as error:
        return _failed(2, str(error), error.way_out)
    except cfg.Error as error:
        return _failed(2, str(error), _('mend the configuration file'))
    except KeyboardInterrupt:
        return _failed(130, _('stopped'), _(
            'run it again: the rules in force are those from before'))
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        _mute()
        return 1
    except OSError as error:
        _mute()
        return _failed(2, ': '.join(filter(None, (
            error.filename and str(error.filename),
            error.strerror or str(error)))), _(
                'make room on the disk, in memory and among the processes, '
                'and run it again'))


def _mute() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _failed(code: int, message: str, way_out: str) -> int:
    print(f'{_PROG}: error: {_clean(message)}\n  way out: {way_out}',
          file=sys.stderr)
    return code


def _commands(parsers: typing.Any) -> None:
    """Define the command line.

    :param parsers: of argparse.
    """
    def add(name: str, explained: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parsers.add_parser(
            name, help=explained, description=explained)
        parser.add_argument('--json', action='store_true',
                            help=_('print JSON in place of a table'))
        return parser

    def tried(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            'paths', nargs='+', metavar='PATH',
            help=_('file of rules, or directory of *.yar and *.yara files'))
        parser.add_argument(
            '--name', dest='source', metavar='NAME',
            help=_('name of the source; default: that of PATH'))
        parser.add_argument(
            '--sample', action='append', default=[], metavar='PATH',
            help=_('try the rules on the code in these of your programs, '
                   'too'))

    def loads(parser: argparse.ArgumentParser) -> None:
        parser.add_argument('--reload', action='store_true',
                            help=_('have the worker load the rules now'))

    parser = add('import', _(
        'Try rules and bring them into force. The rules of each source '
        'replace those that were imported under its name before.'))
    tried(parser)
    loads(parser)
    parser.add_argument('--only', action='store_true',
                        help=_('have no rules but these in the set'))
    parser.add_argument(
        '--replace', action='store_true',
        help=_('replace the source of that name though it was imported '
               'from another place'))
    parser.add_argument('--dry-run', action='store_true',
                        help=_('try the rules, store nothing'))
    parser.add_argument(
        '--no-activate', action='store_true',
        help=_('store the set, and bring it into force by rollback SET'))

    tried(add('lint', _('Try rules and say what is wrong with each.')))

    parser = add('list', _('List the rule sets, or the rules of one.'))
    parser.add_argument('set', nargs='?', metavar='SET',
                        help=_('first digits of a digest, "current" or '
                               '"previous"'))
    parser.add_argument('--rules', action='store_true',
                        help=_('list the rules of SET'))
    parser.add_argument('--state', choices=store.STATES,
                        help=_('list those in this state only'))

    parser = add('show', _('Show a rule or a rule set.'))
    parser.add_argument('wanted', metavar='RULE|SET')
    parser.add_argument('--set', default='current', metavar='SET',
                        help=_('the set that RULE is in'))

    parser = add('diff', _('Compare two rule sets.'))
    parser.add_argument('old', nargs='?', default='previous', metavar='A')
    parser.add_argument('new', nargs='?', default='current', metavar='B')
    parser.add_argument('--text', action='store_true',
                        help=_('show how the text of rules differs'))

    parser = add('rollback', _(
        'Bring another rule set into force: that before, or SET.'))
    parser.add_argument('set', nargs='?', default='previous', metavar='SET')
    loads(parser)

    parser = add('remove', _('Make a set without some sources, and bring '
                             'it into force.'))
    parser.add_argument('sources', nargs='+', metavar='NAME')
    loads(parser)

    parser = add('test', _(
        'Make a page for each rule, and see whether the engine of the '
        'worker finds the rule in it.'))
    parser.add_argument('rules', nargs='*', metavar='RULE')
    parser.add_argument('--all', action='store_true',
                        help=_('test all rules of the set'))
    parser.add_argument('--set', default='current', metavar='SET')

    parser = add('from-clamav', _(
        'Make rules of body signatures of ClamAV; import them afterwards.'))
    parser.add_argument('paths', nargs='+', metavar='FILE',
                        help=_('*.ndb, *.ndu, *.ldb or *.ldu'))
    parser.add_argument('-o', '--output', required=True, metavar='OUT.yar')
    parser.add_argument(
        '--all-targets', action='store_true',
        help=_('take signatures for files that are not executed, too'))


class _Command:
    """One command, with what it needs.

    :param conf: parsed.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._args = conf.command
        self._options = conf.virtav_rules
        self._worker = conf.virtav_worker
        more = getattr(self._args, 'sample', [])
        if more:
            conf.set_override('sample', [*self._options.sample, *more],
                              'virtav_rules')
        self._store = store.Store(
            os.path.join(self._worker.state_dir, 'rules'),
            self._options.group)
        # What is read by a program is not cut to a width.
        self._out = rich_console.Console(
            highlight=False, markup=False, emoji=False,
            width=None if sys.stdout.isatty() else 120)
        self._err = rich_console.Console(
            stderr=True, highlight=False, markup=False, emoji=False)

    def run(self) -> int:
        """:returns: exit status."""
        commands: dict[str, collections.abc.Callable[[], int]] = {
            'import': self._import, 'lint': self._lint, 'list': self._list,
            'show': self._show, 'diff': self._diff,
            'rollback': self._rollback, 'remove': self._remove,
            'test': self._test, 'from-clamav': self._from_clamav}
        return commands[self._args.name]()

    def _import(self) -> int:
        sources = importer.gather(self._args.paths, self._args.source)
        if self._args.dry_run:
            outcome = self._tried(sources)
            return self._imported(outcome, None, False)
        with self._locked():
            outcome = self._tried(sources)
            digest, active = self._stored(
                outcome, 'import', not self._args.no_activate)
        return self._imported(outcome, digest, active)

    @contextlib.contextmanager
    def _locked(self) -> collections.abc.Iterator[None]:
        """Have the store to ourselves."""
        # The worker, which may come later, has to be able to write beside
        # the store. Where it has no user yet, nothing else can be done.
        with contextlib.suppress(exception.PrivilegeError):
            privileges.make_directory(
                self._worker.state_dir,
                privileges.identity(self._worker.user, None), 0o750)
        with self._store.locked():
            yield

    def _tried(self, sources: list[importer.Source]) -> importer.Outcome:
        others: list[store.Entry] = []
        origins: dict[str, typing.Any] = {}
        current = self._store.current()
        if current is not None and not self._args.only:
            names = {source.name for source in sources}
            known = self._store.get(current).manifest['sources']
            for source in sources:
                before = known.get(source.name, {}).get('path')
                if before not in (None, text.printable(
                        source.path, 1024)) and not self._args.replace:
                    raise exception.RuleError(
                        _('source %(name)s was imported from %(before)s, '
                          'not from %(now)s') % {
                            'name': source.name, 'before': before,
                            'now': source.path},
                        _('give another --name, or --replace to replace '
                          'it'))
            origins = {name: about for name, about in known.items()
                       if name not in names}
            others = [entry for entry in self._store.entries(current)
                      if entry.source not in names]
        with self._importer() as work:
            return work.run(sources, others, origins)

    def _stored(self, outcome: importer.Outcome, action: str,
                activate: bool) -> tuple[str, bool]:
        """:returns: digest, and whether the set in force is another now."""
        digest = self._store.add(
            outcome.files, outcome.entries, outcome.manifest)
        changed = activate and digest != self._store.current()
        if changed:
            self._store.activate(digest, action)
        self._store.collect(self._options.keep_sets)
        return digest, changed

    def _imported(self, outcome: importer.Outcome, digest: str | None,
                  changed: bool) -> int:
        reloaded = self._reload() if changed else None
        if self._args.json:
            self._print_json({
                'digest': digest, 'activated': changed,
                'reloaded': reloaded, 'notes': outcome.notes,
                'fresh': importer.counts(outcome.fresh),
                **outcome.manifest,
                'rules': [_summary(entry) for entry in outcome.fresh]})
            return 0
        self._print_counts(outcome.fresh)
        self._print_reasons(outcome.fresh)
        total = sum(entry.in_force for entry in outcome.entries)
        engine = outcome.manifest['engine']
        self._say(_('%(rules)d rules in the set; engine %(name)s loads it '
                    'in %(seconds)s s with %(mib)d MiB') % {
            'rules': total, 'name': engine['name'],
            'seconds': engine['seconds'], 'mib': engine['mib']})
        for note in outcome.notes:
            self._say(_('not shut in as it should be: %s') % note)
        if digest is None:
            self._say(_('dry run: nothing was stored'))
        elif changed:
            self._say(_('set %s is in force') % digest[:12])
            self._say_reload(reloaded)
        elif digest == self._store.current():
            self._say(_('set %s was in force before, and stays')
                      % digest[:12])
        else:
            self._say(_('set %(digest)s is stored; to bring it into force: '
                        'virtav-rules rollback %(digest)s') % {
                'digest': digest[:12]})
        return 0

    def _lint(self) -> int:
        sources = importer.gather(self._args.paths, self._args.source)
        with self._importer() as work:
            entries = work.lint(sources)
        good = all(entry.in_force or entry.state in ('private', 'duplicate')
                   for entry in entries)
        if self._args.json:
            self._print_json({
                'counts': importer.counts(entries),
                'rules': [{**_summary(entry),
                           'dropped': list(entry.dropped),
                           'warnings': list(entry.warnings)}
                          for entry in entries]})
            return 0 if good else 1
        for entry in entries:
            self._out.print(f'{entry.path}: {entry.state}', soft_wrap=True)
            if entry.reason:
                self._out.print(f'    {entry.reason}', soft_wrap=True)
            for term in entry.dropped:
                self._out.print(_('    dropped %s') % term, soft_wrap=True)
            for warning in entry.warnings:
                self._out.print(f'    {warning}', soft_wrap=True)
        self._print_counts(entries)
        return 0 if good else 1

    def _list(self) -> int:
        if not (self._args.set or self._args.rules or self._args.state):
            return self._list_sets()
        found = self._store.find(self._args.set or 'current')
        entries = [entry for entry in self._store.entries(found.digest)
                   if self._args.state in (None, entry.state)]
        if self._args.json:
            self._print_json([_summary(entry) for entry in entries])
            return 0
        table = _table(_('Rule'), _('State'), '>' + _('µs'),
                       _('Severity'), _('Reason'))
        for entry in entries:
            table.add_row(*map(rich_text.Text, (
                entry.path, entry.state,
                '' if entry.us is None else f'{entry.us:.2f}',
                entry.about.get('severity') or '', entry.reason)))
        self._out.print(table)
        return 0

    def _list_sets(self) -> int:
        sets = self._store.sets()
        if self._args.json:
            self._print_json([
                {'digest': each.digest, 'current': each.current,
                 'created': each.manifest['created'],
                 'counts': each.manifest['counts'],
                 'sources': each.manifest['sources']} for each in sets])
            return 0
        table = _table('', _('Set'), _('Made'), '>' + _('Rules'),
                       '>' + _('Left out'), _('Sources'))
        for each in sets:
            counts = each.manifest['counts']
            taken = sum(counts[state] for state in store.IN_FORCE)
            table.add_row(*map(rich_text.Text, (
                '*' if each.current else '', each.digest[:12],
                each.manifest['created'], str(taken),
                str(sum(counts.values()) - taken),
                ', '.join(sorted(each.manifest['sources'])))))
        self._out.print(table)
        if not sets:
            self._say(_('no rules were imported; begin with virtav-rules '
                        'import /etc/virtav/rules'))
        return 0

    def _show(self) -> int:
        wanted = self._args.wanted
        with contextlib.suppress(exception.RuleError):
            if wanted in ('current', 'previous') or (
                    len(wanted) >= 4
                    and not set(wanted) - set('0123456789abcdef')):
                return self._show_set(self._store.find(wanted))
        found = self._store.find(self._args.set)
        entries = _chosen(self._store.entries(found.digest), [wanted])
        if self._args.json:
            self._print_json([vars(entry) for entry in entries])
            return 0
        for entry in entries[:_SHOWN_MAX]:
            self._show_rule(entry)
        if len(entries) > _SHOWN_MAX:
            self._say(_('and %d more') % (len(entries) - _SHOWN_MAX))
        return 0

    def _show_set(self, found: store.Set) -> int:
        # It is plain JSON and says all there is.
        self._print_json({**found.manifest, 'current': found.current})
        return 0

    def _show_rule(self, entry: store.Entry) -> None:
        line = f':{entry.line}' if entry.line else ''
        about = [
            (_('rule'), entry.path), (_('from'), f'{entry.file}{line}'),
            (_('state'), entry.state), (_('reason'), entry.reason),
            (_('file in the set'), entry.namespace),
            (_('time for a page'),
             '' if entry.us is None else f'{entry.us:.2f} µs'),
            (_('harmless pages matched'),
             '' if entry.hits is None else str(entry.hits))]
        about += [(key, ', '.join(value) if isinstance(value, list)
                   else value or '') for key, value in entry.about.items()]
        about += [(_('dropped'), term) for term in entry.dropped]
        for name, value in about:
            if value:
                self._out.print(f'{name}: {value}', soft_wrap=True)
        if entry.text:
            self._out.print(_('in the set:') if entry.in_force
                            else _('fit for pages:'))
            self._out.print(_clean(entry.text), soft_wrap=True)
        if entry.original:
            self._out.print(_('as it was found:'))
            self._out.print(_clean(entry.original), soft_wrap=True)
        self._out.print()

    def _diff(self) -> int:
        old, new = (self._store.find(name)
                    for name in (self._args.old, self._args.new))
        before, after = (
            {entry.path: entry for entry in self._store.entries(each.digest)
             if entry.in_force} for each in (old, new))
        added = sorted(set(after) - set(before))
        removed = sorted(set(before) - set(after))
        changed = sorted(path for path in set(before) & set(after)
                         if before[path].text != after[path].text)
        if self._args.json:
            self._print_json({
                'old': old.digest, 'new': new.digest, 'added': added,
                'removed': removed, 'changed': changed})
            return 0
        for sign, paths in (('-', removed), ('+', added), ('~', changed)):
            for path in paths:
                self._out.print(f'{sign} {path}', soft_wrap=True)
                if sign == '~' and self._args.text:
                    for line in difflib.unified_diff(
                            before[path].text.splitlines(),
                            after[path].text.splitlines(), lineterm=''):
                        self._out.print('    ' + _clean(line),
                                        soft_wrap=True)
        self._say(_('%(old)s to %(new)s: %(removed)d removed, %(added)d '
                    'added, %(changed)d changed') % {
            'old': old.digest[:12], 'new': new.digest[:12],
            'removed': len(removed), 'added': len(added),
            'changed': len(changed)})
        return 0

    def _rollback(self) -> int:
        with self._locked():
            found = self._store.find(self._args.set)
            if not found.current:
                # The engine, or a limit, may be another by now.
                with self._importer() as work:
                    work.prove(self._store.files(found.digest))
                self._store.activate(found.digest, 'rollback')
        reloaded = None if found.current else self._reload()
        if self._args.json:
            self._print_json({'digest': found.digest,
                              'activated': not found.current,
                              'reloaded': reloaded})
        else:
            self._say(_('set %s is in force') % found.digest[:12])
            if not found.current:
                self._say_reload(reloaded)
        return 0

    def _remove(self) -> int:
        with self._locked():
            found = self._store.find('current')
            known = found.manifest['sources']
            for name in self._args.sources:
                if name not in known:
                    raise exception.RuleError(
                        _('no source of the set in force is called %s')
                        % name,
                        _('name one of: %s') % ', '.join(sorted(known)))
            with self._importer() as work:
                outcome = work.run(
                    [], [entry for entry in self._store.entries(found.digest)
                         if entry.source not in self._args.sources],
                    {name: about for name, about in known.items()
                     if name not in self._args.sources})
            digest, changed = self._stored(outcome, 'import', True)
        return self._imported(outcome, digest, changed)

    def _test(self) -> int:
        if bool(self._args.rules) == self._args.all:
            raise exception.RuleError(
                _('either rules or --all has to be given'),
                _('see virtav-rules list --rules for their names'))
        found = self._store.find(self._args.set)
        entries = [entry for entry in self._store.entries(found.digest)
                   if entry.in_force]
        if self._args.rules:
            entries = _chosen(entries, self._args.rules)
        with self._importer() as work:
            pages = work.carry(entries)
            made = [number for number, page in enumerate(pages)
                    if 'page' in page]
            proof = work.prove(
                self._store.files(found.digest),
                (pages[number]['page'] for number in made))
        problems: dict[int, str] = {
            number: _('no page could be made: %s') % page['reason']
            for number, page in enumerate(pages) if 'page' not in page}
        for number, matches in zip(made, proof.get('found', ()),
                                   strict=True):
            entry = entries[number]
            if isinstance(matches, str):
                problems[number] = matches
            elif (entry.namespace, entry.rule) not in matches:
                problems[number] = _('the engine does not find it in the '
                                     'page')
        proved = len(entries) - len(problems)
        if self._args.json:
            self._print_json({
                'set': found.digest, 'rules': len(entries),
                'proved': proved,
                'problems': [{'rule': entries[number].path,
                              'reason': text.printable(reason, 300)}
                             for number, reason in sorted(
                                 problems.items())]})
            return 1 if problems else 0
        for number, reason in sorted(problems.items()):
            self._out.print(f'{entries[number].path}: '
                            + text.printable(reason, 300), soft_wrap=True)
        self._say(_('%(proved)d of %(rules)d rules are found in a page made '
                    'for them') % {'proved': proved, 'rules': len(entries)})
        return 1 if problems else 0

    def _from_clamav(self) -> int:
        taken: list[clamav.Converted] = []
        refused: list[clamav.Converted] = []
        parts = []
        names: set[str] = set()
        for path in self._args.paths:
            kind = _clamav_kind(path)
            content = directory.read_file(path).content
            for each in clamav.convert(
                    content.decode('utf-8', 'replace').splitlines(), kind,
                    self._args.all_targets, names):
                if each.rule:
                    parts.append(each.rule)
                    taken.append(each)
                else:
                    refused.append(each)
        if not taken:
            raise exception.RuleError(
                _('no signature can be made a rule: %s') % '; '.join(
                    f'{each.name}: {each.lost[0]}' for each in refused[:3]),
                _('give body signatures for executable files'))
        _replace(self._args.output, '\n'.join(parts).encode())
        if self._args.json:
            self._print_json({
                'rules': len(taken), 'refused': len(refused),
                'signatures': [
                    {'name': each.name, 'line': each.line,
                     'taken': bool(each.rule), 'lost': list(each.lost)}
                    for each in sorted([*taken, *refused],
                                       key=lambda each: each.line)]})
            return 0
        for each in refused:
            self._out.print(_('%(name)s: not taken: %(why)s') % {
                'name': each.name, 'why': '; '.join(each.lost)},
                soft_wrap=True)
        for each in taken:
            if each.lost:
                self._out.print(_('%(name)s: lost: %(what)s') % {
                    'name': each.name, 'what': '; '.join(each.lost)},
                    soft_wrap=True)
        self._say(_('%(taken)d rules in %(path)s, %(refused)d signatures '
                    'not taken') % {
            'taken': len(taken), 'path': self._args.output,
            'refused': len(refused)})
        return 0

    @contextlib.contextmanager
    def _importer(self) -> collections.abc.Iterator[importer.Importer]:
        """:returns: an importer that shows how far it is."""
        live = self._err.is_terminal
        shown: dict[str, rich_progress.TaskID] = {}
        with rich_progress.Progress(
                rich_progress.TextColumn('{task.description}'),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                console=self._err, disable=not live,
                transient=True) as bars:

            def progress(stage: str, done: int, total: int) -> None:
                if stage not in shown:
                    shown[stage] = bars.add_task(stage, total=total)
                    if not live and not self._args.json:
                        self._say(f'{stage}: {total}')
                bars.update(shown[stage], completed=done)

            yield importer.Importer(
                self._options, self._worker,
                ruleset.engine(self._worker.engine), progress)

    def _reload(self) -> bool | None:
        """Have the worker reload, and wait, when that was asked for.

        :returns: None when it was not.
        :raises StatusError: when the worker does not answer, or keeps the
            rules that it has. What is in the store stays as it is.
        """
        if not getattr(self._args, 'reload', False):
            return None
        path = self._worker.status_socket
        status.ask(path, 'reload')
        report = status.ask(path, 'status')
        while report['reload']['state'] == 'loading':
            time.sleep(_LOOK)
            report = status.ask(path, 'status')
        if report['reload']['error']:
            raise exception.StatusError(
                _('the worker keeps the rules that it had: %s')
                % report['reload']['error'],
                _('see its log, or go back by virtav-rules rollback'))
        return True

    def _say_reload(self, reloaded: bool | None) -> None:
        used = os.path.abspath(self._worker.rules_dir)
        ours = os.path.join(self._store.path, 'current')
        if used != os.path.abspath(ours):
            self._say(_('the worker does not use it: [virtav_worker] '
                        'rules_dir is %(used)s, not %(ours)s') % {
                'used': used, 'ours': ours})
        elif reloaded:
            self._say(_('the worker has loaded it'))
        else:
            self._say(_('have the worker load it: systemctl reload '
                        'virtav-scan-worker'))

    def _print_counts(self, entries: list[store.Entry]) -> None:
        table = _table(_('State'), '>' + _('Rules'), _('Meaning'))
        for state, number in importer.counts(entries).items():
            if number:
                table.add_row(state, str(number), _MEANING[state])
        self._out.print(table)

    def _print_reasons(self, entries: list[store.Entry]) -> None:
        """The most frequent reasons why rules were left out."""
        reasons = collections.Counter(
            (entry.state, entry.reason) for entry in entries
            if entry.state in ('refused', 'quarantined'))
        if not reasons:
            return
        table = _table('>' + _('Rules'), _('State'), _('Reason'))
        for (state, reason), number in reasons.most_common(_REASONS):
            table.add_row(*map(rich_text.Text, (
                str(number), state, reason[:_REASON_SHOWN])))
        self._out.print(table)
        if len(reasons) > _REASONS:
            self._say(_('and %d other reasons; see virtav-rules list '
                        '--state refused') % (len(reasons) - _REASONS))

    def _print_json(self, content: typing.Any) -> None:
        print(json.dumps(content, indent=1, sort_keys=True))

    def _say(self, message: str) -> None:
        console = self._err if self._args.json else self._out
        console.print(message, soft_wrap=True)


def _table(*columns: str) -> rich_table.Table:
    """:param columns: titles; those with numbers begin with ``>``."""
    table = rich_table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(
            title.removeprefix('>'), overflow='fold',
            justify='right' if title.startswith('>') else 'left')
    return table


def _summary(entry: store.Entry) -> dict[str, typing.Any]:
    return {'rule': entry.path, 'line': entry.line, 'state': entry.state,
            'reason': entry.reason, 'namespace': entry.namespace,
            'us': entry.us, 'hits': entry.hits, **entry.about}


def _chosen(entries: list[store.Entry], names: list[str]
            ) -> list[store.Entry]:
    """Find rules by their name, their path, or the end of it.

    :raises RuleError: when there is none of a name.
    """
    chosen: dict[str, store.Entry] = {}
    for name in names:
        found = [entry for entry in entries if entry.rule
                 and (name == entry.rule or entry.path == name
                      or entry.path.endswith('/' + name))]
        if not found:
            raise exception.RuleError(
                _('no rule of the set is called %s')
                % text.printable(name, 200),
                _('see virtav-rules list --rules'))
        chosen.update((entry.path, entry) for entry in found)
    return list(chosen.values())


def _clamav_kind(path: str) -> str:
    kinds = {'.ndb': 'ndb', '.ndu': 'ndb', '.ldb': 'ldb', '.ldu': 'ldb'}
    suffix = os.path.splitext(path)[1]
    if suffix not in kinds:
        raise exception.RuleError(
            _('%s: not a file of body signatures') % path,
            _('give *.ndb or *.ldb; "sigtool --unpack" takes them out of '
              '*.cvd and *.cld'))
    return kinds[suffix]


def _replace(path: str, content: bytes) -> None:
    """Write a file, whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(
                dir=os.path.dirname(os.path.abspath(path)),
                delete=False) as file:
            try:
                file.write(content)
                os.fchmod(file.fileno(), 0o644)
                os.rename(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise exception.RuleError(
            f'{path}: {error.strerror}',
            _('name a file that can be written')) from error


def _clean(value: str) -> str:
    """:returns: text of unknown origin that a terminal may be given."""
    return ''.join(
        char if char.isprintable() or char in '\n\t'
        else char.encode('unicode_escape').decode('ascii')
        for char in value.replace('\r\n', '\n'))


if __name__ == '__main__':
    sys.exit(main())
