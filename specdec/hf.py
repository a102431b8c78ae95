"""generate() for `model.generate(..., custom_generate=specdec.generate)`, and accelerate(): generate()'s contract on specdec's engine.

What reaches a custom_generate callable is settled by transformers: the inputs are expanded, the processors, criteria and the
generation config are prepared, and `streamer`, `tokenizer` and `stop_strings` never arrive (use accelerate(), a direct call of
specdec.generate, or specdec_streamer=). What cannot be honoured is refused by name.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessorList, StopStringCriteria, StoppingCriteriaList
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
from specdec.randomness import Randomness, draw_seed
from specdec.sampling import Law
from specdec.sequence import SamplingParams, Sequence

__all__ = ["accelerate", "generate"]

# What transformers itself adds to the model's arguments, and is either used here or cannot change the output.
_MODEL_KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_engines: weakref.WeakKeyDictionary[Any, dict[tuple[Any, Any], Engine]] = weakref.WeakKeyDictionary()


class _Recorder:
    """Follows one row for generate(): streams its tokens, keeps its scores and logits."""

    def __init__(self, streamer: Any, scores: bool, logits: bool) -> None:
        self.streamer = streamer
        self.keeps_scores = scores or logits
        self.scores: list[torch.Tensor] | None = [] if scores else None
        self.logits: list[torch.Tensor] | None = [] if logits else None

    def emitted(self, seq: Sequence, law: Law, verdict: Verdict, kept: int) -> None:
        """Called once a step, after `kept` tokens were appended."""
        if law.visited is not None:
            for node in verdict.nodes[:kept]:
                raw, scores = law.visited[int(node)]
                if self.scores is not None:
                    self.scores.append(scores)
                if self.logits is not None:
                    self.logits.append(raw)
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
        specdec_seed: fixes the sampled text; default: one draw from torch's generator.
        specdec_streamer: a transformers streamer (batch 1), since transformers keeps `streamer=` from custom generators.
        specdec_engine: an Engine on this model to use instead of the one that is kept per model, method and budget.

    Returns:
        What `model.generate` returns: [B, L + new] token ids, or a GenerateDecoderOnlyOutput.

    Raises:
        ValueError: an argument that specdec cannot honour; it is named.
        UnsupportedModelError: a model that cannot be verified with trees.
    """
    if generation_config is None or not hasattr(generation_config, "_eos_token_tensor"):
        options = {
            "specdec_method": specdec_method, "specdec_budget": specdec_budget, "specdec_seed": specdec_seed,
            "specdec_streamer": specdec_streamer, "specdec_engine": specdec_engine,
        }  # fmt: skip
        given = {
            "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
            "generation_config": generation_config, "synced_gpus": synced_gpus or None,
        }  # fmt: skip
        if input_ids is not None:
            kwargs["inputs"] = input_ids
        return _call(model.generate, model, {k: v for k, v in (options | given | kwargs).items() if v is not None})
    assert input_ids is not None
    _refuse(model, generation_config, logits_processor, synced_gpus, kwargs)
    engine = specdec_engine or _engine(model, specdec_method or "auto", specdec_budget or "auto")
    return _decode(engine, input_ids, logits_processor, stopping_criteria, generation_config, specdec_seed, specdec_streamer, kwargs)


def _call(original: Callable[..., Any], model: Any, kwargs: dict[str, Any]) -> Any:
    """model.generate with custom_generate=generate, and what transformers would drop on the way carried past it."""
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assistant_model cannot be combined with specdec, which drafts by itself; fix: leave it out")
    if (streamer := kwargs.pop("streamer", None)) is not None:
        kwargs["specdec_streamer"] = streamer
    config = kwargs.get("generation_config")
    tokenizer = kwargs.pop("tokenizer", None)
    stop_strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if stop_strings is None:
        stop_strings = getattr(model.generation_config, "stop_strings", None) if config is None else None
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs tokenizer=; fix: pass the tokenizer beside it, as model.generate asks for too")
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer))
        kwargs["stopping_criteria"] = criteria
        if config is not None and getattr(config, "stop_strings", None) is not None:
            kwargs["generation_config"] = copy.deepcopy(config)
            kwargs["generation_config"].stop_strings = None
    return original(custom_generate=generate, **kwargs)


