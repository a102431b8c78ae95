"""The lens of the early exit: least squares as by inversion, laws that come nearer to the model's, nothing left on the model."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import test_architectures as architectures
import tiny_models
from conftest import make_tiny_llama
from oracles import least_squares
from specdec.engine import Engine
from specdec.methods import DRAFTER_METHODS
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams
from specdec.sources import lens as module
from specdec.sources.draft_model import MOST_PAIRS, EarlyExit, stack_path
from specdec.sources.lens import BLOCK, DRIFT, PRIOR, Lens, find_ends
from specdec.target import outputs_of
from specdec.trees.drafted import DraftedTree

SIZE, VOCAB = 12, 40
PROMPTS = [[5, 9, 2, 7], [11, 3, 11, 3, 11, 3, 8], [1], list(range(3, 60))]
GREEDY = SamplingParams(max_new_tokens=40)
SAMPLED = SamplingParams(max_new_tokens=40, temperature=0.8, seed=3)


def make_lens() -> Lens:
    torch.manual_seed(0)
    return Lens(torch.nn.Linear(SIZE, VOCAB, bias=False), SIZE, torch.device("cpu"))


def make_pairs(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """States and what an affine map and some noise make of them."""
    made = torch.Generator().manual_seed(seed)
    early = torch.randn(count, SIZE, generator=made)
    turn, shift = torch.randn(SIZE, SIZE, generator=made), torch.randn(SIZE, generator=made)
    return early, early @ turn + shift + 0.1 * torch.randn(count, SIZE, generator=made)


@pytest.mark.parametrize("drift", [0.0, DRIFT, 0.01])
@pytest.mark.parametrize("sizes", [[1] * 60, [3] * 40, [40, 1, 64, 2, 7], [150]])
def test_it_is_the_oracles_least_squares(sizes: list[int], drift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIFT", drift)
    early, late = make_pairs(sum(sizes))
    lens, calls = make_lens(), list(zip(early.split(sizes), late.split(sizes)))
    for call in calls:
        lens.learn(*call)
    assert lens.pairs == sum(sizes)
    blocks = [block for call in calls for block in zip(*(part.split(BLOCK) for part in call))]
    expected = least_squares(blocks, float(calls[0][0].double().square().mean()), PRIOR, drift)
    torch.testing.assert_close(torch.cat([lens.delta, lens.bias[None]]).double(), expected, rtol=1e-3, atol=1e-4)


def test_without_drift_it_is_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest sum of squares by numpy's solver, in which the prior is as many more rows."""
    monkeypatch.setattr(module, "DRIFT", 0.0)
    early, late = make_pairs(90)
    lens = make_lens()
    lens.learn(early, late)
    weights = torch.full((SIZE + 1,), (PRIOR * float(early.square().mean())) ** 0.5)
    weights[-1] = PRIOR**0.5
    rows = np.concatenate([np.c_[early.numpy(), np.ones(90)], np.diag(weights.numpy())])
    wanted = np.concatenate([(late - early).numpy(), np.zeros((SIZE + 1, SIZE))])
    expected, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    np.testing.assert_allclose(lens.delta.numpy(), expected[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(lens.bias.numpy(), expected[-1], rtol=1e-3, atol=1e-4)


def test_before_it_has_learned_it_is_the_head() -> None:
    lens, (early, late) = make_lens(), make_pairs(20)
    assert torch.equal(lens(early), lens.head(early))
    lens.learn(early, late)
    torch.testing.assert_close(lens(early), lens.head(early + early @ lens.delta + lens.bias))
    assert not torch.equal(lens(early), lens.head(early))
    lens.reset()
    assert torch.equal(lens(early), lens.head(early)) and lens.pairs == 0


def test_it_follows_a_map_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after a change of subject it is as near as one that knows the new subject alone; without drift it is not."""
    errors = {}
    for name, drift, old in (("new alone", DRIFT, 0), ("drift", DRIFT, 3000), ("none", 0.0, 3000)):
        monkeypatch.setattr(module, "DRIFT", drift)
        lens, (early, late) = make_lens(), make_pairs(2500, seed=2)
        lens.learn(*make_pairs(old, seed=1))
        for start in range(0, 2400, 3):
            lens.learn(early[start : start + 3], late[start : start + 3])
        errors[name] = float((late - early - early @ lens.delta - lens.bias)[2400:].square().mean())
    assert errors["drift"] < 1.2 * errors["new alone"] < 0.1 * errors["none"]


def test_states_that_are_no_numbers_teach_nothing() -> None:
    lens, other, (early, late) = make_lens(), make_lens(), make_pairs(9)
    for value, place in ((float("nan"), 2), (float("inf"), 5)):
        early[place, 3] = value
    late[7, 0] = float("nan")
    lens.learn(early, late)
    sound = [0, 1, 3, 4, 6, 8]
    other.learn(early[sound], late[sound])
    assert lens.pairs == 6 and torch.equal(lens.delta, other.delta)
    lens.learn(early[[2, 7]], late[[2, 7]])
    assert lens.pairs == 6 and torch.equal(lens.delta, other.delta)


def test_a_covariance_spoilt_by_rounding_is_forgotten() -> None:
    lens, (early, late) = make_lens(), make_pairs(9)
    lens.learn(early, late)
    assert lens._covariance is not None
    with torch.inference_mode():
        lens._covariance.mul_(-1e6)
    lens.learn(early, late)
    assert lens.pairs == 0 and not lens.delta.any()
    lens.learn(early, late)
    assert lens.pairs == 9


def test_modes_and_default_types_of_the_caller_do_not_matter() -> None:
    early, late = make_pairs(9)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            lens = make_lens()
            lens.learn(early, late)
        lens.learn(early, late)
    finally:
        torch.set_default_dtype(torch.float32)
    lens.learn(early, late)
    lens.reset()
    lens.learn(early, late)
    assert lens.pairs == 9 and lens.delta.dtype == torch.float32


def test_it_stays_sound_over_many_texts() -> None:
    """P as inverted, and positive definite, after 30,000 pairs in steps of three."""
    lens, (early, late) = make_lens(), make_pairs(30_000)
    early *= torch.logspace(0, -3, SIZE)  # some directions hardly ever move
    lens.learn(early[:100], late[:100])
    for start in range(100, 29_999, 3):
        lens.learn(early[start : start + 3], late[start : start + 3])
    assert lens.pairs == 30_000
    assert lens._covariance is not None
    values, most = torch.linalg.eigvalsh(lens._covariance.double()), float(lens._prior.max())
    assert float(values.min()) > 0 and float(values.max()) < 1.01 * most  # what is never seen is no less known than at first


# ---- on models --------------------------------------------------------------------------------------------------------------


def make_model() -> Any:
    model = make_tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight *= 60
    return model


def drafter_of(engine: Engine) -> EarlyExit:
    drafter = engine.builder.model  # type: ignore[attr-defined]
    assert isinstance(drafter, EarlyExit)
    return drafter


@pytest.mark.parametrize("name", [*tiny_models.CONFIGS, *architectures.MORE])
def test_it_finds_the_states_before_the_head(name: str) -> None:
    """The norm of the last layer's output is what the head reads; the model has no hooks afterwards."""
    model = tiny_models.build(name) if name in tiny_models.CONFIGS else architectures.make(name, **architectures.MORE[name])
    ends = find_ends(model, stack_path(model))
    assert ends is not None and model.get_submodule(ends.path) is model.get_output_embeddings()
    assert not hooks(model)
    with torch.inference_mode():
        ids = torch.arange(5, 12)[None]
        output = model(ids, output_hidden_states=True)
        assert output.hidden_states[-1].shape[-1] == ends.size
        with outputs_of([ends.last]) as outputs:
            model(ids)
        torch.testing.assert_close(ends.norm(outputs[ends.last]), output.hidden_states[-1])
    drafter = EarlyExit(model, 1, model.config.vocab_size)
    assert drafter.lens is not None and model.get_submodule(ends.path) is drafter.lens.head


def hooks(model: Any) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


class Halved(LlamaForCausalLM):
    """Its head reads half of what the norm puts out."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, logits_to_keep: int = 0, **options: Any) -> Any:
        states = self.model(input_ids=input_ids, past_key_values=past_key_values, **options)
        logits = self.lm_head(states.last_hidden_state[:, -logits_to_keep:] / 2)
        return CausalLMOutputWithPast(logits=logits, past_key_values=states.past_key_values)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_model_without_such_states_is_read_plainly(params: SamplingParams) -> None:
    model = make_model()
    model.__class__ = Halved
    assert find_ends(model, stack_path(model)) is None and not hooks(model)
    engine = Engine(model, method="draft_model", drafter="early_exit:1", budget=12)
    assert drafter_of(engine).lens is None and engine.target.watched == ()
    same_as_plain(engine, model, params)


def same_as_plain(engine: Engine, model: Any, params: SamplingParams) -> None:
    plain = Engine(model, method="none").generate(PROMPTS, params)
    assert [found.token_ids for found in engine.generate(PROMPTS, params)] == [result.token_ids for result in plain]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_learns_every_prompt_and_every_accepted_token(params: SamplingParams, rows: int) -> None:
    """Each token of the texts once, but a text's last, which is never read; with the states of a forward over the whole text."""
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12, max_rows=rows)
    drafter = drafter_of(engine)
    pairs: list[torch.Tensor] = []
    assert drafter.lens is not None
    learn, drafter.lens.learn = drafter.lens.learn, lambda early, late: pairs.append(torch.cat([early, late], 1))  # type: ignore[method-assign]
    found = engine.generate(PROMPTS, params)
    drafter._learn()
    expected = []
    with torch.inference_mode():
        for prompt, result in zip(PROMPTS, found):
            states = model(torch.tensor([[*prompt, *result.token_ids[:-1]]]), output_hidden_states=True).hidden_states
            expected.append(torch.cat([model.model.norm(states[2]), states[-1]], 2)[0])
    got, wanted = torch.cat(pairs), torch.cat(expected)
    assert got.shape == wanted.shape
    distances = torch.cdist(wanted.double(), got.double())
    assert float(distances.min(1).values.max()) < 1e-3 and float(distances.min(0).values.max()) < 1e-3
    drafter.lens.learn = learn  # type: ignore[method-assign]


@pytest.mark.parametrize("method", DRAFTER_METHODS)
def test_no_text_depends_on_it(method: str) -> None:
    """Greedy text is the model's whatever was learned; the model has no hooks and the weights that it had."""
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, method=method, drafter="early_exit:2", budget=12)
    for _ in range(2):
        same_as_plain(engine, model, GREEDY)
    assert drafter_of(engine).lens.pairs > 100  # type: ignore[union-attr]
    assert not hooks(model) and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("lens", [False, True])
