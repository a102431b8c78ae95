"""TopP keeps the tokens that transformers' own top-p keeps, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec.nucleus import TopP, with_fast_top_p
from specdec.sampling import build_warpers
from specdec.sequence import SamplingParams

IDS = torch.zeros(1, 1, dtype=torch.long)
TOP_P = (0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0)


def laws(shape: str, rows: int, size: int, seed: int) -> torch.Tensor:
    """[rows, size] scores of one kind."""
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, size, generator=noise)
    match shape:
        case "peaked":
            return scores * 4
        case "flat":
            return scores * 0.1
        case "ties":  # few values, as bfloat16 logits have
            return (scores * 2).round()
        case "bfloat16":
            return (scores * 3).bfloat16().float()
        case "equal":
            return torch.zeros(rows, size)
        case "cut":
            return TopKLogitsWarper(20)(IDS, scores * 3)
        case "one":
            return torch.where(torch.arange(size) == 3, 1.0, -torch.inf).expand(rows, size).clone()
    raise ValueError(shape)


SHAPES = ("peaked", "flat", "ties", "bfloat16", "equal", "cut", "one")


@pytest.mark.parametrize("size", [5, 700, 9000])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape: str, size: int) -> None:
    for seed, top_p in enumerate(TOP_P):
        for least in (1, 3):
            scores = laws(shape, 1 + seed % 3, size, seed)
            given_scores = scores.clone()
            kept = TopP(top_p, min_tokens_to_keep=least)(IDS, scores)
            assert torch.equal(kept, TopPLogitsWarper(top_p, min_tokens_to_keep=least)(IDS, scores))
            assert torch.equal(scores, given_scores)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([512, 1000, 8192]))
def test_equals_transformers_at_any_top_p(shape: str, top_p: float, seed: int, size: int) -> None:
    scores = laws(shape, 1, size, seed)
    assert torch.equal(TopP(top_p)(IDS, scores), TopPLogitsWarper(top_p)(IDS, scores))


def test_a_sum_at_the_very_border_is_transformers_to_decide() -> None:
    """Masses of powers of two add up to top_p exactly; and a hair beside it."""
    masses = torch.tensor([2.0**-place for place in range(1, 20)] + [2.0**-19] * 1 + [0.0] * 1000)
    for border in (0.5, 0.75, 0.875):
        for off in (0.0, 1e-7, -1e-7, 2e-5, -2e-5):
            scores = masses.log()[None]
            assert torch.equal(TopP(border + off)(IDS, scores), TopPLogitsWarper(border + off)(IDS, scores))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_visible(value: float) -> None:
    scores = laws("peaked", 1, 4000, 0)
    scores[0, 5] = value
    ours, theirs = TopP(0.9)(IDS, scores), TopPLogitsWarper(0.9)(IDS, scores)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_the_usual_law_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "sort", None)
    scores = laws("peaked", 2, 9000, 1)
    assert 0 < int(TopP(0.9)(IDS, scores).isfinite().sum()) < 4096
    TopP(0.9)(IDS, laws("cut", 1, 9000, 1))


def test_a_list_is_replaced_and_not_changed() -> None:
    class Own(TopPLogitsWarper):  # type: ignore[misc]
        """A user's, which may do anything."""

    given_list = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.9, -5.0, 2), Own(0.8)])
    fast = with_fast_top_p(given_list)
    assert [type(each) for each in given_list] == [TemperatureLogitsWarper, TopPLogitsWarper, Own]
    assert [type(each) for each in fast] == [TemperatureLogitsWarper, TopP, Own]
    assert (fast[1].top_p, fast[1].filter_value, fast[1].min_tokens_to_keep) == (0.9, -5.0, 2)


def test_requests_use_it() -> None:
    assert [type(each) for each in build_warpers(SamplingParams(temperature=1.0, top_p=0.9))] == [TopP]
