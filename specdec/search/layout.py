"""Places of a tree's nodes in a drawing: leaves side by side, every inner node in the middle above its children.

Worked example::

         0             parents  [-1, 0, 0, 1, 1]
      ┌──┴──┐          levels   [ 0, 1, 1, 2, 2]
      1     2          places   [1.25, .5, 2, 0, 1]
    ┌─┴─┐
    3   4
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

__all__ = ["Layout", "tree_layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Coordinates by node."""

    levels: list[int]  # distance from the root
    places: list[float]  # sideways, in leaves


def tree_layout(parents: Seq[int]) -> Layout:
    """Places of the nodes of a tree whose parents precede their children; node 0 is the root. Linear, without recursion."""
    children: list[list[int]] = [[] for _ in parents]
    levels = [0] * len(parents)
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
        levels[node] = levels[parents[node]] + 1
    places = [0.0] * len(parents)
    stack, leaves = [0], 0
    while stack:
        node = stack.pop()
        if not children[node]:
            places[node] = leaves
            leaves += 1
        stack += reversed(children[node])
    for node in range(len(parents) - 1, -1, -1):
        if below := children[node]:
            places[node] = (places[below[0]] + places[below[-1]]) / 2
    return Layout(levels, places)
