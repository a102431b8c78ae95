"""specdec generate | chat | reason | serve | info | bench: the engine from a shell. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import specdec
from specdec.search.cli import reason
from specdec.serve.cli import serve
from specdec.terminal import (
    BudgetOption,
    CompileOption,
    DrafterOption,
    DtypeOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
    clean_errors,
    console,
    facts_table,
    load_engine,
)

if TYPE_CHECKING:
    from specdec.engine import Engine, Result

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Faster generation from an existing Hugging Face model, with unchanged output.",
)


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
    with clean_errors():
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        engine = load_engine(model, dtype, method, budget, drafter, compile)
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
    with clean_errors():
        params = specdec.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        engine = load_engine(model, dtype, method, budget, drafter, compile)
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


app.command()(reason)
app.command()(serve)


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
    with clean_errors():
        _print_facts("specdec", _environment())
        if costs:
            engine = load_engine(model, dtype, method, budget, drafter, compile)
            _print_facts("engine", engine.info())


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Compare methods and peers on the same prompts; `specdec bench --help` lists the options."""
    with clean_errors():
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command.command()(_bench_main())
        command(args=context.args, prog_name="specdec bench")


def main() -> None:
    """Entry point of the `specdec` command."""
    app()


# ---- pieces ----------------------------------------------------------------------------------------------------------------


def _bench_main() -> Callable[..., None]:
    """The benchmark's own command: specdec.bench where specdec is installed, the folder bench/ in a checkout."""
    name = "specdec.bench" if find_spec("specdec.bench") else "bench"
    beside = Path(specdec.__file__).parents[1] / "bench" / "run.py"
    if name == "bench" and not beside.is_file():
        raise ImportError("specdec bench needs the package specdec.bench; fix: pip install --force-reinstall --no-deps specdec")
    run: Callable[..., None] = import_module(f"{name}.run").main
    return run


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
    return facts_table(facts)


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
    output.print(facts_table(facts))


if __name__ == "__main__":
    main()
