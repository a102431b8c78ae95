"""Engine: stops inside an accepted path, budgets, rows, samples, bookkeeping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny_models
from conftest import make_tiny_llama, make_tiny_tokenizer
from oracles_engine import Noisy, Plain, greedy, make_prompts
from specdec.draft_tree import DraftTree
from specdec.engine import PHASES, Engine
from specdec.methods import METHODS
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence

NEW = 20
PROMPTS = make_prompts((6, 17, 1, 33, 9))


@functools.lru_cache
def known() -> tuple[Any, dict[tuple[int, ...], list[int]]]:
    """A tiny llama in fp64 and the text after each prompt."""
    model = tiny_models.build("llama").double()
    return model, {tuple(prompt): greedy(model, prompt, NEW) for prompt in PROMPTS}


def make_engine(exact: bool = False, **options: Any) -> Engine:
    model, truth = known()
    return Engine(model, method=options.pop("method", Noisy(truth, exact=exact)), **{"budget": 12, **options})


def check_rows(engine: Engine) -> None:
    """What holds between steps: sequence i owns cache row i, which holds all its tokens but the last."""
    for row, seq in enumerate(engine.rows):
        assert seq.row == row and not seq.finished
        assert engine.cache.lengths[row] == len(seq.token_ids) - 1
        assert seq.buffer.with_path([])[0].tolist() == seq.token_ids
        assert sum(seq.accept_lengths) == seq.output_length


def run(engine: Engine, seqs: list[Sequence]) -> int:
    """Step to the end, checking every state in between; returns the steps."""
    for seq in seqs:
        engine.add(seq)
    steps = 0
    while engine.rows or engine.waiting:
        engine.step()
        check_rows(engine)
        steps += 1
        assert steps < 500
    return steps


def sequences(engine: Engine, prompts: list[list[int]], params: SamplingParams, **fields: Any) -> list[Sequence]:
    return [
        engine.new_sequence(list(prompt), params, Randomness(0, (index, 0)), **fields) for index, prompt in enumerate(prompts)
    ]


# ---- where a text stops -------------------------------------------------------------------------------------------------


def first_use(truth: list[int], start: int) -> int:
    """A place at or after `start` whose token did not occur before."""
    return next(place for place in range(start, len(truth)) if truth[place] not in truth[:place])


@pytest.mark.parametrize("place", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["eos", "stop token", "criterion", "length"])
def test_a_stop_inside_an_accepted_path_cuts_it(kind: str, place: int) -> None:
    _, truth = known()
    engine, continuation = make_engine(exact=True), truth[tuple(PROMPTS[0])]
    place = first_use(continuation, place) if kind != "length" else place
    token, fields, params = continuation[place], {}, SamplingParams(max_new_tokens=NEW)
    if kind == "eos":
        fields = {"eos_token_ids": frozenset([token])}
    elif kind == "stop token":
        params = SamplingParams(max_new_tokens=NEW, stop_token_ids=(token,))
    elif kind == "criterion":
        fields = {"stop_check": lambda seq: seq.output_length == place + 1}
    else:
        params = SamplingParams(max_new_tokens=place + 1)
    stopped, other = sequences(engine, PROMPTS[:1], params, **fields) + sequences(
        engine, PROMPTS[1:2], SamplingParams(max_new_tokens=NEW)
    )
    run(engine, [stopped, other])
    assert stopped.output_ids == continuation[: place + 1]
    assert stopped.finish_reason == {"eos": "eos", "length": "length"}.get(kind, "stop")
    assert sum(stopped.accept_lengths) == place + 1 and all(length > 0 for length in stopped.accept_lengths)
    assert other.output_ids == truth[tuple(PROMPTS[1])] and other.finish_reason == "length"


def test_ignore_eos_and_min_new_tokens() -> None:
    model, truth = known()
    continuation = truth[tuple(PROMPTS[0])]
    place = first_use(continuation, 2)
    model.generation_config.eos_token_id = continuation[place]
    try:
        engine = make_engine(exact=True)
        assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW)).finish_reason == "eos"
        assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW, ignore_eos=True)).token_ids == continuation
        barred = engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW, min_new_tokens=10)).token_ids
        assert continuation[place] not in barred[:10] and barred[:place] == continuation[:place]
    finally:
        model.generation_config.eos_token_id = None


@functools.lru_cache
def speaker() -> tuple[Any, Any, str]:
    """A model with a tokenizer, and the printable text after "abc" (its other tokens never win)."""
    model, tokenizer = make_tiny_llama(), make_tiny_tokenizer()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 10
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ")["input_ids"]
    hidden = torch.full((258,), -1e4)
    hidden[letters] = 0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + hidden)
    ids = greedy(model, tokenizer("abc")["input_ids"], 40)
    return model, tokenizer, tokenizer.decode(ids)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_stop_strings_in_results_and_streams(start: int, width: int) -> None:
    model, tokenizer, text = speaker()
    stop = text[start : start + width]
    truth = {tuple(tokenizer("abc")["input_ids"]): tokenizer(text)["input_ids"]}
    engine = Engine(model, tokenizer, method=Noisy(truth, exact=True, vocab_size=258), budget=12)
    params = SamplingParams(max_new_tokens=40, stop_strings=(stop, "#"))
    result = engine.generate("abc", params)
    end = text.index(stop)
    assert result.text == text[:end] and result.finish_reason == "stop"
    assert tokenizer.decode(result.token_ids) == text[: end + width]  # not a token beyond the stop string
    assert "".join(engine.stream("abc", params)) == text[:end]
    assert not engine.rows


def test_a_stream_is_the_result() -> None:
    model, tokenizer, text = speaker()
    engine = Engine(model, tokenizer, method="ngram", budget=8)
    pieces = list(engine.stream("abc", SamplingParams(max_new_tokens=40)))
    assert "".join(pieces) == text == engine.generate("abc", SamplingParams(max_new_tokens=40)).text and len(pieces) > 1


# ---- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
def test_waiting_prompts_reuse_rows(max_rows: int) -> None:
    _, truth = known()
    engine = make_engine(max_rows=max_rows)
    seqs = [
        engine.new_sequence(list(prompt), SamplingParams(max_new_tokens=4 + 3 * index), Randomness(0, (0, 0)))
        for index, prompt in enumerate(PROMPTS)
    ]
    run(engine, seqs)
    for index, seq in enumerate(seqs):
        assert seq.output_ids == truth[tuple(seq.token_ids[: seq.prompt_len])][: 4 + 3 * index]
    assert engine.cache.rows <= max(1, 2 * max_rows) and engine.last_step.rows <= max_rows
    assert sorted(engine.builder.started) == sorted(engine.builder.finished)  # type: ignore[attr-defined]
    assert {seq.id for seq in seqs} <= set(engine.builder.finished)  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_order_and_batching_change_nothing(temperature: float) -> None:
    _, truth = known()
    params = SamplingParams(max_new_tokens=12, temperature=temperature, top_p=0.9, seed=4)
    engine = make_engine(max_rows=3)
    together = engine.generate(PROMPTS, params)
    plain = Engine(known()[0], method=Plain(), budget=1).generate(PROMPTS, params)
    other = make_engine(method=Noisy(truth, seed=9), max_rows=5, budget=30).generate(PROMPTS, params)
    assert [r.token_ids for r in together] == [r.token_ids for r in plain] == [r.token_ids for r in other]
    assert engine.generate(PROMPTS[:1], params)[0].token_ids == together[0].token_ids
    if temperature == 0:
        assert [r.token_ids for r in engine.generate(PROMPTS[::-1], params)] == [r.token_ids for r in together[::-1]]


def test_samples_of_one_prompt_share_its_prefill_and_differ() -> None:
    engine = make_engine(max_rows=4)
    forwards: list[int] = []
    original = engine.target.prefill
    engine.target.prefill = lambda *args, **kwargs: (forwards.append(1), original(*args, **kwargs))[1]  # type: ignore[method-assign,assignment,return-value]
    samples = engine.generate(PROMPTS[3], SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, n=4))
    assert len(forwards) == 1 and len({tuple(result.token_ids) for result in samples}) == 4
    alone = Engine(known()[0], method=Plain(), budget=1, max_rows=1).generate(
        PROMPTS[3], SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, n=4)
    )
    assert [result.token_ids for result in alone] == [result.token_ids for result in samples]


def test_prompts_that_extend_each_other_do_not_share_too_much() -> None:
    """A live row's last token is not in its cache: a prompt that is a live row's text must not be forked from it blindly."""
    _, truth = known()
    prompt = PROMPTS[1]
    prompts = [prompt, prompt[:-1], [*prompt, truth[tuple(prompt)][0]], [*prompt, *truth[tuple(prompt)][:3]], prompt[:1]]
    model = known()[0]
    found = make_engine(max_rows=5).generate(prompts, SamplingParams(max_new_tokens=8))
    assert [result.token_ids for result in found] == [greedy(model, p, 8) for p in prompts]


# ---- budgets and depths -------------------------------------------------------------------------------------------------


def spy(engine: Engine, look: Callable[[list[DraftTree]], None]) -> None:
    original = engine.target.forward

    def forward(cache: Any, trees: list[DraftTree], first_row: int = 0) -> torch.Tensor:
        look(trees)
        return original(cache, trees, first_row)

    engine.target.forward = forward  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("budget", [1, 2, 7, 33])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_budget_is_a_hard_cap(method: str, budget: int) -> None:
    """Root included; only the published settings keep their papers' sizes. Depths never pass what is left of the text."""
    engine = make_engine(method=method, budget=budget)
    most = [0]

    def look(trees: list[DraftTree]) -> None:
        most[0] = max(most[0], *map(len, trees))
        for seq, tree in zip(engine.rows, trees, strict=True):
            assert (
                (len(tree) <= budget or method.endswith("_published"))
                and tree.depths.max() <= seq.remaining - 1
                and tree.tokens[0] == seq.token_ids[-1]
            )
            for node in range(len(tree)):
                siblings = tree.tokens[tree.children(node)]
                assert len(set(siblings.tolist())) == len(siblings)

    spy(engine, look)
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
    first = engine.generate([prompt, PROMPTS[1]], SamplingParams(max_new_tokens=14))
    assert [len(result.token_ids) for result in first] == [14, 14]
    assert most[0] == 1 if method == "none" or budget == 1 else most[0] >= 1


