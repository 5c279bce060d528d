# SPDX-License-Identifier: Apache-2.0
"""The console script ``virtav-scan-worker``."""

import contextlib
import importlib.metadata
import logging
import os
import sys
import typing

from oslo_config import cfg
from oslo_log import log
from stevedore import driver
from stevedore import exception as stevedore_exception
from stevedore import extension

from virtav_nova import conf as virtav_conf
from virtav_nova import exception
from virtav_nova.alerts import journal
from virtav_nova.engines import base
from virtav_nova.i18n import _
from virtav_nova.rules import directory
from virtav_nova.worker import listener
from virtav_nova.worker import pool
from virtav_nova.worker import server

LOG = logging.getLogger(__name__)

_PROG = 'virtav-scan-worker'
_ENGINES = 'virtav.engines'

_CLI_OPTS = [
    cfg.BoolOpt('check', default=False,
                help='Load the rules, print their digest and number, exit.'),
]


def main(argv: list[str] | None = None) -> int:
    """Run the scan worker.

    :param argv: arguments; those of the command line when None.
    :returns: exit status: 0 after a drain, 2 when the configuration has to
        be mended first, 1 after anything else.
    """
    conf = cfg.ConfigOpts()
    conf.register_cli_opts(_CLI_OPTS)
    virtav_conf.register_opts(conf)
    log.register_options(conf)
    try:
        conf(argv, project='virtav', prog=_PROG,
             version=importlib.metadata.version('virtav-nova'))
        options = _options(conf)
        if conf.check:
            return _check(options)
        # Where nothing else is said oslo.log would take standard output.
        conf.set_default('use_stderr', not (
            conf.log_file or conf.log_dir or conf.use_journal))
        log.setup(conf, 'virtav')
        return _serve(options)
    except exception.ConfigurationError as error:
        return _failed(2, str(error), error.way_out)
    except cfg.Error as error:
        return _failed(2, str(error), _('mend the configuration file'))
    except pool.StartError as error:
        return _failed(1, _('scan processes do not start: %s') % error,
                       _('see what they wrote above'))


def _failed(status: int, message: str, way_out: str) -> int:
    print(f'{_PROG}: error: {message}\n  way out: {way_out}',
          file=sys.stderr)
    return status


def _options(conf: cfg.ConfigOpts) -> cfg.ConfigOpts.GroupAttr:
    """Read every option now, so that a bad value is found at the start."""
    options: cfg.ConfigOpts.GroupAttr = conf.virtav_worker
    for name in options:
        try:
            options[name]
        except cfg.ConfigFileValueError as error:
            reason = str(error).rpartition('is not valid: ')[2]
            raise exception.ConfigurationError(
                _('[virtav_worker] %(name)s: %(reason)s') % {
                    'name': name, 'reason': reason},
                _('mend the option in the configuration file')) from error
    return options


def _load(options: cfg.ConfigOpts.GroupAttr) -> tuple[base.Engine, bytes]:
    """:returns: the engine with the rules compiled, and their digest."""
    try:
        kind = typing.cast(type[base.Engine], driver.DriverManager(
            _ENGINES, options.engine).driver)
    except stevedore_exception.NoMatches as error:
        known = extension.ExtensionManager(_ENGINES).names()
        raise exception.EngineError(
            _('no scan engine is called %s') % options.engine,
            _('set [virtav_worker] engine to one of: %s')
            % ', '.join(sorted(known))) from error
    files = directory.read(options.rules_dir)
    try:
        engine = kind.compile(files, options.scan_timeout_ms)
    except exception.RuleError as error:
        # The engine knows names only, which are the same on every host.
        raise exception.RuleError(
            os.path.join(options.rules_dir, str(error)),
            error.way_out) from error
    if not engine.describe()['rules']:
        raise exception.RuleError(
            _('the files in rule directory %s hold no rule')
            % options.rules_dir, _('put rules into them'))
    return engine, directory.digest(f'{kind.name} {kind.version}', files)


def _check(options: cfg.ConfigOpts.GroupAttr) -> int:
    engine, digest = _load(options)
    print(f'engine: {engine.name} {engine.version}')
    print(f'rules: {engine.describe()["rules"]}')
    print(f'digest: {digest.hex()}')
    return 0


def _serve(options: cfg.ConfigOpts.GroupAttr) -> int:
    if os.geteuid() == 0:
        LOG.warning('Running as root. A flaw in the scan engine would give a '
                    'guest the whole host: run the worker as a user of its '
                    'own.')
    engine, digest = _load(options)
    LOG.info('Engine %s %s, digest %s: %s', engine.name, engine.version,
             digest.hex(), engine.describe())
    listening = listener.Listener(
        options.socket, options.socket_group or None,
        int(options.socket_mode, 8))
    with contextlib.closing(listening):
        alerts = journal.Journal(
            options.journal_path, options.journal_max_mib << 20,
            options.journal_keep)
        with contextlib.closing(alerts):
            worker = server.Server(
                options, engine, digest, listening, alerts)
            del engine  # Its rules are for the scan processes.
            worker.run()
    return 0


if __name__ == '__main__':
    sys.exit(main())
