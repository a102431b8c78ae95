"""Exact laws of acceptance rules on toys: every tree that a toy drafter can draw, times every outcome of the rule's coins.

`draft_law` lists the trees, `step_law` gives the exact law of what one production step emits; `joint_law` completes it with the target itself, so that its
distance to plain sampling is the rule's bias and nothing else. `grow` is the drafter: it draws the way legality.py promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import permutations, product

import numpy as np
import torch
from scipy.optimize import linprog

from enumeration import Chance, EnumeratingRandomness, direct_law, exact_law
from specdec.draft_tree import ROOT, DraftTree, Kind, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.sequence import SamplingParams, Sequence
from specdec.verify.optimal_transport import Selection
from specdec.verify.step import DRAFT

__all__ = [
    "EXAMPLES", "PROMPT", "Fixed", "Toy", "draft_law", "emitted", "grow", "joint_law", "lp_value", "make_law", "make_sequence",
    "mean_accepted", "restrict", "selected_law", "step_law",
]  # fmt: skip

PROMPT = [0, 1]
Rule = Callable[[DraftTree, Law, Randomness], Verdict]
Draft = Callable[[Randomness], DraftTree]
Trees = list[tuple[DraftTree, float]]  # with their probabilities
Logits = Callable[[list[int]], torch.Tensor]  # token ids -> logits [V] of the next token


class Toy:
    """Logits [V] that depend on the last two tokens and on the length; `near` mixes in another toy (a drafter of that quality)."""

    def __init__(self, vocab_size: int, seed: int = 0, near: Toy | None = None, quality: float = 0.0, scale: float = 1.2) -> None:
        self.vocab_size = vocab_size
        noise = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab_size, vocab_size, 4, vocab_size, generator=noise) * scale
        if near is not None:
            self.table = quality * near.table + (1 - quality) * self.table

    def __call__(self, ids: list[int]) -> torch.Tensor:
        return self.table[ids[-1], ids[-2], len(ids) % 4]


class Fixed:
    """The same law after every text: the worked examples."""

    def __init__(self, *probs: float) -> None:
        self.logits = torch.tensor(probs, dtype=torch.float64).log()
        self.vocab_size = len(probs)

    def __call__(self, ids: list[int]) -> torch.Tensor:
        return self.logits


def grow(
    randomness: Randomness,
    text: list[int],
    drafter: Logits,
    widths: Seq[int],
    kind: Kind = Kind.IID,
    fixed: int = 0,
    exclude: bool = True,
    paths: bool = False,
) -> DraftTree:
    """A tree drawn node by node from softmax(drafter), float32, with the coins of the root's position.

    Args:
        widths: draws at a node of each depth.
        kind: how they are drawn; DETERMINISTIC: none are.
        fixed: deterministic children of every node, the drafter's top tokens.
        exclude: the draws come from off that set; else a draw may land in it, and is the sampled child from then on.
        paths: widths[0] i.i.d. paths instead: a node draws as many children as it has paths.
    """
    tokens, parents, kinds, order, counts, rows, depths = [text[-1]], [-1], [0], [0], [1], [], [0]
    node = -1
    while (node := node + 1) < len(tokens):
        above, path = node, []
        while above != ROOT:
            path.insert(0, tokens[above])
            above = parents[above]
        q = torch.softmax(drafter(text + path).double(), -1).float().numpy()
        children: dict[int, list[int]] = {}  # token -> [kind, first draw, times drawn]
        if depths[node] < len(widths):
            top = np.argsort(-q, kind="stable")[:fixed].tolist()
            children = {token: [Kind.DETERMINISTIC, 0, 1] for token in top}
            if exclude:
                q[top] = 0.0
            left = q.copy()
            wanted = 0 if kind == Kind.DETERMINISTIC else counts[node] if paths and node else widths[depths[node]]
            for draw in range(wanted if kind == Kind.IID else min(wanted, np.count_nonzero(q))):
                token = randomness.pick(left, len(text), node, draw, DRAFT)
                child = children.setdefault(token, [kind, draw, 0])
                if child[0] == Kind.DETERMINISTIC:
                    child[:] = [kind, draw, 0]
                child[2] += 1
                if kind == Kind.WITHOUT_REPLACEMENT:
                    left[token] = 0.0
        rows.append(q)
        for token, (child_kind, draw, count) in children.items():
            tokens.append(token), parents.append(node), kinds.append(child_kind)
            order.append(draw), counts.append(count), depths.append(depths[node] + 1)
    return DraftTree(
        np.array(tokens), np.array(parents), kind=np.array(kinds, np.uint8), draw_index=np.array(order, np.int32),
        multiplicity=np.array(counts, np.int32), probs=np.stack(rows),
    )  # fmt: skip


def restrict(tree: DraftTree, keep: Seq[bool]) -> DraftTree:
    """The nodes of `tree` that are kept and whose ancestors all are."""
    kept = [node for node in range(len(tree)) if all(keep[above] for above in tree.path(node))]
    index = {node: new for new, node in enumerate(kept)}
    parents = [-1, *(index[int(tree.parents[node])] for node in kept[1:])]
    fields = (tree.kind, tree.draw_index, tree.multiplicity, tree.virtual, tree.probs)
    kind, order, counts, virtual, probs = (None if field is None else field[kept] for field in fields)
    return DraftTree(
        tree.tokens[kept], np.array(parents), kind=kind, draw_index=order, multiplicity=counts, virtual=virtual, probs=probs
    )


def lp_value(p: np.ndarray, q: np.ndarray, k: int, replacement: bool = True) -> float:
    """The most that k draws from q let any coupling accept, by linear programme over (set of draws, accepted token)."""
    sets: Counter[tuple[int, ...]] = Counter()
    for draws in product(range(len(p)), repeat=k) if replacement else permutations(range(len(p)), k):
        gone = np.zeros(k) if replacement else np.cumsum([0.0, *q[list(draws)][:-1]])
        sets[tuple(sorted(set(draws)))] += float(np.prod(q[list(draws)] / (1 - gone)))
    pairs = [(row, token) for row, tokens in enumerate(sets) for token in tokens]
    limits = np.zeros((len(sets) + len(p), len(pairs)))
    for column, (row, token) in enumerate(pairs):
        limits[row, column] = limits[len(sets) + token, column] = 1.0
    return -linprog(-np.ones(len(pairs)), A_ub=limits, b_ub=[*sets.values(), *p], method="highs").fun


def selected_law(selection: Selection, q: np.ndarray, k: int) -> np.ndarray:
    """[V]: the law of the draw that `selection` takes, over all k draws from q."""
    law = np.zeros(len(q))
    for draws in product(np.flatnonzero(q), repeat=k):
        for cuts, weight in zip(selection.cuts, selection.weights / selection.weights.sum(), strict=True):
            interval = [int(cuts[: selection.classes[token]].sum()) for token in draws]
            best = [token for token, place in zip(draws, interval, strict=True) if place == max(interval)]
            np.add.at(law, best, weight * np.prod(q[list(draws)]) / len(best))
    return law


def make_law(tree: DraftTree, target: Logits, seq: Sequence) -> Law:
    """The target's laws at the nodes of `tree`; rows of virtual nodes are NaN, since no forward computed them."""
    text = seq.token_ids
    logits = torch.stack([target([*text, *tree.tokens[tree.path(node)[1:]].tolist()]) for node in range(len(tree))])
    if tree.virtual is not None:
        logits[torch.from_numpy(tree.virtual)] = torch.nan
    return Law(logits, tree, seq)


