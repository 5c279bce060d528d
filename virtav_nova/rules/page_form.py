# SPDX-License-Identifier: Apache-2.0
"""Rules for files made into rules for single pages.

A page of memory has no header in front, no size of its own and no name.
What asks for those is *neutral*: it may be so or not. A condition is taken
as the list of the cases in which it holds. In every case the neutral terms
are left out; cases in which no string has to be there are dropped. So if a
rule matches a file for strings that all lie in one page, its page form
matches that page. It may match more: it is weaker than its author made it.

Places in a file lose their meaning (``$a at 10`` becomes ``$a``), places
relative to another string keep it. Referred and global rules are taken
into the rule, which then stands alone and needs no module.
"""

import collections.abc
import operator
import typing

import yaramod

from virtav_nova.i18n import _
from virtav_nova.rules import syntax

#: Name of the meta that the page form of a changed rule carries.
META = 'virtav_dropped'
_META_MAX = 400
#: What a file begins with. Pages of code do not hold it.
_MAGIC = frozenset((
    b'MZ', b'ZM', b'PE', b'PE\0\0', b'\x7fELF', b'ELF', b'PK', b'PK\3\4',
    b'PK\3\4\x14\0\6\0', b'PK\5\6', b'%PDF', b'%PDF-', b'{\\rtf', b'{\\rt',
    b'\xd0\xcf\x11\xe0', b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1',
    b'\xca\xfe\xba\xbe', b'\xfe\xed\xfa\xce', b'\xfe\xed\xfa\xcf',
    b'\xce\xfa\xed\xfe', b'\xcf\xfa\xed\xfe', b'dex\n', b'dex\n035\0',
    b'Rar!', b'Rar!\x1a\7', b'7z\xbc\xaf\x27\x1c', b'\x1f\x8b', b'BZh',
    b'MSCF', b'FWS', b'CWS', b'ITSF', b'!<arch>\n', b'\x89PNG',
    b'\x89PNG\r\n\x1a\n', b'GIF8', b'GIF89a', b'\xff\xd8\xff', b'#!',
    b'L\0\0\0', b'!This program cannot be run in DOS mode.',
    b'This program cannot be run in DOS mode',
    b'This program cannot be run in DOS mode.',
    b'!This program cannot be run in DOS mode',
    b'This program must be run under Win32'))
#: Terms of a condition that is written down.
_TERMS_MAX = 10000
#: A string of so many bytes at the very start is a magic number, too.
_HEADER_MAX = 8

_COMPARE: dict[type[yaramod.BinaryOpExpression],
               collections.abc.Callable[[typing.Any, typing.Any], bool]] = {
    yaramod.EqExpression: operator.eq,
    yaramod.NeqExpression: operator.ne,
    yaramod.LtExpression: operator.lt,
    yaramod.LeExpression: operator.le,
    yaramod.GtExpression: operator.gt,
    yaramod.GeExpression: operator.ge,
}
_COMPARISONS = tuple(_COMPARE)
_TEXT_OPERATORS = (
    yaramod.ContainsExpression, yaramod.IcontainsExpression,
    yaramod.StartsWithExpression, yaramod.IstartsWithExpression,
    yaramod.EndsWithExpression, yaramod.IendsWithExpression,
    yaramod.IequalsExpression, yaramod.MatchesExpression)
_LITERALS = (
    yaramod.IntLiteralExpression, yaramod.DoubleLiteralExpression,
    yaramod.StringLiteralExpression, yaramod.BoolLiteralExpression,
    yaramod.RegexpExpression)
_NAMED = (
    yaramod.StringExpression, yaramod.StringAtExpression,
    yaramod.StringInRangeExpression, yaramod.StringCountExpression,
    yaramod.StringOffsetExpression, yaramod.StringLengthExpression)
_STRINGS = (*_NAMED, yaramod.OfExpression, yaramod.ForStringExpression)
_CHAINS = (yaramod.AndExpression, yaramod.OrExpression)


class Dropped(typing.NamedTuple):
    """A term that does not count on a page.

    :param text: of the original condition.
    """

    text: str
    why: str


class PageForm(typing.NamedTuple):
    """What became of a rule.

    :param text: a whole rule without imports; empty where refused. As it
        stood in its file where nothing had to be changed.
    :param dropped: in the order of the condition; empty says that the rule
        means the same as before.
    :param refused: why there is no page form.
    """

    text: str
    dropped: tuple[Dropped, ...] = ()
    refused: str = ''


