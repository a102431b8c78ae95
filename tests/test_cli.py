"""The command line: what it prints where, and one clean line for what a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec import cli
from specdec.linear import HAVE_OP

runner = CliRunner()


def run(*arguments: str, text: str | None = None):
    return runner.invoke(cli.app, list(arguments), input=text)


def test_generate_streams_what_generate_returns(tiny_folder):
    """Streamed, complete and without drafts: one text, and the statistics stay off stdout."""
    options = ["--model", tiny_folder, "-n", "12"]
    streamed = run("generate", "abcabcabc", *options)
    complete = run("generate", "abcabcabc", *options, "--stats")
    plain = run("generate", "abcabcabc", *options, "--method", "none")
    assert streamed.exit_code == complete.exit_code == plain.exit_code == 0, streamed.output + complete.output + plain.output
    assert streamed.stdout == complete.stdout == plain.stdout
    assert "tokens a step" in complete.stderr and "ended by length" in complete.stderr


def test_prompt_forms(tiny_folder):
    options = ["--model", tiny_folder, "-n", "6"]
    argument, stdin = run("generate", "xyz", *options), run("generate", "-", *options, text="xyz")
    raw, chat = run("generate", "xyz", *options, "--raw"), run("generate", "xyz", *options, "--chat")
    templated = run("generate", "<user>xyz<assistant>", *options, "--raw")
    assert argument.stdout == stdin.stdout == chat.stdout == templated.stdout, "a model with a template gets chat messages"
    assert raw.stdout != chat.stdout


def test_seed_fixes_the_text(tiny_folder):
    options = ["generate", "abc", "--model", tiny_folder, "-n", "16", "-t", "1.0"]
    assert run(*options, "--seed", "3").stdout == run(*options, "--seed", "3").stdout
    assert run(*options, "--seed", "3").stdout != run(*options, "--seed", "4").stdout


def test_chat_keeps_the_conversation_until_reset(tiny_folder, monkeypatch):
    seen = []

    def answer(engine, messages, params):
        seen.append([message["content"] for message in messages])
        return f"answer {len(seen)}"

    monkeypatch.setattr(cli, "_print_stream", answer)
    result = run("chat", "--model", tiny_folder, "--system", "be brief", text="one\ntwo\n/reset\nthree\n/quit\nfour\n")
    assert result.exit_code == 0, result.output
    assert seen == [["be brief", "one"], ["be brief", "one", "answer 1", "two"], ["be brief", "three"]]


def test_chat_prints_answers_and_ends_with_the_input(tiny_folder):
    result = run("chat", "--model", tiny_folder, "-n", "5", text="hello\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n") and len(result.stdout) > 1


def test_interrupt_ends_the_answer_not_the_chat(tiny_folder, monkeypatch, capsys):
    def stream(request, params):
        yield "begun"
        raise KeyboardInterrupt

    engine = type("Engine", (), {"stream": staticmethod(stream)})()
    assert cli._print_stream(engine, "prompt", None) == "begun"
    assert capsys.readouterr().out == "begun"


def test_info(tiny_folder):
    quick = run("info", "--no-costs")
    assert quick.exit_code == 0, quick.output
    for fact in ("specdec", "transformers", "device", "threads", "numba", "native operators", "cache"):
        assert fact in quick.stdout
    assert ("tree_attention on the CPU (" in " ".join(quick.stdout.split())) == HAVE_OP
    measured = run("info", "--model", tiny_folder)
    assert measured.exit_code == 0, measured.output
    assert "method" in measured.stdout and "float32" in measured.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "budget must be auto or an integer >= 1, got '0'"),
        (["--budget", "many"], "budget must be auto or an integer >= 1, got 'many'"),
        (["--method", "magic"], "method must be one of none, "),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an int >= 1"),
        (["--dtype", "int3"], "dtype must be auto or one of"),
        (["--model", "/absent/model"], "no folder /absent/model"),
    ],
)
def test_errors_are_one_line(tiny_folder, arguments, message):
    result = run("generate", "abc", *([] if "--model" in arguments else ["--model", tiny_folder]), *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert result.stdout == ""


def test_chat_without_template(tiny_folder, tmp_path):
    from conftest import make_tiny_llama, make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    make_tiny_llama().save_pretrained(tmp_path)
    assert "chat template" in run("chat", "--model", str(tmp_path)).stderr
    assert "--raw" in run("generate", "abc", "--chat", "--model", str(tmp_path)).stderr
    assert run("generate", "abc", "-n", "4", "--model", str(tmp_path)).exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="names a folder that nobody can make")
def test_without_numba_extension_and_cache(tiny_folder):
    """Plain Python and PyTorch alone, where nothing can be written: slower, and the same text."""
    arguments = ["generate", "abcabcabc", "--model", tiny_folder, "-n", "12"]
    bare = {"SPECDEC_NO_NUMBA": "1", "SPECDEC_NO_EXT": "1", "SPECDEC_CACHE": "/dev/null/specdec"}
    process = subprocess.run(
        [sys.executable, "-m", "specdec.cli", *arguments],
        env=os.environ | bare, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout == run(*arguments).stdout


def test_bench_passes_its_options_on(tiny_folder):
    """The benchmark's own help, table and JSON line under `specdec bench`; its errors are one line too."""
    shown = run("bench", "--help")
    assert shown.exit_code == 0 and "specdec bench" in shown.stdout and "--rounds" in shown.stdout
    options = ["--tasks", "random", "--limit", "1", "--max-new-tokens", "3", "--dtype", "float32", "--model", tiny_folder]
    result = run("bench", "--methods", "none,ngram", *options)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout.splitlines()[-1])["methods"]) == ["none", "ngram@auto"]
    wrong = run("bench", "--methods", "magic", *options)
    assert wrong.exit_code == 2 and "methods must be among" in wrong.stderr


def test_bench_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setattr(cli.specdec, "__file__", str(tmp_path / "specdec" / "__init__.py"))
    result = run("bench")
    assert result.exit_code == 2 and "specdec bench needs the package specdec.bench; fix: pip install" in result.stderr
