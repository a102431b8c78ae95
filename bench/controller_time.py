"""Host time of the search's policies: milliseconds of a cycle. `python -m bench.controller --host-time`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bench.reasoner import Problem, Reasoner
from specdec.search import Completion, Search
from specdec.search.policies import make_policy

__all__ = ["host_time"]


def host_time(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of ask and tell together while a tree grows: the mean of every thousand cycles, and the slowest cycle."""
    table: dict[str, Any] = {}
    for name in ("bg_mcts", "mcts", "best_of_n"):
        reasoner = Reasoner(replace(Problem.make(args.seed, 3), p=0.9, depth=24))
        search = Search(make_policy(name), 10**9)
        table[name] = _cycles(args.nodes, lambda search=search, reasoner=reasoner: _cycle(search, reasoner))
        print(name, json.dumps(table[name]), flush=True)
    try:
        table["treequest StandardMCTS"] = _cycles(min(args.nodes, 2000), _treequest("StandardMCTS"))
        table["treequest ABMCTSA"] = _cycles(min(args.nodes, 400), _treequest("ABMCTSA"))
    except ImportError:
        table["treequest"] = "not installed"
    return {**table, "holds": all(row["last_ms"] <= 1.0 for name, row in table.items() if "treequest" not in name)}


def _cycle(search: Search, reasoner: Reasoner) -> float:
    """Processor seconds of one ask and one tell (the clock of the wall counts the neighbours too)."""
    started = time.process_time()
    (request,) = search.ask()
    asked = time.process_time()
    completion: Completion = reasoner.complete(search, request)
    telling = time.process_time()
    search.tell(request, completion)
    return time.process_time() - telling + asked - started


def _treequest(name: str) -> Callable[[], float]:
    """The same cycle of one of TreeQuest's algorithms, scores at random, its state changed in place."""
    import treequest

    algorithm, rng = getattr(treequest, name)(), np.random.default_rng(0)
    state = algorithm.init_tree()

    def cycle() -> float:
        nonlocal state
        score = float(rng.random())
        started = time.process_time()
        state, (trial,) = algorithm.ask_batch(state, 1, ["text"])
        state = algorithm.tell(state, trial.trial_id, ("text", score))
        return time.process_time() - started

    return cycle


def _cycles(count: int, cycle: Callable[[], float]) -> dict[str, Any]:
    seconds = np.array([cycle() for _ in range(count)])
    tail = seconds[-max(1, count // 10) :]
    milliseconds = {
        "first_ms": seconds[: len(tail)].mean(),
        "last_ms": tail.mean(),
        "median_ms": np.median(tail),
        "worst_ms": seconds.max(),
    }
    return {"cycles": count, **{name: round(1e3 * float(value), 3) for name, value in milliseconds.items()}}
