# SPDX-License-Identifier: Apache-2.0
"""Options of the scan worker."""

import ipaddress

from oslo_config import cfg
from oslo_config import types

from virtav_nova.monitor import wire


class PowerOfTwo(types.Integer):
    """A power of two, or 0.

    :param least: the smallest but for 0.
    :param most: the largest.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__(0, most, type_name='power of two')
        self._least, self._most = least, most

    def __call__(self, value: object) -> int:
        """:raises ValueError: when the value is none."""
        number = super().__call__(value)
        if (not isinstance(number, int) or number & (number - 1)
                or 0 < number < self._least):
            raise ValueError(
                f'{number} is neither 0 nor a power of two from '
                f'{self._least} to {self._most}')
        return number


class Address(types.String):
    """Where to listen: a loopback address with a port, a UNIX path, or ''."""

    def __init__(self) -> None:
        super().__init__(type_name='local address')

    def __call__(self, value: object) -> str:
        """:raises ValueError: when the value is none."""
        given = str(super().__call__(value))
        if given and not given.startswith('unix:/'):
            loopback(given)
        return given


def loopback(given: str) -> tuple[str, int]:
    """Read HOST:PORT.

    :returns: the address as a number, and the port.
    :raises ValueError: when it is no loopback address, or no port.
    """
    host, _colon, port = given.rpartition(':')
    if host.startswith('[') and host.endswith(']'):
        host = host[1:-1]
    elif host == 'localhost':
        host = '127.0.0.1'
    try:
        good = ipaddress.ip_address(host).is_loopback
    except ValueError:
        good = False
    if not good or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f'{given} is neither a loopback address with a port, such as '
            f'127.0.0.1:9109, nor unix:PATH')
    return host, int(port)


GROUP = cfg.OptGroup(
    'virtav_worker',
    title='Scan worker',
    help="""
The scan worker runs once on every compute node. The patched QEMU of each
watched instance connects to its socket and asks it for a verdict on every
page that the guest is about to execute for the first time since the page was
written.
""")

OPTS = [
    cfg.StrOpt(
        'socket',
        default='/run/virtav/worker.sock',
        help="""
Path of the UNIX socket that QEMU connects to.

The directory has to exist, and QEMU has to be able to reach it: mind its
owner and mode, and AppArmor or SELinux. The path becomes part of the domain
XML of every watched instance, so it has to be the same on all hosts between
which instances migrate. At most 107 bytes: the kernel has no room for more.

A socket left behind by a worker that is gone is replaced. When a worker still
listens there, the new one refuses to start.
"""),
    cfg.StrOpt(
        'socket_group',
        help="""
Group that the socket is given to, by name.

Set it to the group that QEMU runs as (``libvirt-qemu`` or ``kvm`` on Debian
and Ubuntu, ``qemu`` on others), so that nobody else can ask for verdicts. The
worker has to be a member of the group, or root. When this is not set the
socket has the group of the worker.
"""),
    cfg.Opt(
        'socket_mode',
        type=types.String(regex=r'^0?[0-7]{3}$'),
        default='0660',
        help="""
Permissions of the socket, octal.

Whoever may write to the socket may use up the worker's time and write session
records into the journal, so leave others out.
"""),
    cfg.StrOpt(
        'user',
        default='virtav',
        help="""
User that the worker becomes when it is started as root, once it has made its
sockets and directories.

It has the groups of that user, and that of ``socket_group``. Name one that
nothing else runs as. Started as anybody else the worker stays who it is. Set
to ``root`` the worker stays root, and has no capability left; that is for
trying it where its program is for root only.
"""),
    cfg.ListOpt(
        'peer_users',
        default=['libvirt-qemu', 'qemu', 'nova', 'root'],
        help="""
Users that may connect to ``socket``, by name or number, as the kernel tells
them. Connections of others are refused.

The worker's own user may always. Names of users that do not exist are passed
over. What runs as one of these users still has to show the token of the
instance that it speaks for; see ``require_token``.
"""),
    cfg.StrOpt(
        'instances_dir',
        default='/var/lib/virtav-instances',
        help="""
Directory of the registrations of instances.

