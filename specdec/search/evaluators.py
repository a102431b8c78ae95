"""Evaluators: how good is a chain of steps, from 0 to 1. The protocol, its combinators, and `Judge`, which survives their failures.

An evaluator is any callable `(problem, steps) -> score`, with `steps` the texts from the first to the newest; it may return
`Score(value, tokens)` to report the tokens that its model read or wrote. One that can score many chains at once has a method
`batch([(problem, steps), ...]) -> [score, ...]` beside it, one that knows its price beforehand `cost(problem, steps) -> tokens`::

    evaluator = weighted({ChainArithmetic(): 3, cached(YesNo(...)): 1})
    Judge(evaluator)("2 + 2?", ["2 + 2 = 5"])    -> Outcome(score=0.05, tokens=57, error=None)

Exact checkers are in `checkers`, those that ask a model in `model_evaluators`.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from specdec.search.worker import Worker

__all__ = [
    "Evaluator", "Item", "Judge", "Outcome", "Score", "cached", "mean", "minimum", "noisy", "product", "score_all", "timeout",
    "weighted",
]  # fmt: skip


class Score(NamedTuple):
    """An evaluation and its price."""

    value: float  # in [0, 1]
    tokens: int = 0  # that the evaluator's model read and wrote


Evaluator = Callable[[Any, Seq[str]], "float | Score"]
Item = tuple[Any, Seq[str]]  # problem, steps


def score_all(evaluator: Evaluator, items: Seq[Item]) -> list[Any]:
    """What the evaluator says of each item, in one call where it has `batch`."""
    batch = getattr(evaluator, "batch", None)
    return [evaluator(*item) for item in items] if batch is None else list(batch(items))


def as_score(said: Any) -> Score:
    """What an evaluator returned as a Score.

    Raises:
        ValueError: None or NaN.
        TypeError: no number.
    """
    value, tokens = said if isinstance(said, tuple) else (said, 0)
    if value is None or math.isnan(float(value)):
        raise ValueError(f"the evaluator returned {value}")
    return Score(float(value), int(tokens))


# ---- failures -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one evaluation."""

    score: float | None  # in [0, 1]; None: unscored, the evaluator failed twice
    tokens: int  # of both calls
    error: str | None = None  # why it is unscored


