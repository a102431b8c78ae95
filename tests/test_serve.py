"""specdec serve: what clients get is what Engine.generate gives, whoever else is served; limits, errors and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, ValidationError

import specdec
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.kv_cache import KVCache
from specdec.sequence import SamplingParams
from specdec.serve import app as app_module
from specdec.serve.app import Limits, make_app
from specdec.serve.mailbox import Mailbox
from specdec.serve.protocol import ChatRequest, CompletionRequest, Message, ReasonRequest
from specdec.serve.scheduler import Ended, Failed, Job, Overloaded, Piece, Scheduler
from specdec.state import load_state

MODEL = "tiny"
PROMPT = "abcabcabc"
BASE = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "abc"}], "max_completion_tokens": 12, "temperature": 0}


def make_engine(model: Any = None, **options: Any) -> specdec.Engine:
    return specdec.Engine(model or make_tiny_llama(), make_tiny_tokenizer(), method="ngram", budget=8, **options)


@pytest.fixture(scope="module")
def reference() -> specdec.Engine:
    """An engine of its own, one prompt at a time: what every answer is compared with."""
    return make_engine()


@contextlib.asynccontextmanager
async def serving(limits: Limits | None = None, key: str | None = None, **options: Any) -> AsyncIterator[Any]:
    """A client of a server in this process; it has no row in use when the block ends well."""
    engine = make_engine(**options)
    app = make_app(engine, MODEL, limits, key)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            client.app, client.engine = app, engine
            yield client
        await until(lambda: not engine.rows and not engine.waiting and not app.state.scheduler._unfinished)


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end well."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({}, {}),
        ({"temperature": 1.0, "seed": 3, "top_p": 0.9, "min_p": 0.01, "top_k": 40}, {"temperature": 1.0, "seed": 3, "top_p": 0.9, "min_p": 0.01, "top_k": 40}),
        ({"temperature": 0.8, "seed": 5, "n": 3, "logprobs": 0}, {"temperature": 0.8, "seed": 5, "n": 3, "logprobs": 0}),
        ({"repetition_penalty": 1.3, "min_tokens": 4, "stop": ["zz", "q"], "ignore_eos": True},
         {"repetition_penalty": 1.3, "min_new_tokens": 4, "stop_strings": ("zz", "q"), "ignore_eos": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_those_of_generate(reference: specdec.Engine, fields: dict, params: dict, stream: bool) -> None:
    expected = reference.generate(PROMPT, SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, **params}))
    results = expected if isinstance(expected, list) else [expected]

    async def main() -> None:
        async with serving(max_rows=2) as client:
            answer = await client.post("/v1/completions", json={**BASE, **fields, "stream": stream})
            assert answer.status_code == 200, answer.text
            if stream:
                choices = [chunk["choices"][0] for chunk in events(answer.text)]
            else:
                choices = answer.json()["choices"]
                assert answer.json()["usage"]["completion_tokens"] == sum(len(each.token_ids) for each in results)
            for index, result in enumerate(results):
                own = [choice for choice in choices if choice["index"] == index]
                assert "".join(choice["text"] for choice in own) == result.text
                assert own[-1]["finish_reason"] == {"eos": "stop"}.get(result.finish_reason, result.finish_reason)
                assert all(choice["finish_reason"] is None for choice in own[:-1])
                if result.logprobs is not None:
                    told = [value for choice in own for value in choice["logprobs"]["token_logprobs"]]
                    assert told == pytest.approx(result.logprobs, abs=1e-5)

    asyncio.run(main())


def test_many_prompts_at_once(reference: specdec.Engine) -> None:
    prompts = ["abc", "xyz xyz", "hello"]
    expected = reference.generate(prompts, SamplingParams(max_new_tokens=10, temperature=1.0, seed=7, n=2))

    async def main() -> None:
        async with serving(max_rows=2) as client:
            body = {**BASE, "prompt": prompts, "max_tokens": 10, "temperature": 1.0, "seed": 7, "n": 2}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert [choice["text"] for choice in answer["choices"]] == [result.text for result in expected]
            assert answer["usage"]["prompt_tokens"] == 3 + 7 + 5

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_that_of_generate(reference: specdec.Engine, stream: bool) -> None:
    expected = reference.generate(CHAT["messages"], SamplingParams(max_new_tokens=12))

    async def main() -> None:
        async with serving() as client:
            parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]}]
            body = {**CHAT, "messages": parts, "stream": stream, "logprobs": True}
            answer = await client.post(
                "/v1/chat/completions", json=body | ({"stream_options": {"include_usage": True}} if stream else {})
            )
            if not stream:
                (choice,) = answer.json()["choices"]
                assert choice["message"]["content"] == expected.text and len(choice["logprobs"]["content"]) == len(
                    expected.token_ids
                )
                speculation = answer.json()["usage"]["speculation"]
                assert speculation["steps"] + speculation["accepted_tokens"] == len(expected.token_ids)
                return
            *chunks, last = events(answer.text)
            assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(expected.token_ids)

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-6}, {"repetition_penalty": 1e-6}, {"repetition_penalty": 100, "temperature": 100}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_outermost_values_are_served(fields: dict, stream: bool) -> None:
    """What is accepted never overflows, and no answer holds NaN, which JSON does not know."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} in an answer")

    async def main() -> None:
        async with serving() as client:
            answer = await client.post("/v1/completions", json={**BASE, **fields, "logprobs": 0, "stream": stream})
            assert answer.status_code == 200, answer.text
            for part in events(answer.text) if stream else [answer.json()]:
                json.loads(json.dumps(part), parse_constant=refuse)

    asyncio.run(main())


