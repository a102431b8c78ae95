"""Cost of the acceptance rules: ms a step at a vocabulary of 152k and 32 nodes, `OMP_NUM_THREADS=1 python -m bench.verify_rules`.

Laws are dense (no top-k), the worst case: target logits N(0, 3), the drafter's are those plus N(0, 1). A tree of levels 4, 12 and
15 for all rules but block, which gets a chain of 31. Not counted: the target's logits, the drawing of the drafts. The last stdout
line is one JSON object: rule -> median ms a step and mean tokens a step.
"""

from __future__ import annotations

import json
from statistics import mean, median
from time import perf_counter

import numpy as np
import torch
import typer

from specdec.draft_tree import DraftTree, Kind
from specdec.randomness import Randomness
from specdec.sampling import Law
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


def measure(name: str, vocab_size: int, repeats: int) -> dict[str, float]:
    """Median ms and mean emitted tokens of `repeats` steps."""
    parents = parents_of((1,) * sum(LEVELS) if name == "block" else LEVELS)
    kind = Kind.IID if name in ("kseq", "optimal_transport") else Kind.WITHOUT_REPLACEMENT
    times, tokens = [], []
    for repeat in range(repeats):
        noise = torch.Generator().manual_seed(repeat)
        logits = 3 * torch.randn(len(parents), vocab_size, generator=noise)
        scores = logits + torch.randn(logits.shape, generator=noise)
        tree = draft(parents, scores, kind, np.random.default_rng(repeat))
        seq = Sequence(0, [0, 1], SamplingParams(temperature=1.0), Randomness(0, (repeat,)))
        start = perf_counter()
        verdict = RULES[name](tree, Law(logits, tree, seq), seq.randomness)
        times.append(1e3 * (perf_counter() - start))
        tokens.append(len(verdict.nodes))
    return {"ms": round(median(times), 2), "tokens": round(mean(tokens), 2)}


def main(vocab_size: int = 152_000, repeats: int = 10) -> None:
    """Time every rule."""
    rows = {}
    for name in RULES:
        rows[name] = measure(name, vocab_size, repeats)
        print(f"{name:20} {rows[name]['ms']:8.2f} ms a step, {rows[name]['tokens']:.2f} tokens", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
