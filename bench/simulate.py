"""The engine's loop without the model: any tree builder, replayed along recorded answers (`bench.record`), in greedy mode.

Builders get what the engine would give them, rejected nodes included, so steps and accepted lengths are the engine's own. "Without
the model" holds from the second replay on: the first asks the model for what no run asked for before (`--ask`), and adds it::

    python -m bench.simulate --record tune.npz --split tune --limit 9 --ask --check    # make a record, compare with the engine
    python -m bench.simulate --record tune.npz --methods ngram,suffix --budget 8,16    # seconds; nothing is asked

A replay that needs an answer which is not recorded stops; with `--skip` rejected nodes that are not recorded teach nothing, which
is near the truth where `misses` (answers that were not there) are few. In float32 and float64 the figures are the engine's
exactly, up to ties within rounding; in bfloat16 the engine's own text depends on the shapes of its trees, and so do the answers.
The last stdout line is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, Verdict
from specdec.engine import Engine, warm_up
from specdec.methods import make_builder
from specdec.models import load
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence
from specdec.target import PREFILL_CHUNK
from specdec.trees.base import TreeBuilder

from .record import UNKNOWN, Prompt, Record, Recorder
from .tasks import DEFAULT_DATA, encode, load_tasks

__all__ = ["NotRecordedError", "Replayed", "Simulator", "summary"]

MODES = ("cold", "warm")


class NotRecordedError(ValueError):
    """A replay left what is recorded."""


@dataclass(slots=True)
class Replayed:
    """One prompt, replayed."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)  # the new tokens
    accept_lengths: list[int] = field(default_factory=list)  # tokens emitted by each step
    tree_sizes: list[int] = field(default_factory=list)  # nodes of each step
    contexts: list[int] = field(default_factory=list)  # tokens before each step
    misses: int = 0  # nodes that were not recorded
    host_seconds: float = 0.0  # in build and update


