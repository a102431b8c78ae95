"""CompiledForward: the model's verification step as machine code, compiled ahead of time, once a machine (`compile=True`).

In eager mode half of a small model's step on a CPU is Python between its operations. Here the whole step is exported
(torch.export) and compiled (AOTInductor) with specdec's own operations inside: `specdec::linear`, which reads the weights as they
lie in the user's model, and `specdec::cached_tree_attention`, which writes the nodes' K/V into the cache in place and attends to
what is there. Two things follow that frozen, bucketed graphs do not have: one compilation serves every number of nodes, rows and
every context, without padding; and it holds no copy of the weights, so a change of them in place is seen at once.

    step                  int32: first row, rows B, nodes N of the largest tree, M of them to compute at most | of each row P, n
                          and how many an earlier forward computed | ancestor masks B*N*W | depths B*N
    tokens, positions     [1, T]: each row's M nodes, the rows one after another, T = max(2, B*M)

Arithmetic stays that of the eager step: bfloat16 intermediate results are rounded where PyTorch rounds them
(`emulate_precision_casts`). The package (some MB, no weights) lies in the cache folder under all that it depends on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import operator
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from specdec import linear
from specdec._cache import cache_folder
from specdec.attention import TreeBatch, compiled_op, op_takes_heads
from specdec.kv_cache import KVCache
from specdec.trace import Trace

if TYPE_CHECKING:
    from specdec.target import TargetModel

__all__ = ["CompiledForward", "cannot_compile"]

FEWEST_TOKENS = 2  # torch.export gives size 1 a graph of its own
_MOST = 1 << 24  # of any dynamic size
_INDUCTOR = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "cpp.dynamic_threads": True,
    "emulate_precision_casts": True,
}
_op: Any = torch.ops.specdec.cached_tree_attention.default if linear.HAVE_OP else None

if _op is not None:

    @torch.library.register_fake("specdec::cached_tree_attention")
    def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


def cannot_compile(target: TargetModel) -> str | None:
    """Why this model's step cannot be compiled, or None; what only compiling shows is not known yet."""
    if compiled_op(kind := target.device.type) is None or (kind == "cpu" and _op is None):
        return f"specdec._C is not built for {kind} (it needs a compiler when specdec is installed, with --no-build-isolation)"
    if target.ranks.size > 1:
        return f"{target.ranks.size} processes share it"
    if not target.uses_interface:
        return "transformers cannot route it through its attention interface"
    if target.rope.kind is not None:
        return f"its {target.rope.kind} RoPE depends on the length of the text"
    for layer in target.layers:
        if layer.device != target.device:
            return f"it has layers on {layer.device} and embeddings on {target.device}"
        if not op_takes_heads(layer.key_dim, layer.value_dim, layer.dtype, kind):
            return f"the attention op has no kernel for heads of {layer.key_dim} in {layer.dtype}"
    if target.prefix_backend != "op":
        return "it has a prefix_backend of its own"
    if hasattr(target.model, "peft_config"):
        return "its adapters can be switched at any time; merge them first (merge_and_unload)"
    hooked = [name for name, module in target.model.named_modules() if _is_hooked(module)]
    return f"hooks that it would no longer call are on {', '.join(map(repr, hooked[:3]))}" if hooked else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class CompiledForward:
    """The compiled step of one TargetModel.

    Args:
        target: its model is on a CPU, and `cannot_compile` finds nothing.

    Raises:
        RuntimeError: the model cannot be exported or compiled; the message says why.
    """

    def __init__(self, target: TargetModel) -> None:
        self._parameters = _tensors(target.model)
        path = _package(target)
        with FileLock(f"{path}.lock"):
            self.was_there = path.exists()
            if not self.was_there:
                _compile(target, path)
        self._facts = json.loads(_facts_of(path).read_text(encoding="utf-8"))
        self._runner = torch._inductor.aoti_load_package(str(path))
        names = self._runner.get_constant_fqns()
        if missing := [name for name in names if name not in self._parameters]:
            raise RuntimeError(f"it makes constants of its own in each forward ({', '.join(sorted(missing)[:3])})")
        self._used = [(name, *self._parameters[name]) for name in names]
        self._pointers: list[int] = []  # of the weights that were handed over
        self._weights: dict[str, Tensor] = {}  # these, so that no other tensor gets their place in memory

    def __call__(self, cache: KVCache, batch: TreeBatch, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Logits [B, M, V] of a batch of trees, announced to the cache; tokens and positions [B, M] int64."""
        self._follow_weights()
        flat = np.zeros((2, 1, max(FEWEST_TOKENS, tokens.size)), np.int64)
        flat[0, 0, : tokens.size], flat[1, 0, : tokens.size] = tokens.ravel(), positions.ravel()
        inputs = torch.from_numpy(flat)
        step = torch.from_numpy(pack_step(cache.first_row, batch, tokens.shape[1]))
        logits = self._runner(inputs[0], inputs[1], step, *cache.buffers())
        return logits[0, : tokens.size].unflatten(0, tokens.shape)

    def info(self) -> dict[str, Any]:
        """What the compilation cost, now or when it was made: seconds, largest memory (of this process and of the compilers), disk."""
        return {f"compile_{name}": value for name, value in self._facts.items()}

    def _follow_weights(self) -> None:
        """Hand over the model's tensors, at first and whenever one was replaced (changes in place need nothing).

        Raises:
            RuntimeError: a tensor has another shape or dtype, or has left the CPU.
        """
        pointers = [owner[name].data_ptr() for _, owner, name in self._used]  # not their shapes: at each step, time counts
        if pointers == self._pointers:
            return
        tensors = {full: owner[name].detach() for full, owner, name in self._used}
        for full, (shape, dtype) in ((full, self._parameters.shapes[full]) for full in tensors):
            tensor = tensors[full]
            if (tensor.shape, tensor.dtype, tensor.device.type) != (shape, dtype, "cpu") or not tensor.is_contiguous():
                raise RuntimeError(
                    f"{full.removeprefix('model.')} became {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} after the model "
                    f"was compiled with {dtype} {tuple(shape)} on the CPU; fix: make a new Engine"
                )
        self._runner.load_constants(tensors, check_full_update=True, user_managed=True)
        self._pointers, self._weights = pointers, tensors


def pack_step(first_row: int, batch: TreeBatch, fresh: int) -> np.ndarray:
    """`step` of cached_tree_attention, [4 + 3B + B*N*W + B*N] int32; fresh: M."""
    lengths, counts, masks, depths = batch.packed_arrays()
    header = np.array([first_row, len(counts), depths.shape[1], fresh], np.int32)
    known = np.array(batch.known or [0] * len(counts), np.int32)
    return np.concatenate([header, lengths, counts, known, masks.ravel(), depths.ravel()])


class _Tensors(dict[str, tuple[dict[str, Any], str]]):
    """Name in the exported graph -> (the dictionary that holds the tensor in its module, its name there), and shapes as compiled."""

    shapes: dict[str, tuple[torch.Size, torch.dtype]]


def _tensors(model: nn.Module) -> _Tensors:
    """Every parameter and buffer of the model under all of its names."""
    found = _Tensors()
    for path, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for name in owner:
                if owner[name] is not None:
                    found[".".join(filter(None, ("model", path, name)))] = (owner, name)
    found.shapes = {full: (owner[name].shape, owner[name].dtype) for full, (owner, name) in found.items()}
    return found


# ---- compiling --------------------------------------------------------------------------------------------------------------


def _package(target: TargetModel) -> Path:
    """Where the package for this model lies: under everything that its code depends on."""
    model = target.model
    sources = {inspect.getsourcefile(type(module)) for module in model.modules() if type(module).__module__ != "builtins"}
    digest = hashlib.sha256()
    for source in sorted([*filter(None, sources), __file__]):
        digest.update(Path(source).read_bytes())
    parts = (
        torch.__version__, transformers_version, linear.build(), torch.backends.cpu.get_cpu_capability(), platform.machine(),
        platform.node(), type(model).__qualname__, target.max_fast_rows > 0, json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        [(name, tuple(shape), str(dtype)) for name, (shape, dtype) in _tensors(model).shapes.items()],
    )  # fmt: skip
    digest.update(repr(parts).encode())
    folder = cache_folder("compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only cache: compiled again in the next process
        folder = Path(tempfile.mkdtemp(prefix="specdec-"))
    return folder / f"{target.name}-{digest.hexdigest()[:16]}.pt2"


def _facts_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _compile(target: TargetModel, path: Path) -> None:
    """Export the model's step, compile it and put the package at `path`, which appears whole or not at all."""
    started = time.perf_counter()
    part = path.with_name(f"{path.stem}.part.pt2")
    console = Console(stderr=True)
    with (
        console.status(f"specdec: compiling {target.name} for this machine, once (a minute or two) ..."),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of torch about itself
        exported = _export(target)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(part), inductor_configs=_INDUCTOR)
    facts = {
        "seconds": round(time.perf_counter() - started, 1),
        "memory_mb": _peaks(),
        "disk_mb": round(part.stat().st_size / 1e6, 1),
    }
    _facts_of(path).write_text(json.dumps(facts), encoding="utf-8")
    part.replace(path)


def _peaks() -> list[int]:
    """Largest resident memory, in MB, of this process and of any of its children; nothing where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    return [round(resource.getrusage(who).ru_maxrss / 1e3) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]


def _export(target: TargetModel) -> Any:
    """The exported step, dynamic in tokens, rows of the cache and capacity."""
    cache = target.new_cache(2, 64)
    trace = _ExportedAttention(cache)
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    step = torch.zeros(16, dtype=torch.int32)
    size = torch.export.Dim("tokens", min=FEWEST_TOKENS, max=_MOST)
    free = torch.export.Dim.DYNAMIC  # a drafter of the first layers reads the cache of all: the number of buffers is free too
    shapes = ({1: size}, {1: size}, {0: free}, tuple({0: free, 1: free, 3: free} for _ in cache.buffers()))
    with target.tracing(trace.attend):
        exported = torch.export.export(
            _StepModule(target.model, trace),
            (tokens, tokens.clone(), step, *cache.buffers()),
            dynamic_shapes=shapes,
            strict=False,
        )
    _merge_linears(exported.graph_module)
    return exported


def _merge_linears(module: torch.fx.GraphModule) -> None:
    """Give linear layers that read the same input (query, key and value; gate and up) one call: each alone is small, and the threads
    would meet after each."""
    graph = module.graph
    readers: dict[Any, list[tuple[torch.fx.Node, Any, Any]]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.specdec.linear.default):
        arguments: list[Any] = list(node.args)
        x, weight, bias, most = arguments + [None, -1][len(arguments) - 2 :]
        if all(each is None or each.op == "placeholder" for each in (weight, bias)):  # there from the beginning
            readers.setdefault((x, most), []).append((node, weight, bias))
    for (x, most), layers in readers.items():
        if len(layers) == 1:
            continue
        nodes, weights, biases = (list(each) for each in zip(*layers))
        with graph.inserting_before(nodes[0]):
            merged = graph.call_function(torch.ops.specdec.linears.default, (x, weights, biases, most))
            merged.meta["val"] = [node.meta["val"] for node in nodes]
            for index, node in enumerate(nodes):
                one = graph.call_function(operator.getitem, (merged, index))
                one.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(one)
                graph.erase_node(node)
    graph.lint()
    module.recompile()


class _StepModule(nn.Module):
    """What is exported: (tokens, positions, step, the cache's buffers) -> logits [1, T, V]."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.model = model
        self._trace = [trace]  # in a list: it holds tensors while exporting, which are no state of this module

    def forward(self, tokens: Tensor, positions: Tensor, step: Tensor, *buffers: Tensor) -> Tensor:
        return self._trace[0].run(self.model, tokens, positions, step, buffers)


class _ExportedAttention(Trace):
    """Leaves storing and attending to cached_tree_attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int) -> Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] of the new tokens -> [1, T, Hq, D]."""
        keys, key_index, values, value_index = self.stored(key, value)
        return _op(query, key, value, keys, values, key_index, value_index, self.step, scale, softcap, window)
