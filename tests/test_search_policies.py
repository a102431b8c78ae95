"""The other policies, the votes, and what they share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mock_search import MockModel, drive, fields, grow
from specdec.search import POLICIES, ROOT, Completion, Kind, NodeStatus, Request, Search, SearchConfig, SearchTree
from specdec.search.beam import Beam, Rebase, shares
from specdec.search.best_of_n import BestOfN
from specdec.search.bg_mcts import BgMcts
from specdec.search.chain_length import ChainLength
from specdec.search.policies import make_policy
from specdec.search.refinement import Refinement
from specdec.search.small_budget import STOP, WAIT, SmallBudget
from specdec.search.tree_bon import TreeBon
from specdec.search.vote import chain_score, rank_answers

NEVER = SmallBudget(first_dive=0, backtrack=0, finish=0)


def answer_all(search: Search, requests: list[Request], scores: dict[int, float] | None = None, **fields: object) -> None:
    """Tell every request a text of two tokens of its own; scores by the request's place."""
    for at, request in enumerate(requests):
        score = 0.5 if scores is None else scores[at]
        search.tell(request, Completion((request.node, 0), f"{request.node} ", score=score, **fields))  # type: ignore[arg-type]


class TestVote:
    ANSWERS = ((0, 0.9, "4"), (0, 0.8, "5"), (0, 0.7, "5"), (0, 0.1, "6"), (0, 0.1, "6"), (0, 0.1, "6"))

    @pytest.mark.parametrize(("rule", "best"), [("best", "4"), ("weighted", "5"), ("majority", "6"), ("auto", "5")])
    def test_rules(self, rule: str, best: str) -> None:
        search = Search(BgMcts(small=NEVER), 100)
        grow(search, self.ANSWERS)
        answers = rank_answers(search.tree, rule)
        assert answers[0].value == best
        assert {answer.value: answer.votes for answer in answers} == {"4": 1, "5": 2, "6": 3}
        assert {answer.value: round(answer.weight, 6) for answer in answers} == {"4": 0.9, "5": 1.5, "6": 0.3}

    def test_auto_is_the_best_of_two(self) -> None:
        search = Search(BgMcts(small=NEVER), 100)
        grow(search, [(0, 0.3, "5"), (0, 0.9, "4")])
        assert rank_answers(search.tree)[0].value == "4"

    def test_the_earliest_wins_a_tie(self) -> None:
        search = Search(BgMcts(small=NEVER), 100)
        grow(search, [(0, 0.5, "b"), (0, 0.5, "a")])
        for rule in ("best", "weighted", "majority"):
            assert rank_answers(search.tree, rule)[0].value == "b"

    @pytest.mark.parametrize(("how", "score"), [("last", 0.9), ("min", 0.5), ("mean", 0.7), ("product", 0.315)])
    def test_chain_scores(self, how: str, score: float) -> None:
        search = Search(BgMcts(small=NEVER), 100)
        grow(search, [(0, 0.5), (1, 0.7), (2, 0.9, "4")])
        assert chain_score(search.tree, 3, how) == pytest.approx(score)


