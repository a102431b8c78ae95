"""BG-MCTS: selection by hand on small trees, statistics against their definition, options."""

from __future__ import annotations

import json
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_search import MockModel, drive, fields, grow, lines_run
from oracles_search import child_scores, in_tree, statistics, widening_score
from specdec.search import ROOT, Completion, Kind, NodeStatus, Search, SearchConfig, SearchTree
from specdec.search.bg_mcts import BgMcts
from specdec.search.chain_length import ChainLength
from specdec.search.mcts import Mcts
from specdec.search.small_budget import SmallBudget

OFF = SmallBudget(first_dive=0, backtrack=0, finish=0)


def search_at(policy: BgMcts, rho: float, nodes: list[tuple]) -> Search:
    """A search whose tree is `nodes` and of whose 1000 tokens 1000 * (1 - rho) are spent."""
    search = Search(policy, 1000, config=SearchConfig(forced_tokens=0))
    grow(search, nodes)
    search.budget.used = round(1000 * (1 - rho))
    return search


# Two chains: 0 ─ 1 [.8] ─ 3 [.9], 0 ─ 2 [.6] ─ 4 [.1]; every node has its k = 2 with a second, worse child.
TREE = [(0, 0.8), (0, 0.6), (1, 0.9), (2, 0.1), (1, 0.2), (2, 0.1), (3, 0.9), (3, 0.9)]


class TestGolden:
    """Selection on TREE. Subtrees: T(1) = {1, 3, 5, 7, 8}, q .8 .9 .2 .9 .9, mean .74, depths 1 2 2 3 3, mean 2.2;
    T(2) = {2, 4, 6}, q .6 .1 .1, mean .2667, depths 1 2 2. dbar = 6 (the hint). E(0) = .7 + rho * .01.
    """

    def test_rho_1(self) -> None:
        search = search_at(BgMcts(small=OFF), 1.0, TREE)
        best, score = search.policy._best_child(ROOT, 1.0, 6.0, set())
        assert best == 1 and score == pytest.approx(0.74)  # no exploration at the root: its visits are not counted
        assert search.policy._widening_score(ROOT, 1.0) == pytest.approx(0.71)  # .74 > .71: descend
        # at 1: m = 5, P(3) = e^.9 / (e^.9 + e^.2) = .6682; S(3) = .9 + 1.4142 * .6682 * sqrt(ln 5 / 3) = 1.5922
        best, score = search.policy._best_child(1, 1.0, 6.0, set())
        assert best == 3 and score == pytest.approx(1.5922, abs=1e-4)
        # E(1) = .55 + .1225; at 3: S = .9 + 1.4142 * .5 * sqrt(ln 3) = 1.6411 for both, tie: the earlier
        assert search.policy._best_child(3, 1.0, 6.0, set()) == (7, pytest.approx(1.6411, abs=1e-4))
        (request,) = search.ask()
        assert (request.parent, request.kind) == (7, Kind.STEP)

    def test_rho_half(self) -> None:
        search = search_at(BgMcts(small=OFF), 0.5, TREE)
        assert search.policy._best_child(ROOT, 0.5, 6.0, set())[1] == pytest.approx(0.74 + 0.5 * 2.2 / 6)
        assert search.policy._widening_score(ROOT, 0.5) == pytest.approx(0.705)
        assert search.policy._best_child(1, 0.5, 6.0, set())[1] == pytest.approx(0.9 + 0.5 * (8 / 3) / 6 + 0.3461, abs=1e-4)
        assert search.ask()[0].parent == 7

    def test_rho_0(self) -> None:
        # nothing left: pure means with the full bias, no exploration, no variance
        search = search_at(BgMcts(small=OFF), 0.0, TREE)
        assert search.policy._best_child(ROOT, 0.0, 6.0, set()) == (1, pytest.approx(0.74 + 2.2 / 6))
        assert search.policy._best_child(1, 0.0, 6.0, set()) == (3, pytest.approx(0.9 + (8 / 3) / 6))
        assert search.policy._widening_score(1, 0.0) == pytest.approx(0.55)
        assert search.policy._select() == 7

    def test_widening_at_the_root(self) -> None:
        # mean of the children .7 + .01; the better child's subtree has mean (.8 + .1 + .1) / 3
        search = search_at(BgMcts(small=OFF), 1.0, [(0, 0.8), (0, 0.6), (1, 0.1), (1, 0.1), (2, 0.1), (2, 0.1)])
        assert search.ask()[0].parent == ROOT

    def test_completion_bias_changes_the_choice(self) -> None:
        # T(1): mean .7, mean depth 1.67; T(2): mean .69, mean depth 2.6. rho 1: widening .71 wins; rho .1: 2 by its depth
        nodes = [(0, 0.7), (0, 0.7), (1, 0.7), (1, 0.7), (2, 0.69), (2, 0.69), (5, 0.69), (5, 0.69), (7, 0.69), (7, 0.69)]
        search = search_at(BgMcts(small=OFF, kappa=3.0), 0.1, nodes)
        assert search.policy._best_child(ROOT, 0.1, 6.0, set())[0] == 2
        assert search.policy._best_child(ROOT, 1.0, 6.0, set())[0] == 1

    def test_g_max_caps_a_runaway_chain(self) -> None:
        chain = [(0, 0.5), (0, 0.5)] + [(i, 0.5) for i in range(2, 22)]
        search = search_at(BgMcts(small=OFF), 0.0, [*chain, (1, 0.5, "4")])
        assert search.tree.depth_limit == 1.5 * 2  # dbar: the one answer at depth 2
        best = search.policy._best_child(ROOT, 0.0, 2.0, set())
        expected = child_scores(search.tree, ROOT, 0.0, 2.0, g_max=1.5)
        assert best == (2, pytest.approx(expected[1])) and best[1] < 2.0


