"""The hard budget: never exceeded by a token, whatever is asked, told, failed, cut or resumed."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from mock_search import MockModel, drive, fields
from specdec.search import POLICIES, Completion, GenerationError, Kind, Search, SearchConfig, Status
from specdec.search.budget import Budget

POLICIES_WITHOUT_EXTRA = [name for name in POLICIES if name != "ab_mcts"]


class TestLedger:
    def test_two_ledgers(self) -> None:
        """The example of the module: rho by expectation, grants by the caps."""
        budget = Budget(100, reserve=10)
        budget.used = 40
        budget.hold(0, max_tokens=30, expected=20.0)
        assert budget.rho == pytest.approx(0.4) and budget.available == 20 and budget.unreserved == 30
        budget.settle(
            0, 25, Completion((1,) * 25, "", prefill_tokens=7, cached_tokens=9, recomputed_tokens=2, evaluator_tokens=4)
        )
        meters = (budget.used, budget.prefill_tokens, budget.cached_tokens, budget.recomputed_tokens, budget.evaluator_tokens)
        assert meters == (65, 7, 9, 2, 4)
        assert budget.available == 25 and budget.rho == pytest.approx(0.35)

    def test_the_evaluator_in_the_same_budget(self) -> None:
        budget = Budget(100, count_evaluator=True, evaluator_max_tokens=30)
        assert budget.available == 70  # an evaluation must fit beside the text
        budget.hold(0, 20, 20.0)
        assert budget.available == 20
        budget.settle(0, 20, Completion((1,) * 20, "", evaluator_tokens=12))
        assert budget.used == 32 and budget.evaluator_tokens == 12
        with pytest.raises(ValueError, match="needs evaluator_max_tokens"):
            Budget(100, count_evaluator=True)

    def test_nothing_left_is_rho_0(self) -> None:
        assert Budget(0).rho == 0.0
        budget = Budget(10)
        budget.hold(0, 10, 10.0)
        assert budget.rho == 0.0 and budget.available == 0

    @pytest.mark.parametrize("total", [-1, float("nan"), float("inf"), 2.5, True])
    def test_bad_totals(self, total: float) -> None:
        with pytest.raises(ValueError, match="budget must be a whole number of tokens >= 0"):
            Search(budget=total)  # type: ignore[arg-type]


def one_run(seed: int) -> None:
    """A random policy, model, batch width, order of results and set of limits."""
    rng = random.Random(seed)
    chances = {name: rng.choice([0.0, 0.0, 0.2]) for name in ("end", "empty", "error", "unscored", "repeat")}
    model = MockModel(seed, answer=rng.choice([0.0, 0.1, 0.4]), longest=rng.choice([1, 8, 40]), **chances)
    count = rng.random() < 0.3
    config = SearchConfig(
        step_tokens=rng.choice([1, 7, 256]),
        full_tokens=rng.choice([None, 30]),
        forced_tokens=rng.choice([0, 5, 32]),
        deterministic=rng.random() < 0.1,
        duplicates=rng.choice(["merge", "ignore", "resample", "keep"]),
        context_window=rng.choice([None, None, 60]),
        count_evaluator=count,
        evaluator_max_tokens=3 if count else None,
    )
    budget = rng.choice([0, 1, 3, 17, 80, 300])
    search = Search(rng.choice(POLICIES_WITHOUT_EXTRA), budget, config=config)
    order = rng if rng.random() < 0.5 else None
    for extra in (0, rng.choice([0, 13])):
        search.resume(extra)
        budget += extra
        while True:
            try:
                drive(search, model, rng.choice([1, 2, 5]), order)
                break
            except GenerationError as error:
                assert error.result.used <= budget
    result = search.result()
    assert result.used <= budget
    charged = sum(search.tree.tokens) + (sum(search.tree.evaluator_tokens) if count else 0)
    assert charged == result.used == search.budget.used
    assert search.budget.in_flight == 0 and search.tree.virtual[0] == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_400_random_runs_stay_within_the_budget() -> None:
    for seed in (*range(400), 4478):  # 4478: several retries that nothing is left for
        one_run(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_10000_random_runs_stay_within_the_budget() -> None:
    for seed in range(10_000):
        one_run(seed)


def test_telling_more_than_was_granted_raises() -> None:
    search = Search("best_of_n", 10, config=SearchConfig(forced_tokens=0))
    (request,) = search.ask()
    assert request.max_tokens == 10
    with pytest.raises(ValueError, match=r"request 0 allows 10 tokens, got 11 .* fix: stop at request.max_tokens"):
        search.tell(request, Completion((1,) * 11, "x"))
    with pytest.raises(ValueError, match="got 3 generated for 4 token_ids"):
        search.tell(request, Completion((1,) * 4, "x", generated=3))
    search.tell(request, Completion((1,) * 4, "x", "stop", 0.5, generated=6))  # two were cut at the stop string
    assert search.budget.used == 6
    with pytest.raises(ValueError, match="request 0 is not outstanding"):
        search.tell(request, Completion((1,), "x"))


def test_a_request_waits_rather_than_being_cut_by_those_in_flight() -> None:
    search = Search("bg_mcts", 100, config=SearchConfig(step_tokens=40, forced_tokens=0))
    search.policy.small = type(search.policy.small)(first_dive=0, backtrack=0, finish=0)
    assert [request.max_tokens for request in search.ask(5)] == [40, 40]


def test_the_wall_clock_limit() -> None:
    now = [0.0]
    search = Search("best_of_n", 10**6, config=SearchConfig(seconds=5.0), clock=lambda: now[0])
    (request,) = search.ask()
    now[0] = 6.0
    search.tell(request, Completion((1, 2), "4", "eos", 0.5, "4"))
    assert search.ask() == []
    assert search.result().status == Status.ANSWERED


def test_the_forced_answer_comes_after_the_wall_clock_limit(tmp_path: Path) -> None:
    """Its tokens were set aside for that; and a search whose time is up goes on with more of it, after a crash too."""
    now = [0.0]

    def reopened() -> Search:
        config = SearchConfig(seconds=5.0)
        return Search("mcts", 1000, config=config, checkpoint=tmp_path / "run.json", clock=lambda: now[0])

    search = reopened()
    first, second = search.ask(2)
    now[0] = 6.0
    search.tell(first, Completion((1, 2), "2 + 2", "stop", 0.5))
    assert search.ask() == [], "one is in flight"
    search.tell(second, Completion((3, 4), "2 - 2", "stop", 0.4))
    (forced,) = search.ask(2)
    assert (forced.kind, forced.parent) == (Kind.FORCED, first.node)
    search.tell(forced, Completion((5,), "4", "eos", answer="4"))
    assert search.ask() == [] and search.result().answer == "4"
    with pytest.raises(ValueError, match=r"seconds must be >= 0 or None, got -1"):
        search.resume(seconds=-1.0)
    search.resume(100, seconds=2.0)
    assert fields(reopened()) == fields(search)
    (more,) = search.ask()
    assert more.kind == Kind.STEP
    search.close()
    now[0] = 7.0
    assert not reopened().budget.expired
    now[0] = 8.0
    assert search.budget.expired
    search.resume()
    assert search.budget.expired, "no more of anything"
    search.resume(1)
    assert not search.budget.expired and search.budget.seconds == 8.0 + 5.0


def test_resume_raises_rho() -> None:
    search = Search("bg_mcts", 50, config=SearchConfig(step_tokens=10, forced_tokens=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drive(search, MockModel(1, answer=0.0, end=0.0, longest=10))
        used = search.budget.used
        search.resume(50)
        assert search.budget.total == 100 and search.budget.rho == pytest.approx(1 - used / 100)
        drive(search, MockModel(1, answer=0.0, end=0.0, longest=10))
    assert used < search.budget.used <= 100
    with pytest.raises(ValueError, match="extra must be a whole number"):
        search.resume(-1)