class TestSmallBudget:
    LENGTH = ChainLength(steps=4, step_tokens=10)  # until told otherwise: chains of 40

    def search(self, budget: int, small: SmallBudget, nodes: list[tuple], used: int = 0) -> Search:
        search = Search(BgMcts(small=small), budget, config=SearchConfig(forced_tokens=0, length=self.LENGTH))
        grow(search, nodes)
        search.tree.step_tokens = 10 * search.tree.step_count  # steps of 10 tokens
        search.budget.used = used
        return search

    def choice(self, search: Search) -> int | None:
        return search.policy.small.node(search.tree, search.budget, self.LENGTH)  # type: ignore[attr-defined]

    def test_first_dive(self) -> None:
        dive = SmallBudget(first_dive=3, backtrack=0, finish=0)
        assert self.choice(self.search(119, dive, [])) == ROOT
        assert self.choice(self.search(119, dive, [(0, 0.1), (1, 0.0)])) == 2  # whatever it scores
        assert self.choice(self.search(120, dive, [(0, 0.1)])) is None  # three chains fit
        assert self.choice(self.search(119, dive, [(0, 0.1), (1, 0.5, "4")])) is None  # done
        search = self.search(119, dive, [(0, 0.1)])
        search.tree.reserve(1, Kind.STEP)
        assert self.choice(search) == WAIT

    def test_no_dive_where_backtrack_decides(self) -> None:
        both = SmallBudget(first_dive=3, backtrack=2, finish=0, reserve=0)
        assert self.choice(self.search(79, both, [(0, 0.1), (1, 0.1)])) == ROOT  # two chains do not fit
        assert self.choice(self.search(81, both, [(0, 0.1), (1, 0.1)])) == 2

    def test_a_single_chain_comes_first(self) -> None:
        single = SmallBudget(single_chain=1.2, backtrack=8)
        assert self.choice(self.search(47, single, [(0, 0.1), (1, 0.1)])) == 2

    def test_backtrack(self) -> None:
        """The example of the module: .9, .9, .1, .1 is taken up again after the second."""
        rule = SmallBudget(first_dive=0, backtrack=8, finish=0)
        chain = [(0, 0.9), (1, 0.9), (2, 0.1), (3, 0.1)]
        assert self.choice(self.search(300, rule, chain)) == 2
        assert self.choice(self.search(1000, rule, chain)) is None
        assert self.choice(self.search(300, rule, [(0, 0.9), (1, 0.9)])) == 2  # a leaf that promises is followed
        # 17 tokens left: only the last two nodes of a chain of (now) 5 can still be finished; the better one of these
        assert self.choice(self.search(300, replace(rule, reserve=0), [(0, 0.9), (1, 0.9), (2, 0.1), (3, 0.3)], used=283)) == 4
        assert self.choice(self.search(300, rule, [*chain, (4, 0.2, "4")], used=295)) == STOP
        assert self.choice(self.search(300, rule, chain, used=295)) == 4  # no answer yet: the deepest

    def test_the_first_answer_is_put_at_no_risk(self) -> None:
        """Chains of (now) 5 steps of 10: after the second node another third step leads to an answer for 30 tokens, so it takes 60."""
        rule, chain = SmallBudget(first_dive=0, backtrack=8, finish=0), [(0, 0.9), (1, 0.9), (2, 0.1), (3, 0.1)]
        assert self.choice(self.search(300, rule, chain, used=240)) == 2
        assert self.choice(self.search(300, rule, chain, used=241)) == 4  # 10 tokens to finish it
        assert self.choice(self.search(300, rule, [*chain, (4, 0.1, "4")], used=241)) == 2  # there is one

    def test_what_is_left_bounds_what_is_in_flight(self) -> None:
        rule, chain = SmallBudget(first_dive=0, backtrack=8, finish=0), [(0, 0.9), (1, 0.9), (2, 0.1), (3, 0.1)]
        one, two = (self.search(319, rule, chain, used=used) for used in (0, 0))
        one.tree.reserve(2, Kind.STEP)
        assert self.choice(one) != WAIT  # the rest holds two times two chains of 50
        two.tree.reserve(2, Kind.STEP)
        two.budget.used = 319 - 199
        assert self.choice(two) == WAIT
        two.policy.small = replace(rule, reserve=0)  # type: ignore[attr-defined]
        assert self.choice(two) != WAIT

    def test_finish(self) -> None:
        rule = SmallBudget(first_dive=0, backtrack=0, finish=1.3)
        leaves = [(0, 0.5), (1, 0.9), (0, 0.8)]  # dbar 4: finishing 2 costs 20, finishing 3 costs 30
        assert self.choice(self.search(1000, rule, leaves, used=900)) is None
        assert self.choice(self.search(1000, rule, leaves, used=974)) == 2
        assert self.choice(self.search(1000, rule, [*leaves, (3, 0.95)], used=981)) == 4
        assert self.choice(self.search(1000, rule, leaves, used=985)) == 2  # nothing fits: the deepest leaf
        answered = [(0, 0.5), (0, 0.9), (0, 0.9), (1, 0.5), (4, 0.5), (5, 0.5, "4")]
        assert self.choice(self.search(1000, rule, answered, used=985)) == STOP

    def test_off(self) -> None:
        assert self.choice(self.search(50, NEVER, [(0, 0.5)])) is None


def test_best_of_n() -> None:
    search = Search("best_of_n", 100, config=SearchConfig(forced_tokens=0))
    drive(search, MockModel(1, longest=3))
    assert all(search.tree.parent[node] == ROOT for node in range(1, len(search.tree)) if search.tree.kind[node] == Kind.FULL)
    three = Search(BestOfN(n=3), 10_000)
    answer_all(three, three.ask(8), finish="eos", answer="4")
    assert three.ask() == [] and three.result().answers[0].votes == 3


def test_best_of_n_continues_what_was_cut() -> None:
    search = Search("best_of_n", 100, config=SearchConfig(full_tokens=10, forced_tokens=0))
    (request,) = search.ask()
    search.tell(request, Completion((1,) * 10, "so", "length", 0.5))
    (rest,) = search.ask()
    assert (rest.parent, rest.kind, rest.full) == (request.node, Kind.CONTINUE, True)
    search.tell(rest, Completion((2,), " 4", "eos", 0.5, "4"))
    assert search.ask()[0].parent == ROOT


