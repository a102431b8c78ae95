"""Speed and tokens a step of several methods, interleaved prompt by prompt: `python -m bench.run --help`.

For every prompt all methods run one after the other, in an order shuffled a prompt, so that a change in the machine's speed hits
all of them alike. Each method has its own engine on the one model. Cold: the engines forget before every prompt. Warm: they keep
what they learned, over the prompts in fixed order. The last line on stdout is one JSON object with everything that was measured.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import specdec
from bench.metrics import Row
from bench.report import print_tables, summary
from bench.runners import Runner, make_runners
from bench.tasks import DEFAULT_DATA, Task, encode, load_tasks
from specdec.models import load
from specdec.sources.draft_model import is_own, load_drafter

__all__ = ["Log", "main", "run_all"]

MODES = ("cold", "warm")
WARM_UP = Task("warm-up", "warm-up", "Count from one to twenty in words, then count again from one to twenty in words.")


class Log:
    """Rows measured so far, in memory and, if asked, in a JSON-lines file: settings first, then one row a line.

    Raises:
        ValueError: the file was written under other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path is None:
            return
        if path.exists():
            self._read(path, settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": settings})

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        written = json.loads(first)["settings"]
        if written != settings:
            changed = [key for key in settings if written.get(key) != settings[key]]
            changes = "; ".join(f"{key}: {written.get(key)!r} there, {settings[key]!r} now" for key in changed)
            raise ValueError(f"out must be a new file or one of the same settings, got {path} ({changes})")
        self.rows = [Row(**json.loads(line)) for line in rest]

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(asdict(row))

    def done(self) -> set[tuple[str, str]]:
        """(task, method) of the rows that are there."""
        return {(row.task, row.method) for row in self.rows}


def pending(tasks: list[Task], runners: list[Runner], log: Log, warm: bool) -> Iterator[tuple[Task, list[Runner]]]:
    """What is left to run: each task with its methods in shuffled order.

    Raises:
        ValueError: a warm run that stopped halfway; what its engines had learned is gone.
    """
    done = log.done()
    left = [(task, [runner for runner in runners if (task.id, runner.label) not in done]) for task in tasks]
    left = [(task, todo) for task, todo in left if todo]
    if warm and log.rows and left:
        raise ValueError(f"a warm run cannot be resumed, its engines have forgotten; give a new --out or delete {log.path}")
    for number, (task, todo) in enumerate(left):
        yield task, random.Random(number).sample(todo, len(todo))


def run_all(
    tasks: list[Task],
    runners: list[Runner],
    tokenizer: Any,
    params: specdec.SamplingParams,
    log: Log,
    warm: bool,
    console: Console,
) -> None:
    """Run what is pending; every row is in the log before the next starts, and an exception ends the run."""
    todo = list(pending(tasks, runners, log, warm))
    if not todo:
        return
    for runner in runners:  # compile, measure costs, check the model: once, not timed
        runner.run(WARM_UP, encode(tokenizer, WARM_UP), params)
        runner.reset()
    with console.status("") as status:
        for number, (task, order) in enumerate(todo, 1):
            prompt = encode(tokenizer, task)
            for runner in order:
                status.update(f"{number}/{len(todo)} {task.id}: {runner.label}")
                if not warm:
                    runner.reset()
                log.add(runner.run(task, prompt, params))


def _budgets(text: str) -> list[int | str]:
    try:
        return [part if part == "auto" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"budget must be auto or integers, separated by commas, got {text!r}") from error


def main(
    split: Annotated[str, typer.Option(help="report, tune or random")] = "report",
    methods: Annotated[
        str, typer.Option(help="methods of specdec, model.generate, prompt_lookup and assisted, separated by commas")
    ] = "none,auto,model.generate,prompt_lookup",
    drafter: Annotated[str | None, typer.Option(help="a folder or hub name, early_exit:8 or mtp")] = None,
    budget: Annotated[str, typer.Option(help="node budgets, root included, separated by commas: auto or integers")] = "auto",
    mode: Annotated[str, typer.Option(help="cold: engines forget before every prompt; warm: they do not")] = "warm",
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float32, ...")] = "bfloat16",
    data: Annotated[Path, typer.Option(help="folder with mix.json")] = DEFAULT_DATA,
    groups: Annotated[str, typer.Option(help="only these groups, separated by commas")] = "",
    limit: Annotated[int | None, typer.Option(help="only so many prompts, spread over the groups")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    share_prefill: Annotated[
        bool, typer.Option(help="prefill each prompt once for all of specdec's methods (tokens a step stay the same)")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file; a cold run goes on where it stopped")] = None,
) -> None:
    """Compare methods on the same prompts."""
    console = Console(stderr=True)
    try:
        if mode not in MODES:
            raise ValueError(f"mode must be cold or warm, got {mode!r}")
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        tasks = load_tasks(data, split, limit, [name for name in groups.split(",") if name])
        loaded, tokenizer = load(model, dtype)
        settings = {
            "split": split, "mode": mode, "model": model or "embedded", "dtype": str(loaded.dtype).removeprefix("torch."),
            "drafter": drafter, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "share_prefill": share_prefill,
            "device": str(loaded.device), "threads": torch.get_num_threads(), "machine": _machine(),
            "versions": {"specdec": specdec.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        log = Log(out, settings)
        loaded_drafter = drafter
        if drafter is not None and not is_own(drafter):
            loaded_drafter = load_drafter(drafter, loaded, tokenizer)  # once, for all engines and peers
        runners = make_runners(loaded, tokenizer, methods.split(","), _budgets(budget), share_prefill, loaded_drafter)
        run_all(tasks, runners, tokenizer, params, log, mode == "warm", console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    labels = [runner.label for runner in runners]
    kept = {task.id for task in tasks}
    rows = [row for row in log.rows if row.method in labels and row.task in kept]
    print_tables(rows, labels, Console(width=max(130, Console().width)))
    print(json.dumps({"bench": "run", "settings": settings, **summary(rows, labels)}))
    sys.stdout.flush()


def _machine() -> str:
    """Processor and cores, as the operating system names them."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    typer.run(main)
