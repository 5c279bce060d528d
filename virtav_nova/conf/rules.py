# SPDX-License-Identifier: Apache-2.0
"""Options of ``virtav-rules``, which brings rules into force."""

from oslo_config import cfg

GROUP = cfg.OptGroup(
    'virtav_rules',
    title='Rules',
    help="""
``virtav-rules`` tries rules from outside before the scan worker gets them.
Each rule is parsed, rewritten so that it can hold on a page of memory,
compiled and timed in a process apart that has limits and no rights. What does
not pass is left out, with the reason kept beside the rule set.
""")

OPTS = [
    cfg.IntOpt(
        'max_rules',
        default=30000,
        min=1,
        max=1000000,
        help="""
Most rules of a rule set. An import that would come to more is refused and the
set in force stays; each rule costs the worker memory and every page time.
"""),
    cfg.IntOpt(
        'memory_mib',
        default=2048,
        min=256,
        help="""
Address space of a process that parses, compiles and tries rules, in MiB. A
rule that needs more is refused.
"""),
    cfg.IntOpt(
        'rule_seconds',
        default=20,
        min=1,
        max=600,
        help="""
Processor time, in seconds, within which a file of rules has to be parsed, and
a handful of rules compiled and tried. What takes longer is looked at rule by
rule, and the rule that is to blame is refused.
"""),
    cfg.IntOpt(
        'slow_us',
        default=50,
        min=1,
        help="""
Mean time in µs that a rule may add to the scan of one harmless page, on this
host. A slower one is quarantined: it would cost every page of every guest.
"""),
    cfg.IntOpt(
        'slowest_page_us',
        default=5000,
        min=1,
        help="""
Longest time in µs that a rule may take for any one page of the sample, among
them pages of text that slow rules down, as a guest could make them. A slower
rule is quarantined.
"""),
    cfg.IntOpt(
        'noisy_pages',
        default=0,
        min=0,
        help="""
Pages of the sample that a rule may match. The sample is harmless code, so a
rule that matches more is quarantined as a false alarm.
"""),
    cfg.MultiStrOpt(
        'sample',
        default=[],
        help="""
Files and directories of your own programs, as many as you like. The code in
them is tried besides the shipped sample of pages, so that a rule that would
raise an alarm on your own software does not come into force.
"""),
    cfg.IntOpt(
        'sample_pages',
        default=20000,
        min=0,
        help="""
Pages that are taken from ``sample`` at most. Each takes 4 KiB of memory, and
2 ms of an import for each thousand rules.
"""),
    cfg.IntOpt(
        'keep_sets',
        default=10,
        min=2,
        max=1000,
        help="""
Rule sets that are kept, that in force among them, so that ``virtav-rules
rollback`` has something to go back to.
"""),
    cfg.StrOpt(
        'group',
        help="""
Group that may read the stored rules, by name; the worker's user has to be in
it. When it is not set everybody on the host may read them. Nobody but their
owner may write them.
"""),
]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the options of this group.

    :param conf: the configuration to register them with.
    """
    conf.register_group(GROUP)
    conf.register_opts(OPTS, group=GROUP)


def list_opts() -> tuple[cfg.OptGroup, list[cfg.Opt]]:
    """:returns: the group with its options."""
    return GROUP, OPTS
