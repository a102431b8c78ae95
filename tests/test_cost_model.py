"""CostModel: prediction, choice of a size, refinement, persistence."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.cost_model import CostModel

TABLE = {(1, 1, 0): 0.020, (1, 8, 0): 0.024, (1, 16, 0): 0.040, (1, 1, 1000): 0.030, (1, 8, 1000): 0.034, (1, 16, 1000): 0.060}


def test_steps_in_nodes_and_lines_in_context() -> None:
    model = CostModel(TABLE)
    assert model.seconds(2, 0) == model.seconds(8, 0) == pytest.approx(0.024)
    assert model.seconds(9, 500) == pytest.approx(0.050)
    assert model.seconds(32, 0) == pytest.approx(0.080), "beyond the table: linear in nodes"
    assert model.sizes() == [1, 8, 16]


def test_never_falls_with_nodes() -> None:
    model = CostModel({(1, 1, 0): 0.03, (1, 4, 0): 0.02, (1, 8, 0): 0.04})
    assert [model.seconds(nodes, 0) for nodes in (1, 4, 8)] == pytest.approx([0.03, 0.03, 0.04])


def test_rows_interpolate() -> None:
    model = CostModel({(1, 1, 0): 0.02, (5, 1, 0): 0.04})
    assert [model.seconds(1, 0, rows) for rows in (1, 3, 5)] == pytest.approx([0.02, 0.03, 0.04])


def test_more_rows_than_measured_cost_as_so_many_nodes() -> None:
    model = CostModel(TABLE)
    assert model.seconds(4, 0, rows=4) == model.seconds(16, 0)
    assert model.seconds(16, 0, rows=2) == pytest.approx(2 * model.seconds(16, 0))


def test_docstring_example_picks_eight() -> None:
    expected = np.interp(np.arange(1, 17), [1, 8, 16], [1.0, 1.8, 2.2])
    size, gain = CostModel(TABLE).best_size(expected, context=0)
    assert (size, gain) == (8, pytest.approx(1.5))


@pytest.mark.parametrize("seed", range(20))
def test_best_size_is_never_below_a_plain_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expected = 1 + np.cumsum(np.r_[0.0, rng.uniform(0, 0.3, 15)])
    model = CostModel(TABLE, host_seconds=rng.uniform(0, 0.02))
    size, gain = model.best_size(expected, context=0)
    plain = 1 / model.seconds(1, 0)
    rate = expected[size - 1] / (model.seconds(size, 0) + (model.host_seconds if size > 1 else 0.0))
    assert gain >= 1 and rate == pytest.approx(gain * plain)
    for other in (1, 8, 16):
        assert rate >= expected[other - 1] / (model.seconds(other, 0) + model.host_seconds) - 1e-9


def test_observations_move_it_but_an_outlier_does_not() -> None:
    model = CostModel(TABLE)
    model.observe(8, 0, 1, 100.0)
    assert model.seconds(8, 0) < 0.027
    for _ in range(200):
        model.observe(8, 0, 1, 0.048)
    assert model.seconds(8, 0) == pytest.approx(0.048, rel=0.01)
    assert 0.04 * 1.2 < model.seconds(16, 0) < 0.08, "the whole machine got slower: other sizes follow in part"


def test_observations_of_a_batch_teach_the_size_that_they_were_predicted_from() -> None:
    """Four rows of two nodes cost what eight nodes cost."""
    model = CostModel(TABLE)
    assert model.seconds(2, 0, rows=4) == model.seconds(8, 0)
    before = model.seconds(16, 0) / model.seconds(8, 0)
    for _ in range(200):
        model.observe(2, 0, 4, 0.048)
    assert model.seconds(2, 0, rows=4) == model.seconds(8, 0) == pytest.approx(0.048, rel=0.01)
    assert model.seconds(16, 0) / model.seconds(8, 0) < before


def test_measure_takes_the_median_and_stops_in_time() -> None:
    calls: list[tuple[int, int, int]] = []

    def forward(rows: int, nodes: int, context: int) -> float:
        calls.append((rows, nodes, context))
        return 9.0 if len(calls) == 3 else 0.001 * nodes

    model = CostModel.measure(forward, nodes=(1, 4), contexts=(256,), repeats=3)
    assert model.seconds(4) == pytest.approx(0.004)
    calls.clear()
    CostModel.measure(forward, nodes=(1, 4), contexts=(256,), repeats=1000, seconds=0.0)
    assert len(calls) == 4


def test_save_and_load(tmp_path) -> None:
    path = tmp_path / "folder" / "costs.json"
    assert CostModel.load(path, "here") is None
    CostModel(TABLE, 0.001).save(path, "here")
    CostModel({(1, 1, 0): 1.0}).save(path, "there")
    loaded = CostModel.load(path, "here")
    assert loaded is not None and loaded.table == TABLE and loaded.host_seconds == 0.001
    assert CostModel.load(path, "elsewhere") is None
    path.write_text("{ damaged")
    assert CostModel.load(path, "here") is None


@pytest.mark.parametrize("table", [{}, {(0, 1, 0): 1.0}, {(1, 1, 0): 0.0}, {(1, 1, 0): float("nan")}])
def test_bad_tables_are_refused(table) -> None:
    with pytest.raises(ValueError, match="table"):
        CostModel(table)


def test_a_disturbed_measurement_of_a_small_size_is_mended() -> None:
    """Another program slowed every forward of one node: it cannot cost more than one of two."""
    model = CostModel.measure(
        lambda rows, nodes, context: 0.1 if nodes == 1 else 0.03 + 0.001 * nodes, contexts=(256,), seconds=0.0
    )
    assert model.seconds(1) == pytest.approx(0.032)
    assert model.seconds(8) == pytest.approx(0.038)


def test_slopes_bound_what_a_larger_tree_costs() -> None:
    """The worked example of the docstring."""
    model = CostModel({(1, 1, 0): 0.020, (1, 8, 0): 0.024, (1, 16, 0): 0.040})
    seconds, slopes = model.slopes(0)
    assert seconds[[1, 8, 16]].tolist() == [0.020, 0.024, 0.040] and np.count_nonzero(seconds) == 3
    assert slopes[[1, 8, 16]].tolist() == pytest.approx([0.004 / 7, 0.002, np.inf])
    assert 75 * slopes[8] == pytest.approx(0.15)
