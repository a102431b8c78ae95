"""A search as users of search libraries write it: one `model.generate` call a request, with nothing kept between two calls.

Slow and obvious: the oracle of `Reasoner` in tests, its baseline in `bench.search_speed`. In float32 both grow one tree, since the
sampler is argmax(scores + keyed noise), which draws from softmax(scores) as multinomial does (Gumbel-max) and in the same way
wherever the scores were computed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from specdec.randomness import Randomness, stream_of
from specdec.sampling import build_processor
from specdec.search.answers import AnswerFormat
from specdec.search.chains import Chains
from specdec.search.loop import run
from specdec.search.prompts import Prompts
from specdec.search.reasoner import Problem
from specdec.search.request import Completion, Finish, Request, Result
from specdec.search.steps import StepRule
from specdec.sequence import SamplingParams

__all__ = ["KeyedGumbel", "PlainSearch", "TextEnd"]


class KeyedGumbel(LogitsProcessor):
    """Adds the noise of each row's own key, so that do_sample=False draws from softmax(scores) with that noise.

    It goes last in the list. One Randomness a row; `pad_lengths` is each row's left padding, which positions do not count.
    """

    def __init__(self, rows: Seq[Randomness], pad_lengths: Seq[int] | None = None) -> None:
        self.rows = rows
        self.pad_lengths = pad_lengths or [0] * len(rows)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        length, vocab_size = input_ids.shape[1], scores.shape[1]
        noise = [
            row.gumbel(length - pad, vocab_size, scores.device) for row, pad in zip(self.rows, self.pad_lengths, strict=True)
        ]
        return scores + torch.stack(noise)


class TextEnd(StoppingCriteria):
    """Ends a single row where `Chains.stop_check` would: a step at its boundary, a full text at the boundary of a step from which an
    answer can be read. `answered`: whether the text so far holds one; None for a step."""

    def __init__(
        self, rule: StepRule, tokenizer: Any, prompt_length: int, answered: Callable[[list[int]], bool] | None = None
    ) -> None:
        self.rule, self.tokenizer, self.prompt_length, self.answered = rule, tokenizer, prompt_length, answered

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        output = input_ids[0, self.prompt_length :].tolist()
        before, now = self.rule.ended(output[:-1], self.tokenizer), self.rule.ended(output, self.tokenizer)
        ended = now > before and (self.answered is None or self.answered(output))
        return torch.full((1,), ended, device=input_ids.device)


@dataclass(frozen=True, slots=True)
class PlainSearch:
    """Runs one search at a time. Arguments: as `Reasoner`'s; `eos`: tokens that end a text.

    What a request reads is counted in `prefill_tokens`, all of it, every time.
    """

    model: Any
    tokenizer: Any
    step: StepRule
    prompts: Prompts
    answers: AnswerFormat
    params: SamplingParams
    eos: frozenset[int]
    seed: int = 0
    width: int = 1

    def run(self, problem: Problem) -> Result:
        """The search of `problem` to its end, the requests of one `ask` one after the other."""
        chains = Chains(problem.tree, problem.prompt_ids, self.tokenizer, self.step, self.prompts, self.answers, self.eos)

        def complete(asked: Seq[Request]) -> list[Completion]:
            return self._scored(problem, asked, [self._generated(problem, chains, request) for request in asked])

        return run(problem.search, complete, self.width)

    def _generated(self, problem: Problem, chains: Chains, request: Request) -> Completion:
        token_ids = [*chains.path_ids(request.parent), *chains.cue(request.parent, request.kind)]
        before = chains.answer_begins(request)
        answered = (
            (lambda ids: self.answers.extract(before + self.tokenizer.decode(ids, skip_special_tokens=True)) is not None)
            if request.full
            else None
        )
        end = TextEnd(self.step, self.tokenizer, len(token_ids), answered)
        output = self._generate(token_ids, request, stream_of(problem.index, 0, *request.stream), end)
        problem.steps += len(output)
        finish = Finish.EOS if output[-1] in self.eos else Finish.LENGTH  # unless a step ends there, as read() finds out
        return chains.read(request, output, finish, prefill_tokens=len(token_ids) - 1)

    def _generate(self, token_ids: list[int], request: Request, stream: tuple[int, ...], end: TextEnd) -> list[int]:
        """New tokens after `token_ids`, the ending one included."""
        processors = LogitsProcessorList(build_processor(self.params, self.eos, len(token_ids)) or [])
        if self.params.temperature > 0:
            processors.append(KeyedGumbel([Randomness(self.seed, stream)]))
        prompt = torch.tensor([token_ids], device=self.model.device)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=0,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([end]),
        )
        return output[0, len(token_ids) :].tolist()

    def _scored(self, problem: Problem, requests: Seq[Request], completions: list[Completion]) -> list[Completion]:
        for place, steps in problem.search.to_score(requests, completions).items():
            if problem.judge is None:
                completions[place] = replace(completions[place], score=0.5)
                continue
            outcome = problem.judge(problem.question, steps, requests[place].evaluator_max_tokens)
            completions[place] = replace(completions[place], score=outcome.score, evaluator_tokens=outcome.tokens)
        return completions
