"""Step rules: where a reasoning step ends in what the model generates. Token ids are kept and never made anew from text.

A rule looks at text; `cut` finds the token that completed the boundary, and the step is all tokens up to and including it. A
boundary that ends inside a token leaves a surplus, which stays with the step: the tokens of a path, joined, are what was generated::

    StopStrings(("\\nStep",)), tokens  "2+2" "=4" "\\n" "Steps" " 2"
                                        └──── the step ────┘        Cut(tokens=4, surplus="s")

`keep=False` gives the boundary up instead: the step ends before the first token that holds nothing but the boundary or what
follows it, and the tokens after that are dropped, though they are paid for (`Completion.generated`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from specdec.sequence import Sequence
from specdec.text import stop_string_check

__all__ = ["CodeBlock", "Cut", "Newline", "Span", "StepRule", "StopStrings", "Tokens", "make_rule", "step_check"]


class Span(NamedTuple):
    """A boundary: characters [start, end) of a text."""

    start: int
    end: int


class Cut(NamedTuple):
    """Where a step ends."""

    tokens: int  # of the step: token_ids[:tokens]
    surplus: str  # text of the last of them beyond the boundary
    dropped: int  # tokens that were needed to see the boundary and are not part of the step; 0 with keep=True


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """One rule; subclasses say where a text has its first boundary.

    Attributes:
        keep: the boundary's tokens belong to the step.
    """

    keep: bool = True
    last: ClassVar[str] = ""  # with which every boundary ends: a token without it cannot complete one

    def find(self, text: str) -> Span | None:
        """The first boundary; if a text has one, every continuation has it at the same start."""
        raise NotImplementedError

    def cut(self, token_ids: Seq[int], tokenizer: Any) -> Cut | None:
        """Where the first step of these tokens ends; None: not yet."""
        span = self.find(_decode(tokenizer, token_ids))
        if span is None:
            return None
        seen = _fewest(len(token_ids), lambda count: self.find(_decode(tokenizer, token_ids[:count])) is not None)
        if self.keep:
            return Cut(seen, _decode(tokenizer, token_ids[:seen])[span.end :], 0)
        count = _fewest(seen, lambda count: _settled(_decode(tokenizer, token_ids[:count])) >= span.start)
        return Cut(count, _decode(tokenizer, token_ids[:count])[span.start :], seen - count)

    def blank(self, text: str) -> bool:
        """Whether a step says nothing: it has no more than white space and its boundary."""
        span = self.find(text)
        return not text[: None if span is None else span.start].strip()

    def ended(self, token_ids: Seq[int], tokenizer: Any) -> int:
        """How many steps have ended in these tokens."""
        text, count = _decode(tokenizer, token_ids), 0
        while (span := self.find(text)) is not None:
            text, count = text[span.end :], count + 1
        return count


@dataclass(frozen=True)
class StopStrings(StepRule):
    """Ends with the first of these strings: by default as BG-MCTS has it.

    Raises:
        ValueError: no strings, or an empty one.
    """

    strings: tuple[str, ...] = ("\n\nStep", "\nStep")

    def __post_init__(self) -> None:
        if not isinstance(self.strings, tuple) or not self.strings or not all(self.strings):
            raise ValueError(f"strings must be a tuple of non-empty strings, got {self.strings!r}")

    def find(self, text: str) -> Span | None:
        found = [Span(start, start + len(stop)) for stop in self.strings if (start := text.find(stop)) >= 0]
        return min(found, key=lambda span: (span.end, span.start), default=None)


@dataclass(frozen=True)
class Newline(StepRule):
    """Ends with `count` newlines in a row after something was said: 1, a line a step; 2, a paragraph."""

    count: int = 1
    last: ClassVar[str] = "\n"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be >= 1, got {self.count}")

    def find(self, text: str) -> Span | None:
        found = re.compile(rf"(?<=\S)[^\S\n]*(?:\n[^\S\n]*){{{self.count - 1}}}\n").search(text)
        return None if found is None else Span(*found.span())


@dataclass(frozen=True)
class Tokens(StepRule):
    """Ends after so many tokens."""

    count: int = 32

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be >= 1, got {self.count}")

    def find(self, text: str) -> Span | None:
        return None  # it is not in the text

    def cut(self, token_ids: Seq[int], tokenizer: Any) -> Cut | None:
        return Cut(self.count, "", 0) if len(token_ids) >= self.count else None

    def ended(self, token_ids: Seq[int], tokenizer: Any) -> int:
        return len(token_ids) // self.count


@dataclass(frozen=True)
class CodeBlock(StepRule):
    """Ends with the line that closes a fenced code block; prose without one, with an empty line."""

    last: ClassVar[str] = "\n"

    def find(self, text: str) -> Span | None:
        opened = said = False
        for found in re.finditer(r"[^\n]*\n", text):
            line = found[0]
            if line.lstrip(" \t").startswith("```"):
                if opened:
                    return Span(*found.span())
                opened = True
            elif not opened and said and not line.strip():
                return Span(*found.span())
            said = said or bool(line.strip())
        return None


def make_rule(rule: str | StepRule) -> StepRule:
    """A rule of a name ("steps", "newline", "paragraph", "code", "tokens:64"), or the object itself.

    Raises:
        ValueError: no such rule.
    """
    if isinstance(rule, StepRule):
        return rule
    made = {"steps": StopStrings(), "newline": Newline(), "paragraph": Newline(2), "code": CodeBlock()}
    if rule in made:
        return made[rule]
    if isinstance(rule, str) and (number := re.fullmatch(r"tokens:([0-9]{1,9})", rule)):
        return Tokens(int(number[1]))
    raise ValueError(f"step must be one of {', '.join(made)}, tokens:N, or a StepRule object, got {rule!r}")


def step_check(rule: StepRule, tokenizer: Any) -> Callable[[Sequence], bool]:
    """The rule as a `Sequence.stop_check`: whether the newest token completed a step. The output must begin with the step."""
    if isinstance(rule, StopStrings):
        return stop_string_check(tokenizer, rule.strings)  # decodes the end of the output alone
    if isinstance(rule, Tokens):
        return lambda seq: seq.output_length >= rule.count

    def completed(seq: Sequence) -> bool:
        return rule.last in _decode(tokenizer, seq.output_ids[-1:]) and rule.find(_decode(tokenizer, seq.output_ids)) is not None

    return completed


def _decode(tokenizer: Any, token_ids: Seq[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _settled(text: str) -> int:
    """Characters that further tokens cannot change: an incomplete one is not among them."""
    return len(text.rstrip("\ufffd"))


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """The least count in [0, most] that is enough, by bisection: more is enough too."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
