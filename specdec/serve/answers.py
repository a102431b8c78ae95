"""From results and pieces to answers, whole or in chunks: OpenAI's, and that of /v1/reason."""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from specdec.engine import Result
from specdec.search.progress import Event as Step
from specdec.search.reason import ReasonResult
from specdec.search.request import Answer
from specdec.serve.protocol import ChatRequest, CompletionRequest, ReasonRequest, finish_reason, speculation, usage
from specdec.serve.scheduler import Ended, Piece

__all__ = ["ChatWriter", "CompletionWriter", "ReasonWriter", "Writer", "event"]


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class Writer:
    """Writes the answer to one request.

    Args:
        model: its name.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str) -> None:
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, end: Any) -> dict[str, Any]:
        """The answer of a request without streaming."""
        raise NotImplementedError

    def chunks(self, piece: Any) -> Iterator[dict[str, Any]]:
        """What comes before the end, in a stream; nothing if it says nothing."""
        raise NotImplementedError

    def last_chunks(self, end: Any) -> Iterator[dict[str, Any]]:
        """What the end becomes in a stream."""
        raise NotImplementedError


class TextWriter(Writer):
    """Writes texts.

    Args:
        model: its name.
        body: the request.
        tokenizer: names the tokens of log-probabilities.
    """

    def __init__(self, model: str, body: CompletionRequest | ChatRequest, tokenizer: Any) -> None:
        super().__init__(model)
        self._tokenizer, self._n, self._wants_usage = tokenizer, body.n or 1, body.wants_usage

    def whole(self, end: Ended) -> dict[str, Any]:
        choices = [self._choice(index, result) for index, result in enumerate(end.results)]
        return {**self._common, "object": self.kind, "choices": choices, "usage": usage(end.results, self._n)}

    def last_chunks(self, end: Ended) -> Iterator[dict[str, Any]]:
        if self._wants_usage:
            yield {**self._common, "object": self.chunk_kind, "choices": [], "usage": usage(end.results, self._n)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": [choice]}

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        raise NotImplementedError

    def _names(self, token_ids: list[int]) -> list[str]:
        return [str(self._tokenizer.decode([token])) for token in token_ids]


class CompletionWriter(TextWriter):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets: dict[int, int] = defaultdict(int)  # letters of the tokens told, by sample

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.index, piece.token_ids, piece.logprobs)
        if piece.text or logprobs or piece.finish_reason:
            yield self._chunk(_completion(piece.index, piece.text, logprobs, piece.finish_reason))

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        return _completion(index, result.text, self._logprobs(index, result.token_ids, result.logprobs), result.finish_reason)

    def _logprobs(self, index: int, token_ids: list[int], logprobs: list[float] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        names, offsets = self._names(token_ids), []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def _completion(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(reason)}


class ChatWriter(TextWriter):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._opened: set[int] = set()

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(piece.token_ids, piece.logprobs)
        if not (piece.text or logprobs or piece.finish_reason):
            return
        delta = {"content": piece.text} if piece.text or not piece.finish_reason else {}
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            delta = {"role": "assistant", "content": piece.text}
        reason = finish_reason(piece.finish_reason)
        yield self._chunk({"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        logprobs = self._logprobs(result.token_ids, result.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(result.finish_reason)}

    def _logprobs(self, token_ids: list[int], logprobs: list[float] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode()), "top_logprobs": []}
            for name, logprob in zip(self._names(token_ids), logprobs)
        ]
        return {"content": content, "refusal": None}


class ReasonWriter(Writer):
    """/v1/reason."""

    prefix, kind, chunk_kind = "reason", "reasoning", "reasoning.step"

    def __init__(self, model: str, body: ReasonRequest) -> None:
        super().__init__(model)
        self._wants_tree = body.tree

    def whole(self, end: ReasonResult) -> dict[str, Any]:
        found: dict[str, Any] = {
            "status": str(end.status), "answer": end.answer, "text": end.text, "score": end.score, "answers": _votes(end.answers),
            "notes": list(end.notes), "seconds": end.seconds,
        }  # fmt: skip
        if self._wants_tree:
            found["tree"] = end.tree.to_dict()
        spent = {
            "budget": end.budget, "completion_tokens": end.used, "evaluator_tokens": end.evaluator_tokens,
            "prefill_tokens": end.prefill_tokens, "cached_tokens": end.cached_tokens, "recomputed_tokens": end.recomputed_tokens,
            "speculation": speculation(end.generated, end.steps),
        }  # fmt: skip
        return {**self._common, "object": self.kind, **found, "usage": spent}

    def chunks(self, piece: Step) -> Iterator[dict[str, Any]]:
        names = ("used", "budget", "nodes", "node", "text", "score")
        told = {name: getattr(piece, name) for name in names}
        yield {**self._common, "object": self.chunk_kind, **told, "answers": _votes(piece.answers)}

    def last_chunks(self, end: ReasonResult) -> Iterator[dict[str, Any]]:
        yield self.whole(end)


def _votes(answers: tuple[Answer, ...]) -> list[dict[str, Any]]:
    return [asdict(answer) for answer in answers]
