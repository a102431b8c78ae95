"""Token Recycling (Luo et al., arXiv 2408.08696): a fixed tree of candidate ranks, filled from the table of successors.

A template says which ranks to try where: its node (parent, r) takes the r-th best known successor of the parent's token. The rule
in two lines::

    tokens[v] = table[tokens[parent[v]]][rank[v]]         unknown rows and repeated siblings are left out, with all below them
    the template's nodes stand in order of their measured chance, and are filled in until the node budget is spent

Worked example, template root -> ranks 0 and 1, rank 0 -> rank 0; table: the -> cat, dog; cat -> sat::

    template     0            the
                / \\          /   \\
               r0  r1       cat   dog
               |             |
               r0           sat

`TokenRecycling` also uses the table's bigram tier and the prompt's logits, and re-orders the template as it learns which ranks
are accepted; `TokenRecyclingPublished` is the paper's: one tier, rows of zeros to begin with, 81 nodes whatever is known.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec._jit import njit, njit_allocating
from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Source, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.token_recycling import AdjacencyTable, TableArrays, lookup_row

__all__ = [
    "PUBLISHED",
    "Template",
    "TokenRecycling",
    "TokenRecyclingPublished",
    "best_template",
    "observe_prompt",
    "observe_tree",
]

MAX_DEPTH = 12  # of a learned template
SPARE = 3  # nodes of a learned template for each node of the budget
PRIOR_WEIGHT = 20.0  # visits that the prior of a rank's chance counts as
COUNT_DECAY = 0.9  # of the rank counts, at every re-ordering


@dataclass(frozen=True, slots=True)
class Template:
    """A tree of ranks; node 0 is the root.

    Raises:
        ValueError: lengths differ, a parent does not precede its child, a negative rank, two siblings of one rank.
    """

    parents: np.ndarray  # [N] int32; parents[0] = -1, parents[i] < i
    ranks: np.ndarray  # [N] int32; ranks[0] = 0 is not used

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.parents) or (self.ranks < 0).any():
            raise ValueError(
                f"a template needs one rank >= 0 a node, got {len(self.parents)} parents and ranks {self.ranks.tolist()}"
            )
        if len(set(zip(self.parents.tolist(), self.ranks.tolist(), strict=True))) < len(self.ranks):
            raise ValueError("two siblings of the template have one rank: drop one of them")
        DraftTree(np.zeros(len(self.parents)), self.parents)  # refuses parents that are no tree

    def __len__(self) -> int:
        return len(self.parents)

    @classmethod
    def from_children(cls, levels: Seq[Mapping[tuple[int, ...], int]]) -> Template:
        """From the number of children (ranks 0, 1, ...) of each node, one mapping a level, nodes named by their path of ranks."""
        parents, ranks = [NO_PARENT], [0]
        place: dict[tuple[int, ...], int] = {(): ROOT}
        for level in levels:
            for path, count in level.items():
                for rank in range(count):
                    child = (*path, rank)
                    place[child] = len(parents)
                    parents.append(place[path])
                    ranks.append(rank)
        return cls(np.array(parents, np.int32), np.array(ranks, np.int32))


def _counts(prefix: tuple[int, ...], *counts: int) -> dict[tuple[int, ...], int]:
    """Numbers of children of the nodes prefix + (0,), prefix + (1,), ..."""
    return {(*prefix, rank): count for rank, count in enumerate(counts)}


# The paper's tree (its code's version 2.2.2): 80 nodes below the root, levels 8, 21, 25, 15, 8, 3.
PUBLISHED = Template.from_children(
    [
        {(): 8},
        _counts((), 8, 4, 3, 2, 1, 1, 1, 1),
        {**_counts((0,), 8, 3, 2, 1, 1, 1, 1, 1), **_counts((1,), 2, 1), (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
        {**_counts((0, 0), 5, 2, 1, 1, 1), (0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
        {**_counts((0, 0, 0), 3, 1, 1), (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
        {(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
    ]
)


def best_template(chances: np.ndarray, count: int, depth: int) -> Template:
    """The `count` most probable nodes, most probable first (so that any prefix is the best smaller template).

    Args:
        chances: [k + 1, k]: chances[a, r] = chance of rank r below an accepted node of rank a; row k: below the root.
        count: nodes, root included.
        depth: most levels below the root.
    """
    k = chances.shape[1]
    parents, ranks = [NO_PARENT], [0]
    heap: list[tuple[float, int, int, int]] = []  # (-chance, depth, parent, rank)

    def push_children(node: int, above: int, chance: float, level: int) -> None:
        for rank in range(k):
            heapq.heappush(heap, (-chance * float(chances[above, rank]), level, node, rank))

    push_children(ROOT, k, 1.0, 1)
    while heap and len(parents) < count:
        chance, level, parent, rank = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(rank)
        if level < depth:
            push_children(len(parents) - 1, rank, -chance, level + 1)
    return Template(np.array(parents, np.int32), np.array(ranks, np.int32))


@njit_allocating
def _fill(
    root: int, prev: int, bigram: bool, parents: np.ndarray, ranks: np.ndarray, table: TableArrays, depth: int,
    out_tokens: np.ndarray, out_parents: np.ndarray,
) -> int:  # fmt: skip
    """Fill the template's nodes in order until `out_*` [budget] are full; returns the number of nodes."""
    budget, nodes = len(out_tokens), len(parents)
    place = np.full(nodes, -1, np.int32)  # template node -> tree node, -1: left out
    rows = np.full(nodes, -1, np.int64)  # row of the table below each template node
    levels = np.zeros(nodes, np.int32)
    out_tokens[ROOT], out_parents[ROOT], place[ROOT] = root, NO_PARENT, ROOT
    rows[ROOT] = lookup_row(table.keys, table.filled, prev if bigram else -1, root)[0]
    count = 1
    for v in range(1, nodes):
        above = parents[v]
        levels[v] = levels[above] + 1
        if count >= budget or place[above] < 0 or rows[above] < 0 or levels[v] > depth:
            continue
        token = table.tokens[rows[above], ranks[v]]
        out_tokens[count], out_parents[count], place[v] = token, place[above], count
        rows[v] = lookup_row(table.keys, table.filled, out_tokens[place[above]] if bigram else -1, token)[0]
        count += 1
    return count