def test_the_usual_chat_idiom(reference: specdec.Engine) -> None:
    """`messages.append(answer.choices[0].message)`, as object and as dict: what the server said may come back, nulls and all."""
    first = [{"role": "user", "content": "abc", "name": "ann"}]
    said = reference.generate(CHAT["messages"], SamplingParams(max_new_tokens=12)).text
    second = [*CHAT["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "d"}]
    expected = reference.generate(second, SamplingParams(max_new_tokens=12)).text
    asked: dict[str, Any] = {"model": MODEL, "max_completion_tokens": 12, "temperature": 0}

    async def main() -> None:
        async with serving() as client:
            chat = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=client, max_retries=0
            ).chat.completions
            told = (await chat.create(messages=first, **asked)).choices[0].message
            assert told.content == said
            for turn in (told, told.model_dump(), {**told.model_dump(), "tool_calls": [], "annotations": []}):
                answer = await chat.create(messages=[*first, turn, {"role": "user", "content": "d"}], **asked)
                assert answer.choices[0].message.content == expected
            for field in ("refusal", "tool_calls", "function_call", "audio"):
                turn = {"role": "assistant", "content": said, field: "x" if field == "refusal" else {"id": "x"}}
                with pytest.raises(openai.BadRequestError, match=field):
                    await chat.create(messages=[*first, turn], **asked)

    asyncio.run(main())


def test_templates_are_given_names() -> None:
    message = Message(role="user", content="abc", name="ann")
    assert message.as_dict() == {"role": "user", "content": "abc", "name": "ann"}


def test_requests_beside_each_other_keep_their_text(reference: specdec.Engine) -> None:
    def expected(index: int) -> str:
        return reference.generate(
            f"text {index % 7}", SamplingParams(max_new_tokens=5 + index % 9, temperature=1.0, seed=index)
        ).text

    async def main() -> None:
        async with serving(max_rows=4) as client:

            async def ask(index: int) -> str:
                body = {**BASE, "prompt": f"text {index % 7}", "max_tokens": 5 + index % 9, "temperature": 1.0, "seed": index}
                return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

            texts = await asyncio.gather(*(ask(index) for index in range(24)))
            assert texts == [expected(index) for index in range(24)]

    asyncio.run(main())


# ---- refusals -----------------------------------------------------------------------------------------------------------

DEEP = "[" * 5000
HOSTILE: list[tuple[str, Any, int, str]] = [  # path, body (dict or raw text), status, what the message names
    ("/v1/completions", {**BASE, "frobnicate": 1}, 400, "frobnicate"),
    ("/v1/completions", {**BASE, "echo": True}, 400, "echo"),
    ("/v1/completions", {**BASE, "presence_penalty": 0.5}, 400, "presence_penalty"),
    ("/v1/completions", {**BASE, "logit_bias": {"1": 5}}, 400, "logit_bias"),
    ("/v1/completions", {**BASE, "logprobs": 5}, 400, "logprobs"),
    ("/v1/completions", {**BASE, "model": "../../etc/passwd"}, 404, "model"),
    ("/v1/completions", {**BASE, "model": "\ud800"}, 404, "model"),
    ("/v1/completions", {**BASE, "\ud800": 1}, 400, ""),
    ("/v1/completions", {**BASE, "prompt": "\ud800"}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": []}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": [[]]}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": [10**6]}, 400, "vocabulary"),
    ("/v1/completions", {**BASE, "prompt": {"a": 1}}, 400, "prompt"),
    ("/v1/completions", {**BASE, "prompt": "a" * 5000}, 400, "tokens"),
    ("/v1/completions", {**BASE, "max_tokens": 10**9}, 400, "max_tokens"),
    ("/v1/completions", {**BASE, "max_tokens": 10**30}, 400, "max_tokens"),
    ("/v1/completions", {**BASE, "max_tokens": "7"}, 400, "max_tokens"),
    ("/v1/completions", {**BASE, "max_tokens": True}, 400, "max_tokens"),
    ("/v1/completions", {**BASE, "n": 10**6}, 400, "n times"),
    ("/v1/completions", {**BASE, "n": 0}, 400, "n"),
    ("/v1/completions", {**BASE, "stop": ""}, 400, "stop"),
    ("/v1/completions", {**BASE, "min_tokens": 100}, 400, "min_new_tokens"),
    ("/v1/completions", {**BASE, "seed": 2**70}, 400, "seed"),
    ("/v1/completions", {**BASE, "temperature": 1e-40}, 400, "temperature"),
    ("/v1/completions", {**BASE, "repetition_penalty": 1e-300}, 400, "repetition_penalty"),
    ("/v1/completions", {**BASE, "temperature": 1, "repetition_penalty": 1e-300}, 400, "repetition_penalty"),
    ("/v1/reason", {"model": MODEL, "problem": "a", "temperature": 1e-40}, 400, "temperature"),
    ("/v1/completions", '{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    ("/v1/completions", '{"model": "tiny", "prompt": "a", "top_p": 1e999}', 400, "top_p"),
    ("/v1/completions", '{"model": "tiny", "prompt": "a", "seed": ' + "9" * 5000 + "}", 400, ""),
    ("/v1/completions", "{", 400, "JSON"),
    ("/v1/completions", DEEP, 400, ""),
    ("/v1/completions", "null", 400, "body"),
    ("/v1/completions", "x" * 200_000, 413, "bytes"),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "root", "content": "a"}]}, 400, "role"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": None}]}, 400, "content"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc"}]}]}, 400, "content"),
    ("/v1/chat/completions", {**CHAT, "tools": []}, 400, "tools"),
    ("/v1/../../etc/passwd", {}, 404, ""),
    ("/v1/%2e%2e/%2e%2e/etc/passwd", {}, 404, ""),
    ("/v1/models/..%2f..%00", {}, 404, ""),
]  # fmt: skip


