"""Layered best-of-n: samples are cut into layers, the weak ones dropped after each, the last layer written to the end.

Qiu et al., "TreeBoN: Enhancing Inference-Time Alignment with Speculative Tree-Search and Best-of-N Sampling", arXiv 2410.16033.
With samples = 8, branch = 4 and layers = 2: eight first steps, the best two get four second steps each, the best two of those eight
get four full continuations each; the best answer, or the vote, of those. Then the next round. (The paper's layers have a fixed number
of tokens and its reward is a language model's; here a layer is a step and the reward the evaluator.)
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.search.beam import Beam
from specdec.search.request import Kind

__all__ = ["TreeBon"]


@dataclass
class TreeBon(Beam):
    """Attributes:
    layers: levels of steps before the full continuations.
    """

    layers: int = 2

    name = "tree_bon"

    @property
    def unit(self) -> Kind:  # type: ignore[override]
        """What the next text is."""
        return Kind.FULL if self._level >= self.layers else Kind.STEP

    def _kind(self, node: int) -> Kind:
        kind = super()._kind(node)
        return Kind.FULL if kind == Kind.STEP and self._level >= self.layers else kind
