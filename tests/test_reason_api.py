"""specdec.reason: results, evaluators by name, resume, checkpoints, cancel; bad input is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from conftest import make_tiny_llama
from specdec.search import GenerationError, Kind, NodeStatus, SearchConfig, Status
from specdec.search.answers import AnswerFormat, ExactAnswers, MathAnswers
from specdec.search.bg_mcts import BgMcts
from specdec.search.model_evaluators import YesNo
from specdec.search.progress import Event
from specdec.search.prompts import Prompts
from specdec.search.reason import EVALUATORS, ReasonResult
from specdec.search.worker import Worker

PROBLEM = "What is 2 + 2?"
OPTIONS: dict[str, Any] = {"temperature": 1.0, "step": "tokens:7", "config": SearchConfig(step_tokens=16), "evaluator": None}


class Letters(AnswerFormat):
    """The last letter of a text that ends with one of a few: a random model answers now and then."""

    def extract(self, text: str) -> str | None:
        return text[-1] if text[-1:] in set("aeiouAEIOU0123456789") else None

    def canonical(self, written: str) -> str:
        return written.casefold()


def by_text(problem: str, steps: Seq[str]) -> float:
    """A score that depends on the text alone."""
    return (sum(map(ord, "".join(steps))) % 97) / 96


@pytest.fixture(scope="module")
def engine(tiny_tokenizer: Any) -> specdec.Engine:
    return specdec.Engine(make_tiny_llama(initializer_range=0.3), tiny_tokenizer, method="best_first", budget=6, max_rows=4)


def solve(engine: Any, budget: int = 150, **options: Any) -> ReasonResult:
    return specdec.reason(engine, PROBLEM, budget, **{"answers": Letters(), **OPTIONS, **options})


def tree_of(result: ReasonResult) -> dict[str, Any]:
    return result.tree.to_dict()


def test_a_result(engine: specdec.Engine) -> None:
    events: list[Event] = []
    result = solve(engine, 300, evaluator=by_text, on_event=events.append)
    assert 0 < result.used <= result.budget == 300 and result.problem == PROBLEM
    assert result.answer == result.answers[0].value and result.status in (Status.ANSWERED, Status.TRUNCATED)
    assert result.text == "".join(result.tree.steps(result.node))
    assert result.cached_tokens > 0 and result.evaluator_tokens == 0
    assert events[-1].status == result.status and events[-1].used == result.used
    assert len(events) == result.tree.to_networkx().number_of_nodes()  # one a text, and the end in place of the root


def test_a_bare_model_is_left_as_it_was(engine: specdec.Engine, tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(initializer_range=0.3).train()
    config, attention = model.config.to_dict(), model.config._attn_implementation
    result = solve(model, tokenizer=tiny_tokenizer, evaluator=by_text)
    assert tree_of(result) == tree_of(solve(engine, evaluator=by_text))
    assert model.training and model.config.to_dict() == config and model.config._attn_implementation == attention


@pytest.mark.parametrize("name", EVALUATORS)
def test_evaluators_by_name(engine: specdec.Engine, name: str) -> None:
    problem = "Use the numbers 3, 5, 7 to make 26."
    result = specdec.reason(engine, problem, 60, **{**OPTIONS, "evaluator": name, "answers": Letters()})
    scores = [result.tree.q[node] for node in range(1, len(result.tree)) if not result.tree.unscored[node]]
    assert scores and all(0 <= score <= 1 for score in scores)
    assert (result.evaluator_tokens > 0) == (name in ("yes_no", "log_probability", "self_consistency"))


@pytest.mark.parametrize("policy", ["bg_mcts", "bg_mcts_coded", "mcts", "best_of_n", "beam", "rebase", "refinement", "tree_bon"])
def test_every_policy_keeps_the_budget(engine: specdec.Engine, policy: str) -> None:
    for budget in (0, 1, 40, 120):
        result = solve(engine, budget, policy=policy, evaluator=by_text)
        assert result.used <= budget and (len(result.tree) > 1) == (budget > 0)


def test_resume_goes_on_with_the_same_tree(engine: specdec.Engine) -> None:
    first = solve(engine, 80, evaluator=by_text)
    before, nodes = first.used, len(first.tree)
    tokens = list(first.tree.token_ids)
    more = first.resume(80)
    assert more.budget == 160 and before < more.used <= 160 and len(more.tree) > nodes
    assert list(more.tree.token_ids)[:nodes] == tokens
    with pytest.raises(ValueError, match="extra must be a whole number"):
        more.resume(-1)


def test_a_cancelled_search_goes_on_once_the_event_is_cleared(engine: specdec.Engine) -> None:
    cancel = threading.Event()
    stopped = solve(engine, evaluator=by_text, on_event=lambda event: event.node == 3 and cancel.set(), cancel=cancel)
    assert stopped.status == Status.CANCELLED
    cancel.clear()
    assert tree_of(stopped.resume(0)) == tree_of(solve(engine, evaluator=by_text))


def test_a_policy_object_serves_many_problems(engine: specdec.Engine) -> None:
    policy = BgMcts(k=2)
    options = {**OPTIONS, "answers": Letters(), "evaluator": by_text, "policy": policy}
    many = dict(specdec.reason_all(engine, [PROBLEM, "Name a river."], 100, **options))
    again = specdec.reason(engine, PROBLEM, 100, **options)
    assert isinstance(many[0], ReasonResult) and tree_of(many[0]) == tree_of(again)


def test_places_fix_the_texts(engine: specdec.Engine) -> None:
    options = {**OPTIONS, "answers": Letters(), "evaluator": by_text}
    all_of_them = dict(specdec.reason_all(engine, ["a", "b", "c"], 60, **options))
    (one,) = specdec.reason_all(engine, ["c"], 60, places=[2], **options)
    assert one[0] == 2 and isinstance(one[1], ReasonResult) and isinstance(all_of_them[2], ReasonResult)
    assert tree_of(one[1]) == tree_of(all_of_them[2])


def test_a_checkpoint_is_resumed_and_others_are_refused(engine: specdec.Engine, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    cancel = threading.Event()

    def stop_early(event: Event) -> None:
        if event.used > 50:
            cancel.set()

    stopped = solve(engine, evaluator=by_text, checkpoint=path, on_event=stop_early, cancel=cancel)
    assert stopped.status == Status.CANCELLED and stopped.used < 150
    whole = solve(engine, evaluator=by_text)
    resumed = solve(engine, evaluator=by_text, checkpoint=path)
    assert tree_of(resumed) == tree_of(whole) and resumed.status == whole.status
    assert resumed.generated == whole.used - stopped.used > 0, "what the first call generated is not counted again"
    assert 0 < resumed.steps < whole.steps and whole.generated == whole.used >= whole.steps
    again = solve(engine, evaluator=by_text, checkpoint=path)
    assert tree_of(again) == tree_of(whole) and again.generated == again.steps == 0 < whole.seconds
    for changed in ({"budget": 151}, {"seed": 1}, {"policy": "mcts"}, {"temperature": 0.5}, {"evaluator": None}):
        with pytest.raises(ValueError, match="holds a search with"):
            solve(engine, **{"evaluator": by_text, "checkpoint": path, **changed})


def test_what_a_checkpoint_must_share(engine: specdec.Engine, tmp_path: Path) -> None:
    """A wrong resume would pass for a right one: every part of what was asked for is in the file."""
    path = tmp_path / "run.json"
    options: dict[str, Any] = {"evaluator": YesNo.of(engine), "answers": ExactAnswers(), "checkpoint": path}
    solve(engine, 40, **options)
    solve(engine, 40, **options)
    other: list[dict[str, Any]] = [
        {"evaluator": YesNo.of(engine, "Is it right? $steps")},
        {"answers": ExactAnswers(case=True)},
        {"answers": "number"},
        {"prompts": Prompts(answer="So:")},
        {"prompts": Prompts(reconsider="Again:")},
    ]
    for changed in other:
        with pytest.raises(ValueError, match="holds a search with (identity|config)"):  # cues fill the window, which is config
            solve(engine, 40, **{**options, **changed})
    with pytest.raises(ValueError, match="holds a search with identity"):
        list(specdec.reason_all(engine, [PROBLEM], 40, **{**OPTIONS, **_many(options), "places": [1]}))
    halves = specdec.Engine(make_tiny_llama(initializer_range=0.3).bfloat16(), engine.tokenizer, method="none")
    with pytest.raises(ValueError, match="holds a search with identity"):
        solve(halves, 40, **{**options, "evaluator": YesNo.of(halves)})


def _many(options: dict[str, Any]) -> dict[str, Any]:
    """The options of reason as those of reason_all."""
    return {**{name: value for name, value in options.items() if name != "checkpoint"}, "checkpoints": [options["checkpoint"]]}


def test_a_smaller_context_window_is_kept(engine: specdec.Engine) -> None:
    """The model's own took its place."""
    prompt = Prompts().encode(engine.tokenizer, PROBLEM)
    config = SearchConfig(step_tokens=16, context_window=len(prompt) + 20)
    result = solve(engine, config=config)
    assert max(result.tree.path_tokens) <= 20 < max(solve(engine).tree.path_tokens)
    assert solve(engine, config=replace(config, context_window=10**9)).used == solve(engine).used


