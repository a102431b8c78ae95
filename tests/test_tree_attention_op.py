"""torch.ops.specdec.tree_attention on the CPU: against float64, bit for bit where it is promised, its errors, its C interface."""

from __future__ import annotations

import ctypes
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specdec.linear
from specdec import attention
from specdec.attention import TreeBatch, attend, compiled_op, tree_attention_reference
from specdec.draft_tree import DraftTree

pytestmark = pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # relative L2 error against float64
DTYPES = list(TOLERANCE)
DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
op = compiled_op()


def random_tree(count: int, seed: int) -> DraftTree:
    dice = random.Random(seed)
    parents = [-1] + [dice.randrange(max(0, node - 6), node) for node in range(1, count)]
    return DraftTree(np.arange(count), np.array(parents))


def make_case(
    prefixes: list[int], counts: list[int], kv_heads: int, group: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, TreeBatch]:
    """Random tensors, the query a transpose as transformers hands it over; what nobody may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows, most, slots = len(counts), max(counts), max(map(sum, zip(prefixes, counts))) + 3
    query = torch.randn(rows, most, kv_heads * group, dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(rows, kv_heads, slots, dim, generator=generator).to(dtype) for _ in range(2))
    for row, (prefix, count) in enumerate(zip(prefixes, counts)):
        key[row, :, prefix + count :] = value[row, :, prefix + count :] = query[row, :, count:] = torch.nan
    trees = [random_tree(count, seed + row) for row, count in enumerate(counts)]
    return query, key, value, TreeBatch(prefixes, trees, counts, torch.device("cpu"))


def check(
    query: Tensor, key: Tensor, value: Tensor, batch: TreeBatch, scale: float, softcap: float = 0.0, window: int = 0
) -> None:
    """Within TOLERANCE of the reference in float64, row by row, and zero past the row's end."""
    output, lse = op(query, key, value, *batch.packed(), scale, softcap, window)
    double = (query.double(), key.double(), value.double())
    expected, expected_lse = tree_attention_reference(*double, *batch.packed(), scale, softcap, window)
    assert output.dtype == query.dtype and output.shape == expected.shape and output.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == expected.shape[:-1] and lse.is_contiguous()
    for row, count in enumerate(batch.counts):
        error = (output[row, :count].double() - expected[row, :count]).norm() / expected[row, :count].norm()
        assert error <= TOLERANCE[query.dtype], float(error)
        torch.testing.assert_close(lse[row, :count], expected_lse[row, :count], rtol=2e-6, atol=2e-6)
        assert not output[row, count:].any() and torch.isneginf(lse[row, count:]).all()


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_equals_float64(dim: int, dtype: torch.dtype) -> None:
    """The grid, its axes of little interest to each other varied together."""
    options = [
        (group, window, softcap) for group in (1, 3, 4, 8) for window, softcap in ((0, 0.0), (0, 8.0), (21, 0.0), (5, 8.0))
    ]
    shapes = [(nodes, prefix) for nodes in (1, 7, 33, 64) for prefix in (0, 1, 17, 300)]
    for i, (nodes, prefix) in enumerate(shapes):
        for group, window, softcap in options[i % 3 :: 3]:
            case = make_case([prefix, prefix // 2], [nodes, max(1, nodes - 5)], 2, group, dim, dtype, seed=i)
            check(*case, dim**-0.5, softcap, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nodes", "prefix", "group"), [(256, 70, 3), (256, 0, 8), (200, 1023, 4), (5, 5000, 4), (64, 2100, 8)])
def test_large_trees_and_long_prefixes(nodes: int, prefix: int, group: int, dtype: torch.dtype) -> None:
    for dim in (64, 128):
        check(*make_case([prefix], [nodes], 1, group, dim, dtype), dim**-0.5)
    check(*make_case([prefix], [nodes], 1, group, 64, dtype), 0.125, 0.0, 90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_contexts(dtype: torch.dtype) -> None:
    check(*make_case([131_072, 70_001], [6, 9], 1, 3, 64, dtype), 0.125)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_shapes_and_trees(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(1, 70), min_size=rows, max_size=rows))
    prefixes = data.draw(st.lists(st.integers(0, 700), min_size=rows, max_size=rows))
    kv_heads, group, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8)), data.draw(st.sampled_from(DIMS))
    window = data.draw(st.one_of(st.just(0), st.integers(1, 400)))
    softcap = data.draw(st.sampled_from([0.0, 3.0, 30.0]))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*make_case(prefixes, counts, kv_heads, group, dim, dtype, data.draw(st.integers(0, 99))), dim**-0.5, softcap, window)