def rewrite(source: syntax.Source, rule: syntax.Rule) -> PageForm:
    """Make the page form of a rule.

    :param source: the file it stands in.
    :param rule: one of its rules.
    """
    if rule.is_private:
        return PageForm('', refused=_(
            'private: it is taken into the rules that refer to it'))
    form = _Form(source)
    needed = source.needed(rule)
    try:
        cases = _conjunction([
            form.cases(each) for each in (rule, *needed)
            if each is rule or each.is_global])
    except _RefusedError as refused:
        return PageForm('', tuple(form.dropped), str(refused))
    except RecursionError:
        return PageForm('', refused=_('condition nested too deep'))
    if cases.strings is None:
        return PageForm('', tuple(form.dropped),
                        _('no string has to be there'))
    if not form.dropped and not needed:
        return PageForm(rule.text.removeprefix('global').lstrip())
    return PageForm(_text(source, rule, cases.strings, form.dropped),
                    tuple(form.dropped))


class _RefusedError(Exception):
    """The rule has no page form, and why."""


class _UnsafeError(Exception):
    """A term depends on more than the page, and how."""


class _Key(typing.NamedTuple):
    """A string of one of the rules.

    :param number: of the string in its rule.
    :param sigil: what is asked of it: ``$``, ``#``, ``@``, ``!``.
    """

    rule: str
    number: int
    sigil: str = '$'


class _Set(typing.NamedTuple):
    """A set of strings."""

    keys: tuple[_Key, ...]


class _Term(typing.NamedTuple):
    """A condition that is not looked into any more.

    :param parts: text, and strings that get their names in the end.
    """

    parts: tuple[str | _Key | _Set, ...]


class _Chain(typing.NamedTuple):
    """Terms of which all, or any, must hold."""

    word: str
    terms: 'tuple[_Formula, ...]'


_Formula = _Term | _Chain

_MAGIC_WHY = _('what files begin with is on no page of code')
#: Holds always.
_TRUE = _Chain('and', ())


class _Cases(typing.NamedTuple):
    """In which cases a condition holds.

    :param neutral: those in which no string need be there; None: no such
        case. What is left in it says which strings must not be there.
    :param strings: those in which some string must be there.
    """

    neutral: _Formula | None
    strings: _Formula | None


_NEUTRAL = _Cases(_TRUE, None)


class _Form:
    """One rewriting, with what it leaves out."""

    def __init__(self, source: syntax.Source) -> None:
        self._source = source
        self.dropped: list[Dropped] = []
        self._cases: dict[tuple[str, bool], _Cases] = {}

    def cases(self, rule: syntax.Rule, negated: bool = False) -> _Cases:
        """Find the cases in which a rule holds, or does not hold.

        :raises _RefusedError: when it cannot be understood.
        """
        # Rules that refer to rules twice each would take for ever.
        key = rule.name, negated
        if key not in self._cases:
            if rule.condition is None:
                raise _RefusedError(_('rule %(name)s: %(why)s') % {
                    'name': rule.name, 'why': rule.unparsed})
            found = _Rewriter(self, rule).cases(rule.condition, {}, negated)
            for each in found:
                _check_size(each)
            self._cases[key] = found
        return self._cases[key]

    def referred(self, name: str, negated: bool) -> _Cases:
        return self.cases(self._source.by_name[name], negated)

    def drop(self, text: str, why: str) -> None:
        each = Dropped(text, why)
        if each not in self.dropped:
            self.dropped.append(each)


#: Loop variables: how they move when the page is moved, or why they mean
#: nothing on a page.
_Scope = dict[str, int | str]


