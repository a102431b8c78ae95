"""y = x @ weight.T + bias for the few rows that a speculative step verifies, on a CPU.

torch's CPU matrix products are tuned for one row or for hundreds. A verification step has 4 to 64, and without AVX512-BF16
torch's bfloat16 path is slower still: the rows then cost almost as much as separate steps would, and there is nothing left for
speculation to win. `torch.ops.specdec.linear` (csrc/cpu/linear.cpp) reads every weight once, in its stored dtype, for all rows.

It is batch-invariant: a row's result is the same bits alone or among others and for any number of threads, since each output
is one fixed sequence of operations over the input features. Only another instruction set (`instruction_set`) may round
differently. `torch.ops.specdec.linears` gives several layers that read the same input one call, with the same bits.

    with FastLinear(model).active():
        model(input_ids)             # plain nn.Linear modules on the CPU run the op; everything is restored on exit
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec._cache import measurement_file, read_measurement, write_measurement

__all__ = ["HAVE_OP", "FastLinear", "instruction_set", "linear", "linear_reference", "measure_advantage", "winning_rows"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNLIMITED = sys.maxsize
PROBE_ROWS = (1, 8, 16, 32, 48, 64, 256)
PROBE_BYTES = 32 << 20  # of weights in one pass over few rows: more than most caches keep
MAX_COPIES = 32  # of one weight: thousands of calls on tiny ones would take seconds
MIN_ADVANTAGE = 1.05
MAX_LOSS = 0.9  # at few rows, accepted where many rows win: one arithmetic for all of them is worth more
LOOKS = 5  # where the op seems to lose somewhere: a spell of another program must not settle that for good


def _load_op() -> Path | None:
    """Load the compiled library that lies beside this file, if there is one."""
    if os.environ.get("SPECDEC_NO_EXT") == "1":
        return None
    for path in sorted(Path(__file__).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(path))
            if hasattr(torch.ops.specdec, "linears"):
                return path
            raise OSError("it is of an earlier specdec")
        except OSError as error:
            warnings.warn(
                f"specdec: {path.name} does not load ({error}); CPU steps are slower. Fix: reinstall specdec against this torch",
                stacklevel=2,
            )
    return None


_LIBRARY = _load_op()
HAVE_OP = _LIBRARY is not None

if HAVE_OP:

    @torch.library.register_fake("specdec::linear")
    def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, max_rows: int = -1) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("specdec::linears")
    def _linears_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], max_rows: int = -1) -> list[Tensor]:
        return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def build() -> str | None:
    """Identifies the compiled library; None without one."""
    return hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()[:16] if _LIBRARY else None


def instruction_set() -> str | None:
    """What the op runs on: "avx512_bf16", "avx512", "avx2" or "portable"; None without the op. $SPECDEC_CPU_ISA lowers it."""
    return torch.ops.specdec.linear_isa() if HAVE_OP else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by the op where it applies and else by torch.

    x [..., in_features], weight [out_features, in_features], bias [out_features]; returns [..., out_features] in x's dtype.
    The op takes contiguous float32, float16 and bfloat16 CPU tensors of one dtype while no gradient is recorded.
    Raises ValueError when the shapes or the dtypes do not fit together.
    """
    _check(x, weight, bias)
    if not HAVE_OP or torch.is_grad_enabled() or not _supported(x) or not _supported(weight):
        return functional.linear(x, weight, bias)
    return torch.ops.specdec.linear(x, weight, None if bias is None else bias.contiguous())


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the op computes, in float64: the result before it is rounded to x's dtype."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def _supported(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass [out_features, in_features]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be weight's {weight.shape[1]} in_features")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; convert x to the weight's dtype")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; pass {x.dtype} [{weight.shape[0]}]")


