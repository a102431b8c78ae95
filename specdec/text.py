"""From token ids to text, piece by piece, and the stop strings."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from specdec.sequence import Sequence

__all__ = ["Detokenizer", "cut_at_stop", "stop_string_check"]

_SLACK = 8  # tokens of left context: a token may decode differently at the start of a text


def cut_at_stop(text: str, stop_strings: Seq[str]) -> str:
    """The text before the first stop string."""
    ends = [index for stop in stop_strings if (index := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def stop_string_check(tokenizer: Any, stop_strings: Seq[str]) -> Callable[[Sequence], bool]:
    """Whether the newest token completed a stop string; only the end of the output is decoded.

    The window covers every text whose tokens carry at least one character each, and doubles where they carry less.
    """
    longest = max(len(stop) for stop in stop_strings)

    def completed(seq: Sequence) -> bool:
        window = longest + _SLACK
        while True:
            first = max(seq.prompt_len, len(seq.token_ids) - window)  # not output_ids, a copy of the whole output
            text = tokenizer.decode(seq.token_ids[first:], skip_special_tokens=True)
            if window >= seq.output_length or len(text) >= longest + _SLACK:
                return any(stop in text for stop in stop_strings)
            window *= 2

    return completed


class Detokenizer:
    """Text of a growing list of tokens, in pieces that never split a character or reveal part of a stop string.

    The pieces of one request, joined, are `tokenizer.decode(all tokens)` cut before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop_strings: Seq[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._start = 0  # tokens before it are settled and only decoded as left context
        self._read = 0  # tokens before it have been turned into text
        self._pending = ""  # text held back: it may be the beginning of a stop string
        self._stopped = False

    def push(self, output_ids: Seq[int], final: bool) -> str:
        """The new text, given all tokens so far; `final` releases what was held back."""
        if self._stopped:
            return ""
        before = self._decode(output_ids[self._start : self._read])
        now = self._decode(output_ids[self._start :])
        if final or not now.endswith("\ufffd"):  # an incomplete character waits for its other bytes
            self._pending += now[len(before) :]
            if len(now) > len(before):  # tokens without text (special ones) are no context: a space after them would be lost
                self._start = self._read
            self._read = len(output_ids)
        return self._release(final)

    def _decode(self, token_ids: Seq[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _release(self, final: bool) -> str:
        cut = cut_at_stop(self._pending, self._stops)
        if len(cut) < len(self._pending):
            self._stopped, self._pending = True, ""
            return cut
        held = 0 if final else max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        ready, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
