"""How contenders are timed against each other: in turns, so that a slow spell of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

__all__ = ["medians"]


def medians(contenders: dict[str, Callable[[], object]], repeats: int, warm_up: int = 0) -> dict[str, float]:
    """Median seconds of each contender, all called once a round; the first `warm_up` rounds come on top and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warm_up + repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[warm_up:]) for name, times in seconds.items()}
