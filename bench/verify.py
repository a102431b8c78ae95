"""Long proofs of losslessness on the embedded model: `python -m bench.verify [all|greedy|long|bf16]`, all resumable.

* greedy: fp32, 64 new tokens, every prompt of a split, every method, budgets 8 and 60, batch 1 and left-padded ragged batches of
  5: token for token what `model.generate` says. A mismatch prints the logit gap and is run again in fp64; no prompt is dropped.
* long: the same once at a context of about 4,000 tokens.
* bf16: near-ties flip with the shape of a matmul there, so the output is teacher-forced through the plain model: the gap of every
  chosen token to the top logit must be at most twice the largest logit difference between one-token and chain forwards of the
  same prompts. With --break-mask one ancestor bit of every tree is wrong, and the audit must fail. Counted besides: outputs equal
  to those of model.generate (identical) and of specdec's own plain decoding (as_none: all, on a CPU with the compiled ops).

Each finished unit is a line of a log; a rerun skips it. `--shard 1/2` and `--shard 2/2`, side by side, share the work (one thread
each: OMP_NUM_THREADS=1); a last run without --shard counts what all of them wrote. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache

from specdec import METHODS, Engine, SamplingParams, models
from specdec.draft_tree import DraftTree
from specdec.kv_cache import cache_argument

from .runners import PrefixEngine
from .tasks import DEFAULT_DATA, Task, encode, load_tasks

__all__ = ["gaps", "main", "reference"]

BUDGETS = (8, 60)
BATCH = 5
WITHOUT_BUDGET = ("none", "token_recycling_published", "goose_published")  # the same trees at any budget: run at one of them
NEW_TOKENS = 64
console = Console(stderr=True)


@dataclass(frozen=True)
class Unit:
    """One comparison: a method at a budget on one prompt, or on a batch."""

    name: str
    method: str
    budget: int
    prompts: list[list[int]]


class Log:
    """JSON lines, one a finished unit: reads those of every shard, writes its own."""

    def __init__(self, folder: Path, check: str, shard: tuple[int, int] = (1, 1)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shard = shard
        self.path = folder / (f"{check}.jsonl" if shard[1] == 1 else f"{check}.{shard[0]}of{shard[1]}.jsonl")
        lines = [line for path in sorted(folder.glob(f"{check}.*jsonl")) for line in path.read_text().splitlines()]
        self.done: dict[str, dict[str, Any]] = {row["name"]: row for row in map(json.loads, lines)}

    def todo(self, groups: Iterable[list[Unit]]) -> list[Unit]:
        """What this shard has still to do; it takes whole groups (the units of one prompt or batch), which share a prefill."""
        index, count = self.shard
        return [unit for i, group in enumerate(groups) if i % count == index - 1 for unit in group if unit.name not in self.done]

    def write(self, row: dict[str, Any]) -> None:
        self.done[row["name"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def reference(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """`model.generate`, greedy, one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def gaps(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """[len(output)] fp32: top logit minus the chosen token's, teacher-forced through the plain model in one forward."""
    ids = torch.tensor([[*prompt, *output]])
    logits = model(ids[:, :-1], logits_to_keep=len(output)).logits[0].float()
    return logits.max(-1).values - logits.gather(1, torch.tensor(output)[:, None])[:, 0]


@torch.inference_mode()
def rounding(model: Any, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Largest logit difference between a chain forward and one-token forwards over the same text."""
    ids = torch.tensor([[*prompt, *output]])
    chain = model(ids[:, :-1], logits_to_keep=len(output)).logits[0].float()
    kept = {cache_argument(model.forward): DynamicCache(config=model.config)}
    model(ids[:, : len(prompt) - 1], use_cache=True, **kept)
    worst = 0.0
    for step in range(len(output)):
        position = len(prompt) - 1 + step
        out = model(ids[:, position : position + 1], use_cache=True, **kept)
        worst = max(worst, float((out.logits[0, -1].float() - chain[step]).abs().max()))
    return worst


def units(prompts: dict[str, list[int]], methods: Sequence[str], budgets: Sequence[int], batch: int) -> Iterator[list[Unit]]:
    """All comparisons, a group of them for each prompt and then for each ragged batch."""
    names = list(prompts)
    batches = [names[i : i + batch] for i in range(0, len(names), batch)] if batch > 1 else []
    groups = [[name] for name in names] + [group for group in batches if len(group) > 1]  # one row alone is there already
    for group in groups:
        rows, last = [prompts[name] for name in group], max(budgets)
        yield [
            Unit(f"{method}@{budget} x{len(group)} {group[0]}", method, budget, rows)
            for method in methods
            for budget in budgets
            if method not in WITHOUT_BUDGET or budget == last
        ]


def left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a ragged batch, as `model.generate` takes it."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def outputs(engines: Callable[[str, int], Engine], model: Any, unit: Unit, new_tokens: int) -> list[list[int]]:
    """specdec's new tokens: through Engine.generate for one prompt, through model.generate with left padding for a batch."""
    engine = engines(unit.method, unit.budget)
    if len(unit.prompts) == 1:
        return [engine.generate(unit.prompts[0], SamplingParams(max_new_tokens=new_tokens)).token_ids]
    import specdec

    inputs = left_padded(unit.prompts, model.config.pad_token_id or 0)
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, custom_generate=specdec.generate, specdec_engine=engine
    )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def _trimmed(tokens: list[int], expected: list[int]) -> list[int]:
    """Without the right padding that a batch brings."""
    return tokens[: len(expected)]


def verify_greedy(
    model: Any,
    prompts: dict[str, list[int]],
    log: Log,
    methods: Sequence[str],
    budgets: Sequence[int],
    batch: int,
    new_tokens: int,
    compile: bool = False,
) -> int:
    """Returns the number of units that differ from `model.generate`."""
    built: dict[tuple[str, int], PrefixEngine] = {}
    memory: dict[Any, Any] = {}
    expected: dict[tuple[int, ...], list[int]] = {}

    def engines(method: str, budget: int) -> Engine:
        if (method, budget) not in built:
            built[method, budget] = PrefixEngine(model, method=method, budget=budget, memory=memory, compile=compile)
        return built[method, budget]

    todo = log.todo(units(prompts, methods, budgets, batch))
    for unit in track(todo, description="comparing", console=console):
        for prompt in unit.prompts:
            if tuple(prompt) not in expected:
                expected[tuple(prompt)] = reference(model, prompt, new_tokens)
        found = outputs(engines, model, unit, new_tokens)
        wrong = []
        for prompt, tokens in zip(unit.prompts, found):
            want = expected[tuple(prompt)]
            if _trimmed(tokens, want) != want:
                wrong.append(_explain(model, unit, prompt, want, tokens))
        log.write({"name": unit.name, "rows": len(unit.prompts), "wrong": wrong})
        for text in wrong:
            console.print(f"[red]{unit.name}: {text}")
    return sum(bool(row["wrong"]) for row in log.done.values())


def _explain(model: Any, unit: Unit, prompt: list[int], want: list[int], tokens: list[int]) -> dict[str, Any]:
    """Where they part, how close the two tokens were, and whether fp64 agrees with model.generate."""
    at = next(i for i, pair in enumerate(zip(want, [*tokens, -1])) if pair[0] != pair[1])
    gap = gaps(model, prompt, [*want[:at], tokens[at]])[-1].item() if at < len(tokens) else None
    dtype = next(model.parameters()).dtype
    model.double()
    try:
        engine = Engine(model, method=unit.method, budget=unit.budget)
        again = engine.generate(prompt, SamplingParams(max_new_tokens=len(want))).token_ids
        equal = again == reference(model, prompt, len(want))
    finally:
        model.to(dtype)
    return {"token": at, "gap": gap, "equal_in_fp64": equal}


def verify_bf16(
    model: Any,
    prompts: dict[str, list[int]],
    log: Log,
    methods: Sequence[str],
    budgets: Sequence[int],
    new_tokens: int,
    broken: bool,
    compile: bool = False,
) -> int:
    """Returns the number of units whose gaps exceed twice the rounding of the plain model."""
    memory: dict[Any, Any] = {}
    built: dict[tuple[str, int], PrefixEngine] = {}
    limits: dict[tuple[int, ...], tuple[list[int], list[int], float]] = {}
    params = SamplingParams(max_new_tokens=new_tokens)
    measured: dict[tuple[int, ...], float] = {}
    undrafted = PrefixEngine(model, method="none", memory=memory)
    todo = log.todo(units(prompts, methods, budgets, 1))
    for unit in track(todo, description="auditing", console=console):
        (prompt,) = unit.prompts
        if tuple(prompt) not in limits:
            plain = reference(model, prompt, new_tokens)
            limits[tuple(prompt)] = (plain, undrafted.generate(prompt, params).token_ids, 2 * rounding(model, prompt, plain))
        if (unit.method, unit.budget) not in built:
            options: dict[str, Any] = {"method": unit.method, "budget": unit.budget, "compile": compile}
            built[unit.method, unit.budget] = PrefixEngine(model, memory=memory, **options)
        with broken_masks() if broken else nullcontext():
            tokens = built[unit.method, unit.budget].generate(prompt, params).token_ids
        plain, own, limit = limits[tuple(prompt)]
        text = (*prompt, *tokens)
        if text not in measured:  # methods mostly give one text
            measured[text] = float(gaps(model, prompt, tokens).max())
        worst = measured[text]
        same = {"identical": tokens == plain, "as_none": tokens == own}
        log.write({"name": unit.name, "gap": worst, "limit": limit, **same, "wrong": worst > limit})
    return sum(bool(row["wrong"]) for row in log.done.values())


@contextmanager
def broken_masks() -> Iterator[None]:
    """Negative control: inside, every node of depth 2 and more is blind to its own parent, one wrong bit a node."""
    honest = DraftTree.ancestor_mask

    def wrong(tree: DraftTree) -> np.ndarray:
        mask = honest(tree)
        deep = np.flatnonzero(tree.depths >= 2)
        mask[deep, tree.parents[deep]] = False
        return mask

    DraftTree.ancestor_mask = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        DraftTree.ancestor_mask = honest  # type: ignore[method-assign]


def long_prompt(tokenizer: Any, tasks: Sequence[Task], length: int) -> list[int]:
    """Prompts of the split, one after the other, cut to `length` tokens."""
    ids: list[int] = []
    for task in tasks:
        ids += encode(tokenizer, task)
    return ids[-length:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", nargs="?", default="all", choices=("all", "greedy", "long", "bf16"))
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--split", default="report")
    parser.add_argument("--limit", type=int, default=None, help="prompts, spread over the groups")
    parser.add_argument("--methods", default=",".join(name for name in METHODS if name != "auto"))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of the ragged batches; 1: none")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--out", type=Path, default=Path(".verify"))
    parser.add_argument("--model", default=None, help="local path or hub name; default: the embedded model")
    parser.add_argument("--compile", action="store_true", help="compiled steps, against the eager model")
    parser.add_argument("--break-mask", action="store_true", help="negative control for bf16")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="do the I-th of N parts, 1 <= I <= N")
    args = parser.parse_args(argv)
    checks = ("greedy", "long", "bf16") if args.check == "all" else (args.check,)
    results = [run_check(check, args) for check in checks]
    print(json.dumps({"checks": results, "wrong": sum(result["wrong"] for result in results)}))
    return 1 if any(result["wrong"] for result in results) else 0


