"""The CUDA kernels of csrc/cuda, proved without a GPU: run in a CPU simulator, under sanitizers, and broken on purpose.

The layers (tests/cuda_sim): the very source that nvcc compiles, run by a simulator of threads, shared memory and tensor-core
instructions and compared with float64; the same under ThreadSanitizer and AddressSanitizer; where nvcc is, its PTX translated
and run by the same simulator, and what ptxas reports and writes. Planted bugs show that each layer sees what it is there for.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench.roofline import Shape, packed_rows
from cuda_sim.build import CSRC, build_driver, build_library, run_driver
from cuda_sim.nvcc import (
    ARCHITECTURES,
    TARGETS,
    Report,
    compile_code,
    compile_driver,
    compile_ptx,
    find_nvcc,
    find_tool,
    machine_code,
    toolkit_root,
)
from cuda_sim.ptx import translate
from mutations import Mutation, mutate

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason=f"the simulator switches stacks on x86_64, not {platform.machine()}"
    ),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no g++ to build the simulator with"),
]

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: neither its PTX nor its machine code is checked")
needs_disassembler = pytest.mark.skipif(
    not (find_tool("cuobjdump") and find_tool("nvdisasm")),
    reason="no cuobjdump or nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm): the machine code is not read",
)

HEADS = ("Hq=2 Hkv=2", "Hq=6 Hkv=2", "Hq=8 Hkv=1")
OPTIONS = [f"window={w} softcap={c} splits={s}" for w, c, s in itertools.product((0, 24), (0, 15), (1, 3))]
SHAPES = list(itertools.product(("fp32", "fp16", "bf16"), (64, 96, 128, 256)))

# A few cases that between them take every kernel, a split without keys, a row without a prefix and all orders of the warps.
SMALL = [
    "dtype=fp32 D=64 Hq=4 Hkv=2 N=5 P=70,0 n=5,2 splits=3 order=1",
    "dtype=fp32 D=256 Hq=2 Hkv=1 N=33 P=40 n=33 window=9 softcap=20",
    "dtype=bf16 D=64 Hq=4 Hkv=2 N=5 P=150,0 n=5,2 splits=4 order=1",
    "dtype=fp16 D=96 Hq=3 Hkv=1 N=9 P=100,3 n=9,4 window=8 softcap=20",
    "dtype=bf16 D=128 Hq=2 Hkv=1 N=40 P=130 n=37 order=2",
    "dtype=fp16 D=256 Hq=4 Hkv=2 N=12 P=60,0 n=12,12 splits=2 order=1",
    "dtype=bf16 D=256 Hq=8 Hkv=1 N=6 P=40 n=6",
]

# Every kernel: 1, 2 and 4 warps along the packed rows, and the merge.
EVERY_KERNEL = [
    f"dtype={dtype} D={dim} {heads} P=9 splits={splits}"
    for dtype, dim in SHAPES
    for heads, splits in (("Hq=1 Hkv=1 N=1 n=1", 2), ("Hq=4 Hkv=1 N=8 n=8", 1), ("Hq=4 Hkv=1 N=16 n=16", 1))
]
KERNELS = 4 + 2 * (3 + 3 + 3 + 2) + 3


def case(dtype: str, dim: int, nodes: int, heads: str, ragged: bool, options: str, index: int) -> str:
    lengths = f"P=150,0 n={nodes},{(nodes + 1) // 2}" if ragged else f"P=97 n={nodes}"
    return f"dtype={dtype} D={dim} N={nodes} {heads} {lengths} {options} order={index % 3} seed={index}"


def grid(nodes: int, keep_one_in: int) -> list[str]:
    """Every combination of dtype, D, heads, ragged, window, softcap and splits, or one in so many (coprime with 2 and 3) of them."""
    combinations = itertools.product(SHAPES, HEADS, (False, True), OPTIONS)
    cases = [case(*shape, nodes, heads, ragged, options, i) for i, (shape, heads, ragged, options) in enumerate(combinations)]
    return cases[::keep_one_in]


def run_cases(program: Path, cases: list[str]) -> None:
    """All cases, shared among the cores; each must be right."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(lambda part: run_driver(program, cases[part::cores]), range(cores)))
    lines = [line for _, output in results for line in output.splitlines()]
    assert [line for line in lines if not line.startswith("ok")] == []
    assert [status for status, _ in results] == [0] * cores and len(lines) == len(cases)


