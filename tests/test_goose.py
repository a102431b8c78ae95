"""Goose: the paper's test vectors, the guarantee of the trie union, and what every builder must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_target import FakeTarget, accepted, check_tree, drive, greedy, make_sequence, step
from specdec.draft_tree import DraftTree, Source, TopK, Verdict
from specdec.trees.goose import Goose, Spine, table_tree
from specdec.trees.goose_published import (
    ContextMatcher,
    GooseConfig,
    GoosePublished,
    confidence,
    harmonic_quotas,
    spine_length,
)

# ---------------------------------------------------------------- the paper's parts (drafting.md 2 and 11)


def _matcher(pool: list[int], lengths: tuple[int, ...] = (3,), longest: int = 20) -> ContextMatcher:
    matcher = ContextMatcher(lengths, longest)
    matcher.extend(pool)
    return matcher


def test_match_returns_the_continuation_of_the_oldest_occurrence() -> None:
    assert _matcher([1, 2, 3, 7, 8, 9, 4, 5, 1, 2, 3]).match([1, 2, 3]) == [7, 8, 9, 4, 5, 1, 2, 3]
    assert _matcher([*range(100), 0, 1, 2], longest=5).match([0, 1, 2]) == [3, 4, 5, 6, 7]


def test_longer_ngrams_are_tried_first() -> None:
    matcher = _matcher([0, 1, 2, 3, 50, 9, 1, 2, 3, 100, 8, 1, 2, 3], (4, 3))
    assert matcher.match([1, 2, 3])[0] == 50
    assert matcher.match([9, 1, 2, 3])[0] == 100


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ([1, 2, 3, 42, 5, 1, 2, 3], False),  # one witness
        ([1, 2, 3, 42, 5, 1, 2, 3, 42, 6, 1, 2, 3], True),
        ([1, 2, 3, 42, 5, 1, 2, 3, 43, 6, 1, 2, 3], False),
        ([1, 2, 3], False),  # the query is never its own witness
    ],
)
def test_consensus(pool: list[int], expected: bool) -> None:
    assert _matcher(pool).consensus([1, 2, 3]) is expected


def test_the_query_never_matches_itself() -> None:
    assert _matcher([5, 6, 1, 2, 3]).match([1, 2, 3]) == []
    assert _matcher([1]).match([1]) == []


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12))
def test_matcher_equals_a_naive_rescan_after_any_commits(commits: list[list[int]]) -> None:
    matcher, pool = ContextMatcher((3, 2), 4), []
    for commit in commits:
        matcher.extend(commit)
        pool += commit
        found = next(
            (
                ends
                for n in (3, 2)
                if len(pool) >= n and (ends := [e for e in range(n, len(pool)) if pool[e - n : e] == pool[-n:]])
            ),
            [],
        )
        assert matcher.match(pool[-3:]) == (pool[found[0] : found[0] + 4] if found else [])
        assert matcher.consensus(pool[-3:]) == (len(found) >= 2 and len({pool[e] for e in found}) == 1)


@pytest.mark.parametrize(
    ("length", "agree", "expected"),
    [(0, True, 0), (3, True, 1), (8, False, 0.7), (20, False, 0.9), (99, False, 0.9), (4, False, 0.3)],
)
def test_confidence(length: int, agree: bool, expected: float) -> None:
    assert confidence(length, agree) == pytest.approx(expected)


def test_spine_length() -> None:
    assert spine_length(20, 0.0, 0.5, GooseConfig()) == 10
    assert spine_length(100, 1.0, 0.1, GooseConfig()) == 100
    assert spine_length(100, 0.0, 0.1, GooseConfig()) == 15


def test_harmonic_quotas() -> None:
    assert harmonic_quotas(24, 10) == [8, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    assert harmonic_quotas(2, 4) == [1, 1, 0, 0]
    assert harmonic_quotas(0, 3) == [0, 0, 0]


def test_a_sure_long_match_takes_the_whole_extended_budget() -> None:
    text = list(range(130))
    builder, seq = GoosePublished(200), make_sequence([*text, 190, *text, 191, *text[:5]])
    builder.start(seq)
    builder.table.observe(np.array([3]), np.array([4]), TopK(np.arange(10, 20)[None], np.full((1, 10), 0.1, np.float32)))
    (tree,) = builder.build([seq], [60], [200])
    assert len(tree) == 101 and (tree.source[1:] == Source.CONTEXT).all()
    assert tree.tokens[1:].tolist() == text[5:105]


def test_published_tree_has_spine_root_and_spine_branches() -> None:
    builder, seq = GoosePublished(50), make_sequence([1, 2, 3, 7, 8, 9, 1, 2, 3])
    builder.start(seq)
    scores = np.array([[0.4, 0.3, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.005, 0.005]], np.float32)
    builder.table.observe(
        np.array([2, 3]), np.array([3, 7]), TopK(np.array([np.arange(7, 17), np.arange(20, 30)]), scores.repeat(2, 0))
    )
    (tree,) = builder.build([seq], [20], [20])
    assert tree.path(6) == [0, 1, 2, 3, 4, 5, 6] and tree.tokens[:7].tolist() == [3, 7, 8, 9, 1, 2, 3]
    assert set(tree.tokens[tree.children(0)].tolist()) == {7, 8, 9, 10, 11, 12, 13, 14}  # scores below 0.01 are not drafted
    assert tree.child(1, 20) > 0 and tree.child(1, 28) < 0


# ---------------------------------------------------------------- every builder


@pytest.mark.parametrize("make", [Goose, GoosePublished], ids=["goose", "published"])
@pytest.mark.parametrize("budget", [1, 2, 8, 60])
def test_output_is_greedy(make: type, budget: int) -> None:
    target, builder = FakeTarget(vocab=12, seed=budget), make(12)
    extra = 0 if make is Goose or budget == 1 else 41  # the published budget is no hard cap: B' + 1 nodes
    seen: list[int] = []
    for seq_id, depth in enumerate((0, 1, 5, 64)):
        run = drive_capped(target, builder, [1], 40, budget, extra, depth, seq_id)
        assert run.tokens == greedy(target, [1], 40)
        seen += [len(tree) for tree in run.trees]
    assert max(seen) <= budget + extra
    run = drive_capped(target, builder, [3, 4], 40, budget, extra, 8, 9, eos=(5, 7))
    assert run.tokens == greedy(target, [3, 4], 40, eos=(5, 7))


def drive_capped(
    target: FakeTarget, builder, prompt: list[int], count: int, budget: int, extra: int, depth: int, seq_id: int, eos=()
):
    """`drive`, told that a published builder adds up to `extra` nodes to what it was given."""
    if not extra:
        return drive(target, builder, prompt, count, budget, depth, seq_id, eos)
    build = builder.build
    builder.build = lambda seqs, budgets, depths: build(seqs, [b - extra for b in budgets], depths)
    try:
        return drive(target, builder, prompt, count, budget + extra, depth, seq_id, eos)
    finally:
        del builder.build


def test_several_requests_do_not_mix() -> None:
    target, builder = FakeTarget(vocab=16), Goose(16)
    seqs = [make_sequence([i, i + 1], 40, i) for i in range(3)]
    for seq in seqs:
        builder.start(seq)
    while live := [seq for seq in seqs if not seq.finished]:
        for seq, tree in zip(live, builder.build(live, [2 + 7 * seq.id for seq in live], [6] * len(live)), strict=True):
            check_tree(tree, seq.token_ids[-1], 2 + 7 * seq.id, 6, 16)
            step(target, builder, seq, tree)
            if seq.finished:
                builder.finish(seq)
    assert [seq.output_ids for seq in seqs] == [greedy(target, [i, i + 1], 40) for i in range(3)]
    assert not builder._requests


# ---------------------------------------------------------------- the guarantee


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(3, 12), budget=st.integers(2, 40), depth=st.integers(1, 12),
    floor=st.sampled_from([0.0, 0.125, 0.3, 0.5]), steps=st.integers(0, 12),
)  # fmt: skip
def test_accepts_at_least_what_either_truncated_source_accepts(
    seed: int, vocab: int, budget: int, depth: int, floor: float, steps: int
) -> None:
    """The tree contains spine[:S] and the table's own tree of M nodes, so for ANY target it accepts no less than either."""
    learned, other = FakeTarget(vocab, 1, seed), FakeTarget(vocab, 2, seed + 1)
    builder = Goose(vocab, floor=floor, min_chance=0.0)
    drive(learned, builder, [0, 1, 2], 1 + steps * 3, 8)
    seq = make_sequence(greedy(learned, [1], 3 + steps), seq_id=7)
    builder.start(seq)
    (tree,) = builder.build([seq], [budget], [depth])
    check_tree(tree, seq.token_ids[-1], budget, depth, vocab)
    share, text = int((budget - 1) * floor), seq.token_ids
    spine: Spine = builder.spine(seq, min(share, depth))
    prev = text[-2]
    table = table_tree(text[-1], prev, builder.table.arrays(), builder.rates, share + 1, depth, 0.0)
    chain = DraftTree.chain([text[-1], *spine.tokens.tolist()])
    for part in (chain, table):
        assert _paths(part) <= _paths(tree)
        for target in (learned, other):
            assert accepted(target, text, tree) >= accepted(target, text, part)


