"""Few-row matrix products on the CPU: specdec's op beside torch's, for single shapes and for a whole model's forward.

    python -m bench.linear                                    # shapes of SmolLM2-135M
    python -m bench.linear --model PATH --dtype bfloat16      # forwards of a model over a cache of 256 tokens

Contenders take turns and the median of their times counts. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.nn import functional

from specdec.kv_cache import cache_argument
from specdec.linear import FastLinear, instruction_set

from .timing import medians

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))  # [out_features, in_features]
ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256


def multiply(linear: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        linear(x, weight)


def bench_shapes(dtype: torch.dtype, rows: list[int], repeats: int) -> list[dict[str, object]]:
    """Products with weights that are not in the cache: each call takes the next of several."""
    results: list[dict[str, object]] = []
    for out_features, in_features in SHAPES:
        size = out_features * in_features * dtype.itemsize
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(max(1, (64 << 20) // size))]
        for n in rows:
            x = torch.randn(n, in_features).to(dtype)
            times = medians(
                {
                    "torch": partial(multiply, functional.linear, x, weights),
                    "specdec": partial(multiply, torch.ops.specdec.linear, x, weights),
                },
                repeats,
            )
            best = times["specdec"] / len(weights)
            gflops, gbytes = 2e-9 * n * out_features * in_features / best, 1e-9 * size / best
            ratio = times["torch"] / times["specdec"]
            shape = f"{out_features}x{in_features}"
            print(f"{shape:>10} {n:3} rows {best * 1e6:8.0f} us {gflops:6.1f} GFLOP/s {gbytes:5.1f} GB/s {ratio:5.2f}x torch")
            results.append({"shape": shape, "rows": n, "us": best * 1e6, "gflops": gflops, "gbytes": gbytes, "ratio": ratio})
    return results


def bench_model(path: str, dtype: torch.dtype, rows: list[int], repeats: int) -> list[dict[str, object]]:
    """Forwards of `rows` tokens over a cache of CONTEXT tokens, with and without the op."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    fast = FastLinear(model, max_rows=max(rows))
    cache = DynamicCache(config=model.config)
    kept = {cache_argument(model.forward): cache}
    model(torch.randint(0, model.config.vocab_size, (1, CONTEXT)), **kept)
    results: list[dict[str, object]] = []
    for n in rows:
        ids = torch.randint(0, model.config.vocab_size, (1, n))

        def step(context: Callable[[], AbstractContextManager[None]], ids: torch.Tensor) -> None:
            with context():
                model(ids, **kept)
            cache.crop(-ids.shape[1])

        times = medians({"torch": partial(step, nullcontext, ids), "specdec": partial(step, fast.active, ids)}, repeats)
        stock, op = times["torch"] * 1e3, times["specdec"] * 1e3
        print(f"{n:3} rows  torch {stock:7.1f} ms  specdec {op:7.1f} ms  {stock / op:5.2f}x")
        results.append({"rows": n, "torch_ms": stock, "specdec_ms": op, "ratio": stock / op})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local path or hub name; without it single shapes are measured")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    arguments = parser.parse_args()
    if instruction_set() is None:
        parser.error("specdec._C is not built: pip install --no-build-isolation .")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print(f"{instruction_set()}, {torch.get_num_threads()} threads, {arguments.dtype}")
    with torch.inference_mode():
        if arguments.model:
            results = bench_model(arguments.model, dtype, arguments.rows, arguments.repeats)
        else:
            results = bench_shapes(dtype, arguments.rows, arguments.repeats)
    threads = torch.get_num_threads()
    print(json.dumps({"isa": instruction_set(), "threads": threads, "dtype": arguments.dtype, "results": results}))


if __name__ == "__main__":
    main()
