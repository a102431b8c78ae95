"""`specdec reason`: one problem, a file of them, and runs that go on where they were stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import specdec
from conftest import make_tiny_llama
from specdec import cli
from specdec.search import POLICIES, SearchConfig
from specdec.search import cli as reason_cli
from specdec.search.answers import ExactAnswers
from specdec.search.batch import read_problems, solve, summary
from specdec.search.bg_mcts import BgMcts
from specdec.search.progress import Event, Progress
from specdec.search.prompts import Prompts
from specdec.search.reason import EVALUATORS
from specdec.search.steps import StopStrings
from test_reason_api import Letters

OPTIONS = ("--evaluator", "none", "--answers", "exact", "--step", "tokens:7", "-t", "1.0", "--budget", "90", "--width", "2")
SOLVE: dict[str, Any] = {"budget": 90, "evaluator": None, "step": "tokens:7", "temperature": 1.0, "width": 2}
LINES = [{"problem": "one", "id": "a/1", "answer": "x"}, {"question": "two"}, {"problem": "three", "id": 3}]


def run(folder: str, *arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["reason", "--model", folder, *OPTIONS, *map(str, arguments)], input=text)


def records_of(path: Path) -> dict[str, dict[str, Any]]:
    """What must be equal in two runs."""
    kept = ("answer", "status", "used", "nodes", "answers")
    records = map(json.loads, path.read_text().splitlines())
    return {record["id"]: {name: record[name] for name in kept} for record in records}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return path


@pytest.fixture
def engine(tiny_tokenizer: Any) -> specdec.Engine:
    return specdec.Engine(make_tiny_llama(initializer_range=0.3), tiny_tokenizer, method="none", max_rows=4)


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ctrl-C after so many events of a run."""

    def arm(count: int) -> None:
        seen: list[Event] = []

        def call(self: Progress, event: Event) -> None:
            seen.append(event)
            if len(seen) == count:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Progress, "__call__", call)

    return arm


def break_problem(engine: specdec.Engine, text: str, after: int = 0) -> None:
    """The engine fails on inputs that hold `text`, but for the first few."""
    start, calls = engine.builder.start, [0]

    def failing(seq: Any) -> None:
        if text in engine.tokenizer.decode(seq.token_ids):
            calls[0] += 1
            if calls[0] > after:
                raise RuntimeError("the machine is on fire")
        start(seq)

    engine.builder.start = failing  # type: ignore[method-assign]


# ---- one problem ----------------------------------------------------------------------------------------------------------------


def test_one_problem_and_its_tree(tiny_folder: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"tree.{name}" for name in ("html", "svg", "graphml", "json")}
    arguments = ["--view", files["html"], "--plot", files["svg"], "--graphml", files["graphml"], "--json", files["json"]]
    result = run(tiny_folder, "2 + 2?", *arguments, "--checkpoint", tmp_path / "run.json")
    assert result.exit_code in (0, 1), result.output  # a random model may say nothing
    assert "of 90, in" in result.stderr and "from the cache" in result.stderr and "a step of the engine" in result.stderr
    assert "<html" in files["html"].read_text() and "<svg" in files["svg"].read_text()
    tree = json.loads(files["json"].read_text())["nodes"]
    assert f"in {len(tree['parent']) - 1} texts" in result.stderr and files["graphml"].stat().st_size > 500
    again = run(tiny_folder, "-", "--checkpoint", tmp_path / "run.json", text="2 + 2?\n")
    assert "of 90, in" in again.stderr and "a step of the engine" not in again.stderr, "nothing was left to generate"
    more = run(tiny_folder, "-", "--checkpoint", tmp_path / "run.json", "--extra", "60", text="2 + 2?\n")
    assert "of 150, in" in more.stderr, more.output


