"""Evaluators: exact checkers against brute force, model scores against plain forwards, failures, combinators."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from collections.abc import Sequence as Seq
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

import tiny_models
from conftest import make_tiny_llama
from specdec import Engine
from specdec.search.answers import NumberAnswers
from specdec.search.arithmetic import evaluate, literals, reachable
from specdec.search.checkers import DEAD_END, ChainArithmetic, Countdown, Puzzle, is_solution, read_puzzle
from specdec.search.evaluators import (
    Evaluator,
    Item,
    Judge,
    Outcome,
    Score,
    as_score,
    cached,
    mean,
    minimum,
    noisy,
    product,
    score_all,
    timeout,
    weighted,
)  # fmt: skip
from specdec.search.model_evaluators import LogProbability, RewardModel, Rollouts, SelfConsistency, YesNo
from specdec.search.prompts import Prompts
from specdec.segments import BLOCK, TextStore
from worker_functions import Priced, slow_evaluator

# ---- arithmetic -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(1,200 + 0.5) × 2", Fraction(2401)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-(3 − 4) ÷ 2", Fraction(1, 2)),
        ("[1 + 2] * .5", Fraction(3, 2)),
        ("$5 + $3", Fraction(8)),
        (r"\left(2 \times 3\right) \div 4", Fraction(3, 2)),
    ],
)
def test_arithmetic_is_exact(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "2 ** 999999999", "9 ** 9 ** 9", "1 // 2", "5 % 2", "1 < 2", "x + 1", "(1, 2)", "()", "",
        "1 / 0", "1 / (2 - 2)", "3(4)", "1 2", "1e9999", "[1 for _ in 2]", "(lambda: 1)()", "1 if 1 else 2", "'a' * 9", "1j", "0x10",
        "(" * 10_000, "(" * 150, "9" * 10_000, "1;2", "1\n+2", "1_000", "٣ + ٤", "1 + \x00 2", "...", "--" * 90,
    ],
)  # fmt: skip
def test_only_arithmetic_is_read(text: str) -> None:
    with pytest.raises(ValueError, match="arithmetic|divides|allowed"):
        evaluate(text)
    if not text.startswith("1 /"):
        with pytest.raises(ValueError, match="arithmetic|allowed"):
            literals(text)


def brute_force(numbers: list[Fraction]) -> set[Fraction]:
    """Every value of all of the numbers, by all ways to join two of them."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set()):
            found |= brute_force([*rest, value])
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 9), min_size=1, max_size=4), st.integers(-30, 60))
def test_reachable_is_brute_force(numbers: list[int], target: int) -> None:
    given_numbers = tuple(map(Fraction, numbers))
    subsets = [list(s) for size in range(1, len(numbers) + 1) for s in itertools.combinations(given_numbers, size)]
    assert reachable(given_numbers, Fraction(target), use_all=True) == (target in brute_force(list(given_numbers)))
    assert reachable(given_numbers, Fraction(target)) == any(target in brute_force(subset) for subset in subsets)


def test_reachable_has_a_limit() -> None:
    assert reachable(tuple(map(Fraction, (3, 3, 8, 8))), Fraction(24), use_all=True)  # 8 / (3 - 8 / 3)
    with pytest.raises(ValueError, match="at most 6"):
        reachable((Fraction(1),) * 7, Fraction(1))


# ---- checkers -------------------------------------------------------------------------------------------------------------------

PUZZLE = Puzzle((3, 5, 7), 26)