@dataclass(frozen=True)
class Launch:
    kind: str  # "c++" or "ptx"
    shared: int  # bytes
    tiles: int  # of packed query rows


def launches(program: Path, cases: list[str]) -> dict[str, Launch]:
    """Mangled kernel -> its latest launch."""
    _, output = run_driver(program, cases, SIM_TRACE="1")
    found = re.findall(r"launch (\w+) (\S+) shared=(\d+) grid=(\d+)", output)
    return {name: Launch(kind, int(shared), int(tiles)) for name, kind, shared, tiles in found}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("simulator"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build_library(tmp_path_factory.mktemp("library"))))
    loaded.specdec_tree_attention_cuda_workspace.restype = ctypes.c_int64
    return loaded


def test_small_cases(driver: Path) -> None:
    run_cases(driver, SMALL)


@pytest.mark.parametrize(("nodes", "keep_one_in"), [(1, 5), (20, 13), (33, 11), (64, 29), (256, 97)])
def test_sample_of_the_grid(driver: Path, nodes: int, keep_one_in: int) -> None:
    run_cases(driver, grid(nodes, keep_one_in))


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "keep_one_in"), [(1, 1), (20, 5), (33, 5), (64, 11), (256, 31)])
def test_grid(driver: Path, nodes: int, keep_one_in: int) -> None:
    run_cases(driver, grid(nodes, keep_one_in))


def test_long_prefix(driver: Path) -> None:
    run_cases(driver, [f"dtype={dtype} D=64 Hq=4 Hkv=1 N=8 P=5000,2999 n=8,3 splits=0" for dtype in ("fp32", "fp16", "bf16")])


def test_strided_caches_odd_scales_and_no_log_sum_exp(driver: Path) -> None:
    odd = ("pad=8", "pad=64 scale=-0.25", "scale=0", "scale=3 softcap=2", "set=lse:0", "set=lse:0 splits=2", "window=1")
    run_cases(driver, [f"dtype={dtype} D=64 Hq=4 Hkv=2 N=6 P=80,3 n=6,5 {text}" for dtype in ("fp32", "fp16") for text in odd])


