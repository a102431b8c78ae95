"""Searches: reasoning calls beside the scheduler's other jobs, a few at a time, each in a thread of its own that never steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from specdec.search.answers import AnswerFormat, make_format
from specdec.search.config import SearchConfig
from specdec.search.progress import Event
from specdec.search.prompts import Prompts
from specdec.search.reason import ReasonResult, reason_all
from specdec.search.search import Search
from specdec.sequence import SamplingParams
from specdec.serve.guest import Guest, Stopped
from specdec.serve.protocol import ReasonRequest
from specdec.serve.scheduler import Failed, Scheduler

__all__ = ["Searches", "Step"]

logger = logging.getLogger("specdec")
SHARE = 0.9  # of the time that is left, for the search; the rest is for the texts in flight at its end
KV_MEGABYTES = 256.0  # of the K/V that one search keeps between its texts

Step = Event  # of a search: one text was told


@dataclass(eq=False, slots=True)
class _Running:
    """A search that was submitted."""

    guest: Guest
    future: Future[None]


class Searches:
    """Runs searches.

    Args:
        scheduler: generates their texts.
        most: searches that run at once; further ones wait.
    """

    def __init__(self, scheduler: Scheduler, most: int) -> None:
        self._scheduler = scheduler
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="specdec-search")

    def encode(self, problem: str) -> list[int]:
        """The token ids with which every text of a search begins."""
        return Prompts().encode(self._scheduler.engine.tokenizer, problem)

    def submit(
        self, body: ReasonRequest, client: str, seconds: float, notify: Callable[[Step | ReasonResult | Failed], None]
    ) -> _Running:
        """Queue a search.

        Args:
            body: what is asked for.
            client: whose share of the rows it uses.
            seconds: that it may take, waiting included.
            notify: told every step, in another thread, and at last the result or Failed: it must not block or raise.

        Raises:
            ValueError: an argument that the search refuses.
            ImportError: it needs a package that the server lacks.
            Overloaded: there is no room for it.
            Closed: the scheduler is.
        """
        guest = Guest(self._scheduler, client, seconds)
        self._scheduler.engine._check_prompt(self.encode(body.problem), SamplingParams(max_new_tokens=1))
        answers = make_format(body.answers)
        config = SearchConfig(step_tokens=body.step_tokens, seconds=body.seconds)
        Search(body.policy, body.budget, body.seed, config)  # raises here what would be raised in the thread

        def on_event(event: Event) -> None:
            if event.status is None:  # the last one is the result
                notify(event)

        def begin(config: SearchConfig) -> Iterator[tuple[int, Any]]:
            return reason_all(
                guest, [body.problem], body.budget, body.evaluator, body.policy, body.seed,
                temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, answers=answers, step=body.step, config=config,
                width=body.width, kv_megabytes=KV_MEGABYTES, on_event=on_event,
            )  # fmt: skip

        def begin_in_time() -> Iterator[tuple[int, Any]]:
            """Who asked for what is found within some seconds gets it before the server's own limit, which drops it."""
            seconds = None if body.seconds is None else max(0.0, min(body.seconds, SHARE * guest.seconds_left))
            return begin(replace(config, seconds=seconds))

        begin(config)  # raises here, too
        self._scheduler.reserve(body.width)
        future = self._pool.submit(self._run, begin_in_time, answers, notify)
        future.add_done_callback(lambda _: self._scheduler.release(body.width))
        return _Running(guest, future)

    def cancel(self, search: _Running) -> None:
        """End a search; nothing happens if it has ended."""
        search.guest.stop("cancelled")
        search.future.cancel()

    def close(self) -> None:
        """Wait for the searches, which the closed scheduler ends."""
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _run(begin: Callable[[], Iterator[tuple[int, Any]]], answers: AnswerFormat, notify: Callable[[Any], None]) -> None:
        last: ReasonResult | Failed = Failed("error")
        try:
            ((_, result),) = begin()
            if isinstance(result, ReasonResult):
                last = result
            else:
                logger.error("specdec: a search failed", exc_info=result)
        except Stopped as stop:
            last = Failed(stop.reason)
        except Exception:  # the client must be told, whatever it is
            logger.exception("specdec: a search failed")
        finally:
            if callable(close := getattr(answers, "close", None)):  # the process that reads mathematics
                close()
        notify(last)
