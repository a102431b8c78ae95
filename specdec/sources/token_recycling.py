"""AdjacencyTable: which tokens the model last considered likely after a token, and after a pair of tokens.

Token Recycling (Luo et al., arXiv 2408.08696) keeps, for each token, the k best next tokens of the last position at which it was
seen; Goose (arXiv 2604.02047) adds their scores and a table keyed by (previous token, token) that is asked first. Two rules:
each observation overwrites, and the last observation of a key wins. Worked example, k = 2::

    observe(prev=[5, 9], tokens=[7, 7], top=[[1, 2], [3, 4]])
    lookup(5, 7) -> [1, 2], tier 2      lookup(9, 7) -> [3, 4], tier 2      lookup(0, 7) -> [3, 4], tier 1

The pair table is bounded: sets of 8 slots, and a full set evicts by second chance (an entry that was written again since the
hand last passed it is spared once). Both tiers share one store of rows, so that a lookup is one row number: rows [0, V) belong
to the tokens, row V + slot to the pairs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from specdec._jit import njit, njit_allocating
from specdec.draft_tree import TopK

__all__ = ["BIGRAM", "NONE", "UNIGRAM", "AdjacencyTable", "Candidates", "TableArrays", "lookup_row"]

NONE, UNIGRAM, BIGRAM = 0, 1, 2  # tiers
WAYS = 8  # slots a set: its keys are one cache line
EMPTY = -1
FORMAT_VERSION = 1
_MAX_VOCAB = 1 << 31  # a key packs two token ids into one int64


class TableArrays(NamedTuple):
    """The table's storage, for numba kernels. S = V + C rows, C = bigram slots."""

    tokens: np.ndarray  # [S, k] int32, best first
    scores: np.ndarray  # [S, k] float32, as observed
    filled: np.ndarray  # [V] bool: row v of the store holds an observation
    keys: np.ndarray  # [C] int64: packed (prev, token) of row V + slot, or EMPTY
    recent: np.ndarray  # [C] bool: written again since the hand last passed
    hands: np.ndarray  # [C / WAYS] uint8: where the next eviction of a set starts


class Candidates(NamedTuple):
    """What the table knows about one key; all of length 0 at tier NONE."""

    tokens: np.ndarray  # [k] int32, best first
    scores: np.ndarray  # [k] float32
    tier: int  # NONE, UNIGRAM or BIGRAM


@njit
def _pack(prev: int, token: int) -> int:
    return int(prev) * 4294967296 + int(token)


