"""Tree attention on the CPU, contender by contender, a group a case: `make bench-micro ARGS="--grid=whole -k P256-N8-"`.

The contenders are those of bench/attention.py, which times them in turns and adds the machine's bounds; here each has its own
statistics, which are saved and compared with those of the run before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.attention import CONTENDERS, REFERENCE_WORK, make_contenders, products
from bench.micro.cases import AXES, timed
from specdec.attention import compiled_op


class Case(NamedTuple):
    model: str
    dtype: str
    prefix: int
    nodes: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-P{self.prefix}-N{self.nodes}"

    def names(self) -> list[str]:
        """The contenders that take part."""
        too_slow = products(self.model, self.prefix, self.nodes) > REFERENCE_WORK
        return [name for name in CONTENDERS if name != "reference" or not too_slow]


@lru_cache(maxsize=1)  # the contenders of a case come one after another and share its tensors
def calls(case: Case) -> dict[str, Callable[[], Any]]:
    return make_contenders(case.model, getattr(torch, case.dtype), case.prefix, case.nodes)


CASES = [Case(*values) for values in itertools.product(*(AXES[axis] for axis in Case._fields))]


def attended(output: Any) -> torch.Tensor:
    """[B, N, H, D] float32 of any contender: the op and the reference return (output, log-sum-exp), torch [B, H, N, D]."""
    return (output[0] if isinstance(output, tuple) else output.transpose(1, 2)).float()


@pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built: pip install --no-build-isolation .")
@pytest.mark.parametrize(
    (*Case._fields, "contender"), [pytest.param(*case, name, id=f"{case}-{name}") for case in CASES for name in case.names()]
)
def bench_attention(benchmark: BenchmarkFixture, model: str, dtype: str, prefix: int, nodes: int, contender: str) -> None:
    case = Case(model, dtype, prefix, nodes)
    benchmark.group = str(case)
    contenders = calls(case)
    found = attended(timed(benchmark, contenders[contender]))
    assert torch.allclose(found, attended(contenders["op"]()), atol=0.02)
