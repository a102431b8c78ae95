"""SampledTree: children drawn from a draft model's law, for the acceptance rules that know it (verification.md sections 1, 3, 4.3).

The shape is fixed before anything is drawn, and every draw stays: that is what the rules suppose. How the children of a node come:

* iid: `paths` i.i.d. paths (SpecTr, arXiv 2310.15141), merged where they agree; a node that stands for m of them has m draws.
* without_replacement: `branching[d]` distinct tokens at depth d (Sequoia, 2402.12374; recursive SD, 2402.14160).
* hybrid: the most probable token for sure, and the others without replacement from the law without it (Hu et al., 2502.18779).

    iid, paths 3, a law (.6, .4):   draws a, b, a   ->   child a with multiplicity 2, child b with 1

Draws are keyed (step, node, draw) apart from the target's noise. At temperature 0 the children are the most probable tokens, all
of them deterministic; DraftedTree makes better trees there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Kind, Source
from specdec.sequence import Sequence
from specdec.sources.draft_model import DraftModel, Growth, log_law
from specdec.trees.by_model import TreeByModel
from specdec.verify.legality import check_pair
from specdec.verify.step import DRAFT

__all__ = ["SampledTree"]

KINDS = {"iid": Kind.IID, "without_replacement": Kind.WITHOUT_REPLACEMENT, "hybrid": Kind.WITHOUT_REPLACEMENT}
RULE_OF = {"iid": "kseq", "without_replacement": "recursive_rejection", "hybrid": "recursive_rejection"}


class SampledTree(TreeByModel):
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        draw: "iid", "without_replacement" or "hybrid".
        rule: acceptance rule; None: one made for this draw.
        branching: children of a node at depth 0, 1, ...; the last number holds for all greater depths. With "iid" the first
            number is that of the paths and the others are not used.

    Raises:
        ValueError: no such draw or rule, a rule that is not lossless for the draw, a branching below 1.
    """

    def __init__(self, model: DraftModel, draw: str = "hybrid", rule: str | None = None, branching: Seq[int] = (3, 2, 1)) -> None:
        if draw not in KINDS:
            raise ValueError(f"draw must be one of {', '.join(KINDS)}, got {draw!r}")
        if not branching or min(branching) < 1:
            raise ValueError(f"branching must be numbers >= 1, at least one, got {branching!r}")
        super().__init__(model)
        self.draw, self.branching = draw, tuple(branching)
        self.rule = rule or RULE_OF[draw]
        check_pair(self.rule, KINDS[draw], chain=max(branching) == 1)

    def plan(self, seq: Sequence, growth: Growth, budget: int, depth: int) -> _Draws:
        return _Draws(seq, growth, self.draw, self._levels(budget, depth))

    def _levels(self, budget: int, depth: int) -> list[int]:
        """Children (or, of the root, paths) of a node at each depth, as deep as the budget goes: at most `budget` nodes in all."""
        counts: list[int] = []
        width, nodes = 1, 1
        while len(counts) < depth:
            many = self.branching[min(len(counts), len(self.branching) - 1)] if self.draw != "iid" or not counts else 1
            many = min(many, (budget - nodes) // width)  # the last level may be narrower
            if many < 1:
                break
            width *= many
            nodes += width
            counts.append(many)
        return counts


@dataclass(slots=True)
class _Draws:
    """One row's tree, level by level: a node's number is its place in the tree and, once it is read, in the growth."""

    seq: Sequence
    growth: Growth
    draw: str
    levels: list[int]  # draws a node of each depth
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [NO_PARENT])
    kinds: list[int] = field(default_factory=lambda: [int(Kind.DETERMINISTIC)])
    order: list[int] = field(default_factory=lambda: [0])
    counts: list[int] = field(default_factory=lambda: [1])
    laws: list[np.ndarray] = field(default_factory=list)  # of the nodes that were read, [V] float32; none at temperature 0
    depth: int = 0  # of the nodes that were read last

    def __post_init__(self) -> None:
        self.tokens = [self.seq.token_ids[-1]]

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the nodes from `first` on: their children are drawn."""
        if not len(logits) or self.depth >= len(self.levels):
            return
        laws = log_law(logits, self.seq.params).exp().cpu().numpy()
        for node, law in enumerate(laws, first):
            many = self.levels[self.depth]
            if self.seq.params.temperature == 0:
                self._add_sure(node, law, many)
            elif self.draw == "iid":
                self.laws.append(law)
                self._add_iid(node, law, self.counts[node] if node else many)
            else:
                if self.draw == "hybrid":
                    self._add_sure(node, law, 1)
                    law[law.argmax()] = 0.0
                    many -= 1
                self.laws.append(law)
                self._add_distinct(node, law, many)

    def _add(self, node: int, token: int, kind: Kind, order: int) -> None:
        self.tokens.append(token)
        self.parents.append(node)
        self.kinds.append(int(kind))
        self.order.append(order)
        self.counts.append(1)

    def _add_sure(self, node: int, law: np.ndarray, many: int) -> None:
        """The most probable tokens."""
        left = law.copy()
        for _ in range(min(many, len(law))):
            token = int(left.argmax())
            left[token] = -1.0
            self._add(node, token, Kind.DETERMINISTIC, 0)

    def _add_iid(self, node: int, law: np.ndarray, many: int) -> None:
        place: dict[int, int] = {}
        for draw in range(many):
            token = self._pick(law, node, draw)
            if token in place:
                self.counts[place[token]] += 1
            else:
                place[token] = len(self.tokens)
                self._add(node, token, Kind.IID, draw)

    def _add_distinct(self, node: int, law: np.ndarray, many: int) -> None:
        left = law.copy()
        for draw in range(many):
            if not left.any():
                return  # every token that the law allows is there
            token = self._pick(left, node, draw)
            left[token] = 0.0
            self._add(node, token, Kind.WITHOUT_REPLACEMENT, draw)

    def _pick(self, law: np.ndarray, node: int, draw: int) -> int:
        return self.seq.randomness.pick(law, len(self.seq.token_ids), node, draw, DRAFT)

    def go_on(self) -> bool:
        """Adds the nodes of the new level to the growth, unless it is the last."""
        self.depth += 1
        fresh = range(len(self.growth.tokens), len(self.tokens))
        if self.depth >= len(self.levels) or not fresh:
            self.depth = len(self.levels)
            return False
        for node in fresh:
            self.growth.add(self.parents[node], self.tokens[node])
        return True

    def tree(self) -> DraftTree:
        """All that was drawn; the drafter has read the first nodes, in this order."""
        count = len(self.tokens)
        source = np.full(count, Source.MODEL, np.uint8)
        source[ROOT] = Source.ROOT
        read = np.arange(count, dtype=np.int32)
        read[len(self.growth.tokens) :] = NO_PARENT
        sampled = bool(self.laws)
        probs = np.zeros((count, len(self.laws[0])), np.float32) if sampled else None
        if probs is not None:
            probs[: len(self.laws)] = self.laws
        return DraftTree(
            np.array(self.tokens, np.int64),
            np.array(self.parents, np.int32),
            source=source,
            kind=np.array(self.kinds, np.uint8) if sampled else None,
            draw_index=np.array(self.order, np.int32) if sampled else None,
            multiplicity=np.array(self.counts, np.int32) if sampled else None,
            probs=probs,
            evidence=read,
        )
