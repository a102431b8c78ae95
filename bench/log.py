"""The rows measured so far, in memory and as JSON lines, so that no exception and no kill loses what was measured.

First line: {"settings": ...}, what every row was measured with. Then one row a line as it is measured, and once {"costs": ...},
what a forward costs here. The rows of one *unit* belong together: a batch of prompts, or in a warm run all prompts of a round, since
what the engines learned is gone with the process. Units that were not finished are run again; their rows are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .metrics import Row

__all__ = ["Log", "read_log"]


class Log:
    """Rows measured so far.

    Args:
        path: file to write, or to go on with; None keeps the rows in memory alone.
        kind: dataclass of a row. `has` and `drop_unfinished` are for bench.run's alone.

    Raises:
        ValueError: the file is no log, or was written under other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], kind: type[Any] = Row) -> None:
        self.path = path
        self.settings = settings
        self.costs: dict[str, Any] = {}
        self.rows: list[Any] = []
        if path is None:
            return
        if path.exists():
            written, self.costs, self.rows = read_log(path, kind)
            if written != settings:
                raise ValueError(
                    f"out must be a new file or one of the same settings, got {path} ({_differences(written, settings)})"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()  # without a line that a kill left half written

    def add(self, rows: list[Any]) -> None:
        """Rows that were just measured; they are on disk when this returns."""
        self.rows += rows
        self._append([asdict(row) for row in rows])

    def note_costs(self, costs: dict[str, Any]) -> None:
        """What a forward costs here, by the engines' cost model; the first note stays."""
        if costs and not self.costs:
            self.costs = costs
            self._append([{"costs": costs}])

    def has(self, unit: Iterable[str], method: str, round_number: int) -> bool:
        """Every task of the unit is there."""
        there = {row.task for row in self.rows if (row.method, row.round) == (method, round_number)}
        return there.issuperset(unit)

    def drop_unfinished(self, units: list[set[str]], methods: list[str], rounds: int) -> None:
        """Drop the rows of units of these methods and rounds that are not complete."""
        for method in methods:
            for number in range(rounds):
                half = set().union(*(unit for unit in units if not self.has(unit, method, number)))
                self.rows = [row for row in self.rows if (row.method, row.round) != (method, number) or row.task not in half]
        self._rewrite()

    def _append(self, records: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))

    def _rewrite(self) -> None:
        """The whole file anew, atomically."""
        if self.path is None:
            return
        records = [{"settings": self.settings}, *([{"costs": self.costs}] if self.costs else []), *map(asdict, self.rows)]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        part.replace(self.path)


def read_log(path: Path, kind: type[Any] = Row) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """(settings, costs, rows) of a file that Log wrote; a last line without its end is left out.

    Raises:
        ValueError: the file is no log.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
        settings = records[0]["settings"]
        costs = next((record["costs"] for record in records if "costs" in record), {})
        return settings, costs, [kind(**record) for record in records[1:] if "costs" not in record]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no log of this benchmark ({type(error).__name__}: {error})") from error


def _differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in changed)
