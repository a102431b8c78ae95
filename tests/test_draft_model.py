"""Draft models: their cache keeps step with the text, their trees grow level by level, and no draft changes what is said."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec import DRAFTER_METHODS, Engine, SamplingParams, accelerate
from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, Source
from specdec.sources.draft_model import DraftModel, EarlyExit, check_tokenizers, first_layers
from specdec.sources.suffix_automaton import SEPARATOR, SuffixSource
from specdec.target import TargetModel
from specdec.trees.by_model import Costs
from specdec.trees.chain import Chain
from specdec.trees.drafted import DraftedTree

PROMPTS = [[5, 9, 2, 7], [11, 3, 11, 3, 11, 3, 8], [1], list(range(3, 60))]
GREEDY = SamplingParams(max_new_tokens=40)


@pytest.fixture
def sharp() -> Any:
    """A tiny model that is sure of what it says, as real ones are: its greedy text is worth drafting deep."""
    model = make_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 60
    return model


def perturbed(model: Any, noise: float, seed: int = 1) -> Any:
    """A model that mostly agrees with another: its weights with noise."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def drafted(model: Any, drafter: Any, **options: Any) -> tuple[Engine, DraftedTree]:
    builder = DraftedTree(DraftModel(drafter, model.config.vocab_size), **options)
    return Engine(model, method=builder, budget=12), builder


def same_as_plain(engine: Engine, model: Any, params: SamplingParams) -> list[Any]:
    """The engine's results for PROMPTS, whose texts are those of plain decoding."""
    plain = Engine(model, method="none").generate(PROMPTS, params)
    found = engine.generate(PROMPTS, params)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    return found


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    """PROMPTS are in the engine, to be stepped by hand; cancelled at the end."""
    sequences = engine._sequences(PROMPTS, [GREEDY] * len(PROMPTS))
    with engine._running(sequences):
        yield


def test_growing_a_tree_level_by_level_gives_its_logits(sharp: Any) -> None:
    """Two rows whose levels have different sizes, against one forward of the whole trees and across a growing cache."""
    target = TargetModel(sharp)
    trees = [DraftTree.from_paths(4, [[7, 1, 2], [7, 3], [9, 1, 5]]), DraftTree.from_paths(6, [[8, 2], [5]])]
    levels = [[1, 3, 6, 8], [1, 3, 4, 4]]  # nodes of each tree after each level
    orders = [[0, 1, 5, 2, 4, 6, 3, 7], [0, 1, 3, 2]]
    trees = [reordered(tree, order) for tree, order in zip(trees, orders)]

    def prefilled(capacity: int) -> Any:
        cache = target.new_cache(2, capacity)
        target.prefill(cache, 0, [3, 1, 4, 1, 5])
        target.prefill(cache, 1, [9, 2])
        return cache

    whole = target.forward(prefilled(64), trees)
    cache, known = prefilled(6), [0, 0]
    for level in range(4):
        sizes = [row[level] for row in levels]
        logits = target.forward(cache, [tree.prefix(size) for tree, size in zip(trees, sizes)], known=known)
        for row, (old, size) in enumerate(zip(known, sizes)):
            torch.testing.assert_close(logits[row, : size - old], whole[row, old:size], rtol=1e-5, atol=1e-5)
        known = sizes


