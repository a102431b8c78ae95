"""Every architecture gives the text of a plain argmax loop, or is refused by name; none is silently wrong."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny_models
from oracles_engine import Noisy, Plain, greedy, make_prompts
from specdec.draft_tree import DraftTree
from specdec.engine import Engine
from specdec.methods import METHODS
from specdec.sequence import SamplingParams
from specdec.sources.draft_model import EarlyExit
from specdec.target import TargetModel, UnsupportedModelError
from specdec.trees.drafted import DraftedTree

WINDOW, THRESHOLD, NEW = 12, 40, 16  # the sliding window and longrope's threshold in tiny_models
LENGTHS = (1, 5, 11, 30, 45)  # texts within, across and past both
METHOD_NAMES = sorted(METHODS)
_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48, "n_ctx": 256}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip

# Beyond tiny_models: class name -> what its configuration needs.
MORE: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {**_MIXED, **_MOE, "head_dim": 8, "num_dense_layers": 1},
    "ApertusForCausalLM": {},
    "BioGptForCausalLM": {},
    "BitNetForCausalLM": {},
    "CodeGenForCausalLM": {**_GPT, "rotary_dim": 4},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": _MIXED,
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": _MLA,
    "Ernie4_5ForCausalLM": {},
    "Exaone4ForCausalLM": _MIXED,
    "GemmaForCausalLM": {"head_dim": 8},
    "GlmForCausalLM": {"head_dim": 8},
    "Glm4ForCausalLM": {"head_dim": 8},
    "GPTBigCodeForCausalLM": _GPT,
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 4},
    "GraniteForCausalLM": {},
    "HeliumForCausalLM": {"head_dim": 8},
    "MinistralForCausalLM": {**_MIXED, "head_dim": 8},
    "NemotronForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo3ForCausalLM": _MIXED,
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "PersimmonForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2MoeForCausalLM": _MOE,
    "Qwen3MoeForCausalLM": _MOE,
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {"sliding_window": WINDOW},
}

# Refused, and a word of the reason: state that cannot be rolled back, attention that a tree mask cannot steer, other kinds.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "MambaForCausalLM": ({"state_size": 8}, "recurrent"),
    "Mamba2ForCausalLM": ({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, "recurrent"),
    "JambaForCausalLM": ({"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, "recurrent"),
    "FalconH1ForCausalLM": ({}, "recurrent"),
    "RwkvForCausalLM": ({"attention_hidden_size": 32}, "recurrent"),
    "RecurrentGemmaForCausalLM": ({}, "recurrent"),
    "Qwen3NextForCausalLM": (_MOE, "recurrent"),
    "Lfm2ForCausalLM": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "GptOssForCausalLM": ({**_MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "BloomForCausalLM": ({"n_layer": 2, "n_head": 4}, "BloomForCausalLM"),
    "MptForCausalLM": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, "tree"),
    "Llama4ForCausalLM": ({"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "head_dim": 8}, "chunked"),
    "T5ForConditionalGeneration": ({"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "BartForConditionalGeneration": (
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        "encoder-decoder",
    ),
    "BertLMHeadModel": ({"is_decoder": False}, "tree"),
    "OpenAIGPTLMHeadModel": (_GPT, "keys and values"),
}  # fmt: skip


def make(class_name: str, **own: Any) -> Any:
    """A tiny random model of a class of transformers."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**_COMMON, **own})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@functools.lru_cache
def known(name: str) -> tuple[Any, dict[tuple[int, ...], list[int]]]:
    """A model of tiny_models in fp64 (fp32 where its kernels need it) and the oracle's text after every prompt."""
    model = tiny_models.build(name)
    model = model if name in tiny_models.FP32_ONLY else model.double()
    return model, {tuple(prompt): greedy(model, prompt, NEW) for prompt in make_prompts(LENGTHS)}


