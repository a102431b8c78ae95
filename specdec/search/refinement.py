"""Sequential refinement: one full text, then "reconsider" again and again, each time below the last answer.

A text that ends without an answer, or that fills the context window, starts a new chain from the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec.search.budget import Budget
from specdec.search.chain_length import ChainLength
from specdec.search.request import Kind, Policy, Proposal
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree

__all__ = ["Refinement"]


@dataclass
class Refinement(Policy):
    """Attributes:
    rounds: most refinements of one chain; None: as many as the budget allows.
    """

    rounds: int | None = None

    name = "refinement"
    unit = Kind.FULL
    refine = True

    def start(self, tree: SearchTree, budget: Budget, length: ChainLength, seed: int) -> None:
        super().start(tree, budget, length, seed)
        self._last, self._round = ROOT, 0

    def state(self) -> dict[str, Any]:
        return {"last": self._last, "round": self._round}

    def restore(self, state: dict[str, Any]) -> None:
        self._last, self._round = state["last"], state["round"]

    def told(self, node: int) -> None:
        if self.tree.status[node] != NodeStatus.DROPPED:
            self._last = node

    def propose(self) -> Proposal | None:
        tree, last = self.tree, self._last
        if tree.virtual[ROOT]:
            return None
        if last == ROOT or tree.closed[last] or tree.draws[last] >= tree.cap(last):
            self._last, self._round = ROOT, 0
            return None if tree.closed[ROOT] or tree.draws[ROOT] >= tree.cap(ROOT) else Proposal(ROOT, Kind.FULL)
        if tree.status[last] == NodeStatus.OPEN:
            return Proposal(last, Kind.CONTINUE)
        if self.rounds is not None and self._round >= self.rounds:
            return None
        self._round += 1
        return Proposal(last, Kind.REFINE)
