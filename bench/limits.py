"""How far best_first is from what its own candidates allow: `python -m bench.limits --record report.npz` (see `bench.simulate`).

The selection oracle knows the text. Out of all candidates that the sources proposed in a step (chosen or not) it takes the best
tree of at most N nodes: the path that agrees with the text, and nothing else. It pays one forward of that many nodes and no host
time. What no source proposed is out of its reach, and so is what lies below a candidate that was not chosen: nobody asked there.
With a cost model the builder stops asking where no larger tree can pay. The wide oracle is that of the same sources in the same
step, had they been asked until N nodes were chosen, whatever these would cost. Worked example, the text goes on a b c; forwards of
1 to 4 nodes take 40 ms, of 8 nodes 50 ms; host time is 2 ms::

    root - a, x; a - y; five more nodes below x and y      the engine chose these 8 nodes: 2 tokens (a, b) in 52 ms, 38.5 a second
           a - (b)                                         b was proposed, not chosen
    root - a - b                                           the oracle: 3 tokens (a, b, c) in 40 ms, 75 a second; the share is 51 %

The loss, 49 %, is what the speed gains when its causes go one by one: no host time (2 in 50 ms: 40.0, so host time cost 2 % of the
oracle's speed), no rejected nodes (2 in 40 ms: 50.0, 13 %), no selection misses (3 in 40 ms: 75.0, 33 %). Sums of tokens and of
seconds over the engine's own steps; the cost curve is frozen. Printed beside it: the wide oracle, the true-token oracle (a drafter
that always says what comes: its gap to the selection oracle is draft misses) and the memory floor (the bytes that one forward of
one node must read, at the measured bandwidth). The last stdout line is one JSON object.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from specdec.cost_model import CostModel
from specdec.draft_tree import ROOT, DraftTree
from specdec.engine import Engine, warm_up
from specdec.models import load
from specdec.pacing import HOST_PHASES, MAX_NODES
from specdec.sequence import SamplingParams, Sequence
from specdec.target import TargetModel
from specdec.trees.best_first import BestFirst
from specdec.trees.evidence import Evidence

from .attention import measure_bounds
from .record import Record, Recorder
from .simulate import MODES, Replayed, Simulator

__all__ = ["Grown", "Ladder", "Step", "WatchedBestFirst", "climb", "floor_bytes", "proposed_path", "steps_of"]

CAUSES = ("host time", "rejected nodes", "selection misses")


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine did in one step, and what the selection oracle would have done there."""

    emitted: int  # tokens; also the nodes of the accepted path, root included
    nodes: int
    context: int
    proposed: int  # tokens that the oracle emits, and nodes that it needs
    wide: int  # and the wide oracle


@dataclass(frozen=True, slots=True)
class Ladder:
    """Tokens a second as causes of loss go, one by one."""

    engine: float
    without_host: float
    without_rejected: float
    oracle: float  # and without selection misses
    wide: float  # and with sources that were asked at N nodes in every step
    true_tokens: float  # and without draft misses

    @property
    def share(self) -> float:
        """The engine's speed by the oracle's."""
        return self.engine / self.oracle

    def losses(self) -> dict[str, float]:
        """Shares of the oracle's speed; with `share` they sum to 1."""
        rungs = (self.engine, self.without_host, self.without_rejected, self.oracle)
        return {cause: (above - below) / self.oracle for cause, below, above in zip(CAUSES, rungs, rungs[1:])}


class Grown(NamedTuple):
    """The trees of one step, before they are cut to the size that pays."""

    own: DraftTree  # what the engine grows
    wide: DraftTree  # what it would grow without a cost model


class WatchedBestFirst(BestFirst):
    """best_first, with what it grew in `grown`."""

    def __init__(self, vocab_size: int, cost_model: CostModel | None = None) -> None:
        super().__init__(vocab_size, cost_model)
        self.grown: list[Grown] = []

    def _build(self, seq: Sequence, budget: int, depth: int, costs: CostModel | None) -> DraftTree:
        own = super()._build(seq, budget, depth, costs)
        wide = own if costs is None else super()._build(seq, budget, depth, None)  # growing a tree teaches nothing
        self.grown.append(Grown(own, wide))
        return own


def proposed_path(tree: DraftTree, evidence: Evidence, future: Seq[int], most: int) -> int:
    """Nodes, root included and at most `most`, of the path of candidates that agrees with the text.

    Args:
        tree: as it was grown.
        evidence: the candidates of each of its nodes; the first `counts[node]` of `tokens[node]`.
        future: tokens that follow the root.
    """
    node = ROOT
    for length, token in enumerate(future, 1):
        if length == most:
            return length
        child = tree.child(node, token)
        if child < 0:
            return length + int(token in evidence.tokens[node, : max(0, evidence.counts[node])])
        node = child
    return min(len(future) + 1, most)


def steps_of(replayed: Replayed, grown: Seq[Grown], most: int) -> list[Step]:
    """The steps of one replayed prompt; `grown` as in WatchedBestFirst, where the last step of a text may have drafted nothing."""
    steps, done = [], 0
    for number, emitted in enumerate(replayed.accept_lengths):
        future = replayed.token_ids[done:-1]  # a draft of the last token would emit one more than the text has
        proposed = wide = emitted
        if number < len(grown):
            drafts: list[tuple[DraftTree, Any]] = [(tree, tree.evidence) for tree in grown[number]]
            proposed, wide = (proposed_path(tree, draft.evidence, future, most) for tree, draft in drafts)
        steps.append(Step(emitted, replayed.tree_sizes[number], replayed.contexts[number], proposed, wide))
        done += emitted
    return steps