def test_hostile_requests_are_refused_by_name(reference: specdec.Engine) -> None:
    async def main() -> None:
        async with serving(Limits(body=100_000)) as client:
            for path, body, status, named in HOSTILE:
                content = body if isinstance(body, str) else json.dumps(body)
                answer = await client.post(path, content=content, headers={"content-type": "application/json"})
                error = answer.json()["error"]
                assert answer.status_code == status, (path, content[:200], answer.text)
                assert named in error["message"], (content[:200], error)
                assert "Traceback" not in answer.text and ".py" not in answer.text and "/work" not in answer.text
            good = (await client.post("/v1/completions", json=BASE)).json()
            assert good["choices"][0]["text"] == reference.generate(PROMPT, SamplingParams(max_new_tokens=12)).text

    asyncio.run(main())


MANY = 20_000
WRONG = {"": 1}
FLOODS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionRequest, {**BASE, "prompt": [-1] * MANY}),
    (CompletionRequest, {**BASE, "prompt": [[-1] * MANY] * 2}),
    (CompletionRequest, {**BASE, "prompt": ["\ud800"] * 2000}),
    (CompletionRequest, {**BASE, "prompt": ["a"] * MANY}),
    (CompletionRequest, {**BASE, "prompt": [[1]] * MANY}),
    (CompletionRequest, {**BASE, "stop": [""] * MANY}),
    (CompletionRequest, {**BASE, "stop_token_ids": [-1] * MANY}),
    (CompletionRequest, {**BASE, **{str(index): 0 for index in range(MANY)}}),
    (ChatRequest, {**CHAT, "messages": [WRONG] * MANY}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": "a"}] * MANY}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [WRONG] * MANY}]}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": "a", **{str(index): 0 for index in range(MANY)}}]}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": "a", "tool_calls": [1] * MANY}]}),
    (ReasonRequest, {"model": MODEL, "problem": "a", **{str(index): 0 for index in range(MANY)}}),
]


