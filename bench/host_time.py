"""Host time of a step, everything but the model's forward: `python -m bench.host_time`.

A stand-in target returns ready-made logits of a real vocabulary, so that draft, accept, commit and learn are timed alone. Its
greedy continuation repeats a text with errors: sources match, trees fill up, and some drafts are accepted. Medians of many steps.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from specdec import METHODS, SamplingParams
from specdec.engine import Engine

VOCAB = 49152
PARTS = ("draft", "accept", "commit", "learn")
console = Console(stderr=True)


def tiny_model(positions: int) -> Any:
    """A one-layer llama whose forward is cheap and whose vocabulary is real."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=positions, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class ScriptedLogits:
    """Replaces the target's forward by a Markov chain over a few hundred tokens: after each it knows eight successors and says
    the first of them in most cases, another one by chance. About as much is accepted as on real text (`tokens`, in the table)."""

    def __init__(self, nodes: int, words: int = 400, branches: int = 8) -> None:
        rng = np.random.default_rng(0)
        self.words = rng.choice(VOCAB, words, replace=False)
        self.successors = self.words[rng.integers(0, words, (VOCAB, branches))]
        self.noise = torch.from_numpy(rng.standard_normal((nodes, VOCAB), dtype=np.float32))
        self.levels = torch.linspace(14, 8, branches)
        self.chance = np.minimum(rng.geometric(0.5, 65536), branches) - 1

    def text(self, length: int, seed: int) -> list[int]:
        """A walk along the chain."""
        rng = np.random.default_rng(seed)
        tokens = [int(self.words[0])]
        while len(tokens) < length:
            tokens.append(int(self.successors[tokens[-1], min(rng.geometric(0.6) - 1, 7)]))
        return tokens

    def ranks(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which successor is said after each token: chance, but the same whenever it is asked again."""
        return self.chance[(31 * tokens + 977 * positions) % len(self.chance)]

    def __call__(self, cache: Any, trees: Sequence[Any], first_row: int = 0) -> torch.Tensor:
        most = max(len(tree) for tree in trees)
        cache.begin(first_row, [len(tree) for tree in trees])
        logits = self.noise[:most].repeat(len(trees), 1, 1)
        for row, tree in enumerate(trees):
            nodes = torch.arange(len(tree))
            successors = torch.from_numpy(self.successors[tree.tokens])
            logits[row, nodes[:, None], successors] = self.levels
            said = torch.from_numpy(self.ranks(tree.tokens, cache.starts[row] + tree.depths))
            logits[row, nodes, successors[nodes, said]] = 20.0
        self.kept = logits  # freed in the next call, not in the middle of a step
        return logits


def _claim(cache: Any, row: int, ids: list[int], observe: Any = None) -> None:
    """A prefill that only counts: the scripted target needs no K/V."""
    cache.lengths[row] = len(ids)


def measure(method: str, nodes: int, rows: int, context: int, steps: int, params: SamplingParams) -> dict[str, float]:
    """Median milliseconds a step, by part; the prompt is `context` tokens that the scripted model would have said itself."""
    engine = Engine(tiny_model(context + 66 * steps + 64), method=method, budget=nodes, max_rows=rows)
    script = ScriptedLogits(2 * nodes)
    engine.target.forward = script  # type: ignore[method-assign]
    engine.target.prefill = _claim  # type: ignore[method-assign]
    prompts = [script.text(context, seed=row) for row in range(rows)]
    sequences = engine._sequences(prompts, [params] * rows)
    for seq in sequences:
        engine.add(seq)
    samples: dict[str, list[float]] = {part: [] for part in (*PARTS, "pass", "step")}
    reduce, passes = engine._reduce, [0.0]

    def timed_pass(logits: torch.Tensor) -> Any:
        started = time.perf_counter()
        found = reduce(logits)
        passes[0] = time.perf_counter() - started
        return found

    engine._reduce = timed_pass  # type: ignore[method-assign]
    filled, emitted = [], []
    for step in range(steps):
        started = time.perf_counter()
        engine.step()
        total = time.perf_counter() - started
        if step < steps // 4:  # learning, warm caches
            continue
        for part in PARTS:
            samples[part].append(engine.last_step.times[part])
        samples["pass"].append(passes[0])
        samples["step"].append(total - engine.last_step.times["forward"])
        filled.append(engine.last_step.nodes)
        emitted.append(engine.last_step.emitted / rows)
    for seq in sequences:
        engine.cancel(seq)
    return {part: 1e3 * float(np.median(values)) for part, values in samples.items()} | {
        "nodes": float(np.mean(filled)),
        "tokens": float(np.mean(emitted)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", default=",".join(name for name in METHODS if name not in ("none", "auto") and "published" not in name)
    )
    parser.add_argument("--nodes", default="64", help="node budgets")
    parser.add_argument("--rows", default="1", help="batch sizes")
    parser.add_argument("--contexts", default="512,8192,32768")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args(argv)
    params = SamplingParams(max_new_tokens=64 * args.steps, temperature=args.temperature, top_p=args.top_p, seed=0)
    table = Table("method", "budget", "nodes", "tokens", "rows", "context", *PARTS, "of it the pass", "all, ms")
    results = []
    for method in args.methods.split(","):
        for nodes, rows, context in _grid(args.nodes, args.rows, args.contexts):
            found = measure(method, nodes, rows, context, args.steps, params)
            results.append({"method": method, "budget": nodes, "rows": rows, "context": context, **found})
            table.add_row(
                method,
                str(nodes),
                f"{found['nodes']:.0f}",
                f"{found['tokens']:.1f}",
                str(rows),
                str(context),
                *(f"{found[part]:.2f}" for part in PARTS),
                f"{found['pass']:.2f}",
                f"{found['step']:.2f}",
            )
    console.print(table)
    print(json.dumps({"vocabulary": VOCAB, "temperature": args.temperature, "top_p": args.top_p, "rows": results}))
    return 0


def _grid(*lists: str) -> list[tuple[int, ...]]:
    import itertools

    return list(itertools.product(*(map(int, text.split(",")) for text in lists)))


if __name__ == "__main__":
    raise SystemExit(main())
