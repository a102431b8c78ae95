"""Goose, grown best first: a spine from the request's own text, branches from the table of successors, one hard budget.

Anisotropic trees (Jin, Nguyen, Inoue: arXiv 2604.02047; `goose_published.py` is the paper's own algorithm) hang shallow
alternatives on one deep chain. Here no formula of the match sets the shape: every edge has a measured chance of being accepted,
and the tree is the N nodes most likely to be reached (drafting.md 2.6, 5.2, 5.4). The rule in two lines::

    chance(spine child) = chance(node) * a           a: how often a spine edge with this much matching context behind it held
    chance(branch)      = chance(node) * (1 - a) * b   b: how often such a successor was right when the spine was wrong

Worked example: in "a b c d e a b c" the match "a b c" went on with d, e, a; the table knows c -> {x, d}. With a = 0.8 and
b(x) = 0.5 a tree of four nodes is the path c d e a (0.8, 0.64, 0.51); x (0.1) has to wait. With a = 0.4 it is c, d (0.4),
x (0.3) and e (0.16).

Guarantee: the tree contains the spine cut to S nodes and the table's own tree (`table_tree`) cut to M nodes, where S and M are
`floor` of the budget's drafts each, as far as the sources reach; so every step accepts at least as much as either of those two
drafts (drafting.md 1). The rest of the budget goes where it is worth most.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from specdec._jit import njit, njit_allocating
from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Source, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.ngram import SEPARATOR, IndexArrays, NgramIndex, find, match_length
from specdec.sources.token_recycling import BIGRAM, AdjacencyTable, TableArrays, lookup_row
from specdec.trees.template import observe_prompt, observe_tree

__all__ = ["Goose", "Spine", "table_tree"]

MATCH_CAP = 16  # matches of this many tokens and more are one class
SINGLE, UNANIMOUS, DISPUTED = 0, 1, 2  # how the earlier occurrences voted on the spine's first token
UNKNOWN, ABSENT, LATER, FIRST = 0, 1, 2, 3  # what the table thinks of a spine token: no row, not in it, a later rank, rank 0
SCORE_EDGES = np.array([0.01, 0.03, 0.07, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95], np.float64)
RANK_CAP = 3  # ranks 3 and later are one class
SPINE_CLASSES = (MATCH_CAP + 1) * 3 * 4
BRANCH_CLASSES = 2 * 2 * (RANK_CAP + 1) * 10
SURE = 0.98  # siblings exclude each other: their chances sum to at most this
PRIOR_WEIGHT = 6.0
DECAY = 0.998
OCCURRENCES = 16
LONGEST_MATCH = 32
NO_SPINE = -1
POOL_HANDICAP = 1  # tokens by which a match in another request must be longer than one in this request
_CONTEXT, _TABLE, _BOTH = int(Source.CONTEXT), int(Source.TABLE), int(Source.BOTH)


class Spine(NamedTuple):
    """What followed an earlier occurrence of the text's end."""

    tokens: np.ndarray  # [L] int64
    match: int  # tokens of context that recurred
    votes: int  # SINGLE, UNANIMOUS or DISPUTED


class _Growth(NamedTuple):
    """A tree under construction: N nodes at most, each with its W possible children sorted by chance."""

    tokens: np.ndarray  # [N] int64
    parents: np.ndarray  # [N] int32
    source: np.ndarray  # [N] uint8
    depths: np.ndarray  # [N] int64
    spine: np.ndarray  # [N] int64: spine tokens on the path to this node, NO_SPINE once the path has left it
    chance: np.ndarray  # [N] float64: of being reached
    child_tokens: np.ndarray  # [N, W] int64
    child_chance: np.ndarray  # [N, W] float64
    child_source: np.ndarray  # [N, W] uint8
    first: np.ndarray  # [N] int64: children before this one are in the tree
    last: np.ndarray  # [N] int64: one past the last child


@njit
def _spine_class(match: int, votes: int, opinion: int) -> int:
    return (min(match, MATCH_CAP) * 3 + votes) * 4 + opinion


@njit
def _branch_class(beside: bool, bigram: bool, rank: int, score: float) -> int:
    level = 0
    while level < len(SCORE_EDGES) and score >= SCORE_EDGES[level]:
        level += 1
    return SPINE_CLASSES + ((int(beside) * 2 + int(bigram)) * (RANK_CAP + 1) + min(rank, RANK_CAP)) * 10 + level


