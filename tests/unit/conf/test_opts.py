# SPDX-License-Identifier: Apache-2.0

import unittest

from oslo_config import cfg

from virtav_nova import conf as virtav_conf
from virtav_nova.conf import opts


class OptsTest(unittest.TestCase):

    def test_all_options_are_listed_and_explained(self):
        conf = cfg.ConfigOpts()
        virtav_conf.register_opts(conf)
        conf([])
        listed = opts.list_opts()
        self.assertEqual(['virtav_rules', 'virtav_worker'],
                         [group.name for group, _ in listed])
        for group, options in listed:
            self.assertEqual(set(conf[group.name]),
                             {option.dest for option in options})
            for option in options:
                with self.subTest(option.name):
                    self.assertGreater(len(option.help), 50)

    def test_journal_follows_the_state_directory(self):
        conf = cfg.ConfigOpts()
        virtav_conf.register_opts(conf)
        conf([])
        conf.set_override('state_dir', '/srv/virtav', 'virtav_worker')
        # The group, and what is noted of its options, is one for all.
        self.addCleanup(conf.clear_override, 'state_dir', 'virtav_worker')
        self.assertEqual('/srv/virtav/alerts/journal.jsonl',
                         conf.virtav_worker.journal_path)

    def test_sizes_of_shared_memory(self):
        conf = cfg.ConfigOpts()
        virtav_conf.register_opts(conf)
        conf([])
        group = conf.virtav_worker
        self.assertEqual((1 << 20, 64),
                         (group.table_entries, group.ring_slots))
        for name, good, bad in (
                ('table_entries', ('0', '4', '67108864'),
                 ('1', '2', '3', '12', '-4', '134217728', 'many', '')),
                ('ring_slots', ('0', '2', '1024'),
                 ('1', '3', '63', '-1', '2048', '1.5', ''))):
            # The group is shared by all configurations there are.
            self.addCleanup(conf.clear_override, name, 'virtav_worker')
            for value in good:
                conf.set_override(name, value, 'virtav_worker')
                self.assertEqual(int(value), group[name])
            for value in bad:
                with self.subTest(name, value=value), \
                        self.assertRaises(ValueError):
                    conf.set_override(name, value, 'virtav_worker')

    def test_where_metrics_are(self):
        conf = cfg.ConfigOpts()
        virtav_conf.register_opts(conf)
        conf([])
        self.addCleanup(conf.clear_override, 'metrics', 'virtav_worker')
        self.assertEqual('', conf.virtav_worker.metrics)
        for good in ('127.0.0.1:9109', '[::1]:9109', 'localhost:1',
                     '127.1.2.3:65535', 'unix:/run/x', ''):
            conf.set_override('metrics', good, 'virtav_worker')
            self.assertEqual(good, conf.virtav_worker.metrics)
        for bad in ('0.0.0.0:9109', '[::]:9109', '192.0.2.1:9109', ':9109',
                    '9109', '127.0.0.1', '127.0.0.1:0', '127.0.0.1:65536',
                    '127.0.0.1:x', 'unix:run/x', 'example.org:9109'):
            with self.subTest(bad), self.assertRaises(ValueError):
                conf.set_override('metrics', bad, 'virtav_worker')
