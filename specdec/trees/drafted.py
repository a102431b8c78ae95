"""DraftedTree: a draft model's most probable continuations, grown best first; at a temperature, with the target's own noise.

Greedy (OPT-Tree, arXiv 2406.17276; EAGLE-2, 2406.16858): the score of a node is the drafter's probability of its path, and the tree is
the best nodes of all. Each forward of the drafter reads the best unread nodes, until what a further one could add is not worth it.

Sampling (verification.md 4.5): the target's token at a position is argmax(log p + g) with noise g keyed by the position, so the
children are the best tokens of log q + g, the very same noise. `match` follows the target's token whatever was drafted: the text
is that of plain sampling with this seed. How far ahead of the others a token is says how likely it is the target's::

    log q + g = 1.9, 1.2, -0.3   ->   exp(s / TEMPER) normalised: .79, .20, .01
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Kind, Source, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.draft_model import DraftModel, Growth, log_law

__all__ = ["DraftedTree"]

BRANCHES = 8  # children of a node that are looked at
WIDTH = 8  # nodes that one forward of the drafter reads, at most
MIN_GAIN = 0.25  # expected tokens for which a forward of the drafter is worth it
TEMPER = 0.5  # sharpness of the scores where drafter and target share their noise


class DraftedTree:
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        width: nodes that one forward of the drafter reads, at most.
        min_gain: expected tokens below which no further forward of the drafter is made.
    """

    sizes_itself = False
    top_k = 0
    compiles = False

    def __init__(self, model: DraftModel, width: int = WIDTH, min_gain: float = MIN_GAIN) -> None:
        self.model, self.width, self.min_gain = model, width, min_gain
        self.forwards = 0  # of the drafter, for statistics

    def start(self, seq: Sequence) -> None:
        self.model.start(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """The drafter reads the prompt itself."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        limits = [min(depth, self.model.depth_limit(seq)) for seq, depth in zip(seqs, depths)]
        if min(limits) < 0:  # a text is longer than the drafter's context
            return [DraftTree.root_only(seq.token_ids[-1]) for seq in seqs]
        growths, logits = self.model.grow(seqs)
        plans = [_Plan(seq, growth, budget, limit) for seq, growth, budget, limit in zip(seqs, growths, budgets, limits)]
        known = [0] * len(plans)
        while True:
            self.forwards += 1
            for plan, rows, first in zip(plans, logits, known):
                plan.receive(rows, first)
            known = [len(growth.tokens) for growth in growths]
            wanted = [plan.expand(self.width, self.min_gain) for plan in plans]
            if not any(wanted):
                return [plan.tree() for plan in plans]
            logits = self.model.extend(seqs, growths, known)

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """The drafter keeps what it has read of the accepted path."""
        if not isinstance(tree.evidence, np.ndarray):  # the engine's own root, which the drafter has not read
            return
        read = tree.evidence[verdict.nodes]
        self.model.keep(seq, read[: np.argmin(np.append(read, NO_PARENT))].tolist())

    def finish(self, seq: Sequence) -> None:
        self.model.finish(seq)

    def reset(self) -> None:
        """Nothing is learned across requests."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _Plan:
    """The candidates of one row. Scores are log-probabilities of paths: no child's is above its parent's."""

    seq: Sequence
    growth: Growth  # what the drafter reads: a node of it is a candidate that was expanded
    budget: int
    depth: int
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [NO_PARENT])
    depths: list[int] = field(default_factory=lambda: [0])
    scores: list[float] = field(default_factory=lambda: [0.0])
    read: list[int] = field(default_factory=lambda: [ROOT])  # candidate -> node of the growth, NO_PARENT: not expanded
    expanded: list[int] = field(default_factory=lambda: [0])  # node of the growth -> candidate

    def __post_init__(self) -> None:
        self.tokens = [self.seq.token_ids[-1]]

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on: their best children become candidates."""
        for row, node in enumerate(range(first, first + len(logits))):
            parent = self.expanded[node]
            if self.depths[parent] >= self.depth:
                continue
            tokens, scores = self._children(logits[row], self.depths[parent])
            self.tokens += tokens
            self.parents += [parent] * len(tokens)
            self.depths += [self.depths[parent] + 1] * len(tokens)
            self.scores += [self.scores[parent] + score for score in scores]
            self.read += [NO_PARENT] * len(tokens)

    def _children(self, logits: torch.Tensor, depth: int) -> tuple[list[int], list[float]]:
        """The best tokens after a node at `depth`, and the logarithms of their chances."""
        law = log_law(logits[None], self.seq.params)[0]
        if self.seq.params.temperature == 0:
            best = torch.topk(law, min(BRANCHES, len(law)))
            scores = best.values
        else:
            position = len(self.seq.token_ids) + depth
            best = torch.topk(law + self.seq.randomness.gumbel(position, len(law), law.device), min(BRANCHES, len(law)))
            scores = torch.log_softmax(best.values / TEMPER, -1)
        kept = scores > float("-inf")
        return best.indices[kept].tolist(), scores[kept].tolist()

    def best(self) -> list[int]:
        """The candidates of the tree: the root and the best others, parents before children."""
        order = np.argsort(-np.array(self.scores), kind="stable")  # equal scores: the parent came first
        return sorted(order[: self.budget].tolist())

    def expand(self, width: int, min_gain: float) -> bool:
        """Adds the best unread candidates of the tree to the growth, unless they promise too little."""
        fresh = [node for node in self.best() if self.read[node] == NO_PARENT and self.depths[node] < self.depth]
        fresh = sorted(fresh, key=lambda node: -self.scores[node])[:width]
        if not fresh or sum(np.exp(self.scores[node]) for node in fresh) < min_gain:
            return False
        for node in sorted(fresh):
            self.read[node] = self.growth.add(self.read[self.parents[node]], self.tokens[node])
            self.expanded.append(node)
        return True

    def tree(self) -> DraftTree:
        """Its `evidence` [N] is each node's number in the growth."""
        nodes = self.best()
        index = {node: i for i, node in enumerate(nodes)} | {NO_PARENT: NO_PARENT}
        kind = None if self.seq.params.temperature == 0 else np.full(len(nodes), Kind.SHARED_NOISE, np.uint8)
        source = np.full(len(nodes), Source.MODEL, np.uint8)
        source[0] = Source.ROOT
        return DraftTree(
            np.array([self.tokens[node] for node in nodes], np.int64),
            np.array([index[self.parents[node]] for node in nodes], np.int32),
            source=source,
            kind=kind,
            evidence=np.array([self.read[node] for node in nodes], np.int32),
        )
