"""What the draft sources learned, as a safetensors file: a warm engine survives the process, and the engines of a node share one.

Sharing needs no server: `Engine.share_state` locks the file, takes in what others left there, and leaves what it now knows. What two
engines know is merged by its owners: of a table's row the one written later, of texts each once (ContextTable.merge_state,
BestFirst.merge_state). Any merge is lossless, for nothing of it is ever emitted unverified: it decides about drafts alone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["load_state", "save_state"]

_FORMAT = "1"


def save_state(arrays: dict[str, Any], path: str | Path, method: str, vocab_size: int) -> None:
    """Write the arrays atomically: a reader sees the old file or the new one, never half of one."""
    from safetensors.numpy import save_file

    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, temporary, {"format": _FORMAT, "method": method, "vocab_size": str(vocab_size)})
        _sync(temporary)  # its content is on disk before its name is: a crash of the machine leaves no empty file
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(path: str | Path, method: str, vocab_size: int) -> dict[str, np.ndarray]:
    """Read what save_state wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a specdec state, or one of another method or vocabulary.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"state {str(path)!r} does not exist; fix: write it with Engine.save_state")
    try:
        with safe_open(str(path), framework="np") as file:
            found = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise ValueError(
            f"state {str(path)!r} is not a safetensors file ({error}); fix: write it with Engine.save_state"
        ) from error
    expected = {"format": _FORMAT, "method": method, "vocab_size": str(vocab_size)}
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"state {str(path)!r} has {name} {found.get(name)!r}, this engine has {value!r}; fix: use a state saved by an equal engine"
            )
    return arrays
