"""specdec reason: a problem, or a file of them, from a shell. Answers and results go to stdout, everything else to stderr.

    specdec reason "What is 17 * 23 - 5?" --budget 2000 --view tree.html
    specdec reason --file problems.jsonl --out results.jsonl            # the same command again goes on where it was stopped

Exit status of one problem: 0 with an answer, 1 without; of a file: 0. Bad input is 2, an interrupt 130.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import specdec
from specdec.search.config import SearchConfig
from specdec.search.policies import POLICIES
from specdec.search.progress import Progress, one_line
from specdec.search.prompts import Prompts
from specdec.search.request import GenerationError
from specdec.terminal import (
    BudgetOption,
    CompileOption,
    DrafterOption,
    DtypeOption,
    MethodOption,
    ModelOption,
    TemperatureOption,
    TopPOption,
    clean_errors,
    console,
    facts_table,
    load_engine,
)

if TYPE_CHECKING:
    from specdec.engine import Engine
    from specdec.search.reason import ReasonResult

__all__ = ["reason"]


def reason(
    problem: Annotated[str | None, typer.Argument(help="the problem; - reads it from stdin")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help='many problems: {"problem": ..., "id": ..., "answer": ...} a line, .jsonl')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="results of --file, appended as they end; started again, it goes on")] = None,
    budget: Annotated[
        int, typer.Option("--budget", "-b", help="most tokens that the model may generate, for each problem")
    ] = 2000,
    policy: Annotated[str, typer.Option(help=", ".join(POLICIES))] = "bg_mcts",
    evaluator: Annotated[
        str, typer.Option(help="yes_no, log_probability, self_consistency, arithmetic, countdown or none")
    ] = "yes_no",
    answers: Annotated[str, typer.Option(help="what counts as an answer: math, number, exact or code")] = "math",
    step: Annotated[str, typer.Option(help="where a step ends: steps, newline, paragraph, code or tokens:N")] = "steps",
    prompts: Annotated[Path | None, typer.Option(help="a TOML file with other prompts")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    method: MethodOption = "auto",
    drafter: DrafterOption = None,
    nodes: BudgetOption = "auto",
    compile: CompileOption = False,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 1.0,
    seed: Annotated[int, typer.Option(help="fixes every text")] = 0,
    width: Annotated[int, typer.Option(help="requests that one search has in flight")] = 4,
    rows: Annotated[int, typer.Option(help="requests that the model works on at once")] = 8,
    kv_megabytes: Annotated[float, typer.Option(help="memory for keys and values of search nodes")] = 512.0,
    seconds: Annotated[float | None, typer.Option(help="wall-clock limit of a search")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="holds the search at every moment; resumed if it is there")] = None,
    extra: Annotated[int, typer.Option(min=0, help="then go on with so many tokens more, each time")] = 0,
    view: Annotated[Path | None, typer.Option(help="write the tree as a page, .html")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the tree as a picture, .svg, .png or .pdf")] = None,
    graphml: Annotated[Path | None, typer.Option(help="write the tree as GraphML")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the tree as JSON")] = None,
) -> None:
    """Search for the answer to a problem under a hard budget of generated tokens; Ctrl-C prints what was found by then."""
    with clean_errors():
        trees = {"--view": view, "--plot": plot, "--graphml": graphml, "--json": json_file}
        _check(problem, file, out, {"--checkpoint": checkpoint, "--extra": extra, **trees})
        options: dict[str, Any] = {
            "budget": budget, "evaluator": None if evaluator == "none" else evaluator, "policy": policy, "seed": seed, "step": step,
            "temperature": temperature, "top_p": top_p, "answers": answers, "width": width, "kv_megabytes": kv_megabytes,
            "prompts": None if prompts is None else Prompts.load(prompts), "config": SearchConfig(seconds=seconds),
        }  # fmt: skip

        def engine() -> Engine:
            return load_engine(model, dtype, method, nodes, drafter, compile, rows, budget_name="nodes")

        if file is not None:
            _solve_file(engine, file, out, options)
        else:
            text = sys.stdin.read().strip() if problem == "-" else str(problem)
            _solve_one(engine(), text, options, checkpoint, extra, {name: path for name, path in trees.items() if path})


def _check(problem: str | None, file: Path | None, out: Path | None, single: dict[str, Any]) -> None:
    """What would be noticed only when the search is over, or not at all."""
    if (problem is None) == (file is None):
        raise ValueError("pass one problem, or --file with many")
    if file is None and out is not None:
        raise ValueError("--out is for --file; the answer to one problem goes to stdout, its tree to --json")
    given = {name: value for name, value in single.items() if value}
    if file is not None and given:
        raise ValueError(f"{next(iter(given))} is for one problem; with --file the results and checkpoints go to --out")
    for name, path in given.items():
        if isinstance(path, Path) and not path.absolute().parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.parent}")


# ---- one problem ----------------------------------------------------------------------------------------------------------------


def _solve_one(
    engine: Engine, problem: str, options: dict[str, Any], checkpoint: Path | None, extra: int, trees: dict[str, Path]
) -> None:
    """Search; print the answer on stdout and what it took on stderr. A model that failed leaves what was found by then."""
    error: GenerationError | None = None
    with _interrupts() as cancel, Progress(console) as progress:
        try:
            result = specdec.reason(engine, problem, checkpoint=checkpoint, on_event=progress, cancel=cancel, **options)
            if extra and not cancel.is_set():
                result = result.resume(extra)
        except GenerationError as failure:
            assert isinstance(failure.result, specdec.ReasonResult)
            error, result = failure, failure.result
    if result.answer is not None:
        typer.echo(result.answer)
    console.print(_facts(result, error))
    _write_trees(result, trees)
    if cancel.is_set():
        raise typer.Exit(130)
    if error is not None or result.answer is None:
        raise typer.Exit(1)


def _facts(result: ReasonResult, error: GenerationError | None) -> Table:
    """What was found and what it took; the model's letters in printable lines."""
    answers = [f"{one_line(each.value, 60)} (votes {each.votes}, weight {each.weight:.2f})" for each in result.answers[:5]]
    rate = f"; {result.generated / result.steps:.2f} a step of the engine" if result.steps else ""
    facts = {
        "status": str(result.status) if error is None else f"{result.status}: {one_line(str(error), 200)}",
        "answers": answers or "none",
        "tokens": f"{result.used} of {result.budget}, in {len(result.tree) - 1} texts, {result.seconds:.1f} s{rate}",
        "evaluator": f"{result.evaluator_tokens} tokens",
        "input": f"{result.prefill_tokens} tokens computed, {result.cached_tokens} from the cache, {result.recomputed_tokens} again",
        "notes": [one_line(note, 200) for note in result.notes],
    }
    return facts_table({name: fact for name, fact in facts.items() if fact})


