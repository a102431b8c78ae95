"""best_first: the tree of the nodes most likely to be accepted, whatever source proposes them.

Where a node's probability is the product of edge probabilities <= 1, the best m-node tree is the m most probable nodes, and that
set is closed under parents (drafting.md 5.2). So one heap serves every source: pop the most probable node, look up what may
follow it (`evidence`), weigh that (`calibration`), push its children. Worked example, budget 4: the root's candidates are a .6
and b .3, a's are c .5 and d .2, b's is e .9: nodes a .6, c .3 (a tie: the earlier parent's child comes after b's), b .3, e .27;
d, at .12, is cut but still counts as a trial when a is visited.

With a cost model the builder stops where the expected tokens a second are highest, and drafts nothing where speculation does not
pay; it goes on learning from the root's candidates then, and resumes when they earn it (hysteresis: `RESUME`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from specdec._jit import njit
from specdec.cost_model import CostModel
from specdec.draft_tree import NO_PARENT, DraftTree, Source, TopK, Verdict
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.context_table import ContextTable, TableArrays
from specdec.sources.ngram import SEPARATOR, IndexArrays, NgramIndex
from specdec.trees.calibration import Calibration, initial, learn, score
from specdec.trees.evidence import CONTEXTS, LEFTOVERS, NO_TOKEN, SOURCES, TAIL, Evidence, collect, new_evidence
from specdec.trees.per_class import PerClass

__all__ = ["BestFirst"]

MIN_PROB = 0.001  # less probable nodes are not worth their host time, whatever the budget
MAX_DEPTH = 64
_NONE = np.zeros(0)
RESUME = 1.05  # speculation resumes at this predicted gain over plain steps, and ends below 1


class _Growth(NamedTuple):
    """A tree while it grows, and what it grows with; N nodes of room."""

    tokens: np.ndarray  # [N] int64
    parents: np.ndarray  # [N] int32
    sources: np.ndarray  # [N] uint8
    path_probs: np.ndarray  # [N] float64, predicted probability that a node is on the accepted path
    depths: np.ndarray  # [N] int32
    following: np.ndarray  # [N] int32, next candidate of each node
    heap: np.ndarray  # [N + 1] int32, nodes by the path probability of their next candidate
    keys: np.ndarray  # [N] float64, that probability


def _room(budget: int, root: int) -> _Growth:
    """Room for `budget` nodes, the root filled in."""
    growth = _Growth(
        np.empty(budget, np.int64), np.empty(budget, np.int32), np.empty(budget, np.uint8), np.empty(budget),
        np.empty(budget, np.int32), np.empty(budget, np.int32), np.empty(budget + 1, np.int32), np.empty(budget),
    )  # fmt: skip
    growth.tokens[0], growth.parents[0], growth.sources[0], growth.path_probs[0] = root, NO_PARENT, Source.ROOT, 1.0
    growth.depths[0] = 0
    return growth


@dataclass(frozen=True, slots=True)
class _Draft:
    """What `update` needs of a built tree."""

    evidence: Evidence
    path_probs: np.ndarray  # [N] float64, predicted probability that a node is on the accepted path


@dataclass(slots=True)
class _Request:
    """One request's own text."""

    index: NgramIndex = field(default_factory=NgramIndex)
    indexed: int = 0  # leading tokens of the sequence that are in the index
    rivals: np.ndarray = field(default_factory=lambda: np.full(LEFTOVERS + 1, -1, np.int32))  # what the model weighed against
    rival_probs: np.ndarray = field(default_factory=lambda: np.zeros(LEFTOVERS + 1))  # the last committed token, best first

    def catch_up(self, seq: Sequence) -> None:
        """Index what was appended to the sequence."""
        self.index.extend(seq.token_ids[self.indexed :])
        self.indexed = len(seq.token_ids)

    def weigh(self, top: TopK, row: int) -> None:
        """Keep what the model weighed against the token it has just emitted."""
        count = min(len(self.rivals), top.tokens.shape[1])
        self.rivals[:count] = top.tokens[row, :count]
        self.rival_probs[:count] = top.probs[row, :count]


@njit
def _before(probs: np.ndarray, left: int, right: int) -> bool:
    """Heap order of nodes by their best child that is left: more probable first, then the earlier node."""
    return probs[left] > probs[right] or (probs[left] == probs[right] and left < right)


