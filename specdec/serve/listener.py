"""Listener: the server at a port. After SIGTERM it takes no new connections; what still runs when the drain is over gets an answer too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

__all__ = ["Listener"]

MARGIN = 5  # seconds between the drain's end, when requests are told so, and the end of connections that do not take it


class Listener(uvicorn.Server):
    """uvicorn's server.

    Args:
        app: of make_app.
        host: address to listen at.
        port: 0: any free one.
        drain: seconds that running requests have after SIGTERM.
        max_connections: at once; more get 503.
        stall: seconds after which the system drops a client that takes nothing of what was sent (where it can).
        proxies: addresses whose X-Forwarded-For tells the client, with commas between them, "*" for any; None: nobody's does.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 8000,
        drain: float = 30,
        max_connections: int = 1000,
        stall: float = 30.0,
        proxies: str | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, timeout_graceful_shutdown=int(drain) + MARGIN, limit_concurrency=max_connections,
                proxy_headers=proxies is not None, forwarded_allow_ips=proxies, log_level="info", access_log=False,
            )
        )  # fmt: skip
        self._close, self._drain, self._stall = app.state.scheduler.close, drain, stall

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; accepted connections have the options of their listening socket."""
        await super().startup(sockets)
        if option := getattr(socket, "TCP_USER_TIMEOUT", None):
            for listening in (each for server in self.servers for each in server.sockets):
                listening.setsockopt(socket.IPPROTO_TCP, option, int(1000 * self._stall))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end, then end them with an error that clients can read, and only then cut connections."""
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending

    async def _end_requests(self) -> Any:
        await asyncio.sleep(self._drain)
        await asyncio.to_thread(self._close)
