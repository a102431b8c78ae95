"""Tiny randomly initialised models, one an architecture, with weights large enough that text depends on context."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

VOCAB = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0,
             "original_max_position_embeddings": 40}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 12}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 12, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 12, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": None}),
    "phi3_longrope": ("Phi3ForCausalLM", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40, "sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}  # fmt: skip
FP32_ONLY = {"mixtral"}  # its expert kernels refuse fp64


def build(name: str, **overrides: Any) -> Any:
    """A fresh model of the architecture, eval mode, fp32, always the same weights."""
    class_name, own = CONFIGS[name]
    model_class = getattr(transformers, class_name)
    common = {key: value for key, value in _COMMON.items() if not (name == "falcon" and key == "head_dim")}
    config = model_class.config_class(**{**common, **own, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(hash_of(name))
        model = model_class(config).eval()
        for parameter in model.parameters():  # normalisation weights that are not all one
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def hash_of(name: str) -> int:
    """A seed that does not depend on the process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


@functools.lru_cache
def shared(name: str) -> Any:
    """The same model for every test that does not change it."""
    return build(name)
