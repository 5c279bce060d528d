# SPDX-License-Identifier: Apache-2.0
"""What rules say about themselves, in one spelling.

There is no standard for the ``meta`` section: each repository has names of
its own for the author or the severity. What is found here goes into alerts,
so it is bounded, and fit to be printed.
"""

import collections.abc
import re
import typing

from virtav_nova import text

_TEXT_MAX = 256
_LIST_MAX = 8

#: Names of the keys, without signs, in the order of preference.
_AUTHOR = ('author', 'authors', 'ruleauthor', 'createdby', 'creator',
           'writtenby', 'maintainer', 'sourceauthor')
_LICENCE = ('license', 'licence', 'licenseid', 'licensename', 'spdx')
_REFERENCE = ('reference', 'references', 'ref', 'refs', 'url', 'urls', 'link',
              'links', 'source', 'sourceurl', 'report', 'blog', 'permalink')
_SEVERITY = ('severity', 'criticality', 'threatlevel', 'risklevel', 'risk',
             'level', 'priority', 'impact', 'score', 'threatscore', 'weight')
_MITRE = re.compile(r'mitre|attack|attck|technique|tactic|ttp', re.ASCII)
#: Technique, with sub-technique as in T1059.003, or in the URL of one.
_TECHNIQUE = re.compile(r'(?<![A-Za-z0-9])T(\d{4})(?:[./_](\d{3}))?(?!\d)',
                        re.IGNORECASE | re.ASCII)
#: Tactic, software, or group of ATT&CK.
_OTHER = re.compile(r'(?<![A-Za-z0-9])(?:TA|S|G)\d{4}(?!\d)', re.ASCII)

_WORDS = {
    'critical': ('critical', 'severe', 'very high', 'veryhigh', 'emergency',
                 'extreme', 'fatal'),
    'high': ('high', 'major', 'important', 'malicious', 'red'),
    'medium': ('medium', 'moderate', 'med', 'mid', 'average', 'suspicious',
               'amber', 'orange', 'yellow'),
    'low': ('low', 'minor', 'green'),
    'info': ('info', 'informational', 'information', 'none', 'notice',
             'white', 'test', 'clean'),
}
_LEVELS = {word: level for level, words in _WORDS.items() for word in words}
#: Least score out of 100 of each level.
_SCORES = ((90, 'critical'), (70, 'high'), (40, 'medium'), (10, 'low'),
           (0, 'info'))


class Description(typing.TypedDict):
    """What a rule says about itself; None and [] where it does not.

    author, licence, reference: printable ASCII of at most 256 characters.
    severity: ``critical``, ``high``, ``medium``, ``low`` or ``info``.
    mitre: identifiers of ATT&CK, such as the technique ``T1059.003``.
    """

    author: str | None
    licence: str | None
    reference: str | None
    severity: str | None
    mitre: list[str]


def describe(meta: collections.abc.Mapping[str, typing.Any],
             tags: collections.abc.Iterable[str] = ()) -> Description:
    """Find what an alert should tell of a rule.

    :param meta: of the rule, as an engine gives it. Values may be lists.
    :param tags: of the rule.
    """
    known: dict[str, list[typing.Any]] = {}
    for key, value in meta.items():
        values = value if isinstance(value, list | tuple) else [value]
        name = re.sub('[^a-z]', '', str(key)[:_TEXT_MAX].lower())
        known.setdefault(name, []).extend(values)
    return {
        'author': _first(known, _AUTHOR),
        'licence': _first(known, _LICENCE),
        'reference': _first(known, _REFERENCE),
        'severity': _severity(known),
        'mitre': _mitre(known, tags),
    }


def _first(known: dict[str, list[typing.Any]],
           names: tuple[str, ...]) -> str | None:
    for name in names:
        values = [str(value).strip() for value in known.get(name, ())]
        values = [value for value in values if value]
        if values:
            return text.printable(', '.join(values[:_LIST_MAX]), _TEXT_MAX)
    return None


def _severity(known: dict[str, list[typing.Any]]) -> str | None:
    for name in _SEVERITY:
        for value in known.get(name, ()):
            level = _level(value)
            if level is not None:
                return level
    return None


def _level(value: typing.Any) -> str | None:
    word = str(value)[:_TEXT_MAX].strip().lower()
    if word in _LEVELS:
        return _LEVELS[word]
    match = re.fullmatch(
        r'(\d{1,3})(?:\.\d+)?\s*(?:/\s*(5|10|100)|%)?', word, re.ASCII)
    if match is None:
        return None
    number = int(match[1])
    # A scale is seldom named. Few give more than 5 or 10 points on a
    # scale that does not end there.
    most = int(match[2]) if match[2] else (
        100 if word.endswith('%') or number > 10 else
        10 if number > 5 else 5)
    score = number * 100 // most
    return next(level for least, level in _SCORES if score >= least)


def _mitre(known: dict[str, list[typing.Any]],
           tags: collections.abc.Iterable[str]) -> list[str]:
    named = [str(value) for name, values in known.items()
             if _MITRE.search(name) for value in values]
    named += [str(value) for name in _REFERENCE
              for value in known.get(name, ())
              if 'attack.mitre.org' in str(value)]
    found: dict[str, None] = {}
    for source in [*named, *tags]:
        for match in _TECHNIQUE.finditer(source[:4 * _TEXT_MAX]):
            found['.'.join(filter(None, (f'T{match[1]}', match[2])))] = None
    for source in named:
        for match in _OTHER.finditer(source[:4 * _TEXT_MAX]):
            found[match[0]] = None
    return list(found)[:_LIST_MAX]
