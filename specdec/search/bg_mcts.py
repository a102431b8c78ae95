"""Budget-Guided MCTS: wide while the budget is ample, deep when it runs out.

Miyamoto, Oba, Okazaki, "Aligning Tree-Search Policies with Fixed Token Budgets in Test-Time Scaling of LLMs", arXiv 2602.09574.
One node is one reasoning step, q(x) its evaluator score, d(x) its depth, dbar the mean depth of answers, m the nodes of a subtree,
rho = 1 - spent / budget. From the root, descend to the best child s of p, or widen p where the virtual child is at least as good::

    S(s) = mean over the subtree of [q(x) + kappa (1 - rho) min(d(x) / dbar, g_max)] + rho c P(s) sqrt(ln m_p / m_s)
    E(p) = mean q of p's children + lambda rho * variance of q of p's children          P = softmax of the siblings' q

At rho = 1, children of q = .8 and .2 with m = 1 below an inner node of m = 3: P = (.65, .35), S = (.8 + .96, .2 + .52) = (1.76, .72),
E = .5 + .09: descend to the first. A childless node gets k texts. Beyond the paper: closed nodes, the rules of `small_budget`, and
requests in flight (`virtual`, at most one widening a node). Every departure is an option; `coded()` and `printed()` have none.
"""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any

import numpy as np

from specdec.search.budget import Budget
from specdec.search.chain_length import ChainLength
from specdec.search.config import SearchConfig
from specdec.search.request import Kind, Policy, Proposal
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree
from specdec.search.small_budget import STOP, WAIT, OpenNodes, SmallBudget

__all__ = ["AS_CODED", "BgMcts", "next_kind"]

# The shared options that belong to the policies as coded and as printed.
AS_CODED = SearchConfig(duplicates="keep", truncated_answers=False, forced_tokens=0, answer_rule="best")
_MANY = 32  # children from which numpy is faster than a loop
_RECENT = 32  # scores by which an evaluator is saturated
_SATURATED = 1e-3  # variance


def next_kind(tree: SearchTree, node: int) -> Kind:
    """How a text below `node` goes on."""
    if node == ROOT:
        return Kind.STEP
    if tree.status[node] == NodeStatus.ANSWERED:
        return Kind.REFINE
    return Kind.CONTINUE if tree.truncated[node] else Kind.STEP


