"""Where drafts come from: matches in the text, tables, trees; `make bench-micro ARGS="-k 'growth and goose'"`.

bench/host_time.py times the same work as the parts of whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.host_time import VOCAB
from bench.micro.cases import ROUNDS, TOP_K, candidates, longest_path, make_sequence, over, timed
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.methods import make_builder
from specdec.sequence import Sequence
from specdec.sources.base import ChainSource
from specdec.sources.context_table import ContextTable
from specdec.sources.ngram import NgramSource
from specdec.sources.suffix_automaton import SuffixSource
from specdec.sources.token_recycling import BIGRAM, AdjacencyTable
from specdec.trees.base import TreeBuilder
from specdec.trees.evidence import TAIL

EMITTED = 4  # tokens of a step
SOURCES: dict[str, Callable[[], ChainSource]] = {"ngram": NgramSource, "suffix": SuffixSource}
METHODS = pytest.mark.parametrize("method", ["suffix", "token_recycling", "goose", "best_first"])


@pytest.mark.parametrize("source", SOURCES)
@over("context")
def bench_match_lookup(benchmark: BenchmarkFixture, source: str, context: int) -> None:
    """The chain after the longest match of the text's end."""
    drafts, seq = SOURCES[source](), make_sequence(0, context)
    drafts.start(seq)
    chain = timed(benchmark, drafts.chain, seq, 16)
    match = seq.token_ids[-chain.match_length :]
    recurred = [*match, *chain.tokens[:1].tolist()]
    assert len(chain) > 0
    assert any(seq.token_ids[i : i + len(recurred)] == recurred for i in range(context))


@pytest.mark.parametrize("source", SOURCES)
@over("context")
def bench_match_update(benchmark: BenchmarkFixture, source: str, context: int) -> None:
    """The tokens of one step enter the index; the text grows from round to round, as it does while a model writes."""
    drafts, seq = SOURCES[source](), make_sequence(0, context)
    rest = make_sequence(0, context + EMITTED * (ROUNDS + 8)).token_ids[context:]
    drafts.start(seq)

    def append() -> tuple[tuple[Sequence, list[int]], dict[str, Any]]:
        done = len(seq.token_ids) - context
        emitted = rest[done : done + EMITTED]
        seq.token_ids.extend(emitted)
        return (seq, emitted), {}

    benchmark.pedantic(drafts.update, setup=append, rounds=ROUNDS, warmup_rounds=1)
    whole = SOURCES[source]()
    whole.start(seq)
    assert drafts.chain(seq, 16).tokens.tolist() == whole.chain(seq, 16).tokens.tolist()


def observations(rows: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, TopK]:
    """Random (token before, token, what the model expects after it), [rows] each."""
    rng = np.random.default_rng(0)
    prev, tokens = rng.integers(0, vocabulary, (2, rows))
    return prev, tokens, TopK(rng.integers(0, vocabulary, (rows, TOP_K), np.int32), rng.random((rows, TOP_K), np.float32))


@over("budget", "vocabulary")
def bench_matrix_update(benchmark: BenchmarkFixture, budget: int, vocabulary: int) -> None:
    """The candidates of every node of a tree go into the table."""
    table, (prev, tokens, top) = AdjacencyTable(vocabulary, TOP_K), observations(budget, vocabulary)
    timed(benchmark, table.observe, prev, tokens, top)
    assert table.lookup(prev[-1], tokens[-1]).tokens.tolist() == top.tokens[-1].tolist()


@over("vocabulary")
def bench_matrix_lookup(benchmark: BenchmarkFixture, vocabulary: int) -> None:
    """What a table that was filled from a long text knows about one pair; builders ask inside of their own kernels."""
    table, (prev, tokens, top) = AdjacencyTable(vocabulary, TOP_K), observations(1 << 16, vocabulary)
    table.observe(prev, tokens, top)
    found = timed(benchmark, table.lookup, int(prev[-1]), int(tokens[-1]))
    assert found.tier == BIGRAM
    assert found.tokens.tolist() == top.tokens[-1].tolist()


@over("budget")
def bench_context_table_update(benchmark: BenchmarkFixture, budget: int) -> None:
    """The same for best_first's table, which keeps what the model expects after the last one, two and three tokens."""
    table, (_, _, top) = ContextTable(TOP_K), observations(budget, VOCAB)
    tails = np.random.default_rng(0).integers(0, VOCAB, (budget, TAIL), np.int32)
    timed(benchmark, table.observe_nodes, tails, np.array([0], np.int32), top)
    assert len(table) == 3 * budget


def prompted(method: str, batch: int, context: int) -> tuple[TreeBuilder, list[Sequence]]:
    """A builder that has seen the prompts of a batch."""
    builder = make_builder(method, VOCAB, None)
    seqs = [make_sequence(row, context) for row in range(batch)]
    for seq in seqs:
        builder.start(seq)
        if builder.top_k:
            builder.observe_prompt(seq, 0, candidates(seq.token_ids, builder.top_k))
    return builder, seqs


@METHODS
@over("budget", "batch", "context")
def bench_tree_growth(benchmark: BenchmarkFixture, method: str, budget: int, batch: int, context: int) -> None:
    """One tree a row."""
    builder, seqs = prompted(method, batch, context)
    trees = timed(benchmark, builder.build, seqs, [budget] * batch, [budget] * batch)
    assert [tree.tokens[0] for tree in trees] == [seq.token_ids[-1] for seq in seqs]
    assert all(1 < len(tree) <= budget for tree in trees)
    assert method == "suffix" or len(trees[0]) > budget // 2  # best_first leaves out what is hopeless
    benchmark.extra_info["nodes"] = float(np.mean([len(tree) for tree in trees]))


@METHODS
@over("budget", "context")
def bench_tree_update(benchmark: BenchmarkFixture, method: str, budget: int, context: int) -> None:
    """What a builder learns from one step, of which the longest path was accepted."""
    builder, (seq,) = prompted(method, 1, context)
    learned = []

    def step() -> tuple[tuple[Sequence, DraftTree, Verdict, TopK | None], dict[str, Any]]:
        (tree,) = builder.build([seq], [budget], [EMITTED - 1])
        path = longest_path(tree)
        token = int(candidates(tree.tokens[path[-1:]], 1).tokens[0, 0])
        seq.append([*tree.tokens[path[1:]].tolist(), token])
        learned.append(len(path))
        top = candidates(tree.tokens, builder.top_k) if builder.top_k else None
        return (seq, tree, Verdict(np.array(path, np.int32), token), top), {}

    benchmark.pedantic(builder.update, setup=step, rounds=ROUNDS, warmup_rounds=1)
    assert len(seq.token_ids) == context + sum(learned)
    (tree,) = builder.build([seq], [budget], [EMITTED - 1])
    assert tree.tokens[0] == seq.token_ids[-1]
