"""generate() for `model.generate(..., custom_generate=specdec.generate)`, and accelerate(): generate()'s contract.

What reaches a custom_generate callable is settled by transformers: the inputs are expanded, the processors, criteria and the
generation config are prepared, and `streamer`, `tokenizer` and `stop_strings` never arrive (use accelerate(), a direct call of
specdec.generate, or specdec_streamer=). What cannot be honoured is refused by name.

Rows of a batch advance at their own pace, so processors and criteria see one row at a time, [1, L], left padding included. A
custom processor may keep state: in a batch every row works on its own copy of it. A row that ended is filled with pad tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.draft_tree import Verdict
from specdec.engine import Engine
from specdec.kv_cache import CACHE_ARGUMENTS
from specdec.nucleus import with_fast_top_p
from specdec.randomness import Randomness, draw_seed
from specdec.sampling import Law
from specdec.sequence import SamplingParams, Sequence

__all__ = ["accelerate", "generate"]

# What transformers itself adds to the model's arguments, and is either used here or cannot change the output.
_MODEL_KWARGS = {"attention_mask", "position_ids", *CACHE_ARGUMENTS, "use_cache", "logits_to_keep", "cache_position"}
_DROPPED = {
    "streamer": "specdec_streamer=, specdec.accelerate or a direct specdec.generate(model, ..., streamer=...)",
    "assistant_model": "no assistant_model: specdec drafts by itself",
    "synced_gpus": "synced_gpus=False: specdec does not run under ZeRO-3 or FSDP generation",
}
_engines: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Engine]] = weakref.WeakKeyDictionary()
_engines_lock = threading.Lock()


class _Recorder:
    """Follows one row for generate(): streams its tokens, keeps its scores and logits."""

    def __init__(self, streamer: Any, scores: bool, logits: bool) -> None:
        self.streamer = streamer
        self.keeps_scores = scores or logits
        self.scores: list[torch.Tensor] | None = [] if scores else None
        self.logits: list[torch.Tensor] | None = [] if logits else None

    def judged(self, law: Law, verdict: Verdict) -> None:
        """A step's verdict is known: keep the scores and logits of the nodes it visited. Stopping criteria may read them."""
        if law.visited is None:
            return
        for node in verdict.nodes:
            raw, scores = law.visited[int(node)]
            if self.scores is not None:
                self.scores.append(scores)
            if self.logits is not None:
                self.logits.append(raw)

    def emitted(self, seq: Sequence, kept: int) -> None:
        """Its first `kept` tokens were appended, and the text may have stopped there."""
        for kept_scores in (self.scores, self.logits):
            if kept_scores is not None:
                del kept_scores[seq.output_length :]
        if self.streamer is not None:
            for token in seq.token_ids[len(seq.token_ids) - kept :]:
                self.streamer.put(torch.tensor([token]))