@dataclass
class BgMcts(Policy):
    """The policy and its options.

    Attributes:
        k: texts drawn below a node that has none.
        c, kappa, lam: weights of exploration, completion bias and widening.
        g_max: most that d / dbar counts; None: no cap (printed). The cap keeps a chain that never ends from drawing the search in.
        root_visits: "omit": the root has no exploration term (coded), "count" (printed). In a batch it always counts.
        answered_bias: an answered node's own depth counts in the completion bias (printed), else 0 (coded).
        hint: before any answer dbar is at least the hint of steps; else the deepest node (coded).
        anneal_exploration, completion_bias, anneal_widening: the three places of rho, for ablation; all off is MCTS.
        widen: allow E(p) at all.
        gen_tie: "half": E(p) wins ties while rho >= 1/2; "gen": always (both).
        gen_bonus: E(p) explores too: "on", "off", or "auto": once the evaluator is saturated.
        fill: a node with fewer than k texts gets the rest when selection first comes by (after a dive).
        child_cap, root_cap: most texts below a node; None: unlimited. A node is closed once it has these and all are closed.
        refine: answered nodes stay open and are continued by a "reconsider" cue.
        own_twice: a node counts twice in its own visits and sums (MCTS as coded).
        small: rules for small budgets.

    Raises:
        ValueError: an option outside these values.
    """

    k: int = 2
    c: float = sqrt(2)
    kappa: float = 1.0
    lam: float = 1.0
    g_max: float | None = 1.5
    root_visits: str = "omit"
    answered_bias: bool = False
    hint: bool = True
    anneal_exploration: bool = True
    completion_bias: bool = True
    anneal_widening: bool = True
    widen: bool = True
    gen_tie: str = "half"
    gen_bonus: str = "auto"
    fill: bool = True
    child_cap: int | None = 3
    root_cap: int | None = None
    refine: bool = False
    own_twice: bool = False
    small: SmallBudget = field(default_factory=SmallBudget)

    name = "bg_mcts"

    def __post_init__(self) -> None:
        choices = {"root_visits": ("omit", "count"), "gen_tie": ("half", "gen"), "gen_bonus": ("on", "off", "auto")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.k < 1 or any(cap is not None and cap < self.k for cap in (self.child_cap, self.root_cap)):
            raise ValueError(f"k must be >= 1 and caps >= k or None, got k={self.k}, {self.child_cap=}, {self.root_cap=}")

    @classmethod
    def coded(cls) -> BgMcts:
        """As the authors' code has it, under the SearchConfig AS_CODED. Left out: the empty node of score 0 that the code adds when
        a budget ends amid a queue.
        """
        off = SmallBudget(first_dive=0, backtrack=0, finish=0)
        return cls(g_max=None, hint=False, gen_tie="gen", gen_bonus="off", fill=False, child_cap=None, refine=True, small=off)

    @classmethod
    def printed(cls) -> BgMcts:
        """As the paper's formulas have it."""
        policy = cls.coded()
        policy.root_visits, policy.answered_bias = "count", True
        return policy

    def start(self, tree: SearchTree, budget: Budget, length: ChainLength, seed: int) -> None:
        super().start(tree, budget, length, seed)
        self._open_nodes = OpenNodes(tree)
        self._queue = (ROOT, 0)  # node, texts still to draw below it
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._saturated = False
        self._set_depth_limit()

    def state(self) -> dict[str, Any]:
        return {"queue": list(self._queue), "recent": list(self._recent), "saturated": self._saturated}

    def restore(self, state: dict[str, Any]) -> None:
        self._queue = (state["queue"][0], state["queue"][1])
        self._recent.extend(state["recent"])
        self._saturated = state["saturated"]

    def told(self, node: int) -> None:
        self._set_depth_limit()
        if self.tree.status[node] == NodeStatus.DROPPED or self.tree.unscored[node]:
            return
        self._recent.append(self.tree.q[node])
        if self.gen_bonus == "auto" and not self._saturated and len(self._recent) == _RECENT:
            mean = sum(self._recent) / _RECENT
            self._saturated = sum((q - mean) ** 2 for q in self._recent) / _RECENT < _SATURATED
            if self._saturated:
                warnings.warn(f"the evaluator's last {_RECENT} scores are all about {mean:.3f}: widening explores", stacklevel=2)

    def propose(self) -> Proposal | None:
        node = self.small.node(self.tree, self.budget, self.length, self._open_nodes)
        if node is None:
            node = self._queued()
        elif node in (STOP, WAIT):
            return None
        else:
            self._queue = (ROOT, 0)
        if node is None:
            node = self._select()
            if node is None:
                return None
            self._queue = (node, self._quota(node) - 1)
        return Proposal(node, next_kind(self.tree, node))

    # ---- selection

    def _dbar(self) -> float:
        return self.length.depth(self.tree, self.hint)

    def _set_depth_limit(self) -> None:
        if self.g_max is not None:
            self.tree.set_depth_limit(self.g_max * self._dbar())

    def _drawn(self, node: int) -> int:
        return self.tree.draws[node] + self.tree.pending[node]

    def _queued(self) -> int | None:
        node, left = self._queue
        if left < 1 or self.tree.closed[node] or self._drawn(node) >= self.tree.cap(node):
            return None
        self._queue = (node, left - 1)
        return node

    def _quota(self, node: int) -> int:
        """Texts to draw below a selected node: the rest of k, or one."""
        drawn = self._drawn(node)
        first = drawn < self.k and (self.fill or not (self.tree.children[node] or self.tree.pending[node]))
        return int(min(self.k, self.tree.cap(node))) - drawn if first else 1

    def _owes(self, node: int) -> bool:
        """Fewer than k texts below it."""
        drawn = self._drawn(node)
        return drawn < min(self.k, self.tree.cap(node)) and (self.fill or drawn == 0)

    def _select(self) -> int | None:
        """The node below which to draw; None: every node waits for texts in flight, or the root is closed."""
        tree, rho, dbar = self.tree, self.budget.rho, self._dbar()
        blocked: set[int] = set()
        node = ROOT
        while node >= 0 and not tree.closed[ROOT]:
            if self._owes(node):
                return node
            child, score = self._best_child(node, rho, dbar, blocked)
            if self._may_widen(node) and (child is None or self._wins(self._widening_score(node, rho), score, rho)):
                return node
            if child is None:  # all below waits: up again, where nothing else has changed
                blocked.add(node)
                child = tree.parent[node]
            node = child
        return None

    def _may_widen(self, node: int) -> bool:
        """At most one text in flight below a node that has its k; none beyond the cap. A node without children may always draw."""
        tree = self.tree
        allowed = self.widen or not tree.children[node]
        return allowed and not tree.pending[node] and tree.draws[node] < tree.cap(node)

    def _wins(self, widening: float, child: float, rho: float) -> bool:
        return widening >= child if self.gen_tie == "gen" or rho >= 0.5 else widening > child

    def _log_visits(self, node: int) -> float:
        """ln m_p with what is in flight; 0 for the root where it is omitted."""
        tree = self.tree
        if node == ROOT and self.root_visits == "omit" and not tree.virtual[ROOT]:
            return 0.0
        return log(max(1, tree.visits[node] + tree.virtual[node]))

    def _best_child(self, node: int, rho: float, dbar: float, blocked: set[int]) -> tuple[int | None, float]:
        """argmax S over the open children that do not wait, and its S. Ties: the deeper, then the cheaper, then the earlier."""
        children = self.tree.live[node]
        if blocked or self.tree.virtual[node]:
            children = [child for child in children if child not in blocked and not self._waits(child)]
        if not children:
            return None, 0.0
        bias = self.kappa * (1.0 - rho) / dbar if self.completion_bias else 0.0
        explore = (rho if self.anneal_exploration else 1.0) * self.c * sqrt(self._log_visits(node)) / self.tree.child_exp[node]
        if len(children) > _MANY:
            many = self._scores(children, bias, explore)
            top = float(many.max())
            best = [children[place] for place in np.flatnonzero(many == top)]
        else:
            few = self._few_scores(children, bias, explore)
            top = max(few)
            best = [child for child, score in zip(children, few) if score == top]
        return min(best, key=self._tie), top

    def _waits(self, child: int) -> bool:
        """All texts that it may have for now are in flight."""
        return self.tree.pending[child] > 0 and not self.tree.children[child] and not self._owes(child)

    def _few_scores(self, children: list[int], bias: float, explore: float) -> list[float]:
        """S of each child."""
        tree, own, scores = self.tree, int(self.own_twice), []
        for child in children:
            visits, q = tree.visits[child] + own, tree.q[child]
            value = (tree.sum_q[child] + own * q + bias * tree.sum_depth(child)) / visits
            scores.append(value + explore * exp(q) / sqrt(visits + tree.virtual[child]))
        return scores

    def _scores(self, children: list[int], bias: float, explore: float) -> np.ndarray:
        """The same [N] for many children at once."""
        tree, own, nodes = self.tree, int(self.own_twice), np.array(children)
        visits, q = tree.gather(tree.visits, nodes) + own, tree.gather(tree.q, nodes)
        value = (tree.gather(tree.sum_q, nodes) + own * q + bias * tree.sum_depths(nodes)) / visits
        return np.asarray(value + explore * np.exp(q) / np.sqrt(visits + tree.gather(tree.virtual, nodes)))

    def _tie(self, node: int) -> tuple[int, int, int]:
        return (-self.tree.depth[node], self.tree.tokens[node], node)

    def _widening_score(self, node: int, rho: float) -> float:
        """E(p); where no child has a score, mu is the node's own."""
        tree, count = self.tree, self.tree.child_count[node]
        mean = tree.child_sum[node] / count if count else tree.q[node]
        variance = max(0.0, tree.child_squares[node] / count - mean * mean) if count else 0.0
        score = mean + self.lam * (rho if self.anneal_widening else 1.0) * variance
        if self.gen_bonus == "on" or (self.gen_bonus == "auto" and self._saturated):
            more, visits = len(tree.children[node]) + 1, tree.visits[node] + tree.virtual[node]
            score += (rho if self.anneal_exploration else 1.0) * self.c * sqrt(self._log_visits(node) / (more * max(1, visits)))
        return score
