"""KVCache: every row's keys and values in preallocated buffers, written in place.

Slots 0..P-1 of a row hold its committed tokens; a forward writes its n nodes to slots P..P+n-1; `commit` moves the accepted
ones to P, P+1, ... and forgets the rest by not counting them. Nothing is concatenated. Buffers of equal shape (all layers' keys
and values in most models) are one tensor, so that a commit is one gather, whatever the number of layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["CACHE_ARGUMENTS", "KVCache", "LayerShape", "Place", "cache_argument"]

CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on; before, and in code of the time before


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's forward calls the cache that it is given."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's cache, as found by the self-check."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class Place(NamedTuple):
    """Where one layer's keys and values lie: number of the buffer, index in it."""

    key_buffer: int
    key_index: int
    value_buffer: int
    value_index: int


class KVLayer(CacheLayerMixin):
    """transformers' view of one layer: all state belongs to the KVCache."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.window_end, 0

    def get_seq_length(self) -> int:
        return max(self._cache.starts, default=0)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length before transformers 5.1."""
        return -1


class KVCache(Cache):
    """Keys and values of `rows` sequences.

    Args:
        layers: one LayerShape a layer, in the order of the model's layer indices.
        rows: sequences held at once; grows by doubling.
        capacity: slots a row; grows by doubling.
        zero_stale: set the slots past a row's P + n to zero in the views that write returns. A model's own attention multiplies
            masked slots by 0, and stale memory may hold NaN.
    """

    def __init__(self, layers: Seq[LayerShape], rows: int = 1, capacity: int = 256, zero_stale: bool = False) -> None:
        super().__init__(layers=[KVLayer(self, index) for index in range(len(layers))])
        self._shapes = list(layers)
        self.rows, self.capacity, self._zero_stale = rows, capacity, zero_stale
        self.lengths = [0] * rows  # [R] committed slots, P
        self.first_row = 0  # rows first_row .. first_row+len(starts)-1 take part in the forward under way
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.known: list[int] = []  # of counts, from the first node on: written by an earlier forward over the same tree
        self._groups: dict[tuple[int, int, torch.dtype, torch.device], int] = {}  # shape -> buffers in the group
        self._slots: list[tuple[tuple, int, tuple, int]] = []  # a layer's (key group, index, value group, index)
        for shape in self._shapes:
            key_group = (shape.key_heads, shape.key_dim, shape.dtype, shape.device)
            value_group = (shape.value_heads, shape.value_dim, shape.dtype, shape.device)
            key_index = self._take(key_group)
            self._slots.append((key_group, key_index, value_group, self._take(value_group)))
        self._buffers = {group: self._allocate(group, rows, capacity) for group in self._groups}  # [buffers, R, H, C, D]

    def _take(self, group: tuple[int, int, torch.dtype, torch.device]) -> int:
        index = self._groups.get(group, 0)
        self._groups[group] = index + 1
        return index

    def _allocate(self, group: tuple[int, int, torch.dtype, torch.device], rows: int, capacity: int) -> torch.Tensor:
        heads, dim, dtype, device = group
        return torch.empty((self._groups[group], rows, heads, capacity, dim), dtype=dtype, device=device)

    @property
    def window_end(self) -> int:
        """Slots that the forward under way reads: the longest row's P + n."""
        return max((start + count for start, count in zip(self.starts, self.counts)), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def reserve(self, rows: int, capacity: int) -> None:
        """Grow (by doubling) so that `rows` rows of `capacity` slots fit; what is committed is kept.

        If there is no memory for that, the cache stays as it is.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        nodes = [start + known for start, known in zip(self.starts, self.known)]  # of the forward under way
        used = min(max([*self.lengths, *nodes]), self.capacity)
        rows, capacity = _doubled(self.rows, rows), _doubled(self.capacity, capacity)
        grown = {group: self._allocate(group, rows, capacity) for group in self._groups}
        for group, kept in self._buffers.items():
            grown[group][:, : self.rows, :, :used] = kept[:, :, :, :used]
        self.lengths += [0] * (rows - self.rows)
        self.rows, self.capacity, self._buffers = rows, capacity, grown

    def begin(self, first_row: int, counts: Seq[int], known: Seq[int] | None = None) -> None:
        """Announce a forward over consecutive rows: row first_row + i has counts[i] nodes, known[i] of them written already."""
        self.reserve(first_row + len(counts), 1)
        self.first_row = first_row
        self.starts = self.lengths[first_row : first_row + len(counts)]
        self.counts = list(counts)
        self.known = [0] * len(counts) if known is None else list(known)
        self.reserve(first_row + len(counts), self.window_end)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new nodes, [B, H, N, D], at each row's own offset; returns views [B, H, T, D] of the rows.

        Slots past P + n are stale.
        """
        key_group, key_index, value_group, value_index = self._slots[layer]
        last = self.first_row + len(self.starts)
        key_rows = self._buffers[key_group][key_index, self.first_row : last]
        value_rows = self._buffers[value_group][value_index, self.first_row : last]
        end = self.window_end
        for row, (start, count, known) in enumerate(zip(self.starts, self.counts, self.known)):
            key_rows[row, :, start + known : start + count] = keys[row, :, : count - known]
            value_rows[row, :, start + known : start + count] = values[row, :, : count - known]
            if self._zero_stale and start + count < end:
                key_rows[row, :, start + count : end] = 0
                value_rows[row, :, start + count : end] = 0
        return key_rows[:, :, :end], value_rows[:, :, :end]

    def commit(self, row: int, nodes: Seq[int]) -> None:
        """Keep the K/V of the accepted path (ascending node indices, root first) and forget the row's other nodes."""
        start = self.lengths[row]
        moved = next((i for i, node in enumerate(nodes) if node != i), len(nodes))  # nodes already in place
        if moved < len(nodes):
            for buffer in self._buffers.values():
                index = torch.tensor([start + int(node) for node in nodes[moved:]], device=buffer.device)
                slots = buffer[:, row]
                slots[:, :, start + moved : start + len(nodes)] = slots.index_select(2, index)
        self.lengths[row] = start + len(nodes)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Row `target` becomes a copy of the first `length` (default: all) committed slots of row `source`."""
        length = self.lengths[source] if length is None else length
        self.reserve(max(source, target) + 1, length)
        for buffer in self._buffers.values():
            buffer[:, target, :, :length] = buffer[:, source, :, :length]
        self.lengths[target] = length

    def release(self, row: int) -> None:
        """The row is free again."""
        self.lengths[row] = 0

    def places(self) -> list[Place]:
        """Where each layer's keys and values lie in buffers()."""
        number = {group: i for i, group in enumerate(self._groups)}
        return [Place(number[keys], key, number[values], value) for keys, key, values, value in self._slots]

    def buffers(self) -> list[torch.Tensor]:
        """All buffers, [buffers of the group, R, H, C, D] each."""
        return list(self._buffers.values())

    def row_tensors(self, row: int) -> list[torch.Tensor]:
        """Committed K/V of a row, one [buffers, H, P, D] view a group (tests, prefix stores)."""
        return [buffer[:, row, :, : self.lengths[row]] for buffer in self._buffers.values()]


def _doubled(size: int, least: int) -> int:
    """`size` doubled until it is at least `least`."""
    while size < least:
        size *= 2
    return size