@pytest.mark.parametrize("place", range(len(FLOODS)))
def test_one_thing_wrong_is_enough(place: int) -> None:
    """A megabyte of mistakes is not told one by one, which would take seconds in the event loop."""
    model, body = FLOODS[place]
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    count = refused.value.error_count()
    assert count <= 12


def test_a_body_without_length_is_limited_too() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async def main() -> None:
        async with serving(Limits(body=10_000)) as client:
            answer = await client.post("/v1/completions", content=body(), headers={"content-type": "application/json"})
            assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "bearer wrong",
        "bearersecret",
        "Bearer  secret",
        "Basic secret",
        "Bearer secretx",
        "secret",
    ],
)
def test_a_missing_or_wrong_key(header: str | None) -> None:
    async def main() -> None:
        async with serving(key="secret") as client:
            headers = {} if header is None else {"authorization": header}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = await client.get(path, headers=headers)
                assert answer.status_code == 401 and "secret" not in answer.text
            assert (await client.get("/health")).status_code == 200
            for scheme in ("Bearer", "bearer", "BEARER"):  # the scheme's letters may be of either case (RFC 9110, 11.1)
                models = await client.get("/v1/models", headers={"authorization": f"{scheme} secret"})
                assert [card["id"] for card in models.json()["data"]] == [MODEL]

    asyncio.run(main())


def test_metrics_count() -> None:
    async def main() -> None:
        async with serving() as client:
            await client.post("/v1/completions", json=BASE)
            await client.get("/nowhere")
            text = (await client.get("/metrics")).text
            assert 'specdec_http_answers_total{path="/v1/completions",status="200"} 1.0' in text
            assert 'specdec_http_answers_total{path="other",status="404"} 1.0' in text
            assert "specdec_prompt_tokens_total 9.0" in text and "specdec_request_seconds_count 1.0" in text

    asyncio.run(main())


