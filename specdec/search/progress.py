"""What happens in a search, live: the events that a driver reports, and a view of them in the terminal.

A driver calls `on_event(event)` after each request that was told, and once at the end::

    with Progress() as progress:                        # or on_event=print, or events.append
        result = specdec.reason(..., on_event=progress)

Without a terminal (a log file, CI) the view writes a line now and then instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from specdec.search.request import Answer, Status

if TYPE_CHECKING:
    from specdec.search.search import Search
    from specdec.search.search_tree import SearchTree

__all__ = ["Event", "Progress", "event_of", "one_line"]

_ANSWERS, _STEPS = 5, 6  # shown
_PAUSE = 5.0  # seconds between two lines without a terminal


@dataclass(frozen=True)
class Event:
    """The state of a search after one request was told.

    Attributes:
        answers: so far, best first. These and the steps are worked out when they are first read, whatever has been told since, so that
            an event that nobody looks at costs nothing.
        steps: texts of the best path.
    """

    problem: str | int  # which of several searches
    used: int
    budget: int
    nodes: int  # told, dropped ones included
    node: int  # that was told; 0 at the beginning and at the end
    text: str  # of that node
    score: float | None
    notes: tuple[str, ...]
    status: Status | None  # at the end
    _tree: SearchTree = field(repr=False, compare=False)
    _leaf: int = field(repr=False, compare=False)  # the best path's end where there is no answer
    _ranked: Callable[[], list[Answer]] = field(repr=False, compare=False)

    @cached_property
    def answers(self) -> tuple[Answer, ...]:
        return tuple(self._ranked())

    @cached_property
    def steps(self) -> tuple[str, ...]:
        return tuple(self._tree.steps(self.answers[0].node if self.answers else self._leaf))


def event_of(search: Search, node: int = 0, problem: str | int = 0, final: bool = False) -> Event:
    """The event after `node` was told."""
    tree, budget = search.tree, search.budget
    return Event(
        problem, budget.used, budget.total, len(tree) - 1 - budget.in_flight, node, tree.text[node],
        None if node == 0 or tree.unscored[node] else tree.q[node], tuple(search.notes),
        search.result().status if final else None, tree, tree.best_leaf, search.ranking(),
    )  # fmt: skip


class Progress:
    """A live view of one search or many: an `on_event`, and a context manager.

    Args:
        console: where to; None: standard error.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._last: dict[str | int, Event] = {}
        self._newest: Event | None = None
        self._started = clock()
        self._written = float("-inf")
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # into the console, above the view; never away from a file or a pipe
        )
        self._is_live = False

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
            self._is_live = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_live:
            self._is_live = False
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._last[event.problem] = self._newest = event
        due = event.status is not None or self._clock() - self._written >= _PAUSE
        if not self._is_live and due:
            self._written = self._clock()
            self.console.print(_line(event), soft_wrap=True, highlight=False, markup=False)

    def render(self) -> Group:
        """The view as it is now."""
        if self._newest is None:
            return Group(Text("no step yet"))
        parts: list[Any] = [self._budgets()]
        if len(self._last) == 1:
            parts += [_answers(self._newest), _path(self._newest)]
        parts += [Text(note, style="yellow") for note in self._newest.notes]
        return Group(*parts)

    def _budgets(self) -> Table:
        """One row a search, the unfinished ones first; of many only as many as fit."""
        grid = Table.grid(padding=(0, 2))
        running = sorted(self._last.values(), key=lambda event: event.status is not None)
        for event in running[:10]:
            share = 100 * event.used / max(1, event.budget)
            name = f"problem {event.problem}" if len(self._last) > 1 else "budget"
            left = f"{event.budget - event.used:,} of {event.budget:,} tokens left"
            done = str(event.status) if event.status else f"{self._clock() - self._started:.0f} s"
            bar = ProgressBar(total=100, completed=share, width=24)
            grid.add_row(escape(name), bar, left, f"{event.nodes} steps", _best(event), done)
        if len(running) > 10:
            grid.add_row(f"and {len(running) - 10} more")
        return grid


def _answers(event: Event) -> Table:
    table = Table(box=None, padding=(0, 2), title_justify="left", header_style="dim")
    for name in ("answer", "votes", "weight", "step"):
        table.add_column(name)
    for answer in event.answers[:_ANSWERS]:
        table.add_row(Text(one_line(answer.value, 60)), str(answer.votes), f"{answer.weight:.2f}", f"#{answer.node}")
    if not event.answers:
        table.add_row(Text("none yet", style="dim"), "", "", "")
    return table


def _path(event: Event) -> Group:
    """The end of the best path, a line a step."""
    first = max(0, len(event.steps) - _STEPS)
    above = [Text(f"  ... {first} steps", style="dim")] if first else []
    return Group(Text("best path", style="dim"), *above, *(Text("  " + one_line(step, 100)) for step in event.steps[first:]))


def _best(event: Event) -> Text:
    return Text(one_line(event.answers[0].value, 30), style="green") if event.answers else Text("-", style="dim")


def _line(event: Event) -> str:
    answer = f"answer {one_line(event.answers[0].value, 60)}" if event.answers else "no answer"
    ended = f", {event.status}" if event.status else ""
    return f"problem {event.problem}: {event.used:,} of {event.budget:,} tokens, {event.nodes} steps, {answer}{ended}"


def one_line(text: str, most: int) -> str:
    """At most so many letters in one printable line: a model's control characters must not reach the terminal."""
    plain = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return plain if len(plain) <= most else plain[: most - 1] + "…"
