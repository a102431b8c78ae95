"""The selection oracle by trying every tree: what bench.limits must find in one walk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

__all__ = ["Choice", "best_choice"]


@dataclass(frozen=True)
class Choice:
    """What a tree earns."""

    tokens: int  # emitted by the step: accepted drafts + 1
    nodes: int  # of the smallest tree that earns it, root included


def _emitted(paths: Seq[tuple[int, ...]], future: Seq[int]) -> int:
    """Tokens of a greedy step with a tree that holds these paths."""
    return 1 + max((len(path) for path in paths if tuple(future[: len(path)]) == path), default=0)


def best_choice(pool: Seq[tuple[int, ...]], future: Seq[int], most: int) -> Choice:
    """The most tokens, then the fewest nodes, of all trees of at most `most` nodes out of the candidates.

    Args:
        pool: every candidate as its path from the root (the root's own path is empty and left out).
        future: tokens that the model says after the root.
    """
    best = Choice(1, 1)
    for count in range(1, min(most - 1, len(pool)) + 1):
        for chosen in itertools.combinations(pool, count):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                tokens = _emitted(chosen, future)
                if tokens > best.tokens:
                    best = Choice(tokens, count + 1)
    return best