class Simulator:
    """Replays prompts of a record with one builder, which goes on learning from prompt to prompt (`builder.reset()`: cold).

    Args:
        record: the answers.
        builder: as in Engine, of temperature 0.
        budget: nodes a tree, root included.
        recorder: asked for what the record lacks; None: NotRecordedError.
        skip: rejected nodes that are not recorded teach nothing instead; the accepted path must be recorded.
    """

    def __init__(
        self, record: Record, builder: TreeBuilder, budget: int, recorder: Recorder | None = None, skip: bool = False
    ) -> None:
        self.record, self.builder, self.budget = record, builder, budget
        self.recorder, self.skip = recorder, skip
        self._ids = itertools.count()

    def run(self, cold: bool, prompts: Iterable[Prompt] | None = None) -> list[Replayed]:
        """Replay the prompts (default: all of the record) in order, from a builder that knows nothing; cold: before each."""
        self.builder.reset()
        replays = []
        for prompt in self.record.prompts if prompts is None else prompts:
            if cold:
                self.builder.reset()
            replays.append(self.replay(prompt))
        return replays

    def replay(self, prompt: Prompt) -> Replayed:
        """One request from start to finish, step by step as Engine.step does it."""
        params = SamplingParams(max_new_tokens=self.record.max_new_tokens)
        seq = Sequence(
            next(self._ids), list(prompt.token_ids), params, cast(Randomness, None), eos_token_ids=self.record.eos_token_ids
        )
        replayed = Replayed(prompt)
        self.builder.start(seq)
        root = self._prefill(seq, prompt, replayed)
        while not seq.finished:
            started = time.perf_counter()
            tree = self._draft(seq)
            built = time.perf_counter()
            replayed.tree_sizes.append(len(tree))
            replayed.contexts.append(len(seq.token_ids))
            entries = self.record.nodes(tree, root, add=self.recorder is not None)
            verdict = self._judge(seq, tree, entries, replayed)
            emitted = [*tree.tokens[verdict.nodes[1:]].tolist(), verdict.next_token]
            kept = seq.append(emitted)
            verdict = Verdict(verdict.nodes[:kept], emitted[kept - 1])
            root = self.record.entry(entries[verdict.nodes[-1]], verdict.next_token, add=self.recorder is not None)
            top = self.record.top(entries, self.builder.top_k) if self.builder.top_k else None
            judged = time.perf_counter()
            self.builder.update(seq, tree, verdict, top)
            replayed.host_seconds += built - started + time.perf_counter() - judged
            replayed.accept_lengths.append(kept)
        self.builder.finish(seq)
        replayed.token_ids = seq.output_ids
        return replayed

    def _prefill(self, seq: Sequence, prompt: Prompt, replayed: Replayed) -> int:
        """Show the builder what the model expected along the prompt, in the engine's chunks; returns the entry of the prompt."""
        entries = self.record.path(prompt.token_ids, add=self.recorder is not None)
        length = len(entries) - 1
        if not self.builder.top_k:
            return entries[-1]
        if missing := length - int(self.record.known(entries[:-1]).sum()):
            replayed.misses += missing
            if self.recorder is None:
                raise NotRecordedError(f"the prompt {prompt.task} is not recorded; fix: --ask, with the model")
            self.recorder.prefill(prompt)
        for start in range(0, length, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, length)
            self.builder.observe_prompt(seq, start, self.record.top(entries[start:end], self.builder.top_k))
        return entries[-1]

    def _draft(self, seq: Sequence) -> DraftTree:
        depth = seq.remaining - 1
        if self.budget == 1 or depth <= 0:
            return DraftTree.root_only(seq.token_ids[-1])
        return self.builder.build([seq], [self.budget], [depth])[0]

    def _judge(self, seq: Sequence, tree: DraftTree, entries: list[int], replayed: Replayed) -> Verdict:
        """The accepted path, after every node that the builder will read is recorded."""
        verdict = self._walk(tree, entries)
        missing = int((~self.record.known(entries)).sum()) if self.builder.top_k else 0
        replayed.misses += max(missing, verdict is None)
        if verdict is not None and (not missing or self.skip):
            return verdict
        if self.recorder is None:
            raise NotRecordedError(
                f"{replayed.prompt.task}: nobody asked the model about a node of step {len(replayed.tree_sizes)} before; "
                "fix: --ask, with the model"
            )
        self.recorder.verify(replayed.prompt, seq.token_ids, tree, entries)
        verdict = self._walk(tree, entries)
        assert verdict is not None
        self.recorder.commit(replayed.prompt, verdict.nodes)
        return verdict

    def _walk(self, tree: DraftTree, entries: list[int]) -> Verdict | None:
        """The rule `match` at temperature 0; None where it comes to a node that is not recorded."""
        nodes = [0]
        while True:
            entry = entries[nodes[-1]]
            token = UNKNOWN if entry < 0 else int(self.record.next[entry])
            if token < 0:
                return None
            child = -1 if token in self.record.eos_token_ids else tree.child(nodes[-1], token)
            if child < 0:
                return Verdict(np.array(nodes, np.int32), token)
            nodes.append(child)


def summary(replays: list[Replayed], costs: CostModel | None = None) -> dict[str, Any]:
    """Sums over prompts; with costs the modelled speed: tokens / (forwards by the cost curve + host time of the builder)."""
    tokens, steps = (sum(map(count, replays)) for count in (_tokens, _steps))
    nodes, host = sum(sum(replay.tree_sizes) for replay in replays), sum(replay.host_seconds for replay in replays)
    result: dict[str, Any] = {
        "prompts": len(replays),
        "tokens": tokens,
        "steps": steps,
        "tokens_a_step": tokens / max(1, steps),
        "nodes_a_step": nodes / max(1, steps),
        "misses": sum(replay.misses for replay in replays),
        "host_ms": 1e3 * host / max(1, steps),
    }
    if costs is not None:
        sizes = [pair for replay in replays for pair in zip(replay.tree_sizes, replay.contexts)]
        result["modelled_tokens_a_second"] = tokens / (host + sum(costs.seconds(*pair) for pair in sizes))
    return result


def _tokens(replay: Replayed) -> int:
    return sum(replay.accept_lengths)


def _steps(replay: Replayed) -> int:
    return len(replay.accept_lengths)


