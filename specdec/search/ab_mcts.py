"""AB-MCTS-A through its own package: at every node, Thompson sampling decides between a new text and refining an old one.

Inoue et al., "Wider or Deeper? Scaling LLM Inference-Time Compute with Adaptive Branching Tree Search", arXiv 2503.04412; package
`treequest` (PyPI). This file only translates: a trial below TreeQuest's root is a full text, one below a node refines its answer.
TreeQuest draws from numpy's global generator: it is seeded for every call, and put back as it was. Its state is rebuilt by replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.search.budget import Budget
from specdec.search.chain_length import ChainLength
from specdec.search.request import Kind, Policy, Proposal
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree

__all__ = ["AbMcts"]

_ACTION = "text"
_ROOT_TRIAL = -1  # TreeQuest's number of its own root


@dataclass
class AbMcts(Policy):
    """Attributes:
    dist_type: "gaussian" or "beta", TreeQuest's model of scores.

    Raises:
        ImportError: treequest is not installed.
    """

    dist_type: str = "gaussian"

    name = "ab_mcts"
    unit = Kind.FULL
    refine = True

    def start(self, tree: SearchTree, budget: Budget, length: ChainLength, seed: int) -> None:
        super().start(tree, budget, length, seed)
        try:
            from treequest import ABMCTSA
        except ImportError as error:
            raise ImportError('policy "ab_mcts" needs TreeQuest; fix: pip install "specdec[treequest]"') from error
        self._algorithm: Any = ABMCTSA(dist_type=self.dist_type)
        self._state: Any = self._algorithm.init_tree()
        self._log: list[list[float]] = []  # [] for an ask, [trial, node, score] for a tell
        self._trials: list[Any] = []  # in the order of asking
        self._waiting: list[tuple[int, int]] = []  # (parent, trial) in flight, in the order of asking
        self._nodes = {_ROOT_TRIAL: ROOT}  # TreeQuest's number of a node -> node

    def state(self) -> dict[str, Any]:
        return {"log": self._log, "waiting": [list(pair) for pair in self._waiting]}

    def restore(self, state: dict[str, Any]) -> None:
        for entry in state["log"]:
            if entry:
                self._tell(int(entry[0]), int(entry[1]), entry[2])
            else:
                self._ask()
        self._waiting = [(parent, trial) for parent, trial in state["waiting"]]

    def propose(self) -> Proposal | None:
        if self.tree.closed[ROOT]:
            return None
        trial = self._ask()
        parent = self._nodes[self._trials[trial].node_to_expand]
        if self.tree.closed[parent] or self.tree.draws[parent] + self.tree.pending[parent] >= self.tree.cap(parent):
            parent = ROOT  # too long, or nothing more to say: a new text in its place
        self._waiting.append((parent, trial))
        if parent == ROOT:
            return Proposal(ROOT, Kind.FULL)
        return Proposal(parent, Kind.REFINE if self.tree.status[parent] == NodeStatus.ANSWERED else Kind.CONTINUE)

    def told(self, node: int) -> None:
        parent = self.tree.parent[node]
        at = next((i for i, (waiting, _) in enumerate(self._waiting) if waiting == parent), None)
        if at is None:
            return  # asked for by another policy
        _, trial = self._waiting.pop(at)
        if self.tree.status[node] != NodeStatus.DROPPED:
            self._tell(trial, node, self.tree.q[node])

    def _ask(self) -> int:
        self._log.append([])
        self._state, trials = self._seeded(lambda: self._algorithm.ask_batch(self._state, 1, [_ACTION]))
        self._trials += trials
        return len(self._trials) - 1

    def _tell(self, trial: int, node: int, score: float) -> None:
        self._log.append([trial, node, score])
        result = (node, score)
        self._state = self._seeded(lambda: self._algorithm.tell(self._state, self._trials[trial].trial_id, result))
        self._nodes[len(self._nodes) - 1] = node  # TreeQuest numbers its nodes in the order told

    def _seeded(self, call: Callable[[], Any]) -> Any:
        """`call()` with numpy's global generator seeded by (seed, calls so far)."""
        before = np.random.get_state()
        np.random.seed((self.seed * 1_000_003 + len(self._log)) % 2**32)
        try:
            return call()
        finally:
            np.random.set_state(before)
