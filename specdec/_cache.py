"""Where specdec keeps what it may rebuild at any time: converted models, measured costs, compiled code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "measurement_file", "read_measurement", "write_measurement"]


def cache_folder(name: str = "") -> Path:
    """$SPECDEC_CACHE, else specdec in the user's cache, and `name` in it; the folder may not exist yet."""
    base = os.environ.get("SPECDEC_CACHE")
    if base:
        return Path(base).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec" / name


def measurement_file(kind: str, fingerprint: str) -> Path:
    """Where in the cache a measurement of this kind, made under this fingerprint (machine, versions, shapes ...), lies."""
    return cache_folder(kind) / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"


def read_measurement(file: Path, fingerprint: str) -> Any:
    """What was written under the fingerprint, or None (no such file, a damaged one): measure then."""
    return _read(file).get(fingerprint)


def write_measurement(file: Path, fingerprint: str, value: Any) -> None:
    """Write the value beside those of other fingerprints, atomically. Raises OSError where the folder cannot be written."""
    stored = {**_read(file), fingerprint: value}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    part.replace(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
