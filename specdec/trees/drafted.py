"""DraftedTree: a draft model's most probable continuations, grown best first; at a temperature, with the target's own noise.

Greedy (OPT-Tree, arXiv 2406.17276; EAGLE-2, 2406.16858): the score of a node is the drafter's probability of its path, and the tree is
the best nodes of all. Each forward of the drafter reads the best unread nodes, until what a further one could add is not worth it.

Sampling (verification.md 4.5): the target's token at a position is argmax(log p + g) with noise g keyed by the position, so the
children are the best tokens of log q + g, the very same noise. `match` follows the target's token whatever was drafted: the text
is that of plain sampling with this seed. How far ahead of the others a token is says how likely it is the target's::

    log q + g = 1.9, 1.2, -0.3   ->   exp(s / TEMPER) normalised: .79, .20, .01
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Kind, Source
from specdec.sequence import Sequence
from specdec.sources.draft_model import DraftModel, Growth, log_law
from specdec.trees.by_model import TreeByModel

__all__ = ["DraftedTree"]

BRANCHES = 8  # children of a node that are looked at
WIDTH = 8  # nodes that one forward of the drafter reads, at most
MIN_GAIN = 0.25  # expected tokens for which a forward of the drafter is worth it
TEMPER = 0.5  # sharpness of the scores where drafter and target share their noise


class DraftedTree(TreeByModel):
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        width: nodes that one forward of the drafter reads, at most.
        min_gain: expected tokens below which no further forward of the drafter is made.
    """

    def __init__(self, model: DraftModel, width: int = WIDTH, min_gain: float = MIN_GAIN) -> None:
        super().__init__(model)
        self.width, self.min_gain = width, min_gain

    def plan(self, seq: Sequence, growth: Growth, budget: int, depth: int) -> _Plan:
        return _Plan(seq, growth, budget, depth, self.width, self.min_gain)


@dataclass(slots=True)
class _Plan:
    """The candidates of one row. Scores are log-probabilities of paths: no child's is above its parent's."""

    seq: Sequence
    growth: Growth  # what the drafter reads: a node of it is a candidate that was expanded
    budget: int
    depth: int
    width: int
    min_gain: float
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [NO_PARENT])
    depths: list[int] = field(default_factory=lambda: [0])
    scores: list[float] = field(default_factory=lambda: [0.0])
    read: list[int] = field(default_factory=lambda: [ROOT])  # candidate -> node of the growth, NO_PARENT: not expanded
    expanded: list[int] = field(default_factory=lambda: [0])  # node of the growth -> candidate
    noise: dict[int, torch.Tensor] = field(default_factory=dict)  # depth -> [V], which all its nodes share

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
            if depth not in self.noise:
                self.noise[depth] = self.seq.randomness.gumbel(len(self.seq.token_ids) + depth, len(law), law.device)
            best = torch.topk(law + self.noise[depth], min(BRANCHES, len(law)))
            scores = torch.log_softmax(best.values / TEMPER, -1)
        kept = scores > float("-inf")
        return best.indices[kept].tolist(), scores[kept].tolist()

    def best(self) -> list[int]:
        """The candidates of the tree: the root and the best others, parents before children."""
        order = np.argsort(-np.array(self.scores), kind="stable")  # equal scores: the parent came first
        return sorted(order[: self.budget].tolist())

    def go_on(self) -> bool:
        """Adds the best unread candidates of the tree to the growth, unless they promise too little."""
        fresh = [node for node in self.best() if self.read[node] == NO_PARENT and self.depths[node] < self.depth]
        fresh = sorted(fresh, key=lambda node: -self.scores[node])[: self.width]
        if not fresh or sum(np.exp(self.scores[node]) for node in fresh) < self.min_gain:
            return False
        for node in sorted(fresh):
            self.read[node] = self.growth.add(self.read[self.parents[node]], self.tokens[node])
            self.expanded.append(node)
        return True

    def tree(self) -> DraftTree:
        """The best candidates."""
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
