"""The adjacency table against a dictionary, its bounds, and its file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from specdec._jit import njit_allocating
from specdec.draft_tree import TopK
from specdec.sources.token_recycling import BIGRAM, NONE, UNIGRAM, AdjacencyTable, lookup_row

V, K = 20, 3


def top_rows(rows):
    """[M, K] distinct-enough candidates and scores, from one number a row."""
    rows = np.asarray(rows)
    tokens = (rows[:, None] * 7 + np.arange(K)) % V
    return TopK(tokens.astype(np.int32), (1.0 / (2 + rows[:, None] + np.arange(K))).astype(np.float32))


def observed(table, pairs, start=0):
    prev, tokens = np.array(pairs, np.int64).reshape(-1, 2).T
    top = top_rows(np.arange(start, start + len(tokens)))
    table.observe(prev, tokens, top)
    return top


def contents(table):
    return {
        (p, t): tuple(np.concatenate([row.tokens, row.scores, [row.tier]]))
        for p in range(-1, V)
        for t in range(V)
        for row in [table.lookup(p, t)]
    }


@given(pairs=st.lists(st.tuples(st.integers(-1, V - 1), st.integers(0, V - 1)), max_size=80))
@settings(deadline=None, max_examples=50)
def test_equals_a_dictionary_in_which_the_last_observation_wins(pairs):
    table = AdjacencyTable(V, K, bigram_capacity=1 << 12)
    top = observed(table, pairs)
    oracle = {}
    for row, (prev, token) in enumerate(pairs):
        oracle[token] = row
        if prev >= 0:
            oracle[prev, token] = row
    for prev in range(-1, V):
        for token in range(V):
            found = table.lookup(prev, token)
            row = oracle.get((prev, token), oracle.get(token))
            assert found.tier == (BIGRAM if (prev, token) in oracle else UNIGRAM if token in oracle else NONE)
            expected = [] if row is None else top.tokens[row].tolist()
            assert found.tokens.tolist() == expected
            assert found.scores.tolist() == ([] if row is None else top.probs[row].tolist())
    assert table.unigram_count == len({token for _, token in pairs})
    assert table.bigram_count == len({pair for pair in pairs if pair[0] >= 0})


def test_worked_example():
    table = AdjacencyTable(10, 2)
    top = TopK(np.array([[1, 2], [3, 4]], np.int32), np.full((2, 2), 0.5, np.float32))
    table.observe(np.array([5, 9]), np.array([7, 7]), top)
    assert table.lookup(5, 7).tokens.tolist() == [1, 2] and table.lookup(5, 7).tier == BIGRAM
    assert table.lookup(9, 7).tokens.tolist() == [3, 4]
    assert table.lookup(0, 7).tokens.tolist() == [3, 4] and table.lookup(0, 7).tier == UNIGRAM
    assert table.lookup(5, 8).tier == NONE and len(table.lookup(5, 8).tokens) == 0


@njit_allocating
def _tiers(keys, filled, prev, tokens):
    found = np.zeros(len(tokens), np.int64)
    for i in range(len(tokens)):
        row, tier = lookup_row(keys, filled, prev[i], tokens[i])
        found[i] = tier if row >= 0 else 0
    return found


def test_kernels_can_look_up():
    table = AdjacencyTable(V, K)
    observed(table, [(1, 2), (-1, 3)])
    arrays = table.arrays()
    prev, tokens = np.array([1, 0, -1, 5, 5, 5, 5]), np.array([2, 2, 3, 3, 4, -1, V])
    assert _tiers(arrays.keys, arrays.filled, prev, tokens).tolist() == [2, 1, 1, 1, 0, 0, 0]


def test_the_pair_tier_is_bounded_and_what_is_evicted_falls_back():
    table = AdjacencyTable(500, 1, bigram_capacity=64)
    pairs = np.array([(p, t) for p in range(40) for t in range(50)], np.int64)
    candidates = (np.arange(len(pairs)) % 500).astype(np.int32)[:, None]
    table.observe(pairs[:, 0], pairs[:, 1], TopK(candidates, np.ones((len(pairs), 1), np.float32)))
    held = [i for i, (p, t) in enumerate(pairs) if table.lookup(p, t).tier == BIGRAM]
    assert table.bigram_count == len(held) <= 64
    assert len(held) > 48
    for i in held:
        assert table.lookup(*pairs[i]).tokens[0] == candidates[i, 0]
    assert all(table.lookup(p, t).tier != NONE for p, t in pairs)
    assert table.lookup(*pairs[-1]).tier == BIGRAM


def test_a_pair_written_again_is_spared_once():
    table = AdjacencyTable(100, 1, bigram_capacity=8)  # one set
    top = TopK(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))
    for prev in [*range(8), 0, 8]:
        table.observe(np.array([prev]), np.array([5]), top)
    assert [table.lookup(prev, 5).tier == BIGRAM for prev in range(9)] == [True, False] + [True] * 7


def test_large_ids_do_not_overflow():
    table = AdjacencyTable(2**20, 1, bigram_capacity=16)
    top = TopK(np.array([[2**20 - 1]], np.int32), np.ones((1, 1), np.float32))
    with np.errstate(all="raise"):
        table.observe(np.array([2**20 - 1]), np.array([2**20 - 1]), top)
    assert table.lookup(2**20 - 1, 2**20 - 1).tokens.tolist() == [2**20 - 1]


def test_more_candidates_than_k_are_cut_and_fewer_are_refused():
    table = AdjacencyTable(V, 2)
    table.observe(np.array([-1]), np.array([0]), TopK(np.array([[4, 5, 6]], np.int32), np.ones((1, 3), np.float32)))
    assert table.lookup(-1, 0).tokens.tolist() == [4, 5]
    with pytest.raises(ValueError, match="at least k=2"):
        table.observe(np.array([-1]), np.array([0]), TopK(np.array([[4]], np.int32), np.ones((1, 1), np.float32)))


@pytest.mark.parametrize(("prev", "token", "candidate"), [(0, V, 0), (0, -1, 0), (V, 0, 0), (0, 0, V), (0, 0, -1)])
def test_ids_out_of_the_vocabulary_are_refused_and_nothing_is_written(prev, token, candidate):
    table = AdjacencyTable(V, 1)
    top = TopK(np.array([[0], [candidate]], np.int32), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="row 1"):
        table.observe(np.array([3, prev]), np.array([3, token]), top)
    assert table.unigram_count == table.bigram_count == 0


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="one row a position"):
        AdjacencyTable(V, K).observe(np.array([1, 2]), np.array([1]), top_rows([0]))


@pytest.mark.parametrize(
    ("size", "k", "capacity", "name"),
    [(0, 1, 8, "vocab_size"), (5, 6, 8, "k must"), (5, 0, 8, "k must"), (5, 1, 0, "bigram_capacity")],
)
def test_bad_sizes_are_refused(size, k, capacity, name):
    with pytest.raises(ValueError, match=name):
        AdjacencyTable(size, k, capacity)


def test_reset_forgets():
    table = AdjacencyTable(V, K)
    observed(table, [(1, 2), (3, 4)])
    table.reset()
    assert table.unigram_count == table.bigram_count == 0 and table.lookup(1, 2).tier == NONE


@given(pairs=st.lists(st.tuples(st.integers(-1, V - 1), st.integers(0, V - 1)), max_size=60))
@settings(deadline=None, max_examples=15)
def test_a_state_restores_every_row_also_into_another_capacity(pairs):
    table = AdjacencyTable(V, K, bigram_capacity=64)
    observed(table, pairs)
    copy, larger = AdjacencyTable(V, K, bigram_capacity=64), AdjacencyTable(V, K, bigram_capacity=1 << 10)
    observed(copy, [(0, 1)], start=90)
    for other in (copy, larger):
        other.load_state(table.state())
        assert contents(other) == contents(table)


def test_a_file_restores_the_table_and_leaves_no_partial_file(tmp_path):
    table, path = AdjacencyTable(V, K), tmp_path / "table.safetensors"
    observed(table, [(1, 2), (-1, 3), (2, 3)])
    table.save(path)
    table.save(path)
    copy = AdjacencyTable(V, K)
    copy.load(path)
    assert contents(copy) == contents(table)
    assert [file.name for file in tmp_path.iterdir()] == ["table.safetensors"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    table, path = AdjacencyTable(V, K), tmp_path / "table.safetensors"
    table.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("specdec.sources.token_recycling.os.replace", fail)
    observed(table, [(1, 2)])
    with pytest.raises(OSError, match="disk full"):
        table.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("other", [AdjacencyTable(V + 1, K), AdjacencyTable(V, K - 1)])
def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path, other):
    table, path = AdjacencyTable(V, K), tmp_path / "table.safetensors"
    table.save(path)
    other.observe(np.array([-1]), np.array([0]), top_rows([1]))
    with pytest.raises(ValueError, match=r"table.safetensors.*vocab_size, k"):
        other.load(path)
    assert other.unigram_count == 1


def _damage(name, value):
    table = AdjacencyTable(V, K)
    observed(table, [(1, 2), (2, 3)])
    state = table.state()
    state[name] = value(state[name])
    return state


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("unigram_ids", lambda a: a + V, "outside"),
        ("unigram_tokens", lambda a: a - V, "outside"),
        ("bigram_tokens", lambda a: a + V, "outside"),
        ("bigram_keys", lambda a: -a, "outside"),
        ("bigram_keys", lambda a: a + V, "outside"),
        ("bigram_scores", lambda a: a * np.float32("nan"), "finite"),
        ("unigram_scores", lambda a: a[:1], "unigram_scores"),
        ("bigram_tokens", lambda a: a.astype(np.int64), "bigram_tokens"),
    ],
)
def test_a_damaged_state_is_refused(name, value, message):
    table = AdjacencyTable(V, K)
    with pytest.raises(ValueError, match=message):
        table.load_state(_damage(name, value))
    assert table.unigram_count == 0


def test_foreign_files_are_refused(tmp_path):
    garbage, foreign = tmp_path / "garbage", tmp_path / "foreign"
    garbage.write_bytes(b"not safetensors")
    save_file({"weight": np.zeros(3)}, foreign)
    table = AdjacencyTable(V, K)
    with pytest.raises(ValueError, match="not a safetensors file"):
        table.load(garbage)
    with pytest.raises(ValueError, match="header"):
        table.load(foreign)
    with pytest.raises(FileNotFoundError):
        table.load(tmp_path / "absent")
