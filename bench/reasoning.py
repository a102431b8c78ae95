"""Accuracy against budget: every policy on the same problems at equal output tokens, on a real model. `make bench-reasoning`, or::

    python -m bench.reasoning --out results/reasoning.jsonl        # embedded model, made-up problems, exact checkers
    python -m bench.reasoning --tasks gsm8k,math500 --model FOLDER --evaluator yes_no --budgets 300,600,1200 --out ...

A *run* is all problems of a group under one policy, budget and seed; its searches go side by side, as many as the engine has rows.
Every search is on disk once it has ended, and none is repeated; beside the file come a report (.md) and a figure (.png, .svg).
Greedy runs at temperature 0, and so for the first seed alone. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specdec.engine import Engine
from specdec.models import load
from specdec.search.bg_mcts import BgMcts
from specdec.search.reason import EVALUATORS, ReasonResult, reason_all
from specdec.search.request import GenerationError, Kind
from specdec.search.search_tree import SearchTree

from .environment import environment
from .log import Log, read_log
from .plots import STYLE
from .reasoning_metrics import THIRDS, Row, failed, measured
from .reasoning_report import draw, markdown, summary
from .reasoning_tasks import GROUPS, ReasoningTask, load_reasoning_tasks
from .tasks import DEFAULT_DATA
from .variants import NAMES, NO_BACKTRACK, config_of, policy_of

__all__ = ["Run", "Setup", "by_thirds", "main", "pending", "search_all"]

GREEDY = "greedy"
POLICIES_SHOWN = (
    "greedy,best_of_n,refinement,beam,rebase,tree_bon,mcts,bg_mcts," + NO_BACKTRACK + ",bg_mcts_printed,bg_mcts_coded"
)


@dataclass(frozen=True, slots=True)
class Run:
    """All problems of a group, searched in one way."""

    group: str
    policy: str
    budget: int
    seed: int


@dataclass(frozen=True, slots=True)
class Setup:
    """What all runs share: an evaluator by name ("oracle": the task's own, "none"), the texts' temperature, requests a search, and
    the commit that is running."""

    evaluator: str
    temperature: float
    width: int
    commit: str | None = None

    def evaluator_of(self, task: ReasoningTask) -> Any:
        """As `reason_all` wants it.

        Raises:
            ValueError: an oracle is asked for where there is none.
        """
        if self.evaluator == "oracle" and task.oracle is None:
            raise ValueError(f"evaluator oracle: {task.group} has no exact checker; fix: --evaluator yes_no, or other --tasks")
        return {"oracle": task.oracle, "none": None}.get(self.evaluator, self.evaluator)


def pending(runs: list[Run], tasks: dict[str, list[ReasoningTask]], rows: list[Row]) -> Iterator[tuple[Run, list[int]]]:
    """What is left: (run, places of its problems). What failed is left too."""
    done = {(Run(row.group, row.policy, row.budget, row.seed), row.task) for row in measured(rows)}
    for run in runs:
        left = [place for place, task in enumerate(tasks[run.group]) if (run, task.id) not in done]
        if left:
            yield run, left


def search_all(engine: Engine, run: Run, tasks: list[ReasoningTask], places: list[int], setup: Setup) -> Iterator[Row]:
    """Search the problems at these places; each row as soon as its search has ended, one that failed with its error."""
    first, last = tasks[0], time.perf_counter()
    results = reason_all(
        engine,
        [tasks[place].problem for place in places],
        run.budget,
        setup.evaluator_of(first),
        policy_of(run.policy),
        run.seed,
        temperature=0.0 if run.policy == GREEDY else setup.temperature,
        answers=first.answers,
        step=first.step,
        prompts=first.prompts,
        config=replace(config_of(run.policy), length=first.length),
        width=setup.width,
        places=places,
    )
    for place, result in results:
        now = time.perf_counter()
        yield _row(run, tasks[place], result, now - last, setup.commit)
        last = now


def _row(run: Run, task: ReasoningTask, ended: ReasonResult | GenerationError, seconds: float, commit: str | None) -> Row:
    error = str(ended) if isinstance(ended, GenerationError) else None
    result: Any = ended.result if isinstance(ended, GenerationError) else ended
    assert result.used <= run.budget, f"{task.id}: {run.policy} used {result.used} of {run.budget} tokens"
    thirds = by_thirds(result.tree, run.budget)
    return Row(
        task=task.id,
        group=run.group,
        policy=run.policy,
        budget=run.budget,
        seed=run.seed,
        answer=result.answer,
        right=task.grade(result.answer),
        answered=result.tree.answered_count > 0,
        status=str(result.status),
        used=result.used,
        steps=result.steps,
        evaluator_tokens=result.evaluator_tokens,
        prefill_tokens=result.prefill_tokens,
        cached_tokens=result.cached_tokens,
        recomputed_tokens=result.recomputed_tokens,
        answers=sum(each.votes for each in result.answers),
        correct=sum(each.votes for each in result.answers if task.grade(each.value)),
        seconds=seconds,
        widening=[fmean(rank >= BgMcts.k for rank, _ in each) if each else None for each in thirds],
        depth=[fmean(depth for _, depth in each) if each else None for each in thirds],
        error=error,
        commit=commit,
    )


def by_thirds(tree: SearchTree, budget: int) -> list[list[tuple[int, int]]]:
    """[3]: of every step asked for in each third of the budget, (texts already drawn below its parent, the parent's depth). Full
    texts, forced answers and the rest of a step that was cut are no steps."""
    thirds: list[list[tuple[int, int]]] = [[] for _ in range(THIRDS)]
    drawn, spent = Counter[int](), 0
    for node in range(1, len(tree)):
        parent, kind = tree.parent[node], tree.kind[node]
        if kind == Kind.STEP or (kind == Kind.REFINE and not tree.full[node]):
            third = min(THIRDS - 1, THIRDS * spent // max(1, budget))
            thirds[third].append((drawn[parent], tree.depth[parent]))
        drawn[parent] += 1
        spent += tree.tokens[node]
    return thirds


def _names(option: str, text: str, known: list[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} must be among {', '.join(known)}, got {unknown[0]!r}")
    return names


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"{option} must be whole numbers separated by commas, got {text!r}")
    return list(map(int, text.split(",")))


def _write(out: Path, rows: list[Row], settings: dict[str, Any]) -> list[str]:
    """Report and figure beside the rows."""
    import matplotlib

    out.with_suffix(".md").write_text(markdown(rows, settings), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure = draw(rows, settings)
        for suffix in (".png", ".svg"):
            figure.savefig(out.with_suffix(suffix))
    return [str(out.with_suffix(suffix)) for suffix in (".md", ".png", ".svg")]


def main(
    tasks: Annotated[str, typer.Option(help="arithmetic, countdown, gsm8k, math500")] = "arithmetic,countdown",
    policies: Annotated[str, typer.Option(help=", ".join(NAMES))] = POLICIES_SHOWN,
    budgets: Annotated[str, typer.Option(help="output tokens")] = "300,600,1200",
    problems: Annotated[int, typer.Option(min=1, help="of each group")] = 20,
    seeds: Annotated[str, typer.Option(help="of the texts; the problems are the same for all")] = "0,1,2",
    evaluator: Annotated[str, typer.Option(help=f"oracle, none, {', '.join(EVALUATORS)}")] = "oracle",
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32, ...")] = "bfloat16",
    temperature: Annotated[float, typer.Option()] = 0.7,
    width: Annotated[int, typer.Option(min=1, help="requests that one search has in flight; trees depend on it")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="requests that the engine generates at once")] = 8,
    length: Annotated[int, typer.Option(min=1, help="operations of a chain of arithmetic")] = 2,
    numbers: Annotated[int, typer.Option(min=2, max=6, help="of a Countdown problem")] = 3,
    data: Annotated[Path, typer.Option(help="folder with gsm8k and math500")] = DEFAULT_DATA,
    out: Annotated[Path, typer.Option(help="JSON-lines file; what is finished in it is not run again")] = Path(
        "results/reasoning.jsonl"
    ),
) -> None:
    """Compare policies on the same problems at equal output tokens."""
    console = Console(stderr=True)
    try:
        groups = _names("tasks", tasks, list(GROUPS))
        chosen = _names("policies", policies, list(NAMES))
        _names("evaluator", evaluator, ["oracle", "none", *EVALUATORS])
        sizes = {"arithmetic": {"steps": length}, "countdown": {"numbers": numbers}}
        loaded = {group: load_reasoning_tasks(group, problems, data=data, **sizes.get(group, {})) for group in groups}
        here = environment()
        setup = Setup(evaluator, temperature, width, here["commit"])
        for group in groups:
            setup.evaluator_of(loaded[group][0])
        all_seeds = _numbers("seeds", seeds)
        runs = [
            Run(group, policy, budget, seed)
            for seed in all_seeds
            for budget in _numbers("budgets", budgets)  # so that a run that was killed has whole columns of all groups
            for group in groups
            for policy in chosen
            if policy != GREEDY or seed == all_seeds[0]
        ]
        settings = {
            "model": model or "embedded", "dtype": dtype, "evaluator": evaluator, "temperature": temperature, "width": width, "rows": rows,
            "sizes": sizes, **here,
        }  # fmt: skip
        log = _opened(out, settings, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    todo = list(pending(runs, loaded, log.rows))
    if todo:
        engine = Engine(*load(model, dtype), max_rows=max(rows, width))
        _run(engine, todo, loaded, setup, log, console)
    wanted = {(run, task.id) for run in runs for task in loaded[run.group]}
    kept = [row for row in log.rows if (Run(row.group, row.policy, row.budget, row.seed), row.task) in wanted]
    files = _write(out, kept, log.settings)
    print(
        json.dumps(
            {"bench": "reasoning", "settings": log.settings, "groups": summary(kept), "errors": len(failed(kept)), "files": files}
        )
    )
    sys.stdout.flush()


def _opened(out: Path, settings: dict[str, Any], console: Console) -> Log:
    """The rows so far. A file that another commit began is gone on with, since a run takes hours and its rows name their commits.

    Raises:
        ValueError: no log, or one of other settings.
    """
    if out.exists():
        begun = read_log(out, Row)[0].get("commit")
        if begun != settings["commit"]:
            console.print(
                f"warning: {out} was begun at commit {begun}, this is {settings['commit']}: whether their rows may be compared "
                "is for you to know; --out elsewhere keeps them apart",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip
        settings = {**settings, "commit": begun}
    return Log(out, settings, Row)


def _run(
    engine: Engine,
    todo: list[tuple[Run, list[int]]],
    tasks: dict[str, list[ReasoningTask]],
    setup: Setup,
    log: Log,
    console: Console,
) -> None:
    """Every pending search; a row is on disk before the next is waited for."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # saturated evaluators, hundreds of times
        bar = progress.add_task("", total=sum(len(places) for _, places in todo))
        for run, places in todo:
            progress.update(bar, description=f"{run.group} {run.policy} {run.budget} seed {run.seed}")
            for row in search_all(engine, run, tasks[run.group], places, setup):
                log.add([row])
                progress.advance(bar)


if __name__ == "__main__":
    typer.run(main)
