"""What speculation, kept K/V and batches are worth inside a search: `python -m bench.search_speed --help`.

One search is run in several ways. In float32 all of them grow the same tree, since every request draws with keyed noise of its own:

    all on                 Reasoner: drafts, the K/V of every node kept, the requests of one `ask` as rows of one batch
    without speculation    one node a draft tree
    without segments       nothing is kept between requests; siblings that run at once still share their prefill
    without batches        one request after the other
    speculation alone, ..  with --alone
    all off                the Reasoner's loop, on specdec's kernels
    model.generate         one plain call a request (`bench.plain_search`)

All ways have one width, on which the tree depends. The evaluators are exact checkers, so that the model alone is timed. The ways take
turns, problem by problem; a problem's median counts, and engines forget before every search. In half precision near-ties may fall
either way and trees differ: speeds are then those of equal budgets. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.engine import Engine
from specdec.models import load
from specdec.search.reasoner import Problem, Reasoner
from specdec.search.request import Result
from specdec.search.search import Search, SearchConfig
from specdec.search.search_tree import SearchTree
from specdec.sequence import SamplingParams

from .environment import environment
from .metrics import Row, medians, select, speed, speed_ratio, tokens_per_step
from .plain_search import PlainSearch
from .reasoning_tasks import ReasoningTask, load_reasoning_tasks
from .report import WIDTH
from .runners import BASELINE, COMPILED

__all__ = ["Kept", "OnEngine", "Plain", "SearchRow", "Setting", "Way", "first_difference", "main", "make_ways", "measure"]

ALL_ON, ALL_OFF, PLAIN = "all on", "all off", "model.generate"
MECHANISMS = ("speculation", "segments", "batches")
SEGMENT_MEGABYTES = 512.0
ONE_TEXT = 128  # most tokens of a text outside a search
WARM_UP_BUDGET = 60
EXACT = ("float32", "float64")  # dtypes in which all trees are equal

Kept = list[tuple[int, tuple[int, ...], float]]  # parent, token ids and score of every node


@dataclass(frozen=True, slots=True)
class Setting:
    """What all ways have in common."""

    policy: str
    budget: int  # policy output tokens of a search
    width: int  # requests that it may have in flight
    step_tokens: int  # most tokens of a step: what each request in flight reserves of the budget
    seed: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class SearchRow(Row):
    """One search, run once in one way; `decode_seconds` are those of all of it, prefill included."""

    computed: int = 0  # input tokens whose K/V were computed
    cached: int = 0  # input tokens whose K/V were there
    tree: Kept = field(default_factory=list)


# ---- the ways -----------------------------------------------------------------------------------------------------------------


class Way(Protocol):
    """One way to run searches."""

    label: str

    def solve(self, task: ReasoningTask, problem: Problem) -> Result:
        """The search of `problem` to its end."""

    def reset(self) -> None:
        """Forget what earlier searches taught."""


@dataclass
class OnEngine:
    """The Reasoner."""

    label: str
    engine: Engine
    megabytes: float  # of segments
    setting: Setting

    def solve(self, task: ReasoningTask, problem: Problem) -> Result:
        pieces = (task.step, task.prompts, task.answers, self.setting.params, self.setting.seed, self.setting.width)
        ((_, result),) = Reasoner(self.engine, *pieces, self.megabytes).run([problem])
        if not isinstance(result, Result):
            raise result
        return result

    def reset(self) -> None:
        self.engine.reset()


@dataclass
class Plain:
    """`model.generate`, once a request."""

    model: Any
    tokenizer: Any
    eos: frozenset[int]
    setting: Setting
    label: str = PLAIN

    def solve(self, task: ReasoningTask, problem: Problem) -> Result:
        pieces = (task.step, task.prompts, task.answers, self.setting.params, self.eos, self.setting.seed, self.setting.width)
        return PlainSearch(self.model, self.tokenizer, *pieces).run(problem)

    def reset(self) -> None:
        """transformers keeps nothing between calls."""


def make_ways(model: Any, tokenizer: Any, methods: Seq[str], setting: Setting, alone: bool = False) -> list[Way]:
    """All ways with the first method, and "all on" with the others.

    Args:
        methods: names of specdec.METHODS, also with "+compile" after them.
        alone: each mechanism by itself too.

    Raises:
        ValueError: no such method.
    """
    engines: dict[tuple[str, int], Engine] = {}

    def way(label: str, method: str, on: set[str]) -> OnEngine:
        drafts = method if "speculation" in on else BASELINE + COMPILED * method.endswith(COMPILED)
        rows = setting.width if "batches" in on else 1
        if (drafts, rows) not in engines:
            engines[drafts, rows] = Engine(
                model, tokenizer, method=drafts.removesuffix(COMPILED), max_rows=rows, compile=drafts.endswith(COMPILED)
            )
        return OnEngine(label, engines[drafts, rows], SEGMENT_MEGABYTES * ("segments" in on), setting)

    every = set(MECHANISMS)
    switched = {ALL_ON: every, **{f"without {name}": every - {name} for name in MECHANISMS}}
    if alone:
        switched |= {f"{name} alone": {name} for name in MECHANISMS}
    ways = [way(label, methods[0], on) for label, on in {**switched, ALL_OFF: set()}.items()]
    ways += [way(f"{ALL_ON}, {method}", method, every) for method in methods[1:]]
    return [*ways, Plain(model, tokenizer, ways[0].engine.eos_token_ids(), setting)]


# ---- measuring ----------------------------------------------------------------------------------------------------------------


def measure(way: Way, task: ReasoningTask, index: int, tokenizer: Any, setting: Setting) -> SearchRow:
    """One search by a way that knows nothing; `index` is the problem's place, on which its randomness depends."""
    way.reset()
    ids = task.prompts.encode(tokenizer, task.problem)
    search = Search(
        setting.policy, setting.budget, setting.seed, SearchConfig(step_tokens=setting.step_tokens, prompt_tokens=len(ids))
    )
    problem = Problem(task.problem, search, task.oracle, ids, index)
    started = time.perf_counter()
    result = way.solve(task, problem)
    seconds = time.perf_counter() - started
    tree = kept(result.tree)
    output = [token for _, token_ids, _ in tree for token in token_ids]
    computed = result.prefill_tokens + result.recomputed_tokens
    counted = {"computed": computed, "cached": result.cached_tokens, "tree": tree}
    return SearchRow(task.id, task.group, way.label, result.used, problem.steps, seconds, 0.0, output, **counted)


