"""Problems for search experiments: prompt, grader and, where one exists, an exact evaluator of the process (the oracle).

    arithmetic     "Start with 7. Add 5. ..."           made up; deterministic for a seed and an index
    countdown      "Use the numbers 3, 5, 7 to make 26." made up, always solvable
    gsm8k          word problems                         read from --data
    math500        competition problems, levels 1 to 3   read from --data

The made-up ones leave room for a model of 135M parameters. An oracle knows the rules of a puzzle, never the held-out answer; results
with it must say so::

    task = make_task("countdown", index=0, seed=0)
    task.grade("3 * 7 + 5")   -> True        task.oracle(task.problem, ["3 * 7 = 21"])   -> 1.0
"""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.tasks import DEFAULT_DATA
from specdec.search.answers import AnswerFormat, MathAnswers, NumberAnswers, boxed, stated
from specdec.search.arithmetic import normalise, reachable
from specdec.search.chain_length import ChainLength
from specdec.search.checkers import ChainArithmetic, Countdown, is_solution, read_puzzle
from specdec.search.evaluators import Evaluator
from specdec.search.prompts import Prompts
from specdec.search.steps import Newline, StepRule, StopStrings

__all__ = ["GROUPS", "ExpressionAnswers", "ReasoningTask", "load_reasoning_tasks", "make_task"]

GROUPS = ("arithmetic", "countdown", "gsm8k", "math500")
MATH_LEVELS = (1, 2, 3)
_WORDS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "+": ("Add {}.", operator.add),
    "-": ("Subtract {}.", operator.sub),
    "*": ("Multiply by {}.", operator.mul),
}
_FORM = "Here are examples of the form of an answer.\n\n$example\n\nAnswer in the same form.\n\nProblem: $problem"
_ARITHMETIC = """Problem: Start with 6. Add 7. Multiply by 3. What is the result?
Start with 6.
Add 7: 6 + 7 = 13
Multiply by 3: 13 * 3 = 39
The answer is 39.

Problem: Start with 25. Subtract 8. Multiply by 2. Add 19. What is the result?
Start with 25.
Subtract 8: 25 - 8 = 17
Multiply by 2: 17 * 2 = 34
Add 19: 34 + 19 = 53
The answer is 53."""
_COUNTDOWN = """Problem: Use the numbers 2, 6, 9 to make 21.
Step 1: 2 * 6 = 12 (left: 9, 12)
Step 2: 12 + 9 = 21 (left: 21)
The answer is 2 * 6 + 9.

Problem: Use the numbers 4, 5, 8 to make 7.
Step 1: 8 - 5 = 3 (left: 4, 3)
Step 2: 4 + 3 = 7 (left: 7)
The answer is 4 + 8 - 5."""
ARITHMETIC = Prompts(problem=_FORM, example=_ARITHMETIC, prefill="Start with", answer="The answer is")
COUNTDOWN = Prompts(problem=_FORM, example=_COUNTDOWN, answer="The answer is")


class ExpressionAnswers(AnswerFormat):
    """Expressions that must solve a Countdown puzzle; the gold answer is the puzzle's text."""

    def extract(self, text: str) -> str | None:
        inside = boxed(text)
        return stated(text) if inside is None else inside

    def canonical(self, written: str) -> str:
        return "".join(normalise(written).partition("=")[0].split())

    def matches(self, gold: str, written: str) -> bool:
        return is_solution(read_puzzle(gold), written)


@dataclass(frozen=True, slots=True)
class ReasoningTask:
    """One problem."""

    id: str  # "group/seed/index" or "group/line"
    group: str
    problem: str
    gold: str
    answers: AnswerFormat
    prompts: Prompts
    step: StepRule
    oracle: Evaluator | None = None  # exact evaluator of the process
    length: ChainLength = field(default_factory=ChainLength)  # hints, from the form of the worked examples

    def grade(self, answer: str | None) -> bool:
        """Whether an answer, as written or canonical, is right."""
        return answer is not None and self.answers.matches(self.gold, answer)