class _Rewriter:
    """Finds the cases of one rule's condition."""

    def __init__(self, form: _Form, rule: syntax.Rule) -> None:
        self._form = form
        self._rule = rule
        self._index = {string.identifier: index
                       for index, string in enumerate(rule.strings)}

    def cases(self, expression: yaramod.Expression, scope: _Scope,
              negated: bool = False, inside: bool = False) -> _Cases:
        """Find the cases in which an expression holds.

        :param negated: or rather does not hold.
        :param inside: the negation was of more than this.
        """
        while True:
            if isinstance(expression, yaramod.ParenthesesExpression):
                expression = expression.enclosed_expr
            elif isinstance(expression, yaramod.NotExpression):
                expression, negated = expression.operand, not negated
            else:
                break
        why = ''
        try:
            _degree(expression, scope)
        except _UnsafeError as unsafe:
            why = str(unsafe)
        if isinstance(expression, _CHAINS) and not (
                negated and not why and _partial(expression)):
            every = isinstance(expression, yaramod.AndExpression) != negated
            terms = syntax.operands(expression)
            found = [self.cases(each, scope, negated, inside or negated)
                     for each in terms]
            if not every:
                return _disjunction(found)
            return self._every(found, terms)
        if not why and not (
                negated and inside and _partial(expression)):
            return self._safe(expression, negated)
        if isinstance(expression, yaramod.IdExpression):
            name = expression.symbol.name if expression.symbol else ''
            if name in self._rule.references and name not in scope:
                return self._form.referred(name, negated)
        if negated:
            return self._neutral(expression, why or _('may be undefined'))
        return self._weakened(expression, scope, why)

    def _every(self, found: list[_Cases],
               terms: list[yaramod.Expression]) -> _Cases:
        if any(each.neutral is None for each in found):
            for each, term in zip(found, terms, strict=True):
                if each.neutral == _TRUE and each.strings is not None:
                    self._form.drop(
                        term.text, _('one alternative asks for no string'))
        return _conjunction(found)

    def _safe(self, expression: yaramod.Expression,
              negated: bool) -> _Cases:
        """Take over a term that means the same on a page."""
        held: typing.Any = None
        shrunk = self._without_magic(expression, negated)
        if shrunk is not None:
            return shrunk
        try:
            held = _blank(self._rule, expression)
        except _UnsafeError:
            held = False
        if held is not None and negated:
            held = not held
        parts = self._parts(expression.text)
        if not any(isinstance(each, _STRINGS)
                   for each in _walk(expression)):
            return _NEUTRAL if held else _Cases(None, None)
        term = _Term(('not (', *parts, ')') if negated else parts)
        return _Cases(term, None) if held else _Cases(None, term)

    def _without_magic(self, expression: yaramod.Expression,
                       negated: bool) -> _Cases | None:
        """Take magic numbers out of a term.

        :returns: None where there is none in it.
        """
        if not self._mentions_magic(expression):
            return None
        if isinstance(expression, (yaramod.OfExpression,
                                   yaramod.ForStringExpression)):
            found = syntax.members(self._rule, expression.iterable) or []
            needed = syntax.quorum(expression.variable, len(found))
            kept = [index for index in found if not self._is_magic(index)]
            place = getattr(expression, 'range', None)
            if needed is not None and needed <= len(found) and kept and (
                    not negated and len(kept) < len(found)
                    and place is None):
                self._form.drop(
                    ', '.join(self._rule.definitions[index].identifier
                              for index in found if index not in kept),
                    _MAGIC_WHY)
                return self._some_of(expression, needed, found, kept)
        return self._neutral(expression, _MAGIC_WHY)

    def _some_of(self, expression: (yaramod.OfExpression
                                    | yaramod.ForStringExpression),
                 needed: int, found: list[int], kept: list[int]) -> _Cases:
        """Ask of a smaller set what was asked of a larger one.

        :param needed: how many of the larger one; 0 for none at all.
        """
        body: tuple[str | _Key | _Set, ...] = ()
        held = False
        if isinstance(expression, yaramod.ForStringExpression):
            body = (' : (', *self._parts(expression.body.text), ')')
            try:
                held = bool(_blank(self._rule, expression.body))
            except _UnsafeError:
                held = False
        if needed == 0:
            term = self._of(0, kept, body)
            return _Cases(None, term) if held else _Cases(term, None)
        least = needed - (len(found) - len(kept))
        if held:
            # It holds where nothing is, so it is no string that is asked.
            return _Cases(self._of(least, kept, body) if least > 0
                          else _TRUE, None)
        return _Cases(None if least > 0 else _TRUE,
                      self._of(max(1, least), kept, body))

    def _weakened(self, expression: yaramod.Expression, scope: _Scope,
                  why: str) -> _Cases:
        """Leave out of a term what does not count on a page."""
        match expression:
            case yaramod.StringAtExpression() | (
                    yaramod.StringInRangeExpression()):
                if expression.id[0] == '$':
                    return self._unanchored(expression, why)
            case yaramod.OfExpression():
                return self._of_weakened(expression, scope, why)
            case yaramod.ForStringExpression():
                return self._for_strings(expression, scope, why)
            case yaramod.ForArrayExpression():
                return self._for_array(expression, scope, why)
            case yaramod.ForDictExpression():
                scope = {**scope, expression.id1: why, expression.id2: why}
                return self._for_body(expression, scope, why)
            case _ if isinstance(expression, _COMPARISONS):
                return self._compared(expression, scope, why)
        return self._neutral(expression, why)

    def _unanchored(
            self, expression: (yaramod.StringAtExpression
                               | yaramod.StringInRangeExpression),
            why: str) -> _Cases:
        if expression.id == '$':
            self._form.drop(expression.text, why)
            return _Cases(None, _Term(('$',)))
        index = self._index[expression.id]
        start = (isinstance(expression, yaramod.StringAtExpression)
                 and expression.at_expr.text == '0'
                 and _length(self._rule.strings[index]) <= _HEADER_MAX)
        if start or self._is_magic(index):
            return self._neutral(expression, _MAGIC_WHY)
        self._form.drop(expression.text, why)
        return _Cases(None, self._present([index]))

    def _of_weakened(self, expression: yaramod.OfExpression,
                     scope: _Scope, why: str) -> _Cases:
        found = syntax.members(self._rule, expression.iterable)
        if found is None:
            return self._of_rules(expression, why)
        needed = syntax.quorum(expression.variable, len(found))
        if not needed or needed > len(found):
            return self._neutral(expression, why)
        self._form.drop(expression.text, why)
        kept = [index for index in found if not self._is_magic(index)]
        least = needed - (len(found) - len(kept))
        if not kept:
            return _NEUTRAL
        return _Cases(None if least > 0 else _TRUE,
                      self._of(max(1, least), kept))

    def _of_rules(self, expression: yaramod.OfExpression,
                  why: str) -> _Cases:
        iterable = expression.iterable
        elements = getattr(iterable, 'elements', [])
        names: list[str] = []
        for each in elements:
            if isinstance(each, yaramod.IdWildcardExpression):
                start = each.id.removesuffix('*')
                names += [name for name in self._rule.references
                          if name.startswith(start)]
            elif isinstance(each, yaramod.IdExpression) and each.symbol:
                names.append(each.symbol.name)
        names = list(dict.fromkeys(names))
        needed = syntax.quorum(expression.variable, len(names))
        if not names or not set(names) <= set(self._rule.references):
            return self._neutral(expression, why)
        if needed == 1 or needed == len(names):
            found = [self._form.referred(name, False) for name in names]
            if needed == 1:
                return _disjunction(found)
            return _conjunction(found)
        return self._neutral(
            expression, _('counts rules, which are taken in one by one'))

    def _for_strings(self, expression: yaramod.ForStringExpression,
                     scope: _Scope, why: str) -> _Cases:
        found = syntax.members(self._rule, expression.iterable)
        if not found:
            return self._neutral(expression, why)
        needed = syntax.quorum(expression.variable, len(found))
        if not needed or needed > len(found):
            return self._neutral(expression, why)
        body = self.cases(expression.body, scope)
        if body.neutral is not None or body.strings is None:
            return self._neutral(expression, why)
        kept = [index for index in found if not self._is_magic(index)]
        least = needed - (len(found) - len(kept))
        if not kept:
            return self._neutral(expression, why)
        inner: tuple[str | _Key | _Set, ...] = ()
        if body.strings != _Term(('$',)):
            inner = (' : (', *_flat(body.strings, 1), ')')
        return _Cases(None if least > 0 else _TRUE,
                      self._of(max(1, least), kept, inner))

    def _for_array(self, expression: yaramod.ForArrayExpression,
                   scope: _Scope, why: str) -> _Cases:
        name = expression.id
        if self._mentions_magic(expression.iterable):
            why = _MAGIC_WHY
            return self._for_body(expression, {**scope, name: why}, why)
        try:
            scope = {**scope, name: _step(expression.iterable, scope)}
        except _UnsafeError as unsafe:
            return self._for_body(
                expression, {**scope, name: str(unsafe)}, why)
        if not syntax.quorum(expression.variable, 1 << 32):
            return self._neutral(expression, why)
        body = self.cases(expression.body, scope)
        if body.neutral is not None or body.strings is None:
            return self._neutral(expression, why)
        return _Cases(None, _Term((
            f'for {expression.variable.text} {name} in ',
            *self._parts(expression.iterable.text), ' : (',
            *_flat(body.strings, 1), ')')))

    def _for_body(self, expression: (yaramod.ForArrayExpression
                                     | yaramod.ForDictExpression),
                  scope: _Scope, why: str) -> _Cases:
        """Ask once for what a loop asks of each of its values.

        :param scope: what mentions the loop's variables is unsafe.
        """
        if not syntax.quorum(expression.variable, 1 << 32):
            return self._neutral(expression, why)
        return self.cases(expression.body, scope)

    def _compared(self, expression: typing.Any, scope: _Scope,
                  why: str) -> _Cases:
        left, right = expression.left_operand, expression.right_operand
        if isinstance(left, yaramod.StringInRangeExpression) and (
                not self._mentions_magic(expression)) and isinstance(
                expression, (yaramod.GtExpression, yaramod.GeExpression)):
            # Fewer of them in a part of the file than in all of it.
            sign = ('>' if isinstance(expression, yaramod.GtExpression)
                    else '>=')
            try:
                if _degree(right, scope) == 0:
                    self._form.drop(expression.text, why)
                    parts = self._parts(
                        f'{left.id} {sign} {right.text}')
                    return _Cases(None, _Term(parts))
            except _UnsafeError:
                pass
        # Where a string is asked for its place, it must be there.
        found: list[int] = []
        for each in _walk(expression):
            if isinstance(each, (yaramod.StringOffsetExpression,
                                 yaramod.StringLengthExpression)):
                if len(each.id) == 1:
                    self._form.drop(expression.text, why)
                    return _Cases(None, _Term(('$',)))
                found.append(self._index['$' + each.id[1:]])
        found = [index for index in sorted(set(found))
                 if not self._is_magic(index)]
        if not found:
            return self._neutral(expression, why)
        self._form.drop(expression.text, why)
        return _Cases(None, self._present(found))

    def _neutral(self, expression: yaramod.Expression,
                 why: str) -> _Cases:
        self._form.drop(expression.text, why)
        return _NEUTRAL

    def _present(self, indexes: list[int]) -> _Formula:
        terms: list[_Formula] = [
            _Term((_Key(self._rule.name, index),))
            if self._rule.strings[index].identifier != '$'
            else self._of(1, [index]) for index in indexes]
        return terms[0] if len(terms) == 1 else _Chain('and', tuple(terms))

    def _of(self, least: int, indexes: list[int],
            body: tuple[str | _Key | _Set, ...] = ()) -> _Formula:
        keys = _Set(tuple(_Key(self._rule.name, each) for each in indexes))
        number = {0: 'none', 1: 'any'}.get(least, str(least))
        if least == len(indexes):
            number = 'all'
        return _Term(('for ' * bool(body) + f'{number} of ', keys, *body))

    def _mentions_magic(self, expression: yaramod.Expression) -> bool:
        for each in _walk(expression):
            if isinstance(each, (yaramod.OfExpression,
                                 yaramod.ForStringExpression)):
                found = syntax.members(self._rule, each.iterable) or []
                if any(self._is_magic(index) for index in found):
                    return True
            elif isinstance(each, _NAMED):
                index = self._index.get('$' + each.id[1:])
                if index is not None and len(each.id) > 1 and (
                        self._is_magic(index)):
                    return True
        return False

    def _is_magic(self, index: int) -> bool:
        string = self._rule.strings[index]
        if isinstance(string, yaramod.PlainString):
            return bytes(string.pure_text).rstrip(b'\0') in _STRIPPED or (
                bytes(string.pure_text) in _MAGIC)
        if isinstance(string, yaramod.HexString):
            try:
                units = syntax.hex_units(string)
            except ValueError:
                return False
            value = bytearray()
            for unit in units:
                if not isinstance(unit, syntax.HexByte) or (
                        unit.mask != 0xff or unit.inverted):
                    return False
                value.append(unit.value)
            return bytes(value) in _MAGIC
        return False

    def _parts(self, text: str) -> tuple[str | _Key | _Set, ...]:
        """Find the strings in the text of a term."""
        parts: list[str | _Key | _Set] = []
        name = self._rule.name
        for match in syntax.TOKEN.finditer(text):
            word = match[0]
            if word == 'them':
                parts.append(_Set(tuple(
                    _Key(name, index)
                    for index in range(len(self._rule.strings)))))
            elif match.lastgroup != 'string' or len(word) == 1:
                parts.append(word)
            elif word[-1] == '*':
                keys = [_Key(name, index) for index, string
                        in enumerate(self._rule.strings)
                        if string.identifier.startswith(word[:-1])]
                for position, key in enumerate(keys):
                    parts += (', ', key) if position else (key,)
            else:
                parts.append(
                    _Key(name, self._index['$' + word[1:]], word[0]))
        return tuple(parts)


