# SPDX-License-Identifier: Apache-2.0
"""What has to be in a page for a rule to hold there.

The condition of a rule is turned into a formula that says less: whenever the
condition holds, the formula does. It is monotone, that is to say more strings
never make it false, so it may be used on what was found so far. What cannot
be said with strings that are there (``not``, sizes, offsets, modules) is taken
as true.
"""

import collections.abc
import operator
import re
import typing

import yaramod

from virtav_nova.rules import syntax

#: Leaves of a formula; rules that refer to rules can make many of few.
LEAVES_MAX = 10000
#: Bytes at a larger offset than this are not looked for there.
OFFSET_MAX = 128


class String(typing.NamedTuple):
    """A string of a rule is there.

    :param rule: name.
    :param number: of the string in the rule, from 0.
    """

    rule: str
    number: int


class Fixed(typing.NamedTuple):
    """Bytes are there at an offset from the beginning."""

    offset: int
    value: bytes


class AtLeast(typing.NamedTuple):
    """So many of the parts hold."""

    least: int
    parts: 'tuple[Formula, ...]'


Leaf = String | Fixed
Formula = Leaf | AtLeast

ALWAYS = AtLeast(0, ())
NEVER = AtLeast(1, ())

_Undefined = typing.NewType('_Undefined', object)
_UNDEFINED = _Undefined(object())
#: None for what is not known.
_Value = int | float | _Undefined | None

_COMPARISONS: dict[type, collections.abc.Callable[[float, float], bool]] = {
    yaramod.LtExpression: operator.lt,
    yaramod.LeExpression: operator.le,
    yaramod.GtExpression: operator.gt,
    yaramod.GeExpression: operator.ge,
    yaramod.EqExpression: operator.eq,
    yaramod.NeqExpression: operator.ne}
_ARITHMETIC: dict[type, collections.abc.Callable[
    [float, float], float] | None] = {
    yaramod.PlusExpression: operator.add,
    yaramod.MinusExpression: operator.sub,
    yaramod.MultiplyExpression: operator.mul,
    yaramod.DivideExpression: None,
    yaramod.ModuloExpression: None,
    yaramod.BitwiseAndExpression: None,
    yaramod.BitwiseOrExpression: None,
    yaramod.BitwiseXorExpression: None,
    yaramod.ShiftLeftExpression: None,
    yaramod.ShiftRightExpression: None}
#: A set of rules, or perhaps a product.
_WILDCARD = re.compile(r'(?<![\w$#@!])[A-Za-z_]\w*\*')
#: Not true when one side is undefined; more is not known of them.
_OPERATORS = (
    yaramod.ContainsExpression, yaramod.IcontainsExpression,
    yaramod.StartsWithExpression, yaramod.IstartsWithExpression,
    yaramod.EndsWithExpression, yaramod.IendsWithExpression,
    yaramod.IequalsExpression, yaramod.MatchesExpression)
#: Nothing of these modules is defined for data that begins otherwise, but
#: for constants, which are in capitals, and what is named here.
_HEADERS = {'pe': Fixed(0, b'MZ'), 'dotnet': Fixed(0, b'MZ'),
            'elf': Fixed(0, b'\x7fELF')}
