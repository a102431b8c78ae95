"""specdec serve as a process on loopback: the openai client, curl, clients that leave or stall, load, fuzzing, SIGTERM, restart."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import specdec
from bench import serve_load
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.search.policies import POLICIES
from specdec.sequence import SamplingParams
from specdec.state import load_state

pytestmark = pytest.mark.slow
KEY = "secret"
ENDED = (0, -signal.SIGTERM)  # uvicorn raises the signal again once it has ended well
HEADERS = {"authorization": f"Bearer {KEY}"}


class Server:
    """`specdec serve` with the tiny model, at a free port."""

    def __init__(self, folder: str, *options: str, port: int | None = None) -> None:
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "specdec.cli", "serve", "--model", folder, "--name", "tiny", "--port", str(self.port)]
        environment = {**os.environ, "SPECDEC_API_KEY": KEY}
        self.process = subprocess.Popen([*command, "--method", "ngram", "--budget", "8", *options], env=environment)
        deadline = time.monotonic() + 120
        while not self._is_up():
            assert self.process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS, timeout=30).text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.metric("specdec_rows_running") + self.metric("specdec_rows_waiting"):
            assert time.monotonic() < deadline, "rows are still in use"
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # which does nothing if it has ended

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def server(tiny_folder: str) -> Iterator[Server]:
    server = Server(tiny_folder, "--max-rows", "8", "--max-waiting", "100")
    yield server
    server.until_idle()
    assert server.stop() in ENDED


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def reference() -> specdec.Engine:
    return specdec.Engine(make_tiny_llama(), make_tiny_tokenizer(), method="ngram", budget=8)


def request_of(index: int) -> dict[str, Any]:
    return asdict(serve_load.Request.of(index, "tiny"))


def answer_to(engine: specdec.Engine, request: dict[str, Any]) -> str:
    params = SamplingParams(max_new_tokens=request["max_tokens"], temperature=request["temperature"], seed=request["seed"])
    return engine.generate(request["prompt"], params).text


def long_request(tokens: int = 1900) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": tokens,
        "temperature": 1,
        "seed": 0,
        "ignore_eos": True,
        "stream": True,
    }


def test_the_openai_client(client: openai.OpenAI, reference: specdec.Engine) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    expected = reference.generate("abcabc", SamplingParams(max_new_tokens=20, temperature=1.0, seed=5, n=2, logprobs=0))
    asked = {"model": "tiny", "prompt": "abcabc", "max_tokens": 20, "temperature": 1.0, "seed": 5, "n": 2, "logprobs": 0}
    whole = client.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == [result.text for result in expected]
    assert whole.choices[1].logprobs.token_logprobs == pytest.approx(expected[1].logprobs, abs=1e-5)
    pieces = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [result.text for result in expected]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "abc"}]
    said = reference.generate(messages, SamplingParams(max_new_tokens=15)).text
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 15, "temperature": 0}
    assert client.chat.completions.create(**asked).choices[0].message.content == said
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said
    assert chunks[-1].usage.completion_tokens > 0
    assert client.completions.create(model="tiny", prompt="abc", extra_body={"top_k": 1}).choices[0].finish_reason in (
        "length",
        "stop",
    )


def test_the_openai_client_samples_stops_and_leaves(server: Server, client: openai.OpenAI, reference: specdec.Engine) -> None:
    messages = [{"role": "user", "content": "abc"}]
    params = SamplingParams(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=11)
    said = reference.generate(messages, params).text
    asked = {"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    assert client.chat.completions.create(**asked).choices[0].message.content == said
    stop = said[5:7]
    choice = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    expected = reference.generate(messages, replace(params, stop_strings=(stop,)))
    assert choice.message.content == expected.text == said[: said.index(stop)] and choice.finish_reason == "stop"
    before = server.metric("specdec_completion_tokens_total")
    long = {**long_request(), "n": 8}
    stream = client.completions.create(
        **{name: value for name, value in long.items() if name != "ignore_eos"}, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.until_idle()
    assert server.metric("specdec_completion_tokens_total") == before, "it was generated to its end"


def test_the_openai_client_is_refused_and_times_out(
    server: Server, client: openai.OpenAI, tiny_folder: str, tmp_path: Path
) -> None:
    """429 while others hold all rows and the whole queue; 504, or an error in the stream, after --timeout. What such a server's
    drafts learned is in its warm state once it has ended."""
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 1900, "seed": 0, "extra_body": {"ignore_eos": True}}
    holders = [client.completions.create(**asked, n=54, stream=True) for _ in range(2)]  # 8 rows and 100 that wait
    with pytest.raises(openai.RateLimitError, match="try again in") as refused:
        client.completions.create(**asked)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for holder in holders:
        holder.close()
    server.until_idle()

    warm = tmp_path / "warm"
    asked["n"] = 16  # in one row: long
    with Server(tiny_folder, "--timeout", "3", "--max-rows", "1", "--warm-state", str(warm), "--method", "best_first") as short:
        late = openai.OpenAI(api_key=KEY, base_url=f"{short.url}/v1", max_retries=0, timeout=60)
        with pytest.raises(openai.InternalServerError, match="longer than the server allows") as ended:
            late.completions.create(**asked)
        assert ended.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(late.completions.create(**asked, stream=True))
        assert late.completions.create(model="tiny", prompt="abc", max_tokens=1).choices[0].finish_reason == "length"
        assert short.stop() in ENDED
        assert len(load_state(warm, "best_first", make_tiny_llama().config.vocab_size)["shared.tokens"]) > 0


def test_the_openai_client_gets_openai_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="abc")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], tools=[])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="wrong", base_url=f"{server.url}/v1", max_retries=0).models.list()


def curl(server: Server, path: str, body: dict[str, Any], *options: str) -> list[str]:
    """The command."""
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    return ["curl", "-sSN", f"{server.url}{path}", *headers, *options, "-d", json.dumps(body)]


def said_by(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_curl(server: Server, reference: specdec.Engine) -> None:
    request = request_of(3)
    whole = json.loads(said_by(curl(server, "/v1/completions", request)))
    assert whole["choices"][0]["text"] == answer_to(reference, request)
    streamed = said_by(curl(server, "/v1/completions", {**request, "stream": True}))
    *chunks, done = [json.loads(line) if line != "[DONE]" else line for line in map(_data, streamed.splitlines()) if line]
    assert done == "[DONE]" and "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer_to(reference, request)

    messages = [{"role": "user", "content": "abc"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 20, "temperature": 0.8, "seed": 4}
    answer = json.loads(said_by(curl(server, "/v1/chat/completions", chat)))
    expected = reference.generate(messages, SamplingParams(max_new_tokens=20, temperature=0.8, seed=4))
    assert answer["choices"][0]["message"]["content"] == expected.text

    refused = said_by(curl(server, "/v1/completions", {**request, "temperature": -1}, "-w", "\n%{http_code}")).splitlines()
    error = json.loads(refused[0])["error"]
    assert refused[1] == "400" and error["param"] == "temperature" and error["type"] == "invalid_request_error"


def _data(line: str) -> str:
    return line.removeprefix("data: ")


def test_curl_killed_in_mid_stream_frees_its_rows(server: Server) -> None:
    before = server.metric("specdec_completion_tokens_total")
    with subprocess.Popen(curl(server, "/v1/completions", {**long_request(), "n": 8}), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(b"data: ")
        assert server.metric("specdec_rows_running") == 8
        process.kill()
    server.until_idle()
    assert server.metric("specdec_completion_tokens_total") == before, "it was generated to its end"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server: Server, stream: bool) -> None:
    before = server.metric("specdec_completion_tokens_total")
    body = {**long_request(), "n": 8, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=0.3)
    server.until_idle()
    assert server.metric("specdec_completion_tokens_total") == before, "it was generated to its end"


def test_clients_that_stall_do_not_block_others(server: Server, reference: specdec.Engine) -> None:
    """Some never read their streams, some never finish their requests."""
    body = json.dumps({**long_request(), "logprobs": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    stalled = []
    for index in range(6):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) if index % 2 else 10]
        )
        stalled.append(connection)
    for index in range(10):
        answer = httpx.post(f"{server.url}/v1/completions", json=request_of(index), headers=HEADERS, timeout=30)
        assert answer.json()["choices"][0]["text"] == answer_to(reference, request_of(index))
    for connection in stalled:
        connection.close()
    server.until_idle()


def test_load(server: Server, reference: specdec.Engine) -> None:
    """64 clients, 2,000 requests: each gets its own answer; memory does not grow."""
    expected = [answer_to(reference, request_of(index)) for index in range(2000)]
    load = serve_load.run(server.url, "tiny", 2000, 64, HEADERS, lambda index, text: text == expected[index], server.process.pid)
    print("\n", load.summary())
    assert load.statuses == [200] * 2000 and not load.wrong
    told = load.summary()
    assert (told["ok"], told["refused"], told["failed"]) == (2000, 0, 0) and told["p50_ms"] <= told["p99_ms"] <= told["p100_ms"]
    assert load.memory[-1] < load.memory[1] + 16, "memory grows"


def test_load_sees_what_is_mixed_up(server: Server) -> None:
    load = serve_load.run(server.url, "tiny", 8, 4, HEADERS, lambda index, text: index != 5, None)
    assert load.wrong == [5] and load.summary()["ok"] == 8
    refused = serve_load.run(server.url, "tiny", 8, 4, {}, lambda index, text: True, None)
    assert refused.statuses == [401] * 8 and refused.summary()["failed"] == 8 and refused.summary()["p99_ms"] is None
    json.dumps(refused.summary(), allow_nan=False)


def test_overload(server: Server) -> None:
    """More than rows and queue hold: some get 429 at once, nobody hangs."""
    body = {**long_request(150), "n": 16, "stream": False}
    with ThreadPoolExecutor(16) as pool:
        asked = [
            pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=120) for _ in range(16)
        ]
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and len(refused) < 16 and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.status_code in (200, 429) for answer in answers)


def _narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The server's own description with fewer values, so that most of what is made of it reaches the engine and soon ends."""
    schemas = description["components"]["schemas"]
    search = schemas["ReasonRequest"]["properties"]
    schemas["ReasonRequest"]["required"].append("budget")  # left out, it is 2000
    search["budget"]["maximum"] = 60
    search["problem"] = {"type": "string", "minLength": 1}
    search["policy"]["enum"] = [*POLICIES, "other"]
    search["step"]["enum"] = ["steps", "newline", "tokens:3", "tokens:0", "other"]
    return description