def reordered(tree: DraftTree, order: list[int]) -> DraftTree:
    place = {node: i for i, node in enumerate(order)} | {-1: -1}
    return DraftTree(tree.tokens[order], [place[int(tree.parents[node])] for node in order])  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_greedy_text_is_that_of_the_target(sharp: Any, noise: float) -> None:
    engine, builder = drafted(sharp, perturbed(sharp, noise))
    found = same_as_plain(engine, sharp, GREEDY)
    assert [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == [result.token_ids for result in found]
    assert builder.model._owners == []
    if noise == 0.0:  # the drafter is the target: nothing is rejected but for want of depth
        assert sum(len(result.token_ids) for result in found) > 3 * sum(result.steps for result in found)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_seed_gives_the_same_text_with_a_drafter(sharp: Any, noise: float, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3, **options)
    engine, _ = drafted(sharp, perturbed(sharp, noise))
    found = same_as_plain(engine, sharp, params)
    if noise == 0.0 and "repetition_penalty" not in options:  # shared noise: the same law draws the same token
        assert sum(len(result.token_ids) for result in found) > 3 * sum(result.steps for result in found)


def test_the_cache_keeps_step(sharp: Any) -> None:
    """After every step the drafter's rows hold the committed text, and its laws are those of a fresh drafter."""
    engine, builder = drafted(sharp, perturbed(sharp, 0.3))
    model = builder.model
    with running(engine):
        for _ in range(6):
            engine.step()
            growths, logits = model.grow(engine.rows, [()] * len(engine.rows))
            for seq, growth, row in zip(engine.rows, growths, logits):
                assert model.cache.lengths[seq.row] == len(seq.token_ids) - 1
                assert growth.tokens == [seq.token_ids[-1]]
                fresh = DraftModel(model._model, model.vocab_size)
                alone = type(seq)(0, list(seq.token_ids), GREEDY, seq.randomness, row=0)
                torch.testing.assert_close(row, fresh.grow([alone], [()])[1][0], rtol=1e-4, atol=1e-4)
    assert model._owners == []


def test_a_drafter_that_fails_costs_no_text(sharp: Any) -> None:
    """NaN everywhere."""
    drafter = make_tiny_llama()
    with torch.no_grad():
        drafter.lm_head.weight.fill_(0.1)
    builder = DraftedTree(DraftModel(drafter, sharp.config.vocab_size))  # it passes the check ...
    with torch.no_grad():
        drafter.lm_head.weight.fill_(float("nan"))  # ... and fails later
    same_as_plain(Engine(sharp, method=builder, budget=12), sharp, GREEDY)
    same_as_plain(Engine(sharp, method=builder, budget=12), sharp, SamplingParams(max_new_tokens=10, temperature=1.0, seed=1))


@pytest.mark.parametrize("vocab_size", [200, 300])
def test_another_vocabulary_size(sharp: Any, vocab_size: int) -> None:
    """A drafter with fewer tokens never drafts the others; one with more is cut."""
    engine, _ = drafted(sharp, make_tiny_llama(vocab_size=vocab_size))
    plain = Engine(sharp, method="none").generate(PROMPTS[0], GREEDY)
    assert engine.generate(PROMPTS[0], GREEDY).token_ids == plain.token_ids


def test_a_text_longer_than_the_drafters_context(sharp: Any) -> None:
    drafter = make_tiny_llama(max_position_embeddings=40)
    engine, _ = drafted(sharp, drafter)
    same_as_plain(engine, sharp, GREEDY)


def test_other_rows_draft_beside_a_text_longer_than_the_drafters_context(sharp: Any) -> None:
    """Rows 0, 2 and 3 do, row 1 is longer; it once kept the whole batch from drafting."""
    drafter = perturbed(sharp, 0.0)
    drafter.config.max_position_embeddings = 50
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[1], PROMPTS[2]]
    engine, builder = drafted(sharp, drafter)
    with engine._running(engine._sequences(prompts, [GREEDY] * 4)):
        engine._admit()
        trees = builder.build(engine.rows, [8] * 4, [4] * 4)
        assert [len(tree) for tree in trees] == [8, 1, 8, 8]
        assert [int(tree.tokens[0]) for tree in trees] == [prompt[-1] for prompt in prompts]
    plain = Engine(sharp, method="none").generate(prompts, GREEDY)
    found = engine.generate(prompts, GREEDY)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert found[1].steps == 40 and all(found[row].steps < 20 for row in (0, 2, 3))


