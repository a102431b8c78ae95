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
    max_searches: Annotated[int, typer.Option(min=1, help="/v1/reason calls that run at once")] = 2,
    max_budget: Annotated[int, typer.Option(min=0, help="most tokens of a /v1/reason call")] = 20_000,
    max_body: Annotated[int, typer.Option(min=1, help="most bytes of a request")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a request may take, waiting included")] = 600.0,
    warm_state: Annotated[
        Path | None, typer.Option(help="file in which the servers of this machine share what their drafts learn")
    ] = None,
    share_every: Annotated[float, typer.Option(min=0.001, help="seconds between two looks at it")] = 60.0,
    drain: Annotated[int, typer.Option(min=0, help="seconds that running requests have after SIGTERM")] = 30,
) -> None:
    """Serve an OpenAI-compatible HTTP API: /v1/completions, /v1/chat/completions, /v1/reason, /v1/models, /health, /metrics."""
    with clean_errors():
        if missing := [package for package in NEEDED if find_spec(package) is None]:
            raise ImportError(f"specdec serve needs {', '.join(missing)}; fix: pip install 'specdec[serve]'")
        import uvicorn

        from specdec.serve.app import Limits, make_app

        if api_key is None and not _is_loopback(host):
            console.print(f"anybody who reaches {host} can use this server; --api-key asks for a key", style="yellow")
        limits = Limits(
            body=max_body, new_tokens=max_tokens, waiting=max_waiting, seconds=timeout, searches=max_searches, search_budget=max_budget,
        )  # fmt: skip
        engine = load_engine(model, dtype, method, budget, drafter, compile, max_rows)
        served = name or (model or "embedded").rstrip("/").rsplit("/", 1)[-1]
        app = make_app(engine, served, limits, api_key, warm_state=warm_state, share_every=share_every)
        console.print(f"serving {served}", highlight=False)
        # Once SIGTERM comes, uvicorn takes no new connections and lets the running requests end.
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=drain, log_level="info", access_log=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
