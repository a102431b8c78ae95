"""What a tree builder asks of a source of linear drafts, and the draft that it gets back."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specdec.sequence import Sequence

__all__ = ["Chain", "ChainSource"]


@dataclass(frozen=True, slots=True)
class Chain:
    """One continuation of the committed text, with the evidence for it. The root is not part of it."""

    tokens: np.ndarray  # [L] int64, L may be 0; tokens[0] follows the last committed token
    match_length: int  # tokens of context that recurred; 0: no evidence
    agreement: float  # share of the recorded occurrences that continued with tokens[0], in [0, 1]
    score: float  # expected number of accepted tokens, in [0, L]; comparable between sources

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def empty(cls, match_length: int = 0) -> Chain:
        """No draft."""
        return cls(np.empty(0, np.int64), match_length, 0.0, 0.0)


class ChainSource(Protocol):
    """Proposes one chain a request. Life cycle of a request: start -> (chain -> update)* -> finish."""

    def start(self, seq: Sequence) -> None:
        """A request begins; `seq.token_ids` is the whole prompt."""

    def chain(self, seq: Sequence, max_len: int) -> Chain:
        """At most `max_len` tokens that may follow `seq.token_ids[-1]`."""

    def update(self, seq: Sequence, emitted: Seq[int]) -> None:
        """`emitted` was just appended to `seq.token_ids`."""

    def finish(self, seq: Sequence) -> None:
        """Free the request's own state (also called for cancelled requests)."""

    def reset(self) -> None:
        """Forget what was learned across requests; running requests keep their own text."""
