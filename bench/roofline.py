"""What an A100 or H100 could at best do in tree attention, a model and no measurement: `python -m bench.roofline`.

The K/V cache is read once (2 Hkv (P+N) D elements) and every query meets every key twice (4 Hq N (P+N) D operations, masked
ones too, since tensor cores do them); the time is the larger of bytes / bandwidth and operations / rate. Example, Llama-3-8B in
bf16, N = 64: 256 operations a byte at any P, more than the 153 at which an A100 is balanced, less than an H100's 295.
The kernels pad: `rows` are the N Hq / Hkv packed query rows of a KV head rounded up to tiles of 16, 32 or 64, and each tile
reads the keys again, from L2 where it is lucky. In brackets: the memory's time, and the arithmetic's with padding. The H100's
rate is that of wgmma, which the kernels do not use. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Device:
    """Data sheet figures of the SXM boards with 80 GB, without sparsity."""

    name: str
    bandwidth: float  # bytes/s
    rate: float  # bf16 tensor-core operations/s


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int


DEVICES = (Device("A100", 2.039e12, 312e12), Device("H100", 3.35e12, 989e12))
SHAPES = (
    Shape("SmolLM2-135M", 9, 3, 64),
    Shape("Qwen2.5-1.5B", 12, 2, 128),
    Shape("Llama-3-8B", 32, 8, 128),
    Shape("Llama-3-70B", 64, 8, 128),
)


def bytes_moved(shape: Shape, prefix: int, nodes: int, item: int = 2) -> int:
    """K and V once; query and output."""
    return item * shape.head_dim * (2 * shape.kv_heads * (prefix + nodes) + 2 * shape.query_heads * nodes)


def operations(shape: Shape, prefix: int, nodes: int) -> int:
    return 4 * shape.query_heads * nodes * (prefix + nodes) * shape.head_dim


def packed_rows(shape: Shape, nodes: int) -> tuple[int, int]:
    """Rows of a KV head's query matrix with the kernels' padding, and the tiles they take (tree_attention_launch.cu)."""
    rows = nodes * shape.query_heads // shape.kv_heads
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = -(-rows // tile)
    return tile * tiles, tiles


def estimate(device: Device, shape: Shape, prefix: int, nodes: int) -> dict[str, Any]:
    """Lower bounds in microseconds: of the memory, of the arithmetic as asked for and as the kernels pad it."""
    moved, asked = bytes_moved(shape, prefix, nodes), operations(shape, prefix, nodes)
    rows, tiles = packed_rows(shape, nodes)
    done = asked * rows * shape.kv_heads // (nodes * shape.query_heads)
    memory, arithmetic, padded = moved / device.bandwidth, asked / device.rate, done / device.rate
    return {
        "device": device.name, "shape": shape.name, "P": prefix, "N": nodes, "bytes": moved, "operations": asked,
        "intensity": asked / moved, "memory_us": 1e6 * memory, "arithmetic_us": 1e6 * arithmetic, "rows": rows, "tiles": tiles,
        "padded_us": 1e6 * padded, "bound": "memory" if memory >= padded else "compute", "model_us": 1e6 * max(memory, padded),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prefixes", default="1024,8192,32768")
    parser.add_argument("--nodes", default="1,8,32,64")
    args = parser.parse_args(argv)
    sizes = itertools.product(map(int, args.prefixes.split(",")), map(int, args.nodes.split(",")))
    rows = [estimate(device, shape, *size) for size, shape, device in itertools.product(sizes, SHAPES, DEVICES)]
    table = Table("shape", "P", "N", "MB", "GFLOP", "FLOP/B", "tiles", *(f"{device.name}, µs" for device in DEVICES))
    table.title = "Model, not measured: bf16 tree attention, one row of the batch, one layer"
    for pair in zip(*(rows[i :: len(DEVICES)] for i in range(len(DEVICES)))):
        times = [f"{row['model_us']:.1f} {row['bound']} ({row['memory_us']:.1f} / {row['padded_us']:.1f})" for row in pair]
        row = pair[0]
        size = [f"{row['bytes'] / 1e6:.1f}", f"{row['operations'] / 1e9:.2f}", f"{row['intensity']:.0f}", str(row["tiles"])]
        table.add_row(row["shape"], str(row["P"]), str(row["N"]), *size, *times)
    console.print(table)
    print(json.dumps({"model": True, "dtype": "bf16", "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
