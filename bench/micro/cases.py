"""What the micro-benchmarks vary, and the texts and trees that they time.

Every benchmark runs over some of the AXES. Without --grid=whole only a cross of cases is timed: those that depart from the MIDDLE
in one axis at most, which shows how the time grows along each of them.

The text is a walk along a Markov chain (bench/host_time.py), so that matches, trees and tables are as full as on real text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.host_time import VOCAB, ScriptedLogits
from specdec.draft_tree import NO_PARENT, DraftTree, TopK
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence

AXES: dict[str, tuple[Any, ...]] = {  # ascending: the first of each is the least
    "budget": (8, 64, 256),  # nodes of a tree
    "batch": (1, 8),  # rows
    "context": (512, 8192, 32768),  # tokens of text
    "vocabulary": (32000, VOCAB, 151936),
    "model": ("SmolLM2-135M", "Qwen2.5-1.5B", "Llama-3-8B", "Llama-3-70B"),  # shapes of attention
    "dtype": ("bfloat16", "float32"),
    "prefix": (256, 1024, 4096, 8192, 32768),  # committed slots that attention reads
    "nodes": (1, 8, 16, 32, 64),  # that it computes
}
MIDDLE = {
    "budget": 64, "batch": 1, "context": 8192, "vocabulary": VOCAB,
    "model": "SmolLM2-135M", "dtype": "bfloat16", "prefix": 1024, "nodes": 16,
}  # fmt: skip
GRIDS = ("least", "cross", "whole")
TOP_K = 8
ROUNDS = 40  # of a benchmark whose every round needs a fresh start


def over(*axes: str) -> Callable[[Any], Any]:
    """Parametrise a benchmark by these axes, with ids that -k can name: budget8, context512."""

    def decorate(function: Any) -> Any:
        for axis in reversed(axes):
            values = AXES[axis]
            function = pytest.mark.parametrize(axis, values, ids=[f"{axis}{value}" for value in values])(function)
        return function

    return decorate


def in_grid(grid: str, params: Mapping[str, Any]) -> bool:
    """Whether a case with these parameters belongs to the grid; parameters that are no axis do not count."""
    axes = [axis for axis in params if axis in AXES]
    if grid == "least":
        return all(params[axis] == AXES[axis][0] for axis in axes)
    return grid == "whole" or sum(params[axis] != MIDDLE[axis] for axis in axes) <= 1


def timed(benchmark: BenchmarkFixture, call: Callable[..., Any], *args: Any) -> Any:
    """The call's result; its first run, which may compile, is not timed."""
    call(*args)
    return benchmark(call, *args)


@lru_cache(maxsize=1)
def script() -> ScriptedLogits:
    return ScriptedLogits(1, branches=16)


@lru_cache(maxsize=16)
def text(row: int, length: int) -> tuple[int, ...]:
    return tuple(script().text(length, seed=row))


def make_sequence(row: int, context: int, **params: Any) -> Sequence:
    params = {"max_new_tokens": 1 << 20} | params
    return Sequence(row, list(text(row, context)), SamplingParams(**params), Randomness(0, (row,)))


def candidates(tokens: Seq[int] | np.ndarray, k: int) -> TopK:
    """The k tokens that the scripted model expects after each token."""
    probs = np.tile(np.linspace(0.3, 0.01, k, dtype=np.float32), (len(tokens), 1))
    return TopK(script().successors[tokens, :k].astype(np.int32), probs)


def longest_path(tree: DraftTree) -> list[int]:
    return tree.path(int(tree.depths.argmax()))


def ladder(nodes: int, **fields: Any) -> DraftTree:
    """A spine with a leaf beside each of its nodes, drafted before it: nodes 2 i - 1 and 2 i hang on 2 i - 2; tokens 0, 1, ..."""
    parents = (np.arange(nodes) - 1) // 2 * 2
    parents[0] = NO_PARENT
    return DraftTree(np.arange(nodes), parents, **fields)
