"""Memory: a long text costs its K/V and a bounded index, requests leave nothing behind."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fake_builder import FakeBuilder
from specdec import Engine, SamplingParams
from specdec.methods import METHODS
from tiny_models import build

OWN = (
    "Sequence",
    "TokenBuffer",
    "DraftTree",
    "Law",
    "Verdict",
    "Randomness",
    "TopK",
    "KVCache",
    "KVLayer",
    "Result",
    "TreeBatch",
)
LONG = 20_000


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", num_hidden_layers=1, max_position_embeddings=32_768)


def live_objects() -> Counter[str]:
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing).__name__ in OWN)


def reachable_bytes(root: object) -> int:
    """Bytes of everything that `root` holds: containers and arrays, not classes, modules, functions or the model."""
    seen: set[int] = set()
    todo, total = [root], 0
    while todo:
        thing = todo.pop()
        skipped = (type, type(sys), type(reachable_bytes), torch.nn.Module)
        if id(thing) in seen or isinstance(thing, skipped):
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing) + (thing.nbytes if isinstance(thing, np.ndarray) and thing.base is not None else 0)
        todo += gc.get_referents(thing)
    return total


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 97, rng.integers(1, 12)).tolist() for _ in range(count)]


def serve(engine: Engine, count: int, seed: int) -> None:
    """`count` short requests, some of them in batches, some abandoned."""
    for index, batch in enumerate(np.array_split(np.arange(count), max(1, count // 10))):
        params = SamplingParams(max_new_tokens=4, temperature=index % 2, seed=index)
        engine.generate(prompts(len(batch), seed + index), params)


@pytest.mark.parametrize("method", METHODS)
def test_requests_leave_nothing(method: str, model: Any) -> None:
    engine = Engine(model, method=method, budget=8)
    serve(engine, 30, 0)
    before, cache, held = live_objects(), engine.cache.nbytes, reachable_bytes(engine.builder)
    serve(engine, 60, 1000)
    assert live_objects() == before
    assert engine.cache.nbytes == cache and not engine.rows and not engine.waiting
    # What is learned across requests is text and statistics: some hundred bytes a token, never a request's own state.
    tokens = 60 * (4 + 12)
    assert reachable_bytes(engine.builder) - held < 500 * tokens


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "suffix", "token_recycling"])
def test_a_thousand_requests(method: str, model: Any) -> None:
    engine = Engine(model, method=method, budget=8)
    serve(engine, 200, 0)
    before, cache = live_objects(), engine.cache.nbytes
    count, resident = len(gc.get_objects()), resident_bytes()
    serve(engine, 1000, 5000)
    assert live_objects() == before and engine.cache.nbytes == cache
    assert len(gc.get_objects()) - count < 500
    assert resident_bytes() - resident < 24 << 20


def test_per_request_state_is_freed(model: Any) -> None:
    builder = FakeBuilder()
    engine = Engine(model, method=builder, budget=8)
    serve(engine, 30, 0)
    assert not builder.live


@pytest.mark.slow
def test_a_long_text_costs_its_cache_and_a_bounded_index(model: Any) -> None:
    """Measured between 2,000 and 20,000 tokens, in one generation."""
    from specdec.randomness import Randomness

    engine = Engine(model, method="auto", budget=8)
    params = SamplingParams(max_new_tokens=LONG, temperature=1.0, top_k=5, seed=0, ignore_eos=True)
    seq = engine.new_sequence([5, 6, 7], params, Randomness(0))
    engine.add(seq)
    while seq.output_length < 2000:
        engine.step()
    resident, held, cache = resident_bytes(), reachable_bytes(engine.builder), engine.cache.nbytes
    while not seq.finished:
        engine.step()
    grown = len(seq.token_ids) - 2000
    a_slot = engine.cache.nbytes / engine.cache.rows / engine.cache.capacity
    assert engine.cache.capacity <= 2 * (LONG + 64) and a_slot == 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 floats
    assert reachable_bytes(engine.builder) - held < 800 * grown  # measured: 580 a token, suffix automaton and tables
    rest = resident_bytes() - resident - (engine.cache.nbytes - cache)
    assert rest < 1500 * grown, f"{rest / grown:.0f} bytes a token besides the cache"