Whoever starts instances, as Nova does, puts two files there for each:
``UUID.json`` with the token and the project for the worker, and ``UUID.token``
for QEMU. The directory has to belong to that user or to root, and nobody else
may be able to write to it; the worker has to be able to read it.
"""),
    cfg.BoolOpt(
        'require_token',
        default=True,
        help="""
Whether a QEMU has to show the token of the instance that it speaks for.

With this off, whoever is one of ``peer_users`` may speak for any instance: use
up its budget, and write records into the alert journal in its name. It is for
instances that were started by hand, without a registration.
"""),
    cfg.StrOpt(
        'status_socket',
        default='/run/virtav/status.sock',
        help="""
Path of the UNIX socket that ``virtav-status`` asks. Empty for none.

It belongs to the worker's user and group, with mode 0660: who may ask may
also have the rules loaded anew. At most 107 bytes.
"""),
    cfg.Opt(
        'metrics',
        type=Address(),
        default='',
        help="""
Where Prometheus finds the worker's metrics, at ``/metrics``: HOST:PORT with a
loopback address (``127.0.0.1:9109``, ``[::1]:9109``), or ``unix:PATH``. Empty
for nowhere, which is the default: a port on loopback can be asked by every
user of the host, and the figures tell how busy the instances are.

Metrics have no names of instances; ``virtav-status`` tells of each. The socket
at PATH has mode 0660 and belongs to the worker's user and group.
"""),
    cfg.StrOpt(
        'state_dir',
        default='/var/lib/virtav',
        help="""
Directory of what outlives the worker, such as the alert journal.
"""),
    cfg.StrOpt(
        'journal_path',
        default='$state_dir/alerts/journal.jsonl',
        help="""
The alert journal: one JSON object a line, for every match and for the begin
and end of every session.

Every record is handed to the kernel at once and is on the disk at most 100 ms
later. When the disk is full or broken, scanning goes on and the records that
are lost are counted in the log. A crash of the host can leave a broken line;
readers skip what is not JSON.
"""),
    cfg.IntOpt(
        'journal_max_mib',
        default=64,
        min=1,
        help="""
Size of the alert journal in MiB at which it is renamed to ``.1`` and begun
anew.
"""),
    cfg.IntOpt(
        'journal_keep',
        default=8,
        min=1,
        help="""
How many older files of the alert journal are kept. The journal takes at most
``journal_max_mib`` times one more than this on the disk.
"""),
    cfg.StrOpt(
        'rules_dir',
        default='$state_dir/rules/current',
        help="""
Directory of the rules. All ``*.yar`` and ``*.yara`` files in it and below it
are in force together; names that start with a dot are passed over.

By default it is the rule set that ``virtav-rules import`` has brought into
force. Another directory is taken as it is: nobody has then tried whether its
rules can hold on a page, what they cost, and whether they raise false alarms.
Links inside the directory and ``include`` statements are refused. A broken
rule keeps the worker from starting: try a new set with ``virtav-scan-worker
--check`` first. A worker that runs reads them anew on SIGHUP; when the new set
cannot be had, the one before stays in force. Only those who may decide what
runs in all instances should be able to write here.
"""),
    cfg.StrOpt(
        'engine',
        default='twostage',
        help="""
What scans the pages: a name from the entry points ``virtav.engines``.

``twostage`` looks for strings of all rules at once and has libyara evaluate
the few rules that may hold. It gives what ``yara`` gives, which evaluates all
rules for every page and takes many times as long. ``clamav`` asks clamd, which
has signatures of its own and no use for the rules; it sees less in a page than
in a file. ``noop`` finds nothing, and is for measuring.
"""),
    cfg.StrOpt(
        'clamd_socket',
        default='/run/clamav/clamd.ctl',
        help="""
Path of the UNIX socket of clamd, for the engine ``clamav``. The worker's user
has to be able to connect to it.
"""),
    cfg.IntOpt(
        'rules_memory_mib',
        default=4096,
        min=64,
        help="""
Memory in MiB that compiling the rules may take at most, address space counted.

Rules are compiled in a process of their own, which ends when it wants more:
the rules before stay in force then, or the worker does not start. What the
compiled rules take after that is less, and is shared by all scan processes.
"""),
    cfg.FloatOpt(
        'load_timeout',
        default=300,
        min=1,
        max=3600,
        help="""