def test_nodes_that_see_nothing_are_zero(driver: Path) -> None:
    run_cases(driver, [f"dtype={t} Hq=2 N=40 P=0,70 n=40,9 blind=4 splits={s}" for t in ("fp32", "bf16") for s in (1, 2)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_launcher_called_from_python_agrees_with_the_reference(library: ctypes.CDLL, dtype: str) -> None:
    """One contract: tensors as the engine makes them, against the PyTorch reference in float64."""
    from specdec.attention import tree_attention_reference
    from test_tree_attention_op import TOLERANCE, Params, make_case

    query, key, value, batch = make_case([170, 40], [20, 11], 2, 3, 64, getattr(torch, dtype))
    output, lse = torch.full_like(query.transpose(1, 2), torch.nan), torch.full((2, 20, 6), torch.nan)
    workspace = torch.full((3 * 2 * 20 * 6 * 65,), torch.nan)
    tensors = (query, key, value, *batch.packed(), output, lse, workspace)
    params = Params(
        ctypes.sizeof(Params), *(tensor.data_ptr() for tensor in tensors), 4 * workspace.numel(),
        *((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in tensors[:3]),
        ["float32", "float16", "bfloat16"].index(dtype), 2, 6, 2, 20, key.shape[2], 64, 50, 0.125, 8.0, 3,
    )  # fmt: skip
    assert library.specdec_tree_attention_cuda_workspace(ctypes.byref(params)) == params.workspace_size
    assert library.specdec_tree_attention_cuda(ctypes.byref(params), None) == 0
    double = (query.double(), key.double(), value.double())
    expected, expected_lse = tree_attention_reference(*double, *batch.packed(), 0.125, 8.0, 50)
    for row, count in enumerate(batch.counts):
        error = (output[row, :count].double() - expected[row, :count]).norm() / expected[row, :count].norm()
        assert error <= TOLERANCE[query.dtype] and not output[row, count:].any()
        torch.testing.assert_close(lse[row, :count], expected_lse[row, :count].float(), rtol=2e-6, atol=2e-6)


def test_no_nodes_at_all(driver: Path) -> None:
    run_cases(driver, [f"dtype={dtype} N=3 P=20,0 n=0,0 splits={splits}" for dtype in ("fp32", "bf16") for splits in (1, 2)])


def test_shared_memory_of_every_target(driver: Path) -> None:
    """Every kernel fits into the 99 KiB of sm_86, the smallest target that runs sm_80 code."""
    run_cases(driver, [f"{case} shared=99" for case in EVERY_KERNEL])


def test_too_little_shared_memory_is_an_error_of_the_launch(driver: Path) -> None:
    assert run_driver(driver, ["dtype=fp16 D=256 N=64 n=64 shared=98"]) == (1, "status=1 dtype=fp16 D=256 N=64 n=64 shared=98\n")


def error_codes() -> dict[str, int]:
    """SPECDEC_BAD_...: the number that a launcher returns."""
    header = (CSRC / "tree_attention.h").read_text()
    return {name: int(code) for name, code in re.findall(r"SPECDEC_(BAD_\w+) = (-\d+)", header)}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("struct_size:8", "BAD_STRUCT_SIZE"), ("dtype:3", "BAD_DTYPE"), ("batch:0", "BAD_BATCH"), ("batch:65536", "BAD_BATCH"),
        ("query_heads:3", "BAD_QUERY_HEADS"), ("kv_heads:0", "BAD_KV_HEADS"), ("nodes:0", "BAD_NODES"), ("nodes:257", "BAD_NODES"),
        ("slots:0", "BAD_SLOTS"), ("head_dim:80", "BAD_HEAD_DIM"), ("query:0", "BAD_QUERY"), ("query:8", "BAD_QUERY"),
        ("query_strides:65", "BAD_QUERY"), ("key_cache:0", "BAD_KEY_CACHE"), ("key_strides:68", "BAD_KEY_CACHE"),
        ("value_cache:2", "BAD_VALUE_CACHE"), ("value_strides:1", "BAD_VALUE_CACHE"), ("prefix_lengths:0", "BAD_PREFIX_LENGTHS"),
        ("node_counts:0", "BAD_NODE_COUNTS"), ("ancestor_mask:0", "BAD_ANCESTOR_MASK"), ("depths:0", "BAD_DEPTHS"),
        ("scale:nan", "BAD_SCALE"), ("softcap:-1", "BAD_SOFTCAP"), ("softcap:inf", "BAD_SOFTCAP"), ("window:-1", "BAD_WINDOW"),
        ("output:0", "BAD_OUTPUT"), ("output:4", "BAD_OUTPUT"), ("lse:2", "BAD_LSE"), ("workspace:0", "BAD_WORKSPACE"), ("workspace:8", "BAD_WORKSPACE"),
        ("workspace_size:2079", "BAD_WORKSPACE"), ("num_splits:-1", "BAD_NUM_SPLITS"), ("num_splits:129", "BAD_NUM_SPLITS"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(driver: Path, change: str, code: str) -> None:
    fine = "dtype=bf16 D=64 Hq=2 Hkv=2 N=2 P=9 n=2 splits=2"  # 2080 bytes of workspace
    status, output = run_driver(driver, [f"{fine} set={change}"])
    assert status == 1 and output.startswith(f"status={error_codes()[code]} ")
    assert run_driver(driver, [fine])[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["tsan", "asan"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str) -> None:
    run_cases(build_driver(tmp_path, sanitizer), SMALL)


@pytest.mark.parametrize("nodes", [1, 5, 6, 10, 11, 21, 22, 64, 256])
def test_roofline_counts_the_launchers_tiles(driver: Path, nodes: int) -> None:
    launch = launches(driver, [f"dtype=bf16 D=64 Hq=3 Hkv=1 N={nodes} n=1 P=3"])
    assert packed_rows(Shape("", 3, 1, 64), nodes)[1] == next(iter(launch.values())).tiles


# --- with nvcc --------------------------------------------------------------------------------------------------------------


def build_translated(folder: Path, driver: Path, kernels: list[str], ptx: str) -> Path:
    """The driver, with these kernels as translated from PTX in the place of those that g++ compiled."""
    sources = []
    for i, kernel in enumerate(kernels):
        sources.append(folder / f"kernel{i}.cpp")
        sources[-1].write_text(translate(ptx, kernel))
    return build_driver(folder, kernels=("-O0",), extra=tuple(sources), like=driver)


@needs_nvcc
@pytest.mark.slow
def test_translated_ptx(tmp_path: Path, driver: Path) -> None:
    """nvcc's PTX of every kernel computes what float64 does."""
    kernels = list(launches(driver, EVERY_KERNEL))
    program = build_translated(tmp_path, driver, kernels, compile_ptx(tmp_path))
    assert {launch.kind for launch in launches(program, EVERY_KERNEL).values()} == {"ptx"} and len(kernels) == KERNELS
    run_cases(program, EVERY_KERNEL)
    run_cases(program, SMALL)
    run_cases(program, grid(1, 7) + grid(20, 29) + grid(33, 31) + grid(64, 97))


def test_unknown_ptx_is_refused() -> None:
    ptx = ".visible .entry f(\n.param .b8 f_param_0[8]\n)\n{\n.reg .b32 %r<3>;\nbrev.b32 %r1, %r2;\n}\n"
    with pytest.raises(NotImplementedError, match=r"PTX opcode brev.b32 _r1, _r2"):
        translate(ptx, "f")


@needs_nvcc
def test_nvcc_tells_where_its_toolkit_is() -> None:
    assert (toolkit_root(find_nvcc() or "") / "include/cuda_runtime.h").exists()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Report]]:
    return compile_code(tmp_path_factory.mktemp("nvcc"))


@needs_nvcc
@pytest.mark.slow
def test_no_spills_no_stack_and_enough_blocks(driver: Path, compiled: tuple[Path, list[Report]]) -> None:
    """Every kernel on every target: registers suffice, shared memory fits, and two blocks share a multiprocessor up to D = 128."""
    shared = launches(driver, EVERY_KERNEL)
    reports = compiled[1]
    assert sorted((r.architecture, r.kernel) for r in reports) == sorted(itertools.product(ARCHITECTURES, shared))
    for report in reports:
        check_report(report, shared[report.kernel].shared)


def check_report(report: Report, shared: int) -> None:
    assert (report.stack, report.spills) == (0, 0), report
    needed = 1 if "Li256E" in report.kernel else 2
    target = TARGETS[report.architecture]
    assert shared <= target.block and target.blocks(report.registers, shared) >= needed, report
    if report.architecture == 80:
        assert shared <= TARGETS[86].block and TARGETS[86].blocks(report.registers, shared) >= 1, report


@needs_nvcc
@needs_disassembler
@pytest.mark.slow
def test_machine_code(compiled: tuple[Path, list[Report]]) -> None:
    """Tensor cores, matrix loads and asynchronous 16-byte copies are there; nothing goes to local memory."""
    code = machine_code(compiled[0])
    assert len(code) == KERNELS * len(ARCHITECTURES)
    for (architecture, kernel), text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), (architecture, kernel)
        assert ("LDGSTS.E.BYPASS.128" in text) == ("attend" in kernel), (architecture, kernel)
        for instruction in (r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M88\.4", r"\bLDSM\.16\.MT88\.4"):
            assert bool(re.search(instruction, text)) == ("attend_mma" in kernel), (architecture, kernel, instruction)


@needs_nvcc
@pytest.mark.slow
def test_on_a_gpu(tmp_path: Path) -> None:
    program = compile_driver(tmp_path)
    status, output = run_driver(program, SMALL)
    if status == 2 and "driver: CUDA error" in output:
        pytest.skip(f"no GPU: compiled and linked by nvcc, and refused with {output.strip()!r}")
    assert status == 0, output
    run_cases(program, [*EVERY_KERNEL, *grid(1, 1), *grid(20, 1), *grid(33, 1), *grid(64, 1), *grid(256, 5)])


# --- planted bugs -----------------------------------------------------------------------------------------------------------


# layer: the comparison with float64, a check of the simulator, a sanitizer, the PTX route, ptxas
MUTATIONS = [
    Mutation("float64", "keys are used before all have arrived", "__syncthreads();  // the keys have arrived, and nobody reads the other stage any more", ""),
    Mutation("float64", "values are used before all have arrived", "__syncthreads();  // the values have arrived\n", "\n"),
    Mutation("float64", "the fp32 kernel overwrites keys in use", "__syncthreads();  // the values and this warp's", "//"),
    Mutation("float64", "one group of copies too few is waited for", "cp_async_wait<1>();", "cp_async_wait<2>();"),
    Mutation("float64", "the result overwrites values in use", "__syncthreads();  // the stages give", "//"),
    Mutation("float64", "values are not transposed", "ldmatrix_transposed(v,", "ldmatrix(v,"),
    Mutation("float64", "the slot past the end is read", "source(min(r, valid - 1)) + d, r < valid", "source(min(r, valid)) + d, r <= valid"),
    Mutation("float64", "slots past the end are seen", "bits &= (1u << (t.end - key)) - 1", "bits &= kAllLanes"),
    Mutation("float64", "the window is one slot wider", "min(depth - p.window + 1 - offset", "min(depth - p.window - offset"),
    Mutation("float64", "near ancestors only matter in deep trees", "if (depth >= p.window) {", "if (depth > p.window) {"),
    Mutation("float64", "exp(-inf + inf)", "(m == -kInfinity ? 0 : m)", "m"),
    Mutation("float64", "heads and nodes are swapped", "(first + r) % a.groups", "(first + r) / a.groups % a.groups"),
    Mutation("float64", "the sum of half a row is forgotten", "l[half] += __shfl_xor_sync(kAllLanes, l[half], 2);", ""),
    Mutation("float64", "rows without a node are merged", "? a.splits : 0", "? a.splits : a.splits"),
    Mutation("float64", "the mask's words are not joined", "word + 1 < words ? static_cast<uint32_t>(mask[word + 1])", "false ? 0"),
    Mutation("simulator", "a collective that half of a warp skips", "if (n % 4 == 0) bits", "if (lane < 16) __syncwarp(); if (n % 4 == 0) bits"),
    Mutation("simulator", "a barrier that a warp without rows skips", "__syncthreads();  // the values have arrived\n", "if (warp.works) __syncthreads();\n"),
    Mutation("simulator", "shared memory beyond 48 KiB is not asked for", "if (shared_bytes > 48 * 1024)", "if (shared_bytes > 480 * 1024)"),
    Mutation("simulator", "64 keys a tile at D = 256", "kKeys = D == 256 ? 32 : 64", "kKeys = 64"),
    Mutation("tsan", "all lanes of a row write its sum", "if (column == 0) parts.m", "parts.m"),
    Mutation("asan", "shared memory is 32 bytes short", "MmaShape<D, kRowWarps>::kSharedBytes", "MmaShape<D, kRowWarps>::kSharedBytes - 32"),
    Mutation("asan", "the word behind the mask is read", "word + 1 < words ?", "true ?"),
    Mutation("ptx", "operands of mma are swapped", "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}", "f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}"),
    Mutation("ptx", "ldmatrix lacks its .trans", "m8n8.x4.trans.shared", "m8n8.x4.shared"),
    Mutation("ptx", "halves are packed the wrong way round", "cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1"),
    Mutation("ptx", "cp.async copies zeros for data and data for zeros", "(valid ? 16 : 0)", "(valid ? 0 : 16)"),
    Mutation("ptx", "cp.async.wait_group waits for one group too few", '"n"(kPending)', '"n"(kPending + 1)'),
    Mutation("static", "registers for four blocks a multiprocessor", "D <= 128 ? 2 : 1", "4"),
    Mutation("static", "the query has shared memory of its own", "(kQueryInRegisters ? 0 : kQueryBytes)", "kQueryBytes"),
]  # fmt: skip


CATCHES: dict[str, Callable[[int, str], bool]] = {
    "float64": lambda status, output: status == 1 and "WRONG" in output,
    "simulator": lambda status, output: status == 3 or (status == 1 and "status=1 " in output),
    "tsan": lambda status, output: "ThreadSanitizer: data race" in output,
    "asan": lambda status, output: "AddressSanitizer: heap-buffer-overflow" in output,
}


def planted(*layers: str) -> pytest.MarkDecorator:
    chosen = [mutation for mutation in MUTATIONS if mutation.layer in layers]
    return pytest.mark.parametrize("mutation", chosen, ids=lambda mutation: f"{mutation.layer}: {mutation.name}")


@pytest.mark.slow
@planted(*CATCHES)
def test_planted_bug_is_caught(tmp_path: Path, driver: Path, mutation: Mutation) -> None:
    sanitizer = mutation.layer if mutation.layer in ("tsan", "asan") else ""
    like = None if sanitizer else driver
    program = build_driver(tmp_path, sanitizer, mutate(tmp_path, mutation, "cuda/*"), kernels=("-O0",), like=like)
    status, output = run_driver(program, SMALL)
    assert CATCHES[mutation.layer](status, output), f"{mutation.layer} let it pass: {status}\n{output[-2000:]}"


@needs_nvcc
@pytest.mark.slow
@planted("ptx")
def test_planted_bug_is_caught_in_the_ptx(tmp_path: Path, driver: Path, mutation: Mutation) -> None:
    """Bugs of the inline assembly, which the C++ simulator never sees."""
    wide = ["dtype=bf16 D=64 Hq=2 Hkv=1 N=20 P=130 n=17"]
    kernels = list(launches(driver, wide))
    csrc = mutate(tmp_path, mutation, "cuda/*")
    program = build_translated(tmp_path, driver, kernels, compile_ptx(tmp_path, csrc, ("attend_mma<BFloat16, 64, 4>",)))
    assert CATCHES["float64"](*run_driver(program, wide))


@needs_nvcc
@pytest.mark.slow
@planted("static")
def test_planted_bug_is_caught_by_ptxas(tmp_path: Path, driver: Path, mutation: Mutation) -> None:
    csrc = mutate(tmp_path, mutation, "cuda/*")
    shared = launches(build_driver(tmp_path, csrc=csrc, kernels=("-O0",), like=driver), EVERY_KERNEL)
    _, reports = compile_code(tmp_path, csrc, ("attend_mma<BFloat16, 128, 4>",), (80,))
    with pytest.raises(AssertionError):
        check_report(reports[0], shared[reports[0].kernel].shared)
