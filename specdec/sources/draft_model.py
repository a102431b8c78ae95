"""DraftModel: a small language model whose laws draft, with a KV cache that keeps step with the committed text of every request.

A tree grows level by level, one forward a level over the new nodes alone: the earlier ones are in the cache, as nodes that tree
attention reaches by ancestry. Worked example, two tokens of the text not seen yet, two nodes expanded a level::

    grow(seqs)              forward: (sat) (on) the     text first, the root last -> law after "the"
    extend([[cat, dog]])    forward: cat dog            law after "the cat" and after "the dog"
    ...                     the verified path is committed, the rest forgotten: keep(seq, path)

The law of a node is what its children are drawn from: after the request's temperature and truncation, over the target's
vocabulary. Penalties and other processors that look at the text are left to the target: they cost acceptance, never the law.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch.nn import Module, ModuleList

from specdec.draft_tree import NO_PARENT, DraftTree
from specdec.kv_cache import KVCache
from specdec.sampling import build_warpers
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.lens import Lens, find_ends
from specdec.target import TargetModel, UnsupportedModelError

__all__ = [
    "DraftModel", "EarlyExit", "Growth", "check_tokenizers", "early_exit_layers", "first_layers", "is_own", "load_drafter", "log_law",
    "make_drafter", "stack_path",
]  # fmt: skip

logger = logging.getLogger("specdec")
MOST_PAIRS = 64  # steps whose states wait to be learned from
CATCH_UP = 8  # tokens of the text that are read together with the root; more are prefilled


def check_tokenizers(draft: Any, target: Any) -> None:
    """Both must give every id that both have the same token.

    Raises:
        ValueError: they do not; the message names the first difference.
    """
    ours, theirs = ({index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (draft, target))
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise ValueError(
                f"the drafter's tokenizer has {ours[index]!r} as token {index}, the target's {theirs[index]!r}: drafts would be "
                "other words. Fix: a drafter of the target's family"
            )


class Growth:
    """The tree that a drafter has read for one request: nodes in the order of their forwards, the root first."""

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [NO_PARENT]

    def add(self, parent: int, token: int) -> int:
        """A node to be read by the next forward; returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def tree(self) -> DraftTree:
        return DraftTree(np.array(self.tokens, np.int64), np.array(self.parents, np.int32))


