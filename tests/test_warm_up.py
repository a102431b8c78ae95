"""Making an Engine compiles every kernel that its requests need: the first text must not stall."""

from __future__ import annotations

import gc

import pytest

import tiny_models
from specdec import METHODS, Engine, SamplingParams
from specdec._jit import HAVE_NUMBA

pytestmark = pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed: nothing is compiled")


def compiled() -> dict[str, int]:
    """Number of compiled signatures of every kernel in memory."""
    from numba.core.dispatcher import Dispatcher

    kernels = [item for item in gc.get_objects() if issubclass(type(item), Dispatcher)]  # isinstance would ask dead proxies
    return {f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}": len(kernel.signatures) for kernel in kernels}


@pytest.mark.parametrize("method", METHODS)
def test_requests_compile_nothing(method: str) -> None:
    engine = Engine(tiny_models.build("llama", max_position_embeddings=9000), method=method, budget=16)
    before = compiled()
    engine.generate([[(i * i) % 90 for i in range(5000)]], SamplingParams(max_new_tokens=40))
    engine.generate([[5, 6, 7], [8]], SamplingParams(max_new_tokens=150, temperature=1.0, top_p=0.9, seed=1))
    assert compiled() == before
