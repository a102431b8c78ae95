"""DepthHeaps: the best node of a growing tree at a depth that fits, without looking at every node.

A heap a depth, since what fits a budget is decided by the depth alone. Of a settled request only the nodes of its path change, so
these alone are put in again; an entry that is out of date is dropped when it comes to the top. What is in flight is looked for at
every call, so nobody has to report anything; `keep_up` at every cycle spares a later call the work of all that came since. With keys
-.9 (node 4) and -.2 (node 7) at depth 2, -.5 (node 3) at depth 1::

    best(any depth) -> 4;  best(depth 1 alone) -> 3;  node 4 gets its last child: best(any depth) -> 3
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from specdec.search.search_tree import NodeStatus, SearchTree

__all__ = ["DepthHeaps"]

Key = tuple[float, ...]


class DepthHeaps:
    """Args:
    tree: read only.
    key: of a node, the least is the best; equal first entries: the deeper, then by the rest of the key, then the earlier.
    member: whether a node may be chosen now. It and the key may change for the nodes of a path alone, as a request below it is
        asked for or settled; a node that is closed for good may drop out at any time.
    whole_path: False: of the path, for the text and its parent alone.
    """

    def __init__(
        self, tree: SearchTree, key: Callable[[int], Key], member: Callable[[int], bool], whole_path: bool = True
    ) -> None:
        self._tree, self._key, self._member, self._whole_path = tree, key, member, whole_path
        self._heaps: dict[int, list[tuple[Key, int]]] = {}
        self._keys: dict[int, Key] = {}  # of the nodes that are in a heap
        self._known = 0  # nodes looked at
        self._waiting: list[int] = []  # of these, the ones in flight

    def best(self, fits: Callable[[int], bool] = lambda depth: True) -> int | None:
        """The best member at a depth that fits."""
        self._refresh()
        found: tuple[Any, ...] | None = None
        for depth, heap in self._heaps.items():
            if fits(depth) and self._cleaned(heap):
                (first, *rest), node = heap[0]
                candidate = (first, -depth, *rest, node)
                found = candidate if found is None or candidate < found else found
        return None if found is None else int(found[-1])

    def deepest(self) -> list[int]:
        """All members of the greatest depth that has any."""
        self._refresh()
        for depth in sorted(self._heaps, reverse=True):
            if nodes := sorted({node for _, node in self._heaps[depth] if self._member(node)}):
                return nodes
        return []

    def keep_up(self) -> None:
        """Do now what the next `best` would have to do first."""
        for depth in {self._tree.depth[node] for node in self._refresh()}:
            self._cleaned(self._heaps.get(depth, []))

    def _refresh(self) -> set[int]:
        """Take in what was told since the last call; the nodes that this has changed."""
        tree, changed = self._tree, set[int]()
        looked, self._waiting = [*self._waiting, *range(self._known, len(tree))], []
        self._known = len(tree)
        for node in looked:
            if tree.status[node] == NodeStatus.PENDING:
                self._waiting.append(node)
                continue
            above = tree.parent[node]
            changed.add(node)
            while above >= 0 and above not in changed:
                changed.add(above)
                above = tree.parent[above] if self._whole_path else -1
        for node in changed:
            if self._member(node) and self._keys.get(node) != (key := self._key(node)):
                self._keys[node] = key
                heappush(self._heaps.setdefault(tree.depth[node], []), (key, node))
        return changed

    def _cleaned(self, heap: list[tuple[Key, int]]) -> bool:
        """Drop what is out of date from the top; False: nothing is left."""
        while heap:
            key, node = heap[0]
            if self._keys.get(node) == key and self._member(node):
                return True
            heappop(heap)
            if self._keys.get(node) == key:  # in flight, or full: put in again when that is settled
                del self._keys[node]
        return False
