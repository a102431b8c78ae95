"""Text in pieces: joined, they are the decoded tokens cut at the first stop string, wherever token borders fall."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import make_tiny_tokenizer
from specdec.text import Detokenizer, cut_at_stop, stop_string_check

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve — das Ende. STOP und weiter"
ALPHABET = "ab S世é👩"


def make_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges: tokens of several characters, and of parts of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator([TEXT, "the end of the story", "STOP STO ST", ALPHABET], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def make_metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is part of the next word, and vanishes at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {
        word: index
        for index, word in enumerate(
            ["<unk>", "<eos>", "\u2581", "\u2581the", "\u2581end", "\u2581of", "s", "\u2581STO", "P", "ing", "."]
        )
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {"bytes": make_tiny_tokenizer(), "bpe": make_bpe(), "metaspace": make_metaspace()}


def stream(tokenizer: Any, token_ids: list[int], stops: tuple[str, ...], cuts: list[int]) -> list[str]:
    """Pieces when the tokens arrive in groups that end at `cuts`."""
    detokenizer = Detokenizer(tokenizer, stops)
    ends = sorted({cut for cut in cuts if 0 < cut < len(token_ids)} | {len(token_ids)})
    return [detokenizer.push(token_ids[:end], end == len(token_ids)) for end in ends]


@pytest.mark.parametrize("stops", [(), ("STOP",), ("世界", "never"), (" ",), ("👩‍👧",)])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_pieces_are_the_text(name: str, stops: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer(TEXT)["input_ids"]
    for width in (1, 2, 3, 7, 1000):
        pieces = stream(tokenizer, token_ids, stops, list(range(0, len(token_ids), width)))
        assert "".join(pieces) == cut_at_stop(TEXT, stops)
        assert "\ufffd" not in "".join(pieces)


@given(
    data=st.data(),
    name=st.sampled_from(sorted(TOKENIZERS)),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_any_tokens_in_any_groups(data: Any, name: str, stops: list[str]) -> None:
    """Also bytes that are no characters, and special tokens in the middle."""
    tokenizer = TOKENIZERS[name]
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=25))
    cuts = data.draw(st.lists(st.integers(0, 25), max_size=25))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces = stream(tokenizer, token_ids, tuple(stops), cuts)
    assert "".join(pieces) == cut_at_stop(whole, stops)


@given(
    words=st.lists(st.text(ALPHABET, max_size=4), max_size=8),
    cuts=st.lists(st.integers(0, 60), max_size=20),
    stop=st.text(ALPHABET, min_size=1, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_never_part_of_a_stop_string_nor_half_a_character(words: list[str], cuts: list[int], stop: str) -> None:
    tokenizer, text = TOKENIZERS["bytes"], "".join(words)
    shown = ""
    for piece in stream(tokenizer, tokenizer(text)["input_ids"], (stop,), cuts):
        shown += piece
        assert cut_at_stop(text, [stop]).startswith(shown) and stop not in shown


def test_what_was_held_back_is_released() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("one ST two STO")["input_ids"]
    detokenizer = Detokenizer(tokenizer, ["STOP"])
    assert detokenizer.push(ids[:6], False) == "one "  # " ST" may be the beginning
    assert detokenizer.push(ids[:7], False) == "ST "
    assert detokenizer.push(ids, False) == "two "
    assert detokenizer.push(ids, True) == "STO"


def test_nothing_after_the_stop_string() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("a STOP b")["input_ids"]
    detokenizer = Detokenizer(tokenizer, ["STOP"])
    assert detokenizer.push(ids, False) == "a "
    assert detokenizer.push([*ids, *ids], False) == "" and detokenizer.push([*ids, *ids], True) == ""


def test_a_character_that_never_completes_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("a世")["input_ids"][:-1]
    assert stream(tokenizer, ids, (), [1, 2]) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("", ["a"], ""), ("abc", [], "abc"), ("abcabc", ["ca", "bc"], "a"), ("abc", ["abc"], ""), ("abc", ["d"], "abc")],
)
def test_cut_at_stop(text: str, stops: list[str], expected: str) -> None:
    assert cut_at_stop(text, stops) == expected


class Output:
    """As much of a Sequence as the check reads."""

    prompt_len = 3

    def __init__(self, output_ids: list[int]) -> None:
        self.token_ids = [0] * self.prompt_len + output_ids
        self.output_length = len(output_ids)


@given(
    data=st.data(),
    name=st.sampled_from(["bytes", "bpe"]),
    stops=st.lists(st.text("STOP ab世", min_size=1, max_size=4), min_size=1, max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_the_check_fires_with_the_first_token_that_completes_a_stop_string(data: Any, name: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    words = data.draw(st.lists(st.sampled_from(["a", "b", " ", "STOP", "ST", "OP", "世", "<eos>"]), max_size=15))
    token_ids = tokenizer("".join(words))["input_ids"]
    check = stop_string_check(tokenizer, stops)
    for count in range(1, len(token_ids) + 1):
        expected = any(stop in tokenizer.decode(token_ids[:count], skip_special_tokens=True) for stop in stops)
        assert check(Output(token_ids[:count])) == expected  # type: ignore[arg-type]
        if expected:
            return


def test_the_check_reads_past_tokens_without_text() -> None:
    """Special tokens carry no character: the window must not be filled by them."""
    tokenizer = TOKENIZERS["bpe"]
    start, end = tokenizer("STO")["input_ids"], tokenizer("P")["input_ids"]
    assert stop_string_check(tokenizer, ["STOP"])(Output([*start, *[tokenizer.eos_token_id] * 40, *end]))  # type: ignore[arg-type]
