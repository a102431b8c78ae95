"""The micro-benchmarks of bench/micro run, one round of the smallest cases, and their groups compare the contenders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

from specdec.attention import compiled_op

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "bench/micro"


def run_micro(*arguments: str) -> str:
    """Output of a run of `make bench-micro` that saves nothing."""
    command = [sys.executable, "-m", "pytest", "-c", str(MICRO / "pytest.ini"), str(MICRO), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")
def test_attention(tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    once = ("--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-min-time=0", "--benchmark-calibration-precision=1")
    run_micro("-k", "SmolLM2 and P256-N8-", *once, f"--benchmark-json={report}", f"--benchmark-storage={tmp_path}")
    groups = defaultdict(set)
    for result in json.loads(report.read_text())["benchmarks"]:
        groups[result["group"]].add(result["params"]["contender"])
    assert set(groups) == {"SmolLM2-135M-bfloat16-P256-N8", "SmolLM2-135M-float32-P256-N8"}
    assert all(names == {"op", "expanded", "grouped", "reference"} for names in groups.values())


def test_drafting(tmp_path: Path) -> None:
    smallest = "not attention and (context512 or vocabulary32000 or packing) and not batch8 and not budget64 and not budget256"
    printed = run_micro("-k", smallest, "--benchmark-disable", f"--benchmark-storage={tmp_path}")
    assert " 11 passed" in printed  # lookup 2, update 1, growth 4, packing 1, acceptance 2, commit 1
