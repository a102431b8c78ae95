"""The README's Python snippets run, in order, in one namespace: with a tiny model always, with the embedded one under `slow`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient

import specdec
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.serve.app import make_app

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    """The ```python blocks, padded with empty lines so that a traceback names the README's own line."""
    text = README.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block.group(1) for block in blocks]


def run_snippets(model: Any, tokenizer: Any) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    with serving(model, tokenizer):
        for snippet in snippets():
            exec(compile(snippet, str(README), "exec"), namespace)


@contextmanager
def serving(model: Any, tokenizer: Any) -> Iterator[None]:
    """OpenAI's client reaches `specdec serve --name my-model` in this process, without a port."""
    app = make_app(specdec.Engine(model, tokenizer), "my-model")
    with pytest.MonkeyPatch.context() as patch, TestClient(app) as client:
        patch.setattr(openai, "OpenAI", partial(openai.OpenAI, http_client=client))
        yield


def test_there_are_snippets():
    assert len(snippets()) >= 5
    assert "custom_generate=specdec.generate" in "".join(snippets())


def test_snippets_run_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_tiny_llama(num_hidden_layers=8)  # deeper than the README's early exit
    tokenizer = make_tiny_tokenizer()
    monkeypatch.setattr(specdec, "load", lambda *_: (model, tokenizer), raising=False)
    run_snippets(model, tokenizer)


@pytest.mark.slow
def test_snippets_run_as_printed(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    run_snippets(*embedded)
    torch.set_rng_state(before)


def test_files_and_make_targets_exist():
    """What the README points to is there."""
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)", text)):
        assert f"\n{target}:" in makefile, f"README names make {target}"
    for path in set(re.findall(r"`((?:specdec|bench|tests|csrc)/[\w./]*)`", text)):
        assert (README.parent / path).exists(), f"README names {path}"
