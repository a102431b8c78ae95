"""The learning pass: the k largest logits of every node, for sources that learn from rejected nodes too, and each node's argmax.

It is the one full-vocabulary pass of a greedy step, so it reads each logit once. Logits are compared as integers that order as
the numbers do: the largest of a block is a few vector instructions then, and nearly no block holds anything above the k-th best
so far. Worked example, bf16: 1.0 is 0x3F80 and 2.0 is 0x4000, in order already; -1.0 is 0xBF80, as an integer below -2.0, so the
rest of its bits is flipped; and every key is moved down by what lies below -inf, so that a NaN of either sign comes out on top.
"""

from __future__ import annotations

import numpy as np
import torch

from specdec._jit import HAVE_NUMBA, njit
from specdec.draft_tree import TopK

__all__ = ["top_k"]

_BLOCK = 64
_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7}
_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@njit
def _key(bits: int, flip: int, offset: int) -> int:
    """Bits of a float -> an integer that orders as it does, NaN on top; still to be cut to the width of the float."""
    return (bits if bits >= 0 else flip - bits) - offset


@njit
def _insert(keys: np.ndarray, tokens: np.ndarray, key: int, token: int) -> None:
    """Put a key into its place in a descending row, dropping the last; equal keys keep the order of arrival."""
    place = len(keys) - 1
    while place > 0 and keys[place - 1] < key:
        keys[place] = keys[place - 1]
        tokens[place] = tokens[place - 1]
        place -= 1
    keys[place] = key
    tokens[place] = token


@njit
def _scan(bits: np.ndarray, flip: int, offset: int, keys: np.ndarray, tokens: np.ndarray) -> None:
    """bits [M, V] int16 or int32 -> the k largest keys of each row, [M, k] descending, and their tokens [M, k] int32.

    `flip` is the largest integer of that width, `offset` its share below -inf.
    """
    cut = bits.dtype.type
    least = cut(-flip - 1)
    width, last = bits.shape[1], keys.shape[1] - 1
    for row in range(bits.shape[0]):
        line, best = bits[row], keys[row]
        best[:] = least
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            largest = least
            for token in range(start, end):
                largest = max(largest, cut(_key(line[token], flip, offset)))
            if largest > best[last]:
                for token in range(start, end):
                    key = cut(_key(line[token], flip, offset))
                    if key > best[last]:
                        _insert(best, tokens[row], key, token)


def _scanned(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [M, k] float32 descending, tokens [M, k] int32, the first of equals first)."""
    bits = logits.contiguous().view(_INTEGER[logits.dtype]).numpy()
    flip = bits.dtype.type(np.iinfo(bits.dtype).max)
    offset = bits.dtype.type((1 << _MANTISSA_BITS[logits.dtype]) - 1)
    keys, tokens = np.empty((len(bits), k), bits.dtype), np.zeros((len(bits), k), np.int32)
    _scan(bits, flip, offset, keys, tokens)
    moved = keys + offset  # wraps around where _key did
    found = np.where(moved >= 0, moved, flip - moved)
    return torch.from_numpy(found).view(logits.dtype).float().numpy(), tokens


def top_k(logits: torch.Tensor, k: int) -> TopK:
    """The k most probable next tokens of each row of `logits` [M, V], with the softmax over those k, and the argmax."""
    if HAVE_NUMBA and logits.device.type == "cpu" and logits.dtype in _INTEGER:
        values, tokens = _scanned(logits, k)
        # Not where the answer is no plain number, and not between 0.0 and -0.0, which are equal but have different keys.
        sure = np.isfinite(values[:, 0]) & (values[:, 0] != 0)
        argmax = np.where(sure, tokens[:, 0], -1)
    else:
        best = torch.topk(logits, k, dim=-1)  # any of equals: no argmax
        values, tokens = best.values.float().cpu().numpy(), best.indices.to(torch.int32).cpu().numpy()
        argmax = None
    with np.errstate(invalid="ignore"):  # inf - inf: the law of such a node refuses it, if it is visited
        weights = np.exp(values - values[:, :1])
    return TopK(tokens, weights / weights.sum(-1, keepdims=True), argmax)
