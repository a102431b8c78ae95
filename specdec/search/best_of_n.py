"""Best-of-n: independent full texts until the budget is spent; the vote decides (repeated sampling, self-consistency).

With 2,000 tokens and chains of 500: four texts below the root, the best-scored answer or the vote of all. A text that was cut, since
several in flight shared the budget, is continued before a new one begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.search.request import Kind, Policy, Proposal
from specdec.search.search_tree import ROOT

__all__ = ["BestOfN"]


@dataclass
class BestOfN(Policy):
    """Attributes:
    n: most texts; None: as many as the budget allows.
    """

    n: int | None = None

    name = "best_of_n"
    unit = Kind.FULL
    child_cap = 1  # a text that was cut has one continuation

    def propose(self) -> Proposal | None:
        tree = self.tree
        for node in tree.live[ROOT]:
            while tree.live[node]:
                node = tree.live[node][0]
            if tree.full[node] and not (tree.children[node] or tree.pending[node]):
                return Proposal(node, Kind.CONTINUE)
        drawn = tree.draws[ROOT] + tree.pending[ROOT]
        if tree.closed[ROOT] or drawn >= tree.cap(ROOT) or (self.n is not None and drawn >= self.n):
            return None
        return Proposal(ROOT, Kind.FULL)
