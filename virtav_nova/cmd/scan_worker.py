# SPDX-License-Identifier: Apache-2.0
"""The console script ``virtav-scan-worker``."""

import contextlib
import importlib.metadata
import logging
import os
import sys

from oslo_config import cfg
from oslo_log import log

from virtav_nova import conf as virtav_conf
from virtav_nova import exception
from virtav_nova.alerts import journal
from virtav_nova.i18n import _
from virtav_nova.worker import handshake
from virtav_nova.worker import listener
from virtav_nova.worker import operation
from virtav_nova.worker import pool
from virtav_nova.worker import privileges
from virtav_nova.worker import recorder
from virtav_nova.worker import ruleset
from virtav_nova.worker import server

LOG = logging.getLogger(__name__)

_PROG = 'virtav-scan-worker'

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
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ['record']:
        return recorder.main(arguments[1:])
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


def _check(options: cfg.ConfigOpts.GroupAttr) -> int:
    rules = ruleset.read(options)
    description = pool.attempt(options, rules)
    print(f'engine: {rules.kind.name} {rules.kind.version}')
    print(f'rules: {description["rules"]}')
    print(f'digest: {rules.digest.hex()}')
    return 0


def _serve(options: cfg.ConfigOpts.GroupAttr) -> int:
    who = privileges.identity(options.user, options.socket_group)
    owner = None
    if who is not None:
        owner = who.uid, who.gid
        # QEMU has to reach the one, and nobody else is to see the other.
        privileges.make_directory(
            os.path.dirname(options.socket), who, 0o755)
        privileges.make_directory(options.state_dir, who, 0o750)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(contextlib.closing(listener.Listener(
            options.socket, options.socket_group or None,
            int(options.socket_mode, 8), owner)))
        faces = stack.enter_context(contextlib.closing(
            operation.Faces(options, owner)))
        confinement = operation.confine(who)
        alerts = journal.Journal(
            options.journal_path, options.journal_max_mib << 20,
            options.journal_keep)
        with contextlib.closing(alerts):
            admission = handshake.Admission(
                listener.Peers(options.peer_users), options.instances_dir,
                options.require_token)
            server.Server(options, listening, alerts, admission, faces,
                          confinement).run()
    return 0


if __name__ == '__main__':
    sys.exit(main())
