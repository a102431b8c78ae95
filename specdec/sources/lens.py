"""Lens: a map from what a model's inner layer holds to what its last layer will hold, learned online by least squares.

The head of a model reads the last layer's output. Read by it too soon, an inner layer's output says little, though much of what the
last layer will say is in it already, in other coordinates (the "tuned lens", Belrose et al., arXiv 2303.08112, trains a map for
that). Here nothing is trained: every token that the target reads anyway is a pair (x, y) of states before the head, x by the first
layers and y by all of them, and the affine map with the least squared error over all pairs so far is known in closed form::

    y ~ x + x D + b        sum |y - x - x D - b|^2 + PRIOR (m |D|^2 + |b|^2) -> min,  m the mean square of x

It is kept by recursive least squares: P = (X'X + PRIOR m I)^-1 and D change by each block of pairs, in O(size^2) a token, less than
one layer takes. With each pair P moves by DRIFT of the way back to what it began with: the map may have changed, so that recent
text counts for more. Before anything was learned D is 0, and the laws are those of the layer's plain output.

Where that leads: embedded model, twelve prompts of `tune`, 96 tokens each, drawn at temperature 1; means of the sum over the vocabulary
of min(law of the first layers, law of all), the chance that a draft is accepted. Learning from each prompt and its own answer
alone, and from the prompts before as well::

    layers          4     8    12    16    20    24  of 30
    plain output  .09   .09   .11   .13   .17   .27
    one prompt    .29   .30   .33   .35   .42   .54
    all           .33   .34   .37   .39   .46   .59

Without drift "all" is .43 at 20 layers, with ten times as much .47 on the last eight prompts where it is .49; PRIOR 10 and 100 lose
.004 and .01.

It shapes drafts and never judges them: any function of earlier steps may (verification.md 4.4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from specdec.target import evaluating, input_device, outputs_of

__all__ = ["Ends", "Lens", "find_ends"]

PRIOR = 30.0  # pairs that the wish for D = 0 counts as
DRIFT = 2e-4  # of what is known, which is forgotten with each pair
# Elements of a state, where that was chosen; its price in error grows as size * sqrt(DRIFT), so wider ones get less.
MEASURED = 576
BLOCK = 64  # pairs that change the map at once


class Lens(Module):
    """The head of a model behind the map, in its place: states [..., H] -> logits [..., V].

    Args:
        head: reads states of `size` elements.
        device: of these states.
    """

    delta: Tensor  # [H, H] fp32
    bias: Tensor  # [H]

    def __init__(self, head: Module, size: int, device: torch.device) -> None:
        super().__init__()
        self.head = head
        with torch.inference_mode(False):  # reset() may be called outside, whoever made this
            self.register_buffer("delta", torch.zeros(size, size, dtype=torch.float32, device=device))
            self.register_buffer("bias", torch.zeros(size, dtype=torch.float32, device=device))
        self._covariance: Tensor | None = None  # P [H + 1, H + 1], the bias last
        self._prior: Tensor  # [H + 1] what its diagonal began with
        self.pairs = 0  # that were learned from

    @property
    def weight(self) -> Any:
        """The head's."""
        return self.head.weight

    def forward(self, states: Tensor) -> Any:
        mapped = states.float() @ self.delta + self.bias
        return self.head(states + mapped.to(states.dtype))

    @torch.inference_mode()
    def learn(self, early: Tensor, late: Tensor) -> None:
        """Pairs [N, H] of states before the head; those that are not finite teach nothing."""
        with torch.autocast(early.device.type, enabled=False):  # the caller's would make some of the operands bf16
            self._learn(early.float(), late.float())

    def _learn(self, x: Tensor, y: Tensor) -> None:
        sound = torch.isfinite(x).all(1) & torch.isfinite(y).all(1)
        x, y = x[sound], y[sound]
        if not len(x):
            return
        drift = DRIFT * min(1.0, MEASURED / x.shape[1]) ** 2
        wanted, x = y - x, torch.nn.functional.pad(x, (0, 1), value=1.0)
        if self._covariance is None:
            scale = x[:, :-1].square().mean().clamp_min(1e-12)
            self._prior = (1 / (PRIOR * scale)).repeat(x.shape[1])
            self._prior[-1] = 1 / PRIOR
            self._covariance = torch.diag(self._prior)
        for block, right in zip(x.split(BLOCK), wanted.split(BLOCK)):
            spread = self._covariance @ block.T
            noise = block @ spread
            noise.diagonal().add_(1.0)
            factor, failed = torch.linalg.cholesky_ex(noise)
            if failed:  # rounding has made P indefinite
                self.reset()
                return
            gain = torch.cholesky_solve(spread.T, factor)  # [N, H + 1]
            miss = right - block[:, :-1] @ self.delta - self.bias
            self.delta.addmm_(gain[:, :-1].T, miss)  # in place: compiled code and CUDA graphs know these tensors
            self.bias.add_(gain[:, -1] @ miss)
            kept = (1 - drift) ** len(block)
            self._covariance.addmm_(spread, gain, beta=kept, alpha=-kept)
            self._covariance.diagonal().add_(self._prior, alpha=1 - kept)
        self.pairs += len(x)

    def reset(self) -> None:
        """Forget all pairs."""
        self.delta.zero_()
        self.bias.zero_()
        self._covariance, self.pairs = None, 0


class Ends(NamedTuple):
    """Where the states before a model's head come from."""

    last: Module  # of the layers
    norm: Module  # its output -> states before the head
    path: str  # of the head
    size: int  # elements of a state
    device: torch.device  # of the states


def find_ends(model: Any, stack: str) -> Ends | None:
    """What follows the model's layers; None where a state does not go from the last layer through one module into the head.

    Args:
        model: a causal language model.
        stack: name of its list of layers.
    """
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        return None
    layers, parent = model.get_submodule(stack), model.get_submodule(stack.rpartition(".")[0])
    layer = layers[-1]
    inputs: list[Tensor] = []
    modules = [layer, *(child for child in parent.children() if child is not layers)]
    with evaluating(model), torch.inference_mode(), outputs_of(modules) as outputs:
        hook = head.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments[:1]))
        try:
            ids = torch.tensor([[3, 2]], device=input_device(model))  # 0 and 1 may be padding, embedded as 0
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            hook.remove()
        if len(inputs) != 1 or layer not in outputs:
            return None
        state, last = inputs[0][0, -1], outputs[layer]
        called = list(outputs.items())
        for norm, output in called[[module for module, _ in called].index(layer) + 1 :]:
            if output.shape == last.shape and torch.equal(output[0, -1], state) and torch.equal(norm(last), output):
                return Ends(layer, norm, path, state.shape[-1], state.device)
    return None