def test_scores_far_apart() -> None:
    """Weights from 1 to below the smallest float, the largest score at either end; no overflow, no NaN."""
    for peak in (0, 150, 299):
        query, key, value, batch = make_case([300], [4], 1, 2, 64, torch.float32)
        key[0, 0, peak] = query[0, 0, 0] * 3
        check(query, key, value, batch, 1.0)
        check(query, key, value, batch, -4.0)


def test_many_small_weights_beside_a_large_one() -> None:
    """An attention sink: each of the other keys adds less than half a unit of the large one's last place, all of them do not.

    They are lost in its own block, which is the worst that can happen to a sum of weights: 63 * 2^-24.
    """
    query, key, value, batch = make_case([6000], [1], 1, 1, 16, torch.float32)
    key[0, 0, :6001] = 0
    query.fill_(1.0)
    key[0, 0, 0] = 16.9 / 16
    _, lse = op(query, key, value, *batch.packed(), 1.0)
    assert lse.item() > 16.9 + 2e-4
    assert lse.item() == pytest.approx(math.log(math.exp(16.9) + 6000), abs=6e-6)


def test_a_wrong_ancestor_shows() -> None:
    """Negative control."""
    query, key, value, batch = make_case([30], [40], 2, 3, 64, torch.float32)
    prefixes, counts, mask, depths = batch.packed()
    right = op(query, key, value, prefixes, counts, mask, depths, 0.125)[0]
    mask[0, 39, 1] ^= 1 << 3
    wrong = op(query, key, value, prefixes, counts, mask, depths, 0.125)[0]
    assert not torch.equal(right[0, 39], wrong[0, 39]) and torch.equal(right[0, :39], wrong[0, :39])


