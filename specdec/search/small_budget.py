"""What to do while a budget holds only a few chains: dive, go back to where a chain went wrong, finish in time (search.md 5.3 a, b).

Step-wise search answers nothing where the budget holds less than about two chains. With B = the budget, L = tokens of a chain (both
estimated as `ChainLength` says), each rule off where its factor is 0::

    B < single_chain * L    one chain, and nothing after it
    B < backtrack * L       always extend, among the nodes that fit, the one that promised most and kept least:
                            q(x) * (1 - the best mean q of a subtree below x); q of the prompt is 1, nothing below counts 0
    B < first_dive * L      else follow one chain to its end before anything else
    left <= finish * cost   else, at the end: complete the best open leaf that fits; cost = tokens to finish the best one

A node fits where finishing a chain from it costs at most slack * what is left; before there is an answer, only where `reserve` such
chains would fit: a step that was wrongly blamed must not cost the only answer. If nothing fits, the search stops where there is an
answer, and goes on with the deepest leaf where there is none. Nor are more requests in flight than what is left holds `reserve`
chains for each: side by side they would spend it before the first has told where to go. Example of `backtrack`: below the prompt a chain of q = .9, .9, .1, .1;
the second node promised .9 and its subtree below has mean .1, so .81; the first has .9 * (1 - .37); a second third step is drawn.
From `rescale` scores on, q is where a score lies between the least and the greatest so far (1 where all are equal), so that an
evaluator which says .9 for wrong and 1 for right is understood: .99, .99, .91, .91 is then the chain above. The range of fewer scores
says little.

`backtrack` is in neither the paper nor search.md, and while it is on it takes every decision: BG-MCTS's own selection begins at
32 L, and no dive comes before it, which would cost 9 points at 1,200 tokens. On the synthetic reasoner it is worth more than every
other rule; `python -m bench.controller` has the rows without it. Beginning at 8 L costs 2 to 8 points from 5,000 to 12,000 tokens (10 to
23 chains) with an evaluator that is right in .7 to .9 of all cases, up to 29 with one whose scores lie close together, and nothing that
shows with .6 (200 problems, seed 11; `--ablation` has the row). At 48 chains going on would still be 5 to 8 points better: the policy
"backtrack". Without `reserve` it is 13 points worse than best-of-n at 600 tokens with an evaluator that is right in six of ten cases, and
four requests in flight cost it 18 at 1,200.
`single_chain` (search.md: 1.2) is off: what it would leave unspent finds answers (`--ablation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from specdec.search.budget import Budget
from specdec.search.chain_length import ChainLength
from specdec.search.depth_heaps import DepthHeaps
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree

__all__ = ["STOP", "WAIT", "OpenNodes", "SmallBudget"]

STOP = -1
WAIT = -2


@dataclass(frozen=True, slots=True)
class SmallBudget:
    """Factors of the rules above."""

    single_chain: float = 0.0
    first_dive: float = 3.0
    backtrack: float = 32.0
    reserve: float = 2.0
    rescale: float = 10
    finish: float = 1.3
    slack: float = 1.1

    def node(self, tree: SearchTree, budget: Budget, length: ChainLength, open_nodes: OpenNodes | None = None) -> int | None:
        """The node to extend now, WAIT for what is in flight, STOP, or None: search. `open_nodes` of this tree, kept from call to
        call, saves a look at every node."""
        open_nodes = open_nodes or OpenNodes(tree)
        chains = budget.total / length.chain(tree)
        dive = self.single_chain if chains < self.backtrack else max(self.first_dive, self.single_chain)
        if chains < self.single_chain and tree.answered_count:
            return WAIT if tree.virtual[ROOT] else STOP
        if chains < dive and not tree.answered_count and not tree.closed_count:
            return WAIT if tree.virtual[ROOT] else _deepest(tree, tree.open_leaves())
        if chains < self.backtrack:
            return self._backtrack(tree, budget, length, open_nodes.by_regret(self.rescale))
        return self._finish(tree, budget, length, open_nodes.leaves)

    def _backtrack(self, tree: SearchTree, budget: Budget, length: ChainLength, by_regret: DepthHeaps) -> int:
        if (
            self.reserve
            and tree.virtual[ROOT]
            and tree.virtual[ROOT] >= budget.expected_left // (self.reserve * length.chain(tree))
        ):
            return WAIT
        slack = self.slack if tree.answered_count or not self.reserve else 1 / self.reserve
        node = by_regret.best(self._fits(tree, budget, length, slack))
        if node is not None:
            return node
        if tree.virtual[ROOT]:
            return WAIT
        deepest = by_regret.deepest()
        return STOP if tree.answered_count or not deepest else _deepest(tree, deepest)

    def _finish(self, tree: SearchTree, budget: Budget, length: ChainLength, leaves: DepthHeaps) -> int | None:
        leaves.keep_up()  # at every cycle, or the first one that needs them would look at the whole tree
        left = budget.expected_left
        if left > self.finish * length.step(tree) * length.depth(tree):  # no chain costs more
            return None
        best = leaves.best()
        if best is None or left > self.finish * length.to_finish(tree, best):
            return None
        fitting = leaves.best(self._fits(tree, budget, length, self.slack))
        if fitting is not None:
            return fitting
        return STOP if tree.answered_count else _deepest(tree, leaves.deepest())

    def _fits(self, tree: SearchTree, budget: Budget, length: ChainLength, slack: float) -> Callable[[int], bool]:
        """Whether a chain can be finished from a depth."""
        left, step, steps = slack * budget.expected_left, length.step(tree), length.depth(tree)
        return lambda depth: step * max(1.0, steps - depth) <= left


class OpenNodes:
    """The nodes of one tree that these rules choose from, best first."""

    def __init__(self, tree: SearchTree) -> None:
        self._tree = tree
        self._scale: _Scale | None = None
        self.leaves = DepthHeaps(tree, lambda node: (-tree.q[node], tree.tokens[node]), lambda node: _is_leaf(tree, node), False)

    def by_regret(self, rescale: float) -> DepthHeaps:
        """Made anew with the scale, which all regrets depend on: seldom, the more scores there are."""
        tree = self._tree
        scale = _Scale(tree.least, tree.greatest) if tree.score_count >= rescale else _Scale()
        if scale != self._scale:
            self._scale = scale
            self._by_regret = DepthHeaps(tree, lambda node: (-_regret(tree, node, scale),), lambda node: _extensible(tree, node))
        return self._by_regret


class _Scale(NamedTuple):
    """The range of scores that stands for 0 to 1."""

    least: float = 0.0
    greatest: float = 1.0

    def __call__(self, score: float) -> float:
        if self.least == self.greatest:
            return 1.0
        return min(1.0, max(0.0, (score - self.least) / (self.greatest - self.least)))  # unscored ones may lie outside


def _deepest(tree: SearchTree, nodes: list[int]) -> int:
    return max(nodes, key=lambda node: (tree.depth[node], tree.q[node], -node), default=ROOT)


def _extensible(tree: SearchTree, node: int) -> bool:
    return _open_text(tree, node) and not tree.pending[node] and tree.draws[node] < tree.cap(node)


def _open_text(tree: SearchTree, node: int) -> bool:
    return tree.status[node] == NodeStatus.OPEN and not tree.closed[node]


def _is_leaf(tree: SearchTree, node: int) -> bool:
    """As `SearchTree.open_leaves` has it."""
    return node != ROOT and _open_text(tree, node) and not tree.children[node] and not tree.pending[node]


def _regret(tree: SearchTree, node: int, scale: _Scale) -> float:
    """What a node promised and its subtree did not keep, in [0, 1]."""
    below = max((scale(tree.sum_q[child] / tree.visits[child]) for child in tree.children[node]), default=0.0)
    return (1.0 if node == ROOT else scale(tree.q[node])) * (1.0 - below)
