"""The rules for small budgets choose from heaps what a look at every node would choose."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest

from mock_search import MockModel, drive, grow
from specdec.search import ROOT, Completion, GenerationError, NodeStatus, Search, SearchConfig, SearchTree
from specdec.search.bg_mcts import BgMcts
from specdec.search.small_budget import STOP, WAIT, SmallBudget

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def slow_node(policy: BgMcts) -> int | None:
    """Rules a and b of search.md 5.3 and `backtrack`, each by a look at every node."""
    small, tree, budget, length = policy.small, policy.tree, policy.budget, policy.length
    nodes = range(len(tree))
    open_nodes = [n for n in nodes if tree.status[n] == NodeStatus.OPEN and not tree.closed[n] and not tree.pending[n]]
    leaves = [n for n in open_nodes if n != ROOT and not tree.children[n]]
    left, answered = budget.expected_left, tree.answered_count

    def deepest(among: list[int]) -> int:
        return max(among, key=lambda n: (tree.depth[n], tree.q[n], -n), default=ROOT)

    def fits(node: int, slack: float = small.slack) -> bool:
        return length.to_finish(tree, node) <= slack * left

    told = [n for n in nodes[1:] if tree.status[n] not in (NodeStatus.PENDING, NodeStatus.DROPPED)]
    scores = [tree.q[n] for n in told if not tree.unscored[n]]
    least, greatest = (min(scores), max(scores)) if len(scores) >= small.rescale else (0.0, 1.0)

    def scaled(score: float) -> float:
        return min(1.0, max(0.0, (score - least) / (greatest - least))) if greatest > least else 1.0

    def regret(node: int) -> float:
        below = max((scaled(tree.sum_q[child] / tree.visits[child]) for child in tree.children[node]), default=0.0)
        return (1.0 if node == ROOT else scaled(tree.q[node])) * (1.0 - below)

    chains = budget.total / length.chain(tree)
    if small.backtrack <= chains < small.first_dive and not answered and not tree.closed_count:
        return WAIT if tree.virtual[ROOT] else deepest(leaves)
    if chains < small.backtrack:
        may_be_in_flight = 1
        while small.reserve and (may_be_in_flight + 1) * small.reserve * length.chain(tree) <= left:
            may_be_in_flight += 1
        if small.reserve and tree.virtual[ROOT] >= may_be_in_flight:
            return WAIT
        members = [n for n in open_nodes if tree.draws[n] < tree.cap(n)]
        slack = 1 / small.reserve if small.reserve and not answered else small.slack
        if fitting := [n for n in members if fits(n, slack)]:
            return max(fitting, key=lambda n: (regret(n), tree.depth[n], -n))
        if tree.virtual[ROOT]:
            return WAIT
        return STOP if answered or not members else deepest(members)
    ranked = sorted(leaves, key=lambda n: (-tree.q[n], -tree.depth[n], tree.tokens[n], n))
    if not ranked or left > small.finish * length.to_finish(tree, ranked[0]):
        return None
    return next((leaf for leaf in ranked if fits(leaf)), STOP if answered else deepest(ranked))


def slow_leaf(tree: SearchTree) -> int:
    """The deepest text without an answer, the better-scored of equals, the earlier of these."""
    texts = [n for n in range(1, len(tree)) if tree.status[n] in ("open", "ended") and tree.kind[n] != "forced"]
    return max(texts, key=lambda n: (tree.depth[n], tree.q[n], -n), default=ROOT)


def squeezed(completion: Completion, least: float) -> Completion:
    """Its score between `least` and 1; at 1, all alike."""
    return completion if completion.score is None else replace(completion, score=least + (1 - least) * completion.score)


@pytest.mark.parametrize(("backtrack", "reserve"), [(0.0, 2.0), (8.0, 2.0), (8.0, 0.0), (float("inf"), 1.5)])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("least", [0.0, 0.9, 1.0])
def test_heaps_choose_what_a_look_at_every_node_does(
    backtrack: float, reserve: float, width: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over whole searches with failures, empty texts, repeats and results in any order; after each of which it was resumed."""
    compared, node = [0], SmallBudget.node

    def checked(self: SmallBudget, *args: object) -> int | None:
        found = node(self, *args)  # type: ignore[arg-type]
        compared[0] += 1
        assert found == slow_node(policy)
        assert policy.tree.best_leaf == slow_leaf(policy.tree)
        return found

    monkeypatch.setattr(SmallBudget, "node", checked)
    for seed in range(6):
        model = MockModel(seed, answer=0.1, empty=0.1, error=0.03, unscored=0.05, repeat=0.3)
        policy = BgMcts(small=SmallBudget(backtrack=backtrack, reserve=reserve))
        search = Search(policy, 300 * (1 + seed), config=SearchConfig(step_tokens=20))
        for _ in range(2):
            while requests := search.outstanding() or search.ask(width):
                with contextlib.suppress(GenerationError):  # the model failed twice: the search goes on
                    request = random.Random(len(search.tree)).choice(requests)
                    search.tell(request, squeezed(model(request), least))
            search.resume(200)
        tree, saved = search.tree, SearchTree.from_dict(search.tree.to_dict())
        names = ("best_leaf", "score_count", "least", "greatest")
        assert [getattr(saved, name) for name in names] == [getattr(tree, name) for name in names]
    assert compared[0] > 500


@pytest.mark.parametrize("backtrack", [0.0, float("inf")])
def test_a_choice_does_not_look_at_every_node(backtrack: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes looked at over a whole search grow with its length and not with its square."""
    import specdec.search.small_budget as module

    looked = [0]
    for name in ("_extensible", "_is_leaf"):
        plain = getattr(module, name)

        def counted(tree: object, node: int, plain: object = plain) -> bool:
            looked[0] += 1
            return bool(plain(tree, node))  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    search = Search(BgMcts(small=SmallBudget(backtrack=backtrack)), 15_000, config=SearchConfig(step_tokens=20))
    drive(search, MockModel(1))
    assert len(search.tree) > 1500 and looked[0] < len(search.tree) ** 2 / 10


@pytest.mark.parametrize("least", [0.0, 0.9, 0.99])
def test_once_there_are_ten_scores_their_scale_does_not_matter(least: float) -> None:
    """Below 2 all went wrong, and nothing else is as much to be regretted, also where wrong is said by .9 and right by 1."""
    nodes = [(0, 0.8), (1, 0.9), (2, 0.1), (3, 0.0), (3, 0.1), (0, 0.5), (6, 1.0), (7, 0.6), (8, 0.6), (8, 0.5)]
    policy = BgMcts(small=SmallBudget(backtrack=float("inf")))
    search = Search(policy, 1000)
    grow(search, [(parent, least + (1 - least) * q) for parent, q in nodes])
    assert policy.small.node(search.tree, search.budget, policy.length) == slow_node(policy) == 2


@pytest.mark.parametrize("least", [0.0, 0.9])
def test_an_evaluator_that_says_one_thing_has_chains_followed_to_their_end(least: float) -> None:
    """Whatever it is: the deepest leaf is the next one, and of .2 it is not the prompt for ever."""
    policy = BgMcts(small=SmallBudget(backtrack=float("inf")))
    search = Search(policy, 1000)
    grow(search, [(0, least)] * 7 + [(7, least), (8, least), (9, least)])
    assert policy.small.node(search.tree, search.budget, policy.length) == slow_node(policy) == 10
