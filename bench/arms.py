"""What ByRate loses with drafters that do not pay, and how much of the possible it reaches with those that do: made-up arms and clock.

A plain step takes 1 s at one row; n nodes take 1 + .01 (n - 1), rows count like nodes. A drafter of quality h drafts k levels of two
nodes, one of which is the target's token with chance h, at `forward` seconds a level; k is the best for its h. Times have 5 % of
noise, a line of `reading` tokens costs what the drafter's forward of 64 nodes does::

    python -m bench.arms
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence
from specdec.trees.by_model import Costs, TreeByModel
from specdec.trees.by_rate import ByRate
from specdec.trees.chain import Chain, NoSource

__all__ = ["Clock", "Drafter", "Plain", "costs", "drafter_of", "run", "speed"]

SIZES = (1, 2, 4, 8, 16, 32, 64)
TEXTS = {48: 40, 256: 20, 2000: 2}  # length -> how many
PROMPTS = (20, 200)
DRAFTERS = (
    (0.5, 1.0),
    (0.8, 0.35),
    (0.95, 0.1),
    (1.2, 0.35),
    (1.5, 0.2),
    (2.0, 0.1),
)  # times plain decoding's speed, seconds a level


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def costs(forward: float, clock: Clock) -> Costs:
    """The cost models of the module's docstring: the drafter's forward over two nodes takes `forward`."""
    target = {(1, nodes, 0): 1 + 0.01 * (nodes - 1) for nodes in SIZES}
    return Costs(CostModel(target), CostModel({key: forward * seconds for key, seconds in target.items()}), clock)


class Arm(Chain):
    """Its steps emit `tokens()` tokens a row and take `seconds()`."""

    compiles = False

    def __init__(self, clock: Clock, seed: int = 0) -> None:
        super().__init__(NoSource())
        self.clock, self.rng, self.steps = clock, np.random.default_rng(seed), 0

    def tokens(self) -> int:
        return 1

    def seconds(self, seqs: Seq[Sequence]) -> float:
        raise NotImplementedError

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        self.steps += 1
        self.clock.now += self.seconds(seqs) * self.rng.uniform(0.95, 1.05)
        return [DraftTree.chain(range(min(self.tokens(), depth + 1))) for depth in depths]


class Plain(Arm):
    """A token a step."""

    def seconds(self, seqs: Seq[Sequence]) -> float:
        return 1 + 0.01 * (len(seqs) - 1)


class Drafter(Arm):
    """`quality(text)`: chance that a level holds the target's token."""

    def __init__(self, clock: Clock, forward: float, quality: Callable[[], float], seed: int = 1) -> None:
        super().__init__(clock, seed)
        self.forward, self.quality = forward, quality
        self.costs = costs(forward, clock)
        self.read: dict[int, int] = {}
        self.model = self

    def unread(self, seq: Sequence) -> int:
        return len(seq.token_ids) - 1 - self.read.get(seq.id, 0)

    def levels(self, rows: int = 1) -> int:
        return max(range(1, 9), key=lambda k: speed(self.quality(), self.forward, k, rows))

    def tokens(self) -> int:
        return 1 + min(int(self.rng.geometric(1 - self.quality())) - 1, self.levels())

    def seconds(self, seqs: Seq[Sequence]) -> float:
        reading = self.reading_seconds(seqs)
        for seq in seqs:
            self.read[seq.id] = len(seq.token_ids) - 1
        rows = len(seqs)
        return reading + step_seconds(self.forward, self.levels(rows), rows)

    plain_seconds = TreeByModel.plain_seconds
    reading_seconds = TreeByModel.reading_seconds
    outlook = TreeByModel.outlook


def step_seconds(forward: float, levels: int, rows: int) -> float:
    return 1 + 0.01 * (rows * (1 + 2 * levels) - 1) + levels * forward * (1 + 0.01 * (2 * rows - 1))