def run_all(
    tasks: list[ReasoningTask], ways: Seq[Way], tokenizer: Any, setting: Setting, rounds: int, console: Console
) -> list[SearchRow]:
    """Every problem in every way, in an order shuffled a problem and round."""
    turns = [(number, index) for number in range(rounds) for index in range(len(tasks))]
    return [
        replace(measure(way, tasks[index], index, tokenizer, setting), round=number)
        for number, index in track(turns, f"{len(ways)} ways a problem", console=console)
        for way in random.Random(f"{number} {index}").sample(list(ways), len(ways))
    ]


def one_text_each(engine: Engine, tasks: list[ReasoningTask], setting: Setting) -> list[Row]:
    """A text after each problem's prompt by an engine that knows nothing: tokens a step outside a search. Not timed."""
    params = replace(setting.params, max_new_tokens=ONE_TEXT, seed=setting.seed)
    rows = []
    for task in tasks:
        engine.reset()
        result = engine.generate(task.prompts.encode(engine.tokenizer, task.problem), params)
        rows.append(Row(task.id, task.group, "one text", len(result.token_ids), result.steps, 0.0, 0.0, result.token_ids))
    return rows


def kept(tree: SearchTree) -> Kept:
    """What must be the same in all ways."""
    return list(zip(tree.parent, tree.token_ids, tree.q))


def first_difference(tree: Kept, reference: Kept) -> dict[str, int] | None:
    """Node, and token in it, from which two trees differ (token: the length of the shorter where one begins the other); None: equal."""
    for node, (mine, theirs) in enumerate(zip(tree, reference)):
        if mine != theirs:
            pairs = zip(mine[1], theirs[1])
            unequal = (place for place, (a, b) in enumerate(pairs) if a != b)
            return {"node": node, "token": next(unequal, min(len(mine[1]), len(theirs[1])))}
    return None if len(tree) == len(reference) else {"node": min(len(tree), len(reference)), "token": 0}


# ---- reporting ----------------------------------------------------------------------------------------------------------------


def summary(rows: list[SearchRow], outside: list[Row]) -> dict[str, Any]:
    """Everything that was measured; `rows` one a problem and way, `outside` the texts outside a search."""
    by_way = {label: select(rows, label) for label in dict.fromkeys(row.method for row in rows)}
    plain = by_way[PLAIN]
    trees = {row.task: row.tree for row in plain}
    differences = {
        label: {row.task: where for row in mine if (where := first_difference(row.tree, trees[row.task]))}
        for label, mine in by_way.items()
    }

    def worth(way: str, other: str) -> dict[str, float]:
        ratio = speed_ratio(by_way[way], by_way[other])
        return {name: round(getattr(ratio, name), 3) for name in ("value", "low", "high")}

    return {
        "problems": len(plain),
        "ways": {label: _figures(mine) | {"speed_up": worth(label, PLAIN)} for label, mine in by_way.items()},
        "worth": {name: worth(ALL_ON, f"without {name}") for name in MECHANISMS},
        "alone": {name: worth(f"{name} alone", ALL_OFF) for name in MECHANISMS if f"{name} alone" in by_way},
        "tokens_per_step": {
            "in the search": round(tokens_per_step(by_way[ALL_ON]), 3),
            "in the search, one row": round(tokens_per_step(by_way["without batches"]), 3),
            "outside": round(tokens_per_step(outside), 3),
        },
        "differences": {label: found for label, found in differences.items() if found},
    }


