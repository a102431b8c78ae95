"""The script for a machine with a GPU: is the CUDA op right there, and how fast is it? `python -m bench.gpu`

    python -m bench.gpu                                      # everything
    python -m bench.gpu --quick --checks grid graph          # seconds
    python -m bench.gpu --quick --device cpu                 # dry run of the script, over the CPU op; says what it leaves out

Checks:
    grid       the op against the reference in float64: dtype x D x GQA x (ragged prefixes, tree sizes) x window x softcap.
               Relative L2 error of each row; what nobody may read is NaN, rows past a tree's end must be zero
    graph      captured in a CUDA graph and replayed with other lengths, trees, queries and keys
    sanitizer  compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over `--quick --checks grid` of this script
    timings    one row, one layer: the op; scaled_dot_product_attention with a boolean mask, the heads expanded as transformers
               does it, or grouped; FlexAttention with the tree mask, compiled; flash-attn on the prefix, merged with the op on
               the tree. Contenders take turns, the medians of CUDA events count, the GPU's caches are overwritten before each
               call. Their outputs must agree with the op's
    model      greedy float32 tokens of an Engine on the device equal those of model.generate

The last line of stdout is one JSON object; the exit status is 1 if a check failed.

Never run on a GPU: so far only the dry run has been executed, and it skips all that needs CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from specdec import Engine, SamplingParams, load
from specdec.attention import TreeBatch, compiled_op, tree_attention_reference
from specdec.draft_tree import DraftTree
from specdec.models import is_embedded_installed
from specdec.pacing import two_chains
from specdec.prefix_backend import FlashAttention, attend_with_prefix, load_flash_attention

from .attention import SHAPES
from .timing import medians

CHECKS = ("grid", "graph", "sanitizer", "timings", "model")
LIMITS = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}  # relative L2 error of an output row
LSE_LIMIT = 1e-5  # of a log-sum-exp, absolute and relative
AGREEMENT = 2e-2  # relative L2 distance of a contender from the op: rounding is below, a wrong mask above
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PREFIXES = (256, 1024, 4096, 16384, 32768)
NODES = (1, 8, 16, 32, 64)
CACHE_BYTES = 256 << 20  # more than the caches of any GPU
PROMPTS = ("def fibonacci(n):", "The capital of France is", "1, 2, 3, 4, 5, 6,")

Call = Callable[[], torch.Tensor]


@dataclass(slots=True)
class Report:
    """What ran, what did not and why, and what failed."""

    checks: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


# ---- correctness -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the op."""

    dtype: str
    dim: int
    group: int  # query heads a KV head
    prefixes: tuple[int, ...]  # [B] P
    counts: tuple[int, ...]  # [B] n
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a case; what nobody may read is NaN."""

    batch: TreeBatch
    query: torch.Tensor  # [B, Hq, N, D], a transpose as transformers hands it over
    key: torch.Tensor  # [B, Hkv, T, D]
    value: torch.Tensor  # [B, Hkv, T, D]

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The op's tensors, in its order."""
        return self.query, self.key, self.value, *self.batch.packed()


def grid(quick: bool) -> list[Case]:
    """`quick`: every dtype, D and kind of option, but few combinations."""
    shapes = [((0,), (1,)), ((1,), (33,)), ((300, 0, 17), (64, 1, 33)), ((1023, 5), (7, 200)), ((5000,), (8,)), ((70,), (256,))]
    options = [(0, 0.0), (0, 8.0), (21, 0.0), (5, 8.0)]
    dims, groups = (64, 96, 128, 256), (1, 3, 4, 8)
    if not quick:
        axes = itertools.product(LIMITS, dims, groups, shapes, options)
        return [Case(dtype, dim, group, *shape, *option) for dtype, dim, group, shape, option in axes]
    axes = zip(dims, groups, shapes, options)
    return [Case(dtype, dim, group, *shape, *option) for dim, group, shape, option in axes for dtype in LIMITS]


