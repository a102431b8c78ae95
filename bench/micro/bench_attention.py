"""Tree attention on the CPU, contender by contender, a group a case: `make bench-micro ARGS="-k 'SmolLM2 and P256- and N8-'"`.

The contenders are those of bench/attention.py, which times them in turns and adds the machine's bounds; here each has its own
statistics, which are saved and compared with those of the run before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.attention import CONTENDERS, REFERENCE_WORK, SHAPES, make_contenders, products
from specdec.attention import compiled_op

DTYPES = ("bfloat16", "float32")
PREFIXES = (256, 1024, 4096, 8192, 32768)
NODES = (1, 8, 16, 32, 64)


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
def calls(case: Case) -> dict[str, Callable[[], object]]:
    return make_contenders(case.model, getattr(torch, case.dtype), case.prefix, case.nodes)


CASES = [Case(*values) for values in itertools.product(SHAPES, DTYPES, PREFIXES, NODES)]


@pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built: pip install --no-build-isolation .")
@pytest.mark.parametrize(
    ("case", "contender"), [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.names()]
)
def bench_attention(benchmark: BenchmarkFixture, case: Case, contender: str) -> None:
    benchmark.group = str(case)
    benchmark(calls(case)[contender])