def test_trees_end_where_the_text_and_the_context_end() -> None:
    model = tiny_models.build("gpt2", n_positions=32).double()  # a table of 32 positions: the next one is an error
    prompt = make_prompts([20])[0]
    truth = {tuple(prompt): greedy(model, prompt, 12)}
    engine = Engine(model, method=Noisy(truth, exact=True, longest=30), budget=40)
    deepest: list[int] = []
    spy(engine, lambda trees: deepest.append(int(trees[0].depths.max()) + len(engine.rows[0].token_ids) - 1))
    result = engine.generate(prompt, SamplingParams(max_new_tokens=12))
    assert result.token_ids == truth[tuple(prompt)] and max(deepest) <= 31
    assert result.steps <= 2  # eleven drafts and the bonus token


def test_a_text_that_outgrows_a_position_table_is_refused_or_ends() -> None:
    model = tiny_models.build("gpt2", n_positions=32)
    prompt = make_prompts([20])[0]
    engine = Engine(model, method=Plain(), budget=4)
    try:
        result = engine.generate(prompt, SamplingParams(max_new_tokens=50))
    except ValueError as error:
        assert "context" in str(error) or "positions" in str(error)
    else:
        assert result.finish_reason == "length" and result.token_ids == greedy(model, prompt, len(result.token_ids))
    assert not engine.rows and engine.generate(prompt, SamplingParams(max_new_tokens=3)).token_ids == greedy(model, prompt, 3)