def _write_trees(result: ReasonResult, trees: dict[str, Path]) -> None:
    """The tree in every form that was asked for."""
    from specdec.search.plot import write_plot
    from specdec.search.view import write_html

    writers: dict[str, Callable[[Path], Any]] = {
        "--view": lambda path: write_html(result, path, problem=result.problem, budget=result.budget),
        "--plot": lambda path: write_plot(result, path),
        "--graphml": result.tree.write_graphml,
        "--json": lambda path: path.write_text(json.dumps(result.tree.to_dict()), encoding="utf-8"),
    }
    for name, path in trees.items():
        writers[name](path)


# ---- a file of problems ---------------------------------------------------------------------------------------------------------


def _solve_file(make_engine: Callable[[], Engine], file: Path, out: Path | None, options: dict[str, Any]) -> None:
    """A line of JSON a problem to `out`, or to stdout; the last line on stdout is the summary."""
    from specdec.search.batch import read_problems, solve, summary

    problems = read_problems(file)
    records: list[dict[str, Any]] = []
    if out is not None and out.exists() and out.samefile(file):
        raise ValueError(f"--out must be another file than --file, got {out} twice")
    engine, start = make_engine(), time.perf_counter()
    with _interrupts() as cancel, Progress(console) as progress:
        for record in solve(engine, problems, out, on_event=progress, cancel=cancel, **options):
            records.append(record)
            if out is None:
                typer.echo(json.dumps(record))
    typer.echo(json.dumps({**summary(records), "seconds": round(time.perf_counter() - start, 2)}))
    if cancel.is_set():
        raise typer.Exit(130)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, the second interrupts."""
    cancel = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
