"""best_first: the growth is optimal, what it learns is what happened, and nothing is learned from what was not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.context_table import ContextTable, lookup
from specdec.trees.best_first import BestFirst
from specdec.trees.calibration import initial, learn, score
from specdec.trees.evidence import BUCKETS, CANDIDATES, SOURCES, context_bucket, new_evidence, table_bucket

VOCAB = 40


def make_seq(tokens: list[int], number: int = 0, **params: Any) -> Sequence:
    randomness: Any = None
    return Sequence(number, list(tokens), SamplingParams(**{"max_new_tokens": 10_000, **params}), randomness)


def walk(tree: DraftTree, future: list[int]) -> np.ndarray:
    nodes = [0]
    for token in future[:-1]:
        child = tree.child(nodes[-1], token)
        if child < 0:
            break
        nodes.append(child)
    return np.array(nodes, np.int32)


def fake_top(rng: np.random.Generator, count: int) -> TopK:
    tokens = np.stack([rng.permutation(VOCAB)[:8] for _ in range(count)]).astype(np.int32)
    return TopK(tokens, rng.dirichlet(np.ones(8), count).astype(np.float32))


def play(builder: BestFirst, seq: Sequence, text: list[int], budget: int = 16, top: Any = None) -> list[int]:
    """Decode so that `text` comes out; returns the tokens of each step."""
    emitted, at = [], 0
    while at < len(text):
        tree = builder.build([seq], [budget], [len(text) - at - 1])[0]
        nodes = walk(tree, text[at:])
        tokens = text[at : at + len(nodes)]
        seq.append(tokens)
        builder.update(seq, tree, Verdict(nodes, tokens[-1]), None if top is None else top(len(tree)))
        emitted.append(len(tokens))
        at += len(tokens)
    return emitted


@pytest.fixture(scope="module")
def busy() -> tuple[BestFirst, list[Sequence]]:
    """A builder that has seen several texts and random logits, with three requests running."""
    rng = np.random.default_rng(0)
    builder = BestFirst(VOCAB)
    seqs = []
    for number in range(5):
        seq = make_seq(rng.integers(0, VOCAB, 60).tolist(), number)
        builder.start(seq)
        builder.observe_prompt(seq, 0, fake_top(rng, 60))
        play(builder, seq, (rng.integers(0, 6, 30).tolist() * 3), top=lambda count: fake_top(rng, count))
        seqs.append(seq)
    for seq in seqs[:2]:
        builder.finish(seq)
    return builder, seqs[2:]


@pytest.mark.parametrize("budget", [1, 2, 8, 60])
@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_trees_are_trees_within_budget_and_depth(busy: Any, budget: int, depth: int) -> None:
    builder, seqs = busy
    for seq, tree in zip(seqs, builder.build(seqs, [budget] * 3, [depth] * 3)):
        assert 1 <= len(tree) <= budget and tree.depths.max() <= depth
        assert tree.tokens[0] == seq.token_ids[-1]
        for node in range(len(tree)):
            children = tree.tokens[tree.children(node)]
            assert len(set(children.tolist())) == len(children)


def test_the_tree_is_the_most_probable_nodes(busy: Any) -> None:
    """Nothing that was cut is more probable than what was drafted: optimal for products of edge probabilities."""
    builder, seqs = busy
    for tree in builder.build(seqs, [24] * 3, [50] * 3):
        evidence, path_probs = tree.evidence.evidence, tree.evidence.path_probs
        assert np.all(np.diff(path_probs) <= 1e-12), "best first: every prefix is optimal too"
        for node in range(len(tree)):
            count = evidence.counts[node]
            assert evidence.probs[node, :count].sum() < 1
            for token, prob in zip(evidence.tokens[node, :count], evidence.probs[node, :count]):
                path = path_probs[node] * prob
                child = tree.child(node, int(token))
                assert path <= path_probs[-1] + 1e-12 if child < 0 else path == pytest.approx(path_probs[child])


def test_a_larger_budget_extends_the_smaller_tree(busy: Any) -> None:
    builder, seqs = busy
    small, large = builder.build(seqs, [6] * 3, [50] * 3), builder.build(seqs, [30] * 3, [50] * 3)
    for few, many in zip(small, large):
        assert many.prefix(6).tokens.tolist() == few.tokens.tolist() and many.prefix(6).parents.tolist() == few.parents.tolist()


def test_repetition_becomes_a_long_spine() -> None:
    builder, text = BestFirst(VOCAB), list(range(20))
    seq = make_seq(text * 3)
    builder.start(seq)
    emitted = play(builder, seq, text * 10, budget=8)
    assert max(emitted) == 8, "a chain of the whole budget"


def test_finished_requests_are_context_of_later_ones() -> None:
    text = np.random.default_rng(1).permutation(VOCAB).tolist()
    builder = BestFirst(VOCAB)
    for number in range(3):
        seq = make_seq([text[0]], number)
        builder.start(seq)
        steps = len(play(builder, seq, text[1:]))
        builder.finish(seq)
        assert steps == len(text) - 1 if number == 0 else steps < 15
    assert not builder._requests, "nothing of a finished request stays but its text"
    builder.reset()
    builder.start(seq := make_seq([text[0]], 9))
    assert len(builder.build([seq], [16], [30])[0]) == 1


def test_logits_of_rejected_nodes_are_learned_and_unknown_rows_are_not() -> None:
    builder = BestFirst(VOCAB)
    builder.start(seq := make_seq([1, 2, 3, 1, 2, 4, 1, 2]))
    tree = builder.build([seq], [3], [5])[0]
    rejected = tree.child(0, 4)
    top = TopK(np.full((len(tree), 8), -1, np.int32), np.zeros((len(tree), 8), np.float32))
    top.tokens[rejected], top.probs[rejected] = np.arange(30, 38), np.full(8, 0.125, np.float32)
    seq.append([9])
    builder.update(seq, tree, Verdict(np.zeros(1, np.int32), 9), top)
    assert len(builder._table) == 3, "orders 1 to 3 of one node"
    seq.append([1, 2, 4])
    assert builder.build([seq], [60], [5])[0].child(0, 30) > 0


def test_censored_candidates_teach_nothing() -> None:
    """Only candidates of visited nodes are trials, also those that the budget cut."""
    builder = BestFirst(VOCAB)
    builder.start(seq := make_seq([1, 2, 3, 4, 5] * 4))
    tree = builder.build([seq], [6], [9])[0]
    evidence = tree.evidence.evidence
    before = initial()
    seq.append([30])
    builder.update(seq, tree, Verdict(np.zeros(1, np.int32), 30), None)
    after = builder._calibrations[seq.params]
    for source in range(SOURCES):
        touched = set(np.flatnonzero(after.trials[source] != before.trials[source]).tolist())
        assert touched == set(evidence.buckets[0, : evidence.counts[0], source].tolist())


def test_probabilities_follow_the_outcomes() -> None:
    """A candidate that is right 70 % of the time is given about 0.7."""
    rng = np.random.default_rng(0)
    calibration = initial()
    evidence = new_evidence(1)
    seen = []
    for _ in range(600):
        evidence.counts[0] = 2
        evidence.tokens[0, :2] = [5, 6]
        evidence.buckets[0, 0], evidence.buckets[0, 1] = 20, 30
        score(evidence, 0, calibration)
        seen.append(float(evidence.probs[0, list(evidence.tokens[0, :2]).index(5)]))
        learn(evidence, 0, rng.choice([5, 6, 7], p=[0.7, 0.1, 0.2]), calibration)
    assert np.mean(seen[-300:]) == pytest.approx(0.7, abs=0.08)


def test_buckets_are_distinct_and_in_range() -> None:
    context = {
        context_bucket(longest, longest, share, count)
        for longest in (1, 2, 3, 4, 5, 8, 12, 16)
        for share in (0.1, 0.5, 0.9, 1.0)
        for count in (1, 2, 5)
    }
    assert len(context) == 8 * 12 and max(context) < BUCKETS
    table = {table_bucket(True, rank, prob) for rank in range(8) for prob in np.linspace(0.0, 1.0, 200)}
    assert max(table) < BUCKETS and min(table) > 1
    assert (context_bucket(0, 0, 0.0, 0), table_bucket(False, -1, 0.0), table_bucket(True, -1, 0.0)) == (0, 0, 1)


def test_more_candidates_than_room() -> None:
    builder = BestFirst(10_000)
    rng = np.random.default_rng(0)
    builder.start(seq := make_seq([token for pair in rng.integers(2, 10_000, 300).tolist() for token in (1, pair)] + [1]))
    for _ in range(5):
        top = TopK(rng.integers(0, 10_000, (600, 8)).astype(np.int32), np.full((600, 8), 0.125, np.float32))
        builder.observe_prompt(seq, 0, top)
    tree = builder.build([seq], [64], [9])[0]
    assert tree.evidence.evidence.counts[: len(tree)].max() <= CANDIDATES


def test_temperature_classes_do_not_mix() -> None:
    builder = BestFirst(VOCAB)
    greedy, warm = make_seq([1, 2, 3] * 5, 0), make_seq([1, 2, 3] * 5, 1, temperature=1.0)
    for seq in (greedy, warm):
        builder.start(seq)
    before = builder._calibrations[greedy.params].trials.copy()
    play(builder, warm, [1, 2, 3] * 5)
    assert np.array_equal(builder._calibrations[greedy.params].trials, before)
    for step in range(100):
        assert builder._calibrations[SamplingParams(temperature=0.1 + step / 10)] is not None
    assert len(builder._calibrations._of) <= 32


def test_size_follows_the_cost_and_speculation_stops_and_resumes() -> None:
    flat = CostModel({(1, nodes, 0): 0.02 for nodes in (1, 8, 64)})
    steep = CostModel({(1, nodes, 0): 0.02 * nodes for nodes in (1, 8, 64)})
    noise, pattern = np.random.default_rng(0).integers(0, VOCAB, 300).tolist(), list(range(10))
    for costs, paying in ((flat, True), (steep, False)):
        builder = BestFirst(VOCAB, costs)
        builder.start(seq := make_seq(pattern * 5))
        emitted = play(builder, seq, pattern * 20, budget=64)
        assert (np.mean(emitted[-5:]) > 5) == paying
    builder = BestFirst(VOCAB, CostModel({(1, 1, 0): 0.02, (1, 8, 0): 0.024, (1, 64, 0): 0.1}, host_seconds=0.002))
    builder.start(seq := make_seq(noise[:100]))
    play(builder, seq, noise[100:], budget=64)
    assert len(builder.build([seq], [64], [50])[0]) == 1, "noise: plain steps"
    emitted = play(builder, seq, pattern * 30, budget=64)
    assert np.mean(emitted[-10:]) > 5, "and it is back within some tens of steps"


class Watched(BestFirst):
    """Keeps the sizes of the trees that it grew; `whole`: growth never ends early."""

    def __init__(self, costs: CostModel, whole: bool) -> None:
        super().__init__(VOCAB, costs)
        self.whole, self.grown, self.chosen = whole, 0, []

    def _build(self, seq: Sequence, budget: int, depth: int, costs: CostModel | None) -> DraftTree:
        tree = super()._build(seq, budget, depth, None if self.whole else costs)
        self.grown += len(tree)
        return tree

    def build(self, *args: Any) -> list[DraftTree]:
        trees = super().build(*args)
        self.chosen += [(tree.tokens.tolist(), tree.parents.tolist()) for tree in trees]
        return trees


@pytest.mark.parametrize("shape", [(20, 20, 24, 40, 90), (20, 21, 21.5, 22, 23), (20, 40, 80, 160, 640), (20, 30, 31, 90, 91)])
def test_growth_ends_where_no_larger_tree_can_pay(shape: tuple[float, ...]) -> None:
    """The trees that are chosen are those of whole growth; only less is grown."""
    table = {(1, nodes, 0): ms / 1e3 for nodes, ms in zip((1, 4, 8, 16, 64), shape)}
    rng, pattern = np.random.default_rng(1), list(range(10))
    noise = rng.integers(0, 6, 150).tolist()
    text = noise + pattern * 15 + noise[:60] + [n for pair in zip(pattern * 6, noise) for n in pair]
    builders = [Watched(CostModel(table, host_seconds=0.001), whole) for whole in (False, True)]
    for builder in builders:
        tops = np.random.default_rng(2)
        builder.start(seq := make_seq(text[:40]))
        play(builder, seq, text, budget=64, top=lambda count, tops=tops: fake_top(tops, count))
    early, whole = builders
    assert early.chosen == whole.chosen
    assert early.grown <= whole.grown
    if shape[-1] > 30:
        assert early.grown < 0.7 * whole.grown


def test_state_survives_a_round_trip(busy: Any) -> None:
    builder, seqs = busy
    other = BestFirst(VOCAB)
    other.load_state(builder.state())
    assert len(other._table) == len(builder._table)
    text = seqs[0].token_ids
    trees = []
    for each in (builder, other):
        each.start(seq := make_seq(text, 77))
        trees.append(each.build([seq], [32], [50])[0])
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    builder.finish(make_seq([1], 78))
    for broken in ({}, {**builder.state(), "table.tokens": np.zeros((3, 8), np.int32)}):
        with pytest.raises(ValueError, match="state"):
            other.load_state(broken)


def test_plain_trees_are_tolerated() -> None:
    builder = BestFirst(VOCAB)
    builder.start(seq := make_seq([1, 2]))
    builder.update(seq, DraftTree.root_only(2), Verdict(np.zeros(1, np.int32), 3), None)


def test_table_merges_grows_and_forgets_the_oldest() -> None:
    table = ContextTable(k=2, capacity=64, keep=(0.5, 0.0, 0.0))
    text = np.array([5, 6], np.int32)

    def after_six(tokens: list[int]) -> list[tuple[int, float]]:
        table.observe_text(text[1:], 0, TopK(np.array([tokens], np.int32), np.array([[0.6, 0.4]], np.float32)))
        row = lookup(table.arrays, text, 1, 1)
        return [(int(token), round(float(prob), 2)) for token, prob in zip(table.arrays.tokens[row], table.arrays.probs[row])]

    assert after_six([1, 2]) == [(1, 0.6), (2, 0.4)]
    assert after_six([2, 3]) == [(2, 0.5), (1, 0.3)]
    assert lookup(table.arrays, text, 1, 2) == -1, "the pair was not observed"
    many = np.arange(1000, dtype=np.int32)
    table.observe_text(many, 0, TopK(np.zeros((1000, 2), np.int32), np.ones((1000, 2), np.float32)))
    assert len(table) <= 64 and lookup(table.arrays, many, 999, 3) >= 0


def test_large_table_keeps_everything_through_growth() -> None:
    table = ContextTable(capacity=1 << 16)
    text = np.random.default_rng(0).integers(0, 1000, 6000).astype(np.int32)
    tokens = np.arange(6000, dtype=np.int32)[:, None] + np.arange(8, dtype=np.int32)
    for start in range(0, 6000, 1000):
        table.observe_text(text[: start + 1000], start, TopK(tokens[start : start + 1000], np.ones((1000, 8), np.float32)))
    found = [lookup(table.arrays, text, end, 3) for end in range(2, 6000)]
    assert np.mean([row >= 0 for row in found]) > 0.98
    assert all(table.arrays.tokens[row, 0] == end for end, row in zip(range(2, 6000), found) if row >= 0)


@pytest.mark.parametrize("arguments", [{"vocab_size": 0}, {"top_k": 0}, {"table_rows": 100}, {"shared_tokens": 1}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least|must be"):
        BestFirst(**{"vocab_size": VOCAB, **arguments})
