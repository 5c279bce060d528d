# SPDX-License-Identifier: Apache-2.0
"""Options of the scan worker."""

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
        default='/etc/virtav/rules',
        help="""
Directory of the rules. All ``*.yar`` and ``*.yara`` files in it and below it
are in force together; names that start with a dot are passed over.

Rules are read at start only: restart the worker after a change. Links inside
the directory and ``include`` statements are refused. A broken rule keeps the
worker from starting: try a new set with ``virtav-scan-worker --check`` first.
Only those who may decide what runs in all instances should be able to write
here.
"""),
    cfg.StrOpt(
        'engine',
        default='yara',
        help="""
What scans the pages: a name from the entry points ``virtav.engines``.
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
the worker's memory: 4.2 KiB for each page that really waits.
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
has run on this host before. Where that must not be known, set it to 0.
"""),
    cfg.Opt(
        'ring_slots',
        type=PowerOfTwo(*wire.RING_SLOTS),
        default=64,
        help="""
Pages that the shared memory of a session has room for: a power of two, or 0
for no shared memory.

Pages and verdicts go through this memory in less time than through the
socket. It takes 4.5 KiB for each page of each session, so at most
``max_sessions`` times ``ring_slots`` times that (73 MiB by default), and
another open file for each session. Where it cannot be had, or QEMU does not
take it, the session uses the socket. No more pages than this wait at a time,
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