@pytest.mark.parametrize(
    ("steps", "score"),
    [
        ([], 1.0),
        (["3 * 7 = 21 (left: 5, 21)"], 1.0),
        (["3 × 7 = 21", "\n21 + 5 = 26 (left: 26)"], 1.0),
        (["7 - 3 = 4 (left: 5 4)"], DEAD_END),
        (["3 * 7 = 20"], 0.0),
        (["2 * 7 = 14"], 0.0),
        (["3 * 3 = 9"], 0.0),
        (["3 * 7 = 21 (left: 5 22)"], 0.0),
        (["3 * 7 = 21 (left: 5,"], 1.0),  # it was cut
        (["3 * 7 = 21 (left: 5, 22\n21 + 5 = 26"], 0.0),
        (["3 * 7 = 21", "7 + 5 = 12"], 0.0),
        (["3 / 0 = 0"], 0.0),
        (["3 / 7 = 3/7 (left: 5, 3/7)"], DEAD_END),
        (["Step 1: think"], 1.0),
        ([r"The answer is \boxed{3 * 7 + 5}."], 1.0),
        (["The answer is (3 * 7) + 5 = 26."], 1.0),
        ([r"\boxed{3 * 7 + 6 - 1}"], 0.0),
        ([r"\boxed{26}"], 0.0),
        ([r"\boxed{__import__('os').abort()}"], 0.0),
        ([r"\boxed{" + "(" * 5000], 1.0),
        (["9" * 5000 + " + 1 = 2"], 0.0),
    ],
)
def test_countdown(steps: list[str], score: float) -> None:
    assert Countdown()(PUZZLE, steps) == score


def test_solutions() -> None:
    assert is_solution(Puzzle((4, 4, 6, 8), 24, True), "(4 + 8) * (6 - 4)")
    assert not is_solution(Puzzle((4, 4, 6, 8), 24, True), "4 * 6")
    assert is_solution(Puzzle((4, 4, 6, 8), 24), "4 * 6")
    assert not is_solution(Puzzle((2, 3), 23), "23")


def test_puzzles_are_read_from_text() -> None:
    assert read_puzzle("Use the numbers 3, 5 and 7 to make 26.") == PUZZLE
    assert Countdown()("Using the numbers 3, 5, 7, reach the target 26.", ["3 * 7 = 21"]) == 1.0
    with pytest.raises(ValueError, match="no puzzle in"):
        read_puzzle("Hello")


@pytest.mark.parametrize(
    ("step", "score"),
    [
        ("12 + 5 = 17, and 17 - 3 = 14.", 1.0),
        ("2 * 3 = 6 = 12 / 2", 1.0),
        ("2 * 3 = 6 = 12 / 3", 0.0),
        ("She has $1,200 / 2 = $600 left.", 1.0),
        ("12 + 5 = 18", 0.0),
        ("x = 5", 1.0),
        ("x + 2 = 5 and 2x = 6", 1.0),
        ("10% of 50 = 5", 1.0),
        ("- 3 + 4 = 7\n2. 3 + 4 = 7", 1.0),
        ("- 3 + 4 = 8", 0.0),
        ("1. 3 + 4 = 8", 0.0),
        ("x^2 + 1 = 5, f(2) = 4 + 1 and 3 * 4 = 12x", 1.0),
        ("6 = 2 * 4", 0.0),
        ("the sum is 3 + 4 = 7.", 1.0),
        ("(2 + 3) * 4 = 20\n20 / 8 = 2.5", 1.0),
        ("-3 + 5 = 2", 1.0),
        ("1 / 0 = 5", 1.0),  # says nothing
        ("=" * 3000 + "(" * 3000, 1.0),
        ("1 + " * 3000 + "1 = 2", 1.0),
    ],
)
def test_chain_arithmetic(step: str, score: float) -> None:
    assert ChainArithmetic()("", ["1 + 1 = 2", step]) == score


# ---- failures -------------------------------------------------------------------------------------------------------------------


class Scripted:
    """Says one thing after the other; exceptions are raised."""

    def __init__(self, *said: Any, batched: bool = False) -> None:
        self.said, self.calls = list(said), 0
        if batched:
            self.batch = lambda items: [self(*item) for item in items]

    def __call__(self, problem: Any, steps: Seq[str]) -> Any:
        self.calls += 1
        said = self.said.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said


@pytest.mark.parametrize("failure", [math.nan, None, "much", ValueError("no"), (math.nan, 3), torch.tensor(math.nan)])
def test_one_failure_is_retried(failure: Any) -> None:
    judge = Judge(Scripted(failure, 0.7))
    assert judge("p", ["s"]).score == 0.7 and judge.failures == 0