@njit
def _first_slot(key: int, slots: int) -> int:
    """First slot of the key's set. Every product stays below 2**63, so that plain Python and numba agree."""
    mixed = (key >> 32) * 0x5BD1E995 ^ (key & 0x7FFFFFFF) * 0x2C1B3C6D
    mixed = ((mixed ^ mixed >> 29) & 0x7FFFFFFF) * 0x297A2D39
    return ((mixed ^ mixed >> 31) & (slots // WAYS - 1)) * WAYS


@njit
def lookup_row(keys: np.ndarray, filled: np.ndarray, prev: int, token: int) -> tuple[int, int]:
    """(row of the store, tier) for a pair, falling back to the token alone; (-1, NONE) if neither was observed.

    Args:
        keys: `TableArrays.keys`.
        filled: `TableArrays.filled`.
        prev: the token before, or any negative number if there is none.
        token: the token to continue; unknown ids are never found.
    """
    if token < 0 or token >= len(filled):
        return -1, NONE
    if prev >= 0:
        key = _pack(prev, token)
        first = _first_slot(key, len(keys))
        for slot in range(first, first + WAYS):
            if keys[slot] == key:
                return len(filled) + slot, BIGRAM
            if keys[slot] == EMPTY:
                break
    if filled[token]:
        return int(token), UNIGRAM
    return -1, NONE


@njit
def _claim_slot(keys: np.ndarray, recent: np.ndarray, hands: np.ndarray, key: int) -> int:
    """The slot that holds `key`, taken from another pair if its set is full."""
    first = _first_slot(key, len(keys))
    for slot in range(first, first + WAYS):
        if keys[slot] == key:
            recent[slot] = True
            return slot
        if keys[slot] == EMPTY:
            keys[slot] = key
            return slot
    group = first // WAYS
    hand = int(hands[group])
    while recent[first + hand]:
        recent[first + hand] = False
        hand = (hand + 1) % WAYS
    hands[group] = (hand + 1) % WAYS
    keys[first + hand] = key
    return first + hand


@njit
def _first_invalid(prev: np.ndarray, tokens: np.ndarray, top_tokens: np.ndarray, vocab_size: int) -> int:
    """Index of the first observation with an id out of the vocabulary, or -1."""
    for i in range(len(tokens)):
        valid = 0 <= tokens[i] < vocab_size and prev[i] < vocab_size
        for rank in range(top_tokens.shape[1]):
            valid = valid and 0 <= top_tokens[i, rank] < vocab_size
        if not valid:
            return i
    return -1


@njit
def _observe(
    store_tokens: np.ndarray, store_scores: np.ndarray, filled: np.ndarray, keys: np.ndarray, recent: np.ndarray,
    hands: np.ndarray, prev: np.ndarray, tokens: np.ndarray, top_tokens: np.ndarray, top_scores: np.ndarray,
) -> None:  # fmt: skip
    width = store_tokens.shape[1]
    for i in range(len(tokens)):
        token = tokens[i]
        filled[token] = True
        row = len(filled) + _claim_slot(keys, recent, hands, _pack(prev[i], token)) if prev[i] >= 0 else token
        for rank in range(width):
            store_tokens[token, rank] = top_tokens[i, rank]
            store_scores[token, rank] = top_scores[i, rank]
            store_tokens[row, rank] = top_tokens[i, rank]
            store_scores[row, rank] = top_scores[i, rank]


@njit_allocating
def _insert_pairs(
    store_tokens: np.ndarray, store_scores: np.ndarray, filled: np.ndarray, keys: np.ndarray, recent: np.ndarray,
    hands: np.ndarray, pair_keys: np.ndarray, pair_tokens: np.ndarray, pair_scores: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(pair_keys)):
        row = len(filled) + _claim_slot(keys, recent, hands, pair_keys[i])
        store_tokens[row] = pair_tokens[i]
        store_scores[row] = pair_scores[i]


class AdjacencyTable:
    """The k best next tokens after each token and after each recent pair of tokens.

    Memory is fixed: (V + C) * 8 k bytes for the rows and 9 C + V for the keys, committed by the system as rows are written.

    Args:
        vocab_size: V; ids must be in [0, V).
        k: candidates a key.
        bigram_capacity: C, most pairs kept, rounded up to a power of two.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(self, vocab_size: int, k: int = 8, bigram_capacity: int = 1 << 18) -> None:
        if not 1 <= vocab_size < _MAX_VOCAB:
            raise ValueError(f"vocab_size must be in [1, 2**31), got {vocab_size}")
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k must be in [1, vocab_size={vocab_size}], got {k}")
        if bigram_capacity < 1:
            raise ValueError(f"bigram_capacity must be >= 1 (pairs to keep), got {bigram_capacity}")
        self.vocab_size = vocab_size
        self.k = k
        slots = max(WAYS, 1 << (bigram_capacity - 1).bit_length())
        self._arrays = TableArrays(
            tokens=np.zeros((vocab_size + slots, k), np.int32),
            scores=np.zeros((vocab_size + slots, k), np.float32),
            filled=np.zeros(vocab_size, np.bool_),
            keys=np.full(slots, EMPTY, np.int64),
            recent=np.zeros(slots, np.bool_),
            hands=np.zeros(slots // WAYS, np.uint8),
        )

    @property
    def unigram_count(self) -> int:
        """Tokens observed."""
        return int(np.count_nonzero(self._arrays.filled))

    @property
    def bigram_count(self) -> int:
        """Pairs held now."""
        return int(np.count_nonzero(self._arrays.keys != EMPTY))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def arrays(self) -> TableArrays:
        """The live storage, for kernels that call `lookup_row`; valid for the table's whole life."""
        return self._arrays

    def observe(self, prev: np.ndarray, tokens: np.ndarray, top: TopK) -> None:
        """Record what the model expects after each of M positions; later rows overwrite earlier ones.

        Order the rows so that the accepted path comes last: it is the most trustworthy context of a token.

        Args:
            prev: [M] int64, the token before each position; negative: none (only the token's own row is written).
            tokens: [M] int64.
            top: at least k candidates a row, of which the first k are kept.

        Raises:
            ValueError: lengths differ, fewer than k candidates, or an id outside the vocabulary; nothing is written then.
        """
        prev = np.ascontiguousarray(prev, np.int64)
        tokens = np.ascontiguousarray(tokens, np.int64)
        top_tokens = np.ascontiguousarray(top.tokens, np.int32)
        top_scores = np.ascontiguousarray(top.probs, np.float32)
        if not len(prev) == len(tokens) == len(top_tokens) == len(top_scores):
            raise ValueError(
                f"prev, tokens and top must have one row a position, got {len(prev)}, {len(tokens)} and {len(top_tokens)} rows"
            )
        if top_tokens.shape != top_scores.shape or top_tokens.shape[1] < self.k:
            raise ValueError(f"top must hold at least k={self.k} candidates a row, got {top_tokens.shape} and {top_scores.shape}")
        invalid = int(_first_invalid(prev, tokens, top_tokens, self.vocab_size))
        if invalid >= 0:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}): row {invalid} has prev {prev[invalid]}, token {tokens[invalid]}, "
                f"candidates {top_tokens[invalid].tolist()}; was the table made for another tokenizer?"
            )
        _observe(*self._arrays, prev, tokens, top_tokens, top_scores)

    def lookup(self, prev: int, token: int) -> Candidates:
        """Candidates after (prev, token), else after token; they are views: copy to keep. `prev` < 0: no previous token."""
        arrays = self._arrays
        row, tier = lookup_row(arrays.keys, arrays.filled, prev, token)
        if tier == NONE:
            return Candidates(arrays.tokens[0, :0], arrays.scores[0, :0], NONE)
        return Candidates(arrays.tokens[row], arrays.scores[row], int(tier))

    def reset(self) -> None:
        """Forget every observation."""
        self._arrays.filled[:] = False
        self._arrays.keys[:] = EMPTY
        self._arrays.recent[:] = False
        self._arrays.hands[:] = 0

    def state(self) -> dict[str, np.ndarray]:
        """What was observed, as compact copies: U tokens and P pairs. The order of future evictions is not part of it."""
        tokens, scores, filled, keys, _, _ = self._arrays
        seen, slots = np.flatnonzero(filled), np.flatnonzero(keys != EMPTY)
        pairs = self.vocab_size + slots
        return {
            "header": np.array([FORMAT_VERSION, self.vocab_size, self.k], np.int64),
            "unigram_ids": seen,  # [U] int64
            "unigram_tokens": tokens[seen],  # [U, k] int32
            "unigram_scores": scores[seen],  # [U, k] float32
            "bigram_keys": keys[slots],  # [P] int64
            "bigram_tokens": tokens[pairs],  # [P, k] int32
            "bigram_scores": scores[pairs],  # [P, k] float32
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content by a `state()`, also of a table with another bigram capacity.

        Raises:
            ValueError: incomplete, of another vocabulary size or k, or damaged; the table is unchanged then.
        """
        arrays = _validated(state, self.vocab_size, self.k)
        self.reset()
        seen = arrays["unigram_ids"]
        self._arrays.filled[seen] = True
        self._arrays.tokens[seen] = arrays["unigram_tokens"]
        self._arrays.scores[seen] = arrays["unigram_scores"]
        _insert_pairs(*self._arrays, arrays["bigram_keys"], arrays["bigram_tokens"], arrays["bigram_scores"])

    def merge_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take in another table's `state()`: the rows of tokens and pairs that are unknown here; the own ones stay.

        Raises:
            ValueError: as load_state.
        """
        theirs, own = _validated(state, self.vocab_size, self.k), self.state()
        merged = {"header": own["header"]}
        for tier, key in (("unigram", "unigram_ids"), ("bigram", "bigram_keys")):
            new = ~np.isin(theirs[key], own[key])
            for name in (name for name in _LAYOUT if name.startswith(tier)):
                merged[name] = np.concatenate([theirs[name][new], own[name]])  # where a set is full, the later ones stay
        self.load_state(merged)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state()` as safetensors; a crash leaves the old file or the new one, never half of one."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(self.state(), partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the content by a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a file, or one for another vocabulary size or k; the table is unchanged then.
        """
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is not a safetensors file ({error}): delete it to start empty") from error
        try:
            self.load_state(state)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_LAYOUT = {
    "unigram_ids": (np.int64, 1), "unigram_tokens": (np.int32, 2), "unigram_scores": (np.float32, 2),
    "bigram_keys": (np.int64, 1), "bigram_tokens": (np.int32, 2), "bigram_scores": (np.float32, 2),
}  # fmt: skip


def _validated(state: Mapping[str, np.ndarray], vocab_size: int, k: int) -> dict[str, np.ndarray]:
    """The arrays of a state, checked so that no kernel can index out of bounds."""
    missing = sorted({"header", *_LAYOUT} - set(state))
    if missing:
        raise ValueError(f"not the state of an AdjacencyTable: {', '.join(missing)} missing")
    header = np.asarray(state["header"]).tolist()
    if header != [FORMAT_VERSION, vocab_size, k]:
        raise ValueError(
            f"the state has [format, vocab_size, k] = {header}, this table {[FORMAT_VERSION, vocab_size, k]}: "
            "use the model and k that it was saved with, or start with an empty table"
        )
    arrays = {}
    for name, (dtype, dims) in _LAYOUT.items():
        array = np.asarray(state[name])
        rows = len(state["unigram_ids" if name.startswith("unigram") else "bigram_keys"])
        if array.dtype != dtype or array.shape != ((rows,) if dims == 1 else (rows, k)):
            raise ValueError(f"damaged state: {name} is {array.dtype} {array.shape}, {rows} rows of k={k} were expected")
        arrays[name] = np.ascontiguousarray(array)
    keys = arrays["bigram_keys"]
    ids = (arrays["unigram_ids"], arrays["unigram_tokens"], keys >> 32, keys & 0xFFFFFFFF, arrays["bigram_tokens"])
    if any(part.size and (part.min() < 0 or part.max() >= vocab_size) for part in ids):
        raise ValueError(f"damaged state: a token id is outside [0, {vocab_size})")
    if not (np.isfinite(arrays["unigram_scores"]).all() and np.isfinite(arrays["bigram_scores"]).all()):
        raise ValueError("damaged state: a score is not finite")
    return arrays
