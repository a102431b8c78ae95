"""Suffix automaton: the longest suffix of the text that occurred before, and what most often followed it.

The automaton of SAM-Decoding (arXiv 2411.10666) finds the match in O(1) amortised a token; the counts and the draft length tied
to the match are SuffixDecoding's (arXiv 2411.04975). Two rules: the match is the suffix link of the whole text, so the query is
never its own match; each token is a vote for itself at every state whose strings it continues. Worked example::

    text   1 2 3 9 1 2 3 8 1 2 3        match: 1 2 3 (length 3), two occurrences, followed by 9 once and by 8 once
    chain  8 1 2 (3 8 1 ...)             a tie goes to the most recent; agreement 1/2; cut where it is less likely than `floor`

Memory: at most 2 states and 3 transitions a token, in flat arrays that double: at most 136 bytes a token of capacity, of which
texts use 65 to 91.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from specdec._jit import njit
from specdec.sequence import Sequence
from specdec.sources.base import Chain

__all__ = ["SEPARATOR", "SuffixAutomaton", "SuffixSource"]

SEPARATOR = -1  # a token that is never drafted: no continuation runs across it
ROOT = 0
NONE = -1

# columns of a state [5] int32: longest string, suffix link, votes cast, edge with the most votes, first edge of its list
LENGTH, LINK, VOTES, BEST, HEAD = 0, 1, 2, 3, 4
# columns of an edge [5] int32: from state, by token, to state, votes for it, next edge of the same state
STATE, TOKEN, TARGET, COUNT, NEXT = 0, 1, 2, 3, 4
# sizes [4] int64
STATES, EDGES, LAST, TOKENS = 0, 1, 2, 3

# On text that repeats itself the suffix links form a chain as long as the text. A token votes at this many states, longest
# first: those are the ones that a match reaches; the structure itself stays exact.
VOTE_DEPTH = 32
# Doubt, in votes, about what followed a match of one token; it shrinks as 1 / match length. With 3 the scores are calibrated
# (replayed reference answers of HumanEval, HumanEvalFix, GSM8K, MATH; 1 promises 1.6 times what is accepted, 4 too little).
_PRIOR = 3.0


@njit
def _bucket(state: int, token: int, mask: int) -> int:
    """Home bucket of an edge. Every product stays below 2**63, so that plain Python and numba agree."""
    mixed = int(state) * 0x5BD1E995 ^ (int(token) + 1) * 0x2C1B3C6D
    mixed = ((mixed ^ mixed >> 29) & 0x7FFFFFFF) * 0x297A2D39
    return int((mixed ^ mixed >> 31) & mask)


@njit
def _find(edges: np.ndarray, buckets: np.ndarray, state: int, token: int) -> int:
    """The edge that leaves `state` by `token`, or NONE."""
    mask = len(buckets) - 1
    bucket = _bucket(state, token, mask)
    while buckets[bucket] != 0:
        edge = int(buckets[bucket]) - 1
        if edges[edge, STATE] == state and edges[edge, TOKEN] == token:
            return edge
        bucket = (bucket + 1) & mask
    return NONE


@njit
def _file(edges: np.ndarray, buckets: np.ndarray, edge: int) -> None:
    """Enter an edge into the hash table; a bucket holds edge + 1, and 0 is free."""
    mask = len(buckets) - 1
    bucket = _bucket(edges[edge, STATE], edges[edge, TOKEN], mask)
    while buckets[bucket] != 0:
        bucket = (bucket + 1) & mask
    buckets[bucket] = edge + 1


@njit
def _refile(edges: np.ndarray, buckets: np.ndarray, count: int) -> None:
    for edge in range(count):
        _file(edges, buckets, edge)


@njit
def _add_state(states: np.ndarray, sizes: np.ndarray, length: int, link: int) -> int:
    state = int(sizes[STATES])
    sizes[STATES] += 1
    states[state, LENGTH] = length
    states[state, LINK] = link
    states[state, VOTES] = 0
    states[state, BEST] = NONE
    states[state, HEAD] = NONE
    return state


@njit
def _add_edge(
    states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, sizes: np.ndarray, state: int, token: int, target: int
) -> int:
    edge = int(sizes[EDGES])
    sizes[EDGES] += 1
    edges[edge, STATE] = state
    edges[edge, TOKEN] = token
    edges[edge, TARGET] = target
    edges[edge, COUNT] = 0
    edges[edge, NEXT] = states[state, HEAD]
    states[state, HEAD] = edge
    _file(edges, buckets, edge)
    return edge


@njit
def _vote(states: np.ndarray, edges: np.ndarray, edge: int) -> None:
    """The text took this edge once more; on a tie the most recent leads."""
    if edges[edge, TOKEN] == SEPARATOR:
        return
    state = edges[edge, STATE]
    edges[edge, COUNT] += 1
    states[state, VOTES] += 1
    best = states[state, BEST]
    if best == NONE or edges[edge, COUNT] >= edges[best, COUNT]:
        states[state, BEST] = edge


@njit
def _clone(states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, sizes: np.ndarray, state: int, length: int) -> int:
    """Split off the strings of `state` up to `length`: until now both have occurred at the same places, so votes are copied."""
    clone = _add_state(states, sizes, length, states[state, LINK])
    states[state, LINK] = clone
    states[clone, VOTES] = states[state, VOTES]
    edge = states[state, HEAD]
    while edge != NONE:
        copy = _add_edge(states, edges, buckets, sizes, clone, edges[edge, TOKEN], edges[edge, TARGET])
        edges[copy, COUNT] = edges[edge, COUNT]
        if edge == states[state, BEST]:
            states[clone, BEST] = copy
        edge = edges[edge, NEXT]
    return clone


@njit
def _suffix_state(states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, sizes: np.ndarray, state: int, edge: int) -> int:
    """The state of (longest string of `state`) + token of `edge`, split from a state with longer strings if need be."""
    target = int(edges[edge, TARGET])
    length = int(states[state, LENGTH]) + 1
    if states[target, LENGTH] == length:
        return target
    clone = _clone(states, edges, buckets, sizes, target, length)
    token = edges[edge, TOKEN]
    while edge != NONE and edges[edge, TARGET] == target:
        edges[edge, TARGET] = clone
        state = states[state, LINK]
        edge = _find(edges, buckets, state, token) if state != NONE else NONE
    return clone


@njit
def _append(states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, sizes: np.ndarray, token: int) -> None:
    """One step of the online construction (Blumer et al. 1985), with votes."""
    state = int(sizes[LAST])
    new = _add_state(states, sizes, states[state, LENGTH] + 1, ROOT)
    edge = NONE
    while state != NONE:
        edge = _find(edges, buckets, state, token)
        if edge != NONE:
            break
        _vote(states, edges, _add_edge(states, edges, buckets, sizes, state, token, new))
        state = states[state, LINK]
    if edge != NONE:
        states[new, LINK] = _suffix_state(states, edges, buckets, sizes, state, edge)
    for _ in range(VOTE_DEPTH):
        if state == NONE:
            break
        _vote(states, edges, _find(edges, buckets, state, token))
        state = states[state, LINK]
    sizes[LAST] = new


@njit
def _extend(
    states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, sizes: np.ndarray, text: np.ndarray, tokens: np.ndarray
) -> None:
    for token in tokens:
        text[sizes[TOKENS]] = token
        sizes[TOKENS] += 1
        _append(states, edges, buckets, sizes, token)


@njit
def _locate(states: np.ndarray, edges: np.ndarray, buckets: np.ndarray, query: np.ndarray) -> tuple[int, int]:
    """(state, length) of the longest suffix of `query` that occurs in the text."""
    state, length = ROOT, 0
    for token in query:
        edge = _find(edges, buckets, state, token)
        while edge == NONE and state != ROOT:
            state = int(states[state, LINK])
            length = int(states[state, LENGTH])
            edge = _find(edges, buckets, state, token)
        if edge != NONE:
            state = int(edges[edge, TARGET])
            length += 1
    return state, length


@njit
def _follow(states: np.ndarray, edges: np.ndarray, state: int, length: int, floor: float, out: np.ndarray) -> tuple[int, float]:
    """Write the most frequent continuation of a match into `out`; returns (tokens written, expected number accepted).

    A token is worth drafting while the product of the estimates up to it is at least `floor`.
    """
    path, score = 1.0, 0.0
    for count in range(len(out)):
        while state != ROOT and states[state, BEST] == NONE:  # the end of the text: go on with less context
            state = int(states[state, LINK])
            length = min(length, int(states[state, LENGTH]))
        if state == ROOT:
            return count, score
        edge = int(states[state, BEST])
        path *= edges[edge, COUNT] / (states[state, VOTES] + _PRIOR / length)
        if path < floor:
            return count, score
        out[count] = edges[edge, TOKEN]
        score += path
        state = int(edges[edge, TARGET])
        length += 1
    return len(out), score


def _free_buckets(capacity: int) -> np.ndarray:
    """Hash table for 3 edges a token: at most three quarters full."""
    return np.zeros(1 << (4 * capacity - 1).bit_length(), np.int32)


class SuffixAutomaton:
    """All substrings of a growing token text, each with what followed it.

    Extending costs O(1) amortised a token, whatever the length of the text. A text longer than `max_tokens` is rebuilt from its
    most recent half: a pause of max_tokens / 2 extensions every max_tokens / 2 tokens.

    Args:
        capacity: tokens to reserve memory for; it doubles when needed.
        max_tokens: bound of the text.
        floor: a chain ends where its estimated probability falls below this.

    Raises:
        ValueError: a number is out of range.
    """

    _states: np.ndarray  # [2 capacity + 1, 5] int32
    _edges: np.ndarray  # [3 capacity, 5] int32
    _buckets: np.ndarray  # [power of two >= 4 capacity] int32: edge + 1 by hash of (state, token); 0: free
    _text: np.ndarray  # [capacity] int32
    _sizes: np.ndarray  # [4] int64

    def __init__(self, capacity: int = 1024, max_tokens: int = 1 << 17, floor: float = 0.1) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1 (tokens to reserve), got {capacity}")
        if not 2 <= max_tokens <= 1 << 28:
            raise ValueError(f"max_tokens must be in [2, 2**28], got {max_tokens}")
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {floor}")
        self.max_tokens = max_tokens
        self.floor = floor
        self._allocate(min(capacity, max_tokens))
        self._clear()

    def __len__(self) -> int:
        return int(self._sizes[TOKENS])

    @property
    def text(self) -> np.ndarray:
        """The tokens held now, [len(self)] int32; a view."""
        return self._text[: len(self)]

    @property
    def state_count(self) -> int:
        return int(self._sizes[STATES])

    @property
    def edge_count(self) -> int:
        return int(self._sizes[EDGES])

    @property
    def nbytes(self) -> int:
        return self._states.nbytes + self._edges.nbytes + self._buckets.nbytes + self._text.nbytes

    def extend(self, tokens: Seq[int] | np.ndarray) -> None:
        """Append tokens (>= 0, or SEPARATOR).

        Raises:
            ValueError: a token is not in [-1, 2**31 - 1).
        """
        new = np.ascontiguousarray(tokens, np.int64)
        if new.size and (new.min() < SEPARATOR or new.max() >= 2**31 - 1):
            raise ValueError(f"tokens must be in [-1, 2**31 - 1), got {new.min()} to {new.max()}")
        if len(self) + len(new) > self.max_tokens:
            new = np.concatenate([self.text, new])[-max(1, self.max_tokens // 2) :]
            self.reset()
        if len(self) + len(new) > len(self._text):
            self._grow(len(self) + len(new))
        _extend(self._states, self._edges, self._buckets, self._sizes, self._text, new)

    def match(self) -> int:
        """Length of the longest suffix of the text that also ends at an earlier position (the two may overlap)."""
        return int(self._states[self._match_state(), LENGTH])

    def chain(self, max_len: int) -> Chain:
        """The most frequent continuation of that match, at most `max_len` tokens."""
        return self._chain(self._match_state(), self.match(), max_len)

    def match_of(self, query: Seq[int] | np.ndarray) -> int:
        """Length of the longest suffix of another text that occurs in this one."""
        return int(_locate(self._states, self._edges, self._buckets, np.ascontiguousarray(query, np.int64))[1])

    def chain_after(self, query: Seq[int] | np.ndarray, max_len: int) -> Chain:
        """The most frequent continuation of the longest suffix of another text that occurs in this one."""
        state, length = _locate(self._states, self._edges, self._buckets, np.ascontiguousarray(query, np.int64))
        return self._chain(int(state), int(length), max_len)

    def reset(self) -> None:
        """Forget the text, keep the memory."""
        self._buckets = _free_buckets(len(self._text))
        self._clear()

    def _clear(self) -> None:
        self._sizes = np.zeros(4, np.int64)
        _add_state(self._states, self._sizes, 0, NONE)

    def _match_state(self) -> int:
        return max(ROOT, int(self._states[self._sizes[LAST], LINK]))

    def _chain(self, state: int, length: int, max_len: int) -> Chain:
        if state == ROOT or max_len < 1:
            return Chain.empty(length)
        tokens = np.empty(max_len, np.int64)
        count, score = _follow(self._states, self._edges, state, length, self.floor, tokens)
        if count == 0:
            return Chain.empty(length)
        return Chain(tokens[:count], length, self._agreement(state), float(score))

    def _agreement(self, state: int) -> float:
        while self._states[state, BEST] == NONE:
            state = int(self._states[state, LINK])
        return float(self._edges[self._states[state, BEST], COUNT] / self._states[state, VOTES])

    def _allocate(self, capacity: int) -> None:
        """A suffix automaton of n tokens has at most 2 n states and 3 n transitions; pages are committed as they are used."""
        self._states = np.empty((2 * capacity + 1, 5), np.int32)
        self._edges = np.empty((3 * capacity, 5), np.int32)
        self._buckets = _free_buckets(capacity)
        self._text = np.empty(capacity, np.int32)

    def _grow(self, needed: int) -> None:
        states, edges, text, (n_states, n_edges) = self._states, self._edges, self.text, self._sizes[:2]
        self._allocate(min(self.max_tokens, max(needed, 2 * len(self._text))))
        self._states[:n_states] = states[:n_states]
        self._edges[:n_edges] = edges[:n_edges]
        self._text[: len(text)] = text
        _refile(self._edges, self._buckets, n_edges)


class SuffixSource:
    """Chains from each request's own text (prompt and output) and from the outputs of all requests.

    The own text adapts at once; the shared one knows what earlier and parallel requests wrote. The longer match wins, and the
    shared one must be longer by more than `local_bias`. A draft is at most `floor(factor * match_length + offset)` tokens long:
    weak evidence makes short drafts. Outputs reach the shared text in blocks of `share_every` tokens, each closed by SEPARATOR.

    Args:
        factor: drafted tokens for each matched token.
        offset: drafted tokens added to that.
        min_match: shorter matches draft nothing.
        local_bias: tokens by which a shared match must be longer than the own one.
        max_tokens: bound of each request's text and of the shared one (see `SuffixAutomaton`).
        share_every: block length of the shared text; 0 shares nothing.
        context: most tokens of context that are looked up in the shared text.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, factor: float = 2.0, offset: float = 0.0, min_match: int = 1, local_bias: int = 0, max_tokens: int = 1 << 17,
        share_every: int = 256, context: int = 32,
    ) -> None:  # fmt: skip
        if factor < 0 or not math.isfinite(factor) or not math.isfinite(offset):
            raise ValueError(f"factor must be >= 0 and offset a number, both finite, got {factor} and {offset}")
        checks = [
            ("min_match", min_match, 1),
            ("local_bias", local_bias, 0),
            ("share_every", share_every, 0),
            ("context", context, 1),
        ]
        for name, value, low in checks:
            if value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        self.factor, self.offset, self.min_match, self.local_bias = factor, offset, min_match, local_bias
        self.max_tokens, self.share_every, self.context = max_tokens, share_every, context
        self._local: dict[int, SuffixAutomaton] = {}  # by seq.id
        self._unshared: dict[int, list[int]] = {}  # by seq.id: outputs not in the shared text yet
        self._shared = SuffixAutomaton(max_tokens=max_tokens)

    @property
    def remembers(self) -> bool:
        """Whether a request's chains depend on earlier requests."""
        return self.share_every > 0

    def start(self, seq: Sequence) -> None:
        """Index the prompt."""
        # Without room to spare: it doubles at the first token, so that growing is compiled with the rest and not in a later step.
        automaton = SuffixAutomaton(capacity=len(seq.token_ids), max_tokens=self.max_tokens)
        automaton.extend(seq.token_ids)
        self._local[seq.id] = automaton
        self._unshared[seq.id] = []

    def chain(self, seq: Sequence, max_len: int) -> Chain:
        """The better of the two continuations; empty without a match of `min_match` tokens."""
        local = self._local[seq.id]
        own_length = local.match()
        shared_length = 0
        if len(self._shared):
            query = np.array(seq.token_ids[-self.context :], np.int64)
            shared_length = self._shared.match_of(query)
        if shared_length > own_length + self.local_bias:
            chain = self._shared.chain_after(query, self._cap(shared_length, max_len))
            if len(chain):
                return chain
        return local.chain(self._cap(own_length, max_len))

    def update(self, seq: Sequence, emitted: Seq[int]) -> None:
        """Index what was emitted."""
        self._local[seq.id].extend(emitted)
        if self.share_every:
            self._unshared[seq.id].extend(emitted)
            if len(self._unshared[seq.id]) >= self.share_every:
                self._share(seq.id)

    def finish(self, seq: Sequence) -> None:
        """Free the request's own text; its output stays in the shared one. Unknown requests are ignored."""
        if self._local.pop(seq.id, None) is not None:
            self._share(seq.id)
            del self._unshared[seq.id]

    def reset(self) -> None:
        """Forget the shared text; running requests keep their own."""
        self._shared = SuffixAutomaton(max_tokens=self.max_tokens)
        for tokens in self._unshared.values():
            tokens.clear()

    def _share(self, seq_id: int) -> None:
        tokens = self._unshared[seq_id]
        if tokens:
            self._shared.extend([*tokens, SEPARATOR])
            tokens.clear()

    def _cap(self, match_length: int, max_len: int) -> int:
        if match_length < self.min_match:
            return 0
        return min(max_len, math.floor(self.factor * match_length + self.offset))
