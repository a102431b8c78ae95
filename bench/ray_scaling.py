"""What Ray costs and what a second worker brings: `python -m bench.ray_scaling` (specdec[ray]).

The same prompts in batches of `--batch`, one thread an engine, three ways: an engine without Ray; `specdec.ray.Generator` with one
worker; with two. Two rates, both without the start of Ray and of the models, which is in the seconds alone, and with what Ray does
between batches:

  added: a worker's tokens after its first batch (which warms up) over the time from its end to that of its last batch; the workers' rates
    are added, as if all had work to the last. What the machine can do.
  wall clock: all tokens after the moment when every worker has ended its first batch, over the time from then to the end of the last
    batch of all; a worker that has nothing left to do while another goes on counts. What one gets.

Every text must be that of the engine without Ray. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

try:
    import ray
except ModuleNotFoundError as error:
    raise ImportError("bench.ray_scaling needs ray; fix: pip install 'specdec[ray]'") from error

import specdec
from specdec.models import embedded_model_path
from specdec.ray import Generator

from .environment import environment
from .tasks import random_tasks

Timed = list[dict[str, Any]]  # rows: id, text, text_tokens, worker, end (seconds) of their batch


class TimedGenerator(Generator):
    """Notes who generated a batch, and when it was done."""

    def __init__(self, worker: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.worker = worker or ray.get_runtime_context().get_actor_id()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        found = super().__call__(batch)
        rows = len(batch["id"])
        return {**found, "worker": np.full(rows, self.worker), "end": np.full(rows, time.time())}


def tiny_model(folder: Path) -> str:
    """A random llama of width 64 with the embedded model's tokenizer: nearly all of its time is specdec's and Ray's own."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def batches(prompts: list[str], size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(prompts), size):
        rows = np.arange(start, min(start + size, len(prompts)))
        yield {"id": rows, "prompt": np.array([prompts[row] for row in rows], object)}


def without_ray(prompts: list[str], size: int, options: dict[str, Any]) -> Timed:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator, rows = TimedGenerator("here", **options), []
    for batch in batches(prompts, size):
        found = generator(batch)
        rows += [{name: column[row] for name, column in found.items()} for row in range(len(batch["id"]))]
    torch.set_num_threads(threads)
    return rows


def with_ray(prompts: list[str], size: int, options: dict[str, Any], workers: int) -> Timed:
    items = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    data = ray.data.from_items(items, override_num_blocks=-(-len(items) // size))
    made = data.map_batches(TimedGenerator, fn_constructor_kwargs=options, batch_size=size, concurrency=workers, num_cpus=1)
    return list(made.take_all())


def added_rate(rows: Timed) -> float:
    """Tokens a second, added over the workers.

    Raises:
        ValueError: a worker had fewer than three batches.
    """
    return sum(_rate(own, own[0]["end"]) for own in _by_worker(rows))


def wall_clock_rate(rows: Timed) -> float:
    """Tokens a second of all workers, from the moment when each has ended its first batch.

    Raises:
        ValueError: a worker had fewer than three batches.
    """
    return _rate(sorted(rows, key=lambda row: row["end"]), max(own[0]["end"] for own in _by_worker(rows)))


def _by_worker(rows: Timed) -> list[Timed]:
    """The rows of each worker in the order of their ends."""
    ordered = sorted(rows, key=lambda row: (row["worker"], row["end"]))
    parts = [list(own) for _, own in groupby(ordered, key=lambda row: row["worker"])]
    for own in parts:
        if len({row["end"] for row in own}) < 3:
            raise ValueError(f"worker {own[0]['worker']} had fewer than three batches; fix: more --prompts or a smaller --batch")
    return parts


def _rate(rows: Timed, begin: float) -> float:
    """Tokens a second of the batches that ended after `begin`."""
    return sum(row["text_tokens"] for row in rows if row["end"] > begin) / (rows[-1]["end"] - begin)


def main(
    model: Annotated[str, typer.Option(help='folder or hub name, "embedded", or "tiny": a random model of width 64')] = "tiny",
    prompts: Annotated[int, typer.Option(min=6)] = 96,
    batch: Annotated[int, typer.Option(min=1, help="rows of a batch, all decoded at once")] = 4,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="of the three ways in turn; the median counts")] = 3,
) -> None:
    """One engine without Ray, one Ray worker, two."""
    texts = [task.text for task in random_tasks(prompts)]
    params = specdec.SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    added: dict[str, list[float]] = {"no Ray": [], "1 worker": [], "2 workers": []}
    wall_clock: dict[str, list[float]] = {way: [] for way in added}
    seconds: dict[str, list[float]] = {way: [] for way in added}
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model(Path(folder)) if model == "tiny" else None if model == "embedded" else model
        options = {"model": path, "params": params, "key": "id", "max_rows": batch, "dtype": "float32"}
        runs = {
            "no Ray": lambda: without_ray(texts, batch, options),
            "1 worker": lambda: with_ray(texts, batch, options, 1),
            "2 workers": lambda: with_ray(texts, batch, options, 2),
        }
        expected = {row["id"]: row["text"] for row in without_ray(texts, batch, options)}  # and whatever is measured once is
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        for _ in range(rounds):
            for way, run in runs.items():
                begin = time.perf_counter()
                rows = run()
                seconds[way].append(time.perf_counter() - begin)
                if sorted(row["id"] for row in rows) != list(range(prompts)) or {r["id"]: r["text"] for r in rows} != expected:
                    raise AssertionError(f"{way}: the texts are not those of an engine without Ray")
                added[way].append(added_rate(rows))
                wall_clock[way].append(wall_clock_rate(rows))
        ray.shutdown()
    table = Table("", "tokens a second, added", "x no Ray", "wall clock", "x no Ray", "seconds, start included")
    for way in added:
        ratios = [np.median(rates[way]) / np.median(rates["no Ray"]) for rates in (added, wall_clock)]
        table.add_row(
            way, f"{np.median(added[way]):.1f}", f"{ratios[0]:.2f}", f"{np.median(wall_clock[way]):.1f}", f"{ratios[1]:.2f}",
            f"{np.median(seconds[way]):.1f}",
        )  # fmt: skip
    Console().print(table)
    settings = {"model": model, "prompts": prompts, "batch": batch, "max_new_tokens": max_new_tokens, **environment()}
    found = {"added": ratios_of(added), "wall_clock": ratios_of(wall_clock)}
    rates = {"added": added, "wall_clock": wall_clock}
    print(json.dumps({"bench": "ray_scaling", "settings": settings, **found, "tokens_per_second": rates, "seconds": seconds}))


def ratios_of(rates: dict[str, list[float]]) -> dict[str, float]:
    """scaling: two workers over one; overhead: the share of the speed without Ray that one worker lacks."""
    median = {way: float(np.median(found)) for way, found in rates.items()}
    return {"scaling": median["2 workers"] / median["1 worker"], "overhead": 1 - median["1 worker"] / median["no Ray"]}


if __name__ == "__main__":
    typer.run(main)