def test_overload_is_429_and_no_hang() -> None:
    async def main() -> None:
        async with serving(Limits(waiting=2), max_rows=1) as client:
            body = {**BASE, "max_tokens": 40, "ignore_eos": True}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(12)))
            codes = [answer.status_code for answer in answers]
            assert set(codes) == {200, 429} and codes.count(200) >= 3
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_request_ends_and_others_go_on(stream: bool) -> None:
    async def main() -> None:
        async with serving(Limits(seconds=0.2), max_rows=1) as client:
            long = {**BASE, "max_tokens": 2000, "ignore_eos": True, "stream": stream}
            answer = await client.post("/v1/completions", json=long)
            error = json.loads(answer.text.split("data: ")[-1])["error"] if stream else answer.json()["error"]
            assert answer.status_code == (200 if stream else 504) and "longer" in error["message"] and "[DONE]" not in answer.text
            assert (await client.post("/v1/completions", json={**BASE, "max_tokens": 1})).status_code == 200

    asyncio.run(main())


def test_a_stream_without_news_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments, which clients skip, while a request waits for a row."""
    monkeypatch.setattr("specdec.serve.app.POLL", 0.01)
    monkeypatch.setattr("specdec.serve.app.KEEP_ALIVE", 0.02)

    async def main() -> None:
        async with serving(max_rows=1) as client:
            long = asyncio.create_task(client.post("/v1/completions", json={**BASE, "max_tokens": 500, "ignore_eos": True}))
            await until(lambda: client.engine.rows)
            text = (await client.post("/v1/completions", json={**BASE, "stream": True})).text
            assert text.startswith(": ") and text.endswith("data: [DONE]\n\n")
            assert (await long).status_code == 200

    asyncio.run(main())


def test_what_nobody_reads_is_kept_as_one_piece() -> None:
    async def main() -> None:
        mailbox = Mailbox()
        for step in range(200):
            for index in range(3):
                mailbox.put(Piece(index, f"{step},", [step], [-1.0 * step], "stop" if step == 199 else None))
        mailbox.put(Failed("closed"))
        await until(lambda: len(mailbox) == 4)
        for index in range(3):
            expected = Piece(
                index, "".join(f"{step}," for step in range(200)), list(range(200)), [-1.0 * s for s in range(200)], "stop"
            )
            assert await mailbox.get(1) == expected
        assert await mailbox.get(1) == Failed("closed") and await mailbox.get(0.01) is None

    asyncio.run(main())


def test_a_failing_step_ends_those_in_it(reference: specdec.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as client:

            def broken(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError("secret /path")

            with monkeypatch.context() as patch:
                patch.setattr(client.engine.target, "forward", broken)
                answer = await client.post("/v1/completions", json=BASE)
            assert answer.status_code == 500 and "secret" not in answer.text
            again = (await client.post("/v1/completions", json=BASE)).json()
            assert again["choices"][0]["text"] == reference.generate(PROMPT, SamplingParams(max_new_tokens=12)).text

    asyncio.run(main())


def test_memory_that_was_short_once_is_no_end(reference: specdec.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt for which the cache cannot grow fails alone; what runs beside it and what comes later is answered."""
    original = KVCache._allocate

    def short_of_memory(self: KVCache, *args: Any) -> Any:
        wanted = original(self, *args)
        if wanted.shape[3] > 1024:
            raise torch.OutOfMemoryError("no memory")
        return wanted

    monkeypatch.setattr(KVCache, "_allocate", short_of_memory)
    short, long = {**BASE, "max_tokens": 300, "ignore_eos": True}, {**BASE, "prompt": "a" * 1500}
    expected = reference.generate(PROMPT, SamplingParams(max_new_tokens=300, ignore_eos=True)).text

    async def main() -> None:
        async with serving() as client:
            beside = asyncio.create_task(client.post("/v1/completions", json=short))
            await until(lambda: client.engine.rows)
            assert (await client.post("/v1/completions", json=long)).status_code == 500
            for answer in (await beside, await client.post("/v1/completions", json=short)):
                assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected

    asyncio.run(main())


# ---- the scheduler alone ------------------------------------------------------------------------------------------------