_FLAGS = ('is_pe', 'is_dotnet')
#: Numbers beyond are not counted with: they may wrap round.
_NUMBER_MAX = 1 << 60
#: More than the difference within which libyara takes floats for equal.
_NEARLY = 1e-15
_READS: dict[str, tuple[int, typing.Literal['little', 'big'], bool]] = {
    f'{sign}int{bits}{end}': (
        bits // 8, 'big' if end else 'little', not sign)
    for sign in ('', 'u') for bits in (8, 16, 32) for end in ('', 'be')}


def formulas(source: syntax.Source) -> dict[str, Formula]:
    """Find what the rules of a file need.

    :returns: a formula by the rule's name. That of a rule counts in the
        rules it refers to and the global rules of the file.
    """
    alone: dict[str, Formula] = {}
    for rule in source.rules:
        alone[rule.name] = _bounded(_of_rule(rule, alone))
    everywhere = [alone[rule.name] for rule in source.rules
                  if rule.is_global]
    if not everywhere:
        return alone
    return {name: _bounded(all_of([*everywhere, formula]))
            for name, formula in alone.items()}


def at_least(count: int, parts: collections.abc.Iterable[Formula]) -> Formula:
    """Make a formula, simplified.

    :param count: of the parts that have to hold; a part that is given twice
        counts twice.
    """
    kept = []
    for part in parts:
        if part == ALWAYS:
            count -= 1
        elif part != NEVER:
            kept.append(part)
    if count <= 0:
        return ALWAYS
    if count > len(kept):
        return NEVER
    if count in (1, len(kept)):
        flat: dict[Formula, None] = {}
        for part in kept:
            if isinstance(part, AtLeast) and part.least == (
                    1 if count == 1 else len(part.parts)):
                flat.update(dict.fromkeys(part.parts))
            else:
                flat[part] = None
        kept = list(flat)
        count = 1 if count == 1 else len(kept)
    return kept[0] if len(kept) == 1 else AtLeast(count, tuple(kept))


def all_of(parts: collections.abc.Sequence[Formula]) -> Formula:
    """:returns: the formula that all parts hold."""
    return at_least(len(parts), parts)


def any_of(parts: collections.abc.Iterable[Formula]) -> Formula:
    """:returns: the formula that one of the parts holds."""
    return at_least(1, parts)


def leaves(formula: Formula) -> list[Leaf]:
    """:returns: the leaves in the order in which they stand, each once."""
    found: dict[Leaf, None] = {}
    todo = [formula]
    while todo:
        part = todo.pop()
        if isinstance(part, AtLeast):
            todo += reversed(part.parts)
        else:
            found[part] = None
    return list(found)


def holds(formula: Formula,
          found: collections.abc.Container[Leaf]) -> bool:
    """Evaluate a formula.

    :param found: the leaves that are true.
    """
    if not isinstance(formula, AtLeast):
        return formula in found
    missing = formula.least
    if missing:
        for part in formula.parts:
            if holds(part, found):
                missing -= 1
                if not missing:
                    break
    return not missing


def assuming(formula: Formula,
             known: collections.abc.Container[Leaf]) -> Formula:
    """:returns: what is left of a formula when some leaves are true."""
    if not isinstance(formula, AtLeast):
        return ALWAYS if formula in known else formula
    return at_least(formula.least,
                    [assuming(part, known) for part in formula.parts])


def apart(formula: Formula,
          known: collections.abc.Container[Leaf]) -> Formula:
    """Say what is to be found apart for a formula that may hold together.

    What is only assumed is no reason to look: where that alone would do, at
    least one leaf has to be found beside it.

    :param known: leaves that are not looked for, and taken as true.
    """
    left = assuming(formula, known)
    if left != ALWAYS or not isinstance(formula, AtLeast):
        return left
    parts = [part for part in (
        apart(part, known) for part in formula.parts) if part != ALWAYS]
    return any_of(parts) if parts else ALWAYS


def fewest(formula: Formula) -> int:
    """Tell how many leaves have to be true at least.

    :returns: at most the true number; exactly that when no leaf stands in
        a formula twice.
    """
    if not isinstance(formula, AtLeast):
        return 1
    if not formula.least:
        return 0
    if formula.least > len(formula.parts):
        return LEAVES_MAX + 1
    costs = sorted(map(fewest, formula.parts))[:formula.least]
    total = 0
    seen: set[Leaf] = set()
    for part in formula.parts:
        found = leaves(part)
        total += len(found)
        seen.update(found)
    # One leaf may serve several parts.
    return sum(costs) if total == len(seen) else max(costs)


def joins(formula: Formula) -> bool:
    """Tell whether it takes several leaves to make a formula true."""
    return isinstance(formula, AtLeast) and (
        1 < formula.least <= len(formula.parts)
        or any(map(joins, formula.parts)))


def _bounded(formula: Formula) -> Formula:
    todo = [formula]
    count = 0
    while todo:
        part = todo.pop()
        if isinstance(part, AtLeast):
            todo += part.parts
        count += 1
        if count > LEAVES_MAX:
            return ALWAYS
    return formula


def _of_rule(rule: syntax.Rule, before: dict[str, Formula]) -> Formula:
    if rule.condition is None:
        return ALWAYS
    try:
        return _Reader(rule, before).boolean(rule.condition)
    except RecursionError:
        return ALWAYS


class _Reader:
    """Reads the condition of a rule.

    :param before: formulas of the rules that it may refer to.
    """

    def __init__(self, rule: syntax.Rule,
                 before: dict[str, Formula]) -> None:
        self._rule = rule
        self._before = before
        self._strings = [string.identifier for string in rule.strings]
        #: That ``$`` stands for, within a loop over strings.
        self._current: String | None = None
        #: Loop variables, which hide rules.
        self._variables: list[str] = []

    def boolean(self, expression: yaramod.Expression) -> Formula:
        """:returns: what has to be there for an expression to be true."""
        if isinstance(expression, yaramod.ParenthesesExpression):
            return self.boolean(expression.enclosed_expr)
        for kind, join in ((yaramod.AndExpression, all_of),
                           (yaramod.OrExpression, any_of)):
            if isinstance(expression, kind):
                return join([self.boolean(operand)
                             for operand in _operands(expression, kind)])
        if isinstance(expression, yaramod.BoolLiteralExpression):
            return ALWAYS if expression.value else NEVER
        if isinstance(expression, yaramod.StringExpression):
            return self._leaf(expression.id)
        if isinstance(expression, yaramod.StringAtExpression):
            return all_of([self._leaf(expression.id),
                           self._defined(expression.at_expr)])
        if isinstance(expression, yaramod.StringInRangeExpression):
            # Of "#a in (...)", too, nothing is there without the string.
            found = [self._leaf(expression.id)]
            span = expression.range_expr
            if isinstance(span, yaramod.RangeExpression):
                found += [self._defined(span.low), self._defined(span.high)]
            return all_of(found)
        # What belongs to a module is a subclass.
        if type(expression) is yaramod.IdExpression:
            return self._reference(expression.symbol.name)
        if isinstance(expression, yaramod.OfExpression):
            return self._of(expression)
        if isinstance(expression, yaramod.ForStringExpression):
            return self._for_string(expression)
        if isinstance(expression, yaramod.ForArrayExpression):
            return self._loop(expression, [expression.id])
        if isinstance(expression, yaramod.ForDictExpression):
            return self._loop(expression, [expression.id1, expression.id2])
        if isinstance(expression, yaramod.DefinedExpression):
            operand = expression.operand
            while isinstance(operand, yaramod.ParenthesesExpression):
                operand = operand.enclosed_expr
            if isinstance(operand, yaramod.StringOffsetExpression
                          | yaramod.StringLengthExpression):
                return self._leaf(operand.id)
            return ALWAYS
        return self._without(expression)

    def _leaf(self, identifier: str) -> Formula:
        """:param identifier: with any of the four signs."""
        if len(identifier) == 1:
            return self._current or ALWAYS
        name = f'${identifier[1:]}'
        if self._strings.count(name) != 1:
            return ALWAYS
        return String(self._rule.name, self._strings.index(name))

    def _reference(self, name: str) -> Formula:
        if name in self._variables or name not in self._rule.references:
            return ALWAYS
        return self._before.get(name, ALWAYS)

    def _set(self, iterable: yaramod.Expression) -> list[Formula]:
        """:returns: what is in a set of strings or rules."""
        if isinstance(iterable, yaramod.ThemExpression):
            return [String(self._rule.name, index)
                    for index in range(len(self._strings))]
        found: list[Formula] = []
        if not isinstance(iterable, yaramod.IterableExpression
                          | yaramod.SetExpression):
            return found
        for element in iterable.elements:
            if isinstance(element, yaramod.StringWildcardExpression):
                prefix = element.id.removesuffix('*')
                found += [String(self._rule.name, index)
                          for index, name in enumerate(self._strings)
                          if name.startswith(prefix)]
            elif isinstance(element, yaramod.StringExpression):
                found.append(self._leaf(element.id))
            elif (type(element) is yaramod.IdExpression
                  and not _WILDCARD.search(self._rule.condition_text)):
                found.append(self._reference(element.symbol.name))
            else:
                # It may be any number of rules: of "a*" yaramod gives "a".
                return []
        return found

    def _of(self, expression: yaramod.OfExpression) -> Formula:
        parts = self._set(expression.iterable)
        if not parts or expression.body is not None:
            return ALWAYS
        return at_least(_quantity(expression.variable, len(parts)), parts)

    def _for_string(self, expression: yaramod.ForStringExpression
                    ) -> Formula:
        outer = self._current
        parts: list[Formula] = []
        for each in self._set(expression.iterable):
            self._current = each if isinstance(each, String) else None
            parts.append(self.boolean(expression.body))
        self._current = outer
        if not parts:
            return ALWAYS
        return at_least(_quantity(expression.variable, len(parts)), parts)

    def _loop(self, expression: yaramod.ForExpression,
              variables: list[str]) -> Formula:
        # A loop that may run no time at all asks for nothing.
        if _quantity(expression.variable, 0) < 1:
            return ALWAYS
        self._variables += variables
        body = self.boolean(expression.body)
        del self._variables[-len(variables):]
        header = _header(expression.iterable)
        return all_of([header, body]) if header else body

    def _without(self, expression: yaramod.Expression) -> Formula:
        """Find strings without which an expression is not true."""
        compare = _COMPARISONS.get(type(expression))
        operands = [expression]
        if ((compare or isinstance(expression, _OPERATORS))
                and isinstance(expression, yaramod.BinaryOpExpression)):
            operands = [expression.left_operand, expression.right_operand]
        if isinstance(expression, yaramod.EqExpression):
            fixed = _fixed(*operands) or _fixed(*reversed(operands))
            if fixed:
                return fixed
        strings: dict[Leaf, None] = {}
        for operand in operands:
            self._collect(operand, strings)

        def may_be_true(absent: collections.abc.Container[Leaf]) -> bool:
            values = [self._value(operand, absent) for operand in operands]
            if _UNDEFINED in values:
                return False
            if compare is None:
                return len(values) > 1 or values[0] != 0
            first, second = values
            if not isinstance(first, int | float) or not isinstance(
                    second, int | float):
                return True
            if isinstance(first, float) or isinstance(second, float):
                # To libyara what hardly differs is equal.
                first, second = float(first), float(second)
                if compare is operator.eq and abs(first - second) < _NEARLY:
                    return True
            return compare(first, second)

        needed = [string for string in strings
                  if not may_be_true((string,))]
        if needed:
            return all_of(needed)
        if not strings or may_be_true(strings):
            return ALWAYS
        return any_of(strings)

    def _defined(self, expression: yaramod.Expression) -> Formula:
        """:returns: what has to be there for a value to be defined."""
        leaves: dict[Leaf, None] = {}
        self._collect(expression, leaves)
        return all_of([leaf for leaf in leaves
                       if self._value(expression, (leaf,)) is _UNDEFINED])

    def _collect(self, expression: yaramod.Expression,
                 strings: dict[Leaf, None]) -> None:
        """Collect what a value depends on."""
        if isinstance(expression, yaramod.StringCountExpression
                      | yaramod.StringInRangeExpression
                      | yaramod.StringOffsetExpression
                      | yaramod.StringLengthExpression):
            leaf = self._leaf(expression.id)
            if isinstance(leaf, String):
                strings[leaf] = None
        header = _header(expression)
        if header:
            strings[header] = None
        for part in _parts(expression):
            self._collect(part, strings)

    def _value(self, expression: yaramod.Expression,
               absent: collections.abc.Container[Leaf]) -> _Value:
        """:returns: what an expression is when some strings are absent."""
        if isinstance(expression, yaramod.StringCountExpression
                      | yaramod.StringInRangeExpression):
            return 0 if self._leaf(expression.id) in absent else None
        if isinstance(expression, yaramod.StringOffsetExpression
                      | yaramod.StringLengthExpression):
            return (_UNDEFINED if self._leaf(expression.id) in absent
                    else None)
        header = _header(expression)
        if header and header in absent:
            return _UNDEFINED
        values = [self._value(part, absent) for part in _parts(expression)]
        if _UNDEFINED in values:
            return _UNDEFINED
        kind = type(expression)
        if kind is yaramod.ParenthesesExpression:
            return values[0]
        if kind in _ARITHMETIC:
            return _counted(_ARITHMETIC[kind], values[0], values[1])
        return _number(expression)


def _parts(expression: yaramod.Expression) -> list[yaramod.Expression]:
    """:returns: what makes a number undefined when it is."""
    if isinstance(expression, yaramod.ParenthesesExpression):
        return [expression.enclosed_expr]
    if isinstance(expression, yaramod.UnaryMinusExpression
                  | yaramod.BitwiseNotExpression):
        return [expression.operand]
    if isinstance(expression, yaramod.IntFunctionExpression):
        return [expression.argument]
    if isinstance(expression, yaramod.FunctionCallExpression):
        return list(expression.arguments)
    if type(expression) in _ARITHMETIC and isinstance(
            expression, yaramod.BinaryOpExpression):
        return [expression.left_operand, expression.right_operand]
    return []


def _header(expression: yaramod.Expression) -> Fixed | None:
    """:returns: how data begins for which a value of a module is defined."""
    name = ''
    while True:
        if isinstance(expression, yaramod.FunctionCallExpression):
            expression = expression.function
        elif isinstance(expression, yaramod.ArrayAccessExpression):
            expression = expression.array
        elif isinstance(expression, yaramod.StructAccessExpression):
            name = expression.symbol.name
            expression = expression.structure
        else:
            break
    if (not name or name.isupper() or name in _FLAGS
            or not isinstance(expression, yaramod.IdExpression)):
        return None
    return _HEADERS.get(expression.symbol.name)


def _counted(function: collections.abc.Callable[[float, float], float]
             | None, first: _Value, second: _Value) -> _Value:
    if function is operator.mul and (first == 0 or second == 0):
        return 0
    if function is None or not isinstance(first, int) or not isinstance(
            second, int):
        return None
    result = function(first, second)
    return result if abs(result) < _NUMBER_MAX else None


def _operands(expression: yaramod.Expression,
              kind: type[yaramod.BinaryOpExpression]
              ) -> list[yaramod.Expression]:
    """Give what a chain of one operator joins, however long it is."""
    found = []
    while isinstance(expression, kind):
        found.append(expression.right_operand)
        expression = expression.left_operand
    found.append(expression)
    found.reverse()
    return found


def _number(expression: yaramod.Expression) -> int | float | None:
    """:returns: the value of a constant."""
    if isinstance(expression, yaramod.ParenthesesExpression):
        return _number(expression.enclosed_expr)
    if isinstance(expression, yaramod.UnaryMinusExpression):
        value = _number(expression.operand)
        return None if value is None else -value
    if isinstance(expression, yaramod.DoubleLiteralExpression):
        return float(expression.value)
    if not isinstance(expression, yaramod.IntLiteralExpression):
        return None
    # The value that yaramod gives takes a KB for a thousand.
    text = expression.text
    unit = {'KB': 1 << 10, 'MB': 1 << 20}.get(text[-2:], 1)
    try:
        value = int(text.removesuffix('KB').removesuffix('MB'), 0) * unit
    except ValueError:
        return None
    return value if value < _NUMBER_MAX else None


def _quantity(variable: yaramod.Expression, size: int) -> int:
    """Tell how many of a set have to be there.

    :param size: of the set.
    :returns: 0 where that is not known.
    """
    if isinstance(variable, yaramod.AnyExpression):
        return 1
    if isinstance(variable, yaramod.AllExpression):
        return size
    if isinstance(variable, yaramod.PercentualExpression):
        value = _number(variable.operand)
        if isinstance(value, int) and value > 0:
            return -(-value * size // 100)
        return 0
    value = _number(variable)
    return value if isinstance(value, int) and value > 0 else 0


def _fixed(read: yaramod.Expression, value: yaramod.Expression
           ) -> Formula | None:
    """:returns: the leaf for a number that is read from an offset."""
    if not isinstance(read, yaramod.IntFunctionExpression):
        return None
    offset, number = _number(read.argument), _number(value)
    layout = _READS.get(read.function)
    if (layout is None or not isinstance(offset, int)
            or not isinstance(number, int)
            or not 0 <= offset <= OFFSET_MAX):
        return None
    size, order, signed = layout
    try:
        return Fixed(offset, number.to_bytes(size, order, signed=signed))
    except OverflowError:
        return None
