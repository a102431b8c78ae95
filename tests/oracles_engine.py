"""Slow and obvious: greedy text by a plain argmax loop, and a builder whose drafts are partly right."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

import torch

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import Sequence


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by argmax, every one from a forward over the whole text: no cache, no mask, no generate()."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def make_prompts(lengths: Seq[int], vocab_size: int = 97) -> list[list[int]]:
    """One prompt a length, all different."""
    return [[(5 * i * i + 7 * i + 3 * row) % (vocab_size - 2) + 2 for i in range(length)] for row, length in enumerate(lengths)]


class Plain:
    """Trees of one node. Also counts the calls that a builder must get for every request."""

    sizes_itself = False
    top_k = 0

    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self.resets = 0

    def start(self, seq: Sequence) -> None:
        self.started.append(seq.id)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        pass

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [DraftTree.root_only(seq.token_ids[-1]) for seq in seqs]

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        pass

    def finish(self, seq: Sequence) -> None:
        self.finished.append(seq.id)

    def reset(self) -> None:
        self.resets += 1

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class Noisy(Plain):
    """Random trees around the true continuation: some paths leave it early, some late, some are right to the end.

    Args:
        truth: prompt -> its continuation; prompts that it lacks get random drafts.
        paths: paths a tree; longest: their greatest depth.
        exact: draft the continuation itself in every tree, so that a step accepts as much as it may.
    """

    top_k = 4

    def __init__(
        self,
        truth: dict[tuple[int, ...], list[int]],
        seed: int = 0,
        paths: int = 4,
        longest: int = 6,
        exact: bool = False,
        vocab_size: int = 97,
    ) -> None:
        super().__init__()
        self.truth, self.paths, self.longest, self.exact, self.vocab_size = truth, paths, longest, exact, vocab_size
        self.random = random.Random(seed)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._tree(seq, budget, depth) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _tree(self, seq: Sequence, budget: int, depth: int) -> DraftTree:
        true = self.truth.get(tuple(seq.token_ids[: seq.prompt_len]), [])[seq.output_length :]
        paths = [true[: min(self.longest, depth)]] if self.exact else []
        for _ in range(self.paths):
            length = self.random.randint(0, min(self.longest, depth))
            right = self.random.randint(0, length)
            noise = [self.random.randrange(self.vocab_size) for _ in range(length - len(true[:right]))]
            paths.append(true[:right] + noise)
        if not self.exact:
            self.random.shuffle(paths)
        return DraftTree.from_paths(seq.token_ids[-1], paths).prefix(budget)
