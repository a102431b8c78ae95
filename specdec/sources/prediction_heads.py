"""PredictionHeads: the multi-token-prediction layer that a checkpoint carries beside its model (DeepSeek-V3, GLM-4.5, ...), as drafter.

The layer reads the target's last hidden state at a position together with the next token, and gives the law of the token after
that. transformers leaves it out of the model and loads it with `MtpModel`; what that is made of is used here, with the same layer
again for every further depth, fed with its own output (as vLLM does). Worked example, text "the cat", root "sat"::

    (h of "the", cat)   (h of "cat", sat)                     the target's hidden states: the text up to the root
                              |  -> law after "sat": on, down
                        (own output at "sat", on)             a draft has no hidden state of the target's yet
                              |  -> law after "sat on"

When the target has verified a draft, its own hidden state is known, and the accepted tokens are read again with it. A checkpoint
without such a layer, or whose weights are missing, is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Seq
from typing import Any

import torch
from transformers.modeling_layers import MtpModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec.draft_tree import DraftTree
from specdec.kv_cache import KVCache
from specdec.sequence import Sequence
from specdec.sources.draft_model import DraftModel, Growth, stack_path
from specdec.sources.lens import find_ends
from specdec.target import PREFILL_CHUNK, TargetModel, UnsupportedModelError

__all__ = ["PredictionHeads", "load_heads"]


def load_heads(model: Any) -> Any:
    """The extra layers of the model's checkpoint.

    Raises:
        ValueError: the model has none, or its checkpoint lacks their weights.
    """
    fix = 'fix: another drafter, such as "early_exit:8"'
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "num_mtp_layers", None):
        lacking = f"{type(model).__name__} has none"
        raise ValueError(f'drafter "mtp" needs extra prediction layers (config.num_mtp_layers), {lacking}; {fix}')
    try:
        return MtpModel.from_pretrained(model).to(model.device).eval()
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'drafter "mtp" cannot read the extra layers of {config.name_or_path!r} ({error}); {fix}') from error


class _Reader(torch.nn.Module):
    """The first extra layer as a causal language model, for TargetModel. `previous` [B, N, H] goes in beside the tokens, `output` comes out."""

    _supports_attention_backend = True

    def __init__(self, heads: Any) -> None:
        super().__init__()
        self.heads, self.config = heads, heads.config
        self.previous: torch.Tensor | None = None
        self.output: torch.Tensor | None = None

    def get_input_embeddings(self) -> Any:
        return self.heads.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.heads.shared_head

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        rows, count = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(count, device=input_ids.device)[None]
        previous = self.previous
        if previous is None:  # the self-check's
            previous = self.heads.embed_tokens.weight.new_zeros(rows, count, self.config.hidden_size)
        self.output = self.heads.forward_layer(0, previous, position_ids, past_key_values, input_ids=input_ids)
        return CausalLMOutputWithPast(logits=self.heads._project_to_logits(self.output))


class PredictionHeads(DraftModel):
    """Laws of the next token by the checkpoint's own extra layer.

    Its cache holds one entry a token but the first: slot s belongs to token s + 1, read with the target's hidden state of token s.

    Args:
        model: the target.

    Raises:
        ValueError: as load_heads.
        UnsupportedModelError: as TargetModel.
    """

    reads_guesses = False
    needs_states = True

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._layer = _Reader(load_heads(model))
        super().__init__(self._layer, vocab_size)
        if self.reader.rope.kind is not None:
            fix = 'another drafter, such as "early_exit:8"'
            raise UnsupportedModelError(self.reader.name, f'drafter "mtp" does not follow {self.reader.rope.kind} RoPE', fix)
        if (ends := find_ends(model, stack_path(model))) is None:
            reason = "its head does not read what a norm makes of its last layer's output"
            raise UnsupportedModelError(type(model).__name__, reason, 'another drafter, such as "early_exit:8"')
        self._norm = ends.norm
        self._target: weakref.ref[TargetModel] | None = None  # which knows this drafter
        self._hidden: dict[int, list[torch.Tensor]] = {}  # request -> target's states [K, H] not read yet
        self._requests: dict[int, int] = {}  # row of the target's cache -> request
        self._own: list[torch.Tensor] = []  # own outputs [N, H] at the nodes of each growth

    def attach(self, target: TargetModel, cache: KVCache) -> None:
        """Have the target hand over its hidden states."""
        self._target = weakref.ref(target)
        target.watch((self._norm,), self._prefilled)

    def start(self, seq: Sequence) -> None:
        super().start(seq)
        self._requests[seq.row] = seq.id
        self._hidden[seq.id] = []

    def finish(self, seq: Sequence) -> None:
        super().finish(seq)
        self._hidden.pop(seq.id, None)

    def _prefilled(self, row: int, states: list[torch.Tensor]) -> None:
        (hidden,) = states
        if (pieces := self._hidden.get(self._requests.get(row, -1))) is not None:
            pieces.append(hidden.clone())

    def _waiting(self, seq: Sequence) -> torch.Tensor | None:
        """[K, H], one for each token that is not in the cache; None where some are missing (a text of one token, a copied prompt)."""
        self._claim(seq)
        pieces = self._hidden.get(seq.id, [])
        wanted = len(seq.token_ids) - 1 - self.cache.lengths[seq.row]
        if wanted < 1 or sum(map(len, pieces)) != wanted:
            return None
        self._hidden[seq.id] = [torch.cat(pieces)]
        return self._hidden[seq.id][0]

    def depth_limit(self, seq: Sequence) -> int:
        return -1 if self._waiting(seq) is None else super().depth_limit(seq)

    def grow(self, seqs: Seq[Sequence], guesses: Seq[Seq[int]]) -> tuple[list[Growth], list[torch.Tensor]]:
        """As DraftModel.grow; it takes no guesses, whose hidden states nobody knows."""
        assert not any(guesses)
        chains, previous = [], []
        for seq in seqs:
            fresh, hidden = seq.token_ids[self.cache.lengths[seq.row] + 1 :], self._waiting(seq)
            assert hidden is not None, "depth_limit() said so"
            for begin in range(0, len(fresh) - 1, PREFILL_CHUNK):
                end = min(begin + PREFILL_CHUNK, len(fresh) - 1)
                self._layer.previous = hidden[None, begin:end]
                self.reader.prefill(self.cache, seq.row, fresh[begin:end])
            chains.append(DraftTree.root_only(fresh[-1]))
            previous.append(hidden[-1:])
            self._hidden[seq.id] = [hidden[-1:]]  # of the root, which is read but not committed
        logits = self._read(chains, previous, seqs[0].row, None)
        self._own = [self._output(row, 1) for row in range(len(seqs))]
        return [Growth(seq.token_ids[-1]) for seq in seqs], [self._common(rows[:1]) for rows in logits]

    def extend(self, seqs: Seq[Sequence], growths: Seq[Growth], known: Seq[int]) -> list[torch.Tensor]:
        """As DraftModel.extend: a node is read with this layer's output at its parent."""
        previous = [own[growth.parents[old:]] for own, growth, old in zip(self._own, growths, known)]
        logits = self._read([growth.tree() for growth in growths], previous, seqs[0].row, known)
        counts = [len(growth.tokens) - old for growth, old in zip(growths, known)]
        self._own = [torch.cat([own, self._output(row, count)]) for row, (own, count) in enumerate(zip(self._own, counts))]
        return [self._common(rows[:count]) for rows, count in zip(logits, counts)]

    def _read(self, trees: Seq[DraftTree], previous: Seq[torch.Tensor], first_row: int, known: Seq[int] | None) -> torch.Tensor:
        self._layer.previous = torch.nn.utils.rnn.pad_sequence(list(previous), batch_first=True)
        return self.reader.forward(self.cache, trees, first_row=first_row, known=known)

    def _output(self, row: int, count: int) -> torch.Tensor:
        assert self._layer.output is not None
        return self._layer.output[row, :count].clone()

    def keep(self, seq: Sequence, nodes: Seq[int]) -> None:
        """The root alone: what follows is read again with the target's hidden states."""
        if self._owners[seq.row] == seq.id:
            self.cache.commit(seq.row, [0])
            self._hidden[seq.id] = []

    def verified(self, seq: Sequence, nodes: Seq[int]) -> None:
        """The target has read these nodes, from the root on, and they are accepted."""
        target = None if self._target is None else self._target()
        states = None if target is None else target.seen_at(seq.row, nodes)
        assert states is not None
        if seq.id in self._hidden:
            self._hidden[seq.id] += states
