"""The prefix part of tree attention by flash-attn (`prefix_backend="flash_attn"`), an option beside the op.

A node sees two disjoint sets of keys: all P committed slots of its row, which needs no mask and so is what flash-attn computes,
and its ancestors among the tree's n slots, which is tree attention with P = 0. Each gives an output o_i and the log-sum-exp l_i
of its scores, and together they are (Flash-Decoding, pytorch.org/blog/flash-decoding)

    l = logsumexp_i l_i,   o = sum_i exp(l_i - l) o_i

Worked example, all scores 0, P = 3 and a root alone: l = log 3 and log 1, so the weights are 3/4 and 1/4, as for four equal keys.

What `flash_attn_with_kvcache` does, read from flash-attn 2 (flash_attn_interface.py, flash_api.cpp: mha_fwd_kvcache, softmax.h):
    layout    q [B, N, Hq, D], caches [B, T, Hkv, D], D contiguous, other strides free; out as q; lse [B, Hq, N] fp32, natural log
    lengths   cache_seqlens [B] int32; slots from there on are not read; a row of length 0 gives out = 0 and lse = +inf
    refused   any dtype but float16 and bfloat16, D > 256; if D % 8 != 0 it copies the whole cache
    window    counted from a row's last slots, one a query, which are not the positions of tree nodes: windows go to attend()

Neither this nor flash-attn was ever run on a GPU here: tests/test_prefix_backend.py uses a CPU function of that contract.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable

import torch

from specdec.attention import TreeBatch, attend, is_aligned, tree_attention

__all__ = ["attend_with_prefix", "attention_function", "load_flash_attention", "merge"]

PREFIX_BACKENDS = ("op", "flash_attn")
FlashAttention = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Attend = Callable[..., torch.Tensor]
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_logger = logging.getLogger("specdec")


def attention_function(prefix_backend: str | FlashAttention, device: torch.device, dtype: torch.dtype) -> Attend:
    """attend(), or attend_with_prefix() over flash-attn or over a function of the caller's.

    Args:
        prefix_backend: "op", "flash_attn", or a function with flash_attn_with_kvcache's contract (FlashAttention-3's, a test's).
        device, dtype: the model's.

    Raises:
        ValueError: another name; or "flash_attn" without CUDA, a dtype that it takes, or flash-attn 2.6 or later.
    """
    if prefix_backend == "op":
        return attend
    if callable(prefix_backend):
        return functools.partial(attend_with_prefix, prefix_backend)
    if prefix_backend != "flash_attn":
        raise ValueError(f"prefix_backend must be one of {', '.join(PREFIX_BACKENDS)} or a function, got {prefix_backend!r}")
    if device.type != "cuda":
        raise ValueError(
            f'prefix_backend="flash_attn" needs a model on CUDA, this one is on {device.type}. '
            'Fix: model.to("cuda"), or prefix_backend="op"'
        )
    if dtype not in _DTYPES:
        raise ValueError(
            f'prefix_backend="flash_attn" takes float16 and bfloat16, this model is {dtype}. '
            'Fix: model.to(torch.bfloat16), or prefix_backend="op"'
        )
    return functools.partial(attend_with_prefix, load_flash_attention())


def load_flash_attention() -> FlashAttention:
    """flash_attn.flash_attn_with_kvcache.

    Raises:
        ValueError: it cannot be imported, or is older than 2.6 (no softcap).
    """
    fix = 'Fix: pip install --no-build-isolation "flash-attn>=2.6", or prefix_backend="op"'
    try:
        from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(f'prefix_backend="flash_attn": flash-attn cannot be imported ({error}). {fix}') from error
    if missing := {"softcap", "return_softmax_lse"} - inspect.signature(flash_attn_with_kvcache).parameters.keys():
        raise ValueError(f'prefix_backend="flash_attn": this flash-attn has no {" and no ".join(sorted(missing))}. {fix}')
    return flash_attn_with_kvcache


def attend_with_prefix(
    flash: FlashAttention,
    batch: TreeBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """attend(), the prefixes by `flash`: query [B, Hq, N, D], key and value [B, Hkv, T, D] -> [B, N, Hq, D]; zero past n.

    Prompts, sliding windows and what flash-attn does not take (said once a process) go to attend().
    """
    if batch.trees is None or window > 0 or not any(batch.prefix_lengths) or not _takes(query, key, value):
        return attend(batch, query, key, value, scale, softcap, window)
    prefixes, counts, mask, depths = batch.packed(query.device)
    slots = prefixes[:, None].long() + torch.arange(query.shape[2], device=query.device)
    slots.clamp_(max=key.shape[2] - 1)  # past n: any slot, for nobody reads it
    nodes = [_gather(cache, slots) for cache in (key, value)]
    tree, tree_lse = tree_attention(query, *nodes, torch.zeros_like(prefixes), counts, mask, depths, scale, softcap)
    prefix, prefix_lse = _prefix(flash, query, key, value, prefixes, scale, softcap)
    prefix_lse = prefix_lse.masked_fill(tree_lse.isneginf(), float("-inf"))  # past n; every node sees itself
    return merge([prefix, tree], [prefix_lse, tree_lse])[0].to(query.dtype)


def merge(outputs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys.

    Args:
        outputs: [..., D] of each set.
        lses: [...] fp32 of each set; -inf says that it is empty, and then its output may hold anything, NaN too.

    Returns:
        output [..., D] fp32 and log-sum-exp [...]; zero and -inf where all sets are empty.
    """
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - total.clamp(min=torch.finfo(total.dtype).min))[..., None]  # never exp(-inf + inf)
    merged = [torch.where(weight > 0, weight * output.float(), 0.0) for weight, output in zip(weights, outputs)]
    return torch.stack(merged).sum(0), total


def _prefix(
    flash: FlashAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lengths: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every node over its row's P committed slots, in place on the cache: output [B, N, Hq, D] and lse [B, N, Hq]."""
    output, lse, *_ = flash(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=prefix_lengths,
        softmax_scale=scale,
        causal=False,
        softcap=softcap,
        return_softmax_lse=True,
    )
    return output, lse.transpose(1, 2).masked_fill((prefix_lengths == 0)[:, None, None], float("-inf"))


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """cache [B, H, T, D], slots [B, N] -> [B, H, N, D]."""
    index = slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.gather(2, index)


def _takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether flash-attn runs on these; if not, why is said once a process."""
    obstacle = _obstacle(query, key, value)
    if obstacle is not None:
        _notice(obstacle)
    return obstacle is None


def _obstacle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    dim = query.shape[-1]
    if query.dtype not in _DTYPES or not query.dtype is key.dtype is value.dtype:
        return f"it takes one of float16 and bfloat16, not {query.dtype}, {key.dtype} and {value.dtype}"
    if dim > _MAX_HEAD_DIM or dim % 8:
        return f"it has no kernel for head dimension {dim}"
    if value.shape[-1] != dim:
        return f"values have dimension {value.shape[-1]}, keys {dim}"
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 or not all(map(is_aligned, (query, key, value))):
        return "the query, keys or values are not contiguous in their last dimension or not aligned to 16 bytes"
    return None


@functools.cache
def _notice(obstacle: str) -> None:
    _logger.warning("specdec's tree attention does not use flash-attn for the prefix: %s", obstacle)
