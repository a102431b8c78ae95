"""Step rules: token ids are cut, never made anew; wherever token borders fall, the step ends at the token that ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_target import make_sequence
from specdec.search.steps import CodeBlock, Newline, StepRule, StopStrings, Tokens, make_rule, step_check
from test_text import TOKENIZERS

RULES: list[StepRule] = [
    StopStrings(),
    StopStrings(("世a\n", "世", "a\n\nS", "\n\n")),
    Newline(),
    Newline(2),
    CodeBlock(),
    Tokens(count=5),
]
TEXTS = st.text(alphabet="aS世é👩\n `", max_size=40) | st.sampled_from(
    ["2+2=4\n\nStep 2: x", "\nSteps", "a\n```py\nx=1\n\ny\n```\nb", "```\n```\n", "Grüße\n \nx", "a\u2028b\x0b\r\n\r\nc"]
)


class Pieces:
    """A tokenizer of given pieces: token i is the i-th."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)


def slow_count(rule: StepRule, ids: list[int], tokenizer: Any) -> int | None:
    """The oracle: the first prefix that has a boundary."""
    if isinstance(rule, Tokens):
        return rule.count if len(ids) >= rule.count else None
    return next((n for n in range(len(ids) + 1) if rule.find(tokenizer.decode(ids[:n])) is not None), None)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data())
def test_cut_is_the_first_prefix_with_a_boundary(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text)["input_ids"]
    for rule in RULES:
        cut, expected = rule.cut(ids, tokenizer), slow_count(rule, ids, tokenizer)
        assert (cut and cut.tokens) == expected
        if cut is None or isinstance(rule, Tokens):
            continue
        found = [rule.find(text[:end]) for end in range(len(text) + 1)]
        assert {span for span in found if span is not None} == {rule.find(text)}  # once seen, a boundary stays where it is
        if cut.surplus:
            assert tokenizer.decode(ids[: cut.tokens]).endswith(cut.surplus)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_check_stops_the_engine_at_the_same_token(rule: StepRule, text: str) -> None:
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer(text)["input_ids"]
    seq = make_sequence([0], max_new_tokens=1000)
    seq.stop_check = step_check(rule, tokenizer)
    kept = seq.append(list(ids)) if ids else 0
    cut = rule.cut(ids, tokenizer)
    assert kept == (len(ids) if cut is None else cut.tokens)
    assert (seq.finish_reason == "stop") == (cut is not None)


def test_boundary_inside_a_token_leaves_a_surplus() -> None:
    tokenizer = Pieces("2+2", "=4", "\n", "Steps", " 2")
    assert StopStrings(("\nStep",)).cut([0, 1, 2, 3, 4], tokenizer) == (4, "s", 0)
    assert StopStrings(("\nStep",)).cut([0, 1, 2], tokenizer) is None


def test_boundary_given_up() -> None:
    """keep=False: no text before the boundary is lost; a token that holds both stays whole."""
    assert StopStrings(keep=False).cut([0, 1, 2, 3], Pieces("a", "\n", "\n", "Step")) == (1, "", 3)
    assert StopStrings(("\nStep",), keep=False).cut([0, 1, 2], Pieces("a", "\n", "Step")) == (1, "", 2)
    assert StopStrings(("\nStep",), keep=False).cut([0, 1, 2], Pieces("a", ".\n", "Step")) == (2, "\n", 1)
    assert StopStrings(("\nStep",), keep=False).cut([0, 1], Pieces("\n", "Step")) == (0, "", 2)


@pytest.mark.parametrize(
    ("rule", "text", "step"),
    [
        (StopStrings(), "a\nStep\n\nStep", "a\nStep"),
        (Newline(), "\n \n a \nb\n", "\n \n a \n"),
        (Newline(2), "a\nb \n \nc", "a\nb \n \n"),
        (CodeBlock(), "see:\n```py\nx = 1\n\ny\n```\nmore\n", "see:\n```py\nx = 1\n\ny\n```\n"),
        (CodeBlock(), "\n\nfirst\n\nsecond\n\n", "\n\nfirst\n\n"),
        (CodeBlock(), "```\nopen\n\n", None),
        (CodeBlock(), "a\u2028b\n\nc", "a\u2028b\n\n"),
    ],
)
def test_examples(rule: StepRule, text: str, step: str | None) -> None:
    cut = rule.cut(list(range(len(text))), Pieces(*text))
    assert (None if cut is None else text[: cut.tokens]) == step


def test_incomplete_character_ends_no_step() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("é世")["input_ids"]
    assert StopStrings(("世",)).cut(ids[:-1], tokenizer) is None
    assert StopStrings(("世",)).cut(ids, tokenizer) == (5, "", 0)
    assert StopStrings(("世",), keep=False).cut(ids, tokenizer) == (2, "", 3)


@pytest.mark.parametrize(
    ("rule", "text", "blank"),
    [
        (StopStrings(), "\nStep", True),
        (StopStrings(), " \n\nStep", True),
        (StopStrings(), "Step", False),
        (StopStrings(), ". \nStep", False),
        (Newline(), " \n", True),
        (Newline(), "a\n", False),
        (Tokens(count=3), "   ", True),
        (Tokens(count=3), " a ", False),
    ],
)
def test_steps_that_say_nothing(rule: StepRule, text: str, blank: bool) -> None:
    assert rule.blank(text) is blank


@pytest.mark.parametrize("name", ["steps", "newline", "paragraph", "code", "tokens:64"])
def test_rules_by_name(name: str) -> None:
    assert isinstance(make_rule(name), StepRule)


@pytest.mark.parametrize("bad", ["lines", "tokens:", "tokens:-1", "tokens:0", 3])
def test_bad_rule(bad: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_rule(bad)


@pytest.mark.parametrize("options", [{"strings": ()}, {"strings": "ab"}, {"strings": ("",)}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        StopStrings(**options)
