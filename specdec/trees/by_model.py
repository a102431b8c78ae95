"""TreeByModel: what the builders around a DraftModel share: the life cycle of a request, and the loop over the drafter's forwards.

With measured costs a further forward of the drafter is made only where it pays. Worked example: the tree so far is worth 2.5
tokens and a step with it takes 50 + 20 ms; another forward of 10 ms is expected to add .5 tokens: 3.0 / 80 beats 2.5 / 70, so it
is made; at .3 tokens it would not be. Whether to draft at all is not decided here: `ByRate` compares with not drafting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from specdec.cost_model import CostModel
from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, TopK, Verdict
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.draft_model import CATCH_UP, DraftModel, Growth
from specdec.trees.base import TreeBuilder
from specdec.trees.chain import Chain
from specdec.trees.per_class import PerClass
from specdec.trees.trust import HOLD, Trust

__all__ = ["Costs", "Drafted", "Edges", "Plan", "TreeByModel", "forward_seconds", "spine_kind"]


LONGEST_SPINE = 15
READ_NODES = 64  # of a forward whose seconds a node are those of reading the text
DEEPEST = 8  # levels that are looked at where nobody has seen the drafter work


class Costs(NamedTuple):
    """Measured seconds of a forward, and the clock that goes on measuring them."""

    target: CostModel
    drafter: CostModel
    clock: Callable[[], float] = time.perf_counter


class Edges(NamedTuple):
    """The proposals for one node's children, as Trust counts them."""

    tokens: np.ndarray  # [C]
    kinds: np.ndarray  # [C]
    logs: np.ndarray  # [C] log-probabilities by the drafter


@dataclass(frozen=True, slots=True)
class Drafted:
    """`evidence` of these trees."""

    nodes: np.ndarray  # [N] each node's number in the plan
    read: np.ndarray  # [N] int32, and in the growth; NO_PARENT where the drafter has not read it
    plan: Plan

    def learn(self, tree: DraftTree, verdict: Verdict) -> None:
        """What the target said after the nodes that it visited."""
        said = [*tree.tokens[verdict.nodes[1:]].tolist(), verdict.next_token]
        for node, token in zip(self.nodes[verdict.nodes].tolist(), said):
            self.plan.learn(node, token)


@dataclass
class Plan:
    """One row's tree in the making. A node is a candidate for the tree; `numbers` says which of them the drafter reads.

    Node 1 ... `guessed` are the spine's, which come with the root; they get their chances with their parents' laws.
    """

    seq: Sequence
    params: SamplingParams  # of the drafter
    growth: Growth  # what the drafter reads
    budget: int
    depth: int
    trust: Trust
    match: int  # tokens of context that the spine's text shares
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False, default_factory=lambda: [NO_PARENT])
    depths: list[int] = field(init=False, default_factory=lambda: [0])
    chances: list[float] = field(init=False, default_factory=lambda: [1.0])  # of being on the accepted path
    numbers: list[int] = field(init=False, default_factory=lambda: [ROOT])  # node -> node of the growth, NO_PARENT: not read
    expanded: list[int] = field(init=False, default_factory=lambda: [ROOT])  # node of the growth -> node
    edges: dict[int, Edges] = field(init=False, default_factory=dict)  # node -> its children
    guessed: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [self.seq.token_ids[-1]]
        for node, token in enumerate(self.growth.tokens[1:]):
            self.add(node, token, 0.0)
            self.numbers[-1] = node + 1
            self.expanded.append(node + 1)
        self.guessed = len(self.tokens) - 1

    def add(self, parent: int, token: int, chance: float) -> None:
        """A new node."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.chances.append(chance)
        self.numbers.append(NO_PARENT)

    def receive(self, logits: torch.Tensor, first: int) -> None:
        """Logits [M, V] of the growth's nodes from `first` on."""
        raise NotImplementedError

    def fresh(self) -> list[int]:
        """The nodes that the drafter would read next; none: the tree is complete."""
        raise NotImplementedError

    def learn(self, node: int, token: int) -> None:
        """The target said `token` after this node, which it visited."""
        if (children := self.edges.get(node)) is not None:
            self.trust.learn(children.kinds, children.logs, children.tokens == token)

    def promise(self, nodes: Seq[int]) -> float:
        """Tokens that the children of these nodes are expected to add to the accepted path."""
        return self.trust.hold * sum(self.chances[node] for node in nodes)

    def expected(self) -> np.ndarray:
        """[M] float64: tokens that a step is expected to emit with the best m nodes, m = 1 ... M."""
        raise NotImplementedError

    def size_with(self, nodes: Seq[int]) -> int:
        """Nodes of the tree when `nodes` have been read and have children."""
        raise NotImplementedError

    def read(self, nodes: Seq[int]) -> None:
        """Adds them to the growth."""
        for node in nodes:
            self.numbers[node] = self.growth.add(self.numbers[self.parents[node]], self.tokens[node])
            self.expanded.append(node)

    def tree(self, size: int) -> DraftTree:
        """The tree, of at most `size` nodes where the builder may choose; its `evidence` is a Drafted."""
        raise NotImplementedError

    def drafted(self, nodes: Seq[int]) -> Drafted:
        """The evidence of a tree of these nodes."""
        return Drafted(np.array(nodes, np.intp), np.array([self.numbers[node] for node in nodes], np.int32), self)