_STRIPPED = frozenset(magic.rstrip(b'\0') for magic in _MAGIC)


def _degree(expression: typing.Any, scope: _Scope) -> int:
    """Say how a value changes with the place where the page lies.

    :returns: 0 not at all, 1 by as many bytes as the page is moved.
    :raises _UnsafeError: when it depends on what is not in the page.
    """
    match expression:
        case None:
            return 0
        case yaramod.ParenthesesExpression():
            return _degree(expression.enclosed_expr, scope)
        case yaramod.StringExpression() | yaramod.StringCountExpression():
            return 0
        case yaramod.StringOffsetExpression():
            _fixed(expression.index_expr, scope)
            return 1
        case yaramod.StringLengthExpression():
            _fixed(expression.index_expr, scope)
            return 0
        case yaramod.StringAtExpression():
            _moving(expression.at_expr, scope)
            return 0
        case yaramod.StringInRangeExpression():
            _moving(expression.range_expr, scope)
            return 0
        case yaramod.RangeExpression():
            low = _degree(expression.low, scope)
            if low != _degree(expression.high, scope):
                raise _UnsafeError(_('a place in a file'))
            return low
        case yaramod.PlusExpression():
            return (_degree(expression.left_operand, scope)
                    + _degree(expression.right_operand, scope))
        case yaramod.MinusExpression():
            return (_degree(expression.left_operand, scope)
                    - _degree(expression.right_operand, scope))
        case yaramod.IntFunctionExpression():
            if _degree(expression.argument, scope) != 1:
                raise _UnsafeError(_('reads at a fixed place of a file'))
            return 0
        case yaramod.FilesizeExpression():
            raise _UnsafeError(_('a page has no file size'))
        case yaramod.EntrypointExpression():
            raise _UnsafeError(_('a page has no entry point'))
        case yaramod.OfExpression():
            _fixed(expression.variable, scope)
            if not _of_strings(expression.iterable):
                raise _UnsafeError(_('refers to rules'))
            if expression.range is not None:
                _moving(expression.range, scope)
            return 0
        case yaramod.ForStringExpression():
            _fixed(expression.variable, scope)
            _fixed(expression.body, scope)
            return 0
        case yaramod.ForArrayExpression():
            _fixed(expression.variable, scope)
            step = _step(expression.iterable, scope)
            _fixed(expression.body, {**scope, expression.id: step})
            return 0
        case yaramod.AllExpression() | yaramod.AnyExpression() | (
                yaramod.NoneExpression()):
            return 0
        case yaramod.StructAccessExpression() | (
                yaramod.ArrayAccessExpression()) | (
                yaramod.FunctionCallExpression()):
            raise _UnsafeError(_('asks a module about the file'))
        case yaramod.IdExpression():
            return _identifier(expression, scope)
    if isinstance(expression, _LITERALS):
        return 0
    if isinstance(expression, _CHAINS):
        for each in syntax.operands(expression):
            _fixed(each, scope)
        return 0
    if isinstance(expression, _COMPARISONS):
        if _degree(expression.left_operand, scope) != _degree(
                expression.right_operand, scope):
            raise _UnsafeError(_('a place in a file'))
        return 0
    if isinstance(expression, yaramod.BinaryOpExpression):
        _fixed(expression.left_operand, scope)
        _fixed(expression.right_operand, scope)
        return 0
    if isinstance(expression, yaramod.UnaryOpExpression):
        _fixed(expression.operand, scope)
        return 0
    raise _UnsafeError(_('not understood'))


