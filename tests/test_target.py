"""TargetModel: the self-check refuses models that would answer wrongly, and leaves the user's model as it was."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import tiny_models
from oracles_engine import Noisy, greedy, make_prompts
from specdec.draft_tree import DraftTree
from specdec.engine import Engine
from specdec.sequence import SamplingParams
from specdec.target import PREFILL_CHUNK, TargetModel, UnsupportedModelError


def flat_attention(module: Any) -> Any:
    """An attention forward that sees every earlier token in the order given, whatever the mask says."""

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        rows, count, _ = hidden_states.shape
        query, key, value = (
            layer(hidden_states).view(rows, count, -1, module.head_dim).transpose(1, 2)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (past_key_values if cache is None else cache).update(key, value, module.layer_idx)
        mask = torch.ones(count, key.shape[2], dtype=torch.bool).tril(key.shape[2] - count)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=module.scaling, enable_gqa=True)
        return module.o_proj(out.transpose(1, 2).reshape(rows, count, -1)), None

    return forward


def ignore_mask(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = flat_attention(layer.self_attn)


def ignore_mask_in_one_layer(model: Any) -> None:
    layer = model.model.layers[1]
    layer.self_attn.forward = flat_attention(layer.self_attn)


def ignore_positions(model: Any) -> None:
    """Positions counted from the cache's length, as models without position_ids do."""
    original = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: original(
        x, position_ids[:, :1] + torch.arange(position_ids.shape[1])
    )


def add_noise(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0.2 * torch.randn_like(output))


def look_ahead(model: Any) -> None:
    """Every token's state gets a share of the next token's: not a causal model."""
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + 0.3 * output.roll(-1, dims=1))


def mix_the_window(model: Any) -> None:
    """A convolution over the last two tokens in the order given, outside any cache (as in some hybrids)."""
    model.model.layers[1].register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 0.3 * inputs[0].roll(1, dims=1), *inputs[1:])
    )


