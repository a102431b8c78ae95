"""What attention takes of a model's step at a long context, and what the op makes of it: `python -m bench.model_attention`.

One forward over a tree of `nodes` nodes after `--context` tokens, the embedded model by default, three ways that take turns; the
medians count. All run specdec's own matrix products, so that they differ in nothing but the attention and the cache under it:
    op            torch.ops.specdec.tree_attention, in place on specdec's cache
    torch         specdec's PyTorch path (attention.attend_row) on the same cache
    transformers  scaled_dot_product_attention over a DynamicCache with a 4-D boolean mask, as a user of transformers writes it
Attention is the time inside the attention functions; a cache's own work (torch.cat in DynamicCache) is in the step alone. What the
cache holds is noise: it costs the same. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec import attention
from specdec.kv_cache import KVCache, cache_argument
from specdec.models import load
from specdec.pacing import two_chains
from specdec.target import TargetModel

from .timing import medians

TIMED_SDPA = "specdec_bench_sdpa"


class Stopwatch:
    """Adds up the seconds inside the functions that it wraps, for each lap."""

    def __init__(self) -> None:
        self.laps: list[float] = [0.0]  # the first is of calls outside of any

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.laps[-1] += time.perf_counter() - start
            return result

        return timed

    def lap(self, call: Callable[[], object]) -> Callable[[], object]:
        def measured() -> object:
            self.laps.append(0.0)
            return call()

        return measured


def filled_cache(target: TargetModel, context: int, nodes: int) -> KVCache:
    """`context` slots of noise, and room for a tree."""
    cache = target.new_cache(1, context + nodes)
    for buffer in cache.buffers():
        buffer.normal_()
    cache.lengths = [context]
    return cache


def specdec_forward(
    target: TargetModel, watch: Stopwatch, cache: KVCache, nodes: int, with_op: bool
) -> Callable[[], torch.Tensor]:
    """A tree forward of the target, logits [nodes, V]; its attention is timed by `watch`."""
    tree, attend = two_chains(nodes, target.vocab_size), target._attention

    def forward() -> torch.Tensor:
        op = attention._op if with_op else None
        with patch.object(attention, "_op", op), patch.object(target, "_attention", watch.wrap(attend)):
            return target.forward(cache, [tree])[0]

    return forward


def transformers_forward(target: TargetModel, watch: Stopwatch, cache: KVCache, nodes: int) -> Callable[[], torch.Tensor]:
    """The same tree through the model's own scaled_dot_product_attention and a DynamicCache of the same contents."""
    model, tree, context = target.model, two_chains(nodes, target.vocab_size), cache.lengths[0]
    AttentionInterface.register(TIMED_SDPA, watch.wrap(sdpa_attention_forward))
    dynamic = DynamicCache(config=model.config)
    kept = {cache_argument(model.forward): dynamic}
    cache.begin(0, [0])
    for layer, shape in enumerate(target.layers):
        nothing = (torch.empty(1, shape.key_heads, 0, shape.key_dim), torch.empty(1, shape.value_heads, 0, shape.value_dim))
        dynamic.update(*(view.clone() for view in cache.write(layer, *nothing)), layer)
    ids, positions = torch.from_numpy(tree.tokens).long()[None], context + torch.from_numpy(tree.depths).long()[None]
    mask = torch.from_numpy(attention.TreeBatch([context], [tree], [nodes], model.device).visible(0, 0))[None, None]

    def forward() -> torch.Tensor:
        before = model.config._attn_implementation
        model.config._attn_implementation = TIMED_SDPA
        try:
            with torch.inference_mode(), target._linear.active():
                logits = model(ids, attention_mask=mask, position_ids=positions, **kept).logits
        finally:
            model.config._attn_implementation = before
        dynamic.crop(-nodes)
        return logits[0]

    return forward


def make_forwards(target: TargetModel, context: int, nodes: int) -> dict[str, tuple[Callable[[], torch.Tensor], Stopwatch]]:
    """Way -> a call that gives logits [nodes, V], and what times its attention."""
    cache, watches = filled_cache(target, context, nodes), {name: Stopwatch() for name in ("op", "torch", "transformers")}
    return {
        "op": (specdec_forward(target, watches["op"], cache, nodes, True), watches["op"]),
        "torch": (specdec_forward(target, watches["torch"], cache, nodes, False), watches["torch"]),
        "transformers": (transformers_forward(target, watches["transformers"], cache, nodes), watches["transformers"]),
    }


def measure(target: TargetModel, context: int, nodes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Way -> median milliseconds of a step and of its attention."""
    ways = make_forwards(target, context, nodes)
    steps = medians({name: watch.lap(forward) for name, (forward, watch) in ways.items()}, repeats, warm_up=1)
    return {
        name: {"step_ms": 1e3 * steps[name], "attention_ms": 1e3 * median(watch.laps[2:])} for name, (_, watch) in ways.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local path or hub name; default: the embedded model")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    if attention.compiled_op() is None:
        parser.error("specdec._C is not built: pip install --no-build-isolation .")
    table = Table(title=f"a step after {args.context} tokens, {torch.get_num_threads()} threads, ms")
    for column in ("dtype", "nodes", "way", "step", "attention", "share", "step, x op"):
        table.add_column(column, justify="left" if column in ("dtype", "way") else "right")
    rows = []
    for dtype in args.dtypes:
        model, _ = load(args.model, dtype)
        target = TargetModel(model)
        for nodes in args.nodes:
            found = measure(target, args.context, nodes, args.repeats)
            for way, ms in found.items():
                share, ratio = ms["attention_ms"] / ms["step_ms"], ms["step_ms"] / found["op"]["step_ms"]
                figures = f"{ms['step_ms']:.1f}", f"{ms['attention_ms']:.1f}", f"{100 * share:.0f} %", f"{ratio:.2f}"
                table.add_row(dtype, str(nodes), way, *figures)
                rows.append({"dtype": dtype, "nodes": nodes, "way": way, **ms, "share": share, "ratio": ratio})
    Console(width=120).print(table)
    print(json.dumps({"bench": "model_attention", "context": args.context, "threads": torch.get_num_threads(), "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
