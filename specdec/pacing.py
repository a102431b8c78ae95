"""Pacer: how many nodes a step may spend, from measured forward times, so that speculation is never slower than none.

A builder that knows its nodes' probabilities (`sizes_itself`) chooses its size with the cost model alone. For the others the
expected tokens of an m-node tree are modelled as E(m) = 1 + g * log2(m), g estimated online from what the steps emit, and the
pacer picks the m that maximises E(m) / t(m). Worked example: t = 30 ms at 1 node, 36 at 8, 60 at 32; g = 0.5 gives 1/30, 2.5/36
and 3.5/60 tokens a ms: 8 nodes. At g = 0.05 one node wins: the engine decodes plainly and tries again every PROBE steps.
"""

from __future__ import annotations

import contextlib
import math
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specdec import linear
from specdec._cache import measurement_file
from specdec.cost_model import CONTEXTS, NODES, CostModel
from specdec.draft_tree import NO_PARENT, DraftTree

if TYPE_CHECKING:
    from specdec.engine import StepStats
    from specdec.target import TargetModel

__all__ = ["MAX_NODES", "Pacer", "two_chains"]

MAX_NODES = 64
HOST_PHASES = ("draft", "accept", "commit", "learn")
TRY_NODES = 4  # of such a try
PROBE = 32  # plain steps between two tries, where speculation does not pay
DECAY = 0.9
SWITCH = 1.03  # hysteresis: another size must be this much better


class Pacer:
    """Chooses the node budget of every step.

    Args:
        target: whose forwards are timed.
        budget: nodes a tree, or "auto".
    """

    def __init__(self, target: TargetModel, budget: int | str) -> None:
        self.fixed = None if budget == "auto" else int(budget)
        self.cost_model: CostModel | None = None if self.fixed is not None else measured_costs(target)
        self.reset()

    def reset(self) -> None:
        """Forget the acceptance seen so far; the measured times stay."""
        self._gain = 0.5
        self._size = 8
        self._plain = 0  # plain steps since speculation last paid or was tried

    def budget(self, rows: int, context: int, sizes_itself: bool) -> int:
        """Most nodes of each tree of the next step (root included)."""
        if self.fixed is not None:
            return self.fixed
        if sizes_itself:
            return MAX_NODES
        best = self._best_size(rows, context)
        if best > 1:
            self._plain = 0
            return best
        self._plain += 1
        return TRY_NODES if self._plain % PROBE == 0 else 1

    def _best_size(self, rows: int, context: int) -> int:
        assert self.cost_model is not None
        sizes, seconds = self.cost_model.curve(context, rows)
        rates = (1 + self._gain * np.log2(sizes)) / seconds
        best = int(np.argmax(rates))
        now = int(np.searchsorted(sizes, self._size))
        if now >= len(sizes) or rates[best] > SWITCH * rates[now]:
            self._size = int(sizes[best])
        return self._size

    def observe(self, stats: StepStats, context: int) -> None:
        """Learn from a step: what it cost and what it emitted."""
        if self.cost_model is None or not stats.rows:
            return
        self.cost_model.observe(stats.nodes, context, stats.rows, stats.times["forward"])
        if stats.nodes > 1:
            if not stats.by_model:
                self.cost_model.observe_host(sum(stats.times[phase] for phase in HOST_PHASES))
            gain = (stats.emitted / stats.rows - 1) / math.log2(stats.nodes)
            self._gain += (1 - DECAY) * (gain - self._gain)

    def info(self) -> dict[str, Any]:
        """Measured milliseconds of a forward over 1, 8, 16, 32 and 64 nodes at 256 tokens of context."""
        if self.cost_model is None:
            return {}
        return {"forward_ms": {m: round(1e3 * self.cost_model.seconds(m, 256, 1), 2) for m in (1, 8, 16, 32, 64)}}


def measured_costs(target: TargetModel) -> CostModel:
    """The cost model of this machine and model: from the cache folder, else measured now (a few seconds) and saved."""
    fingerprint = _fingerprint(target)
    path = measurement_file("costs", fingerprint)
    if (known := target.ranks.first(CostModel.load(path, fingerprint))) is not None:
        return known
    longest = (target.max_positions or max(CONTEXTS) + MAX_NODES) - MAX_NODES
    contexts = [context for context in CONTEXTS if context <= longest] or [max(0, longest)]
    model = CostModel.measure(_timer(target), contexts=contexts, clock=target.ranks.clock)
    if target.ranks.number == 0:
        with contextlib.suppress(OSError):  # a read-only cache: measured again next time
            model.save(path, fingerprint)
    return model


def _timer(target: TargetModel) -> Any:
    """forward(rows, nodes, context) -> seconds of one tree forward, K/V contents being irrelevant to its cost."""

    def forward(rows: int, nodes: int, context: int) -> float:
        cache = target.new_cache(rows, context + nodes)
        for tensor in cache.buffers():
            tensor.zero_()
        cache.lengths = [context] * len(cache.lengths)
        tree = two_chains(nodes, target.vocab_size)
        started = target.ranks.clock()
        target.forward(cache, [tree] * rows)
        _synchronize(target.device)
        return target.ranks.clock() - started

    return forward


def two_chains(nodes: int, vocab_size: int | None = None) -> DraftTree:
    """A tree to time: node i hangs on node i - 2, a real mask and positions that stay within small contexts; tokens 0, 1, ..."""
    parents = np.maximum(np.arange(nodes) - 2, 0)
    parents[0] = NO_PARENT
    return DraftTree(np.arange(nodes) % (vocab_size or nodes), parents)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fingerprint(target: TargetModel) -> str:
    config = target.model.config.to_dict()
    shape = {name: value for name, value in sorted(config.items()) if isinstance(value, int) and not isinstance(value, bool)}
    parts = (target.name, shape, target.dtype, target.device, torch.get_num_threads(), torch.__version__, NODES)
    return repr((*parts, platform.node(), platform.machine(), target.info(), linear.build()))
