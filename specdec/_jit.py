"""numba where it is installed, plain Python where it is not: the same functions, only slower.

`njit` compiles on first use and keeps the machine code on disk, so that only the very first process ever pays for it. A
read-only install keeps the code in the user's cache folder; a machine where no folder can be written compiles in memory.

It is for functions that make no arrays (numba refuses to compile them otherwise): they only borrow those they are given, and
counting references to them would take half of their time. `njit_allocating` is for the few that need room of their own.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec._cache import cache_folder

__all__ = ["HAVE_NUMBA", "njit", "njit_allocating"]


def _cache_folder() -> Path:
    """A folder of its own for every version of the sources.

    numba keys a cached function by the file that defines it alone, so a change in another file, inlined into it, would go on
    running as old machine code.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return cache_folder("numba") / digest.hexdigest()[:12]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


try:
    if os.environ.get("SPECDEC_NO_NUMBA") == "1":
        raise ImportError("SPECDEC_NO_NUMBA=1")
    import numba

    HAVE_NUMBA = True
except ImportError as error:  # pragma: no cover - exercised by a subprocess test
    HAVE_NUMBA = False
    warnings.warn(
        f"specdec: numba is not available ({error}); drafting runs in plain Python and is many times slower. "
        "Fix: pip install numba",
        stacklevel=2,
    )

if HAVE_NUMBA:
    if "NUMBA_CACHE_DIR" not in os.environ and _writable(_folder := _cache_folder()):
        numba.config.CACHE_DIR = str(_folder)
        _CACHE = True
    else:
        _CACHE = "NUMBA_CACHE_DIR" in os.environ and _writable(Path(os.environ["NUMBA_CACHE_DIR"]))

    def njit_allocating(function: Callable[..., Any]) -> Callable[..., Any]:
        """numba.njit with an on-disk cache, without the GIL, without fast-math."""
        return numba.njit(cache=_CACHE, nogil=True)(function)

    def njit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The same without numba's runtime of reference counts (its option `_nrt`)."""
        return numba.njit(cache=_CACHE, nogil=True, _nrt=False)(function)

else:

    def njit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself: numba is missing."""
        return function

    njit_allocating = njit