def _figures(rows: list[SearchRow]) -> dict[str, Any]:
    return {
        "seconds": round(sum(row.decode_seconds for row in rows), 3),
        "tokens": sum(row.tokens for row in rows),
        "tokens_per_second": round(speed(rows), 3),
        "tokens_per_step": round(tokens_per_step(rows), 3),
        "computed_tokens": sum(row.computed for row in rows),
        "cached_tokens": sum(row.cached for row in rows),
    }


def print_table(found: dict[str, Any], console: Console) -> None:
    """A line a way."""
    title = f"{found['problems']} problems; seconds: sum of medians; ratios: tokens a second, 95 % intervals over problems"
    table = Table("way", title=title)
    headers = (
        "seconds",
        "tokens",
        "tok / s",
        f"x {PLAIN}",
        f"{ALL_ON} / it",
        "tok / step",
        "input computed",
        "cached",
        "same trees",
    )
    for header in headers:
        table.add_column(header, justify="right")
    fastest = found["ways"][ALL_ON]["tokens_per_second"]
    for label, way in found["ways"].items():
        ratio = way["speed_up"]
        same = found["problems"] - len(found["differences"].get(label, {}))
        table.add_row(
            label,
            f"{way['seconds']:.1f}",
            str(way["tokens"]),
            f"{way['tokens_per_second']:.1f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            f"{fastest / way['tokens_per_second']:.2f}",
            f"{way['tokens_per_step']:.2f}",
            str(way["computed_tokens"]),
            str(way["cached_tokens"]),
            f"{same} / {found['problems']}",
        )
    console.print(table)
    console.print("tokens a step: " + ", ".join(f"{value:.2f} {where}" for where, value in found["tokens_per_step"].items()))


def main(
    groups: Annotated[str, typer.Option(help="arithmetic, countdown, separated by commas")] = "arithmetic,countdown",
    problems: Annotated[int, typer.Option(min=1, help="of each group")] = 3,
    budget: Annotated[int, typer.Option(min=1, help="policy output tokens of a search")] = 400,
    width: Annotated[int, typer.Option(min=1, help="requests that a search may have in flight")] = 4,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="most tokens of a step; width * step_tokens must fit the budget, or nothing runs at once")
    ] = 48,
    policy: Annotated[str, typer.Option(help="a name of specdec.search.POLICIES")] = "bg_mcts",
    methods: Annotated[
        str, typer.Option(help="drafting methods, also with +compile, by commas: all ways with the first, all on with the others")
    ] = "auto",
    alone: Annotated[bool, typer.Option(help="each mechanism by itself too")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="times that every search runs; a problem's median counts")] = 1,
    model: Annotated[str | None, typer.Option(help="local folder or hub name; the embedded model if not given")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...")] = "float32",
    temperature: Annotated[float, typer.Option()] = 0.7,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Time one search in several ways."""
    console = Console(stderr=True)
    try:
        setting = Setting(policy, budget, width, step_tokens, seed, SamplingParams(temperature=temperature))
        names = groups.split(",")
        tasks = [task for name in names for task in load_reasoning_tasks(name, problems, seed)]
        if any(task.oracle is None for task in tasks):
            raise ValueError(f"groups must have exact evaluators (arithmetic, countdown), got {groups}")
        loaded, tokenizer = load(model, dtype)
        ways = make_ways(loaded, tokenizer, methods.split(","), setting, alone)
        for way in ways:  # compile, measure costs: once, not timed
            measure(way, load_reasoning_tasks(names[0], 1, seed + 1)[0], 0, tokenizer, replace(setting, budget=WARM_UP_BUDGET))
        rows = medians(run_all(tasks, ways, tokenizer, setting, rounds, console))
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    rows.sort(key=lambda row: [way.label for way in ways].index(row.method))  # the order of turns was shuffled
    found = summary(rows, one_text_each(ways[0].engine, tasks, setting))
    settings = {
        "policy": policy, "budget": budget, "width": width, "step_tokens": step_tokens, "methods": methods, "groups": groups,
        "model": model or "embedded", "dtype": str(loaded.dtype).removeprefix("torch."), "temperature": temperature, "seed": seed, **environment(),
    }  # fmt: skip
    print_table(found, Console(width=WIDTH))
    print(json.dumps({"bench": "search_speed", "settings": settings, "rounds": rounds, **found}))
    sys.stdout.flush()
    if settings["dtype"] in EXACT and found["differences"]:
        console.print(
            f"error: trees differ in {settings['dtype']}, where none may: {found['differences']}", style="red", markup=False
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
