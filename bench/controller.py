"""Does the search controller do its work? On the synthetic reasoner (`bench.reasoner`), so a regression test, not a claim::

    python -m bench.controller                # accuracy at budgets 600 to 5000, paired differences with 95 % intervals
    python -m bench.controller --ablation     # every rule switched off by itself
    python -m bench.controller --accuracy     # evaluators of accuracy .6 to 1
    python -m bench.controller --host-time    # milliseconds a cycle of trees of up to 10,000 nodes, TreeQuest's beside them

The reported problems are seed 0; the defaults were chosen on seed 11. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bench.reasoner import Problem, Reasoner, solve
from specdec.search import Completion, Policy, Search, SearchConfig
from specdec.search.bg_mcts import BgMcts
from specdec.search.policies import make_policy
from specdec.search.small_budget import SmallBudget

BUDGETS = (600, 1200, 2500, 5000)
BAR = -0.02
Make = Callable[[], Policy | str]


def play(make: Make, budget: int, problems: int, seed: int, accuracy: float = 0.9, **options: Any) -> dict[str, np.ndarray]:
    """Per problem: right [R] bool, answered [R] bool (not forced), used [R] tokens."""
    rows = {name: np.zeros(problems, kind) for name, kind in (("right", bool), ("answered", bool), ("used", int))}
    for index in range(problems):
        search = Search(make(), budget, config=SearchConfig(**options))
        result = solve(search, Reasoner(Problem.make(seed, index), accuracy))
        assert result.used <= budget, "the budget was exceeded"
        rows["right"][index] = result.answer == "right"
        rows["answered"][index] = search.tree.answered_count > 0
        rows["used"][index] = result.used
    return rows


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean paired difference of two [R] bool arrays with its normal 95 % interval."""
    gaps = ours.astype(float) - theirs.astype(float)
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return {
        name: round(value, 3)
        for name, value in zip(("mean", "low", "high"), (gaps.mean(), gaps.mean() - half, gaps.mean() + half))
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by budget; the first policy against all others."""
    table: dict[str, Any] = {"bar": BAR}
    for budget in args.budgets:
        runs = {
            name: play(lambda name=name: make_policy(name), budget, args.problems, args.seed, args.evaluator)
            for name in args.policies
        }
        first, *others = args.policies
        row: dict[str, Any] = {name: _summary(run) for name, run in runs.items()}
        row["differences"] = {name: difference(runs[first]["right"], runs[name]["right"]) for name in others}
        table[str(budget)] = row
        print(budget, json.dumps(row), flush=True)
    held = [gap["low"] >= BAR for budget in args.budgets for gap in table[str(budget)]["differences"].values()]
    return {**table, "holds": all(held)}


def _summary(run: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: round(float(values.mean()), 3) for name, values in run.items()}


def _bg(**options: Any) -> Make:
    return lambda: BgMcts(**options)


def _small(**options: Any) -> Make:
    return _bg(small=replace(SmallBudget(), **options))


def ablations() -> dict[str, tuple[Make, dict[str, Any]]]:
    """Name -> policy and shared options, each with one rule switched."""
    search_alone = {"first_dive": 0, "backtrack": 0, "finish": 0}
    off = SmallBudget(**search_alone)
    return {
        "default": (_bg(), {}),
        "no backtrack": (_small(backtrack=0), {}),
        "backtrack always": (_small(backtrack=math.inf), {}),
        "no first dive": (_small(first_dive=0), {}),
        "no backtrack, no dive": (_small(backtrack=0, first_dive=0), {}),
        "no finish": (_small(finish=0), {}),
        "no small-budget rules": (_small(**search_alone), {}),
        "alone: no exploration annealing": (_bg(small=off, anneal_exploration=False), {}),
        "alone: no completion bias": (_bg(small=off, completion_bias=False), {}),
        "alone: no widening annealing": (_bg(small=off, anneal_widening=False), {}),
        "alone: no g_max": (_bg(small=off, g_max=None), {}),
        "alone: root visits counted": (_bg(small=off, root_visits="count"), {}),
        "alone: answered bias": (_bg(small=off, answered_bias=True), {}),
        "alone: no depth hint": (_bg(small=off, hint=False), {}),
        "alone: GEN takes ties": (_bg(small=off, gen_tie="gen"), {}),
        "alone: no fill": (_bg(small=off, fill=False), {}),
        "alone: no widening": (_bg(small=off, widen=False), {}),
        "alone: gen_bonus on": (_bg(small=off, gen_bonus="on"), {}),
        "alone: no child cap": (_bg(small=off, child_cap=None), {}),
        "alone: refine": (_bg(small=off, refine=True), {}),
        "no forced answer": (_bg(), {"forced_tokens": 0}),
        "best answer": (_bg(), {"answer_rule": "best"}),
        "majority": (_bg(), {"answer_rule": "majority"}),
        "printed": (BgMcts.printed, {}),
        "coded": (BgMcts.coded, {}),
    }


def ablate(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every variant by budget."""
    table = {}
    for name, (make, options) in ablations().items():
        runs = {budget: play(make, budget, args.problems, args.seed, args.evaluator, **options) for budget in args.budgets}
        table[name] = {str(budget): _summary(run)["right"] for budget, run in runs.items()}
        print(f"{name:36s}", json.dumps(table[name]), flush=True)
    return table


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by evaluator accuracy."""
    table: dict[str, Any] = {}
    for accuracy in (0.6, 0.7, 0.8, 0.9, 1.0):
        for name in args.policies:
            runs = {b: play(lambda name=name: make_policy(name), b, args.problems, args.seed, accuracy) for b in args.budgets}
            row = {str(budget): _summary(run)["right"] for budget, run in runs.items()}
            table.setdefault(str(accuracy), {})[name] = row
            print(accuracy, f"{name:12s}", json.dumps(row), flush=True)
    return table


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"ablation": ablate, "accuracy": sweep, "host-time": host_time}
    for name in modes:
        parser.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    parser.add_argument("--policies", nargs="+", default=["bg_mcts", "best_of_n", "mcts"])
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluator", type=float, default=0.9, help="accuracy of the evaluator")
    parser.add_argument("--nodes", type=int, default=10_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # saturated evaluators, hundreds of times
    started = time.perf_counter()
    table = modes.get(args.mode, compare)(args)
    print(
        json.dumps(
            {"mode": args.mode or "compare", "problems": args.problems, **table, "seconds": round(time.perf_counter() - started)}
        )
    )


if __name__ == "__main__":
    main()
