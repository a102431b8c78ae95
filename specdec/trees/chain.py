"""Chain: one linear draft a step, cut to the budget. Prompt lookup and suffix decoding are this builder around their sources.

Worked example: the source proposes "sat on the mat" after "cat"; a budget of 4 nodes keeps  cat - sat - on - the.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import Sequence
from specdec.sources.base import Chain as Draft
from specdec.sources.base import ChainSource

__all__ = ["Chain", "NoSource"]


class NoSource:
    """Proposes nothing: plain decoding in the same loop."""

    def start(self, seq: Sequence) -> None: ...

    def chain(self, seq: Sequence, max_len: int) -> Draft:
        return Draft.empty()

    def update(self, seq: Sequence, emitted: Seq[int]) -> None: ...

    def finish(self, seq: Sequence) -> None: ...

    def reset(self) -> None: ...


class Chain:
    """Tree builder around one ChainSource; it needs no logits."""

    sizes_itself = False
    top_k = 0

    def __init__(self, source: ChainSource) -> None:
        self.source = source
        self._seen: dict[int, int] = {}  # request -> tokens of it that the source knows

    @property
    def remembers(self) -> bool:
        """Whether a request's chains depend on earlier requests."""
        return getattr(self.source, "remembers", True)

    def start(self, seq: Sequence) -> None:
        self.source.start(seq)
        self._seen[seq.id] = len(seq.token_ids)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """Chains come from the text alone."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq, min(budget - 1, depth)) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, seq: Sequence, longest: int) -> DraftTree:
        root = seq.token_ids[-1]
        if longest <= 0:
            return DraftTree.root_only(root)
        return DraftTree.chain([root, *self.source.chain(seq, longest).tokens[:longest].tolist()])

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """Show the source every token that was emitted since the last call."""
        if fresh := seq.token_ids[self._seen[seq.id] :]:
            self.source.update(seq, fresh)
            self._seen[seq.id] = len(seq.token_ids)

    def finish(self, seq: Sequence) -> None:
        self.source.finish(seq)
        self._seen.pop(seq.id, None)

    def reset(self) -> None:
        self.source.reset()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Chains keep nothing across processes."""
