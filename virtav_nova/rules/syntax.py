# SPDX-License-Identifier: Apache-2.0
"""Rule sources taken apart: single rules, their strings and conditions.

A scanner of our own finds where rules begin and end; yaramod then parses
one rule at a time, so that a rule that only libyara understands costs
nothing but its own tree. yaramod opens included files and follows its trees
by recursion. Therefore it never sees an ``include``, nor anything that is
nested or chained beyond the limits below.

yaramod is C++: text of unknown origin is to be parsed in a process of its
own.
"""

import bisect
import collections.abc
import dataclasses
import functools
import re
import typing

import yaramod

from virtav_nova import exception
from virtav_nova.i18n import _

#: Characters of one source.
TEXT_MAX = 16 << 20
#: Levels of parentheses in a condition, or of groups in one string.
NESTING_MAX = 100
#: Tokens of a condition. One operator makes its tree one level deeper.
CONDITION_MAX = 4000
#: Characters that make a tree deeper, in a row or not, in one string.
STRING_MAX = 65536

#: What a source or a condition consists of, the group names its kind.
TOKEN = re.compile(
    r'''(?P<blank>[ \t\r\n]+|//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)
    |(?P<text>"(?:[^"\\\n]++|\\[^\n])*+")
    |(?P<regex>/(?:[^/*\\\n]|\\[^\n])(?:[^/\\\n]++|\\[^\n])*+/[a-zA-Z]*)
    |(?P<string>[$#@!][A-Za-z0-9_]*\*?)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*\*?)
    |(?P<number>[0-9][A-Za-z0-9_]*(?:\.[0-9]+)?)
    |(?P<broken>["/])
    |(?P<sign>.)''', re.VERBOSE | re.DOTALL)
_HEX = re.compile(
    r'\{(?:[^}/]++|//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)*+\}')
_COMMENT = re.compile(r'//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/')
_ERROR = re.compile(r'Error at (\d+)\.[\d.-]+: (.*)', re.DOTALL)
_UNKNOWN = re.compile(r"Unrecognized identifier '(\w+)' referenced")
_HEX_TOKEN = re.compile(r'~?[0-9a-fA-F?]{2}|\[[^\]]*\]|[()|]')
#: The usual alphabet.
BASE64 = (b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
          b'+/')
_SECTIONS = ('meta', 'variables', 'strings', 'condition')
#: What an external variable may be; its type stands nowhere in the rules.
_VALUES = ('""', '0', 'false')
_EXTERNALS_MAX = 4
_OPENING = re.compile(r'\\.|(\()|(\))', re.DOTALL)


class Definition(typing.NamedTuple):
    """A string as it stands in the source.

    :param identifier: with its ``$``, which is all of it where anonymous.
    :param text: the definition with its modifiers, without comments.
    """

    identifier: str
    text: str


class HexByte(typing.NamedTuple):
    """One byte of a hex string.

    :param mask: bits that count.
    :param inverted: any byte but this one.
    """

    value: int
    mask: int
    inverted: bool


class HexJump(typing.NamedTuple):
    """Any bytes, so many.

    :param high: None is without bound.
    """

    low: int
    high: int | None


class HexChoice(typing.NamedTuple):
    """One of several."""

    branches: 'tuple[tuple[HexUnit, ...], ...]'


HexUnit = HexByte | HexJump | HexChoice


