"""SearchTree: every text that a search generated, as columns, with subtree statistics that cost O(1) to read.

Node 0 is the prompt. A node is reserved when it is asked for (PENDING) and settled when it is told; ids never change and parents
precede children. Worked example, q in brackets, depth = steps since the prompt or the last answer above::

    0 prompt ── 1 [.8] ── 3 [.9]           visits  m = (4, 2, 1, 1): nodes of the subtree, itself included
             └─ 2 [.2]                     sum_q     = (1.9, 1.7, .2, .9)
                                           sum_depth = (4, 3, 1, 2)

`sum_depth` counts depths up to a limit that moves with every answer. It is kept in whole numbers: depths up to the whole part of the
limit, and how many nodes are deeper, so that the fraction may move for nothing, and the whole part for the cost of the deeper nodes.

Requests in flight count in `pending` of their parent and in `virtual` of the whole path above: selection adds `virtual` to the
visits and leaves every mean as it is, which is adding the mean once more for each. Nothing in here recurses.
"""

from __future__ import annotations

import re
from array import array
from bisect import insort
from enum import StrEnum
from math import exp, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.search.request import Completion, Finish, Kind

if TYPE_CHECKING:
    import networkx

__all__ = ["ROOT", "Closed", "NodeStatus", "SearchTree", "add_piece"]

ROOT = 0
MAX_EMPTIES = 2
_INFINITY = float("inf")


class NodeStatus(StrEnum):
    """What a node is."""

    PENDING = "pending"  # asked for, not told
    OPEN = "open"  # a step that ended where steps end, or was cut (`truncated`)
    ANSWERED = "answered"  # its path holds an answer
    ENDED = "ended"  # the model ended the text without an answer
    DROPPED = "dropped"  # not part of the tree: empty, equal to a sibling, or the model failed


class Closed(StrEnum):
    """Why a node may not be extended any more; NOT is falsy."""

    NOT = ""
    ANSWERED = "answered"
    ENDED = "ended"
    EXHAUSTED = "exhausted"  # as many children as are allowed, all closed
    EMPTY = "empty"  # the model had nothing to say after it, twice running, and all below is closed
    TOO_LONG = "too_long"  # another step might not fit into the context window
    DROPPED = "dropped"


# Columns that are saved, with the value of a new node. The rest follows from them.
_COLUMNS: dict[str, Any] = {
    "parent": -1,
    "kind": Kind.STEP,
    "status": NodeStatus.PENDING,
    "closed": Closed.NOT,
    "full": False,  # generated up to the end of the text, not up to a step's end
    "truncated": False,  # cut by max_tokens
    "unscored": False,  # the evaluator failed: q is the parent's
    "q": 0.5,  # evaluator's score
    "depth": 0,  # chain depth
    "token_ids": (),
    "text": "",
    "answer": None,
    "tokens": 0,  # charged for it
    "evaluator_tokens": 0,
    "draws": 0,  # texts told below it, the dropped ones too
    "empties": 0,  # of these, the empty ones since the last that said something
    "visits": 0,  # nodes of the subtree; equal siblings count each time
    "sum_q": 0.0,
    "child_count": 0,  # scored children; equal ones count each time
    "child_sum": 0.0,  # of their q
    "child_squares": 0.0,  # of their q^2
    "child_exp": 0.0,  # of exp(q) over distinct children
    "copies": 0,  # how often the node itself counts in these sums: 1, more with equal siblings
}
# Columns that selection reads for many nodes at once: typed arrays, which numpy reads in place (`gather`).
_TYPED = {"q": "d", "visits": "q", "sum_q": "d"}
_SHOWN = ("kind", "status", "closed", "truncated", "unscored", "q", "depth", "text", "tokens", "evaluator_tokens", "visits")
_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
_COUNTERS = (
    "answered_count",
    "answered_depths",
    "deepest",
    "closed_count",
    "step_count",
    "step_tokens",
    "full_count",
    "full_tokens",
)


