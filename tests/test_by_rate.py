"""ByRate: the faster arm works, the other is tried now and then, and what is learned goes to all."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence
from specdec.trees.by_rate import LONGEST_PAUSE, PAUSE, SPELL, ByRate
from specdec.trees.chain import Chain, NoSource
from specdec.trees.trust import PRIOR, Trust


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Arm(Chain):
    """Drafts nothing; its steps take `seconds` and emit `tokens`."""

    compiles = False

    def __init__(self, clock: Clock, seconds: float, tokens: int, late: float = 0.0) -> None:
        super().__init__(NoSource())
        self.clock, self.seconds, self.tokens, self.late = clock, seconds, tokens, late
        self.steps = self.updates = 0

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        self.steps += 1
        self.clock.now += self.seconds + (self.late if self.steps == 1 else 0.0)
        return [DraftTree.chain([1, *range(2, 1 + self.tokens)]) for _ in seqs]

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: Any) -> None:
        super().update(seq, tree, verdict, top)
        self.updates += 1


def play(builder: ByRate, steps: int) -> None:
    seq = Sequence(0, [1, 2, 3], SamplingParams(max_new_tokens=10**6), Randomness(0), row=0)
    builder.start(seq)
    for _ in range(steps):
        trees = builder.build([seq], [8], [8])
        for tree in trees:
            builder.update(seq, tree, Verdict(np.arange(len(tree), dtype=np.int32), 9), None)
    builder.finish(seq)


@pytest.mark.parametrize("order", [("slow", "fast"), ("fast", "slow")])
def test_the_faster_arm_works_and_trials_grow_rare(order: tuple[str, str]) -> None:
    clock = Clock()
    arms = {"slow": Arm(clock, 3.0, 5), "fast": Arm(clock, 1.0, 2)}  # 1.67 against 2 tokens a second
    builder = ByRate({name: arms[name] for name in order}, clock)
    play(builder, 2000)
    trials, pause, steps = 1, PAUSE, 2 * SPELL
    while steps < 2000:
        steps, trials, pause = steps + min(pause, LONGEST_PAUSE) + SPELL, trials + 1, 2 * pause
    assert abs(arms["slow"].steps - trials * SPELL) <= 2 * SPELL
    assert builder.info()["tokens_per_second"] == {"slow": 1.67, "fast": 2.0}
    assert arms["slow"].updates == arms["fast"].updates == 2000  # all learn


def test_it_notices_when_the_other_becomes_the_faster() -> None:
    clock = Clock()
    first, second = Arm(clock, 1.0, 2), Arm(clock, 3.0, 2)
    builder = ByRate({"first": first, "second": second}, clock)
    play(builder, 100)
    assert first.steps > 3 * second.steps
    first.seconds, second.seconds, before = 3.0, 1.0, second.steps
    play(builder, 1000)
    assert second.steps - before > 600


def test_the_first_step_of_a_trial_does_not_count() -> None:
    clock = Clock()
    late, other = Arm(clock, 1.0, 3, late=1000.0), Arm(clock, 1.0, 2)
    builder = ByRate({"late": late, "other": other}, clock)
    play(builder, 500)
    assert late.steps > 400


def test_reset_and_state() -> None:
    clock = Clock()
    builder = ByRate({"one": Arm(clock, 1.0, 2), "two": Arm(clock, 2.0, 2)}, clock)
    play(builder, 50)
    builder.reset()
    assert builder.info() == {"tokens_per_second": {}}
    builder.load_state(builder.state())


def test_bad_input() -> None:
    arm = Chain(NoSource())
    with pytest.raises(ValueError, match="builders must be at least two"):
        ByRate({"only": arm})
    other, third = Chain(NoSource()), Chain(NoSource())
    other.rule, third.rule = "kseq", "block"  # type: ignore[attr-defined]
    assert ByRate({"a": arm, "b": other}).rule == "kseq"
    with pytest.raises(ValueError, match="one rule beside match"):
        ByRate({"a": other, "b": third})


def test_trust_moves_from_the_drafters_word_to_what_is_true() -> None:
    """The docstring's example, and siblings that exclude each other."""
    trust, kinds, half = Trust(), np.array([0]), np.log(np.array([0.5000001]))
    for step in range(40):
        trust.learn(kinds, half, np.array([step % 5 != 0]))
    assert trust.chances(kinds, half)[0] == pytest.approx((32 + PRIOR * 0.593) / (40 + PRIOR), abs=0.02)
    assert trust.chances(np.array([1]), half)[0] == pytest.approx(0.593, abs=0.001)  # another kind
    many = trust.chances(np.zeros(5, np.intp), np.log(np.full(5, 0.9)))
    assert many.sum() <= 0.98 + 1e-12
    extreme = trust.chances(np.array([0, 1]), np.array([-np.inf, 0.0]))
    assert np.isfinite(extreme).all() and extreme[0] < 0.001 < 0.95 < extreme[1] < 1
