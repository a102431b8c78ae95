"""Whatever interrupts a generation, the model and the engine stay usable, no row is lost, and others do not notice."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import specdec
from conftest import make_tiny_tokenizer
from fake_builder import FakeBuilder
from specdec.sequence import SamplingParams
from tiny_models import build

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22, 23, 24, 25, 26], [40]]
PARAMS = SamplingParams(max_new_tokens=30)
INPUTS = {"input_ids": torch.tensor([PROMPTS[0]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


class Boom(Exception):
    """What the tests raise inside."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", vocab_size=258)


@pytest.fixture(scope="module")
def texts(model: Any) -> list[list[int]]:
    """The whole true text of each prompt, by model.generate."""
    return [
        model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=30)[0].tolist()
        for prompt in PROMPTS
    ]


@pytest.fixture
def engine(model: Any, texts: list[list[int]]) -> Iterator[specdec.Engine]:
    """An engine that must be as good as new after the test."""
    engine = specdec.Engine(model, make_tiny_tokenizer(), method=FakeBuilder(texts, 258), budget=12)
    attention, training = model.config._attn_implementation, model.training
    yield engine
    gc.collect()
    assert not engine.rows and not engine.waiting and not engine.builder.live and not any(engine.cache.lengths)
    results = engine.generate(PROMPTS, PARAMS)
    assert [prompt + result.token_ids for prompt, result in zip(PROMPTS, results)] == texts
    assert (model.config._attn_implementation, model.training) == (attention, training) and "forward" not in model.__dict__


class Breaking:
    """A callable that raises at its n-th call."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.left = error, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else False


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_streamer_raises(engine: specdec.Engine, model: Any, at: int) -> None:
    class Streamer(BaseStreamer):
        put = Breaking(Boom(), at)

        def end(self) -> None: ...

    with pytest.raises(Boom):
        specdec.generate(model, **INPUTS, max_new_tokens=30, streamer=Streamer(), specdec_engine=engine)


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Boom()], ids=["ctrl-c", "error"])
def test_the_forward_is_interrupted(
    engine: specdec.Engine, model: Any, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    layer = model.model.layers[1]
    original, breaking = layer.forward, Breaking(error, at)

    def forward(*args: Any, **kwargs: Any) -> Any:
        breaking()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", forward)
        with pytest.raises(type(error)):
            engine.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Boom()], ids=["ctrl-c", "error"])
def test_a_processor_raises(engine: specdec.Engine, model: Any, at: int, error: BaseException) -> None:
    with pytest.raises(type(error)):
        specdec.generate(
            model, **INPUTS, max_new_tokens=30, logits_processor=LogitsProcessorList([Breaking(error, at)]), specdec_engine=engine
        )


@pytest.mark.parametrize("at", [1, 7])
def test_a_criterion_raises(engine: specdec.Engine, model: Any, at: int) -> None:
    with pytest.raises(Boom):
        specdec.generate(
            model,
            **INPUTS,
            max_new_tokens=30,
            stopping_criteria=StoppingCriteriaList([Breaking(Boom(), at)]),
            specdec_engine=engine,
        )


def test_the_builder_is_interrupted(engine: specdec.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "observe_prompt", "build", "update"):
        with monkeypatch.context() as patch:
            original, breaking = getattr(engine.builder, name), Breaking(KeyboardInterrupt(), 2)
            patch.setattr(engine.builder, name, lambda *args, o=original, b=breaking: (b(), o(*args))[1])
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS, PARAMS)
        assert not engine.rows and not engine.waiting


def failing_row(engine: specdec.Engine, at: int) -> Any:
    """A sequence whose processor fails at its n-th token."""
    from specdec.randomness import Randomness

    return engine.new_sequence(list(PROMPTS[1]), PARAMS, Randomness(0), processor=LogitsProcessorList([Breaking(Boom(), at)]))


def test_a_failing_row_fails_alone(engine: specdec.Engine, texts: list[list[int]]) -> None:
    """A stream steps the rows of others: their failure is theirs, and what it emits is what it would have."""
    engine.add(bad := failing_row(engine, 4))
    streamed = "".join(engine.stream(PROMPTS[0], PARAMS))
    assert streamed == engine.tokenizer.decode(texts[0][len(PROMPTS[0]) :], skip_special_tokens=True)
    assert bad.finish_reason == "error" and isinstance(bad.error, Boom) and bad.row == -1


def test_rows_beside_a_failing_one_keep_their_text(engine: specdec.Engine, texts: list[list[int]]) -> None:
    """Rows after it in the same step have uncommitted K/V when it fails."""
    from specdec.randomness import Randomness

    for at in (1, 2, 5):
        others = [engine.new_sequence(list(prompt), PARAMS, Randomness(0)) for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[3])]
        bad = failing_row(engine, at)
        for seq in (others[0], bad, *others[1:]):
            engine.add(seq)
        while any(not seq.finished for seq in others):
            engine.step()
        assert [seq.token_ids for seq in others] == [texts[0], texts[2], texts[3]] and isinstance(bad.error, Boom)


def test_a_failing_row_ends_its_own_call(engine: specdec.Engine) -> None:
    sequences = [failing_row(engine, at) for at in (30, 3, 29)]
    with pytest.raises(Boom):
        engine.run(sequences)
    assert [seq.finish_reason for seq in sequences] == ["cancelled", "error", "cancelled"]


def test_an_interrupt_among_streams(engine: specdec.Engine, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during one stream's step leaves the other stream able to go on."""
    first, second = engine.stream(PROMPTS[0], PARAMS), engine.stream(PROMPTS[2], PARAMS)
    pieces = [next(first)]
    next(second)
    original, breaking = engine.target.forward, Breaking(KeyboardInterrupt(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.target, "forward", lambda *args, **kwargs: (breaking(), original(*args, **kwargs))[1])
        with pytest.raises(KeyboardInterrupt):
            list(second)
    assert len(engine.rows) == 1
    assert "".join(pieces + list(first)) == engine.tokenizer.decode(texts[0][len(PROMPTS[0]) :], skip_special_tokens=True)


@pytest.mark.parametrize("how", ["close", "collect", "throw"])
def test_an_abandoned_stream_frees_its_row(engine: specdec.Engine, how: str) -> None:
    stream = engine.stream(PROMPTS[0], PARAMS)
    next(stream)
    assert len(engine.rows) == 1
    if how == "close":
        stream.close()
    elif how == "throw":
        with pytest.raises(Boom):
            stream.throw(Boom())
    else:
        del stream
        gc.collect()
    assert not engine.rows


def test_a_stream_that_was_never_started(engine: specdec.Engine) -> None:
    engine.stream(PROMPTS[0], PARAMS)
    assert not engine.rows and not engine.waiting


def test_interleaved_streams(engine: specdec.Engine, texts: list[list[int]]) -> None:
    streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS]
    pieces: list[list[str]] = [[] for _ in streams]
    live = set(range(len(streams)))
    while live:
        for index in sorted(live):
            piece = next(streams[index], None)
            live -= {index} if piece is None else set()
            pieces[index].append(piece or "")
        if 0 in live and len(pieces[0]) == 3:
            (result,) = engine.generate([PROMPTS[1]], PARAMS)  # a whole call in between
            assert PROMPTS[1] + result.token_ids == texts[1]
    expected = [engine.tokenizer.decode(text[len(prompt) :], skip_special_tokens=True) for text, prompt in zip(texts, PROMPTS)]
    assert ["".join(piece) for piece in pieces] == expected


