"""Builds the kernels of csrc/cuda for the simulator: g++ instead of nvcc, sim.h instead of a GPU, driver.cpp as the program."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SIM = Path(__file__).parent
CSRC = SIM.parents[1] / "csrc"
SANITIZERS = {"": [], "tsan": ["-fsanitize=thread"], "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed; its messages are in the error otherwise."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def build_driver(
    folder: Path,
    sanitizer: str = "",
    csrc: Path = CSRC,
    kernels: tuple[str, ...] = (),
    extra: tuple[Path, ...] = (),
    like: Path | None = None,
) -> Path:
    """Compiles `csrc` and the simulator in `folder`, with a sanitizer ("", "tsan", "asan"), and returns the program.

    The runtime itself is never instrumented (see runtime.cpp); it is told which sanitizer follows its fibers. `kernels` are
    compiler options for the kernels alone, `extra` further sources. All but kernels is taken over from `like`, a program built
    before with the same sanitizer.
    """
    common = [os.environ.get("CXX", "g++"), "-std=c++20", "-g1", "-w", "-ffp-contract=off", f"-I{SIM}", f"-I{csrc}"]
    define = [f"-DSIM_{sanitizer.upper()}"] if sanitizer else []
    checks = SANITIZERS[sanitizer]
    compilations = {
        SIM / "runtime.cpp": ["-O3", *define],
        csrc / "cuda/tree_attention_launch.cu": ["-x", "c++", "-O1", *checks, *kernels],
        SIM / "driver.cpp": ["-O2"],
        **{source: ["-O1", *kernels] for source in extra},
    }
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{source.stem}.o" for source in compilations}
    if like is not None:
        for source in (SIM / "runtime.cpp", SIM / "driver.cpp"):
            del compilations[source]
            objects[source] = like.parent / f"{source.stem}.o"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run(*common, *compilations[source], "-c", source, "-o", objects[source]), compilations))
    program = folder / "driver"
    run(common[0], *checks, "-rdynamic", *objects.values(), "-ldl", "-o", program)
    return program


def build_library(folder: Path) -> Path:
    """The launcher over the simulator as a shared library, to be called through ctypes with tensors of Python's."""
    library = folder / "libspecdec_cuda_sim.so"
    launcher = ("-x", "c++", CSRC / "cuda/tree_attention_launch.cu")
    options = ("-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared", f"-I{SIM}")
    run(os.environ.get("CXX", "g++"), *options, SIM / "runtime.cpp", *launcher, "-ldl", "-o", library)
    return library


def run_driver(program: Path, cases: list[str], **environment: str) -> tuple[int, str]:
    """Exit status (0: all correct, 1: some wrong, 3: the simulator stopped it, else a sanitizer) and all output."""
    settings = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    done = subprocess.run(
        [str(program)],
        input="\n".join(cases) + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, **settings, **environment},
    )
    return done.returncode, done.stdout + done.stderr
