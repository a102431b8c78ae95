"""TreeBuilder: what the engine asks of every drafting method.

Life cycle of one request: start -> observe_prompt (once a prefill chunk) -> (build -> update)* -> finish. A builder owns its
sources and forwards these calls to them; per-request state is keyed by `seq.id` and freed in `finish`; what was learned across
requests lives until `reset`.

More attributes a builder may have: `merge_state(state)`, which takes in what another engine's builder learned (without it an engine
keeps to its own, see Engine.share_state); `rule`, the acceptance rule of its trees ("match" without it, see specdec.verify.rules);
`remembers = False`, if what it drafts for a request depends on nothing of earlier ones (else, where its rule tosses coins, each
request has coins of its own, see Engine.new_sequence); `compiles = False`, if it runs no numba kernels that the engine should have compiled before the first request; `parts`, the builders
that it is made of; `model`, its DraftModel.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol, runtime_checkable

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import Sequence


@runtime_checkable
class TreeBuilder(Protocol):
    """Drafts one tree a row, and learns from every verdict."""

    sizes_itself: bool  # chooses its own size within the budget, from a cost model
    top_k: int  # how many logits a node the engine must reduce for update() and observe_prompt(); 0: none

    def start(self, seq: Sequence) -> None:
        """A request begins; `seq.token_ids` is the whole prompt."""

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """Prefill harvest: `top` row i belongs to prompt position `start + i` (what the model expects after it)."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        """One tree a row with at most `budgets[i]` nodes (root included, a hard cap, >= 1) and depth at most `depths[i]`.

        `seqs[i].token_ids[-1]` is the root's token.
        """

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """Learn from one verified tree. Called AFTER the emitted tokens were appended to `seq.token_ids`.

        `verdict.nodes` is already cut where the sequence stopped; `top` has one row a node (all N nodes).
        """

    def finish(self, seq: Sequence) -> None:
        """Free the request's own state (also called for cancelled requests)."""

    def reset(self) -> None:
        """Forget everything learned."""

    def state(self) -> dict[str, Any]:
        """Arrays worth keeping across processes (may be empty)."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of state()."""
