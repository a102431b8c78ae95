"""What nvcc makes of csrc/cuda: PTX for ptx.py, ptxas' report and machine code for the static checks."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cuda_sim.build import CSRC, SIM, run

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Target:
    """Shared memory of one architecture, bytes (CUDA C++ programming guide, table of compute capabilities)."""

    block: int  # the most that a block may ask for
    multiprocessor: int
    registers: int = 65536  # of a multiprocessor

    def blocks(self, registers: int, shared: int, threads: int = 128) -> int:
        """How many blocks fit on a multiprocessor: a warp's registers come in 256s, and each block costs 1 KiB of its own."""
        by_registers = self.registers // (threads // 32 * -(-registers * 32 // 256) * 256)
        return min(by_registers, self.multiprocessor // (shared + 1024))


TARGETS = {
    80: Target(163 * 1024, 164 * 1024),
    86: Target(99 * 1024, 100 * 1024),  # runs sm_80 code
    90: Target(227 * 1024, 228 * 1024),
    100: Target(227 * 1024, 228 * 1024),
}


@dataclass(frozen=True)
class Report:
    """One kernel for one architecture, as ptxas -v describes it."""

    kernel: str  # mangled
    architecture: int
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    registers: int  # a thread


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or of a toolkit."""
    installed = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    return str(installed[-1]) if installed else shutil.which(name)


def toolkit_root(nvcc: str) -> Path:
    """nvcc may be a link or a script; what it would run tells where it lives."""
    done = run("sh", "-c", f'"{nvcc}" --dryrun x.cu 2>&1 || true')
    found = re.search(r"^#\$ TOP=(.*)$", done, re.M)
    if not found:
        raise RuntimeError(f"{nvcc} --dryrun names no TOP:\n{done[:500]}")
    return Path(found[1].strip()).resolve()


def _source(folder: Path, csrc: Path, kernels: tuple[str, ...]) -> Path:
    """The launcher with all kernels, or a file with only these: "attend_mma<Half, 64, 1>"."""
    if not kernels:
        return csrc / "cuda/tree_attention_launch.cu"
    lines = [f"template __global__ void {kernel}(Arguments);" for kernel in kernels]
    source = folder / "kernels.cu"
    source.write_text("\n".join([f'#include "{csrc}/cuda/tree_attention_kernel.cuh"', "namespace specdec {", *lines, "}"]))
    return source


def compile_ptx(folder: Path, csrc: Path = CSRC, kernels: tuple[str, ...] = ()) -> str:
    output = folder / "kernels.ptx"
    run(find_nvcc() or "nvcc", "-std=c++20", "-arch=compute_80", "-ptx", _source(folder, csrc, kernels), "-o", output)
    return output.read_text()


def compile_code(
    folder: Path, csrc: Path = CSRC, kernels: tuple[str, ...] = (), architectures: tuple[int, ...] = ARCHITECTURES
) -> tuple[Path, list[Report]]:
    """Machine code for the architectures, and ptxas' report on each kernel."""
    output, log = folder / "kernels.fatbin", folder / "ptxas.log"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    options = ["-std=c++20", *codes, "-Xptxas", "-v", "-fatbin", _source(folder, csrc, kernels), "-o", output]
    run("sh", "-c", '"$@" 2>"$0"', log, find_nvcc() or "nvcc", *options)
    return output, parse_report(log.read_text())


def compile_driver(folder: Path) -> Path:
    """driver.cpp for a real GPU: sm_80 code, and PTX from which later ones make theirs."""
    program = folder / "gpu_driver"
    sources = (SIM / "driver.cpp", CSRC / "cuda/tree_attention_launch.cu")
    run(find_nvcc() or "nvcc", "-std=c++20", "-arch=sm_80", "-x", "cu", *sources, "-o", program)
    return program


def parse_report(log: str) -> list[Report]:
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Report(kernel, int(architecture), int(stack), int(stores) + int(loads), int(registers))
        for kernel, architecture, stack, stores, loads, registers in re.findall(pattern, log, re.S)
    ]


def machine_code(program: Path) -> dict[tuple[int, str], str]:
    """(architecture, mangled kernel) -> its instructions."""
    disassembler = Path(find_tool("nvdisasm") or "nvdisasm").parent  # cuobjdump looks for it in PATH
    path = f"{disassembler}{os.pathsep}{os.environ['PATH']}"
    listing = run(find_tool("cuobjdump") or "cuobjdump", "-sass", program, env={**os.environ, "PATH": path})
    code = {}
    for section in re.split(r"^\s*arch = ", listing, flags=re.M)[1:]:
        architecture = int(re.match(r"sm_(\d+)", section)[1])  # type: ignore[index]
        for function in re.split(r"Function : ", section)[1:]:
            code[architecture, function.split()[0]] = function
    return code
