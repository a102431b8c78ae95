"""generate()'s contract: what model.generate returns, specdec.generate and accelerate() return too, and leave no trace."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process as warpers
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import specdec
from conftest import make_tiny_tokenizer
from fake_builder import FakeBuilder, installed
from oracles import KeyedGumbel
from specdec.methods import METHODS
from specdec.randomness import Randomness
from tiny_models import VOCAB, build, shared

NEW = 16
TINY = {"initializer_range": 0.4, "vocab_size": 258, "eos_token_id": None}


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded random prompts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[specdec.Engine]:
    """How many sequences each engine has made: which one generated."""
    counter: Counter[specdec.Engine] = Counter()
    new_sequence = specdec.Engine.new_sequence

    def counted(engine: specdec.Engine, *args: Any, **kwargs: Any) -> Any:
        counter[engine] += 1
        return new_sequence(engine, *args, **kwargs)

    monkeypatch.setattr(specdec.Engine, "new_sequence", counted)
    return counter


def texts_of(output: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Each row of generate()'s output without its left padding."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    pads = (inputs["attention_mask"] == 0).sum(-1).repeat_interleave(len(sequences) // len(inputs["input_ids"]))
    return [row[pad:].tolist() for row, pad in zip(sequences, pads.tolist())]


def everyway(
    model: Any, inputs: dict[str, torch.Tensor], builder: FakeBuilder, ways: str = "custom direct accelerate", **kwargs: Any
) -> list[Any]:
    """The outputs of the three ways into specdec. Factories (callables of no argument named make_*) give each its own object."""
    options = {"specdec_method": "fake", "specdec_budget": 10}

    def given() -> dict[str, Any]:
        return {name.removeprefix("make_"): value() if name.startswith("make_") else value for name, value in kwargs.items()}

    outputs = []
    with installed(builder):
        if "custom" in ways:
            outputs.append(model.generate(**inputs, **given(), custom_generate=specdec.generate, **options))
        if "direct" in ways:
            outputs.append(specdec.generate(model, **inputs, **given(), **options))
    if "accelerate" in ways:
        with specdec.accelerate(model, method=builder, budget=10) as engine:
            outputs.append(model.generate(**inputs, **given()))
        assert not engine.rows
    assert not builder.live
    return outputs


def expected_of(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    return model.generate(
        **inputs, **{name.removeprefix("make_"): value() if name.startswith("make_") else value for name, value in kwargs.items()}
    )


def check(model: Any, inputs: dict[str, torch.Tensor], ways: str = "custom direct accelerate", **kwargs: Any) -> Any:
    """These ways give model.generate's result, with drafts that are often right; returns it."""
    expected = expected_of(model, inputs, **kwargs)
    builder = FakeBuilder(texts_of(expected, inputs))
    for output in everyway(model, inputs, builder, ways, **kwargs):
        assert type(output) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(output, expected) and output.dtype == expected.dtype
        else:
            assert torch.equal(output.sequences, expected.sequences)
    assert builder.nodes > 0
    return expected