class SearchTree:
    """The tree of one search. Only `Search` changes it.

    Args:
        child_cap: most children of a node other than the root before it may be EXHAUSTED; None: never.
        root_cap: the same for the root.
        answered_bias: an answered node's own depth counts in sum_depth (as printed); else 0 (as coded).
        refine: answered nodes stay open.
    """

    parent: list[int]
    kind: list[str]
    status: list[str]
    closed: list[str]
    full: list[bool]
    truncated: list[bool]
    unscored: list[bool]
    q: array[float]
    depth: list[int]
    token_ids: list[tuple[int, ...]]
    text: list[str]
    answer: list[str | None]
    tokens: list[int]
    evaluator_tokens: list[int]
    draws: list[int]
    empties: list[int]
    visits: array[int]
    sum_q: array[float]
    child_count: list[int]
    child_sum: list[float]
    child_squares: list[float]
    child_exp: list[float]
    copies: list[int]

    def __init__(
        self, child_cap: int | None = None, root_cap: int | None = None, answered_bias: bool = False, refine: bool = False
    ) -> None:
        self.child_cap, self.root_cap = child_cap, root_cap
        self.answered_bias, self.refine = answered_bias, refine
        for name in _COLUMNS:
            setattr(self, name, array(_TYPED[name]) if name in _TYPED else [])
        self.children: list[list[int]] = []  # told and in the tree
        self.live: list[list[int]] = []  # of these, the open ones
        self.pending: list[int] = []  # in flight below the node
        self.virtual = array("q")  # in flight in its subtree
        self._whole_depths = array("q")  # sum of min(bias depth, whole part of depth_limit) over the subtree
        self._deeper = array("q")  # nodes of the subtree whose bias depth is greater than that
        self._at_depth: list[list[int]] = []  # chain depth -> nodes whose depth counts
        self.path_tokens: list[int] = []  # token ids from the prompt (excluded) to the node, cues excluded
        self.path_cues: list[int] = []  # cues that were inserted on this path
        self.answered: list[int] = []  # nodes that hold an answer
        self.answered_count = self.answered_depths = 0  # of these, without the forced ones; sum of their chain depths
        self.step_count = self.step_tokens = self.full_count = self.full_tokens = 0  # told texts by unit, and their tokens
        self.score_count, self.least, self.greatest = 0, 1.0, 0.0  # the evaluator's scores and their range
        self.deepest = 0
        self.best_leaf = (
            ROOT  # the deepest text without an answer, the better-scored of equals, then the earlier; 0: there is none
        )
        self.closed_count = 0  # nodes closed
        self._set_limit(_INFINITY)
        self._twins: dict[tuple[int, tuple[int, ...]], int] = {}
        self._append(-1, Kind.STEP)
        self.status[ROOT] = NodeStatus.OPEN
        self.visits[ROOT] = 1

    def __len__(self) -> int:
        return len(self.parent)

    # ---- reading

    def path(self, node: int) -> list[int]:
        """Nodes from the root (excluded) to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parent[node]
        return nodes[::-1]

    def path_token_ids(self, node: int) -> list[int]:
        """The nodes' own tokens from the root to `node`; prompt and inserted cues excluded."""
        return [token for each in self.path(node) for token in self.token_ids[each]]

    def steps(self, node: int) -> list[str]:
        """The texts from the root to `node`; the pieces of a step that was cut and continued are one."""
        steps: list[str] = []
        for each in self.path(node):
            add_piece(steps, Kind(self.kind[each]), self.text[each])
        return steps

    def step_ends(self, node: int) -> list[int]:
        """The nodes with which these steps end."""
        path = self.path(node)
        return [each for each, after in zip(path, [*path[1:], ROOT]) if self.kind[after] != Kind.CONTINUE]

    def cap(self, node: int) -> float:
        """Most texts that may be drawn below `node`; none once the model had nothing to say after it MAX_EMPTIES times running."""
        if self.empties[node] >= MAX_EMPTIES:
            return 0
        cap = self.root_cap if node == ROOT else self.child_cap
        return _INFINITY if cap is None else cap

    def twin(self, parent: int, token_ids: tuple[int, ...]) -> int | None:
        """The child of `parent` with exactly these tokens."""
        return self._twins.get((parent, token_ids))

    def open_leaves(self) -> list[int]:
        """Nodes that may be extended and have nothing below them, not even in flight."""
        return [
            node
            for node in range(1, len(self))
            if self.status[node] == NodeStatus.OPEN and not (self.closed[node] or self.children[node] or self.pending[node])
        ]

    def sum_depth(self, node: int) -> float:
        """Sum of min(bias depth, depth_limit) over the subtree."""
        return self._whole_depths[node] + self._fraction * self._deeper[node]

    def sum_depths(self, nodes: np.ndarray) -> np.ndarray:
        """The same [N] of many."""
        return self.gather(self._whole_depths, nodes) + self._fraction * self.gather(self._deeper, nodes)

    def gather(self, column: array[Any], nodes: np.ndarray) -> np.ndarray:
        """column[nodes] [N] of a typed column, without copying the rest."""
        return np.frombuffer(column, column.typecode)[nodes]

    # ---- growing

    def reserve(self, parent: int, kind: Kind) -> int:
        """A PENDING node below `parent`."""
        node = self._append(parent, kind)
        self.pending[parent] += 1
        self._count_virtual(parent, 1)
        return node

    def charge(self, node: int, charged: int, completion: Completion) -> None:
        """Add to what the node has cost; a failed attempt counts too."""
        self.tokens[node] += charged
        self.evaluator_tokens[node] += completion.evaluator_tokens

    def drop(self, node: int, charged: int, completion: Completion, empty: bool = False) -> None:
        """Settle a pending node that does not become part of the tree."""
        parent = self._settle(node, charged, completion)
        self.status[node], self.closed[node] = NodeStatus.DROPPED, Closed.DROPPED
        self.empties[parent] += empty
        self.close_if_exhausted(parent)

    def merge(self, node: int, twin: int, charged: int, completion: Completion, count: bool) -> None:
        """Settle a pending node whose tokens are those of its sibling `twin`; `count`: the twin counts once more everywhere."""
        self.drop(node, charged, completion)
        if count:
            self._count(twin)

    def settle(self, node: int, charged: int, completion: Completion, status: NodeStatus, score: float | None) -> None:
        """Make a pending node part of the tree; `score` None: unscored."""
        parent = self._settle(node, charged, completion)
        self.status[node] = status
        self.token_ids[node], self.text[node] = tuple(completion.token_ids), completion.text
        self.empties[parent] = 0
        self.truncated[node] = completion.finish == Finish.LENGTH
        self.unscored[node] = score is None
        self.q[node] = self.q[parent] if score is None else score
        self._count_score(node)
        kind = self.kind[node]
        self.full[node] = kind == Kind.FULL or (self.full[parent] and kind in (Kind.REFINE, Kind.CONTINUE))
        above = 0 if self.status[parent] == NodeStatus.ANSWERED else self.depth[parent]
        self.depth[node] = above + (kind not in (Kind.CONTINUE, Kind.FORCED))
        self.deepest = max(self.deepest, self.depth[node])
        self._rank_leaf(node)
        if status == NodeStatus.ANSWERED:
            self._count_answer(node, completion.answer)
        if kind == Kind.FORCED:  # a way out of the search, not a part of it
            self.closed[node] = Closed.ENDED
            return
        self._link(node)
        self.child_exp[parent] += exp(self.q[node])
        self._list_by_depth(node)
        self._count(node)
        self._count_tokens(node)
        if status == NodeStatus.ENDED:
            self.close(node, Closed.ENDED)
        elif status == NodeStatus.ANSWERED and not self.refine:
            self.close(node, Closed.ANSWERED)

    def close(self, node: int, reason: Closed) -> None:
        """Close a node, and every node above that this exhausts."""
        while not self.closed[node]:
            self.closed[node] = reason
            self.closed_count += 1
            if node == ROOT:
                return
            parent = self.parent[node]
            self.live[parent].remove(node)
            if not self._exhausted(parent):
                return
            node, reason = parent, self._why(parent)

    def _reopen(self, node: int) -> None:
        self.closed[node] = Closed.NOT
        self.closed_count -= 1
        if node != ROOT:
            insort(self.live[self.parent[node]], node)

    def close_if_exhausted(self, node: int) -> None:
        """Close `node` if it has all the children it may have and all are closed."""
        if self._exhausted(node):
            self.close(node, self._why(node))

    def set_rules(self, child_cap: int | None, root_cap: int | None, refine: bool) -> None:
        """Go on by other rules (see the class): nodes that were exhausted by the old ones may open, others close."""
        self.child_cap, self.root_cap, self.refine = child_cap, root_cap, refine
        for node in range(len(self) - 1, -1, -1):  # children before their parents
            if self.closed[node] == Closed.EXHAUSTED and not self._exhausted(node):
                self._reopen(node)
            elif self.status[node] == NodeStatus.ANSWERED and not refine:
                self.close(node, Closed.ANSWERED)
            else:
                self.close_if_exhausted(node)

    def set_depth_limit(self, limit: float) -> None:
        """Bias depths count up to `limit`: O(1) unless its whole part moves across nodes, whose paths it costs then."""
        old = self._whole
        self._set_limit(limit)
        least = min(old, self._whole)
        if old == self._whole or self.deepest <= least:
            return
        moved = [node for nodes in self._at_depth[int(least) + 1 :] for node in nodes]
        depth, copies, whole = self.depth, self.copies, self._whole
        self._spread(self._whole_depths, {x: copies[x] * int(min(depth[x], whole) - min(depth[x], old)) for x in moved})
        self._spread(self._deeper, {x: copies[x] * ((depth[x] > whole) - (depth[x] > old)) for x in moved})

    def _set_limit(self, limit: float) -> None:
        self.depth_limit = limit
        self._whole = limit if limit == _INFINITY else floor(limit)
        self._fraction = 0.0 if limit == _INFINITY else limit - self._whole

    def _spread(self, column: array[int], own: dict[int, int]) -> None:
        """Add what each of these nodes has of its own to the sums of itself and of all above."""
        above = set[int]()
        for node in own:
            while node >= 0 and node not in above:
                above.add(node)
                node = self.parent[node]
        change = {**dict.fromkeys(above, 0), **own}
        for node in sorted(above, reverse=True):  # children before their parents
            column[node] += change[node]
            if node != ROOT:
                change[self.parent[node]] += change[node]

    def _append(self, parent: int, kind: Kind) -> int:
        for name, default in _COLUMNS.items():
            getattr(self, name).append(default)
        node = len(self.parent) - 1
        self.parent[node], self.kind[node] = parent, kind
        self.children.append([])
        self.live.append([])
        self.pending.append(0)
        self.virtual.append(0)
        self._whole_depths.append(0)
        self._deeper.append(0)
        self.path_tokens.append(0)
        self.path_cues.append(0)
        return node

    def _settle(self, node: int, charged: int, completion: Completion) -> int:
        parent = self.parent[node]
        self.pending[parent] -= 1
        self.draws[parent] += self.kind[node] != Kind.FORCED
        self._count_virtual(parent, -1)
        self.charge(node, charged, completion)
        return parent

    def _link(self, node: int) -> None:
        parent = self.parent[node]
        self.children[parent].append(node)
        if not self.closed[node]:
            self.live[parent].append(node)
        self.path_tokens[node] = self.path_tokens[parent] + len(self.token_ids[node])
        self.path_cues[node] = self.path_cues[parent] + (self.kind[node] == Kind.REFINE)
        self._twins.setdefault((parent, self.token_ids[node]), node)

    def _count_score(self, node: int) -> None:
        if not self.unscored[node]:
            self.score_count += 1
            self.least, self.greatest = min(self.least, self.q[node]), max(self.greatest, self.q[node])

    def _rank_leaf(self, node: int) -> None:
        if self.status[node] in (NodeStatus.OPEN, NodeStatus.ENDED) and self.kind[node] != Kind.FORCED:
            ranks = [(self.depth[each], self.q[each], -each) for each in (node, self.best_leaf)]
            if self.best_leaf == ROOT or ranks[0] > ranks[1]:
                self.best_leaf = node

    def _count_answer(self, node: int, answer: str | None) -> None:
        self.answer[node] = answer
        self.answered.append(node)
        if self.kind[node] != Kind.FORCED:
            self.answered_count += 1
            self.answered_depths += self.depth[node]

    def _count(self, node: int) -> None:
        """Add the node, once (more), to the sums of its parent and of all above."""
        parent, q = self.parent[node], self.q[node]
        self.copies[node] += 1
        if not self.unscored[node]:
            self.child_count[parent] += 1
            self.child_sum[parent] += q
            self.child_squares[parent] += q * q
        depth = self.depth[node] if self._has_bias(node) else 0
        limited, deeper = int(min(depth, self._whole)), int(depth > self._whole)
        while node >= 0:
            self.visits[node] += 1
            self.sum_q[node] += q
            self._whole_depths[node] += limited
            self._deeper[node] += deeper
            node = self.parent[node]

    def _count_tokens(self, node: int) -> None:
        if self.full[node]:
            self.full_count += self.kind[node] != Kind.CONTINUE
            self.full_tokens += self.tokens[node]
        else:
            self.step_count += self.kind[node] != Kind.CONTINUE
            self.step_tokens += self.tokens[node]

    def _has_bias(self, node: int) -> bool:
        """Its depth counts in `sum_depth`."""
        return self.answered_bias or self.status[node] != NodeStatus.ANSWERED

    def _list_by_depth(self, node: int) -> None:
        if self._has_bias(node):
            depth = self.depth[node]
            self._at_depth.extend([] for _ in range(depth + 1 - len(self._at_depth)))
            self._at_depth[depth].append(node)

    def _count_virtual(self, node: int, change: int) -> None:
        while node >= 0:
            self.virtual[node] += change
            node = self.parent[node]

    def _why(self, node: int) -> Closed:
        return Closed.EMPTY if self.empties[node] >= MAX_EMPTIES else Closed.EXHAUSTED

    def _exhausted(self, node: int) -> bool:
        return not self.live[node] and not self.pending[node] and self.draws[node] >= self.cap(node)

    # ---- saving

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives the same tree, bit for bit."""
        rules = {name: getattr(self, name) for name in ("child_cap", "root_cap", "answered_bias", "refine")}
        limit = None if self.depth_limit == _INFINITY else self.depth_limit
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {"rules": rules, "depth_limit": limit, **counters, "nodes": {name: list(getattr(self, name)) for name in _COLUMNS}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SearchTree:
        """Undo `to_dict`."""
        tree = cls(**data["rules"])
        for name in _COUNTERS:
            setattr(tree, name, data[name])
        for name in _COLUMNS:
            column = data["nodes"][name]
            setattr(tree, name, array(_TYPED[name], column) if name in _TYPED else list(column))
        tree.token_ids = [tuple(ids) for ids in tree.token_ids]
        count = len(tree)
        tree.children, tree.live = [[] for _ in range(count)], [[] for _ in range(count)]
        tree.pending, tree.virtual = [0] * count, array("q", [0]) * count
        tree._whole_depths, tree._deeper = array("q", [0]) * count, array("q", [0]) * count
        tree.path_tokens, tree.path_cues = [0] * count, [0] * count
        for node in range(1, count):
            if tree.status[node] == NodeStatus.PENDING:
                tree.pending[tree.parent[node]] += 1
                tree._count_virtual(tree.parent[node], 1)
            elif tree.status[node] != NodeStatus.DROPPED:
                tree._count_score(node)
                tree._rank_leaf(node)
                if tree.kind[node] != Kind.FORCED:
                    tree._link(node)
                    tree._list_by_depth(node)
        tree.answered = [node for node in range(1, count) if tree.status[node] == NodeStatus.ANSWERED]
        tree._spread(tree._whole_depths, {node: tree.copies[node] * tree.depth[node] for each in tree._at_depth for node in each})
        tree.set_depth_limit(_INFINITY if data["depth_limit"] is None else data["depth_limit"])
        return tree

    def to_networkx(self) -> networkx.DiGraph:
        """Nodes of the tree (none PENDING or DROPPED) with their fields as attributes, edges from parents to children.

        Raises:
            ImportError: networkx is not installed.
        """
        import networkx

        graph = networkx.DiGraph()
        for node in range(len(self)):
            if self.status[node] in (NodeStatus.PENDING, NodeStatus.DROPPED):
                continue
            fields = {name: _scalar(getattr(self, name)[node]) for name in _SHOWN}
            graph.add_node(node, **fields, answer=self.answer[node] or "", token_ids=" ".join(map(str, self.token_ids[node])))
            if node != ROOT:
                graph.add_edge(self.parent[node], node)
        return graph

    def write_graphml(self, path: str | Path) -> None:
        """`to_networkx` as GraphML (yEd, Gephi, Cytoscape). Control characters, which XML has no way to write, become U+FFFD."""
        import networkx

        graph = self.to_networkx()
        for fields in graph.nodes.values():
            for name in ("text", "answer"):
                fields[name] = _NOT_XML.sub("\ufffd", fields[name])
        networkx.write_graphml(graph, str(path))


def add_piece(steps: list[str], kind: Kind, text: str) -> None:
    """Add the text of such a request to the steps of its parent."""
    if kind == Kind.CONTINUE:
        steps[-1] += text
    else:
        steps.append(text)


def _scalar(value: Any) -> Any:
    """An enumeration's member as plain text, which GraphML can write."""
    return value.value if isinstance(value, StrEnum) else value