def _fixed(expression: yaramod.Expression | None, scope: _Scope) -> None:
    if _degree(expression, scope) != 0:
        raise _UnsafeError(_('a place in a file'))


def _moving(expression: yaramod.Expression, scope: _Scope) -> None:
    if _degree(expression, scope) != 1:
        raise _UnsafeError(_('a place in a file'))


def _step(iterable: yaramod.Expression, scope: _Scope) -> int:
    """:returns: how the values of a loop change with the page's place."""
    if isinstance(iterable, yaramod.RangeExpression):
        return _degree(iterable, scope)
    if isinstance(iterable, (yaramod.SetExpression,
                             yaramod.IterableExpression)):
        steps = {_degree(each, scope) for each in iterable.elements}
        if len(steps) == 1:
            return steps.pop()
        raise _UnsafeError(_('a place in a file'))
    raise _UnsafeError(_('asks a module about the file'))


def _identifier(expression: yaramod.IdExpression, scope: _Scope) -> int:
    name = expression.symbol.name if expression.symbol else ''
    known = scope.get(name, _('refers to a rule, a module or what is given '
                              'from outside'))
    if isinstance(known, str):
        raise _UnsafeError(known)
    return known


def _of_strings(iterable: yaramod.Expression) -> bool:
    if isinstance(iterable, yaramod.ThemExpression):
        return True
    return isinstance(iterable, yaramod.SetExpression) and all(
        isinstance(each, (yaramod.StringExpression,
                          yaramod.StringWildcardExpression))
        for each in iterable.elements)


