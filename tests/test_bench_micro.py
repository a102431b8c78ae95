"""The micro-benchmarks of bench/micro run, once in their smallest cases, and their report names what grows and what slowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from bench.micro.cases import AXES, MIDDLE, in_grid
from bench.micro.report import changes, curves, main
from specdec.attention import compiled_op

ROOT = Path(__file__).parent.parent
ONCE = ("--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-min-time=0", "--benchmark-calibration-precision=1")
PIECES = {
    "commit", "context_table_update", "depths", "detokenizer", "gumbel", "linear", "mask_packing", "match", "match_lookup",
    "match_update", "matrix_lookup", "matrix_update", "rules", "stop_strings", "top_k", "tree_growth", "tree_update",
}  # fmt: skip


def test_every_piece(tmp_path: Path) -> None:
    """What `make bench-micro` runs, the least case of each piece; every benchmark checks its own result."""
    saved = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "-c", "bench/micro/pytest.ini", "bench/micro", "--grid=least", *ONCE]
    # pytest-benchmark saves nothing in a worker of xdist, which it knows by these variables
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, f"--benchmark-json={saved}"], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(saved.read_text())
    contenders = {case["params"].get("contender") for case in run["benchmarks"] if case["name"].startswith("bench_attention")}
    assert contenders == ({"op", "expanded", "grouped", "reference"} if compiled_op() else set())
    pieces = {case["name"].split("[")[0].removeprefix("bench_") for case in run["benchmarks"]}
    assert pieces - {"attention"} == PIECES
    assert [change.ratio for change in changes(run, [run])] == [1.0] * len(run["benchmarks"])


def test_grids() -> None:
    middle = {"budget": MIDDLE["budget"], "batch": MIDDLE["batch"], "rule": "kseq"}
    assert in_grid("cross", middle)
    assert in_grid("cross", middle | {"budget": 256})
    assert not in_grid("cross", middle | {"budget": 256, "batch": 8})
    assert in_grid("whole", middle | {"budget": 256, "batch": 8})
    assert in_grid("least", {"budget": 8, "batch": 1})
    assert not in_grid("least", middle)
    assert all(MIDDLE[axis] in values for axis, values in AXES.items())


def run_of(times: dict[tuple[int, int], float]) -> dict[str, Any]:
    """A saved run of one piece: (budget, batch) -> seconds."""
    return {
        "benchmarks": [
            {"name": f"bench_x[{budget}-{batch}]", "params": {"budget": budget, "batch": batch}, "stats": {"min": seconds}}
            for (budget, batch), seconds in times.items()
        ]
    }


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_of({(8, 1): 1.0, (64, 1): 1.0})
    second = run_of({(8, 1): 2.0})  # a part of the cases: the newest time of each counts
    third = run_of({(256, 1): 48.0, (8, 1): 2.0, (64, 1): 3.0, (64, 8): 3.0})
    assert [(curve.axis, round(curve.exponent, 6)) for curve in curves(third)] == [("budget", 2.0), ("batch", 0.0)]
    assert [(change.name, change.ratio) for change in changes(third, [first, second])] == [
        ("bench_x[64-1]", 3.0),
        ("bench_x[8-1]", 1.0),
    ]
    (tmp_path / "machine").mkdir()
    for number, run in enumerate((first, second, third), 1):
        (tmp_path / f"machine/000{number}_x.json").write_text(json.dumps(run))
    main(["--folder", str(tmp_path)])
    shown = capsys.readouterr()
    assert "bench_x[64-1]" in shown.err
    said = json.loads(shown.out.splitlines()[-1])
    assert said == {"run": "0003_x.json", "cases": 4, "steep": {"x, budget": 2.0}, "slower": {"bench_x[64-1]": 3.0}}
    main(["--folder", str(tmp_path), "--against", "0001"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["slower"] == {"bench_x[64-1]": 3.0, "bench_x[8-1]": 2.0}
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path), "--against", "0007"])
