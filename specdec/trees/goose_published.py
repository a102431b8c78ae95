"""Goose as published (Jin, Nguyen, Inoue: arXiv 2604.02047), for comparison; `goose.py` has the method that we recommend.

A context match gives a spine; a table of successors gives branches, most of them near the root. The rule in two lines::

    confidence c of the match -> tree size B' = B + extension * c, spine length S = B' * r(c, recent spine acceptance)
    the rest: half below the root, half below the spine nodes with quotas ~ 1/i, what is left extends branches first in first out

Worked example: text "a b c d e a b c", anchor c; the 3-gram "a b c" was followed by d, so the spine is d e a b c; the table knows
c -> {x, d}, so the root gets the branch x (d is the spine's own) and e's successor y hangs on the spine beside a::

    c -- d -- e -- a -- b -- c
     \\- x      \\- y
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Source, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.token_recycling import NONE, AdjacencyTable
from specdec.trees.template import observe_prompt, observe_tree

__all__ = ["ContextMatcher", "GooseConfig", "GoosePublished", "confidence", "harmonic_quotas", "spine_length"]


@dataclass(frozen=True, slots=True)
class GooseConfig:
    """Hyper-parameters of the paper (Table 5 and its code's constants): the same for all models and data sets."""

    node_budget: int = 60  # B: nodes of a tree without a match, root included
    max_extended_chain: int = 100  # longest spine; a sure match may add this minus B nodes to the budget
    adjacency_top_k: int = 10  # K
    min_score: float = 0.01  # successors below this are not drafted
    max_branch_depth: int = 6  # D: a branch node at this depth is not extended
    spine_branch_ratio: float = 0.5  # rho: share of the branches that hang on the spine, the others on the root
    ngram_lengths: tuple[int, ...] = (5, 4, 3)  # tried in this order
    max_chain: int = 20  # longest continuation of one match
    long_match: int = 8  # a continuation of this length is trusted
    ema_alpha: float = 0.3  # weight of the newest spine acceptance rate
    ema_start: float = 0.5
    ema_tiers: tuple[float, float] = (0.2, 0.4)
    spine_ratios: tuple[float, float, float] = (0.15, 0.30, 0.50)  # r0 below, between and above the tiers
    extension_threshold: float = 0.6  # a chain of more confidence is extended by matching again


@dataclass(slots=True)
class _Occurrences:
    """All that matching needs of the places where one n-gram occurred; constant size however often it recurs."""

    first: int  # index of the token that followed the first occurrence
    follower: int  # that token
    count: int = 1
    unanimous: bool = True


class ContextMatcher:
    """N-gram index over one request's text: the continuation of the OLDEST earlier occurrence of the suffix.

    An n-gram is indexed only when a token follows it, so the query at the end never matches itself.
    """

    def __init__(self, lengths: Seq[int] = (5, 4, 3), max_continuation: int = 20) -> None:
        if not lengths or min(lengths) < 1 or max_continuation < 1:
            raise ValueError(
                f"lengths and max_continuation must be >= 1, got lengths={tuple(lengths)}, max_continuation={max_continuation}"
            )
        self.lengths = tuple(sorted(lengths, reverse=True))
        self.max_continuation = max_continuation
        self.pool: list[int] = []
        self._index: dict[tuple[int, ...], _Occurrences] = {}

    def extend(self, tokens: Seq[int]) -> None:
        """Append to the text and index every n-gram that one of the new tokens follows."""
        start = len(self.pool)
        self.pool += tokens
        for end in range(max(1, start), len(self.pool)):
            for n in self.lengths:
                if end >= n:
                    self._add(tuple(self.pool[end - n : end]), end)

    def _add(self, ngram: tuple[int, ...], end: int) -> None:
        seen = self._index.get(ngram)
        if seen is None:
            self._index[ngram] = _Occurrences(end, self.pool[end])
        else:
            seen.count += 1
            seen.unanimous = seen.unanimous and seen.follower == self.pool[end]

    def _find(self, suffix: Seq[int]) -> _Occurrences | None:
        for n in self.lengths:
            seen = self._index.get(tuple(suffix[-n:])) if len(suffix) >= n else None
            if seen is not None:
                return seen
        return None

    def match(self, suffix: Seq[int]) -> list[int]:
        """Up to max_continuation tokens that followed the oldest occurrence of the longest n-gram at the end of `suffix`."""
        seen = self._find(suffix)
        return [] if seen is None else self.pool[seen.first : seen.first + self.max_continuation]

    def consensus(self, suffix: Seq[int]) -> bool:
        """At least two occurrences of the longest known n-gram, all followed by one token."""
        seen = self._find(suffix)
        return seen is not None and seen.count >= 2 and seen.unanimous


def confidence(length: int, consensus: bool, long_match: int = 8) -> float:
    """Trust in a continuation of `length` tokens, 0..1."""
    if length == 0:
        return 0.0
    if consensus:
        return 1.0
    if length >= long_match:
        return min(0.9, 0.7 + 0.2 * (length - long_match) / 12)
    return 0.6 * length / long_match


def spine_length(budget: int, trust: float, ema: float, config: GooseConfig) -> int:
    """Most spine nodes in a tree of `budget` nodes."""
    low, high = config.ema_tiers
    base = config.spine_ratios[0 if ema < low else 1 if ema < high else 2]
    return int(budget * (base + trust * (1 - base)))


def harmonic_quotas(total: int, count: int) -> list[int]:
    """`total` branches over `count` spine nodes with weights 1/i, nearest the root first; at least 1 each while any are left."""
    norm = sum(1 / i for i in range(1, count + 1))
    quotas, left = [], total
    for i in range(1, count + 1):
        quotas.append(min(max(1, int(total / i / norm)), left))
        left -= quotas[-1]
    return quotas


@dataclass(slots=True)
class _State:
    matcher: ContextMatcher
    ema: float


class _Growth:
    """One tree under construction: the paper's Algorithm 1."""

    def __init__(self, anchor: int, prev: int, table: AdjacencyTable, budget: int, depth: int, config: GooseConfig) -> None:
        self.tokens, self.parents, self.depths, self.sources = [anchor], [NO_PARENT], [0], [int(Source.ROOT)]
        self.children: list[set[int]] = [set()]
        self.prev, self.table, self.budget, self.depth, self.config = prev, table, budget, depth, config
        self.queue: list[tuple[int, float]] = []  # first in, first out: branch nodes that may be extended

    def add(self, parent: int, token: int, source: Source) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.sources.append(int(source))
        self.children[parent].add(token)
        self.children.append(set())
        return len(self.tokens) - 1

    def spine(self, chain: list[int]) -> None:
        node = ROOT
        for token in chain:
            node = self.add(node, token, Source.CONTEXT)

    def branches(self, node: int, quota: int) -> None:
        """Hang up to `quota` successors on `node`, best first, beside the spine child that it may have."""
        prev = self.prev if node == ROOT else self.tokens[self.parents[node]]
        if self.depths[node] >= self.depth:
            return
        known = self.table.lookup(prev, self.tokens[node])
        for token, score in zip(known.tokens.tolist(), known.scores.tolist(), strict=True):
            if quota <= 0 or score < self.config.min_score:
                break
            if token in self.children[node]:
                continue
            child = self.add(node, token, Source.TABLE)
            quota -= 1
            if self.depths[child] < self.config.max_branch_depth:
                self.queue.append((child, score))

    def extend(self) -> None:
        """Spend what is left of the budget below the branches."""
        for node, score in self.queue:  # grows while it is read
            remaining = self.budget - len(self.tokens)
            if remaining <= 0:
                return
            width = min(self.config.adjacency_top_k, max(1, ceil(remaining * score)))
            self.branches(node, min(width, max(1, self.config.adjacency_top_k // self.depths[node]), remaining))

    def tree(self) -> DraftTree:
        return DraftTree(
            np.array(self.tokens, np.int64), np.array(self.parents, np.int32), source=np.array(self.sources, np.uint8)
        )


class GoosePublished:
    """The paper's builder. Its budget is NO hard cap: a tree has up to budget + extension * confidence + 1 nodes.

    `build` takes the paper's B from `budgets`; a budget of 1 still means a plain step, and depth is a hard cap.
    """

    sizes_itself = False

    def __init__(self, vocab_size: int, config: GooseConfig | None = None) -> None:
        self.config = config or GooseConfig()
        self.top_k = min(self.config.adjacency_top_k, vocab_size)
        self.table = AdjacencyTable(vocab_size, self.top_k)
        self._states: dict[int, _State] = {}

    def start(self, seq: Sequence) -> None:
        matcher = ContextMatcher(self.config.ngram_lengths, self.config.max_chain)
        matcher.extend(seq.token_ids)
        self._states[seq.id] = _State(matcher, self.config.ema_start)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        observe_prompt(self.table, seq, start, top)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq, budget, depth) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, seq: Sequence, budget: int, depth: int) -> DraftTree:
        anchor = seq.token_ids[-1]
        if budget <= 1 or depth <= 0:
            return DraftTree.root_only(anchor)
        state = self._states[seq.id]
        chain, trust = self._propose(state.matcher, state.matcher.pool)
        prev = seq.token_ids[-2] if len(seq.token_ids) > 1 else -1
        if self.table.lookup(prev, anchor).tier == NONE:
            return DraftTree.chain([anchor, *chain[:depth]])
        if trust > self.config.extension_threshold:
            chain = self._extend_chain(state.matcher, chain, trust)
        budget += int(trust * max(0, self.config.max_extended_chain - self.config.node_budget))
        chain = chain[: min(depth, spine_length(budget, trust, state.ema, self.config))]
        return self._grow(anchor, prev, chain, budget, depth)

    def _propose(self, matcher: ContextMatcher, tokens: list[int]) -> tuple[list[int], float]:
        suffix = tokens[-max(matcher.lengths) :]
        chain = matcher.match(suffix)
        return chain, confidence(len(chain), matcher.consensus(suffix), self.config.long_match)

    def _extend_chain(self, matcher: ContextMatcher, chain: list[int], trust: float) -> list[int]:
        """Match again from the chain's end until nothing is found or the limit is reached."""
        limit = int(self.config.max_extended_chain * trust)
        tail = matcher.pool[-max(matcher.lengths) :]
        while len(chain) < limit:
            more, more_trust = self._propose(matcher, tail + chain)
            if not more:
                break
            chain = chain + more
            if trust == 1.0 and more_trust < 1.0:
                break
        return chain[:limit]

    def _grow(self, anchor: int, prev: int, chain: list[int], budget: int, depth: int) -> DraftTree:
        growth = _Growth(anchor, prev, self.table, budget, depth, self.config)
        growth.spine(chain)
        branches = max(0, budget - 1 - len(chain))
        on_spine = max(1, int(branches * self.config.spine_branch_ratio)) if chain and branches else 0
        growth.branches(ROOT, branches - on_spine)
        for node, quota in enumerate(harmonic_quotas(on_spine, len(chain)), 1):
            growth.branches(node, quota)
        growth.extend()
        return growth.tree()

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        state = self._states[seq.id]
        spine = 0 if tree.source is None else int(np.count_nonzero(tree.source == Source.CONTEXT))
        if spine and tree.source is not None:
            kept = int(np.count_nonzero(tree.source[verdict.nodes] == Source.CONTEXT))
            state.ema += self.config.ema_alpha * (kept / spine - state.ema)
        state.matcher.extend(seq.token_ids[len(state.matcher.pool) :])
        if top is not None:
            observe_tree(self.table, -1, tree, verdict, top)  # -1: the root's own bigram is skipped

    def finish(self, seq: Sequence) -> None:
        self._states.pop(seq.id, None)

    def reset(self) -> None:
        self.table.reset()

    def state(self) -> dict[str, Any]:
        return self.table.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.table.load_state(state)
