"""The synthetic reasoner and the bench of the controller: small runs that must come out right on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.controller import ablations, difference, play
from bench.reasoner import Problem, Reasoner, solve
from specdec.search import Kind, NodeStatus, Search, SearchConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROOT_FOLDER = Path(__file__).parent.parent


def test_a_full_text_is_the_chain_of_first_steps() -> None:
    """Every policy explores the same problem: the tokens, the answer and the score of step-wise and full generation agree."""
    problem = Problem.make(3, 1)
    full = Search("greedy", 10_000)
    solve(full, Reasoner(problem))
    steps = Search("bg_mcts", 10_000, config=SearchConfig(deterministic=True))
    solve(steps, Reasoner(problem))
    assert full.result().answer == steps.result().answer and full.budget.used == steps.budget.used
    assert full.result().score == steps.result().score and steps.tree.deepest == problem.depth


def test_a_cut_text_continued_is_the_uncut_one() -> None:
    problem = Problem.make(3, 2)
    whole, cut = Search("greedy", 10_000), Search("best_of_n", 10_000, config=SearchConfig(full_tokens=37))
    solve(whole, Reasoner(problem))
    reasoner = Reasoner(problem)
    while not cut.tree.answered:
        (request,) = cut.ask()
        cut.tell(request, reasoner.complete(cut, request))
    assert set(cut.tree.kind[2:]) == {Kind.CONTINUE}
    assert cut.budget.used == whole.budget.used and cut.result().answer == whole.result().answer


def test_the_evaluator_is_right_as_often_as_it_says() -> None:
    counts: Counter[bool] = Counter()
    for index in range(60):
        search, reasoner = Search("best_of_n", 4000), Reasoner(Problem.make(1, index), accuracy=0.8)
        solve(search, reasoner)
        for node in range(1, len(search.tree)):
            if search.tree.status[node] == NodeStatus.ANSWERED and search.tree.kind[node] != Kind.FORCED:
                counts[(search.tree.q[node] > 0.5) == reasoner.states[node].right] += 1
    assert 0.75 < counts[True] / counts.total() < 0.85


def test_the_rules_for_small_budgets_hold_the_bar() -> None:
    """A hundredth of the bench: BG-MCTS against best-of-n and MCTS at 1,200 tokens; at seeds that chose nothing."""
    ours, sampled, searched = (
        play(lambda name=name: name, 1200, 60, seed=5)["right"] for name in ("bg_mcts", "best_of_n", "mcts")
    )
    assert difference(ours, sampled)["low"] > 0.0 and difference(ours, searched)["low"] > 0.3


def test_ablations_differ_in_what_they_name() -> None:
    """Every variant runs, and none but the harmless ones is the default under another name."""
    variants = ablations()
    trees: dict[str, list[list[int]]] = {}
    for name, (make, options) in variants.items():
        searches = [Search(make(), 2200, config=SearchConfig(**options)) for _ in range(2)]
        for index, search in enumerate(searches):
            solve(search, Reasoner(Problem.make(2, index)))
        trees[name] = [list(search.tree.parent) for search in searches]
    off = "no small-budget rules"
    assert trees["default"] != trees[off] != trees["coded"]
    for name in (
        "no backtrack",
        "alone: no completion bias",
        "alone: no exploration annealing",
        "alone: root visits counted",
    ):
        assert trees[name] != trees["default" if name.startswith("no ") else off], name


def test_the_command_ends_with_one_json_line() -> None:
    command = [
        sys.executable,
        "-m",
        "bench.controller",
        "--problems",
        "5",
        "--budgets",
        "600",
        "--policies",
        "bg_mcts",
        "best_of_n",
    ]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT_FOLDER, check=True).stdout
    last = json.loads(out.splitlines()[-1])
    assert last["mode"] == "compare" and set(last["600"]) == {"bg_mcts", "best_of_n", "differences"}
