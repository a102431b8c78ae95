"""Builds the optional extension specdec._C (csrc/) and names the packages; everything else is in pyproject.toml.

Without a compiler or without torch in the build environment the install goes on in pure Python, with one line that says so:

    pip install --no-build-isolation .     # builds against the torch that is installed
    SPECDEC_NO_EXT=1 pip install .         # pure Python

SPECDEC_CUDA=0|1|auto (auto: with a CUDA build of torch and an nvcc) links the CUDA kernels of csrc/cuda, for the architectures of
SPECDEC_CUDA_ARCHS="80;90;100". nvcc is $NVCC or the one in PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = ["csrc/binding.cpp", "csrc/cpu/linear.cpp", "csrc/cpu/tree_attention.cpp"]
HEADERS = [
    "csrc/specdec_linear.h",
    "csrc/tree_attention.h",
    "csrc/cpu/isa.h",
    "csrc/cpu/linear_kernel.h",
    "csrc/cpu/tree_attention_kernel.h",
]
CUDA_SOURCE = "csrc/cuda/tree_attention_launch.cu"
CUDA_HEADERS = ["csrc/cuda/device.cuh", "csrc/cuda/tree_attention_kernel.cuh"]
TORCH_STABLE_ABI = "0x020d000000000000"  # 2.13, the first with a stream's native handle


class BuildOptionalExtension(build_ext):
    """Compiles the extension, or says why not and carries on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._point_at_torch(ext)
            if (nvcc := wanted_nvcc()) is not None:
                self._add_cuda(ext, nvcc)
            super().build_extension(ext)
        except (ImportError, BaseError, CCompilerError, OSError, subprocess.CalledProcessError) as error:
            print(f"specdec: specdec._C is not built ({error}); CPU steps will be slower", file=sys.stderr)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit: torch.ops.load_library loads it

    @staticmethod
    def _point_at_torch(ext: Extension) -> None:
        """torch's folders, imported here: it is no build requirement, which would download it again for each build."""
        try:
            import torch
        except ImportError as error:
            raise ImportError("torch is not in the build environment: use pip install --no-build-isolation") from error
        root = Path(torch.__file__).parent
        ext.include_dirs += [str(root / "include"), str(root / "include/torch/csrc/api/include")]
        ext.library_dirs.append(str(root / "lib"))

    def _add_cuda(self, ext: Extension, nvcc: str) -> None:
        """Compile the kernels with nvcc, which needs no header of torch, and link them and the static CUDA runtime."""
        codes = os.environ.get("SPECDEC_CUDA_ARCHS", "80;90;100").split(";")
        options = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
        target = Path(self.build_temp) / "tree_attention_cuda.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [nvcc, "-std=c++20", "-O3", "-Xcompiler", "-fPIC", *options, "-c", CUDA_SOURCE, "-o", str(target)], check=True
        )
        dryrun = subprocess.run([nvcc, "--dryrun", CUDA_SOURCE], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.M)  # nvcc may be a link or a script; this is where it lives
        if top is None:
            raise OSError(f"{nvcc} --dryrun does not say where its toolkit is")
        root = Path(top[1].strip())
        ext.library_dirs += [str(folder) for folder in (root / "lib64", root / "targets/x86_64-linux/lib") if folder.is_dir()]
        ext.extra_objects.append(str(target))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("SPECDEC_WITH_CUDA", None))


def wanted_nvcc() -> str | None:
    """The nvcc to use, None to build for the CPU alone.

    Raises:
        ValueError: SPECDEC_CUDA=1, but there is no nvcc; SPECDEC_CUDA is none of its values.
    """
    wanted = os.environ.get("SPECDEC_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"SPECDEC_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if wanted == "1":
        if nvcc is None:
            raise ValueError("SPECDEC_CUDA=1 needs nvcc in PATH or in $NVCC")
        return nvcc
    import torch

    return nvcc if torch.version.cuda else None


def extensions() -> list[Extension]:
    if os.environ.get("SPECDEC_NO_EXT") == "1":
        return []
    return [
        Extension(
            "specdec._C",
            sources=SOURCES,
            depends=[*HEADERS, CUDA_SOURCE, *CUDA_HEADERS],
            include_dirs=["csrc"],
            libraries=["torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_STABLE_ABI)],
            # No contraction and no fast-math: a result must not depend on how the compiler groups operations.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-w", "-Wno-psabi"],
            language="c++",
            optional=True,  # an editable install does not miss it
        )
    ]


setup(
    # `specdec bench` of an installed specdec: the folder bench/ ships as specdec.bench, so that no top-level "bench" is installed.
    packages=[*find_packages(include=["specdec*"]), "specdec.bench"],
    package_dir={"specdec.bench": "bench"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOptionalExtension},
)
