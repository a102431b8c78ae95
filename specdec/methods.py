"""METHODS: name -> draft sources and tree builder. The whole menu, one row a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.trees.base import TreeBuilder

if TYPE_CHECKING:
    from specdec.cost_model import CostModel

__all__ = ["METHODS", "Method", "make_builder"]


@dataclass(frozen=True, slots=True)
class Method:
    """One drafting method: `make(vocab_size, cost_model)`; cost_model is None where the budget is a number."""

    make: Callable[[int, Any], TreeBuilder]
    summary: str


def _none(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.chain import Chain, NoSource

    return Chain(NoSource())


def _ngram(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.sources.ngram import NgramSource
    from specdec.trees.chain import Chain

    return Chain(NgramSource())


def _suffix(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.sources.suffix_automaton import SuffixSource
    from specdec.trees.chain import Chain

    return Chain(SuffixSource())


def _token_recycling(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.template import TokenRecycling

    return TokenRecycling(vocab_size)


def _token_recycling_published(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.template import TokenRecyclingPublished

    return TokenRecyclingPublished(vocab_size)


def _goose(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.goose import Goose

    return Goose(vocab_size)


def _goose_published(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.goose_published import GoosePublished

    return GoosePublished(vocab_size)


def _best_first(vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    from specdec.trees.best_first import BestFirst

    return BestFirst(vocab_size, cost_model)


METHODS: dict[str, Method] = {
    "none": Method(_none, "no drafts: plain decoding in the same loop, the base line"),
    "ngram": Method(_ngram, "prompt lookup: the text after the last occurrence of the current n-gram, as a chain"),
    "suffix": Method(_suffix, "suffix automaton: the most frequent continuation of the longest match, as a chain"),
    "token_recycling": Method(_token_recycling, "adjacency matrix of the model's own top candidates, as a template tree"),
    "goose": Method(_goose, "a context spine with branches from the adjacency matrix"),
    "best_first": Method(_best_first, "the nodes most likely to be accepted, from context and matrix together, by measured cost"),
    "auto": Method(_best_first, "best_first: the best of the above by measurement (README, benchmark)"),
    "token_recycling_published": Method(_token_recycling_published, "Token Recycling with its paper's settings, for benchmarks"),
    "goose_published": Method(_goose_published, "Goose with its paper's settings, for benchmarks"),
}


def make_builder(method: str | TreeBuilder, vocab_size: int, cost_model: CostModel | None) -> TreeBuilder:
    """The tree builder of a method's name, or the builder itself.

    Raises:
        ValueError: no such method, or an object that is no TreeBuilder.
    """
    if not isinstance(method, (str, type)) and callable(getattr(method, "build", None)):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, or a TreeBuilder object, got {method!r}")
    return METHODS[method].make(vocab_size, cost_model)
