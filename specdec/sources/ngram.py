"""n-gram matching: an index of every n-gram of a token stream, and prompt lookup on top of it.

`NgramIndex` finds the earlier places where the last n tokens occurred, without a rescan: per n-gram length a hash table maps an
n-gram to the position of its last token in its most recent occurrence, and `previous` links each occurrence to the one
before it (design: drafting.md 4.2). Worked example, lengths 1 and 2, stream 7 8 9 7 8::

    position      0 1 2 3 4
    token         7 8 9 7 8
    unigram 7  -> 3 -> 0        the 8 at position 4 is not indexed yet: no token follows it
    bigram 7 8 -> 1             so a query of 7 8 finds position 1 and reads on: 9 7 8

Memory is bounded: past `capacity` tokens the older half of the stream is dropped and the rest is indexed anew.

`NgramSource` is prompt lookup decoding (PLD, drafting.md 4.1): the continuation of the longest match.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from specdec._jit import njit
from specdec.sequence import Sequence
from specdec.sources.base import Chain

__all__ = ["SEPARATOR", "IndexArrays", "NgramIndex", "NgramSource", "find", "match_length"]

SEPARATOR = -1  # between two texts in one stream; no n-gram that holds it is indexed
_MODULUS = 2147483647
_FACTOR = 1000003
_FIRST_CAPACITY = 1 << 10


class IndexArrays(NamedTuple):
    """The index as numba sees it. L n-gram lengths, C tokens of capacity, H = 2C slots a length."""

    tokens: np.ndarray  # [C] int32
    lengths: np.ndarray  # [L] int64, ascending
    heads: np.ndarray  # [L, H] int32: last position of the most recent occurrence, -1: empty slot
    previous: np.ndarray  # [L, C] int32: the occurrence before this one, -1: none


@njit
def _hash(tokens: np.ndarray, end: int, length: int) -> int:
    """Hash of tokens[end - length + 1 .. end], or -1 where one of them is a separator."""
    value = length
    for position in range(end - length + 1, end + 1):
        token = int(tokens[position])
        if token < 0:
            return -1
        value = (value * _FACTOR + token + 1) % _MODULUS
    return value * _FACTOR % _MODULUS  # spreads n-grams that differ in the last token


@njit
def _same(left: np.ndarray, left_end: int, right: np.ndarray, right_end: int, length: int) -> bool:
    """Whether the `length` tokens that end at the two positions are equal."""
    for back in range(length):
        if left[left_end - back] != right[right_end - back]:
            return False
    return True


@njit
def _slot(index: IndexArrays, row: int, tokens: np.ndarray, end: int) -> int:
    """Slot of the n-gram of lengths[row] that ends at tokens[end] (its own, or an empty one), -1: not indexable."""
    length = index.lengths[row]
    value = _hash(tokens, end, length)
    if value < 0:
        return -1
    mask = index.heads.shape[1] - 1
    slot = value & mask
    while index.heads[row, slot] >= 0 and not _same(tokens, end, index.tokens, index.heads[row, slot], length):
        slot = (slot + 1) & mask
    return slot


@njit
def find(index: IndexArrays, row: int, tokens: np.ndarray, end: int) -> int:
    """Last position of the most recent occurrence of the n-gram of lengths[row] ending at tokens[end], or -1.

    `tokens` may be any int32 array, e.g. the tail of a draft path; negative tokens match nothing.
    """
    if end + 1 < index.lengths[row]:
        return -1
    slot = _slot(index, row, tokens, end)
    return -1 if slot < 0 else int(index.heads[row, slot])


@njit
def match_length(index: IndexArrays, position: int, tokens: np.ndarray, end: int, limit: int) -> int:
    """How many tokens ending at index position `position` equal those ending at tokens[end], at most `limit`."""
    limit = min(limit, min(position, end) + 1)
    length = 0
    while length < limit and tokens[end - length] >= 0 and index.tokens[position - length] == tokens[end - length]:
        length += 1
    return length


@njit
def _link(index: IndexArrays, first: int, last: int) -> None:
    """Index the n-grams that end at positions first .. last - 1; each must have a follower already."""
    for position in range(first, last):
        for row in range(len(index.lengths)):
            if position + 1 < index.lengths[row]:
                continue
            slot = _slot(index, row, index.tokens, position)
            if slot >= 0:
                index.previous[row, position] = index.heads[row, slot]
                index.heads[row, slot] = position


class NgramIndex:
    """Bounded, incremental n-gram index of one token stream.

    Args:
        lengths: n-gram lengths, each in 1..32.
        capacity: most tokens kept, >= 64.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, lengths: Seq[int] = (1, 2, 3, 4, 6, 8), capacity: int = 1 << 17) -> None:
        if not lengths or min(lengths) < 1 or max(lengths) > 32:
            raise ValueError(f"lengths must be n-gram lengths in 1..32, got {list(lengths)!r}")
        if capacity < 64:
            raise ValueError(f"capacity must be at least 64 tokens, got {capacity}")
        self.capacity = capacity
        self.size = 0
        self._lengths = np.array(sorted(set(lengths)), np.int64)
        self.arrays = self._allocate(min(_FIRST_CAPACITY, capacity))

    @property
    def tokens(self) -> np.ndarray:
        """The stream as it is kept now, [size] int32."""
        return self.arrays.tokens[: self.size]

    def extend(self, tokens: Seq[int] | np.ndarray) -> None:
        """Append tokens (SEPARATOR allowed) and index every n-gram that has got a follower."""
        new = np.asarray(tokens, np.int32)[-self.capacity :]
        if self.size + len(new) > len(self.arrays.tokens):
            self._make_room(len(new))
        before = self.size
        self.arrays.tokens[before : before + len(new)] = new
        self.size += len(new)
        _link(self.arrays, max(0, before - 1), self.size - 1)

    def clear(self) -> None:
        """Forget everything."""
        self.size = 0
        self.arrays = self._allocate(min(_FIRST_CAPACITY, self.capacity))

    def _make_room(self, new: int) -> None:
        """Double the arrays, or at full capacity keep the newer half of the stream; either way index anew."""
        kept = self.tokens.copy()
        size = len(self.arrays.tokens)
        if len(kept) + new > self.capacity:
            kept = kept[max(0, len(kept) - min(self.capacity // 2, self.capacity - new)) :] if new < self.capacity else kept[:0]
        while size < min(len(kept) + new, self.capacity):
            size = min(2 * size, self.capacity)
        self.arrays = self._allocate(size)
        self.arrays.tokens[: len(kept)] = kept
        self.size = len(kept)
        _link(self.arrays, 0, self.size - 1)

    def _allocate(self, size: int) -> IndexArrays:
        slots = 1 << (2 * size - 1).bit_length()
        rows = len(self._lengths)
        return IndexArrays(
            np.zeros(size, np.int32), self._lengths, np.full((rows, slots), -1, np.int32), np.full((rows, size), -1, np.int32)
        )


class NgramSource:
    """Prompt lookup: the longest n-gram match of a request in its own text, most recent occurrence first.

    Of the matches of the longest length, the most recent one that has a full continuation wins; where none has, the one with
    the longest continuation (drafting.md 4.1, "choice of occurrence").

    Args:
        lengths: n-gram lengths that are tried, longest first.
        capacity: most tokens of one request that are indexed.
        max_occurrences: how many occurrences of one n-gram are looked at.
    """

    def __init__(self, lengths: Seq[int] = (1, 2, 3), capacity: int = 1 << 17, max_occurrences: int = 32) -> None:
        if max_occurrences < 1:
            raise ValueError(f"max_occurrences must be at least 1, got {max_occurrences}")
        self.lengths = tuple(lengths)
        self.capacity = capacity
        self.max_occurrences = max_occurrences
        self._indexes: dict[int, NgramIndex] = {}
        NgramIndex(self.lengths, capacity)  # raises now rather than at the first request

    def start(self, seq: Sequence) -> None:
        """Index the prompt."""
        index = NgramIndex(self.lengths, self.capacity)
        index.extend(seq.token_ids)
        self._indexes[seq.id] = index

    def chain(self, seq: Sequence, max_len: int) -> Chain:
        """The continuation of the longest match, at most `max_len` tokens; empty where nothing matches."""
        index = self._indexes[seq.id]
        tail = np.asarray(seq.token_ids[-max(self.lengths) :], np.int32)
        for row in range(len(index.arrays.lengths) - 1, -1, -1):
            ends = self._occurrences(index.arrays, row, tail)
            if ends:
                return self._continuation(index, ends, int(index.arrays.lengths[row]), max_len)
        return Chain(np.empty(0, np.int64), 0, 0.0, 0.0)

    def update(self, seq: Sequence, emitted: Seq[int]) -> None:
        """Index the tokens that were just appended to `seq`."""
        self._indexes[seq.id].extend(emitted)

    def finish(self, seq: Sequence) -> None:
        """Free the request's index."""
        self._indexes.pop(seq.id, None)

    def reset(self) -> None:
        """Nothing outlives a request."""
        self._indexes.clear()

    def _occurrences(self, arrays: IndexArrays, row: int, tail: np.ndarray) -> list[int]:
        ends: list[int] = []
        end = find(arrays, row, tail, len(tail) - 1)
        while end >= 0 and len(ends) < self.max_occurrences:
            ends.append(end)
            end = int(arrays.previous[row, end])
        return ends

    def _continuation(self, index: NgramIndex, ends: list[int], length: int, max_len: int) -> Chain:
        best = next((end for end in ends if index.size - 1 - end >= max_len), ends[-1])
        tokens = index.tokens[best + 1 : best + 1 + max_len].astype(np.int64)
        agree = sum(index.tokens[end + 1] == tokens[0] for end in ends) / len(ends) if len(tokens) else 0.0
        return Chain(tokens, length, agree, agree * len(tokens))
