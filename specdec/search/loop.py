"""The loop between a search and whatever generates: ask, complete, tell. An engine and a mock drive it alike.

`evaluated` is the evaluator's part of it: it asks once more where the evaluator fails, and leaves out texts that need no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from specdec.search.request import Completion, Request, Result
from specdec.search.search import Search

__all__ = ["evaluated", "run"]


def run(search: Search, complete: Callable[[Sequence[Request]], Sequence[Completion]], width: int = 1) -> Result:
    """Drive `search` to its end, `width` requests at a time; what was outstanding at a crash comes first.

    Args:
        complete: generates and scores a batch; one completion a request, in the same order.

    Raises:
        GenerationError: the model failed twice on one request.
        ValueError: `complete` returned another number of completions than it got requests.
    """
    while requests := search.outstanding() or search.ask(width):
        completions = complete(requests)
        if len(completions) != len(requests):
            raise ValueError(f"complete() got {len(requests)} requests and returned {len(completions)} completions")
        for request, completion in zip(requests, completions):
            search.tell(request, completion)
    return search.result()


def evaluated(search: Search, request: Request, completion: Completion, score: Callable[[list[str]], float | None]) -> Completion:
    """`completion` with the score of its steps, `score(steps)` being called twice at the most; None where both calls failed.

    A failure is None, NaN, or one of the exceptions that arithmetic, parsing, timing out and a lost process raise.
    """
    wanted = search.to_score([request], [completion])
    if not wanted:
        return completion
    value: float | None = None
    for _ in range(2):
        try:
            value = score(wanted[0])
        except (ArithmeticError, ValueError, LookupError, TypeError, RuntimeError, OSError):
            value = None
        if value is not None and value == value:  # not NaN
            break
    return replace(completion, score=value)