class Judge:
    """An evaluator whose failures are outcomes.

    NaN, None and exceptions are retried once, then the chain is unscored; values outside [0, 1] are clamped, with one warning.

    Args:
        evaluator: any.
        max_failures: unscored chains in a row after which `broken` is True, and a search should do without.

    Attributes:
        failures: unscored chains in a row.
        tokens: of all evaluations.
    """

    def __init__(self, evaluator: Evaluator, max_failures: int = 3) -> None:
        if not callable(evaluator):
            raise ValueError(f"evaluator must be callable, (problem, steps) -> score in [0, 1], got {evaluator!r:.80}")
        if max_failures < 1:
            raise ValueError(f"max_failures must be >= 1, got {max_failures}")
        self.evaluator, self.max_failures = evaluator, max_failures
        self.failures = self.tokens = 0
        self._warned = False

    @property
    def broken(self) -> bool:
        """The last `max_failures` chains could not be scored."""
        return self.failures >= self.max_failures

    def __call__(self, problem: Any, steps: Seq[str], max_tokens: int | None = None) -> Outcome:
        """Evaluate one chain; `max_tokens` bounds both calls together: beyond it an evaluator that knows its cost is not asked, and
        of one that does not the score is refused."""
        return self._counted(self._alone((problem, steps), max_tokens, attempts=2))

    def batch(self, items: Seq[Item], max_tokens: int | None = None) -> list[Outcome]:
        """Evaluate many chains, in one call where the evaluator can; `max_tokens` holds for each."""
        if len(items) < 2 or max_tokens is not None or not hasattr(self.evaluator, "batch"):
            return [self(*item, max_tokens=max_tokens) for item in items]
        try:
            said = score_all(self.evaluator, items)
        except Exception:  # evaluators are anybody's code; one bad chain must not cost the others their score
            said = [None] * len(items)
        said += [None] * (len(items) - len(said))
        return [self._counted(self._checked(each) or self._alone(item, None, attempts=1)) for item, each in zip(items, said)]

    def _alone(self, item: Item, max_tokens: int | None, attempts: int) -> Outcome:
        tokens, error = 0, ""
        price = getattr(self.evaluator, "cost", lambda *_: 0)
        for _ in range(attempts):
            needed = tokens
            try:
                needed += price(*item)
                if max_tokens is not None and needed > max_tokens:
                    return Outcome(None, tokens, error or f"an evaluation costs {needed} tokens, {max_tokens} are allowed")
                score = as_score(self.evaluator(*item))
            except Exception as failure:  # evaluators are anybody's code, and raise whatever they like
                error = f"{type(failure).__name__}: {failure}"
                tokens = needed
                continue
            if max_tokens is not None and tokens + score.tokens > max_tokens:
                return self._overspent(tokens + score.tokens, max_tokens)
            return Outcome(self._clamped(score.value), tokens + score.tokens)
        return Outcome(None, tokens, error)

    def _overspent(self, tokens: int, allowed: int) -> Outcome:
        """The limit is hard: what was spent beyond it is not counted, and bought nothing."""
        error = (
            f"the evaluator spent {tokens} tokens, {allowed} are allowed; fix: a method cost(problem, steps) that says so beforehand, "
            "or a higher evaluator_max_tokens"
        )
        self._warn(error)
        return Outcome(None, allowed, error)

    def _checked(self, said: Any) -> Outcome | None:
        try:
            score = as_score(said)
        except (TypeError, ValueError):
            return None
        return Outcome(self._clamped(score.value), score.tokens)

    def _clamped(self, value: float) -> float:
        if not 0 <= value <= 1:
            self._warn(f"the evaluator gave {value:g}: scores are clamped to [0, 1]")
        return min(1.0, max(0.0, value))

    def _warn(self, message: str) -> None:
        """The first time alone."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=6)

    def _counted(self, outcome: Outcome) -> Outcome:
        self.failures = self.failures + 1 if outcome.score is None else 0
        self.tokens += outcome.tokens
        return outcome


# ---- combinators ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """Several evaluators and a function of their values."""

    parts: tuple[Evaluator, ...]
    join: Callable[[list[float]], float]

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        return self.batch([(problem, steps)])[0]

    def batch(self, items: Seq[Item]) -> list[Score]:
        columns = [[as_score(said) for said in score_all(part, items)] for part in self.parts]
        return [Score(self.join([s.value for s in row]), sum(s.tokens for s in row)) for row in zip(*columns)]

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return sum(_cost(part, problem, steps) for part in self.parts)


def mean(*evaluators: Evaluator) -> Evaluator:
    """The arithmetic mean."""
    return _Joined(_some(evaluators), fmean)


def minimum(*evaluators: Evaluator) -> Evaluator:
    """The worst of them."""
    return _Joined(_some(evaluators), min)


def product(*evaluators: Evaluator) -> Evaluator:
    """All must agree."""
    return _Joined(_some(evaluators), math.prod)


def weighted(weights: Mapping[Evaluator, float]) -> Evaluator:
    """The weighted mean.

    Raises:
        ValueError: a weight that is negative or not finite, or none above 0.
    """
    shares = list(weights.values())
    if any(not math.isfinite(share) or share < 0 for share in shares) or not sum(shares) > 0:
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {shares}")
    return _Joined(tuple(weights), partial(fmean, weights=shares))


@dataclass(frozen=True)
class _Wrapped:
    """One evaluator, changed."""

    inner: Evaluator

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return _cost(self.inner, problem, steps)


@dataclass(frozen=True)
class cached(_Wrapped):
    """Remember the last `size` scores; a score that is remembered costs no tokens. Failures are not remembered."""

    size: int = 4096

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be >= 1, got {self.size}")
        object.__setattr__(self, "_known", OrderedDict())

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        return self.batch([(problem, steps)])[0]

    def batch(self, items: Seq[Item]) -> list[Score]:
        known: OrderedDict[bytes, float] = self._known  # type: ignore[attr-defined]
        keys = [_digest(*item) for item in items]
        new = {key: item for key, item in zip(keys, items) if key not in known}
        tokens = {}
        for key, said in zip(new, score_all(self.inner, list(new.values())) if new else []):
            known[key], tokens[key] = as_score(said)
        scores = [Score(known[key], tokens.pop(key, 0)) for key in keys]
        while len(known) > self.size:
            known.popitem(last=False)
        return scores

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return 0 if _digest(problem, steps) in self._known else _cost(self.inner, problem, steps)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class noisy(_Wrapped):
    """An evaluator that is wrong now and then, for experiments: with this probability it says 1 - score.

    The same chain gets the same answer, whatever the order.

    Raises:
        ValueError: `flip` outside [0, 1].
    """

    flip: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        return self.batch([(problem, steps)])[0]

    def batch(self, items: Seq[Item]) -> list[Score]:
        scores = [as_score(said) for said in score_all(self.inner, items)]
        return [Score(1 - s.value, s.tokens) if self._flips(item) else s for item, s in zip(items, scores)]

    def _flips(self, item: Item) -> bool:
        return int.from_bytes(_digest(self.seed, *item)[:7], "big") < self.flip * 2**56


class timeout:
    """An evaluator bounded in time: it runs in a process of its own, which is killed when it takes longer than `seconds`.

    Args:
        evaluator: defined in a module, and picklable.

    Raises:
        ValueError: it cannot go to another process.
    """

    def __init__(self, evaluator: Evaluator, seconds: float) -> None:
        self._inner = evaluator
        self._worker = Worker(_Plain(evaluator), seconds)

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        """The evaluator's score.

        Raises:
            TimeoutError: it took too long.
            WorkerError: it raised.
        """
        return Score(*self._worker(problem, list(steps)))

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return _cost(self._inner, problem, steps)

    def close(self) -> None:
        """End the process."""
        self._worker.close()


@dataclass(frozen=True)
class _Plain:
    """Scores as JSON can carry them."""

    inner: Evaluator

    def __call__(self, problem: Any, steps: Seq[str]) -> list[float]:
        return list(as_score(self.inner(problem, steps)))


def _some(evaluators: tuple[Evaluator, ...]) -> tuple[Evaluator, ...]:
    if not evaluators:
        raise ValueError("there must be at least one evaluator to combine, got none")
    return evaluators


def _cost(evaluator: Evaluator, problem: Any, steps: Seq[str]) -> int:
    price = getattr(evaluator, "cost", None)
    return 0 if price is None else int(price(problem, steps))


def _digest(*parts: Any) -> bytes:
    """The same bytes for the same values, in every process."""
    parts = tuple(
        part if isinstance(part, (str, int)) else list(part) if isinstance(part, (list, tuple)) else repr(part) for part in parts
    )
    return hashlib.blake2b(pickle.dumps(parts, protocol=4)).digest()
