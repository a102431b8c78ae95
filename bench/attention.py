"""Tree attention on the CPU: specdec's op beside torch's attention, over context lengths, tree sizes and shapes of real models.

    python -m bench.attention                                  # all shapes, bfloat16 and float32
    python -m bench.attention --models SmolLM2-135M --prefix 512 --nodes 1 8 --repeats 20

Contenders take turns and the median of their times counts:
    op         torch.ops.specdec.tree_attention
    expanded   what transformers runs: repeat_kv, then scaled_dot_product_attention with a boolean mask
    grouped    scaled_dot_product_attention with a boolean mask and enable_gqa=True, without the copy
    reference  specdec.attention.tree_attention_reference
Beside them, which of the machine's two bounds applies (reading K and V at the measured bandwidth, or the products at the measured
rate of a large float32 matmul, in which all dtypes are summed) and the share of it that the op reaches. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import geometric_mean

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from specdec.attention import TreeBatch, compiled_op, tree_attention_reference
from specdec.linear import instruction_set
from specdec.pacing import two_chains

from .timing import medians

SHAPES = {  # query heads, KV heads, head dimension
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-1.5B": (12, 2, 128),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128),
}
PREFIXES = (256, 1024, 4096, 8192)
NODES = (1, 8, 16, 32)
CONTENDERS = ("op", "expanded", "grouped", "reference")
REFERENCE_WORK = 5e8  # multiplications; above, the reference is left out


@dataclass(frozen=True, slots=True)
class Bounds:
    """What this machine can do at most, measured."""

    bytes_per_second: float  # reading
    flops_per_second: float  # a float32 matmul


@dataclass(frozen=True, slots=True)
class Result:
    """One shape, dtype, P and N."""

    model: str
    dtype: str
    prefix: int
    nodes: int
    ms: dict[str, float]  # contender -> median
    bound: str  # "bandwidth" or "matmul"
    share: float  # time at the bound / time of the op

    def speedup(self, contender: str) -> float:
        return self.ms[contender] / self.ms["op"]


def measure_bounds() -> Bounds:
    """Medians of readings of 256 MiB and of matmuls of 1536 x 1536."""
    block, square = torch.ones(64 << 20), torch.ones(1536, 1536)
    times = medians({"read": block.sum, "matmul": lambda: square @ square}, 7, warm_up=1)
    return Bounds(block.numel() * 4 / times["read"], 2 * 1536**3 / times["matmul"])


def products(model: str, prefix: int, nodes: int) -> int:
    """Multiplications of one call: every query with every key, every weight with every value."""
    heads, _, dim = SHAPES[model]
    return 2 * heads * nodes * (prefix + nodes) * dim


def make_contenders(model: str, dtype: torch.dtype, prefix: int, nodes: int) -> dict[str, Callable[[], object]]:
    """Calls of CONTENDERS on the same random tensors, a batch of one; the reference only up to REFERENCE_WORK products."""
    heads, kv_heads, dim = SHAPES[model]
    slots, scale = prefix + nodes, dim**-0.5
    query = torch.randn(1, nodes, heads, dim).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, kv_heads, slots, dim).to(dtype) for _ in range(2))
    batch = TreeBatch([prefix], [two_chains(nodes)], [nodes], torch.device("cpu"))
    packed, mask = batch.packed(), torch.from_numpy(batch.visible(0, 0))[None, None]
    op, sdpa = compiled_op(), functional.scaled_dot_product_attention
    assert op is not None

    def expanded() -> torch.Tensor:
        groups = heads // kv_heads
        return sdpa(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask, scale=scale)

    contenders: dict[str, Callable[[], object]] = {
        "op": lambda: op(query, key, value, *packed, scale),
        "expanded": expanded,
        "grouped": lambda: sdpa(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True),
    }
    if products(model, prefix, nodes) <= REFERENCE_WORK:
        contenders["reference"] = lambda: tree_attention_reference(query, key, value, *packed, scale)
    return contenders


def bench_case(model: str, dtype: torch.dtype, prefix: int, nodes: int, repeats: int, bounds: Bounds) -> Result:
    _, kv_heads, dim = SHAPES[model]
    times = medians(make_contenders(model, dtype, prefix, nodes), repeats, warm_up=1)
    reading = 2 * kv_heads * (prefix + nodes) * dim * dtype.itemsize / bounds.bytes_per_second
    multiplying = 2 * products(model, prefix, nodes) / bounds.flops_per_second
    return Result(
        model,
        str(dtype).removeprefix("torch."),
        prefix,
        nodes,
        {name: 1e3 * seconds for name, seconds in times.items()},
        "bandwidth" if reading > multiplying else "matmul",
        max(reading, multiplying) / times["op"],
    )


def print_table(results: list[Result], bounds: Bounds, console: Console) -> None:
    table = Table(title=f"{instruction_set()}, {torch.get_num_threads()} threads; times in ms, speed-ups of the op in brackets")
    for column in ("model", "dtype", "P", "N", *CONTENDERS, "bound", "reached"):
        table.add_column(column, justify="left" if column in ("model", "dtype", "bound") else "right")
    for result in results:
        cells = [f"{result.ms[name]:.3f} ({result.speedup(name):.1f}x)" if name in result.ms else "-" for name in CONTENDERS[1:]]
        place = (result.model, result.dtype, str(result.prefix), str(result.nodes))
        table.add_row(*place, f"{result.ms['op']:.3f}", *cells, result.bound, f"{100 * result.share:.0f} %")
    console.print(table)
    console.print(f"bounds: {bounds.bytes_per_second / 1e9:.1f} GB/s read, {bounds.flops_per_second / 1e9:.1f} GFLOP/s matmul")


def summary(results: list[Result]) -> dict[str, dict[str, float]]:
    """Contender -> geometric mean and least speed-up of the op over all cases in which it ran."""
    speedups = {name: [r.speedup(name) for r in results if name in r.ms] for name in CONTENDERS[1:]}
    return {name: {"geomean": geometric_mean(xs), "least": min(xs)} for name, xs in speedups.items() if xs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--prefix", type=int, nargs="+", default=list(PREFIXES))
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    arguments = parser.parse_args()
    if compiled_op() is None:
        parser.error("specdec._C is not built: pip install --no-build-isolation .")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    torch.manual_seed(0)
    with torch.inference_mode():
        bounds = measure_bounds()
        results = [
            bench_case(model, getattr(torch, dtype), prefix, nodes, arguments.repeats, bounds)
            for model in arguments.models
            for dtype in arguments.dtypes
            for prefix in arguments.prefix
            for nodes in arguments.nodes
        ]
    print_table(results, bounds, console)
    totals = summary(results)
    for name, total in totals.items():
        console.print(f"op against {name}: {total['geomean']:.2f}x (geometric mean), least {total['least']:.2f}x")
    machine = {"isa": instruction_set(), "threads": torch.get_num_threads()}
    print(json.dumps(machine | {"bounds": asdict(bounds), "summary": totals, "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