def test_a_node_that_sees_nothing_is_zero() -> None:
    query, key, value, batch = make_case([0], [3], 1, 2, 64, torch.float32)
    prefixes, counts, mask, depths = batch.packed()
    mask[0, 1] = 0
    output, lse = op(query, key, value, prefixes, counts, mask, depths, 0.125)
    assert not output[0, 1].any() and torch.isneginf(lse[0, 1]).all() and output[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", ["tokens first", "cut from a larger cache", "one row expanded"])
def test_strides(layout: str) -> None:
    query, key, value, batch = make_case([100, 90], [9, 9], 3, 2, 64, torch.float32)
    if layout == "tokens first":
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    elif layout == "cut from a larger cache":
        strided = [torch.randn(4, 5, 200, 100)[1:3, 2:5, : x.shape[2], 7:71] for x in (query, key, value)]
        strided[0] = torch.randn(4, 9, 200, 100)[1:3, :6, :9, 7:71]
        for target, source in zip(strided, (query, key, value)):
            target.copy_(source)
    else:
        batch = TreeBatch([100, 100], [batch.trees[0]] * 2, [9, 9], batch.device)
        strided = [x[:1].expand(2, -1, -1, -1) for x in (query, key, value)]
        query, key, value = (x.contiguous() for x in strided)
    for found, expected in zip(op(*strided, *batch.packed(), 0.125), op(query, key, value, *batch.packed(), 0.125)):
        assert torch.equal(found, expected)


# ---- bit for bit -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (9.0, 700)])
def test_same_bits_for_every_number_of_threads(dtype: torch.dtype, softcap: float, window: int, threads) -> None:
    for kv_heads, group, dim in ((1, 9, 64), (3, 3, 64), (2, 4, 128)):
        query, key, value, batch = make_case([4000, 1500], [33, 8], kv_heads, group, dim, dtype)
        threads(1)
        alone = op(query, key, value, *batch.packed(), dim**-0.5, softcap, window)
        for count in (2, 3, 7):
            threads(count)
            for _ in range(3):
                many = op(query, key, value, *batch.packed(), dim**-0.5, softcap, window)
                assert all(torch.equal(a, b) for a, b in zip(alone, many))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    prefixes, counts = [0, 500, 63, 1200], [12, 1, 40, 33]
    query, key, value, batch = make_case(prefixes, counts, 2, 3, 64, dtype)
    together, together_lse = op(query, key, value, *batch.packed(), 0.125)
    for row, (prefix, count) in enumerate(zip(prefixes, counts)):
        one = TreeBatch([prefix], [batch.trees[row]], [count], batch.device)
        slots = slice(0, prefix + count)
        output, lse = op(query[row, None, :, :count], key[row, None, :, slots], value[row, None, :, slots], *one.packed(), 0.125)
        assert torch.equal(output[0], together[row, :count]) and torch.equal(lse[0], together_lse[row, :count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (9.0, 0), (0.0, 50)])
@pytest.mark.parametrize(("prefix", "nodes"), [(0, 64), (1, 7), (60, 64), (63, 33), (64, 30), (250, 256), (1020, 40)])
def test_a_tree_gives_the_bits_of_token_by_token_decoding(prefix, nodes, softcap, window, dtype) -> None:
    """Every node again, as the only node behind a prefix that holds its path: positions are cut at fixed places."""
    dim = 64
    query, key, value, batch = make_case([prefix], [nodes], 2, 3, dim, dtype, seed=nodes)
    tree = batch.trees[0]
    output, lse = op(query, key, value, *batch.packed(), 0.3, softcap, window)
    for node in range(0, nodes, 1 + nodes // 40):
        path = list(tree.path(node))
        slots = [*range(prefix), *(prefix + n for n in path)]
        alone = TreeBatch([len(slots) - 1], [DraftTree.chain([0])], [1], batch.device)
        step, step_lse = op(query[:, :, node, None], key[:, :, slots], value[:, :, slots], *alone.packed(), 0.3, softcap, window)
        assert torch.equal(step[0, 0], output[0, node]) and torch.equal(step_lse[0, 0], lse[0, node]), (node, path)


# ---- instruction sets ------------------------------------------------------------------------------------------------------


def smaller_instruction_sets() -> list[str]:
    """Those that this CPU has beside the one in use, which every other test runs on."""
    names = ["portable", "avx2", "avx512", "avx512_bf16"]
    return names[: names.index(specdec.linear.instruction_set() or "portable")]


@pytest.mark.parametrize("name", smaller_instruction_sets())
def test_smaller_instruction_sets(name: str) -> None:
    """The choice is made at first use, hence a process for each."""
    code = (
        "from test_tree_attention_op import *; print(specdec.linear.instruction_set())\n"
        "for dtype in DTYPES:\n"
        "    for dim, group, nodes, prefix in ((16, 1, 1, 0), (80, 3, 33, 300), (128, 4, 64, 17), (64, 8, 7, 1100)):\n"
        "        check(*make_case([prefix, 3], [nodes, 1], 2, group, dim, dtype), dim**-0.5)\n"
        "    check(*make_case([90], [33], 2, 3, 64, dtype), 0.125, 5.0, 11)\n"
        "    test_a_tree_gives_the_bits_of_token_by_token_decoding(60, 33, 9.0, 50, dtype)\n"
    )
    environment = os.environ | {"SPECDEC_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]


# ---- as an op --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    query, key, value, batch = make_case([20, 3], [9, 4], 2, 3, 32, dtype)
    arguments = (query, key[:, :, :29].nan_to_num(), value[:, :, :29].nan_to_num(), *batch.packed(), 0.2)
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(op, arguments, {"softcap": 4.0, "window": 7})


def test_compiled_once_while_the_context_grows() -> None:
    """Lengths are tensors: a graph over a cache of fixed size serves every P."""
    query, key, value, batch = make_case([500], [9], 2, 3, 64, torch.float32)
    _, counts, mask, depths = batch.packed()
    traces = 0

    def backend(module, inputs):
        nonlocal traces
        traces += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(prefix: Tensor) -> Tensor:
        return op(query * 2, key, value, prefix, counts, mask, depths, 0.0625)[0] + 1

    key, value = key.nan_to_num(), value.nan_to_num()
    for prefix in (0, 1, 100, 500):
        lengths = torch.tensor([prefix], dtype=torch.int32)
        expected = op(query * 2, key, value, lengths, counts, mask, depths, 0.0625)[0] + 1
        assert torch.equal(step(lengths), expected)
    assert traces == 1


def test_inference_mode() -> None:
    with torch.inference_mode():
        check(*make_case([20], [9], 2, 3, 32, torch.bfloat16), 0.2)


ARGUMENTS = (
    "query",
    "key_cache",
    "value_cache",
    "prefix_lengths",
    "node_counts",
    "ancestor_mask",
    "depths",
    "scale",
    "softcap",
    "window",
)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x[0], "query must have 4 dimensions, has 3"),
        ("query", lambda x: x[:, :5], "query has 5 heads, which is not a multiple of key_cache's 2"),
        ("query", lambda x: x.double(), "query must be float32, float16 or bfloat16"),
        ("query", lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2), "query must be contiguous in its last dimension"),
        ("key_cache", lambda x: x.bfloat16(), "key_cache must have query's dtype"),
        ("key_cache", lambda x: x[:1], "key_cache has 1 rows, query 2"),
        ("key_cache", lambda x: x[..., :16], "key_cache has head dimension 16, query 32"),
        ("key_cache", lambda x: x[:, :0], "value_cache has 2 heads, key_cache 0"),
        ("value_cache", lambda x: x[:, :1], "value_cache has 1 heads, key_cache 2"),
        ("value_cache", lambda x: x[:, :, :5], "value_cache has 5 slots, key_cache 32"),
        ("prefix_lengths", lambda x: x.long(), "prefix_lengths must be a contiguous int32 tensor"),
        ("prefix_lengths", lambda x: x + 4, "prefix_lengths: P < 0, or P . n is more than the cache's 32 slots"),
        ("prefix_lengths", lambda x: -x, "prefix_lengths: P < 0"),
        ("prefix_lengths", lambda x: x[:1], "prefix_lengths must be .2."),
        ("node_counts", lambda x: x + 1, "node_counts must be in 0..9"),
        ("node_counts", lambda x: x - 5, "node_counts must be in 0..9"),
        ("ancestor_mask", lambda x: x[..., None], "ancestor_mask must be .2, 9, 1."),
        ("depths", lambda x: x[:, 1:].contiguous(), "depths must be .2, 9."),
        ("depths", lambda x: x + 9, "depths of the nodes must be in 0..8"),
        ("scale", lambda x: math.nan, "scale must be finite"),
        ("softcap", lambda x: -1.0, "softcap must be finite and at least 0"),
        ("window", lambda x: -1, "window must be at least 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name: str, change, message: str) -> None:
    query, key, value, batch = make_case([20, 3], [9, 4], 2, 3, 32, torch.float32)
    arguments = dict(zip(ARGUMENTS, (query, key, value, *batch.packed(), 0.2, 0.0, 0)))
    op(*arguments.values())
    arguments[name] = change(arguments[name])
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        op(*arguments.values())


def test_head_dimensions_and_nodes_without_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="query has head dimension 40, for which there is no kernel"):
        op(*make_case([5], [3], 1, 2, 40, torch.float32)[:3], *make_case([5], [3], 1, 2, 40, torch.float32)[3].packed(), 0.2)
    query, key, value, batch = make_case([5], [257], 1, 2, 32, torch.float32)
    with pytest.raises(RuntimeError, match="query has 257 nodes, the op takes 1 to 256"):
        op(query, key, value, *batch.packed(), 0.2)


# ---- from the engine -------------------------------------------------------------------------------------------------------


def test_attend_runs_the_op_for_trees_only(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "_op", lambda *arguments: calls.append(1) or op(*arguments))
    query, key, value, batch = make_case([20, 3], [9, 4], 2, 3, 32, torch.float32)
    found = attend(batch, query, key, value, 0.2)
    assert len(calls) == 1
    attend(TreeBatch([20, 3], None, [9, 4], batch.device), query, key, value, 0.2)
    attend(batch, query.double(), key.double(), value.double(), 0.2)
    assert len(calls) == 1
    assert torch.equal(found, op(query, key, value, *batch.packed(), 0.2)[0])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]), "head dimension 24"),
        (lambda q, k, v: (q, k, v[..., :16]), "values have dimension 16, keys 32"),
        (lambda q, k, v: (q, k, v.transpose(-1, -2).contiguous().transpose(-1, -2)), "not contiguous"),
    ],
)
def test_what_the_op_does_not_take_falls_back_with_one_notice(change, why: str, caplog) -> None:
    attention._notice.cache_clear()
    query, key, value, batch = make_case([20, 3], [9, 4], 2, 3, 32, torch.float32)
    tensors = change(query, key, value)
    for _ in range(2):
        output = attend(batch, *tensors, 0.2)
        expected, _ = tree_attention_reference(*tensors, *batch.packed(), 0.2)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert [why in record.message for record in caplog.records] == [True]