@pytest.mark.parametrize("method", DRAFTER_METHODS)
@pytest.mark.parametrize("layers", [1, 2])
def test_early_exit(method: str, layers: int) -> None:
    """The target's own first layers draft over the engine's cache; the model is as it was."""
    model = make_tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight *= 60
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, method=method, budget=12, drafter=f"early_exit:{layers}")
    assert engine.builder.model.cache is engine.cache  # type: ignore[attr-defined]
    same_as_plain(engine, model, GREEDY)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_early_exit_reads_the_same_as_the_first_layers_alone(sharp: Any) -> None:
    """Over the engine's cache, with prompts and commits of the target's, its laws are those of a model of these layers."""
    drafter = EarlyExit(sharp, 1, sharp.config.vocab_size, lens=False)
    engine = Engine(sharp, method="draft_model", budget=8, drafter=drafter)
    with running(engine):
        for _ in range(4):
            engine.step()
            _, logits = drafter.grow(engine.rows, [()] * len(engine.rows))
            for seq, row in zip(engine.rows, logits):
                with torch.inference_mode():
                    expected = first_layers(sharp, 1)(torch.tensor([seq.token_ids])).logits[0, -1:]
                torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "spectr"}, "method 'spectr' needs a draft model; fix: Engine"),
        ({"method": "goose", "drafter": "early_exit:1"}, "method 'goose' uses no drafter; fix: one of draft_model, "),
        ({"drafter": "early_exit:2"}, r"layers must be an int in \[1, 1\], the model has 2, got 2"),
        ({"drafter": "early_exit"}, "drafter must say how many layers, such as"),
        ({"drafter": "/no/such/model"}, "no folder /no/such/model"),
        ({"method": "magic"}, "method must be one of none, .*, draft_model, .*got 'magic'"),
    ],
)
def test_bad_drafters(sharp: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        Engine(sharp, **options)


def test_a_loaded_drafter(sharp: Any, tiny_folder: str, tiny_tokenizer: Any) -> None:
    engine = Engine(sharp, tiny_tokenizer, drafter=tiny_folder, budget=8)
    assert engine.generate(PROMPTS[0], GREEDY).token_ids == Engine(sharp, method="none").generate(PROMPTS[0], GREEDY).token_ids
    assert type(engine.builder).__name__ == "ByRate"


def test_accelerate_with_a_drafter(sharp: Any) -> None:
    ids = torch.tensor([PROMPTS[1]])
    expected = sharp.generate(ids, max_new_tokens=20, do_sample=False)
    with accelerate(sharp, method="draft_model", budget=8, drafter=perturbed(sharp, 0.3)) as engine:
        assert torch.equal(sharp.generate(ids, max_new_tokens=20, do_sample=False), expected)
    assert engine.builder.forwards > 0


def with_spine(model: Any, drafter: Any, **options: Any) -> tuple[Engine, DraftedTree]:
    return drafted(model, drafter, spine=Chain(SuffixSource()), **options)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_new_tokens=30, temperature=0.9, top_k=20, seed=3)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_spine_changes_no_text(sharp: Any, noise: float, params: SamplingParams) -> None:
    engine, builder = with_spine(sharp, perturbed(sharp, noise))
    found = same_as_plain(engine, sharp, params)
    assert [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == [
        result.token_ids for result in same_as_plain(engine, sharp, GREEDY)
    ]
    assert builder.model._owners == [] and builder._match == {}
    if noise == 0.0:
        assert sum(len(result.token_ids) for result in found) > 3 * sum(result.steps for result in found)


def test_a_spine_has_read_the_last_step_of_a_request(sharp: Any) -> None:
    engine, builder = with_spine(sharp, perturbed(sharp, 0.0))
    text = engine.generate(PROMPTS[0], GREEDY).token_ids
    assert builder.spine is not None and isinstance(builder.spine.source, SuffixSource)
    assert builder.spine.source._shared.text.tolist() == [*text, SEPARATOR]


def test_the_drafter_reads_the_spine_in_its_first_forward(sharp: Any) -> None:
    """One forward, and every node of the spine has the drafter's children; its own laws are those along the spine."""
    engine, builder = with_spine(sharp, perturbed(sharp, 0.3), min_gain=99.0)
    prompt = [5, 9, 2, 7, 30, 31, 32, 5, 9, 2, 7]
    with engine._running(engine._sequences([prompt], [GREEDY])):
        engine._admit()
        before = builder.forwards
        seq = engine.rows[0]
        spine = builder.guesses(seq, 6)
        assert spine == builder.spine.source.chain(seq, 6).tokens.tolist() and len(spine) >= 2  # type: ignore[union-attr]
        (tree,) = builder.build([seq], [200], [9])  # room for every candidate
        assert builder.forwards == before + 1
        node = 0
        for token in spine:
            assert np.isin(tree.children(node), np.flatnonzero(tree.source == Source.MODEL)).sum() >= 4
            node = tree.child(node, token)
            assert node > 0 and tree.source is not None and tree.source[node] == Source.CONTEXT
        fresh = DraftModel(builder.model._model, builder.model.vocab_size)
        alone = type(seq)(0, [*seq.token_ids, *spine[:1]], GREEDY, seq.randomness, row=0)
        best = int(fresh.grow([alone], [()])[1][0].argmax())
        assert tree.child(tree.child(0, spine[0]), best) > 0


def test_costs_decide_how_deep_a_tree_is(sharp: Any) -> None:
    """A drafter whose forwards are cheap drafts deep; one as dear as the target drafts one level; the text is the same."""
    steps = {}
    for seconds in (1e-4, 0.2, 1e4):
        tables = [{(1, nodes, 0): cost for nodes in (1, 8, 64)} for cost in (1.0, seconds)]
        engine, builder = drafted(sharp, sharp, costs=Costs(*map(CostModel, tables)))
        builder.clock = lambda: 0.0
        found = same_as_plain(engine, sharp, GREEDY)
        steps[seconds] = sum(result.steps for result in found)
        if seconds == 1e4:
            assert builder.forwards <= max(result.steps for result in found) + len(PROMPTS)
    assert steps[1e-4] < steps[0.2] < steps[1e4]


@pytest.mark.parametrize("forward", [0.01, 10.0])
@pytest.mark.parametrize("method", ["auto", *DRAFTER_METHODS])
def test_costs_and_the_clock_decide_between_drafting_and_not(sharp: Any, method: str, forward: float, monkeypatch: Any) -> None:
    """Every look at the clock is a second later. What the cost model gives a chance is tried, the rest is not; the text is the same."""
    ticks, seconds = itertools.count(), iter([1.0, forward])
    monkeypatch.setattr("specdec.ranks.Ranks.clock", lambda self: float(next(ticks)))
    monkeypatch.setattr(
        "specdec.pacing.measured_costs", lambda target: CostModel(dict.fromkeys([(1, 1, 0), (1, 64, 0)], next(seconds, 1.0)))
    )
    engine = Engine(sharp, method=method, drafter=perturbed(sharp, 0.3))
    same_as_plain(engine, sharp, GREEDY)
    same_as_plain(engine, sharp, GREEDY)
    assert len(engine.info()["tokens_per_second"]) == (2 if forward < 1 else 1)
    assert (engine.builder.forwards > 0) == (forward < 1)  # type: ignore[attr-defined]
    engine.reset()
    assert engine.info()["tokens_per_second"] == {}


@pytest.mark.parametrize("early", [False, True])
def test_what_a_drafter_has_not_read(sharp: Any, early: bool) -> None:
    """The text but its root at first, what others drafted later; nothing where the cache is the target's."""
    drafter = EarlyExit(sharp, 1, sharp.config.vocab_size) if early else DraftModel(sharp, sharp.config.vocab_size)
    builder = DraftedTree(drafter)
    engine = Engine(sharp, method=builder, budget=12)
    with running(engine):
        engine._admit()
        unread = [drafter.unread(seq) for seq in engine.rows]
        assert unread == [0 if early else len(prompt) - 1 for prompt in PROMPTS]
        engine.step()
        assert [drafter.unread(seq) for seq in engine.rows if not early] == [
            len(seq.token_ids) - 1 - drafter.cache.lengths[seq.row] for seq in engine.rows if not early
        ]
        assert max(drafter.unread(seq) for seq in engine.rows) <= 1


def test_tokenizers_must_agree() -> None:
    class Words:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: index for index, word in enumerate(self.words)}

    check_tokenizers(Words("a", "b"), Words("a", "b", "c"))
    with pytest.raises(ValueError, match="has 'x' as token 1, the target's 'b'"):
        check_tokenizers(Words("a", "x"), Words("a", "b"))