class Counting(LogitsProcessor):
    """Stateful: what it adds depends on how many tokens it has seen; it insists on seeing each once, in order."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert not self.lengths or input_ids.shape[1] == self.lengths[-1] + 1
        self.lengths.append(input_ids.shape[1])
        scores[:, len(self.lengths) % VOCAB] += 5.0
        scores[:, int(input_ids[0, -1])] -= 3.0
        return scores


class StopAfter(StoppingCriteria):
    """Stops a row after its k-th token of an even id."""

    def __init__(self, k: int, prompt_length: int) -> None:
        self.k, self.prompt_length = k, prompt_length
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return (input_ids[:, self.prompt_length :] % 2 == 0).sum(-1) >= self.k


RAGGED = prompts(5, 17, 1, 9)
SINGLE = prompts(12)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_length": {"max_length": 40, "max_new_tokens": None},
    "generation_config": {
        "make_generation_config": lambda: GenerationConfig(max_new_tokens=13, repetition_penalty=1.2, eos_token_id=7, pad_token_id=3),
        "max_new_tokens": None,
    },
    "eos_int": {"eos_token_id": 40},
    "eos_list": {"eos_token_id": list(range(20, 40)), "pad_token_id": 1},
    "min_new_tokens": {"eos_token_id": list(range(10, 60)), "min_new_tokens": 9},
    "min_length": {"eos_token_id": list(range(10, 60)), "min_length": 22},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7], [20]], "eos_token_id": 9},
    "suppress": {"suppress_tokens": list(range(30, 60)), "begin_suppress_tokens": list(range(60, 97))},
    "forced_eos": {"forced_eos_token_id": 11, "eos_token_id": 11},
    "sequence_bias": {"sequence_bias": [[[8], 6.0], [[8, 9], 12.0]]},
    "exponential_decay": {"eos_token_id": 11, "exponential_decay_length_penalty": (3, 1.5)},
    "encoder_penalty": {"encoder_repetition_penalty": 1.6},
    "encoder_ngram": {"encoder_no_repeat_ngram_size": 1},
    "remove_invalid": {"remove_invalid_values": True, "renormalize_logits": True},
    "prefix_allowed": {
        "prefix_allowed_tokens_fn": lambda row, ids: [(row * 13 + int(ids[-1]) * 7 + k) % VOCAB for k in range(9)],
    },
    "stop_after": {
        "make_stopping_criteria": lambda: StoppingCriteriaList([StopAfter(4, 17)]), "eos_token_id": 96, "pad_token_id": 0,
    },
    "own_max_length": {"make_stopping_criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(26)])},
    "own_eos": {
        "make_stopping_criteria": lambda: StoppingCriteriaList([EosTokenCriteria(torch.arange(20, 40))]), "pad_token_id": 2,
    },
    "max_time": {"max_time": 600.0},
    "no_cache": {"use_cache": False},
    "eos_none": {"eos_token_id": None},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("inputs", [SINGLE, RAGGED], ids=["single", "ragged"])
def test_greedy_is_model_generate(name: str, inputs: dict[str, torch.Tensor]) -> None:
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **OPTIONS[name]}
    kwargs = {key: value for key, value in kwargs.items() if key != "max_new_tokens" or value is not None}
    check(shared("llama"), inputs, "custom" if inputs is SINGLE else "direct accelerate", **kwargs)


def test_forced_bos() -> None:
    check(shared("llama"), prompts(1), max_new_tokens=6, forced_bos_token_id=33)


def test_no_input_starts_from_bos() -> None:
    model = build("llama")
    model.generation_config.bos_token_id = 4
    expected = model.generate(max_new_tokens=8)
    with specdec.accelerate(model, method=FakeBuilder(expected.tolist()), budget=8):
        assert torch.equal(model.generate(max_new_tokens=8), expected)
    with installed(FakeBuilder(expected.tolist())):
        assert torch.equal(specdec.generate(model, max_new_tokens=8, specdec_method="fake", specdec_budget=4), expected)


@pytest.mark.parametrize("inputs", [SINGLE, RAGGED], ids=["single", "ragged"])
def test_scores_and_logits(inputs: dict[str, torch.Tensor]) -> None:
    kwargs: dict[str, Any] = {
        "max_new_tokens": NEW, "repetition_penalty": 1.5, "eos_token_id": list(range(12)), "min_new_tokens": 3,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    expected = expected_of(shared("llama"), inputs, **kwargs)
    length = inputs["input_ids"].shape[1]
    for output in everyway(shared("llama"), inputs, FakeBuilder(texts_of(expected, inputs)), **kwargs):
        assert torch.equal(output.sequences, expected.sequences)
        assert len(output.scores) == len(expected.scores) == len(output.logits)
        for row, new in enumerate(expected.sequences[:, length:].tolist()):
            ended = next((step for step, token in enumerate(new) if token < 12), len(new) - 1)
            for step in range(ended + 1):
                torch.testing.assert_close(output.scores[step][row], expected.scores[step][row], atol=1e-4, rtol=0)
                torch.testing.assert_close(output.logits[step][row], expected.logits[step][row], atol=1e-4, rtol=0)
        assert output.scores[0].shape == expected.scores[0].shape and not output.scores[0].is_inference()
    only_sequences = {**kwargs, "output_scores": False, "output_logits": False}
    assert check(shared("llama"), inputs, **only_sequences).scores is None


def test_custom_processor_runs_once_a_token_in_order() -> None:
    model, length = shared("llama"), SINGLE["input_ids"].shape[1]
    theirs = Counting()
    expected = model.generate(**SINGLE, max_new_tokens=NEW, logits_processor=LogitsProcessorList([theirs]))
    ours = [Counting() for _ in range(3)]
    fresh = iter(ours)
    outputs = everyway(
        model,
        SINGLE,
        FakeBuilder(expected.tolist()),
        max_new_tokens=NEW,
        make_logits_processor=lambda: LogitsProcessorList([next(fresh)]),
    )
    assert all(torch.equal(output, expected) for output in outputs)
    assert all(processor.lengths == theirs.lengths == list(range(length, length + NEW)) for processor in ours)


def test_custom_processor_of_a_batch_keeps_its_state_by_row() -> None:
    model = shared("llama")
    alone = []
    for row in range(4):
        mask = RAGGED["attention_mask"][row]
        ids = RAGGED["input_ids"][row : row + 1, mask == 1]
        alone.append(model.generate(ids, max_new_tokens=NEW, logits_processor=LogitsProcessorList([Counting()]))[0].tolist())
    original = Counting()
    for output in everyway(
        model, RAGGED, FakeBuilder(alone), max_new_tokens=NEW, logits_processor=LogitsProcessorList([original])
    ):
        assert texts_of(output, RAGGED) == alone
    assert original.lengths == []


def test_a_processor_is_not_asked_behind_the_end() -> None:
    """A grammar allows nothing after EOS; drafts behind it must not make it fail."""
    model = shared("llama")
    free = model.generate(**SINGLE, max_new_tokens=NEW)
    length, eos = SINGLE["input_ids"].shape[1], int(free[0, SINGLE["input_ids"].shape[1] + 7])

    def grammar(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert eos not in ids[0, length:].tolist()
        return scores

    expected = model.generate(**SINGLE, max_new_tokens=NEW, eos_token_id=eos)
    for seed in range(5):
        for output in everyway(
            model,
            SINGLE,
            FakeBuilder(free.tolist(), seed=seed),
            max_new_tokens=NEW,
            eos_token_id=eos,
            logits_processor=LogitsProcessorList([grammar]),
        ):
            assert torch.equal(output, expected)


def test_processors_see_one_row_at_a_time() -> None:
    def batched(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.zeros(4, VOCAB)

    with (
        pytest.raises(ValueError, match="logits_processor returned scores of shape"),
        specdec.accelerate(shared("llama"), method="none", budget=4),
    ):
        shared("llama").generate(**RAGGED, max_new_tokens=4, logits_processor=LogitsProcessorList([batched]))


def test_processors_that_cannot_be_copied_are_refused_in_a_batch() -> None:
    class Locked(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    class Holding(Counting):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError

    with specdec.accelerate(shared("llama"), method="none", budget=4):
        with pytest.raises(ValueError, match="Locked cannot be copied"):
            shared("llama").generate(**RAGGED, max_new_tokens=4, logits_processor=LogitsProcessorList([Locked()]))
        shared("llama").generate(**SINGLE, max_new_tokens=4, logits_processor=LogitsProcessorList([Locked()]))


def test_a_copied_processor_shares_its_model() -> None:
    from specdec.hf import _own_copy

    processor = Counting()
    processor.model = shared("llama")  # type: ignore[attr-defined]
    own = _own_copy(processor)
    assert own is not processor and own.model is processor.model and own.lengths is not processor.lengths  # type: ignore[attr-defined]


def test_criteria_are_called_once_a_token_and_row() -> None:
    model, length = shared("llama"), RAGGED["input_ids"].shape[1]
    criterion = StopAfter(100, length)
    expected = model.generate(**RAGGED, max_new_tokens=NEW)
    with specdec.accelerate(model, method=FakeBuilder(texts_of(expected, RAGGED)), budget=12):
        assert torch.equal(
            model.generate(**RAGGED, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([criterion])), expected
        )
    assert sorted(criterion.shapes) == sorted((1, length + step) for step in range(1, NEW + 1) for _ in range(4))


def test_criteria_get_the_scores() -> None:
    class Confident(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            assert len(scores) == input_ids.shape[1] - SINGLE["input_ids"].shape[1] and scores[-1].shape == (1, VOCAB)
            return scores[-1].softmax(-1).amax(-1) > 0.99

    free = shared("llama").generate(**SINGLE, max_new_tokens=60)
    kwargs: dict[str, Any] = {
        "max_new_tokens": 60, "make_stopping_criteria": lambda: StoppingCriteriaList([Confident()]),
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    expected = expected_of(shared("llama"), SINGLE, **kwargs)
    for output in everyway(shared("llama"), SINGLE, FakeBuilder(free.tolist()), **kwargs):
        assert torch.equal(output.sequences, expected.sequences) and len(output.scores) == len(expected.scores)


def test_max_time_stops() -> None:
    with specdec.accelerate(shared("llama"), method="none", budget=4):
        output = shared("llama").generate(**SINGLE, max_new_tokens=400, max_time=0.02)
    assert SINGLE["input_ids"].shape[1] < output.shape[1] < SINGLE["input_ids"].shape[1] + 400


# ---- sampling ---------------------------------------------------------------------------------------------------------------

LAWS: list[dict[str, Any]] = [
    {"temperature": temperature, **rest}
    for temperature in (0.3, 0.7, 1.0)
    for rest in (
        {"top_k": 0},
        {"top_k": 12},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.05},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    )
]
ALL_LAWS = [
    {"temperature": temperature, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    for temperature in (0.3, 0.7, 1.0)
]


def oracle(
    model: Any, inputs: dict[str, torch.Tensor], law: dict[str, Any], rows: list[Randomness], new: int = NEW, **kwargs: Any
) -> torch.Tensor:
    """model.generate(do_sample=False) with transformers' own warpers and the keyed noise: sampling, written as a search."""
    processors = LogitsProcessorList()
    pads = (inputs["attention_mask"] == 0).sum(-1)
    if (penalty := law.get("repetition_penalty")) is not None:
        processors.append(warpers.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=pads))
    if law["temperature"] != 1:
        processors.append(warpers.TemperatureLogitsWarper(law["temperature"]))
    if law.get("top_k"):
        processors.append(warpers.TopKLogitsWarper(law["top_k"]))
    if "top_p" in law:
        processors.append(warpers.TopPLogitsWarper(law["top_p"]))
    if "min_p" in law:
        processors.append(warpers.MinPLogitsWarper(law["min_p"]))
    processors.append(KeyedGumbel(rows, pads.tolist()))
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, logits_processor=processors, **kwargs)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("inputs", [SINGLE, RAGGED], ids=["single", "ragged"])
def test_sampling_is_the_oracle(law: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
    model = shared("llama")
    expected = oracle(model, inputs, law, [Randomness(11, (row, 0)) for row in range(len(inputs["input_ids"]))])
    with specdec.accelerate(model, method=FakeBuilder(texts_of(expected, inputs)), budget=10, seed=11):
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=True, **law), expected)