@contextmanager
def accelerate(model: Any, method: str = "auto", budget: int | str = "auto", *, seed: int | None = None) -> Iterator[Engine]:
    """Inside the block every `model.generate(...)`, a pipeline's or a PEFT wrapper's too, is speculative; afterwards all is as before.

    Args:
        model: the model (for PEFT: the wrapper).
        method, budget: as for Engine.
        seed: fixes all sampled texts of the block.

    Yields:
        The Engine that does the work (its statistics, save_state).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine = Engine(base, method=method, budget=budget)
    original = base.generate
    had_own = "generate" in base.__dict__

    @functools.wraps(original)
    def speculative(inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            raise ValueError("custom_generate cannot be used inside specdec.accelerate; fix: leave it out, or leave the block")
        kwargs.pop("custom_generate", None)
        if inputs is not None:
            kwargs["inputs"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
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


def _engine(model: Any, method: str, budget: int | str) -> Engine:
    """The engine kept for a model: its drafts stay warm between calls, and it dies with the model."""
    engines = _engines.setdefault(model, {})
    if (method, budget) not in engines:
        engines[method, budget] = Engine(model, method=method, budget=budget)
        engines[method, budget]._model = None  # the dictionary must not keep its own key alive
    return engines[method, budget]


def _refuse(model: Any, config: Any, processors: Any, synced_gpus: Any, kwargs: dict[str, Any]) -> None:
    """Refuse by name what would otherwise be ignored."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"specdec does greedy search and sampling, this call asks for {mode.value} (num_beams={config.num_beams}, "
            f"penalty_alpha={config.penalty_alpha}, prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}); fix: leave those out"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; specdec works on decoder-only models")
    if synced_gpus:
        raise ValueError("synced_gpus=True is not supported: specdec does not run under ZeRO-3 or FSDP generation")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("output_attentions and output_hidden_states are not supported: a step runs over a tree, not over one token")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(f"cache_implementation={config.cache_implementation!r} is not supported: specdec brings its own cache; fix: leave it out")
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors or ()):
        raise ValueError("guidance_scale is not supported: it runs the model a second time on its own cache")
    if getattr(kwargs.get("past_key_values"), "_is_user_defined", False):
        raise ValueError("past_key_values of the caller is not supported; fix: pass the whole text as input_ids")
    if unknown := sorted(name for name, value in kwargs.items() if name not in _MODEL_KWARGS and value is not None):
        raise ValueError(f"specdec does not know the model arguments {unknown} and will not ignore them; fix: leave them out or call model.generate")


def _decode(
    engine: Engine, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any, seed: int | None, streamer: Any, kwargs: dict[str, Any]
) -> Any:
    rows, length = input_ids.shape
    if streamer is not None and rows > 1:
        raise ValueError(f"streamer supports one row, this call has {rows} (batch size times num_return_sequences)")
    pads = _left_padding(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    if config.max_length <= length:
        raise ValueError(f"max_length={config.max_length} leaves no room after {length} prompt tokens; fix: raise max_new_tokens")
    sampling = bool(config.do_sample)
    if sampling and seed is None:
        seed = draw_seed()
    params = SamplingParams(max_new_tokens=config.max_length - length, temperature=1.0 if sampling else 0.0, seed=seed)
    eos = frozenset(config._eos_token_tensor.tolist()) if config._eos_token_tensor is not None else frozenset()
    own_criteria = [c for c in criteria or () if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    keep = config.return_dict_in_generate
    samples = max(1, config.num_return_sequences or 1)
    tokens = input_ids.tolist()
    sequences = [
        engine.new_sequence(
            tokens[row][pads[row] :],
            params,
            Randomness(seed or 0, (row // samples, row % samples)),
            eos_token_ids=eos,
            pad_ids=tokens[row][: pads[row]],
            processor=_row_processors(processors, row, rows, samples),
            stop_check=functools.partial(_criteria_met, own_criteria) if own_criteria else None,
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


def _criteria_met(criteria: list[Any], seq: Sequence) -> bool:
    """Every criterion sees the row's whole text after every token, as in generate(), none is skipped."""
    ids = seq.buffer.with_path([])
    return any([bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in criteria])


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
                raise ValueError(f"attention_mask of row {row} has zeros after its first one; fix: pad on the left only (padding_side='left')")
    if position_ids is not None:
        expected = torch.arange(length)[None] - torch.tensor(pads)[:, None]
        given = position_ids.to("cpu").expand(rows, -1)
        if given.shape != expected.shape or bool(((given != expected) & (expected >= 0)).any()):
            raise ValueError("position_ids other than 0, 1, 2, ... after the left padding are not supported; fix: leave position_ids out")
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
    return copy.deepcopy(processor)


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