class TreeByModel:
    """Tree builder around one DraftModel, which belongs to it alone.

    Args:
        model: drafts.
        costs: measured times, by which the tree's depth and size are chosen; None: as large as the budget allows.
        spine: builder of chains, continuations of the text, whose tokens the first forward reads together with the root; None: none.
        sampling: temperature and truncation of the drafter's laws where a request samples; None: the request's own.
    """

    top_k = 0
    compiles = False
    prunes = False  # may leave nodes out of a tree for what they are: no rule but `match` allows it

    def __init__(
        self,
        model: DraftModel,
        costs: Costs | None = None,
        spine: Chain | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        if sampling is not None and sampling.temperature == 0:
            raise ValueError("sampling must have a temperature above 0, got 0; greedy requests have their own laws anyway")
        self.model, self.costs, self.spine, self.sampling = model, costs, spine, sampling
        self.parts: list[TreeBuilder] = [] if spine is None else [spine]
        self._match: dict[int, int] = {}  # request -> tokens of context that the spine's text shares
        self.sizes_itself = costs is not None
        self.forwards = 0  # of the drafter, for statistics
        self.clock = time.perf_counter if costs is None else costs.clock
        self.trusts: PerClass[Trust] = PerClass(Trust)

    @property
    def remembers(self) -> bool:
        """Whether a request's drafts depend on earlier requests: by what paid then, or by a drafter or a spine that has read them."""
        return self.costs is not None or self.model.remembers or (self.spine is not None and self.spine.remembers)

    def plan(self, **shared: Any) -> Plan:
        """A Plan of these, the fields of every Plan; the growth may hold nodes beside the root, which are read with it."""
        raise NotImplementedError

    def plain_seconds(self, seqs: Seq[Sequence]) -> float:
        """Of a step without drafts; 1 without costs."""
        if self.costs is None:
            return 1.0
        return float(forward_seconds(self.costs.target, 1, seqs))

    def reading_seconds(self, seqs: Seq[Sequence]) -> float:
        """Of what a step with this drafter must read first; 0 without costs."""
        if self.costs is None:
            return 0.0
        unread = sum(tokens for seq in seqs if (tokens := self.model.unread(seq)) > CATCH_UP)
        return unread * float(forward_seconds(self.costs.drafter, READ_NODES, seqs[:1])) / READ_NODES

    def outlook(self, seqs: Seq[Sequence]) -> tuple[float, float] | None:
        """Tokens and plain steps of a step of the depth that pays best, if a level of two nodes holds the target's token with the chance
        HOLD: what is to be expected of a drafter that nobody has seen work; None without costs."""
        if self.costs is None:
            return None
        levels = np.arange(1, DEEPEST + 1)
        tokens = (1 - HOLD ** (levels + 1)) / (1 - HOLD)
        seconds = forward_seconds(self.costs.target, 1 + 2 * levels, seqs) + self.costs.target.host_seconds
        seconds += levels * forward_seconds(self.costs.drafter, 2, seqs)
        best = int(np.argmax(tokens / seconds))
        return float(tokens[best]), float(seconds[best]) / self.plain_seconds(seqs)

    def guesses(self, seq: Sequence, longest: int) -> list[int]:
        """Tokens that may follow the text, to be read together with the root: the spine's, as far as the drafter knows them."""
        if self.spine is None or longest < 1 or not self.model.reads_guesses:
            return []
        chain = self.spine.source.chain(seq, min(longest, LONGEST_SPINE))
        self._match[seq.id] = chain.match_length
        unknown = np.append(chain.tokens >= self.model.reader.vocab_size, True)
        return chain.tokens[: np.argmax(unknown)].tolist()

    def laws(self, seq: Sequence) -> SamplingParams:
        """Temperature and truncation of the drafter for this request."""
        return seq.params if self.sampling is None or seq.params.temperature == 0 else self.sampling

    def trust_of(self, seq: Sequence) -> Trust:
        """What is known of the drafter when it drafts for this request."""
        return self.trusts[seq.params]

    def start(self, seq: Sequence) -> None:
        self.model.start(seq)
        if self.spine is not None:
            self.spine.start(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """The drafter reads the prompt itself."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        limits = [min(depth, self.model.depth_limit(seq)) for seq, depth in zip(seqs, depths)]
        trees = []
        for drafts, run in groupby(range(len(seqs)), lambda row: limits[row] >= 0):  # below 0: longer than the drafter's context
            rows = list(run)
            some = slice(rows[0], rows[-1] + 1)  # the drafter reads consecutive rows
            if drafts:
                trees += self._draft(seqs[some], budgets[some], limits[some])
            else:
                trees += [DraftTree.root_only(seq.token_ids[-1]) for seq in seqs[some]]
        return trees

    def _draft(self, seqs: Seq[Sequence], budgets: Seq[int], limits: Seq[int]) -> list[DraftTree]:
        """The trees of consecutive rows, level by level together."""
        begin = self.clock()
        guesses = [self.guesses(seq, min(budget - 1, limit)) for seq, budget, limit in zip(seqs, budgets, limits)]
        growths, logits = self.model.grow(seqs, guesses)
        plans = [
            self.plan(
                seq=seq,
                params=self.laws(seq),
                growth=growth,
                budget=budget,
                depth=limit,
                trust=self.trust_of(seq),
                match=self._match.get(seq.id, 0),
            )
            for seq, growth, budget, limit in zip(seqs, growths, budgets, limits)
        ]
        known, started = [0] * len(plans), begin
        context = max(len(seq.token_ids) for seq in seqs)
        while True:
            self.forwards += 1
            for plan, rows, first in zip(plans, logits, known):
                plan.receive(rows, first)
            now = self.clock()
            if self.costs is not None:
                width = max(len(growth.tokens) - old for growth, old in zip(growths, known))
                if known[0]:
                    self.costs.drafter.observe(width, context, len(seqs), now - started)
                else:  # the first forward reads the text too, which is no reason to draft more
                    begin = max(begin, now - float(forward_seconds(self.costs.drafter, width, seqs)))
            known, started = [len(growth.tokens) for growth in growths], now
            fresh = [plan.fresh() for plan in plans]
            size = self._best_size(plans, context, now - begin)
            if not any(fresh) or not self._pays(plans, fresh, size, context, now - begin):
                return [plan.tree(size) for plan in plans]
            for plan, nodes in zip(plans, fresh):
                plan.read(nodes)
            logits = self.model.extend(seqs, growths, known)

    def _best_size(self, plans: Seq[Plan], context: int, spent: float) -> int:
        """Nodes of the largest tree of the batch, by tokens a second; `spent` seconds are gone whatever it is."""
        most = max(len(plan.expected()) for plan in plans)
        if self.costs is None or not self.prunes:
            return most
        expected = _together(plans)
        sizes, seconds = self.costs.target.curve(context, len(plans))
        reached = np.minimum(sizes, most)
        return int(reached[np.argmax(expected[reached - 1] / (seconds + spent))])

    def _pays(self, plans: Seq[Plan], fresh: Seq[list[int]], size: int, context: int, spent: float) -> bool:
        """Whether a forward of the drafter over the fresh nodes raises the expected tokens a second."""
        if self.costs is None:
            return True
        rows = len(plans)
        gained = sum(plan.promise(nodes) for plan, nodes in zip(plans, fresh))
        worth = _together(plans)[size - 1]
        now = self.costs.target.seconds(size, context, rows) + spent
        larger = size if self.prunes else max(plan.size_with(nodes) for plan, nodes in zip(plans, fresh))
        then = self.costs.target.seconds(larger, context, rows) + spent
        then += self.costs.drafter.seconds(max(map(len, fresh)), context, rows)
        return bool((worth + gained) * now > worth * then)

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """The drafter keeps what it has read of the accepted path, and learns how far to trust itself."""
        if isinstance(tree.evidence, Drafted):  # else the drafter has read nothing of it
            read = tree.evidence.read[verdict.nodes]
            self.model.keep(seq, read[: np.argmin(np.append(read, NO_PARENT))].tolist())
            tree.evidence.learn(tree, verdict)
        self.model.verified(seq, verdict.nodes.tolist())
        if self.spine is not None:
            self.spine.update(seq, tree, verdict, top)  # now, or what a request's last step emits would reach nobody

    def finish(self, seq: Sequence) -> None:
        self.model.finish(seq)
        if self.spine is not None:
            self.spine.finish(seq)
            self._match.pop(seq.id, None)

    def reset(self) -> None:
        """Forget how far the drafter can be trusted, and what it and the spine's source has learned across requests."""
        self.trusts.clear()
        self.model.reset()
        if self.spine is not None:
            self.spine.reset()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def spine_kind(first: int, match: int) -> int:
    """Kind of proposal of a spine's token, `first` or one of the next two, by the tokens of context that recurred."""
    return first + (0 if match <= 2 else 1 if match <= 6 else 2)


def forward_seconds(costs: CostModel, nodes: int | np.ndarray, seqs: Seq[Sequence]) -> np.ndarray:
    """Seconds of a forward over `nodes` nodes a row, of the shape of `nodes`."""
    sizes, seconds = costs.curve(max(len(seq.token_ids) for seq in seqs), len(seqs))
    return seconds[np.minimum(np.searchsorted(sizes, nodes), len(sizes) - 1)]


def _together(plans: Seq[Plan]) -> np.ndarray:
    """[M] expected tokens of all rows when each has its best m nodes."""
    curves = [plan.expected() for plan in plans]
    total = np.zeros(max(map(len, curves)))
    for curve in curves:
        total[: len(curve)] += curve
        total[len(curve) :] += curve[-1]
    return total
