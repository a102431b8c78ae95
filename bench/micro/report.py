"""What a saved run of the micro-benchmarks says: `python -m bench.micro.report`, which `make bench-micro` ends with.

Two tables. How the time of each piece grows along each axis, as the exponent e of time ~ axis^e between the last two values: a
piece of which e passes 1 does not scale. And which cases became slower or faster than in the newest earlier run that has them
(or in --against). The least time of a case counts: other load on the machine only adds to it. The last stdout line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.micro.cases import AXES

STEEP = 1.15  # exponents above this are named
console = Console(stderr=True)


class Curve(NamedTuple):
    """Time of one piece along one axis, all else equal."""

    piece: str
    axis: str
    times: dict[float, float]  # value of the axis -> seconds, ascending

    @property
    def exponent(self) -> float:
        """log of the ratio of times by log of the ratio of values, at the upper end."""
        (low, before), (high, after) = list(self.times.items())[-2:]
        return math.log(after / before) / math.log(high / low)


class Change(NamedTuple):
    """One case in two runs, in seconds."""

    name: str
    before: float
    now: float

    @property
    def ratio(self) -> float:
        return self.now / self.before


def least(run: dict[str, Any]) -> dict[str, float]:
    """Case -> least seconds."""
    return {case["name"]: case["stats"]["min"] for case in run["benchmarks"]}


def curves(run: dict[str, Any]) -> list[Curve]:
    """The steepest curve of every piece along every axis of numbers."""
    found: dict[tuple[str, str, tuple[Any, ...]], dict[float, float]] = {}
    for case in run["benchmarks"]:
        params = case["params"] or {}
        variant = [value if isinstance(value, str) else f"{name} {value}" for name, value in params.items() if name not in AXES]
        piece = " ".join([case["name"].split("[")[0].removeprefix("bench_"), *variant])
        for axis in params:
            if axis in AXES and not isinstance(params[axis], str):
                others = tuple(value for name, value in params.items() if name != axis)
                found.setdefault((piece, axis, others), {})[params[axis]] = case["stats"]["min"]
    steepest: dict[tuple[str, str], Curve] = {}
    for (piece, axis, _), times in found.items():
        if len(times) > 1:
            curve = Curve(piece, axis, dict(sorted(times.items())))
            steepest[piece, axis] = max(curve, steepest.get((piece, axis), curve), key=lambda curve: curve.exponent)
    return sorted(steepest.values(), key=lambda curve: curve.piece)


def changes(now: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> list[Change]:
    """Every case of `now` beside its newest time in `earlier`, oldest run first; slowed most first."""
    before: dict[str, float] = {}
    for run in earlier:
        before |= least(run)
    both = [Change(name, before[name], seconds) for name, seconds in least(now).items() if name in before]
    return sorted(both, key=lambda change: -change.ratio)


def show_growth(found: list[Curve]) -> None:
    table = Table("piece", "axis", "us at each value", "exponent")
    for before, curve in pairwise([None, *found]):
        assert curve is not None
        times = "  ".join(f"{value:g}: {1e6 * seconds:.4g}" for value, seconds in curve.times.items())
        mark = "red" if curve.exponent > STEEP else ""
        table.add_row(
            "" if before and before.piece == curve.piece else curve.piece, curve.axis, times, f"{curve.exponent:.2f}", style=mark
        )
    console.print(table)


def show_changes(found: list[Change], threshold: float) -> None:
    table = Table("case", "before, us", "now, us", "now / before")
    for change in found:
        if not 1 / threshold <= change.ratio <= threshold:
            mark = "red" if change.ratio > 1 else "green"
            table.add_row(
                escape(change.name), f"{1e6 * change.before:.4g}", f"{1e6 * change.now:.4g}", f"{change.ratio:.2f}", style=mark
            )
    if table.row_count:
        console.print(table)
    console.print(f"{table.row_count} of {len(found)} cases changed by more than a factor of {threshold:g}")


def saved_runs(folder: Path) -> list[Path]:
    """pytest-benchmark's files, oldest first: machine/0001_commit_time.json."""
    return sorted(folder.glob("*/[0-9]*.json"), key=lambda path: path.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.micro.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".benchmarks"))
    parser.add_argument(
        "--against", default="", help="number of the run to compare with, for example 0003; default: all earlier ones"
    )
    parser.add_argument("--threshold", type=float, default=1.25, help="factor beyond which a change is shown")
    args = parser.parse_args(argv)
    paths = saved_runs(args.folder)
    if not paths:
        parser.error(f"no saved run in {args.folder}; fix: make bench-micro")
    earlier = [path for path in paths[:-1] if path.name.startswith(args.against)]
    if args.against and not earlier:
        parser.error(
            f"--against {args.against}: no such run before {paths[-1].name}; there are {[p.name[:4] for p in paths[:-1]]}"
        )
    now = json.loads(paths[-1].read_text())
    growth, changed = curves(now), changes(now, [json.loads(path.read_text()) for path in earlier])
    show_growth(growth)
    if earlier:
        show_changes(changed, args.threshold)
    steep = {f"{curve.piece}, {curve.axis}": round(curve.exponent, 2) for curve in growth if curve.exponent > STEEP}
    slower = {change.name: round(change.ratio, 3) for change in changed if change.ratio > args.threshold}
    print(json.dumps({"run": paths[-1].name, "cases": len(now["benchmarks"]), "steep": steep, "slower": slower}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