@pytest.mark.parametrize("law", ALL_LAWS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_samples_the_oracle(method: str, law: dict[str, Any]) -> None:
    model = shared("llama")
    expected = oracle(model, RAGGED, law, [Randomness(5, (row, 0)) for row in range(4)])
    with specdec.accelerate(model, method=method, budget=16, seed=5):
        for _ in range(2):  # the second time with what was learned
            assert torch.equal(model.generate(**RAGGED, max_new_tokens=NEW, do_sample=True, **law), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_greedy(method: str) -> None:
    model = shared("llama")
    expected = model.generate(**RAGGED, max_new_tokens=60)
    with specdec.accelerate(model, method=method, budget=16) as engine:
        for _ in range(2):
            assert torch.equal(model.generate(**RAGGED, max_new_tokens=60), expected)
    assert not engine.rows


def test_sampling_does_not_depend_on_the_batch() -> None:
    """A row's stream is its place: the same prompt at the same place says the same beside any others; engine streams likewise."""
    model, law = shared("llama"), ALL_LAWS[1]
    ids = [row[mask == 1].tolist() for row, mask in zip(RAGGED["input_ids"], RAGGED["attention_mask"])]
    params = specdec.SamplingParams(max_new_tokens=NEW, seed=3, **law)
    engine = specdec.Engine(model, method=FakeBuilder(), budget=8)
    together = [result.token_ids for result in engine.generate(ids, params)]
    rng = [Randomness(3, (row, 0)) for row in range(4)]
    assert together == [row[RAGGED["input_ids"].shape[1] :].tolist() for row in oracle(model, RAGGED, law, rng)]
    narrow = specdec.Engine(model, method=FakeBuilder(together, seed=5), budget=8, max_rows=2)
    assert [result.token_ids for result in narrow.generate(ids, params)] == together
    assert engine.generate(ids[0], params).token_ids == together[0]
    order = [2, 0, 3, 1]
    permuted = engine.generate([ids[i] for i in order], params)
    again = oracle(
        model, {key: value[order] for key, value in RAGGED.items()}, law, rng
    )[:, RAGGED["input_ids"].shape[1] :]  # fmt: skip
    assert [result.token_ids for result in permuted] == again.tolist()


def test_num_return_sequences() -> None:
    model, law = shared("llama"), {"temperature": 1.0, "top_k": 0}
    inputs = prompts(4, 8)
    expanded = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
    expected = oracle(model, expanded, law, [Randomness(2, (row, sample)) for row in range(2) for sample in range(3)])
    outputs = everyway(
        model,
        inputs,
        FakeBuilder(texts_of(expected, expanded)),
        max_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=3,
        specdec_seed=2,
        **law,
    )
    assert all(torch.equal(output, expected) for output in outputs)
    assert len({tuple(row) for row in expected.tolist()}) == 6


def test_seeds_and_the_global_generator() -> None:
    model = shared("llama")
    kwargs: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": True,
        "custom_generate": specdec.generate,
        "specdec_method": "none",
        "specdec_budget": 1,
    }
    before = torch.get_rng_state()
    first = model.generate(**RAGGED, **kwargs, specdec_seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    model.generate(**RAGGED, **{**kwargs, "do_sample": False})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.generate(**RAGGED, **kwargs, specdec_seed=4), first)
    torch.manual_seed(9)
    one = model.generate(**RAGGED, **kwargs)
    after = torch.get_rng_state()
    torch.manual_seed(9)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), after)  # exactly one draw
    assert not torch.equal(model.generate(**RAGGED, **kwargs), one)
    torch.manual_seed(9)
    assert torch.equal(model.generate(**RAGGED, **kwargs), one)
    torch.set_rng_state(before)


