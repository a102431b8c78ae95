"""Pacer: the size that emits most tokens a second by the measured costs, plain steps where drafts never hit, and the way back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specdec.engine import StepStats
from specdec.pacing import MAX_NODES, PROBE, TRY_NODES, Pacer

SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64)


class Costs:
    """seconds(m) = base + slope * m, whatever the context and rows; remembers what it was told."""

    def __init__(self, base: float, slope: float) -> None:
        self.base, self.slope = base, slope
        self.seen: list[tuple[int, int, int, float]] = []

    def seconds(self, nodes: int, context: int, rows: int = 1) -> float:
        return self.base + self.slope * nodes

    def curve(self, context: int, rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
        return np.array(SIZES), np.array([self.seconds(size, context, rows) for size in SIZES])

    def observe_host(self, seconds: float) -> None:
        """Host time is free here."""

    def observe(self, nodes: int, context: int, rows: int, seconds: float) -> None:
        self.seen.append((nodes, context, rows, seconds))


def make_pacer(monkeypatch: pytest.MonkeyPatch, base: float = 0.03, slope: float = 0.001) -> Pacer:
    costs: Any = Costs(base, slope)
    monkeypatch.setattr("specdec.pacing.measured_costs", lambda target: costs)
    return Pacer(None, "auto")  # type: ignore[arg-type]


def drive(pacer: Pacer, steps: int, emitted: Callable[[int], float], rows: int = 1) -> list[int]:
    """Steps whose trees use the whole budget and emit emitted(nodes) tokens a row; the budgets chosen."""
    budgets = []
    for _ in range(steps):
        nodes = pacer.budget(rows, 100, False)
        stats = StepStats(rows=rows, nodes=nodes, emitted=rows * emitted(nodes) if nodes > 1 else rows)  # type: ignore[arg-type]
        stats.times["forward"] = 0.01
        pacer.observe(stats, 100)
        budgets.append(nodes)
    return budgets


def best_size(gain: float, base: float, slope: float) -> int:
    return max(SIZES, key=lambda m: (1 + gain * math.log2(m)) / (base + slope * m))


def test_a_number_is_the_budget() -> None:
    pacer = Pacer(None, 13)  # type: ignore[arg-type]
    assert [pacer.budget(rows, context, sized) for rows, context, sized in ((1, 5, False), (4, 10**5, True))] == [13, 13]
    pacer.observe(StepStats(rows=1, nodes=13, emitted=1), 5)
    assert pacer.cost_model is None and pacer.info() == {}


def test_builders_that_size_themselves_get_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_pacer(monkeypatch).budget(1, 100, True) == MAX_NODES


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("gain", "base", "slope"), [(0.5, 0.03, 0.001), (0.6, 0.03, 0.0001), (0.3, 0.03, 0.0005), (0.9, 0.03, 0.004)]
)
def test_finds_the_best_size(gain: float, base: float, slope: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = drive(make_pacer(monkeypatch, base, slope), 120, lambda nodes: 1 + gain * math.log2(nodes), rows)
    value = {m: (1 + gain * math.log2(m)) / (base + slope * m) for m in SIZES}
    assert value[budgets[-1]] >= value[best_size(gain, base, slope)] / 1.04  # within the hysteresis
    assert len(set(budgets[-30:])) == 1, "it settles"


def test_drafts_that_never_hit_cost_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = drive(make_pacer(monkeypatch), 400, lambda nodes: 1.0)
    later = budgets[100:]
    tries = [m for m in later if m > 1]
    assert len(tries) <= len(later) / PROBE + 1 and set(tries) == {TRY_NODES}
    assert tries, "it must go on trying"


def test_recovers_when_the_text_becomes_predictable(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = make_pacer(monkeypatch)
    assert drive(pacer, 400, lambda nodes: 1.0)[-1] == 1
    budgets = drive(pacer, 200, lambda nodes: 1 + 0.8 * math.log2(nodes))
    assert budgets[-1] > 1
    assert next(step for step in range(200) if min(budgets[step : step + 5]) > 1) <= 4 * PROBE


def test_gives_up_within_tens_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = make_pacer(monkeypatch)
    drive(pacer, 100, lambda nodes: 1 + 0.8 * math.log2(nodes))
    budgets = drive(pacer, 100, lambda nodes: 1.0)
    assert budgets.index(1) <= 50


def test_noise_does_not_make_it_flutter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that alternate between none and twice the mean: a handful of changes of size, not one a step."""
    pacer, high = make_pacer(monkeypatch), [False]

    def emitted(nodes: int) -> float:
        high[0] = not high[0]
        return 1 + (0.9 if high[0] else 0.1) * math.log2(nodes)

    budgets = drive(pacer, 300, emitted)[50:]
    assert sum(a != b for a, b in itertools.pairwise(budgets)) <= 10


def test_speculation_that_costs_too_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft hits, but a node costs as much as a step."""
    budgets = drive(make_pacer(monkeypatch, base=0.0, slope=0.03), 200, lambda nodes: 1 + 0.3 * math.log2(nodes))
    assert budgets[-1] == 1


def test_every_step_teaches_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = make_pacer(monkeypatch)
    stats = StepStats(rows=3, nodes=8, emitted=5)
    stats.times["forward"] = 0.25
    pacer.observe(stats, 77)
    pacer.observe(StepStats(), 77)  # a step that had no row
    assert pacer.cost_model is not None and pacer.cost_model.seen == [(8, 77, 3, 0.25)]  # type: ignore[attr-defined]


def test_reset_forgets_acceptance_but_not_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = make_pacer(monkeypatch)
    first = pacer.budget(1, 100, False)
    drive(pacer, 300, lambda nodes: 1.0)
    costs = pacer.cost_model
    pacer.reset()
    assert pacer.budget(1, 100, False) == first and pacer.cost_model is costs