# ---- bookkeeping --------------------------------------------------------------------------------------------------------


def test_results_count_what_happened() -> None:
    engine = make_engine()
    calls = [0]
    spy(engine, lambda trees: calls.__setitem__(0, calls[0] + 1))
    results = engine.generate(PROMPTS[:3], SamplingParams(max_new_tokens=NEW, logprobs=0))
    for prompt, result in zip(PROMPTS, results, strict=False):
        assert result.prompt_tokens == len(prompt) and sum(result.accept_lengths) == len(result.token_ids) == NEW
        assert result.steps == len(result.accept_lengths) <= calls[0]
        assert result.tokens_per_step == NEW / result.steps > 1
        assert set(result.times) == set(PHASES) and all(seconds >= 0 for seconds in result.times.values())
        assert result.times["forward"] > 0 and result.times["draft"] > 0 and result.text == ""
        assert result.logprobs is not None and len(result.logprobs) == NEW and all(value <= 0 for value in result.logprobs)
    assert calls[0] == max(result.steps for result in results)


def test_logprobs_are_those_of_a_plain_forward() -> None:
    model, _ = known()
    result = make_engine(exact=True).generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW, logprobs=0))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + result.token_ids])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[range(NEW), result.token_ids]
    torch.testing.assert_close(torch.tensor(result.logprobs), expected.float(), rtol=1e-4, atol=1e-5)


