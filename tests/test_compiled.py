"""The compiled step: its op against the plain one, its logits and texts against the eager step, weights, cache, refusals."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models
from oracles import greedy_loop
from oracles_engine import make_prompts
from specdec import linear as linear_module
from specdec.attention import TreeBatch, compiled_op
from specdec.compiled import CompiledForward, _export, pack_step
from specdec.draft_tree import DraftTree
from specdec.engine import Engine
from specdec.methods import METHODS
from specdec.sequence import SamplingParams
from specdec.target import TargetModel, UnsupportedModelError
from test_tree_attention_op import random_tree

pytestmark = pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")

PROMPTS = make_prompts([5, 23, 11])
op = torch.ops.specdec.cached_tree_attention if compiled_op() else None
plain = torch.ops.specdec.tree_attention if compiled_op() else None


@functools.lru_cache
def compilable(name: str = "llama") -> Any:
    """A tiny model with heads that the op takes."""
    own = {"n_head": 2, "num_attention_heads": 2} if name == "gpt2" else {"head_dim": 16}
    return tiny_models.build(name, **own)


@functools.lru_cache
def compiled_target() -> TargetModel:
    return TargetModel(compilable(), compile=True)


# ---- the op ---------------------------------------------------------------------------------------------------------------


def make_call(
    prefixes: list[int],
    counts: list[int],
    known: list[int],
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    first_row: int = 0,
) -> tuple[list[Any], TreeBatch]:
    """Random arguments of cached_tree_attention: 2 query heads a KV head, 3 KV heads of 16; `spare` tokens beyond the nodes'."""
    generator = torch.Generator().manual_seed(0)
    trees = [random_tree(count, seed) for seed, count in enumerate(counts)]
    fresh = max(count - old for count, old in zip(counts, known))
    batch = TreeBatch(prefixes, trees, counts, torch.device("cpu"), known)
    tokens = len(counts) * fresh + spare
    query = torch.randn(1, tokens, 6, 16, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, tokens, 3, 16, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    slots = max(map(sum, zip(prefixes, counts))) + 2
    buffers = torch.randn(4, first_row + len(counts), 3, slots, 16, generator=generator).to(dtype)
    step = torch.from_numpy(pack_step(first_row, batch, fresh))
    return [query, key, value, buffers, buffers, 2, 3, step, 0.25], batch


def expected_call(arguments: list[Any], batch: TreeBatch, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """What the op should return and leave in the buffers: nodes stored one by one, all nodes through the plain op."""
    query, key, value, buffers, _, key_index, value_index, _, scale = arguments
    buffers = buffers.clone()
    assert batch.known is not None
    fresh = max(count - old for count, old in zip(batch.counts, batch.known))
    most = max(batch.counts)
    queries = torch.zeros(len(batch.counts), 6, most, 16, dtype=query.dtype)
    places = []
    for row, (prefix, count, old) in enumerate(zip(batch.prefix_lengths, batch.counts, batch.known)):
        for node in range(old, count):
            token = row * fresh + node - old
            buffers[key_index, first_row + row, :, prefix + node] = key[0, :, token]
            buffers[value_index, first_row + row, :, prefix + node] = value[0, :, token]
            queries[row, :, node] = query[0, :, token]
            places.append((token, row, node))
    rows = slice(first_row, first_row + len(batch.counts))
    attended = plain(queries, buffers[key_index, rows], buffers[value_index, rows], *batch.all_nodes().packed(), scale)[0]
    output = torch.zeros(1, query.shape[2], 6, 16, dtype=query.dtype)
    for token, row, node in places:
        output[0, token] = attended[row, node]
    return output, buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first_row", [0, 2])
@pytest.mark.parametrize(
    ("prefixes", "counts", "known"),
    [
        ([0], [1], [0]),
        ([7], [9], [0]),
        ([300], [40], [0]),
        ([5, 0, 64], [1, 7, 3], [0, 0, 0]),
        ([5], [9], [4]),
        ([5, 8], [9, 3], [4, 3]),  # the second row has nothing new
        ([5, 8, 30], [9, 12, 1], [0, 11, 0]),
    ],
)
@pytest.mark.parametrize("spare", [0, 3])
def test_the_op_stores_and_attends(
    prefixes: list[int], counts: list[int], known: list[int], spare: int, first_row: int, dtype: torch.dtype
) -> None:
    arguments, batch = make_call(prefixes, counts, known, dtype, spare, first_row)
    output, buffers = expected_call(arguments, batch, first_row)
    found = op(*arguments)
    assert torch.equal(found, output)
    assert torch.equal(arguments[3], buffers)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda query: query[:, :, :5], "a token for every node"),
        (1, lambda key: key[:, :2], "heads of its buffer"),
        (3, lambda buffers: buffers[:, :, :, :8], "slots"),
        (3, lambda buffers: buffers.double(), "dtype"),
        (5, lambda index: 4, "index below G"),
        (5, lambda index: -1, "index below G"),
        (7, lambda step: step[:-1], "does not hold what its header says"),
        (7, lambda step: step.long(), "int32"),
        (7, lambda step: torch.cat([step.new_tensor([5]), step[1:]]), "rows"),
        (7, lambda step: torch.cat([step[:4], step.new_tensor([-1]), step[5:]]), "does not fit"),
        (7, lambda step: torch.cat([step[:5], step.new_tensor([99]), step[6:]]), "99 nodes"),
        (7, lambda step: torch.cat([step[:6], step.new_tensor([-3]), step[7:]]), "known"),
    ],
)
def test_the_op_refuses_what_does_not_fit(place: int, change: Any, message: str) -> None:
    arguments, _ = make_call([4], [8], [0])
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