# ---- text: streamers, stop strings, pipelines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texty() -> tuple[Any, Any]:
    """A model over bytes with lively text, and its tokenizer."""
    model = build("llama", vocab_size=258, initializer_range=0.4, suppress_tokens=None)
    model.generation_config.suppress_tokens = [*range(10), *range(94, 258)]  # printable ASCII only
    model.generation_config.pad_token_id = 256
    return model, make_tiny_tokenizer()


def test_streamers(texty: tuple[Any, Any]) -> None:
    model, tokenizer = texty
    inputs = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=NEW)
    text = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    builder = FakeBuilder(expected.tolist(), 258)
    streamer = lambda: transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)  # noqa: E731
    with specdec.accelerate(model, method=builder, budget=8):
        first = streamer()
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, streamer=first), expected)
    with installed(builder):
        second, third = streamer(), streamer()
        specdec.generate(model, **inputs, max_new_tokens=NEW, streamer=second, specdec_method="fake", specdec_budget=8)
        model.generate(
            **inputs,
            max_new_tokens=NEW,
            custom_generate=specdec.generate,
            specdec_streamer=third,
            specdec_method="fake",
            specdec_budget=8,
        )
    assert "".join(first) == "".join(second) == "".join(third) == text


def test_a_streamer_that_would_be_dropped_is_refused(texty: tuple[Any, Any]) -> None:
    model, tokenizer = texty
    inputs = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="streamer does not reach"):
        model.generate(
            **inputs, max_new_tokens=4, custom_generate=specdec.generate, streamer=transformers.TextStreamer(tokenizer)
        )


