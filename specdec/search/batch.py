"""Problems of a JSON-lines file, many in flight on one engine; results are appended as they end, and a killed run goes on.

    {"problem": "What is 2 + 2?", "id": "easy/1", "answer": "4"}        "question" for "problem" does as well; id and answer may lack

    for record in solve(engine, read_problems("problems.jsonl"), out="results.jsonl", budget=2000): ...

Problems whose results are in `out` are not solved again; a search that was under way continues from its checkpoint beside `out`. A
problem's texts depend on its place in the file and not on the others, so the results are those of a run that was never interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from specdec.engine import Engine
from specdec.search.answers import AnswerFormat, make_format
from specdec.search.config import SearchConfig
from specdec.search.evaluators import Evaluator
from specdec.search.identity import described
from specdec.search.journal import lock_of, unlock
from specdec.search.prompts import Prompts
from specdec.search.reason import ReasonResult, reason_all
from specdec.search.request import GenerationError, Policy, Status

__all__ = ["BatchProblem", "read_problems", "solve", "summary"]

METERS = ("evaluator_tokens", "prefill_tokens", "cached_tokens", "recomputed_tokens")
_BEGIN = b'{"id": '  # of every record
_HARMLESS = ("kv_megabytes",)  # options that results do not depend on


@dataclass(frozen=True, slots=True)
class BatchProblem:
    """One line of the file."""

    id: str
    problem: str
    gold: str | None  # the right answer, where it is known
    place: int  # in the file; its randomness


def read_problems(path: str | Path) -> list[BatchProblem]:
    """The problems of a file.

    Raises:
        ValueError: a line that is no problem, or an id that was there before (the message has the line).
        OSError: the file cannot be read.
    """
    problems: list[BatchProblem] = []
    known: set[str] = set()
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        problem = _problem(line, len(problems), f"{path}, line {number}")
        if problem.id in known:
            raise ValueError(f"{path}, line {number}: the id {problem.id!r} was there before; fix: ids of their own")
        known.add(problem.id)
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


def _problem(line: bytes, place: int, where: str) -> BatchProblem:
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8, and no token
    except ValueError as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from error
    text = entry.get("problem", entry.get("question")) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where} must be {{"problem": "..."}}, got {line.decode()!r:.80}')
    gold = entry.get("answer")
    return BatchProblem(str(entry.get("id", place)), text, None if gold is None else str(gold), place)


def solve(
    engine: Engine,
    problems: Iterable[BatchProblem],
    out: str | Path | None = None,
    budget: int = 2000,
    evaluator: Evaluator | str | None = "yes_no",
    policy: str | Policy = "bg_mcts",
    seed: int = 0,
    answers: str | AnswerFormat = "math",
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Solve what `out` does not hold yet; yields a record a problem, those of `out` first, the others as they end.

    Args:
        out: results, a line a problem; None: nothing is kept.
        budget, evaluator, policy, seed, answers, options: see `specdec.reason_all`.

    Raises:
        ValueError: `out` holds something else or results of another model or other settings, another process writes it, or a bad
            option.
    """
    form = make_format(answers)
    settings: dict[str, Any] = {
        "model": str(getattr(engine.target.model.config, "_name_or_path", "")),
        "budget": budget,
        "evaluator": described(evaluator),
        "policy": described(policy),
        "seed": seed,
        "answers": described(answers),
        **_settings(options),
    }
    lock = None if out is None else lock_of(Path(out))
    try:
        yield from _solve(engine, problems, out, settings, form, [budget, evaluator, policy, seed], options)
    finally:
        if form is not answers:
            form.close()
        if lock is not None:
            unlock(lock)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """What of the options decides about results, where it is not the default."""
    config, prompts = options.get("config") or SearchConfig(), options.get("prompts") or Prompts()
    plain = {name: value for name, value in options.items() if isinstance(value, (str, int, float)) and name not in _HARMLESS}
    usual, changed = asdict(SearchConfig()), dict[str, Any]()
    changed |= {f"config.{name}": value for name, value in asdict(config).items() if value != usual[name]}
    changed |= {f"prompts.{name}": value for name, value in asdict(prompts).items() if value != getattr(Prompts(), name)}
    rule = options.get("step")
    return {**plain, **changed, **({} if rule is None or isinstance(rule, str) else {"step": repr(rule)})}


