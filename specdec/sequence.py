"""SamplingParams and Sequence: one request, its tokens, and the only place that decides when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from specdec.kv_cache import KVCache
    from specdec.randomness import Randomness

__all__ = ["EXTREME", "KVStore", "SamplingParams", "Sequence"]

EXTREME = 1e6  # most that temperature and penalty may scale logits by, up or down: past it, float32 overflows

StopCheck = Callable[["Sequence"], bool]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    Args:
        max_new_tokens: most tokens to emit, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it, in [1e-6, 1e6].
        top_k: keep the k most probable tokens; 0 is off.
        top_p: keep the smallest set of tokens with at least this probability; 1 is off.
        min_p: keep tokens with at least this share of the top token's probability; 0 is off.
        repetition_penalty: > 1 lowers the logits of tokens that already occurred (prompt included); 1 is off, in [1e-6, 1e6].
        min_new_tokens: no EOS or stop token before this many tokens.
        seed: None draws one number from torch's global generator a call, as `generate` would; an int fixes the text and leaves
            the global generator alone.
        stop_token_ids: tokens that end the text besides the model's own EOS; they are emitted as the last token.
        stop_strings: strings that end the text; the text is cut before the first of them.
        ignore_eos: go on after the model's EOS.
        n: samples for each prompt; each has its own random stream.
        logprobs: None, or 0 to report the log-probability of each emitted token under the processed law.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and the fix.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop_strings"):
            value = getattr(self, name)
            if isinstance(value, (str, int)):
                value = (value,)
            _require(isinstance(value, Iterable), f"{name} must be a tuple (empty: none), got {value!r}")
            object.__setattr__(self, name, tuple(value))
        _require(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens must be an int >= 1, got {self.max_new_tokens!r}",
        )
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(number, f"{name} must be a finite number, got {value!r}")
        _require(self.temperature >= 0, f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        _require(
            self.temperature == 0 or 1 / EXTREME <= self.temperature <= EXTREME,
            f"temperature must be 0 (greedy) or in [{1 / EXTREME:g}, {EXTREME:g}], or logits overflow, got {self.temperature}",
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, f"top_k must be an int >= 0 (0 is off), got {self.top_k!r}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1] (1 is off), got {self.top_p}")
        _require(0 <= self.min_p <= 1, f"min_p must be in [0, 1] (0 is off), got {self.min_p}")
        _require(
            1 / EXTREME <= self.repetition_penalty <= EXTREME,
            f"repetition_penalty must be > 0 (1 is off), in [{1 / EXTREME:g}, {EXTREME:g}], or logits overflow, got {self.repetition_penalty}",
        )
        _require(
            _is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be an int in [0, max_new_tokens={self.max_new_tokens}], got {self.min_new_tokens!r}",
        )
        _require(self.seed is None or _is_int(self.seed), f"seed must be None or an int, got {self.seed!r}")
        _require(
            all(_is_int(token) and token >= 0 for token in self.stop_token_ids),
            f"stop_token_ids must be ints >= 0, got {self.stop_token_ids!r}",
        )
        _require(
            all(isinstance(text, str) and text for text in self.stop_strings),
            f"stop_strings must be non-empty strings, got {self.stop_strings!r}",
        )
        _require(_is_int(self.n) and self.n >= 1, f"n must be an int >= 1, got {self.n!r}")
        _require(
            self.logprobs is None or self.logprobs == 0, f"logprobs must be None or 0 (chosen tokens only), got {self.logprobs!r}"
        )


class TokenBuffer:
    """A list of token ids that only grows, as a [1, length] tensor, so that logits processors get a view and no fresh copy.

    Args:
        pad_ids: come first.
        token_ids: the list itself; what was appended to it since the last call is copied at the next one.
    """

    def __init__(self, pad_ids: list[int], token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._pads = len(pad_ids)
        self._copied = 0  # of token_ids
        self._data = torch.tensor([pad_ids], dtype=torch.long)

    def with_path(self, path: list[int]) -> torch.Tensor:
        """[1, pads + length + len(path)]: the committed tokens followed by `path`, which stays uncommitted."""
        fresh = self._token_ids[self._copied :] + path
        start = self._pads + self._copied
        end = start + len(fresh)
        if end > self._data.shape[1]:
            grown = torch.empty((1, 2 * end), dtype=torch.long)
            grown[:, :start] = self._data[:, :start]
            self._data = grown
        if fresh:
            self._data[0, start:end] = torch.tensor(fresh, dtype=torch.long)
        self._copied = len(self._token_ids)
        return self._data[:, :end]


class KVStore(Protocol):
    """Keeps K/V between requests."""

    def load(self, cache: KVCache, row: int) -> int:
        """Write the K/V that it has of the prompt's first slots to an empty row; returns how many slots."""

    def save(self, cache: KVCache, row: int) -> None:
        """The sequence has finished well and leaves `row`, whose committed slots hold its tokens but the last."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine.

    `token_ids` holds prompt + output; its last element is the root of the next tree and is not in the cache. `pad_ids` are the
    left-padding tokens that a caller of `generate` passed: the model never sees them, logits processors and criteria do.
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    randomness: Randomness
    eos_token_ids: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None  # stop strings or StoppingCriteria: asked once per emitted token
    pad_ids: list[int] = field(default_factory=list)
    processor: Any = None  # LogitsProcessorList for this row, or None
    row: int = -1  # slot of the KV cache; -1: not admitted
    prompt_len: int = field(init=False)
    buffer: TokenBuffer = field(init=False)
    accept_lengths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None  # why it ended with finish_reason "error"; raised to whoever asked for it
    record: Any = None  # the caller's Recorder (streamer, scores, logits), told about every step
    store: KVStore | None = None  # K/V of the prompt's beginning, and who wants this sequence's
    cached_tokens: int = 0  # of the prompt, whose K/V came from the store
    times: dict[str, float] = field(default_factory=dict)  # seconds by phase

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)
        self.buffer = TokenBuffer(self.pad_ids, self.token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.params.max_new_tokens - self.output_length

    def append(self, token_ids: list[int]) -> int:
        """Emit tokens one by one until the sequence stops; returns how many were kept.

        The only place that decides about EOS, stop tokens, stop strings and length. The kept count cuts the accepted path.
        """
        for count, token in enumerate(token_ids, 1):
            self.token_ids.append(token)
            stopped = self.stop_check is not None and self.stop_check(self)  # a criterion may count its calls: one a token
            if token in self.eos_token_ids:
                self.finish_reason = "eos"
            elif stopped or token in self.params.stop_token_ids:
                self.finish_reason = "stop"
            elif self.remaining <= 0:
                self.finish_reason = "length"
            if self.finished:
                return count
        return len(token_ids)