def emitted(tree: DraftTree, verdict: Verdict) -> tuple[int, ...]:
    return (*tree.tokens[verdict.nodes[1:]].tolist(), verdict.next_token)


def draft_law(draft: Draft) -> Trees:
    """Every tree that `draft` can draw, with its probability."""
    trees: dict[tuple, DraftTree] = {}

    def run(chance: Chance) -> tuple:
        tree = draft(EnumeratingRandomness(chance))
        fields = (tree.tokens, tree.parents, tree.kind, tree.draw_index, tree.multiplicity, tree.virtual)
        key = tuple(None if field is None else field.tobytes() for field in fields)
        trees[key] = tree
        return key

    return [(trees[key], mass) for key, mass in exact_law(run).items()]


def make_sequence(eos: Seq[int] = (), temperature: float = 1.0) -> Sequence:
    return Sequence(0, list(PROMPT), SamplingParams(temperature=temperature), Randomness(0), frozenset(eos))


def step_law(rule: Rule, trees: Trees, target: Logits, **options) -> dict[tuple[int, ...], float]:
    """The law of the tokens that one step emits (accepted ones, then the next token)."""
    law: Counter[tuple[int, ...]] = Counter()
    for tree, mass in trees:
        seq = make_sequence(**options)
        laws = make_law(tree, target, seq)

        def run(chance: Chance, tree: DraftTree = tree, laws: Law = laws, seq: Sequence = seq) -> tuple[int, ...]:
            seq.randomness = EnumeratingRandomness(chance)
            return emitted(tree, rule(tree, laws, seq.randomness))

        for text, p in exact_law(run).items():
            law[text] += mass * p
    return dict(law)


def joint_law(law: dict[tuple[int, ...], float], target: Logits, length: int = 3) -> dict[tuple[int, ...], float]:
    """The law of the first `length` tokens when the target itself goes on after a step of this law."""
    joint: Counter[tuple[int, ...]] = Counter()
    for text, mass in law.items():
        for rest, p in direct_law(target, [*PROMPT, *text], max(0, length - len(text))).items():
            joint[(*text, *rest)[:length]] += mass * p
    return dict(joint)


def mean_accepted(law: dict[tuple[int, ...], float]) -> float:
    """E[tau], drafted tokens accepted by a step whose law this is; for one level it is alpha."""
    return sum(mass * (len(text) - 1) for text, mass in law.items())


# p and q of the examples in verification.md section 8
EXAMPLES = {
    "A": ((1 / 3, 2 / 3), (2 / 3, 1 / 3)),
    "B": ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5)),
    "C": ((0.5, 0.25, 0.15, 0.1), (0.1, 0.4, 0.4, 0.1)),
    "D": ((0.45, 0.25, 0.15, 0.1, 0.05), (0.5, 0.2, 0.1, 0.1, 0.1)),
}
