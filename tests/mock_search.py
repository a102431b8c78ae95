"""A model for search tests: what it says is a pure function of its seed, the request's stream and the parent, so runs can be compared."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from specdec.search import Completion, Finish, Kind, Request, Search

__all__ = ["MockModel", "drive", "fields", "grow", "lines_run"]


@dataclass(frozen=True)
class MockModel:
    """Chances of every thing that may happen to a request; the rest are steps that end where steps end."""

    seed: int = 0
    answer: float = 0.15
    end: float = 0.05
    empty: float = 0.0
    error: float = 0.0
    unscored: float = 0.0
    repeat: float = 0.0  # a text that its siblings may have as well
    longest: int = 12
    evaluator: int = 3  # most tokens of an evaluation

    def __call__(self, request: Request) -> Completion:
        rng = random.Random(f"{self.seed} {request.stream} {request.parent}")
        wanted = rng.randint(1, self.longest) * (6 if request.full else 1)
        count = min(wanted, request.max_tokens)
        if rng.random() < self.error:
            return Completion((), "", error="out of memory", generated=rng.randint(0, count))
        if rng.random() < self.empty:
            return Completion((), "", generated=rng.randint(0, min(1, count)))
        word = 7 if rng.random() < self.repeat else rng.randrange(10**6)
        finish, answer = Finish.STOP, None
        if count < wanted:
            finish = Finish.LENGTH
        elif request.full or rng.random() < self.end:
            finish = Finish.EOS
        if finish != Finish.LENGTH and rng.random() < (0.8 if request.full else self.answer):
            finish, answer = Finish.EOS, str(rng.randrange(4))
        most = self.evaluator if request.evaluator_max_tokens is None else request.evaluator_max_tokens
        score = None if rng.random() < self.unscored else rng.random()
        return Completion(
            (word,) * count,
            f"{word} ",
            finish,
            score,
            answer,
            evaluator_tokens=rng.randint(0, min(self.evaluator, most)),
            prefill_tokens=rng.randint(0, 3),
            cached_tokens=rng.randint(0, 9),
        )


def drive(
    search: Search, model: MockModel, width: int = 1, shuffle: random.Random | None = None, steps: int | None = None
) -> None:
    """Run to the end, or `steps` rounds; results told in a random order where `shuffle` is given."""
    while (steps is None or steps > 0) and (requests := search.outstanding() or search.ask(width)):
        order = list(requests)
        if shuffle is not None:
            shuffle.shuffle(order)
        for request in order:
            search.tell(request, model(request))
        steps = None if steps is None else steps - 1


def fields(search: Search) -> dict[str, object]:
    """Everything that two equal searches share; time and file positions apart."""
    state = search.state()
    state["budget"] = {name: value for name, value in state["budget"].items() if name != "elapsed"}
    return state


def grow(search: Search, nodes: Sequence[tuple[int, float] | tuple[int, float, str]]) -> None:
    """Put (parent, q) or (parent, q, answer) into the tree of a search, one token each, past its policy."""
    for parent, q, *answer in nodes:
        node = search.tree.reserve(parent, Kind.STEP)
        completion = Completion((node,), f"{node} ", Finish.STOP, q, answer[0] if answer else None)
        search.tree.settle(node, 1, completion, "answered" if answer else "open", q)  # type: ignore[arg-type]
        search.policy.told(node)


def lines_run(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs, a comprehension's too: what work costs without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