def test_the_engine_knows_that_it_remembers(lens: bool) -> None:
    """So that the rules that toss coins give each request its own: see test_sampled_trees."""
    model = make_model()
    engine = Engine(model, method="hybrid", drafter=EarlyExit(model, 1, model.config.vocab_size, lens=lens), budget=8)
    assert engine.builder.remembers == lens
    texts = [engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=20, temperature=1.0, seed=3)).token_ids for _ in range(2)]
    assert (texts[0] == texts[1]) == (not lens)


def test_a_score_in_the_middle_of_a_step_teaches_nothing() -> None:
    """A stopping criterion that scores the text so far with the same engine, three rows at once."""
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    plain = Engine(model, method="none").generate(PROMPTS, GREEDY)

    def scores(seq: Any) -> bool:
        engine.score(list(seq.token_ids[-3:]))
        return False

    sequences = [
        engine.new_sequence(list(prompt), GREEDY, Randomness(0, i), stop_check=scores) for i, prompt in enumerate(PROMPTS)
    ]
    engine.run(sequences)
    assert [seq.output_ids for seq in sequences] == [result.token_ids for result in plain]
    drafter = drafter_of(engine)
    drafter._learn()
    assert drafter.lens is not None
    assert drafter.lens.pairs == sum(len(prompt) + len(result.token_ids) - 1 for prompt, result in zip(PROMPTS, plain))


