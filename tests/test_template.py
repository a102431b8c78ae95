"""Token Recycling: the published template, filling, learning which ranks matter."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fake_target import FakeTarget, accepted, drive, greedy, make_sequence
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.trees.template import PUBLISHED, Template, TokenRecycling, TokenRecyclingPublished, best_template, observe_tree

BUILDERS = {
    "learned": lambda vocab: TokenRecycling(vocab, refresh=2),
    "fixed": lambda vocab: TokenRecycling(vocab, template=PUBLISHED),
    "unigram": lambda vocab: TokenRecycling(vocab, bigram=False, prefill_harvest=False),
    "published": lambda vocab: TokenRecyclingPublished(vocab),
}


def test_published_template_has_the_papers_shape() -> None:
    depths = DraftTree(np.zeros(len(PUBLISHED)), PUBLISHED.parents).depths
    assert np.bincount(depths).tolist() == [1, 8, 21, 25, 15, 8, 3]
    leaves = set(range(len(PUBLISHED))) - set(PUBLISHED.parents.tolist())
    assert (len(PUBLISHED), len(leaves)) == (81, 40)


def test_template_refuses_what_is_no_tree_of_ranks() -> None:
    with pytest.raises(ValueError, match="one rank"):
        Template(np.array([-1, 0, 0], np.int32), np.array([0, 1, 1], np.int32))
    with pytest.raises(ValueError, match="parents"):
        Template(np.array([-1, 2, 0], np.int32), np.array([0, 1, 1], np.int32))
    with pytest.raises(ValueError, match="raise top_k"):
        TokenRecycling(20, top_k=4, template=PUBLISHED)


def _chance(template: Template, chances: np.ndarray) -> float:
    """Expected accepted tokens: the sum of every node's chance."""
    total, reach, above = 0.0, [1.0], [chances.shape[1]]
    for parent, rank in zip(template.parents[1:].tolist(), template.ranks[1:].tolist(), strict=True):
        reach.append(reach[parent] * chances[above[parent], rank])
        above.append(rank)
        total += reach[-1]
    return total


def test_best_template_beats_every_other_tree_of_its_size() -> None:
    chances = np.array([[0.5, 0.3], [0.4, 0.1], [0.6, 0.35]])  # below rank 0, below rank 1, below the root
    best = _chance(best_template(chances, 5, 4), chances)
    values = []
    for parents in itertools.product(*(range(i) for i in range(1, 5))):
        for ranks in itertools.product((0, 1), repeat=4):
            if len(set(zip(parents, ranks, strict=True))) < 4:
                continue  # two siblings of one rank
            values.append(_chance(Template(np.array([-1, *parents], np.int32), np.array([0, *ranks], np.int32)), chances))
    assert best == pytest.approx(max(values))
    assert DraftTree(np.zeros(6), best_template(chances, 6, 2).parents).depths.max() == 2


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("budget", [1, 2, 8, 60])
def test_output_is_greedy(name: str, budget: int) -> None:
    target = FakeTarget(vocab=12, seed=budget)
    builder = BUILDERS[name](12)
    cap = 81 if "published" in name else budget
    for seq_id, depth in enumerate((0, 1, 5, 16)):
        assert drive(target, builder, [1], 40, cap, depth, seq_id).tokens == greedy(target, [1], 40)
    assert drive(target, builder, [3, 4], 40, cap, 8, 9, eos=(5, 7)).tokens == greedy(target, [3, 4], 40, eos=(5, 7))


def test_tiny_vocabulary_and_empty_table() -> None:
    target = FakeTarget(vocab=3)
    assert drive(target, TokenRecycling(3), [1], 20).tokens == greedy(target, [1], 20)
    builder, seq = TokenRecycling(50), make_sequence([7])
    builder.start(seq)
    assert len(builder.build([seq], [8], [8])[0]) == 1  # nothing known, nothing drafted


