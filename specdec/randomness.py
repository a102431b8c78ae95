"""Randomness: every random number of a request is a pure function of its key, never of batching, order or history.

Two domains that never overlap (verification.md 4.5):

* `gumbel`, `gumbel_at`, `choose`: noise keyed (seed, stream, absolute position, token), for `match` and its drafter only. A token
  drawn as argmax(scores + noise) has the law softmax(scores) (Gumbel-max), and re-reading a position gives the same noise, so
  the text is that of plain sampling with this noise, whatever was drafted.
* `coin`, `pick`: keyed (seed, stream, step, node, draw index, purpose), for every other rule. A key must never be used twice, nor
  by two requests of which one may influence the other: where it may, `apart` gives each request coins of its own.

`stream` separates what must be independent under one seed: prompts, their samples, the branches of a search, retries.

    Randomness(seed=1, stream=stream_of(prompt_index=0, sample_index=2)).choose(position=17, scores=logits)

The noise is computed with IEEE additions, multiplications and divisions only (no libm), so a seed fixes it bit for bit on every
machine, with numba or without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch

from specdec._jit import HAVE_NUMBA, njit

__all__ = ["Randomness", "argmax", "draw_seed", "stream_of"]

_GUMBEL_DOMAIN = "gumbel"
_COIN_DOMAIN = "coin"
_SMALL_SUPPORT = 8  # noise is generated on the support alone where it is less than 1/8 of the vocabulary

# splitmix64 (Steele, Lea, Flood 2014): a Weyl sequence through a bijective mixer
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_U12, _U27, _U30, _U31, _U52 = np.uint64(12), np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(52)

# float64 as bits; unsigned integers only, which vectorise on every CPU
_ONE = np.uint64(0x3FF0000000000000)  # 1.0
_TWO_52 = np.uint64(0x4330000000000000)  # 2^52: its low mantissa bits count in ones
_BIAS = np.uint64(1024)  # keeps exponents positive
_SQRT_HALF = np.uint64(0x3FE6A09E667F3BCD - (1024 << 52) & (1 << 64) - 1)  # sqrt(1/2), less the bias
_LN_2 = 0.6931471805599453

_LEAST = np.array([int(math.exp(-math.exp(-k)) * 2**52) - 1 for k in range(38)], np.int64)  # bits with noise above k are no less
_BLOCK = 64
_SLACK = 0.01  # sums are rounded ...
_SLACK_SHARE = 1e-6  # ... to 2^-24 of themselves


# The functions below hold for one number (numba's loop) and for an array (numpy, without numba) alike.


@njit
def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection."""
    x = (x ^ (x >> _U30)) * _MIX_1
    x = (x ^ (x >> _U27)) * _MIX_2
    return x ^ (x >> _U31)


@njit
def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of normal float64 x > 0, relative error below 1e-11.

    x = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, as its Taylor series.
    """
    bits = np.float64(x).view(np.uint64)
    exponent = (bits - _SQRT_HALF) >> _U52  # k + 1024
    k = np.uint64(exponent | _TWO_52).view(np.float64) - (2.0**52 + 1024.0)
    m = np.uint64(bits - ((exponent - _BIAS) << _U52)).view(np.float64)
    s = np.divide(m - 1.0, m + 1.0)  # not "/": its check for a zero divisor keeps numba from vectorising
    z = s * s
    series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13))))))
    return k * _LN_2 + 2.0 * s * series


@njit
def _gumbel(x: np.ndarray) -> np.ndarray | np.float32:
    """uint64 counter -> float32 Gumbel(0, 1) noise in [-3.7, 36.8], see `_gumbel_of`."""
    return _gumbel_of(_mix(x) >> _U12)


@njit
def _gumbel_of(bits: np.ndarray) -> np.ndarray | np.float32:
    """52 bits -> float32: -log(-log u), u = (bits + 1/2) / 2^52, never 0 or 1; it rises with the bits."""
    u = np.uint64(bits | _ONE).view(np.float64) - (1.0 - 2.0**-53)
    return np.float32(-_log(-_log(u)))


def _noise_arrays(key: np.uint64, tokens: np.ndarray, out: np.ndarray) -> None:
    """out [K] float32 <- the noise of `tokens` [K] uint64."""
    out[:] = _gumbel(tokens * _WEYL + key)


@njit
def _noise_loop(key: np.uint64, tokens: np.ndarray, out: np.ndarray) -> None:
    """The same, token by token: numba fuses and vectorises it."""
    for i in range(len(tokens)):
        out[i] = _gumbel(tokens[i] * _WEYL + key)


_noise = _noise_loop if HAVE_NUMBA else _noise_arrays


@njit
def _choose(key: np.uint64, scores: np.ndarray, best_score: int, least: np.ndarray) -> int:
    """argmax(scores [V] float32 + noise), first of equals, by the noise of those tokens alone that may win.

    A token wins only if its noise is above what it lacks of the best sum so far. Whether it is above a whole number k shows in its
    bits, before any logarithm, and for a block of tokens at once.

    Args:
        best_score: the argmax of the scores, which sets a first mark; where that is NaN or infinite, it wins.
        least: [K] int64, `_LEAST`.
    """
    winner = best_score
    if not np.isfinite(scores[winner]):
        return winner
    best = np.float32(scores[winner] + _gumbel(np.uint64(winner) * _WEYL + key))
    for start in range(0, len(scores), _BLOCK):
        end = min(start + _BLOCK, len(scores))
        score, most = np.float32(-np.inf), np.int64(0)
        for token in range(start, end):
            score = max(score, scores[token])
        if score == -np.inf:  # after top-k nearly every block
            continue
        for token in range(start, end):
            most = max(most, np.int64(_mix(np.uint64(token) * _WEYL + key) >> _U12))
        lack = best - score - (_SLACK + _SLACK_SHARE * abs(best))
        if lack > 0 and most < least[len(least) - 1 if lack > len(least) - 1 else int(lack)]:
            continue
        for token in range(start, end):
            total = np.float32(scores[token] + _gumbel(np.uint64(token) * _WEYL + key))
            if total > best or (total == best and token < winner):
                best, winner = total, token
    return winner


def _hash(*parts: int | str) -> int:
    """64 bits that identify `parts`; keys that differ anywhere are independent."""
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def argmax(scores: torch.Tensor) -> int:
    """torch.argmax of [V]: the first of equal maxima, NaN above all; numpy finds it 10 times faster on a CPU."""
    return int(scores.numpy().argmax() if scores.device.type == "cpu" else torch.argmax(scores))


def draw_seed() -> int:
    """A seed from one draw of torch's global generator, as `generate` would consume it."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def stream_of(prompt_index: int, sample_index: int = 0, *branch: int) -> tuple[int, ...]:
    """The stream of one sample of one prompt; `branch` (expansion id, retry number) gives every fork its own."""
    return (int(prompt_index), int(sample_index), *(int(part) for part in branch))


