"""ByRate: a drafter that pays is found and used, one that does not costs a bounded time, and what is learned goes to all.

Texts, arms and clock are those of `bench.arms`: what is lost and won can be told beforehand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.arms import Arm, Clock, Drafter, Plain, Run, drafter_of, quality_of, run
from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, Verdict
from specdec.methods import METHODS
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence
from specdec.trees.best_first import BestFirst
from specdec.trees.by_model import Costs
from specdec.trees.by_rate import ByRate
from specdec.trees.chain import Chain, NoSource
from specdec.trees.trust import Trust

SEEDS = range(8)
LOSERS = [
    (0.5, 1.0),
    (0.8, 0.35),
    (0.95, 0.1),
]  # times plain decoding's speed, seconds of a forward that a plain step takes 1 for
WINNERS = [(1.2, 0.35), (1.5, 0.2), (2.0, 0.1)]


def both(clock: Clock, forward: float, quality: Any, seed: int = 0) -> tuple[ByRate, list[Any]]:
    arms: list[Arm] = [Plain(clock, seed), Drafter(clock, forward, quality, seed + 1)]
    return ByRate({"none": arms[0], "drafter": arms[1]}, clock), arms


def mean_of(runs: list[Run]) -> float:
    return float(np.mean([found.ratio for found in runs]))


@pytest.mark.parametrize(("wanted", "forward"), LOSERS)
@pytest.mark.parametrize(("length", "most"), [(48, 0.05), (256, 0.025)])
@pytest.mark.parametrize("prompt", [20, 200])
def test_a_drafter_that_does_not_pay_costs_little(wanted: float, forward: float, length: int, most: float, prompt: int) -> None:
    runs = [drafter_of(wanted, forward, prompt, length, seed) for seed in SEEDS]
    reading = prompt * forward * 1.63 / 64
    assert mean_of(runs) <= 1 + most
    for found in runs:  # twice what may be lost: a bad step is seen when it is over, and 5 % are hard to tell
        assert found.seconds - found.plain <= reading + 2 * (2 + 0.01 * length)


def test_a_long_text_with_a_drafter_that_does_not_pay() -> None:
    assert drafter_of(0.8, 0.35, 200, 2000, 0).ratio < 1.015


@pytest.mark.parametrize(("wanted", "forward"), WINNERS)
def test_a_drafter_that_pays_is_found_and_used(wanted: float, forward: float) -> None:
    runs = [drafter_of(wanted, forward, 20, 256, seed) for seed in SEEDS]
    assert min(sum(found.drafted[:40]) for found in runs) > 10
    assert np.mean([np.mean(found.drafted[40:]) for found in runs]) > 0.8
    assert mean_of(runs) < 1 - 0.85 * (1 - 1 / wanted)
    short = [drafter_of(wanted, forward, 20, 48, seed) for seed in SEEDS]
    assert mean_of(short) < 1 - 0.6 * (1 - 1 / wanted)


def test_what_the_cost_model_rules_out_is_not_tried() -> None:
    clock = Clock()
    builder, arms = both(clock, 1.5, lambda: 0.2)
    run(builder, arms, clock, [500], 20)
    assert arms[1].steps == 0


@pytest.mark.parametrize(("prompt", "drafts"), [(20, True), (20_000, False)])
def test_a_text_is_read_only_where_that_can_pay(prompt: int, drafts: bool) -> None:
    """1.5x on 100 tokens saves 33 steps; reading the long prompt takes 100."""
    found = drafter_of(1.5, 0.2, prompt, 100, 0)
    assert any(found.drafted) == drafts


def test_a_drafter_that_is_used_does_not_read_a_text_for_nothing() -> None:
    """A later request with a long prompt and few tokens."""
    clock, quality = Clock(), quality_of(1.5, 0.2)
    builder, arms = both(clock, 0.2, lambda: quality)
    assert run(builder, arms, clock, [300], 20).drafted[-1]
    assert not any(run(builder, arms, clock, [10], 2000, first=1).drafted)
    assert any(run(builder, arms, clock, [300], 20, first=2).drafted[:3])  # it is known by now


@pytest.mark.parametrize("spell", [1, 5])
def test_a_drafter_that_pays_on_some_texts_only(spell: int) -> None:
    """1.5x and 0.6x in turns of one or five texts."""
    clock, place = Clock(), [0]
    qualities = [quality_of(wanted, 0.2) for wanted in (1.5, 0.6)]
    builder, arms = both(clock, 0.2, lambda: qualities[place[0]])
    times = np.zeros((2, 2))
    for text in range(20):
        place[0] = text // spell % 2
        found = run(builder, arms, clock, [256], 20, first=text)
        times[place[0]] += found.seconds, found.plain
    paying, losing = times[:, 0] / times[:, 1]
    assert paying < 0.78 and losing < 1.07


@pytest.mark.parametrize(("wanted", "forward", "most"), [(1.5, 0.2, 0.75), (0.8, 0.35, 1.03)])
def test_eight_rows_that_become_one(wanted: float, forward: float, most: float) -> None:
    """Prices of eight rows do not decide about one, whose drafts cost less: in a batch every node counts."""
    ratios = []
    for seed in SEEDS:
        clock, quality = Clock(), quality_of(wanted, forward)
        builder, arms = both(clock, forward, lambda quality=quality: quality, 2 * seed)
        found = run(builder, arms, clock, [*range(20, 27), 200], 20)
        ratios.append(found.ratio)
        if wanted > 1:
            assert np.mean(found.drafted[-30:]) > 0.7
    assert np.mean(ratios) < most


def test_context_makes_steps_slower_and_no_arm_worse() -> None:
    """Every step takes three times as long as before, as the cost model says: nothing is tried or left for that."""
    for wanted in (0.8, 1.5):
        clock, quality = Clock(), quality_of(wanted, 0.2)
        builder, arms = both(clock, 0.2, lambda quality=quality: quality)
        before = run(builder, arms, clock, [300], 20).drafted
        for arm in arms:
            arm.seconds = lambda seqs, seconds=arm.seconds: 3 * seconds(seqs)
        slower = [CostModel({key: 3 * time for key, time in model.table.items()}) for model in arms[1].costs[:2]]
        arms[1].costs = Costs(*slower, clock)
        after = run(builder, arms, clock, [60], 20, first=1).drafted
        assert before[-1] == (wanted > 1) and (np.mean(after) > 0.7 if wanted > 1 else sum(after) <= 8)


def test_the_base_is_found_again_when_it_has_learned() -> None:
    """Context drafts that become twice as fast as plain steps, after 60 tokens in which a drafter of 1.3x was better."""

    class Learner(Plain):
        emitted = 0

        def tokens(self) -> int:
            return 1 if self.emitted < 60 else int(self.rng.geometric(0.5))

        def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: Any) -> None:
            super().update(seq, tree, verdict, top)
            self.emitted += len(verdict.nodes)

    shares = []
    for seed in SEEDS:
        clock, quality = Clock(), quality_of(1.3, 0.2)
        arms: list[Any] = [Learner(clock, seed), Drafter(clock, 0.2, lambda quality=quality: quality, seed)]
        found = run(ByRate({"best_first": arms[0], "drafter": arms[1]}, clock), arms, clock, [800], 20)
        shares.append(np.mean(found.drafted[-100:]))
        assert found.ratio < 0.75
    assert np.mean(shares) < 0.3


def test_the_clock_decides_without_a_cost_model() -> None:
    for wanted in (0.7, 1.5):
        clock, quality = Clock(), quality_of(wanted, 0.2)
        builder, arms = both(clock, 0.2, lambda quality=quality: quality)
        arms[1].plain_seconds, arms[1].reading_seconds, arms[1].outlook = (
            (lambda seqs: 1.0),
            (lambda seqs: 0.0),
            (lambda seqs: None),
        )
        found = run(builder, arms, clock, [500], 20)
        assert (np.mean(found.drafted[-200:]) > 0.8) == (wanted > 1) and found.ratio < 1.03


def test_both_learn_from_every_step() -> None:
    clock = Clock()
    builder, arms = both(clock, 0.1, lambda: 0.7)
    seen = [0, 0]
    for place, arm in enumerate(arms):
        arm.update = lambda *verdict, place=place: seen.__setitem__(place, seen[place] + 1)
    steps = len(run(builder, arms, clock, [200], 20).drafted)
    assert seen == [steps, steps] and 0 < arms[1].steps < steps


def test_steps_that_it_did_not_draft_are_not_counted() -> None:
    """Where no draft fits the engine steps without the builder; its trees may lie where those of the last step lay."""
    clock = Clock()
    builder, _ = both(clock, 1.5, lambda: 0.2)
    seq = Sequence(0, [1, 2, 3], SamplingParams(max_new_tokens=10**6), Randomness(0), row=0)
    builder.start(seq)
    for _ in range(20):
        (tree,) = builder.build([seq], [8], [8])
        builder.update(seq, tree, Verdict(np.arange(1, dtype=np.int32), 9), None)
        del tree
        for _ in range(3):
            clock.now += 100.0
            builder.update(seq, DraftTree.root_only(1), Verdict(np.arange(1, dtype=np.int32), 9), None)
    assert builder.info()["tokens_per_second"]["none"] == pytest.approx(1.0, abs=0.05)


def test_rows_that_fail_are_not_counted() -> None:
    """Of eight rows seven have no verdict."""
    clock = Clock()
    builder, _ = both(clock, 1.5, lambda: 0.2)
    seqs = [Sequence(row, [1, 2, 3], SamplingParams(max_new_tokens=10**6), Randomness(0), row=row) for row in range(8)]
    for seq in seqs:
        builder.start(seq)
    for _ in range(20):
        trees = builder.build(seqs, [8] * 8, [8] * 8)
        builder.update(seqs[0], trees[0], Verdict(np.arange(1, dtype=np.int32), 9), None)
    assert builder.info()["tokens_per_second"]["none"] == pytest.approx(1 / 1.07, abs=0.05)


def test_reading_the_text_is_not_priced() -> None:
    """A prompt that takes 20 steps to read, and a drafter of twice plain decoding's speed."""
    clock, quality = Clock(), quality_of(2.0, 0.1)
    builder, arms = both(clock, 0.1, lambda: quality)
    run(builder, arms, clock, [1500], 3000)
    assert builder.info()["tokens_per_second"]["drafter"] == pytest.approx(2.0, abs=0.6)
    assert np.isclose(builder.info()["tokens_per_second"]["none"], 1.0, atol=0.05)


