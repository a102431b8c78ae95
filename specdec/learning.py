"""The learning pass: the k largest logits of every node, for sources that learn from rejected nodes too.

It is the one full-vocabulary pass of a greedy step, so it reads each logit once: blocks that hold nothing above the row's k-th
best so far (nearly all of them) cost one vectorised comparison.
"""

from __future__ import annotations

import numpy as np
import torch

from specdec._jit import HAVE_NUMBA, njit
from specdec.draft_tree import TopK

__all__ = ["top_k"]

_BLOCK = 64


@njit
def _insert(values: np.ndarray, tokens: np.ndarray, value: float, token: int) -> None:
    """Put a value into its place in a descending row, dropping the last; equal values keep the order of arrival."""
    place = len(values) - 1
    while place > 0 and values[place - 1] < value:
        values[place] = values[place - 1]
        tokens[place] = tokens[place - 1]
        place -= 1
    values[place] = value
    tokens[place] = token


@njit
def _top_k_rows(logits: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> None:
    """logits [M, V] fp32 -> values [M, k] fp32 descending and tokens [M, k] int32."""
    width = logits.shape[1]
    last = values.shape[1] - 1
    for row in range(logits.shape[0]):
        line = logits[row]
        best = values[row]
        best[:] = -np.inf
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            bound = best[last]
            above = 0
            for token in range(start, end):
                above += line[token] > bound
            if above > 0:
                for token in range(start, end):
                    if line[token] > best[last]:
                        _insert(best, tokens[row], line[token], token)


@njit
def _ordered(bits: int) -> int:
    """bf16 as int16 bits -> an int16 that orders as the number does (an involution)."""
    return bits ^ ((bits >> 15) & 0x7FFF)


@njit
def _top_k_rows_bf16(logits: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> None:
    """logits [M, V] bf16 seen as int16 -> values [M, k] int16 (ordered bits), tokens [M, k]. The same scan on integers."""
    width = logits.shape[1]
    last = values.shape[1] - 1
    for row in range(logits.shape[0]):
        line = logits[row]
        best = values[row]
        best[:] = -32768
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            bound = best[last]
            above = 0
            for token in range(start, end):
                above += _ordered(line[token]) > bound
            if above > 0:
                for token in range(start, end):
                    value = _ordered(line[token])
                    if value > best[last]:
                        _insert(best, tokens[row], value, token)


def _ordered_array(bits: np.ndarray) -> np.ndarray:
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def top_k(logits: torch.Tensor, k: int) -> TopK:
    """The k most probable next tokens of each row of `logits` [M, V], with the softmax over those k."""
    tokens = np.zeros((len(logits), k), np.int32)
    fast = HAVE_NUMBA and logits.device.type == "cpu"
    if fast and logits.dtype == torch.float32:
        values = np.empty((len(logits), k), np.float32)
        _top_k_rows(logits.contiguous().numpy(), values, tokens)
    elif fast and logits.dtype == torch.bfloat16:
        bits = np.empty((len(logits), k), np.int16)
        _top_k_rows_bf16(logits.contiguous().view(torch.int16).numpy(), bits, tokens)
        values = torch.from_numpy(_ordered_array(bits)).view(torch.bfloat16).float().numpy()
    else:
        best = torch.topk(logits, k, dim=-1)
        values = best.values.float().cpu().numpy()
        tokens = best.indices.to(torch.int32).cpu().numpy()
    weights = np.exp(values - values[:, :1])
    return TopK(tokens, weights / weights.sum(-1, keepdims=True))
