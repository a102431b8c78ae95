"""The flash-attn prefix backend with a CPU function of flash-attn's contract, and which tensors the op takes on a GPU."""

from __future__ import annotations

import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models
from specdec import Engine, SamplingParams, attention, prefix_backend
from specdec.attention import TreeBatch, tree_attention_reference
from specdec.draft_tree import DraftTree
from specdec.prefix_backend import attend_with_prefix, attention_function, load_flash_attention, merge
from specdec.target import TargetModel, UnsupportedModelError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # relative L2 error against float64


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    softcap: float,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """flash-attn 2 for what is asked of it: its checks, layouts and rows of length 0; slots past a row's length are not read."""
    rows, nodes, heads, dim = q.shape
    assert q.dtype in TOLERANCE, "FlashAttention only support fp16 and bf16 data type"
    assert k_cache.dtype == v_cache.dtype == q.dtype, "query, key and value must have the same dtype"
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1, "Input tensor must have contiguous last dimension"
    assert dim <= 256 and heads % k_cache.shape[2] == 0
    assert k_cache.shape == v_cache.shape == (rows, k_cache.shape[1], k_cache.shape[2], dim)
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous() and cache_seqlens.shape == (rows,)
    assert return_softmax_lse and not causal
    out, lse = torch.zeros_like(q), torch.full((rows, heads, nodes), torch.inf)  # of a row of length 0: +inf, as the real one
    for row, length in enumerate(cache_seqlens.tolist()):
        if length:
            keys, values = (x[row, :length].float().repeat_interleave(heads // x.shape[2], 1) for x in (k_cache, v_cache))
            scores = torch.einsum("nhd,thd->hnt", q[row].float(), keys) * softmax_scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hnt,thd->nhd", torch.softmax(scores, -1).to(q.dtype).float(), values).to(q.dtype)
            lse[row] = torch.logsumexp(scores, -1)
    return out, lse


def make_case(
    prefixes: list[int], counts: list[int], kv_heads: int, group: int, dim: int, dtype: torch.dtype
) -> tuple[TreeBatch, Tensor, Tensor, Tensor]:
    """Random trees and tensors, caches cut from larger ones, as the KVCache's; what nobody may read is NaN."""
    generator, dice = torch.Generator().manual_seed(sum(prefixes) + dim), random.Random(0)
    rows, most, slots = len(counts), max(counts), max(map(sum, zip(prefixes, counts)))
    query = torch.randn(rows, most, kv_heads * group, dim, generator=generator).to(dtype).transpose(1, 2)
    caches = [torch.randn(rows, kv_heads, slots + 9, dim, generator=generator).to(dtype)[:, :, :slots] for _ in range(2)]
    for row, (prefix, count) in enumerate(zip(prefixes, counts)):
        query[row, :, count:] = torch.nan
        for cache in caches:
            cache[row, :, prefix + count :] = torch.nan
    trees = [
        DraftTree(np.arange(n), np.array([-1, *(dice.randrange(max(0, node - 6), node) for node in range(1, n))])) for n in counts
    ]
    return TreeBatch(prefixes, trees, counts, CPU), query, *caches


def check(case: tuple[TreeBatch, Tensor, Tensor, Tensor], softcap: float = 0.0, window: int = 0, flash=flash_attn_with_kvcache):
    """Within TOLERANCE of the reference in float64, row by row, and zero past the row's end."""
    batch, query, key, value = case
    scale = query.shape[-1] ** -0.5
    output = attend_with_prefix(flash, *case, scale, softcap, window)
    expected, _ = tree_attention_reference(query.double(), key.double(), value.double(), *batch.packed(), scale, softcap, window)
    assert output.dtype == query.dtype and output.shape == expected.shape and output.is_contiguous()
    for row, count in enumerate(batch.counts):
        error = (output[row, :count].double() - expected[row, :count]).norm() / expected[row, :count].norm()
        assert error <= TOLERANCE[query.dtype], float(error)
        assert not output[row, count:].any()


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 6.0])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(2, 1, 64), (2, 4, 64), (1, 3, 128), (1, 8, 256), (2, 2, 8)])
@pytest.mark.parametrize(
    ("prefixes", "counts"), [([40], [1]), ([300], [33]), ([0, 517, 3], [33, 1, 20]), ([7, 0], [1, 1]), ([0, 0], [5, 2])]
)
def test_equals_float64(prefixes, counts, kv_heads: int, group: int, dim: int, softcap: float, dtype: torch.dtype) -> None:
    batch, query, key, value = make_case(prefixes, counts, kv_heads, group, dim, dtype)
    check((batch, query, key, value), softcap)
    check((batch, query.nan_to_num(1.0), key, value), softcap)  # the model's padding has finite queries


