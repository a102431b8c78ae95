"""DraftedTree: a draft model's most probable continuations, grown best first; at a temperature, with the target's own noise.

Greedy (OPT-Tree, arXiv 2406.17276; EAGLE-2, 2406.16858): every edge has a chance of being the target's token, which is learned from
the drafter's probability (`trust`); the chance of a node is the product along its path, and the tree is the best nodes of all.
Each forward of the drafter reads the best unread nodes, until a further one does not pay.

Sampling (verification.md 4.5): the target's token at a position is argmax(log p + g) with noise g keyed by the position, so the
children are the best tokens of log q + g, the very same noise. `match` follows the target's token whatever was drafted: the text
is that of plain sampling with this seed. How far ahead of the others a token is says how likely it is the target's::

    log q + g = 1.9, 1.2, -0.3   ->   exp(s / TEMPER) normalised: .79, .20, .01

With a chain source, whose continuation of the text is the spine, this is Goose (2604.02047) with a model as its second source: the
first forward reads the root and the whole spine, so that every node of the spine gets the drafter's branches at once::

    the - cat - sat - on        the spine, from an earlier "the cat sat on"
     |     |
    dog   is                    the drafter's branches; a spine token that the drafter expects too counts for more
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Kind, Source
from specdec.sequence import SamplingParams
from specdec.sources.draft_model import DraftModel, log_law
from specdec.trees.by_model import Costs, Edges, Plan, TreeByModel, spine_kind
from specdec.trees.chain import Chain

__all__ = ["DraftedTree"]

BRANCHES = 20  # children of a node that are looked at: the more the worse the drafter
WIDTH = 8  # nodes that one forward of the drafter reads, at most
MIN_GAIN = 0.25  # without costs: nodes on the accepted path for which a forward of the drafter is worth it
TEMPER = 0.5  # sharpness of the scores where drafter and target share their noise
BEST, OTHER, SPINE = 0, 1, 2  # kinds of proposals: the drafter's best, its others, the spine's (this and the next two, by match)


class DraftedTree(TreeByModel):
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        width: nodes that one forward of the drafter reads, at most.
        min_gain: without costs, no forward of the drafter is made over nodes of which fewer than this are expected to be accepted.
        spine, costs, sampling: see TreeByModel.
    """

    prunes = True

    def __init__(
        self,
        model: DraftModel,
        width: int = WIDTH,
        min_gain: float = MIN_GAIN,
        spine: Chain | None = None,
        costs: Costs | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        super().__init__(model, costs, spine, sampling)
        self.width, self.min_gain = width, min_gain if costs is None else 0.0

    def plan(self, **shared: Any) -> _Plan:
        return _Plan(**shared, width=self.width, min_gain=self.min_gain)


@dataclass
class _Plan(Plan):
    """No node's chance is above its parent's."""

    width: int = WIDTH
    min_gain: float = MIN_GAIN
    noise: dict[int, torch.Tensor] = field(default_factory=dict)  # depth -> [V], which all its nodes share

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on: their best children become candidates."""
        for node, row in enumerate(logits, first):
            parent = self.expanded[node]
            if self.depths[parent] >= self.depth:
                continue
            beside = parent + 1 if parent < self.guessed else None
            tokens, kinds, logs = self._children(row, self.depths[parent], None if beside is None else self.tokens[beside])
            chances = self.chances[parent] * self.trust.chances(kinds, logs)
            self.edges[parent] = Edges(tokens, kinds, logs)
            for token, chance, kind in zip(tokens.tolist(), chances.tolist(), kinds.tolist()):
                if kind >= SPINE and beside is not None:
                    self.chances[beside] = chance
                else:
                    self.add(parent, token, chance)

    def _children(self, logits: torch.Tensor, depth: int, spine: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best tokens after a node at `depth`, the spine's among them: tokens, kinds and log-probabilities [C]."""
        law = log_law(logits[None], self.params)[0]
        if self.seq.params.temperature == 0:
            scores, best = law, torch.topk(law, min(BRANCHES, len(law))).indices
        else:
            if depth not in self.noise:
                self.noise[depth] = self.seq.randomness.gumbel(len(self.seq.token_ids) + depth, len(law), law.device)
            noisy = (law + self.noise[depth]) / TEMPER
            top = torch.topk(noisy, min(BRANCHES, len(law)))
            scores, best = noisy - torch.logsumexp(top.values, 0), top.indices
        if spine is not None and not bool((best == spine).any()):
            best = torch.cat([best, best.new_tensor([spine])])
        tokens, logs = best.cpu().numpy(), np.minimum(scores[best].double().cpu().numpy(), 0.0)
        kinds = np.where(np.arange(len(tokens)) == 0, BEST, OTHER)
        if spine is not None:
            kinds[tokens == spine] = spine_kind(SPINE, self.match)
        kept = (logs > -np.inf) | (kinds >= SPINE)
        return tokens[kept], kinds[kept], logs[kept]

    def best(self, size: int) -> list[int]:
        """The root and the best others, parents before children."""
        order = np.argsort(-np.array(self.chances), kind="stable")  # equal chances: the parent came first
        return sorted(order[:size].tolist())

    def fresh(self) -> list[int]:
        best = [node for node in self.best(self.budget) if self.numbers[node] == NO_PARENT and self.depths[node] < self.depth]
        best = sorted(best, key=lambda node: -self.chances[node])[: self.width]
        return sorted(best) if sum(self.chances[node] for node in best) >= self.min_gain else []

    def expected(self) -> np.ndarray:
        return np.cumsum(np.sort(self.chances)[::-1][: self.budget])

    def size_with(self, nodes: Seq[int]) -> int:
        return min(self.budget, len(self.tokens) + BRANCHES * len(nodes))

    def tree(self, size: int) -> DraftTree:
        """The best candidates."""
        nodes = self.best(min(size, self.budget))
        index = {node: i for i, node in enumerate(nodes)} | {NO_PARENT: NO_PARENT}
        kind = None if self.seq.params.temperature == 0 else np.full(len(nodes), Kind.SHARED_NOISE, np.uint8)
        return DraftTree(
            np.array([self.tokens[node] for node in nodes], np.int64),
            np.array([index[self.parents[node]] for node in nodes], np.int32),
            source=np.array([_source(node, self.guessed) for node in nodes], np.uint8),
            kind=kind,
            evidence=self.drafted(nodes),
        )


def _source(node: int, guessed: int) -> Source:
    return Source.ROOT if node == ROOT else Source.CONTEXT if node <= guessed else Source.MODEL
