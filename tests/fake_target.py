"""A deterministic toy target and a tiny loop: every tree builder can be tested in milliseconds, without a model.

`FakeTarget` is a fixed random table: the logits after a text depend on its last `order` tokens only. With few tokens the greedy
text soon runs into a cycle, so context sources find matches and tables fill up. `drive` is the engine's loop in twenty lines::

    build -> greedy walk over the tree -> append -> update with the top-k of every node
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.draft_tree import ROOT, DraftTree, TopK, Verdict
from specdec.sequence import SamplingParams, Sequence

__all__ = ["FakeTarget", "Run", "accepted", "check_tree", "drive", "greedy", "make_sequence"]


@dataclass(frozen=True)
class FakeTarget:
    """Logits [V] after a text, a pure function of its last `order` tokens and the seed."""

    vocab: int = 24
    order: int = 2
    seed: int = 0
    _memo: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, repr=False)

    def logits(self, tokens: list[int]) -> np.ndarray:
        key = tuple(tokens[-self.order :])
        if key not in self._memo:
            self._memo[key] = np.random.default_rng([self.seed, *key]).normal(size=self.vocab).astype(np.float32) * 3
        return self._memo[key]

    def next(self, tokens: list[int]) -> int:
        return int(self.logits(tokens).argmax())

    def top(self, texts: list[list[int]], k: int) -> TopK:
        """What the engine reduces the logits to: the k best tokens after each text, softmax over those k."""
        logits = np.stack([self.logits(text) for text in texts])
        tokens = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
        kept = np.take_along_axis(logits, tokens, 1)
        probs = np.exp(kept - kept.max(1, keepdims=True))
        return TopK(tokens, (probs / probs.sum(1, keepdims=True)).astype(np.float32))


@dataclass
class Run:
    """What one driven request did."""

    tokens: list[int]  # emitted, without the prompt
    trees: list[DraftTree] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        return sum(self.accept_lengths) / max(1, len(self.accept_lengths))


def make_sequence(prompt: list[int], max_new_tokens: int = 64, seq_id: int = 0, eos: tuple[int, ...] = ()) -> Sequence:
    randomness: Any = None  # greedy needs none
    return Sequence(seq_id, list(prompt), SamplingParams(max_new_tokens=max_new_tokens), randomness, frozenset(eos))


def greedy(target: FakeTarget, prompt: list[int], max_new_tokens: int, eos: tuple[int, ...] = ()) -> list[int]:
    """Plain decoding: the output every builder must reproduce."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(target.next(tokens))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def walk(target: FakeTarget, text: list[int], tree: DraftTree) -> Verdict:
    """Greedy acceptance: follow the target's own choice as long as a child carries it."""
    nodes, text = [ROOT], list(text)
    while True:
        token = target.next(text)
        child = tree.child(nodes[-1], token)
        if child < 0:
            return Verdict(np.array(nodes, np.int32), token)
        nodes.append(child)
        text.append(token)


def accepted(target: FakeTarget, text: list[int], tree: DraftTree) -> int:
    """Draft tokens that greedy verification keeps."""
    return len(walk(target, text, tree).nodes) - 1


def check_tree(tree: DraftTree, root: int, budget: int, depth: int, vocab: int) -> None:
    """The contract of TreeBuilder.build: root token, budget, depth, distinct siblings, ids inside the vocabulary."""
    assert int(tree.tokens[ROOT]) == root
    assert len(tree) <= budget
    assert int(tree.depths.max()) <= depth
    edges = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    assert len(set(edges)) == len(edges), "two siblings carry the same token"
    assert tree.tokens.min() >= 0 and tree.tokens.max() < vocab


def step(target: FakeTarget, builder: Any, seq: Sequence, tree: DraftTree) -> int:
    """Verify one tree, emit, learn; returns how many tokens were emitted."""
    text = list(seq.token_ids)
    verdict = walk(target, text, tree)
    emitted = [*tree.tokens[verdict.nodes[1:]].tolist(), verdict.next_token]
    kept = seq.append(emitted)
    if kept < len(emitted):  # stopped inside the accepted path
        verdict = Verdict(verdict.nodes[:kept], emitted[kept - 1])
    paths = [text + tree.tokens[tree.path(node)[1:]].tolist() for node in range(len(tree))]
    builder.update(seq, tree, verdict, target.top(paths, builder.top_k) if builder.top_k else None)
    return kept


def drive(
    target: FakeTarget,
    builder: Any,
    prompt: list[int],
    max_new_tokens: int = 64,
    budget: int = 8,
    depth: int = 16,
    seq_id: int = 0,
    eos: tuple[int, ...] = (),
    on_tree: Callable[[Sequence, DraftTree], None] | None = None,
) -> Run:
    """Generate one request with `builder`, checking the contract of every tree."""
    seq = make_sequence(prompt, max_new_tokens, seq_id, eos)
    builder.start(seq)
    if builder.top_k:
        prefixes = [seq.token_ids[: i + 1] for i in range(len(prompt))]
        builder.observe_prompt(seq, 0, target.top(prefixes, builder.top_k))
    run = Run([])
    while not seq.finished:
        (tree,) = builder.build([seq], [budget], [depth])
        check_tree(tree, seq.token_ids[-1], budget, depth, target.vocab)
        if on_tree is not None:
            on_tree(seq, tree)
        run.trees.append(tree)
        run.accept_lengths.append(step(target, builder, seq, tree))
    builder.finish(seq)
    run.tokens = seq.output_ids
    return run
