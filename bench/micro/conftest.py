"""What all micro-benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specdec.linear import instruction_set


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Saved with each run: the plugin warns where a comparison crosses instruction sets or thread counts."""
    machine_info["torch"] = {"isa": instruction_set(), "threads": torch.get_num_threads(), "version": torch.__version__}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