def check(model: Any, truth: dict[tuple[int, ...], list[int]], method: Any, budget: int) -> None:
    """All prompts in one ragged batch whose rows are reused, then one alone, equal the oracle."""
    prompts = [list(prompt) for prompt in truth]
    engine = Engine(model, method=method, budget=budget, max_rows=3)
    params = SamplingParams(max_new_tokens=NEW)
    found = engine.generate(prompts, params)
    assert [result.token_ids for result in found] == list(truth.values())
    assert engine.generate(prompts[-2], params).token_ids == truth[tuple(prompts[-2])]
    assert not engine.rows and not engine.waiting


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_two_oracles_agree(name: str) -> None:
    """The argmax loop without a cache is model.generate: so equality with the one is equality with the other."""
    model, truth = known(name)
    for prompt, continuation in truth.items():
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert output[0, len(prompt) :].tolist() == continuation
    assert len({token for tokens in truth.values() for token in tokens}) > 2, "degenerate text proves little"


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_partly_right_drafts(name: str) -> None:
    model, truth = known(name)
    check(model, truth, Noisy(truth), budget=12)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_tree_read_level_by_level(name: str) -> None:
    """Nodes of an earlier forward are known: the later ones have the logits of one forward over all, also past a window."""
    model, _ = known(name)
    target = TargetModel(model)
    texts, parents = ([5, 9, 3], list(range(7, 27))), [-1, 0, 0, 1, 2, 3, 3, 5]
    trees = [DraftTree(np.arange(20 + row, 28 + row), parents) for row in range(2)]
    caches = [target.new_cache(2, capacity) for capacity in (40, 4)]
    for cache in caches:
        for row, text in enumerate(texts):
            target.prefill(cache, row, text)
    whole = target.forward(caches[0], trees)
    sizes = [(1, 1), (3, 2), (5, 6), (8, 8)]
    for old, new in zip([(0, 0), *sizes], sizes):
        logits = target.forward(caches[1], [tree.prefix(size) for tree, size in zip(trees, new)], known=old)
        for row, (first, last) in enumerate(zip(old, new)):
            torch.testing.assert_close(logits[row, : last - first], whole[row, first:last], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_its_first_layer_drafts(name: str) -> None:
    model, truth = known(name)
    check(model, truth, DraftedTree(EarlyExit(model, 1, tiny_models.VOCAB), min_gain=0.05), budget=12)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method(method: str) -> None:
    check(*known("llama"), method, budget=8)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [8, 60])
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_method_on_every_architecture(name: str, method: str, budget: int) -> None:
    check(*known(name), method, budget)


def test_longrope_below_at_and_above_its_threshold() -> None:
    """From position 40 on the long factors hold for the whole text: prompts and generations that end on every side of it."""
    model, _ = known("phi3_longrope")
    truth = {tuple(prompt): greedy(model, prompt, NEW) for prompt in make_prompts(range(THRESHOLD - 4, THRESHOLD + 3))}
    check(model, truth, Noisy(truth), budget=12)
    check(model, truth, Noisy(truth, exact=True), budget=12)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_texts_around_a_sliding_window(name: str) -> None:
    model, _ = known(name)
    truth = {tuple(prompt): greedy(model, prompt, NEW) for prompt in make_prompts(range(WINDOW - 2, WINDOW + 3))}
    check(model, truth, Noisy(truth), budget=12)


def test_dynamic_rope_is_refused_past_its_threshold() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 40}
    model = tiny_models.build("llama", rope_parameters=rope, max_position_embeddings=40).double()
    (prompt,) = make_prompts([20])
    engine = Engine(model, method=Noisy({}), budget=8)
    assert engine.generate(prompt, SamplingParams(max_new_tokens=12)).token_ids == greedy(model, prompt, 12)
    with pytest.raises(ValueError, match="dynamic RoPE"):
        engine.generate(prompt, SamplingParams(max_new_tokens=30))


@pytest.mark.parametrize("class_name", MORE)
def test_more_architectures(class_name: str) -> None:
    model = make(class_name, **MORE[class_name])
    truth = {tuple(prompt): greedy(model, prompt, NEW) for prompt in make_prompts((3, 20))}
    check(model, truth, Noisy(truth), budget=10)


@pytest.mark.parametrize("class_name", REFUSED)
def test_refused_by_name(class_name: str) -> None:
    own, reason = REFUSED[class_name]
    with pytest.raises(UnsupportedModelError, match=class_name) as caught:
        TargetModel(make(class_name, **own))
    assert reason in str(caught.value)


def test_falcon_with_alibi_is_refused_or_right() -> None:
    model = tiny_models.build("falcon", alibi=True)
    try:
        engine = Engine(model, method=Plain(), budget=8)
    except UnsupportedModelError as error:
        assert "FalconForCausalLM" in str(error)
        return
    truth = {tuple(prompt): greedy(model, prompt, NEW) for prompt in make_prompts((3, 20))}
    del engine
    check(model, truth, Noisy(truth), budget=10)