def make_inputs(case: Case, device: torch.device, seed: int, slots: int | None = None) -> Inputs:
    """Random trees and tensors over two KV heads, T = `slots` or a few more than needed; the same on every device."""
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    rows, most, kv_heads = len(case.counts), max(case.counts), 2
    slots = slots or max(map(sum, zip(case.prefixes, case.counts))) + 3
    query = torch.randn(rows, most, kv_heads * case.group, case.dim, generator=generator)
    key, value = (torch.randn(rows, kv_heads, slots, case.dim, generator=generator) for _ in range(2))
    for row, (prefix, count) in enumerate(zip(case.prefixes, case.counts)):
        query[row, count:] = key[row, :, prefix + count :] = value[row, :, prefix + count :] = torch.nan
    parents = [[-1, *(dice.randrange(max(0, node - 6), node) for node in range(1, count))] for count in case.counts]
    trees = [DraftTree(np.arange(len(row)), np.array(row)) for row in parents]
    batch = TreeBatch(list(case.prefixes), trees, list(case.counts), device)
    tensors = (x.to(getattr(torch, case.dtype)).to(device) for x in (query, key, value))
    query, key, value = tensors
    return Inputs(batch, query.transpose(1, 2), key, value)


def wrong(case: Case, inputs: Inputs, output: torch.Tensor, lse: torch.Tensor) -> tuple[float, str]:
    """Relative L2 error of the worst row against the reference in float64, and what is wrong with the results ("": nothing)."""
    double = (inputs.query.double(), inputs.key.double(), inputs.value.double())
    options = (case.dim**-0.5, case.softcap, case.window)
    expected, expected_lse = tree_attention_reference(*double, *inputs.batch.packed(), *options)
    worst, reason = 0.0, ""
    for row, count in enumerate(case.counts):
        error = float((output[row, :count].double() - expected[row, :count]).norm() / expected[row, :count].norm())
        worst = max(worst, error)
        if not error <= LIMITS[case.dtype]:
            reason = f"relative error {error:.1e}, limit {LIMITS[case.dtype]:.0e}"
        if not torch.allclose(lse[row, :count], expected_lse[row, :count], rtol=LSE_LIMIT, atol=LSE_LIMIT):
            reason = "the log-sum-exp differs"
        if output[row, count:].any() or not lse[row, count:].isneginf().all():
            reason = "nodes past the end of a row are not empty"
    return worst, reason


@torch.no_grad()
def check_grid(report: Report, device: torch.device, quick: bool) -> None:
    op, cases, worst = _op(device), grid(quick), dict.fromkeys(LIMITS, 0.0)
    for seed, case in enumerate(cases):
        inputs = make_inputs(case, device, seed)
        error, reason = wrong(case, inputs, *op(*inputs.arguments(), case.dim**-0.5, case.softcap, case.window))
        worst[case.dtype] = max(worst[case.dtype], error)
        if reason:
            report.failures.append(f"grid: {case}: {reason}")
    report.checks["grid"] = {"cases": len(cases), "worst": worst}


@torch.no_grad()
def check_graph(report: Report, device: torch.device) -> None:
    """One graph a dtype, replayed over other contents of the same tensors."""
    if device.type != "cuda":
        report.skipped.append("graph: needs CUDA")
        return
    op, slots, replays = _op(device), 960, (((900, 5), 20), ((0, 899), 1), ((517, 64), 33))
    for dtype in LIMITS:
        cases = [Case(dtype, 128, 4, prefixes, (33, count)) for prefixes, count in replays]
        static = make_inputs(cases[0], device, 0, slots).arguments()
        op(*static, 128**-0.5)  # what the first call sets up may not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(*static, 128**-0.5)
        for seed, case in enumerate(cases, 1):
            inputs = make_inputs(case, device, seed, slots)
            for target, source in zip(static, inputs.arguments()):
                target.copy_(source)
            graph.replay()
            if reason := wrong(case, inputs, *captured)[1]:
                report.failures.append(f"graph: {case}: {reason}")
    report.checks["graph"] = {"replays": len(LIMITS) * len(replays)}


