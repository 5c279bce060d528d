# SPDX-License-Identifier: Apache-2.0
"""The rules that are to be in force, and those of them that are not."""

import collections.abc
import json
import logging
import os
import typing

from oslo_config import cfg
from stevedore import driver
from stevedore import exception as stevedore_exception
from stevedore import extension

from virtav_nova import exception
from virtav_nova import text
from virtav_nova.alerts import record
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory

LOG = logging.getLogger(__name__)

_ENGINES = 'virtav.engines'
#: Rules in quarantine at most; after that an operator has to see to it.
_QUARANTINE_MAX = 1000
_NAME_MAX = 512
_FILE_MAX = 4 << 20

#: Namespace and name of a rule.
Name: typing.TypeAlias = tuple[str, str]


class Ruleset(typing.NamedTuple):
    """What a loader is to load.

    :param kind: the engine.
    :param options: for the engine.
    :param files: the rules.
    :param digest: names what decides, 32 bytes.
    """

    kind: type[base.Engine]
    options: base.EngineOptions
    files: list[directory.RuleFile]
    digest: bytes


def engine(name: str) -> type[base.Engine]:
    """Find an engine.

    :param name: in the entry points.
    :raises EngineError: when there is none of that name.
    """
    try:
        return typing.cast(type[base.Engine], driver.DriverManager(
            _ENGINES, name).driver)
    except stevedore_exception.NoMatches as error:
        known = extension.ExtensionManager(_ENGINES).names()
        raise exception.EngineError(
            _('no scan engine is called %s') % name,
            _('set [virtav_worker] engine to one of: %s')
            % ', '.join(sorted(known))) from error
    except ImportError as error:
        raise exception.EngineError(
            _('scan engine %(name)s cannot be had: %(error)s') % {
                'name': name, 'error': error},
            _('install what it needs, or set [virtav_worker] engine to '
              'another one')) from error


def read(options: cfg.ConfigOpts.GroupAttr) -> Ruleset:
    """Read the rules, and what is in quarantine.

    :param options: the group ``virtav_worker``.
    :raises ConfigurationError: when they cannot be had.
    """
    kind = engine(options.engine)
    files = directory.read(options.rules_dir)
    quarantine = Quarantine(options.state_dir)
    wanted = base.EngineOptions(
        scan_timeout_ms=options.scan_timeout_ms,
        clamd_socket=options.clamd_socket,
        quarantine=frozenset(quarantine.names()))
    return Ruleset(kind, wanted, files, directory.digest(
        json.dumps([kind.name, kind.release(wanted),
                    sorted(wanted.quarantine)]), files))


class Quarantine:
    """Rules that cost the worker too many scan processes.

    :param state_dir: where the file with them is, by option.
    """

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, 'quarantine.json')
        self.entries: list[dict[str, str]] = []
        try:
            with open(self._path, 'rb') as file:
                self._take(json.loads(file.read(_FILE_MAX)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError,
                RecursionError) as error:
            LOG.error('Quarantine %s is passed over: %s', self._path, error)

    def _take(self, entries: object) -> None:
        if not isinstance(entries, list):
            raise ValueError('not a list')
        for entry in entries[:_QUARANTINE_MAX]:
            self.entries.append({
                name: str(entry[name])[:_NAME_MAX]
                for name in ('namespace', 'rule', 'why', 'time')})

    def names(self) -> collections.abc.Iterator[Name]:
        """:returns: namespace and name of each."""
        for entry in self.entries:
            yield entry['namespace'], entry['rule']

    def add(self, name: Name, why: str) -> bool:
        """Put a rule into quarantine.

        :param name: of the rule.
        :param why: for people.
        :returns: False when there is no room for it, or it cannot be
            written down.
        """
        if name in self.names():
            return True
        if len(self.entries) >= _QUARANTINE_MAX:
            LOG.error('Quarantine %s is full', self._path)
            return False
        self.entries.append({
            'namespace': name[0], 'rule': name[1],
            'why': text.printable(why, _NAME_MAX), 'time': record.now()})
        fresh = f'{self._path}.0'
        try:
            with open(fresh, 'w', encoding='ascii') as file:
                json.dump(self.entries, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._path)
        except OSError as error:
            LOG.error('Quarantine %s: %s', self._path, error.strerror)
            return False
        return True


def located(options: cfg.ConfigOpts.GroupAttr, message: str) -> str:
    """Say where a rule is that is broken.

    :param options: the group ``virtav_worker``.
    :param message: of the engine, which knows names only: they are the same
        on every host.
    """
    return os.path.join(options.rules_dir, message)
