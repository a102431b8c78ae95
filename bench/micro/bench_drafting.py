"""The engine's own work in a step, piece by piece: `make bench-micro ARGS="-k 'growth and goose and budget64-'"`.

The text is a walk along a Markov chain (bench/host_time.py), so that matches, trees and tables are as full as on real text;
bench/host_time.py times the same work as the parts of whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.host_time import VOCAB, ScriptedLogits
from specdec.attention import TreeBatch
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.kv_cache import KVCache, LayerShape
from specdec.methods import make_builder
from specdec.pacing import two_chains
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.base import ChainSource
from specdec.sources.ngram import NgramSource
from specdec.sources.suffix_automaton import SuffixSource
from specdec.sources.token_recycling import AdjacencyTable
from specdec.verify.match import match

BUDGETS = (8, 64, 256)
BATCHES = (1, 8)
CONTEXTS = (512, 8192, 32768)
VOCABULARIES = (32000, 151936)
TOP_K = 8
CPU = torch.device("cpu")


def over(name: str, values: Seq[object]) -> pytest.MarkDecorator:
    """Parametrise with ids that -k can name: budget8, context512."""
    return pytest.mark.parametrize(name, values, ids=[f"{name}{value}" for value in values])


@lru_cache(maxsize=1)
def script() -> ScriptedLogits:
    return ScriptedLogits(max(BUDGETS), branches=16)


def timed(benchmark: BenchmarkFixture, call: Callable[..., Any], *args: Any) -> Any:
    """The call's result; its first run, which may compile, is not timed."""
    call(*args)
    return benchmark(call, *args)


def make_sequence(row: int, context: int, **params: Any) -> Sequence:
    params = {"max_new_tokens": 1 << 20} | params
    return Sequence(row, script().text(context, seed=row), SamplingParams(**params), Randomness(0, (row,)))


def candidates(tokens: list[int], k: int) -> TopK:
    """The k tokens that the scripted model expects after each token."""
    probs = np.tile(np.linspace(0.3, 0.01, k, dtype=np.float32), (len(tokens), 1))
    return TopK(script().successors[tokens, :k].astype(np.int32), probs)


@over("context", CONTEXTS)
@pytest.mark.parametrize("source", [NgramSource, SuffixSource])
def bench_match_lookup(benchmark: BenchmarkFixture, source: Callable[[], ChainSource], context: int) -> None:
    """The chain after the longest match of the text's end."""
    benchmark.group = f"match lookup, context {context}"
    drafts, seq = source(), make_sequence(0, context)
    drafts.start(seq)
    timed(benchmark, drafts.chain, seq, 16)


@over("vocabulary", VOCABULARIES)
@over("budget", BUDGETS)
def bench_matrix_update(benchmark: BenchmarkFixture, budget: int, vocabulary: int) -> None:
    """The candidates of every node of a tree go into the table."""
    benchmark.group = f"matrix update, budget {budget}"
    table, rng = AdjacencyTable(vocabulary, TOP_K), np.random.default_rng(0)
    prev, tokens = rng.integers(0, vocabulary, (2, budget))
    top = TopK(rng.integers(0, vocabulary, (budget, TOP_K), np.int32), rng.random((budget, TOP_K), np.float32))
    timed(benchmark, table.observe, prev, tokens, top)


@over("context", CONTEXTS)
@over("batch", BATCHES)
@over("budget", BUDGETS)
@pytest.mark.parametrize("method", ["suffix", "token_recycling", "goose", "best_first"])
def bench_tree_growth(benchmark: BenchmarkFixture, method: str, budget: int, batch: int, context: int) -> None:
    """One tree a row, by a builder that has seen the prompts."""
    benchmark.group = f"tree growth, budget {budget}, batch {batch}, context {context}"
    builder = make_builder(method, VOCAB, None)
    seqs = [make_sequence(row, context) for row in range(batch)]
    for seq in seqs:
        builder.start(seq)
        if builder.top_k:
            builder.observe_prompt(seq, 0, candidates(seq.token_ids, builder.top_k))
    trees = timed(benchmark, builder.build, seqs, [budget] * batch, [budget] * batch)
    benchmark.extra_info["nodes"] = float(np.mean([len(tree) for tree in trees]))


@over("batch", BATCHES)
@over("budget", BUDGETS)
def bench_mask_packing(benchmark: BenchmarkFixture, budget: int, batch: int) -> None:
    """The attention op's view of a batch of trees."""
    benchmark.group = f"mask packing, budget {budget}"
    trees = [two_chains(budget) for _ in range(batch)]
    timed(benchmark, lambda: TreeBatch([512] * batch, trees, [budget] * batch, CPU).packed())


def longest_path(tree: DraftTree) -> list[int]:
    return tree.path(int(tree.depths.argmax()))


@over("vocabulary", VOCABULARIES)
@over("budget", BUDGETS)
@over("temperature", [0.0, 1.0])
def bench_acceptance(benchmark: BenchmarkFixture, temperature: float, budget: int, vocabulary: int) -> None:
    """The walk down a path of half of the tree's nodes; the logits are at hand."""
    benchmark.group = f"acceptance, budget {budget}, vocabulary {vocabulary}"
    tree, logits, seq = two_chains(budget), torch.randn(budget, vocabulary), make_sequence(0, 512, temperature=temperature)
    path = longest_path(tree)
    logits[path[:-1], tree.tokens[path[1:]]] = 50.0

    def accept() -> Verdict:
        return match(tree, Law(logits, tree, seq), seq.randomness)

    assert timed(benchmark, accept).nodes.tolist() == path


@over("context", CONTEXTS)
@over("batch", BATCHES)
@over("budget", BUDGETS)
def bench_commit(benchmark: BenchmarkFixture, budget: int, batch: int, context: int) -> None:
    """The K/V of a path of half of the nodes moves to the end of each row's prefix: 4 layers of Qwen2.5-1.5B's shape."""
    benchmark.group = f"KV commit, budget {budget}, batch {batch}"
    layers = [LayerShape(2, 128, 2, 128, torch.bfloat16, CPU)] * 4
    cache = KVCache(layers, batch, context + budget)
    path = longest_path(two_chains(budget))

    def commit() -> None:
        for row in range(batch):
            cache.lengths[row] = context
            cache.commit(row, path)

    timed(benchmark, commit)
