"""Scheduler: one thread owns the engine. Requests join and leave between steps, and every client has the same share of the rows, and
within it every request.

    submit -> a queue a client -> free rows to who has the fewest -> Engine.step -> pieces, results -> notify
    call   ------------------------------------------------------------------> between two steps -> its result

A request's random streams are those of `Engine.generate` for its prompts alone, so its text does not depend on what runs beside it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from specdec.engine import Engine, Result
from specdec.sequence import SamplingParams, Sequence
from specdec.text import Detokenizer

__all__ = ["Closed", "Ended", "Failed", "Job", "Overloaded", "Piece", "Scheduler"]

T = TypeVar("T")
logger = logging.getLogger("specdec")


class Closed(RuntimeError):
    """The scheduler takes nothing any more; the message says why."""


class Overloaded(Exception):
    """The queue is full. Attribute `retry_after`: seconds until there should be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one sample of a streaming request."""

    index: int  # of the sample: prompt by prompt
    text: str  # maybe "", while a character or a stop string may be incomplete
    token_ids: list[int]  # emitted since the last piece
    logprobs: list[float] | None  # of token_ids
    finish_reason: str | None  # on the last piece of a sample


@dataclass(frozen=True, slots=True)
class Ended:
    """All samples have finished."""

    results: list[Result]  # prompt by prompt


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a result."""

    reason: str  # "error" (the model failed), "timeout", "cancelled" or "closed" (the server stops)


Event = Piece | Ended | Failed


@dataclass(eq=False, slots=True)
class Job:
    """One request.

    Attributes:
        prompts: token ids of each prompt.
        params: of all its prompts.
        client: who asks; clients share the rows equally.
        notify: told every event, in the scheduler's thread: it must not block or raise. The last one is Ended or Failed.
        timeout: seconds from submission, waiting included.
        stream: whether it wants Pieces.
        sequences: of its samples, if they are made already.
        part_of: the request whose share of the client's rows it uses; None: its own.
        counted: against the limit of the queue; False: `reserve` has counted it.
    """

    prompts: list[list[int]]
    params: SamplingParams
    client: str
    notify: Callable[[Event], None]
    timeout: float = 600.0
    stream: bool = False
    sequences: list[Sequence] | None = None
    part_of: Any = None
    counted: bool = True
    deadline: float = math.inf
    left: int = 0  # samples that have not finished
    samples: list[_Sample] = field(default_factory=list)

    @property
    def request(self) -> Any:
        """What it shares the client's rows as."""
        return self if self.part_of is None else self.part_of

    @property
    def size(self) -> int:
        """Rows that it needs."""
        return len(self.prompts) * self.params.n


@dataclass(eq=False, slots=True)
class _Sample:
    """One row of a job, waiting or running."""

    job: Job
    index: int
    seq: Sequence
    detokenizer: Detokenizer
    sent: int = 0  # tokens that Pieces have told


