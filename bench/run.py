"""Speed and tokens a step of several methods, interleaved prompt by prompt: `specdec bench --help`, `python -m bench.run --help`.

For every prompt (or batch of prompts) all methods run one after the other, in an order shuffled a prompt, so that a change in the
machine's speed hits all of them alike. Each method has its own engine on the one model. Cold: the engines forget before every
prompt. Warm: they keep what they learned over the prompts, in fixed order, and forget before every round. What was measured is on
disk at once (bench.log). The last line on stdout is one JSON object with everything that was measured.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import specdec
from specdec.models import load
from specdec.pacing import measured_costs
from specdec.sources.draft_model import is_own, load_drafter

from .arctic import ARCTIC, missing_arctic
from .environment import environment
from .log import Log
from .metrics import medians
from .report import WIDTH, print_tables, summary
from .runners import EngineRunner, Runner, make_runners, parse_budgets
from .tasks import DEFAULT_DATA, Message, Task, encode, load_tasks

__all__ = ["main", "run_all"]

MODES = ("cold", "warm")
WARM_UP_TOKENS = 32
WARM_UP = Task("warm-up", "warm-up", "Count from one to twenty in words, then count again from one to twenty in words.")
CONTEXTS = (256, 2048)  # of the cost curves in the log

Batch = list[Task]


def batches(tasks: list[Task], size: int) -> list[Batch]:
    """Tasks that run at once. No batch holds a task and what follows it: all of the latter come last."""
    if size == 1:
        return [[task] for task in tasks]
    parts = [[task for task in tasks if bool(task.follows) == second] for second in (False, True)]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def pending(parts: list[Batch], runners: list[Runner], log: Log, rounds: int) -> Iterator[tuple[int, Batch, list[Runner]]]:
    """What is left to run: (round, batch, its methods in shuffled order)."""
    for number in range(rounds):
        for batch in parts:
            ids = [task.id for task in batch]
            todo = [runner for runner in runners if not log.has(ids, runner.label, number)]
            if todo:
                yield number, batch, random.Random(f"{number} {ids[0]}").sample(todo, len(todo))


def conversation(task: Task, tasks: dict[str, Task], log: Log, tokenizer: Any) -> tuple[Message, ...]:
    """The messages before the task's own turn. The answer to the turn that it follows is the first one measured, whichever
    method's it was, so that all methods and rounds see one prompt; the methods being lossless, it is the model's own."""
    if not task.follows:
        return task.before
    leader = tasks[task.follows]
    answer = next(row.token_ids for row in log.rows if row.task == leader.id)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return (*leader.before, {"role": "user", "content": leader.text}, {"role": "assistant", "content": text})


def run_all(
    tasks: list[Task],
    runners: list[Runner],
    tokenizer: Any,
    params: specdec.SamplingParams,
    log: Log,
    warm: bool,
    console: Console,
    rounds: int = 1,
    batch: int = 1,
    window: int | None = None,
) -> None:
    """Run what is pending; every row is in the log before the next starts, and an exception ends the run.

    Raises:
        ValueError: the warm-up's prompt is among the tasks.
    """
    if any(task.text == WARM_UP.text for task in tasks):
        raise ValueError(f"tasks has the prompt of the warm-up, which must not be measured: {WARM_UP.text!r}")
    parts = batches(tasks, batch)
    units = [{task.id for task in tasks}] if warm else [{task.id for task in part} for part in parts]
    log.drop_unfinished(units, [runner.label for runner in runners], rounds)
    todo = list(pending(parts, runners, log, rounds))
    if not todo:
        return
    _warm_up(runners, tokenizer, params, batch)
    log.note_costs(_costs(runners))
    by_id = {task.id: task for task in tasks}
    with _progress(console) as progress:
        bar = progress.add_task("", total=sum(len(order) for _, _, order in todo))
        begun = 0
        for number, part, order in todo:
            if number > begun:  # a new round: nothing is known
                begun = number
                for runner in runners:
                    runner.reset()
            prompts = [encode(tokenizer, task, conversation(task, by_id, log, tokenizer), window) for task in part]
            for runner in order:
                progress.update(bar, description=f"round {number + 1}/{rounds} {part[0].id}: {runner.label}")
                if not warm:
                    runner.reset()
                log.add([replace(row, round=number) for row in runner.run(part, prompts, params)])
                progress.advance(bar)


def _warm_up(runners: list[Runner], tokenizer: Any, params: specdec.SamplingParams, batch: int) -> None:
    """Compile, measure costs, check the model: once, not timed, and forgotten."""
    params = replace(params, max_new_tokens=min(params.max_new_tokens, WARM_UP_TOKENS))
    for runner in runners:
        runner.run([WARM_UP] * batch, [encode(tokenizer, WARM_UP)] * batch, params)
        runner.reset()


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}", markup=False), console=console, speed_estimate_period=600)


def _costs(runners: list[Runner]) -> dict[str, Any]:
    """Milliseconds of a forward by nodes and context, as the cost model measured them; nothing without an engine."""
    engine = next((runner.engine for runner in runners if isinstance(runner, EngineRunner)), None)
    if engine is None:
        return {}
    model = measured_costs(engine.target)
    seconds = {context: model.curve(context)[1] for context in CONTEXTS}
    return {
        "nodes": model.sizes(),
        "forward_ms": {str(context): [round(1e3 * each, 3) for each in times.tolist()] for context, times in seconds.items()},
    }


def _available(methods: list[str], console: Console) -> list[str]:
    """The methods whose packages are there; the others are named and skipped.

    Raises:
        ValueError: none is left.
    """
    reason = missing_arctic()
    skipped = [method for method in methods if method.partition("@")[0] in ARCTIC and reason]
    if len(skipped) == len(methods):
        raise ValueError(f"methods {', '.join(methods)}: {reason}")
    for method in skipped:
        console.print(f"skipped: {method}, {reason}", style="yellow", markup=False, soft_wrap=True)
    return [method for method in methods if method not in skipped]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured, of any tasks."""

    methods: list[str]
    budgets: list[int | str]
    params: specdec.SamplingParams
    model: str | None
    dtype: str
    drafter: str | None
    share_prefill: bool
    mode: str
    rounds: int
    batch: int
    settings: dict[str, Any]  # of the log; the loaded model's are added


