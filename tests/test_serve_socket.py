"""specdec serve at a socket, in this process: clients that leave or stall, the drain's end, forged addresses, too many connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from specdec.serve import app as app_module
from specdec.serve.app import Limits, make_app
from specdec.serve.listener import Listener
from specdec.serve.scheduler import Job, Piece, Scheduler
from specdec.serve.searches import Searches
from test_serve import BASE, MODEL, make_engine, until

LONG = {**BASE, "max_tokens": 2000, "ignore_eos": True}


@contextlib.asynccontextmanager
async def listening(limits: Limits | None = None, max_rows: int = 2, **options: Any) -> AsyncIterator[Any]:
    """A client of a server at a free port; `client.listener` is the server."""
    app = make_app(make_engine(max_rows=max_rows), MODEL, limits)
    listener = Listener(app, port=0, **options)
    serving = asyncio.create_task(listener.serve())
    await until(lambda: listener.started)
    port = listener.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.listener, client.scheduler, client.port = listener, app.state.scheduler, port
        yield client
        listener.should_exit = True
        await serving


async def leave_unread(port: int, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection with a request on it, whose answer nobody reads."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


async def metric(client: Any, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_counted(stream: bool) -> None:
    async def main() -> None:
        async with listening() as client:
            connection = await leave_unread(client.port, "/v1/completions", {**LONG, "n": 8, "stream": stream})
            await until(lambda: client.scheduler.running)
            connection.close()
            await until(lambda: not client.scheduler._unfinished)
            assert await metric(client, 'specdec_failures_total{reason="cancelled"}') == 1
            assert await metric(client, "specdec_completion_tokens_total") == 0

    asyncio.run(main())


def test_a_client_that_leaves_is_noticed_however_fast_events_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search tells a step every few milliseconds: there is no pause to look at the connection in."""
    begun, left = threading.Event(), threading.Event()

    def submit(self: Searches, body: Any, client: str, seconds: float, notify: Any) -> None:
        def tell() -> None:
            while not left.wait(0.01):
                notify(Piece(0, "", [], None, None))
                begun.set()

        threading.Thread(target=tell).start()

    monkeypatch.setattr(Searches, "submit", submit)
    monkeypatch.setattr(Searches, "cancel", lambda self, search: left.set())

    async def main() -> None:
        async with listening() as client:
            connection = await leave_unread(client.port, "/v1/reason", {"model": MODEL, "problem": "1 + 1"})
            try:
                await until(begun.is_set)
                connection.close()
                await until(left.is_set)
            finally:
                left.set()

    asyncio.run(main())


def test_a_stream_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request ends and so does its connection; before, both stayed for as long as the client liked."""
    written = app_module.event
    monkeypatch.setattr(app_module, "event", lambda body: ":" + " " * 2**22 + "\n" + written(body))

    async def main() -> None:
        async with listening(Limits(stall=0.3), stall=0.3) as client:
            connection = await leave_unread(client.port, "/v1/completions", {**LONG, "stream": True}, 4096)
            await until(lambda: client.scheduler.running)
            await until(lambda: not client.scheduler._unfinished)
            state = client.listener.server_state
            await until(lambda: not state.tasks)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                await until(lambda: not state.connections)
            assert await metric(client, 'specdec_failures_total{reason="cancelled"}') == 1
            connection.close()

    asyncio.run(main())


def test_the_end_of_the_drain_is_an_answer() -> None:
    """What still runs then ends with errors that clients can read: 503, or an event in a stream."""

    async def main() -> None:
        async with listening(drain=0.2, max_rows=1) as client:
            body = {**LONG, "n": 8}
            whole, stream = (
                asyncio.create_task(client.post("/v1/completions", json={**body, "stream": stream})) for stream in (False, True)
            )
            await until(lambda: client.scheduler._unfinished == 16)
            client.listener.should_exit = True
            answer = await whole
            assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
            last = json.loads((await stream).text.rstrip().split("data: ")[-1])
            assert (await stream).status_code == 200 and "shutting down" in last["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("proxies", "expected"), [(None, {"127.0.0.1"}), ("127.0.0.1", {"10.0.0.1", "10.0.0.2"}), ("10.1.1.1", {"127.0.0.1"})]
)
def test_who_asks_cannot_be_forged(monkeypatch: pytest.MonkeyPatch, proxies: str | None, expected: set[str]) -> None:
    """A client with many made-up addresses would have many shares of the rows."""
    seen: set[str] = set()
    original = Scheduler.submit

    def submit(self: Scheduler, job: Job) -> None:
        seen.add(job.client)
        original(self, job)

    monkeypatch.setattr(Scheduler, "submit", submit)

    async def main() -> None:
        async with listening(proxies=proxies) as client:
            for address in ("10.0.0.1", "10.0.0.2"):
                answer = await client.post("/v1/completions", json=BASE, headers={"X-Forwarded-For": address})
                assert answer.status_code == 200
            assert seen == expected

    asyncio.run(main())


def test_connections_are_bounded() -> None:
    async def main() -> None:
        async with listening(max_connections=4) as client:
            idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
            await until(lambda: len(client.listener.server_state.connections) == 4)
            assert (await client.get("/health")).status_code == 503
            for connection in idle:
                connection.close()
            await until(lambda: len(client.listener.server_state.connections) <= 1)
            assert (await client.get("/health")).status_code == 200

    asyncio.run(main())
