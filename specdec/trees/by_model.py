"""TreeByModel: what the builders around a DraftModel share: the life cycle of a request, and the loop over the drafter's forwards."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np
import torch

from specdec.draft_tree import NO_PARENT, DraftTree, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.draft_model import DraftModel, Growth

__all__ = ["Plan", "TreeByModel"]


class Plan(Protocol):
    """One row's tree in the making."""

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on."""

    def go_on(self) -> bool:
        """Adds to the growth what the drafter shall read next; False: nothing."""

    def tree(self) -> DraftTree:
        """Its `evidence` [N] int32 is each node's number in the growth, NO_PARENT where the drafter has not read it."""


class TreeByModel:
    """Tree builder around one DraftModel, which belongs to it alone."""

    sizes_itself = False
    top_k = 0
    compiles = False

    def __init__(self, model: DraftModel) -> None:
        self.model = model
        self.forwards = 0  # of the drafter, for statistics

    def plan(self, seq: Sequence, growth: Growth, budget: int, depth: int) -> Plan:
        """A tree of at most `budget` nodes and this depth."""
        raise NotImplementedError

    def start(self, seq: Sequence) -> None:
        self.model.start(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """The drafter reads the prompt itself."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        limits = [min(depth, self.model.depth_limit(seq)) for seq, depth in zip(seqs, depths)]
        if min(limits) < 0:  # a text is longer than the drafter's context
            return [DraftTree.root_only(seq.token_ids[-1]) for seq in seqs]
        growths, logits = self.model.grow(seqs)
        plans = [self.plan(seq, growth, budget, limit) for seq, growth, budget, limit in zip(seqs, growths, budgets, limits)]
        known = [0] * len(plans)
        while True:
            self.forwards += 1
            for plan, rows, first in zip(plans, logits, known):
                plan.receive(rows, first)
            known = [len(growth.tokens) for growth in growths]
            wanted = [plan.go_on() for plan in plans]
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