def climb(steps: Seq[Step], costs: CostModel, host_seconds: float, most: int) -> Ladder:
    """The speeds over all steps: sum of tokens / sum of seconds; `most` is the largest tree of the true-token oracle."""

    def speed(tokens: int, nodes: Seq[int], host: float = 0.0) -> float:
        return tokens / sum(costs.seconds(count, step.context) + host for count, step in zip(nodes, steps))

    chosen, accepted = [step.nodes for step in steps], [step.emitted for step in steps]
    proposed, wide = [step.proposed for step in steps], [step.wide for step in steps]
    emitted = sum(accepted)
    return Ladder(
        speed(emitted, chosen, host_seconds),
        speed(emitted, chosen),
        speed(emitted, accepted),
        speed(sum(proposed), proposed),
        speed(sum(wide), wide),
        max(speed(size * len(steps), [size] * len(steps)) for size in range(1, most + 1)),
    )


def floor_bytes(target: TargetModel, context: int) -> int:
    """Bytes that a forward of one node must read: every weight that takes part in a product once, K and V of the context."""
    model = target.model
    weights = {id(weight): weight for weight in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        weights.pop(id(embedding))  # one row of it is read
    cache = target.new_cache(1, 64)
    return sum(weight.numel() * weight.element_size() for weight in weights.values()) + cache.nbytes // 64 * context


def host_seconds_of(engine: Engine, record: Record, prompts: int) -> float:
    """Measured host time of one step of the engine, over the first prompts."""
    params, seconds, steps = SamplingParams(max_new_tokens=record.max_new_tokens), 0.0, 0
    for prompt in record.prompts[:prompts]:
        result = engine.generate([list(prompt.token_ids)], params)[0]
        seconds += sum(result.times[phase] for phase in HOST_PHASES)
        steps += result.steps
    return seconds / steps


def watch(record: Record, recorder: Recorder, costs: CostModel | None, budget: int, cold: bool) -> dict[str, list[Step]]:
    """Replay every prompt; its steps by group."""
    builder = WatchedBestFirst(record.vocab_size, costs)
    warm_up(builder, record.vocab_size, recorder.target.dtype)
    simulator = Simulator(record, builder, budget, recorder)
    groups: dict[str, list[Step]] = defaultdict(list)
    for prompt in record.prompts:
        if cold:
            builder.reset()
        builder.grown.clear()
        groups[prompt.group] += steps_of(simulator.replay(prompt), builder.grown, budget)
    return groups


def _table(title: str, ladders: dict[str, Ladder], steps: dict[str, list[Step]]) -> Table:
    table = Table("group", "tokens a step", "tokens/s", "oracle", "share", *CAUSES, "wide", "share", "true tokens", title=title)
    for group, ladder in ladders.items():
        rate = np.mean([step.emitted for step in steps[group]])
        losses = [f"{100 * loss:.1f} %" for loss in ladder.losses().values()]
        speeds = (f"{rate:.2f}", f"{ladder.engine:.1f}", f"{ladder.oracle:.1f}", f"{100 * ladder.share:.1f} %")
        wide = (f"{ladder.wide:.1f}", f"{100 * ladder.engine / ladder.wide:.1f} %")
        table.add_row(group, *speeds, *losses, *wide, f"{ladder.true_tokens:.0f}")
    return table


def main(
    record: Annotated[Path, typer.Option(help="what bench.simulate --ask wrote")],
    budget: Annotated[str, typer.Option(help="auto: sizes by the cost model out of 64 nodes; or a number of nodes")] = "auto",
    mode: Annotated[str, typer.Option(help="cold, warm or cold,warm")] = "cold,warm",
    timed: Annotated[int, typer.Option(help="prompts over which the engine's host time is measured")] = 3,
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...; as recorded")] = "bfloat16",
    compile: Annotated[bool, typer.Option("--compile", help="costs and host time of the compiled step")] = False,
) -> None:
    """The engine's speed as a share of the selection oracle's, and where the rest goes."""
    console = Console(stderr=True, width=130)
    if unknown := set(mode.split(",")) - set(MODES):
        raise typer.BadParameter(f"mode must be cold or warm, got {', '.join(sorted(unknown))}")
    answers = Record.load(record)
    loaded, tokenizer = load(model, dtype)
    recorder = Recorder(loaded, answers)
    engine = Engine(loaded, tokenizer, method="best_first", budget="auto", compile=compile)
    costs = engine.pacer.cost_model
    assert costs is not None
    costs = CostModel(costs.table)  # before the engine's steps change it
    host = host_seconds_of(engine, answers, timed)
    costs.host_seconds = host
    title = f"best_first{'+compile' if compile else ''}"
    most = MAX_NODES if budget == "auto" else int(budget)
    results: dict[str, Any] = {}
    for how in mode.split(","):
        steps = watch(answers, recorder, costs if budget == "auto" else None, most, how == "cold")
        steps["all"] = [step for group in steps.values() for step in group]
        ladders = {group: climb(mine, costs, host, most) for group, mine in steps.items()}
        console.print(_table(f"{title}@{budget}, {how}; losses in shares of the selection oracle's speed", ladders, steps))
        results[how] = {group: {**asdict(rungs), "share": rungs.share, **rungs.losses()} for group, rungs in ladders.items()}
    if recorder.forwards:
        answers.save(record)
    context = int(np.mean([step.context for step in steps["all"]]))
    floor = floor_bytes(recorder.target, context) / measure_bounds().bytes_per_second
    figures = {"context": context, "memory_floor_ms": 1e3 * floor, "one_node_ms": 1e3 * costs.seconds(1, context)}
    console.print(f"host time {1e3 * host:.2f} ms a step; one node at {context} tokens of context: {figures}")
    print(
        json.dumps({"bench": "limits", "budget": budget, "compile": compile, "host_ms": 1e3 * host, **figures, "modes": results}),
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