def test_the_prefix_is_flash_attns_and_windows_and_prompts_are_not() -> None:
    """Also the negative control: a prefix part of other keys shows."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return flash_attn_with_kvcache(*args, **kwargs)

    case = make_case([60, 31], [9, 4], 2, 2, 64, torch.float16)
    check(case, flash=counted)
    assert len(calls) == 1
    check(case, window=20, flash=counted)
    batch, *tensors = case
    attend_with_prefix(counted, TreeBatch(batch.prefix_lengths, None, batch.counts, CPU), *tensors, 0.125)
    assert len(calls) == 1

    def short(*args: Any, cache_seqlens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(*args, cache_seqlens=cache_seqlens - 1, **kwargs)

    with pytest.raises(AssertionError):
        check(case, flash=short)


def test_far_apart_scores_and_an_empty_part() -> None:
    """Weights from 1 to 0 at either side, one part empty, both empty with NaN in them."""
    outputs = [
        torch.tensor([[1.0], [1.0], [torch.nan], [1.0], [torch.nan]]),
        torch.tensor([[3.0], [3.0], [3.0], [3.0], [torch.nan]]),
    ]
    lses = [torch.tensor([500.0, -500.0, -torch.inf, 0.0, -torch.inf]), torch.tensor([-500.0, 500.0, 2.0, 0.0, -torch.inf])]
    output, lse = merge(outputs, lses)
    assert output[:, 0].tolist() == [1.0, 3.0, 3.0, 2.0, 0.0]
    torch.testing.assert_close(lse, torch.tensor([500.0, 500.0, 2.0, float(np.log(2)), -torch.inf]))


def test_what_flash_attn_does_not_take_falls_back_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    prefix_backend._notice.cache_clear()
    batch, query, key, value = make_case([60, 31], [9, 4], 2, 2, 64, torch.float16)
    for change, why in (
        (lambda x: x.float(), "not torch.float32"),
        (lambda x: x[..., :20].contiguous(), "head dimension 20"),
        (lambda x: torch.nn.functional.pad(x, (1, 3))[..., 1:65], "aligned"),
    ):
        tensors = [change(x) for x in (query, key, value)]
        for _ in range(2):
            output = attend_with_prefix(flash_attn_with_kvcache, batch, *tensors, 0.1)
            expected, _ = tree_attention_reference(*tensors, *batch.packed(), 0.1)
            torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
        assert [why in record.message for record in caplog.records if "flash-attn" in record.message] == [True]
        caplog.clear()


# ---- as an option --------------------------------------------------------------------------------------------------------


def plain_logits(model: Any, prompt: list[int], output: list[int]) -> Tensor:
    """[len(output), V] fp32 by one causal forward of the model alone."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :].float()


def test_an_engine_decodes_with_it() -> None:
    """Teacher-forced: the plain model gives every chosen token the top logit, but for the rounding of bfloat16."""
    exact = tiny_models.build("llama", head_dim=64)
    model = tiny_models.build("llama", head_dim=64).to(torch.bfloat16)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(args[0].shape[1])
        return flash_attn_with_kvcache(*args, **kwargs)

    engine = Engine(model, method="best_first", budget=12, prefix_backend=counted)
    assert "the prefix by test_an_engine_decodes_with_it" in engine.target.info()["attention"]
    calls.clear()
    prompts = [[5, 6, 7] * 5, [9, 8, 9, 8, 9], [3]]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=40))
    assert len(calls) >= 2 * min(result.steps for result in results) and max(calls) == 12  # two layers, trees
    for prompt, result in zip(prompts, results):
        logits = plain_logits(model, prompt, result.token_ids)
        rounding = (logits - plain_logits(exact, prompt, result.token_ids)).abs().max()
        gaps = logits.max(-1).values - logits.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        assert len(result.token_ids) == 40 and gaps.max() <= 2 * rounding, (gaps.max(), rounding)