@pytest.mark.parametrize("name", ["places", "checkpoints"])
def test_two_problems_share_nothing(engine: specdec.Engine, tmp_path: Path, name: str) -> None:
    given = [3, 3] if name == "places" else [tmp_path / "run.json"] * 2
    with pytest.raises(ValueError, match=f"{name} must all be different, got .* twice"):
        list(specdec.reason_all(engine, ["a", "b"], 40, **{**OPTIONS, name: given}))


def test_a_kept_result_keeps_no_process(engine: specdec.Engine) -> None:
    """A worker is started for answers in mathematics; results lay there with one each."""
    pytest.importorskip("math_verify")
    started: list[Worker] = []
    start = Worker._started

    def counted(self: Worker) -> Any:
        started.append(self)
        return start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_started", counted)
        patch.setattr(MathAnswers, "extract", lambda self, text: "1/2" if text.strip() else None)
        result = solve(engine, 40, answers="math")
        assert started and all(worker._process is None for worker in started)
        before = len(started)
        patch.setattr(MathAnswers, "extract", lambda self, text: "1/4" if text.strip() else None)
        result.resume(40)
        assert len(started) > before and all(worker._process is None for worker in started), "it starts again, and ends again"


def test_a_broken_evaluator_is_a_note_and_best_of_n(engine: specdec.Engine) -> None:
    def broken(problem: str, steps: Seq[str]) -> float:
        raise RuntimeError("no score")

    with pytest.warns(UserWarning, match="3 evaluations failed in a row"):
        result = solve(engine, evaluator=broken)
    assert any("best-of-n" in note for note in result.notes) and result.used <= 150