Seconds that loading the rules may take at most. The rules before stay in force
when it takes longer, or the worker does not start.
"""),
    cfg.FloatOpt(
        'reload_rate',
        default=5,
        min=0.01,
        max=10000,
        help="""
Instances moved to new rules in a second, after these have been loaded.

An instance that is moved has all pages looked at anew that it executes. With a
higher rate all guests of the host do so at the same time, and wait for each
other; with a lower one the old rules stay in use, and in memory, for longer.
New connections have the new rules at once.
"""),
    cfg.IntOpt(
        'blame_after',
        default=3,
        min=1,
        max=1000,
        help="""
Scan processes that a rule may cost, by scans that take too long or crash,
before it is put into quarantine: the rules are loaded anew without it, and
stay without it until its entry is taken out of ``quarantine.json`` in
``state_dir``. What is in quarantine is part of the rule-set digest.
"""),
    cfg.IntOpt(
        'processes',
        default=0,
        min=0,
        max=1024,
        help="""
Number of scan processes; 0 for one on each processor that the worker may use.

Each session belongs to one of them. A scan process that dies or hangs is
replaced; its sessions lose their connection and QEMU connects again.
"""),
    cfg.IntOpt(
        'scan_timeout_ms',
        default=500,
        min=10,
        max=60000,
        help="""
Longest scan of one page in ms.

A scan that takes longer ends with its process, and from then on this page is
answered as *unknown* without another try; QEMU does with it what on-timeout
says. Keep it well below the deadline of the instances (``deadline-ms``, 1000
by default), because a page that comes after the slow one waits for it.
"""),
    cfg.IntOpt(
        'busy_poll_us',
        default=5000,
        min=0,
        max=10000,
        help="""
How long a scan process looks for the next page before it sleeps, in µs.

A guest that starts programs fetches new pages in bursts, and to wake a
sleeping process takes longer than to scan a page. This shortens the holds at
the price of processor time of the host: at most this much after each verdict
while pages come one soon after the other, and a tenth of it otherwise. Set it
to 0 where the host has none to spare.
"""),
    cfg.IntOpt(
        'budget_percent',
        default=25,
        min=1,
        max=100,
        help="""
Percent of one processor that an instance may have for its scans while other
instances of the same scan process want theirs.

What an instance does not use it may use later, up to one second of scan time,
so that a boot is not slowed down. Beyond that it waits while others are
served, and is served when nobody else is waiting.
"""),
    cfg.IntOpt(
        'cache_mib',
        default=32,
        min=1,
        max=65536,
        help="""
Memory in MiB that each scan process has at most for the results of scans, so
that no page is scanned twice. It takes 256 bytes for a clean page, and more
for one with a part of a rule.
"""),
    cfg.IntOpt(
        'max_sessions',
        default=256,
        min=1,
        max=65536,
        help="""
Most connections at a time; others are refused as overload. Each watched
instance holds one, and a second one for a moment when it migrates to this
host.
"""),
    cfg.IntOpt(
        'max_in_flight',
        default=64,
        min=1,
        max=4096,
        help="""
Most pages that one instance may have waiting for a verdict.

A session that sends more is closed: a well-behaved QEMU never does. Bounds
the worker's memory: 5.2 KiB for each page that really waits.
"""),
    cfg.Opt(
        'table_entries',
        type=PowerOfTwo(*wire.TABLE_ENTRIES),
        default=1 << 20,
        help="""
Clean pages that the verdict table holds: a power of two, or 0 for no table.

The table is memory of the worker that each QEMU can read. A page that is in
it, because it was scanned before for whatever instance, runs without asking
the worker. It takes 16 bytes an entry, once for the host.

How long a page takes to run the first time tells a guest whether the same
has run on this host before. Where that must not be known, see ``table_scope``.
"""),
    cfg.StrOpt(
        'table_scope',
        default='node',
        choices=[
            ('node', 'All instances of the host share what is learnt.'),
            ('project', 'Only instances of one project do.')],
        help="""
Who shares what is learnt of pages: the verdict table, the results that scan
processes remember, and the key that both are kept under.