def _shard(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    index, count = (int(part) if part.isdigit() else 0 for part in (*text.split("/", 1), "")[:2])
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, such as 1/2, got {text!r}")
    return index, count


def run_check(check: str, args: argparse.Namespace) -> dict[str, Any]:
    """One check, resumed from its log; returns its summary."""
    methods, budgets = args.methods.split(","), [int(budget) for budget in args.budgets.split(",")]
    model, tokenizer = models.load(args.model, dtype=torch.bfloat16 if check == "bf16" else torch.float32)
    tasks = load_tasks(args.data, args.split, args.limit)
    log = Log(args.out, f"{check}{'-compile' if args.compile else ''}{'-broken' if args.break_mask else ''}", args.shard)
    prompts = {task.id: encode(tokenizer, task) for task in tasks}
    if check == "long":
        prompts = {"4k": long_prompt(tokenizer, tasks, 4000)}
    if check == "bf16":
        wrong = verify_bf16(model, prompts, log, methods, budgets, args.new_tokens, args.break_mask, args.compile)
        rows = log.done.values()
        found: dict[str, Any] = {
            "identical": sum(bool(row["identical"]) for row in rows),
            "as_none": sum(bool(row["as_none"]) for row in rows),
            "largest_gap": max((row["gap"] for row in rows), default=0.0),
            "smallest_limit": min((row["limit"] for row in rows), default=0.0),
        }
    else:
        batch = 1 if check == "long" else args.batch
        wrong = verify_greedy(model, prompts, log, methods, budgets, batch, args.new_tokens, args.compile)
        found = {"rows": sum(row["rows"] for row in log.done.values())}
    return {"check": check, "prompts": len(prompts), "units": len(log.done), "wrong": wrong, **found}


if __name__ == "__main__":
    sys.exit(main())
