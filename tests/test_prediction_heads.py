"""The checkpoint's extra prediction layer as drafter: its laws are those of transformers' own code, and it changes no text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

from conftest import make_tiny_llama
from specdec import Engine, SamplingParams
from specdec.sources.prediction_heads import PredictionHeads, load_heads
from specdec.target import UnsupportedModelError
from test_draft_model import GREEDY, PROMPTS, same_as_plain

LAYERS = 2
PATTERN = rf"model\.layers\.{LAYERS}\..*"  # the extra layer of a checkpoint this small; the class knows the real ones


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with an extra layer, in the format of the published ones."""
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [PATTERN])
    config = Glm4MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        n_group=1, topk_group=1, first_k_dense_replace=1, max_position_embeddings=512, initializer_range=0.3, num_mtp_layers=1,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    heads = MtpModel(model, 1)
    with torch.no_grad():
        for name, value in heads.layers.state_dict().items():
            value.copy_(torch.ones_like(value) if "norm" in name else 0.3 * torch.randn_like(value))
    (file,) = tmp_path.glob("*.safetensors")
    save_file({**load_file(file), **dict(published(heads.state_dict()))}, file, metadata={"format": "pt"})
    return tmp_path


def published(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The extra layer's weights under the names of a checkpoint: one layer more, experts apart."""
    for name, value in state.items():
        if name.startswith("layers.0."):
            rest = name.removeprefix("layers.0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            prefix = f"model.layers.{LAYERS}."
            if rest.endswith("experts.gate_up_proj"):
                for index, expert in enumerate(value):
                    for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2)):
                        yield f"{prefix}mlp.experts.{index}.{part}.weight", half.clone()
            elif rest.endswith("experts.down_proj"):
                for index, expert in enumerate(value):
                    yield f"{prefix}mlp.experts.{index}.down_proj.weight", expert.clone()
            else:
                yield prefix + rest, value.clone()


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_weights_are_those_of_the_checkpoint(folder: Path, model: Any) -> None:
    heads, tensors = load_heads(model), load_file(next(folder.glob("*.safetensors")))
    assert torch.equal(heads.layers[0].eh_proj.weight, tensors[f"model.layers.{LAYERS}.eh_proj.weight"])
    assert torch.equal(
        heads.layers[0].mtp_block.mlp.experts.down_proj[2], tensors[f"model.layers.{LAYERS}.mlp.experts.2.down_proj.weight"]
    )


def expected_laws(model: Any, text: list[int], drafts: list[int]) -> list[torch.Tensor]:
    """transformers' own pieces, over the whole text at once: logits [V] after the text, after its first draft, ..."""
    heads = load_heads(model)
    with torch.inference_mode():
        hidden = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1]
        laws = []
        for end in range(len(drafts) + 1):
            tokens = torch.tensor([[*text[1:], *drafts[:end]]])
            output = heads.forward_layer(0, hidden, torch.arange(tokens.shape[1])[None], DynamicCache(), input_ids=tokens)
            laws.append(heads._project_to_logits(output)[0, -1])
            hidden = torch.cat([hidden, output[:, -1:]], 1)
    return laws


def test_its_laws_are_those_of_transformers(model: Any) -> None:
    """After every step, drafts accepted or not: the root's law, and those along the tree's first path."""
    engine = Engine(model, method="draft_model", budget=40, drafter="mtp")  # random weights: some draft must be right by chance
    drafter: Any = engine.builder.model  # type: ignore[attr-defined]
    accepted = 0
    with engine._running(engine._sequences([PROMPTS[3]], [GREEDY])):
        for _ in range(12):
            engine.step()
            (seq,) = engine.rows
            accepted += seq.accept_lengths[-1] - 1
            assert drafter.depth_limit(seq) > 0
            (growth,), (root,) = drafter.grow([seq], [()])
            for token in (7, 9):
                growth.add(len(growth.tokens) - 1, token)
                known = [len(growth.tokens) - 1]
                (law,) = drafter.extend([seq], [growth], known)
                root = torch.cat([root, law])
            expected = torch.stack(expected_laws(model, seq.token_ids, [7, 9]))
            torch.testing.assert_close(root, expected, rtol=1e-4, atol=1e-4)
    assert accepted > 0


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_new_tokens=40, temperature=0.8, seed=3)])
@pytest.mark.parametrize("method", ["draft_model", "goose_drafter", "auto"])
def test_it_changes_no_text(model: Any, method: str, params: SamplingParams) -> None:
    engine = Engine(model, method=method, budget=12, drafter="mtp")
    found = same_as_plain(engine, model, params)
    assert sum(len(result.token_ids) for result in found) > sum(result.steps for result in found)  # some drafts are accepted
    assert engine.builder.forwards > 0 or method == "auto"  # type: ignore[attr-defined]
    drafter: Any = engine.builder.model  # type: ignore[attr-defined]
    assert drafter._owners == [] and drafter._hidden == {}
    same_as_plain(engine, model, params)


def test_the_rules_that_know_its_law(model: Any) -> None:
    for method in ("hybrid", "spectr", "block"):
        engine = Engine(model, method=method, budget=12, drafter="mtp")
        same_as_plain(engine, model, GREEDY)
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, temperature=1.0, seed=1))


def test_samples_of_one_prompt(model: Any) -> None:
    """A copied prompt has no hidden states, so it is not copied."""
    params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, n=3)
    engine = Engine(model, method="draft_model", budget=40, drafter="mtp")  # random weights: some draft must be right by chance
    found = engine.generate([PROMPTS[1]], params)
    plain = Engine(model, method="none").generate([PROMPTS[1]], params)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert engine.builder.forwards > 10  # type: ignore[attr-defined]


def test_models_without_such_a_layer_are_refused(model: Any, folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"needs extra prediction layers \(config.num_mtp_layers\), LlamaForCausalLM has none; fix"
    ):
        Engine(make_tiny_llama(), drafter="mtp")
    (file,) = folder.glob("*.safetensors")
    kept = {name: value for name, value in load_file(file).items() if "eh_proj" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot read the extra layers of .*eh_proj.*fix: another drafter"):
        PredictionHeads(model, 64)


def test_frequencies_that_depend_on_the_length_are_refused(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match='drafter "mtp" does not follow dynamic RoPE. Fix: another drafter'):
        PredictionHeads(model, 64)