def test_the_first_of_several_differences_is_named(tiny_tokenizer: Any) -> None:
    other = swapped((200, 7), (70, 31), (9, 40))
    with pytest.raises(ValueError, match=f"has {other.convert_ids_to_tokens(7)!r} as token 7, the target's "):
        check_tokenizers(other, tiny_tokenizer)


def swapped(*pairs: tuple[int, int]) -> Any:
    """The tiny tokenizer with the tokens of these ids exchanged."""
    from tokenizers import Tokenizer

    tokenizer = make_tiny_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in core["model"]["vocab"].items()}
    for one, other in pairs:
        tokens[one], tokens[other] = tokens[other], tokens[one]
    core["model"]["vocab"] = {token: index for index, token in tokens.items()}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="<pad>", eos_token="<eos>")


def saved(folder: Path, tokenizer: Any = None, model: Any = None) -> str:
    """A tiny model, with a tokenizer beside it or without."""
    (model or make_tiny_llama()).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def opened(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("given", ["folder", "model"])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_drafter_of_another_tokenizer_is_refused_however_it_is_given(
    tmp_path: Path, tiny_folder: str, tiny_tokenizer: Any, given: str, with_tokenizer: bool
) -> None:
    """Only a folder's name beside an engine's tokenizer was checked once."""
    folder = saved(tmp_path, swapped((200, 7), (70, 31)))
    drafter = folder if given == "folder" else opened(folder)
    model = opened(tiny_folder)
    with pytest.raises(ValueError, match="as token 7, the target's .* Fix: a drafter of the target's family"):
        Engine(model, tiny_tokenizer if with_tokenizer else None, drafter=drafter, budget=8)
    with pytest.raises(ValueError, match="as token 7, the target's "), accelerate(model, drafter=drafter, budget=8):
        pass


@pytest.mark.parametrize("given", ["folder", "model"])
def test_a_drafter_of_the_same_tokenizer_is_taken_silently(tmp_path: Path, tiny_folder: str, given: str, caplog: Any) -> None:
    folder = saved(tmp_path, make_tiny_tokenizer())
    with caplog.at_level(logging.WARNING, "specdec"):
        Engine(opened(tiny_folder), method="draft_model", drafter=folder if given == "folder" else opened(folder), budget=8)
    assert "tokenizer" not in caplog.text


def made_up(folder: Path) -> str:
    """A folder without a tokenizer, of a family for which transformers makes one up: <|endoftext|> as token 0 and no other."""
    config = Qwen2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return saved(folder, model=Qwen2ForCausalLM(config))


@pytest.mark.parametrize("given", ["folder", "model", "nameless", "hub name", "made up"])
def test_a_drafter_without_a_tokenizer_is_taken_with_one_warning(
    tmp_path: Path, tiny_folder: str, tiny_tokenizer: Any, given: str, caplog: Any
) -> None:
    drafter: Any = made_up(tmp_path) if given == "made up" else saved(tmp_path)
    if given in ("model", "hub name"):
        drafter = opened(drafter)
    elif given == "nameless":
        drafter = make_tiny_llama()
    if given == "hub name":
        drafter.name_or_path = "nobody/has-this"
    model = opened(tiny_folder)
    with caplog.at_level(logging.WARNING, "specdec"):
        engine = Engine(model, method="draft_model", drafter=drafter, budget=8)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "specdec"]
    assert "nobody has checked that the drafter has the model's tokenizer (no tokenizer of " in warning
    plain = Engine(model, method="none").generate(PROMPTS[0], GREEDY)
    assert engine.generate(PROMPTS[0], GREEDY).token_ids == plain.token_ids


