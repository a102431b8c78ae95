"""The extension with the CUDA kernels linked in, on a machine without a GPU: it builds, loads, serves the CPU and refuses a launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import ctypes, sys
import torch
from specdec import attention, linear
from test_tree_attention_op import Params, make_case

assert torch._C._dispatch_has_kernel_for_dispatch_key("specdec::tree_attention", "CUDA")
query, key, value, batch = make_case([40], [7], 1, 3, 64, torch.float32)
arguments = (query, key, value, *batch.packed(), 0.125)
found, expected = attention.tree_attention(*arguments)[0], attention.tree_attention_reference(*arguments)[0]
assert torch.allclose(found, expected, atol=1e-5)

launch = ctypes.CDLL(str(linear._LIBRARY)).specdec_tree_attention_cuda
assert launch(ctypes.byref(Params(0)), None) == -1  # the size of the struct
output = torch.empty(1, 7, 3, 64)
tensors = (query.contiguous(), key.contiguous(), value.contiguous(), *batch.packed(), output, torch.empty(1, 7, 3))
params = Params(
    ctypes.sizeof(Params), *(tensor.data_ptr() for tensor in tensors), None, 0,
    *((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in tensors[:3]),
    0, 1, 3, 1, 7, key.shape[2], 64, 0, 0.125, 0.0, 1, 0,
)
print("cuda error", launch(ctypes.byref(params), None))
"""


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext in a copy of the sources."""
    for name in ("csrc", "specdec"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA kernels cannot be linked")
def test_the_cuda_extension_loads_on_a_cpu_torch_and_refuses_a_launch(tmp_path: Path) -> None:
    done = build(tmp_path, SPECDEC_CUDA="1", SPECDEC_CUDA_ARCHS="80")
    assert done.returncode == 0 and list((tmp_path / "specdec").glob("_C*.so")), done.stderr
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) > 0  # a cudaError_t: no driver, or no device


@pytest.mark.parametrize(("value", "message"), [("1", "needs nvcc"), ("maybe", "SPECDEC_CUDA must be 0, 1 or auto")])
def test_an_impossible_wish_is_refused(tmp_path: Path, value: str, message: str) -> None:
    done = build(tmp_path, SPECDEC_CUDA=value, NVCC="", PATH="/nowhere")
    assert done.returncode != 0
    assert message in done.stderr
