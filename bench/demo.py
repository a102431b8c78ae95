"""`make demo`: the embedded model edits a function, first streamed by specdec, then timed against `model.generate`.

In float32 the two outputs are equal, token for token. In bfloat16 near-ties may fall either way, as they do between any two
shapes of a matrix product, so there equality is reported and not promised.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import specdec
from specdec.models import load

from .metrics import Row, agreement, speed, tokens_per_step
from .runners import EngineRunner, PeerRunner, Runner
from .tasks import Task, encode

PROMPT = """Fix the typo in this function and return the whole function:

def summarize_orders(orders, currency="EUR"):
    totals = {}
    for order in orders:
        customer = order["customer"]
        amount = order["quantity"] * order["unit_price"]
        if customer not in totals:
            totals[customer] = 0
        totals[customer] = totals[customer] + amount
    lines = []
    for customer in sorted(totals):
        amount = totals[customer]
        lines.append(customer + ": " + str(amount) + " " + currency)
    retrun lines
"""
TASK = Task("demo", "code-edit", PROMPT)
WARM_UP = Task("warm-up", "warm-up", "Write the numbers from one to ten, twice.")


def stream_answer(engine: specdec.Engine, prompt: list[int], params: specdec.SamplingParams) -> None:
    """Print the answer as it is generated."""
    for piece in engine.stream(prompt, params):
        print(piece, end="", flush=True)
    print("\n")


def compare(runners: list[Runner], prompt: list[int], params: specdec.SamplingParams, rounds: int) -> list[Row]:
    """`rounds` timed runs of each, in turn; nothing that one run taught reaches the next."""
    rows = []
    for _ in range(rounds):
        for runner in runners:
            runner.reset()
            rows += runner.run([TASK], [prompt], params)
    return rows


def measure(model: Any, tokenizer: Any, params: specdec.SamplingParams, rounds: int, stream: bool) -> list[str]:
    """The table row of one dtype; streams the answer first if asked."""
    peer, ours = PeerRunner(model, "model.generate"), EngineRunner(model, tokenizer, "auto", "auto")
    prompt = encode(tokenizer, TASK)
    for runner in (peer, ours):  # compile and measure costs before anything is timed
        runner.run([WARM_UP], [encode(tokenizer, WARM_UP)], params)
    if stream:
        stream_answer(ours.engine, prompt, params)
    rows = compare([peer, ours], prompt, params, rounds)
    theirs, mine = ([row for row in rows if row.method == runner.label] for runner in (peer, ours))
    return [
        str(model.dtype).removeprefix("torch."),
        f"{speed(theirs):.1f}",
        f"{speed(mine):.1f}",
        f"{speed(mine) / speed(theirs):.2f}x",
        f"{tokens_per_step(mine):.2f}",
        "yes" if agreement(mine, theirs) == 1 else "no",
    ]


def main(
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 192,
    rounds: Annotated[int, typer.Option(help="timed runs of each side")] = 2,
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
) -> None:
    """Stream one answer, then compare speeds."""
    start = time.perf_counter()
    logging.disable_progress_bar()
    console = Console(width=110)
    console.print("Loading the model (the embedded one is converted at first use: about half a minute) ...", style="dim")
    params = specdec.SamplingParams(max_new_tokens=max_new_tokens)
    table = Table(title="decode speed on this machine, prefill excluded")
    columns = ("dtype", "model.generate, tokens/s", "specdec, tokens/s", "ratio", "tokens a step", "same output")
    for column in columns:
        table.add_column(column, justify="right")
    for dtype in ("float32", "bfloat16"):
        loaded, tokenizer = load(model, dtype)
        first = dtype == "float32"
        if first:
            console.print(f"\nPROMPT\n{PROMPT}\nANSWER, streamed by specdec", markup=False, highlight=False)
        table.add_row(*measure(loaded, tokenizer, params, rounds, stream=first))
        del loaded
    console.print(table)
    console.print("float32: the same output is promised. bfloat16: near-ties may fall either way.", style="dim")
    console.print(f"{time.perf_counter() - start:.0f} s in all", style="dim")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
