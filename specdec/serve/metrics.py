"""Metrics: what /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specdec.search.reason import ReasonResult
from specdec.serve.scheduler import Ended, Failed, Scheduler

__all__ = ["Metrics"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        scheduler: whose rows and queue are watched.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        self._answers = Counter("specdec_http_answers", "HTTP answers", ["path", "status"], registry=registry)
        self._failures = Counter("specdec_failures", "requests that ended without a result", ["reason"], registry=registry)
        self._prompt = Counter("specdec_prompt_tokens", "prompt tokens, once a sample", registry=registry)
        self._tokens = Counter("specdec_completion_tokens", "tokens generated", registry=registry)
        self._steps = Counter("specdec_steps", "verification steps, once a row; tokens / steps: tokens a step", registry=registry)
        self._seconds = Histogram("specdec_request_seconds", "from submission to the end", buckets=SECONDS, registry=registry)
        Gauge("specdec_rows_running", "samples that have a row", registry=registry).set_function(lambda: scheduler.running)
        Gauge("specdec_rows_waiting", "samples that wait for one", registry=registry).set_function(lambda: scheduler.waiting)

    def answered(self, scope: MutableMapping[str, Any], status: int) -> None:
        """Count an HTTP answer; paths that no route has count as one, or a scanner would fill the memory."""
        route = scope.get("route")
        self._answers.labels(getattr(route, "path", "other"), status).inc()

    def ended(self, last: Ended | ReasonResult | Failed, seconds: float) -> None:
        """Count a request."""
        self._seconds.observe(seconds)
        if isinstance(last, Failed):
            self._failures.labels(last.reason).inc()
            return
        if isinstance(last, ReasonResult):
            self._tokens.inc(last.generated)
            self._steps.inc(last.steps)
            return
        for result in last.results:
            self._prompt.inc(result.prompt_tokens)
            self._tokens.inc(len(result.token_ids))
            self._steps.inc(result.steps)