@njit
def _opinion(row_tokens: np.ndarray, row: int, token: int) -> int:
    """What table row `row` (-1: none) thinks of `token`."""
    if row < 0:
        return UNKNOWN
    for rank in range(row_tokens.shape[1]):
        if row_tokens[row, rank] == token:
            return FIRST if rank == 0 else LATER
    return ABSENT


@njit_allocating
def _propose(index: IndexArrays, size: int, tail: np.ndarray, out: np.ndarray) -> tuple[int, int, int]:
    """Fill `out` with the continuation of the longest match of `tail`; (tokens written, match, votes).

    The occurrences with the longest true match vote on the first token, the most recent of the winners is copied; a copy
    that reaches the end of the text goes on with itself, so that a loop is continued; it stops at a separator.
    """
    end = NO_PARENT
    row = len(index.lengths)
    while end < 0 and row > 0:
        row -= 1
        end = find(index, row, tail, len(tail) - 1)
    if end < 0 or len(out) == 0:
        return 0, 0, SINGLE
    ends = np.empty(OCCURRENCES, np.int64)
    lengths = np.empty(OCCURRENCES, np.int64)
    count = 0
    while end >= 0 and count < OCCURRENCES:
        ends[count] = end
        lengths[count] = match_length(index, end, tail, len(tail) - 1, LONGEST_MATCH)
        count += 1
        end = index.previous[row, end]
    longest = lengths[:count].max()
    winner, most, voters = 0, 0, 0
    for i in range(count):
        if lengths[i] < longest:
            continue
        voters += 1
        agree = 0
        for j in range(count):
            agree += lengths[j] == longest and index.tokens[ends[j] + 1] == index.tokens[ends[i] + 1]
        if agree > most:
            winner, most = i, agree
    position = ends[winner] + 1
    written = 0
    while written < len(out):
        source = position + written
        token = index.tokens[source] if source < size else out[source - size]
        if token == SEPARATOR:
            break
        out[written] = token
        written += 1
    return written, longest, SINGLE if voters == 1 else UNANIMOUS if most == voters else DISPUTED


@njit
def _offer(tree: _Growth, node: int, token: int, chance: float, source: int) -> None:
    """Insert a possible child into the node's list, which stays sorted by chance."""
    slot = tree.last[node]
    while slot > 0 and tree.child_chance[node, slot - 1] < chance:
        tree.child_tokens[node, slot] = tree.child_tokens[node, slot - 1]
        tree.child_chance[node, slot] = tree.child_chance[node, slot - 1]
        tree.child_source[node, slot] = tree.child_source[node, slot - 1]
        slot -= 1
    tree.child_tokens[node, slot] = token
    tree.child_chance[node, slot] = chance
    tree.child_source[node, slot] = source
    tree.last[node] += 1


@njit
def _expand(tree: _Growth, node: int, prev: int, spine: Spine, table: TableArrays, rates: np.ndarray) -> None:
    """List the possible children of a node that was just added."""
    row, tier = lookup_row(table.keys, table.filled, prev, tree.tokens[node])
    beside = 0 <= tree.spine[node] < len(spine.tokens)
    token, held = -1, 0.0
    if beside:
        token = spine.tokens[tree.spine[node]]
        opinion = _opinion(table.tokens, row, token)
        held = rates[_spine_class(spine.match + tree.spine[node], spine.votes, opinion)]
        _offer(tree, node, token, tree.chance[node] * held, _BOTH if opinion >= LATER else _CONTEXT)
    if row < 0:
        return
    total = 0.0
    for rank in range(table.tokens.shape[1]):
        if table.tokens[row, rank] != token:
            total += rates[_branch_class(beside, tier == BIGRAM, rank, table.scores[row, rank])]
    scale = tree.chance[node] * (1.0 - held) * min(1.0, SURE / max(total, 1e-9))
    for rank in range(table.tokens.shape[1]):
        if table.tokens[row, rank] != token:
            chance = rates[_branch_class(beside, tier == BIGRAM, rank, table.scores[row, rank])]
            _offer(tree, node, table.tokens[row, rank], scale * chance, _TABLE)


@njit
def _take(tree: _Growth, count: int, node: int, slot: int, spine: Spine) -> None:
    """Make child `slot` of `node` the tree's node `count`."""
    token = tree.child_tokens[node, slot]
    on_spine = 0 <= tree.spine[node] < len(spine.tokens) and spine.tokens[tree.spine[node]] == token
    tree.tokens[count] = token
    tree.parents[count] = node
    tree.source[count] = tree.child_source[node, slot]
    tree.depths[count] = tree.depths[node] + 1
    tree.spine[count] = tree.spine[node] + 1 if on_spine else NO_SPINE
    tree.chance[count] = tree.child_chance[node, slot]
    for other in range(slot, tree.first[node], -1):  # keep the taken ones in front, the rest sorted
        tree.child_tokens[node, other] = tree.child_tokens[node, other - 1]
        tree.child_chance[node, other] = tree.child_chance[node, other - 1]
        tree.child_source[node, other] = tree.child_source[node, other - 1]
    tree.child_tokens[node, tree.first[node]] = token
    tree.first[node] += 1


