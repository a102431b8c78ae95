"""TargetModel: the only file that calls the Hugging Face model.

It puts specdec's attention under the model for the length of one forward (the user's own implementation is back afterwards),
gives it the KVCache, and proves at first use that a tree forward equals sequential ones. Models that transformers cannot route
through its attention interface get a 4-D mask instead.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from specdec.attention import TreeBatch, compiled_op
from specdec.compiled import CompiledForward, cannot_compile
from specdec.draft_tree import DraftTree
from specdec.graphs import GraphedForward
from specdec.kv_cache import CACHE_ARGUMENTS, KVCache, LayerShape, cache_argument
from specdec.linear import FastLinear, instruction_set
from specdec.prefix_backend import FlashAttention, attention_function
from specdec.ranks import Ranks, misplaced

__all__ = ["TargetModel", "UnsupportedModelError"]

PREFILL_CHUNK = 256
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of transformers' attention functions that change nothing here; any other that is set would be ignored silently.
_HARMLESS = {
    "dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
    "logits_to_keep", *CACHE_ARGUMENTS, "attention_mask", "layer_head_mask", "head_mask", "position_embeddings", "labels", "layer_idx", "output_router_logits",
}  # fmt: skip
_names = itertools.count()


class UnsupportedModelError(ValueError):
    """This model cannot be accelerated without risking its output; the message says why."""

    def __init__(self, name: str, reason: str, fix: str = "call model.generate without specdec") -> None:
        super().__init__(f"specdec cannot accelerate {name}: {reason}. Fix: {fix}")


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _refusal(model: PreTrainedModel) -> str | None:
    """Why this kind of model cannot be verified with trees, or None."""
    config = _text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; specdec speculates on decoder-only causal language models"
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "_is_stateful", False) or not ({*CACHE_ARGUMENTS, "kwargs", "args"} & parameters.keys()):
        return "it keeps a recurrent (state-space or linear-attention) state, which cannot be rolled back to an accepted path"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - _KNOWN_LAYER_TYPES:
        return f"it has layers of type {sorted(unknown)}; only full and sliding attention can be verified with trees"
    if getattr(config, "attention_chunk_size", None):
        return "it uses chunked attention"
    return misplaced(model)


class _RopeSwitch:
    """RoPE whose frequencies depend on the largest position of a forward (longrope, dynamic NTK): `threshold` positions.

    longrope: a forward that reaches position `threshold` uses the long factors for all its tokens, and transformers recomputes
    the whole cache there. Dynamic NTK past the threshold depends on what ran before (transformers keeps the longest length seen):
    not reproducible, so the engine refuses requests that would get there.
    """

    def __init__(self, config: Any) -> None:
        parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        found = next((p for p in [parameters, *nested] if p.get("rope_type") in ("longrope", "dynamic")), None)
        self.kind: str | None = found["rope_type"] if found else None
        self.threshold = 0
        if found:
            own = found.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            self.threshold = int(own or config.max_position_embeddings)

    def depth_limit(self, position: int) -> int | None:
        """Deepest tree whose root stands at `position` (it may not reach the threshold); None: no limit."""
        if self.kind is None or position >= self.threshold:
            return None
        return self.threshold - 1 - position

    def past(self, position: int) -> bool:
        """Rows whose roots are on the same side of the threshold may share a forward."""
        return self.kind is not None and position >= self.threshold

    def recompute(self, position: int) -> bool:
        """The root at `position` is the first past the threshold: the cache must be rebuilt with the long factors."""
        return self.kind == "longrope" and position == self.threshold


class TargetModel:
    """A causal language model that verifies draft trees.

    Args:
        model: any decoder-only `PreTrainedModel` (also wrapped by PEFT).
        fast_linear: let specdec's CPU kernel compute skinny matrix products where it is faster (see specdec.linear); not where
            several processes share the model.
        compile: run the steps as machine code compiled for this machine, once (see specdec.compiled); on CUDA as graphs
            (specdec.graphs).
        prefix_backend: "op", or what computes the committed part of tree attention in its place (see specdec.prefix_backend).

    Raises:
        UnsupportedModelError: the model's kind cannot be verified with trees, the self-check found a difference, or `compile` is
            asked for and impossible.
        ValueError: prefix_backend does not exist, is not installed or does not take this model's device or dtype.
    """

    def __init__(
        self, model: Any, fast_linear: bool = True, prefix_backend: str | FlashAttention = "op", compile: bool = False
    ) -> None:
        if not callable(getattr(model, "forward", None)) or not hasattr(model, "config"):
            raise UnsupportedModelError(
                type(model).__name__, "model must be a transformers causal language model", "load it with AutoModelForCausalLM"
            )
        self._model = weakref.ref(model)
        self.name = type(model).__name__
        if reason := _refusal(model):
            raise UnsupportedModelError(self.name, reason)
        config = _text_config(model)
        self.vocab_size = int(
            model.get_output_embeddings().weight.shape[0] if model.get_output_embeddings() is not None else config.vocab_size
        )
        self.max_positions = _context_length(config)
        self.has_position_table = _has_position_table(model, self.max_positions)
        self.rope = _RopeSwitch(config)
        self._configs = list(
            {
                id(m.config): m.config
                for m in model.modules()
                if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
            }.values()
        )
        self.ranks = Ranks(model)  # the processes that share it
        # Which product wins is a matter of a clock, and ranks must not round differently.
        self._linear = FastLinear(model) if fast_linear and self.ranks.size == 1 else None
        self.max_fast_rows = self._linear.max_rows if self._linear else 0
        self._attend = attention_function(prefix_backend, self.device, self.dtype)
        self.prefix_backend = getattr(prefix_backend, "__qualname__", prefix_backend)
        self._cache_argument = cache_argument(_unwrapped(model).forward)
        self._keeps_logits = "logits_to_keep" in inspect.signature(_unwrapped(model).forward).parameters
        self._batch: TreeBatch | None = None  # what the forward under way attends to
        self._calls: list[int] = []  # sliding window of each attention call of the last forward
        self.watched: tuple[torch.nn.Module, ...] = ()
        self._seen: list[torch.Tensor] | None = None  # what they put out in the latest forward, [B, M, H] each ...
        self._seen_row = 0  # ... and its first row
        self._on_prefill: Callable[[int, list[torch.Tensor]], None] | None = None
        self._interface = f"specdec_{next(_names)}"
        _register(self)
        self.uses_interface = bool(getattr(_unwrapped(model), "_supports_attention_backend", False))
        self.compiled: CompiledForward | GraphedForward | None = None  # what runs the steps, if anything but the model
        self._check()
        if compile:
            self._compile()

    @property
    def model(self) -> Any:
        """The user's model. Held weakly, so that an engine cached by specdec.generate does not keep it alive."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this TargetModel was deleted")
        return model

    def info(self) -> dict[str, Any]:
        """Which code runs the attention and the matrix products."""
        op = "torch.ops.specdec.tree_attention" if compiled_op(self.device.type) else "PyTorch reference"
        if self.prefix_backend != "op":
            op += f", the prefix by {self.prefix_backend},"
        return {
            "attention": f"{op} through transformers' attention interface"
            if self.uses_interface
            else "the model's own, with a 4-D mask",
            "linear": f"specdec ({instruction_set()}), {len(self._linear)} layers, up to {self._linear.max_rows} rows"
            if self._linear
            else "torch",
            "step": "compiled" if self.compiled else "eager",
            **({"ranks": self.ranks.size} if self.ranks.size > 1 else {}),
        }

    # ---- attention ------------------------------------------------------------------------------------------------------

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """What transformers calls in every layer: query [B, Hq, N, D], key/value views [B, Hkv, T, D] of the cache."""
        unknown = {name for name, value in kwargs.items() if value is not None and name not in _HARMLESS}
        if unknown:
            raise UnsupportedModelError(self.name, f"it passes {sorted(unknown)} to its attention, which specdec does not know")
        assert self._batch is not None, "specdec's attention was called outside TargetModel.forward"
        window = int(sliding_window or 0)
        self._calls.append(window)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = (float(scale), float(softcap or 0.0), window)
        if self._batch.known is None:
            return self._attend(self._batch, query, key, value, *options), None
        output = self._attend(self._batch.all_nodes(), self._batch.spread(query), key, value, *options)
        return self._batch.collect(output, query.shape[2]), None

    @contextmanager
    def tracing(self, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
        """The model calls attend(query, key, value, scale, softcap, window) inside, ready to be exported."""
        saved = self._attend
        self._attend = lambda batch, *arguments: attend(*arguments)
        linear = nullcontext() if self._linear is None else self._linear.tracing()
        try:
            with self._installed(TreeBatch([0], None, [1], self.device), linear), torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._attend = saved

    @contextmanager
    def _installed(self, batch: TreeBatch, linear: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """The model runs specdec's attention and kernels inside, and is exactly as before outside, whatever happens."""
        if linear is None:
            linear = nullcontext() if self._linear is None else self._linear.active()
        saved = [config._attn_implementation_internal for config in self._configs]
        self._batch = batch
        self._calls = []
        try:
            for config in self._configs:
                if self.uses_interface:
                    config._attn_implementation_internal = self._interface
                elif config._attn_implementation_internal not in ("eager", "sdpa"):
                    config._attn_implementation_internal = "eager"
            with torch.inference_mode(), evaluating(self.model), linear:
                yield
        finally:
            for config, implementation in zip(self._configs, saved):
                config._attn_implementation_internal = implementation
            self._batch = None

    def _mask(self, batch: TreeBatch) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """The 4-D mask for models outside the attention interface."""
        if self.uses_interface:
            return None
        known = batch.known or [0] * len(batch.counts)
        most = max(count - old for count, old in zip(batch.counts, known))
        end = max(p + n for p, n in zip(batch.prefix_lengths, batch.counts))
        visible = torch.zeros((len(batch.counts), 1, most, end), dtype=torch.bool)
        visible[..., 0] = True  # padding queries see one slot, so that no softmax is empty
        for row, (prefix, count, old) in enumerate(zip(batch.prefix_lengths, batch.counts, known)):
            visible[row, 0, : count - old, : prefix + count] = torch.from_numpy(batch.visible(row, 0)[old:])
        if self._configs[0]._attn_implementation_internal == "sdpa":
            return visible.to(batch.device)
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).to(batch.device)

    # ---- forwards -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return input_device(self.model)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty KVCache of this model's shape."""
        return KVCache(self.layers, rows, capacity, zero_stale=not self.uses_interface)

    def watch(self, modules: Seq[torch.nn.Module], on_prefill: Callable[[int, list[torch.Tensor]], None]) -> None:
        """Keep what these modules of the model put out in each eager forward; on_prefill gets each chunk's row, and [n, H] each."""
        self.watched, self._on_prefill = tuple(modules), on_prefill

    def seen_at(self, row: int, nodes: Seq[int]) -> list[torch.Tensor] | None:
        """Of each watched module [len(nodes), H], at nodes of a row in the latest forward; None: it told nothing (compiled)."""
        return None if self._seen is None else [states[row - self._seen_row, list(nodes)] for states in self._seen]

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Forwards inside are nobody's: of another cache, maybe in the middle of a step. What was seen before stays."""
        saved = self.watched, self._seen, self._seen_row
        self.watched = ()
        try:
            yield
        finally:
            self.watched, self._seen, self._seen_row = saved

    def _run(
        self, cache: KVCache, batch: TreeBatch, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: int
    ) -> torch.Tensor:
        kwargs: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        parents = [] if batch.trees is None else [tree.parents for tree in batch.trees]
        self.ranks.compare(input_ids.numpy(), position_ids.numpy(), *parents)
        with self._installed(batch), outputs_of(self.watched) as seen:
            output = self.model(
                input_ids=input_ids.to(batch.device),
                attention_mask=self._mask(batch),
                position_ids=position_ids.to(batch.device),
                use_cache=True,
                return_dict=True,
                **kwargs,
            )
        self._seen = [seen[module] for module in self.watched] if self.watched and len(seen) == len(self.watched) else None
        return output.logits[:, -keep:] if keep else output.logits

    def forward(self, cache: KVCache, trees: Seq[DraftTree], first_row: int = 0, known: Seq[int] | None = None) -> torch.Tensor:
        """Verify one tree a row (consecutive cache rows) in one forward; K/V go to slots P..P+N-1, uncommitted.

        Args:
            known: the first nodes of each tree that were in a forward of this call's cache before, with nothing committed since:
                only the others are computed (a drafter grows its tree level by level).

        Returns:
            logits [B, M, V] in the model's dtype of the nodes that were computed, M = the most of a row; rows past a tree's end
            are meaningless.
        """
        counts = [len(tree) for tree in trees]
        old = [0] * len(counts) if known is None else list(known)
        most = max(count - first for count, first in zip(counts, old))
        cache.begin(first_row, counts, old)
        tokens = np.zeros((len(trees), most), np.int64)
        positions = np.zeros((len(trees), most), np.int64)
        for row, (tree, first) in enumerate(zip(trees, old)):
            tokens[row, : len(tree) - first] = tree.tokens[first:]
            positions[row, : len(tree) - first] = cache.starts[row] + tree.depths[first:]
        batch = TreeBatch(cache.starts, list(trees), counts, self.device, old if any(old) else None)
        if self.compiled is not None and (logits := self.compiled(cache, batch, tokens, positions)) is not None:
            self._seen = None
            return logits
        self._seen_row = first_row
        return self._run(cache, batch, torch.from_numpy(tokens), torch.from_numpy(positions), 0)

    def prefill(
        self,
        cache: KVCache,
        row: int,
        token_ids: Seq[int],
        observe: Callable[[int, torch.Tensor], None] | None = None,
        first: int = 0,
        chunk: int | None = None,
    ) -> None:
        """Commit a prompt's tokens to `row`, chunk by chunk through causal attention.

        Args:
            token_ids: tokens to append to what the row holds (the prompt without its last token).
            observe: called with (place in token_ids, logits [n, V] from there on) after every chunk that reaches beyond `first`; None:
                no logits are computed but a chunk's last.
            first: place in token_ids before which logits are not wanted, nor computed.
            chunk: tokens a forward; None: PREFILL_CHUNK.
        """
        base = cache.lengths[row]
        crosses = self.rope.kind is not None and base + len(token_ids) + 1 > self.rope.threshold
        # one choice of frequencies for the whole prompt, as transformers does
        size = len(token_ids) if crosses else chunk or PREFILL_CHUNK
        for start in range(0, len(token_ids), max(size, 1)):
            piece = list(token_ids[start : start + size])
            self._chunk(cache, row, piece, start, observe, first, crosses)

    def _chunk(
        self,
        cache: KVCache,
        row: int,
        piece: list[int],
        offset: int,
        observe: Callable[[int, torch.Tensor], None] | None,
        first: int,
        crosses: bool,
    ) -> None:
        # Whether a prompt is past the threshold is decided by its last token, the root, which is not in this chunk: an uncommitted
        # position stands for it.
        tokens = [*piece, piece[-1]] if crosses else piece
        cache.begin(row, [len(tokens)])
        start = cache.starts[0]
        batch = TreeBatch(cache.starts, None, [len(tokens)], self.device)
        positions = torch.arange(start, start + len(tokens))[None]
        wanted = max(0, min(len(piece), offset + len(piece) - first)) if observe else 0
        keep = max(1, wanted + len(tokens) - len(piece))
        logits = self._run(cache, batch, torch.tensor([tokens]), positions, keep)
        cache.commit(row, range(len(piece)))
        if self._on_prefill is not None and self._seen is not None:
            self._on_prefill(row, [states[0, : len(piece)] for states in self._seen])
        if observe and wanted:
            observe(offset + len(piece) - wanted, logits[0, :wanted])

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first floating-point parameter, and so of its logits."""
        floating = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return next(floating, torch.float32)

    # ---- self-check -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Compare a tree forward with sequential ones on a dozen tokens, and a wrong ancestor that must make a difference.

        Raises:
            UnsupportedModelError: they differ by more than rounding, or the mask is ignored.
        """
        ids, tree = self._probe()
        reference = self._sequential(ids)
        logits = self._tree_logits(ids, tree)
        if logits is None:
            self.uses_interface = False
            logits = self._tree_logits(ids, tree)
        assert logits is not None
        worst = 0.0
        for node in (0, 2, 4, 5):
            path = [int(tree.tokens[n]) for n in tree.path(node)[1:]]
            expected = reference if node == 0 else self._sequential(ids + path)
            worst = max(
                worst, float((logits[node].double() - expected.double()).abs().max() / (expected.double().abs().max() + 1e-6))
            )
        limit = _limit(logits.dtype)
        if not worst <= limit:
            raise UnsupportedModelError(
                self.name,
                f"verifying a draft tree changed its logits by {worst:.1e} of their size (limit {limit:.0e} in {logits.dtype}), "
                "so its attention does not honour the tree mask or the positions",
            )
        wrong = DraftTree(tree.tokens, np.where(np.arange(len(tree)) == 5, 3, tree.parents))
        if torch.equal(self._tree_logits(ids, wrong)[5], logits[5]):  # type: ignore[index]
            raise UnsupportedModelError(self.name, "a wrong ancestor made no difference, its attention ignores the mask")

    def _probe(self) -> tuple[list[int], DraftTree]:
        """Six tokens and a tree of six nodes on the last of them, for checks."""
        ids = [(7 * i + 3) % self.vocab_size for i in range(6)]
        fork = (ids[-1] + 1) % self.vocab_size
        deep = [(ids[-1] + 11 + i) % self.vocab_size for i in range(4)]
        return ids, DraftTree.from_paths(ids[-1], [[fork, deep[0]], [deep[1], deep[2]], [fork, deep[3]]])

    def _compile(self) -> None:
        """Compile the step, and compare it with the eager one over two rows of different lengths.

        Raises:
            UnsupportedModelError: it cannot be compiled, or gives other logits.
        """
        fix = "leave compile out"
        if reason := cannot_compile(self):
            raise UnsupportedModelError(self.name, f"compile=True is impossible, {reason}", fix)
        eager = self._two_rows()
        try:
            self.compiled = GraphedForward(self) if self.device.type == "cuda" else CompiledForward(self)
            compiled = self._two_rows()
        except Exception as error:  # exporter and compilers raise whatever they like; the reason is passed on
            self.compiled = None
            text = str(error).strip().split("\n")[0]
            raise UnsupportedModelError(
                self.name, f"compile=True is impossible, its step does not compile ({type(error).__name__}: {text})", fix
            ) from error
        worst = max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(compiled, eager))
        if not worst <= (limit := _limit(self.dtype)):
            self.compiled = None
            raise UnsupportedModelError(
                self.name,
                f"compile=True changes its logits by {worst:.1e} of their size (limit {limit:.0e} in {self.dtype})",
                fix,
            )

    def _two_rows(self) -> list[torch.Tensor]:
        """Logits [n, V] of a tree and of a root alone, in rows of different lengths."""
        ids, tree = self._probe()
        trees = [tree, DraftTree.root_only(ids[2])]
        cache = self.new_cache(2, 16)
        self.prefill(cache, 0, ids[:-1])
        self.prefill(cache, 1, ids[:2])
        return [logits[: len(tree)] for logits, tree in zip(self.forward(cache, trees), trees)]

    def _sequential(self, ids: list[int]) -> torch.Tensor:
        """Logits after the last of `ids` by the model alone (its own attention and cache), [V]."""
        with torch.inference_mode(), evaluating(self.model):
            cache = DynamicCache(config=_text_config(self.model))
            device, kept = self.device, {self._cache_argument: cache}
            self.model(input_ids=torch.tensor([ids[:-1]], device=device), use_cache=True, **kept)
            output = self.model(
                input_ids=torch.tensor([ids[-1:]], device=device),
                position_ids=torch.tensor([[len(ids) - 1]], device=device),
                use_cache=True,
                **kept,
            )
        if not hasattr(output, "logits"):
            raise UnsupportedModelError(self.name, "it gives no logits", "load it with AutoModelForCausalLM")
        if not hasattr(self, "layers"):
            self.layers = [self._shape(layer) for layer in cache.layers]
        return output.logits[0, -1]

    def _shape(self, layer: Any) -> LayerShape:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise UnsupportedModelError(self.name, f"a layer keeps {type(layer).__name__} instead of keys and values")
        return LayerShape(keys.shape[1], keys.shape[-1], values.shape[1], values.shape[-1], keys.dtype, keys.device)

    def _tree_logits(self, ids: list[int], tree: DraftTree) -> torch.Tensor | None:
        """Logits [N, V] of a tree after ids[:-1]; None if the model did not use specdec's attention in every layer."""
        cache = self.new_cache(1, 16)
        try:
            self.prefill(cache, 0, ids[:-1])
            logits = self.forward(cache, [tree])[0]
        except UnsupportedModelError:
            raise
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UnsupportedModelError(
                self.name, f"its forward fails on a draft tree ({type(error).__name__}: {error})"
            ) from error
        if self.uses_interface:
            if len(self._calls) != len(self.layers):
                return None
            self._check_windows()
        return logits

    def _check_windows(self) -> None:
        """The sliding windows that reached the attention must be those of the configuration."""
        config = _text_config(self.model)
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", None) is False:
            window = None
        types = getattr(config, "layer_types", None) or []
        expected = bool(window) and (not types or "sliding_attention" in types)
        if expected and not any(self._calls):
            raise UnsupportedModelError(self.name, f"its sliding window of {window} does not reach the attention function")