class Randomness:
    """All random numbers of one request.

    Args:
        seed: any int.
        stream: an int or a tuple of ints, see `stream_of`.
    """

    def __init__(self, seed: int, stream: tuple[int, ...] | int = ()) -> None:
        self.seed = int(seed)
        self.stream = (int(stream),) if isinstance(stream, int) else tuple(int(part) for part in stream)
        self.coin_stream: tuple[int | str, ...] = self.stream
        self._all_tokens = np.empty(0, np.uint64)

    def apart(self, request: int) -> Randomness:
        """The same noise, and the coins and picks of this request alone, whoever else has its seed and stream."""
        own = copy.copy(self)
        own.coin_stream = (*self.stream, "request", int(request))
        return own

    def __repr__(self) -> str:
        return f"Randomness(seed={self.seed}, stream={self.stream})"

    def gumbel(self, position: int, vocab_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """[V] float32: the noise of every token at this absolute position of the sequence."""
        if len(self._all_tokens) != vocab_size:
            self._all_tokens = np.arange(vocab_size, dtype=np.uint64)
        return self._noise_of(position, self._all_tokens).to(device)

    def gumbel_at(self, position: int, tokens: torch.Tensor) -> torch.Tensor:
        """[K] float32: the noise of `tokens` [K] alone, bit for bit `gumbel(position, V)[tokens]`."""
        return self._noise_of(position, tokens.cpu().numpy().astype(np.uint64)).to(tokens.device)

    def choose(self, position: int, scores: torch.Tensor) -> int:
        """A token drawn from softmax(scores) with the noise of `position`: argmax(scores + noise), first of equals.

        `scores` is [V] float32, unnormalised; -inf excludes a token. NaN wins, so that the caller sees it.
        """
        if scores.device.type != "cpu":
            return argmax(scores + self.gumbel(position, len(scores), scores.device))
        if HAVE_NUMBA and scores.dtype == torch.float32:
            return _choose(self._noise_key(position), scores.contiguous().numpy(), argmax(scores), _LEAST)
        kept = scores.numpy() != -np.inf
        if 0 < np.count_nonzero(kept) * _SMALL_SUPPORT < len(scores):
            support = torch.from_numpy(np.flatnonzero(kept))
            return int(support[argmax(scores[support] + self.gumbel_at(position, support))])
        return argmax(scores + self.gumbel(position, len(scores)))

    def coin(self, p: float, *key: int | str) -> bool:
        """True with probability p; `key` = (step, node, draw index, purpose). p <= 0 is never, p >= 1 always."""
        return self._uniform(*key) < p

    def pick(self, weights: torch.Tensor | np.ndarray | Sequence[float], *key: int | str) -> int:
        """An index drawn in proportion to `weights` [K], finite and >= 0; an index of weight 0 is never drawn.

        Raises:
            ValueError: a weight is negative or not finite, or all are 0.
        """
        cumulative = np.cumsum(np.asarray(weights, np.float64))
        total = float(cumulative[-1]) if len(cumulative) else 0.0
        if not 0.0 < total < np.inf or np.any(np.diff(cumulative, prepend=0.0) < 0):
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got a sum of {total}; normalise them before pick()")
        # u < 1, but u * total may round up to total: the last index that added mass is then the right one
        index = np.searchsorted(cumulative, self._uniform(*key) * total, side="right")
        return int(min(index, np.searchsorted(cumulative, total)))

    def _noise_of(self, position: int, tokens: np.ndarray) -> torch.Tensor:
        out = np.empty(len(tokens), np.float32)
        _noise(self._noise_key(position), tokens, out)
        return torch.from_numpy(out)

    def _noise_key(self, position: int) -> np.uint64:
        return np.uint64(_hash(_GUMBEL_DOMAIN, self.seed, *self.stream, position))

    def _uniform(self, *key: int | str) -> float:
        """A multiple of 2^-53 in [0, 1)."""
        return (_hash(_COIN_DOMAIN, self.seed, *self.coin_stream, *key) >> 11) * 2.0**-53
