"""Table of next-token guesses keyed by the last one, two and three tokens.

Token Recycling (arXiv 2408.08696, drafting.md 3) keeps the most probable next tokens the model ever announced after a token;
this table keeps them after the last `order` tokens, order 1..3, in one bounded hash table, with their probabilities. A row that
is observed again is merged with what it held (`keep` of the old mass stays), so that one odd context does not wipe it out.
Worked example after observing the model at "the cat sat" -> {on: .6, down: .3}::

    order 3  (the, cat, sat) -> on .6, down .3
    order 2  (cat, sat)      -> on .6, down .3
    order 1  (sat)           -> on .3 + what "sat" announced elsewhere, halved
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from specdec._jit import njit, njit_allocating
from specdec.draft_tree import TopK

__all__ = ["MAX_ORDER", "ContextTable", "TableArrays", "lookup"]

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
    merged_tokens: np.ndarray  # [2k] int32, scratch of a write
    merged_probs: np.ndarray  # [2k] float32, scratch of a write


_STATE = TableArrays._fields[:5]


@njit
def _slot(table: TableArrays, tail: np.ndarray, end: int, order: int) -> int:
    """Slot of the context tail[end - order + 1 .. end], or ~slot (negative) of the place where it would be written."""
    value = order
    for position in range(end - order + 1, end + 1):
        value = (value * _FACTOR + int(tail[position]) + 1) % _MODULUS
    value = value * _FACTOR % _MODULUS  # spreads contexts that differ in the last token
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
    merged_tokens, merged_probs = table.merged_tokens, table.merged_probs
    merged_probs[:] = 0.0
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
def _observe_many(
    table: TableArrays, text: np.ndarray, first: int, tokens: np.ndarray, probs: np.ndarray, keep: np.ndarray
) -> None:
    for row in range(len(tokens)):
        observe(table, text, first + row, tokens[row], probs[row], keep)


@njit
def _observe_nodes(
    table: TableArrays, tails: np.ndarray, accepted: np.ndarray, tokens: np.ndarray, probs: np.ndarray, keep: np.ndarray
) -> None:
    passed = 0
    for node in range(len(tokens)):
        if passed < len(accepted) and accepted[passed] == node:
            passed += 1
        else:
            observe(table, tails[node], tails.shape[1] - 1, tokens[node], probs[node], keep)
    for node in accepted:
        observe(table, tails[node], tails.shape[1] - 1, tokens[node], probs[node], keep)


@njit_allocating
def _rehash(old: TableArrays, new: TableArrays) -> None:
    """Move all rows to a larger table; oldest rows give way where a probe window is full."""
    for row in range(len(old.keys)):
        if old.keys[row, MAX_ORDER - 1] == _EMPTY:
            continue
        order = MAX_ORDER
        while old.keys[row, MAX_ORDER - order] == _EMPTY:
            order -= 1
        slot = ~_slot(new, old.keys[row], MAX_ORDER - 1, order)
        if new.keys[slot, MAX_ORDER - 1] == _EMPTY:
            new.clock[1] += 1
        new.keys[slot], new.stamps[slot] = old.keys[row], old.stamps[row]
        new.tokens[slot], new.probs[slot] = old.tokens[row], old.probs[row]
    new.clock[0] = old.clock[0]


def _newest(keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """Indices of one row a key, the one with the largest stamp (of equals the first), by ascending stamp."""
    order = np.lexsort((-stamps, *keys.T))  # stable
    ordered = keys[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept = order[first]
    return kept[np.argsort(stamps[kept], kind="stable")]


class ContextTable:
    """Bounded table of the model's own next-token guesses by the last 1..3 tokens.

    Args:
        k: tokens a row, 1..8.
        capacity: most rows, a power of two; 80 bytes each at k = 8. The table starts small and doubles as it fills.
        keep: share of an existing row that stays when orders 1, 2, 3 are observed again, each in [0, 1).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, k: int = 8, capacity: int = 1 << 18, keep: tuple[float, float, float] = (0.5, 0.3, 0.0)) -> None:
        if not 1 <= k <= 8:
            raise ValueError(f"k must be 1..8 tokens a row, got {k}")
        if capacity < 64 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two of at least 64 rows, got {capacity}")
        if len(keep) != MAX_ORDER or not all(0 <= share < 1 for share in keep):
            raise ValueError(f"keep must be {MAX_ORDER} shares in [0, 1), got {keep!r}")
        self.k = k
        self.capacity = capacity
        self._keep = np.array([0.0, *keep])
        self.clear()

    def __len__(self) -> int:
        """Rows in use."""
        return int(self.arrays.clock[1])

    def clear(self) -> None:
        """Forget everything. Grown once from the smallest size, so that the growing is compiled with the rest, not in a later step."""
        self.arrays = self._allocate(64)
        self._make_room(min(1 << 12, self.capacity // 2))

    def observe_text(self, tokens: np.ndarray, first: int, top: TopK) -> None:
        """Harvest a prompt: row i of `top` is what the model expects after tokens[first + i] (int32)."""
        self._make_room(MAX_ORDER * len(top.tokens))
        _observe_many(self.arrays, tokens, first, top.tokens, top.probs, self._keep)

    def observe_nodes(self, tails: np.ndarray, accepted: np.ndarray, top: TopK) -> None:
        """Learn from the N nodes of a tree, tails [N, T] int32 ending in each; the accepted ones (ascending) have the last word."""
        self._make_room(MAX_ORDER * len(top.tokens))
        _observe_nodes(self.arrays, tails, accepted, top.tokens, top.probs, self._keep)

    def state(self) -> dict[str, np.ndarray]:
        """The rows in use, for `load_state`."""
        used = np.flatnonzero(self.arrays.keys[:, -1] != _EMPTY)
        names = ("keys", "stamps", "tokens", "probs")
        return {name: getattr(self.arrays, name)[used] for name in names} | {"clock": self.arrays.clock.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content by a saved one.

        Raises:
            ValueError: arrays are missing or do not fit together, hold more tokens a row than k, or numbers that no table has;
                nothing is changed then.
        """
        self._replace(self.checked(state))

    def merge_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take in another table's rows. Where both know a context, the row with the larger stamp stays, on a tie the own one.

        Tables that began with one state count their writes on from its clock, so that a row which only one of them has written
        since is that one's. Where that is more than the table holds, the rows written last stay.

        Raises:
            ValueError: as load_state; nothing is changed then.
        """
        own, theirs = self.state(), self.checked(state)
        both = {name: np.concatenate([own[name], theirs[name]]) for name in own if name != "clock"}
        self._replace({**both, "clock": np.maximum(own["clock"], theirs["clock"])})

    def checked(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a `state()`, fit for the kernels.

        Raises:
            ValueError: as load_state.
        """
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise ValueError(f"state lacks {missing}; pass what ContextTable.state() returned")
        rows = len(state["keys"])
        shapes = {"keys": (rows, MAX_ORDER), "stamps": (rows,), "tokens": (rows, self.k), "probs": (rows, self.k), "clock": (2,)}
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(
                    f"state[{name!r}] has shape {state[name].shape}, expected {shape}: saved with another k or damaged"
                )
            if state[name].dtype != getattr(self.arrays, name).dtype:
                raise ValueError(f"state[{name!r}] is {state[name].dtype}, expected {getattr(self.arrays, name).dtype}: damaged")
        keys, probs = state["keys"], state["probs"]
        padded = (keys[:, 1:] >= 0) | ((keys[:, 1:] == _EMPTY) & (keys[:, :-1] == _EMPTY))  # no gap behind a token
        if not (padded.all() and (keys[:, -1] >= 0).all() and (keys >= _EMPTY).all() and (keys != -1).all()):
            raise ValueError("state['keys'] holds what is no context: damaged")
        if (state["tokens"] < -1).any() or (state["stamps"] < 0).any() or (state["clock"] < 0).any():
            raise ValueError("state holds negative tokens, stamps or clocks: damaged")
        if not ((probs >= 0) & (probs <= 1.001)).all():
            raise ValueError("state['probs'] must be in [0, 1]: damaged")
        return {name: np.ascontiguousarray(state[name]) for name in _STATE}

    def _replace(self, state: dict[str, np.ndarray]) -> None:
        """Hold these rows and no others."""
        kept = _newest(state["keys"], state["stamps"])
        rows = {name: state[name][kept] for name in _STATE if name != "clock"}
        self.clear()
        self._make_room(len(kept))
        _rehash(self.arrays._replace(**rows, clock=state["clock"]), self.arrays)

    def _make_room(self, new: int) -> None:
        """Double while `new` rows more than fill half of the slots."""
        slots = len(self.arrays.keys)
        while slots < self.capacity and 2 * (len(self) + new) > slots:
            slots *= 2
        if slots > len(self.arrays.keys):
            old, self.arrays = self.arrays, self._allocate(slots)
            _rehash(old, self.arrays)

    def _allocate(self, slots: int) -> TableArrays:
        return TableArrays(
            np.full((slots, MAX_ORDER), _EMPTY, np.int32), np.zeros(slots, np.int64), np.full((slots, self.k), -1, np.int32),
            np.zeros((slots, self.k), np.float32), np.zeros(2, np.int64), np.empty(2 * self.k, np.int32),
            np.empty(2 * self.k, np.float32),
        )  # fmt: skip