def test_the_self_check_refuses_a_wrong_prefix() -> None:
    def blind(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, lse = flash_attn_with_kvcache(*args, **kwargs)
        return output, lse - 4

    model = tiny_models.build("llama", head_dim=64).to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="changed its logits"):
        TargetModel(model, prefix_backend=blind)


def test_refusals_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.shared("llama")
    with pytest.raises(ValueError, match="prefix_backend must be one of op, flash_attn or a function, got 'flash'"):
        Engine(model, prefix_backend="flash")
    with pytest.raises(ValueError, match="needs a model on CUDA, this one is on cpu. Fix: model.to"):
        Engine(model, prefix_backend="flash_attn")
    with pytest.raises(ValueError, match=r"this model is torch.float32. Fix: model.to\(torch.bfloat16\)"):
        attention_function("flash_attn", CUDA, torch.float32)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="flash-attn cannot be imported .* Fix: pip install"):
        attention_function("flash_attn", CUDA, torch.bfloat16)


def test_flash_attn_is_found_and_an_old_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert load_flash_attention() is flash_attn_with_kvcache
    module.flash_attn_with_kvcache = lambda q, k_cache, v_cache, cache_seqlens, softmax_scale: q  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has no return_softmax_lse and no softcap. Fix: pip install"):
        load_flash_attention()


# ---- the op on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension were linked with them."""
    if attention.compiled_op() is None:
        pytest.skip("specdec._C is not built")
    monkeypatch.setattr(attention, "_has_kernel", lambda device_type: device_type in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("dim", "change", "why"),
    [
        (64, lambda x: x, None),
        (256, lambda x: x, None),
        (64, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), None),
        (64, lambda x: x.double(), "not torch.float64"),
        (80, lambda x: x, "no kernel for head dimension 80 on cuda"),
        (64, lambda x: torch.nn.functional.pad(x, (8, 0))[..., 8:], None),
        (64, lambda x: torch.nn.functional.pad(x, (4, 4))[..., 4:68], "aligned to 16 bytes"),  # 8 bytes too far
        (64, lambda x: torch.nn.functional.pad(x, (0, 4))[..., :64], "aligned to 16 bytes"),  # rows 136 bytes apart
        (64, lambda x: torch.nn.functional.pad(x, (0, 4))[:1, :1, :1, :64], None),  # but there is only one
    ],
)
def test_what_the_cuda_kernels_take(dim: int, change, why: str | None, cuda_kernels: None) -> None:
    _, *tensors = make_case([20, 3], [9, 4], 2, 3, dim, torch.float16)
    obstacle = attention._obstacle(*map(change, tensors), "cuda")
    assert (obstacle is None) if why is None else (obstacle is not None and why in obstacle)


def test_a_build_without_cuda_kernels_says_so() -> None:
    if attention.compiled_op("cuda") is not None:
        pytest.skip("the CUDA kernels are linked in")
    _, *tensors = make_case([20, 3], [9, 4], 2, 3, 64, torch.float16)
    obstacle = attention._obstacle(*tensors, "cuda")
    assert attention.compiled_op() is None or (obstacle is not None and "fix: SPECDEC_CUDA=1 pip install" in obstacle)


def test_a_batch_is_packed_once_a_device() -> None:
    batch, *_ = make_case([20, 3], [9, 4], 2, 3, 64, torch.float16)
    packed, meta = batch.packed(), batch.packed(torch.device("meta"))
    assert batch.packed(CPU) is packed and batch.packed(torch.device("meta")) is meta
    assert [(x.shape, x.dtype, x.is_contiguous()) for x in meta] == [(x.shape, torch.int32, True) for x in packed]
    copied = attention._copied([x.numpy() for x in packed], CPU)
    assert all(map(torch.equal, copied, packed)) and len({x.untyped_storage().data_ptr() for x in copied}) == 1
    assert [tuple(x.shape) for x in packed] == [(2,), (2,), (2, 9, 1), (2, 9)]
    assert packed[0].tolist() == [20, 3] and packed[1].tolist() == [9, 4]
    assert torch.equal(packed[3][1, :4], torch.from_numpy(batch.trees[1].depths)) and not packed[3][1, 4:].any()