@pytest.mark.parametrize(
    "doctor", [ignore_mask, ignore_mask_in_one_layer, ignore_positions, add_noise, look_ahead, mix_the_window]
)
def test_doctored_models_are_refused_by_name(doctor: Any) -> None:
    model = tiny_models.build("llama")
    before = model.config._attn_implementation
    doctor(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        TargetModel(model)
    assert model.config._attn_implementation == before


def test_a_sliding_window_that_is_dropped_is_noticed() -> None:
    model = tiny_models.build("mistral")
    for layer in model.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.config = type(model.config)(**{**model.config.to_dict(), "sliding_window": None})
        del original
    with pytest.raises(UnsupportedModelError, match=r"MistralForCausalLM.*sliding window of 12"):
        TargetModel(model)


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_a_check_that_ignores_the_tree_mask_alone_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's own sensitivity: with one wrong bit in every tree mask it refuses, on both mask paths."""
    original = DraftTree.ancestor_mask

    def wrong(tree: DraftTree) -> np.ndarray:
        mask = original(tree)
        if len(tree) > 5:
            mask[5, 2] = ~mask[5, 2]
        return mask

    monkeypatch.setattr(DraftTree, "ancestor_mask", wrong)
    with pytest.raises(UnsupportedModelError):
        TargetModel(tiny_models.build(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2"])
def test_every_dtype_passes(name: str, dtype: torch.dtype) -> None:
    target = TargetModel(tiny_models.build(name).to(dtype))
    assert target.new_cache(2, 32).buffers()[0].dtype == dtype


@pytest.mark.parametrize("name", sorted(set(tiny_models.CONFIGS) - {"llama", "gpt2", "falcon", "gemma2"}))
def test_bf16_passes_on_every_architecture(name: str) -> None:
    TargetModel(tiny_models.build(name).to(torch.bfloat16))


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="must be a transformers causal language model"):
        TargetModel(model)


def test_the_model_is_as_it_was() -> None:
    model = tiny_models.build("llama").train()
    model.set_attn_implementation("eager")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    (prompt,) = make_prompts([7])
    before = model(torch.tensor([prompt])).logits
    engine = Engine(model, method=Noisy({}), budget=6)
    engine.generate(prompt, SamplingParams(max_new_tokens=5))
    assert model.training and all(module.training for module in model.modules())
    assert model.config._attn_implementation == "eager" and set(vars(model)) == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(torch.tensor([prompt])).logits, before) and torch.is_grad_enabled()


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = tiny_models.build("llama").train()
    target = TargetModel(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        target.forward(target.new_cache(1, 8), [DraftTree.root_only(3)])
    handle.remove()
    assert model.training and model.config._attn_implementation == "sdpa"


def test_a_target_keeps_neither_the_model_nor_its_registration() -> None:
    model = tiny_models.build("llama")
    target = TargetModel(model)
    name = target._interface
    assert name in AttentionInterface().valid_keys()
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="deleted"):
        _ = target.model
    del target
    gc.collect()
    assert name not in AttentionInterface().valid_keys()


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "phi3_longrope"])
def test_chunked_prefill_is_a_plain_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7, with logits observed at their offsets, equal one forward over the whole prompt."""
    monkeypatch.setattr("specdec.target.PREFILL_CHUNK", 7)
    model = tiny_models.build(name).double()
    target = TargetModel(model)
    (prompt,) = make_prompts([30])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    cache, seen = target.new_cache(1, 4), torch.zeros_like(expected[:-1])
    offsets: list[int] = []

    def observe(start: int, logits: torch.Tensor) -> None:
        offsets.append(start)
        seen[start : start + len(logits)] = logits

    target.prefill(cache, 0, prompt[:-1], observe)
    assert offsets == [0, 7, 14, 21, 28] and cache.lengths[0] == 29
    torch.testing.assert_close(seen, expected[:-1], rtol=1e-6, atol=1e-7)
    logits = target.forward(cache, [DraftTree.root_only(prompt[-1])])
    torch.testing.assert_close(logits[0, 0], expected[-1], rtol=1e-6, atol=1e-7)


def test_prefill_never_makes_logits_that_nobody_reads() -> None:
    model = tiny_models.build("llama")
    target = TargetModel(model)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    (prompt,) = make_prompts([2 * PREFILL_CHUNK + 3])
    model.config.max_position_embeddings = 4096
    target.prefill(target.new_cache(1, 8), 0, prompt)
    assert widths == [1, 1, 1]


def test_an_empty_prefill_is_nothing() -> None:
    target = TargetModel(tiny_models.shared("llama"))
    cache = target.new_cache(1, 8)
    target.prefill(cache, 0, [])
    assert cache.lengths == [0]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "falcon", "stablelm-like"])
def test_a_tree_forward_is_a_forward_a_path(name: str) -> None:
    """Every node of ragged trees gets the logits of a plain forward over its own path; NaN in freed slots reaches nobody."""
    model = tiny_models.build("gpt_neox" if name == "stablelm-like" else name).double()
    target = TargetModel(model)
    prompts = make_prompts((9, 1, 14))
    trees = [
        DraftTree.from_paths(prompts[0][-1], [[5, 6, 7], [5, 8], [9]]),
        DraftTree.root_only(prompts[1][-1]),
        DraftTree.from_paths(prompts[2][-1], [[3], [4, 4]]),
    ]
    cache = target.new_cache(3, 32)
    for buffer in cache.buffers():
        buffer.fill_(torch.nan)
    for row, prompt in enumerate(prompts):
        target.prefill(cache, row, prompt[:-1])
    logits = target.forward(cache, trees)
    for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        for node in range(len(tree)):
            text = prompt + [int(tree.tokens[ancestor]) for ancestor in tree.path(node)[1:]]
            with torch.no_grad():
                expected = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(logits[row, node], expected, rtol=1e-6, atol=1e-7)


class FakeQuantisedLinear(torch.nn.Module):
    """A linear layer as quantisation libraries make them: int8 weights, scales, no `weight` of a float type."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model: Any) -> Any:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(module, name, FakeQuantisedLinear(child))
    return model


def check_against_argmax_loop(model: Any) -> None:
    prompts = make_prompts((4, 13))
    truth = {tuple(prompt): greedy(model, prompt, 12) for prompt in prompts}
    found = Engine(model, method=Noisy(truth), budget=8).generate(prompts, SamplingParams(max_new_tokens=12))
    assert [result.token_ids for result in found] == list(truth.values())


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_quantised_layers(name: str) -> None:
    check_against_argmax_loop(quantise(tiny_models.build(name)))


def test_a_dispatched_model() -> None:
    """accelerate's hooks replace every module's forward and move its arguments, as device_map does."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_models.build("llama"), device_map={"": "cpu"}, force_hooks=True)
    check_against_argmax_loop(model)
    split = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    check_against_argmax_loop(accelerate.dispatch_model(tiny_models.build("llama"), device_map=split, force_hooks=True))


def test_device_map_at_load(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tiny_models.build("llama").save_pretrained(tmp_path)
    check_against_argmax_loop(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))


def test_a_layer_on_disk(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tiny_models.build("llama").save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    check_against_argmax_loop(model)
    with pytest.raises(UnsupportedModelError, match="compile=True is impossible"):
        Engine(model, compile=True)


def test_offloaded_weights_work() -> None:
    """Weights on the meta device until a hook loads them: what cpu_offload leaves in memory between forwards."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_models.build("llama")
    prompts = make_prompts((4, 13))
    truth = {tuple(prompt): greedy(model, prompt, 12) for prompt in prompts}
    offloaded = accelerate.cpu_offload(tiny_models.build("llama"), execution_device=torch.device("cpu"))
    try:
        found = Engine(offloaded, method=Noisy(truth), budget=8).generate(prompts, SamplingParams(max_new_tokens=12))
    except UnsupportedModelError as error:
        assert "LlamaForCausalLM" in str(error)
        return
    assert [result.token_ids for result in found] == list(truth.values())