class Listener:
    """Collects the events of one job."""

    def __init__(self, scheduler: Scheduler, prompt: str, params: SamplingParams, client: str = "", **fields: Any) -> None:
        self.scheduler, self.events = scheduler, []
        self.first, self.done = threading.Event(), threading.Event()
        self.job = Job([scheduler.engine.encode(prompt)], params, client, self, **fields)

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        self.first.set()
        if not isinstance(event, Piece):
            self.done.set()

    def ask(self) -> Any:
        """Submit, and wait for the end."""
        self.scheduler.submit(self.job)
        return self.last

    @property
    def last(self) -> Any:
        assert self.done.wait(60), "no end came"
        return self.events[-1]


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(make_engine(max_rows=2), max_waiting=50)
    yield scheduler
    scheduler.close()
    assert not scheduler.engine.rows and not scheduler.engine.waiting and scheduler._unfinished == 0 and not scheduler._queues


LONG = SamplingParams(max_new_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)


def test_clients_share_the_rows(scheduler: Scheduler) -> None:
    """One client queues 20 requests before another asks for one: that one does not come last."""
    order: list[str] = []
    many = [Listener(scheduler, f"a{index}", SHORT, "greedy") for index in range(20)]
    one = Listener(scheduler, "b", SHORT, "modest")
    for listener in (*many, one):
        listener.job.notify = lambda event, o=listener: (order.append(o.job.client), o(event))
        scheduler.submit(listener.job)
    scheduler.start()
    assert all(isinstance(listener.last, Ended) for listener in (*many, one))
    assert order.index("modest") <= 3


@pytest.mark.parametrize("search", [False, True])
def test_requests_of_a_client_share_its_rows(scheduler: Scheduler, search: bool) -> None:
    """Twenty samples, of one request or of a search, whose every text is a job, do not all go before the same client's next request."""
    order: list[str] = []
    part_of = object() if search else None
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, n=1 if search else 20)
    many = [Listener(scheduler, "a", params, "one", part_of=part_of) for _ in range(20 if search else 1)]
    other = Listener(scheduler, "b", SHORT, "one")
    admitted = scheduler.engine.add
    scheduler.engine.add = lambda seq: (order.append("b" if seq.token_ids == other.job.prompts[0] else "a"), admitted(seq))
    for listener in (*many, other):
        scheduler.submit(listener.job)
    scheduler.start()
    assert all(isinstance(listener.last, Ended) for listener in (*many, other))
    assert order[:2] == ["a", "b"] and len(order) == 21


def test_a_short_request_overtakes_a_long_one(scheduler: Scheduler) -> None:
    scheduler.start()
    long = Listener(scheduler, "abc", LONG, stream=True)
    scheduler.submit(long.job)
    assert long.first.wait(60)
    assert isinstance(Listener(scheduler, "xyz", SHORT).ask(), Ended) and not long.done.is_set()
    scheduler.cancel(long.job)


def test_cancelling_frees_the_row(scheduler: Scheduler) -> None:
    scheduler.start()
    running = [Listener(scheduler, "abc", LONG, stream=True) for _ in range(2)]
    waiting = Listener(scheduler, "abc", LONG)
    after = Listener(scheduler, "xyz", SHORT)
    for listener in (*running, waiting, after):
        scheduler.submit(listener.job)
    assert running[0].first.wait(60)
    for listener in (waiting, *running):
        scheduler.cancel(listener.job)
    assert isinstance(after.last, Ended)
    assert [listener.last for listener in (*running, waiting)] == [Failed("cancelled")] * 3
    scheduler.cancel(after.job)  # nothing is left to cancel


