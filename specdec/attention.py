"""tree_attention(): the nodes of each row's draft tree attend to the row's prefix and to their own ancestors.

One signature, two implementations: `torch.ops.specdec.tree_attention` (csrc/cpu/tree_attention.cpp, csrc/cuda/) where it can run,
and the PyTorch reference below, which is the oracle of its tests. Query node i of row b sees cache slots 0..P-1 and the slots P+j
of its ancestors j (itself included). Worked example, P = 2 and the tree of draft_tree.py::

    slot      0  1 | 2 (the) 3 (cat) 4 (dog) 5 (sat)
    node sat  x  x | x       x       .       x

On a CPU the op's result for a node is a function of the node's query and of the keys and values that it sees, in the order of
their positions: the same bits in every tree and batch, for every number of threads, and whether a token is a node or committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from specdec.draft_tree import DraftTree
from specdec.linear import HAVE_OP

__all__ = ["TreeBatch", "op_takes_heads", "pack_mask", "tree_attention", "tree_attention_reference", "unpack_mask"]

_BITS = 32
_MAX_NODES = 256
_HEAD_DIMS = {"cpu": frozenset((16, 32, 64, 80, 96, 112, 128, 192, 256)), "cuda": frozenset((64, 96, 128, 256))}
_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_logger = logging.getLogger("specdec")


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """[..., N, N] bool -> [..., N, ceil(N/32)] int32; bit j & 31 of word j >> 5 is column j (bit 31 is the sign bit)."""
    count = mask.shape[-1]
    words = -(-count // _BITS)
    padded = np.zeros((*mask.shape[:-1], words * _BITS), np.uint8)
    padded[..., :count] = mask
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")


def unpack_mask(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Inverse of pack_mask: [..., N, W] int32 -> [..., N, count] bool."""
    columns = torch.arange(count, device=packed.device)
    words = packed.long()[..., columns >> 5]
    return ((words >> (columns & 31)) & 1).bool()


@dataclass(slots=True, eq=False)
class TreeBatch:
    """What one forward attends to: B rows, each with P committed slots and n new nodes (a tree, or a causal chunk)."""

    prefix_lengths: list[int]  # [B] P of each row
    trees: list[DraftTree] | None  # [B]; None: the new nodes are one causal chain a row (prefill)
    counts: list[int]  # [B] n of each row
    device: torch.device
    known: list[int] | None = None  # [B] the first nodes of each row, which an earlier forward computed: no queries of theirs
    _bias: dict[tuple[int, int, torch.dtype, torch.device], torch.Tensor | None] = field(default_factory=dict)
    _packed: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def visible(self, row: int, window: int) -> np.ndarray:
        """[n, P+n] bool: which cache slots each new node of the row sees."""
        prefix, count = self.prefix_lengths[row], self.counts[row]
        mask = np.ones((count, prefix + count), np.bool_)
        if self.trees is None:
            depths = np.arange(count, dtype=np.int32)
            mask[:, prefix:] = np.tri(count, dtype=np.bool_)
        else:
            depths = self.trees[row].depths
            mask[:, prefix:] = self.trees[row].ancestor_mask()
        if window > 0:
            slots = np.concatenate([np.arange(prefix, dtype=np.int32), prefix + depths])
            mask &= (prefix + depths)[:, None] - slots[None, :] < window
        return mask

    def bias(self, row: int, window: int, dtype: torch.dtype, groups: int, device: torch.device) -> torch.Tensor | None:
        """[groups*n, P+n] additive mask of the row, cached for all layers; None where every slot is visible."""
        key = (row, window, dtype, device)
        if key not in self._bias:
            prefix, count = self.prefix_lengths[row], self.counts[row]
            if count == 1 and (window <= 0 or prefix < window):
                self._bias[key] = None
            else:
                visible = torch.from_numpy(self.visible(row, window))
                bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
                self._bias[key] = bias.repeat(groups, 1).to(device)
        return self._bias[key]

    def packed(self, device: torch.device | None = None) -> tuple[torch.Tensor, ...]:
        """prefix_lengths [B], node_counts [B], ancestor_mask [B, N, W] and depths [B, N], all int32, for the compiled op.

        On `device` (default: the batch's), made once for all layers there.
        """
        device = device or self.device
        if device not in self._packed:
            arrays = self.packed_arrays()
            self._packed[device] = tuple(map(torch.from_numpy, arrays)) if device.type == "cpu" else _copied(arrays, device)
        return self._packed[device]

    def all_nodes(self) -> TreeBatch:
        """The same without known nodes."""
        return replace(self, known=None)

    def spread(self, new: torch.Tensor) -> torch.Tensor:
        """[B, H, M, D] of the new nodes -> [B, H, N, D] of all: zeros for known ones, whose results `collect` drops."""
        assert self.known is not None
        spread = new.new_zeros((*new.shape[:2], max(self.counts), new.shape[-1]))
        for row, (known, count) in enumerate(zip(self.known, self.counts)):
            spread[row, :, known:count] = new[row, :, : count - known]
        return spread

    def collect(self, output: torch.Tensor, most: int) -> torch.Tensor:
        """Inverse of spread() for the output: [B, N, H, D] -> [B, most, H, D], zeros past a row's new nodes."""
        assert self.known is not None
        new = output.new_zeros((output.shape[0], most, *output.shape[2:]))
        for row, (known, count) in enumerate(zip(self.known, self.counts)):
            new[row, : count - known] = output[row, known:count]
        return new

    def packed_arrays(self) -> tuple[np.ndarray, ...]:
        """What packed() gives, as arrays."""
        assert self.trees is not None, "a causal chunk has no packed mask"
        most = max(self.counts)
        masks = np.zeros((len(self.counts), most, most), np.bool_)
        depths = np.zeros((len(self.counts), most), np.int32)
        for row, tree in enumerate(self.trees):
            masks[row, : len(tree), : len(tree)] = tree.ancestor_mask()
            depths[row, : len(tree)] = tree.depths
        return np.array(self.prefix_lengths, np.int32), np.array(self.counts, np.int32), pack_mask(masks), depths