def test_two_threads(engine: specdec.Engine, texts: list[list[int]]) -> None:
    """Calls and streams of one engine from several threads: each gets its own text."""
    wrong: list[Any] = []

    def call(index: int) -> None:
        for _ in range(3):
            result = engine.generate(PROMPTS[index], PARAMS)
            if PROMPTS[index] + result.token_ids != texts[index]:
                wrong.append((index, result))

    def stream(index: int) -> None:
        text = "".join(engine.stream(PROMPTS[index], PARAMS))
        if text != engine.tokenizer.decode(texts[index][len(PROMPTS[index]) :], skip_special_tokens=True):
            wrong.append((index, text))

    threads = [
        threading.Thread(target=call, args=(0,)),
        threading.Thread(target=call, args=(1,)),
        threading.Thread(target=stream, args=(2,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_generate_from_two_threads(model: Any, texts: list[list[int]]) -> None:
    """specdec.generate on one model from two threads shares one kept engine."""
    outputs: dict[int, list[int]] = {}

    def call(index: int) -> None:
        ids = torch.tensor([PROMPTS[index]])
        outputs[index] = specdec.generate(model, ids, max_new_tokens=30, specdec_method="ngram", specdec_budget=6)[0].tolist()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [outputs.get(index) for index in range(4)] == texts


def test_a_prompt_that_continues_a_waiting_one(engine: specdec.Engine, model: Any) -> None:
    """A new row copies a live row's cache only where that row has really computed it."""
    prompts = [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7], [5, 6]]
    results = engine.generate(prompts, PARAMS)
    expected = [model.generate(torch.tensor([prompt]), max_new_tokens=30)[0].tolist() for prompt in prompts]
    assert [prompt + result.token_ids for prompt, result in zip(prompts, results)] == expected