def test_what_cannot_be_learned_costs_no_text(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    learn = Lens.learn

    def full(self: Lens, early: torch.Tensor, late: torch.Tensor) -> None:
        if len(early) > 50:
            raise torch.OutOfMemoryError("no memory")
        learn(self, early, late)

    monkeypatch.setattr(Lens, "learn", full)
    for _ in range(2):
        same_as_plain(engine, model, GREEDY)
    assert "forgets what it has learned (no memory)" in caplog.text
    assert len(drafter_of(engine)._pairs) < MOST_PAIRS


def test_under_autocast() -> None:
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(engine.generate(PROMPTS[3], GREEDY).token_ids) == 40
    assert drafter_of(engine).lens.pairs > 50  # type: ignore[union-attr]


def test_weights_are_freed_with_the_engine() -> None:
    model = make_model()
    weight = weakref.ref(model.model.layers[0].mlp.gate_proj.weight)
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    engine.generate(PROMPTS[0], GREEDY)
    gc.collect()
    gc.disable()
    try:
        del engine, model
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_whose_forward_was_replaced_is_refused_by_name() -> None:
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda *given, **options: forward(*given, **options)
    with pytest.raises(ValueError, match="the forward of its LlamaModel was replaced"):
        Engine(model, method="draft_model", drafter="early_exit:2", budget=12)


def test_reset_forgets() -> None:
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    first = engine.generate(PROMPTS[3], SAMPLED)
    engine.generate(PROMPTS[1], SAMPLED)
    engine.reset()
    lens = drafter_of(engine).lens
    assert lens is not None and lens.pairs == 0 and not lens.delta.any()
    again = engine.generate(PROMPTS[3], SAMPLED)
    assert (again.token_ids, again.steps) == (first.token_ids, first.steps)


def test_long_waits_are_learned_without_a_draft() -> None:
    """Where another builder drafts all the time, states do not pile up."""
    model = make_model()
    drafter = EarlyExit(model, 1, model.config.vocab_size)
    engine = Engine(model, method=DraftedTree(drafter), budget=1)
    engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=200))
    assert len(drafter._pairs) < MOST_PAIRS and drafter.lens is not None and drafter.lens.pairs > 100


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_pays_on_the_embedded_model(embedded: tuple[Any, Any], temperature: float) -> None:
    """The same text in fewer steps than with the layers' plain output; float32."""
    model, tokenizer = embedded
    params = SamplingParams(max_new_tokens=64, temperature=temperature, seed=1)
    prompt = [{"role": "user", "content": "Write a short story about a farmer, his old dog and a storm that comes at night."}]
    results = []
    for lens in (False, True):
        drafter = EarlyExit(model, 20, model.config.vocab_size, lens=lens)
        results.append(Engine(model, tokenizer, method=DraftedTree(drafter), budget=20).generate(prompt, params))
    assert results[0].token_ids == results[1].token_ids
    assert results[1].steps < 0.9 * results[0].steps


def test_compiled_steps_teach_nothing_but_prompts_do() -> None:
    """What the target tells of a compiled step is nothing, rather than the states of an earlier forward."""
    model = make_model()
    engine = Engine(model, method="draft_model", drafter="early_exit:2", budget=12)
    drafter, target = drafter_of(engine), engine.target
    forward = type(target).forward

    def compiled(cache: Any, trees: Any, first_row: int = 0, known: Any = None) -> torch.Tensor:
        target.compiled = lambda *_: forward_eagerly(cache, trees, first_row, known)  # type: ignore[assignment]
        try:
            return forward(target, cache, trees, first_row, known)
        finally:
            target.compiled = None

    def forward_eagerly(cache: Any, trees: Any, first_row: int, known: Any) -> torch.Tensor:
        target.compiled = None
        return forward(target, cache, trees, first_row, known)

    target.forward = compiled  # type: ignore[method-assign]
    same_as_plain(engine, model, GREEDY)
    assert drafter.lens is not None and drafter.lens.pairs == sum(len(prompt) - 1 for prompt in PROMPTS)
