"""/v1/reason: the search is specdec.reason's, whoever else is served; steps as a stream, cancellation, limits, refusals."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any, get_args

import pytest

import specdec
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.search import SearchConfig, Status
from specdec.search.reason import EVALUATORS, ReasonResult
from specdec.sequence import SamplingParams
from specdec.serve.app import Limits
from specdec.serve.guest import Guest, Stopped
from specdec.serve.protocol import Evaluators, ReasonRequest
from specdec.serve.scheduler import Failed, Scheduler
from specdec.serve.searches import Searches
from test_serve import BASE, PROMPT, events, make_engine, serving, until

PROBLEM = "Use the numbers 3, 5, 7 to make 26."
ASKED = {
    "problem": PROBLEM,
    "budget": 60,
    "seed": 3,
    "temperature": 1.0,
    "step": "tokens:7",
    "step_tokens": 16,
    "answers": "exact",
}
BODY = {"model": "tiny", **ASKED}
ENDLESS = {**BODY, "budget": 20_000, "evaluator": None}


def own_model() -> Any:
    return make_tiny_llama(initializer_range=0.3)


def directly(**changes: Any) -> ReasonResult:
    """What specdec.reason finds on an engine of its own."""
    options = {**ASKED, **changes}
    config = SearchConfig(step_tokens=options.pop("step_tokens"))
    engine = specdec.Engine(own_model(), make_tiny_tokenizer(), method="ngram", budget=8, max_rows=4)
    return specdec.reason(engine, options.pop("problem"), config=config, **options)


@pytest.mark.parametrize(
    ("evaluator", "budget", "count"),
    [("yes_no", 60, 2), pytest.param("self_consistency", 14, 1, marks=pytest.mark.slow), (None, 60, 2)],
)
def test_the_search_is_that_of_reason_beside_completions(evaluator: str | None, budget: int, count: int) -> None:
    """Rows are scarce, and everybody's texts are those that they get alone."""
    expected = directly(evaluator=evaluator, budget=budget)
    body = {**BODY, "evaluator": evaluator, "budget": budget, "tree": True}
    reference = specdec.Engine(own_model(), make_tiny_tokenizer(), method="ngram", budget=8)
    text = reference.generate(PROMPT, SamplingParams(max_new_tokens=12, temperature=1.0, seed=1)).text

    async def main() -> None:
        async with serving(model=own_model(), max_rows=2) as client:
            searches = [client.post("/v1/reason", json=body) for _ in range(count)]
            texts = [client.post("/v1/completions", json={**BASE, "temperature": 1.0, "seed": 1}) for _ in range(8)]
            answers = await asyncio.gather(*searches, *texts)
            for answer in answers[:count]:
                found = answer.json()
                assert found["tree"] == json.loads(json.dumps(expected.tree.to_dict()))
                assert found["answer"] == expected.answer and found["status"] == str(expected.status)
                assert found["usage"]["completion_tokens"] == expected.used and found["usage"]["budget"] == budget
                assert found["usage"]["evaluator_tokens"] == expected.evaluator_tokens
            assert [answer.json()["choices"][0]["text"] for answer in answers[count:]] == [text] * 8

    asyncio.run(main())


def test_a_stream_tells_every_step_and_then_the_answer() -> None:
    async def main() -> None:
        async with serving(model=own_model()) as client:
            *steps, last = events((await client.post("/v1/reason", json={**BODY, "stream": True})).text)
            found = (await client.post("/v1/reason", json=BODY)).json()
            assert len(steps) > 3 and {step["object"] for step in steps} == {"reasoning.step"}
            assert [step["used"] for step in steps] == sorted(step["used"] for step in steps)
            for name in ("object", "status", "answer", "answers", "text", "score"):
                assert last[name] == found[name]
            assert last["id"] == steps[0]["id"] != found["id"]

    asyncio.run(main())


def test_completions_are_served_while_a_search_has_more_texts_than_rows() -> None:
    async def main() -> None:
        async with serving(model=own_model(), max_rows=1) as client:
            search = asyncio.create_task(client.post("/v1/reason", json=ENDLESS))
            await until(lambda: client.engine.rows)
            for _ in range(5):
                assert (await client.post("/v1/completions", json=BASE)).status_code == 200
            assert not search.done()
            search.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_search_ends(stream: bool) -> None:
    async def main() -> None:
        async with serving(Limits(seconds=0.5), model=own_model()) as client:
            answer = await client.post("/v1/reason", json={**ENDLESS, "stream": stream})
            error = json.loads(answer.text.split("data: ")[-1])["error"] if stream else answer.json()["error"]
            assert answer.status_code == (200 if stream else 504) and "longer" in error["message"]

    asyncio.run(main())


def test_seconds_end_a_search_with_what_it_found() -> None:
    async def main() -> None:
        async with serving(model=own_model()) as client:
            found = (await client.post("/v1/reason", json={**ENDLESS, "seconds": 0.3})).json()
            assert found["status"] in {str(status) for status in Status} and 0 < found["usage"]["completion_tokens"] < 20_000

    asyncio.run(main())


def test_seconds_beyond_the_servers_limit_end_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was found, which the server's limit would drop."""
    monkeypatch.setattr("specdec.serve.searches.SHARE", 0.02)

    async def main() -> None:
        async with serving(Limits(seconds=20), model=own_model()) as client:
            answer = await client.post("/v1/reason", json={**ENDLESS, "seconds": 1000})
            assert answer.status_code == 200 and 0 < answer.json()["usage"]["completion_tokens"] < 20_000

    asyncio.run(main())