def test_a_linear_gives_many_rows_to_torch() -> None:
    x, weight = torch.randn(9, 48), torch.randn(31, 48)
    linear = torch.ops.specdec.linear
    assert torch.equal(linear(x, weight, None, 8), torch.nn.functional.linear(x, weight))
    assert torch.equal(linear(x[:8], weight, None, 8), linear(x[:8], weight))


# ---- the step -------------------------------------------------------------------------------------------------------------


def both_logits(target: TargetModel, prefixes: list[int], sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [n, V] of every row's tree, compiled and eager."""
    found: list[list[Tensor]] = []
    compiled = target.compiled
    for way in (compiled, None):
        target.compiled = way
        cache = target.new_cache(len(sizes), 16)
        for row, prefix in enumerate(prefixes):
            target.prefill(cache, row, [(5 * i + row) % tiny_models.VOCAB for i in range(prefix)])
        trees = [DraftTree(random_tree(n, n).tokens % tiny_models.VOCAB, random_tree(n, n).parents) for n in sizes]
        logits = target.forward(cache, trees)
        found.append([rows[:n] for rows, n in zip(logits, sizes)])
    target.compiled = compiled
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_logits_are_those_of_the_eager_step(name: str) -> None:
    """Any number of nodes, rows and any context, windows and soft caps and experts, with one compilation."""
    target = compiled_target() if name == "llama" else TargetModel(compilable(name), compile=True)
    for prefixes, sizes in [([1], [1]), ([1], [2]), ([30], [17]), ([100], [64]), ([0, 40, 7], [5, 1, 9]), ([3] * 5, [1] * 5)]:
        for compiled, eager in zip(*both_logits(target, prefixes, sizes)):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "merged"), [("llama", 2), ("qwen2", 2), ("gpt2", 0)])
def test_layers_of_one_input_become_one_call(name: str, merged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value, and gate and up: two calls a layer for five, beside attention's output, down and the head."""
    monkeypatch.setattr(linear_module, "winning_rows", lambda *_: 64)
    target = TargetModel(compilable(name))
    called = [node.target for node in _export(target).graph.nodes]
    assert called.count(torch.ops.specdec.linears.default) == merged * len(target.layers)
    assert called.count(torch.ops.specdec.linear.default) == merged * len(target.layers) + 1


@pytest.mark.slow
def test_bfloat16_rounds_where_the_eager_step_does() -> None:
    model = copy.deepcopy(compilable()).to(torch.bfloat16)
    target = TargetModel(model, compile=True)
    for compiled, eager in zip(*both_logits(target, [30, 9], [12, 3])):
        different = (compiled != eager).float().mean()
        assert different < 0.02, f"{different:.0%} of the logits differ"


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "draft_model"])
def test_greedy_texts_are_the_models_own(method: str) -> None:
    model = compilable()
    drafter = "early_exit:1" if method == "draft_model" else None
    engine = Engine(model, method=method, budget=9, max_rows=2, compile=True, drafter=drafter)
    assert engine.target.compiled is not None
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24))
    assert [result.token_ids for result in results] == [greedy_loop(model, ids, 24) for ids in PROMPTS]
    assert method == "none" or any(max(result.accept_lengths) > 1 for result in results)
    if drafter:
        follows_its_lens(engine)


def follows_its_lens(engine: Engine) -> None:
    """What the first layers learn from prompts changes their compiled step as it does the eager one."""
    model: Any = engine.builder.model  # type: ignore[attr-defined]
    assert model.lens.pairs == sum(len(ids) - 1 for ids in PROMPTS) and model.reader.compiled is not None
    logits = {}
    for learned in (True, False):
        for name, step in (("compiled", model.reader.compiled), ("eager", None)):
            compiled, model.reader.compiled = model.reader.compiled, step
            cache = model.reader.new_cache(1, 16)
            model.reader.prefill(cache, 0, PROMPTS[0][:4])
            logits[name, learned] = model.reader.forward(cache, [DraftTree.chain(PROMPTS[0][:2])])
            model.reader.compiled = compiled
        torch.testing.assert_close(logits["compiled", learned], logits["eager", learned], rtol=1e-3, atol=1e-3)
        model.reset()
    assert float((logits["compiled", True] - logits["compiled", False]).abs().max()) > 0.01


@pytest.mark.slow
def test_sampled_texts_do_not_depend_on_compilation() -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=3, n=2)
    eager = Engine(compilable(), budget=8).generate(PROMPTS, params)
    compiled = Engine(compilable(), budget=8, compile=True).generate(PROMPTS, params)
    assert [result.token_ids for result in compiled] == [result.token_ids for result in eager]