def test_a_failing_request_fails_alone(scheduler: Scheduler, reference: specdec.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second sample fails in its processor; both end, a neighbour does not notice."""
    engine, original = scheduler.engine, scheduler.engine._sequences

    def sequences(items: Any, each: Any) -> Any:
        made = original(items, each)
        if len(made) == 2:
            made[1].processor = lambda ids, scores: 1 / 0
        return made

    monkeypatch.setattr(engine, "_sequences", sequences)
    bad = Listener(scheduler, "abc", SamplingParams(max_new_tokens=30, n=2, ignore_eos=True))
    good = Listener(scheduler, PROMPT, SamplingParams(max_new_tokens=12))
    for listener in (bad, good):
        scheduler.submit(listener.job)
    scheduler.start()
    assert (
        bad.last == Failed("error")
        and good.last.results[0].text == reference.generate(PROMPT, SamplingParams(max_new_tokens=12)).text
    )


def test_closing_ends_what_runs(scheduler: Scheduler) -> None:
    scheduler.start()
    listener = Listener(scheduler, "abc", LONG, stream=True)
    scheduler.submit(listener.job)
    assert listener.first.wait(60)
    scheduler.close()
    assert listener.last == Failed("closed")
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(Listener(scheduler, "abc", SHORT).job)


def test_idle_buffers_are_given_back(scheduler: Scheduler) -> None:
    """What a burst of long prompts has grown is not held for ever."""
    scheduler.start()
    held = scheduler.engine.cache.nbytes
    scheduler.idle_seconds = 0.01
    listener = Listener(scheduler, "a" * 900, SHORT, stream=True)
    scheduler.submit(listener.job)
    assert listener.first.wait(60)
    assert isinstance(listener.last, Ended)
    asyncio.run(until(lambda: scheduler.engine.cache.nbytes == held))
    assert isinstance(Listener(scheduler, "abc", SHORT).ask(), Ended)


def test_a_job_that_comes_while_closing_is_told(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives after the thread has looked for arrivals, and before it sees that it must end."""
    first, late = (Listener(scheduler, "abc", LONG) for _ in range(2))
    closer, original = threading.Thread(target=scheduler.close), scheduler._begin

    def begin(job: Job) -> None:
        original(job)
        scheduler.submit(late.job)
        closer.start()
        while not scheduler._refusal:
            pass

    monkeypatch.setattr(scheduler, "_begin", begin)
    scheduler.start()
    assert first.ask() == late.last == Failed("closed")
    closer.join()


def break_the_thread(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next look at the rows raises what nobody expects."""

    def broken() -> None:
        raise AssertionError("unforeseen")

    monkeypatch.setattr(scheduler, "_admit", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


def test_the_thread_does_not_end_in_silence(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it is told, and whoever comes later is refused at once."""
    break_the_thread(scheduler, monkeypatch)
    jobs = [Listener(scheduler, "abc", LONG) for _ in range(3)]
    for listener in jobs:
        scheduler.submit(listener.job)
    called: list[Any] = []

    def call() -> None:
        with pytest.raises(RuntimeError) as refused:
            scheduler.call(lambda: 1)
        called.append(refused.value)

    caller = threading.Thread(target=call)
    caller.start()
    while not scheduler._calls:
        pass
    scheduler.start()
    assert [listener.last for listener in jobs] == [Failed("error")] * 3
    caller.join(60)
    assert called and not caller.is_alive()
    scheduler._thread.join()
    with pytest.raises(RuntimeError, match="thread has ended"):
        scheduler.submit(Listener(scheduler, "abc", SHORT).job)
    assert scheduler._unfinished == scheduler.running == scheduler.waiting == 0


def test_a_server_without_its_thread_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as client:
            break_the_thread(client.app.state.scheduler, monkeypatch)
            assert (await client.post("/v1/completions", json=BASE)).status_code == 500
            await until(lambda: not client.app.state.scheduler.alive)
            assert (await client.get("/health")).status_code == 503
            answer = await client.post("/v1/completions", json=BASE)
            assert answer.status_code == 503 and "thread has ended" in answer.json()["error"]["message"]

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError, KeyError, MemoryError])
def test_a_request_that_cannot_begin_fails_alone(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.engine, "_stop_check", lambda params: (_ for _ in ()).throw(error("unforeseen")))
        bad = Listener(scheduler, "abc", SHORT)
        scheduler.start()
        assert bad.ask() == Failed("error")
    assert isinstance(Listener(scheduler, "abc", SHORT).ask(), Ended)


