"""Guest: what a search takes for an engine of its own. Its texts are jobs of the scheduler, beside everybody else's.

`specdec.reason` drives an engine: it adds sequences and steps until they have ended. Here nobody but the scheduler steps: `add`
submits a job, `step` waits until all jobs have ended, `score` runs between two steps. The tree is the same, since it depends neither
on the batch nor on the order of results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Seq
from typing import Any

from specdec.engine import Engine, TextScore
from specdec.segments import TextStore
from specdec.sequence import SamplingParams, Sequence
from specdec.serve.scheduler import Closed, Ended, Event, Failed, Job, Scheduler

__all__ = ["Guest", "Stopped"]


class Stopped(BaseException):
    """The search must end: no failure of a model or an evaluator, which would be tried again. Attribute `reason`: as in `Failed`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Guest:
    """One search's view of the scheduler's engine; every attribute that is not below is the engine's.

    Args:
        scheduler: runs the jobs. The search has reserved its rows.
        client: whose share of the rows the search uses.
        seconds: that the search may take, from now on.
    """

    def __init__(self, scheduler: Scheduler, client: str, seconds: float) -> None:
        self._scheduler, self._client = scheduler, client
        self._deadline = time.monotonic() + seconds
        self._changed = threading.Condition()  # guards the next two
        self._live: dict[int, Job] = {}  # by id() of what was submitted
        self._reason = ""  # why the search must end

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Engine, as far as isinstance is concerned: a proxy, as weakref.proxy is one."""
        return Engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler.engine, name)

    # ---- the search's side, in its thread

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            Stopped: the search must end.
        """
        self._submit(seq, Job([seq.token_ids], seq.params, self._client, self._ignore, sequences=[seq]))

    def step(self) -> None:
        """Wait until all sequences have ended.

        Raises:
            Stopped: the search must end.
        """
        self._wait(lambda: not self._live)

    def cancel(self, seq: Sequence) -> None:
        """Stop a sequence; it has left its row when this returns."""
        if job := self._live.get(id(seq)):
            self._scheduler.cancel(job)
            with self._changed:
                self._changed.wait_for(lambda: id(seq) not in self._live or not self._scheduler.alive)

    def generate(self, prompts: list[int], params: SamplingParams) -> Any:
        """As Engine.generate, for the token ids of one prompt.

        Raises:
            Stopped: the search must end.
            RuntimeError: the model failed.
        """
        events: list[Event] = []
        job = Job([prompts], params, self._client, events.append)
        self._submit(events, job)
        try:
            self._wait(lambda: id(events) not in self._live)
        except Stopped:
            self._scheduler.cancel(job)
            raise
        if not isinstance(events[-1], Ended):
            raise RuntimeError("the model failed")
        results = events[-1].results
        return results[0] if len(results) == 1 else results

    def score(self, token_ids: Seq[int], start: int = 1, store: TextStore | None = None) -> TextScore:
        """As Engine.score.

        Raises:
            Closed: the scheduler is.
        """
        return self._scheduler.call(lambda: self._scheduler.engine.score(token_ids, start, store))

    # ---- from any thread

    @property
    def seconds_left(self) -> float:
        """Until the search must end."""
        return self._deadline - time.monotonic()

    def stop(self, reason: str) -> None:
        """End the search before its next text; nothing happens if it has ended."""
        with self._changed:
            self._reason = self._reason or reason
            self._changed.notify_all()

    # ---- within

    def _submit(self, key: Any, job: Job) -> None:
        listener = job.notify

        def notify(event: Event) -> None:  # in the scheduler's thread
            listener(event)
            with self._changed:
                del self._live[id(key)]
                if isinstance(event, Failed) and event.reason != "error":  # an error is the search's to retry: seq.error
                    self._reason = self._reason or event.reason
                self._changed.notify_all()

        job.notify, job.counted, job.part_of = notify, False, self
        job.timeout = self.seconds_left
        with self._changed:
            self._check()
            self._live[id(key)] = job
        try:
            self._scheduler.submit(job)
        except Closed as error:
            del self._live[id(key)]
            raise Stopped("closed") from error

    def _wait(self, condition: Any) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: condition() or self._reason, max(0.0, self.seconds_left) + 1)
            self._reason = self._reason or ("" if in_time else "timeout")
            self._check()

    def _check(self) -> None:
        if self._reason:
            raise Stopped(self._reason)

    @staticmethod
    def _ignore(event: Event) -> None:
        """What became of a sequence is written on the sequence."""
