"""GraphedForward: the verification step as CUDA graphs, one for each number of rows and bucket of nodes (`compile=True` on CUDA).

A graph replays a fixed sequence of kernels over fixed memory, without Python or launches between them. So trees are padded to the
next bucket, and everything that differs from step to step (tokens, positions, slots, lengths, masks) is copied into buffers that
the graph reads::

    a tree of 5 nodes -> bucket 8: nodes 5..7 are padding; their keys and values go to slots past the tree, where nobody reads them,
    and the node count, 5, keeps them out of the attention

A cache that has grown lies elsewhere: its graphs are captured again. `capture` is a parameter so that all but the capture itself
runs in tests on a CPU. Never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.attention import TreeBatch, tree_attention
from specdec.cost_model import NODES
from specdec.kv_cache import KVCache
from specdec.trace import Trace

if TYPE_CHECKING:
    from specdec.target import TargetModel

__all__ = ["GraphedForward", "capture_cuda"]

Replay = Callable[[], Tensor]
WARM_UPS = 2  # runs before a capture: libraries set themselves up in the first


def capture_cuda(body: Replay) -> Replay:
    """Run `body` a few times, record it as a CUDA graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = body()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a graph reads, on the device: B rows, N nodes."""

    tokens: Tensor  # [B, N] int64
    positions: Tensor  # [B, N] int64
    slots: Tensor  # [B, N] int64, of each node in its row of the cache
    lengths: Tensor  # [B] int32, P
    counts: Tensor  # [B] int32, n
    masks: Tensor  # [B, N, W] int32
    depths: Tensor  # [B, N] int32

    @classmethod
    def empty(cls, rows: int, nodes: int, device: torch.device) -> _Inputs:
        """All zeros, a legal step."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tokens, positions, slots = (zeros(rows, nodes, dtype=torch.int64) for _ in range(3))
        masks = zeros(rows, nodes, -(-nodes // 32))
        return cls(tokens, positions, slots, zeros(rows), zeros(rows), masks, zeros(rows, nodes))

    def fill(self, batch: TreeBatch, tokens: np.ndarray, positions: np.ndarray) -> None:
        """Copy a step of at most N nodes a row into them; the rest is padding."""
        most, nodes = tokens.shape[1], self.tokens.shape[1]
        lengths, counts, masks, depths = batch.packed_arrays()
        padded = [np.zeros(tensor.shape, np.int64) for tensor in (self.tokens, self.positions)]
        padded[0][:, :most], padded[1][:, :most] = tokens, positions
        slots = lengths[:, None].astype(np.int64) + np.arange(nodes)
        wide = np.zeros(self.masks.shape, np.int32)
        wide[:, :most, : masks.shape[2]] = masks
        deep = np.zeros(self.depths.shape, np.int32)
        deep[:, :most] = depths
        fields = (self.tokens, self.positions, self.slots, self.lengths, self.counts, self.masks, self.depths)
        for tensor, array in zip(fields, (*padded, slots, lengths, counts, wide, deep)):
            tensor.copy_(torch.from_numpy(array), non_blocking=True)


class _StaticAttention(Trace):
    """Stores by index and attends with the op, all from tensors that keep their place."""

    step: _Inputs

    def __init__(self, cache: KVCache, first_row: int) -> None:
        super().__init__(cache)
        self._first_row = first_row

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int) -> Tensor:
        keys, key_index, values, value_index = self.stored(key, value)
        own = slice(self._first_row, self._first_row + query.shape[0])
        key_rows, value_rows = keys[key_index, own], values[value_index, own]
        rows = torch.arange(query.shape[0], device=query.device)[:, None]
        key_rows[rows, :, self.step.slots] = key.transpose(1, 2)
        value_rows[rows, :, self.step.slots] = value.transpose(1, 2)
        lengths, counts, masks, depths = self.step.lengths, self.step.counts, self.step.masks, self.step.depths
        return tree_attention(query, key_rows, value_rows, lengths, counts, masks, depths, scale, softcap, window)[0]


class GraphedForward:
    """The step of one TargetModel as captured graphs.

    Args:
        target: whose model's step is captured.
        capture: makes a replay of a function without arguments; on a CPU a test's.
        buckets: node counts for which there are graphs; a larger tree is none of them and runs eagerly.
    """

    def __init__(
        self, target: TargetModel, capture: Callable[[Replay], Replay] = capture_cuda, buckets: tuple[int, ...] = NODES
    ) -> None:
        self._target, self._capture, self._buckets = target, capture, buckets
        self._graphs: dict[tuple[Any, ...], tuple[_Inputs, Replay]] = {}
        self._buffers: tuple[int, ...] = ()  # addresses of the cache that the graphs belong to

    def __call__(self, cache: KVCache, batch: TreeBatch, tokens: np.ndarray, positions: np.ndarray) -> Tensor | None:
        """Logits [B, M, V] of a batch of trees, announced to the cache; tokens and positions [B, M] int64. None: run it eagerly."""
        rows, most = tokens.shape
        bucket = next((size for size in self._buckets if size >= most), None)
        if bucket is None or batch.known is not None:
            return None
        cache.reserve(cache.rows, max(batch.prefix_lengths) + bucket)
        self._follow(cache)
        key = (cache.first_row, rows, bucket)
        if key not in self._graphs:
            self._graphs[key] = self._captured(cache, rows, bucket)
        inputs, replay = self._graphs[key]
        inputs.fill(batch, tokens, positions)
        return replay()[:, :most].clone()  # the next replay writes to the same place

    def info(self) -> dict[str, Any]:
        """How many graphs there are."""
        return {"graphs": len(self._graphs)}

    def _follow(self, cache: KVCache) -> None:
        """Forget the graphs of a cache that lay elsewhere."""
        now = tuple(buffer.data_ptr() for buffer in cache.buffers())
        if now != self._buffers:
            self._graphs.clear()
            self._buffers = now

    def _captured(self, cache: KVCache, rows: int, bucket: int) -> tuple[_Inputs, Replay]:
        inputs = _Inputs.empty(rows, bucket, self._target.device)
        inputs.slots.copy_(torch.tensor(cache.starts)[:, None] + torch.arange(bucket))  # the first runs write there too
        inputs.lengths.copy_(torch.tensor(cache.starts, dtype=torch.int32))
        trace = _StaticAttention(cache, cache.first_row)

        def body() -> Tensor:
            with self._target.tracing(trace.attend):
                return trace.run(self._target.model, inputs.tokens, inputs.positions, inputs, tuple(cache.buffers()))

        return inputs, self._capture(body)