def load_reasoning_tasks(group: str, count: int, seed: int = 0, data: Path = DEFAULT_DATA, **sizes: int) -> list[ReasoningTask]:
    """The first `count` problems of a group in the order that the seed fixes.

    Args:
        sizes: of made-up problems, see `arithmetic_task` and `countdown_task`.

    Raises:
        ValueError: no such group, or its file is not under `data`.
    """
    if group in _MAKERS:
        return [make_task(group, index, seed, **sizes) for index in range(count)]
    if group not in _LOADERS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    path = data / group / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"data must be a folder with {group}/test.jsonl, got {data}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    tasks = _LOADERS[group](rows)
    random.Random(f"{group}/{seed}").shuffle(tasks)
    return tasks[:count]


def make_task(group: str, index: int, seed: int = 0, **sizes: int) -> ReasoningTask:
    """One made-up problem: the same for the same arguments, whatever else is made.

    Raises:
        ValueError: no such group.
    """
    if group not in _MAKERS:
        raise ValueError(f"group must be one of {', '.join(_MAKERS)}, got {group!r}")
    return _MAKERS[group](f"{group}/{seed}/{index}", random.Random(f"{group}/{seed}/{index}/{sizes}"), **sizes)


def arithmetic_task(name: str, rng: random.Random, steps: int = 3, largest: int = 30) -> ReasoningTask:
    """A chain of `steps` operations on numbers up to `largest`; factors are at most 4, and no result is negative."""
    value = rng.randint(2, largest)
    sentences = [f"Start with {value}."]
    for _ in range(steps):
        sign = rng.choice("+-*" if value > 2 else "+*")
        other = rng.randint(2, 4) if sign == "*" else rng.randint(2, min(largest, value) if sign == "-" else largest)
        words, apply = _WORDS[sign]
        value = apply(value, other)
        sentences.append(words.format(other))
    problem = " ".join([*sentences, "What is the result?"])
    return ReasoningTask(
        name,
        "arithmetic",
        problem,
        str(value),
        NumberAnswers(),
        ARITHMETIC,
        Newline(),
        ChainArithmetic(),
        ChainLength(steps + 1, 14),
    )


def countdown_task(name: str, rng: random.Random, numbers: int = 3, largest: int = 9) -> ReasoningTask:
    """`numbers` numbers up to `largest` and a target that all of them together can make by whole steps."""
    while True:
        chosen = [rng.randint(2, largest) for _ in range(numbers)]
        left, target = list(chosen), 0
        rng.shuffle(left)
        while len(left) > 1:
            a, b = left.pop(), left.pop()
            left.append(_WORDS[rng.choice("+-*")][1](max(a, b), min(a, b)))
        target = left[0]
        if target > largest and target not in chosen:
            break
    assert reachable(tuple(map(Fraction, chosen)), Fraction(target))
    problem = f"Use the numbers {', '.join(map(str, chosen))} to make {target}."
    return ReasoningTask(
        name, "countdown", problem, problem, ExpressionAnswers(), COUNTDOWN, Newline(), Countdown(), ChainLength(numbers, 20)
    )


def _gsm8k(rows: list[dict[str, Any]]) -> list[ReasoningTask]:
    answers = NumberAnswers()
    return [
        ReasoningTask(
            f"gsm8k/{line}", "gsm8k", row["question"], str(answers.read(row["answer"])), answers, Prompts(), StopStrings()
        )
        for line, row in enumerate(rows)
    ]  # fmt: skip


def _math500(rows: list[dict[str, Any]]) -> list[ReasoningTask]:
    answers = MathAnswers()
    return [
        ReasoningTask(f"math500/{line}", "math500", row["problem"], row["answer"], answers, Prompts(), StopStrings())
        for line, row in enumerate(rows)
        if row["level"] in MATH_LEVELS
    ]


_MAKERS: dict[str, Callable[..., ReasoningTask]] = {"arithmetic": arithmetic_task, "countdown": countdown_task}
_LOADERS: dict[str, Callable[[list[dict[str, Any]]], list[ReasoningTask]]] = {"gsm8k": _gsm8k, "math500": _math500}
