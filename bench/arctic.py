"""Suffix decoding by its authors' own code: the suffix cache of arctic-inference (arXiv 2411.04975), in specdec's loop.

A peer, for benchmarks alone. The settings are those of its vLLM plug-in (depth 64, factor 1, at least 0.1 a token), which drafts a
chain; the tree is the paper's other mode. The cache has a tree of each request's own text and one of all outputs; the draft of the
higher score wins. The package declares torch as a build requirement, which its suffix cache does not need: build it without::

    pip install nanobind==2.9.2
    pip install --no-deps --no-build-isolation arctic-inference
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from typing import Any

import numpy as np

from specdec.draft_tree import NO_PARENT, DraftTree, TopK, Verdict
from specdec.sequence import Sequence

__all__ = ["ARCTIC", "ArcticSuffix", "missing_arctic"]

MAX_DEPTH = 64
MAX_CACHED_REQUESTS = 100_000
ARCTIC = {"suffix_arctic": False, "suffix_arctic_tree": True}  # method -> drafts a tree


def missing_arctic() -> str | None:
    """What to install; None if it is there."""
    if find_spec("arctic_inference") is not None:
        return None
    return (
        "the package arctic-inference (extra: peers) is not installed; fix: pip install nanobind==2.9.2, then "
        "pip install --no-deps --no-build-isolation arctic-inference"
    )


def _new_cache() -> Any:
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    return SuffixDecodingCache(max_tree_depth=MAX_DEPTH, max_cached_requests=MAX_CACHED_REQUESTS)


class ArcticSuffix:
    """Tree builder around arctic-inference's SuffixDecodingCache.

    Args:
        tree: draft a tree, not a chain.
        new_cache: makes an empty cache.
    """

    sizes_itself = False
    top_k = 0
    compiles = False

    def __init__(self, tree: bool, new_cache: Callable[[], Any] = _new_cache) -> None:
        self.tree = tree
        self._new_cache = new_cache
        self._seen: dict[int, int] = {}  # request -> tokens of it that the cache knows
        self._cache = new_cache()

    def start(self, seq: Sequence) -> None:
        self._cache.start_request(seq.id, np.array(seq.token_ids, np.int32))
        self._seen[seq.id] = len(seq.token_ids)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        """Drafts come from the text alone."""

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        return [self._build(seq, min(budget - 1, depth)) for seq, budget, depth in zip(seqs, budgets, depths, strict=True)]

    def _build(self, seq: Sequence, most: int) -> DraftTree:
        """A tree of at most `most` drafted tokens; so it is no deeper either."""
        root = seq.token_ids[-1]
        if most <= 0:  # 0 would mean "as many as the cache is deep"
            return DraftTree.root_only(root)
        context = np.array(seq.token_ids[-MAX_DEPTH:], np.int32)
        draft = self._cache.speculate(seq.id, context, max_spec_tokens=most, use_tree_spec=self.tree)
        parents = [NO_PARENT, *(parent + 1 for parent in draft.parents)]  # theirs count without the root, whose children have -1
        return DraftTree(np.array([root, *draft.token_ids]), np.array(parents))

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """Show the cache every token that was emitted since the last call."""
        if fresh := seq.token_ids[self._seen[seq.id] :]:
            self._cache.add_active_response(seq.id, np.array(fresh, np.int32))
            self._seen[seq.id] = len(seq.token_ids)

    def finish(self, seq: Sequence) -> None:
        self._cache.stop_request(seq.id)
        del self._seen[seq.id]

    def reset(self) -> None:
        """Forget all outputs. Running requests would be lost: benchmarks have none then."""
        self._cache = self._new_cache()
        self._seen.clear()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept across processes."""
