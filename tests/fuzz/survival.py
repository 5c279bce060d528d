# SPDX-License-Identifier: Apache-2.0
"""Whether the importer gets over a file that its process apart dies of."""

import pathlib

from oslo_config import cfg

from virtav_nova import conf as virtav_conf
from virtav_nova.engines import yara
from virtav_nova.rules import directory
from virtav_nova.rules import importer
from virtav_nova.rules import store

#: A rule that has to come through, whatever stands beside it.
GOOD = b'rule good { strings: $a = "a good rule" condition: $a }'


def check(contents, home):
    """Import files, and store what comes of it.

    :param contents: of each file, as bytes
    :param home: directory for the store
    :raises AssertionError: what is good did not come through
    :raises Exception: the importer did not survive
    """
    conf = cfg.ConfigOpts()
    virtav_conf.register_opts(conf)
    conf([], default_config_files=[])
    conf.set_override('memory_mib', 1024, 'virtav_rules')
    source = importer.Source('fuzz', '/fuzz', [
        directory.RuleFile('f%03d.yar' % number, content)
        for number, content in enumerate([*contents, GOOD])], [])
    made = importer.Importer(conf.virtav_rules, conf.virtav_worker,
                             yara.YaraEngine, lambda *_said: None)
    outcome = made.run([source])
    good = 'f%03d.yar' % len(contents)
    assert [entry.rule for entry in outcome.entries if entry.in_force
            and entry.file == good] == ['good'], outcome.entries[-1:]
    kept = store.Store(str(pathlib.Path(home) / 'rules'))
    with kept.locked():
        digest = kept.add(outcome.files, outcome.entries, outcome.manifest)
        kept.activate(digest, 'import')
    assert kept.current() == digest
    assert [file.content for file in kept.files(digest)] == [
        file.content for file in outcome.files]
    assert len(kept.entries(digest)) == len(outcome.entries)
