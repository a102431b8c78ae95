"""Randomness: bits that never change, uniformity along and independence across every part of the key, exact subsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from power import BIAS, biased, excess
from specdec import randomness
from specdec.randomness import Randomness, argmax, draw_seed, stream_of

LEAST_P = 1e-6  # a false alarm in a million; keys are fixed, so a pass stays a pass


def noise_along(axis: str, count: int, start: int = 0) -> np.ndarray:
    """[count] noise with one part of the key counting up and the others fixed."""
    if axis == "token":
        return Randomness(3, (1, 2)).gumbel(7, start + count)[start:].numpy()
    token = np.array([5], np.uint64)
    keys = {"seed": (0, (1, 2), 7), "stream": (3, (0, 2), 7), "sample": (3, (1, 0), 7), "position": (3, (1, 2), 0)}
    seed, (prompt, sample), position = keys[axis]
    values = []
    for i in range(start, start + count):
        at = {"seed": seed, "stream": prompt, "sample": sample, "position": position, axis: i}
        values.append(Randomness(at["seed"], (at["stream"], at["sample"]))._noise_of(at["position"], token).numpy()[0])
    return np.array(values)


AXES = ["token", "seed", "stream", "sample", "position"]


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_gumbel_along_every_axis(axis: str) -> None:
    values = noise_along(axis, 60_000)
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > LEAST_P
    assert len(np.unique(values)) > 0.98 * len(values)
    shifted = np.where(stats.gumbel_r.cdf(values) < BIAS, 5.0, values)
    assert stats.kstest(shifted, stats.gumbel_r.cdf).pvalue < LEAST_P


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_independent(axis: str) -> None:
    """8 x 8 table of (noise at key i, noise at key i + 1), in octiles."""
    values = noise_along(axis, 100_001)
    bins = np.minimum((stats.gumbel_r.cdf(values) * 8).astype(int), 7)
    first, second = bins[:-1], bins[1:]
    assert stats.chi2_contingency(np.histogram2d(first, second, bins=8)[0]).pvalue > LEAST_P
    # of the pairs with an odd sum, 1 in 25 gets an even one: the least visible dependence of total variation .02
    moved = second ^ (((first + second) % 2 == 1) & (np.arange(len(second)) % 25 == 0))
    assert stats.chi2_contingency(np.histogram2d(first, moved, bins=8)[0]).pvalue < LEAST_P


def test_rows_of_neighbouring_keys_are_uncorrelated() -> None:
    count = 250_000
    rows = [
        Randomness(seed, (prompt, sample)).gumbel(position, count).numpy()
        for seed in (0, 1) for prompt in (0, 1) for sample in (0, 1) for position in (0, 1)
    ]  # fmt: skip
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 6 / count**0.5
    copied = np.where(np.arange(count) < BIAS * count, rows[0], rows[1])
    assert np.corrcoef(rows[0], copied)[0, 1] > 6 / count**0.5


def test_keys_are_unambiguous() -> None:
    """(seed 1, stream (2, 3), position 4) shares nothing with any other way to write 1 2 3 4, nor with negative or huge seeds."""
    keys = [(1, (2, 3), 4), (1, (2,), 3), (1, (2, 3, 4), 4), (12, (3,), 4), (-1, (2, 3), 4), (1 + 2**64, (2, 3), 4), (1, (), 2)]
    rows = {Randomness(seed, stream).gumbel(position, 4).numpy().tobytes() for seed, stream, position in keys}
    assert len(rows) == len(keys)
    assert torch.equal(Randomness(1, 2).gumbel(3, 4), Randomness(np.int64(1), (np.int32(2),)).gumbel(np.int64(3), 4))


def test_noise_never_changes() -> None:
    """A seed fixes the text for ever: these bits are part of the interface."""
    noise = Randomness(1, stream_of(2, 3)).gumbel(4, 6)
    assert [value.hex() for value in noise.tolist()] == [
        "0x1.4b92dc0000000p-1", "-0x1.0d21260000000p-5", "-0x1.0a11680000000p-1",
        "0x1.2db8b20000000p+1", "-0x1.9274ba0000000p+0", "0x1.587d760000000p-1",
    ]  # fmt: skip


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as it is where numba is missing."""
    for name in ("_mix", "_log", "_gumbel_of", "_gumbel"):
        function = getattr(randomness, name)
        monkeypatch.setattr(randomness, name, getattr(function, "py_func", function))
    monkeypatch.setattr(randomness, "_noise", randomness._noise_arrays)


