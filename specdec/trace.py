"""Trace: stands for the KVCache and for the attention while a model's step is exported or captured.

The model stores each layer's new keys and values in a cache that hands them back as they are, and then calls the attention with
them. Where they belong in the real cache's buffers is known by then, so one `attend` stores and attends.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.kv_cache import KVCache, cache_argument

__all__ = ["Trace"]


class Trace:
    """Args:
    cache: of the model, for where its layers lie in the buffers.
    """

    step: Any  # what the forward attends to, in the form that attend() understands
    buffers: tuple[Tensor, ...]

    def __init__(self, cache: KVCache) -> None:
        self._places = cache.places()
        self._layer = -1
        self._latest: tuple[Tensor, Tensor] | None = None  # keys and values of the latest update

    def run(self, model: Any, tokens: Tensor, positions: Tensor, step: Any, buffers: tuple[Tensor, ...]) -> Tensor:
        """Logits of the model for tokens and positions [B, N]; inside TargetModel.tracing(self.attend)."""
        self.step, self.buffers = step, buffers
        cache = Cache(layers=[_Layer(self, index) for index in range(len(self._places))])
        kept = {cache_argument(model.forward): cache}
        output = model(input_ids=tokens, attention_mask=None, position_ids=positions, use_cache=True, return_dict=True, **kept)
        return output.logits

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int) -> Tensor:
        """Store the new nodes' keys and values [B, Hkv, N, D], attend with query [B, Hq, N, D] -> [B, N, Hq, D]."""
        raise NotImplementedError

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A layer has stored these."""
        self._layer, self._latest = layer, (keys, values)

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, int, Tensor, int]:
        """Where the keys and values that the attention gets belong: buffer and index in it of both.

        Raises:
            NotImplementedError: they are not what the layer has just stored.
        """
        if self._latest is None or self._latest[0] is not key or self._latest[1] is not value:
            raise NotImplementedError("a layer attends to other keys and values than those it has just stored")
        place = self._places[self._layer]
        return self.buffers[place.key_buffer], place.key_index, self.buffers[place.value_buffer], place.value_index


class _Layer(CacheLayerMixin):
    """transformers' view of one layer: it gets back what it stores."""

    is_compileable = False
    is_sliding = False

    def __init__(self, trace: Trace, index: int) -> None:
        super().__init__()
        self._trace, self._index = trace, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        self._trace.update(self._index, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length before transformers 5.1."""
        return -1