def _walk(expression: yaramod.Expression
          ) -> collections.abc.Iterator[yaramod.Expression]:
    """Find every part of an expression, itself first."""
    todo: list[typing.Any] = [expression]
    while todo:
        each = todo.pop()
        yield each
        for name in ('left_operand', 'right_operand', 'operand',
                     'enclosed_expr', 'argument', 'at_expr', 'range_expr',
                     'index_expr', 'low', 'high', 'body', 'iterable',
                     'variable', 'range'):
            child = getattr(each, name, None)
            if child is not None:
                todo.append(child)
        todo += getattr(each, 'elements', ())


def _partial(expression: yaramod.Expression) -> bool:
    """:returns: whether it may be undefined, which no ``not`` turns."""
    return any(isinstance(each, (
        yaramod.StringOffsetExpression, yaramod.StringLengthExpression,
        yaramod.IntFunctionExpression)) for each in _walk(expression))


def _blank(rule: syntax.Rule, expression: typing.Any) -> typing.Any:
    """Evaluate a term on a page that holds none of the strings.

    :returns: a number or truth value, None where undefined.
    :raises _UnsafeError: when it is too involved to say.
    """
    match expression:
        case yaramod.ParenthesesExpression():
            return _blank(rule, expression.enclosed_expr)
        case yaramod.StringExpression() | yaramod.StringAtExpression():
            return False
        case yaramod.StringCountExpression():
            return 0
        case yaramod.StringInRangeExpression():
            return False if expression.id[0] == '$' else 0
        case yaramod.StringOffsetExpression() | (
                yaramod.StringLengthExpression()) | (
                yaramod.IntFunctionExpression()):
            return None
        case yaramod.IntLiteralExpression():
            return syntax.integer(expression)
        case yaramod.DoubleLiteralExpression() | (
                yaramod.BoolLiteralExpression()) | (
                yaramod.StringLiteralExpression()):
            return expression.value
        case yaramod.NotExpression():
            value = _blank(rule, expression.operand)
            return None if value is None else not value
        case yaramod.DefinedExpression():
            return _blank(rule, expression.operand) is not None
        case yaramod.AndExpression():
            values = [_blank(rule, each)
                      for each in syntax.operands(expression)]
            return all(values)
        case yaramod.OrExpression():
            values = [_blank(rule, each)
                      for each in syntax.operands(expression)]
            return any(values)
        case yaramod.OfExpression():
            return _quorum_blank(rule, expression, False)
        case yaramod.ForStringExpression():
            return _quorum_blank(
                rule, expression, bool(_blank(rule, expression.body)))
        case yaramod.PlusExpression() | yaramod.MinusExpression() | (
                yaramod.MultiplyExpression()):
            left = _blank(rule, expression.left_operand)
            right = _blank(rule, expression.right_operand)
            if not isinstance(left, (int, float)) or not isinstance(
                    right, (int, float)):
                return None
            if isinstance(expression, yaramod.PlusExpression):
                return left + right
            if isinstance(expression, yaramod.MinusExpression):
                return left - right
            return left * right
        case yaramod.UnaryMinusExpression():
            value = _blank(rule, expression.operand)
            return -value if isinstance(value, (int, float)) else None
    if isinstance(expression, _COMPARISONS):
        left = _blank(rule, expression.left_operand)
        right = _blank(rule, expression.right_operand)
        if left is None or right is None or (
                isinstance(left, str) != isinstance(right, str)):
            return None
        return _COMPARE[type(expression)](left, right)
    raise _UnsafeError(_('not understood'))