def test_stop_strings(texty: tuple[Any, Any]) -> None:
    model, tokenizer = texty
    inputs = tokenizer(["hello", "hey you"], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    free = model.generate(**inputs, max_new_tokens=NEW)
    length = inputs["input_ids"].shape[1]
    stop = tokenizer.decode(free[0, length + 5 : length + 8])
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = 257  # so that ended rows are padded
    kwargs: dict[str, Any] = {"max_new_tokens": NEW, "stop_strings": [stop, "@@@@"], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **kwargs)
    assert expected[0].tolist() != free[0].tolist()
    config = GenerationConfig(max_new_tokens=NEW, stop_strings=stop)
    builder = FakeBuilder(texts_of(free, inputs), 258)
    with specdec.accelerate(model, method=builder, budget=8):
        assert torch.equal(model.generate(**inputs, **kwargs), expected)
        assert torch.equal(model.generate(**inputs, generation_config=config, tokenizer=tokenizer), expected)
        with pytest.raises(ValueError, match="stop_strings"):
            model.generate(**inputs, max_new_tokens=4, stop_strings="x")
    with installed(builder):
        options = {"specdec_method": "fake", "specdec_budget": 8}
        assert torch.equal(specdec.generate(model, **inputs, **kwargs, **options), expected)
        assert torch.equal(specdec.generate(model, **inputs, generation_config=config, tokenizer=tokenizer, **options), expected)
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop, "@@@@"])])
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=NEW, stopping_criteria=criteria, custom_generate=specdec.generate, **options),
            expected,
        )
        model.generation_config.stop_strings = [stop, "@@@@"]
        assert torch.equal(specdec.generate(model, **inputs, max_new_tokens=NEW, tokenizer=tokenizer, **options), expected)
        with pytest.raises(ValueError, match="stop_strings"):
            specdec.generate(model, **inputs, max_new_tokens=NEW, **options)
    assert config.stop_strings == stop