def test_refinement() -> None:
    search = Search(Refinement(rounds=2), 1000)
    parents = []
    for answer in ("3", "4", "5", "6"):
        (request,) = search.ask(4)  # one at a time
        parents.append((request.parent, request.kind))
        assert request.full
        search.tell(request, Completion((request.node,), answer, "eos", 0.5, answer))
        if len(parents) == 3:
            break
    assert parents == [(0, Kind.FULL), (1, Kind.REFINE), (2, Kind.REFINE)] and search.ask() == []
    other = Search("refinement", 1000)
    for _ in range(2):  # an end without an answer: a new chain
        (request,) = other.ask()
        other.tell(request, Completion((request.node,), "hm", "eos", 0.5))
        assert request.parent == ROOT


def test_beam() -> None:
    """Four texts a level; the best two get two each."""
    search = Search(Beam(samples=4, branch=2, small=NEVER), 10_000)
    first = search.ask(8)
    assert [request.parent for request in first] == [ROOT] * 4
    answer_all(search, first[:3], {0: 0.2, 1: 0.9, 2: 0.8})
    assert search.ask(8) == []  # the level is not complete
    answer_all(search, first[3:], {0: 0.1})
    assert [request.parent for request in search.ask(8)] == [2, 2, 3, 3]


def test_a_beam_that_is_done_begins_again() -> None:
    search = Search(Beam(samples=2, branch=2, small=NEVER), 10_000)
    answer_all(search, search.ask(8), answer="4", finish="eos")
    assert [request.parent for request in search.ask(8)] == [ROOT] * 2


def test_rebase() -> None:
    assert shares([1.0, 0.9, 0.2], 8, 0.2) == [5, 3, 0]
    assert shares([0.5, 0.5], 3, 0.2) == [2, 1] and shares([0.1], 4, 0.2) == [4]
    search = Search(Rebase(samples=8, small=NEVER), 10_000)
    requests = search.ask(8)
    answer_all(search, requests[:3], {0: 1.0, 1: 0.9, 2: 0.2})
    answer_all(search, requests[3:], answer="4", finish="eos")  # five chains are complete: three texts are left
    assert [request.parent for request in search.ask(8)] == [1, 1, 2]


def test_tree_bon() -> None:
    """Layers of steps, then full continuations of the kept ones."""
    search = Search(TreeBon(samples=4, branch=2, layers=2, small=NEVER), 10_000)
    for level in range(2):
        requests = search.ask(4)
        assert len(requests) == 4 and all(request.kind == Kind.STEP for request in requests), level
        answer_all(search, requests, {0: 0.9, 1: 0.1, 2: 0.8, 3: 0.2})
    requests = search.ask(4)
    assert [request.kind for request in requests] == [Kind.FULL] * 4 and len({request.parent for request in requests}) == 2


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "ab_mcts"])
def test_every_policy_answers_and_its_options_are_saved(name: str) -> None:
    search = Search(name, 800, config=SearchConfig(step_tokens=20))
    drive(search, MockModel(8), width=2)
    assert search.result().answer is not None
    row = fields(search)["header"]["policy"]  # type: ignore[index]
    assert make_policy(row["name"], row["options"]) == make_policy(name)
    data = search.tree.to_dict()
    assert SearchTree.from_dict(json.loads(json.dumps(data))).to_dict() == data  # bit for bit


def test_menu_errors() -> None:
    with pytest.raises(ValueError, match="policy must be one of bg_mcts, .* got 'astar'"):
        Search("astar")
    with pytest.raises(ValueError, match="policy 'beam' has no option 'width'; it has branch, samples, small"):
        make_policy("beam", {"width": 3})


class TestAbMcts:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "treequest", None)
        with pytest.raises(ImportError, match=r'pip install "specdec\[treequest\]"'):
            Search("ab_mcts", 100)

    def test_it_widens_refines_and_can_be_resumed(self, tmp_path: object) -> None:
        pytest.importorskip("treequest")
        runs = []
        for checkpoint in (None, f"{tmp_path}/run.json"):
            search = Search("ab_mcts", 3000, seed=2, checkpoint=checkpoint)
            drive(search, MockModel(3, longest=4), width=2, steps=None if checkpoint is None else 10)
            if checkpoint is not None:
                search = Search("ab_mcts", 3000, seed=2, checkpoint=checkpoint)
                drive(search, MockModel(3, longest=4), width=2)
            runs.append(fields(search))
        assert runs[0] == runs[1]
        kinds = [kind for kind, status in zip(search.tree.kind, search.tree.status) if status != NodeStatus.DROPPED]
        assert Kind.REFINE in kinds and kinds.count(Kind.FULL) > 1