def _quorum_blank(rule: syntax.Rule, expression: typing.Any,
                  each: bool) -> bool:
    found = syntax.members(rule, expression.iterable)
    if found is None:
        raise _UnsafeError(_('not understood'))
    needed = syntax.quorum(expression.variable, len(found))
    if needed is None:
        needed = _blank(rule, expression.variable)
    if not isinstance(needed, int):
        return False
    count = len(found) if each else 0
    return count == 0 if needed == 0 else count >= needed


def _length(string: yaramod.String) -> int:
    """:returns: bytes of a string at least, roughly."""
    if isinstance(string, yaramod.HexString):
        return sum(isinstance(unit, syntax.HexByte)
                   for unit in syntax.hex_units(string))
    if isinstance(string, yaramod.PlainString):
        return len(string.pure_text) * (1 if string.is_ascii else 2)
    return len(string.pure_text)


def _conjunction(found: list[_Cases]) -> _Cases:
    either = [_any([each.neutral, each.strings]) for each in found]
    if any(each is None for each in either):
        return _Cases(None, None)
    whole = _all([each for each in either if each is not None])
    if all(each.neutral is not None for each in found):
        # A string of one of them must be there.
        strings = _any([each.strings for each in found])
        neutral = _all([each.neutral for each in found
                        if each.neutral is not None])
        if strings is None:
            return _Cases(neutral, None)
        # Here terms are doubled, and once more at each level above.
        strings = _all([whole, strings])
        _check_size(strings)
        return _Cases(neutral, strings)
    return _Cases(None, whole)


