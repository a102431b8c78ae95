"""csrc/cpu under ThreadSanitizer and under AddressSanitizer with UBSan, in programs of their own, and broken on purpose.

tests/cpu_op/tree_attention_driver.cpp compares the attention op with float64 case by case, on threads of the op's and of the
driver's, with every tensor in a heap block that ends where it ends; linear_driver.cpp does so with the few-row matrix product.
Memory operands of inline assembly (the AVX2 bfloat16 product's) are not instrumented: no sanitizer sees them.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from cuda_sim.build import CSRC, SANITIZERS, run, run_driver
from mutations import Mutation, mutate

CXX = os.environ.get("CXX", "g++")
SOURCES = Path(__file__).parent / "cpu_op"
# Of setup.py; -O1 and symbols are the sanitizers'. What UBSan would say of null and short objects, ASan says too.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-w", "-Wno-psabi", "-pthread", f"-I{Path(torch.__file__).parent / 'include'}"]
QUICKER = {"asan": ["-fno-sanitize=null,object-size"]}  # half of the time to compile
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX} to build csrc/cpu with a sanitizer"),
]


def grid(keep_one_in: int) -> list[str]:
    """Cases of tree_attention_driver.cpp, one in so many (coprime with 2 and 3) of all combinations."""
    axes = (
        ("dtype=fp32", "dtype=fp16", "dtype=bf16"),
        ("D=16", "D=64", "D=80", "D=256"),
        ("Hq=2 Hkv=2", "Hq=6 Hkv=2", "Hq=4 Hkv=1"),
        (
            "N=1 P=0,1100 n=1,1", "N=1 P=2100,3 n=1,0", "N=33 P=300,0 n=33,17", "N=33 P=0,40,290 n=33,0,21",
            "N=256 P=30 n=256", "N=256 P=0,300 n=0,130",
        ),
        ("window=0 softcap=0", "window=21 softcap=0", "window=0 softcap=8", "window=5 softcap=8"),
        ("layout=dense", "layout=cache", "layout=tokens"),
    )  # fmt: skip
    cases = [f"{' '.join(words)} lse={int(i % 4 > 0)} seed={i}" for i, words in enumerate(itertools.product(*axes))]
    return cases[::keep_one_in]


# A window, a row without nodes, one without a prefix, each layout; splits of a row on several threads.
SMALL = [
    "dtype=fp32 D=16 Hq=6 Hkv=2 N=33 P=300,0 n=33,17 window=21 softcap=0 layout=dense lse=1 seed=1",
    "dtype=bf16 D=64 Hq=6 Hkv=1 N=65 P=0,1100 n=0,65 window=0 softcap=8 layout=cache lse=1 seed=2",
    "dtype=fp16 D=80 Hq=3 Hkv=1 N=40 P=600 n=40 window=0 softcap=0 layout=tokens lse=0 seed=3",
]


def compile_driver(folder: Path, op: str) -> Path:
    """The driver's object file: fast, and not under a sanitizer itself."""
    driver = folder / "driver.o"
    run(CXX, *FLAGS, "-O2", f"-I{CSRC}", "-c", SOURCES / f"{op}_driver.cpp", "-o", driver)
    return driver


@dataclass(frozen=True)
class Toolchain:
    """A compiler whose programs run under the sanitizer."""

    sanitizer: str  # of SANITIZERS
    isas: tuple[str, ...]  # the instruction sets of this CPU

    def build(self, folder: Path, driver: Path, op: str, isas: tuple[str, ...] | None = None, csrc: Path = CSRC) -> Path:
        """The driver with csrc/cpu/{op}.cpp, which alone is under the sanitizer and has the kernels of `isas`, default: all."""
        isas = isas or self.isas
        table = ", ".join(f"SPECDEC_KERNELS_OF({isa})" for isa in isas)
        redefine = f"#undef SPECDEC_KERNEL_TABLE\n#define SPECDEC_KERNEL_TABLE {{{table}}}\n"
        if "avx512" in isas:  # else: what cannot run need not compile, which would take as long as the rest
            redefine = ""
        source, program = folder / f"{op}.cpp", folder / f"{op}_{self.sanitizer}"
        source.write_text(f'#include "cpu/isa.h"\n{redefine}#include "cpu/{op}.cpp"\n')
        checks = [*SANITIZERS[self.sanitizer], *QUICKER.get(self.sanitizer, [])]
        run(CXX, *FLAGS, "-O1", "-g1", *checks, f"-I{csrc}", source, driver, "-o", program)
        return program


@cache
def find_toolchain(sanitizer: str) -> Toolchain:
    """Skips the test if programs under the sanitizer do not compile, link and run."""
    environment = {name: value for name, value in os.environ.items() if name != "SPECDEC_CPU_ISA"}
    with TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text('#include <cstdio>\n#include "cpu/isa.h"\nint main() { std::puts(specdec::isa_name()); }\n')
        try:
            run(CXX, *FLAGS, *SANITIZERS[sanitizer], f"-I{CSRC}", source, "-o", program)
            best = run(program, env=environment).strip()
        except RuntimeError as error:
            pytest.skip(f"{CXX} builds no program that runs under {sanitizer}: {error}")
    return Toolchain(sanitizer, ISAS[: ISAS.index(best) + 1])


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("driver"), "tree_attention")