@njit
def _best(tree: _Growth, count: int, depth: int) -> int:
    """The node with the most probable child that is not in the tree yet, or -1; the earlier node wins a tie."""
    best, chance = -1, 0.0
    for node in range(count):
        slot = tree.first[node]
        if slot < tree.last[node] and tree.depths[node] < depth and tree.child_chance[node, slot] > chance:
            best, chance = node, tree.child_chance[node, slot]
    return best


@njit
def _force(tree: _Growth, count: int, node: int, token: int, spine: Spine, least: float) -> int:
    """The child of `node` with this token, taken into the tree as node `count` if it is not there yet; -1: not possible."""
    for slot in range(tree.last[node]):
        if tree.child_tokens[node, slot] != token:
            continue
        if slot >= tree.first[node]:
            if tree.child_chance[node, slot] < least:
                return -1
            _take(tree, count, node, slot, spine)
            return count
        for child in range(node + 1, count):
            if tree.parents[child] == node and tree.tokens[child] == token:
                return child
    return -1


@njit_allocating
def _grow(
    tree: _Growth, prev: int, spine: Spine, table: TableArrays, rates: np.ndarray, depth: int, least: float,
    spine_floor: int, floor_tokens: np.ndarray, floor_parents: np.ndarray,
) -> int:  # fmt: skip
    """Grow `tree` from its root (already set): first the guaranteed parts, then best first; returns the number of nodes.

    Nodes reached with less than `least` chance are left out. `floor_tokens`, `floor_parents` [M + 1] are the table's own tree.
    """
    budget = len(tree.tokens)
    _expand(tree, ROOT, prev, spine, table, rates)
    count, node = 1, ROOT
    for i in range(min(spine_floor, len(spine.tokens), depth, budget - 1)):
        node = _force(tree, count, node, spine.tokens[i], spine, least)
        if node < 0:
            break
        _expand(tree, node, tree.tokens[tree.parents[node]], spine, table, rates)
        count += 1
    place = np.full(len(floor_tokens), -1, np.int64)
    place[0] = ROOT
    for i in range(1, len(floor_tokens)):
        parent = place[floor_parents[i]]
        if parent < 0 or count >= budget:
            continue
        place[i] = _force(tree, count, parent, floor_tokens[i], spine, 0.0)
        if place[i] == count:
            _expand(tree, count, tree.tokens[parent], spine, table, rates)
            count += 1
    while count < budget:
        node = _best(tree, count, depth)
        if node < 0 or tree.child_chance[node, tree.first[node]] < least:
            break
        _take(tree, count, node, tree.first[node], spine)
        _expand(tree, count, tree.tokens[node], spine, table, rates)
        count += 1
    return count


@njit
def _learn(
    path: np.ndarray, following: np.ndarray, prev: int, spine: Spine, table: TableArrays, prior: np.ndarray,
    counts: np.ndarray, rates: np.ndarray,
) -> None:  # fmt: skip
    """Count what the target said at each visited node: path [A] its tokens, following [A] the target's token after each.

    Every candidate of a visited node is a trial, drafted or not; branches beside a spine that held are censored.
    """
    counts *= DECAY
    on_spine = True
    for i in range(len(path)):
        on_spine = on_spine and (i == 0 or (i <= len(spine.tokens) and spine.tokens[i - 1] == path[i]))
        row, tier = lookup_row(table.keys, table.filled, path[i - 1] if i else prev, path[i])
        beside = on_spine and i < len(spine.tokens)
        token = -1
        if beside:
            token = spine.tokens[i]
            edge = _spine_class(spine.match + i, spine.votes, _opinion(table.tokens, row, token))
            counts[edge, 1] += 1
            if token == following[i]:
                counts[edge, 0] += 1
                continue
        if row >= 0:
            for rank in range(table.tokens.shape[1]):
                if table.tokens[row, rank] != token:
                    edge = _branch_class(beside, tier == BIGRAM, rank, table.scores[row, rank])
                    counts[edge, 0] += table.tokens[row, rank] == following[i]
                    counts[edge, 1] += 1
    for edge in range(len(rates)):
        rates[edge] = (counts[edge, 0] + PRIOR_WEIGHT * prior[edge]) / (counts[edge, 1] + PRIOR_WEIGHT)


