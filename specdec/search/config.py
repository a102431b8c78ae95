"""SearchConfig: the options that hold for every policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.search.chain_length import ChainLength
from specdec.search.vote import CHAIN_SCORES, RULES

__all__ = ["SearchConfig"]

DUPLICATES = ("merge", "ignore", "resample", "keep")


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Options that hold for every policy.

    Attributes:
        step_tokens, full_tokens: most tokens of one request for a step, for a full text (None: what the budget allows).
        forced_tokens: kept for a forced answer while there is none; 0: never force one.
        deterministic: the driver samples at temperature 0: nothing is drawn twice.
        duplicates: a text equal to a sibling's is charged and: "merge" counts the sibling once more, "ignore" changes nothing,
            "resample" draws once more with another stream (then merges), "keep" is a node of its own (as BG-MCTS is coded).
        truncated_answers: a cut text that holds an answer is answered (BG-MCTS's code refuses).
        prompt_tokens, context_window: a node after which another step might not fit is closed; None: no window.
        cue_tokens: most that the driver inserts before a REFINE or a FORCED; they fill the window too (`Prompts.cue_tokens`).
        answer_rule, chain_score: see `vote`.
        seconds: wall-clock limit; after it nothing is asked for but the forced answer.
        count_evaluator, evaluator_max_tokens: charge the evaluator's tokens to the same budget, so many an evaluation at most.
        max_failures: failed evaluations in a row after which best-of-n with a majority vote takes over; 0: never.
        length: hints of how long a chain is.

    Raises:
        ValueError: an option outside the values above.
    """

    step_tokens: int = 256
    full_tokens: int | None = None
    forced_tokens: int = 32
    deterministic: bool = False
    duplicates: str = "merge"
    truncated_answers: bool = True
    prompt_tokens: int = 0
    cue_tokens: int = 0
    context_window: int | None = None
    answer_rule: str = "auto"
    chain_score: str = "last"
    seconds: float | None = None
    count_evaluator: bool = False
    evaluator_max_tokens: int | None = None
    max_failures: int = 3
    length: ChainLength = field(default_factory=ChainLength)

    def __post_init__(self) -> None:
        choices = {"duplicates": DUPLICATES, "answer_rule": RULES, "chain_score": tuple(CHAIN_SCORES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in {"step_tokens": 1, "forced_tokens": 0, "prompt_tokens": 0, "cue_tokens": 0, "max_failures": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("full_tokens", "context_window", "evaluator_max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {getattr(self, name)}")