@njit
def _push(heap: np.ndarray, size: int, probs: np.ndarray, node: int) -> None:
    place = size
    while place > 0 and _before(probs, node, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = node


@njit
def _sift_down(heap: np.ndarray, size: int, probs: np.ndarray) -> None:
    """Restore the order after the key of heap[0] fell, or heap[0] was replaced."""
    node, place = heap[0], 0
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _before(probs, heap[child + 1], heap[child]):
            child += 1
        if not _before(probs, heap[child], node):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = node


@njit
def _source(buckets: np.ndarray) -> int:
    """Which kind of source proposed a candidate, from its buckets [SOURCES]."""
    context = False
    for source in range(CONTEXTS):
        context |= buckets[source] > 0 and (buckets[source] - 1) % 15 > 0
    table = False
    for source in range(CONTEXTS, SOURCES):
        table |= buckets[source] > 1
    return 3 if context and table else 1 if context else 2


@njit
def _rivals(evidence: Evidence, parent: int, tokens: np.ndarray, probs: np.ndarray) -> None:
    """Write the most probable children of a node, padded with -1."""
    for rank in range(len(tokens)):
        known = rank < evidence.counts[parent]
        tokens[rank] = evidence.tokens[parent, evidence.order[parent, rank]] if known else -1
        probs[rank] = evidence.probs[parent, evidence.order[parent, rank]] if known else 0.0


@njit
def _grow(
    own: IndexArrays, shared: IndexArrays, table: TableArrays, rivals: np.ndarray, rival_probs: np.ndarray,
    calibration: Calibration, evidence: Evidence, max_depth: int, growth: _Growth, seconds: np.ndarray, slopes: np.ndarray,
    host_seconds: float,
) -> int:  # fmt: skip
    """Fill `growth` from node 1 on (node 0 is given); returns the number of nodes N.

    Every node below N gets its evidence, leaves too: a walk that ends there learns from their candidates. `rivals` and
    `rival_probs` [R] come with the root's and are overwritten. With `CostModel.slopes` growth ends where no larger tree can pay;
    empty arrays: it fills the room.
    """
    tokens, parents, path_probs, depths = growth.tokens, growth.parents, growth.path_probs, growth.depths
    following, heap, keys = growth.following, growth.heap, growth.keys
    budget = len(tokens)
    size, count, node = 0, 1, 0
    expected, best = path_probs[0], 1.0 / seconds[1] if len(seconds) > 1 else 0.0
    while True:
        if node > 0:
            _rivals(evidence, parents[node], rivals, rival_probs)
        collect(own, shared, table, rivals, rival_probs, evidence, node)
        following[node] = 0
        score(evidence, node, calibration)
        if evidence.counts[node] > 0 and depths[node] < max_depth:
            keys[node] = path_probs[node] * evidence.probs[node, evidence.order[node, 0]]
            _push(heap, size, keys, node)
            size += 1
        if count == budget or size == 0 or keys[heap[0]] < MIN_PROB:
            return count
        if count < len(seconds) and seconds[count] > 0.0:
            best = max(best, expected / (seconds[count] + host_seconds))
            if keys[heap[0]] <= best * slopes[count]:
                return count
        parent, node = heap[0], count
        choice = evidence.order[parent, following[parent]]
        tokens[node] = evidence.tokens[parent, choice]
        parents[node] = parent
        growth.sources[node] = _source(evidence.buckets[parent, choice])
        path_probs[node] = keys[parent]
        expected += keys[parent]
        depths[node] = depths[parent] + 1
        for place in range(TAIL - 1):
            evidence.tails[node, place] = evidence.tails[parent, place + 1]
        evidence.tails[node, TAIL - 1] = tokens[node]
        count += 1
        following[parent] += 1
        if following[parent] < evidence.counts[parent]:
            keys[parent] = path_probs[parent] * evidence.probs[parent, evidence.order[parent, following[parent]]]
        else:
            size -= 1
            heap[0] = heap[size]
        _sift_down(heap, size, keys)


@njit
def _learn_path(evidence: Evidence, nodes: np.ndarray, outcomes: np.ndarray, calibration: Calibration) -> None:
    for step in range(len(nodes)):
        learn(evidence, nodes[step], outcomes[step], calibration)


def _texts(tokens: np.ndarray) -> list[bytes]:
    """The texts of a stream, each with the SEPARATOR that ends it."""
    ends = np.flatnonzero(tokens == SEPARATOR) + 1
    return [part.tobytes() for part in np.split(tokens, ends) if part.size]


class BestFirst:
    """Best-first trees over context and table evidence, calibrated online.

    The text and the calibration of running requests, the text of finished ones (`shared_tokens` at most) and the table of the
    model's own guesses are all bounded.

    Args:
        vocab_size: tokens of the model.
        cost_model: choose the size of each tree by it, within the budget; None: fill the budget.
        shared_tokens: tokens of finished requests that are kept as context for later ones.
        table_rows: most rows of the table, a power of two.
        top_k: logits a node that the table keeps, 1..8.

    Raises:
        ValueError: an argument is out of range.
    """

    sizes_itself = True

    def __init__(
        self,
        vocab_size: int,
        cost_model: CostModel | None = None,
        shared_tokens: int = 1 << 17,
        table_rows: int = 1 << 18,
        top_k: int = 8,
    ) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self.vocab_size = vocab_size
        self.cost_model = cost_model
        self.top_k = min(top_k, vocab_size)
        self._shared = NgramIndex(capacity=shared_tokens)
        self._table = ContextTable(self.top_k, table_rows)
        self._requests: dict[int, _Request] = {}
        self._calibrations: PerClass[Calibration] = PerClass(initial)
        self._speculating = True

    def start(self, seq: Sequence) -> None:
        """Index the prompt."""
        self._requests[seq.id] = request = _Request()
        request.catch_up(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """Prefill harvest: what the model expected along the prompt."""
        first = max(0, start - TAIL)
        text = np.array(seq.token_ids[first : start + len(top.tokens)], np.int32)
        self._table.observe_text(text, start - first, top)
        self._requests[seq.id].weigh(top, len(top.tokens) - 1)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        """One tree a row; with a cost model all rows get the one size that pays best for the batch."""
        costs = self.cost_model if len(seqs) == 1 else None  # of a batch a row's own nodes do not tell which size pays
        trees = [self._build(seq, budget, depth, costs) for seq, budget, depth in zip(seqs, budgets, depths)]
        if self.cost_model is None or not trees:
            return trees
        size = self._best_size(trees, max(len(seq.token_ids) for seq in seqs))
        return [tree.prefix(size) for tree in trees]

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """Learn from every candidate of the visited nodes, and from the logits of all nodes; rows of -1 in `top` are skipped."""
        draft, nodes = tree.evidence, verdict.nodes
        if isinstance(draft, _Draft):
            outcomes = np.append(tree.tokens[nodes[1:]], verdict.next_token)
            _learn_path(draft.evidence, nodes, outcomes, self._calibrations[seq.params])
        if top is not None:
            tails = draft.evidence.tails if isinstance(draft, _Draft) else _tails(seq, tree, len(nodes))
            self._table.observe_nodes(tails, nodes, top)
            self._requests[seq.id].weigh(top, int(nodes[-1]))

    def finish(self, seq: Sequence) -> None:
        """Keep the request's text as context of later ones."""
        request = self._requests.pop(seq.id, None)
        if request is not None:
            self._shared.extend([*seq.token_ids, SEPARATOR])

    def reset(self) -> None:
        """Forget everything learned; running requests keep their own text."""
        self._shared.clear()
        self._table.clear()
        self._calibrations.clear()
        self._speculating = True

    def state(self) -> dict[str, Any]:
        """The table, the text of finished requests and the calibration of greedy decoding."""
        table = {f"table.{name}": array for name, array in self._table.state().items()}
        calibration = self._calibrations[SamplingParams()]
        learned = {f"calibration.{name}": array for name, array in calibration._asdict().items()}
        return {**table, **learned, "shared.tokens": self._shared.tokens.copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of state().

        Raises:
            ValueError: an array is missing or has another shape, or holds what none of this vocabulary does; nothing is changed.
        """
        table, calibration, texts = self._checked(state)
        self._table.load_state(table)
        self._set(calibration, texts)

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Take in what another builder learned: rows of the table as ContextTable.merge_state, of all texts each once, the other's
        before those that are only here (the oldest are forgotten first), and the calibration with more trials.

        Raises:
            ValueError: as load_state.
        """
        table, theirs, texts = self._checked(state)
        own = self._calibrations[SamplingParams()]
        self._table.merge_state(table)
        merged = list(dict.fromkeys([*_texts(texts), *_texts(self._shared.tokens)]))
        calibration = theirs if theirs.trials.sum() > own.trials.sum() else own
        self._set(calibration, np.frombuffer(b"".join(merged), np.int32))

    def _set(self, calibration: Calibration, texts: np.ndarray) -> None:
        self._calibrations[SamplingParams()] = calibration
        self._shared.clear()
        self._shared.extend(texts)

    def _checked(self, state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Calibration, np.ndarray]:
        """The table's arrays, the calibration and the texts of a state."""
        learned = []
        for name, array in initial()._asdict().items():
            found = state.get(f"calibration.{name}")
            if found is None or found.shape != array.shape or found.dtype.kind != "f" or not np.isfinite(found).all():
                raise ValueError(f"state has no calibration.{name} of shape {array.shape}; pass what BestFirst.state() returned")
            learned.append(np.array(found, np.float64))
        calibration = Calibration(*learned)
        if not ((calibration.trials > 0) & (calibration.success >= 0)).all():
            raise ValueError("state's calibration counts fewer than 0 successes or no trials: damaged")
        texts = state.get("shared.tokens")
        if texts is None or texts.ndim != 1 or texts.dtype != np.int32:
            raise ValueError("state has no shared.tokens of one dimension; pass what BestFirst.state() returned")
        table = self._table.checked({name[6:]: array for name, array in state.items() if name.startswith("table.")})
        for name, tokens in {"shared.tokens": texts, "table.tokens": table["tokens"], "table.keys": table["keys"]}.items():
            if tokens.size and (tokens.max() >= self.vocab_size or (name == "shared.tokens" and tokens.min() < SEPARATOR)):
                raise ValueError(f"state's {name} has ids outside [0, {self.vocab_size}); was it saved with another tokenizer?")
        return table, calibration, texts

    def _build(self, seq: Sequence, budget: int, depth: int, costs: CostModel | None) -> DraftTree:
        """A tree of `budget` nodes, or with costs of as many as may pay."""
        request = self._requests[seq.id]
        request.catch_up(seq)
        evidence = new_evidence(budget)
        tail = seq.token_ids[-TAIL:]
        evidence.tails[0, TAIL - len(tail) :] = tail
        growth = _room(budget, tail[-1])
        seconds, slopes = (_NONE, _NONE) if costs is None else costs.slopes(len(seq.token_ids))
        count = _grow(
            request.index.arrays, self._shared.arrays, self._table.arrays, request.rivals.copy(), request.rival_probs.copy(),
            self._calibrations[seq.params], evidence, min(depth, MAX_DEPTH), growth, seconds, slopes,
            0.0 if costs is None else costs.host_seconds,
        )  # fmt: skip
        return DraftTree(
            growth.tokens[:count],
            growth.parents[:count],
            growth.sources[:count],
            evidence=_Draft(evidence, growth.path_probs[:count]),
        )

    def _best_size(self, trees: list[DraftTree], context: int) -> int:
        """The size with the highest expected tokens a second, 1 where none beats plain steps."""
        assert self.cost_model is not None
        expected = np.zeros(max(map(len, trees)))
        for tree in trees:
            assert isinstance(tree.evidence, _Draft)
            prefix = np.cumsum(tree.evidence.path_probs)
            expected[: len(prefix)] += prefix
            expected[len(prefix) :] += prefix[-1]
        size, gain = self.cost_model.best_size(expected / len(trees), context, len(trees))
        self._speculating = gain > (1.0 if self._speculating else RESUME)
        return size if self._speculating else 1


def _tails(seq: Sequence, tree: DraftTree, emitted: int) -> np.ndarray:
    """[N, TAIL] int32: the last tokens up to and with each node of a tree that another builder drafted."""
    tails = np.full((len(tree), TAIL), NO_TOKEN, np.int32)
    text = seq.token_ids[: len(seq.token_ids) - emitted][-TAIL:]
    tails[0, TAIL - len(text) :] = text
    for node in range(1, len(tree)):
        tails[node, :-1] = tails[tree.parents[node], 1:]
        tails[node, -1] = tree.tokens[node]
    return tails