def test_two_failures_are_unscored_and_three_chains_break_it() -> None:
    judge = Judge(Scripted(*[RuntimeError("down")] * 6, 0.5))
    for count in (1, 2, 3):
        assert not judge.broken
        assert judge("p", ["s"]) == Outcome(None, 0, "RuntimeError: down")
        assert judge.failures == count
    assert judge.broken
    assert judge("p", ["s"]).score == 0.5 and not judge.broken


def test_values_outside_are_clamped_and_warned_of_once() -> None:
    judge = Judge(Scripted(1.5, -2, math.inf, True, torch.tensor(0.25)))
    with pytest.warns(UserWarning, match="clamped") as caught:
        assert [judge("p", ["s"]).score for _ in range(5)] == [1, 0, 1, 1, 0.25]
    assert len(caught) == 1


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt):
        Judge(Scripted(KeyboardInterrupt()))("p", ["s"])


def test_tokens_are_counted() -> None:
    judge = Judge(Scripted(Score(0.5, 7), Score(0.1, 5)))
    assert judge("p", ["s"]).tokens == 7
    assert judge("p", ["s"]).tokens == 5
    assert judge.tokens == 12


class PricedScript(Scripted):
    """Costs ten tokens a call."""

    def cost(self, problem: Any, steps: Seq[str]) -> int:
        return 10


def test_evaluations_beyond_the_allowance_are_not_made() -> None:
    priced = PricedScript(ValueError("no"), Score(0.5, 10))
    outcome = Judge(priced)("p", ["s"], max_tokens=15)
    assert outcome == Outcome(None, 10, "ValueError: no") and priced.calls == 1  # the second call would be too many
    assert Judge(PricedScript())("p", ["s"], max_tokens=9).error == "an evaluation costs 10 tokens, 9 are allowed"


def test_a_price_that_cannot_be_told_is_a_failure() -> None:
    """It comes from the evaluator's own code, before anything was spent."""

    class Priceless(Scripted):
        def cost(self, problem: Any, steps: Seq[str]) -> int:
            raise KeyError("price")

    assert Judge(Priceless(0.5))("p", ["s"], max_tokens=9) == Outcome(None, 0, "KeyError: 'price'")


def test_an_evaluator_that_spends_more_than_is_allowed_is_refused() -> None:
    """One that does not know its price cannot be stopped beforehand: the hard budget is charged what was allowed, and no score bought."""
    judge = Judge(Scripted(Score(0.5, 10), Score(0.7, 9)))
    with pytest.warns(UserWarning, match=r"spent 10 tokens, 9 are allowed; fix: a method cost\(problem, steps\)"):
        outcome = judge("p", ["s"], max_tokens=9)
    assert (outcome.score, outcome.tokens) == (None, 9) and "spent 10 tokens" in str(outcome.error)
    assert judge("p", ["s"], max_tokens=9) == Outcome(0.7, 9)


def test_a_failing_batch_costs_the_others_nothing() -> None:
    items: list[Item] = [("p", ["a"]), ("p", ["b"]), ("p", ["c"])]
    judge = Judge(Scripted(0.1, math.nan, Score(0.3, 4), 0.2, batched=True))
    assert [each.score for each in judge.batch(items)] == [0.1, 0.2, 0.3]
    judge = Judge(Scripted(0.1, ValueError(), 0.5, 0.6, 0.7, batched=True))
    assert [each.score for each in judge.batch(items)] == [0.5, 0.6, 0.7]
    judge.evaluator = lambda problem, steps: 0.4
    assert [each.score for each in judge.batch(items)] == [0.4] * 3


