"""WarmState: the file in which the servers of a machine share what their drafts learned (Engine.share_state), now and then and at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from specdec.serve.scheduler import Scheduler

__all__ = ["WarmState"]

logger = logging.getLogger("specdec")


class WarmState:
    """Shares the state of a scheduler's engine; the engine begins with what is in the file.

    Args:
        scheduler: shares between two steps.
        path: the file; others may share it.
        seconds: between two looks at it. An engine that took no step since the last one leaves it alone.

    Raises:
        ValueError: seconds <= 0, or the file is that of another method or vocabulary.
        OSError: the file cannot be read or written.
    """

    def __init__(self, scheduler: Scheduler, path: str | Path, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"share_every must be > 0 (seconds), got {seconds}")
        self._scheduler, self._path, self._seconds = scheduler, path, seconds
        self._share()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Share every so many seconds within the block, and after it, when the scheduler must be closed."""
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            await run_in_threadpool(self._share_or_log)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            if self._scheduler.engine.last_step is not self._seen:
                with contextlib.suppress(RuntimeError):  # the scheduler closes: the last look is near
                    await run_in_threadpool(self._scheduler.call, self._share_or_log)

    def _share(self) -> None:
        engine = self._scheduler.engine
        engine.share_state(self._path)
        self._seen = engine.last_step

    def _share_or_log(self) -> None:
        """A disk that is full must not end the server."""
        try:
            self._share()
        except (OSError, ValueError):
            logger.exception("specdec: the warm state was not shared")
