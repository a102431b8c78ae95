"""The synthetic reasoner and the bench of the controller: small runs that must come out right on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.controller import BASELINES, ablations, difference, misses, named, play
from bench.controller_time import cycles, grown
from bench.reasoner import Problem, Reasoner, solve
from bench.variants import NO_BACKTRACK
from mock_search import lines_run
from specdec.search import Kind, NodeStatus, Request, Search, SearchConfig
from specdec.search.bg_mcts import BgMcts
from specdec.search.small_budget import SmallBudget

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
    ours, sampled, searched = (play(named(name), 1200, 60, seed=5)["right"] for name in ("bg_mcts", *BASELINES))
    assert difference(ours, sampled)["low"] > 0.0 and difference(ours, searched)["low"] > 0.3


def trees(name: str, budget: int = 2200) -> list[list[int]]:
    """The parents of two problems' nodes."""
    variant, grown = ablations()[name], []
    for index in range(2):
        search = Search(variant.make(), budget, config=variant.config)
        solve(search, Reasoner(Problem.make(2, index), repeat=variant.repeat), variant.width)
        grown.append(list(search.tree.parent))
    return grown


def test_ablations_differ_in_what_they_name() -> None:
    """Every variant runs, and none but the harmless ones is another under a new name."""
    variants = ablations()
    assert all(variant.against in variants for variant in variants.values())
    grown = {name: trees(name) for name in variants}
    for name in (
        "no backtrack",
        "width 4",
        "no backtrack: width 4, virtual means",
        "alone",
        "alone: no completion bias",
        "alone: no exploration annealing",
        "alone: root visits counted",
        "repeats: keep",
        "repeats: resample",
        "coded",
    ):
        assert grown[name] != grown[variants[name].against], name


def test_what_is_as_coded_runs_as_coded() -> None:
    """Not under the defaults, which merge, force answers and vote."""
    for name in ("coded", "printed", "mcts, coded"):
        config = ablations()[name].config
        assert (config.duplicates, config.truncated_answers, config.forced_tokens, config.answer_rule) == (
            "keep",
            False,
            0,
            "best",
        )
    assert named("bg_mcts_printed").config == named("bg_mcts_coded").config == ablations()["coded"].config


def test_without_backtrack_the_papers_selection_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, below 32 chains, never: the two rows of the table are two algorithms."""
    selections: list[int] = []
    select = BgMcts._select
    monkeypatch.setattr(BgMcts, "_select", lambda self: selections.append(1) or select(self))
    play(named("bg_mcts"), 1200, 3, seed=2)
    assert not selections
    play(named(NO_BACKTRACK), 1200, 3, seed=2)
    assert selections


def test_a_single_chain_is_one_answer() -> None:
    search = Search(BgMcts(small=SmallBudget(single_chain=3.0)), 900)
    solve(search, Reasoner(Problem(7, 8, 0.9)))
    assert search.tree.answered_count == 1 and search.result().used < 700 and len(search.tree) == 9


def test_misses_name_the_bound() -> None:
    far, near, below = ({"mean": low, "low": low, "high": low} for low in (0.3, 0.0, -0.03))
    assert misses({600: {"mcts": far, "best_of_n": near}, 5000: {"mcts": near, "best_of_n": far, "other": below}}) == []
    assert misses({600: {"mcts": near, "best_of_n": below}}) == [
        "best_of_n at 600: the lower bound is -0.03",
        "mcts at 600: the lower bound is 0.0",
    ]
    assert misses({5000: {"best_of_n": near}}) == ["best_of_n at 5000: the lower bound is 0.0"]


def test_a_saturated_evaluator_keeps_its_order_until_it_says_nothing() -> None:
    """Of a step that is seen as right and of one that is seen as wrong."""

    def scores(saturation: float) -> list[float]:
        search, reasoner = Search("mcts", 600), Reasoner(Problem(5, 8, 0.5), saturation=saturation)
        solve(search, reasoner)
        return [search.tree.q[node] for node in range(1, 6)]

    plain, half, full = map(scores, (0.0, 0.5, 1.0))
    assert half == pytest.approx([0.5 + 0.5 * score for score in plain]) and full == [1.0] * 5
    assert min(plain) < 0.1 < 0.9 < max(plain)


def test_repeated_draws_are_texts_that_were_there() -> None:
    search = Search("best_of_n", 20_000, config=SearchConfig(duplicates="keep"))
    solve(search, Reasoner(Problem.make(2, 3), repeat=0.5))
    texts = [search.tree.token_ids[node] for node in search.tree.children[0]]
    assert 0.3 < 1 - len(set(texts)) / len(texts) < 0.7


def test_host_time_looks_at_searches_that_end_and_at_watched_ones(tmp_path: Path) -> None:
    finishing = cycles(10_000, grown("bg_mcts", 2000, 0), tail=0.01)
    assert 10 < finishing["cycles"] < 60, "it ends with its budget"
    watched = cycles(40, grown("bg_mcts", 10**9, 0, tmp_path / "run.json"))
    assert watched["cycles"] == 40 and (tmp_path / "run.json.journal").stat().st_size > 0
    assert watched["first_ms"] > 0 and watched["p99_ms"] <= watched["worst_ms"]


@pytest.mark.parametrize("policy", ["bg_mcts", "beam"])
def test_a_search_that_begins_to_finish_looks_at_no_more_than_before(policy: str) -> None:
    """The cycle in which a budget begins to run out is a cycle like others: nothing in it grows with the tree."""
    search, reasoner = Search(policy, 60_000), Reasoner(replace(Problem.make(0, 3), p=0.9))
    lines, asked = list[int](), list[Request]()
    while True:
        lines.append(lines_run(lambda: asked.extend(search.ask())))
        if not asked:
            break
        request = asked.pop()
        search.tell(request, reasoner.complete(search, request))
    before, late = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert len(search.tree) > 500 and max(late) < 2 * max(before)


def test_chains_that_end_early_differ_in_length() -> None:
    search = Search("best_of_n", 20_000)
    solve(search, Reasoner(replace(Problem.make(2, 3), depth=30), early=0.2))
    depths = [search.tree.tokens[node] // 50 for node in search.tree.answered]
    assert len(set(depths)) > 5 and max(depths) > 3 * min(depths)


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
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT_FOLDER, check=False)
    last = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == (not last["holds"])
    assert last["mode"] == "compare" and set(last["600"]) == {"bg_mcts", "best_of_n", "differences"}
