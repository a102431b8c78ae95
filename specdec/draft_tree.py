"""DraftTree: the candidate continuations that one forward verifies, as flat arrays.

Node 0 is the root: the last committed token, whose K/V is not in the cache yet. Parents precede children, siblings carry
distinct tokens (unless they were drawn i.i.d. and keep their multiplicity). Worked example, root "the" with two children and
one grandchild::

    node      0      1      2      3
    token     the    cat    dog    sat
    parent   -1      0      0      1
    depth     0      1      1      2        position of node i = prefix length + depth[i]
    sees      0      0,1    0,2    0,1,3    (and the whole prefix)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from specdec._jit import njit

if TYPE_CHECKING:
    import networkx

__all__ = ["NO_PARENT", "ROOT", "DraftTree", "Kind", "Source", "TopK", "Verdict"]

ROOT = 0
NO_PARENT = -1


class Kind(IntEnum):
    """How a node was drawn from its parent; the acceptance rule checks it."""

    DETERMINISTIC = 0
    WITHOUT_REPLACEMENT = 1
    IID = 2
    SHARED_NOISE = 3  # chosen with the noise by which `match` draws the target's token; for `match` alone


class Source(IntEnum):
    """Which draft source proposed a node (statistics, tie-breaks)."""

    ROOT = 0
    CONTEXT = 1
    TABLE = 2
    BOTH = 3
    MODEL = 4


@njit
def _fill_depths(parents: np.ndarray, depths: np.ndarray) -> bool:
    """Depths [N] of nodes whose parents precede them; False where one does not."""
    depths[0] = 0
    for node in range(1, len(parents)):
        if not 0 <= parents[node] < node:
            return False
        depths[node] = depths[parents[node]] + 1
    return True


@njit
def _ancestors(parents: np.ndarray, mask: np.ndarray) -> None:
    """mask [N, N] bool: mask[i, j] = node j is an ancestor of node i, or i itself."""
    for node in range(len(parents)):
        if node > 0:
            parent = parents[node]
            for other in range(parent + 1):
                mask[node, other] = mask[parent, other]
        mask[node, node] = True


@njit
def _child(tokens: np.ndarray, parents: np.ndarray, node: int, token: int) -> int:
    for child in range(node + 1, len(tokens)):
        if parents[child] == node and tokens[child] == token:
            return child
    return -1


@dataclass(slots=True, eq=False)
class DraftTree:
    """A draft tree of N nodes, root included. Treat it as immutable.

    Every optional array is None where all nodes have the default: that keeps the common, deterministic tree cheap.

    Raises:
        ValueError: empty tree, lengths that differ, a parent that does not precede its child, a second root.
    """

    tokens: np.ndarray  # [N] int64
    parents: np.ndarray  # [N] int32; parents[0] = -1, parents[i] < i
    source: np.ndarray | None = None  # [N] uint8, Source; None: all ROOT
    kind: np.ndarray | None = None  # [N] uint8, Kind; None: all DETERMINISTIC
    draw_index: np.ndarray | None = None  # [N] int32, order of the draw among siblings; None: all 0
    multiplicity: np.ndarray | None = None  # [N] int32, i.i.d. paths through the node; None: all 1
    virtual: np.ndarray | None = None  # [N] bool, kept for losslessness, not forwarded; None: none
    probs: np.ndarray | None = None  # [N, V] float32, q at node i from which its sampled children were drawn
    evidence: object = None  # the builder's own record of why each node is here, handed back to it in update()
    depths: np.ndarray = field(init=False)  # [N] int32

    def __post_init__(self) -> None:
        self.tokens = np.ascontiguousarray(self.tokens, np.int64)
        self.parents = np.ascontiguousarray(self.parents, np.int32)
        count = len(self.tokens)
        if count == 0 or len(self.parents) != count:
            raise ValueError(
                f"a draft tree needs as many parents as tokens and at least a root, got {count} tokens and {len(self.parents)} parents"
            )
        self.depths = np.empty(count, np.int32)
        if self.parents[0] != NO_PARENT or not _fill_depths(self.parents, self.depths):
            raise ValueError(f"parents must be [-1, p1, ...] with 0 <= p_i < i, got {self.parents.tolist()}")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def root_only(cls, token: int) -> DraftTree:
        """The tree of one node: plain autoregressive decoding."""
        return cls(np.array([token], np.int64), np.array([NO_PARENT], np.int32))

    @classmethod
    def chain(cls, tokens: Sequence[int] | np.ndarray, source: int = Source.CONTEXT) -> DraftTree:
        """A single path; tokens[0] is the root."""
        count = len(tokens)
        sources = np.full(count, source, np.uint8)
        sources[0] = Source.ROOT
        return cls(np.asarray(tokens, np.int64), np.arange(-1, count - 1, dtype=np.int32), source=sources)

    @classmethod
    def from_paths(cls, root: int, paths: Iterable[Sequence[int]], source: int = Source.CONTEXT) -> DraftTree:
        """Trie of the paths (each without the root), nodes in order of first appearance."""
        tokens, parents = [root], [NO_PARENT]
        index: dict[tuple[int, int], int] = {}
        for path in paths:
            node = ROOT
            for token in path:
                child = index.get((node, token))
                if child is None:
                    child = len(tokens)
                    tokens.append(int(token))
                    parents.append(node)
                    index[node, token] = child
                node = child
        sources = np.full(len(tokens), source, np.uint8)
        sources[0] = Source.ROOT
        return cls(np.array(tokens, np.int64), np.array(parents, np.int32), source=sources)

    def child(self, node: int, token: int) -> int:
        """The child of `node` that carries `token`, or -1."""
        return int(_child(self.tokens, self.parents, node, token))

    def children(self, node: int) -> np.ndarray:
        """Children of `node` in node order, [C]."""
        return np.flatnonzero(self.parents == node)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = []
        while node != NO_PARENT:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def ancestor_mask(self) -> np.ndarray:
        """[N, N] bool: row i marks the ancestors of node i and i itself."""
        mask = np.zeros((len(self), len(self)), np.bool_)
        _ancestors(self.parents, mask)
        return mask

    def prefix(self, count: int) -> DraftTree:
        """The first `count` nodes: a tree again, since parents precede children."""
        if count >= len(self):
            return self

        def cut(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[:count]

        return DraftTree(
            self.tokens[:count],
            self.parents[:count],
            cut(self.source),
            cut(self.kind),
            cut(self.draw_index),
            cut(self.multiplicity),
            cut(self.virtual),
            cut(self.probs),
            self.evidence,
        )

    def to_networkx(self) -> networkx.DiGraph:
        """Directed graph with token, depth and source on each node."""
        import networkx

        graph = networkx.DiGraph()
        for node in range(len(self)):
            source = Source.ROOT if self.source is None else Source(int(self.source[node]))
            graph.add_node(node, token=int(self.tokens[node]), depth=int(self.depths[node]), source=source.name.lower())
            if node != ROOT:
                graph.add_edge(int(self.parents[node]), node)
        return graph


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification kept: the accepted path and the target's own token after it."""

    nodes: np.ndarray  # [A] int32, accepted path, nodes[0] = 0
    next_token: int  # bonus or recovered token: the root of the next tree


@dataclass(frozen=True, slots=True)
class TopK:
    """The most probable next tokens after each of M positions or nodes, best first."""

    tokens: np.ndarray  # [M, k] int32
    probs: np.ndarray  # [M, k] float32: softmax over the k kept logits (not the full vocabulary)
    argmax: np.ndarray | None = None  # [M] int32: the very token that argmax gives, -1 where it must be asked; None: everywhere

    def __getitem__(self, rows: slice | int) -> TopK:
        """Some of the M."""
        return TopK(self.tokens[rows], self.probs[rows], None if self.argmax is None else self.argmax[rows])