def test_an_evaluator_that_does_not_know_its_price_cannot_break_the_budget(engine: specdec.Engine) -> None:
    config = SearchConfig(step_tokens=16, count_evaluator=True, evaluator_max_tokens=9)
    with pytest.warns(UserWarning, match="the evaluator spent 10 tokens, 9 are allowed"):
        result = solve(engine, evaluator=lambda problem, steps: (0.5, 10), config=config)
    assert any("best-of-n" in note for note in result.notes) and 100 < result.used <= 150
    assert result.used == sum(result.tree.tokens) + result.evaluator_tokens


def test_a_failing_model_gives_the_partial_result(tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    engine = specdec.Engine(model, tiny_tokenizer, method="none", max_rows=4)
    calls, forward = [0], engine.target.forward

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > 20:
            raise RuntimeError("the machine is on fire")
        return forward(*args, **options)

    engine.target.forward = failing  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match="failed twice on request .*RuntimeError: the machine is on fire") as failure:
        solve(engine)
    partial = failure.value.result
    assert (
        isinstance(partial, ReasonResult) and 0 < partial.used <= 150 and str(failure.value.__cause__) == "the machine is on fire"
    )
    assert not engine.rows and not engine.waiting
    assert NodeStatus.PENDING not in partial.tree.status, "all that was in flight has been told"
    both = dict(specdec.reason_all(engine, [PROBLEM, "Name a river."], 100, **{**OPTIONS, "answers": Letters()}))
    assert all(isinstance(each, GenerationError) for each in both.values()), "each search has its own error"
    engine.target.forward = forward  # type: ignore[method-assign]
    assert partial.used < partial.resume(0).used <= 150