def _copied(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arrays of one dtype as contiguous views of one buffer on `device`: one copy from the host."""
    buffer = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = buffer.split([array.size for array in arrays])
    return tuple(part.view(array.shape) for part, array in zip(parts, arrays))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """query [1, H, M, D], key and value [1, H, T, D], bias [M, T] -> [1, H, M, Dv]."""
    if softcap <= 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores.float() if scores.dtype != torch.float64 else scores, -1).to(value.dtype), value)


def attend_row(
    batch: TreeBatch,
    row: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    """One row: query [Hq, n, D], key and value [Hkv, P+n, D] -> [n, Hq, Dv].

    The query heads that share a KV head are stacked as rows of one matmul, so K and V are neither expanded nor copied.
    """
    heads, count, dim = query.shape
    kv_heads = key.shape[0]
    groups = heads // kv_heads
    prefix = batch.prefix_lengths[row]
    if batch.trees is None and prefix == 0 and softcap <= 0 and (window <= 0 or count <= window):
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=count > 1, scale=scale, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1)
    bias = batch.bias(row, window, query.dtype, groups, query.device)
    stacked = query.reshape(1, kv_heads, groups * count, dim)
    out = _attend(stacked, key[None], value[None], bias, scale, softcap)
    return out.reshape(heads, count, -1).transpose(0, 1)


def attend(
    batch: TreeBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """All rows of a batch: query [B, Hq, N, D], key and value [B, Hkv, T, D] -> [B, N, Hq, Dv]; rows past n are zero.

    Trees go to the compiled op where it takes them. Else row by row, so that a row's result depends neither on its neighbours nor
    on their lengths.
    """
    if batch.trees is not None and _op_takes(query, key, value):
        return _op(query, key, value, *batch.packed(query.device), scale, softcap, window)[0]
    rows = range(query.shape[0])
    if len(rows) == 1:
        end = batch.prefix_lengths[0] + batch.counts[0]
        out = attend_row(batch, 0, query[0], key[0, :, :end], value[0, :, :end], scale, softcap, window)[None]
        return out.contiguous()  # as transformers' own functions return it: some models view it, the others reshape (and copy) it
    out = query.new_zeros((query.shape[0], query.shape[2], query.shape[1], value.shape[-1]))
    for row in rows:
        count = batch.counts[row]
        end = batch.prefix_lengths[row] + count
        out[row, :count] = attend_row(
            batch, row, query[row, :, :count], key[row, :, :end], value[row, :, :end], scale, softcap, window
        )
    return out


def tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    prefix_lengths: torch.Tensor,
    node_counts: torch.Tensor,
    ancestor_mask: torch.Tensor,
    depths: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch reference of `torch.ops.specdec.tree_attention` (kernel.md, section 1): output and log-sum-exp.

    Args:
        query: [B, Hq, N, D] rotated queries of the tree nodes.
        key_cache, value_cache: [B, Hkv, T, D]; slots 0..P-1 hold the prefix, P..P+n-1 the tree nodes; later slots are not read.
        prefix_lengths, node_counts: [B] int32, P and n of each row.
        ancestor_mask: [B, N, ceil(N/32)] int32, bit-packed; node j is visible to node i.
        depths: [B, N] int32; position of node i is P + depth (used by the window only).
        scale, softcap (0: off), window (0: off; a key is visible iff its distance is below it).

    Returns:
        output [B, N, Hq, D] (rows past n are zero) and log-sum-exp [B, N, Hq] fp32 (-inf past n).

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    rows, heads, nodes, _ = query.shape
    kv_heads = key_cache.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is not a multiple of key_cache's {kv_heads}")
    if ancestor_mask.shape != (rows, nodes, -(-nodes // _BITS)):
        raise ValueError(f"ancestor_mask must be [{rows}, {nodes}, {-(-nodes // _BITS)}], got {list(ancestor_mask.shape)}")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_zeros((rows, nodes, heads, value_cache.shape[-1]))
    lse = torch.full((rows, nodes, heads), float("-inf"), dtype=torch.float32, device=query.device)
    for row in range(rows):
        prefix, count = int(prefix_lengths[row]), int(node_counts[row])
        if count == 0:
            continue
        positions = prefix + depths[row, :count]
        visible = torch.ones((count, prefix + count), dtype=torch.bool, device=query.device)
        visible[:, prefix:] = unpack_mask(ancestor_mask[row, :count], count)
        if window > 0:
            slots = torch.cat([torch.arange(prefix, device=query.device), positions])
            visible &= positions[:, None] - slots[None, :] < window
        keys = key_cache[row, :, : prefix + count].to(wide).repeat_interleave(heads // kv_heads, 0)
        values = value_cache[row, :, : prefix + count].to(wide).repeat_interleave(heads // kv_heads, 0)
        scores = query[row, :, :count].to(wide) @ keys.transpose(-1, -2) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        output[row, :count] = (torch.softmax(scores, -1) @ values).transpose(0, 1).to(query.dtype)
        lse[row, :count] = torch.logsumexp(scores, -1).T.float()
    return output, lse


def compiled_op(device_type: str = "cpu") -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """torch.ops.specdec.tree_attention, or None where it has no kernel for tensors of this type ("cpu", "cuda")."""
    return _op if _has_kernel(device_type) else None


_op: Any = torch.ops.specdec.tree_attention.default if HAVE_OP and hasattr(torch.ops.specdec, "tree_attention") else None

if _op is not None:

    @torch.library.register_fake("specdec::tree_attention")
    def _fake(query: torch.Tensor, key_cache: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows, heads, nodes, dim = query.shape
        return query.new_empty(rows, nodes, heads, dim), query.new_empty(rows, nodes, heads, dtype=torch.float32)


@cache
def _has_kernel(device_type: str) -> bool:
    if _op is None or device_type not in _HEAD_DIMS:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("specdec::tree_attention", device_type.upper())


def op_takes_heads(key_dim: int, value_dim: int, dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether the op has a kernel for heads of these dimensions."""
    return _has_kernel(device_type) and dtype in _DTYPES and key_dim == value_dim and key_dim in _HEAD_DIMS[device_type]


def _op_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the op runs on these; if not, why is said once a process."""
    obstacle = _obstacle(query, key, value, query.device.type)
    if obstacle is not None and query.dtype is not torch.float64:
        _notice(obstacle)
    return obstacle is None


def _obstacle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, device_type: str) -> str | None:
    """The first reason for which the op does not run on a device of this type, None where it does."""
    if _op is None:
        return "specdec._C is not built"
    if not _has_kernel(device_type):
        fix = " (fix: SPECDEC_CUDA=1 pip install --no-build-isolation ., with nvcc)" if device_type == "cuda" else ""
        return f"specdec._C has no kernel for {device_type}{fix}"
    if query.dtype not in _DTYPES or not query.dtype is key.dtype is value.dtype:
        return f"it takes one of float32, float16 and bfloat16, not {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[-1] not in _HEAD_DIMS[device_type]:
        return f"it has no kernel for head dimension {query.shape[-1]} on {device_type}"
    if value.shape[-1] != query.shape[-1]:
        return f"values have dimension {value.shape[-1]}, keys {query.shape[-1]}"
    if query.shape[-2] > _MAX_NODES:
        return f"a tree has {query.shape[-2]} nodes, it takes {_MAX_NODES}"
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return "the last dimension of the query, keys or values is not contiguous"
    if device_type == "cuda" and not all(map(is_aligned, (query, key, value))):
        return "the query, keys or values are not aligned to 16 bytes, their strides included"
    return None


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether every vector of the last dimension starts at a multiple of 16 bytes, as GPU kernels load them.

    torch's allocators align a storage itself to more than that.
    """
    steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    return all(step * tensor.element_size() % 16 == 0 for step in [tensor.storage_offset(), *steps])


@cache
def _notice(obstacle: str) -> None:
    _logger.warning("specdec's tree attention runs in PyTorch and not in the compiled op: %s", obstacle)


def tree_attention(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compiled op for what it takes, else the reference; arguments as tree_attention_reference."""
    if _op_takes(query, key_cache, value_cache):
        return _op(query, key_cache, value_cache, *args, **kwargs)
    return tree_attention_reference(query, key_cache, value_cache, *args, **kwargs)
