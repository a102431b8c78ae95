"""What may follow a node of a draft tree: candidates from the text and from the table, and why each is one.

Seven sources look at the last tokens of a node's own path (committed text, then draft), so that spine, agreement and disagreement
need no special case (drafting.md 4.5, 5.7):

    OWN, SHARED    up to `OCCURRENCES` recent places where the longest suffix occurred in this request, in earlier ones
    ORDER3..ORDER1 the table row of the last 3, 2, 1 tokens
    LEFTOVER       the node's own rivals: what may have stood in its place often comes right after it
    SHIFTED        what the table has after the node's strongest rival: text often goes on as it would have without the node

Every source files every candidate, also those that it did not propose, under one of its buckets: what its evidence looks like,
coarsely. `calibration` learns from outcomes what a bucket is worth. Worked example, path "... the cat", own text "the cat sat"
twice and "cat ran" once: longest match 2 tokens; candidate "sat" in bucket (match 2, share > 2/3, 2-3 places), "ran" in bucket
(shorter match), and a candidate that only the table has in bucket (match 2, not proposed).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdec._jit import njit
from specdec.sources.context_table import MAX_ORDER, TableArrays, lookup
from specdec.sources.ngram import IndexArrays, find, match_length

__all__ = [
    "BUCKETS",
    "CANDIDATES",
    "CONTEXTS",
    "SOURCES",
    "TAIL",
    "Evidence",
    "collect",
    "context_bucket",
    "new_evidence",
    "table_bucket",
]

TAIL = 16  # tokens of a path that are looked at: the longest match told apart
SOURCES = 7  # OWN, SHARED, ORDER3, ORDER2, ORDER1, LEFTOVER, SHIFTED
LEFTOVER, SHIFTED = SOURCES - 2, SOURCES - 1
LEFTOVERS = 5  # rivals that are looked at
CONTEXTS = 2  # the first sources are n-gram indexes, the others table rows
CANDIDATES = 40  # most candidates of one node
OCCURRENCES = 8
BACKOFF = 0.3  # weight of an occurrence, a token of context that it lacks
_WEIGHTS = BACKOFF ** np.arange(TAIL, -1.0, -1.0)  # [TAIL + 1], by match length
NO_TOKEN = -3  # fills the tail of a path shorter than TAIL; matches nothing

MATCH_CLASSES = 8
_A_MATCH = 15  # buckets of one match class: not proposed, 4 shares x 3 counts, 2 of shorter matches
_RANKS, _PROBS = 8, 10
BUCKETS = 1 + max(MATCH_CLASSES * _A_MATCH, 1 + _RANKS * _PROBS)


class Evidence(NamedTuple):
    """Candidates of N nodes, at most C each. Rows of nodes with count -1 are unwritten."""

    tokens: np.ndarray  # [N, C] int32, in the order of the sources
    buckets: np.ndarray  # [N, C, SOURCES] int16
    probs: np.ndarray  # [N, C] float64, given that the node is on the accepted path
    order: np.ndarray  # [N, C] int32, places in tokens by descending probability
    counts: np.ndarray  # [N] int32
    tails: np.ndarray  # [N, TAIL] int32, the last tokens up to and with the node
    votes: np.ndarray  # [3, C] float64, scratch of collect()
    absent: np.ndarray  # [SOURCES] int16, scratch of collect()
    step: np.ndarray  # [SOURCES + 1] float64, scratch of calibration.learn()


def new_evidence(nodes: int) -> Evidence:
    """Room for `nodes` nodes."""
    return Evidence(
        np.empty((nodes, CANDIDATES), np.int32), np.empty((nodes, CANDIDATES, SOURCES), np.int16),
        np.empty((nodes, CANDIDATES)), np.empty((nodes, CANDIDATES), np.int32), np.full(nodes, -1, np.int32),
        np.full((nodes, TAIL), NO_TOKEN, np.int32), np.empty((3, CANDIDATES)), np.empty(SOURCES, np.int16),
        np.empty(SOURCES + 1),
    )  # fmt: skip


@njit
def _match_class(length: int) -> int:
    if length <= 4:
        return length - 1
    return 4 if length <= 6 else 5 if length <= 9 else 6 if length <= 15 else 7


@njit
def context_bucket(longest: int, length: int, share: float, count: int) -> int:
    """Bucket of a candidate of an n-gram index.

    Args:
        longest: longest match of the node, 0: nothing matched.
        length: longest match that this candidate followed, 0: it followed none.
        share: its share of the weights of all occurrences.
        count: how many occurrences it followed.
    """
    if longest == 0:
        return 0
    base = 1 + _A_MATCH * _match_class(longest)
    if count == 0:
        return base
    if length < longest:
        return base + (14 if share > 0.2 else 13)
    shares = 0 if share < 0.34 else 1 if share < 0.67 else 2 if share < 0.95 else 3
    counts = 0 if count < 2 else 1 if count < 4 else 2
    return base + 1 + shares * 3 + counts


@njit
def table_bucket(found: bool, rank: int, prob: float) -> int:
    """Bucket of a candidate of one table order; rank -1: the row has other tokens only."""
    if rank < 0:
        return 1 if found else 0
    if rank == 0:
        level = int(prob * 9.99)
    else:
        level = int(min(9.0, max(0.0, 9.99 + 1.5 * np.log2(max(prob, 1e-6)))))
    return 2 + min(rank, _RANKS - 1) * _PROBS + level


@njit
def _candidate(evidence: Evidence, node: int, token: int) -> int:
    """Position of a token among the candidates of a node, added if it is new; -1: no room."""
    count = evidence.counts[node]
    for position in range(count):
        if evidence.tokens[node, position] == token:
            return position
    if count == CANDIDATES:
        return -1
    evidence.tokens[node, count] = token
    evidence.buckets[node, count] = -1
    evidence.counts[node] = count + 1
    return int(count)


@njit
def _occurrences(index: IndexArrays, evidence: Evidence, node: int) -> int:
    """Add the followers of the most recent longest matches; evidence.votes gets weight, count and longest match of each.

    Longest n-grams first, then shorter ones until OCCURRENCES are seen; returns the longest match, 0 for none.
    """
    tail, votes = evidence.tails[node], evidence.votes
    votes[:] = 0.0
    seen, longest, above = 0, 0, TAIL + 1
    for row in range(len(index.lengths) - 1, -1, -1):
        position = find(index, row, tail, TAIL - 1)
        looked = 0
        while position >= 0 and seen < OCCURRENCES and looked < 2 * OCCURRENCES:
            looked += 1
            length = match_length(index, position, tail, TAIL - 1, TAIL)
            token = index.tokens[position + 1]
            if length < above and token >= 0:  # the longer ones were seen in the row before
                seen += 1
                longest = max(longest, length)
                place = _candidate(evidence, node, token)
                if place >= 0:
                    votes[0, place] += _WEIGHTS[length]
                    votes[1, place] += 1.0
                    votes[2, place] = max(votes[2, place], length)
            position = index.previous[row, position]
        above = index.lengths[row]
        if seen >= OCCURRENCES:
            break
    return longest


@njit
def _context(index: IndexArrays, evidence: Evidence, node: int, source: int) -> int:
    """File the candidates of one index; returns the bucket of those it did not propose."""
    longest = _occurrences(index, evidence, node)
    votes = evidence.votes
    total = max(votes[0].sum(), 1e-30)
    for place in range(evidence.counts[node]):
        evidence.buckets[node, place, source] = context_bucket(longest, votes[2, place], votes[0, place] / total, votes[1, place])
    return context_bucket(longest, 0, 0.0, 0)


@njit
def _order(table: TableArrays, evidence: Evidence, node: int, order: int, source: int) -> int:
    """File the candidates of one table order; returns the bucket of those it did not propose."""
    row = lookup(table, evidence.tails[node], TAIL - 1, order)
    if row >= 0:
        for rank in range(table.tokens.shape[1]):
            if table.tokens[row, rank] < 0:
                break
            place = _candidate(evidence, node, table.tokens[row, rank])
            if place >= 0:
                evidence.buckets[node, place, source] = table_bucket(True, rank, table.probs[row, rank])
    return table_bucket(row >= 0, -1, 0.0)


@njit
def _leftovers(tokens: np.ndarray, probs: np.ndarray, evidence: Evidence, node: int) -> int:
    """File the rivals of a node, most probable first; returns the bucket of other tokens."""
    rank = 0
    for other in range(min(len(tokens), LEFTOVERS + 1)):
        token = tokens[other]
        if token < 0 or rank == LEFTOVERS:
            break
        if token != evidence.tails[node, TAIL - 1]:
            place = _candidate(evidence, node, token)
            if place >= 0:
                evidence.buckets[node, place, LEFTOVER] = table_bucket(True, rank, probs[other])
            rank += 1
    return table_bucket(rank > 0, -1, 0.0)


@njit
def _shifted(table: TableArrays, rivals: np.ndarray, evidence: Evidence, node: int) -> int:
    """File what the table has after the node's strongest rival, in the node's own place."""
    tail = evidence.tails[node]
    own = tail[TAIL - 1]
    rival = -1
    for other in range(min(2, len(rivals))):
        if rivals[other] != own:
            rival = rivals[other]
            break
    if rival < 0:
        return 0
    tail[TAIL - 1] = rival
    bucket = 0
    for order in range(MAX_ORDER, 0, -1):
        if bucket == 0:
            bucket = _order(table, evidence, node, order, SHIFTED)
    tail[TAIL - 1] = own
    return bucket


@njit
def collect(
    own: IndexArrays, shared: IndexArrays, table: TableArrays, rivals: np.ndarray, rival_probs: np.ndarray, evidence: Evidence,
    node: int,
) -> None:  # fmt: skip
    """Write tokens, buckets and count of `node`, whose tail is there already.

    Args:
        rivals: [R] int32, what may have stood in the node's place, most probable first; -1: none.
        rival_probs: [R] float, their probabilities.
    """
    evidence.counts[node] = 0
    absent = evidence.absent
    absent[0] = _context(own, evidence, node, 0)
    absent[1] = _context(shared, evidence, node, 1)
    for order in range(MAX_ORDER, 0, -1):
        source = CONTEXTS + MAX_ORDER - order
        absent[source] = _order(table, evidence, node, order, source)
    absent[SHIFTED] = _shifted(table, rivals, evidence, node)
    absent[LEFTOVER] = _leftovers(rivals, rival_probs, evidence, node)
    for place in range(evidence.counts[node]):
        for source in range(SOURCES):
            if evidence.buckets[node, place, source] < 0:
                evidence.buckets[node, place, source] = absent[source]
