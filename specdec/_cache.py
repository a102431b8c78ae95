"""Where specdec keeps what it may rebuild at any time: converted models, measured costs, compiled code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(name: str = "") -> Path:
    """$SPECDEC_CACHE, else specdec in the user's cache, and `name` in it; the folder may not exist yet."""
    base = os.environ.get("SPECDEC_CACHE")
    if base:
        return Path(base).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec" / name