def check_sanitizer(report: Report, device: torch.device, path: str | None) -> None:
    """This script's small grid under each of the tools; without torch's memory cache, which would hide accesses out of bounds."""
    if device.type != "cuda":
        report.skipped.append("sanitizer: needs CUDA")
        return
    path = path or shutil.which("compute-sanitizer")
    if path is None:
        report.skipped.append("sanitizer: no compute-sanitizer in PATH; it is in the CUDA toolkit (--sanitizer PATH)")
        return
    report.checks["sanitizer"] = {}
    script = [sys.executable, "-m", "bench.gpu", "--quick", "--checks", "grid"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = [path, "--tool", tool, "--error-exitcode", "9", *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        report.checks["sanitizer"][tool] = done.returncode
        if done.returncode:
            report.failures.append(f"sanitizer: {tool} exits with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


# ---- timings -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """One shape, dtype, P and N."""

    model: str
    dtype: str
    prefix: int
    nodes: int
    ms: dict[str, float]  # contender -> median


def make_contenders(inputs: Inputs, flash: FlashAttention | None) -> dict[str, Call]:
    """Name -> a call that gives [B, N, Hq, D]; masks and packed trees are made beforehand."""
    batch, query, key, value = inputs.batch, inputs.query, inputs.key, inputs.value
    groups, scale, device = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5, query.device
    op, arguments = _op(device), inputs.arguments()
    mask = torch.from_numpy(batch.visible(0, 0)).to(device)

    def sdpa(keys: torch.Tensor, values: torch.Tensor, **options: bool) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[None, None], scale=scale, **options
        ).transpose(1, 2)

    contenders: dict[str, Call] = {
        "op": lambda: op(*arguments, scale)[0],
        "expanded": lambda: sdpa(key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)),
        "grouped": lambda: sdpa(key, value, enable_gqa=True),
    }
    if device.type == "cuda":  # on a CPU it would compile for half a minute a shape
        contenders["flex"] = make_flex(query, key, value, mask, scale)
    if flash is not None and query.dtype != torch.float32:
        contenders["flash_attn"] = lambda: attend_with_prefix(flash, batch, query, key, value, scale)
    return contenders


def make_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> Call:
    """FlexAttention under the mask [N, T]."""
    block_mask = create_block_mask(lambda _b, _h, node, slot: mask[node, slot], None, None, *mask.shape, device=query.device)
    torch._dynamo.reset()  # each shape is compiled for itself
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True).transpose(1, 2)


def cuda_medians(contenders: dict[str, Call], repeats: int, warm_up: int) -> dict[str, float]:
    """bench.timing.medians with CUDA events.

    Overwriting the caches does two things: a layer's keys come from memory, as they do in a forward over many layers, and the
    host has queued the call before the GPU gets to it, so that the time between the events is the GPU's own.
    """
    scratch = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for _ in range(warm_up + repeats):
        for name, call in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: median(start.elapsed_time(end) / 1e3 for start, end in pairs[warm_up:]) for name, pairs in events.items()}