class Scheduler:
    """Runs jobs on an engine that nobody else steps.

    Args:
        engine: with a tokenizer.
        max_waiting: samples that may wait for a row; `submit` refuses more.
        idle_seconds: without work, after which the K/V buffers are given back.

    Raises:
        ValueError: no tokenizer, a model that several processes share, or max_waiting < 0.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256, idle_seconds: float = 300.0) -> None:
        if engine.tokenizer is None:
            raise ValueError("a server needs a tokenizer to read and write text; fix: Engine(model, tokenizer)")
        if engine.target.ranks.size > 1:
            raise ValueError(
                f"{engine.target.ranks.size} processes share the model, and requests would reach one; fix: serve from one process"
            )
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be >= 0, got {max_waiting}")
        self.engine, self.max_waiting, self.idle_seconds = engine, max_waiting, idle_seconds
        self._changed = threading.Condition()  # guards the next five
        self._arrived: list[Job] = []
        self._cancelled: list[Job] = []
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._unfinished = 0  # samples, waiting and running, and reserved ones
        self._refusal = ""  # why nothing is taken any more
        self._jobs: set[Job] = set()
        self._queues: dict[str, deque[_Sample]] = {}  # by client, none empty; who was served last comes last
        self._running: list[_Sample] = []
        self._seconds = 1.0  # that a job takes, a moving average
        self._thread = threading.Thread(target=self._loop, name="specdec-scheduler", daemon=True)

    # ---- from any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Samples that have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Samples that wait for a row, or that a search has reserved."""
        return max(0, self._unfinished - len(self._running))

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Overloaded: there is no room for it.
            Closed: the server stops, or the thread has ended.
        """
        with self._changed:
            self._reserve(job.size if job.counted else 0)
            job.left = job.size
            job.deadline = time.monotonic() + job.timeout
            self._arrived.append(job)
            self._changed.notify()

    def reserve(self, samples: int) -> None:
        """Count samples whose jobs come later, with `counted=False`; raises as `submit` does."""
        with self._changed:
            self._reserve(samples)

    def release(self, samples: int) -> None:
        """Undo `reserve`."""
        with self._changed:
            self._unfinished -= samples

    def _reserve(self, samples: int) -> None:
        if self._refusal:
            raise Closed(f"the scheduler is closed: {self._refusal}")
        rows = self.engine.max_rows
        if samples and self._unfinished + samples > rows + self.max_waiting:
            raise Overloaded(min(60, math.ceil(self._seconds * max(1, self.waiting) / rows)))
        self._unfinished += samples

    def call(self, function: Callable[[], T]) -> T:
        """`function()` between two steps; blocks until then.

        Raises:
            Closed: as `submit`. And what the function raises.
        """
        future: Future[T] = Future()
        with self._changed:
            self._reserve(0)
            self._calls.append((future, function))
            self._changed.notify()
        return future.result()

    def cancel(self, job: Job) -> None:
        """Free the rows of a job before its next step; nothing happens if it has ended."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Stop after this step; jobs that have not ended fail with "closed"."""
        with self._changed:
            self._refusal = self._refusal or "the server is shutting down"
            self._changed.notify()
        if self.alive:
            self._thread.join()

    # ---- in the scheduler's thread --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        last = Failed("error")
        try:
            while self._take():
                self._admit()
                self._step()
                for sample in list(self._running):
                    self._report(sample)
                self._answer_call()
            for job in list(self._jobs):
                self._end(job, Failed("closed"))
            last = Failed("closed")
        finally:
            self._tell_everybody(last)

    def _tell_everybody(self, last: Failed) -> None:
        """Nobody may wait for a thread that has ended, however it did; the engine is not touched, it may be what failed."""
        with self._changed:
            self._refusal = self._refusal or "the engine's thread has ended"
            jobs, calls = [*self._jobs, *self._arrived], list(self._calls)
            self._jobs, self._arrived = set(), []
            self._calls.clear()
            self._queues.clear()
            self._running.clear()
        for job in jobs:
            self._finished(job, job.left)
            job.notify(last)
        for future, _ in calls:
            future.set_exception(Closed(f"the scheduler is closed: {self._refusal}"))

    def _take(self) -> bool:
        """Wait for something to do; start what has arrived, end what was cancelled or is late. False: closing."""
        if not self._wait(self.idle_seconds):
            self._trim()
            self._wait(None)
        with self._changed:
            arrived, self._arrived = self._arrived, []
            self._jobs.update(arrived)
            cancelled, self._cancelled = self._cancelled, []
        for job in arrived:
            self._begin(job)
        for job in cancelled:
            self._end(job, Failed("cancelled"))
        now = time.monotonic()
        for job in [job for job in self._jobs if now > job.deadline]:
            self._end(job, Failed("timeout"))
        return not self._refusal

    def _wait(self, seconds: float | None) -> bool:
        """Whether something to do has come within so many seconds."""
        with self._changed:
            return bool(self._changed.wait_for(self._has_work, seconds))

    def _has_work(self) -> bool:
        return bool(self._arrived or self._cancelled or self._jobs or self._calls or self._refusal)

    def _trim(self) -> None:
        """Give back what long or many texts have made the buffers grow to."""
        try:
            self.engine.trim()
        except (RuntimeError, MemoryError):  # not even the smallest buffers can be had beside the old ones: those stay
            logger.exception("specdec: no memory for new buffers")

    def _begin(self, job: Job) -> None:
        try:
            sequences = job.sequences or self.engine._sequences(job.prompts, [job.params] * len(job.prompts))
        except Exception:  # the thread must outlive it, whatever it is: this request alone fails
            logger.exception("specdec: a request was accepted that the engine refuses")
            self._end(job, Failed("error"))
            return
        stops, tokenizer = job.params.stop_strings, self.engine.tokenizer
        job.samples = [_Sample(job, index, seq, Detokenizer(tokenizer, stops)) for index, seq in enumerate(sequences)]
        self._queues.setdefault(job.client, deque()).extend(job.samples)

    def _admit(self) -> None:
        """Give free rows to the client with the fewest, among equals to the one that was served longest ago; and of its requests to the
        one with the fewest, among equals to the oldest."""
        engine = self.engine
        while self._queues and len(engine.rows) + len(engine.waiting) < engine.max_rows:
            rows = Counter(sample.job.client for sample in self._running)
            client = min(self._queues, key=lambda name: rows[name])  # min takes the first of equals
            queue = self._queues.pop(client)
            own = Counter(sample.job.request for sample in self._running)
            sample = min(queue, key=lambda sample: own[sample.job.request])
            queue.remove(sample)
            if queue:
                self._queues[client] = queue
            engine.add(sample.seq)
            self._running.append(sample)

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:  # the thread must outlive a failing forward: all rows were in it, and all of them fail
            logger.exception("specdec: a step failed")
            for sample in self._running:
                self.engine.cancel(sample.seq)
                sample.seq.finish_reason, sample.seq.error = "error", error

    def _answer_call(self) -> None:
        """One a step: calls must not hold up the texts."""
        with self._changed:
            if not self._calls:
                return
            future, function = self._calls.popleft()
        try:
            future.set_result(function())
        except BaseException as error:  # the caller's to handle
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def _report(self, sample: _Sample) -> None:
        """Tell what the step gave this sample."""
        seq, job = sample.seq, sample.job
        if job not in self._jobs:  # another sample of it has just failed
            return
        if seq.error is not None:
            logger.error("specdec: a request failed", exc_info=seq.error)
            self._end(job, Failed("error"))
            return
        if job.stream and (seq.finished or seq.output_length > sample.sent):
            job.notify(self._piece(sample))
        if seq.finished:
            self._running.remove(sample)
            self._finished(job, 1)
            if job.left == 0:
                self._jobs.discard(job)
                if job.counted:
                    self._seconds += 0.1 * (time.monotonic() - job.deadline + job.timeout - self._seconds)
                job.notify(Ended([self.engine._result(other.seq) for other in job.samples]))

    def _piece(self, sample: _Sample) -> Piece:
        seq, first = sample.seq, sample.sent
        output_ids = seq.output_ids
        sample.sent = len(output_ids)
        logprobs = seq.logprobs[first:] if seq.params.logprobs is not None else None
        text = sample.detokenizer.push(output_ids, seq.finished)
        return Piece(sample.index, text, output_ids[first:], logprobs, seq.finish_reason)

    def _end(self, job: Job, event: Failed) -> None:
        """End a job without a result, wherever its samples are."""
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        if queue := self._queues.get(job.client):
            kept = deque(sample for sample in queue if sample.job is not job)
            if kept:
                self._queues[job.client] = kept
            else:
                del self._queues[job.client]
        for sample in job.samples:
            self.engine.cancel(sample.seq)
        self._running = [sample for sample in self._running if sample.job is not job]
        self._finished(job, job.left)
        job.notify(event)

    def _finished(self, job: Job, samples: int) -> None:
        with self._changed:
            job.left -= samples
            self._unfinished -= samples if job.counted else 0