def test_schemathesis(tiny_folder: str, tmp_path: Path) -> None:
    """Fuzzed by its own description: no 500, and every answer is as described. Some of what is made must be answered: were it all
    refused at the door (for its `model`, once), nothing behind it would have been tried."""
    with Server(tiny_folder, "--max-rows", "4", "--max-tokens", "24", "--max-budget", "60", "--timeout", "20") as server:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        (tmp_path / "openapi.json").write_text(
            json.dumps(_narrowed(httpx.get(f"{server.url}/openapi.json", headers=HEADERS).json()))
        )
        run = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url, "-H", f"Authorization: Bearer {KEY}",
             "--checks", checks, "--max-examples", "40", "--seed", "1", "--request-timeout", "30"],
            cwd=tmp_path, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/reason"):
            assert server.metric(f'specdec_http_answers_total{{path="{path}",status="200"}}') >= 10
        server.until_idle()
        assert server.stop() in ENDED


def test_sigterm_drains_and_a_restart_serves(tiny_folder: str, reference: specdec.Engine) -> None:
    server = Server(tiny_folder, "--drain", "60")
    expected = reference.generate("abc", SamplingParams(max_new_tokens=800, temperature=1.0, seed=0, ignore_eos=True)).text
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long_request(800), headers=HEADERS, timeout=60) as answer:
        lines = answer.iter_lines()
        told = [next(lines)]
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        told += [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in told[:-1] if line) == expected
    assert server.process.wait(60) in ENDED
    stranger = openai.OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        stranger.models.list()
    again = Server(tiny_folder, port=server.port)
    assert [model.id for model in stranger.models.list()] == ["tiny"]
    assert again.stop() in ENDED