def test_published_fills_from_zeros_and_from_unigrams_only() -> None:
    builder, seq = TokenRecyclingPublished(30), make_sequence([7])
    assert builder.build([seq], [81], [9])[0].tokens.tolist() == [7, 0, 0, 0, 0, 0, 0]  # six levels of zeros, siblings merged
    builder.matrix[7] = np.arange(1, 9)
    assert builder.build([seq], [81], [1])[0].tokens.tolist() == [7, 1, 2, 3, 4, 5, 6, 7, 8]


def test_unknown_rows_are_skipped_and_the_budget_is_spent_on_known_ones() -> None:
    builder, seq = TokenRecycling(100, top_k=4), make_sequence([1, 2])
    builder.start(seq)
    builder.observe_prompt(seq, 0, TopK(np.array([[2, 3, 4, 5], [10, 11, 12, 13]]), np.full((2, 4), 0.25, np.float32)))
    (tree,) = builder.build([seq], [5], [9])
    assert tree.tokens.tolist() == [2, 10, 11, 12, 13]
    assert tree.parents.tolist() == [-1, 0, 0, 0, 0]


def test_accepted_path_wins_over_rejected_nodes() -> None:
    tree = DraftTree.from_paths(1, [[5], [6, 5]])  # token 5 at node 1 (rejected) and node 3 (accepted)
    builder = TokenRecycling(20, top_k=1)
    top = TopK(np.array([[6], [11], [5], [13]], np.int32), np.ones((4, 1), np.float32))
    for accepted_path in ([0, 2, 3], [0, 1]):
        observe_tree(builder.table, -1, tree, Verdict(np.array(accepted_path, np.int32), 0), top)
        assert builder.table.lookup(-1, 5).tokens.tolist() == top.tokens[accepted_path[-1]].tolist()


def test_template_learns_which_rank_is_accepted() -> None:
    builder = TokenRecycling(50, top_k=4, refresh=1)
    chain = TopK(np.array([[20, 21, 22, 23]], np.int32), np.full((1, 4), 0.25, np.float32))
    for step in range(60):  # the target always takes the candidate of rank 2
        seq = make_sequence([9], seq_id=step)
        builder.start(seq)
        builder.table.observe(np.array([-1]), np.array([9]), chain)
        (tree,) = builder.build([seq], [2], [4])
        seq.append([22])
        builder.update(seq, tree, Verdict(np.array([0], np.int32), 22), None)
        builder.finish(seq)
    assert builder.template(2).ranks[1] == 2


def test_improved_beats_published_at_an_equal_budget() -> None:
    target = FakeTarget(vocab=40, order=2, seed=3)
    improved, published = TokenRecycling(40), TokenRecyclingPublished(40)
    runs = [
        (drive(target, improved, [i, i + 1], 40, 81, 8, i), drive(target, published, [i, i + 1], 40, 81, 8, i)) for i in range(5)
    ]
    assert sum(len(r.accept_lengths) for r, _ in runs) < sum(len(r.accept_lengths) for _, r in runs)


@pytest.mark.parametrize("name", ["learned", "published"])
def test_state_round_trip(name: str) -> None:
    target, builder = FakeTarget(), BUILDERS[name](24)
    drive(target, builder, [1, 2, 3], 40, 81)
    other = BUILDERS[name](24)
    other.load_state(builder.state())
    seq = make_sequence([1, 2, 3])
    for one in (builder, other):
        one.start(seq)
    if name == "learned":
        builder.template(81), builder.load_state(builder.state())  # orders its template anew, as the other one will
    assert builder.build([seq], [30], [6])[0].tokens.tolist() == other.build([seq], [30], [6])[0].tokens.tolist()
    with pytest.raises(ValueError):
        BUILDERS[name](25).load_state(builder.state())
    builder.reset()
    assert accepted(target, [1, 2, 3], builder.build([seq], [30], [6])[0]) == 0
