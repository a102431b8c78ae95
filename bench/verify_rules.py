"""Cost of the acceptance rules: ms a step at a vocabulary of 152k and 32 nodes, `OMP_NUM_THREADS=1 python -m bench.verify_rules`.

Laws are dense (no top-k), the worst case: target logits N(0, 3), the drafter's are those plus N(0, 1). A tree of levels 4, 12 and
15 for all rules but block, which gets a chain of 31. Drafts drawn apart from the target's noise let `match` visit a node or two, so
it has three cases more: the drafts are the target's own draws, accepted to the last level, without truncation, with top_k 50 and
top_p .9, and with top_p .9 alone, which keeps tens of thousands of tokens of so flat a law. Not counted: the target's logits, the
drawing of the drafts. The last stdout line is one JSON object: case -> median ms a step and mean tokens a step.
"""

from __future__ import annotations

import json
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import typer

from specdec.draft_tree import DraftTree, Kind
from specdec.randomness import Randomness
from specdec.sampling import Law, build_processor
from specdec.sequence import SamplingParams, Sequence
from specdec.verify.rules import RULES

__all__ = ["main"]

LEVELS = (4, 12, 15)


def parents_of(levels: tuple[int, ...]) -> np.ndarray:
    """[N]: nodes of each level share out those of the level above."""
    parents, above = [-1], [0]
    for size in levels:
        level = list(range(len(parents), len(parents) + size))
        parents += sorted(above[i % len(above)] for i in range(size))
        above = level
    return np.array(parents)


def draft(parents: np.ndarray, scores: torch.Tensor, kind: Kind, noise: np.random.Generator) -> DraftTree:
    """Children drawn from softmax(scores [N, V]) of their parents, all different."""
    probs = torch.softmax(scores, -1).numpy()
    tokens, order = np.zeros(len(parents), np.int64), np.zeros(len(parents), np.int32)
    for node in range(len(parents)):
        children = np.flatnonzero(parents == node)
        if len(children):
            keys = scores[node].numpy() + noise.gumbel(size=scores.shape[1])
            tokens[children] = np.argsort(-keys)[: len(children)]
            order[children] = np.arange(len(children))
    kinds = np.full(len(parents), kind, np.uint8)
    return DraftTree(tokens, parents, kind=kinds, draw_index=order, probs=probs)


def accepted_path(tree: DraftTree, law: Law) -> DraftTree:
    """The tree with the target's own draws along one path to the last level; the other children keep their tokens."""
    tokens, node = tree.tokens.copy(), 0
    while len(children := np.flatnonzero(tree.parents == node)):
        tokens[children] += tokens[children] == (token := law.draw(node))  # siblings stay different but for the rarest chance
        node = children[0]
        tokens[node] = token
    return DraftTree(tokens, tree.parents)


def measure(
    name: str, vocab_size: int, repeats: int, accepted: bool = False, top_k: int = 0, top_p: float = 1.0
) -> dict[str, float]:
    """Median ms and mean emitted tokens of `repeats` steps; `accepted`: of a tree that holds what the target draws."""
    parents = parents_of((1,) * sum(LEVELS) if name == "block" else LEVELS)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    kind = Kind.IID if name in ("kseq", "optimal_transport") else Kind.WITHOUT_REPLACEMENT
    times, tokens = [], []
    for repeat in range(repeats):
        noise = torch.Generator().manual_seed(repeat)
        logits = 3 * torch.randn(len(parents), vocab_size, generator=noise)
        scores = logits + torch.randn(logits.shape, generator=noise)
        tree = draft(parents, scores, kind, np.random.default_rng(repeat))
        seq = Sequence(0, [0, 1], params, Randomness(0, (repeat,)), processor=build_processor(params))
        if accepted:
            tree = accepted_path(tree, Law(logits, tree, seq))
        start = perf_counter()
        verdict = RULES[name](tree, Law(logits, tree, seq), seq.randomness)
        times.append(1e3 * (perf_counter() - start))
        tokens.append(len(verdict.nodes))
    return {"ms": round(median(times), 2), "tokens": round(mean(tokens), 2)}


def main(vocab_size: int = 152_000, repeats: int = 10) -> None:
    """Time every case."""
    rows = {}
    cases: dict[str, dict[str, Any]] = {name: {"name": name} for name in RULES}
    cases["match, accepted"] = {"name": "match", "accepted": True}
    cases["match, accepted, top_k 50, top_p .9"] = {"name": "match", "accepted": True, "top_k": 50, "top_p": 0.9}
    cases["match, accepted, top_p .9"] = {"name": "match", "accepted": True, "top_p": 0.9}
    for name, case in cases.items():
        rows[name] = measure(vocab_size=vocab_size, repeats=repeats, **case)
        print(f"{name:36} {rows[name]['ms']:8.2f} ms a step, {rows[name]['tokens']:.2f} tokens", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
