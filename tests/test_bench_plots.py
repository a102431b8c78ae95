"""Figures: what they show is what was measured, and a figure without data is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from bench import plots
from bench.log import Log
from bench.metrics import Row

COSTS = {"nodes": [1, 4, 8, 16], "forward_ms": {"256": [10.0, 11.0, 14.0, 30.0], "2048": [12.0, 13.0, 16.0, 33.0]}}
TIMES = {"prefill": 1.0, "forward": 1.0, "draft": 0.1, "accept": 0.05, "commit": 0.05, "learn": 0.1}


def row(task: str, method: str, steps: int, seconds: float, times=TIMES, group="qa", category="") -> Row:
    return Row(task, group, method, 100, steps, seconds, 1.0, [1], times, category, accepted=[0, 2 * steps - 100, 100 - steps])


ROWS = [
    row(f"{i}", method, steps, seconds, times, group, category)
    for i, (group, category) in enumerate([("qa", ""), ("mt-bench", "writing"), ("mt-bench", "stem")])
    for method, steps, seconds, times in [
        ("model.generate", 100, 4.0, {}), ("none", 100, 2.0, TIMES),
        ("goose@4", 80, 1.5, TIMES), ("goose@8", 60, 1.0, TIMES), ("goose@16", 55, 1.8, TIMES),
    ]
]  # fmt: skip
LABELS = ["model.generate", "none", "goose@4", "goose@8", "goose@16"]


def test_figures_show_the_measurements():
    figures = plots.draw(ROWS, COSTS, LABELS)
    assert list(figures) == ["speed_up", "accepted", "budget", "cost", "step"]
    (axes,) = figures["speed_up"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["qa", "mt-bench/writing", "mt-bench/stem", "all"]
    marks = {line.get_label(): line.get_xdata()[-1] for line in axes.get_lines()}
    assert marks["none"] == pytest.approx(2.0) and marks["goose@8"] == pytest.approx(4.0)
    (axes,) = figures["accepted"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["goose@4 (1.25)", "goose@8 (1.67)", "goose@16 (1.82)"]
    assert axes.get_images()[0].get_array()[1, :2].tolist() == pytest.approx([100 / 3, 200 / 3])
    (axes,) = figures["budget"].axes
    assert axes.get_lines()[0].get_xdata().tolist() == [4, 8, 16]
    assert axes.get_lines()[0].get_ydata() == pytest.approx([100 / 80, 100 / 60, 100 / 55])
    (axes,) = figures["step"].axes
    assert sum(bar.get_width() for bar in axes.patches[:4]) == pytest.approx(10 + 1000 / 80 + 1000 / 60 + 1000 / 55), "forwards"


def test_predicted_and_measured_optimum():
    """goose: 1.25, 1.67, 1.82 tokens a step at 11, 14, 30 ms and 0.3 s of host time over all steps."""
    axes = plots.draw(ROWS, COSTS, LABELS)["cost"].axes[1]
    lines = {line.get_label(): line for line in axes.get_lines() if line.get_linestyle() != "None"}
    host = [300 / steps for steps in (80, 60, 55)]
    predicted = [1e5 / steps / (ms + extra) for steps, ms, extra in zip((80, 60, 55), (11, 14, 30), host)]
    assert lines["goose, predicted"].get_ydata() == pytest.approx(predicted)
    assert lines["goose, measured"].get_ydata() == pytest.approx([100 / 1.5, 100.0, 100 / 1.8])
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert [float(star.get_xdata()[0]) for star in stars] == [8.0, 8.0]


def test_figures_without_data_are_left_out():
    plain = [replace(each, times={}) for each in ROWS if each.method == "model.generate"]
    assert plots.draw(plain, {}, ["model.generate"]) == {}


def test_command_line(tmp_path, monkeypatch):
    log = Log(tmp_path / "run.jsonl", {})
    log.note_costs(COSTS)
    log.add(ROWS)
    app = typer.Typer()
    app.command()(plots.main)
    result = CliRunner().invoke(app, [str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout.splitlines()[-1])["files"]
    assert len(files) == 10 and all((tmp_path / "figures" / name).stat().st_size > 1000 for name in files)
    for arguments, message in [
        (["absent.jsonl"], "log must be a file that bench.run --out wrote, got absent.jsonl"),
        (
            [str(tmp_path / "run.jsonl"), "--methods", "goose"],
            "methods must be among goose@4, goose@8, goose@16, model.generate, none",
        ),
    ]:
        wrong = CliRunner().invoke(app, arguments)
        assert wrong.exit_code == 2 and message in wrong.stderr
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    missing = CliRunner().invoke(app, [str(tmp_path / "run.jsonl")])
    assert missing.exit_code == 2 and "pip install specdec[bench]" in missing.stderr