def _limit(dtype: torch.dtype) -> float:
    """Largest difference of logits by their size that is rounding; eager models take their softmax in fp32 even in fp64."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 0.1)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was in, frozen parts of a model in training too."""
    training = [module for module in model.modules() if module.training] if model.training else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device if embeddings is not None else next(model.parameters()).device
    hook = getattr(embeddings, "_hf_hook", None)
    if device.type == "meta" and hook is not None:  # offloaded by accelerate, whose hook brings the weights for each forward
        return torch.device(hook.execution_device)
    return device


@contextmanager
def outputs_of(modules: Iterable[torch.nn.Module]) -> Iterator[dict[torch.nn.Module, torch.Tensor]]:
    """What each of these modules puts out inside, its latest output; none of them is changed."""
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(note).remove)
        yield outputs


def _register(target: TargetModel) -> None:
    """Make the target's attention known to transformers for as long as the target lives."""
    reference = weakref.ref(target)

    def specdec_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        owner = reference()
        assert owner is not None, "specdec's attention outlived its TargetModel"
        return owner._attention(*args, **kwargs)

    AttentionInterface.register(target._interface, specdec_attention)
    weakref.finalize(target, AttentionInterface._global_mapping.pop, target._interface, None)


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_position_table(model: Any, positions: int | None) -> bool:
    """Learned positions, beyond which there are none (OPT keeps two rows more); rotary models go on past what they were built for."""
    tables = (
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    )
    return positions is not None and any(positions <= table.num_embeddings <= positions + 2 for table in tables)


def _context_length(config: Any) -> int | None:
    """Positions that the model was built for."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
