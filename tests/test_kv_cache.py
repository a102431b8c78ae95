"""KVCache against a list of tokens a row, and against fresh prefills while an engine runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from oracles_engine import Noisy, greedy, make_prompts
from specdec.engine import Engine
from specdec.kv_cache import KVCache, LayerShape
from specdec.sequence import SamplingParams

CPU = torch.device("cpu")
ROWS = 5
# Layers that differ in heads and widths, keys and values too: three groups of buffers.
SHAPES = [
    LayerShape(2, 4, 2, 4, torch.float32, CPU),
    LayerShape(1, 3, 2, 5, torch.float32, CPU),
    LayerShape(2, 4, 1, 3, torch.float64, CPU),
]


def vector(token: int, layer: int, which: int, heads: int, dim: int) -> torch.Tensor:
    """[heads, dim] that names its token, layer and kind."""
    return 1000.0 * token + 100 * layer + 50 * which + torch.arange(heads * dim).reshape(heads, dim)


def stored(tokens: list[int], layer: int, which: int) -> torch.Tensor:
    """[heads, len(tokens), dim]: what a layer must hold for a row."""
    shape = SHAPES[layer]
    heads, dim = (shape.key_heads, shape.key_dim) if which == 0 else (shape.value_heads, shape.value_dim)
    return torch.stack([vector(token, layer, which, heads, dim) for token in tokens], 1).to(shape.dtype)


class Naive:
    """The cache as it is meant: a list of tokens a row."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.next_token = 0

    def fresh(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))


def forward(cache: KVCache, naive: Naive, first: int, trees: list[list[int]]) -> None:
    """Write len(tree) new tokens to each row, check what the model would see, then commit the nodes named in `keep`."""
    most = max(len(keep) for keep in trees)
    tokens = [naive.fresh(len(keep)) for keep in trees]
    cache.begin(first, [len(keep) for keep in trees])
    for layer in range(len(SHAPES)):
        keys, values = (
            torch.stack(
                [
                    torch.cat(
                        [
                            part := stored(new, layer, which),
                            part.new_full((part.shape[0], most - len(new), part.shape[2]), torch.nan),
                        ],
                        1,
                    )
                    for new in tokens
                ]
            )
            for which in (0, 1)
        )  # padding is NaN: it may not reach the cache
        seen_keys, seen_values = cache.write(layer, keys, values)
        for row, new in enumerate(tokens):
            whole = naive.rows[first + row] + new
            assert torch.equal(seen_keys[row, :, : len(whole)], stored(whole, layer, 0))
            assert torch.equal(seen_values[row, :, : len(whole)], stored(whole, layer, 1))
    for row, (new, keep) in enumerate(zip(tokens, trees, strict=True)):
        path = [node for node, kept in enumerate(keep) if kept]
        cache.commit(first + row, path)
        naive.rows[first + row] += [new[node] for node in path]


def contents(cache: KVCache, row: int) -> list[torch.Tensor]:
    """[heads, P, dim] of keys and values, layer by layer."""
    found = []
    for key_group, key, value_group, value in cache._slots:
        groups = dict(zip(cache._groups, cache.row_tensors(row), strict=True))
        found += [groups[key_group][key], groups[value_group][value]]
    return found


