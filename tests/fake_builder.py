"""FakeBuilder: drafts random trees around the true continuation, so that every test accepts paths of many lengths and shapes."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

from specdec import hf
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.methods import METHODS, Method
from specdec.sequence import Sequence

__all__ = ["FakeBuilder", "installed"]


class FakeBuilder:
    """A TreeBuilder whose three paths a tree follow the true text for a random while, and leave it for random tokens.

    Args:
        texts: token lists, prompt included; the drafts for a sequence follow the first text that begins like it. A sequence
            that fits none is drafted at random.
        vocab_size: random tokens are below it.
        seed: of the shapes.
    """

    sizes_itself = False
    top_k = 4

    def __init__(self, texts: Seq[Seq[int]] = (), vocab_size: int = 97, seed: int = 0) -> None:
        self.texts = [list(text) for text in texts]
        self.vocab_size = vocab_size
        self.random = random.Random(seed)
        self.live: dict[int, int] = {}  # sequence id -> updates seen
        self.nodes = 0  # drafted, roots included

    def start(self, seq: Sequence) -> None:
        assert seq.id not in self.live
        self.live[seq.id] = 0

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        assert top.tokens.shape[1] == self.top_k

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        trees = [self._tree(seq, budget, depth) for seq, budget, depth in zip(seqs, budgets, depths)]
        self.nodes += sum(map(len, trees))
        return trees

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        assert top is not None and len(top.tokens) == len(tree)
        self.live[seq.id] += 1

    def finish(self, seq: Sequence) -> None:
        self.live.pop(seq.id, None)

    def reset(self) -> None:
        self.random.seed(0)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def _tree(self, seq: Sequence, budget: int, depth: int) -> DraftTree:
        true = self._future(seq.token_ids)
        paths = []
        for _ in range(3):
            length = self.random.randint(0, min(6, depth))
            right = self.random.randint(0, length)
            wrong = [self.random.randrange(self.vocab_size) for _ in range(length)]
            paths.append((true[:right] + wrong)[:length])
        self.random.shuffle(paths)
        return DraftTree.from_paths(seq.token_ids[-1], paths).prefix(budget)

    def _future(self, token_ids: list[int]) -> list[int]:
        known = next((text for text in self.texts if text[: len(token_ids)] == token_ids), None)
        return known[len(token_ids) :] if known else []


class installed:
    """Inside the block, METHODS["fake"] makes `builder`; the engines that specdec.generate keeps with it are forgotten after."""

    def __init__(self, builder: FakeBuilder) -> None:
        self.builder = builder

    def __enter__(self) -> FakeBuilder:
        METHODS["fake"] = Method(lambda vocab_size, cost_model: self.builder, "for tests")
        return self.builder

    def __exit__(self, *_: object) -> None:
        METHODS.pop("fake", None)
        for engines in hf._engines.values():
            for key in [key for key in engines if key[0] == "fake"]:
                del engines[key]