def speed(quality: float, forward: float, levels: int, rows: int = 1) -> float:
    """Plain decoding's time a token over this drafter's."""
    tokens = (1 - quality ** (levels + 1)) / (1 - quality)
    return tokens * (1 + 0.01 * (rows - 1)) / step_seconds(forward, levels, rows)


def quality_of(wanted: float, forward: float) -> float:
    """The quality at which a drafter is `wanted` times as fast as plain decoding."""
    low, high = 0.0, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        fastest = max(speed(middle, forward, levels) for levels in range(1, 9))
        low, high = (middle, high) if fastest < wanted else (low, middle)
    return low


@dataclass
class Run:
    """What some texts took."""

    seconds: float = 0.0
    plain: float = 0.0
    drafted: list[bool] = field(default_factory=list)  # by steps

    @property
    def ratio(self) -> float:
        return self.seconds / self.plain


class Row(NamedTuple):
    """Of the table; times are those of plain decoding."""

    drafter: float
    forward: float
    prompt: int
    length: int
    time: float
    worst: float

    @property
    def reached(self) -> float:
        """Share of what the drafter could save."""
        return (1 - self.time) / (1 - 1 / self.drafter)


def run(
    builder: Any, arms: Seq[Arm], clock: Clock, lengths: Seq[int], prompt: int, limit: int | None = None, first: int = 0
) -> Run:
    """Texts of these lengths in one batch; `limit`: what they were allowed, if they end by themselves."""
    seqs = [
        Sequence(first + row, [1] * prompt, SamplingParams(max_new_tokens=limit or length), cast(Any, Randomness(0)), row=row)
        for row, length in enumerate(lengths)
    ]
    ends, found, begin = {seq.id: length for seq, length in zip(seqs, lengths)}, Run(), clock.now
    for seq in seqs:
        builder.start(seq)
    while seqs:
        left = [ends[seq.id] - seq.output_length for seq in seqs]
        before = arms[1].steps
        trees = builder.build(seqs, [64] * len(seqs), [most - 1 for most in left])
        found.drafted.append(arms[1].steps > before)
        for seq, tree in zip(seqs, trees):
            seq.append([1] * len(tree))
            if arms[1].steps > before:
                cast(Drafter, arms[1]).read[seq.id] = len(seq.token_ids) - 1
            builder.update(seq, tree, Verdict(np.arange(len(tree), dtype=np.int32), 1), None)
        for seq in [seq for seq in seqs if seq.output_length >= ends[seq.id]]:
            builder.finish(seq)
            seqs.remove(seq)
    found.seconds = clock.now - begin
    remaining = sorted(lengths)
    found.plain = sum(
        (length - before) * (1 + 0.01 * (len(remaining) - place - 1))
        for place, (before, length) in enumerate(zip([0, *remaining], remaining))
    )
    return found


def drafter_of(wanted: float, forward: float, prompt: int, length: int, seed: int) -> Run:
    """A text of an engine that knows nothing, with a drafter that is `wanted` times as fast as plain decoding."""
    clock, quality = Clock(), quality_of(wanted, forward)
    arms: list[Arm] = [Plain(clock, 2 * seed), Drafter(clock, forward, lambda: quality, 2 * seed + 1)]
    return run(ByRate({"none": arms[0], "drafter": arms[1]}, clock), arms, clock, [length], prompt)


def main() -> None:
    table = []
    for wanted, forward in DRAFTERS:
        for prompt in PROMPTS:
            for length, texts in TEXTS.items():
                ratios = [drafter_of(wanted, forward, prompt, length, seed).ratio for seed in range(texts)]
                table.append(Row(wanted, forward, prompt, length, float(np.mean(ratios)), max(ratios)))
                print(*(f"{value:8.3f}" for value in table[-1]), f"{table[-1].reached:8.2f}", flush=True)
    print(json.dumps({"bench": "arms", "rows": [row._asdict() for row in table]}))


if __name__ == "__main__":
    main()