def _measure(plan: _Plan, tasks: list[Task], out: Path | None, console: Console) -> tuple[Log, list[str]]:
    """Load the model and run what is pending: the log and the labels of the methods."""
    loaded, tokenizer = load(plan.model, plan.dtype)
    settings = {**plan.settings, "dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device), **environment()}
    log = Log(out, settings)
    drafter: Any = plan.drafter
    if drafter is not None and not is_own(drafter):
        drafter = load_drafter(drafter, loaded, tokenizer)  # once, for all engines and peers
    runners = make_runners(loaded, tokenizer, plan.methods, plan.budgets, plan.share_prefill, drafter, plan.batch)
    window = _window(loaded, plan.params.max_new_tokens)
    run_all(tasks, runners, tokenizer, plan.params, log, plan.mode == "warm", console, plan.rounds, plan.batch, window)
    return log, [runner.label for runner in runners]


def _spread(plan: _Plan, tasks: list[Task], out: Path | None, workers: int) -> tuple[Log, list[str]]:
    """The same with the tasks dealt to Ray workers, each with a model and engines of its own; rows are in the log as parts end.

    Raises:
        ValueError: `out` exists, for what a worker has left half done cannot go on.
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ImportError("--ray needs ray; fix: pip install 'specdec[ray]'") from error
    if out is not None and out.exists():
        raise ValueError(f"out must be a new file with --ray, got {out}")
    second = [task for task in tasks if task.follows]
    parts = [[task for task in tasks if not task.follows][worker::workers] for worker in range(workers)]
    for part in parts:  # a second turn is where its first is
        leaders = {task.id for task in part}
        part += [task for task in second if task.follows in leaders]
    if not all(parts):
        raise ValueError(f"ray must be at most the number of prompts, got {workers}")
    if not ray.is_initialized():
        ray.init(num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False)
    declared = share_of([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
    measure = ray.remote(_measure_part).options(**declared, max_retries=0)  # a second try would be measured on a warm machine
    running = [measure.remote(plan, part) for part in parts]
    log = None
    while running:
        (ended,), running = ray.wait(running)
        found, labels = ray.get(ended)
        log = Log(out, found.settings) if log is None else log
        log.note_costs(found.costs)
        log.add(found.rows)
    assert log is not None
    return log, labels


def _measure_part(plan: _Plan, tasks: list[Task]) -> tuple[Log, list[str]]:
    """In a worker; a Console cannot travel to it."""
    return _measure(plan, tasks, None, Console(quiet=True))


def share_of(nodes: list[dict[str, float]], workers: int) -> dict[str, float]:
    """What each of so many workers may declare so that all run at once: whole CPUs, and a GPU, several, or a part of one."""
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) / workers for kind in ("CPU", "GPU"))
    most = max(node.get("CPU", 0.0) for node in nodes)
    return {"num_cpus": max(1, int(min(cpus, most))), "num_gpus": gpus if gpus < 1 else int(gpus)}


def _window(model: Any, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt; None where the model has no bound."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= max_new_tokens:
        raise ValueError(f"max_new_tokens must be below the model's window of {positions} tokens, got {max_new_tokens}")
    return int(positions) - max_new_tokens


def main(
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "--split",
            help="report, tune, random, spec-bench, humaneval, gsm8k, math500, humanevalfix, long-qmsum, or a file of yours: "
            '{"prompt": ...} or {"messages": [...]} a line, .jsonl',
        ),
    ] = "report",
    methods: Annotated[
        str,
        typer.Option(
            help="methods of specdec, suffix_arctic and suffix_arctic_tree, each also with +compile and a budget of its own (goose@16); "
            "model.generate, prompt_lookup and assisted; separated by commas"
        ),
    ] = "none,auto,model.generate,prompt_lookup",
    drafter: Annotated[str | None, typer.Option(help="a folder or hub name, early_exit:8 or mtp")] = None,
    budget: Annotated[str, typer.Option(help="node budgets, root included, separated by commas: auto or integers")] = "auto",
    mode: Annotated[str, typer.Option(help="cold: engines forget before every prompt; warm: before every round")] = "warm",
    rounds: Annotated[int, typer.Option(min=1, help="times that all prompts run; a prompt's median counts")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="prompts that run at once")] = 1,
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32, ...")] = "bfloat16",
    data: Annotated[Path, typer.Option(help="folder with mix.json and the sets")] = DEFAULT_DATA,
    groups: Annotated[str, typer.Option(help="only these groups, separated by commas")] = "",
    limit: Annotated[int | None, typer.Option(help="only so many prompts, spread over the groups")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    share_prefill: Annotated[
        bool, typer.Option(help="prefill each prompt once for all of specdec's methods (tokens a step stay the same)")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file; what is finished in it is not run again")] = None,
    ray: Annotated[
        int,
        typer.Option(
            min=0, help="spread the prompts over so many Ray workers; on one machine their times are those of a busy one"
        ),
    ] = 0,
) -> None:
    """Compare methods on the same prompts."""
    console = Console(stderr=True)
    try:
        if mode not in MODES:
            raise ValueError(f"mode must be cold or warm, got {mode!r}")
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        chosen = load_tasks(data, tasks, limit, [name for name in groups.split(",") if name])
        names, budgets = _available(methods.split(","), console), parse_budgets(budget)
        settings = {
            "tasks": tasks, "mode": mode, "batch": batch, "model": model or "embedded", "drafter": drafter,
            "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "share_prefill": share_prefill,
        }  # fmt: skip
        if mode == "warm" or batch > 1:  # what an engine knows, or has beside it, depends on which prompts there are
            settings |= {"groups": groups, "limit": limit}
        if ray:
            settings["ray"] = ray
        plan = _Plan(names, budgets, params, model, dtype, drafter, share_prefill, mode, rounds, batch, settings)
        log, labels = _spread(plan, chosen, out, ray) if ray else _measure(plan, chosen, out, console)
    except (ValueError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    kept = {task.id for task in chosen}
    rows = medians(row for row in log.rows if row.method in labels and row.task in kept and row.round < rounds)
    print_tables(rows, labels, Console(width=max(WIDTH, Console().width)))
    print(json.dumps({"bench": "run", "settings": log.settings, "rounds": rounds, **summary(rows, labels)}))
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
