"""specdec generate | chat | bench | info: the engine from a shell. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import specdec

if TYPE_CHECKING:
    from specdec.engine import Engine, Result

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Faster generation from an existing Hugging Face model, with unchanged output.",
)
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from stdin")],
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    method: MethodOption = "auto",
    drafter: DrafterOption = None,
    budget: BudgetOption = "auto",
    compile: CompileOption = False,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="through the chat template, or as it is; chat if there is a template")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="print the answer when it is complete, and what it took")] = False,
) -> None:
    """Complete one prompt."""
    with _clean_errors():
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        engine = _engine(model, dtype, method, budget, drafter, compile)
        request = _request(engine.tokenizer, text, chat)
        if not stats:
            _print_stream(engine, request, params)
            return
        start = time.perf_counter()
        result = engine.generate(request, params)
        seconds = time.perf_counter() - start
        typer.echo(result.text)
        console.print(_statistics(result, seconds))


@app.command()
def chat(
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    method: MethodOption = "auto",
    drafter: DrafterOption = None,
    budget: BudgetOption = "auto",
    compile: CompileOption = False,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
) -> None:
    """Talk to the model. /reset starts over; an empty line, /quit or Ctrl-D ends; Ctrl-C stops an answer."""
    with _clean_errors():
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        engine = _engine(model, dtype, method, budget, drafter, compile)
        if not getattr(engine.tokenizer, "chat_template", None):
            raise ValueError("model must have a chat template to chat; use `specdec generate --raw`")
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        while line := _read_line():
            if line == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _print_stream(engine, messages, params)})


@app.command()
def info(
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    method: MethodOption = "auto",
    drafter: DrafterOption = None,
    budget: BudgetOption = "auto",
    compile: CompileOption = False,
    costs: Annotated[bool, typer.Option("--costs/--no-costs", help="load the model and measure its forward")] = True,
) -> None:
    """Versions, device, which operators run, and what a forward of the model costs here."""
    with _clean_errors():
        _print_facts("specdec", _environment())
        if costs:
            engine = _engine(model, dtype, method, budget, drafter, compile)
            _print_facts("engine", engine.info())


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Compare methods and peers on the same prompts; `specdec bench --help` lists the options."""
    with _clean_errors():
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command.command()(_bench_main())
        command(args=context.args, prog_name="specdec bench")


def main() -> None:
    """Entry point of the `specdec` command."""
    app()


# ---- pieces ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _clean_errors() -> Iterator[None]:
    """What a user can mend is one line on stderr and exit status 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def _engine(model: str | None, dtype: str, method: str, budget: str, drafter: str | None, compile: bool) -> Engine:
    nodes = _budget(budget)
    if method not in (names := [*specdec.METHODS, *specdec.DRAFTER_METHODS]):
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    with console.status(f"loading {model or 'the embedded model'}"):
        _quiet_transformers()
        loaded, tokenizer = specdec.load(model, dtype)
        return specdec.Engine(loaded, tokenizer, method=method, budget=nodes, drafter=drafter, compile=compile)


def _bench_main() -> Callable[..., None]:
    """The benchmark's own command: specdec.bench where specdec is installed, the folder bench/ in a checkout."""
    name = "specdec.bench" if find_spec("specdec.bench") else "bench"
    beside = Path(specdec.__file__).parents[1] / "bench" / "run.py"
    if name == "bench" and not beside.is_file():
        raise ImportError("specdec bench needs the package specdec.bench; fix: pip install --force-reinstall --no-deps specdec")
    run: Callable[..., None] = import_module(f"{name}.run").main
    return run


def _budget(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"budget must be auto or an integer >= 1, got {text!r}")
    return int(text)


def _quiet_transformers() -> None:
    """No progress bars of weight loading between the prompt and the answer."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _request(tokenizer: Any, text: str, chat: bool | None) -> str | list[dict[str, str]]:
    """The prompt as Engine takes it: a chat message where there is, or must be, a chat template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("chat needs a model with a chat template; use --raw")
    return [{"role": "user", "content": text}] if chat or (chat is None and has_template) else text


def _print_stream(engine: Engine, request: Any, params: specdec.SamplingParams) -> str:
    """Print the answer as it comes; Ctrl-C ends it. Returns what was printed."""
    pieces = []
    stream = engine.stream(request, params)
    try:
        for piece in stream:
            pieces.append(piece)
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
    else:
        typer.echo()
    return "".join(pieces)


def _read_line() -> str:
    """One line of the user; empty at the end of the input and for /quit."""
    try:
        line = console.input("[bold green]> [/]").strip()
    except EOFError:
        return ""
    return "" if line == "/quit" else line


def _statistics(result: Result, seconds: float) -> Table:
    decode = seconds - result.times.get("prefill", 0.0)
    tokens = len(result.token_ids)
    facts = {
        "tokens": f"{tokens} after a prompt of {result.prompt_tokens}, ended by {result.finish_reason}",
        "steps": f"{result.steps}, {tokens / max(result.steps, 1):.2f} tokens a step",
        "speed": f"{tokens / decode:.1f} tokens a second, prefill ({seconds - decode:.2f} s) excluded",
        "milliseconds a step": ", ".join(
            f"{part} {1000 * spent / max(result.steps, 1):.2f}" for part, spent in result.times.items() if part != "prefill"
        ),
    }
    return _facts_table(facts)


def _environment() -> dict[str, Any]:
    import torch

    from specdec._cache import cache_folder
    from specdec._jit import HAVE_NUMBA
    from specdec.models import is_embedded_installed

    return {
        "specdec": specdec.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "numpy", "numba")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "compiled drafting (numba)": "yes" if HAVE_NUMBA else "no: plain Python, many times slower; pip install numba",
        "native operators": _native_operators(),
        "embedded model": "installed" if is_embedded_installed() else "not installed: pip install specdec[demo]",
        "cache": cache_folder(),
    }


def _native_operators() -> str:
    """What of specdec._C runs here, or why PyTorch does its work."""
    from specdec.attention import compiled_op
    from specdec.linear import HAVE_OP, instruction_set

    if not HAVE_OP:
        if os.environ.get("SPECDEC_NO_EXT") == "1":
            return "no, SPECDEC_NO_EXT=1 is set: PyTorch does their work"
        return "no, specdec._C is not built: PyTorch does their work; pip install --no-build-isolation . builds it"
    cuda = "with" if compiled_op("cuda") else "without"
    return f"linear and tree_attention on the CPU ({instruction_set()}); {cuda} tree_attention on CUDA (SPECDEC_CUDA=1)"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    output = Console()
    output.print(f"[bold]{title}")
    output.print(_facts_table(facts))


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _fact(value))
    return table


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(item) for item in value)
    return str(value)


if __name__ == "__main__":
    main()