With ``project`` an instance cannot find out by the time that a page takes
what instances of other projects have run. Each project then has a table of
its own, as long as one of its instances is connected, so that up to 16 times
``table_entries`` bytes are taken for each; and pages are scanned once for
each. Instances whose project is not known share one.
"""),
    cfg.Opt(
        'ring_slots',
        type=PowerOfTwo(*wire.RING_SLOTS),
        default=64,
        help="""
Pages that the shared memory of a session has room for: a power of two, or 0
for no shared memory.

Pages and verdicts go through this memory in less time than through the
socket. It takes 5.5 KiB for each page of each session, so at most
``max_sessions`` times ``ring_slots`` times that (89 MiB by default), and
another open file for each session. Where it cannot be had, or QEMU does not
take it, the session uses the socket. Fewer pages than this wait at a time,
whatever ``max_in_flight`` says.
"""),
    cfg.FloatOpt(
        'handshake_timeout',
        default=5,
        min=0.1,
        max=60,
        help="""
Seconds within which a new connection has to have said who it is.
"""),
    cfg.FloatOpt(
        'drain_timeout',
        default=10,
        min=0.1,
        max=600,
        help="""
Seconds that the worker, told to stop by SIGTERM or SIGINT, takes at most for
answering what it has received. A second signal ends it at once.
"""),
    cfg.BoolOpt(
        'accumulate',
        default=True,
        help="""
Whether rules are found whose strings lie on several pages.

The worker then remembers, for each address space of each instance, the pages
on which there is a part of such a rule. When the parts may come to a match, it
reads the memory of the process through the page tables of the guest and
evaluates the rule over it: this is the *deep scan*. With this off a rule has
to hold within one page, or across the boundary of two. Engines other than
``twostage`` do not know parts of rules, so that this changes nothing.
"""),
    cfg.IntOpt(
        'accumulate_wait_ms',
        default=200,
        min=0,
        max=60000,
        help="""
Longest time in ms that the verdict of a fetch waits for a deep scan.

A fetch waits only when with its page all is there that a rule needs. If the
deep scan takes longer, the verdict is what the remembered pages say, and the
deep scan goes on: it may still raise an alert, but cannot keep the page from
running. Keep it well below the deadline of the instances (``deadline-ms``,
1000 by default).
"""),
    cfg.FloatOpt(
        'accumulate_rate',
        default=10,
        min=1,
        max=1000,
        help="""
Deep scans of one instance in a second: so many for fetches that do not wait,
and so many for those that wait because the rest of a rule was seen in another
address space, of which the page may be a part, too. Where it was seen in the
same address space there is no limit but ``max_in_flight``: the guest's own
time is spent. A deep scan takes up to 50 ms of a processor of the host, in
small steps between which others are served.
"""),
    cfg.IntOpt(
        'accumulate_deep_pages',
        default=256,
        min=0,
        max=65536,
        help="""
Pages that a deep scan reads at most beside those that are remembered: the
nearest ones to them that are mapped. So a rule is found though some of its
strings lie in data that is never executed.
"""),
    cfg.IntOpt(
        'accumulate_fresh_ms',
        default=2000,
        min=0,
        max=600000,
        help="""
For how many ms a remembered page counts by itself.

Where a deep scan cannot tell whether it is still there (QEMU was started with
``deep-scan=off``, or the deep scan takes too long) a rule is evaluated over
the remembered pages of this age at most. An address space that ended within
that time and one that was made in its place may then be taken for one.
"""),
    cfg.IntOpt(
        'accumulate_pages',
        default=64,
        min=2,
        max=4096,
        help="""
Pages that are remembered of one address space; the one that was fetched
longest ago is forgotten first.
"""),
    cfg.IntOpt(
        'accumulate_rules',
        default=1000,
        min=1,
        help="""
Rules of which parts are remembered in one address space.
"""),
    cfg.IntOpt(
        'accumulate_spaces',
        default=1024,
        min=1,
        help="""
Address spaces that a scan process remembers pages of, over all instances; the
one that was heard of longest ago is forgotten first.
"""),
    cfg.IntOpt(
        'accumulate_mib',
        default=16,
        min=1,
        help="""
Memory in MiB that remembered pages take of each scan process at most. A page
takes about 6 KiB.
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