# ---- the C interface -------------------------------------------------------------------------------------------------------

PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64), ctypes.c_void_p
)
POINTERS = "query key_cache value_cache prefix_lengths node_counts ancestor_mask depths output lse workspace".split()
SIZES = "dtype batch query_heads kv_heads nodes slots head_dim window".split()


class Params(ctypes.Structure):
    """csrc/tree_attention.h"""

    _fields_ = [
        ("struct_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("workspace_size", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int32) for name in SIZES),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("num_splits", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("parallel_for", PARALLEL_FOR),
        ("parallel_pool", ctypes.c_void_p),
    ]


def c_call(threads: int, parallel_for=None) -> tuple[object, Params, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The launcher, a filled struct, the tensors that it writes to, and what the op returns for the same."""
    loaded = [path for path in torch.ops.loaded_libraries if Path(path).parent == Path(attention.__file__).parent]
    library = ctypes.CDLL(loaded[0])  # a second copy of the library would register the op again
    query, key, value, batch = make_case([900, 200], [20, 11], 1, 3, 64, torch.float32)
    output, lse = torch.full((2, 20, 3, 64), torch.nan), torch.full((2, 20, 3), torch.nan)
    tensors = (query, key, value, *batch.packed(), output, lse)
    params = Params(
        ctypes.sizeof(Params), *(tensor.data_ptr() for tensor in tensors), None, 0,
        *((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in tensors[:3]),
        0, 2, 3, 1, 20, key.shape[2], 64, 0, 0.125, 0.0, 0, threads, parallel_for or PARALLEL_FOR(), None,
    )  # fmt: skip
    params.kept = tensors
    return library.specdec_tree_attention_cpu, params, output, lse, op(query, key, value, *batch.packed(), 0.125)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_c_interface(threads: int) -> None:
    launch, params, output, lse, expected = c_call(threads)
    assert launch(ctypes.byref(params)) == 0
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


def test_c_interface_with_the_callers_threads_and_no_lse() -> None:
    seen = []

    def parallel_for(pool, tasks, task, context):
        seen.append(tasks)
        for i in reversed(range(tasks)):
            task(context, i)

    launch, params, output, lse, expected = c_call(4, PARALLEL_FOR(parallel_for))
    params.lse = None
    assert launch(ctypes.byref(params)) == 0
    assert torch.equal(output, expected[0]) and lse.isnan().all() and len(seen) == 1 and 1 < seen[0] <= 4


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("struct_size", 8, -1), ("dtype", 3, -2), ("batch", -1, -3), ("query_heads", 0, -4), ("kv_heads", 2, -4), ("kv_heads", 0, -5),
        ("nodes", 0, -6), ("nodes", 257, -6), ("slots", -1, -7), ("head_dim", 40, -8), ("query", None, -9), ("key_cache", None, -10),
        ("value_cache", None, -11), ("prefix_lengths", None, -12), ("slots", 900, -12), ("node_counts", None, -13),
        ("ancestor_mask", None, -14), ("depths", None, -15), ("scale", math.inf, -16), ("softcap", math.nan, -17), ("window", -1, -18),
        ("output", None, -19), ("num_threads", -1, -23),
    ],
)  # fmt: skip
def test_c_error_codes(field: str, value: object, code: int) -> None:
    launch, params, output, _, _ = c_call(1)
    setattr(params, field, value)
    assert launch(ctypes.byref(params)) == code
    assert output.isnan().all()