def _disjunction(found: list[_Cases]) -> _Cases:
    return _Cases(_any([each.neutral for each in found]),
                  _any([each.strings for each in found]))


def _all(formulas: list[_Formula]) -> _Formula:
    terms: dict[_Formula, None] = {}
    for each in formulas:
        if isinstance(each, _Chain) and each.word == 'and':
            terms.update(dict.fromkeys(each.terms))
        else:
            terms[each] = None
    if len(terms) == 1:
        return next(iter(terms))
    return _Chain('and', tuple(terms))


def _any(formulas: list[_Formula | None]) -> _Formula | None:
    terms: dict[_Formula, None] = {}
    for each in formulas:
        if each == _TRUE:
            return _TRUE
        if isinstance(each, _Chain) and each.word == 'or':
            terms.update(dict.fromkeys(each.terms))
        elif each is not None:
            terms[each] = None
    if not terms:
        return None
    if len(terms) == 1:
        return next(iter(terms))
    return _Chain('or', tuple(terms))


def _check_size(formula: _Formula | None) -> None:
    """:raises _RefusedError: when a formula is too long to be written."""
    todo = [formula]
    size = 0
    while todo:
        each = todo.pop()
        size += 1
        if size > _TERMS_MAX:
            raise _RefusedError(_('condition too involved'))
        if isinstance(each, _Chain):
            todo += each.terms


def _flat(formula: _Formula, depth: int = 0
          ) -> collections.abc.Iterator[str | _Key | _Set]:
    """:returns: text and strings of a formula in order."""
    if isinstance(formula, _Term):
        yield from formula.parts
        return
    for position, each in enumerate(formula.terms):
        if position:
            yield f' {formula.word} ' if depth else (
                f'\n        {formula.word} ')
        if isinstance(each, _Chain):
            yield '('
            yield from _flat(each, depth + 1)
            yield ')'
        else:
            yield from each.parts


def _text(source: syntax.Source, rule: syntax.Rule, formula: _Formula,
          dropped: list[Dropped]) -> str:
    """Write the rule down again with a new condition."""
    parts = list(_flat(formula))
    used = {each._replace(sigil='$')
            for part in parts if not isinstance(part, str)
            for each in (part.keys if isinstance(part, _Set) else (part,))}
    order = [each.name for each in source.rules]
    keys = sorted(used, key=lambda key: (
        key.rule != rule.name, order.index(key.rule), key.number))
    names: dict[_Key, str] = {}
    taken = {each.identifier for each in rule.definitions}
    for key in keys:
        owner = source.by_name[key.rule]
        name = owner.definitions[key.number].identifier
        if name == '$':
            name = f'$anonymous_{key.number}'
        if owner is not rule:
            name = f'${owner.name}_{name[1:]}'
        if name != owner.definitions[key.number].identifier:
            while name in taken:
                name += '_'
        taken.add(name)
        names[key] = name
    lines = [f'rule {rule.name}'
             + (' : ' + ' '.join(rule.tags) if rule.tags else '') + ' {']
    if dropped or rule.meta_text:
        lines.append(f'    {rule.meta_text or "meta:"}')
    if dropped:
        lines.append(f'        {META} = "{_listed(dropped)}"')
    lines.append('    strings:')
    for key in keys:
        owner = source.by_name[key.rule]
        lines.append(f'        {names[key]} = '
                     f'{owner.definitions[key.number].text}')
    lines.append('    condition:')
    words: list[str] = ['        ']
    for part in parts:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, _Key):
            words.append(part.sigil
                         + names[part._replace(sigil='$')][1:])
        elif len(part.keys) == len(used) and set(part.keys) == used:
            words.append('them')
        else:
            words.append('(' + ', '.join(
                names[key] for key in part.keys) + ')')
    lines += (''.join(words), '}')
    return '\n'.join(lines)


def _listed(dropped: list[Dropped]) -> str:
    """:returns: what was dropped, fit to stand in a text of YARA's."""
    text = '; '.join(' '.join(each.text.split()) for each in dropped)
    if len(text) > _META_MAX:
        text = text[:_META_MAX] + '...'
    return ''.join(each if ' ' <= each <= '~' else '?' for each in text
                   ).replace('\\', '\\\\').replace('"', '\\"')