def open_record(path: Path, model: Any, tokenizer: Any, data: Path, split: str, limit: int | None, new_tokens: int) -> Record:
    """The record at `path`, or a new one for the prompts of a split.

    Raises:
        ValueError: no file there and no model to make one.
    """
    if path.exists():
        return Record.load(path)
    if model is None:
        raise ValueError(f"record must be a file that --ask wrote, got {path}; fix: --ask")
    prompts = [Prompt(task.id, task.group, tuple(encode(tokenizer, task))) for task in load_tasks(data, split, limit)]
    engine = Engine(model, tokenizer, method="none", budget=1)
    return Record(prompts, new_tokens, engine.eos_token_ids(), engine.target.vocab_size)


def engine_lengths(engine: Engine, record: Record, cold: bool) -> list[list[int]]:
    """What the real engine accepts, prompt by prompt."""
    engine.reset()
    params = SamplingParams(max_new_tokens=record.max_new_tokens)
    lengths = []
    for prompt in record.prompts:
        if cold:
            engine.reset()
        lengths.append(engine.generate([list(prompt.token_ids)], params)[0].accept_lengths)
    return lengths


def combinations(methods: str, budgets: str, modes: str) -> list[tuple[str, int, str]]:
    """(method, budget, mode) of all of them, each list separated by commas."""
    if unknown := set(modes.split(",")) - set(MODES):
        raise ValueError(f"mode must be cold or warm, got {', '.join(sorted(unknown))}")
    return list(itertools.product(methods.split(","), map(int, budgets.split(",")), modes.split(",")))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "mode", "tokens a step", "nodes a step", "misses", "steps/s", "as the engine")
    for row in rows:
        same = f"{100 * row['same_steps']:.0f} % of prompts" if "same_steps" in row else ""
        figures = (f"{row['tokens_a_step']:.3f}", f"{row['nodes_a_step']:.1f}", str(row["misses"]))
        table.add_row(row["method"], row["mode"], *figures, f"{row['steps'] / row['seconds']:.0f}", same)
    return table


def main(
    record: Annotated[Path, typer.Option(help="the .npz file")],
    methods: Annotated[str, typer.Option(help="methods of specdec, separated by commas")] = "best_first",
    budget: Annotated[str, typer.Option(help="node budgets, root included, separated by commas")] = "16",
    mode: Annotated[str, typer.Option(help="cold, warm or cold,warm")] = "warm",
    ask: Annotated[bool, typer.Option(help="ask the model for what is not recorded, and record it")] = False,
    check: Annotated[bool, typer.Option(help="run the real engine too, and compare step by step")] = False,
    skip: Annotated[bool, typer.Option(help="rejected nodes that are not recorded teach nothing")] = False,
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...; of a new record")] = "float32",
    data: Annotated[Path, typer.Option(help="folder with mix.json, for a new record")] = DEFAULT_DATA,
    split: Annotated[str, typer.Option(help="tune or report, for a new record")] = "tune",
    limit: Annotated[int | None, typer.Option(help="so many prompts, spread over the groups, for a new record")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="for a new record")] = 128,
) -> None:
    """Replay methods along recorded answers."""
    console = Console(stderr=True)
    rows = []
    try:
        todo = combinations(methods, budget, mode)
        loaded, tokenizer = load(model, dtype) if ask or check else (None, None)
        answers = open_record(record, loaded if ask else None, tokenizer, data, split, limit, max_new_tokens)
        recorder = Recorder(loaded, answers) if ask else None
        for name, nodes, how in todo:
            builder = make_builder(name, answers.vocab_size, None)
            warm_up(builder, answers.vocab_size, torch.float32)
            started = time.perf_counter()
            replays = Simulator(answers, builder, nodes, recorder, skip).run(how == "cold")
            seconds = time.perf_counter() - started
            row = {"method": f"{name}@{nodes}", "mode": how, **summary(replays), "seconds": seconds}
            if recorder is not None:
                answers.save(record)
            if check:
                real = engine_lengths(Engine(loaded, tokenizer, method=name, budget=nodes), answers, how == "cold")
                row["same_steps"] = sum(a == b.accept_lengths for a, b in zip(real, replays)) / len(replays)
            rows.append(row)
            console.print(f"{len(rows)} of {len(todo)}: {name}@{nodes}, {how}, {row['tokens_a_step']:.3f} tokens a step")
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(_table(rows))
    print(json.dumps({"bench": "simulate", "record": str(record), "entries": len(answers), "runs": rows}), flush=True)


if __name__ == "__main__":
    typer.run(main)
