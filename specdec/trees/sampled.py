"""SampledTree: children drawn from a draft model's law, for the acceptance rules that know it (verification.md sections 1, 3, 4.3).

Whatever is drawn stays in the tree, and how many children a node gets is settled before they are drawn: that is what the rules
suppose. Everything known by then may count (verification.md 4.4): the levels above, the drafter's law at the node, what such draws
were worth in earlier steps. So each level is settled at once: the first draw of each of its nodes, the second, ... and the draws that
may follow below them, as those of a mean node, are taken best first until the budget is used up; its own share is what is drawn
(Sequoia's tree, arXiv 2402.12374, anew for every level with the chances at hand). A drafter that is right 4 times of 5 gets long
thin trees, one that is right 1 time of 6 broad ones. Worked example, 3 nodes to spend at a root whose first draw is right with .5 and
second with .3, a mean node's with .5 and .1::

    first .5, second .3, and .25 below the first   ->   the root draws 2, and 1 node is left for the next level

With measured costs the budget is that of the mean tree of the most tokens a second, and the tree ends where a further level does
not pay. Below an improbable node nothing is drawn (`confidence`). How the children of a node come:

* iid: i.i.d. paths (SpecTr, arXiv 2310.15141), merged where they agree; a node that stands for m of them has m draws.
* without_replacement: distinct tokens (Sequoia; recursive SD, 2402.14160).
* hybrid: one token for sure, and the others without replacement from the law without it (Hu et al., 2502.18779): the text's own
  continuation where there is a spine, else the drafter's most probable token.

    iid, paths 3, a law (.6, .4):   draws a, b, a   ->   child a with multiplicity 2, child b with 1

Draws are keyed (step, node, draw) apart from the target's noise. At temperature 0 the children are the most probable tokens, all
of them deterministic; DraftedTree makes better trees there.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from specdec.draft_tree import ROOT, DraftTree, Kind, Source
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.draft_model import DraftModel, log_law
from specdec.trees.by_model import Costs, Edges, Plan, TreeByModel, forward_seconds, spine_kind
from specdec.trees.chain import Chain
from specdec.trees.trust import BINS, CERTAIN, DRAWS, RATE, Trust, bins
from specdec.verify.legality import check_pair
from specdec.verify.step import DRAFT

__all__ = ["SampledTree"]

KINDS = {"iid": Kind.IID, "without_replacement": Kind.WITHOUT_REPLACEMENT, "hybrid": Kind.WITHOUT_REPLACEMENT}
CONFIDENCE = 0.05  # what it saves makes the likely paths deeper
SURE, FIRST, LAST = 0, 1, 3  # kinds of proposals: deterministic; drawn first, second, later
SPINE = 4  # and the spine's (this and the next two, by match)
FLOOR = 1e-5  # tokens of less probability are nothing to count on
UNBORN = -1
TIMES = np.geomspace(0.01, 1e5, 80)  # see `_drawn`
PATHS = (2,)  # of i.i.d. draws
RULE_OF = {"iid": "kseq", "without_replacement": "recursive_rejection", "hybrid": "recursive_rejection"}


class SampledTree(TreeByModel):
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        draw: "iid", "without_replacement" or "hybrid".
        rule: acceptance rule; None: one made for this draw.
        branching: children of a node at depth 0, 1, ...; the last number holds for all greater depths. With "iid" the first
            number is that of the paths, a node that stands for m of them has m draws. None: as many as are worth their nodes,
            and 2 paths: how often a draw of several equal ones was right does not say what one more would have brought.
        confidence: a node gets no children where its chance to be accepted is less.
        costs, spine, sampling: see TreeByModel; a spine is for "hybrid".

    Raises:
        ValueError: no such draw or rule, a rule that is not lossless for the draw, a branching below 1, a spine beside other draws.
    """

    def __init__(
        self,
        model: DraftModel,
        draw: str = "hybrid",
        rule: str | None = None,
        branching: Seq[int] | None = None,
        confidence: float = CONFIDENCE,
        costs: Costs | None = None,
        spine: Chain | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        if draw not in KINDS:
            raise ValueError(f"draw must be one of {', '.join(KINDS)}, got {draw!r}")
        if branching is not None and (not branching or min(branching) < 1):
            raise ValueError(f"branching must be numbers >= 1, at least one, got {branching!r}")
        if spine is not None and draw != "hybrid":
            raise ValueError(f'spine needs draw="hybrid", whose sure tokens it gives, got draw={draw!r}')
        super().__init__(model, costs, spine, sampling)
        if branching is None and draw == "iid":
            branching = PATHS
        self.draw, self.branching, self.confidence = draw, branching and tuple(branching), confidence
        self.rule = rule or RULE_OF[draw]
        self._own: dict[int, Trust] = {}  # request -> what it has taught, where none may know of another
        check_pair(self.rule, KINDS[draw], chain=branching is not None and max(branching) == 1)

    def trust_of(self, seq: Sequence) -> Trust:
        """Of the request's own steps alone, where its coins may be those of an earlier one."""
        return super().trust_of(seq) if self.remembers else self._own.setdefault(seq.id, Trust())

    def finish(self, seq: Sequence) -> None:
        super().finish(seq)
        self._own.pop(seq.id, None)

    def _draft(self, seqs: Seq[Sequence], budgets: Seq[int], limits: Seq[int]) -> list[DraftTree]:
        if self.costs is not None and self.branching is None:
            most = self._best_budget(self.costs, seqs, max(budgets), max(limits))
            budgets = [min(budget, most) for budget in budgets]
        return super()._draft(seqs, budgets, limits)

    def _best_budget(self, costs: Costs, seqs: Seq[Sequence], budget: int, depth: int) -> int:
        """Nodes of the tree that is the best by tokens a second, if all nodes are as the mean of what was seen."""
        mean = self.trust_of(seqs[0]).draws
        draws = list(islice(_best_first([_Draw(mean[0], ROOT, 0, 0, mean)], mean, depth, self.confidence), budget - 1))
        tokens = np.cumsum([1.0, *(draw.chance for draw in draws)])
        levels = np.maximum.accumulate([0, *(draw.depth + 1 for draw in draws)])
        sizes = 1 + np.arange(len(tokens))
        seconds = forward_seconds(costs.target, sizes, seqs) + costs.target.host_seconds
        seconds += levels * forward_seconds(costs.drafter, np.maximum(1, sizes // np.maximum(levels, 1)), seqs)
        return 2 + int(np.argmax((tokens / seconds)[1:])) if draws else 1

    def plan(self, **shared: Any) -> _Draws:
        return _Draws(**shared, draw=self.draw, branching=self.branching, confidence=self.confidence)


@dataclass
class _Draws(Plan):
    """Level by level. Whatever decides how many draws a node gets was known before them."""

    draw: str = "hybrid"
    branching: Seq[int] | None = None
    confidence: float = CONFIDENCE
    kinds: list[int] = field(init=False, default_factory=lambda: [int(Kind.DETERMINISTIC)])
    order: list[int] = field(init=False, default_factory=lambda: [0])
    counts: list[int] = field(init=False, default_factory=lambda: [1])
    laws: dict[int, np.ndarray] = field(init=False, default_factory=dict)  # node -> [V] float32; none at temperature 0
    wanted: dict[int, int] = field(init=False)  # node that is being read -> draws it gets
    drawn: int = field(init=False)  # nodes and repeated draws so far
    begun: int = field(init=False)  # first node of the newest level
    worth: dict[int, np.ndarray] = field(init=False, default_factory=dict)  # node -> [DRAWS] chance of each draw to be right

    def __post_init__(self) -> None:
        super().__post_init__()
        self.begun = self.drawn = len(self.tokens)
        self.kinds, self.order, self.counts = (column * self.drawn for column in (self.kinds, self.order, self.counts))
        self._want([node for node in self.expanded if self.depths[node] < self.depth])

    def _want(self, nodes: Seq[int]) -> None:
        """Settle how many children each of these nodes gets, its spine's aside; the last level may be narrower."""
        if self.branching is None:
            self.wanted = self._best_draws({node: self.worth.get(node, self.trust.draws) for node in nodes})
            return
        left = self.budget - self.drawn
        if self.draw == "iid":
            paths = {node: self.counts[node] if node else self.branching[0] for node in nodes}
            enough = ROOT in paths or sum(paths.values()) <= left
            self.wanted = {node: min(many, left) if enough else 0 for node, many in paths.items()}
            return
        self.wanted = {}
        share = left if self.guessed else left // max(1, len(nodes))
        for node in nodes:
            many = self.branching[min(self.depths[node], len(self.branching) - 1)] - (node < self.guessed)
            self.wanted[node] = min(many, share, left)
            left -= self.wanted[node]

    def _best_draws(self, worths: dict[int, np.ndarray]) -> dict[int, int]:
        """How many draws of each node are among the best that the budget has room for; what it leaves goes to deeper levels."""
        starts = [_Draw(self.chances[node] * worth[0], node, 0, self.depths[node], worth) for node, worth in worths.items()]
        best = _best_first(starts, self.trust.draws, self.depth, self.confidence)
        wanted = dict.fromkeys(worths, 0)
        for draw in islice(best, self.budget - len(self.tokens)):
            if draw.node >= 0:
                wanted[draw.node] += 1
        return wanted

    def _foresee(self, nodes: Seq[int], laws: np.ndarray) -> None:
        """Settle how many children each of these nodes gets, whose laws [M, V] have just been read."""
        for node, law in zip(nodes, laws):
            if node < self.guessed:  # the spine's child is there, and waits for this
                self._weigh(node, [node + 1], law)
        self.worth |= {node: self._worth_of(node, law) for node, law in zip(nodes, laws)}
        self._want([node for node in nodes if self.depths[node] < self.depth])

    def _worth_of(self, node: int, law: np.ndarray) -> np.ndarray:
        """[DRAWS] chance of each child that the node may get to be the right one, before any is drawn from `law` [V]."""
        law, table = law.copy(), self.trust.table()
        if self.params.temperature == 0:
            return _falling(table[SURE, bins(np.log(np.maximum(np.sort(law)[-DRAWS:][::-1], 1e-30)))])
        if node < self.guessed:
            law[self.tokens[node + 1]] = 0.0
        sure = []
        if self.draw == "hybrid" and node >= self.guessed:
            sure = [table[SURE, bins(np.log(max(law.max(), 1e-30)))]]
            law[law.argmax()] = 0.0
        kinds = np.minimum(FIRST + np.arange(DRAWS - len(sure)), LAST)
        drawn = (_drawn(law, len(kinds)) * table[kinds]).sum(1)
        return _falling(np.array([*sure, *drawn]))

    def learn(self, node: int, token: int) -> None:
        super().learn(node, token)
        if (worth := self.worth.get(node)) is not None:
            self.trust.draws += RATE * (worth - self.trust.draws)

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on: their children are drawn."""
        if not len(logits):
            return
        laws = log_law(logits, self.params).exp().cpu().numpy()
        if self.branching is None:
            self._foresee(self.expanded[first:], laws)
        for node, law in zip(self.expanded[first:], laws):
            many, begin, whole = self.wanted.get(node, 0), len(self.tokens), law.copy()
            sure = [node + 1] if node < self.guessed else []  # the spine's
            if sure:
                law[self.tokens[node + 1]] = 0.0 if self.params.temperature else -1.0
            if self.params.temperature == 0:
                self._add_sure(node, law, many)
            elif self.draw == "iid":
                self._add_iid(node, law, many)
            else:
                if self.draw == "hybrid" and many and not sure:
                    self._add_sure(node, law, 1)
                    law[law.argmax()] = 0.0
                    many -= 1
                self._add_distinct(node, law, many)
            self._weigh(node, [*sure, *range(begin, len(self.tokens))], whole)
            self.drawn += self.wanted.get(node, 0)

    def _weigh(self, node: int, children: list[int], law: np.ndarray) -> None:
        """The chances of a node's children, by what such proposals were worth before."""
        if not children:
            return
        drawn = np.array([self.kinds[child] != Kind.DETERMINISTIC for child in children], np.bool_)
        order = np.array([self.order[child] for child in children], np.intp)
        kinds = np.where(drawn, np.minimum(FIRST + order, LAST), SURE)
        if node < self.guessed:
            kinds[0] = spine_kind(SPINE, self.match)
        tokens = np.array([self.tokens[child] for child in children])
        logs = np.log(np.maximum(law[tokens], 1e-30))
        self.edges[node] = Edges(tokens, kinds, logs)
        for child, chance in zip(children, (self.chances[node] * self.trust.chances(kinds, logs)).tolist()):
            self.chances[child] = chance

    def _add(self, node: int, token: int, kind: Kind, order: int) -> None:
        self.add(node, token, 0.0)  # weighed with its siblings
        self.kinds.append(int(kind))
        self.order.append(order)
        self.counts.append(1)

    def _add_sure(self, node: int, law: np.ndarray, many: int) -> None:
        """The most probable tokens."""
        left = law.copy()
        for _ in range(min(many, len(law))):
            token = int(left.argmax())
            left[token] = -1.0
            self._add(node, token, Kind.DETERMINISTIC, 0)

    def _add_iid(self, node: int, law: np.ndarray, many: int) -> None:
        self.laws[node] = law
        place: dict[int, int] = {}
        for draw in range(many):
            token = self._pick(law, node, draw)
            if token in place:
                self.counts[place[token]] += 1
            else:
                place[token] = len(self.tokens)
                self._add(node, token, Kind.IID, draw)

    def _add_distinct(self, node: int, law: np.ndarray, many: int) -> None:
        self.laws[node] = law
        left = law.copy()
        for draw in range(many):
            if not left.any():
                return  # every token that the law allows is there
            token = self._pick(left, node, draw)
            left[token] = 0.0
            self._add(node, token, Kind.WITHOUT_REPLACEMENT, draw)

    def _pick(self, law: np.ndarray, node: int, draw: int) -> int:
        return self.seq.randomness.pick(law, len(self.seq.token_ids), node, draw, DRAFT)

    def fresh(self) -> list[int]:
        """The nodes of the new level, but for those that are not worth children."""
        level = [node for node in range(self.begun, len(self.tokens)) if self.depths[node] < self.depth]
        self._want([node for node in level if self.chances[node] >= self.confidence])
        return [node for node, many in self.wanted.items() if many]

    def expected(self) -> np.ndarray:
        return np.cumsum(self.chances)

    def size_with(self, nodes: Seq[int]) -> int:
        return len(self.tokens) + sum(self.wanted[node] for node in nodes)

    def read(self, nodes: Seq[int]) -> None:
        self.begun = len(self.tokens)
        super().read(nodes)

    def tree(self, size: int) -> DraftTree:
        """All that was drawn, whatever `size` is."""
        count = len(self.tokens)
        source = np.full(count, Source.MODEL, np.uint8)
        source[ROOT] = Source.ROOT
        source[1 : self.guessed + 1] = Source.CONTEXT
        sampled = bool(self.laws)
        probs = None
        if sampled:
            probs = np.zeros((count, len(next(iter(self.laws.values())))), np.float32)
            for node, law in self.laws.items():
                probs[node] = law
        return DraftTree(
            np.array(self.tokens, np.int64),
            np.array(self.parents, np.int32),
            source=source,
            kind=np.array(self.kinds, np.uint8) if sampled else None,
            draw_index=np.array(self.order, np.int32) if sampled else None,
            multiplicity=np.array(self.counts, np.int32) if sampled else None,
            probs=probs,
            evidence=self.drafted(range(count)),
        )


class _Draw(NamedTuple):
    """One draw that may be made."""

    chance: float  # that it is on the accepted path
    node: int  # that it is made at, UNBORN where that is a draw itself
    number: int  # draws of the node before it
    depth: int  # of the node
    worth: np.ndarray  # [DRAWS] of the node's draws


def _best_first(starts: Seq[_Draw], mean: np.ndarray, deepest: int, confidence: float) -> Iterator[_Draw]:
    """All draws worth making from `starts` on, the first ones of some nodes, by falling chance.

    What a draw will bring is not known before it is made, so that what hangs on it is as the `mean` [DRAWS] of all nodes.
    """
    ties = count()
    best = [(-draw.chance, next(ties), draw) for draw in starts]
    heapify(best)
    while best and best[0][0] < 0.0:
        chance, node, number, depth, worth = draw = heappop(best)[2]
        yield draw
        followers = []
        if number + 1 < len(worth):
            followers.append(_Draw(chance * worth[number + 1] / worth[number], node, number + 1, depth, worth))
        if depth + 1 < deepest and chance >= confidence:
            followers.append(_Draw(chance * mean[0], UNBORN, 0, depth + 1, mean))
        for follower in followers:
            heappush(best, (-follower.chance, next(ties), follower))


def _drawn(law: np.ndarray, many: int) -> np.ndarray:
    """[many, BINS] chance of the first, second ... token drawn from `law` [V] without replacement to be of each class.

    Tokens come as Poisson clocks ring, one of probability q has rung by the time t with 1 - exp(-q t); the j-th comes between the
    times when j - 1 and j are expected to have. All tokens of a class count as equally probable.
    """
    kept = law[law > FLOOR]
    place = bins(np.log(kept))
    tokens = np.bincount(place, minlength=BINS).astype(np.float64)
    mean = np.bincount(place, kept, minlength=BINS) / np.maximum(tokens, 1)
    times = np.interp(np.arange(many + 1), (tokens * -np.expm1(-mean * TIMES[:, None])).sum(1), TIMES, left=0.0)
    return np.diff(tokens * -np.expm1(-mean * times[:, None]), axis=0)


def _falling(worth: np.ndarray) -> np.ndarray:
    """No draw is worth more than one before it, and all together no more than certainty."""
    worth = np.minimum.accumulate(np.pad(worth, (0, DRAWS - len(worth))))
    return worth * min(1.0, CERTAIN / max(worth.sum(), CERTAIN))