def test_pipeline(texty: tuple[Any, Any], made: Counter[specdec.Engine]) -> None:
    model, tokenizer = texty
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    kwargs: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = pipe("hello there", **kwargs)
    batch = pipe(["hello", "a longer prompt", "x"], batch_size=3, **kwargs)
    stop = expected[0]["generated_text"][-6:-3]
    stopped = pipe("hello there", **kwargs, stop_strings=[stop], tokenizer=tokenizer)
    with specdec.accelerate(model, method="ngram", budget=8) as engine:
        assert pipe("hello there", **kwargs) == expected
        assert made[engine] == 1  # it was specdec that ran
        assert pipe(["hello", "a longer prompt", "x"], batch_size=3, **kwargs) == batch
        assert pipe("hello there", **kwargs, stop_strings=[stop], tokenizer=tokenizer) == stopped


# ---- accelerate(): PEFT, nesting, restoring --------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        ).eval()


def test_peft(made: Counter[specdec.Engine]) -> None:
    plain = shared("llama").generate(**RAGGED, max_new_tokens=NEW)
    model = lora(build("llama"))
    expected = model.generate(**RAGGED, max_new_tokens=NEW)
    assert not torch.equal(expected, plain)
    for output in everyway(model, RAGGED, FakeBuilder(texts_of(expected, RAGGED)), max_new_tokens=NEW):
        assert torch.equal(output, expected)
    base = model.get_base_model()
    with specdec.accelerate(base, method="none", budget=4) as engine:
        assert torch.equal(model.generate(**RAGGED, max_new_tokens=NEW), expected)
    assert made[engine] == 4 and "generate" not in base.__dict__
    ids = [row[mask == 1].tolist() for row, mask in zip(RAGGED["input_ids"], RAGGED["attention_mask"])]
    results = specdec.Engine(model, method="ngram", budget=8).generate(ids, specdec.SamplingParams(max_new_tokens=NEW))
    assert [result.token_ids for result in results] == expected[:, RAGGED["input_ids"].shape[1] :].tolist()


