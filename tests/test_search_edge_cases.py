"""search.md 5.4, one test a line of it, named after it."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from mock_search import MockModel, drive, fields, grow
from specdec.search import (
    POLICIES,
    ROOT,
    Closed,
    Completion,
    GenerationError,
    Kind,
    NodeStatus,
    Request,
    Search,
    SearchConfig,
    Status,
)
from specdec.search.bg_mcts import BgMcts
from specdec.search.checkers import Countdown, Puzzle
from specdec.search.loop import evaluated, run
from specdec.search.mcts import Mcts
from specdec.search.policies import make_policy
from specdec.search.small_budget import SmallBudget
from specdec.search.vote import chain_score

OFF = SmallBudget(first_dive=0, backtrack=0, finish=0)


def text(request: Request, words: str = "", count: int = 5, **fields: object) -> Completion:
    """A step of `count` tokens that only this request has."""
    fields = {"score": 0.5, **fields}
    return Completion((request.node,) * min(count, request.max_tokens), words or f"{request.node} ", **fields)  # type: ignore[arg-type]


def plain(budget: int = 1000, **options: object) -> Search:
    """BG-MCTS by selection alone."""
    return Search(BgMcts(small=OFF), budget, config=SearchConfig(**options))  # type: ignore[arg-type]


def test_budget_0() -> None:
    search = Search("bg_mcts", 0)
    assert search.ask() == []
    result = search.result()
    assert (result.status, result.used, result.answer, result.node) == (Status.NO_ANSWER, 0, None, ROOT)


@pytest.mark.parametrize("answer", [None, "4"])
def test_budget_smaller_than_one_step(answer: str | None) -> None:
    search = Search("bg_mcts", 10)
    (request,) = search.ask()
    assert request.max_tokens == 10
    search.tell(request, text(request, count=10, finish="length", answer=answer))
    assert search.ask() == []
    assert (search.result().status, search.result().answer, search.result().used) == (Status.TRUNCATED, answer, 10)


def test_a_step_cut_by_max_tokens_is_continued_at_the_same_depth() -> None:
    search = Search(BgMcts(small=OFF, k=1), 1000, config=SearchConfig(step_tokens=5))
    (first,) = search.ask()
    search.tell(first, text(first, "2 + ", finish="length", score=0.9))
    search.tree.child_sum[ROOT] = 0.0  # or widening at the root would win
    (rest,) = search.ask()
    assert (rest.parent, rest.kind) == (first.node, Kind.CONTINUE)
    search.tell(rest, text(rest, "2 = 4"))
    assert search.tree.depth[first.node] == search.tree.depth[rest.node] == 1
    assert search.tree.steps(rest.node) == ["2 + 2 = 4"]


@pytest.mark.parametrize("counts", [True, False])
def test_a_cut_step_with_an_answer(counts: bool) -> None:
    search = plain(truncated_answers=counts)
    (request,) = search.ask()
    search.tell(request, text(request, finish="length", answer="4"))
    assert search.tree.status[request.node] == (NodeStatus.ANSWERED if counts else NodeStatus.OPEN)
    assert search.result().status == Status.TRUNCATED


def test_an_empty_text_needs_no_score() -> None:
    search = plain()
    (request,) = search.ask()
    assert not search.needs_score(request, (), "") and not search.needs_score(request, (9,), " \n")
    assert search.needs_score(request, (9,), "x")


def test_empty_steps_are_charged_and_close_the_node() -> None:
    search = plain(100)
    while requests := search.ask():
        search.tell(requests[0], Completion((), ""))
    assert search.budget.used == 2 and search.tree.closed[ROOT] == Closed.EMPTY  # one token each, two running
    assert search.result().status == Status.NO_ANSWER
    inner = plain(100)
    grow(inner, [(0, 0.9), (0, 0.1)])
    for _ in range(2):
        request = inner.ask()[0]
        assert request.parent == 1
        inner.tell(request, Completion((7,), "  "))
    assert inner.tree.closed[1] == Closed.EMPTY and not inner.tree.closed[ROOT]


def test_eos_inside_a_step() -> None:
    search = plain()
    first, second = search.ask(2)
    search.tell(first, text(first, finish="eos", score=0.8))
    search.tell(second, text(second, finish="eos", answer="4"))
    tree = search.tree
    assert (tree.status[first.node], tree.closed[first.node], tree.q[first.node]) == (NodeStatus.ENDED, Closed.ENDED, 0.8)
    assert tree.status[second.node] == NodeStatus.ANSWERED
    assert [answer.votes for answer in search.result().answers] == [1]


@pytest.mark.parametrize("rule", ["merge", "ignore", "resample", "keep"])
def test_duplicate_siblings(rule: str) -> None:
    search = plain(duplicates=rule)
    first, second = search.ask(2)
    search.tell(first, Completion((5, 6), "same", score=0.8))
    assert search.needs_score(second, (5, 6), "same") is (rule == "keep")
    search.tell(second, Completion((5, 6), "same", score=0.8))
    tree = search.tree
    if rule == "resample":
        (again,) = search.ask()
        assert (again.node, again.parent, again.retry, again.stream) == (second.node, ROOT, 1, (second.node, 1))
        search.tell(again, Completion((5, 6), "same", score=0.8))
    nodes = 2 if rule == "keep" else 1
    visits = {"merge": 2, "ignore": 1, "resample": 2, "keep": 1}[rule]
    assert len(tree.children[ROOT]) == nodes and tree.visits[first.node] == visits
    assert tree.sum_q[first.node] / visits == pytest.approx(0.8)  # the mean is not diluted
    assert search.budget.used == (6 if rule == "resample" else 4)
    assert tree.draws[ROOT] == 2


def test_deterministic_sampling_draws_nothing_twice() -> None:
    search = plain(200, deterministic=True)
    model = MockModel(1, answer=0.0, end=0.0)
    drive(search, model, width=4)
    assert all(len(children) <= 1 for children in search.tree.children)
    assert len(search.tree) > 5


def test_ties() -> None:
    """(score, higher depth, fewer tokens, lower id); GEN against a child: GEN from rho 1/2 on, else the child."""
    search = plain()
    grow(search, [(0, 0.5), (0, 0.5)])
    assert search.policy._best_child(ROOT, 1.0, 6.0, set())[0] == 1
    search.tree.tokens[1] = 9
    assert search.policy._best_child(ROOT, 1.0, 6.0, set())[0] == 2
    search.tree.depth[1] = 3
    assert search.policy._best_child(ROOT, 1.0, 6.0, set())[0] == 1
    policy = search.policy
    assert policy._wins(0.5, 0.5, rho=0.5) and not policy._wins(0.5, 0.5, rho=0.49)
    assert BgMcts(gen_tie="gen")._wins(0.5, 0.5, rho=0.0)


def test_one_child() -> None:
    """P = 1, variance = 0."""
    search = plain()
    grow(search, [(0, 0.7), (1, 0.6)])
    assert search.policy._widening_score(1, 1.0) == pytest.approx(0.6)
    explore = math.sqrt(2 * math.log(2)) / search.tree.child_exp[1]
    assert search.policy._few_scores([2], 0.0, explore) == [pytest.approx(0.6 + math.sqrt(2 * math.log(2)))]


def test_no_visits_no_logarithm() -> None:
    search = plain()
    assert search.policy._log_visits(ROOT) == 0.0
    assert Search(Mcts(), 10).policy._log_visits(ROOT) == 0.0


def test_all_children_closed() -> None:
    """The node is closed, selection starts again; a closed root ends the search with the best answer."""
    search = Search(BgMcts(small=OFF, child_cap=2, root_cap=2), 1000)
    grow(search, [(0, 0.9), (0, 0.2), (1, 0.9, "4"), (1, 0.8, "5")])
    assert search.tree.closed[1] == Closed.EXHAUSTED and search.ask()[0].parent == 2
    other = Search(BgMcts(small=OFF, child_cap=2, root_cap=2), 1000)
    grow(other, [(0, 0.9, "4"), (0, 0.2, "5")])
    assert other.tree.closed[ROOT] and other.ask() == []
    assert other.result().answer == "4"


def test_an_evaluator_out_of_range_is_clamped_with_one_warning() -> None:
    search = plain()
    with pytest.warns(UserWarning, match=r"outside \[0, 1\]: clamped") as caught:
        for score in (1.7, -3.0):
            (request,) = search.ask()
            search.tell(request, text(request, score=score))
    assert search.tree.q[1:].tolist() == [1.0, 0.0] and len(caught) == 1
    assert len(search.result().notes) == 1


def test_an_evaluator_that_fails() -> None:
    """Tried twice, then the parent's q (the root's is .5) and `unscored`: no part of variance, no weight in votes."""
    search = plain(max_failures=0)
    calls = []

    def score(steps: list[str]) -> float:
        calls.append(steps)
        raise ValueError("no verdict")

    (request,) = search.ask()
    search.tell(request, evaluated(search, request, text(request, score=None), score))
    assert len(calls) == 2 and search.tree.unscored[1] and search.tree.q[1] == 0.5
    grow(search, [(0, 0.9, "4"), (1, 0.8)])
    (below,) = [r for r in search.ask(4) if r.parent == 1][:1] or search.ask()
    search.tell(below, text(below, score=math.nan, answer="5"))
    assert search.tree.q[below.node] == search.tree.q[below.parent] and search.tree.unscored[below.node]
    assert search.tree.child_count[ROOT] == 1
    weights = {answer.value: answer.weight for answer in search.result().answers}
    assert weights["5"] == 0.0 and weights["4"] == 0.9


def test_an_evaluator_that_recovers_at_the_second_call() -> None:
    search = plain()
    (request,) = search.ask()
    answers = iter([math.nan, 0.7])
    assert evaluated(search, request, text(request, score=None), lambda steps: next(answers)).score == 0.7


def test_three_failures_in_a_row_hand_over_to_best_of_n() -> None:
    search = plain(300)
    with pytest.warns(UserWarning, match="3 evaluations failed in a row"):
        drive(search, MockModel(2, unscored=1.0))
    full = [node for node in range(len(search.tree)) if search.tree.full[node]]
    assert len(full) >= 2 and all(search.tree.parent[node] == ROOT for node in full if search.tree.kind[node] == Kind.FULL)
    result = search.result()
    assert "best-of-n" in result.notes[0]
    assert result.answers[0].votes == max(answer.votes for answer in result.answers)


def test_a_saturated_evaluator() -> None:
    search = plain(10_000)
    assert search.policy._widening_score(ROOT, 1.0) == 0.5
    with pytest.warns(UserWarning, match="last 32 scores are all about 0.970"):
        for _ in range(32):
            (request,) = search.ask()
            search.tell(request, text(request, score=0.97))
    node = search.tree.parent[request.node]
    assert search.policy._widening_score(node, 1.0) > 0.97 + 0.1  # gen_bonus is on from here


def test_the_model_fails() -> None:
    """Charge what it returned, once more with another stream, then raise with the partial result; the search can go on."""
    search = plain()
    (request,) = search.ask()
    search.tell(request, Completion((), "", error="out of memory", generated=3))
    (again,) = search.ask()
    assert (again.node, again.stream) == (request.node, (request.node, 1)) and search.budget.used == 3
    with pytest.raises(GenerationError, match="failed twice on request 1: out of memory") as caught:
        search.tell(again, Completion((), "", error="out of memory"))
    assert caught.value.result.used == 4 and search.tree.pending[ROOT] == 0
    assert search.ask()[0].parent == ROOT


def test_cancel() -> None:
    search = plain()
    first, second = search.ask(2)
    search.cancel()
    assert search.ask() == [] and search.result().status == Status.CANCELLED
    search.tell(first, text(first))  # what was in flight is not lost
    search.resume()
    assert search.outstanding() == [second] and search.ask()


def test_a_cancelled_search_goes_on_as_if_it_had_not_been() -> None:
    """Near the end too, where the reserve for a forced answer would no longer be set aside anew."""
    search = plain(100, step_tokens=60, forced_tokens=15)
    (request,) = search.ask()
    search.tell(request, text(request, count=60))
    assert search.budget.available == 100 - 60 - 15
    search.cancel()
    search.resume()
    assert search.budget.available == 100 - 60 - 15


def test_budget_exhausted_amid_a_queue() -> None:
    """The second sibling is dropped, and no empty node stands in for it."""
    search = plain(10, step_tokens=10, forced_tokens=0)
    (request,) = search.ask(4)
    search.tell(request, text(request, count=10))
    assert search.ask() == [] and len(search.tree) == 2 and search.tree.draws[ROOT] == 1


def test_the_context_window() -> None:
    search = plain(1000, prompt_tokens=50, context_window=80, step_tokens=20)
    first, second = search.ask(2)
    search.tell(first, text(first, count=10))  # 50 + 10 + 20 fits
    search.tell(second, text(second, count=11))
    assert not search.tree.closed[first.node] and search.tree.closed[second.node] == Closed.TOO_LONG
    nowhere = plain(1000, prompt_tokens=80, context_window=80)
    with pytest.warns(UserWarning, match="the prompt of 80 tokens fills the context window"):
        assert nowhere.ask() == [] and nowhere.tree.closed[ROOT] == Closed.TOO_LONG
    assert nowhere.result().notes


def test_requests_in_flight_fit_together() -> None:
    search = Search("best_of_n", 1000, config=SearchConfig(forced_tokens=30))
    requests = search.ask(8)
    assert 1 <= len(requests) <= 8
    assert sum(request.max_tokens for request in requests) <= 1000 - 30
    assert search.budget.rho < 0.9  # what they are expected to cost is spent already


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_chain_of_1200_steps_is_saved_and_read(tmp_path: object) -> None:
    """No recursion anywhere."""
    search = Search(BgMcts(small=OFF, k=1), 10**6, checkpoint=f"{tmp_path}/run.json")
    grow(search, [(i, 0.5) for i in range(1200)])
    search.close()
    again = Search.load(f"{tmp_path}/run.json")
    assert again.tree.to_dict() == search.tree.to_dict() and len(again.tree.steps(1200)) == 1200
    assert again.tree.to_networkx().number_of_nodes() == 1201


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("deep", [False, True])
def test_100_000_nodes_and_a_chain_of_10_000(deep: bool, tmp_path: Path) -> None:
    """Built, selected from, written and read; the statistics are those of a count from the leaves up, nothing recurses."""
    rng, count = random.Random(1), 10_000 if deep else 100_000
    search = Search(
        BgMcts(small=OFF, k=1, child_cap=1 if deep else None, root_cap=1 if deep else None),
        10**9,
        checkpoint=tmp_path / "run.json",
    )
    parents = [node if deep else rng.randrange(node + 1) for node in range(count)]
    grow(search, [(parent, rng.random()) for parent in parents])
    tree = search.tree
    sizes, sums = [1] * (count + 1), [0.0, *tree.q[1:]]
    for node in range(count, 0, -1):
        sizes[parents[node - 1]] += sizes[node]
        sums[parents[node - 1]] += sums[node]
    assert list(tree.visits) == sizes and tree.sum_q == pytest.approx(sums)
    asked = search.ask(20)
    assert len(asked) >= 1
    search.close()
    again = Search.load(tmp_path / "run.json")
    assert fields(again) == fields(search) and again.outstanding() == asked
    for each in (search, again):
        each.tell(asked[0], text(asked[0], finish="eos", answer="4"))
    assert fields(again) == fields(search) and again.ask(3) == search.ask(3)
    assert len(tree.steps(asked[0].node)) == tree.depth[asked[0].node]
    if deep:
        assert tree.depth[asked[0].node] == 10_001 and tree.closed[1] == Closed.EXHAUSTED, "closed from the leaf up"


def test_a_forced_answer() -> None:
    """The reserve is kept while there is no answer, asked for at the very end below the best leaf, and marks the result."""
    search = plain(200, step_tokens=50, forced_tokens=32)
    requests = []
    while asked := search.ask():
        (request,) = asked
        requests.append(request)
        if request.kind == Kind.FORCED:
            break
        search.tell(request, text(request, count=50))
    assert request.kind == Kind.FORCED and request.full and request.max_tokens == 32
    assert search.tree.depth[request.parent] == search.tree.deepest
    assert not search.needs_score(request, (1,), "4")
    search.tell(request, text(request, "4", count=3, score=None, finish="eos", answer="4"))
    result = search.result()
    assert (result.status, result.answer, result.score) == (Status.TRUNCATED, "4", None)
    assert search.tree.visits[request.parent] == 1  # not part of the statistics


def test_a_regular_answer_beats_a_forced_one() -> None:
    search = plain(200, step_tokens=50)
    grow(search, [(0, 0.9), (1, 0.1, "5")])
    node = search.tree.reserve(1, Kind.FORCED)
    search.tree.settle(node, 1, Completion((9,), "4", answer="4"), NodeStatus.ANSWERED, None)
    assert [answer.value for answer in search.result().answers] == ["5"]


def test_run_checks_its_completions() -> None:
    with pytest.raises(ValueError, match="got 1 requests and returned 0 completions"):
        run(plain(), lambda requests: [])


def test_bad_input_to_ask_and_tell() -> None:
    search = plain()
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        search.ask(0)
    (request,) = search.ask()
    with pytest.raises(ValueError, match="prefill_tokens must be >= 0"):
        search.tell(request, text(request, prefill_tokens=-1))
    with pytest.raises(ValueError, match="is not a valid Finish"):
        search.tell(request, text(request, finish="bored"))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="duplicates must be one of"):
        SearchConfig(duplicates="maybe")


# ---- what an evaluator is given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [BgMcts(small=OFF, k=1), "best_of_n"])
def test_a_cut_step_is_judged_with_the_piece_that_it_goes_on_with(policy: object) -> None:
    """A number that was cut is no wrong number, and the pieces on either side of the cut are one step, in votes too."""
    puzzle, checker = Puzzle((3, 5, 7), 26), Countdown()
    search = Search(policy, 1000, config=SearchConfig(step_tokens=5, full_tokens=5, chain_score="product"))  # type: ignore[arg-type]
    texts = ["3 * 7 = 2", "1 (left: 5, 2", "1)", "\n21 + 5 = 26 (left: 26)"]
    seen: list[list[str]] = []

    def score(steps: list[str]) -> float:
        seen.append(steps)
        return checker(puzzle, steps)

    for count, words in enumerate(texts):
        (request,) = search.ask()
        assert request.kind == (Kind.CONTINUE if 0 < count < 3 or (count and request.full) else request.kind)
        cut = "length" if count < 2 or (request.full and count < 3) else "stop"
        answer = "26" if count == 3 else None
        told = evaluated(search, request, text(request, words, finish=cut, answer=answer, score=None), score)
        assert told.score == 1.0, (words, seen[-1])
        search.tell(request, told)
        search.tree.child_sum[ROOT] = 0.0  # or widening at the root would win
    whole = "".join(texts)
    assert seen[-1] == ([whole] if request.full else ["".join(texts[:3]), texts[3]])
    assert [answer.weight for answer in search.result().answers] == [1.0]


def test_a_score_of_a_cut_piece_is_no_score_of_a_step() -> None:
    search = plain()
    for parent, kind, q, answer in [(0, Kind.STEP, 0.1, None), (1, Kind.CONTINUE, 0.8, None), (2, Kind.STEP, 0.5, "4")]:
        node = search.tree.reserve(parent, kind)
        status = NodeStatus.OPEN if answer is None else NodeStatus.ANSWERED
        search.tree.settle(node, 1, Completion((node,), "x", answer=answer), status, q)
    assert search.tree.step_ends(3) == [2, 3] and search.tree.step_ends(1) == [1] and search.tree.step_ends(ROOT) == []
    assert [chain_score(search.tree, 3, how) for how in ("last", "min", "product")] == [0.5, 0.5, 0.4]


def test_a_word_that_was_cut_is_not_judged() -> None:
    search = plain()
    (request,) = search.ask()

    def judged(words: str, **fields: object) -> str:
        return search.to_score([request], [text(request, words, **fields)])[0][0]

    assert judged("3 * 7 = 2") == "3 * 7 = 2", "it was not cut"
    assert judged("3 * 7 = 2", finish="length") == "3 * 7 = "
    assert judged("3 * 7 = ", finish="length") == "3 * 7 = "
    assert judged("3*7=2", finish="length") == "3*7=2", "there is nothing else"
    assert judged(r"so \\boxed{21}", finish="length", answer="21") == r"so \\boxed{21}"


@pytest.mark.parametrize("rule", ["merge", "ignore", "resample", "keep"])
def test_equal_siblings_of_a_batch_are_judged_once(rule: str, tmp_path: Path) -> None:
    """Whether a crash comes between their tells or not."""

    def opened(file: str) -> Search:
        return Search(BgMcts(small=OFF), 1000, config=SearchConfig(duplicates=rule), checkpoint=tmp_path / file)

    def scored(search: Search, requests: list[Request]) -> list[Completion]:
        made = [Completion((5, 6), "same") for _ in requests]
        places = search.to_score(requests, made)
        return [replace(each, score=0.8, evaluator_tokens=7) if at in places else each for at, each in enumerate(made)]

    whole, cut = opened("whole"), opened("cut")
    requests = whole.ask(2)
    for request, completion in zip(requests, scored(whole, requests)):
        whole.tell(request, completion)
    first, _ = cut.ask(2)
    cut.tell(first, scored(cut, requests)[0])
    cut = opened("cut")
    (second,) = cut.outstanding()
    cut.tell(second, scored(cut, [second])[0])
    assert fields(cut) == fields(whole)
    assert whole.budget.evaluator_tokens == (14 if rule == "keep" else 7)


# ---- the hand-over to best-of-n ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("greedy", "best_of_n")])
def test_every_policy_can_hand_over_to_best_of_n(policy: str, width: int, tmp_path: Path) -> None:
    """It spends the budget on texts of its own: no cap of the old policy stops it, no text that has ended is continued."""
    if policy == "ab_mcts":
        pytest.importorskip("treequest")
    config = SearchConfig(forced_tokens=0, step_tokens=20)
    search = Search(policy, 3000, config=config, checkpoint=tmp_path / "run.json")
    drive(search, MockModel(2, unscored=1.0, answer=0.3), width)
    tree = search.tree
    assert any("best-of-n" in note for note in search.result().notes)
    assert 2900 < search.budget.used <= 3000
    fresh = [node for node in range(1, len(tree)) if tree.kind[node] == Kind.FULL and tree.parent[node] == ROOT]
    assert len(fresh) > 50
    continued = [tree.parent[node] for node in range(1, len(tree)) if tree.kind[node] == Kind.CONTINUE]
    assert all(tree.truncated[node] for node in continued) and len(set(continued)) == len(continued)
    votes = sum(answer.votes for answer in search.result().answers)
    assert votes <= len(fresh) + 20, "one vote a text"
    again = Search(policy, 3000, config=config, checkpoint=tmp_path / "run.json")
    assert fields(again) == fields(search) and again.ask() == []


def test_other_rules_open_and_close_nodes() -> None:
    tree = Search(BgMcts(small=OFF, child_cap=2, root_cap=2, refine=True), 1000)
    grow(tree, [(0, 0.9), (0, 0.2), (1, 0.9), (1, 0.8), (2, 0.5, "4")])
    nodes = tree.tree
    for node in (3, 4):
        nodes.close(node, Closed.ENDED)
    assert nodes.closed[1] == Closed.EXHAUSTED and nodes.live[ROOT] == [2] and nodes.live[2] == [5]
    nodes.set_rules(1, None, False)
    assert (
        nodes.closed[5] == Closed.ANSWERED and nodes.closed[2] == Closed.EXHAUSTED == nodes.closed[1] and not nodes.closed[ROOT]
    )
    nodes.set_rules(3, 2, False)
    assert not nodes.closed[1] and not nodes.closed[2] and nodes.live[ROOT] == [1, 2] and nodes.closed_count == 3
    nodes.set_rules(1, 2, False)
    assert nodes.closed[ROOT] == Closed.EXHAUSTED
    nodes.set_rules(1, None, False)
    assert not nodes.closed[ROOT]


# ---- cues and the window ----------------------------------------------------------------------------------------------------------


def test_cues_fill_the_window_too() -> None:
    config = SearchConfig(prompt_tokens=50, context_window=100, cue_tokens=15, forced_tokens=30)
    search = Search("refinement", 1000, config=config)
    (request,) = search.ask()
    assert request.max_tokens == 50
    search.tell(request, text(request, count=10, finish="eos", answer="4"))
    (request,) = search.ask()
    assert request.kind == Kind.REFINE and request.max_tokens == 100 - 50 - 10 - 15
    search.tell(request, text(request, count=5, finish="length"))
    (request,) = search.ask()
    assert request.kind == Kind.CONTINUE and request.max_tokens == 100 - 50 - 10 - 15 - 5
    search.tell(request, text(request, count=5, finish="eos", answer="5"))
    assert search.tree.closed[request.node] == Closed.TOO_LONG, "15 tokens are left, and the cue takes them"
    assert search.ask()[0].parent == ROOT


def test_a_forced_answer_leaves_room_for_its_cue() -> None:
    config = SearchConfig(prompt_tokens=50, context_window=99, cue_tokens=15, forced_tokens=30, step_tokens=25)
    search = Search(BgMcts(small=OFF, k=1, child_cap=1, root_cap=1), 1000, config=config)
    (request,) = search.ask()
    search.tell(request, text(request, count=25))  # no room for a step of 25
    (request,) = search.ask()
    assert request.kind == Kind.FORCED and request.max_tokens == 99 - 50 - 25 - 15


# ---- steps that say nothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["beam", "rebase", "tree_bon"])
def test_levels_draw_nothing_below_a_node_that_has_nothing_to_say(policy: str) -> None:
    search = Search(make_policy(policy, {"samples": 4}), 10_000)
    for request in search.ask(4):
        search.tell(request, text(request, score=1.0 if request.node == 1 else 0.0))
    empty = [0]
    for _ in range(20):
        (request,) = search.ask()
        if request.parent == 1:
            empty[0] += 1
            search.tell(request, Completion((), ""))
        else:
            search.tell(request, text(request))
    assert empty[0] == 2 and search.tree.closed[1] == Closed.EMPTY
