"""Exact checkers: evaluators that know the rules of a puzzle and ask no model. They are oracles of the process, not of the answer.

Countdown (and the Game of 24): steps of the form "a op b = c (left: ...)". Worked example, numbers 3 5 7, target 26::

    "3 * 7 = 21 (left: 5 21)"         1.0    right, and 21 + 5 makes 26
    "7 - 3 = 4 (left: 5 4)"           0.1    right, but 26 is out of reach
    "3 * 7 = 20"                      0.0    wrong;  so is "2 * 7 = 14": there is no 2

Chain arithmetic: 1 while every equality that the text states holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from specdec.search.answers import boxed, stated
from specdec.search.arithmetic import evaluate, literals, normalise, reachable

__all__ = ["ChainArithmetic", "Countdown", "Puzzle", "is_solution", "read_puzzle"]

DEAD_END = 0.1
_DIGITS = tuple("0123456789.)")
_JOINS = tuple("^_%+-*/(}")  # beside an equality: it is only a part of what is meant
_EXPRESSION = r"[-+(]?\s?[0-9.(][0-9.+\-*/() ]{0,200}+"  # possessive: hostile text costs no backtracking
_EQUALITY = re.compile(rf"{_EXPRESSION}(?:=\s?{_EXPRESSION})+")
_OPERATION = re.compile(r"[0-9)]\s*[-+*/]")
_BULLET = re.compile(r"^\s*(?:[-+*•]|[0-9]+[.)])\s+", re.MULTILINE)
_STEP = re.compile(r"(-?[0-9./]+)\s*([-+*/x])\s*\(?(-?[0-9./]+)\)?\s*=\s*\(?(-?[0-9./]+)")
_LEFT = re.compile(r"left\s*:\s*([-0-9./, ]+)", re.IGNORECASE)
_UNFINISHED = re.compile(r"\(\s*left\b[^)\n]*\Z", re.IGNORECASE)  # a text that was cut has not said yet what is left
_TARGET = re.compile(r"(?:target|make|makes|making|equals?|obtain|reach|get)\b[^0-9\n-]{0,30}(-?[0-9]+)", re.IGNORECASE)
_LIST = re.compile(
    r"(?:numbers?|using|use|input)\b[^0-9\n]{0,30}((?:-?[0-9]+(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s+))+-?[0-9]+)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Make `target` of `numbers`, each used at most once, or exactly once with `use_all`."""

    numbers: tuple[int, ...]
    target: int
    use_all: bool = False


def read_puzzle(problem: Any) -> Puzzle:
    """The puzzle of a problem: itself, its attribute `puzzle`, or what the text asks ("numbers 3, 5, 7 ... make 26").

    Raises:
        ValueError: the text names no numbers or no target.
    """
    if isinstance(problem, Puzzle):
        return problem
    if isinstance(found := getattr(problem, "puzzle", None), Puzzle):
        return found
    text = str(problem)
    numbers, target = _LIST.search(text), _TARGET.search(text)
    if numbers is None or target is None:
        raise ValueError(f'no puzzle in {text!r:.120}; fix: "Use the numbers 3, 5, 7 to make 26.", or Countdown(read=...)')
    return Puzzle(tuple(int(n) for n in re.findall("-?[0-9]+", numbers[1])), int(target[1]))


def is_solution(puzzle: Puzzle, expression: str) -> bool:
    """Whether an expression, as "(3 * 7) + 5" or "(3 * 7) + 5 = 26", solves the puzzle. Untrusted text: nothing is eval-ed."""
    expression = normalise(expression).partition("=")[0]
    try:
        used, value = Counter(literals(expression)), evaluate(expression)
    except ValueError:
        return False
    given = Counter(map(Fraction, puzzle.numbers))
    return value == puzzle.target and (used == given if puzzle.use_all else used <= given)


@dataclass(frozen=True)
class Countdown:
    """1 while the target can still be reached, DEAD_END when it cannot, 0 after a wrong step; an answer is right (1) or not (0).

    Args:
        read: problem -> Puzzle.

    Raises (when called):
        ValueError: the problem holds no puzzle, or one of more than six numbers.
    """

    read: Callable[[Any], Puzzle] = read_puzzle

    def __call__(self, problem: Any, steps: Seq[str]) -> float:
        puzzle = self.read(problem)
        text = normalise("\n".join(steps))
        answer = boxed(text) or stated(text)
        if answer is not None:
            return float(is_solution(puzzle, answer))
        left = Counter(map(Fraction, puzzle.numbers))
        for line in _UNFINISHED.sub("", text).split("\n"):
            if not _take(left, line):
                return 0.0
        return 1.0 if reachable(tuple(left.elements()), Fraction(puzzle.target), puzzle.use_all) else DEAD_END


def _take(left: Counter[Fraction], line: str) -> bool:
    """Apply the equations of a line to the numbers left; False: one is wrong."""
    for a, sign, b, c in _STEP.findall(line):
        try:
            used, made = (evaluate(a), evaluate(b)), evaluate(c)
            right = evaluate(f"({a}){'*' if sign == 'x' else sign}({b})") == made
        except ValueError:
            return False
        if not right or not Counter(used) <= left:
            return False
        left.subtract(used)
        left[made] += 1
    for stated_left in _LEFT.findall(line):
        try:
            said = Counter(evaluate(number) for number in re.findall(r"-?[0-9./]+", stated_left))
        except ValueError:
            return False
        if said != +left:
            return False
    return True


@dataclass(frozen=True)
class ChainArithmetic:
    """1 while every equality between numbers that is stated ("12 + 5 = 17", "2 * 3 = 6 = 12 / 2") holds, else 0.

    Equations with letters ("x + 2 = 5") state nothing, and neither does "n = m" without an operation.
    """

    def __call__(self, problem: Any, steps: Seq[str]) -> float:
        texts = (_BULLET.sub("", normalise(step)) for step in steps)
        return float(all(_holds(text, found) for text in texts for found in _EQUALITY.finditer(text)))


def _holds(text: str, found: re.Match[str]) -> bool:
    """Text that only looks like an equality says nothing, and so nothing wrong."""
    before, after = text[: found.start()], text[found.end() :][:1]
    part_of_more = before.rstrip(" ").endswith(_JOINS) or before.endswith(_DIGITS) or before[-1:].isalpha()
    signed = found[0][0] in "-+(" and before.rstrip(" ")[-1:].isalnum()  # x + 2 = 5
    if (
        part_of_more
        or signed
        or after.isalpha()
        or after in ("^", "_", "%", *_DIGITS, *"+-*/(")
        or not _OPERATION.search(found[0])
    ):
        return True
    try:
        values = [evaluate(part.strip(" .")) for part in found[0].split("=")]
    except ValueError:
        return True
    return len(set(values)) == 1
