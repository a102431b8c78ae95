"""How long a chain of reasoning is: tokens a step, steps a chain, and so what it costs to finish one.

Before anything is known, hints stand in; then running means. With steps of 50 tokens, answers at depths 6 and 8 (mean 7), a leaf at
depth 5 costs 50 * (7 - 5) = 100 tokens to finish, and a chain 350.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.search.search_tree import SearchTree

__all__ = ["ChainLength"]


@dataclass(frozen=True, slots=True)
class ChainLength:
    """Estimates from the tree.

    Attributes:
        steps: hint, steps of a chain, used until something is answered.
        step_tokens: hint, tokens of a step, used until one is told.
    """

    steps: float = 6.0
    step_tokens: float = 64.0

    def depth(self, tree: SearchTree, hint: bool = True) -> float:
        """Mean chain depth of answered nodes; before any, max(hint, deepest + 1), or the deepest without hint. Never below 1."""
        if tree.answered_count:
            return max(1.0, tree.answered_depths / tree.answered_count)
        return float(max(self.steps, tree.deepest + 1) if hint else max(1, tree.deepest))

    def step(self, tree: SearchTree) -> float:
        """Mean tokens of a step."""
        return tree.step_tokens / tree.step_count if tree.step_count and tree.step_tokens else self.step_tokens

    def chain(self, tree: SearchTree) -> float:
        """Tokens of a whole chain."""
        if tree.full_count and not tree.step_count:
            return tree.full_tokens / tree.full_count
        return self.step(tree) * self.depth(tree)

    def to_finish(self, tree: SearchTree, node: int) -> float:
        """Tokens from `node` to the end of its chain, one step at the least."""
        return self.step(tree) * max(1.0, self.depth(tree) - tree.depth[node])