class Modifiers(typing.NamedTuple):
    """What is done to a string before it is looked for.

    :param ascii: as it stands; libyara takes it so unless ``wide`` alone
        is said.
    :param wide: with a zero after each byte. What follows is done to the
        one and the other form, and leaves neither as it was.
    :param nocase: of a regular expression also its ``i``.
    :param dotall: the ``s`` of a regular expression.
    :param xor: lowest and highest key.
    :param base64: alphabet of 64 bytes.
    :param base64wide: alphabet; what comes out is then made wide.
    """

    ascii: bool
    wide: bool
    nocase: bool
    fullword: bool
    dotall: bool
    xor: tuple[int, int] | None
    base64: bytes | None
    base64wide: bytes | None


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """One rule of a source.

    Strings, condition and all parts of them live as long as the rule: who
    touches them later crashes the process.

    :ivar line: where it begins.
    :ivar text: as it stands in the source, from its modifiers to its brace.
    :ivar head: ``text`` up to the brace that opens it, and including it.
    :ivar meta_text: its section with the keyword; may be empty.
    :ivar definitions: its strings in order, as they stand in the source.
    :ivar condition_text: without the keyword.
    :ivar modules: names of the modules that it uses.
    :ivar references: names of the rules before it that it refers to.
    :ivar metas: the last value of each key.
    :ivar externals: identifiers that nothing here defines.
    :ivar unparsed: why there is no tree, or empty. Such a rule may still
        mean something to libyara: what is decided by the tree has to be
        decided as if nothing were known of the rule.
    :ivar strings: parsed, as many as ``definitions``.
    :ivar condition: parsed; None where ``unparsed``.
    """

    name: str
    line: int
    text: str
    head: str
    meta_text: str
    definitions: tuple[Definition, ...]
    condition_text: str
    modules: tuple[str, ...]
    references: tuple[str, ...]
    is_private: bool
    is_global: bool
    tags: tuple[str, ...]
    metas: dict[str, str | int | bool]
    externals: tuple[str, ...] = ()
    unparsed: str = ''
    strings: tuple[yaramod.String, ...] = ()
    condition: yaramod.Expression | None = None
    _tree: yaramod.YaraFile | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One file of rules, which is one namespace.

    :ivar imports: names of the modules, in order.
    """

    name: str
    imports: tuple[str, ...]
    rules: tuple[Rule, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Rule]:
        """The rules by their names."""
        return {rule.name: rule for rule in self.rules}

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {rule.name: place for place, rule in enumerate(self.rules)}

    @functools.cached_property
    def _globals(self) -> tuple[str, ...]:
        return tuple(rule.name for rule in self.rules if rule.is_global)

    def needed(self, rule: Rule) -> list[Rule]:
        """Find the rules without which one does not mean the same.

        :returns: what it refers to, directly or not, and the global rules
            of the file, without the rule itself, in the order of the file.
        """
        names: set[str] = set()
        todo = [*rule.references, *self._globals]
        while todo:
            name = todo.pop()
            if name not in names:
                names.add(name)
                todo += self.by_name[name].references
        names.discard(rule.name)
        return [self.by_name[name]
                for name in sorted(names, key=self._places.__getitem__)]

    def standalone(self, rule: Rule) -> str:
        """Make a source that holds one rule and what it needs.

        :returns: the other rules are private there, so that a match is one
            of the rule.
        """
        parts = []
        rules = [*self.needed(rule), rule]
        rules.sort(key=lambda each: self._places[each.name])
        modules = {name for each in rules for name in each.modules}
        parts += [f'import "{name}"\n'
                  for name in self.imports if name in modules]
        for each in rules:
            if each is not rule and not each.is_private:
                parts.append('private ')
            parts += (each.text, '\n')
        return ''.join(parts)


class _Token(typing.NamedTuple):
    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def parse(text: str, name: str) -> Source:
    """Take a source apart.

    :param text: the whole file.
    :param name: of the file, for messages.
    :raises RuleError: when it is not a list of rules, or holds an
        ``include``. A rule whose inside cannot be understood is no error:
        see :attr:`Rule.unparsed`.
    """
    return _Parser(text, name).source()


def hex_units(string: yaramod.HexString) -> tuple[HexUnit, ...]:
    """Give the units of a hex string, which yaramod keeps to itself.

    :raises ValueError: when it is written in a way that is unknown here.
    """
    words = _HEX_TOKEN.findall(string.pure_text.decode())
    words.reverse()
    branches = _hex_branches(words)
    if words or len(branches) != 1:
        raise ValueError('unbalanced hex string')
    return branches[0]


def modifiers(string: yaramod.String) -> Modifiers:
    """Give the modifiers of a string with their arguments."""
    text = string.modifiers_text
    dialect = (string.suffix_modifiers
               if isinstance(string, yaramod.Regexp) else '')
    keys = re.search(r'\bxor(?:\((\w+)(?:-(\w+))?\))?', text)
    xor = None
    if string.is_xor and keys:
        low = int(keys[1] or '0', 0)
        xor = (low, int(keys[2] or keys[1] or '255', 0))
    alphabet = BASE64
    given = re.search(r'\bbase64(?:wide)?\("((?:[^"\\]|\\.)*)"', text)
    if given:
        alphabet = _unescaped(given[1])
    return Modifiers(
        ascii=string.is_ascii or not string.is_wide,
        wide=string.is_wide,
        nocase=string.is_nocase or 'i' in dialect,
        fullword=string.is_fullword,
        dotall='s' in dialect,
        xor=xor,
        base64=alphabet if string.is_base64 else None,
        base64wide=alphabet if string.is_base64_wide else None)


def integer(literal: yaramod.IntLiteralExpression) -> int:
    """Give the number that libyara reads there.

    yaramod takes KB and MB for powers of ten.
    """
    return _number(literal.text)


def operands(expression: yaramod.AndExpression | yaramod.OrExpression
             ) -> list[yaramod.Expression]:
    """Give the terms of a chain of one operator, from left to right.

    The tree of a chain is as deep as it is long.
    """
    kind = type(expression)
    found: list[yaramod.Expression] = []
    todo: list[yaramod.Expression] = [expression]
    while todo:
        each = todo.pop()
        if isinstance(each, kind):
            todo += (each.left_operand, each.right_operand)
        else:
            found.append(each)
    found.reverse()
    return found


def members(rule: Rule, iterable: yaramod.Expression) -> list[int] | None:
    """Give the strings that a set means.

    :returns: indexes in the rule's strings; one that is named twice stands
        there twice, as libyara counts it. None where it is no set of
        strings.
    """
    identifiers = [string.identifier for string in rule.strings]
    if isinstance(iterable, yaramod.ThemExpression):
        return list(range(len(identifiers)))
    if not isinstance(iterable, (yaramod.SetExpression,
                                 yaramod.IterableExpression)):
        return None
    found = []
    for each in iterable.elements:
        if isinstance(each, yaramod.StringExpression):
            found.append(identifiers.index(each.id))
        elif isinstance(each, yaramod.StringWildcardExpression):
            found += [index for index, name in enumerate(identifiers)
                      if name.startswith(each.id[:-1])]
        else:
            return None
    return found


def quorum(quantifier: yaramod.Expression, size: int) -> int | None:
    """Give how many of a set there must be.

    :param size: of the set.
    :returns: 0 for ``none``, which means exactly none; None where it
        depends on what is scanned.
    """
    match quantifier:
        case yaramod.AllExpression():
            return size
        case yaramod.AnyExpression():
            return 1
        case yaramod.NoneExpression():
            return 0
        case yaramod.IntLiteralExpression():
            return integer(quantifier)
        case yaramod.PercentualExpression(
                operand=yaramod.IntLiteralExpression() as share):
            return -(-size * integer(share) // 100)
    return None


class _Parser:

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name
        self._newlines = [match.start()
                          for match in re.finditer('\n', text[:TEXT_MAX])]

    def source(self) -> Source:
        self._check()
        imports: dict[str, None] = {}
        rules: dict[str, Rule] = {}
        head: list[_Token] = []
        tokens = self._tokens()
        for token in tokens:
            if token.text in ('private', 'global'):
                head.append(token)
            elif token.text == 'rule':
                head.append(token)
                rule = self._rule(head, tokens, imports, rules)
                if rule.name in rules:
                    raise self._error(
                        token.start, _('a second rule %s') % rule.name,
                        _('rename one of them'))
                rules[rule.name] = rule
                head = []
            elif token.text == 'import' and not head:
                module = next(tokens, None)
                if module is None or module.kind != 'text':
                    raise self._unexpected(module or token)
                imports[module.text[1:-1]] = None
            elif token.text == 'include':
                raise self._include(token)
            else:
                raise self._unexpected(token)
        if head:
            raise self._unexpected(head[-1])
        return Source(self._name, tuple(imports), tuple(rules.values()))

    def _check(self) -> None:
        if len(self._text) > TEXT_MAX:
            raise exception.RuleError(
                _('%(path)s: more than %(limit)d MiB of rules') % {
                    'path': self._name, 'limit': TEXT_MAX >> 20},
                _('split the file'))
        end = self._text.find('\0')
        if end >= 0:
            raise self._error(
                end, _('holds a NUL character'),
                _('give rules as text; compiled rules are refused'))
        try:
            self._text.encode()
        except UnicodeEncodeError as error:
            raise self._error(
                error.start, _('not UTF-8'),
                _('convert the file to UTF-8')) from error

    def _tokens(self) -> collections.abc.Iterator[_Token]:
        position = 0
        if self._text.startswith('\ufeff'):
            position = 1
        last = ''
        while position < len(self._text):
            match = TOKEN.match(self._text, position)
            kind = 'sign'
            # A brace after "=" opens a hex string, any other one a rule.
            if last == '=' and self._text[position] == '{':
                match = _HEX.match(self._text, position)
                kind = 'hex'
            if match is None:
                raise self._unended(position)
            kind = match.lastgroup or kind
            if kind == 'broken':
                raise self._unended(position)
            position = match.end()
            if kind != 'blank':
                last = match[0]
                yield _Token(kind, last, match.start())

    def _rule(self, head: list[_Token],
              tokens: collections.abc.Iterator[_Token],
              imports: dict[str, None], before: dict[str, Rule]) -> Rule:
        """Read on to the end of a rule.

        :param head: the words up to ``rule``.
        :param tokens: what follows.
        :param imports: modules that are known here.
        :param before: rules that it may refer to.
        """
        name = next(tokens, None)
        if name is None or name.kind != 'word':
            raise self._unexpected(name or head[-1])
        tags = []
        last = name
        for last in tokens:
            if last.text == '{':
                break
            if last.kind == 'word':
                tags.append(last.text)
            elif last.text != ':' or tags:
                raise self._unexpected(last)
        opening = last
        section = ''
        sections: dict[str, list[_Token]] = {}
        for token in tokens:
            if token.text == '}':
                break
            # Three words are keywords, so they stand nowhere else.
            if token.kind == 'word' and token.text in _SECTIONS and (
                    token.text not in sections):
                section = token.text
                sections[section] = []
            elif not section:
                raise self._unexpected(token)
            elif token.text == 'include':
                raise self._include(token)
            sections[section].append(token)
        else:
            raise self._error(name.start,
                              _('rule %s has no end') % name.text,
                              _('close it with a brace'))
        # Keyword and colon come first.
        condition = sections.get('condition', [])[2:]
        words = [each.text for each in condition if each.kind == 'word']
        start, end = head[0].start, token.end
        meta = sections.get('meta')
        rule = Rule(
            name=name.text,
            line=self._line(start),
            text=self._text[start:end],
            head=self._text[start:opening.end],
            meta_text=(self._text[meta[0].start:meta[-1].end]
                       if meta else ''),
            definitions=tuple(_definitions(sections.get('strings', []))),
            condition_text=(
                self._text[condition[0].start:condition[-1].end]
                if condition else ''),
            modules=tuple(each for each in imports if each in words),
            references=tuple(_references(words, before)),
            is_private=any(each.text == 'private' for each in head),
            is_global=any(each.text == 'global' for each in head),
            tags=tuple(tags),
            metas=dict(_metas(meta or [])))
        body = [token for part in ('variables', 'strings', 'condition')
                for token in sections.get(part, ())]
        problem = _excess(condition, body)
        if problem:
            return dataclasses.replace(rule, unparsed=problem)
        return self._tree(rule, body)

    def _tree(self, rule: Rule, body: list[_Token]) -> Rule:
        """Have a rule parsed by yaramod.

        :param body: what stands between the rule's braces, but for the
            meta section.
        """
        # Comments are left out: what hides in one is no business of
        # another scanner. The lines stay.
        lines = self._line(body[0].start) if body else rule.line
        parts = []
        position = body[0].start if body else 0
        for token in body:
            gap = self._text[position:token.start]
            text = token.text
            if token.kind == 'hex':
                text = _COMMENT.sub(_blank, text)
            elif token.kind == 'word' and text[-1] == '*':
                # yaramod takes a set of nothing but this for a product.
                text = ', '.join(name for name in rule.references
                                 if name.startswith(text[:-1])) or text
            parts.append(_COMMENT.sub(_blank, gap) + text)
            position = token.end
        at = next((index for index, token in enumerate(body)
                   if token.text in ('strings', 'condition')), 0)
        before, after = ''.join(parts[:at]), ''.join(parts[at:])
        if re.search(r'\binclude\s*"', before + after):
            return dataclasses.replace(
                rule, unparsed=_('a string looks like an include'))
        prefix = ''.join(
            [f'import "{name}" ' for name in rule.modules]
            + [f'rule {name} {{ condition: true }} '
               for name in rule.references])
        externals: dict[str, int] = {}
        first = ''
        while True:
            variables = ''.join(
                f'{name} = {_VALUES[index]} '
                for name, index in externals.items())
            if variables:
                variables = f' variables: {variables} '
            source = (f'{prefix}rule {rule.name} {{ '
                      f'{before}{variables}{after} }}')
            try:
                parsed = _yaramod().parse_string(source)
                return _filled(rule, parsed, tuple(externals))
            except Exception as error:  # what C++ throws has no one base
                line, problem = _problem(error)
                first = first or _('line %(line)d: %(problem)s') % {
                    'line': lines + line - 1, 'problem': problem}
                unknown = _UNKNOWN.match(problem)
                if (unknown and unknown[1] not in externals
                        and len(externals) < _EXTERNALS_MAX):
                    externals[unknown[1]] = 0
                elif not _next(externals):
                    return dataclasses.replace(rule, unparsed=first)

    def _line(self, offset: int) -> int:
        return bisect.bisect_left(self._newlines, offset) + 1

    def _error(self, offset: int, message: str,
               way_out: str) -> exception.RuleError:
        return exception.RuleError(
            f'{self._name}:{self._line(offset)}: {message}', way_out)

    def _unexpected(self, token: _Token) -> exception.RuleError:
        return self._error(
            token.start, _('unexpected %r') % token.text[:40],
            _('mend the rule or take it out'))

    def _include(self, token: _Token) -> exception.RuleError:
        return self._error(
            token.start,
            _('include is refused: it would read files of this host'),
            _('put the rules of that file here'))

    def _unended(self, offset: int) -> exception.RuleError:
        return self._error(
            offset, _('string, regular expression or comment has no end'),
            _('close it on its line'))


@functools.cache
def _yaramod() -> yaramod.Yaramod:
    # Made once: it takes 15 ms.
    return yaramod.Yaramod(yaramod.Features.AllCurrent)


def _metas(section: list[_Token]
           ) -> collections.abc.Iterator[tuple[str, str | int | bool]]:
    # yaramod stumbles over negative numbers.
    key = ''
    sign = 1
    for token in section[2:]:
        if token.kind == 'word' and token.text in ('true', 'false'):
            yield key, token.text == 'true'
        elif token.kind == 'word':
            key, sign = token.text, 1
        elif token.text == '-':
            sign = -1
        elif token.kind == 'text':
            yield key, _unescaped(token.text[1:-1]).decode(
                errors='replace')
        elif token.kind == 'number':
            try:
                yield key, sign * _number(token.text)
            except ValueError:
                continue


def _number(text: str) -> int:
    for suffix, factor in (('KB', 1 << 10), ('MB', 1 << 20)):
        if text.endswith(suffix):
            return int(text[:-2]) * factor
    # A leading zero alone means nothing.
    return int(text, 0 if text[:2] in ('0x', '0o') else 10)


def _definitions(section: list[_Token]
                 ) -> collections.abc.Iterator[Definition]:
    identifier = ''
    parts: list[str] = []
    for token in section[2:]:
        if token.kind == 'string' and token.text[0] == '$':
            if identifier:
                yield Definition(identifier, ' '.join(parts))
            identifier, parts = token.text, []
        elif parts or token.text != '=':
            text = token.text
            if token.kind == 'hex':
                text = _COMMENT.sub(_blank, text)
            parts.append(text)
    if identifier:
        yield Definition(identifier, ' '.join(parts))


def _references(words: list[str], before: dict[str, Rule]
                ) -> collections.abc.Iterator[str]:
    seen = set()
    for word in words:
        if word in before:
            found = [word]
        elif word.endswith('*'):
            found = [name for name in before if name.startswith(word[:-1])]
        else:
            continue
        for name in found:
            if name not in seen:
                seen.add(name)
                yield name


def _excess(condition: list[_Token], body: list[_Token]) -> str:
    """:returns: why a rule must not be given to a recursive parser."""
    if len(condition) > CONDITION_MAX:
        return _('condition of more than %d words') % CONDITION_MAX
    deepest = depth = 0
    for token in condition:
        depth += (token.text == '(') - (token.text == ')')
        deepest = max(deepest, depth)
    for token in body:
        if token.kind not in ('regex', 'hex'):
            continue
        if len(token.text) > STRING_MAX:
            return _('string of more than %d characters') % STRING_MAX
        depth = 0
        for match in _OPENING.finditer(token.text):
            depth += (match[1] is not None) - (match[2] is not None)
            deepest = max(deepest, depth)
        # Alternatives make a tree that is as deep as they are many.
        if token.text.count('|') > CONDITION_MAX:
            return _('more than %d alternatives') % CONDITION_MAX
    if deepest > NESTING_MAX:
        return _('nested more than %d deep') % NESTING_MAX
    return ''


def _filled(rule: Rule, parsed: yaramod.YaraFile | None,
            externals: tuple[str, ...]) -> Rule:
    if parsed is None or len(parsed.rules) != len(rule.references) + 1:
        raise ValueError('not one rule')
    tree = parsed.rules[-1]
    strings = tuple(tree.strings)
    if len(strings) != len(rule.definitions):
        raise ValueError('strings were lost')
    return dataclasses.replace(
        rule, externals=externals, strings=strings,
        condition=tree.condition, _tree=parsed)


def _problem(error: Exception) -> tuple[int, str]:
    """:returns: line, and what is wrong without the lists of yaramod."""
    match = _ERROR.match(str(error))
    if match is None:
        return 1, str(error)[:200] or type(error).__name__
    return int(match[1]), match[2].partition(', expected one of')[0][:200]


def _next(externals: dict[str, int]) -> bool:
    """Try other types of external variables, like a counter goes up."""
    for name, index in externals.items():
        if index + 1 < len(_VALUES):
            externals[name] = index + 1
            return True
        externals[name] = 0
    return False


def _hex_branches(words: list[str]) -> tuple[tuple[HexUnit, ...], ...]:
    """Read alternatives up to the parenthesis that ends them.

    :param words: last first; what is read is taken off.
    """
    branches: list[tuple[HexUnit, ...]] = []
    branch: list[HexUnit] = []
    while words and words[-1] != ')':
        word = words.pop()
        if word == '(':
            branch.append(HexChoice(_hex_branches(words)))
            if not words:
                raise ValueError('unbalanced hex string')
            words.pop()
        elif word == '|':
            branches.append(tuple(branch))
            branch = []
        elif word[0] == '[':
            low, dash, high = word[1:-1].replace(' ', '').partition('-')
            first = int(low) if low else 0
            branch.append(HexJump(first, (
                int(high) if high else None) if dash else first))
        else:
            digits = word[-2:]
            mask = int(''.join('0' if each == '?' else 'f'
                               for each in digits), 16)
            branch.append(HexByte(int(digits.replace('?', '0'), 16), mask,
                                  word[0] == '~'))
    branches.append(tuple(branch))
    return tuple(branches)


def _unescaped(text: str) -> bytes:
    """:returns: what a text string of YARA's stands for."""
    named = {b't': b'\t', b'n': b'\n', b'r': b'\r'}

    def plain(match: re.Match[bytes]) -> bytes:
        if match[1]:
            return bytes((int(match[1], 16),))
        return named.get(match[2], match[2])

    return re.sub(rb'\\(?:x([0-9a-fA-F]{2})|(.))', plain, text.encode())


def _blank(match: re.Match[str]) -> str:
    return ' ' + '\n' * match[0].count('\n')