def _prior() -> np.ndarray:
    """[classes] float64: what edges are worth before anything was measured; round numbers seen on SmolLM2-135M, mixed prompts."""
    prior = np.empty(SPINE_CLASSES + BRANCH_CLASSES)
    for match in range(MATCH_CAP + 1):
        for opinion in (UNKNOWN, ABSENT, LATER, FIRST):
            held = 1 - (0.55 * np.exp(-0.25 * (match - 1)) if opinion == FIRST else 0.7 * np.exp(-0.1 * (match - 1)))
            for votes, trust in ((SINGLE, 1.0), (UNANIMOUS, 1.0), (DISPUTED, 0.75)):
                prior[_spine_class(match, votes, opinion)] = trust * min(SURE, max(0.05, held))
    scores = np.concatenate(([0.005], np.sqrt(SCORE_EDGES[:-1] * SCORE_EDGES[1:]), [0.97]))
    for beside, bigram, trust in ((False, False, 0.33), (False, True, 0.72), (True, False, 0.4), (True, True, 0.8)):
        for rank in range(RANK_CAP + 1):
            for score in scores:
                prior[_branch_class(beside, bigram, rank, score)] = 0.01 + trust * score
    return prior


_EMPTY_SPINE = Spine(np.empty(0, np.int64), 0, SINGLE)


def table_tree(root: int, prev: int, table: TableArrays, rates: np.ndarray, budget: int, depth: int, least: float) -> DraftTree:
    """The tree of `budget` nodes that the table alone would give: Token Recycling with measured chances instead of a template."""
    return _tree(root, prev, _EMPTY_SPINE, table, rates, budget, depth, least, 0, None)


def _tree(
    root: int, prev: int, spine: Spine, table: TableArrays, rates: np.ndarray, budget: int, depth: int, least: float,
    spine_floor: int, floor: DraftTree | None,
) -> DraftTree:  # fmt: skip
    width = table.tokens.shape[1] + 1
    growth = _Growth(
        tokens=np.empty(budget, np.int64), parents=np.empty(budget, np.int32), source=np.zeros(budget, np.uint8),
        depths=np.zeros(budget, np.int64), spine=np.zeros(budget, np.int64), chance=np.ones(budget),
        child_tokens=np.empty((budget, width), np.int64), child_chance=np.empty((budget, width)),
        child_source=np.empty((budget, width), np.uint8), first=np.zeros(budget, np.int64), last=np.zeros(budget, np.int64),
    )  # fmt: skip
    growth.tokens[ROOT], growth.parents[ROOT] = root, NO_PARENT
    if floor is None:
        floor = DraftTree.root_only(root)
    count = _grow(growth, prev, spine, table, rates, depth, least, spine_floor, floor.tokens, floor.parents)
    return DraftTree(growth.tokens[:count], growth.parents[:count], source=growth.source[:count], evidence=spine)


@dataclass(slots=True)
class _Request:
    index: NgramIndex
    seen: int  # tokens of the request that are in the index


def _spine(index: NgramIndex, tail: np.ndarray, limit: int) -> Spine:
    out = np.empty(limit, np.int64)
    count, match, votes = _propose(index.arrays, index.size, tail, out)
    return Spine(out[:count], int(match), int(votes))