@pytest.mark.filterwarnings("error")
def test_same_bits_without_numba(request: pytest.FixtureRequest) -> None:
    tokens = torch.tensor([0, 7, 40_000])
    compiled = Randomness(1, (2,)).gumbel(3, 50_000), Randomness(1, (2,)).gumbel_at(3, tokens)
    request.getfixturevalue("plain")
    assert torch.equal(Randomness(1, (2,)).gumbel(3, 50_000), compiled[0])
    assert torch.equal(Randomness(1, (2,)).gumbel_at(3, tokens), compiled[1])


def test_noise_is_minus_log_minus_log_of_the_counter(plain: None) -> None:
    u = np.concatenate([np.random.default_rng(0).random(10_000), [2.0**-53, 0.5, 0.5**0.5, 1 - 2.0**-53, 1.0, 36.8]])
    np.testing.assert_allclose(randomness._log(u), np.log(u), rtol=1e-11)
    counters = np.arange(1000, dtype=np.uint64)
    uniform = [((int(mixed) >> 12) + 0.5) * 2.0**-52 for mixed in randomness._mix(counters)]
    np.testing.assert_allclose(randomness._gumbel(counters), -np.log(-np.log(uniform)), rtol=1e-6, atol=1e-7)


def test_noise_is_finite_at_the_ends(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_mix", lambda x: x)
    least, most = randomness._gumbel(np.array([0, 2**64 - 1], np.uint64))
    assert -3.7 < least < -3.5 and 36.7 < most < 36.8


def test_mixer_is_splitmix64(plain: None) -> None:
    """First outputs of the reference splitmix64 with seed 0: mix(i * golden ratio)."""
    counters = np.arange(1, 4, dtype=np.uint64) * randomness._WEYL
    assert randomness._mix(counters).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_noise_does_not_depend_on_vocabulary_or_history() -> None:
    source = Randomness(5, (0, 1))
    full = source.gumbel(9, 1000)
    source.gumbel(3, 77)
    assert torch.equal(source.gumbel(9, 300), full[:300])
    tokens = torch.tensor([999, 0, 17, 17])
    assert torch.equal(source.gumbel_at(9, tokens), full[tokens])
    assert torch.equal(Randomness(5, (0, 1)).gumbel_at(9, tokens), full[tokens])


@pytest.mark.parametrize("kept", [0, 1, 3, 62, 63, 400, 500])
def test_choose_on_the_support_equals_choose_on_all(kept: int) -> None:
    source, generator = Randomness(2), torch.Generator().manual_seed(kept)
    for position in range(20):
        scores = torch.full((500,), -torch.inf)
        support = torch.randperm(500, generator=generator)[:kept]
        scores[support] = torch.randn(kept, generator=generator) * 4
        assert source.choose(position, scores) == int(torch.argmax(scores + source.gumbel(position, 500)))


def test_choose_follows_the_law() -> None:
    """Chi-square against softmax, V = 16, threshold df + 10 sqrt(2 df)."""
    scores = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1.5
    law, source = torch.softmax(scores.double(), 0).numpy(), Randomness(4)

    def counts(scores: torch.Tensor) -> np.ndarray:
        return np.bincount([source.choose(position, scores) for position in range(70_000)], minlength=16)

    assert 70_000 * law.min() > 5
    assert excess(counts(scores), law) < 1
    assert excess(counts(torch.from_numpy(biased(law)).log()), law) > 1


def test_choose_shows_nan() -> None:
    scores = torch.zeros(20)
    scores[11] = torch.nan
    assert Randomness(0).choose(0, scores) == 11
    scores[torch.arange(20) != 11] = -torch.inf
    assert Randomness(0).choose(0, scores) == 11


def test_argmax_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 64, 1000, 49_152):
        scores = torch.randint(0, 5, (size,), generator=generator).float()  # full of ties
        assert argmax(scores) == int(torch.argmax(scores)) == int((scores == scores.max()).nonzero()[0])
    assert argmax(torch.tensor([1.0, torch.nan, 3.0])) == 1