def test_the_queue_is_bounded(scheduler: Scheduler) -> None:
    for _ in range(52):
        scheduler.submit(Listener(scheduler, "abc", SHORT).job)
    with pytest.raises(Overloaded, match="try again") as refused:
        scheduler.submit(Listener(scheduler, "abc", SHORT).job)
    assert 1 <= refused.value.retry_after <= 60
    scheduler.start()  # else closing has nobody to end them


def make_learner() -> specdec.Engine:
    """Its drafts can be merged with what others learned."""
    return specdec.Engine(make_tiny_llama(), make_tiny_tokenizer(), method="best_first", budget=6)


@contextlib.asynccontextmanager
async def sharing(engine: specdec.Engine, path: Path, share_every: float) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with a warm state."""
    app = make_app(engine, MODEL, warm_state=path, share_every=share_every)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("share_every", [0.02, 1000.0])
def test_the_warm_state_is_shared_now_and_then_and_at_the_end(tmp_path: Path, share_every: float) -> None:
    engine, path = make_learner(), tmp_path / "warm"

    def learned() -> int:
        return len(load_state(path, "best_first", engine.target.vocab_size)["shared.tokens"])

    async def main() -> None:
        async with sharing(engine, path, share_every) as client:
            assert learned() == 0
            assert (await client.post("/v1/completions", json=BASE)).status_code == 200
            if share_every < 1:
                await until(lambda: learned() > 0)
            assert (learned() > 0) == (share_every < 1)
        assert learned() > 0

    asyncio.run(main())


def test_a_warm_state_that_cannot_be_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start it is refused; later the server goes on and says so."""
    engine, path = make_learner(), tmp_path / "warm"
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        make_app(engine, MODEL, warm_state=path)
    path.unlink()
    with pytest.raises(ValueError, match="share_every must be > 0"):
        make_app(engine, MODEL, warm_state=path, share_every=0)

    async def main() -> None:
        async with sharing(engine, path, 0.02) as client:
            path.write_text("nonsense")
            for _ in range(2):
                assert (await client.post("/v1/completions", json=BASE)).status_code == 200
                await until(lambda: "the warm state was not shared" in caplog.text)

    asyncio.run(main())


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from specdec import cli

    monkeypatch.setattr("specdec.serve.cli.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 2 and "pip install 'specdec[serve]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "host", "warned"),
    [([], "127.0.0.1", False), (["--host", "::1"], "::1", False), (["--host", "localhost"], "localhost", False),
     (["--host", "0.0.0.0"], "0.0.0.0", True), (["--host", "0.0.0.0", "--api-key", "k"], "0.0.0.0", False)],
)  # fmt: skip
def test_the_command_listens_to_this_machine_alone_unless_told(
    monkeypatch: pytest.MonkeyPatch, options: list[str], host: str, warned: bool
) -> None:
    from typer.testing import CliRunner

    from specdec import cli

    seen: list[Any] = []

    class Idle:
        def __init__(self, app: Any, host: str, *options: Any) -> None:
            seen.append((host, *options))

        def run(self) -> None:
            """Listen to nobody."""

    monkeypatch.setattr("specdec.serve.listener.Listener", Idle)
    monkeypatch.setattr("specdec.serve.cli.load_engine", lambda *args: make_engine())
    monkeypatch.setattr(app_module, "make_app", lambda engine, name, limits, key, **warm: seen.append(limits))
    result = CliRunner().invoke(cli.app, ["serve", *options, "--max-prompt", "7", "--max-samples", "3", "--stall", "5"])
    assert result.exit_code == 0, result.output
    assert seen == [Limits(prompt_tokens=7, samples=3, stall=5.0), (host, 8000, 30, 1000, 5.0, None)]
    assert ("can use this server" in result.stdout + result.stderr) == warned