@njit
def _count_ranks(
    path: np.ndarray, following: np.ndarray, prev: int, bigram: bool, table: TableArrays, counts: np.ndarray
) -> None:
    """Add to counts [k + 1, k + 1]: [a, r] rank r was right below a node of rank a (k: the root, or none), [a, k]: visits.

    Every known rank of a visited node counts, drafted or not.
    """
    k = table.tokens.shape[1]
    above = k
    for i in range(len(path)):
        before = path[i - 1] if i else prev
        row = lookup_row(table.keys, table.filled, before if bigram else -1, path[i])[0]
        if row < 0:
            return
        counts[above, k] += 1
        rank = 0
        while rank < k and table.tokens[row, rank] != following[i]:
            rank += 1
        if rank == k:
            return
        counts[above, rank] += 1
        above = rank


def _before_last(tokens: list[int]) -> int:
    """The last token but one, -1 if there is none."""
    return tokens[-2] if len(tokens) > 1 else -1


def _prior_chances(k: int) -> np.ndarray:
    """[k + 1, k] as in `best_template`, before anything was measured (drafting.md 5.4)."""
    return np.tile(0.33 * 0.45 ** np.arange(k), (k + 1, 1))


def observe_prompt(table: AdjacencyTable, seq: Sequence, start: int, top: TopK) -> None:
    """Prefill harvest: `top` row i is what the model expects after prompt position start + i."""
    tokens = np.array(seq.token_ids[start : start + len(top.tokens)], np.int64)
    prev = np.concatenate(([seq.token_ids[start - 1] if start else -1], tokens[:-1]))
    table.observe(prev, tokens, top)


