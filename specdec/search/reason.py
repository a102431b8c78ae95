"""reason: a problem, a hard budget of tokens, an answer. The public face of the search.

    result = specdec.reason(model, "What is 17 * 23 - 5?", budget=2000, tokenizer=tokenizer, policy="bg_mcts", seed=0)
    result.answer, result.used, result.status          # "386", 1893, "answered"
    result = result.resume(1000)                       # the same search with 1,000 tokens more
    result.tree.to_networkx()

`reason_all` runs many problems on one engine, their requests being rows of the same batches.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from specdec.engine import Engine
from specdec.search.answers import AnswerFormat, make_format
from specdec.search.checkers import ChainArithmetic, Countdown
from specdec.search.evaluators import Evaluator
from specdec.search.identity import described
from specdec.search.model_evaluators import LogProbability, Rollouts, SelfConsistency, YesNo
from specdec.search.progress import Event
from specdec.search.prompts import Prompts, encode_piece
from specdec.search.reasoner import Problem, Reasoner
from specdec.search.request import GenerationError, Policy, Result
from specdec.search.search import Search, SearchConfig
from specdec.search.steps import StepRule, make_rule
from specdec.sequence import SamplingParams

__all__ = ["EVALUATORS", "ReasonResult", "make_evaluator", "reason", "reason_all"]

DEFAULT_ROLLOUT = 256  # most tokens of a continuation that self-consistency asks for


@dataclass(frozen=True, slots=True)
class ReasonResult(Result):
    """What a search has found. Attributes: see `specdec.search.Result`."""

    problem: str = ""
    budget: int = 0  # policy output tokens that were allowed
    seconds: float = 0.0  # spent on the search, in earlier processes too
    generated: int = 0  # tokens since the call; what an earlier process generated is in `used` alone
    steps: int = 0  # verification steps that they took, added up: generated / steps tokens a step
    _go_on: Callable[[int, float | None], ReasonResult] | None = field(default=None, repr=False, compare=False)

    def resume(self, extra_budget: int = 0, seconds: float | None = None) -> ReasonResult:
        """The same search with so many tokens more; its tree grows on. With 0, a cancelled one goes on; clear `cancel` first.

        `seconds` is the time that it then has; None: what is left, or as much as at first where that is over and there are more tokens.

        Raises:
            ValueError: negative or no whole number.
        """
        assert self._go_on is not None
        return self._go_on(extra_budget, seconds)


# ---- evaluators by name ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    """What evaluators are made of."""

    engine: Engine
    prompts: Prompts
    answers: AnswerFormat
    params: SamplingParams
    seed: int


def _log_probability(setting: _Setting) -> Evaluator:
    return LogProbability(setting.engine, lambda problem: setting.prompts.encode(setting.engine.tokenizer, str(problem)))


def _self_consistency(setting: _Setting) -> Evaluator:
    def sample(problem: Any, steps: Seq[str], n: int) -> Rollouts:
        tokenizer = setting.engine.tokenizer
        ids = setting.prompts.encode(tokenizer, str(problem)) + encode_piece(tokenizer, "".join(steps))
        digest = hashlib.blake2b(repr((setting.seed, str(problem), list(steps))).encode(), digest_size=6).digest()
        seed = int.from_bytes(digest, "big")  # of its own: the search's noise is never used twice
        params = replace(setting.params, max_new_tokens=DEFAULT_ROLLOUT, seed=seed, n=n)
        made = setting.engine.generate(ids, params)
        results = made if isinstance(made, list) else [made]
        return Rollouts([result.text for result in results], sum(len(result.token_ids) for result in results))

    return SelfConsistency(sample, setting.answers, rollout_tokens=DEFAULT_ROLLOUT)


EVALUATORS: dict[str, tuple[Callable[[_Setting], Evaluator], str]] = {
    "yes_no": (lambda setting: YesNo.of(setting.engine), "the model's own judgement of the newest step, from its logits"),
    "log_probability": (_log_probability, "how certain the model was of the newest step"),
    "self_consistency": (_self_consistency, "how many of 4 continuations agree; dear"),
    "arithmetic": (lambda setting: ChainArithmetic(), "exact: 1 while every stated equality holds"),
    "countdown": (lambda setting: Countdown(), "exact: whether the target of a number puzzle can still be reached"),
}


def make_evaluator(
    evaluator: Evaluator | str | None, engine: Engine, prompts: Prompts, answers: AnswerFormat, params: SamplingParams, seed: int
) -> Evaluator | None:
    """The evaluator of a name, or the callable itself.

    Raises:
        ValueError: no such name, or not callable.
    """
    if evaluator is None:
        return None
    if isinstance(evaluator, str):
        if evaluator not in EVALUATORS:
            raise ValueError(f"evaluator must be one of {', '.join(EVALUATORS)}, a callable, or None, got {evaluator!r}")
        return EVALUATORS[evaluator][0](_Setting(engine, prompts, answers, params, seed))
    if not callable(evaluator):
        raise ValueError(f"evaluator must be callable, (problem, steps) -> score in [0, 1], got {evaluator!r:.80}")
    return evaluator


# ---- the calls ------------------------------------------------------------------------------------------------------------------


def reason(
    model: Any,
    problem: str,
    budget: int = 2000,
    evaluator: Evaluator | str | None = "yes_no",
    policy: str | Policy = "bg_mcts",
    seed: int = 0,
    *,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> ReasonResult:
    """Search for the answer to one problem with at most `budget` generated tokens.

    Args:
        model: an Engine, or a Hugging Face model (with `tokenizer=`).
        problem: its text.
        budget: hard limit of the tokens that the model generates; the evaluator's are counted apart.
        evaluator: a name of EVALUATORS, a callable `(problem, steps) -> score in [0, 1]`, or None: every step is as good.
        policy: a name of `specdec.search.POLICIES`, or a Policy object.
        seed: fixes all texts; the tree depends neither on caching, batches nor speculation.
        checkpoint: a file that holds the search at every moment; one that exists is resumed, if it was cancelled too.
        options: see `reason_all`.

    Returns:
        What was found, with the whole tree; `resume` goes on.

    Raises:
        ValueError: a bad option, or a checkpoint of another search.
        GenerationError: the model failed twice on one request; its `result` holds what was found, and can be resumed.
    """
    checkpoints = None if checkpoint is None else [Path(checkpoint)]
    ((_, result),) = reason_all(model, [_checked(problem)], budget, evaluator, policy, seed, checkpoints=checkpoints, **options)
    if isinstance(result, GenerationError):
        raise result
    return result


def reason_all(
    model: Any,
    problems: Iterable[str],
    budget: int = 2000,
    evaluator: Evaluator | str | None = "yes_no",
    policy: str | Policy = "bg_mcts",
    seed: int = 0,
    *,
    tokenizer: Any = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 0,
    answers: str | AnswerFormat = "math",
    step: str | StepRule = "steps",
    prompts: Prompts | None = None,
    config: SearchConfig | None = None,
    width: int = 4,
    kv_megabytes: float = 512.0,
    checkpoints: Iterable[str | Path] | None = None,
    places: Iterable[int] | None = None,
    on_event: Callable[[Event], None] | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[tuple[int, ReasonResult | GenerationError]]:
    """Many searches on one engine; yields (place of the problem, result) as they end.

    Args:
        model, budget, evaluator, policy, seed: as in `reason`, for each problem.
        tokenizer: of a bare model.
        temperature, top_p, top_k: of the texts.
        answers: what counts as an answer: "math" (needs math-verify), "number", "exact", "code", or an AnswerFormat.
        step: where a step ends: "steps", "newline", "paragraph", "code", "tokens:N", or a StepRule.
        prompts: the texts around what the model writes.
        config: further options of the search. The context window is the model's, or a smaller one.
        width: requests that one search has in flight, the rows of a batch. The tree depends on it.
        kv_megabytes: memory for the K/V of search nodes.
        checkpoints: one file a problem; all different.
        places: of the problems, on which their randomness depends; all different. None: 0, 1, 2 ...
        on_event: called with an Event after every text; its `problem` is the place.
        cancel: once set, searches stop where they are; their results say so.

    Raises:
        ValueError: a bad option, problem or checkpoint.
    """
    if prompts is not None and not isinstance(prompts, Prompts):
        raise ValueError(f"prompts must be Prompts, got {prompts!r:.80}; fix: Prompts(problem=...) or Prompts.load(file)")
    if config is not None and not isinstance(config, SearchConfig):
        raise ValueError(f"config must be a SearchConfig, got {config!r:.80}")
    if isinstance(problems, str):
        raise ValueError(f"problems must be strings, got one: {problems!r:.80}; fix: reason for one problem")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    engine = model if isinstance(model, Engine) else Engine(model, tokenizer, max_rows=max(8, width))
    prompts, form, rule = prompts or Prompts(), make_format(answers), make_rule(step)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=1)
    reasoner = Reasoner(engine, rule, prompts, form, params, seed, width, kv_megabytes, on_event, cancel)
    judge = make_evaluator(evaluator, engine, prompts, form, params, seed)
    config = config or SearchConfig()
    windows = [window for window in (config.context_window, engine.target.max_positions) if window is not None]
    config = replace(config, deterministic=temperature == 0, context_window=min(windows, default=None))
    files = _one_each("checkpoints", checkpoints, itertools.repeat(None))
    numbers = _one_each("places", places, itertools.count())
    shared = {
        "model": _model_id(engine),
        "evaluator": described(evaluator),
        "answers": described(form),
        "sampling": [temperature, top_p, top_k, seed],
        "step": repr(rule),
        "cues": [prompts.prefill, prompts.reconsider, prompts.answer],
        "width": width,
    }

    used_before: dict[int, int] = {}

    def made() -> Iterator[Problem]:
        for question, index, file in zip(problems, numbers, files):
            ids = prompts.encode(engine.tokenizer, _checked(question))
            identity = {"prompt": hashlib.sha256(repr(ids).encode()).hexdigest()[:16], "place": index, **shared}
            cues = prompts.cue_tokens(engine.tokenizer, engine.eos_token_ids())
            own = replace(config, prompt_tokens=len(ids), cue_tokens=cues)
            search = Search(copy.deepcopy(policy), budget, seed, own, file, identity)  # a Policy object keeps state
            if search.cancelled:
                search.resume()
            used_before[index] = search.budget.used
            yield Problem(question, search, judge, ids, index)

    def finished(problem: Problem, result: Result | GenerationError) -> ReasonResult | GenerationError:
        if isinstance(result, GenerationError):
            result.result = with_problem(problem, result.result)
            return result
        return with_problem(problem, result)

    def with_problem(problem: Problem, result: Result) -> ReasonResult:
        known = {each.name: getattr(result, each.name) for each in fields(Result)}
        ledger = problem.search.budget
        return ReasonResult(
            **known, problem=problem.question, budget=ledger.total, seconds=ledger.elapsed, steps=problem.steps,
            generated=result.used - used_before[problem.index], _go_on=partial(go_on, problem),
        )  # fmt: skip

    def go_on(problem: Problem, extra: int, seconds: float | None) -> ReasonResult:
        problem.search.resume(extra, seconds)
        ((_, again),) = run([problem])
        more = finished(problem, again)
        if isinstance(more, GenerationError):
            raise more
        return more

    def run(problems: Iterable[Problem]) -> Iterator[tuple[Problem, Result | GenerationError]]:
        """A format made here has no process of its own once nothing is searched for: a result may be kept for long."""
        try:
            yield from reasoner.run(problems)
        finally:
            if form is not answers:
                form.close()

    return ((problem.index, finished(problem, result)) for problem, result in run(made()))


def _model_id(engine: Engine) -> str:
    config = engine.target.model.config
    return f"{config.model_type} {getattr(config, '_name_or_path', '')} {engine.target.dtype}"


def _checked(problem: Any) -> str:
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"problem must be a string with something in it, got {problem!r:.80}; for many problems: reason_all")
    return problem


def _one_each(name: str, given: Iterable[Any] | None, default: Iterator[Any]) -> Iterator[Any]:
    """`given`, which must have an entry of its own for every problem."""
    if given is None:
        yield from default
    seen: set[Any] = set()
    for each in given or ():
        if each in seen:
            raise ValueError(f"{name} must all be different, got {each!r} twice")
        seen.add(each)
        yield each
    raise ValueError(f"{name} must have one entry a problem, got fewer")