def test_reset_forgets_the_prices() -> None:
    clock = Clock()
    builder, arms = both(clock, 0.1, lambda: 0.7)
    run(builder, arms, clock, [100], 20)
    assert len(builder.info()["tokens_per_second"]) == 2
    builder.reset()
    assert builder.info() == {"tokens_per_second": {}}


def test_a_state_fits_the_method_with_and_without_a_drafter() -> None:
    """best_first's own names: what `auto` saved without a drafter loads with one, and the other way round."""

    def learned() -> BestFirst:
        builder = BestFirst(50)
        seq = Sequence(0, [1, 2, 3, 4, 1, 2], SamplingParams(), Randomness(0), row=0)
        builder.start(seq)
        builder.finish(seq)
        return builder

    def with_drafter(base: BestFirst) -> ByRate:
        return ByRate({"best_first": base, "goose_drafter": Drafter(Clock(), 0.1, lambda: 0.7)}, Clock())

    alone = METHODS["auto"].make(50, None)
    alone.load_state(learned().state())
    for load in ("load_state", "merge_state"):
        builder = with_drafter(BestFirst(50))
        getattr(builder, load)(alone.state())
        assert builder.state().keys() == alone.state().keys()
        for name, array in alone.state().items():
            np.testing.assert_array_equal(builder.state()[name], array)
        fresh = BestFirst(50)
        fresh.load_state(builder.state())
        assert len(fresh.state()["shared.tokens"]) == 7


