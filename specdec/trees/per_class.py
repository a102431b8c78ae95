"""PerClass: something learned for each class of requests whose acceptance is alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from specdec.sequence import SamplingParams

__all__ = ["PerClass"]

T = TypeVar("T")
MOST = 32  # classes kept, the oldest goes first


class PerClass(Generic[T]):
    """Greedy requests are one class, and those of about equal temperature and cuts are."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._of: dict[tuple[float, ...], T] = {}

    def __getitem__(self, params: SamplingParams) -> T:
        key = _class(params)
        if key not in self._of:
            self[params] = self._make()
        return self._of[key]

    def __setitem__(self, params: SamplingParams, value: T) -> None:
        while len(self._of) >= MOST:
            del self._of[next(iter(self._of))]
        self._of[_class(params)] = value

    def clear(self) -> None:
        self._of.clear()


def _class(params: SamplingParams) -> tuple[float, ...]:
    if params.temperature == 0:
        return (0.0,)
    return (round(params.temperature, 1), float(params.top_k), round(params.top_p, 1), round(params.min_p, 1))
