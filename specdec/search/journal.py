"""Journal: what a search was asked and told, on disk before it is acted upon, so that kill -9 loses nothing.

Two files: `PATH`, a snapshot written atomically (temporary file, fsync, rename), and `PATH.journal`, one JSON line an event since
then. An event costs O(1) however large the tree; the snapshot is renewed when the journal is as long as the tree, which keeps the
whole cost linear. Events are numbered: those that a snapshot holds already are skipped, so a crash between the two files is
harmless, and so is a last line that was cut. Events survive the death of the process; a power cut may cost those since the snapshot.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Journal", "read_snapshot", "write_atomically"]

FORMAT = 1
_LEAST_EVENTS = 256  # between two snapshots


def write_atomically(path: Path, text: str) -> None:
    """`path` holds the old or the new text at every moment, whatever dies."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_snapshot(path: Path) -> dict[str, Any]:
    """The snapshot at `path`.

    Raises:
        ValueError: not a checkpoint, or of a format that this version does not read.
    """
    try:
        snapshot = json.loads(path.read_text(encoding="utf-8"))
        version = snapshot["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a search checkpoint ({error}); fix: another path, or delete it") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; fix: the specdec version that wrote it")
    return dict(snapshot)


class Journal:
    """The two files of one search."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log = self.path.with_name(f"{self.path.name}.journal")
        self._number = 0  # of the last event
        self._events = 0  # since the snapshot
        self._file: Any = None

    def exists(self) -> bool:
        """A search was saved here."""
        return self.path.exists()

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The snapshot and the events after it."""
        snapshot = read_snapshot(self.path)
        self._number = snapshot["events"]
        events, length = [], 0
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        for line in lines:
            if not line.endswith(b"\n"):
                break  # cut by the death of the process, before anything was done about it
            event = json.loads(line)
            length += len(line)
            if event["number"] > self._number:
                self._number = event["number"]
                events.append(event)
        if lines:
            os.truncate(self.log, length)
        self._events = len(events)
        return snapshot, events

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; it is with the operating system on return."""
        if self._file is None:
            self._file = self.log.open("ab", buffering=0)
        self._number += 1
        self._events += 1
        self._file.write(json.dumps({"number": self._number, **event}).encode() + b"\n")

    def due(self, nodes: int) -> bool:
        """Time for a snapshot of a tree of so many nodes."""
        return self._events >= max(_LEAST_EVENTS, nodes)

    def snapshot(self, state: dict[str, Any]) -> None:
        """Replace the snapshot; the journal starts anew."""
        write_atomically(self.path, json.dumps({"format": FORMAT, "events": self._number, **state}))
        self.close()
        self.log.unlink(missing_ok=True)
        self._events = 0

    def close(self) -> None:
        """Let go of the file; the next event opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
