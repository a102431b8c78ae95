"""Accuracy against budget: known numbers, thirds, nothing run twice, the hard budget, one run from end to end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import reasoning
from bench.environment import environment
from bench.reasoning import Run, Setup, by_thirds, main, pending
from bench.reasoning_metrics import Row, accuracy, difference, verdict
from bench.reasoning_report import draw, markdown, summary
from bench.reasoning_tasks import load_reasoning_tasks
from specdec.search import Completion, Search
from specdec.search.reason import ReasonResult
from specdec.search.request import Finish, GenerationError

SETTINGS: dict[str, Any] = {
    "model": "embedded", "dtype": "bfloat16", "temperature": 0.7, "evaluator": "oracle", "machine": "a machine",
    "sizes": {"arithmetic": {"steps": 4}},
}  # fmt: skip


def row(task: int, policy: str, right: bool, seed: int = 0, budget: int = 300, **fields: Any) -> Row:
    known: dict[str, Any] = {
        "task": f"arithmetic/0/{task}", "group": "arithmetic", "policy": policy, "budget": budget, "seed": seed, "answer": "1",
        "right": right, "answered": True, "status": "answered", "used": 200, "steps": 100, "evaluator_tokens": 0, "prefill_tokens": 50,
        "cached_tokens": 20, "recomputed_tokens": 0, "answers": 4, "correct": 2, "seconds": 1.5, "widening": [None, 0.5, 0.25],
        "depth": [0.0, 1.5, 3.0],
    }  # fmt: skip
    return Row(**{**known, **fields})


# ---- report ------------------------------------------------------------------------------------------------------------------


def test_a_problem_counts_once_whatever_its_seeds() -> None:
    rows = [row(0, "mcts", True), row(0, "mcts", True, 1), row(1, "mcts", True), row(1, "mcts", False, 1), row(2, "mcts", False)]
    found = accuracy(rows)
    assert found.mean == pytest.approx(0.5) and found.problems == 3 and (found.low, found.high) == (0.0, 1.0)


def test_the_interval_is_that_of_the_mean() -> None:
    """A fair coin, 400 problems: 1.96 standard errors are 4.9 points."""
    found = accuracy([row(task, "mcts", task % 2 == 0) for task in range(400)])
    assert found.mean == 0.5 and found.high - found.mean == pytest.approx(0.049, abs=0.006)


def test_differences_are_paired() -> None:
    """Right on the same problems and on 8 of 40 more: an interval without 0, where the unpaired ones overlap."""
    base = [row(task, "best_of_n", task < 20) for task in range(40)]
    ours = [row(task, "mcts", task < 28) for task in range(40)]
    gap = difference(ours, base)
    assert gap.mean == pytest.approx(0.2) and 0.05 < gap.low < 0.2 < gap.high < 0.35
    assert accuracy(base).high > accuracy(ours).low
    assert [verdict(each) for each in (gap, difference(base, ours), difference(ours, ours))] == [
        "helps",
        "hurts",
        "no difference",
    ]
    assert difference(ours[:30], base[10:]).problems == 20


def test_report() -> None:
    rows = [row(task, policy, task < most) for policy, most in (("best_of_n", 2), ("mcts", 9)) for task in range(10)]
    rows += [row(task, "mcts", False, budget=600, used=590) for task in range(10)]
    text = markdown(rows, SETTINGS)
    assert "knows the rules and not the answer" in text and "evaluator: oracle" in text.split("\n")[0]
    assert "## arithmetic: 10 problems ({'steps': 4}), seeds: 1, evaluator: oracle" in text
    assert "| accuracy | 300 | 600 |" in text and "| best_of_n | 20% (0% to 50%) | - |" in text
    assert re.search(r"\| mcts \| \+70 \(\+[34]0 to \+(90|100)\) helps \| - \|", text)
    assert "| mcts | - / 0.50 / 0.25 | - / 0.50 / 0.25 |" in text and "| mcts | 1.5; 2.00 | 1.5; 5.90 |" in text
    assert "knows the rules" not in markdown(rows, {**SETTINGS, "evaluator": "yes_no"})
    figures = summary(rows)["arithmetic"]
    assert figures["mcts"]["300"]["accuracy"]["mean"] == 0.9 and figures["mcts"]["300"]["difference"]["verdict"] == "helps"
    assert figures["best_of_n"]["600"]["problems"] == 0 and figures["best_of_n"]["600"]["accuracy"]["mean"] is None
    json.dumps(figures, allow_nan=False)


def test_searches_that_failed_are_counted_and_in_no_figure() -> None:
    rows = [row(task, "best_of_n", task < 5) for task in range(10)]
    broken = [row(task, "mcts", False, error="out of memory") for task in range(10)]
    rows += [*broken, *(row(task, "mcts", True, commit="b") for task in range(4))]
    text = markdown(rows, SETTINGS)
    assert "Errors: 6 searches ended with one" in text and "the first mcts on arithmetic/0/4 at 300: out of memory" in text
    assert "The rows are of 2 commits: None, b." in text
    assert summary(rows)["arithmetic"]["mcts"]["300"]["problems"] == 4 and "| mcts | 100% (100% to 100%) |" in text
    assert "Errors" not in markdown(rows[:10], SETTINGS) and "commits" not in markdown(rows[:10], SETTINGS)


def test_figure() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(task, policy, task < 3, budget=budget)
        for policy in ("best_of_n", "mcts")
        for budget in (300, 600)
        for task in range(5)
    ]
    figure = draw([*rows, replace(rows[0], group="countdown")], SETTINGS)
    assert [axes.get_title() for axes in figure.axes] == ["arithmetic, evaluator: oracle", "countdown, evaluator: oracle"]
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 2


# ---- what a search did -------------------------------------------------------------------------------------------------------


def test_thirds() -> None:
    """Plain MCTS, k = 2, texts of 10 tokens: two steps below the prompt (the first third), then two below one of these, and so on."""
    search = Search("mcts", 60)
    for _ in range(6):
        (request,) = search.ask()
        text = f"step {request.node}"
        search.tell(request, Completion(tuple(range(request.node, request.node + 10)), text, Finish.STOP, score=0.5))
    thirds = by_thirds(search.tree, 60)
    assert thirds[0] == [(0, 0), (1, 0)] and [rank for rank, _ in thirds[1]] == [0, 1]
    assert thirds[1][0][1] == 1 and sum(map(len, thirds)) == 6
    full = Search("best_of_n", 20)
    (request,) = full.ask()
    full.tell(request, Completion((1, 2), "ab", Finish.EOS, score=0.5, answer="a"))
    assert by_thirds(full.tree, 20) == [[], [], []]


# ---- running -----------------------------------------------------------------------------------------------------------------


def test_pending_leaves_out_what_is_there() -> None:
    tasks = {"arithmetic": load_reasoning_tasks("arithmetic", 3)}
    runs = [Run("arithmetic", policy, 300, seed) for policy in ("mcts", "beam") for seed in (0, 1)]
    done = [row(0, "mcts", True), row(2, "mcts", True), *(row(task, "beam", False, 1) for task in range(3))]
    assert list(pending(runs, tasks, done)) == [(runs[0], [1]), (runs[1], [0, 1, 2]), (runs[2], [0, 1, 2])]


def test_what_failed_is_searched_again() -> None:
    tasks = {"arithmetic": load_reasoning_tasks("arithmetic", 2)}
    (run,) = runs = [Run("arithmetic", "mcts", 300, 0)]
    assert list(pending(runs, tasks, [row(0, "mcts", True), row(1, "mcts", False, error="lost")])) == [(run, [1])]


def test_a_model_that_fails_is_a_row_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load_reasoning_tasks("arithmetic", 2)
    found = Search("mcts", 300).result()
    left = {name: getattr(found, name) for name in found.__slots__}
    result = ReasonResult(**left, problem="", budget=300)
    ended = [(0, GenerationError("out of memory", result)), (1, result)]
    monkeypatch.setattr(reasoning, "reason_all", lambda *_, **__: iter(ended))
    setup = Setup("oracle", 0.7, 1, "abc")
    rows = list(reasoning.search_all(None, Run("arithmetic", "mcts", 300, 0), tasks, [0, 1], setup))  # type: ignore[arg-type]
    assert [each.error for each in rows] == ["out of memory", None] and {each.commit for each in rows} == {"abc"}


def test_a_budget_that_was_exceeded_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load_reasoning_tasks("arithmetic", 1)
    monkeypatch.setattr(reasoning, "reason_all", lambda *_, **__: iter([(0, SimpleNamespace(used=301))]))
    with pytest.raises(AssertionError, match="used 301 of 300 tokens"):
        list(reasoning.search_all(None, Run("arithmetic", "mcts", 300, 0), tasks, [0], Setup("oracle", 0.7, 1)))  # type: ignore[arg-type]


def test_an_oracle_is_refused_where_there_is_none() -> None:
    task = replace(load_reasoning_tasks("arithmetic", 1)[0], oracle=None)
    with pytest.raises(ValueError, match="--evaluator yes_no"):
        Setup("oracle", 0.7, 1).evaluator_of(task)
    assert Setup("none", 0.7, 1).evaluator_of(task) is None and Setup("yes_no", 0.7, 1).evaluator_of(task) == "yes_no"


def invoke(folder: str, out: Path, *options: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    arguments = [
        "--model",
        folder,
        "--dtype",
        "float32",
        "--tasks",
        "arithmetic",
        "--problems",
        "2",
        "--seeds",
        "0,1",
        "--budgets",
        "16,40",
    ]
    return CliRunner().invoke(app, [*arguments, "--policies", "greedy,best_of_n,bg_mcts", "--out", str(out), *options])


def outcome(row: dict[str, Any]) -> str:
    """A row without what depends on the order of searches: the time, and the drafts, which learn from what ran before."""
    return json.dumps({name: value for name, value in row.items() if name not in ("seconds", "steps")})


def test_from_end_to_end_and_nothing_twice(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "r.jsonl"
    first = invoke(tiny_folder, out)
    assert first.exit_code == 0, first.output
    lines = out.read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    assert len(rows) == 2 * 2 * (1 + 2 + 2) and all(0 < each["used"] <= each["budget"] for each in rows)
    made = json.loads(first.stdout.splitlines()[-1])
    assert made["bench"] == "reasoning" and set(made["groups"]["arithmetic"]) == {"greedy", "best_of_n", "bg_mcts"}
    assert [Path(file).suffix for file in made["files"]] == [".md", ".png", ".svg"] and all(
        Path(f).stat().st_size for f in made["files"]
    )

    out.write_text("\n".join([*lines[:-3], lines[-3][:40]]))  # killed while the row was being written
    again = invoke(tiny_folder, out)
    assert again.exit_code == 0, again.output
    resumed = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert resumed[:-3] == rows[:-3], "what was there was left alone"
    assert sorted(map(outcome, resumed)) == sorted(map(outcome, rows)), "and the rest is what it was"

    monkeypatch.setattr(reasoning, "load", lambda *_: pytest.fail("there is nothing to run"))
    assert invoke(tiny_folder, out).exit_code == 0
    assert invoke(tiny_folder, out, "--temperature", "0.5").exit_code == 2, "rows of other settings are no rows of this table"

    monkeypatch.setattr(reasoning, "environment", lambda: {**environment(), "commit": "another"})
    other = invoke(tiny_folder, out)
    assert other.exit_code == 0 and "begun at commit" in other.output, "a commit ends no run of hours"
    assert json.loads(out.read_text().splitlines()[0])["settings"]["commit"] == environment()["commit"]


@pytest.mark.parametrize("options", [("--policies", "dfs"), ("--budgets", "many"), ("--evaluator", "me"), ("--tasks", "chess")])
def test_bad_options_are_named(options: tuple[str, str], tiny_folder: str, tmp_path: Path) -> None:
    result = invoke(tiny_folder, tmp_path / "r.jsonl", *options)
    assert result.exit_code == 2 and options[0].removeprefix("--")[:4] in result.output
