"""Level by level: all texts of a level are told, then the budget of the next level is shared out among them by score.

* Beam search: the best `samples / branch` nodes get `branch` texts each.
* REBASE (Wu et al., "Inference Scaling Laws", arXiv 2408.00724): every node gets a share in proportion to softmax(q / temperature),
  of as many texts as chains are not complete yet. Eight texts over q = (1, .9, .2) at temperature .2: (5, 3, 0).

A level without open nodes starts a new round from the prompt. `samples` None: as many as chains fit into the budget, 16 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, floor
from typing import Any

from specdec.search.bg_mcts import next_kind
from specdec.search.budget import Budget
from specdec.search.chain_length import ChainLength
from specdec.search.request import Kind, Policy, Proposal
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree
from specdec.search.small_budget import STOP, WAIT, OpenNodes, SmallBudget

__all__ = ["Beam", "Levels", "Rebase", "shares"]

_MOST_SAMPLES = 16


def shares(scores: Sequence[float], total: int, temperature: float) -> list[int]:
    """`total` texts in proportion to softmax(scores / temperature), largest remainders first, the earlier of equals."""
    top = max(scores)
    weights = [exp((score - top) / temperature) for score in scores]
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [floor(share) for share in exact]
    by_remainder = sorted(range(len(scores)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass
class Levels(Policy):
    """What level-synchronous policies share; `_share` is the algorithm.

    Attributes:
        samples: texts of a level; None: by the budget.
        small: rules for small budgets; only that for the end is on.
    """

    samples: int | None = None
    small: SmallBudget = field(default_factory=lambda: SmallBudget(first_dive=0, backtrack=0))

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1 or None, got {self.samples}")

    def start(self, tree: SearchTree, budget: Budget, length: ChainLength, seed: int) -> None:
        super().start(tree, budget, length, seed)
        self._open_nodes = OpenNodes(tree)
        self._todo: list[int] = []  # nodes to draw below, one entry a text
        self._told: list[int] = []  # nodes of the present level
        self._level = 0
        self._completed = 0  # chains of this round

    def state(self) -> dict[str, Any]:
        return {"todo": self._todo, "told": self._told, "level": self._level, "completed": self._completed}

    def restore(self, state: dict[str, Any]) -> None:
        self._todo, self._told = list(state["todo"]), list(state["told"])
        self._level, self._completed = state["level"], state["completed"]

    def told(self, node: int) -> None:
        if self.tree.status[node] == NodeStatus.OPEN:
            self._told.append(node)
        elif self.tree.status[node] == NodeStatus.DROPPED:  # its parent may have nothing more to say
            self._todo = [each for each in self._todo if not self.tree.closed[each] and self.tree.cap(each)]
        else:
            self._completed += 1

    def propose(self) -> Proposal | None:
        leaf = self.small.node(self.tree, self.budget, self.length, self._open_nodes)
        if leaf is not None:
            return None if leaf in (STOP, WAIT) else Proposal(leaf, next_kind(self.tree, leaf))
        while not self._todo:
            if self.tree.virtual[ROOT] or self.tree.closed[ROOT]:
                return None
            self._next_level()
            if not self._todo:
                return None
        node = self._todo.pop(0)
        return Proposal(node, self._kind(node))

    def _count(self) -> int:
        """Texts of a level."""
        if self.samples is not None:
            return self.samples
        return max(1, min(_MOST_SAMPLES, int(self.budget.total / self.length.chain(self.tree))))

    def _next_level(self) -> None:
        nodes = sorted(node for node in self._told if not self.tree.closed[node] and not self.tree.children[node])
        counts = self._share(nodes) if nodes else []
        self._todo = [node for node, count in zip(nodes, counts) for _ in range(int(min(count, self.tree.cap(node))))]
        self._told = []
        self._level += 1
        if not self._todo:
            self._level = self._completed = 0
            self._todo = [ROOT] * int(min(self._count(), self.tree.cap(ROOT) - self.tree.draws[ROOT]))

    def _share(self, nodes: list[int]) -> list[int]:
        """Texts below each open node of the level that is complete."""
        raise NotImplementedError

    def _kind(self, node: int) -> Kind:
        return next_kind(self.tree, node)


@dataclass
class Beam(Levels):
    """Attributes:
    branch: texts below each node that is kept.
    """

    branch: int = 2

    name = "beam"

    def _share(self, nodes: list[int]) -> list[int]:
        width = max(1, self._count() // self.branch)
        kept = sorted(nodes, key=lambda node: (-self.tree.q[node], node))[:width]
        return [min(self.branch, self._count()) if node in kept else 0 for node in nodes]


@dataclass
class Rebase(Levels):
    """Attributes:
    temperature: of the softmax over scores.
    """

    temperature: float = 0.2

    name = "rebase"

    def _share(self, nodes: list[int]) -> list[int]:
        return shares([self.tree.q[node] for node in nodes], max(1, self._count() - self._completed), self.temperature)
