"""Ranks: the processes that share one model (tensor parallelism), and what makes them do the same.

Each of them runs the same engine over its share of every layer's heads and features. What the engine decides is a function of the
tokens, of the logits, which transformers gathers on all of them, and of keyed noise, so it is the same everywhere, but for clocks,
caches on disk and undrawn seeds: of those, rank 0's count. Worked example, a forward over 8 nodes that took 20 ms on rank 0 and
31 ms on rank 1: both learn 20 ms, and both choose 16 nodes for the next tree.

Ranks that are about to run different forwards would wait for each other or add up what does not belong together. They compare
before each one, and all of them raise.
"""

from __future__ import annotations

import time
import zlib
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Ranks", "misplaced"]

T = TypeVar("T")


class Ranks:
    """The processes that share `model`, this one among them; made on all of them at the same time.

    Args:
        model: loaded with transformers' `tp_plan`, or any other, which belongs to this process alone.
    """

    def __init__(self, model: Any) -> None:
        shared = _mesh(model) is not None
        self._group = _control_group(dist.group.WORLD) if shared else None
        self.size = dist.get_world_size(self._group) if shared else 1
        self.number = dist.get_rank(self._group) if shared else 0

    def first(self, value: T) -> T:
        """Rank 0's value, which can be pickled, on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def clock(self) -> float:
        """Seconds, as time.perf_counter says on rank 0."""
        return self.first(time.perf_counter())

    def compare(self, *arrays: np.ndarray) -> None:
        """Nothing, where all ranks have the same arrays.

        Raises:
            RuntimeError: they differ; on every rank.
        """
        if self._group is None:
            return
        digest = 0
        for array in arrays:
            digest = zlib.crc32(array.tobytes(), zlib.crc32(repr((array.shape, array.dtype)).encode(), digest))
        extremes = torch.tensor([digest, -digest])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        if extremes.sum() != 0:
            raise RuntimeError(
                f"the {self.size} processes that share this model are about to run different forwards (this is rank {self.number}); "
                "fix: give every one of them the same prompts, parameters and options"
            )


def misplaced(model: Any) -> str | None:
    """Why processes hold this model in a way that is not tensor parallelism over all of them, or None."""
    if (mesh := _mesh(model)) is None:
        split = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
        return "something other than transformers' tp_plan has split its weights over processes" if split else None
    size = getattr(model, "_tp_size", None) or 1
    if not mesh.size() == size == dist.get_world_size():
        return f"its {dist.get_world_size()} processes are no group of tensor parallelism (tp_size is {size})"
    return None


def _mesh(model: Any) -> Any:
    """transformers' mesh of the processes that hold the model; None: this one alone."""
    return getattr(model, "_device_mesh", None)


@cache
def _control_group(world: Any) -> Any:
    """The same processes over the CPU, so that comparing and agreeing never waits for an accelerator."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
