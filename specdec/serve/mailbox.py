"""Mailbox: the events of one request, between the thread that makes them and the handler that reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import replace
from typing import Any

from specdec.serve.scheduler import Piece

__all__ = ["Mailbox"]


class Mailbox:
    """Events in their order. Pieces of one sample that nobody has read yet become one, so that what a slow client leaves unread takes
    the memory of its text, and not of an event a step.

    To be made in the event loop that reads.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._unread: deque[Any] = deque()
        self._filled = asyncio.Event()

    def put(self, happened: Any) -> None:
        """From any thread; does not block."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it everybody who listened
            self._loop.call_soon_threadsafe(self._add, happened)

    async def get(self, seconds: float) -> Any:
        """The oldest event; None if none comes within so many seconds."""
        if not self._unread:
            self._filled.clear()
            try:
                await asyncio.wait_for(self._filled.wait(), seconds)
            except TimeoutError:
                return None
        return self._unread.popleft()

    def __len__(self) -> int:
        return len(self._unread)

    def _add(self, happened: Any) -> None:
        if isinstance(happened, Piece):
            for place, other in enumerate(self._unread):
                if isinstance(other, Piece) and other.index == happened.index:
                    self._unread[place] = _joined(other, happened)
                    return
        self._unread.append(happened)
        self._filled.set()


def _joined(first: Piece, second: Piece) -> Piece:
    logprobs = None if first.logprobs is None else [*first.logprobs, *(second.logprobs or [])]
    text, token_ids = first.text + second.text, [*first.token_ids, *second.token_ids]
    return replace(second, text=text, token_ids=token_ids, logprobs=logprobs)
