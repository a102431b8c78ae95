"""Prompts: templates, files, and token ids that only ever grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from specdec.models import embedded_model_path, is_embedded_installed
from specdec.search.prompts import Prompts

HOSTILE = 'What is $x$ in ${problem} $example \\boxed{} {0} %s </s> <|im_end|>\n"世界 👩‍👩‍👧"?'


@pytest.fixture(scope="module")
def smollm() -> Any:
    if not is_embedded_installed():
        pytest.skip("the embedded model is not installed (make setup)")
    return AutoTokenizer.from_pretrained(embedded_model_path())


def test_problem_is_inserted_and_never_interpreted() -> None:
    assert Prompts(problem="Costs $$5. $problem").user_turn(HOSTILE) == f"Costs $5. {HOSTILE}"


def test_default_shows_example_and_prefills(tiny_tokenizer: Any) -> None:
    text = tiny_tokenizer.decode(Prompts().encode(tiny_tokenizer, "2 + 2?"))
    assert text.count("Problem: ") == 2 and "Step 2: " in text and "\\boxed{}" in text
    assert text.endswith("Problem: 2 + 2?<assistant>Step 1:")


def test_system_message(tiny_tokenizer: Any) -> None:
    text = tiny_tokenizer.decode(Prompts(system="Be brief.").encode(tiny_tokenizer, "2 + 2?"))
    assert text.startswith("<system>Be brief.<user>")


def test_without_chat_template(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    ids = Prompts(problem="Q: $problem", system="S", prefill="A:").encode(tiny_tokenizer, "2 + 2?")
    assert tiny_tokenizer.decode(ids) == "S\n\nQ: 2 + 2?\n\nA:"


@pytest.mark.parametrize("template", ["no place", "$problem $other", "${", "$problem $"])
def test_bad_template(template: str) -> None:
    with pytest.raises(ValueError, match="problem must be a template"):
        Prompts(problem=template)


def test_not_a_string() -> None:
    with pytest.raises(ValueError, match="prefill must be a string"):
        Prompts(prefill=None)  # type: ignore[arg-type]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text("problem = '''$problem = \\boxed{?}'''\nprefill = ''\n", encoding="utf-8")
    prompts = Prompts.load(path)
    assert prompts.user_turn("x") == "x = \\boxed{?}" and prompts.prefill == "" and prompts.answer == Prompts().answer


@pytest.mark.parametrize(("text", "message"), [("probelm = 'x'", "unknown field 'probelm'"), ("= 3", "is not TOML")])
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Prompts.load(path)


def test_prefill_extends_the_chat_prompt(smollm: Any) -> None:
    """Prefix identity: the ids with a prefill begin with the ids without it."""
    bare, prefilled = (Prompts(prefill=prefill).encode(smollm, HOSTILE) for prefill in ("", "Step 1:"))
    assert prefilled[: len(bare)] == bare and smollm.decode(prefilled[len(bare) :]) == "Step 1:"


def test_continued_turn_is_a_prefix(smollm: Any) -> None:
    """prompt + step + cue: nothing before the cue changes, and the text is what a turn written in one go would be."""
    prompts = Prompts()
    prompt = prompts.encode(smollm, "2 + 2?")
    step = smollm(" 2 + 2 = 5, so \\boxed{5}.", add_special_tokens=False)["input_ids"]
    path = prompt + step
    for ids, said in (
        (prompts.reconsider_ids(smollm, path), prompts.reconsider + "Step 1:"),
        (prompts.answer_ids(smollm, path), prompts.answer),
    ):
        assert smollm.decode(path + ids) == smollm.decode(path) + said
        assert smollm.eos_token_id not in ids


def test_cue_after_eos_is_the_users(smollm: Any) -> None:
    """The chat goes on as the template itself would render it."""
    prompts = Prompts(problem="$problem")
    eos = frozenset([smollm.eos_token_id])
    reply = smollm(" 2 + 2 = 5.", add_special_tokens=False)["input_ids"]
    path = prompts.encode(smollm, "2 + 2?") + reply + [smollm.eos_token_id]
    whole = path + prompts.reconsider_ids(smollm, path, eos)
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "Step 1: 2 + 2 = 5."},
        {"role": "user", "content": prompts.reconsider.strip()},
    ]
    rendered = smollm.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert smollm.decode(whole) == rendered + "Step 1:"


def test_cue_tokens_are_the_most_that_a_cue_may_be(tiny_tokenizer: Any) -> None:
    prompts, eos = Prompts(), frozenset({257})
    lengths = {
        len(cue(tiny_tokenizer, path, eos)) for path in ([5], [5, 257]) for cue in (prompts.reconsider_ids, prompts.answer_ids)
    }
    assert len(lengths) == 4 and prompts.cue_tokens(tiny_tokenizer, eos) == max(lengths)