def test_prompt_learning_is_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt learning"):
        model.generate(**SINGLE, max_new_tokens=4, custom_generate=specdec.generate, specdec_method="none", specdec_budget=1)
    with pytest.raises(ValueError, match="prompt learning"), specdec.accelerate(model, method="none", budget=1):
        model.generate(**SINGLE, max_new_tokens=4)


def test_nested_and_mixed(made: Counter[specdec.Engine]) -> None:
    model = build("llama")
    expected = model.generate(**RAGGED, max_new_tokens=NEW)
    with specdec.accelerate(model, method="none", budget=4) as outer:
        with specdec.accelerate(model, method="ngram", budget=8) as inner:
            assert torch.equal(model.generate(**RAGGED, max_new_tokens=NEW), expected)
        assert (made[outer], made[inner]) == (0, 4)
        assert torch.equal(model.generate(**RAGGED, max_new_tokens=NEW), expected)
        assert torch.equal(model.generate(**RAGGED, max_new_tokens=NEW, custom_generate=specdec.generate), expected)
        assert torch.equal(specdec.generate(model, **RAGGED, max_new_tokens=NEW), expected)
        assert made[outer] == 12
        assert torch.equal(
            specdec.generate(model, **RAGGED, max_new_tokens=NEW, specdec_method="suffix", specdec_budget=6), expected
        )
        assert made[outer] == 12
        assert torch.equal(
            model.generate(RAGGED["input_ids"], GenerationConfig(max_new_tokens=NEW), attention_mask=RAGGED["attention_mask"]),
            expected,
        )
        with pytest.raises(ValueError, match="custom_generate"):
            model.generate(**RAGGED, max_new_tokens=NEW, custom_generate=lambda *args, **kwargs: None)
    assert "generate" not in model.__dict__
    model.generate = model.generate  # an instance's own, as some wrappers set it
    own = model.__dict__["generate"]
    with specdec.accelerate(model, method="none", budget=4):
        assert model.__dict__["generate"] is not own
    assert model.__dict__["generate"] is own


def snapshot(model: Any) -> Any:
    return (
        [(module.training, sorted(module.__dict__)) for module in model.modules()],
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        model.config.to_dict(), model.generation_config.to_dict(), torch.get_rng_state().tolist(),
        [parameter.requires_grad for parameter in model.parameters()], [len(module._forward_hooks) for module in model.modules()],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2"])
def test_everything_is_restored(name: str) -> None:
    model = build(name)
    model.train()
    model.get_input_embeddings().eval()  # a part that the user froze
    before = snapshot(model)
    with specdec.accelerate(model, method="ngram", budget=8):
        model.generate(**RAGGED, max_new_tokens=8, do_sample=True, specdec_seed=1)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), specdec.accelerate(model, method="ngram", budget=8):
        model.generate(**SINGLE, max_new_tokens=8)
        raise ZeroDivisionError
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**SINGLE, max_new_tokens=8, num_beams=2, custom_generate=specdec.generate)
    assert snapshot(model) == before
    model(**SINGLE).logits.sum().backward()  # nothing left in inference mode


def test_the_kept_engine(made: Counter[specdec.Engine]) -> None:
    """It is reused, follows the model's dtype, and dies with the model."""
    from specdec import hf

    gc.collect()
    model = build("llama")
    kwargs: dict[str, Any] = {
        "max_new_tokens": 6,
        "custom_generate": specdec.generate,
        "specdec_method": "ngram",
        "specdec_budget": 4,
    }
    model.generate(**SINGLE, **kwargs)
    model.generate(**SINGLE, **kwargs)
    (engine,) = hf._engines[model].values()
    assert made[engine] == 2
    model.double()
    assert torch.equal(model.generate(**SINGLE, **kwargs), model.generate(**SINGLE, max_new_tokens=6))
    assert len(hf._engines[model]) == 2
    dead, dead_engine, kept = weakref.ref(model), weakref.ref(engine), len(hf._engines)
    made.clear()  # it holds the engine
    del model, engine
    gc.collect()
    assert dead() is None and dead_engine() is None and len(hf._engines) == kept - 1