def test_last_step() -> None:
    engine = make_engine(exact=True, max_rows=2)
    engine.step()
    assert engine.last_step.rows == engine.last_step.nodes == engine.last_step.emitted == 0  # nothing to do
    seqs = sequences(engine, PROMPTS[:2], SamplingParams(max_new_tokens=NEW))
    for seq in seqs:
        engine.add(seq)
    engine.step()
    stats = engine.last_step
    assert stats.rows == 2 and 1 < stats.nodes <= 12 and stats.emitted == sum(seq.output_length for seq in seqs) > 2
    assert set(stats.times) == set(PHASES) and stats.times["prefill"] > 0
    for seq in seqs:
        engine.cancel(seq)


def test_cancel_wherever_it_is() -> None:
    _, truth = known()
    engine = make_engine(max_rows=2)
    seqs = sequences(engine, PROMPTS[:4], SamplingParams(max_new_tokens=NEW))
    for seq in seqs:
        engine.add(seq)
    engine.step()
    engine.cancel(seqs[0])  # live, not the last row
    engine.cancel(seqs[3])  # waiting
    engine.cancel(seqs[3])  # twice
    check_rows(engine)
    run(engine, [])
    assert [seq.finish_reason for seq in seqs] == ["cancelled", "length", "length", "cancelled"]
    for seq in seqs[1:3]:
        assert seq.output_ids == truth[tuple(seq.token_ids[: seq.prompt_len])]
    before = list(seqs[1].token_ids)
    engine.cancel(seqs[1])  # finished long ago
    assert seqs[1].finish_reason == "length" and seqs[1].token_ids == before
    assert sorted(set(engine.builder.started)) == sorted(engine.builder.finished)  # type: ignore[attr-defined]


def test_an_abandoned_stream_frees_its_row() -> None:
    model, tokenizer, text = speaker()
    engine = Engine(model, tokenizer, method=Plain(), budget=1)
    stream = engine.stream("abc", SamplingParams(max_new_tokens=40))
    assert text.startswith(next(stream)) and len(engine.rows) == 1
    stream.close()
    assert not engine.rows and not engine.waiting
    assert engine.generate("abc", SamplingParams(max_new_tokens=40)).text == text


def test_two_streams_at_once() -> None:
    model, tokenizer, text = speaker()
    engine = Engine(model, tokenizer, method=Plain(), budget=1)
    first, second = (engine.stream("abc", SamplingParams(max_new_tokens=40)) for _ in range(2))
    shown = [next(first), next(second)]
    shown[0] += "".join(first)
    shown[1] += "".join(second)
    assert shown == [text, text]


def test_reset_and_trim() -> None:
    engine = make_engine()
    before = engine.builder.resets  # type: ignore[attr-defined]
    engine.reset()
    assert engine.builder.resets == before + 1  # type: ignore[attr-defined]
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=4))
    held = engine.cache.nbytes
    engine.trim()
    assert engine.cache.nbytes < held
    assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW)).token_ids == known()[1][tuple(PROMPTS[0])]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_reset_makes_a_method_forget(method: str) -> None:
    """The second, reset run takes the steps of the first: what was learned is gone."""
    engine = make_engine(method=method, budget=8)
    runs = []
    for _ in range(2):
        engine.reset()
        runs.append(engine.generate(PROMPTS[1], SamplingParams(max_new_tokens=NEW)).accept_lengths)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_state_survives(method: str, tmp_path: Any) -> None:
    """An engine that loads a state drafts as the one that saved it."""
    model, _ = known()
    warm = Engine(model, method=method, budget=8)
    warm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
    warm.save_state(tmp_path / "state")
    loaded = Engine(model, method=method, budget=8, state=tmp_path / "state")
    results = [
        engine.generate(PROMPTS[1], SamplingParams(max_new_tokens=NEW))
        for engine in (loaded, Engine(model, method=method, budget=8))
    ]
    assert results[0].token_ids == results[1].token_ids
    if method.startswith("token_recycling"):
        assert results[0].steps < results[1].steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget"), ({"budget": True}, "budget"), ({"budget": "many"}, "budget"), ({"budget": 2.5}, "budget"),
        ({"max_rows": 0}, "max_rows"), ({"max_rows": 1.5}, "max_rows"), ({"method": "magic"}, "method must be one of"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        ([[]], "empty"),
        ([[97]], "outside the vocabulary"),
        ([[-1]], "outside the vocabulary"),
        ("text", "tokenizer"),
        (7, "prompts must be"),
        ([[1], [None]], "a prompt must be"),
    ],
)
def test_bad_prompts_leave_the_engine_usable(prompts: Any, message: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts)
    assert not engine.rows and not engine.waiting
    assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=NEW)).token_ids == known()[1][tuple(PROMPTS[0])]