def _paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}


def test_without_a_match_the_tree_is_the_tables_and_without_a_table_it_is_the_spine() -> None:
    builder, seq = Goose(60), make_sequence([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    builder.start(seq)
    (tree,) = builder.build([seq], [6], [9])
    assert tree.tokens.tolist() == [3, 4, 5, 6, 7, 1] and tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    fresh = make_sequence([8, 9], seq_id=1)
    builder.start(fresh)
    builder.observe_prompt(fresh, 0, TopK(np.array([np.arange(10), np.arange(20, 30)]), np.full((2, 10), 0.1, np.float32)))
    (tree,) = builder.build([fresh], [6], [9])
    alone = table_tree(9, 8, builder.table.arrays(), builder.rates, 6, 9, builder.min_chance)
    assert tree.tokens.tolist() == alone.tokens.tolist() and len(tree) == 6


def test_a_loop_is_continued_past_the_end_of_the_text() -> None:
    builder, seq = Goose(20), make_sequence([1, 2, 1, 2, 1, 2])
    builder.start(seq)
    assert builder.spine(seq, 7).tokens.tolist() == [1, 2, 1, 2, 1, 2, 1]


def test_finished_requests_lend_spines_up_to_their_end() -> None:
    builder = Goose(60)
    first, second = make_sequence([1, 2, 3, 40, 41], seq_id=0), make_sequence([9, 1, 2, 3], seq_id=1)
    builder.start(first), builder.finish(first), builder.start(second)
    assert builder.spine(second, 9).tokens.tolist() == [40, 41]
    builder.reset()
    assert len(builder.spine(second, 9).tokens) == 0


def test_rates_follow_what_the_target_does() -> None:
    """A spine that never holds loses its place to the table's candidates, and gets it back when it holds again."""
    builder, text = Goose(60, top_k=4, pool_capacity=0), [1, 2, 3, 4, 5, 6, 1, 2, 3]
    top = TopK(np.array([[30, 31, 32, 33]]), np.full((1, 4), 0.25, np.float32))

    def first_child(seq_id: int, answer: int) -> int:
        seq = make_sequence(text, seq_id=seq_id)
        builder.start(seq)
        builder.table.observe(np.array([2]), np.array([3]), top)
        (tree,) = builder.build([seq], [2], [4])
        seq.append([answer])
        builder.update(seq, tree, Verdict(np.array([0], np.int32), answer), None)
        builder.finish(seq)
        return int(tree.tokens[1])

    assert first_child(0, 30) == 4
    assert [first_child(1 + i, 30) for i in range(60)][-1] == 30
    assert [first_child(100 + i, 4) for i in range(60)][-1] == 4


@pytest.mark.parametrize("make", [Goose, GoosePublished], ids=["goose", "published"])
def test_state_round_trip(make: type) -> None:
    target, builder, other = FakeTarget(), make(24), make(24)
    drive_capped(target, builder, [1, 2, 3], 40, 30, 0 if make is Goose else 41, 8, 0)
    other.load_state(builder.state())
    seq = make_sequence([1, 2, 3])
    for one in (builder, other):
        if isinstance(one, Goose):
            one.pool = None  # finished texts are not part of the state
        one.start(seq)
    assert _paths(builder.build([seq], [30], [6])[0]) == _paths(other.build([seq], [30], [6])[0])
    with pytest.raises(ValueError):
        make(25).load_state(builder.state())
    builder.reset()
    assert len(builder.build([seq], [30], [6])[0]) == 1


@pytest.mark.parametrize(("name", "value"), [("min_chance", 1.0), ("floor", 0.6), ("pool_capacity", 5)])
def test_bad_arguments_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name.split("_")[-1]):
        Goose(24, **{name: value})


def test_tiny_vocabulary() -> None:
    target = FakeTarget(vocab=2)
    assert drive(target, Goose(2), [1], 20).tokens == greedy(target, [1], 20)