def test_a_model_that_fails_once_costs_a_retry(tiny_tokenizer: Any) -> None:
    """As out of memory in a batched forward: what had been generated by then is charged, and the texts are drawn anew."""
    engine = specdec.Engine(make_tiny_llama(initializer_range=0.3), tiny_tokenizer, method="none", max_rows=4)
    calls, forward = [0], engine.target.forward

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **options)

    engine.target.forward = failing  # type: ignore[method-assign]
    result = solve(engine, policy="mcts")
    tree = result.tree
    assert 100 < result.used <= 150 and result.used == sum(tree.tokens)
    again = [node for node in range(1, len(tree)) if tree.tokens[node] == len(tree.token_ids[node]) + 4]
    assert again == [1, 2], "both texts in flight had four tokens"


def test_a_prompt_beyond_the_window_is_no_answer(engine: specdec.Engine) -> None:
    with pytest.warns(UserWarning, match="fills the context window"):
        results = dict(specdec.reason_all(engine, ["x" * 3000, PROBLEM], 60, **{**OPTIONS, "answers": Letters()}))
    assert isinstance(results[0], ReasonResult) and results[0].status == Status.NO_ANSWER and results[0].used == 0
    assert "fills the context window" in results[0].notes[0]
    assert isinstance(results[1], ReasonResult) and results[1].used > 0


def test_cues_near_the_end_of_the_window(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted; a driver that does not count them loses that search alone, and what it found is there."""
    prompt = len(Prompts().encode(tiny_tokenizer, PROBLEM))
    model = make_tiny_llama(initializer_range=0.3, max_position_embeddings=prompt + 150)
    engine = specdec.Engine(model, tiny_tokenizer, method="none", max_rows=2)
    cues = Prompts().cue_tokens(tiny_tokenizer, engine.eos_token_ids())
    assert 50 < cues < 100
    options = {**OPTIONS, "answers": Letters(), "policy": "refinement", "width": 1}
    counted = specdec.reason(engine, PROBLEM, 300, **{**options, "config": SearchConfig(step_tokens=16)})
    assert Kind.REFINE in counted.tree.kind and counted.used > 250
    monkeypatch.setattr(Prompts, "cue_tokens", lambda *_: 0)
    uncounted = dict(specdec.reason_all(engine, [PROBLEM, PROBLEM], 300, **{**options, "config": SearchConfig(step_tokens=16)}))
    for error in uncounted.values():
        assert isinstance(error, GenerationError) and "fix: shorten the prompt" in str(error)
        assert error.result.used > 0 and error.result.answer is not None
    assert not engine.rows and not engine.waiting


def test_at_temperature_0_nothing_is_drawn_twice(engine: specdec.Engine) -> None:
    result = solve(engine, temperature=0.0, evaluator=by_text)
    assert all(len(children) <= 1 for children in result.tree.children)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget must be a whole number"),
        ({"budget": float("nan")}, "budget must be a whole number"),
        ({"policy": "magic"}, "policy must be one of"),
        ({"evaluator": "magic"}, "evaluator must be one of yes_no"),
        ({"evaluator": 3}, "evaluator must be callable"),
        ({"answers": "magic"}, "answers must be one of"),
        ({"step": "magic"}, "step must be one of"),
        ({"temperature": -1.0}, "temperature must"),
        ({"width": 0}, "width must be an int >= 1"),
        ({"kv_megabytes": -1.0}, "megabytes must be at least 0"),
        ({"prompts": "x"}, "prompts must be Prompts"),
        ({"config": {}}, "config must be a SearchConfig"),
        ({"seed": 1.5}, "seed must be an int"),
    ],
)
def test_bad_input(engine: specdec.Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(engine, **options)


def test_bad_problem_and_model(engine: specdec.Engine) -> None:
    with pytest.raises(ValueError, match="problem must be a string"):
        specdec.reason(engine, ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="problem must be a string"):
        specdec.reason(engine, " ")
    with pytest.raises(ValueError, match="problems must be strings, got one"):
        specdec.reason_all(engine, PROBLEM)
    for name in ("places", "checkpoints"):
        with pytest.raises(ValueError, match=f"{name} must have one entry a problem"):
            list(specdec.reason_all(engine, ["a"], 0, answers="exact", **{name: []}))
    with pytest.raises(ValueError, match="reasoning needs a tokenizer"):
        specdec.reason(make_tiny_llama(), PROBLEM, answers="number")
    assert Prompts().prefill == "Step 1:"