def measure_advantage(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, rows: Sequence[int] = PROBE_ROWS, repeats: int = 3
) -> dict[int, float]:
    """How many times faster the op is than torch, for each number of rows, over weights of these [out, in] shapes.

    The weights of one pass do not fit in the cache, as a model's do not; with more rows, where arithmetic is what counts, they
    are fewer. Takes some tenths of a second.
    """
    if not HAVE_OP:
        return dict.fromkeys(rows, 0.0)
    with torch.inference_mode():
        return {n: _advantage(_probe_weights(shapes, dtype, PROBE_BYTES // max(1, n // 8)), n, repeats) for n in rows}


def _probe_weights(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, size: int) -> list[Tensor]:
    """Weights of these shapes, tall ones cut, repeated until they are `size` bytes together."""
    share = size // (len(shapes) * dtype.itemsize)
    weights: list[Tensor] = []
    for out_features, in_features in shapes:
        out_features = min(out_features, max(1, share // in_features))
        copies = min(MAX_COPIES, max(1, share // (out_features * in_features)))  # a small model's do fit in the cache
        weights.extend(torch.ones(out_features, in_features, dtype=dtype) for _ in range(copies))
    return weights


def _advantage(weights: list[Tensor], rows: int, repeats: int) -> float:
    """Best time of torch over best time of the op; the two take turns, so that other load on the machine hits both."""
    xs = {weight.shape[1]: torch.ones(rows, weight.shape[1], dtype=weight.dtype) for weight in weights}
    contenders: tuple[Callable[..., Tensor], ...] = (functional.linear, torch.ops.specdec.linear.default)
    best = [float("inf")] * len(contenders)
    for _ in range(repeats):
        for i, contender in enumerate(contenders):
            start = time.perf_counter()
            for weight in weights:
                contender(xs[weight.shape[1]], weight, None)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


@lru_cache(maxsize=64)
def _winning_rows(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, threads: int) -> int:
    machine = platform.node(), platform.machine(), instruction_set(), torch.backends.cpu.get_cpu_capability()
    fingerprint = repr((shapes, dtype, threads, *machine, torch.__version__, build()))
    file = measurement_file("linear", fingerprint)
    known = read_measurement(file, fingerprint)
    if isinstance(known, int):
        return known
    rows = _measured_winner(shapes, dtype)
    with suppress(OSError):  # a read-only cache: measured again in the next process
        write_measurement(file, fingerprint, rows)
    return rows


def _measured_winner(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    looks = [measure_advantage(shapes, dtype)]
    if _winner(looks[0]) != UNLIMITED:
        looks += [measure_advantage(shapes, dtype) for _ in range(LOOKS - 1)]
    return _winner({rows: median(look[rows] for look in looks) for rows in looks[0]})


def _winner(advantages: Mapping[int, float]) -> int:
    winner = 0
    for rows, advantage in advantages.items():
        if advantage < MAX_LOSS:
            break
        if advantage >= MIN_ADVANTAGE:
            winner = rows
    return UNLIMITED if winner == PROBE_ROWS[-1] else winner


def winning_rows(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Up to how many rows the op beats torch on this machine (0: never).

    Measured once for each set of shapes, and kept in the cache folder: the two products round differently, and were each process
    to time them anew, a seed would not give the same bfloat16 text twice where they are about equally fast.
    """
    if not HAVE_OP or not shapes:
        return 0
    return _winning_rows(tuple(sorted(set(shapes))), dtype, torch.get_num_threads())


class FastLinear:
    """Runs a model's plain `nn.Linear` modules through the op while `active()`.

    Taken are modules whose type is exactly nn.Linear with an ordinary contiguous CPU weight of a supported dtype; quantised,
    parametrised and subclassed ones, and those whose `forward` somebody has already replaced (accelerate), are left alone. A
    call with more than `max_rows` rows, with gradients on, or with an input of another dtype or layout takes torch's way.

    max_rows: None means where the op wins (winning_rows).
    """

    def __init__(self, model: nn.Module, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 0:
            raise ValueError(f"max_rows is {max_rows}; pass 0 (never) or more, or None to measure")
        taken = [module for module in model.modules() if _is_plain_linear(module)] if HAVE_OP else []
        self.max_rows = _measured_rows(taken) if max_rows is None else max_rows
        if self.max_rows == 0:
            taken = []
        self._forwards = [(module.__dict__, _fast_forward(module, self.max_rows)) for module in taken]
        self._traced = [(module.__dict__, _traced_forward(module, self.max_rows)) for module in taken]
        self._lock = threading.Lock()
        self._users = 0
        self._swapped: list[dict[str, object]] = []

    def __len__(self) -> int:
        """Number of modules that the op serves."""
        return len(self._forwards)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the modules run the op. May be nested and entered from several threads: the last one out restores."""
        with self._swapped_for(self._forwards):
            yield

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Inside, the modules may be exported for any number of rows: the op itself gives too many of them to torch.

        Raises:
            RuntimeError: entered while `active()`.
        """
        with self._swapped_for(self._traced):
            if self._users > 1:
                raise RuntimeError("FastLinear.tracing() inside active(): the modules would be exported as they are now")
            yield

    @contextmanager
    def _swapped_for(self, forwards: Sequence[tuple[dict[str, Any], Callable[[Tensor], Tensor]]]) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._swap(forwards)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def _swap(self, forwards: Sequence[tuple[dict[str, Any], Callable[[Tensor], Tensor]]]) -> None:
        for attributes, forward in forwards:
            if "forward" not in attributes:
                attributes["forward"] = forward
                self._swapped.append(attributes)

    def _restore(self) -> None:
        for attributes in self._swapped:
            attributes.pop("forward", None)
        self._swapped.clear()


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not _supported(weight):
        return False
    return bias is None or (_supported(bias) and bias.dtype is weight.dtype)


def _measured_rows(modules: Sequence[nn.Linear]) -> int:
    """The number of rows up to which the op wins for every dtype that occurs in the modules."""
    shapes: dict[torch.dtype, set[tuple[int, int]]] = {}
    for module in modules:
        shapes.setdefault(module.weight.dtype, set()).add((module.out_features, module.in_features))
    return min((winning_rows(sorted(kinds), dtype) for dtype, kinds in shapes.items()), default=0)


def _fast_forward(module: nn.Linear, max_rows: int) -> Callable[[Tensor], Tensor]:
    """A forward for this module; it reads the parameters at each call, since they may be replaced (`module.to`)."""
    parameters: dict[str, Any] = module._parameters
    op = torch.ops.specdec.linear.default

    def forward(input: Tensor) -> Tensor:
        weight = parameters["weight"]
        if (
            input.dtype is weight.dtype
            and input.dtype in DTYPES
            and input.numel() <= max_rows * input.shape[-1]
            and not torch.is_grad_enabled()
            and input.is_contiguous()
            and input.is_cpu
        ):
            return op(input, weight, parameters["bias"])
        return functional.linear(input, weight, parameters["bias"])

    return forward


def _traced_forward(module: nn.Linear, max_rows: int) -> Callable[[Tensor], Tensor]:
    """The same for a graph in which the number of rows is a symbol: no condition on it."""
    parameters: dict[str, Any] = module._parameters
    most = -1 if max_rows == UNLIMITED else max_rows

    def forward(input: Tensor) -> Tensor:
        weight = parameters["weight"]
        if input.dtype is weight.dtype and input.dtype in DTYPES:
            return torch.ops.specdec.linear.default(input, weight, parameters["bias"], most)
        return functional.linear(input, weight, parameters["bias"])

    return forward
