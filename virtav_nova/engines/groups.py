# SPDX-License-Identifier: Apache-2.0
"""Rule files cut into groups of rules that libyara evaluates together.

A group holds what its rules refer to and the global rules of their files, as
private rules, so that they mean what they mean in the whole file.
"""

import collections.abc
import io
import logging
import typing

import yara

from virtav_nova import exception
from virtav_nova.engines import sources
from virtav_nova.rules import syntax

LOG = logging.getLogger(__name__)

class File(typing.NamedTuple):
    """One file of rules, which is one namespace.

    :param source: None when it has to be taken as a whole.
    :param names: of its rules that are not private, in order.
    """

    name: str
    text: str
    source: syntax.Source | None
    names: list[str]


class Group:
    """Rules that libyara evaluates together.

    :param rules: numbers of the rules; the sources may hold others.
    :param texts: source by namespace, in the order of the files.
    :ivar single: the rules one by one, once that was asked for.
    """

    def __init__(self, rules: collections.abc.Iterable[int],
                 texts: dict[str, str]) -> None:
        self.rules = frozenset(rules)
        self._texts = texts
        self.compiled = loaded(texts)
        self.single: list[tuple[int, yara.Rules]] = []

    def split(self, names: dict[int, tuple[str, str]]) -> None:
        """Compile the rules one by one.

        Nothing changes when they cannot be told apart.

        :param names: namespace and name by the rule's number.
        """
        if self.single or len(self.rules) < 2:
            return
        parsed = {}
        try:
            for namespace, text in self._texts.items():
                parsed[namespace] = syntax.parse(text, namespace)
            self.single = [
                (number, loaded({namespace: parsed[namespace].standalone(
                    parsed[namespace].by_name[name])}))
                for number, (namespace, name) in names.items()]
        except exception.RuleError:
            return


def read(texts: dict[str, str]) -> list[File]:
    """Compile rules once as they are, and take them apart.

    :param texts: source by namespace.
    :raises RuleError: as :func:`sources.compiled`.
    """
    every = [_listed(rule) for rule in sources.compiled(texts)]
    files = []
    for name, text in texts.items():
        try:
            source = syntax.parse(text, name)
        except exception.RuleError:
            source = None
        files.append(File(name, text, source, []))
    understood = every == [
        (rule.name, rule.is_private, rule.is_global, rule.tags)
        for file in files if file.source for rule in file.source.rules]
    return [_checked(file, understood) for file in files]


def loaded(texts: dict[str, str]) -> yara.Rules:
    """Compile rules that are known to compile.

    :param texts: source by namespace.
    :raises RuleError: should they not.
    """
    # What was just compiled takes many times the memory of what is loaded.
    image = io.BytesIO()
    sources.compiled(texts).save(file=image)
    image.seek(0)
    return yara.load(file=image)


class Cutter:
    """Makes groups.

    :param files: all of them.
    """

    def __init__(self, files: collections.abc.Iterable[File]) -> None:
        self._files = {file.name: file for file in files}
        self._places: dict[str, dict[str, int]] = {}
        self._globals: dict[str, list[str]] = {}
        for file in self._files.values():
            if file.source:
                self._places[file.name] = {
                    rule.name: place
                    for place, rule in enumerate(file.source.rules)}
                self._globals[file.name] = [
                    rule.name for rule in file.source.rules
                    if rule.is_global]

    def group(self, wanted: dict[int, tuple[str, str]]) -> Group:
        """Make a group.

        :param wanted: namespace and name of rules by their numbers, in
            their order.
        """
        names: dict[str, list[str]] = {}
        for namespace, name in wanted.values():
            names.setdefault(namespace, []).append(name)
        try:
            return Group(wanted, {namespace: self._text(namespace, each)
                                  for namespace, each in names.items()})
        except exception.RuleError:
            # Something in them was not understood. The whole file is right
            # in any case, but takes longer.
            LOG.exception('Rules cannot be cut apart: %s', list(names))
            return Group(wanted, {namespace: self._files[namespace].text
                                  for namespace in names})

    def _text(self, namespace: str, names: list[str]) -> str:
        file = self._files[namespace]
        if file.source is None:
            return file.text
        source = file.source
        places = self._places[namespace]
        taken: set[str] = set()
        todo = [*names, *self._globals[namespace]]
        while todo:
            name = todo.pop()
            if name not in taken:
                taken.add(name)
                todo += source.rules[places[name]].references
        rules = [source.rules[place]
                 for place in sorted(places[name] for name in taken)]
        modules = {name for rule in rules for name in rule.modules}
        # A module costs time for each page, used or not.
        parts = [f'import "{name}"\n' for name in source.imports
                 if name in modules]
        wanted = set(names)
        for rule in rules:
            if rule.name not in wanted and not rule.is_private:
                parts.append('private ')
            parts += (rule.text, '\n')
        return ''.join(parts)


def _listed(rule: yara.Rule) -> tuple[str, bool, bool, tuple[str, ...]]:
    return (rule.identifier, rule.is_private, rule.is_global,
            tuple(rule.tags))


def _checked(file: File, understood: bool) -> File:
    """:returns: the file, with its source only if libyara sees the same."""
    source = file.source
    if source and understood and not {
            rule.name for rule in source.rules}.intersection(source.imports):
        return file._replace(names=[
            rule.name for rule in source.rules if not rule.is_private])
    every = [_listed(rule)
             for rule in sources.compiled({file.name: file.text})]
    if source and (
            every != [(rule.name, rule.is_private, rule.is_global, rule.tags)
                      for rule in source.rules]
            or {rule.name for rule in source.rules}.intersection(
                source.imports)):
        source = None
    return file._replace(
        source=source,
        names=[name for name, is_private, _global, _tags in every
               if not is_private])
