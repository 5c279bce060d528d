# SPDX-License-Identifier: Apache-2.0
"""Records of the alert journal.

A match record is begun in the scan process, which knows the page, and
completed in the main process, which knows the session. The scan process is
not trusted with more than its own part: it works on hostile data.
"""

import collections.abc
import datetime
import typing

from virtav_nova import text
from virtav_nova.engines import base
from virtav_nova.monitor import wire
from virtav_nova.rules import meta as rules_meta

Record: typing.TypeAlias = dict[str, typing.Any]

#: Records made for one page; more rules than that are only counted.
MATCHES_MAX = 16
_NAME_MAX = 128
_META_MAX = 16
_VALUE_MAX = 256
_TAGS_MAX = 16
_STRINGS_MAX = 32
_PAGES_MAX = 64
_EXCERPT = 256

#: What is counted of a session; ``distinct`` by page tag.
COUNTS = ('fetches', 'distinct', 'matches', 'unknown', 'dropped')

_DETAILS = (
    'rule', 'rule_author', 'rule_licence', 'rule_reference', 'severity',
    'mitre', 'tags', 'meta', 'namespace', 'form', 'start', 'pages', 'strings',
    'rules_matched', 'repeats', 'block', 'offset', 'gpa', 'gva', 'rip', 'cr3',
    'cpl', 'vcpu', 'tag', 'bytes', 'held', 'resent')


class Finding(typing.NamedTuple):
    """A match, and what it was found in.

    :param form: ``page``, ``junction`` or ``accumulated``.
    :param start: guest virtual address of the first byte of what was
        scanned; offsets of strings are from there.
    :param data: what was scanned; of several pages the one that was fetched.
    :param pages: for ``accumulated``: ``gva`` and ``gpa`` of each page that
        a string was found on.
    """

    form: str
    match: base.Match
    start: int
    data: bytes | memoryview
    pages: collections.abc.Sequence[Record] = ()


def now() -> str:
    """:returns: the time, ISO 8601 in UTC with µs."""
    return datetime.datetime.now(datetime.UTC).isoformat(
        timespec='microseconds')


def details(request: wire.Request, findings: list[Finding]
            ) -> collections.abc.Iterator[Record]:
    """Say what was found, in the scan process.

    :param request: with its page.
    :param findings: at least one.
    :returns: for each of the first findings, the parts of its record that
        the scan process knows, everything bounded.
    """
    gpa = None if request.gpa == wire.UNKNOWN_GPA else request.gpa
    for finding in findings[:MATCHES_MAX]:
        match = finding.match
        said = rules_meta.describe(match.meta, match.tags)
        meta = {
            text.printable(name, _NAME_MAX): _bounded(value)
            for name, value in list(match.meta.items())[:_META_MAX]}
        yield {
            'time': now(),
            'rule': text.printable(match.rule, _NAME_MAX),
            'rule_author': said['author'],
            'rule_licence': said['licence'],
            'rule_reference': said['reference'],
            'severity': said['severity'],
            'mitre': said['mitre'],
            'tags': [text.printable(tag, _NAME_MAX)
                     for tag in match.tags[:_TAGS_MAX]],
            'meta': meta,
            'namespace': text.printable(match.namespace, _VALUE_MAX),
            'form': finding.form,
            'start': finding.start,
            'pages': list(finding.pages[:_PAGES_MAX]),
            'strings': [
                {'identifier': text.printable(identifier, _NAME_MAX),
                 'offset': offset}
                for identifier, offset in match.strings[:_STRINGS_MAX]],
            'rules_matched': len(findings),
            'block': text.printable(request.block, _VALUE_MAX),
            'offset': request.offset,
            'gpa': gpa,
            'gva': request.gva,
            'rip': request.rip,
            'cr3': request.cr3,
            'cpl': request.cpl,
            'vcpu': request.vcpu,
            'tag': request.tag.hex(),
            'bytes': _excerpt(finding.data, match.strings),
            'held': bool(request.flags & wire.HOLD),
            'resent': bool(request.flags & wire.RESENT),
        }


def match(hello: wire.Hello, digest: bytes, known: Record) -> Record:
    """Complete a match record, in the main process.

    :param hello: of the session.
    :param digest: of the rule set.
    :param known: from :func:`details`, as the scan process sent it.
    """
    return {
        'type': 'match',
        'time': known.get('time'),
        'instance': str(hello.instance),
        **{name: known.get(name) for name in _DETAILS},
        'digest': digest.hex(),
        'policy': hello.policy.name.lower(),
        'on_match': hello.on_match.name.lower(),
    }


def session(event: str, hello: wire.Hello, digest: bytes,
            reason: str | None = None, counts: Record | None = None
            ) -> Record:
    """Make the record of a session's begin or end.

    :param event: ``opened`` or ``closed``.
    :param reason: why it was closed.
    :param counts: of the session; None when its scan process took them to
        the grave.
    """
    counts = counts or {}
    return {
        'type': 'session',
        'time': now(),
        'instance': str(hello.instance),
        'event': event,
        'reason': reason and text.printable(reason, _VALUE_MAX),
        **{name: _count(counts.get(name)) for name in COUNTS},
        'digest': digest.hex(),
    }


def _bounded(value: object) -> str | int | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and -1 << 63 <= value < 1 << 64:
        return value
    return text.printable(str(value), _VALUE_MAX)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _excerpt(data: bytes | memoryview, strings: list[tuple[str, int]]) -> str:
    """:returns: the bytes round the first string found, as hex."""
    first = min((offset for _, offset in strings), default=0)
    start = max(0, min(first - _EXCERPT // 4, len(data) - _EXCERPT))
    return bytes(data[start:start + _EXCERPT]).hex()