def test_bad_judge() -> None:
    with pytest.raises(ValueError, match="evaluator must be callable"):
        Judge(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_failures"):
        Judge(constant(1), max_failures=0)


# ---- combinators ----------------------------------------------------------------------------------------------------------------


def constant(value: float, tokens: int = 0) -> Evaluator:
    return lambda problem, steps: Score(value, tokens)


@pytest.mark.parametrize(
    ("evaluator", "value"),
    [
        (mean(constant(0.2, 1), constant(0.6, 2)), 0.4),
        (minimum(constant(0.2, 1), constant(0.6, 2)), 0.2),
        (product(constant(0.2, 1), constant(0.6, 2)), 0.12),
        (weighted({constant(0.2, 1): 3, constant(0.6, 2): 1}), 0.3),
        (mean(minimum(constant(0.2, 1)), cached(constant(0.6, 2))), 0.4),
    ],
)
def test_combinators(evaluator: Evaluator, value: float) -> None:
    score = as_score(evaluator("p", ["s"]))
    assert score.value == pytest.approx(value) and score.tokens == 3
    (batched,) = score_all(evaluator, [("p", ["t"])])
    assert batched.value == pytest.approx(value)


def test_combinators_go_to_another_process() -> None:
    for evaluator in (mean(slow_evaluator, cached(slow_evaluator)), weighted({slow_evaluator: 3, ChainArithmetic(): 1})):
        again = pickle.loads(pickle.dumps(evaluator))
        assert as_score(again("fine", ["2 + 2 = 4"])) == as_score(evaluator("fine", ["2 + 2 = 4"]))
    bounded = timeout(weighted({slow_evaluator: 1, ChainArithmetic(): 3}), seconds=20)
    assert as_score(bounded("fine", ["2 + 2 = 5"])).value == pytest.approx(0.25 / 4)
    bounded.close()


def test_wrappers_tell_the_price_of_what_is_in_them() -> None:
    priced = Priced()
    for evaluator in (mean(priced, constant(1)), noisy(priced), cached(priced), cached(mean(priced))):
        assert evaluator.cost("p", ["s"]) == 10  # type: ignore[attr-defined]
    bounded = timeout(priced, seconds=1)
    assert bounded.cost("p", ["s"]) == 10
    bounded.close()


def test_a_failing_part_fails_the_whole() -> None:
    with pytest.raises(ValueError, match="returned nan"):
        mean(constant(1), constant(math.nan))("p", ["s"])


@pytest.mark.parametrize(
    "make", [mean, lambda: weighted({}), lambda: weighted({constant(1): -1}), lambda: weighted({constant(1): 0})]
)
def test_bad_combinations(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="at least one|weights must be"):
        make()


def test_cached() -> None:
    inner = Scripted(Score(0.1, 5), ValueError(), Score(0.3, 5), Score(0.4, 5))
    evaluator = cached(inner, size=1)
    assert evaluator("p", ["s"]) == (0.1, 5)
    assert evaluator("p", ["s"]) == (0.1, 0) and inner.calls == 1
    with pytest.raises(ValueError):
        evaluator("p", ["t"])
    assert score_all(evaluator, [("p", ["t"]), ("p", ("t",))]) == [(0.3, 5), (0.3, 0)]
    assert evaluator("p", ["s"]) == (0.4, 5)  # was forgotten


def test_noise_flips_its_share_and_always_the_same() -> None:
    evaluator = noisy(constant(0.9), flip=0.2, seed=1)
    scores = [as_score(evaluator("p", [str(i)])).value for i in range(1000)]
    flipped = sum(value == pytest.approx(0.1) for value in scores)
    assert 150 < flipped < 250 and {round(value, 9) for value in scores} == {0.9, 0.1}
    assert [said.value for said in score_all(evaluator, [("p", (str(i),)) for i in range(1000)])] == scores
    assert (
        as_score(noisy(constant(1.0), flip=0)("p", [])).value == 1 and as_score(noisy(constant(1.0), flip=1)("p", [])).value == 0
    )
    with pytest.raises(ValueError, match="flip"):
        noisy(constant(1), flip=1.5)


def test_timeout_kills() -> None:
    evaluator = timeout(slow_evaluator, seconds=0.5)
    judge = Judge(evaluator)
    assert judge("fine", ["s"]).score == 0.25
    outcome = judge("hang", ["s"])
    assert outcome.score is None and "within 0.5 s" in str(outcome.error)
    assert judge("fine", ["s"]).score == 0.25
    assert judge("nan", ["s"]).score is None and judge("none", ["s"]).score is None
    evaluator.close()


# ---- models ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_tokenizer: Any) -> Engine:
    return Engine(make_tiny_llama(), tiny_tokenizer, method="ngram", budget=4)


def plain_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[n - 1]: of ids[1:], by one plain forward."""
    with torch.inference_mode():
        laws = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return laws[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3_longrope"])
@pytest.mark.parametrize("length", [1, 60])
def test_engine_score_is_a_plain_forward(name: str, length: int) -> None:
    model = tiny_models.build(name)
    ids = [(7 * i + i * i) % 97 for i in range(length)]
    scored = Engine(model, method="none").score(ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(scored.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(scored.logprobs), plain_logprobs(model, ids), rtol=1e-4, atol=1e-4)


def test_engine_score_in_blocks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.engine.BLOCK", 7)
    ids = [(5 * i + i * i) % 251 for i in range(40)]
    expected = plain_logprobs(engine.target.model, ids)
    for start in (1, 6, 7, 8, 30, 39, 40):
        scored = engine.score(ids, start)
        torch.testing.assert_close(torch.tensor(scored.logprobs), expected[start - 1 :], rtol=1e-4, atol=1e-4)


def branches(blocks: int) -> list[list[int]]:
    """Texts that begin alike, of about so many blocks, in an order that asks for old ones again."""
    trunk = [(5 * i + i * i) % 251 for i in range(BLOCK * blocks)]
    cuts = (BLOCK, BLOCK - 1, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 30, len(trunk), 3, BLOCK + 1, len(trunk) - 1)
    return [[*trunk[:cut], cut % 251, 7, 9] for cut in cuts]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3_longrope"])
@pytest.mark.parametrize("megabytes", [256.0, 0.12, 0.0])
def test_a_kept_beginning_changes_no_bit_of_a_score(name: str, megabytes: float) -> None:
    model = tiny_models.build(name)
    engine, store = Engine(model, method="none"), TextStore(megabytes)
    for ids in branches(3):
        ids = [token % 97 for token in ids][: engine.target.max_positions - 1]
        for start in {1, max(1, len(ids) - 5), len(ids)}:
            kept, plain = engine.score(ids, start, store), engine.score(ids, start)
            assert kept.logprobs == plain.logprobs
            assert torch.equal(kept.logits, plain.logits)


def test_a_score_reads_what_is_new_and_makes_the_logits_that_it_needs(engine: Engine) -> None:
    model = engine.target.model
    read: list[int] = []
    made: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].shape[1])),
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: made.append(args[0].shape[1])),
    ]
    text = [(3 * i + i * i) % 251 for i in range(2 * BLOCK + 20)]
    store = TextStore()
    engine.score(text, len(text), store)
    assert (sum(read), sum(made)) == (len(text), 3)  # a forward gives one row of logits at least
    read.clear()
    made.clear()
    scored = engine.score([*text[:-10], 1, 2, 3], len(text) - 10, store)
    assert len(scored.logprobs) == 3
    assert (sum(read), sum(made)) == (13, 4)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("ids", "start"), [([], 1), ([1, 2], 0), ([1, 2], 3), ([300], 1), ([1] * 3000, 1)])
def test_engine_score_refuses(engine: Engine, ids: list[int], start: int) -> None:
    with pytest.raises(ValueError, match="empty|start must be|outside the vocabulary|context"):
        engine.score(ids, start)


def test_score_leaves_generation_alone(engine: Engine) -> None:
    before = engine.generate("abcabc")
    engine.score(list(range(100)))
    assert engine.generate("abcabc").token_ids == before.token_ids


def test_log_probability(engine: Engine) -> None:
    steps = ["ab c", "世d"]
    ids = engine.encode([{"role": "user", "content": "Q"}])
    first, second = (engine.tokenizer(step)["input_ids"] for step in steps)
    logprobs = plain_logprobs(engine.target.model, ids + first + second)
    score = LogProbability(engine)("Q", steps)
    assert score.value == pytest.approx(math.exp(logprobs[-len(second) :].mean()), rel=1e-4)
    assert score.tokens == len(ids + first + second) == LogProbability(engine).cost("Q", steps)
    whole = LogProbability(engine, whole=True)("Q", steps)
    assert whole.value == pytest.approx(math.exp(logprobs[len(ids) - 1 :].mean()), rel=1e-4)
    prompted = LogProbability(engine, lambda problem: Prompts().encode(engine.tokenizer, problem))
    assert 0 < prompted("Q", steps).value <= 1
    with pytest.raises(ValueError, match="no step"):
        LogProbability(engine)("Q", [])


def test_yes_no_reads_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])
    judge = YesNo(lambda ids: logits, lambda text: list(text.encode()), (0, 1), (2,), "$problem|$steps|$step")
    yes, no = math.exp(0) + math.exp(1), math.exp(2)
    assert judge("p", ["a", "b"]) == (pytest.approx(yes / (yes + no)), len("p|ab|b"))
    extreme = YesNo(lambda ids: torch.tensor([-1e4, 1e4], dtype=torch.bfloat16), lambda text: [1], (0,), (1,))
    assert extreme("p", ["a"]).value == 0
    assert Judge(YesNo(lambda ids: torch.full((2,), math.nan), lambda text: [1], (0,), (1,)))("p", ["a"]).score is None
    with pytest.raises(ValueError, match="disjoint"):
        YesNo(lambda ids: logits, lambda text: [1], (0,), (0,))


def test_yes_no_of_an_engine(engine: Engine) -> None:
    judge = YesNo.of(engine)
    assert set(judge.yes_ids) == {
        engine.tokenizer(letter)["input_ids"][0] for letter in "Yy"
    }  # " Yes" and " No" both begin with " "
    score = judge("2+2", ["2+2=4 $x {}"])
    assert 0 < score.value < 1 and score.tokens == judge.cost("2+2", ["2+2=4 $x {}"])


def test_self_consistency() -> None:
    asked = []

    def sample(problem: str, steps: Seq[str], n: int) -> Rollouts:
        asked.append(list(steps))
        return Rollouts(["The answer is 5.", "The answer is 5.0", "The answer is 6.", "I do not know"], 40)

    evaluator = SelfConsistency(sample, NumberAnswers())
    assert evaluator("p", ["so far"]) == (0.5, 40)
    assert evaluator("p", ["The answer is 6."]) == (0.25, 40)
    assert evaluator("p", ["The answer is 7."]) == (0.0, 40)
    assert asked == [["so far"], [], []]
    assert evaluator.cost("p", []) == 0 and SelfConsistency(sample, NumberAnswers(), 3, 20).cost("p", []) == 60
    with pytest.raises(ValueError, match="rollout_tokens must be >= 1 or None, got 0"):
        SelfConsistency(sample, NumberAnswers(), rollout_tokens=0)


@pytest.mark.parametrize("labels", [1, 3])
def test_reward_model(tiny_tokenizer: Any, labels: int) -> None:
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_labels=labels, pad_token_id=tiny_tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    reward = RewardModel(model, tiny_tokenizer, positive=min(2, labels - 1), batch_size=2)
    items: list[Item] = [("2+2", ["a", "bc"]), ("a much longer problem", ["4"]), ("3", [])]
    scores = reward.batch(items)
    for (problem, steps), score in zip(items, scores):
        ids = torch.tensor([tiny_tokenizer(f"<user>{problem}<assistant>{''.join(steps)}")["input_ids"]])
        with torch.inference_mode():
            logits = model(ids).logits[0]
        expected = torch.sigmoid(logits[0]) if labels == 1 else logits.softmax(-1)[2]
        assert score.value == pytest.approx(float(expected), rel=1e-4) and score.tokens == ids.shape[1]
        assert reward(problem, steps).value == pytest.approx(score.value, rel=1e-4)
        assert reward.cost(problem, steps) == score.tokens
    assert as_score(weighted({reward: 1, constant(0.5): 0})(*items[0])).value == pytest.approx(scores[0].value)
    with pytest.raises(ValueError, match="pad_token_id of tokenizer and model are"):
        model.config.pad_token_id = 0
        RewardModel(model, tiny_tokenizer)
    with pytest.raises(ValueError, match="positive must be"):
        RewardModel(
            LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 2})), tiny_tokenizer, positive=2
        )