def test_a_model_without_a_tokenizer_is_one_warning_and_its_own_layers_are_none(tiny_folder: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "specdec"):
        Engine(make_tiny_llama(), method="draft_model", drafter="early_exit:1", budget=8)
        assert not caplog.records
        Engine(make_tiny_llama(), method="draft_model", drafter=tiny_folder, budget=8)
    assert len(caplog.records) == 1 and "no tokenizer of ''" in caplog.text


def test_trim_gives_back_the_drafters_buffers_too(sharp: Any) -> None:
    drafter = DraftModel(perturbed(sharp, 0.3), sharp.config.vocab_size)
    engine = Engine(sharp, method="draft_model", budget=12, drafter=drafter)
    small = drafter.cache.nbytes
    drafter.cache.reserve(4, 1000)  # as many long texts would
    engine.trim()
    assert drafter.cache.nbytes == small and drafter._owners == []
    same_as_plain(engine, sharp, GREEDY)
    assert drafter.cache.nbytes > small
    engine.trim()
    assert drafter.cache.nbytes == small
    same_as_plain(engine, sharp, GREEDY)


def test_trim_leaves_early_exit_on_the_engines_cache(sharp: Any) -> None:
    engine = Engine(sharp, method="draft_model", budget=12, drafter="early_exit:1")
    same_as_plain(engine, sharp, GREEDY)
    engine.trim()
    assert engine.builder.model.cache is engine.cache  # type: ignore[attr-defined]
    same_as_plain(engine, sharp, GREEDY)


@pytest.mark.parametrize("method", ["draft_model", "goose_drafter"])
def test_a_seed_gives_the_same_text_with_early_exit(method: str) -> None:
    model = make_tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight *= 60
    engine = Engine(model, method=method, budget=12, drafter="early_exit:2")
    for options in ({}, {"top_k": 20}):
        same_as_plain(engine, model, SamplingParams(max_new_tokens=30, temperature=0.9, seed=3, **options))
    assert engine.builder.forwards > 0  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_model", "goose_drafter"])
def test_a_seed_gives_the_same_text_with_early_exit_of_the_embedded_model(embedded: tuple[Any, Any], method: str) -> None:
    """fp32."""
    model, tokenizer = embedded
    params = SamplingParams(max_new_tokens=24, temperature=0.8, seed=5)
    prompt = [{"role": "user", "content": "Name three fruits that are red."}]
    engine = Engine(model, tokenizer, method=method, budget=12, drafter="early_exit:12")
    assert engine.generate(prompt, params).token_ids == Engine(model, tokenizer, method="none").generate(prompt, params).token_ids
    assert engine.builder.forwards > 0  # type: ignore[attr-defined]
