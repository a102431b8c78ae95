"""Functions that run in another process, which imports this file: nothing heavy is imported here."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any


def obey(order: str) -> Any:
    """What a worker of these tests does."""
    if order == "hang":
        time.sleep(1000)
    if order == "die":
        os._exit(3)
    if order == "raise":
        raise KeyError("no\nsuch")
    if order == "print":
        print("noise", flush=True)
        subprocess.run(["echo", "noise"], check=True)
    if order == "eat":
        return len(bytearray(1 << 30))
    return {"order": order, "pid": os.getpid()}


def slow_evaluator(problem: str, steps: list[str]) -> float:
    """Hangs on some problems, is odd on others."""
    if problem == "hang":
        time.sleep(1000)
    return {"none": None, "nan": float("nan")}.get(problem, 0.25)  # type: ignore[return-value]


class Priced:
    """An evaluator that costs ten tokens a call."""

    def __call__(self, problem: str, steps: list[str]) -> tuple[float, int]:
        return 0.5, 10

    def cost(self, problem: str, steps: list[str]) -> int:
        return 10
