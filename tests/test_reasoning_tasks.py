"""Problems of the search experiments: deterministic, solvable, and graded exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.reasoning_tasks import GROUPS, ExpressionAnswers, load_reasoning_tasks, make_task
from specdec.search.arithmetic import reachable
from specdec.search.checkers import read_puzzle


@pytest.mark.parametrize("group", ["arithmetic", "countdown"])
def test_made_up_problems_are_deterministic_and_different(group: str) -> None:
    tasks = load_reasoning_tasks(group, 30, seed=3)
    assert tasks[7].problem == make_task(group, 7, seed=3).problem
    assert len({task.problem for task in tasks}) > 25
    assert tasks[0].problem != make_task(group, 0, seed=4).problem
    assert [task.id for task in tasks[:2]] == [f"{group}/3/0", f"{group}/3/1"]


def test_a_problem_never_changes() -> None:
    """Results of different days are compared."""
    assert make_task("arithmetic", 0).problem == "Start with 24. Add 25. Add 23. Add 9. What is the result?"
    assert make_task("countdown", 0).problem == "Use the numbers 8, 9, 6 to make 11."


def test_arithmetic_gold() -> None:
    for task in load_reasoning_tasks("arithmetic", 20, steps=4):
        value, *rest = map(int, re.findall("[0-9]+", task.problem))
        for word, number in zip(re.findall("Add|Subtract|Multiply", task.problem), rest, strict=True):
            value = {"Add": value + number, "Subtract": value - number, "Multiply": value * number}[word]
        assert task.gold == str(value) and value >= 0
        assert task.grade(str(value)) and not task.grade(str(value + 1)) and not task.grade(None)
        assert task.answers.read(f"The answer is {value}.") == task.gold


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_countdown_can_be_solved(numbers: int) -> None:
    for task in load_reasoning_tasks("countdown", 20, numbers=numbers):
        puzzle = read_puzzle(task.problem)
        assert len(puzzle.numbers) == numbers and puzzle.target not in puzzle.numbers
        assert reachable(puzzle.numbers, puzzle.target) and task.oracle is not None  # type: ignore[arg-type]
        assert task.oracle(task.problem, []) == 1.0


def test_countdown_grades_expressions() -> None:
    answers = ExpressionAnswers()
    gold = "Use the numbers 3, 5, 7 to make 26."
    assert answers.read("The answer is 3 × 7 + 5 = 26.") == "3*7+5"
    assert answers.matches(gold, "3*7+5") and not answers.matches(gold, "26") and not answers.matches(gold, "exit()")


def test_examples_in_the_prompts_are_right() -> None:
    """A worked example with a mistake would teach it."""
    for group in ("arithmetic", "countdown"):
        task = make_task(group, 0)
        for example in task.prompts.example.split("\n\n"):
            problem, *steps = example.split("\n")
            assert task.oracle is not None and task.oracle(problem, steps) == 1.0
            assert task.oracle(problem, steps[:-1]) == 1.0
            if group == "countdown":
                assert task.answers.matches(problem, str(task.answers.extract(example)))


def test_files(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [{"question": f"q{i}", "answer": f"so <<1+1=2>>\n#### 1,{i:03}"} for i in range(5)],
        "math500": [{"problem": f"p{i}", "answer": r"\frac{1}{2}", "level": i + 1} for i in range(5)],
    }
    for group, lines in rows.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    gsm8k = load_reasoning_tasks("gsm8k", 10, data=tmp_path)
    assert sorted(task.problem for task in gsm8k) == ["q0", "q1", "q2", "q3", "q4"]
    assert all(task.gold == f"1{task.problem[1:]:0>3}" and task.grade(f"$1,{task.problem[1:]:0>3}") for task in gsm8k)
    assert [t.id for t in gsm8k] == [t.id for t in load_reasoning_tasks("gsm8k", 10, data=tmp_path)]
    assert [t.id for t in gsm8k[:2]] == [t.id for t in load_reasoning_tasks("gsm8k", 2, data=tmp_path)]
    pytest.importorskip("math_verify")
    math500 = load_reasoning_tasks("math500", 10, data=tmp_path)
    assert sorted(task.problem for task in math500) == ["p0", "p1", "p2"]  # levels 1 to 3


def test_bad_groups(tmp_path: Path) -> None:
    assert set(GROUPS) == {"arithmetic", "countdown", "gsm8k", "math500"}
    with pytest.raises(ValueError, match="group must be one of"):
        load_reasoning_tasks("chess", 1)
    with pytest.raises(ValueError, match="group must be one of"):
        make_task("gsm8k", 1)
    with pytest.raises(ValueError, match="data must be a folder"):
        load_reasoning_tasks("gsm8k", 1, data=tmp_path)
