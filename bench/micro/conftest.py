"""What all micro-benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.micro.cases import GRIDS, in_grid
from specdec.linear import instruction_set


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=GRIDS,
        default="cross",
        help="cases: the least of each axis, one axis at a time (minutes), or all (an hour)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if in_grid(config.getoption("--grid"), item.callspec.params)]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Saved with each run: the plugin warns where a comparison crosses instruction sets or thread counts."""
    machine_info["torch"] = {"isa": instruction_set(), "threads": torch.get_num_threads(), "version": torch.__version__}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