def test_kill_9_in_mid_stream(tiny_folder: str, reference: specdec.Engine) -> None:
    """Clients see an error at once, never an answer that looks whole; a server started again answers them alike."""
    server = Server(tiny_folder)
    body = {**long_request(), "stream": False, "n": 4}
    client = openai.OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=60)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60)
        stream = client.completions.create(
            model="tiny", prompt="abc", max_tokens=1900, seed=0, stream=True, extra_body={"ignore_eos": True}
        )
        told = [next(stream)]
        server.process.kill()
        server.process.wait(60)
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):  # older clients let the second through
            told.extend(stream)
        assert isinstance(whole.exception(60), httpx.TransportError)
    assert all(each.choices[0].finish_reason is None for each in told)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    again = Server(tiny_folder, port=server.port)
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=1, seed=0)
    expected = reference.generate("abc", SamplingParams(max_new_tokens=20, temperature=1.0, seed=0))
    assert answer.choices[0].text == expected.text
    assert again.stop() in ENDED


def test_sigterm_lets_a_search_end(tiny_folder: str) -> None:
    server = Server(tiny_folder, "--drain", "60")
    body = {"model": "tiny", "problem": "What is 2 + 2?", "budget": 60, "evaluator": None, "step": "tokens:5", "answers": "exact"}
    expected = httpx.post(f"{server.url}/v1/reason", json=body, headers=HEADERS, timeout=60).json()
    with httpx.stream("POST", f"{server.url}/v1/reason", json={**body, "stream": True}, headers=HEADERS, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, last, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]" and json.loads(last)["text"] == expected["text"]
    assert server.process.wait(60) in ENDED


def test_sigterm_ends_a_search_that_takes_too_long(tiny_folder: str) -> None:
    server = Server(tiny_folder, "--drain", "1")
    body = {"model": "tiny", "problem": "2 + 2", "budget": 20_000, "evaluator": None, "step": "tokens:5", "answers": "exact"}
    with httpx.stream("POST", f"{server.url}/v1/reason", json={**body, "stream": True}, headers=HEADERS, timeout=60) as answer:
        next(answer.iter_lines())
        started = time.monotonic()
        assert server.stop() in ENDED and time.monotonic() - started < 10


def test_drain_has_an_end(tiny_folder: str) -> None:
    server = Server(tiny_folder, "--drain", "1", "--max-rows", "1")
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**long_request(), "n": 16}, headers=HEADERS, timeout=60
    ) as answer:
        next(answer.iter_lines())
        started = time.monotonic()
        assert server.stop() in ENDED and time.monotonic() - started < 10