@pytest.mark.slow
def test_a_context_that_doubles_four_times_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = compiled_target()
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: pytest.fail("compiled again"))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported again"))
    cache, ids = target.new_cache(1, 16), [(7 * i) % tiny_models.VOCAB for i in range(257)]
    capacities = set()
    for length in (15, 31, 62, 125, 250):
        target.prefill(cache, 0, ids[cache.lengths[0] : length])
        logits = target.forward(cache, [DraftTree.root_only(ids[length])])[0, 0]
        with torch.no_grad():
            expected = target.model(torch.tensor([ids[: length + 1]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        capacities.add(cache.capacity)
    assert len(capacities) == 5


# ---- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_are_the_users_own_and_changes_are_seen() -> None:
    model = copy.deepcopy(compilable())
    engine = Engine(model, method="best_first", budget=6, compile=True)
    params = SamplingParams(max_new_tokens=16)

    def agrees() -> list[int]:
        text = engine.generate(PROMPTS[1], params).token_ids
        assert text == greedy_loop(model, PROMPTS[1], 16)
        return text

    first = agrees()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)  # in place
    second = agrees()
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(-model.model.layers[1].self_attn.q_proj.weight.detach())
    third = agrees()
    assert first != second != third
    model.model.norm.weight.data = model.model.norm.weight.data[:16].clone()
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight became torch\.float32 \(16,\).*fix: make a new Engine"):
        engine.target.forward(engine.target.new_cache(1, 8), [DraftTree.root_only(1)])


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(compilable())
    before = (
        model.config.to_dict(),
        model.config._attn_implementation,
        {name: set(vars(module)) for name, module in model.named_modules()},
    )
    model.train()
    TargetModel(model, compile=True)
    assert model.training and model.model.layers[0].mlp.training
    model.eval()
    after = (
        model.config.to_dict(),
        model.config._attn_implementation,
        {name: set(vars(module)) for name, module in model.named_modules()},
    )
    assert before == after


SECOND = """
import torch, tiny_models
import specdec.linear
from specdec.target import TargetModel
torch.export.export = None  # nobody may export
specdec.linear.winning_rows = lambda *_: 64
target = TargetModel(tiny_models.build("llama", head_dim=16), compile=True)
print(target.compiled.was_there)
"""


@pytest.mark.slow
def test_a_second_process_finds_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the linear op is in the graph is timed in each process; here it is said, in both."""
    monkeypatch.setattr(linear_module, "winning_rows", lambda *_: 64)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target = TargetModel(compilable(), compile=True)
    assert target.compiled is not None and not target.compiled.was_there
    files = sorted((tmp_path / "compiled").glob("LlamaForCausalLM-*"))
    assert [path.suffix for path in files] == [".json", ".pt2", ".lock"] or [path.suffix for path in files] == [".json", ".pt2"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    run = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert run.stdout.strip() == "True", run.stderr
    facts = CompiledForward(target).info()
    assert facts["compile_seconds"] > 1 and facts["compile_disk_mb"] == pytest.approx(files[1].stat().st_size / 1e6, abs=0.1)


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_models.build("llama"), "no kernel for heads of 8"),
        (lambda: tiny_models.build("llama", head_dim=16).double(), r"no kernel for heads of 16 in torch\.float64"),
        (lambda: tiny_models.build("falcon"), "attention interface"),
        (lambda: tiny_models.build("phi3_longrope"), "longrope RoPE depends on the length"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(
        UnsupportedModelError, match=rf"{type(model).__name__}: compile=True is impossible.*{reason}.*leave compile out"
    ):
        Engine(model, compile=True)
    Engine(model)


def test_adapters_and_prefix_backends_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_models.build("llama", head_dim=16), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge them first"):
        Engine(adapted, compile=True)


def test_hooks_and_replaced_forwards_are_refused() -> None:
    """They are the user's to add and to remove; a compiled step would not notice."""
    model = tiny_models.build("llama", head_dim=16)
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UnsupportedModelError, match=r"hooks.*'model\.layers\.1'"):
        Engine(model, compile=True)
    handle.remove()
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(UnsupportedModelError, match=r"hooks.*'lm_head'"):
        Engine(model, compile=True)


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no C++ compiler found\nand a long story")

    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(UnsupportedModelError, match=r"does not compile \(OSError: no C\+\+ compiler found\)"):
        TargetModel(compilable(), compile=True)
    assert not list(tmp_path.rglob("*.pt2"))


def test_a_wrong_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check: logits that differ by more than rounding."""

    class Wrong:
        def __init__(self, target: TargetModel) -> None:
            self.vocab_size = target.vocab_size

        def __call__(self, cache: Any, batch: TreeBatch, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
            return torch.ones(*tokens.shape, self.vocab_size)

    monkeypatch.setattr("specdec.target.CompiledForward", Wrong)
    with pytest.raises(UnsupportedModelError, match="compile=True changes its logits"):
        TargetModel(compilable(), compile=True)
