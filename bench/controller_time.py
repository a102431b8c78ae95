"""Host time of the search's policies: milliseconds of processor time of a cycle. `python -m bench.controller --host-time`.

A cycle is one ask and one tell of a tree that grows to `--nodes`; the bar is on the mean of the last tenth. Rows beside the policies
in plain search: *finishing*, a budget that ends with the tree, of which the last hundredth of cycles is looked at; *uneven*, the same with
chains of 1 to 90 steps, where every answer moves the depth that counts, of which the last tenth is; *watched*, with a journal on disk
and an event for every text. TreeQuest's rows need TreeQuest, which the environment of specdec does not have (its
`ulid` is another package's name): `make test-treequest` has one of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.reasoner import Problem, Reasoner
from bench.variants import policy_of
from specdec.search import Completion, Search
from specdec.search.progress import event_of

__all__ = ["host_time"]

BAR_MS = 1.0  # at --nodes 10,000
MOST_S = 600.0  # of a row; one that takes longer ends there, and its `cycles` say so
AMPLE = 10**9
TREEQUEST = ("StandardMCTS", "ABMCTSA")


def host_time(args: argparse.Namespace) -> dict[str, Any]:
    """A row a way to search; `holds`: none of specdec's own is above the bar."""
    table: dict[str, Any] = {}

    def measure(name: str, cycle: Callable[[], float | None], tail: float = 0.1) -> None:
        table[name] = cycles(args.nodes, cycle, tail)
        print(name, json.dumps(table[name]), flush=True)

    for name in ("bg_mcts", "mcts", "best_of_n", "backtrack"):
        measure(name, grown(name, AMPLE, args.seed))
    measure("bg_mcts, finishing", grown("bg_mcts", 65 * args.nodes, args.seed), tail=0.01)
    measure("bg_mcts, uneven", grown("bg_mcts", 65 * args.nodes, args.seed, depth=200, early=0.125))
    with tempfile.TemporaryDirectory() as folder:
        measure("bg_mcts, watched", grown("bg_mcts", AMPLE, args.seed, checkpoint=Path(folder) / "run.json"))
    missed = [name for name, row in table.items() if row["last_ms"] > BAR_MS]
    if find_spec("treequest") is None:
        print("TreeQuest is not installed here, so its rows are missing: make test-treequest")
        return {**table, "treequest": "not installed: make test-treequest", "missed": missed, "holds": not missed}
    for name in TREEQUEST:
        measure(f"treequest {name}", _treequest(name))
    return {**table, "missed": missed, "holds": not missed}


def grown(
    name: str, budget: int, seed: int, checkpoint: Path | None = None, depth: int = 24, early: float = 0.0
) -> Callable[[], float | None]:
    """Cycles of one search, with a journal and events where there is a checkpoint; None: it is over."""
    reasoner = Reasoner(replace(Problem.make(seed, 3), p=0.9, depth=depth), early=early)
    search = Search(policy_of(name), budget, checkpoint=checkpoint)

    def cycle() -> float | None:
        started = time.process_time()
        requests = search.ask()
        asked = time.process_time()
        if not requests:
            return None
        completion: Completion = reasoner.complete(search, requests[0])
        telling = time.process_time()
        search.tell(requests[0], completion)
        if checkpoint is not None:
            event_of(search, requests[0].node)
        return time.process_time() - telling + asked - started

    return cycle


def cycles(count: int, cycle: Callable[[], float | None], tail: float = 0.1) -> dict[str, Any]:
    """Of up to `count` cycles: the mean of the first and of the last ones (a share `tail`), their 99th percentile, the slowest."""
    taken, spent = list[float](), 0.0
    while len(taken) < count and spent < MOST_S and (one := cycle()) is not None:
        taken.append(one)
        spent += one
    seconds = np.array(taken)
    last = seconds[-max(1, int(tail * len(seconds))) :]
    facts = {
        "first_ms": seconds[: len(last)].mean(),
        "last_ms": last.mean(),
        "p99_ms": np.quantile(last, 0.99),
        "worst_ms": seconds.max(),
        "total_s": seconds.sum() / 1e3,
    }
    return {"cycles": len(seconds), **{name: round(1e3 * float(value), 3) for name, value in facts.items()}}


def _treequest(name: str) -> Callable[[], float | None]:
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
