"""What a figure was measured with: machine, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import specdec

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Facts that the rows of one file share."""
    return {
        "threads": torch.get_num_threads(),
        "machine": _machine(),
        "commit": _commit(),
        "versions": {"specdec": specdec.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _machine() -> str:
    """Processor and cores, as the operating system names them."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None where specdec was installed."""
    root = Path(specdec.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository of another user
        return None
