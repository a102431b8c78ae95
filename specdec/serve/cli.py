"""specdec serve: the engine behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import ipaddress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from specdec.terminal import (
    BudgetOption,
    CompileOption,
    DrafterOption,
    DtypeOption,
    MethodOption,
    ModelOption,
    clean_errors,
    console,
    load_engine,
)

__all__ = ["serve"]

NEEDED = ("fastapi", "prometheus_client", "uvicorn")


def serve(
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    method: MethodOption = "auto",
    drafter: DrafterOption = None,
    budget: BudgetOption = "auto",
    compile: CompileOption = False,
    host: Annotated[
        str, typer.Option(help="address to listen at; the default is reachable from this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="of the model in requests; default: its folder or hub name's last part")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SPECDEC_API_KEY", help="that clients must send; the variable keeps it out of ps")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="samples decoded at once")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="samples that may wait for a row; further requests get 429")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="most new tokens of a sample")] = 4096,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="most tokens of a prompt; default: the model's context")] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="most samples of a request, prompts times n")] = 64,
    max_searches: Annotated[int, typer.Option(min=1, help="/v1/reason calls that run at once")] = 2,
    max_budget: Annotated[int, typer.Option(min=0, help="most tokens of a /v1/reason call")] = 20_000,
    max_body: Annotated[int, typer.Option(min=1, help="most bytes of a request")] = 1 << 20,
    max_connections: Annotated[int, typer.Option(min=1, help="connections at once; more get 503")] = 1000,
    stall: Annotated[float, typer.Option(min=0.001, help="seconds that a client may leave its stream unread")] = 30.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a request may take, waiting included")] = 600.0,
    warm_state: Annotated[
        Path | None, typer.Option(help="file in which the servers of this machine share what their drafts learn")
    ] = None,
    share_every: Annotated[float, typer.Option(min=0.001, help="seconds between two looks at it")] = 60.0,
    drain: Annotated[int, typer.Option(min=0, help="seconds that running requests have after SIGTERM")] = 30,
    proxy: Annotated[
        str | None, typer.Option(help="addresses (* for any) whose X-Forwarded-For names the client; default: nobody's does")
    ] = None,
) -> None:
    """Serve an OpenAI-compatible HTTP API: /v1/completions, /v1/chat/completions, /v1/reason, /v1/models, /health, /metrics."""
    with clean_errors():
        if missing := [package for package in NEEDED if find_spec(package) is None]:
            raise ImportError(f"specdec serve needs {', '.join(missing)}; fix: pip install 'specdec[serve]'")
        from specdec.serve.app import Limits, make_app
        from specdec.serve.listener import Listener

        if api_key is None and not _is_loopback(host):
            console.print(f"anybody who reaches {host} can use this server; --api-key asks for a key", style="yellow")
        limits = Limits(
            body=max_body, new_tokens=max_tokens, prompt_tokens=max_prompt, samples=max_samples, waiting=max_waiting,
            seconds=timeout, stall=stall, searches=max_searches, search_budget=max_budget,
        )  # fmt: skip
        engine = load_engine(model, dtype, method, budget, drafter, compile, max_rows)
        served = name or (model or "embedded").rstrip("/").rsplit("/", 1)[-1]
        app = make_app(engine, served, limits, api_key, warm_state=warm_state, share_every=share_every)
        console.print(f"serving {served}", highlight=False)
        Listener(app, host, port, drain, max_connections, stall, proxy).run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
