"""What goes over the wire: OpenAI's requests, as far as the engine can honour them, and OpenAI's answers and errors.

A field that is unknown, or whose value would change the output in a way that the engine does not have, is refused by name. Beyond
OpenAI's fields: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, as other servers call them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from specdec.engine import Result
from specdec.sequence import EXTREME, SamplingParams

__all__ = [
    "ApiError", "ChatRequest", "CompletionRequest", "ErrorAnswer", "Message", "ReasonRequest", "error_body", "finish_reason", "speculation",
    "usage",
]  # fmt: skip

INT64 = 2**63
MOST = 2048  # prompts, messages, parts of a message


def _encodable(text: str) -> str:
    """JSON can escape lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, got a lone surrogate") from None
    return text


def _greedy_or_finite(temperature: float) -> float:
    """Where SamplingParams has its lower bound, too."""
    if 0 < temperature < 1 / EXTREME:
        raise ValueError(f"must be 0 (greedy) or at least {1 / EXTREME:g}, got {temperature:g}")
    return temperature


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# Every list is given up at its first mistake: a body full of them would be told one by one.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Several = Field(min_length=1, max_length=MOST, fail_fast=True)
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_greedy_or_finite)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None  # as answers say it
Evaluators = Literal["yes_no", "log_probability", "self_consistency", "arithmetic", "countdown"]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class ApiError(HTTPException):
    """An error in OpenAI's form. The message never holds what the server knows and the client does not (paths, tracebacks)."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(status, message, {"Retry-After": str(retry_after)} if retry_after else None)
        self.param, self.code = param, code


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; text that UTF-8 cannot hold (lone surrogates) is replaced."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    named = None if param is None else _printable(param)
    return {"error": {"message": _printable(message), "type": kind, "param": named, "code": code}}


def _printable(text: str) -> str:
    return text[:500].encode("utf-8", "replace").decode()


class _Body(BaseModel):
    """Strict: a string is no number, and what is not declared is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, body: Any) -> Any:
        """All but the first of the fields to refuse are left out: one is told, and there may be many."""
        if not isinstance(body, dict):
            return body
        unknown = [name for name in body if name not in cls.model_fields]
        return {name: value for name, value in body.items() if name in cls.model_fields or name is unknown[0]}


class StreamOptions(_Body):
    """What a stream ends with."""

    include_usage: bool | None = None


class _Sampling(_Body):
    """What both requests have in common. null is the same as leaving a field out."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = Field(None, description="0 is greedy; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1 / EXTREME, le=100)
    presence_penalty: float | None = Field(None, ge=0, le=0, description="not supported: use repetition_penalty")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="not supported: use repetition_penalty")
    n: int | None = Field(None, ge=1, lt=2**31)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="fixes the text")
    user: str | None = Field(None, description="read by nobody")

    @property
    def wanted_tokens(self) -> int | None:
        """max_tokens; None: as many as there may be."""
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        """Whether the emitted tokens' log-probabilities are asked for."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, max_new_tokens: int) -> SamplingParams:
        """The engine's parameters.

        Raises:
            ValueError: values that contradict each other.
        """
        given: dict[str, Any] = {
            "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty, "n": self.n,
            "min_new_tokens": self.min_tokens, "ignore_eos": self.ignore_eos, "stop_token_ids": self.stop_token_ids,
        }  # fmt: skip
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=self.seed,
            stop_strings=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=0 if self.wants_logprobs else None,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Text | TokenIds | Annotated[list[Text], Several] | Annotated[list[TokenIds], Several]
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="default 16")
    logprobs: Literal[0] | None = Field(None, description="0: of the emitted tokens; alternatives are not reported")
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> list[Any]:
        """As the engine encodes them."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Body):
    """A part of a message; images and sound are refused."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One turn of a chat; what an answer's message holds may come back in the next request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MOST, fail_fast=True)]
    name: Text | None = Field(None, description="of who speaks; the chat template may use it")
    refusal: None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None
    annotations: Nothing = None

    def as_dict(self) -> dict[str, str]:
        """What chat templates expect; developer is OpenAI's newer name of system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        said = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return said if self.name is None else {**said, "name": self.name}


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Several]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="goes before max_tokens; default: all that fit")
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def prompts(self) -> list[Any]:
        """As the engine encodes them."""
        return [[message.as_dict() for message in self.messages]]


class ReasonRequest(_Body):
    """POST /v1/reason: the arguments of `specdec.reason`, with its defaults. Nothing here runs code that a client or the model wrote."""

    model: str
    problem: Annotated[Text, Field(pattern=r"\S")]
    budget: int = Field(2000, ge=0, lt=2**31, description="most tokens that the model generates, all texts together")
    evaluator: Evaluators | None = "yes_no"
    policy: str = Field("bg_mcts", max_length=100)
    seed: int = Field(0, ge=0, lt=INT64)
    temperature: Temperature = 0.7
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    answers: Literal["math", "number", "exact"] = "math"
    step: str = Field("steps", max_length=100, description="where a step ends: steps, newline, paragraph, code, tokens:N")
    step_tokens: int = Field(256, ge=1, lt=2**31, description="most tokens of a step")
    seconds: float | None = Field(None, gt=0, description="after which the search ends with what it has found")
    width: int = Field(4, ge=1, lt=2**31, description="texts that it has in flight; the tree depends on it")
    tree: bool = Field(False, description="send the whole tree with the answer")
    stream: bool = False


def finish_reason(reason: str | None) -> str | None:
    """OpenAI's word for the engine's."""
    return "stop" if reason in ("eos", "stop") else reason


def usage(results: Iterable[Result], n: int) -> dict[str, Any]:
    """Tokens, and what speculation saved; a prompt counts once for its n samples."""
    results = list(results)
    prompt = sum(result.prompt_tokens for result in results[::n])
    completion, steps = sum(len(result.token_ids) for result in results), sum(result.steps for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "speculation": speculation(completion, steps),
    }


def speculation(tokens: int, steps: int) -> dict[str, Any]:
    """What speculation saved: the forwards of `accepted_tokens`."""
    return {"steps": steps, "accepted_tokens": tokens - steps, "tokens_per_step": tokens / max(1, steps)}
