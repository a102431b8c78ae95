"""GraphedForward on a CPU: everything but the capture. Padding, buckets, ragged rows, a cache that grows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from oracles import greedy_loop
from oracles_engine import make_prompts
from specdec.attention import compiled_op
from specdec.draft_tree import DraftTree
from specdec.engine import Engine
from specdec.graphs import GraphedForward, Replay
from specdec.sequence import SamplingParams
from specdec.target import TargetModel
from test_tree_attention_op import random_tree

pytestmark = pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")


class Recorder:
    """A capture that a CPU can do: it counts, and runs the body again at each replay, into one place as a graph would."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, body: Replay) -> Replay:
        self.captures += 1
        output = body().clone()

        def replay() -> Tensor:
            return output.copy_(body())

        return replay


@functools.lru_cache
def model() -> Any:
    return tiny_models.build("llama", head_dim=16)


def graphed(**options: Any) -> tuple[TargetModel, Recorder]:
    target, recorder = TargetModel(model()), Recorder()
    target.compiled = GraphedForward(target, recorder, **options)
    return target, recorder


def tree_of(nodes: int) -> DraftTree:
    tree = random_tree(nodes, nodes)
    return DraftTree(tree.tokens % tiny_models.VOCAB, tree.parents)


def logits_of(target: TargetModel, prefixes: list[int], sizes: list[int], capacity: int = 16) -> list[Tensor]:
    cache = target.new_cache(len(sizes), capacity)
    for row, prefix in enumerate(prefixes):
        target.prefill(cache, row, [(5 * i + row) % tiny_models.VOCAB for i in range(prefix)])
    logits = target.forward(cache, [tree_of(n) for n in sizes])
    return [rows[:n] for rows, n in zip(logits, sizes)]


@pytest.mark.parametrize(
    ("prefixes", "sizes"), [([1], [1]), ([9], [5]), ([30], [17]), ([0, 40, 7], [5, 1, 9]), ([3] * 5, [1] * 5)]
)
def test_padding_changes_nothing(prefixes: list[int], sizes: list[int]) -> None:
    target, recorder = graphed()
    for found, expected in zip(logits_of(target, prefixes, sizes), logits_of(TargetModel(model()), prefixes, sizes)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert recorder.captures == 1


def test_a_bucket_serves_the_sizes_up_to_it_and_a_larger_tree_runs_eagerly() -> None:
    target, recorder = graphed(buckets=(4, 8))
    cache = target.new_cache(1, 64)
    seen = []
    for nodes in (1, 3, 4, 5, 8, 2, 9):
        assert target.forward(cache, [tree_of(nodes)]).shape == (1, nodes, tiny_models.VOCAB)
        seen.append(recorder.captures)
    assert seen == [1, 1, 1, 2, 2, 2, 2]


def test_an_earlier_result_is_not_overwritten() -> None:
    target, _ = graphed()
    cache = target.new_cache(1, 64)
    first = target.forward(cache, [tree_of(3)])
    kept = first.clone()
    target.forward(cache, [DraftTree.root_only(5)])
    target.forward(cache, [tree_of(4)])
    assert torch.equal(first, kept)


def test_a_cache_that_grows_is_captured_again() -> None:
    target, recorder = graphed()
    cache, ids = target.new_cache(1, 16), [(7 * i) % tiny_models.VOCAB for i in range(80)]
    for position in range(79):
        cache_before = cache.capacity
        logits = target.forward(cache, [DraftTree.root_only(ids[position])])[0, 0]
        cache.commit(0, [0])
        assert recorder.captures == {16: 1, 32: 2, 64: 3, 128: 4}[cache.capacity], (position, cache_before)
    with torch.no_grad():
        expected = model()(torch.tensor([ids[:79]])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["none", "best_first", "goose", "draft_model"])
def test_greedy_texts_are_the_models_own(method: str) -> None:
    prompts = make_prompts([5, 23, 11])
    engine = Engine(model(), method=method, budget=7, max_rows=2, drafter="early_exit:1" if method == "draft_model" else None)
    recorder = Recorder()
    engine.target.compiled = GraphedForward(engine.target, recorder)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=24))
    assert [result.token_ids for result in results] == [greedy_loop(model(), ids, 24) for ids in prompts]
    assert recorder.captures >= 2