@pytest.fixture(scope="module", params=["tsan", "asan"])
def toolchain(request: pytest.FixtureRequest) -> Toolchain:
    return find_toolchain(request.param)


@pytest.fixture(scope="module")
def program(toolchain: Toolchain, driver: Path) -> Path:
    return toolchain.build(driver.parent, driver, "tree_attention")


def run_isa(program: Path, isa: str, cases: list[str]) -> tuple[int, str]:
    return run_driver(program, cases, SPECDEC_CPU_ISA=isa, ASAN_OPTIONS="detect_leaks=1")


def run_cases(program: Path, isa: str, cases: list[str]) -> list[str]:
    """The lines that the driver printed: one a case, shared among the cores, each right."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(lambda part: run_isa(program, isa, cases[part::cores]), range(cores)))
    lines = [line for _, output in results for line in output.splitlines()]
    assert [line for line in lines if not line.startswith(f"ok isa={isa} ")] == []
    assert [status for status, _ in results] == [0] * cores and len(lines) == len(cases)
    return lines


@pytest.mark.parametrize("isa", ISAS)
def test_attention(toolchain: Toolchain, program: Path, isa: str) -> None:
    if isa not in toolchain.isas:
        pytest.skip(f"this CPU has no {isa}")
    lines = run_cases(program, isa, grid(61))
    assert sum("tasks=4" in line for line in lines) > len(lines) // 3  # threads had something to do


def test_linear(tmp_path: Path) -> None:
    """Under AddressSanitizer alone: specdec::Linear starts no threads."""
    toolchain = find_toolchain("asan")
    program = toolchain.build(tmp_path, compile_driver(tmp_path, "linear"), "linear")
    shapes = itertools.product((1, 2, 5, 13, 97), ((1, 1), (7, 3), (16, 25), (77, 49), (130, 24)), (0, 1))
    sizes = [f"rows={rows} in={k} out={out} bias={bias}" for rows, (k, out), bias in shapes]
    cases = [f"dtype={dtype} {size}" for dtype in ("fp32", "fp16", "bf16") for size in sizes]
    for isa in toolchain.isas:
        run_cases(program, isa, cases)


# --- planted bugs -----------------------------------------------------------------------------------------------------------


# layer: the comparison with float64, or a sanitizer where every result up to then is right
MUTATIONS = [
    Mutation("float64", "the window is one key wider", "depth - window + 1 - block.slot", "depth - window - block.slot"),
    Mutation("float64", "rows without a node keep what they had", "std::memset(static_cast<char*>(params_.output)", "if (false) std::memset(static_cast<char*>(params_.output)"),
    Mutation("asan", "the slot past the end is read", "float(keys[std::min(first + i, count - 1) * stride + d])", "float(keys[std::min(first + i, count) * stride + d])"),
    Mutation("asan", "a thread's memory is 16 floats short", "2 * kMaxKeys * dim + 2 * partial_size_)", "2 * kMaxKeys * dim + 2 * partial_size_ - 16)"),
    Mutation("asan", "a thread's memory is not given back", "(float* memory) const { ::operator delete(memory, kAlignment); }", "(float*) const {}"),
    Mutation("ubsan", "a shift by more bits than there are", "uint64_t{1} << (node % 64)", "uint64_t{1} << node"),
    Mutation("tsan", "the last of the splits does not wait for the others", "std::memory_order_acq_rel", "std::memory_order_relaxed"),
    Mutation("tsan", "splits are counted without an atomic", "std::atomic_ref(unit.pending).fetch_sub(1, std::memory_order_acq_rel) > 1", "unit.pending-- > 1"),
    Mutation("tsan", "all threads share one memory", "static thread_local Arena arena;\n  const", "static Arena arena;\n  const"),
]  # fmt: skip

CATCHES = {
    "float64": r"^WRONG",
    "asan": r"AddressSanitizer: heap-buffer-overflow|LeakSanitizer: detected memory leaks",
    "ubsan": r"runtime error: shift exponent",
    "tsan": r"ThreadSanitizer: data race",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.layer}: {mutation.name}")
def test_planted_bug_is_caught(tmp_path: Path, driver: Path, mutation: Mutation) -> None:
    """In the portable kernels, which compile fastest."""
    toolchain = find_toolchain("tsan" if mutation.layer == "tsan" else "asan")
    program = toolchain.build(tmp_path, driver, "tree_attention", ISAS[:1], mutate(tmp_path, mutation, "cpu/tree_attention*"))
    status, output = run_isa(program, ISAS[0], SMALL)
    assert status != 0 and re.search(CATCHES[mutation.layer], output, re.M), f"{status}\n{output[-2000:]}"
    assert mutation.layer == "float64" or "WRONG" not in output