def test_searches_count_in_the_queue() -> None:
    """Each reserves its width: one fits, the next gets 429; what it reserved is free once its client has gone."""

    async def main() -> None:
        async with serving(Limits(waiting=4, searches=1), model=own_model(), max_rows=2) as client:
            search = asyncio.create_task(client.post("/v1/reason", json=ENDLESS))
            await until(lambda: client.engine.rows)
            refused = await client.post("/v1/reason", json=BODY)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            waiting = asyncio.create_task(client.post("/v1/reason", json={**BODY, "width": 2}))  # for the one thread
            await until(lambda: client.app.state.scheduler._unfinished == 6)
            for task in (waiting, search):
                task.cancel()
            await until(lambda: not client.app.state.scheduler._unfinished)

    asyncio.run(main())


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "model"),
    ({"problem": ""}, 400, "problem"),
    ({"problem": " \n"}, 400, "problem"),
    ({"problem": "\ud800"}, 400, "problem"),
    ({"problem": ["a"]}, 400, "problem"),
    ({"problem": "a" * 5000}, 400, "tokens"),
    ({"budget": -1}, 400, "budget"),
    ({"budget": 10**7}, 400, "budget must be at most 20000"),
    ({"budget": 1.5}, 400, "budget"),
    ({"budget": True}, 400, "budget"),
    ({"policy": "dfs"}, 400, "policy must be one of bg_mcts"),
    ({"policy": "../../etc/passwd"}, 400, "policy"),
    ({"policy": {"name": "bg_mcts"}}, 400, "policy"),
    ({"evaluator": "os.system"}, 400, "evaluator"),
    ({"evaluator": "def score(problem, steps): return 1"}, 400, "evaluator"),
    ({"answers": "code"}, 400, "answers"),
    ({"step": "tokens:0"}, 400, "count"),
    ({"step": "tokens:-1"}, 400, "step"),
    ({"step_tokens": 0}, 400, "step_tokens"),
    ({"width": 0}, 400, "width"),
    ({"width": 10**6}, 400, "width must be at most 64"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**64}, 400, "seed"),
    ({"seconds": 0}, 400, "seconds"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"checkpoint": "/tmp/x"}, 400, "checkpoint"),
    ({"prompts": "/etc/passwd"}, 400, "prompts"),
    ({"config": {}}, 400, "config"),
]


def test_bad_searches_are_refused_by_name() -> None:
    async def main() -> None:
        async with serving(model=own_model()) as client:
            for fields, status, named in REFUSED:
                for stream in (False, True):
                    content = json.dumps({**BODY, **fields, "stream": stream})
                    answer = await client.post("/v1/reason", content=content, headers={"content-type": "application/json"})
                    assert answer.status_code == status, (fields, answer.text)
                    message = answer.json()["error"]["message"]
                    assert named in message and ".py" not in message and "/work" not in message
            nan = json.dumps({**BODY, "temperature": float("nan")})
            assert (await client.post("/v1/reason", content=nan)).status_code == 400

    asyncio.run(main())


def test_a_failing_model_is_an_error_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(model=own_model()) as client:

            def broken(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError("secret /path")

            with monkeypatch.context() as patch:
                patch.setattr(client.engine.target, "forward", broken)
                answer = await client.post("/v1/reason", json=BODY)
            assert answer.status_code == 500 and "secret" not in answer.text
            assert (await client.post("/v1/reason", json=BODY)).json()["usage"]["completion_tokens"] == directly().used

    asyncio.run(main())


def test_the_request_has_the_defaults_and_names_of_reason() -> None:
    import inspect

    from specdec.search.reason import reason, reason_all

    assert set(get_args(Evaluators)) == set(EVALUATORS)
    parameters = {**inspect.signature(reason_all).parameters, **inspect.signature(reason).parameters}
    for name, field in ReasonRequest.model_fields.items():
        if name in parameters and name != "model":
            default = parameters[name].default
            assert name == "problem" or field.default == default, name
    assert ReasonRequest.model_fields["step_tokens"].default == SearchConfig().step_tokens


# ---- without HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(make_engine(max_rows=2), max_waiting=50)
    scheduler.start()
    yield scheduler
    scheduler.close()
    assert scheduler._unfinished == 0 and not scheduler.engine.rows and not scheduler.engine.waiting


def test_closing_ends_running_and_waiting_searches(scheduler: Scheduler) -> None:
    searches = Searches(scheduler, 1)
    said: list[list[Any]] = [[], []]
    first = threading.Event()
    for place in range(2):
        body = ReasonRequest(**ENDLESS)
        searches.submit(body, "", 60, lambda event, place=place: (said[place].append(event), first.set()))
    assert first.wait(60)
    scheduler.close()
    searches.close()
    assert said[0][-1] == Failed("closed") and said[1][-1:] in ([], [Failed("closed")])


def test_a_guest_that_was_stopped_asks_for_nothing(scheduler: Scheduler) -> None:
    guest = Guest(scheduler, "", 60)
    assert isinstance(guest, specdec.Engine) and guest.tokenizer is scheduler.engine.tokenizer
    assert guest.score([1, 2, 3]).logprobs == scheduler.engine.score([1, 2, 3]).logprobs
    guest.stop("cancelled")
    with pytest.raises(Stopped, match="cancelled"):
        guest.generate([1, 2], SamplingParams(max_new_tokens=3))
    with pytest.raises(ValueError, match="start"):
        guest.score([1, 2], 7)
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        guest.score([1, 2, 3])
    with pytest.raises(Stopped, match="closed"):
        Guest(scheduler, "", 60).generate([1, 2], SamplingParams(max_new_tokens=3))
