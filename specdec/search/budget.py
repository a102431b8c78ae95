"""Budget: the hard token budget of one search, with everything that is metered beside it.

Two ledgers, since one fails either way (reserving expectations breaks the cap, reserving caps drives rho to 0)::

    rho        = 1 - (used + expected tokens of requests in flight) / total, within [0, 1]: what policies anneal by
    available  = total - used - max_tokens of requests in flight - reserve:                 what a new request may be granted

So used <= total whatever the requests return. With total 100, used 40, one request in flight (expected 20, max_tokens 30) and a
reserve of 10 for a forced answer: rho = 0.4, available = 20.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from specdec.search.request import Completion

__all__ = ["Budget", "whole_tokens"]

METERS = ("used", "evaluator_tokens", "prefill_tokens", "cached_tokens", "recomputed_tokens")


class _Flight(NamedTuple):
    """What one request in flight holds."""

    most: int  # tokens that it may cost at the most
    expected: float


class Budget:
    """The ledger of one search.

    Args:
        total: policy output tokens, >= 0.
        reserve: tokens kept for a forced answer; the owner sets it to 0 once there is an answer.
        seconds: wall-clock limit, None: none.
        evaluator_max_tokens: most tokens of one evaluation. With it set, `count_evaluator` charges them to the same budget.
        clock: seconds, monotonic.

    Raises:
        ValueError: `total` negative or no whole number, `seconds` negative, `count_evaluator` without evaluator_max_tokens.
    """

    def __init__(
        self,
        total: int,
        reserve: int = 0,
        seconds: float | None = None,
        count_evaluator: bool = False,
        evaluator_max_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = whole_tokens(total, "budget")
        self.reserve = reserve
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"seconds must be >= 0 or None, got {seconds}")
        if count_evaluator and evaluator_max_tokens is None:
            raise ValueError("count_evaluator=True needs evaluator_max_tokens, the most that one evaluation may cost")
        self.seconds = seconds
        self.count_evaluator = count_evaluator
        self.evaluator_max_tokens = evaluator_max_tokens
        self.used = self.evaluator_tokens = self.prefill_tokens = self.cached_tokens = self.recomputed_tokens = 0
        self._flights: dict[int, _Flight] = {}
        self._held = 0
        self._clock, self._started, self._spent_before = clock, clock(), 0.0

    @property
    def rho(self) -> float:
        """Budget sufficiency in [0, 1]: 1 at the start, 0 when all is spent or in flight."""
        if self.total == 0:
            return 0.0
        return min(1.0, max(0.0, 1.0 - (self.used + self._expected) / self.total))

    @property
    def expected_left(self) -> float:
        """Tokens that will be left, the reserve apart, once what is in flight has come back as expected."""
        return self.total - self.used - self._expected - self.reserve

    @property
    def _expected(self) -> float:
        return sum(flight.expected for flight in self._flights.values())

    @property
    def available(self) -> int:
        """Tokens that a new request may be granted, the reserve left alone; the evaluation of its text comes on top."""
        evaluation = self.evaluator_max_tokens or 0 if self.count_evaluator else 0
        return self.total - self.used - self._held - self.reserve - evaluation

    @property
    def unreserved(self) -> int:
        """Tokens that a forced answer, which is not evaluated, may be granted."""
        return self.total - self.used - self._held

    @property
    def in_flight(self) -> int:
        """Requests asked and not told."""
        return len(self._flights)

    @property
    def elapsed(self) -> float:
        """Seconds spent on this search, in earlier processes too."""
        return self._spent_before + self._clock() - self._started

    @property
    def expired(self) -> bool:
        """True once the wall-clock limit has passed."""
        return self.seconds is not None and self.elapsed >= self.seconds

    def hold(self, request: int, max_tokens: int, expected: float, evaluated: bool = True) -> None:
        """Reserve `max_tokens` (and the evaluation) for a request; `expected` tokens of it enter rho."""
        evaluation = self.evaluator_max_tokens or 0 if self.count_evaluator and evaluated else 0
        flight = _Flight(max_tokens + evaluation, min(expected, max_tokens))
        assert max_tokens >= 1 and flight.most <= self.total - self.used - self._held, "a request beyond the budget"
        self._flights[request] = flight
        self._held += flight.most

    def settle(self, request: int, charged: int, completion: Completion) -> None:
        """Replace the reservation of `request` by what it cost: `charged` output tokens and the meters of its completion."""
        self._held -= self._flights.pop(request).most
        self.used += charged + (completion.evaluator_tokens if self.count_evaluator else 0)
        self.evaluator_tokens += completion.evaluator_tokens
        self.prefill_tokens += completion.prefill_tokens
        self.cached_tokens += completion.cached_tokens
        self.recomputed_tokens += completion.recomputed_tokens

    def extend(self, extra: int) -> None:
        """Add `extra` tokens: rho rises at once.

        Raises:
            ValueError: negative or no whole number.
        """
        self.total += whole_tokens(extra, "extra")

    def state(self) -> dict[str, Any]:
        """JSON types; see `restore`."""
        flights = {str(request): list(flight) for request, flight in self._flights.items()}
        meters = {name: getattr(self, name) for name in METERS}
        limits = {"total": self.total, "reserve": self.reserve, "seconds": self.seconds}
        return {**limits, "elapsed": self.elapsed, "in_flight": flights, **meters}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`; the time between the two does not count."""
        for name in ("total", "reserve", "seconds", *METERS):
            setattr(self, name, state[name])
        self._flights = {int(request): _Flight(*flight) for request, flight in state["in_flight"].items()}
        self._held = sum(flight.most for flight in self._flights.values())
        self.set_elapsed(state["elapsed"])

    def set_elapsed(self, seconds: float) -> None:
        """Count on from `seconds`."""
        self._spent_before, self._started = seconds, self._clock()


def whole_tokens(value: float, name: str) -> int:
    """`value` as an int >= 0, else a ValueError that calls it `name`."""
    if isinstance(value, bool) or not math.isfinite(value) or value < 0 or value != int(value):
        raise ValueError(f"{name} must be a whole number of tokens >= 0, got {value}")
    return int(value)