def time_case(report: Report, device: torch.device, flash: FlashAttention | None, place: tuple[Any, ...], repeats: int) -> Timing:
    """`place`: model, dtype, P and N."""
    model, dtype, prefix, nodes = place
    heads, kv_heads, dim = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, nodes, heads, dim), *[(1, kv_heads, prefix + nodes, dim)] * 2)
    query, key, value = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for shape in shapes)
    batch = TreeBatch([prefix], [two_chains(nodes)], [nodes], device)
    contenders = make_contenders(Inputs(batch, query.transpose(1, 2), key, value), flash)
    expected = contenders["op"]().double()
    for name, call in list(contenders.items()):
        try:
            distance = float((call().double() - expected).norm() / expected.norm())
        except (RuntimeError, ValueError) as error:  # a shape that this library does not take is its own affair
            report.skipped.append(f"timings: {name} at {place}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del contenders[name]
            continue
        if not distance <= AGREEMENT:
            report.failures.append(f"timings: {name} at {place} is {distance:.1e} away from the op")
    timer = cuda_medians if device.type == "cuda" else medians
    times = timer(contenders, repeats, warm_up=2)
    return Timing(*place, {name: 1e3 * seconds for name, seconds in times.items()})


@torch.no_grad()
def check_timings(report: Report, device: torch.device, places: Sequence[tuple[Any, ...]], repeats: int) -> list[Timing]:
    flash = None
    if device.type != "cuda":
        report.skipped.append("timings: FlexAttention and flash-attn need CUDA")
    else:
        try:
            flash = load_flash_attention()
        except ValueError as error:
            report.skipped.append(f"timings: {error}")
    timings = [time_case(report, device, flash, place, repeats) for place in places]
    rivals = sorted({name for timing in timings for name in timing.ms} - {"op"})
    speedups = {name: [t.ms[name] / t.ms["op"] for t in timings if name in t.ms] for name in rivals}
    report.checks["timings"] = {
        "speedup": {name: {"geomean": geometric_mean(ratios), "least": min(ratios)} for name, ratios in speedups.items()},
        "results": [asdict(timing) for timing in timings],
    }
    return timings


def print_timings(timings: Sequence[Timing], console: Console) -> None:
    rivals = [name for name in ("expanded", "grouped", "flex", "flash_attn") if any(name in t.ms for t in timings)]
    table = Table(
        "model", "dtype", "P", "N", "op", *rivals, title="Medians in ms; in brackets, time of the contender / time of the op"
    )
    for t in timings:
        cells = [f"{t.ms[name]:.3f} ({t.ms[name] / t.ms['op']:.2f})" if name in t.ms else "-" for name in rivals]
        table.add_row(t.model, t.dtype, str(t.prefix), str(t.nodes), f"{t.ms['op']:.3f}", *cells)
    console.print(table)


# ---- a model ------------------------------------------------------------------------------------------------------------------


def check_model(report: Report, device: torch.device, source: str | None, new_tokens: int) -> None:
    """Greedy, float32: prompt by prompt and as one ragged batch, plain and with draft trees."""
    if source is None and not is_embedded_installed():
        report.skipped.append("model: the embedded model is not installed (make setup), and no --model is given")
        return
    model, tokenizer = load(source, "float32", device)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    expected = [_generate(model, prompt, new_tokens) for prompt in prompts]
    params = SamplingParams(max_new_tokens=new_tokens)
    for method in ("none", "best_first"):
        engine = Engine(model, method=method, budget=32)
        found = {"one by one": [engine.generate(prompt, params) for prompt in prompts], "batch": engine.generate(prompts, params)}
        for how, results in found.items():
            for text, tokens, result in zip(PROMPTS, expected, results):
                if result.token_ids != tokens:
                    where = next((i for i, pair in enumerate(zip(tokens, result.token_ids)) if pair[0] != pair[1]), "the end")
                    report.failures.append(f"model: {method}, {how}: {text!r} differs from model.generate at {where}")
    with torch.profiler.profile() as profile:
        engine.generate(prompts[0], params)
    calls = sum(event.count for event in profile.key_averages() if event.key == "specdec::tree_attention")
    report.checks["model"] = {"name": engine.target.name, "tokens": sum(map(len, expected)), "op_calls": calls}
    if not calls:
        report.skipped.append("model: its tree attention runs in PyTorch, so that nothing was shown of the op (see the warning)")


def _generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


# ---- main ----------------------------------------------------------------------------------------------------------------------


def _op(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    op = compiled_op(device.type)
    assert op is not None, "main() has checked it"
    return op


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--quick", action="store_true", help="a small grid; timings of the first model at few sizes")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="shapes to time")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(LIMITS), help="to time")
    parser.add_argument("--prefix", type=int, nargs="+", help="P to time")
    parser.add_argument("--nodes", type=int, nargs="+", help="N to time")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sanitizer", help="path of compute-sanitizer, default: looked for in PATH")
    parser.add_argument("--model", help="folder or hub name, default: the embedded model")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu is a dry run of this script")
    if compiled_op(arguments.device) is None:
        option = "SPECDEC_CUDA=1 " if arguments.device == "cuda" else ""
        parser.error(f"specdec._C has no kernel for {arguments.device}: {option}pip install --no-build-isolation .")
    few = arguments.quick
    arguments.models = arguments.models or list(SHAPES)[: 1 if few else None]
    arguments.prefix = arguments.prefix or PREFIXES[: 1 if few else None]
    arguments.nodes = arguments.nodes or NODES[: 2 if few else None]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a check failed."""
    arguments = _parse(argv)
    device, report, console = torch.device(arguments.device), Report(), Console(width=140)
    places = list(itertools.product(arguments.models, arguments.dtypes, arguments.prefix, arguments.nodes))
    run: dict[str, Callable[[], object]] = {
        "grid": lambda: check_grid(report, device, arguments.quick),
        "graph": lambda: check_graph(report, device),
        "sanitizer": lambda: check_sanitizer(report, device, arguments.sanitizer),
        "timings": lambda: print_timings(check_timings(report, device, places, arguments.repeats), console),
        "model": lambda: check_model(report, device, arguments.model, arguments.new_tokens),
    }
    for check in CHECKS:
        if check in arguments.checks:
            run[check]()
    for name, found in report.checks.items():
        console.print(name, {key: value for key, value in found.items() if key != "results"})
    for line in report.skipped:
        console.print("skipped", line, style="yellow", markup=False, highlight=False)
    for line in report.failures:
        console.print("FAILED", line, style="red", markup=False, highlight=False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu (a dry run: nothing about a GPU is shown)"
    print(json.dumps({"device": name, "torch": torch.__version__, **asdict(report)}))
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
