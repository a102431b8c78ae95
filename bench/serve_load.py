"""Load on a running `specdec serve`: `python -m bench.serve_load --url http://127.0.0.1:8000 --model NAME`.

So many clients at once send short requests, one after the other. Printed: requests a second, latency percentiles, what was refused
with 429 or failed, and, given the server's process number, its resident memory after each quarter. The last stdout line is one JSON
object. What each answer must be is checked by whoever passes `check` (tests/test_serve_process.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError("bench.serve_load needs httpx; fix: pip install 'specdec[bench]'") from error

QUARTERS = 4


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        seconds: of each request that was answered with 200, in the order of their ends.
        statuses: HTTP status of each request; 0: no answer at all.
        wrong: numbers of the requests whose answer `check` refused.
        wall: seconds in all.
        memory: MiB of the server after each quarter of the requests; empty without a process number.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # threads append to lists safely
    wrong: list[int] = field(default_factory=list)
    wall: float = 0.0
    memory: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float | None:
        """Milliseconds within which this share of the requests was answered; None if none was."""
        ordered = sorted(self.seconds)
        return round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * share))], 1) if ordered else None

    def summary(self) -> dict[str, Any]:
        """One flat record. refused: with 429; failed: any other end without an answer."""
        refused = self.statuses.count(429)
        return {
            "requests": len(self.statuses), "ok": len(self.seconds), "refused": refused,
            "failed": len(self.statuses) - len(self.seconds) - refused, "wrong": len(self.wrong),
            "per_second": round(len(self.seconds) / max(self.wall, 1e-9), 1),
            **{f"p{share:g}_ms": self.percentile(share / 100) for share in (50, 90, 99, 100)},
            "memory_mib": [round(each, 1) for each in self.memory],
        }  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One of many short requests; no two of them are alike."""

    model: str
    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    @classmethod
    def of(cls, index: int, model: str) -> Request:
        """The request of a number."""
        return cls(model, f"request {index} of many", 4 + index % 13, float(index % 2), index)


def run(
    url: str, model: str, requests: int, clients: int, headers: dict[str, str], check: Callable[[int, str], bool], pid: int | None
) -> Load:
    """Send the requests.

    Args:
        url: of the server.
        model: its name there.
        requests, clients: how many; a client has one request open at a time.
        headers: with the key.
        check: whether a text is the answer to the request of a number.
        pid: of the server's process on this machine.
    """
    load, started = Load(), time.perf_counter()
    with httpx.Client(base_url=url, headers=headers, timeout=120, limits=httpx.Limits(max_connections=clients)) as session:

        def ask(index: int) -> None:
            begun = time.perf_counter()
            try:
                answer = session.post("/v1/completions", json=asdict(Request.of(index, model)))
            except httpx.HTTPError:
                load.statuses.append(0)
                return
            load.statuses.append(answer.status_code)
            if answer.status_code != 200:
                return
            load.seconds.append(time.perf_counter() - begun)
            if not check(index, answer.json()["choices"][0]["text"]):
                load.wrong.append(index)

        with ThreadPoolExecutor(clients) as pool:
            for quarter in range(QUARTERS):
                list(pool.map(ask, range(requests * quarter // QUARTERS, requests * (quarter + 1) // QUARTERS)))
                load.memory += [] if pid is None else [resident(pid)]
    load.wall = time.perf_counter() - started
    return load


def resident(pid: int) -> float:
    """MiB of memory that a process of this machine has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def main(
    model: Annotated[str, typer.Option(help="its name in requests")],
    url: Annotated[str, typer.Option(help="of the server")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=QUARTERS)] = 2000,
    clients: Annotated[int, typer.Option(min=1, help="requests open at once")] = 64,
    api_key: Annotated[str | None, typer.Option(envvar="SPECDEC_API_KEY")] = None,
    pid: Annotated[int | None, typer.Option(help="of the server, to watch its memory")] = None,
) -> None:
    """Load a server and print what its clients saw."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    summary = run(url, model, requests, clients, headers, lambda index, text: True, pid).summary()
    for name, value in summary.items():
        print(f"{name:>12}  {value}")
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
