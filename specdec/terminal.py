"""What the commands share: options, the engine they describe, errors of one line, and the console on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import specdec

if TYPE_CHECKING:
    from specdec.engine import Engine

__all__ = [
    "BudgetOption",
    "CompileOption",
    "DrafterOption",
    "DtypeOption",
    "MaxNewTokensOption",
    "MethodOption",
    "ModelOption",
    "SeedOption",
    "TemperatureOption",
    "TopPOption",
    "clean_errors",
    "console",
    "facts_table",
    "load_engine",
]

console = Console(stderr=True)

ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="local folder or hub name; default: the embedded model")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16, float32")]
MethodOption = Annotated[
    str,
    typer.Option(
        help="drafting method: auto, none, ngram, suffix, token_recycling, goose, best_first; with --drafter: draft_model, spectr, "
        "optimal_transport, without_replacement, hybrid, traversal, block"
    ),
]
DrafterOption = Annotated[
    str | None, typer.Option(help='draft model: folder or hub name, "early_exit:8" (its own first 8 layers) or "mtp"')
]
CompileOption = Annotated[bool, typer.Option("--compile", help="compile the steps for this machine, once (a minute or two)")]
BudgetOption = Annotated[str, typer.Option(help="most nodes of a draft tree, or auto: from the measured costs")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", help="most tokens to generate")]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy")]
TopPOption = Annotated[float, typer.Option(help="1 is off")]
SeedOption = Annotated[int | None, typer.Option(help="fixes the text of a sampled answer")]


@contextmanager
def clean_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit status 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def load_engine(
    model: str | None,
    dtype: str,
    method: str,
    budget: str,
    drafter: str | None,
    compile: bool,
    max_rows: int = 8,
    *,
    budget_name: str = "budget",
) -> Engine:
    """The engine that the options describe; the command calls its node budget `budget_name`.

    Raises:
        ValueError: a bad option.
        OSError: no such model.
    """
    if budget != "auto" and (not budget.isdecimal() or int(budget) < 1):
        raise ValueError(f"{budget_name} must be auto or an integer >= 1, got {budget!r}")
    nodes: int | str = budget if budget == "auto" else int(budget)
    if method not in (names := [*specdec.METHODS, *specdec.DRAFTER_METHODS]):
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    with console.status(f"loading {model or 'the embedded model'}"):
        _quiet_transformers()
        loaded, tokenizer = specdec.load(model, dtype)
        return specdec.Engine(loaded, tokenizer, method=method, budget=nodes, drafter=drafter, compile=compile, max_rows=max_rows)


def _quiet_transformers() -> None:
    """No progress bars of weight loading between the prompt and the answer."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, a line each; what looks like markup is text."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(_fact(value)))
    return table


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(item) for item in value)
    return str(value)