class Goose:
    """Builder: one request's own text and a table of successors shared by all requests, under a hard node budget.

    Args:
        vocab_size: V of the target.
        top_k: successors kept for a key.
        lengths: n-gram lengths of the text index.
        min_chance: nodes less likely to be reached than this are not drafted.
        pool_capacity: tokens of finished requests in which a spine is looked for too, 0 or >= 64.
        floor: share of the drafts guaranteed to the spine, and again to the table's own tree.
        prefill_harvest: fill the table from the prompt's logits too.

    Raises:
        ValueError: an argument is out of range.
    """

    sizes_itself = False

    def __init__(
        self,
        vocab_size: int,
        top_k: int = 10,
        lengths: Seq[int] = (1, 2, 3, 4, 6, 8),
        min_chance: float = 0.001,
        pool_capacity: int = 1 << 16,
        floor: float = 0.125,
        prefill_harvest: bool = True,
    ) -> None:
        if not 0 <= min_chance < 1:
            raise ValueError(f"min_chance must be in [0, 1), got {min_chance}")
        if not 0 <= floor <= 0.5:
            raise ValueError(f"floor must be in [0, 0.5]: both sources get this share, got {floor}")
        self.top_k = min(top_k, vocab_size)
        self.table = AdjacencyTable(vocab_size, self.top_k)
        self.lengths = tuple(lengths)
        self.min_chance, self.floor, self.prefill_harvest = min_chance, floor, prefill_harvest
        self._prior = _prior()
        self._counts = np.zeros((len(self._prior), 2))
        self.rates = self._prior.copy()  # [classes]: current chance of every class of edges
        self.pool = NgramIndex(self.lengths, pool_capacity) if pool_capacity else None
        self._requests: dict[int, _Request] = {}

    def start(self, seq: Sequence) -> None:
        index = NgramIndex(self.lengths)
        index.extend(seq.token_ids)
        self._requests[seq.id] = _Request(index, len(seq.token_ids))

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        if self.prefill_harvest:
            observe_prompt(self.table, seq, start, top)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq, budget, depth) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, seq: Sequence, budget: int, depth: int) -> DraftTree:
        root = seq.token_ids[-1]
        if budget <= 1 or depth <= 0:
            return DraftTree.root_only(root)
        prev = seq.token_ids[-2] if len(seq.token_ids) > 1 else -1
        table = self.table.arrays()
        spine = self.spine(seq, min(budget - 1, depth))
        share, floor = int((budget - 1) * self.floor), None
        if len(spine.tokens) and share:
            floor = table_tree(root, prev, table, self.rates, share + 1, depth, self.min_chance)
        return _tree(root, prev, spine, table, self.rates, budget, depth, self.min_chance, share, floor)

    def spine(self, seq: Sequence, limit: int) -> Spine:
        """The continuation that the request's text suggests, at most `limit` tokens."""
        own = self._requests[seq.id].index
        tail = own.tokens[-LONGEST_MATCH:]
        spine = _spine(own, tail, limit)
        if self.pool is None or spine.match >= LONGEST_MATCH:
            return spine
        other = _spine(self.pool, tail, limit)
        return other if other.match > spine.match + POOL_HANDICAP and len(other.tokens) else spine

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        request = self._requests[seq.id]
        emitted = seq.token_ids[request.seen :]
        prev = seq.token_ids[request.seen - 2] if request.seen > 1 else -1
        if isinstance(tree.evidence, Spine) and not seq.finished:  # a cut path says nothing about its last token
            path, following = tree.tokens[verdict.nodes], np.array(emitted, np.int64)
            _learn(path, following, prev, tree.evidence, self.table.arrays(), self._prior, self._counts, self.rates)
        request.index.extend(emitted)
        request.seen = len(seq.token_ids)
        if top is not None:
            observe_tree(self.table, prev, tree, verdict, top)

    def finish(self, seq: Sequence) -> None:
        if self._requests.pop(seq.id, None) is not None and self.pool is not None:
            self.pool.extend([*seq.token_ids, SEPARATOR])

    def reset(self) -> None:
        self.table.reset()
        self._counts[:] = 0
        if self.pool is not None:
            self.pool.clear()
        self.rates[:] = self._prior

    def state(self) -> dict[str, Any]:
        return {**self.table.state(), "goose_counts": self._counts.copy()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of state().

        Raises:
            ValueError: not a state of this builder, or one for another vocabulary or top_k; nothing is changed then.
        """
        counts = self._counts_of(state)
        self.table.load_state({name: array for name, array in state.items() if name != "goose_counts"})
        self._set_counts(counts)

    def merge_state(self, state: dict[str, Any]) -> None:
        """Take in what another builder learned: rows of the table that are unknown here, and the counts of whoever saw more.

        Raises:
            ValueError: as load_state; nothing is changed then.
        """
        counts = self._counts_of(state)
        self.table.merge_state(state)
        if counts[:, 1].sum() > self._counts[:, 1].sum():
            self._set_counts(counts)

    def _counts_of(self, state: dict[str, Any]) -> np.ndarray:
        counts = np.asarray(state.get("goose_counts", np.zeros_like(self._counts)), np.float64)
        if counts.shape != self._counts.shape or not np.isfinite(counts).all():
            raise ValueError(
                f"goose_counts must be {self._counts.shape} finite numbers, got shape {counts.shape}; drop it to start anew"
            )
        return counts

    def _set_counts(self, counts: np.ndarray) -> None:
        self._counts[:] = counts
        self.rates[:] = (counts[:, 0] + PRIOR_WEIGHT * self._prior) / (counts[:, 1] + PRIOR_WEIGHT)