trees = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(trees, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([None, 1.5]), st.sampled_from(["omit", "count"]))
def test_scores_equal_the_formula(rows: list[tuple[float, float, bool]], rho: float, g_max: float | None, root: str) -> None:
    """Every child's S and every E, read from sums, equal a walk over the subtrees; also through numpy, for many children."""
    policy = BgMcts(small=OFF, g_max=g_max, root_visits=root, refine=True, child_cap=None)
    search = Search(policy, 1000)
    grow(search, [(int(where * i), q, *(["a"] if answered else [])) for i, (where, q, answered) in enumerate(rows)])
    tree, dbar = search.tree, search.config.length.depth(search.tree)
    for node in range(len(tree)):
        if not tree.children[node]:
            continue
        expected = child_scores(tree, node, rho, dbar, g_max or math.inf, root == "count")
        explore = rho * policy.c * math.sqrt(policy._log_visits(node)) / tree.child_exp[node]
        for way in (policy._few_scores, policy._scores):
            assert way(tree.children[node], (1 - rho) / dbar, explore) == pytest.approx(expected)
        assert policy._widening_score(node, rho) == pytest.approx(widening_score(tree, node, rho))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(["bg_mcts", "bg_mcts_coded", "beam", "refinement", "tree_bon"]))
def test_statistics_equal_their_definition(seed: int, width: int, policy: str) -> None:
    """Failures, repeated and empty texts, lost scores, results in any order: the sums stay those of the definition."""
    model = MockModel(seed, empty=0.1, error=0.1, unscored=0.1, repeat=0.3)
    search = Search(policy, 400, config=SearchConfig(max_failures=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            drive(search, model, width, random.Random(seed))
        except RuntimeError:
            search.cancel()  # a model that fails twice on a request; the tree holds all that was told
    tree = search.tree
    read = SearchTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    for node in range(len(tree)):
        if in_tree(tree, node):
            for name, value in statistics(tree, node).items():
                kept = tree.sum_depth(node) if name == "sum_depth" else getattr(tree, name)[node]
                assert kept == pytest.approx(value, abs=1e-9), (name, node)
            assert read.sum_depth(node) == tree.sum_depth(node)
    pending = [node for node in range(len(tree)) if tree.status[node] == NodeStatus.PENDING]
    assert tree.virtual[ROOT] == len(pending) == sum(tree.pending)


limits = st.lists(st.one_of(st.floats(0, 12), st.just(math.inf)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(trees, limits, st.booleans())
def test_depths_follow_a_limit_that_moves(rows: list[tuple[float, float, bool]], moves: list[float], printed: bool) -> None:
    """Wherever the limit goes, before and after texts are told, repeated ones too, the sums are those of the definition."""
    tree, told = SearchTree(answered_bias=printed, refine=True), [ROOT]
    for i, (where, q, answered) in enumerate(rows):
        node = tree.reserve(told[-1 - int(where * min(2, i))], Kind.STEP)  # deep: below one of the last three
        completion = Completion((node,), "", answer="a" if answered else None)
        tree.settle(node, 1, completion, NodeStatus.ANSWERED if answered else NodeStatus.OPEN, q)
        told.append(node)
        if q < 0.3:
            tree.merge(tree.reserve(tree.parent[node], Kind.STEP), node, 1, completion, count=True)
        tree.set_depth_limit(moves[i % len(moves)])
    for limit in moves:
        tree.set_depth_limit(limit)
        for node in range(len(tree)):
            if in_tree(tree, node):
                assert tree.sum_depth(node) == pytest.approx(statistics(tree, node)["sum_depth"], abs=1e-9)
        assert tree.sum_depths(np.arange(len(tree))).tolist() == [tree.sum_depth(node) for node in range(len(tree))]


def test_a_moved_limit_costs_the_deeper_nodes_only() -> None:
    """Every answer moves the limit a little, and somewhere a chain is longer: no reason to look at the whole tree."""
    search = Search(BgMcts(small=OFF, gen_bonus="off"), 10**6)
    grow(search, [*((0, 0.5) for _ in range(2000)), (1, 0.5), *((node, 0.5) for node in range(2001, 2012))])
    tree = search.tree
    tree.set_depth_limit(6.5)
    assert lines_run(lambda: tree.set_depth_limit(6.25)) < 30
    assert lines_run(lambda: tree.set_depth_limit(8.0)) < 500
    assert tree.deepest == 13 and tree.sum_depth(1) == sum(min(depth, 8) for depth in range(1, 14))


@pytest.mark.parametrize("policy", ["bg_mcts", "bg_mcts_coded", "bg_mcts_printed", "mcts", "mcts_coded"])
def test_same_seed_same_tree(policy: str) -> None:
    runs = []
    for _ in range(2):
        search = Search(policy, 1500, config=SearchConfig(step_tokens=20))
        drive(search, MockModel(5), width=3)
        runs.append(fields(search))
    assert runs[0] == runs[1]
    other = Search(policy, 1500, config=SearchConfig(step_tokens=20))
    drive(other, MockModel(6), width=3)
    assert fields(other)["tree"] != runs[0]["tree"]


def test_one_at_a_time_is_the_sequential_order() -> None:
    """ask(1) until nothing is outstanding gives the tree of the plain loop; k siblings are drawn one after the other."""
    plain = Search(BgMcts(small=OFF), 600, config=SearchConfig(step_tokens=20))
    drive(plain, MockModel(3), width=1)
    narrow = Search(BgMcts(small=OFF), 600, config=SearchConfig(step_tokens=20))
    model, parents = MockModel(3), []
    while requests := narrow.ask(1):
        parents.append(requests[0].parent)
        narrow.tell(requests[0], model(requests[0]))
    assert fields(plain) == fields(narrow)
    assert parents[:2] == [ROOT, ROOT] and parents[2] == parents[3] != ROOT


def test_a_batch_spreads() -> None:
    """A node whose quota is in flight leaves the argmax, and at most one widening a node is in flight."""
    search = Search(BgMcts(small=OFF), 10_000, config=SearchConfig(step_tokens=20))
    drive(search, MockModel(1, answer=0.0, end=0.0), width=1, steps=60)
    requests = search.ask(8)
    assert len(requests) == 8
    by_parent = [request.parent for request in requests]
    for parent in set(by_parent):
        fresh = not search.tree.children[parent]
        assert by_parent.count(parent) <= (2 if fresh else 1)
    assert len({request.stream for request in requests}) == 8


def test_requests_in_flight_keep_every_mean() -> None:
    """With requests in flight below it, a node's value is unchanged and its exploration smaller."""
    search = search_at(BgMcts(small=OFF, root_visits="count"), 1.0, TREE)
    before = search.policy._few_scores([1], 0.5, 0.0)
    explored = search.policy._few_scores([1], 0.5, 1.0)
    search.tree.reserve(3, Kind.STEP)
    assert search.policy._few_scores([1], 0.5, 0.0) == before
    assert search.policy._few_scores([1], 0.5, 1.0) < explored


def test_root_visits() -> None:
    """Omitted: no exploration at the root, unless something is in flight. Counted: always."""
    omit, count = (search_at(BgMcts(small=OFF, root_visits=how), 1.0, TREE) for how in ("omit", "count"))
    assert omit.policy._log_visits(ROOT) == 0.0
    assert count.policy._log_visits(ROOT) == pytest.approx(math.log(len(TREE) + 1))
    omit.tree.reserve(3, Kind.STEP)
    assert omit.policy._log_visits(ROOT) == pytest.approx(math.log(len(TREE) + 2))


def test_answered_bias() -> None:
    """As coded an answered node's depth is 0; as printed it counts."""
    nodes = [(0, 0.5), (1, 0.5), (2, 0.5, "4")]
    coded, printed = Search("bg_mcts_coded", 100), Search("bg_mcts_printed", 100)
    for search in (coded, printed):
        grow(search, nodes)
    assert coded.tree.sum_depth(1) == 3.0 and printed.tree.sum_depth(1) == 6.0


def test_ablations_switch_rho_off() -> None:
    """With all three places of rho off, the budget changes nothing: BG-MCTS without widening is MCTS."""
    off = {"anneal_exploration": False, "completion_bias": False, "anneal_widening": False}
    policy = BgMcts(small=OFF, root_visits="count", widen=False, g_max=None, child_cap=2, root_cap=2, gen_bonus="off", **off)
    trees = []
    for each in (policy, Mcts()):
        search = Search(each, 500, config=SearchConfig(step_tokens=20, forced_tokens=0))
        drive(search, MockModel(2))
        trees.append(search.tree.to_dict())
    assert trees[0] == trees[1]
    for rho in (0.0, 1.0):
        search = search_at(BgMcts(small=OFF, **off), rho, TREE)
        assert search.policy._best_child(1, rho, 6.0, set())[1] == pytest.approx(1.5922, abs=1e-4)
        assert search.policy._widening_score(1, rho) == pytest.approx(0.6725)


def test_mcts_as_coded_counts_every_node_twice() -> None:
    search = Search(Mcts.coded(), 1000)
    grow(search, TREE)
    # T(2): q .6 .1 .1 and its own .6 once more
    assert search.policy._few_scores([2], 0.0, 0.0) == [pytest.approx((0.8 + 0.6) / 4)]
    assert search.policy.c == pytest.approx(2**0.25)


def test_refine_continues_answers_and_restarts_the_depth() -> None:
    search = Search(BgMcts(small=OFF, refine=True, k=1, child_cap=None), 1000)
    grow(search, [(0, 0.5), (1, 0.9, "4")])
    (request,) = search.ask()
    assert (request.parent, request.kind) == (2, Kind.REFINE)
    search.tell(request, Completion((5,), "again", score=0.5))
    assert search.tree.depth[request.node] == 1


def test_without_a_cap_answers_are_drawn_again_and_again() -> None:
    """What the cap is for (search.md 5.3 c): with it the node is closed, its parent too, and the search goes elsewhere."""
    for cap, closed in ((None, False), (2, True)):
        search = Search(BgMcts(small=OFF, child_cap=cap), 1000)
        grow(search, [(0, 0.9), (0, 0.1), (1, 0.9, "4"), (1, 0.9, "4")])
        assert bool(search.tree.closed[1]) is closed
        assert not search.tree.closed[ROOT]


def test_fill_pays_what_a_dive_owes() -> None:
    search = Search(BgMcts(small=OFF), 1000)
    grow(search, [(0, 0.9), (1, 0.9), (2, 0.9)])
    assert search.ask()[0].parent == ROOT  # one of its k = 2 is missing
    without = Search(BgMcts(small=OFF, fill=False), 1000)
    grow(without, [(0, 0.9), (1, 0.8), (2, 0.7)])
    assert without.policy._quota(ROOT) == 1


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="root_visits must be one of omit, count, got 'never'"):
        BgMcts(root_visits="never")
    with pytest.raises(ValueError, match="caps >= k"):
        BgMcts(k=4, child_cap=3)


def test_chain_length() -> None:
    tree, length = SearchTree(), ChainLength(steps=6, step_tokens=50)
    assert (length.depth(tree), length.step(tree), length.chain(tree)) == (6.0, 50.0, 300.0)
    search = Search(BgMcts(small=OFF), 100)
    grow(search, [(i, 0.5) for i in range(8)])
    assert length.depth(search.tree) == 9.0 and length.depth(search.tree, hint=False) == 8.0
    grow(search, [(1, 0.5, "4")])
    assert length.depth(search.tree) == 2.0 and length.to_finish(search.tree, 1) == 1.0
