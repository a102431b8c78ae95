"""Exact arithmetic on untrusted text: + - * / and parentheses over decimal numbers, as Fractions. Nothing is ever eval-ed.

The text may hold only the characters of such an expression, and its syntax tree only the node types below::

    evaluate("(1,200 + 0.5) × 2")  ->  Fraction(2401, 1)
    evaluate("2 ** 99999999")      ->  ValueError

`reachable` is the Countdown question: can these numbers make the target?
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, product

__all__ = ["evaluate", "literals", "normalise", "reachable"]

MAX_LENGTH = 200  # characters of an expression
MAX_NUMBERS = 6  # of `reachable`
_LOOKALIKES = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("\\,", ""), ("$", ""))
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_ALLOWED = re.compile(r"[0-9.+\-*/() ]+")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def normalise(text: str) -> str:
    """Typographic and LaTeX operators as + - * /, thousands separators and dollar signs gone."""
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    return _THOUSANDS.sub("", text.translate(_LOOKALIKES))


def evaluate(expression: str) -> Fraction:
    """The exact value.

    Raises:
        ValueError: not such an expression, longer than MAX_LENGTH, or a division by zero.
    """
    source, tree = _parsed(expression)
    try:
        return _value(tree, source)
    except ZeroDivisionError as error:
        raise ValueError(f"{expression!r:.80} divides by zero") from error


def literals(expression: str) -> list[Fraction]:
    """The numbers of an expression, from left to right.

    Raises:
        ValueError: as `evaluate`.
    """
    source, tree = _parsed(expression)
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [_value(node, source) for node in sorted(constants, key=lambda node: node.col_offset)]


def _parsed(expression: str) -> tuple[str, ast.expr]:
    source = normalise(expression).strip() if len(expression) <= 2 * MAX_LENGTH else ""
    if not 0 < len(source) <= MAX_LENGTH or not _ALLOWED.fullmatch(source):
        raise ValueError(
            f"{expression!r:.80} is no arithmetic expression of at most {MAX_LENGTH} characters (+ - * / and numbers)"
        )
    try:
        tree = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r:.80} is no arithmetic expression ({error.msg})") from error
    for node in ast.walk(tree):
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if not (number or isinstance(node, (ast.BinOp, ast.UnaryOp)) or type(node) in _OPERATORS):
            raise ValueError(f"{expression!r:.80} has a {type(node).__name__}; only + - * / and numbers are allowed")
    return source, tree


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, source), _value(node.right, source))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, source))
    return Fraction(source[node.col_offset : node.end_col_offset])  # as written: 0.1 is one tenth


def reachable(numbers: tuple[Fraction, ...], target: Fraction, use_all: bool = False) -> bool:
    """Whether + - * / over `numbers`, each used at most once (exactly once with `use_all`), can make `target`.

    Raises:
        ValueError: more than MAX_NUMBERS numbers.
    """
    if len(numbers) > MAX_NUMBERS:
        raise ValueError(f"numbers must be at most {MAX_NUMBERS}, got {len(numbers)}")
    sizes = (len(numbers),) if use_all else range(1, len(numbers) + 1)
    return any(_makes(chosen, target) for size in sizes for chosen in combinations(sorted(numbers), size))


@lru_cache(maxsize=1 << 16)
def _makes(numbers: tuple[Fraction, ...], target: Fraction) -> bool:
    """Whether all of `numbers` together can: the last operation joins a value of a smaller part to what the rest must then make."""
    if len(numbers) <= 3:
        return target in _values(numbers)
    parts = ((value, rest) for part, rest in _splits(numbers) for value in _values(part))
    return any(_makes(rest, needed) for value, rest in parts for needed in _needed(value, target))


@lru_cache(maxsize=1 << 12)
def _values(numbers: tuple[Fraction, ...]) -> frozenset[Fraction]:
    """Everything that all of `numbers` together can make."""
    if len(numbers) == 1:
        return frozenset(numbers)
    pairs = (pair for part, rest in _splits(numbers) for pair in product(_values(part), _values(rest)))
    return frozenset(value for a, b in pairs for value in _combined(a, b))


def _splits(numbers: tuple[Fraction, ...]) -> Iterator[tuple[tuple[Fraction, ...], tuple[Fraction, ...]]]:
    """Every way into two parts, the smaller one first."""
    places = range(len(numbers))
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(places, size):
            yield tuple(numbers[i] for i in chosen), tuple(numbers[i] for i in places if i not in chosen)


def _combined(a: Fraction, b: Fraction) -> Iterator[Fraction]:
    yield from (a + b, a - b, b - a, a * b)
    if b:
        yield a / b
    if a:
        yield b / a


def _needed(b: Fraction, target: Fraction) -> Iterator[Fraction]:
    """Every a with target in _combined(a, b); of 0 * a = 0 another split speaks, where the rest of the zero makes it."""
    yield from (target - b, target + b, b - target)
    if b:
        yield from (target / b, target * b)
        if target:
            yield b / target