def observe_tree(table: AdjacencyTable, prev: int, tree: DraftTree, verdict: Verdict, top: TopK) -> None:
    """Learn from every node of a verified tree: the rejected ones first, then the accepted path in order, so that it wins.

    `prev` is the token before the root, or -1: then the root's own pair is not recorded.
    """
    order = np.concatenate((np.delete(np.arange(len(tree)), verdict.nodes), verdict.nodes))
    before = np.where(tree.parents >= 0, tree.tokens[tree.parents], prev)
    table.observe(before[order], tree.tokens[order], TopK(top.tokens[order], top.probs[order]))


class TokenRecycling:
    """Token Recycling with its weak points mended (drafting.md 3.5): nothing unknown is drafted and the budget is a hard cap.

    Args:
        vocab_size: V of the target.
        top_k: successors kept for a key.
        template: a fixed template, its nodes in order of worth; None: learned from which ranks were accepted.
        bigram: ask the pair (token before, token) first.
        prefill_harvest: fill the table from the prompt's logits too.
        refresh: verified trees between two re-orderings of the learned template.

    Raises:
        ValueError: an argument is out of range, or the template asks for a rank that the table does not keep.
    """

    sizes_itself = False

    def __init__(
        self,
        vocab_size: int,
        top_k: int = 8,
        template: Template | None = None,
        bigram: bool = True,
        prefill_harvest: bool = True,
        refresh: int = 32,
    ) -> None:
        if refresh < 1:
            raise ValueError(f"refresh must be a number of trees >= 1, got {refresh}")
        self.top_k = min(top_k, vocab_size)
        if template is not None and int(template.ranks.max()) >= self.top_k:
            raise ValueError(f"the template uses rank {int(template.ranks.max())}, the table keeps {self.top_k}: raise top_k")
        self.table = AdjacencyTable(vocab_size, self.top_k, **({} if bigram else {"bigram_capacity": 1}))
        self.bigram, self.prefill_harvest, self.refresh = bigram, prefill_harvest, refresh
        self._fixed = template
        self._learned: Template | None = None
        self._counts = np.zeros((self.top_k + 1, self.top_k + 1))  # as in _count_ranks
        self._trees = 0  # verified since the template was ordered
        self._seen: dict[int, int] = {}  # request -> tokens of it that were learned from

    def start(self, seq: Sequence) -> None:
        self._seen[seq.id] = len(seq.token_ids)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        if self.prefill_harvest:
            observe_prompt(self.table, seq, start, top)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq, budget, depth) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, seq: Sequence, budget: int, depth: int) -> DraftTree:
        root, prev = seq.token_ids[-1], _before_last(seq.token_ids)
        if budget <= 1 or depth <= 0:
            return DraftTree.root_only(root)
        template = self.template(budget)
        tokens, parents = np.empty(budget, np.int64), np.empty(budget, np.int32)
        count = _fill(root, prev, self.bigram, template.parents, template.ranks, self.table.arrays(), depth, tokens, parents)
        source = np.full(count, Source.TABLE, np.uint8)
        source[ROOT] = Source.ROOT
        return DraftTree(tokens[:count], parents[:count], source=source)

    def template(self, budget: int) -> Template:
        """The template in force, with nodes to spare: those whose row is unknown are skipped."""
        if self._fixed is not None:
            return self._fixed
        size = SPARE * max(budget, 32)
        if self._learned is None or len(self._learned) < size or self._trees >= self.refresh:
            self._learned = best_template(self.chances(), size, MAX_DEPTH)
            self._counts *= COUNT_DECAY
            self._trees = 0
        return self._learned

    def chances(self) -> np.ndarray:
        """[k + 1, k]: measured acceptance by (rank of the parent, rank), see `best_template`."""
        visits = self._counts[:, -1:]
        return (self._counts[:, :-1] + PRIOR_WEIGHT * _prior_chances(self.top_k)) / (visits + PRIOR_WEIGHT)

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        seen, self._seen[seq.id] = self._seen[seq.id], len(seq.token_ids)
        prev = _before_last(seq.token_ids[:seen])
        if not seq.finished:  # a cut path says nothing about its last token
            path, following = tree.tokens[verdict.nodes], np.array(seq.token_ids[seen:], np.int64)
            _count_ranks(path, following, prev, self.bigram, self.table.arrays(), self._counts)
            self._trees += 1
        if top is not None:
            observe_tree(self.table, prev, tree, verdict, top)

    def finish(self, seq: Sequence) -> None:
        self._seen.pop(seq.id, None)

    def reset(self) -> None:
        self.table.reset()
        self._counts[:] = 0
        self._learned = None

    def state(self) -> dict[str, Any]:
        return {**self.table.state(), "rank_counts": self._counts.copy()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of state().

        Raises:
            ValueError: not a state of this builder, or one for another vocabulary or top_k; nothing is changed then.
        """
        counts = self._counts_of(state)
        self.table.load_state({name: array for name, array in state.items() if name != "rank_counts"})
        self._set_counts(counts)

    def merge_state(self, state: dict[str, Any]) -> None:
        """Take in what another builder learned: rows of the table that are unknown here, and the counts of whoever saw more.

        Raises:
            ValueError: as load_state; nothing is changed then.
        """
        counts = self._counts_of(state)
        self.table.merge_state(state)
        if counts.sum() > self._counts.sum():
            self._set_counts(counts)

    def _counts_of(self, state: dict[str, Any]) -> np.ndarray:
        counts = np.asarray(state.get("rank_counts", np.zeros_like(self._counts)), np.float64)
        if counts.shape != self._counts.shape or not np.isfinite(counts).all():
            raise ValueError(
                f"rank_counts must be {self._counts.shape} finite numbers, got shape {counts.shape}; drop it to start anew"
            )
        return counts

    def _set_counts(self, counts: np.ndarray) -> None:
        self._counts[:] = counts
        self._learned = None


class TokenRecyclingPublished:
    """The paper's method: one tier that starts as zeros, no prefill harvest, the 80-node template whatever the budget.

    Its budget is NO hard cap (81 nodes); a budget of 1 still means a plain step, and depth is a hard cap. Repeated siblings,
    mostly zeros of unfilled rows, are dropped: a lower rank has all the children of a higher one, so nothing accepted is lost.
    """

    sizes_itself = False

    def __init__(self, vocab_size: int, template: Template = PUBLISHED) -> None:
        self.vocab_size, self._template = vocab_size, template
        self.top_k = min(1 + int(template.ranks.max()), vocab_size)
        self.matrix = np.zeros((vocab_size, 1 + int(template.ranks.max())), np.int32)  # [V, k] candidates, best first

    def start(self, seq: Sequence) -> None:
        """Nothing is kept for a request."""

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """The paper learns nothing from the prompt."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq.token_ids[-1], budget, depth) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, root: int, budget: int, depth: int) -> DraftTree:
        if budget <= 1 or depth <= 0:
            return DraftTree.root_only(root)
        ranks, tokens = self._template.ranks.tolist(), [root]
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(self._template.parents.tolist()[1:], 1):
            tokens.append(int(self.matrix[tokens[parent], ranks[node]]))
            paths.append((*paths[parent], tokens[node]))
        return DraftTree.from_paths(root, (path[:depth] for path in paths), Source.TABLE)

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        if top is None or seq.finished:  # the reference skips the update of its last step
            return
        order = np.concatenate((np.delete(np.arange(len(tree)), verdict.nodes), verdict.nodes))
        self.matrix[tree.tokens[order], : self.top_k] = top.tokens[order, : self.top_k]  # the last of equal tokens wins

    def finish(self, seq: Sequence) -> None:
        """Nothing is kept for a request."""

    def reset(self) -> None:
        self.matrix[:] = 0

    def state(self) -> dict[str, Any]:
        return {"matrix": self.matrix.copy()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of state().

        Raises:
            ValueError: no matrix of this shape, or an id outside the vocabulary; nothing is changed then.
        """
        matrix = np.asarray(state.get("matrix"))
        if matrix.shape != self.matrix.shape or matrix.min() < 0 or matrix.max() >= self.vocab_size:
            raise ValueError(
                f"matrix must be {self.matrix.shape} ids in [0, {self.vocab_size}), got shape {matrix.shape}; use the same model"
            )
        self.matrix[:] = matrix
