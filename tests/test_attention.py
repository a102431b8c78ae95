"""attend, attend_row and tree_attention_reference against an oracle that unrolls every root-to-node path."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.attention import TreeBatch, attend, attend_row, pack_mask, tree_attention, tree_attention_reference, unpack_mask
from specdec.draft_tree import DraftTree

CPU = torch.device("cpu")


def random_tree(count: int, seed: int) -> DraftTree:
    dice = random.Random(seed)
    parents = [-1] + [dice.randrange(max(0, node - 6), node) for node in range(1, count)]
    return DraftTree(np.arange(count), np.array(parents))


def unrolled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: int,
    tree: DraftTree,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, fp64, one node and head at a time: ordinary causal attention of the path's last token. [n, Hq, Dv] and [n, Hq]."""
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    output = torch.zeros(len(tree), heads, value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(len(tree), heads, dtype=torch.float64)
    for node in range(len(tree)):
        slots = [*range(prefix), *(prefix + ancestor for ancestor in tree.path(node))]  # position of slots[i] is i
        if window:
            slots = slots[-window:]
        for head in range(heads):
            scores = torch.stack([query[head, node].double() @ key[head // groups, slot].double() for slot in slots]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            output[node, head] = torch.softmax(scores, 0) @ value[head // groups, slots].double()
            lse[node, head] = torch.logsumexp(scores, 0)
    return output, lse


def make_case(counts: list[int], prefixes: list[int], kv_heads: int, dtype: torch.dtype, dims: tuple[int, int] = (8, 8)) -> tuple:
    """Random tensors whose slots past P + n (and query rows past n) hold NaN: nobody may read them."""
    generator = torch.Generator().manual_seed(sum(counts) + 7 * kv_heads)
    rows, most, slots = len(counts), max(counts), max(map(sum, zip(prefixes, counts, strict=True))) + 3
    query = torch.randn(rows, 4, most, dims[0], generator=generator, dtype=torch.float64).to(dtype)
    key = torch.randn(rows, kv_heads, slots, dims[0], generator=generator, dtype=torch.float64).to(dtype)
    value = torch.randn(rows, kv_heads, slots, dims[1], generator=generator, dtype=torch.float64).to(dtype)
    for row, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        key[row, :, prefix + count :] = torch.nan
        value[row, :, prefix + count :] = torch.nan
        query[row, :, count:] = torch.nan
    return (
        query,
        key,
        value,
        TreeBatch(prefixes, [random_tree(count, count + row) for row, count in enumerate(counts)], counts, CPU),
    )


CASES = [([1], [0]), ([1], [9]), ([2], [0]), ([33], [5]), ([64], [2]), ([1, 2, 33], [7, 0, 3]), ([33, 1, 12], [0, 20, 1])]


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("counts", "prefixes"), CASES, ids=[f"{n}-{p}" for n, p in CASES])
def test_equal_to_unrolled_paths(counts: list[int], prefixes: list[int], softcap: float, window: int, kv_heads: int) -> None:
    query, key, value, batch = make_case(counts, prefixes, kv_heads, torch.float64)
    scale = 0.4
    ours = attend(batch, query, key, value, scale, softcap, window)
    reference, lse = tree_attention_reference(query, key, value, *batch.packed(), scale, softcap, window)
    assert ours.shape == reference.shape == (len(counts), max(counts), 4, 8) and ours.is_contiguous()
    assert batch.trees is not None
    for row, (count, prefix) in enumerate(zip(counts, prefixes, strict=True)):
        expected, expected_lse = unrolled(query[row], key[row], value[row], prefix, batch.trees[row], scale, softcap, window)
        for found in (ours[row, :count], reference[row, :count]):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse[row, :count].double(), expected_lse, rtol=1e-5, atol=1e-5)
        assert not ours[row, count:].any() and not reference[row, count:].any()  # rows past n are zero ...
        assert torch.isneginf(lse[row, count:]).all()  # ... and weigh nothing in a merge
        alone = attend_row(
            batch,
            row,
            query[row, :, :count],
            key[row, :, : prefix + count],
            value[row, :, : prefix + count],
            scale,
            softcap,
            window,
        )
        assert torch.equal(alone, ours[row, :count])  # a row does not depend on its neighbours


@pytest.mark.parametrize("dims", [(8, 6), (6, 16)])
def test_keys_and_values_of_different_width(dims: tuple[int, int]) -> None:
    query, key, value, batch = make_case([5, 3], [4, 0], 2, torch.float64, dims)
    ours = attend(batch, query, key, value, 0.3)
    reference, _ = tree_attention_reference(query, key, value, *batch.packed(), 0.3)
    assert ours.shape[-1] == dims[1]
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_narrow_types(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value, batch = make_case([33, 7], [12, 30], 2, dtype)
    for softcap in (0.0, 3.0):
        reference, _ = tree_attention_reference(query, key, value, *batch.packed(), 0.35, softcap, 11)
        ours = attend(batch, query, key, value, 0.35, softcap, 11)
        assert ours.dtype == reference.dtype == dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 3, 50])
@pytest.mark.parametrize("prefix", [0, 6])
def test_a_prefill_chunk_is_a_chain(prefix: int, window: int, softcap: float) -> None:
    query, key, value, _batch = make_case([10], [prefix], 2, torch.float64)
    chain = DraftTree.chain(range(10))
    causal = TreeBatch([prefix], None, [10], CPU)
    expected, _ = unrolled(query[0], key[0], value[0], prefix, chain, 0.4, softcap, window)
    torch.testing.assert_close(attend(causal, query, key, value, 0.4, softcap, window)[0], expected, rtol=1e-10, atol=1e-12)


def test_one_batch_serves_layers_with_and_without_a_window() -> None:
    """Masks are cached for all layers of a forward: by window and dtype, or a layer would get another's."""
    query, key, value, batch = make_case([9, 4], [11, 2], 2, torch.float64)
    for window in (0, 3, 0, 5, 3):
        reference, _ = tree_attention_reference(query, key, value, *batch.packed(), 0.4, 0.0, window)
        torch.testing.assert_close(attend(batch, query, key, value, 0.4, 0.0, window), reference, rtol=1e-10, atol=1e-12)
        low = attend(batch, query.float(), key.float(), value.float(), 0.4, 0.0, window)
        torch.testing.assert_close(low.double(), reference, rtol=1e-4, atol=1e-5)


def test_a_wrong_ancestor_shows() -> None:
    """Negative control: the comparisons above can fail."""
    query, key, value, batch = make_case([12], [3], 2, torch.float64)
    prefixes, counts, mask, depths = batch.packed()
    mask = mask.clone()
    mask[0, 11, 0] ^= 1 << 4
    right, _ = tree_attention_reference(query, key, value, *batch.packed(), 0.4)
    wrong, _ = tree_attention_reference(query, key, value, prefixes, counts, mask, depths, 0.4)
    assert not torch.allclose(right[0, 11], wrong[0, 11]) and torch.equal(right[0, :11], wrong[0, :11])


@given(count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_pack_and_unpack(count: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((2, count, count)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == np.int32 and packed.shape == (2, count, -(-count // 32))
    assert np.array_equal(unpack_mask(torch.from_numpy(packed), count).numpy(), mask)


def test_bit_31_is_the_sign_bit() -> None:
    mask = np.zeros((32, 32), np.bool_)
    mask[0, 31] = mask[1, 0] = mask[2, :] = True
    packed = pack_mask(mask)
    assert packed[0, 0] == -(2**31) and packed[1, 0] == 1 and packed[2, 0] == -1
    assert np.array_equal(unpack_mask(torch.from_numpy(packed), 32).numpy(), mask)


def test_visible_rows_are_prefix_and_ancestors() -> None:
    tree = DraftTree.from_paths(0, [[1, 3], [2]])
    batch = TreeBatch([2], [tree], [4], CPU)
    assert batch.visible(0, 0).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert batch.visible(0, 2).tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 3, 5, 8)}, "query has 3 heads"),
        ({"ancestor_mask": torch.zeros(1, 5, 2, dtype=torch.int32)}, "ancestor_mask"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    query, key, value, batch = make_case([5], [2], 2, torch.float32)
    names = ("prefix_lengths", "node_counts", "ancestor_mask", "depths")
    arguments = {
        "query": query,
        "key_cache": key,
        "value_cache": value,
        **dict(zip(names, batch.packed(), strict=True)),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        tree_attention_reference(**arguments, scale=1.0)


def test_dispatch_is_the_reference_where_no_op_is_registered() -> None:
    query, key, value, batch = make_case([6], [4], 2, torch.float32)
    found, lse = tree_attention(query, key, value, *batch.packed(), 1 / math.sqrt(8))
    expected, expected_lse = tree_attention_reference(query, key, value, *batch.packed(), 1 / math.sqrt(8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