def test_what_the_drafter_learned_is_its_own() -> None:
    class Learned(Drafter):
        seen: Any = None

        def state(self) -> dict[str, Any]:
            return {"shared.tokens": np.arange(3)}

        def load_state(self, state: dict[str, Any]) -> None:
            self.seen = state

    drafter = Learned(Clock(), 0.1, lambda: 0.7)
    builder = ByRate({"best_first": BestFirst(50), "goose_drafter": drafter}, Clock())
    builder.load_state(builder.state())
    assert drafter.seen["shared.tokens"].tolist() == [0, 1, 2]


def test_bad_input() -> None:
    arm = Chain(NoSource())
    with pytest.raises(ValueError, match="builders must be two"):
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
    assert trust.chances(kinds, half)[0] == pytest.approx(0.8, abs=0.005)
    assert trust.chances(np.array([1]), half)[0] == pytest.approx(0.593, abs=0.001)  # another kind
    third = np.array([3])
    for step in range(10):
        trust.learn(third, np.log(np.array([0.8])), np.array([step < 2]))
    assert trust.chances(third, np.log(np.array([0.8])))[0] == pytest.approx(0.21, abs=0.01)
    assert trust.chances(third, np.log(np.array([0.9])))[0] == pytest.approx(0.24, abs=0.01)  # the first of its class
    assert trust.chances(third, np.log(np.array([0.9998])))[0] == pytest.approx(0.95, abs=0.01)


def test_a_drafter_that_is_wrong_where_it_doubts_is_believed_where_it_is_sure() -> None:
    """Chances that were scaled by what the whole kind got right were .97 here, and .84 where nothing had been seen, at .999."""
    trust, kinds = Trust(), np.array([0])
    doubtful, sure = np.log(np.array([0.6])), np.log(np.array([0.9999]))
    for step in range(30):
        trust.learn(kinds, doubtful, np.array([step % 3 == 0]))
        trust.learn(kinds, sure, np.array([True]))
    assert trust.chances(kinds, doubtful)[0] == pytest.approx(1 / 3, abs=0.06)
    assert trust.table()[0, -1] > 0.985
    assert trust.chances(kinds, np.log(np.array([0.999])))[0] > 0.95


def test_chances_of_siblings_sum_to_less_than_one() -> None:
    trust = Trust()
    many = trust.chances(np.zeros(5, np.intp), np.log(np.full(5, 0.9)))
    assert many.sum() <= 0.98 + 1e-12
    extreme = trust.chances(np.array([0, 1]), np.array([-np.inf, 0.0]))
    assert np.isfinite(extreme).all() and extreme[0] < 0.001 < 0.95 < extreme[1] < 1
