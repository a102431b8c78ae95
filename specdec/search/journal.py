"""Journal: what a search was asked and told, on disk before it is acted upon, so that kill -9 loses nothing.

Two files: `PATH`, a snapshot written atomically (temporary file, fsync, rename), and `PATH.journal`, one JSON line an event since
then. An event costs O(1) however large the tree; the snapshot is renewed when the journal is as long as the tree, which keeps the
whole cost linear. Events are numbered: those that a snapshot holds already are skipped, so a crash between the two files is
harmless, and so is a last line that was cut. Events survive the death of the process; a power cut may cost those since the snapshot.
`PATH.lock` is held while events are written: of two processes on one checkpoint the second is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

__all__ = ["FORMAT", "Journal", "lock_of", "read_snapshot", "unlock", "write_atomically"]

FORMAT = 3
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


_locks: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()  # one a file: a lock counts its holders in one process


def lock_of(path: Path) -> FileLock:
    """The lock of what belongs to `path`, taken.

    Raises:
        ValueError: another process has it.
    """
    name = path.absolute().with_name(f"{path.name}.lock")
    lock = _locks.get(name)
    if lock is None:
        lock = _locks[name] = FileLock(name, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{path} is in use by another process; fix: wait until it has ended, or another path") from error
    return lock


def unlock(lock: FileLock) -> None:
    """Give a lock back; its file goes with the last holder here."""
    if lock.lock_counter == 1:
        Path(lock.lock_file).unlink(missing_ok=True)  # still held: who has opened this very file is refused
    lock.release()


class Journal:
    """The two files of one search, which are this process's from the first event after a snapshot, or from `load`, to the next
    snapshot."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log = self.path.with_name(f"{self.path.name}.journal")
        self._number = 0  # of the last event
        self._events = 0  # since the snapshot
        self._file: Any = None
        self._end = 0  # of the last whole line
        self._lock: FileLock | None = None
        self._seen: tuple[int, int] | None = None  # the snapshot as it was written or read here

    def exists(self) -> bool:
        """A search was saved here."""
        return self.path.exists()

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The snapshot and the events after it.

        Raises:
            ValueError: not a checkpoint, an event that is damaged or missing, or another process works on it.
        """
        self._take()
        try:
            return self._read()
        except ValueError:
            self.close()
            raise

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        snapshot = read_snapshot(self.path)
        self._seen = _version(self.path)
        self._number = snapshot["events"]
        events, length, last = [], 0, None
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        for place, line in enumerate(lines, 1):
            if place == len(lines) and not line.endswith(b"\n"):
                break  # cut by the death of the process, before anything was done about it
            event = self._parsed(line, place)
            number = event["number"]
            if number > self._number + 1 or (last is not None and number != last + 1):
                raise self._damaged(place, f"event {number} follows {self._number if last is None else last}")
            last, length = number, length + len(line)
            if number > self._number:
                self._number = number
                events.append(event)
        if lines:
            os.truncate(self.log, length)
        self._events = len(events)
        return snapshot, events

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; it is with the operating system on return.

        Raises:
            ValueError: another process works on the search, or has worked on it since the last snapshot.
            OSError: there is no room for it; the event counts as not written.
        """
        if self._file is None:
            self._open()
        line = memoryview(json.dumps({"number": self._number + 1, **event}).encode() + b"\n")
        whole = self._end + len(line)
        try:
            while line:
                line = line[self._file.write(line) :]  # less than all of it where a disk is nearly full
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end = whole
        self._number += 1
        self._events += 1

    def due(self, nodes: int) -> bool:
        """Time for a snapshot of a tree of so many nodes."""
        return self._events >= max(_LEAST_EVENTS, nodes)

    def snapshot(self, state: dict[str, Any]) -> None:
        """Replace the snapshot; the journal starts anew."""
        self._take()
        write_atomically(self.path, json.dumps({"format": FORMAT, "events": self._number, **state}))
        self._seen = _version(self.path)
        self.log.unlink(missing_ok=True)
        self._events = 0
        self.close()

    def close(self) -> None:
        """Let go of the files; the next event opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def _take(self) -> None:
        """Lock the files; they must be as this process left them."""
        if self._lock is None:
            self._lock = lock_of(self.path)
            if self._seen is not None and (not self.exists() or _version(self.path) != self._seen):
                self.close()
                raise ValueError(f"another search has gone on with {self.path}; fix: start from it again")

    def _open(self) -> None:
        self._take()
        self._file = self.log.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)

    def _parsed(self, line: bytes, place: int) -> dict[str, Any]:
        try:
            event = json.loads(line)
            if isinstance(event["number"], int):
                return dict(event)
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(place, str(error)) from error
        raise self._damaged(place, "an event without a number")

    def _damaged(self, place: int, why: str) -> ValueError:
        return ValueError(
            f"{self.log}, line {place} is damaged ({why}); fix: delete the file to go on from the snapshot {self.path} without its "
            "events, or another path"
        )


def _version(path: Path) -> tuple[int, int]:
    """What every write of a snapshot changes."""
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns
