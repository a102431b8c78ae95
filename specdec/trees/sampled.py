"""SampledTree: children drawn from a draft model's law, for the acceptance rules that know it (verification.md sections 1, 3, 4.3).

Whatever is drawn stays in the tree, and how many children a node gets is settled before they are drawn: that is what the rules
suppose. It may depend on the node's own path: below an improbable one nothing is drawn (`confidence`), and with measured costs the
whole tree ends where a further level does not pay (verification.md 4.4). How the children of a node come:

* iid: `paths` i.i.d. paths (SpecTr, arXiv 2310.15141), merged where they agree; a node that stands for m of them has m draws.
* without_replacement: `branching[d]` distinct tokens at depth d (Sequoia, 2402.12374; recursive SD, 2402.14160).
* hybrid: one token for sure, and the others without replacement from the law without it (Hu et al., 2502.18779): the text's own
  continuation where there is a spine, else the drafter's most probable token.

    iid, paths 3, a law (.6, .4):   draws a, b, a   ->   child a with multiplicity 2, child b with 1

Draws are keyed (step, node, draw) apart from the target's noise. At temperature 0 the children are the most probable tokens, all
of them deterministic; DraftedTree makes better trees there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specdec.draft_tree import ROOT, DraftTree, Kind, Source
from specdec.sequence import SamplingParams
from specdec.sources.draft_model import DraftModel, log_law
from specdec.trees.by_model import Costs, Edges, Plan, TreeByModel, spine_kind
from specdec.trees.chain import Chain
from specdec.verify.legality import check_pair
from specdec.verify.step import DRAFT

__all__ = ["SampledTree"]

KINDS = {"iid": Kind.IID, "without_replacement": Kind.WITHOUT_REPLACEMENT, "hybrid": Kind.WITHOUT_REPLACEMENT}
CONFIDENCE = 0.05  # what it saves makes the likely paths deeper
SURE, FIRST, LAST = 0, 1, 2  # kinds of proposals: deterministic; drawn first; later
SPINE = 3  # and the spine's (this and the next two, by match)
RULE_OF = {"iid": "kseq", "without_replacement": "recursive_rejection", "hybrid": "recursive_rejection"}


class SampledTree(TreeByModel):
    """Tree builder around one DraftModel.

    Args:
        model: drafts; it belongs to this builder alone.
        draw: "iid", "without_replacement" or "hybrid".
        rule: acceptance rule; None: one made for this draw.
        branching: children of a node at depth 0, 1, ...; the last number holds for all greater depths. With "iid" the first
            number is that of the paths and the others are not used.
        confidence: a node gets no children where the drafter itself says its path with less than this probability; tokens of the
            spine count as certain. Nothing learned is in it, so that without costs a seed fixes the text.
        costs, spine, sampling: see TreeByModel; a spine is for "hybrid".

    Raises:
        ValueError: no such draw or rule, a rule that is not lossless for the draw, a branching below 1, a spine beside other draws.
    """

    def __init__(
        self,
        model: DraftModel,
        draw: str = "hybrid",
        rule: str | None = None,
        branching: Seq[int] = (2, 1),
        confidence: float = CONFIDENCE,
        costs: Costs | None = None,
        spine: Chain | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        if draw not in KINDS:
            raise ValueError(f"draw must be one of {', '.join(KINDS)}, got {draw!r}")
        if not branching or min(branching) < 1:
            raise ValueError(f"branching must be numbers >= 1, at least one, got {branching!r}")
        if spine is not None and draw != "hybrid":
            raise ValueError(f'spine needs draw="hybrid", whose sure tokens it gives, got draw={draw!r}')
        super().__init__(model, costs, spine, sampling)
        self.draw, self.branching, self.confidence = draw, tuple(branching), confidence
        self.rule = rule or RULE_OF[draw]
        check_pair(self.rule, KINDS[draw], chain=max(branching) == 1)

    def plan(self, **shared: Any) -> _Draws:
        return _Draws(**shared, draw=self.draw, branching=self.branching, confidence=self.confidence)


@dataclass
class _Draws(Plan):
    """Level by level. Whatever decides how many draws a node gets was known before them."""

    draw: str = "hybrid"
    branching: Seq[int] = (1,)
    confidence: float = CONFIDENCE
    kinds: list[int] = field(init=False, default_factory=lambda: [int(Kind.DETERMINISTIC)])
    order: list[int] = field(init=False, default_factory=lambda: [0])
    counts: list[int] = field(init=False, default_factory=lambda: [1])
    said: list[float] = field(
        init=False, default_factory=lambda: [1.0]
    )  # probability of the path by the drafter, see `confidence`
    laws: dict[int, np.ndarray] = field(init=False, default_factory=dict)  # node -> [V] float32; none at temperature 0
    wanted: dict[int, int] = field(init=False)  # node that is being read -> children it gets (of i.i.d. paths: draws)
    drawn: int = field(init=False)  # nodes and repeated draws so far
    begun: int = field(init=False)  # first node of the newest level

    def __post_init__(self) -> None:
        super().__post_init__()
        self.begun = self.drawn = len(self.tokens)
        self.kinds, self.order, self.counts = (column * self.drawn for column in (self.kinds, self.order, self.counts))
        self.said = [1.0] * self.drawn
        self._want([node for node in self.expanded if self.depths[node] < self.depth])

    def _want(self, nodes: Seq[int]) -> None:
        """Settle how many children each of these nodes gets, its spine's aside; the last level may be narrower."""
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

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on: their children are drawn."""
        if not len(logits):
            return
        laws = log_law(logits, self.params).exp().cpu().numpy()
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
            self.said += (self.said[node] * whole[self.tokens[begin:]]).tolist()
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
        self._want([node for node in level if self.said[node] >= self.confidence])
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
