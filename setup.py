"""Builds the optional extension specdec._C (csrc/); everything else is in pyproject.toml.

Without a compiler or without torch in the build environment the install goes on in pure Python, with one line that says so:

    pip install --no-build-isolation .     # builds against the torch that is installed
    SPECDEC_NO_EXT=1 pip install .         # pure Python
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
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
TORCH_STABLE_ABI = "0x020a000000000000"  # 2.10, the first with parallel_for


class BuildOptionalExtension(build_ext):
    """Compiles the extension, or says why not and carries on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._point_at_torch(ext)
            super().build_extension(ext)
        except (ImportError, BaseError, CCompilerError, OSError) as error:
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


def extensions() -> list[Extension]:
    if os.environ.get("SPECDEC_NO_EXT") == "1":
        return []
    return [
        Extension(
            "specdec._C",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=["csrc"],
            libraries=["torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_STABLE_ABI)],
            # No contraction and no fast-math: a result must not depend on how the compiler groups operations.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-w"],
            language="c++",
            optional=True,  # an editable install does not miss it
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOptionalExtension})
