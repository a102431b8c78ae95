"""The plain search grows the Reasoner's tree, whatever kinds of requests there are; the bench finds that, and would find the opposite."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import search_speed
from bench.plain_search import PlainSearch
from bench.search_speed import first_difference, kept, main
from conftest import make_tiny_llama
from specdec.engine import Engine
from specdec.search.answers import AnswerFormat
from specdec.search.bg_mcts import BgMcts
from specdec.search.evaluators import Evaluator
from specdec.search.policies import make_policy
from specdec.search.prompts import Prompts
from specdec.search.reasoner import Problem, Reasoner
from specdec.search.request import Kind, Policy
from specdec.search.search import Search, SearchConfig
from specdec.search.search_tree import SearchTree
from specdec.search.small_budget import SmallBudget
from specdec.search.steps import StopStrings, Tokens
from specdec.sequence import SamplingParams

PROMPTS = Prompts(problem="$problem", prefill="Step 1:")
QUESTION = "What is 2 + 2?"
RULE = StopStrings(strings=tuple("abcdefgh"))  # steps of many lengths, some longer than step_tokens
PARAMS = SamplingParams(temperature=0.9, top_k=50)
SEED = 3


class Letters(AnswerFormat):
    """An answer is the last of these letters; without any, nothing is one."""

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def extract(self, text: str) -> str | None:
        return next((letter for letter in reversed(text) if letter in self.letters), None)

    def canonical(self, written: str) -> str:
        return written


def by_letters(problem: str, steps: list[str]) -> float:
    """A score that depends on the text alone."""
    return (sum(map(ord, "".join(steps))) % 97) / 96


def make_problem(tokenizer: Any, policy: Policy, evaluator: Evaluator = by_letters) -> Problem:
    config = SearchConfig(step_tokens=9, full_tokens=25, forced_tokens=8)
    search = Search(policy, 160, SEED, config)
    return Problem(QUESTION, search, evaluator, PROMPTS.encode(tokenizer, QUESTION), index=2)


def both(
    model: Any, tokenizer: Any, policy: Any, answers: AnswerFormat, width: int, evaluator: Evaluator = by_letters
) -> tuple[SearchTree, SearchTree]:
    """Reasoner's tree with everything on, and the plain one."""
    engine = Engine(model, tokenizer, method="best_first", budget=6, max_rows=width)
    reasoner = Reasoner(engine, RULE, PROMPTS, answers, PARAMS, SEED, width)
    ((_, fast),) = reasoner.run([make_problem(tokenizer, policy(), evaluator)])
    plain = PlainSearch(model, tokenizer, RULE, PROMPTS, answers, PARAMS, engine.eos_token_ids(), SEED, width)
    return fast.tree, plain.run(make_problem(tokenizer, policy(), evaluator)).tree


# Backtracking reopens no answer: where it hands over early, every kind of text occurs.
POLICIES = {"bg_mcts": lambda: BgMcts(refine=True, small=SmallBudget(backtrack=8)), "best_of_n": lambda: make_policy("best_of_n")}
EXPECTED = {
    ("bg_mcts", " jklm"): {Kind.STEP, Kind.CONTINUE, Kind.REFINE},
    ("bg_mcts", ""): {Kind.STEP, Kind.CONTINUE, Kind.FORCED},
    ("best_of_n", " jklm"): {Kind.FULL, Kind.CONTINUE},
    ("best_of_n", ""): {Kind.FULL, Kind.CONTINUE, Kind.FORCED},
}


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("policy", "letters"), EXPECTED)
def test_the_plain_tree_is_the_reasoners(tiny_tokenizer: Any, policy: str, letters: str, width: int) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    fast, plain = both(model, tiny_tokenizer, POLICIES[policy], Letters(letters), width)
    assert len(plain) >= 8
    assert {Kind(kind) for kind in plain.kind[1:]} == EXPECTED[policy, letters]
    assert first_difference(kept(fast), kept(plain)) is None
    assert fast.to_dict() == plain.to_dict(), "texts, answers, kinds and statistics too"


def test_both_judge_a_text_with_the_piece_that_it_goes_on_with(tiny_tokenizer: Any) -> None:
    seen: list[list[str]] = []

    def judged(problem: str, steps: list[str]) -> float:
        seen.append(list(steps))
        return by_letters(problem, steps)

    model = make_tiny_llama(initializer_range=0.3)
    for tree in both(model, tiny_tokenizer, POLICIES["bg_mcts"], Letters(" jklm"), 4, judged):
        nodes = [node for node in range(1, len(tree)) if tree.copies[node]]
        assert any(tree.kind[node] == Kind.CONTINUE and not tree.truncated[node] for node in nodes)
        assert all(tree.steps(node) in seen[: len(nodes)] for node in nodes if not tree.truncated[node])
        del seen[: len(nodes)]
    assert not seen, "every node is judged once"


def test_differences_are_named() -> None:
    tree = [(-1, (), 0.5), (0, (1, 2, 3), 0.5), (1, (4,), 0.7)]
    assert first_difference(tree, tree) is None
    assert first_difference([tree[0], (0, (1, 9, 3), 0.5)], tree) == {"node": 1, "token": 1}
    assert first_difference([tree[0], (0, (1, 2, 3), 0.6)], tree) == {"node": 1, "token": 3}, "the score alone"
    assert first_difference(tree[:2], tree) == {"node": 2, "token": 0}


def run_main(*options: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(options))


def test_one_run(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = search_speed.load_reasoning_tasks  # a random model writes no lines: steps of some tokens instead
    monkeypatch.setattr(search_speed, "load_reasoning_tasks", lambda *a: [replace(t, step=Tokens(count=12)) for t in load(*a)])
    options = ["--model", tiny_folder, "--problems", "1", "--budget", "150", "--groups", "arithmetic", "--width", "2", "--alone"]
    ran = run_main(*options)
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout.splitlines()[-1])
    assert next(iter(found["ways"])) == "all on" and list(found["ways"])[-2:] == ["all off", "model.generate"]
    assert found["differences"] == {} and len({way["tokens"] for way in found["ways"].values()}) == 1
    assert found["ways"]["model.generate"]["tokens_per_step"] == 1 and found["ways"]["model.generate"]["cached_tokens"] == 0
    assert found["ways"]["all off"]["computed_tokens"] > found["ways"]["all on"]["computed_tokens"] > 0
    assert found["worth"].keys() == found["alone"].keys() == {"speculation", "segments", "batches"}
    monkeypatch.setattr(
        search_speed.PlainSearch, "_generate", lambda self, token_ids, request, stream, end: [7] * request.max_tokens
    )
    wrong = run_main(*options)
    assert wrong.exit_code == 1 and json.loads(wrong.stdout.splitlines()[-1])["differences"].keys() == set(found["ways"]) - {
        "model.generate"
    }


@pytest.mark.parametrize("options", [["--groups", "gsm9k"], ["--methods", "suffixx"], ["--policy", "mcsts"]])
def test_bad_options_are_refused(tiny_folder: str, options: list[str]) -> None:
    refused = run_main("--model", tiny_folder, "--problems", "1", *options)
    assert refused.exit_code == 2 and "must be one of" in refused.output
