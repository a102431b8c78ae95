"""Slow and obvious decoding: what every fast path must reproduce token for token."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from bench.plain_search import KeyedGumbel

__all__ = ["KeyedGumbel", "greedy_loop", "least_squares", "next_scores", "sample_loop"]


@torch.no_grad()
def next_scores(model: PreTrainedModel, ids: list[int], processor: LogitsProcessorList | None = None) -> torch.Tensor:
    """[V] float32: processed logits of the token after `ids`, by a forward over all of it, without a cache."""
    input_ids = torch.tensor([ids])
    logits = model(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits[:, -1]
    scores = logits.to(torch.float32, copy=True)
    return (processor(input_ids, scores) if processor else scores)[0]


def greedy_loop(model: PreTrainedModel, ids: Seq[int], n: int, eos: Seq[int] = ()) -> list[int]:
    """The `n` new tokens of a plain argmax loop without cache; fewer where one of `eos` ends it (it is the last token)."""
    return sample_loop(model, ids, n, None, eos)


def sample_loop(
    model: PreTrainedModel, ids: Seq[int], n: int, processor: LogitsProcessorList | None, eos: Seq[int] = ()
) -> list[int]:
    """The same with processors: transformers' own warpers, and a KeyedGumbel at the end where it is to sample."""
    text = list(ids)
    while len(text) < len(ids) + n and (len(text) == len(ids) or text[-1] not in eos):
        text.append(int(torch.argmax(next_scores(model, text, processor), dim=-1)))
    return text[len(ids) :]


def least_squares(blocks: Seq[tuple[torch.Tensor, torch.Tensor]], scale: float, prior: float, drift: float) -> torch.Tensor:
    """[H + 1, H] fp64: the map of a Lens (rows of D, then b) after these blocks of pairs ([N, H], [N, H]), an inversion for each.

    `scale` is the mean square of the states that the prior knows.
    """
    size = blocks[0][0].shape[1] + 1
    start = torch.full((size,), 1 / (prior * scale), dtype=torch.float64)
    start[-1] = 1 / prior
    spread, found = torch.diag(start), torch.zeros(size, size - 1, dtype=torch.float64)
    for early, late in blocks:
        x, wanted = torch.cat([early, torch.ones(len(early), 1)], 1).double(), (late - early).double()
        after = torch.linalg.inv(torch.linalg.inv(spread) + x.T @ x)
        found = found + after @ x.T @ (wanted - x @ found)
        kept = (1 - drift) ** len(x)
        spread = kept * after + (1 - kept) * torch.diag(start)
    return found
