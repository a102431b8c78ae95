"""METHODS: name -> draft sources and tree builder. DRAFTER_METHODS: the same for a draft model. The whole menu, one row a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.trees.base import TreeBuilder

if TYPE_CHECKING:
    from specdec.cost_model import CostModel
    from specdec.sources.draft_model import DraftModel
    from specdec.trees.by_model import Costs
    from specdec.trees.chain import Chain

__all__ = ["DRAFTER_METHODS", "METHODS", "DrafterMethod", "Method", "make_builder"]


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


@dataclass(frozen=True, slots=True)
class DrafterMethod:
    """One way to use a draft model: `make(draft_model, costs)`; costs is None where the budget is a number."""

    make: Callable[[DraftModel, Any], TreeBuilder]
    summary: str


def _drafted(draft_model: DraftModel, costs: Costs | None) -> TreeBuilder:
    from specdec.trees.drafted import DraftedTree

    return DraftedTree(draft_model, costs=costs)


def _spine(**options: int) -> Chain:
    from specdec.sources.suffix_automaton import SuffixSource
    from specdec.trees.chain import Chain

    return Chain(SuffixSource(**options))


def _spine_and_drafter(draft_model: DraftModel, costs: Costs | None) -> TreeBuilder:
    from specdec.trees.drafted import DraftedTree

    return DraftedTree(draft_model, spine=_spine(), costs=costs)


def _sampled(draw: str, rule: str, branching: tuple[int, ...] | None = None) -> Callable[[DraftModel, Any], TreeBuilder]:
    def make(draft_model: DraftModel, costs: Costs | None) -> TreeBuilder:
        from specdec.trees.sampled import SampledTree

        # The spine reads the request's own text alone: what an earlier one wrote with the same seed came from the very coins that
        # these drafts are tested with (verification.md 4.5), and a seed would not fix the text.
        spine = _spine(share_every=0) if draw == "hybrid" else None
        return SampledTree(draft_model, draw, rule, branching, costs=costs, spine=spine)

    return make


DRAFTER_METHODS: dict[str, DrafterMethod] = {
    "draft_model": DrafterMethod(_drafted, "its best continuations, best first; at a temperature by the target's own noise"),
    "goose_drafter": DrafterMethod(_spine_and_drafter, "a context spine with branches from the drafter; noise as draft_model"),
    "spectr": DrafterMethod(_sampled("iid", "kseq"), "SpecTr: i.i.d. paths, K-SEQ"),
    "optimal_transport": DrafterMethod(_sampled("iid", "optimal_transport"), "i.i.d. paths, the most that they allow to accept"),
    "without_replacement": DrafterMethod(
        _sampled("without_replacement", "recursive_rejection"), "distinct draws, recursive rejection"
    ),
    "hybrid": DrafterMethod(
        _sampled("hybrid", "recursive_rejection"), "context spine or best token, and distinct draws, recursive rejection"
    ),
    "traversal": DrafterMethod(_sampled("without_replacement", "traversal"), "distinct draws, traversal verification"),
    "block": DrafterMethod(_sampled("iid", "block", (1,)), "one sampled chain, block verification"),
}


def make_builder(
    method: str | TreeBuilder, vocab_size: int, cost_model: CostModel | None, draft_model: DraftModel | None = None
) -> TreeBuilder:
    """The tree builder of a method's name, or the builder itself.

    With a draft model the clock and the costs decide (`ByRate`): "auto" is the faster of best_first and goose_drafter, whose rule is
    `match`, so that a seed fixes the text whichever works; with a cost model another method drafts where plain steps are slower.

    Raises:
        ValueError: no such method, an object that is no TreeBuilder, a draft model missing or of no use to the method.
    """
    if not isinstance(method, (str, type)) and callable(getattr(method, "build", None)):
        builder = method
    elif method in DRAFTER_METHODS or (method == "auto" and draft_model is not None):
        if draft_model is None:
            raise ValueError(f'method {method!r} needs a draft model; fix: Engine(model, drafter=...), a model or "early_exit:8"')
        return _with_drafter(str(method), vocab_size, cost_model, draft_model)
    elif method in METHODS:
        builder = METHODS[method].make(vocab_size, cost_model)
    else:
        names = ", ".join([*METHODS, *DRAFTER_METHODS])
        raise ValueError(f"method must be one of {names}, or a TreeBuilder object, got {method!r}")
    if draft_model is not None:
        raise ValueError(f"method {method!r} uses no drafter; fix: one of {', '.join(DRAFTER_METHODS)}, or leave drafter out")
    return builder


def _with_drafter(method: str, vocab_size: int, cost_model: CostModel | None, draft_model: DraftModel) -> TreeBuilder:
    from specdec.pacing import measured_costs
    from specdec.trees.by_model import Costs
    from specdec.trees.by_rate import ByRate

    clock = draft_model.reader.ranks.clock
    costs = None if cost_model is None else Costs(cost_model, measured_costs(draft_model.reader), clock)
    name = "goose_drafter" if method == "auto" else method
    drafting = DRAFTER_METHODS[name].make(draft_model, costs)
    if method == "auto":
        other = METHODS["best_first"].make(vocab_size, cost_model)
        return ByRate({"best_first": other, name: drafting}, clock)
    return drafting if costs is None else ByRate({"none": METHODS["none"].make(vocab_size, cost_model), name: drafting}, clock)
