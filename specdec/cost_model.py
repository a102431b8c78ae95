"""CostModel: how long one forward takes, and from that the tree size that pays best.

t(rows, nodes, context) is measured at a few sizes with the code path that decodes (drafting.md 5.3): step-wise in nodes (a size
costs what the next measured size costs), linear in context and between row counts; beyond the largest tree and batch it grows in
proportion. The best size of a tree whose m most probable nodes are worth S_m expected tokens is argmax S_m / (t(m) + t_host)
(5.2); only the measured sizes are candidates, since filling a plateau costs nothing. Worked example, t = {1: 20 ms, 8: 24 ms, 16: 40 ms}, S = {1: 1, 8: 1.8, 16: 2.2}: 50, 75 and 55 tokens a second,
so 8 nodes.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from specdec._cache import read_measurement, write_measurement

__all__ = ["CONTEXTS", "NODES", "CostModel"]

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (256, 2048)
_OFTEN = 16  # sizes up to here are timed in every round: most trees are that small, and a few milliseconds decide
_SELDOM = 3  # larger ones in every third
_CONTEXT_STEP = 64
_BATCH = 8  # observations applied together
_RATE = 0.05  # share of one observation, once for all sizes (the machine drifts) and once for its own
_LARGEST_RATIO = 2.0  # one observation counts as at most this far off: an outlier is no trend

Key = tuple[int, int, int]  # (rows, nodes, context)


def _interpolate(points: list[int], values: list[float], at: float) -> float:
    """Linear between the points and beyond the last; constant before the first."""
    if at <= points[0] or len(points) == 1:
        return values[0]
    right = min(bisect_left(points, at), len(points) - 1)
    left = right - 1
    return values[left] + (values[right] - values[left]) * (at - points[left]) / (points[right] - points[left])


class CostModel:
    """Seconds of a forward by (rows, nodes, context), with online refinement.

    Args:
        table: (rows, nodes a row, context) -> seconds; every rows value needs at least one entry.
        host_seconds: host time of one speculative step beside the forward (draft, accept, commit, learn).

    Raises:
        ValueError: an empty table, a size below 1 or a time that is not positive and finite.
    """

    def __init__(self, table: Mapping[Key, float], host_seconds: float = 0.0) -> None:
        if not table:
            raise ValueError("table must hold at least one (rows, nodes, context) -> seconds entry")
        for key, seconds in table.items():
            if len(key) != 3 or min(key[0], key[1]) < 1 or key[2] < 0 or not 0 < seconds < float("inf"):
                raise ValueError(
                    f"table entries are (rows >= 1, nodes >= 1, context >= 0) -> seconds > 0, got {key} -> {seconds}"
                )
        if not 0 <= host_seconds < float("inf"):
            raise ValueError(f"host_seconds must be at least 0, got {host_seconds}")
        self.table = dict(table)
        self.host_seconds = host_seconds
        self._rows = sorted({key[0] for key in table})
        self._sizes = {row: sorted({key[1] for key in table if key[0] == row}) for row in self._rows}
        self._contexts = {key[:2]: sorted(other[2] for other in table if other[:2] == key[:2]) for key in table}
        self._pending: list[tuple[int, int, float]] = []  # (row, bucket, step) of observations that are not in the table yet
        self._curves: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._slopes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def measure(
        cls,
        forward: Callable[[int, int, int], float],
        rows: Seq[int] = (1,),
        nodes: Seq[int] = NODES,
        contexts: Seq[int] = CONTEXTS,
        repeats: int = 9,
        seconds: float = 8.0,
        host_seconds: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> CostModel:
        """Time `forward(rows, nodes, context)`, which returns its own seconds, at every combination of the sizes.

        Every size runs twice (the first warms up); further repeats, round by round so that a slow spell hits all sizes alike,
        as long as `seconds` are not used up (small sizes in every round: two or three samples each mistook a size by a fifth, which
        cost 3 % of the speed). The median counts, and at most that of any larger tree: what a spell of another
        program added to a small size would else never be corrected, for sizes that look dear are not used.
        """
        keys = [(row, node, context) for row in rows for context in contexts for node in nodes]
        begin = clock()
        for key in keys:
            forward(*key)
        samples: dict[Key, list[float]] = {key: [forward(*key)] for key in keys}
        for number in range(1, repeats):
            for key in keys:
                due = key[1] <= _OFTEN or number % _SELDOM == 0
                if due and clock() - begin < seconds:
                    samples[key].append(forward(*key))
        table = {key: float(np.median(times)) for key, times in samples.items()}
        for row, node, context in sorted(keys, key=lambda key: -key[1]):
            larger = [table[row, other, context] for other in nodes if other > node]
            table[row, node, context] = min([table[row, node, context], *larger])
        return cls(table, host_seconds)

    def sizes(self, rows: int = 1) -> list[int]:
        """Node counts that were measured for about this many rows, ascending: the right ends of the plateaus."""
        return self._sizes[self._row_points(rows)[-1]]

    def seconds(self, nodes: int, context: int = 256, rows: int = 1) -> float:
        """Predicted seconds of a forward over `nodes` nodes a row; never falls when nodes grow."""
        points = self._row_points(rows)
        if rows > points[-1]:  # more rows than were measured: what costs is rows x nodes
            return self._row_seconds(points[-1], -(-nodes * rows // points[-1]), context)
        times = [self._row_seconds(point, nodes, context) for point in points]
        return _interpolate(points, times, rows)

    def curve(self, context: int = 256, rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The measured sizes [S] and the seconds of a forward at each [S]; contexts are rounded, and the answer is remembered."""
        rounded = context // _CONTEXT_STEP * _CONTEXT_STEP
        if (rounded, rows) not in self._curves:
            sizes = self.sizes(rows)
            seconds = np.array([self.seconds(size, rounded, rows) for size in sizes])
            self._curves[rounded, rows] = (np.array(sizes), seconds)
        return self._curves[rounded, rows]

    def slopes(self, context: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """For one row, by number of nodes n: seconds of a forward [M + 1], and the least seconds that each node beyond n costs [M + 1].

        Both are 0 where n is no measured size. At a rate of r tokens a second, nodes of a probability of at most r times the
        latter cannot raise it, however many there are: t = {1: 20 ms, 8: 24 ms, 16: 40 ms} has slopes .57, 2 and infinite, so
        that at 75 tokens a second the ninth node must have a probability above .15.
        """
        rounded = context // _CONTEXT_STEP * _CONTEXT_STEP
        if rounded not in self._slopes:
            sizes, seconds = self.curve(context)
            by_nodes, slopes = np.zeros(sizes[-1] + 1), np.zeros(sizes[-1] + 1)
            for place, size in enumerate(sizes):
                larger = (seconds[place + 1 :] - seconds[place]) / (sizes[place + 1 :] - size)
                by_nodes[size], slopes[size] = seconds[place], larger.min(initial=np.inf)
            self._slopes[rounded] = by_nodes, slopes
        return self._slopes[rounded]

    def observe(self, nodes: int, context: int, rows: int, seconds: float) -> None:
        """Learn from one timed forward: a bounded move of the whole table, and of the entries it was predicted from.

        Applied every few calls, so that a step costs microseconds.
        """
        if not seconds > 0:
            return
        row = min(self._row_points(rows), key=lambda point: abs(point - rows))
        if rows > row:  # predicted from the size that has as many nodes in fewer rows
            bucket, predicted = self._bucket(row, -(-nodes * rows // row)), self.seconds(nodes, context, rows)
        else:
            sizes, curve = self.curve(context, rows)
            place = min(int(np.searchsorted(sizes, nodes)), len(sizes) - 1)
            bucket, predicted = int(sizes[place]), float(curve[place]) * max(1.0, nodes / int(sizes[place]))
        ratio = seconds / predicted
        step = min(max(ratio, 1 / _LARGEST_RATIO), _LARGEST_RATIO) ** _RATE
        self._pending.append((row, bucket, step))
        if len(self._pending) >= _BATCH:
            self._apply()

    def _apply(self) -> None:
        for row, bucket, step in self._pending:
            for key in self.table:
                self.table[key] *= step * (step if key[:2] == (row, bucket) else 1.0)
        self._pending.clear()
        self._curves.clear()
        self._slopes.clear()

    def observe_host(self, seconds: float) -> None:
        """Learn the host time of one speculative step."""
        self.host_seconds += _RATE * (min(seconds, 4 * self.host_seconds + 1e-3) - self.host_seconds)

    def best_size(self, expected: np.ndarray, context: int = 256, rows: int = 1) -> tuple[int, float]:
        """(m*, its gain over a plain step) for expected [M], expected[m - 1] = expected tokens of the best m nodes.

        The gain is tokens a second relative to a step of the root alone without drafting; 1.0 for m* = 1.
        """
        sizes, seconds = self.curve(context, rows)
        plain = float(seconds[0]) if sizes[0] == 1 else self.seconds(1, context, rows)
        reached = np.minimum(sizes, len(expected))  # a tree of fewer nodes than the plateau holds costs the plateau
        rates = expected[reached - 1] * plain / (seconds + self.host_seconds)
        rates[reached < 2] = 0.0
        first_beyond = int(np.searchsorted(sizes, len(expected)))
        rates[first_beyond + 1 :] = 0.0
        best = int(np.argmax(rates))
        return (int(reached[best]), float(rates[best])) if rates[best] > 1.0 else (1, 1.0)

    def save(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        """Write the table under `fingerprint` (model, device, dtype, threads ...) beside those of other machines; atomic."""
        table = [[*key, seconds] for key, seconds in sorted(self.table.items())]
        write_measurement(Path(path), fingerprint, {"host_seconds": self.host_seconds, "table": table})

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str) -> CostModel | None:
        """The table saved under `fingerprint`, or None: measure then."""
        stored = read_measurement(Path(path), fingerprint)
        if stored is None:
            return None
        return cls({(int(r), int(n), int(c)): float(t) for r, n, c, t in stored["table"]}, float(stored["host_seconds"]))

    def _row_points(self, rows: int) -> list[int]:
        """The one or two measured row counts that `rows` is predicted from."""
        right = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        return self._rows[right : right + 1] if self._rows[right] == rows or right == 0 else self._rows[right - 1 : right + 1]

    def _bucket(self, row: int, nodes: int) -> int:
        sizes = self._sizes[row]
        return sizes[min(bisect_left(sizes, nodes), len(sizes) - 1)]

    def _row_seconds(self, row: int, nodes: int, context: int) -> float:
        """Running maximum over the sizes up to the bucket; beyond the largest measured size, linear in nodes."""
        bucket = self._bucket(row, nodes)
        best = 0.0
        for size in self._sizes[row]:
            if size <= bucket:
                points = self._contexts[row, size]
                best = max(best, _interpolate(points, [self.table[row, size, point] for point in points], context))
        return best * max(1.0, nodes / bucket)
