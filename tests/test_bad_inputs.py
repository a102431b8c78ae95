"""Each bad input gets an error that names it, and leaves the model and the engine usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import specdec
from conftest import make_tiny_tokenizer
from fake_builder import FakeBuilder
from specdec import Engine, SamplingParams
from specdec.randomness import Randomness
from tiny_models import build

PROMPT = [5, 6, 7, 8]
Call = Callable[[Engine, Any], object]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", vocab_size=258, max_position_embeddings=128)


@pytest.fixture(scope="module")
def engine(model: Any) -> Engine:
    return Engine(model, make_tiny_tokenizer(), method=FakeBuilder(vocab_size=258), budget=8)


@pytest.fixture(autouse=True)
def still_usable(engine: Engine, model: Any) -> Iterator[None]:
    yield
    assert not engine.rows and not engine.waiting and not engine.builder.live  # type: ignore[attr-defined]
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=5)[0, len(PROMPT) :].tolist()
    assert engine.generate(PROMPT, SamplingParams(max_new_tokens=5)).token_ids == expected


def bare(model: Any) -> Engine:
    return Engine(model, method="ngram", budget=4)


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens 0": ({"max_new_tokens": 0}, "max_new_tokens"),
    "max_new_tokens negative": ({"max_new_tokens": -3}, "max_new_tokens"),
    "max_new_tokens float": ({"max_new_tokens": 2.5}, "max_new_tokens"),
    "max_new_tokens bool": ({"max_new_tokens": True}, "max_new_tokens"),
    "max_new_tokens None": ({"max_new_tokens": None}, "max_new_tokens"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "temperature nan": ({"temperature": float("nan")}, "temperature"),
    "temperature inf": ({"temperature": float("inf")}, "temperature"),
    "temperature string": ({"temperature": "hot"}, "temperature"),
    "temperature None": ({"temperature": None}, "temperature"),
    "temperature bool": ({"temperature": True}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, "top_p"),
    "top_p above 1": ({"top_p": 1.5}, "top_p"),
    "top_k negative": ({"top_k": -1}, "top_k"),
    "top_k float": ({"top_k": 3.0}, "top_k"),
    "min_p above 1": ({"min_p": 2}, "min_p"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "min_new above max_new": ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens"),
    "seed float": ({"seed": 1.5}, "seed"),
    "seed string": ({"seed": "1"}, "seed"),
    "stop_token_ids negative": ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    "stop_token_ids strings": ({"stop_token_ids": ("a",)}, "stop_token_ids"),
    "stop_token_ids float": ({"stop_token_ids": 1.5}, "stop_token_ids"),
    "stop_strings empty": ({"stop_strings": ""}, "stop_strings"),
    "stop_strings of ints": ({"stop_strings": [3]}, "stop_strings"),
    "stop_strings None": ({"stop_strings": None}, "stop_strings"),
    "n 0": ({"n": 0}, "n must be"),
    "logprobs 5": ({"logprobs": 5}, "logprobs"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_bad_sampling_params(name: str) -> None:
    arguments, message = PARAMS[name]
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "budget 0": ({"budget": 0}, "budget"),
    "budget negative": ({"budget": -8}, "budget"),
    "budget True": ({"budget": True}, "budget"),
    "budget big": ({"budget": "big"}, "budget"),
    "budget float": ({"budget": 8.0}, "budget"),
    "budget None": ({"budget": None}, "budget"),
    "max_rows 0": ({"max_rows": 0}, "max_rows"),
    "max_rows True": ({"max_rows": True}, "max_rows"),
    "max_rows string": ({"max_rows": "4"}, "max_rows"),
    "unknown method": ({"method": "guess"}, "method must be one of .*best_first"),
    "method None": ({"method": None}, "method"),
    "method class": ({"method": FakeBuilder}, "method"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_bad_engines(name: str, model: Any) -> None:
    arguments, message = ENGINES[name]
    with pytest.raises(ValueError, match=message):
        Engine(model, **{"method": "ngram", "budget": 4, **arguments})


def test_bad_models_and_tokenizers(model: Any) -> None:
    from transformers import GPT2Config, GPT2Model

    for bad in (None, "gpt2", torch.nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="model must be"):
            Engine(bad)
    headless = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="GPT2Model"):
        Engine(headless, method="ngram", budget=4)
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{index}>" for index in range(10)])
    with pytest.raises(ValueError, match="tokenizer has 268 ids"):
        Engine(model, tokenizer, method="ngram", budget=4)
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model, "not a tokenizer", method="ngram", budget=4)


PROMPTS: dict[str, tuple[Any, str]] = {
    "no prompts": ([], "prompts is empty"),
    "empty list": ([[]], "the prompt is empty"),
    "empty string": ("", "the prompt is empty"),
    "empty tensor": (torch.empty(0, dtype=torch.long), "the prompt is empty"),
    "one of two empty": ([[1, 2], []], "the prompt is empty"),
    "outside the vocabulary": ([1, 258], "token id 258 .* outside the vocabulary"),
    "negative id": ([1, -2], "token id -2"),
    "one of two outside": ([[1, 2], [3, 999]], "token id 999"),
    "longer than the context": ([1] * 128, "context is 128"),
    "None": (None, "prompts must be"),
    "int": (3, "prompts must be"),
    "dict": ({"role": "user", "content": "x"}, "prompts must be"),
    "floats": ([1.5, 2.5], "a prompt must be"),
    "float tensor": (torch.tensor([1.5, 2.0]), "a prompt must be"),
    "nested floats": ([[1.5, 2.0]], "a prompt must be"),
    "bools": ([True, False], "a prompt must be"),
    "None inside": ([[1, None]], "a prompt must be"),
    "list of None": ([None], "a prompt must be"),
    "3-D tensor": (torch.ones(1, 2, 2, dtype=torch.long), "prompts must be|a prompt must be"),
    "bytes": (b"abc", "prompts must be"),
    "messages without role": ([{"text": "x"}], "chat"),
    "mixed": ([1, "a"], "a prompt must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts(name: str, engine: Engine) -> None:
    prompt, message = PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, SamplingParams(max_new_tokens=4))
    if not isinstance(prompt, list) or (prompt and not isinstance(prompt[0], list)):
        with pytest.raises(ValueError):
            list(engine.stream(prompt, SamplingParams(max_new_tokens=4)))


CALLS: dict[str, tuple[Call, str]] = {
    "params too few": (lambda engine, _: engine.generate([PROMPT, PROMPT], [SamplingParams()]), "params has 1 entries for 2"),
    "params a dict": (lambda engine, _: engine.generate(PROMPT, {"temperature": 1}), "params"),
    "params a number": (lambda engine, _: engine.generate(PROMPT, 5), "params"),
    "params of numbers": (lambda engine, _: engine.generate([PROMPT], [5]), "params"),
    "stream of many": (lambda engine, _: list(engine.stream([PROMPT, PROMPT])), "prompt"),
    "stream with n": (lambda engine, _: list(engine.stream(PROMPT, SamplingParams(n=2))), "n=2"),
    "text without tokenizer": (lambda _, model: bare(model).generate("hi"), "needs a tokenizer"),
    "chat without tokenizer": (lambda _, model: bare(model).generate([{"role": "user", "content": "x"}]), "needs a tokenizer"),
    "stream without tokenizer": (lambda _, model: list(bare(model).stream(PROMPT)), "stream needs a tokenizer"),
    "stop_strings without tokenizer": (
        lambda _, model: bare(model).generate(PROMPT, SamplingParams(stop_strings=("x",))), "stop_strings=.* needs a tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name: str, engine: Engine, model: Any) -> None:
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(engine, model)


def test_chat_without_a_template(model: Any) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template|chat_template"):
        Engine(model, tokenizer, method="ngram", budget=4).generate([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nan_logits(temperature: float, engine: Engine, model: Any) -> None:
    head = model.lm_head.weight.data
    saved = head[17].clone()
    head[17] = float("nan")
    try:
        with pytest.raises(FloatingPointError, match="nan"):
            engine.generate(PROMPT, SamplingParams(max_new_tokens=4, temperature=temperature, seed=0))
    finally:
        head[17] = saved


def test_processors_that_exclude_everything(engine: Engine) -> None:
    def nothing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)

    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=4, temperature=temperature, seed=0)
        with pytest.raises(ValueError, match="every token is excluded"):
            engine.run([engine.new_sequence(list(PROMPT), params, Randomness(0), processor=LogitsProcessorList([nothing]))])


def test_the_context_ends(model: Any) -> None:
    """A model with a table of positions cannot go past it; the request is refused before it starts."""
    learned = build("gpt2", n_positions=32, max_position_embeddings=32)
    engine = Engine(learned, method=FakeBuilder(), budget=8)
    with pytest.raises(ValueError, match="context"):
        engine.generate([3] * 30, SamplingParams(max_new_tokens=10))
    expected = learned.generate(torch.tensor([[3] * 20]), max_new_tokens=12)[0, 20:].tolist()
    assert engine.generate([3] * 20, SamplingParams(max_new_tokens=12)).token_ids == expected
    rotary = Engine(model, method=FakeBuilder(vocab_size=258), budget=8)
    expected = model.generate(torch.tensor([[3] * 120]), max_new_tokens=20)[0, 120:].tolist()
    assert (
        rotary.generate([3] * 120, SamplingParams(max_new_tokens=20)).token_ids == expected
    )  # as model.generate, which only warns


# ---- state files ------------------------------------------------------------------------------------------------------------


def test_bad_state_files(model: Any, tmp_path: Path) -> None:
    engine = Engine(model, method="token_recycling", budget=8)
    engine.generate(PROMPT, SamplingParams(max_new_tokens=8))
    good = tmp_path / "good.safetensors"
    engine.save_state(good)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        engine.load_state(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Engine(model, method="token_recycling", budget=8, state=tmp_path / "missing")
    broken = tmp_path / "broken"
    for content in (b"", b"hello", good.read_bytes()[:-100], b"\xff" * 200):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            engine.load_state(broken)
    with pytest.raises(ValueError, match="method"):
        Engine(model, method="ngram", budget=8).load_state(good)
    with pytest.raises(ValueError, match="vocab_size"):
        Engine(build("llama"), method="token_recycling", budget=8).load_state(good)
    from safetensors.numpy import save_file

    save_file({}, broken, {"format": "1", "method": "token_recycling", "vocab_size": "258"})
    with pytest.raises(ValueError):
        engine.load_state(broken)
    with pytest.raises(OSError):
        engine.save_state(tmp_path / "no" / "such" / "folder")
    engine.load_state(good)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8)[0, len(PROMPT) :].tolist()
    assert engine.generate(PROMPT, SamplingParams(max_new_tokens=8)).token_ids == expected


def test_bad_arguments_of_accelerate(model: Any) -> None:
    for arguments, message in (({"method": "x"}, "method"), ({"budget": 0}, "budget"), ({"seed": "a"}, "seed")):
        with pytest.raises(ValueError, match=message), specdec.accelerate(model, **{"method": "ngram", "budget": 4, **arguments}):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=True)
        assert "generate" not in model.__dict__
