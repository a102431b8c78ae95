"""python -m bench.gpu: its dry run on a CPU, that its checks can fail, and on a machine with a GPU the thing itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.attention import compiled_op
from test_prefix_backend import flash_attn_with_kvcache

pytestmark = pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = gpu.Case("float32", 64, 3, (40, 7), (33, 5), softcap=4.0)


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON object of the last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    make_tiny_llama(head_dim=64).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--device",
        "cpu",
        "--quick",
        "--repeats",
        "2",
        "--prefix",
        "64",
        "--new-tokens",
        "12",
    ]
    ran = subprocess.run([*command, "--model", str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert "dry run" in found["device"] and found["failures"] == []
    assert [line.split(":")[0] for line in found["skipped"]] == ["graph", "sanitizer", "timings"]
    assert found["checks"]["grid"]["cases"] == 12 and found["checks"]["model"]["tokens"] > 0
    assert found["checks"]["model"]["op_calls"] > 0
    assert all(0 < error < gpu.LIMITS[dtype] for dtype, error in found["checks"]["grid"]["worst"].items())
    assert len(found["checks"]["timings"]["results"]) == 4
    assert all(row["ms"].keys() == {"op", "expanded", "grouped"} for row in found["checks"]["timings"]["results"])


def test_a_failed_check_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "grid", lambda quick: [CASE, replace(CASE, window=9)])
    assert gpu.main(["--device", "cpu", "--checks", "grid"]) == 0
    assert result(capsys)["failures"] == []
    monkeypatch.setitem(gpu.LIMITS, "float32", 1e-9)
    assert gpu.main(["--device", "cpu", "--checks", "grid"]) == 1
    failures = result(capsys)["failures"]
    assert len(failures) == 2 and "relative error" in failures[0] and "window=9" in failures[1]


def test_what_is_wrong_is_named() -> None:
    inputs = gpu.make_inputs(CASE, CPU, 0)
    assert inputs.key[1, :, 12:].isnan().all() and inputs.query[1, :, 5:].isnan().all() and inputs.key[1, :, :12].isfinite().all()
    output, lse = compiled_op()(*inputs.arguments(), 64**-0.5, CASE.softcap, CASE.window)
    assert gpu.wrong(CASE, inputs, output, lse)[1] == ""
    assert "relative error" in gpu.wrong(CASE, inputs, output * 1.001, lse)[1]
    assert "relative error" in gpu.wrong(CASE, inputs, torch.where(output == output[0, 0, 0, 0], torch.nan, output), lse)[1]
    assert "log-sum-exp" in gpu.wrong(CASE, inputs, output, lse + 0.01)[1]
    output[1, 5, 0, 0] = 1
    assert "past the end" in gpu.wrong(CASE, inputs, output, lse)[1]


def test_the_grid_has_every_dtype_dimension_group_option_and_size() -> None:
    for quick in (False, True):
        cases = gpu.grid(quick)
        assert {case.dtype for case in cases} == set(gpu.LIMITS) and {case.dim for case in cases} == {64, 96, 128, 256}
        assert {case.group for case in cases} == {1, 3, 4, 8} and len({(case.window, case.softcap) for case in cases}) == 4
        assert {0, 300} <= {prefix for case in cases for prefix in case.prefixes}
        assert {1, 33, 64} <= {count for case in cases for count in case.counts}
    assert {256, 200} <= {count for case in gpu.grid(False) for count in case.counts}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_contenders_agree(dtype: str) -> None:
    case = gpu.Case(dtype, 64, 3, (70,), (20,))
    contenders = gpu.make_contenders(gpu.make_inputs(case, CPU, 0, slots=90), flash_attn_with_kvcache)
    assert ("flash_attn" in contenders) == (dtype == "bfloat16")
    expected = contenders["op"]().double()
    for call in contenders.values():
        assert (call().double() - expected).norm() / expected.norm() <= gpu.AGREEMENT


def test_a_wrong_contender_fails_and_a_refusing_one_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> torch.Tensor:
        raise RuntimeError("no such shape\nat line 3")

    correct = gpu.make_contenders
    monkeypatch.setattr(
        gpu,
        "make_contenders",
        lambda inputs, flash: {
            **correct(inputs, flash),
            "wrong": lambda: torch.zeros_like(inputs.query).transpose(1, 2),
            "none": refuse,
        },
    )
    report = gpu.Report()
    timing = gpu.time_case(report, CPU, None, ("SmolLM2-135M", "float32", 30, 4), 1)
    assert timing.ms.keys() == {"op", "expanded", "grouped", "wrong"}
    assert len(report.failures) == 1 and "wrong at ('SmolLM2-135M', 'float32', 30, 4)" in report.failures[0]
    assert report.skipped == ["timings: none at ('SmolLM2-135M', 'float32', 30, 4): no such shape"]


def test_sanitizer_findings_are_failures(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING"\n[ "$2" != racecheck ] || exit 9\n')
    tool.chmod(0o755)
    report = gpu.Report()
    gpu.check_sanitizer(report, CUDA, str(tool))
    assert report.checks["sanitizer"] == {"memcheck": 0, "racecheck": 9, "synccheck": 0, "initcheck": 0}
    assert len(report.failures) == 1 and "--error-exitcode 9" in report.failures[0]
    assert "-m bench.gpu --quick --checks grid 1" in report.failures[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "torch sees no CUDA device; --device cpu is a dry run" in capsys.readouterr().err


@pytest.mark.skipif(
    compiled_op("cuda") is None or not torch.cuda.is_available(), reason="no CUDA device, or no CUDA kernels in specdec._C"
)
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--quick", "--checks", "grid", "graph"])
    assert status == 0, result(capsys)["failures"]