class DraftModel:
    """Laws of the next token by a small model.

    Args:
        model: any model that TargetModel takes, of the target's tokenizer.
        vocab_size: the target's; what the drafter knows beyond is cut off, what it lacks it never drafts.
        compile: as for TargetModel.

    Raises:
        UnsupportedModelError: as TargetModel.
    """

    reads_guesses = True  # grow() takes tokens beyond the root
    needs_states = False  # of the target, at every token of every request
    remembers = False  # its laws depend on earlier requests: see TreeBuilder

    def __init__(self, model: Any, vocab_size: int, compile: bool = False) -> None:
        self._model = model  # kept alive: the TargetModel only refers to it
        self.reader = TargetModel(model, compile=compile)
        self.vocab_size = vocab_size
        self.cache = self.reader.new_cache(1, 256)
        self._owners: list[int] = []  # id of the request whose text is in each row of the cache

    # ---- requests -------------------------------------------------------------------------------------------------------

    def start(self, seq: Sequence) -> None:
        """A request begins in row `seq.row`; its prompt is read with the first draft."""
        self._claim(seq)

    def finish(self, seq: Sequence) -> None:
        """Free the row; the last one moves into it, as in the engine's own cache."""
        if seq.id not in self._owners:
            return
        row, last = self._owners.index(seq.id), len(self._owners) - 1
        if row != last:
            self.cache.fork(last, row)
            self._owners[row] = self._owners[last]
        self._owners.pop()
        self.cache.release(last)

    def _claim(self, seq: Sequence) -> None:
        """Row `seq.row` holds a prefix of the request's text, if only an empty one."""
        while len(self._owners) <= seq.row:
            self.cache.reserve(len(self._owners) + 1, 1)  # first, since it may find no memory
            self.cache.lengths[len(self._owners)] = 0
            self._owners.append(-1)
        if self._owners[seq.row] != seq.id:
            self._owners[seq.row] = seq.id
            self.cache.lengths[seq.row] = 0

    def trim(self) -> None:
        """Give back the buffers that long or many texts made grow; no request is under way."""
        self.cache = self.reader.new_cache(1, 256)
        self._owners = []

    def attach(self, target: TargetModel, cache: KVCache) -> None:
        """The engine's model and cache, for drafters that live on them."""

    def verified(self, seq: Sequence, nodes: Seq[int]) -> None:
        """The target has read these nodes, from the root on, and they are accepted, whoever drafted them; after keep()."""

    def reset(self) -> None:
        """Forget what was learned from texts, where there is any such thing."""

    def unread(self, seq: Sequence) -> int:
        """Tokens of the text before its root that grow() reads first."""
        self._claim(seq)
        return len(seq.token_ids) - 1 - self.cache.lengths[seq.row]

    def depth_limit(self, seq: Sequence) -> int:
        """Deepest node that the drafter's context has room for, below 0 where the text itself has none."""
        longest = self.reader.max_positions
        return len(seq.token_ids) if longest is None else longest - len(seq.token_ids)

    # ---- drafting -------------------------------------------------------------------------------------------------------

    def grow(self, seqs: Seq[Sequence], guesses: Seq[Seq[int]]) -> tuple[list[Growth], list[torch.Tensor]]:
        """Read the texts up to their roots, and behind each root a chain of guesses: a Growth and its logits [1 + G, V] for each.

        Args:
            seqs: in consecutive rows.
            guesses: tokens that may follow each text, of the drafter's vocabulary; they become nodes 1 ... G of the growth.
        """
        chains = []
        for seq, more in zip(seqs, guesses):
            self._claim(seq)
            fresh = [self._readable(token) for token in seq.token_ids[self.cache.lengths[seq.row] :]]
            if len(fresh) > CATCH_UP:
                self.reader.prefill(self.cache, seq.row, fresh[:-1])
                fresh = fresh[-1:]
            chains.append(DraftTree.chain([*fresh, *more]))
        logits = self.reader.forward(self.cache, chains, first_row=seqs[0].row)
        growths, found = [], []
        for row, (seq, chain, more) in enumerate(zip(seqs, chains, guesses)):
            root = len(chain) - len(more) - 1
            self.cache.commit(seq.row, range(root))  # the root stays the first uncommitted node, the guesses follow it
            growth = Growth(int(chain.tokens[root]))
            for parent, token in enumerate(more):
                growth.add(parent, token)
            growths.append(growth)
            found.append(self._common(logits[row, root : len(chain)]))
        return growths, found

    def extend(self, seqs: Seq[Sequence], growths: Seq[Growth], known: Seq[int]) -> list[torch.Tensor]:
        """Read the nodes from known[i] on of each growth: their logits, [M_i, V] each."""
        logits = self.reader.forward(self.cache, [growth.tree() for growth in growths], first_row=seqs[0].row, known=known)
        return [self._common(rows[: len(growth.tokens) - old]) for rows, growth, old in zip(logits, growths, known)]

    def keep(self, seq: Sequence, nodes: Seq[int]) -> None:
        """Commit the accepted nodes of a request's growth, the root among them; called when they are in `seq.token_ids`."""
        if self._owners[seq.row] == seq.id:
            self.cache.commit(seq.row, nodes)

    def _readable(self, token: int) -> int:
        """The token, or another in place of one that the drafter lacks: its drafts are worse after that, and no less checked."""
        return token if token < self.reader.vocab_size else 0

    def _common(self, logits: torch.Tensor) -> torch.Tensor:
        """[M, V] over the target's vocabulary: -inf where the drafter has no token. NaN counts for little: a drafter that
        fails may cost drafts, not the text."""
        logits = torch.nan_to_num(logits[:, : self.vocab_size].float(), nan=-1e4, posinf=1e4, neginf=float("-inf"))
        missing = self.vocab_size - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def log_law(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[M, V] fp32 log-probabilities of the drafter under the request's temperature and truncation; as they are at temperature 0."""
    for warper in build_warpers(params):
        logits = warper(None, logits)
    return torch.log_softmax(logits, -1)


class EarlyExit(DraftModel):
    """The target's own first layers with its final norm and head, for users without a second model.

    Their keys and values of the committed text are the target's: it reads and writes the engine's cache, whose slots past the
    committed ones the target's forward fills anew. So it needs no prompt, no commit and no cache. What its layers say comes
    through a Lens (8 bytes times the square of a state's elements), which learns from the states of the prompts and of the
    accepted tokens.

    Args:
        model: the target.
        layers: how many of its first layers, at least 1 and fewer than it has.
        lens: False reads the layers' plain output, as transformers' assisted generation does.

    Raises:
        ValueError: layers out of range.
        UnsupportedModelError: the model has no list of layers to cut, or somebody has replaced the forward of what holds it.
    """

    def __init__(self, model: Any, layers: int, vocab_size: int, compile: bool = False, lens: bool = True) -> None:
        cut = first_layers(model, layers)
        self._ends = find_ends(cut, stack_path(model)) if lens else None
        self.lens: Lens | None = None  # None, too, where the model's states do not go straight from a norm into its head
        if self._ends is not None:
            self.lens = Lens(cut.get_output_embeddings(), self._ends.size, self._ends.device)
            cut = _exchange(cut, self._ends.path, self.lens)
        super().__init__(cut, vocab_size, compile)
        self.layers = layers
        self.remembers = self.lens is not None
        self._target: weakref.ref[TargetModel] | None = None  # which knows this drafter
        self._pairs: list[list[torch.Tensor]] = []  # states [n, H] of accepted tokens after `layers` layers and at the end

    def attach(self, target: TargetModel, cache: KVCache) -> None:
        """Use the engine's cache, and have the target tell its states."""
        self.cache = cache
        if self._ends is not None:
            target.watch((self._ends.last, self._ends.norm), self._prefilled)
            self._target = weakref.ref(target)

    def start(self, seq: Sequence) -> None: ...

    def finish(self, seq: Sequence) -> None: ...

    def keep(self, seq: Sequence, nodes: Seq[int]) -> None: ...

    def _claim(self, seq: Sequence) -> None: ...

    def grow(self, seqs: Seq[Sequence], guesses: Seq[Seq[int]]) -> tuple[list[Growth], list[torch.Tensor]]:
        """As DraftModel.grow, once all that was verified is learned."""
        self._learn()
        return super().grow(seqs, guesses)

    def _prefilled(self, row: int, states: list[torch.Tensor]) -> None:
        self._pairs.append(states)
        self._learn()  # now: a long prompt's states are large

    def verified(self, seq: Sequence, nodes: Seq[int]) -> None:
        """The target has read these nodes, from the root on, and they are accepted."""
        target = None if self._target is None else self._target()
        if target is not None and (states := target.seen_at(seq.row, nodes)) is not None:
            self._pairs.append(states)
            if len(self._pairs) >= MOST_PAIRS:  # nobody has drafted for long
                self._learn()

    def _learn(self) -> None:
        if self._pairs and self.lens is not None and self._ends is not None:
            pairs, self._pairs = self._pairs, []  # first: what cannot be learned now must not wait for ever
            try:
                with torch.inference_mode():
                    early, late = (torch.cat(states) for states in zip(*pairs))
                    self.lens.learn(self._ends.norm(early), late)
            except RuntimeError as error:  # no memory: it costs drafts, not the text
                logger.warning("specdec: the early exit forgets what it has learned (%s)", error)
                self.lens.reset()

    def reset(self) -> None:
        """Forget what the lens has learned."""
        self._pairs = []
        if self.lens is not None:
            self.lens.reset()


def first_layers(model: Any, layers: int) -> Any:
    """A model of the first `layers` layers that shares all weights with `model`, which stays as it is.

    Raises:
        ValueError: layers out of range.
        UnsupportedModelError: no module of the model is a list of as many layers as its configuration says.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers < total:
        raise ValueError(f"layers must be an int in [1, {total - 1}], the model has {total}, got {layers!r}")
    path = stack_path(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    copies = {id(model.config): config, id(model.config.get_text_config(decoder=True)): text}
    return _exchange(model, path, ModuleList(list(model.get_submodule(path))[:layers]), copies)


def stack_path(model: Any) -> str:
    """Name of the model's list of layers.

    Raises:
        UnsupportedModelError: no module is a list of as many layers as its configuration says.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == total:
            return str(name)
    raise UnsupportedModelError(type(model).__name__, f"it has no list of its {total} layers", "draft with another method")


def _exchange(model: Any, path: str, module: Module, configs: dict[int, Any] | None = None) -> Any:
    """`model` with another module at this path, all others the very same; it stays as it is itself.

    Args:
        configs: id of a configuration -> the one in its place.
    """
    *parents, last = path.split(".")
    top = shell = _shell(model, configs or {})
    for part in parents:
        inner = shell._modules[part]
        assert inner is not None, "named_modules() found the path"
        child = _shell(inner, configs or {})
        shell._modules[part] = child
        shell = child
    shell._modules[last] = module
    return top


def _shell(module: Module, configs: dict[int, Any]) -> Module:
    """The module under another configuration; its children are the very same, but can be exchanged."""
    if "forward" in module.__dict__:  # the copy would run the original
        reason = f"the forward of its {type(module).__name__} was replaced (by accelerate's hooks?), so it cannot be cut"
        raise UnsupportedModelError(type(module).__name__, reason, "draft with another method")
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    if hasattr(module, "config"):
        shell.config = configs.get(id(module.config), module.config)
    return shell


def early_exit_layers(drafter: Any) -> int | None:
    """8 for "early_exit:8", None for any other drafter.

    Raises:
        ValueError: early_exit without a number of layers.
    """
    kind, _, layers = drafter.partition(":") if isinstance(drafter, str) else ("", "", "")
    if kind != "early_exit":
        return None
    if not layers.isdecimal():
        raise ValueError(f'drafter must say how many layers, such as "early_exit:8", got {drafter!r}')
    return int(layers)


def is_own(drafter: Any) -> bool:
    """Whether this names a part of the target itself, and no model to load.

    Raises:
        ValueError: as early_exit_layers.
    """
    return isinstance(drafter, str) and (drafter == "mtp" or early_exit_layers(drafter) is not None)


def _compare_tokenizers(drafter: Any, model: Any, tokenizer: Any, local_files_only: bool) -> None:
    """Check the drafter's tokenizer against the target's: `tokenizer`, or what lies beside the model; a warning where one is missing.

    Raises:
        ValueError: as check_tokenizers.
    """
    from specdec.models import find_tokenizer

    try:
        ours = find_tokenizer(getattr(drafter, "name_or_path", ""), local_files_only)
        theirs = find_tokenizer(getattr(model, "name_or_path", "")) if tokenizer is None else tokenizer
    except LookupError as missing:
        logger.warning(
            "specdec: nobody has checked that the drafter has the model's tokenizer (%s); the text is right even if not, the drafts are not",
            missing,
        )
        return
    check_tokenizers(ours, theirs)


def load_drafter(name: str, model: Any, tokenizer: Any) -> Any:
    """The model of a folder or hub name, in the target's dtype and on its device.

    Raises:
        ValueError: its tokenizer is not the target's.
    """
    from specdec.models import load_model

    drafter = load_model(name, next(model.parameters()).dtype, model.device)
    _compare_tokenizers(drafter, model, tokenizer, local_files_only=False)
    return drafter


def make_drafter(drafter: Any, model: Any, tokenizer: Any, vocab_size: int, compile: bool = False) -> DraftModel:
    """What Engine's argument `drafter` stands for: a DraftModel, a model, "early_exit:8", "mtp", or a folder or hub name to load.

    A DraftModel is taken as it is, compiled or not.

    Raises:
        ValueError: as early_exit_layers, load_drafter and PredictionHeads; more layers than the model has.
        UnsupportedModelError: as TargetModel.
    """
    if isinstance(drafter, DraftModel):
        return drafter
    if (layers := early_exit_layers(drafter)) is not None:
        return EarlyExit(model, layers, vocab_size, compile)
    if isinstance(drafter, str) and drafter == "mtp":
        from specdec.sources.prediction_heads import PredictionHeads

        return PredictionHeads(model, vocab_size)
    if isinstance(drafter, str):
        return DraftModel(load_drafter(drafter, model, tokenizer), vocab_size, compile)
    _compare_tokenizers(drafter, model, tokenizer, local_files_only=True)
    return DraftModel(drafter, vocab_size, compile)