def test_an_engine_of_the_callers(made: Counter[specdec.Engine]) -> None:
    model = build("llama")
    engine = specdec.Engine(model, method="ngram", budget=8)
    expected = model.generate(**SINGLE, max_new_tokens=NEW)
    assert torch.equal(specdec.generate(model, **SINGLE, max_new_tokens=NEW, specdec_engine=engine), expected)
    assert made[engine] == 1
    with pytest.raises(ValueError, match="specdec_engine"):
        specdec.generate(shared("llama"), **SINGLE, max_new_tokens=4, specdec_engine=engine)
    with pytest.raises(ValueError, match="specdec_method"):
        specdec.generate(model, **SINGLE, max_new_tokens=4, specdec_engine=engine, specdec_method="none")


# ---- refusals ---------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "num_beams=4": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "guidance_scale": {"guidance_scale": 1.5},
    "dola": {"dola_layers": "high"},
    "synced_gpus": {"synced_gpus": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "cache_implementation='static'": {"cache_implementation": "static"},
    "cache_implementation='offloaded'": {"cache_implementation": "offloaded"},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 32)},
    "labels": {"labels": torch.zeros(1, 12)},
    "position_ids": {"position_ids": torch.arange(12)[None] + 3},
    "zeros after its first one": {"attention_mask": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]])},
    "pad on the left": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])},
    "attention_mask must have the shape": {"attention_mask": torch.tensor([[0, 1, 1]])},
    "budget must be": {"specdec_budget": 0},
    "method must be": {"specdec_method": "wishful"},
    "seed must be": {"specdec_seed": "x", "do_sample": True},
    "prompt is empty": {"attention_mask": torch.zeros(1, 12, dtype=torch.long)},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("direct", [False, True], ids=["custom", "direct"])
def test_refused_by_name(message: str, direct: bool) -> None:
    model = shared("llama")
    arguments = {"max_new_tokens": 4, "specdec_method": "none", "specdec_budget": 4, **SINGLE, **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        specdec.generate(model, **arguments) if direct else model.generate(**arguments, custom_generate=specdec.generate)
    plain = {"max_new_tokens": 4, **SINGLE}
    assert torch.equal(specdec.generate(model, **plain, specdec_method="none", specdec_budget=4), model.generate(**plain))


def test_more_refusals(texty: tuple[Any, Any]) -> None:
    model, tokenizer = texty
    options: dict[str, Any] = {"max_new_tokens": 4, "specdec_method": "none", "specdec_budget": 4}
    inputs = {"input_ids": torch.tensor([[40, 41, 42]])}
    for assistant in (shared("llama"), model):
        with pytest.raises(ValueError, match="assistant"):
            specdec.generate(model, **inputs, **options, assistant_model=assistant)
    with pytest.raises(ValueError, match="past_key_values"):
        cache = transformers.DynamicCache(config=model.config)
        specdec.generate(model, **inputs, **options, past_key_values=cache)
    with pytest.raises(ValueError, match="token_type_ids"):
        specdec.generate(build("gpt2"), **inputs, **options, token_type_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="streamer supports one row"):
        specdec.generate(
            model, input_ids=torch.ones(2, 3, dtype=torch.long), **options, streamer=transformers.TextStreamer(tokenizer)
        )
    with pytest.raises(ValueError, match="logits_to_keep|not used"):
        specdec.generate(model, **inputs, **options, pixel_values=torch.zeros(1, 3))


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 4}
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(**inputs, custom_generate=specdec.generate)
    with pytest.raises(ValueError, match="encoder-decoder"), specdec.accelerate(model):
        pass
    assert "generate" not in model.__dict__
