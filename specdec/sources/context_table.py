"""Table of next-token guesses keyed by the last one, two and three tokens.

Token Recycling (arXiv 2408.16696 -> drafting.md 3) keeps the most probable next tokens the model ever announced after a token;
this table keeps them after the last `order` tokens, order 1..3, in one bounded hash table, with their probabilities. A row that
is observed again is merged with what it held (`keep` of the old mass stays), so that one odd context does not wipe it out.
Worked example after observing the model at "the cat sat" -> {on: .6, down: .3}::

    order 3  (the, cat, sat) -> on .6, down .3
    order 2  (cat, sat)      -> on .6, down .3
    order 1  (sat)           -> on .3 + what "sat" announced elsewhere, halved
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdec._jit import njit

__all__ = ["MAX_ORDER", "ContextTable", "TableArrays", "lookup", "observe"]

MAX_ORDER = 3
_PROBES = 8  # slots that one key may live in
_MODULUS = 2147483647
_FACTOR = 1000003
_EMPTY = -2  # fills keys shorter than MAX_ORDER, and empty slots


class TableArrays(NamedTuple):
    """The table as numba sees it: H slots (a power of two), k tokens a row."""

    keys: np.ndarray  # [H, MAX_ORDER] int32: the context, oldest token first, padded in front with -2; all -2: empty slot
    stamps: np.ndarray  # [H] int64: when the row was last written
    tokens: np.ndarray  # [H, k] int32, best first; -1: none
    probs: np.ndarray  # [H, k] float32
    clock: np.ndarray  # [2] int64: writes so far, rows in use


@njit
def _slot(table: TableArrays, tail: np.ndarray, end: int, order: int) -> int:
    """Slot of the context tail[end - order + 1 .. end], or ~slot (negative) of the place where it would be written."""
    value = order
    for position in range(end - order + 1, end + 1):
        value = (value * _FACTOR + int(tail[position]) + 1) % _MODULUS
    mask = len(table.keys) - 1
    oldest = value & mask
    for probe in range(_PROBES):
        slot = (value + probe) & mask
        if table.keys[slot, MAX_ORDER - 1] == _EMPTY:
            return ~slot
        same = True
        for back in range(MAX_ORDER):
            wanted = tail[end - back] if back < order else _EMPTY
            if table.keys[slot, MAX_ORDER - 1 - back] != wanted:
                same = False
                break
        if same:
            return slot
        if table.stamps[slot] < table.stamps[oldest]:
            oldest = slot
    return ~oldest


@njit
def lookup(table: TableArrays, tail: np.ndarray, end: int, order: int) -> int:
    """Row of the last `order` tokens up to tail[end], or -1. Tokens below 0 match nothing."""
    if end + 1 < order:
        return -1
    for position in range(end - order + 1, end + 1):
        if tail[position] < 0:
            return -1
    slot = _slot(table, tail, end, order)
    return slot if slot >= 0 else -1


@njit
def _merge(table: TableArrays, slot: int, tokens: np.ndarray, probs: np.ndarray, keep: float) -> None:
    """row = keep * row + (1 - keep) * observation, best k kept, sorted; ties go to the observation."""
    width = table.tokens.shape[1]
    merged_tokens = np.full(2 * width, -1, np.int32)
    merged_probs = np.zeros(2 * width, np.float32)
    count = 0
    for rank in range(width):
        if tokens[rank] >= 0:
            merged_tokens[count] = tokens[rank]
            merged_probs[count] = (1.0 - keep) * probs[rank]
            count += 1
    fresh = count
    for rank in range(width):
        token = table.tokens[slot, rank]
        if token < 0:
            break
        place = count
        for other in range(fresh):
            if merged_tokens[other] == token:
                place = other
                break
        merged_tokens[place] = token
        merged_probs[place] += keep * table.probs[slot, rank]
        count = max(count, place + 1)
    for rank in range(min(width, count)):
        best = rank
        for other in range(rank + 1, count):
            if merged_probs[other] > merged_probs[best]:
                best = other
        token, prob = merged_tokens[best], merged_probs[best]
        for other in range(best, rank, -1):
            merged_tokens[other], merged_probs[other] = merged_tokens[other - 1], merged_probs[other - 1]
        merged_tokens[rank], merged_probs[rank] = token, prob
    for rank in range(width):
        table.tokens[slot, rank] = merged_tokens[rank] if rank < count else -1
        table.probs[slot, rank] = merged_probs[rank]


@njit
def observe(table: TableArrays, tail: np.ndarray, end: int, tokens: np.ndarray, probs: np.ndarray, keep: np.ndarray) -> None:
    """Write what the model announced after tail[.. end] to the rows of orders 1..MAX_ORDER.

    tokens [k] int32 best first (tokens[0] = -1: nothing is known, ignored), probs [k]; keep [MAX_ORDER + 1]: share of an
    existing row that stays, by order.
    """
    if tokens[0] < 0:
        return
    for order in range(1, MAX_ORDER + 1):
        if end + 1 < order or tail[end - order + 1] < 0:
            return
        slot = _slot(table, tail, end, order)
        table.clock[0] += 1
        if slot >= 0:
            _merge(table, slot, tokens, probs, keep[order])
        else:
            slot = ~slot
            if table.keys[slot, MAX_ORDER - 1] == _EMPTY:
                table.clock[1] += 1
            for back in range(MAX_ORDER):
                table.keys[slot, MAX_ORDER - 1 - back] = tail[end - back] if back < order else _EMPTY
            for rank in range(table.tokens.shape[1]):
                table.tokens[slot, rank] = tokens[rank]
                table.probs[slot, rank] = probs[rank]
        table.stamps[slot] = table.clock[0]


@njit
def _observe_many(table: TableArrays, tails: np.ndarray, first: int, tokens: np.ndarray, probs: np.ndarray, keep: np.ndarray) -> None:
    for row in range(len(tokens)):
        observe(table, tails, first + row, tokens[row], probs[row], keep)
