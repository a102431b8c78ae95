"""Evaluators that ask a model: log-probability, yes/no judgement, self-consistency, a Hugging Face reward model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from specdec.search.answers import AnswerFormat
from specdec.search.evaluators import Item, Score
from specdec.search.prompts import JUDGE
from specdec.segments import TextStore

if TYPE_CHECKING:
    from specdec.engine import Engine

__all__ = ["LogProbability", "RewardModel", "Rollouts", "SelfConsistency", "YesNo"]


@dataclass(frozen=True)
class LogProbability:
    """exp(mean log-probability of a token) of the newest step under the model itself: 1 where it was certain of every token.

    Args:
        engine: with a tokenizer.
        encode: problem -> token ids of the prompt (`Prompts.encode`); None: the problem as a chat, or as text.
        whole: of all steps instead of the newest.

    It keeps the K/V of what it has read (256 MB at most), as the judge does: chains of one problem begin alike. An evaluator is for one
    set of weights, therefore.
    """

    engine: Engine
    encode: Callable[[Any], list[int]] | None = None
    whole: bool = False
    _read: TextStore = field(init=False, repr=False, compare=False, default_factory=TextStore)

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        ids, start = self._ids(problem, steps)
        if start == len(ids):
            raise ValueError("there is no step to score, or the newest is empty")
        scored = self.engine.score(ids, start, self._read)
        return Score(math.exp(sum(scored.logprobs) / len(scored.logprobs)), len(ids))

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return len(self._ids(problem, steps)[0])

    def _ids(self, problem: Any, steps: Seq[str]) -> tuple[list[int], int]:
        """Ids of prompt and steps, and where the scored ones begin."""
        tokenizer = self.engine.tokenizer
        prompt = (
            self.encode(problem) if self.encode is not None else self.engine.encode([{"role": "user", "content": str(problem)}])
        )
        pieces = ["".join(steps)] if self.whole else ["".join(steps[:-1]), *steps[-1:]]
        texts = [list(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else [] for piece in pieces]
        start = len(prompt) + (0 if self.whole else len(texts[0]))
        return [*prompt, *(token for ids in texts for token in ids)], start


@dataclass(frozen=True)
class YesNo:
    """A generative verifier: asks whether the newest step is right, and reads p(yes) / (p(yes) + p(no)) from the next token's logits.

    Args:
        logits_of: token ids -> [V] logits after them.
        encode: text -> token ids of a prompt that is answered next (a chat with its generation prompt).
        yes_ids, no_ids: tokens that begin either answer.
        template: with $problem, $steps and $step.
    """

    logits_of: Callable[[list[int]], torch.Tensor]
    encode: Callable[[str], list[int]]
    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]
    template: str = JUDGE

    def __post_init__(self) -> None:
        if not self.yes_ids or not self.no_ids or set(self.yes_ids) & set(self.no_ids):
            raise ValueError(f"yes_ids and no_ids must be disjoint and not empty, got {self.yes_ids} and {self.no_ids}")

    @classmethod
    def of(cls, engine: Engine, template: str = JUDGE, yes: Seq[str] = ("Yes", "yes"), no: Seq[str] = ("No", "no")) -> YesNo:
        """Judged by the model of an engine."""
        read = TextStore()
        yes_ids, no_ids = _first_tokens(engine.tokenizer, yes), _first_tokens(engine.tokenizer, no)
        return cls(
            lambda ids: engine.score(ids, len(ids), read).logits,
            lambda text: engine.encode([{"role": "user", "content": text}]),
            tuple(yes_ids - no_ids),  # a token of white space alone begins both
            tuple(no_ids - yes_ids),
            template,
        )

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        ids = self._ids(problem, steps)
        logits = self.logits_of(ids).double()
        yes, no = (torch.logsumexp(logits[list(which)], 0) for which in (self.yes_ids, self.no_ids))
        return Score(float(torch.sigmoid(yes - no)), len(ids))

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return len(self._ids(problem, steps))

    def _ids(self, problem: Any, steps: Seq[str]) -> list[int]:
        fields = {"problem": str(problem), "steps": "".join(steps), "step": steps[-1] if steps else ""}
        return self.encode(Template(self.template).substitute(fields))


class Rollouts(NamedTuple):
    """What a sampler returns."""

    texts: Seq[str]
    tokens: int = 0  # generated


@dataclass(frozen=True)
class SelfConsistency:
    """Continues the chain `n` times to its end: the share of the most frequent answer; or, where the chain holds an answer already,
    the share of continuations of the bare problem that agree with it.

    Args:
        sample: (problem, steps, n) -> Rollouts: n texts that continue the steps.
        answers: how to read them; texts without an answer agree with nothing.
        rollout_tokens: most tokens of one of these texts; None: unknown, so that a limit is noticed only after it was passed.
    """

    sample: Callable[[Any, Seq[str], int], Rollouts]
    answers: AnswerFormat
    n: int = 4
    rollout_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be >= 1, got {self.n}")
        if self.rollout_tokens is not None and self.rollout_tokens < 1:
            raise ValueError(f"rollout_tokens must be >= 1 or None, got {self.rollout_tokens}")

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return self.n * (self.rollout_tokens or 0)

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        answer = self.answers.read("".join(steps))
        rollouts = self.sample(problem, steps if answer is None else [], self.n)
        votes = Counter(found for text in rollouts.texts if (found := self.answers.read(text)) is not None)
        agreeing = max(votes.values(), default=0) if answer is None else votes[answer]
        return Score(agreeing / self.n, rollouts.tokens)


@dataclass(eq=False)  # two are never the same, and so can be the keys of `weighted`
class RewardModel:
    """An AutoModelForSequenceClassification: sigmoid of its one logit, or the softmax probability of its label `positive`.

    Args:
        model, tokenizer: a model and its tokenizer, from_pretrained.
        render: (problem, steps) -> text to classify; None: the tokenizer's chat template, else problem and steps as they are.
        positive: label index, for models with several.
        batch_size: chains in one forward.
    """

    model: Any
    tokenizer: Any
    render: Callable[[Any, Seq[str]], str] | None = None
    positive: int = 1
    batch_size: int = 8
    _labels: int = field(init=False)

    def __post_init__(self) -> None:
        self._labels = self.model.config.num_labels
        if self._labels > 1 and not 0 <= self.positive < self._labels:
            raise ValueError(f"positive must be a label index below {self._labels}, got {self.positive}")
        pads = (self.tokenizer.pad_token_id, self.model.config.pad_token_id)  # the model looks for its own to find the last token
        if self.batch_size != 1 and (None in pads or pads[0] != pads[1]):
            raise ValueError(
                f"pad_token_id of tokenizer and model are {pads[0]} and {pads[1]}; fix: make them equal, or batch_size=1"
            )

    def __call__(self, problem: Any, steps: Seq[str]) -> Score:
        return self.batch([(problem, steps)])[0]

    def batch(self, items: Seq[Item]) -> list[Score]:
        texts = [self._text(*item) for item in items]
        groups = (texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size))
        return [score for group in groups for score in self._forward(group)]

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return len(self._encoded([self._text(problem, steps)])["input_ids"][0])

    def _forward(self, texts: list[str]) -> list[Score]:
        inputs = self._encoded(texts, padding=len(texts) > 1, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits.double()  # [rows, labels]
        values = torch.sigmoid(logits[:, 0]) if self._labels == 1 else logits.softmax(-1)[:, self.positive]
        return [Score(value, tokens) for value, tokens in zip(values.tolist(), inputs["attention_mask"].sum(1).tolist())]

    def _encoded(self, texts: list[str], **options: Any) -> Any:
        chat = self.render is None and self.tokenizer.chat_template is not None  # which writes the special tokens itself
        return self.tokenizer(texts, add_special_tokens=not chat, **options)

    def _text(self, problem: Any, steps: Seq[str]) -> str:
        if self.render is not None:
            return self.render(problem, steps)
        if self.tokenizer.chat_template is None:
            return f"{problem}\n{''.join(steps)}"
        chat = [{"role": "user", "content": str(problem)}, {"role": "assistant", "content": "".join(steps)}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False))


def _first_tokens(tokenizer: Any, words: Seq[str]) -> set[int]:
    """The first token of each word, at the start of a text and after a space."""
    spellings = [spelling for word in words for spelling in (word, f" {word}")]
    return {tokenizer(spelling, add_special_tokens=False)["input_ids"][0] for spelling in spellings}
