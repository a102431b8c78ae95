"""TopP: transformers' top-p without sorting the vocabulary, which costs more than the rest of a step.

Tokens are kept while those above them hold less than `top_p`. Nearly always a few tokens decide that, so the largest are looked at
alone; where rounding, a tie or a flat law leaves a doubt, transformers' own code decides, so that the law is the same to the bit.
Worked example, top_p .9, probabilities .6, .25, .1, .05: above them are 0, .6, .85 and .95, so three are kept.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TopPLogitsWarper

__all__ = ["TopP", "with_fast_top_p"]

_LOOKS = (128, 2048)  # largest tokens that are looked at
_DOUBT = 1e-5  # sums nearer to top_p than this may be rounded to its other side (float32 sums over 152k tokens: 4e-7)


class TopP(TopPLogitsWarper):
    """As TopPLogitsWarper."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> [B, V], `filter_value` where a token is cut."""
        for most in _LOOKS:
            if 4 * most <= scores.shape[-1] and (kept := self._among(scores, most)) is not None:
                return kept
        return super().__call__(input_ids, scores)

    def _among(self, scores: torch.Tensor, most: int) -> torch.Tensor | None:
        """The answer by the `most` largest tokens of each row, None where they leave a doubt."""
        best = torch.topk(scores, most, dim=-1)
        mass = (best.values - torch.logsumexp(scores, -1, keepdim=True)).double().exp()
        above = mass.cumsum(-1) - mass
        count = (above < self.top_p).sum(-1, keepdim=True).clamp(min=self.min_tokens_to_keep)  # [B, 1]
        if int(count.max()) >= most or not bool(((above - self.top_p).abs() > _DOUBT).all()):  # NaN is a doubt
            return None
        if not bool((best.values.gather(-1, count - 1) > best.values.gather(-1, count)).all()):
            return None  # a tie, or -inf kept for want of others
        inside = torch.arange(most, device=scores.device) < count
        values = best.values.masked_fill(~inside, self.filter_value)
        return torch.full_like(scores, self.filter_value).scatter_(-1, best.indices, values)


def with_fast_top_p(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The list with TopP in place of transformers' own; the given one stays as it is."""
    return LogitsProcessorList(
        TopP(each.top_p, each.filter_value, each.min_tokens_to_keep) if type(each) is TopPLogitsWarper else each
        for each in processors
    )