def check(cache: KVCache, naive: Naive) -> None:
    for row, tokens in enumerate(naive.rows[: cache.rows]):
        assert cache.lengths[row] == len(tokens)
        if tokens:
            for index, tensor in enumerate(contents(cache, row)):
                assert torch.equal(tensor, stored(tokens, index // 2, index % 2))


ROW = st.integers(0, ROWS - 1)
KEEP = st.lists(st.integers(0, 1), max_size=6).map(lambda rest: [1, *rest])  # the root is always kept
OPERATIONS = st.one_of(
    st.tuples(st.just("forward"), ROW, st.lists(KEEP, min_size=1, max_size=3)),
    st.tuples(st.just("fork"), ROW, ROW, st.integers(0, 20)),
    st.tuples(st.just("release"), ROW),
    st.tuples(st.just("reserve"), st.integers(1, ROWS), st.integers(1, 40)),
)


@given(operations=st.lists(OPERATIONS, max_size=25), capacity=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_like_a_list_of_tokens(operations: list[tuple[Any, ...]], capacity: int) -> None:
    cache, naive = KVCache(SHAPES, 1, capacity), Naive()
    for name, *arguments in operations:
        if name == "forward":
            first, trees = arguments
            forward(cache, naive, first, trees[: ROWS - first])
        elif name == "fork":
            source, target, length = arguments
            source = min(source, cache.rows - 1)
            length = min(length, len(naive.rows[source]))
            cache.fork(source, target, length)
            naive.rows[target] = naive.rows[source][:length]
        elif name == "release":
            row = min(arguments[0], cache.rows - 1)
            cache.release(row)
            naive.rows[row] = []
        else:
            cache.reserve(*arguments)
            assert cache.rows >= arguments[0] and cache.capacity >= arguments[1]
        check(cache, naive)


def test_growth_doubles_and_keeps_what_is_committed() -> None:
    cache, naive = KVCache(SHAPES, 1, 4), Naive()
    for step in range(12):
        forward(cache, naive, 0, [[1, 0, 1]])
        check(cache, naive)
        assert cache.capacity in (4, 8, 16, 32) and cache.capacity < 2 * (2 * step + 3) + 4
    cache.reserve(3, 1)
    assert cache.rows == 4 and cache.capacity == 32
    check(cache, naive)
    assert cache.nbytes == sum(b.numel() * b.element_size() for b in cache.buffers()) > 0


def test_nothing_is_concatenated_and_buffers_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(SHAPES[:2], 2, 64)
    addresses = [buffer.data_ptr() for buffer in cache.buffers()]

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cache step concatenates")

    for name in ("cat", "concat", "stack"):
        monkeypatch.setattr(torch, name, forbidden)
    for _ in range(4):
        cache.begin(0, [5, 3])
        for layer, shape in enumerate(SHAPES[:2]):
            cache.write(
                layer, torch.zeros(2, shape.key_heads, 5, shape.key_dim), torch.zeros(2, shape.value_heads, 5, shape.value_dim)
            )
        cache.commit(0, [0, 2, 4])
        cache.commit(1, [0, 1])
    assert cache.lengths[:2] == [12, 8]
    assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "phi3_longrope", "gpt2"])
def test_every_step_leaves_what_a_fresh_prefill_would(name: str) -> None:
    """Property 5: after each step, each row's K/V is that of its committed text (also past longrope's threshold of 40)."""
    model = tiny_models.build(name).double()
    prompts = make_prompts((5, 27, 1, 30))
    truth = {tuple(prompt): greedy(model, prompt, 16) for prompt in prompts}
    engine = Engine(model, method=Noisy(truth), budget=10, max_rows=3)
    fresh = engine.target.new_cache(1, 64)
    seqs = engine._sequences(prompts, [SamplingParams(max_new_tokens=16)] * len(prompts))
    for seq in seqs:
        engine.add(seq)
    steps = 0
    while engine.rows or engine.waiting:
        engine.step()
        steps += 1
        for seq in engine.rows:
            assert engine.cache.lengths[seq.row] == len(seq.token_ids) - 1
            if engine.target.rope.past(len(seq.token_ids) - 1) and not engine.target.rope.past(len(seq.token_ids) - 2):
                continue  # the next step rebuilds this row with the long factors
            fresh.lengths[0] = 0
            engine.target.prefill(fresh, 0, seq.token_ids[:-1])
            for ours, theirs in zip(engine.cache.row_tensors(seq.row), fresh.row_tensors(0), strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-8)
    assert steps > 5 and all(seq.finished for seq in seqs)
    assert [seq.output_ids for seq in seqs] == [truth[tuple(prompt)] for prompt in prompts]


def test_a_failed_allocation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three groups finds no memory: the cache is as it was, and growing works once there is some."""
    cache = KVCache(SHAPES, 1, 16)
    naive = Naive()
    forward(cache, naive, 0, [[1, 1, 1]])
    held, before = cache.nbytes, [tensor.clone() for tensor in cache.row_tensors(0)]
    original = KVCache._allocate
    calls: list[Any] = []

    def short_of_memory(self: KVCache, *args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_allocate", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(4, 1000)
    assert (cache.rows, cache.capacity, cache.nbytes, len(cache.lengths)) == (1, 16, held, 1)
    cache.reserve(4, 1000)
    assert cache.rows == 4 and cache.capacity >= 1000 and cache.lengths == [3, 0, 0, 0]
    assert all(torch.equal(now, then) for now, then in zip(cache.row_tensors(0), before))


def test_an_admission_without_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt finds no memory beside a running text: that goes on, and later prompts are served."""
    (prompt,) = make_prompts([9])
    engine = Engine(tiny_models.shared("llama"), method="ngram", max_rows=4)
    alone = engine.generate(prompt, SamplingParams(max_new_tokens=30)).token_ids
    engine.trim()
    original = KVCache._allocate

    def short_of_memory(self: KVCache, *args: Any) -> torch.Tensor:
        wanted = original(self, *args)
        if self is engine.cache and wanted.shape[3] > 256:
            raise torch.OutOfMemoryError("no memory")
        return wanted

    monkeypatch.setattr(KVCache, "_allocate", short_of_memory)
    params = [SamplingParams(max_new_tokens=30), SamplingParams(max_new_tokens=5)]
    running, long = engine._sequences([prompt, [1] * 300], params)
    engine.add(running)
    engine.step()
    engine.add(long)
    while not running.finished:
        engine.step()
    assert isinstance(long.error, torch.OutOfMemoryError) and long.finish_reason == "error" and long.row == -1
    assert running.error is None and running.output_ids == alone
    assert engine.generate(prompt, SamplingParams(max_new_tokens=30)).token_ids == alone and not engine.rows
