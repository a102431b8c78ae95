"""From a node's logits to the law of the token after it, exactly as `model.generate` would build it there.

The law of a node is softmax(processors(logits)) with the processors applied to the node's OWN prefix (prompt, output, path from
the root), in generate()'s order: penalties, temperature, top-k, top-p, min-p (verification.md section 6). Laws are lazy: only the
nodes that the acceptance walk visits are ever processed, since one pass over a vocabulary costs as much as the rest of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specdec.draft_tree import ROOT, DraftTree
from specdec.randomness import argmax
from specdec.sequence import SamplingParams, Sequence

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

__all__ = ["Law", "build_processor", "build_warpers"]


def build_processor(
    params: SamplingParams,
    eos_token_ids: Iterable[int] = (),
    prompt_length: int = 0,
    pad_length: int = 0,
    device: torch.device | str = "cpu",
) -> LogitsProcessorList | None:
    """The processors that generate() would build from these parameters, in its order; None where there are none.

    Args:
        params: what the request asks for; temperature 0 leaves out the sampling-only ones, as do_sample=False does.
        eos_token_ids: the model's own EOS; min_new_tokens bars them, and params.stop_token_ids.
        prompt_length: prompt tokens without padding.
        pad_length: left padding that the processors see before the prompt; no penalty for it.
        device: where the logits live.
    """
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    stops = sorted({*eos_token_ids, *params.stop_token_ids})
    if params.repetition_penalty != 1:
        penalty = float(params.repetition_penalty)
        processors.append(hf.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=pad_length or None))
    if params.min_new_tokens > 0 and stops:
        skip = pad_length + prompt_length
        processors.append(hf.MinNewTokensLengthLogitsProcessor(skip, params.min_new_tokens, stops, device=str(device)))
    processors.extend(build_warpers(params))
    return processors or None


def build_warpers(params: SamplingParams) -> list[Any]:
    """Temperature and truncation, the processors that look at the scores alone; none at temperature 0."""
    from transformers.generation import logits_process as hf

    from specdec.nucleus import TopP

    if params.temperature == 0:
        return []
    warpers: list[Any] = []
    if params.temperature != 1:
        warpers.append(hf.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopP(params.top_p))
    if params.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    return warpers


class Law:
    """The laws of the next token at the nodes of one tree, computed on request.

    A processor runs at most once a node, and the walk asks for a parent before its child, so stateful processors see the emitted
    tokens in order, once each.

    Args:
        logits: [N, V] of the tree's nodes, any float dtype and device.
        tree: the tree of N nodes.
        seq: its sequence; `processor`, `params.temperature`, `randomness` and `buffer` are read.
        keep_visited: keep (raw logits, processed scores) of every visited node in `visited`, for generate()'s output_logits and
            output_scores.
        argmax: [N] int32, the argmax of the logits of each node, -1 where it is not known; None: nowhere.
    """

    __slots__ = ("_argmax", "_greedy", "_logits", "_processor", "_scores", "_seq", "_tree", "visited")

    def __init__(
        self,
        logits: torch.Tensor,
        tree: DraftTree,
        seq: Sequence,
        keep_visited: bool = False,
        argmax: np.ndarray | None = None,
    ) -> None:
        if len(logits) != len(tree):
            raise ValueError(f"logits must have one row a node, got {len(logits)} rows for a tree of {len(tree)} nodes")
        self._logits = logits
        self._tree = tree
        self._seq = seq
        self._processor = seq.processor or None
        self._greedy = seq.params.temperature == 0
        self._scores: dict[int, torch.Tensor] = {}
        self.visited: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {} if keep_visited else None
        plain = self._greedy and self._processor is None and self.visited is None
        self._argmax = argmax if plain else None

    def scores(self, node: int) -> torch.Tensor:
        """[V] float32: the processed logits of `node`; do not write into it."""
        if self._processor is None and self.visited is None:
            return self._logits[node].float()
        scores = self._scores.get(node)
        if scores is None:
            scores = self._scores[node] = self._process(node)
        return scores

    def draw(self, node: int) -> int:
        """The token after `node`: the argmax at temperature 0, else drawn with the noise of its absolute position.

        Raises:
            FloatingPointError: the scores hold NaN, or +inf while sampling.
            ValueError: the processors exclude every token.
        """
        if self._argmax is not None and self._argmax[node] >= 0:
            return int(self._argmax[node])
        scores = self.scores(node)
        if self._greedy:
            token = argmax(scores)
        else:
            token = self._seq.randomness.choose(self.position(node), scores)
        score = scores[token].item()  # argmax lands on NaN if there is one, and on -inf only if nothing else is left
        if not math.isfinite(score) and not (self._greedy and score == math.inf):
            self._refuse(node, score)
        return token

    def probs(self, node: int) -> np.ndarray:
        """[V] float64: the law itself; one-hot at temperature 0.

        Raises:
            FloatingPointError, ValueError: as draw().
        """
        scores = self.scores(node)
        if self._greedy:
            law = np.zeros(len(scores))
            law[self.draw(node)] = 1.0
            return law
        best = float(scores.max())
        if not math.isfinite(best):
            self._refuse(node, best)
        return torch.softmax(scores.double(), -1).cpu().numpy()

    def ends(self, token: int) -> bool:
        """The text ends with `token`: no node behind it is visited, where a grammar would have nothing left to allow."""
        return token in self._seq.eos_token_ids or token in self._seq.params.stop_token_ids

    def logprob(self, node: int, token: int) -> float:
        """log softmax(scores(node))[token]; temperature 0 is reported as the law of the unscaled scores.

        Tokens with +inf share the law equally, its limit.
        """
        scores = self.scores(node)
        if infinite := int(torch.isposinf(scores).sum()) if scores[token] == math.inf else 0:
            return -math.log(infinite)
        return float(scores[token] - torch.logsumexp(scores, dim=-1))

    def _process(self, node: int) -> torch.Tensor:
        raw = self._logits[node : node + 1].to(torch.float32, copy=True)  # as generate() does: processors may write into it
        scores = raw
        if self._processor is not None:
            path = [int(self._tree.tokens[ancestor]) for ancestor in self._tree.path(node)[1:]] if node != ROOT else []
            scores = self._processor(self._seq.buffer.with_path(path).to(raw.device), raw)
            if scores.shape != raw.shape:
                raise ValueError(
                    f"logits_processor returned scores of shape {list(scores.shape)} for {list(raw.shape)}: it is called with "
                    "one row at a time; fix: make it independent of the batch, or call with one prompt"
                )
        if self.visited is not None:
            self.visited[node] = (raw[0], scores[0])
        return scores[0]

    def position(self, node: int) -> int:
        """Absolute position of the token after `node`, padding not counted."""
        return len(self._seq.token_ids) + int(self._tree.depths[node])

    def _refuse(self, node: int, score: float) -> None:
        where = f"at position {self.position(node)} (node {node} of the tree)"
        if score == -math.inf:
            raise ValueError(
                f"every token is excluded {where}: the logits, or what the logits processors left of them, are all -inf; "
                "relax the processors (min_new_tokens, bad words, a grammar)"
            )
        raise FloatingPointError(
            f"the scores {where} contain {score}: the model or a logits processor overflowed; "
            "run the model in float32 or bfloat16 instead of float16, or raise the temperature"
        )