def test_the_answer_alone_goes_to_stdout(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model wrote is no markup and no control character on stderr."""
    reason = specdec.reason

    def answering(*arguments: Any, **options: Any) -> specdec.ReasonResult:
        return reason(*arguments, **{**options, "answers": Brackets()})

    class Brackets(Letters):
        def canonical(self, written: str) -> str:
            return "[/x] \x1b[2J[red]"

    monkeypatch.setattr(specdec, "reason", answering)
    result = run(tiny_folder, "2 + 2?", "--budget", "400")
    assert (result.exit_code, result.stdout) == (0, "[/x] [red]\n"), result.output
    assert "[/x]  [2J[red] (votes" in result.stderr


def test_an_interrupt_prints_what_was_found_and_the_checkpoint_goes_on(
    tiny_folder: str, tmp_path: Path, interrupt_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, whole, resumed = (tmp_path / name for name in ("run.json", "whole.json", "resumed.json"))
    run(tiny_folder, "2 + 2?", "--json", whole)
    handler = signal.getsignal(signal.SIGINT)
    interrupt_after(3)
    stopped = run(tiny_folder, "2 + 2?", "--checkpoint", checkpoint, "--json", resumed)
    assert stopped.exit_code == 130 and "cancelled" in stopped.stderr and signal.getsignal(signal.SIGINT) is handler
    assert 0 < len(json.loads(resumed.read_text())["nodes"]["parent"]) < len(json.loads(whole.read_text())["nodes"]["parent"])
    monkeypatch.undo()
    assert run(tiny_folder, "2 + 2?", "--checkpoint", checkpoint, "--json", resumed).exit_code in (0, 1)
    assert json.loads(resumed.read_text()) == json.loads(whole.read_text())


def test_a_failing_model_leaves_what_was_found(
    tiny_folder: str, tmp_path: Path, engine: specdec.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_problem(engine, "2 + 2?", after=4)
    monkeypatch.setattr(reason_cli, "load_engine", lambda *_, **__: engine)
    result = run(tiny_folder, "2 + 2?", "--json", tmp_path / "tree.json")
    assert result.exit_code == 1 and "RuntimeError: the machine is on fire" in " ".join(result.stderr.split()), result.output
    assert len(json.loads((tmp_path / "tree.json").read_text())["nodes"]["parent"]) >= 4


# ---- a file of problems ---------------------------------------------------------------------------------------------------------


def test_a_file_of_problems_is_resumed(tiny_folder: str, tmp_path: Path, problems: Path) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    first = run(tiny_folder, "--file", problems, "--out", whole)
    assert first.exit_code == 0, first.output
    records = {record["id"]: record for record in map(json.loads, whole.read_text().splitlines())}
    assert set(records) == {"a/1", "1", "3"} and records["a/1"]["right"] is False and "right" not in records["3"]
    assert all(record["seconds"] > 0 and record["settings"]["budget"] == 90 for record in records.values())
    said = json.loads(first.stdout.splitlines()[-1])
    assert said["problems"] == 3 and said["accuracy"] == 0.0 and 0 < said["used"] <= 270 and said["seconds"] > 0
    assert not Path(f"{whole}.searches").exists()
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:30])  # killed while it wrote the second
    again = run(tiny_folder, "--file", problems, "--out", out)
    assert again.exit_code == 0 and records_of(out) == records_of(whole), again.output
    assert json.loads(again.stdout.splitlines()[-1])["used"] == said["used"]


def test_an_interrupted_file_goes_on_from_its_checkpoints(
    tiny_folder: str, tmp_path: Path, problems: Path, interrupt_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(tiny_folder, "--file", problems, "--out", whole)
    for count in (2, 9):
        interrupt_after(count)
        assert run(tiny_folder, "--file", problems, "--out", out).exit_code == 130
        monkeypatch.undo()
    assert set(records_of(out)) < set(records_of(whole)) if out.exists() else True
    assert any(Path(f"{out}.searches").iterdir())
    assert run(tiny_folder, "--file", problems, "--out", out).exit_code == 0
    assert records_of(out) == records_of(whole) and not Path(f"{out}.searches").exists()


def test_without_out_the_results_are_lines(tiny_folder: str, problems: Path) -> None:
    result = run(tiny_folder, "--file", problems)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 4, result.output


def test_graded(tmp_path: Path, engine: specdec.Engine) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"problem": "one"}))
    (record,) = solve(engine, read_problems(path), answers=Letters(), **{**SOLVE, "budget": 600})
    assert record["answer"] is not None
    for gold, right in ((record["answer"], True), ("is it #", False)):
        path.write_text(json.dumps({"problem": "one", "answer": gold}))
        records = list(solve(engine, read_problems(path), answers=Letters(), **{**SOLVE, "budget": 600}))
        assert records[0]["right"] is right and summary(records)["accuracy"] == float(right)


def test_a_problem_that_fails_is_a_line_and_the_others_go_on(tmp_path: Path, engine: specdec.Engine, problems: Path) -> None:
    expected = {record["id"]: record for record in solve(engine, read_problems(problems), answers="exact", **SOLVE)}
    break_problem(engine, "two", after=4)
    out = tmp_path / "out.jsonl"
    records = {record["id"]: record for record in solve(engine, read_problems(problems), out, answers="exact", **SOLVE)}
    assert "on fire" in records["1"]["error"] and 0 < records["1"]["used"] <= 90
    for name in ("a/1", "3"):
        assert "error" not in records[name] and records[name]["used"] == expected[name]["used"]
    assert summary(records.values())["errors"] == 1 and set(records_of(out)) == set(records)
    assert len(list(solve(engine, read_problems(problems), out, answers="exact", **SOLVE))) == 3, "an error is a result"


def test_too_long_a_problem_says_so(tmp_path: Path, engine: specdec.Engine) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"problem": "x" * 3000}))
    with pytest.warns(UserWarning, match="fills the context window"):
        (record,) = solve(engine, read_problems(path), answers="exact", **SOLVE)
    assert (record["status"], record["used"]) == ("no_answer", 0) and "fills the context window" in record["notes"][0]


def test_ids_of_any_letters(tmp_path: Path, engine: specdec.Engine) -> None:
    """Line separators of Unicode are no ends of lines, and slashes no folders."""
    path, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    names = ["a\u2028b", "../up", "\x85*?[", "0-a.json"]
    path.write_text("\n".join(json.dumps({"problem": f"say {name}", "id": name}, ensure_ascii=False) for name in names))
    records = list(solve(engine, read_problems(path), out, answers="exact", **SOLVE))
    assert {record["id"] for record in records} == set(names)
    assert list(solve(engine, read_problems(path), out, answers="exact", **SOLVE)) == records
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "problems.jsonl"]


# ---- bad input ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "holds no problems"), ('{"problem": 3}', "line 1 must be"), ('{"problem": "a"}\n{', "line 2 is not JSON"),
     ('{"problem": "\\ud800"}', "line 1 is not JSON in UTF-8"), ("\n\n[]", "line 3 must be"), ('{"question": " "}', "line 1 must be"),
     ('{"problem": "a", "id": 1}\n{"problem": "b", "id": "1"}', "line 2: the id '1' was there before")],
)  # fmt: skip
def test_bad_files(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_problems(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"problem": "a"}\n{"problem": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON in UTF-8"):
        read_problems(path)


def test_bad_options(tiny_folder: str, tmp_path: Path, problems: Path) -> None:
    for arguments, message in (
        ((), "pass one problem, or --file"),
        (("a", "--file", problems), "pass one problem, or --file"),
        (("a", "--out", "x.jsonl"), "--out is for --file"),
        (("--file", problems, "--view", "x.html"), "--view is for one problem"),
        (("--file", problems, "--out", problems), "--out must be another file"),
        (("--file", tmp_path / "none.jsonl"), "No such file"),
        (("a", "--view", tmp_path / "none" / "x.html"), "--view"),
        (("a", "--prompts", tmp_path / "none.toml"), "No such file"),
        (("a", "--policy", "magic"), "policy must be one of"),
        (("a", "--nodes", "magic"), "nodes must be auto"),
        (("a", "--seconds", "-1"), "seconds must be"),
        ((" ",), "problem must be a string with something in it"),
    ):
        result = run(tiny_folder, *arguments)
        assert result.exit_code == 2 and message in result.stderr, (arguments, result.output)
        assert result.stdout == ""
    assert problems.read_text().endswith("}\n\n"), "what was passed as --out is untouched"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}\n", "line 1 is no result"), (b"my notes", "line 1 is no result"), (b'{"id": "1"}\n', "line 1 is no result"),
     (b"\xff\xfe\n", "line 1 is no result")],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(
    tmp_path: Path, engine: specdec.Engine, problems: Path, content: bytes, message: str
) -> None:
    out = tmp_path / "other.jsonl"
    out.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(solve(engine, read_problems(problems), out, answers="exact", **SOLVE))
    assert out.read_bytes() == content


def test_results_of_other_settings_are_refused(tmp_path: Path, engine: specdec.Engine, problems: Path) -> None:
    out = tmp_path / "out.jsonl"
    settings: dict[str, Any] = {**SOLVE, "answers": "exact", "config": SearchConfig(step_tokens=16)}
    records = list(solve(engine, read_problems(problems), out, **settings))
    for changed, message in (({"budget": 91}, "a result with budget 90, not 91"), ({"policy": "mcts"}, "with policy 'bg_mcts'"),
                             ({"temperature": 0.5}, "with temperature 1.0"), ({"seed": 1}, "with seed 0"),
                             ({"prompts": Prompts(system="Be brief.")}, "with prompts.system None, not 'Be brief.'"),
                             ({"config": SearchConfig(step_tokens=16, seconds=9.0)}, "with config.seconds None, not 9.0"),
                             ({"config": SearchConfig(step_tokens=17)}, "with config.step_tokens 16, not 17"),
                             ({"config": None}, "with config.step_tokens 16, not None"),
                             ({"step": StopStrings(strings=("a",))}, "with step 'tokens:7'"),
                             ({"answers": ExactAnswers(case=True)}, "with answers 'exact'"),
                             ({"policy": BgMcts(k=3)}, "with policy 'bg_mcts'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(solve(engine, read_problems(problems), out, **{**settings, **changed}))
    problems.write_text(json.dumps({"problem": "another", "id": "3"}))
    with pytest.raises(ValueError, match="with problem 'three', not 'another'"):
        list(solve(engine, read_problems(problems), out, **settings))
    problems.write_text(json.dumps(LINES[0]))
    assert [each["id"] for each in solve(engine, read_problems(problems), out, **settings)] == ["a/1"], "of these problems only"
    assert len(out.read_text().splitlines()) == len(records)


def test_a_file_that_another_process_writes_is_left_alone(tmp_path: Path, engine: specdec.Engine, problems: Path) -> None:
    out = tmp_path / "out.jsonl"
    code = f"""
from pathlib import Path
from specdec.search.journal import lock_of
lock = lock_of(Path({str(out)!r}))
print("ready", flush=True)
input()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    with pytest.raises(ValueError, match="out.jsonl is in use by another process"):
        next(solve(engine, read_problems(problems), out, answers="exact", **SOLVE))
    other.communicate("\n")
    assert len(list(solve(engine, read_problems(problems), out, answers="exact", **SOLVE))) == len(LINES)


def test_the_help_lists_all_names() -> None:
    command: Any = typer.main.get_command(cli.app)
    helps = {option.name: getattr(option, "help", "") for option in command.commands["reason"].params}
    assert helps["policy"].split(", ") == list(POLICIES)
    assert all(name in helps["evaluator"] for name in EVALUATORS)