def generate(
    model: Any,
    input_ids: torch.Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: Any = None,
    synced_gpus: bool | None = False,
    *,
    specdec_method: str | None = None,
    specdec_budget: int | str | None = None,
    specdec_compile: bool | None = None,
    specdec_seed: int | None = None,
    specdec_streamer: Any = None,
    specdec_engine: Engine | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with speculation, under the contract of `model.generate`.

    Use it as `model.generate(**inputs, custom_generate=specdec.generate)`, or call it: `specdec.generate(model, **inputs,
    streamer=..., tokenizer=..., stop_strings=...)`.

    Args:
        model: the model, as transformers passes it.
        input_ids: [B, L] prompts, left-padded (attention_mask says where).
        logits_processor, stopping_criteria, generation_config, synced_gpus: as in `model.generate`.
        specdec_method: drafting method (METHODS); default "auto".
        specdec_budget: nodes a tree, or "auto".
        specdec_compile: compile the steps for this machine, once (Engine's `compile`).
        specdec_seed: fixes the sampled text; default: one draw from torch's generator.
        specdec_streamer: a transformers streamer (batch 1), since transformers keeps `streamer=` from custom generators.
        specdec_engine: an Engine on this model to use instead of the one that is kept per model and these options.

    Returns:
        What `model.generate` returns: [B, L + new] token ids, or a GenerateDecoderOnlyOutput.

    Raises:
        ValueError: an argument that specdec cannot honour; it is named.
        UnsupportedModelError: a model that cannot be verified with trees.
    """
    options = {
        "specdec_method": specdec_method, "specdec_budget": specdec_budget, "specdec_compile": specdec_compile,
        "specdec_seed": specdec_seed, "specdec_streamer": specdec_streamer, "specdec_engine": specdec_engine,
    }  # fmt: skip
    if not hasattr(generation_config, "_eos_token_tensor"):  # called by the user: transformers prepares the arguments first
        given = {
            "inputs": input_ids, "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
            "generation_config": generation_config, "synced_gpus": synced_gpus or None,
        }  # fmt: skip
        return _call(
            model.generate, model, {name: value for name, value in (options | given).items() if value is not None} | kwargs
        )
    assert input_ids is not None
    _refuse_dropped(sys._getframe(1))
    _refuse(model, generation_config, logits_processor, kwargs)
    engine = _chosen_engine(model, specdec_engine, specdec_method, specdec_budget, specdec_compile)
    return _decode(
        engine, input_ids, logits_processor, stopping_criteria, generation_config, specdec_seed, specdec_streamer, kwargs
    )


def _call(original: Callable[..., Any], model: Any, kwargs: dict[str, Any]) -> Any:
    """model.generate with custom_generate=generate, and what transformers would drop on the way carried past it."""
    kwargs.pop("custom_generate", None)
    if (streamer := kwargs.pop("streamer", None)) is not None:
        kwargs["specdec_streamer"] = streamer
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config")
    stop_strings = kwargs.pop("stop_strings", None) or next(
        (found for place in (config, model.generation_config) if (found := getattr(place, "stop_strings", None))), None
    )
    if stop_strings:
        if tokenizer is None:
            raise ValueError(
                f"stop_strings={stop_strings!r} needs tokenizer=; fix: pass the tokenizer beside it, as to model.generate"
            )
        criterion = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
        kwargs["stop_strings"] = None  # overrides those of the configs, for which transformers would want the tokenizer again
    return original(custom_generate=generate, **kwargs)


@contextmanager
def accelerate(
    model: Any,
    method: str = "auto",
    budget: int | str = "auto",
    *,
    seed: int | None = None,
    drafter: Any = None,
    compile: bool = False,
) -> Iterator[Engine]:
    """Inside the block every `model.generate(...)`, a pipeline's or a PEFT wrapper's too, is speculative; then all is as before.

    Args:
        model: the model (for PEFT: the wrapper).
        method, budget, drafter, compile: as for Engine.
        seed: fixes all sampled texts of the block.

    Yields:
        The Engine that does the work (its statistics, save_state).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine = Engine(base, method=method, budget=budget, drafter=drafter, compile=compile)
    original = base.generate
    had_own = "generate" in base.__dict__

    positional = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def speculative(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(positional, args))
        if kwargs.get("custom_generate") not in (None, generate):
            raise ValueError("custom_generate cannot be used inside specdec.accelerate; fix: leave it out, or leave the block")
        if all(kwargs.get(f"specdec_{name}") is None for name in ("method", "budget", "compile")):
            kwargs.setdefault("specdec_engine", engine)
        if seed is not None:
            kwargs.setdefault("specdec_seed", seed)
        return _call(original, base, kwargs)

    base.__dict__["generate"] = speculative
    try:
        yield engine
    finally:
        if had_own:
            base.__dict__["generate"] = original
        else:
            base.__dict__.pop("generate", None)


def _chosen_engine(
    model: Any, engine: Engine | None, method: str | None, budget: int | str | None, compile: bool | None
) -> Engine:
    """The caller's engine, or the one kept for a model and options: its drafts stay warm, and it dies with the model."""
    if engine is not None:
        if not method is budget is compile is None:
            raise ValueError(
                "specdec_engine brings its own method, budget and compile; fix: leave out specdec_method, specdec_budget and specdec_compile"
            )
        if engine.target.model is not model:
            raise ValueError("specdec_engine was made for another model; fix: Engine(model)")
        return engine
    method, budget = "auto" if method is None else method, "auto" if budget is None else budget
    parameter = next(model.parameters())
    key = (
        method,
        budget,
        bool(compile),
        parameter.dtype,
        parameter.device,
        model.config.get_text_config(decoder=True).vocab_size,
    )
    with _engines_lock:
        engines = _engines.setdefault(model, {})
        if key not in engines:
            engines[key] = Engine(model, method=method, budget=budget, compile=bool(compile))
            engines[key]._model = None  # the dictionary must not keep its own key alive
        return engines[key]


def _refuse_dropped(caller: FrameType) -> None:
    """transformers' generate() does not hand these to a custom generator; its frame tells whether the user passed them."""
    if caller.f_code.co_name != "generate":
        return
    for name, fix in _DROPPED.items():
        if caller.f_locals.get(name):
            raise ValueError(f"{name} does not reach specdec through custom_generate= or is not supported; fix: use {fix}")


def _refuse(model: Any, config: Any, processors: Any, kwargs: dict[str, Any]) -> None:
    """Refuse by name what would otherwise be ignored."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"specdec does greedy search and sampling, this call asks for {mode.value} (num_beams={config.num_beams}, "
            f"penalty_alpha={config.penalty_alpha}, prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}); fix: leave them out"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; specdec works on decoder-only models")
    if getattr(model.prepare_inputs_for_generation, "__self__", model) is not model:
        owner = type(model.prepare_inputs_for_generation.__self__).__name__
        raise ValueError(
            f"{owner} prepares the inputs of {type(model).__name__} itself (prompt learning), which specdec does not support"
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "output_attentions and output_hidden_states are not supported: a step runs over a tree, not over one token"
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not supported: specdec has its own cache; fix: leave it out"
        )
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors or ()):
        raise ValueError("guidance_scale is not supported: it runs the model a second time on its own cache")
    if any(getattr(kwargs.get(name), "_is_user_defined", False) for name in CACHE_ARGUMENTS):
        raise ValueError("past_key_values (cache) of the caller is not supported; fix: pass the whole text as input_ids")
    if unknown := sorted(name for name, value in kwargs.items() if name not in _MODEL_KWARGS and value is not None):
        raise ValueError(f"specdec does not know the model arguments {unknown} and will not ignore them; fix: leave them out")


def _decode(
    engine: Engine,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    seed: int | None,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Any:
    rows, length = input_ids.shape
    if streamer is not None and rows > 1:
        raise ValueError(f"streamer supports one row, this call has {rows} (batch size times num_return_sequences)")
    pads = _left_padding(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    # A user's criterion of these two kinds replaces transformers' own, so that they, not the config, say where a text ends.
    criteria = list(criteria or ())
    max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=config.max_length)
    eos = frozenset(int(token) for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist())
    own_criteria = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    sampling = bool(config.do_sample)
    if sampling and seed is None:
        seed = engine.target.ranks.first(draw_seed())
    params = SamplingParams(max_new_tokens=max(1, max_length - length), temperature=1.0 if sampling else 0.0, seed=seed)
    keep = config.return_dict_in_generate
    samples = max(1, config.num_return_sequences or 1)
    if type(processors) is LogitsProcessorList:
        processors = with_fast_top_p(processors)
    tokens = input_ids.tolist()
    sequences = [
        engine.new_sequence(
            tokens[row][pads[row] :],
            params,
            Randomness(seed or 0, (row // samples, row % samples)),
            eos_token_ids=eos,
            pad_ids=tokens[row][: pads[row]],
            processor=_row_processors(processors, row, rows, samples),
            stop_check=functools.partial(_criteria_met, own_criteria, input_ids.device) if own_criteria else None,
            record=_Recorder(streamer, keep and config.output_scores, keep and config.output_logits),
        )
        for row in range(rows)
    ]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    engine.run(sequences)
    engine.trim()
    if streamer is not None:
        streamer.end()
    return _output(sequences, input_ids, config)


def _criteria_met(criteria: list[Any], device: torch.device, seq: Sequence) -> bool:
    """Every criterion sees the row's whole text after every token, as in generate()."""
    ids = seq.buffer.with_path([]).to(device)
    scores = None if seq.record.scores is None else tuple(step[None] for step in seq.record.scores[: seq.output_length])
    return any([bool(torch.as_tensor(criterion(ids, scores)).any()) for criterion in criteria])  # noqa: C419 - none is skipped


def _left_padding(input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> list[int]:
    """Pad tokens at the left of each row, [B]."""
    rows, length = input_ids.shape
    if mask is None:
        pads = [0] * rows
    else:
        mask = mask.to("cpu") != 0
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, got {list(mask.shape)}")
        pads = (~mask).sum(-1).tolist()
        for row, count in enumerate(pads):
            if bool((~mask[row, count:]).any()):
                raise ValueError(
                    f"attention_mask of row {row} has zeros after its first one; fix: pad on the left only (padding_side='left')"
                )
    if position_ids is not None:
        expected = torch.arange(length)[None] - torch.tensor(pads)[:, None]
        given = position_ids.to("cpu").expand(rows, -1)
        if given.shape != expected.shape or bool(((given != expected) & (expected >= 0)).any()):
            raise ValueError(
                "position_ids other than 0, 1, 2, ... after the left padding are not supported; fix: leave position_ids out"
            )
    return pads


def _row_processors(processors: Any, row: int, rows: int, samples: int) -> Any:
    """The processors as one row sees them: transformers calls them once for the batch, specdec once a row and token."""
    if not processors or rows == 1:
        return processors or None
    return LogitsProcessorList(_bound_to_row(processor, row, row // samples) for processor in processors)


def _bound_to_row(processor: Any, row: int, prompt: int) -> Any:
    """One row's view of a processor that holds something for each row; a user's own, maybe stateful, processor is copied."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = functools.partial(_allowed_in_row, processor._prefix_allowed_tokens_fn, row)
        return PrefixConstrainedLogitsProcessor(allowed, processor._num_beams)
    if type(processor).__module__.startswith("transformers.") and not hasattr(processor, "state"):
        own = copy.copy(processor)
        if isinstance(own, RepetitionPenaltyLogitsProcessor) and isinstance(own.prompt_ignore_length, torch.Tensor):
            own.prompt_ignore_length = own.prompt_ignore_length[row : row + 1]
        elif isinstance(own, EncoderRepetitionPenaltyLogitsProcessor):
            own.encoder_input_ids = own.encoder_input_ids[prompt : prompt + 1]
        elif isinstance(own, EncoderNoRepeatNGramLogitsProcessor):
            own.batch_size, own.generated_ngrams = 1, [own.generated_ngrams[prompt]]
        return own
    return _own_copy(processor)


def _own_copy(processor: Any) -> Any:
    """A copy whose state belongs to one row; what is heavy and no state (models, tokenizers) is shared."""
    attributes = getattr(processor, "__dict__", {}).values()
    shared = {id(value): value for value in attributes if isinstance(value, (torch.nn.Module, PreTrainedTokenizerBase))}
    try:
        return copy.deepcopy(processor, shared)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise ValueError(
            f"logits_processor {type(processor).__name__} cannot be copied for each row of the batch ({error}); "
            "fix: give it a __deepcopy__, or call with one row"
        ) from error


def _allowed_in_row(allowed: Callable[[int, torch.Tensor], list[int]], row: int, _batch: int, ids: torch.Tensor) -> list[int]:
    return allowed(row, ids)


def _output(sequences: list[Sequence], input_ids: torch.Tensor, config: Any) -> Any:
    """[B, L + longest output], padded on the right, alone or in a GenerateDecoderOnlyOutput."""
    longest = max(seq.output_length for seq in sequences)
    pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
    new = torch.full((len(sequences), longest), pad, dtype=input_ids.dtype)
    for row, seq in enumerate(sequences):
        new[row, : seq.output_length] = torch.tensor(seq.output_ids, dtype=input_ids.dtype)
    ids = torch.cat([input_ids, new.to(input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return ids
    records = [seq.record for seq in sequences]
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=_by_step([record.scores for record in records], longest) if config.output_scores else None,
        logits=_by_step([record.logits for record in records], longest) if config.output_logits else None,
    )


def _by_step(rows: list[list[torch.Tensor]], longest: int) -> tuple[torch.Tensor, ...]:
    """One [B, V] tensor a step; a row that ended earlier is zero from there on."""
    zero = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[step] if step < len(row) else zero for row in rows]) for step in range(longest))
