"""Reasoner: searches on one engine. Requests of any number of problems are rows of one batch; K/V of every node is kept once.

    ask -> rows of the engine, each from its parent's segments -> step until all of a search's rows have ended -> score -> tell

A search is told its results in the order of asking, whatever the others do, and every request draws from its own stream, so a tree
depends neither on the batch nor on what was cached (token for token in fp32). What is in flight at a cancel is thrown away and
generated again by whoever resumes the search; its tokens are charged when they are told, once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from specdec.engine import Engine
from specdec.randomness import Randomness, stream_of
from specdec.sampling import build_processor
from specdec.search.answers import AnswerFormat
from specdec.search.chains import Chains
from specdec.search.evaluators import Evaluator, Judge
from specdec.search.progress import Event, event_of
from specdec.search.prompts import Prompts
from specdec.search.request import Completion, Finish, GenerationError, Request, Result
from specdec.search.search import Search
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree
from specdec.search.steps import StepRule
from specdec.segments import PathStore, SegmentStore
from specdec.sequence import SamplingParams, Sequence

__all__ = ["Problem", "Reasoner"]

FINISHES = {"eos": Finish.EOS, "stop": Finish.STOP, "length": Finish.LENGTH}


@dataclass
class Problem:
    """One problem and the search that works on it.

    Attributes:
        question: the text of the problem.
        search: asked and told.
        evaluator: scores chains; None: none, every node has the score 0.5.
        prompt_ids: token ids up to the first token that the model writes (`Prompts.encode`).
        index: its place among the problems, part of every request's stream.
    """

    question: str
    search: Search
    evaluator: Evaluator | None
    prompt_ids: list[int]
    index: int = 0
    steps: int = field(init=False, default=0)  # verification steps of all rows: tokens / steps is the mean accepted length
    judge: Judge | None = field(init=False)
    running: list[tuple[Request, Sequence]] = field(init=False, default_factory=list)
    prefilled: bool = field(init=False)  # the prompt was computed once

    def __post_init__(self) -> None:
        self.prefilled = len(self.tree) - 1 > self.search.budget.in_flight
        self.judge = None if self.evaluator is None else Judge(self.evaluator, max(1, self.search.config.max_failures))

    @property
    def tree(self) -> SearchTree:
        return self.search.tree


class Reasoner:
    """Runs searches on one engine.

    Args:
        engine: with a tokenizer; its `max_rows` is how many requests are generated at once.
        step: where a reasoning step ends.
        prompts: the texts around what the model writes.
        answers: what counts as an answer.
        params: temperature and truncation; max_new_tokens, seed and n are the search's to choose.
        seed: of all texts.
        width: requests that one search may have in flight.
        kv_megabytes: memory for K/V between requests; 0: everything is computed anew.
        on_event: called with an Event for every result that was told.
        cancel: once it is set, nothing more is generated.

    Raises:
        ValueError: an engine without a tokenizer, width < 1.
    """

    def __init__(
        self,
        engine: Engine,
        step: StepRule,
        prompts: Prompts,
        answers: AnswerFormat,
        params: SamplingParams,
        seed: int = 0,
        width: int = 1,
        kv_megabytes: float = 512.0,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise ValueError("reasoning needs a tokenizer; fix: Engine(model, tokenizer)")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be an int >= 1, got {width!r}")
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.step, self.prompts, self.answers = step, prompts, answers
        self.params, self.seed, self.width = params, seed, width
        self.segments = SegmentStore(kv_megabytes)
        self._chains: dict[int, Chains] = {}  # by problem
        self.on_event, self.cancel = on_event, cancel
        self.eos = engine.eos_token_ids()

    def run(self, problems: Iterable[Problem]) -> Iterator[tuple[Problem, Result | GenerationError]]:
        """Every search to its end, as many at once as keep the engine's rows busy; each result as soon as it is there.

        A model that failed twice on one request ends that search alone: its GenerationError holds what was found. Closing the
        iterator, or an exception, leaves every search resumable: what was in flight is still outstanding.
        """
        coming = iter(problems)
        live: list[Problem] = []
        try:
            self._take(coming, live)  # if it is cancelled already, their results say so
            while True:
                if self.cancelled:
                    for problem in live:
                        self._drop(problem)
                        problem.search.cancel()
                else:
                    self._take(coming, live)
                for problem in [each for each in live if not each.running]:
                    try:
                        # Not self.cancelled: set since, by an event or a signal, it would end a search that does not know of it.
                        over = problem.search.cancelled or not self._ask(problem)
                    except GenerationError as error:
                        yield problem, self._failed(problem, live, error)
                        continue
                    if over:
                        live.remove(problem)
                        yield problem, self._finish(problem)
                if not live and (self.cancelled or not self._take(coming, live)):
                    return
                self._step(live)
                for problem in [each for each in live if all(seq.finished for _, seq in each.running)]:
                    try:
                        self._tell(problem)
                    except GenerationError as error:
                        yield problem, self._failed(problem, live, error)
        finally:
            for problem in live:
                self._drop(problem)
                self._forget(problem)

    def _take(self, coming: Iterator[Problem], live: list[Problem]) -> bool:
        """Begin as many of the coming problems as there are rows for; False: none is left."""
        while len(live) * self.width < self.engine.max_rows:
            problem = next(coming, None)
            if problem is None:
                break
            live.append(problem)
        return bool(live)

    @property
    def cancelled(self) -> bool:
        """Somebody set the event."""
        return self.cancel is not None and self.cancel.is_set()

    def _drop(self, problem: Problem) -> None:
        """Stop what is being generated for a search, uncharged."""
        for _, seq in problem.running:
            self.engine.cancel(seq)
        problem.running = []

    def _step(self, live: list[Problem]) -> None:
        """One step of the engine. What it raises ends the texts that were being generated, not the searches."""
        try:
            self.engine.step()
        except Exception as error:  # a model is anybody's code, and memory runs out anywhere
            running = [seq for problem in live for _, seq in problem.running]
            going = [seq for seq in running if not seq.finished]
            failed = [seq for seq in going if seq not in self.engine.waiting] or going
            for seq in running:
                if seq in failed:
                    self.engine.cancel(seq)
                    seq.finish_reason, seq.error = "error", error
                elif seq.finished:
                    self.engine.cancel(seq)  # which frees its row, as the end of the step would have done

    # ---- asking

    def _ask(self, problem: Problem) -> bool:
        """Put a search's next requests into the engine; False: it is over."""
        requests = problem.search.outstanding() or problem.search.ask(self.width)
        if requests and problem.index not in self._chains:
            self._chains[problem.index] = Chains(
                problem.tree, problem.prompt_ids, self.tokenizer, self.step, self.prompts, self.answers, self.eos
            )
        for request in requests:
            try:
                seq = self._sequence(problem, request)
            except ValueError as error:  # more than this engine can hold
                problem.search.tell(request, Completion((), "", error=str(error)))
                continue
            problem.running.append((request, seq))
            self.engine.add(seq)
        return bool(requests)

    def _sequence(self, problem: Problem, request: Request) -> Sequence:
        chains = self._chains[problem.index]
        path, ends = chains.ends(request.parent)
        token_ids = [*chains.path_ids(request.parent), *chains.cue(request.parent, request.kind)]
        params = replace(self.params, max_new_tokens=request.max_tokens, seed=self.seed, n=1)
        return self.engine.new_sequence(
            token_ids,
            params,
            Randomness(self.seed, stream_of(problem.index, 0, *request.stream)),
            eos_token_ids=self.eos,
            processor=build_processor(params, self.eos, len(token_ids)),
            stop_check=chains.stop_check(request),
            store=PathStore(self.segments, [(problem.index, node) for node in path], ends, (problem.index, request.node)),
        )

    # ---- telling

    def _tell(self, problem: Problem) -> None:
        """Score and tell the results of a search, in the order of asking."""
        running, problem.running = problem.running, []
        completions = [self._completion(problem, request, seq) for request, seq in running]
        self._score(problem, [request for request, _ in running], completions)
        failure: GenerationError | None = None
        for (request, seq), completion in zip(running, completions):
            try:
                problem.search.tell(request, completion)
            except GenerationError as error:  # raised once the others of this batch are told
                error.__cause__ = seq.error
                failure = failure or error
            if problem.tree.status[request.node] in (NodeStatus.DROPPED, NodeStatus.PENDING):  # PENDING: it is drawn anew
                self.segments.discard((problem.index, request.node))
            self._report(problem, request.node)
        if failure is not None:
            failure.result = problem.search.result()
            raise failure

    def _completion(self, problem: Problem, request: Request, seq: Sequence) -> Completion:
        problem.steps += len(seq.accept_lengths)
        chains = self._chains[problem.index]
        computed = max(0, seq.prompt_len - 1 - seq.cached_tokens)
        fresh = len(chains.cue(request.parent, request.kind)) + (0 if problem.prefilled else len(problem.prompt_ids))
        problem.prefilled = True
        meters: dict[str, Any] = {"cached_tokens": seq.cached_tokens, "prefill_tokens": min(computed, fresh)}
        meters["recomputed_tokens"] = computed - meters["prefill_tokens"]
        if seq.error is not None:
            return Completion((), "", generated=seq.output_length, error=f"{type(seq.error).__name__}: {seq.error}", **meters)
        return chains.read(request, seq.output_ids, FINISHES[str(seq.finish_reason)], **meters)

    def _score(self, problem: Problem, requests: Seq[Request], completions: list[Completion]) -> None:
        """Enter the evaluator's scores, in one batch where it can."""
        wanted = problem.search.to_score(requests, completions)
        if problem.judge is None:
            for place in wanted:
                completions[place] = replace(completions[place], score=0.5)
            return
        chains = [(problem.question, steps) for steps in wanted.values()]
        limit = min((most for place in wanted if (most := requests[place].evaluator_max_tokens) is not None), default=None)
        for place, outcome in zip(wanted, problem.judge.batch(chains, limit)):
            completions[place] = replace(completions[place], score=outcome.score, evaluator_tokens=outcome.tokens)

    def _report(self, problem: Problem, node: int = ROOT, final: bool = False) -> None:
        if self.on_event is not None:
            self.on_event(event_of(problem.search, node, problem.index, final))

    def _finish(self, problem: Problem) -> Result:
        result = problem.search.result()
        self._report(problem, final=True)
        problem.search.close()
        self._forget(problem)
        return result

    def _failed(self, problem: Problem, live: list[Problem], error: GenerationError) -> GenerationError:
        """The model failed twice on a request of this search, which ends; the others go on."""
        live.remove(problem)
        self._drop(problem)
        self._finish(problem)
        return error

    def _forget(self, problem: Problem) -> None:
        """Free the K/V and the token ids of a search."""
        self._chains.pop(problem.index, None)
        for node in range(len(problem.tree) - 1, -1, -1):  # children before their parents
            self.segments.discard((problem.index, node))