def _solve(
    engine: Engine,
    problems: Iterable[BatchProblem],
    out: str | Path | None,
    settings: dict[str, Any],
    form: AnswerFormat,
    positional: list[Any],
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    by_place = {problem.place: problem for problem in problems}
    done = {} if out is None else _done(Path(out), {problem.id: problem for problem in by_place.values()}, settings)
    yield from done.values()
    left = [problem for problem in by_place.values() if problem.id not in done]
    folder = None if out is None else Path(f"{out}.searches")
    if folder is not None and left:
        folder.mkdir(parents=True, exist_ok=True)
        options = {**options, "checkpoints": [folder / _checkpoint(problem) for problem in left]}
    texts, places = [problem.problem for problem in left], [problem.place for problem in left]
    cancelled = False
    for place, result in reason_all(engine, texts, *positional, answers=form, places=places, **options):
        record = {**_record(by_place[place], result, form), "settings": settings}
        if record["status"] == Status.CANCELLED:
            cancelled = True  # it goes on next time
        elif out is not None and folder is not None:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            for written in folder.glob(f"{_checkpoint(by_place[place])}*"):
                written.unlink()
        yield record
    if folder is not None and folder.is_dir() and not (cancelled or any(folder.iterdir())):
        shutil.rmtree(folder)


def summary(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Problems, answered ones, tokens, and the share of right answers among those with a known one."""
    records = list(records)
    graded = [record["right"] for record in records if "right" in record]
    return {
        "problems": len(records),
        "answered": sum(record["answer"] is not None for record in records),
        "errors": sum("error" in record for record in records),
        "used": sum(record["used"] for record in records),
        "accuracy": sum(graded) / len(graded) if graded else None,
    }


def _record(problem: BatchProblem, result: ReasonResult | GenerationError, form: AnswerFormat) -> dict[str, Any]:
    error = {"error": str(result)} if isinstance(result, GenerationError) else {}
    found = result.result if isinstance(result, GenerationError) else result
    assert isinstance(found, ReasonResult)
    right = {}
    if problem.gold is not None:
        gold = form.extract(problem.gold) or problem.gold
        right = {"right": found.answer is not None and form.matches(gold, found.answer)}
    return {
        "id": problem.id,
        "problem": problem.problem,
        "answer": found.answer,
        **right,
        "status": str(found.status),
        **error,
        "score": found.score,
        "answers": [{"value": each.value, "votes": each.votes, "weight": each.weight} for each in found.answers],
        "used": found.used,
        **{name: getattr(found, name) for name in METERS},
        "nodes": len(found.tree) - 1,
        "seconds": round(found.seconds, 3),
        "notes": list(found.notes),
    }


def _done(out: Path, problems: dict[str, BatchProblem], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of a file that are of these problems, by id; a last line that was cut is removed."""
    *lines, cut = out.read_bytes().split(b"\n") if out.exists() else [b""]
    records = {}
    for number, line in enumerate(lines, 1):
        record = _read_record(line, f"{out}, line {number}")
        if (problem := problems.get(record["id"])) is None:
            continue
        theirs = {"problem": record["problem"], **record["settings"]}
        ours = {"problem": problem.problem, **settings}
        for name in {**ours, **theirs}:
            if (other := theirs.get(name)) != (mine := ours.get(name)):
                raise ValueError(
                    f"{out}, line {number} is a result with {name} {other!r:.80}, not {mine!r:.80}; fix: another --out"
                )
        records[problem.id] = record
    if cut:
        if not _BEGIN.startswith(cut[: len(_BEGIN)]):  # not ours to remove
            raise ValueError(f"{out}, line {len(lines) + 1} is no result of specdec reason; fix: another --out")
        with out.open("rb+") as file:
            file.truncate(out.stat().st_size - len(cut))
    return records


def _read_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    types: dict[str, Any] = {"id": str, "problem": str, "answer": (str, type(None)), "used": int, "settings": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(name, ...), kind) for name, kind in types.items()):
        raise ValueError(f"{where} is no result of specdec reason; fix: another --out")
    return record


def _checkpoint(problem: BatchProblem) -> str:
    """The place makes it different from all others."""
    return f"{problem.place}-{quote(problem.id, safe='')[:100]}.json"