def test_coin_frequency_and_limits() -> None:
    source = Randomness(1, (0,))
    trials, deviation = 50_000, (50_000 * 0.3 * 0.7) ** 0.5

    def hits(p: float) -> int:
        return sum(source.coin(p, step, 0, 0, "accept") for step in range(trials))

    assert abs(hits(0.3) - 0.3 * trials) < 6 * deviation
    assert all(abs(hits(0.3 + bias) - 0.3 * trials) > 6 * deviation for bias in (-BIAS, BIAS))
    assert not any(source.coin(0.0, step) for step in range(1000))
    assert all(source.coin(1.0, step) for step in range(1000))


def test_pick_follows_the_weights() -> None:
    source, weights = Randomness(1), np.array([0.0, 2.0, 0.0, 1.0, 5.0, 0.0])
    law, kept = weights / weights.sum(), weights > 0

    def counts(weights: np.ndarray) -> np.ndarray:
        return np.bincount([source.pick(weights, step, 0, 0, "residual") for step in range(50_000)], minlength=6)

    fair = counts(weights)
    assert (fair[~kept] == 0).all()
    assert stats.chisquare(fair[kept], 50_000 * law[kept]).pvalue > LEAST_P
    assert stats.chisquare(counts(biased(law))[kept], 50_000 * law[kept]).pvalue < LEAST_P
    assert source.pick(torch.tensor([0.0, 1e-30, 0.0]), 0) == 1


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_pick_at_the_ends(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    monkeypatch.setattr(Randomness, "_uniform", lambda *_: u)
    assert Randomness(0).pick([0.0, 0.1, 0.2, 0.7, 0.0], 0) == (1 if u == 0 else 3)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [1.0, float("nan")], [1.0, float("inf")]])
def test_pick_refuses_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        Randomness(0).pick(weights, 0)


def test_coins_and_noise_are_separate_domains() -> None:
    """A coin whose key spells a noise key shares nothing with it; parts of a coin's key all count."""
    source = Randomness(1, (2,))
    uniforms = [source._uniform(3), *(source._uniform(*key) for key in [(3, 0), (0, 3), (3, "a"), (3, "b"), (3, 0, 0)])]
    noise = np.exp(-np.exp(-source.gumbel(3, 100).double().numpy()))
    assert len(set(uniforms)) == len(uniforms)
    assert np.abs(noise[:, None] - np.array(uniforms)).min() > 1e-6
    assert Randomness(1, (9,))._uniform(3) != source._uniform(3) != Randomness(8, (2,))._uniform(3)


def test_draw_seed_is_one_draw_of_the_global_generator() -> None:
    torch.manual_seed(0)
    first, then = draw_seed(), torch.rand(1)
    torch.manual_seed(0)
    assert draw_seed() == first and torch.equal(torch.rand(1), then)
    state = torch.get_rng_state()
    Randomness(first).choose(0, torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 40.0, 1e4, 1e30])
@pytest.mark.parametrize("shift", [0.0, -1e3, 1e6])
def test_choose_is_the_argmax_of_scores_and_noise(spread: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(int(min(spread, 100)))
    for position in range(60):
        source = Randomness(position, (1,))
        scores = torch.randn(3000, generator=generator) * spread + shift
        if position % 3 == 1:
            scores = scores.bfloat16().float()
        if position % 5 == 1:
            scores[torch.randperm(3000, generator=generator)[: 1 + 40 * position]] = -torch.inf
        if position % 7 == 1:
            scores[position] = scores[2 * position] = torch.inf
        assert source.choose(position, scores) == int(torch.argmax(scores + source.gumbel(position, 3000)))


def test_choose_finds_a_winner_far_below_the_best_score() -> None:
    """Where one token leads by 6 to 12, another wins now and then: those are the ones that skipping tokens might lose."""
    wins = 0
    for position in range(4000):
        scores = torch.zeros(400)
        scores[7] = 6.0 + position % 7
        source = Randomness(8)
        chosen = source.choose(position, scores)
        assert chosen == int(torch.argmax(scores + source.gumbel(position, 400)))
        wins += chosen != 7
    assert wins > 200


def test_bits_tell_how_large_the_noise_is() -> None:
    """No noise above k has bits below _LEAST[k], and the bound is tight."""
    for k, least in enumerate(randomness._LEAST.tolist()[:36]):
        near = np.array([max(0, least - 2), least + 3], np.uint64)
        below, above = (randomness._gumbel_of(bits) for bits in near)
        assert below <= k + 1e-6
        assert above >= k - (1e-6 if k < 25 else 1.0)  # noise has few values up there
    assert randomness._LEAST[-1] >= 2**52 - 2
