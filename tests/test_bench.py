"""The benchmark's ruler: prompts, sums, ratios, resuming, and one run from end to end."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import specdec
from bench import metrics, report
from bench.metrics import Row
from bench.model_attention import make_forwards, measure
from bench.run import Log, pending, run_all
from bench.runners import PEERS, EngineRunner, PeerRunner, make_runners
from bench.tasks import DEFAULT_DATA, Task, encode, load_tasks, random_tasks
from conftest import make_tiny_llama
from specdec.attention import compiled_op
from specdec.target import TargetModel

MIX = {
    "templates": {"spec-bench": "{turns[0]}", "code-edit": "Fix:\n{declaration}{buggy_solution}", "gsm8k": "{question}"},
    "report": [
        {"group": "qa", "file": "spec-bench/question.jsonl", "id": 7},
        {"group": "qa", "file": "spec-bench/question.jsonl", "id": 8},
        {"group": "code-edit", "file": "humanevalfix/humanevalpack_python.jsonl", "id": "Python/0"},
        {"group": "gsm8k", "file": "gsm8k/test.jsonl", "id": 1},
    ],
    "tune": [],
}
FILES = {
    "spec-bench/question.jsonl": [{"question_id": 7, "turns": ["who?", "why?"]}, {"question_id": 8, "turns": ["when?\u2028now"]}],
    "humanevalfix/humanevalpack_python.jsonl": [
        {"task_id": "Python/0", "declaration": "def f():\n", "buggy_solution": "    return {1}"},
    ],
    "gsm8k/test.jsonl": [{"question": "1 + 1"}, {"question": "2 + 2"}],
}


@pytest.fixture
def data(tmp_path):
    for name, rows in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "mix.json").write_text(json.dumps(MIX))
    return tmp_path


def row(task: str, method: str, tokens: int, seconds: float, steps: int = 1, group: str = "g", ids=(1,)) -> Row:
    return Row(task, group, method, tokens, steps, seconds, 0.0, list(ids))


# ---- tasks -----------------------------------------------------------------------------------------------------------------


def test_tasks_follow_mix_json(data):
    tasks = load_tasks(data, "report")
    assert [(task.id, task.text) for task in tasks] == [
        ("qa/7", "who?"),
        ("qa/8", "when?\u2028now"),
        ("code-edit/Python/0", "Fix:\ndef f():\n    return {1}"),
        ("gsm8k/1", "2 + 2"),
    ]
    one_of_each_group = ["qa/7", "code-edit/Python/0", "gsm8k/1"]
    assert [task.id for task in load_tasks(data, "report", limit=3)] == one_of_each_group
    assert [task.id for task in load_tasks(data, "report", groups=["qa"])] == ["qa/7", "qa/8"]


def test_tasks_errors(data):
    with pytest.raises(ValueError, match="split must be one of report, tune, random, got 'test'"):
        load_tasks(data, "test")
    with pytest.raises(ValueError, match="has no group law; it has code-edit, gsm8k, qa"):
        load_tasks(data, "report", groups=["law"])
    with pytest.raises(ValueError, match="--data"):
        load_tasks(data / "absent", "report")


def test_random_tasks_are_fixed():
    assert random_tasks() == random_tasks()
    assert len({task.text for task in random_tasks()}) == len(random_tasks())


def test_encode_keeps_the_last_tokens(tiny_tokenizer):
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, Task("t", "g", "hello"))) == "<user>hello<assistant>"
    long = encode(tiny_tokenizer, Task("t", "g", "x" * 3000))
    assert len(long) == 1500 and tiny_tokenizer.decode(long).endswith("x<assistant>")


@pytest.mark.skipif(not (DEFAULT_DATA / "mix.json").is_file(), reason="needs ../shared/data")
def test_the_real_mix():
    report_tasks, tune_tasks = load_tasks(DEFAULT_DATA, "report"), load_tasks(DEFAULT_DATA, "tune")
    assert len(report_tasks) == len(tune_tasks) == 54
    assert not {task.id for task in report_tasks} & {task.id for task in tune_tasks}
    assert len({task.group for task in load_tasks(DEFAULT_DATA, "report", limit=9)}) == 9


# ---- metrics ---------------------------------------------------------------------------------------------------------------


def test_sums_not_means():
    rows = [row("a", "m", 10, 1.0, steps=5), row("b", "m", 30, 2.0, steps=5)]
    assert metrics.speed(rows) == pytest.approx(40 / 3)
    assert metrics.tokens_per_step(rows) == pytest.approx(4.0)


def test_ratio_uses_common_prompts_and_covers_the_value():
    mine = [row(str(i), "m", 100, 1.0 + 0.01 * i, group="ab"[i % 2]) for i in range(20)] + [row("extra", "m", 1, 1000.0)]
    base = [row(str(i), "b", 100, 2.0, group="ab"[i % 2]) for i in range(20)]
    ratio = metrics.speed_ratio(mine, base)
    assert ratio.value == pytest.approx(40 / sum(1.0 + 0.01 * i for i in range(20)))
    assert ratio.low < ratio.value < ratio.high
    assert ratio == metrics.speed_ratio(mine, base), "the bootstrap has its own seed"


def test_ratio_of_a_method_with_itself_is_exactly_one():
    rows = [row(str(i), "m", 50 + i, 1.0 + i) for i in range(5)]
    assert metrics.speed_ratio(rows, rows) == metrics.Ratio(1.0, 1.0, 1.0)


def test_ratio_without_common_prompts():
    with pytest.raises(ValueError, match="both methods ran"):
        metrics.speed_ratio([row("a", "m", 1, 1.0)], [row("b", "n", 1, 1.0)])


def test_agreement_counts_prompts():
    reference = [row("a", "r", 1, 1, ids=(1, 2)), row("b", "r", 1, 1, ids=(3,))]
    assert metrics.agreement([row("a", "m", 1, 1, ids=(1, 2)), row("b", "m", 1, 1, ids=(4,))], reference) == 0.5


def test_summary_is_json_and_leaves_prefill_out_of_host_time():
    rows = [
        replace(row("a", "auto@8", 10, 1.0, steps=4), times={"prefill": 9.0, "forward": 5.0, "draft": 0.002, "learn": 0.006}),
        row("a", "model.generate", 10, 2.0, steps=10),
    ]
    result = json.loads(json.dumps(report.summary(rows, ["auto@8", "model.generate"]), allow_nan=False))
    assert result["methods"]["auto@8"]["host_ms_per_step"] == pytest.approx(2.0)
    assert result["methods"]["model.generate"]["host_ms_per_step"] is None
    assert result["ratios"] == {"auto@8/model.generate": {"value": 2.0, "low": 2.0, "high": 2.0}}
    assert result["methods"]["auto@8"]["same_output"] == 1.0


# ---- run -------------------------------------------------------------------------------------------------------------------


class FakeRunner:
    """Emits its call number; fails at the call it is told to."""

    def __init__(self, label: str, fail_at: int | None = None) -> None:
        self.label, self.fail_at, self.calls, self.resets = label, fail_at, 0, 0

    def run(self, task, prompt, params) -> Row:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine is on fire")
        return row(task.id, self.label, self.calls, 1.0)

    def reset(self) -> None:
        self.resets += 1


TASKS = [Task(f"t{i}", "g", f"text {i}") for i in range(4)]
SETTINGS = {"mode": "cold"}


def run_fakes(path, tokenizer, runners, warm=False):
    log = Log(path, SETTINGS)
    run_all(TASKS, runners, tokenizer, specdec.SamplingParams(), log, warm, Console(file=io.StringIO()))
    return log


def test_cold_run_resumes_where_it_stopped(tmp_path, tiny_tokenizer):
    """An exception ends the run, loses no row, and records no row of its own."""
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError, match="on fire"):
        run_fakes(path, tiny_tokenizer, [FakeRunner("a"), FakeRunner("b", fail_at=4)])
    kept = Log(path, SETTINGS).rows
    assert 4 <= len(kept) < 8
    again = [FakeRunner("a"), FakeRunner("b")]
    log = run_fakes(path, tiny_tokenizer, again)
    assert log.rows[: len(kept)] == kept
    assert sorted((r.task, r.method) for r in log.rows) == sorted((t.id, m) for t in TASKS for m in "ab")
    assert sum(runner.calls - 1 for runner in again) == 8 - len(kept), "one warm-up each, then only what was missing"


def test_warm_run_never_resets_and_does_not_resume(tmp_path, tiny_tokenizer):
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError):
        run_fakes(path, tiny_tokenizer, [FakeRunner("a", fail_at=3)], warm=True)
    with pytest.raises(ValueError, match="warm run cannot be resumed"):
        run_fakes(path, tiny_tokenizer, [FakeRunner("a")], warm=True)
    fresh = FakeRunner("a")
    run_fakes(None, tiny_tokenizer, [fresh], warm=True)
    assert fresh.resets == 1, "only what the warm-up taught is forgotten"


def test_order_of_methods_is_shuffled_and_fixed():
    runners = [FakeRunner(name) for name in "abcd"]
    tasks = [Task(str(i), "g", "") for i in range(10)]
    orders = [[[r.label for r in order] for _, order in pending(tasks, runners, Log(None, {}), warm=False)] for _ in range(2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) > 3


def test_log_refuses_other_settings(tmp_path):
    Log(tmp_path / "run.jsonl", {"dtype": "float32"})
    with pytest.raises(ValueError, match="dtype: 'float32' there, 'bfloat16' now"):
        Log(tmp_path / "run.jsonl", {"dtype": "bfloat16"})


def test_make_runners(tiny_llama, tiny_tokenizer):
    runners = make_runners(tiny_llama, tiny_tokenizer, ["none", "ngram", "model.generate"], [4, 8])
    assert [runner.label for runner in runners] == ["none", "ngram@4", "ngram@8", "model.generate"]
    with pytest.raises(ValueError, match="got 'magic'"):
        make_runners(tiny_llama, tiny_tokenizer, ["magic"], [4])
    drafted = make_runners(tiny_llama, tiny_tokenizer, ["spectr", "assisted"], [4, 8], drafter="early_exit:1")
    assert [runner.label for runner in drafted] == ["spectr@4", "spectr@8", "assisted"]
    with pytest.raises(ValueError, match='"assisted", which needs a drafter; fix'):
        make_runners(tiny_llama, tiny_tokenizer, ["assisted"], [4])


@pytest.mark.parametrize("peer", list(PEERS))
def test_one_ruler(tiny_llama, tiny_tokenizer, peer):
    """Both kinds of runner report the same tokens; a peer's timed tokens leave out what its prefill emitted."""
    params, task = specdec.SamplingParams(max_new_tokens=24), Task("t", "g", "abcabcabcabc")
    prompt = encode(tiny_tokenizer, task)
    theirs = PeerRunner(tiny_llama, peer, make_tiny_llama(num_hidden_layers=1)).run(task, prompt, params)
    ours = EngineRunner(tiny_llama, tiny_tokenizer, "ngram", 8).run(task, prompt, params)
    assert theirs.token_ids == ours.token_ids and len(ours.token_ids) == 24
    assert ours.tokens == 24
    assert 0 < theirs.tokens < 24
    assert theirs.steps == 23 or peer in ("prompt_lookup", "assisted")
    assert min(theirs.decode_seconds, theirs.prefill_seconds, ours.decode_seconds, ours.prefill_seconds) > 0


def test_command_line(tiny_folder, tmp_path):
    """One run from end to end: tables, rows on disk, one JSON object as the last line."""
    import typer

    from bench.run import main

    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "results" / "run.jsonl"
    arguments = "--split random --methods none,ngram,model.generate --budget 4,8 --mode cold --limit 2 --max-new-tokens 6 "
    arguments += f"--dtype float32 --model {tiny_folder} --out {out}"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert list(last["methods"]) == ["none", "ngram@4", "ngram@8", "model.generate"]
    assert all(method["same_output"] == 1.0 for method in last["methods"].values())
    assert last["settings"]["threads"] == torch.get_num_threads()
    assert len(out.read_text().splitlines()) == 1 + 2 * 4
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout.splitlines()[-1]) == last, "all rows were there: nothing ran again"
    wrong = CliRunner().invoke(app, ["--mode", "tepid", "--model", tiny_folder])
    assert wrong.exit_code == 2 and "mode must be cold or warm" in wrong.stderr


@pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")
def test_ways_of_attention_compute_the_same(tiny_llama):
    """What bench.model_attention compares is one function, and its attention is part of its step."""
    target = TargetModel(tiny_llama)
    logits = {way: forward() for way, (forward, _) in make_forwards(target, 40, 9).items()}
    for way in ("torch", "transformers"):
        torch.testing.assert_close(logits[way], logits["op"], rtol=1e-4, atol=1e-4)
    for ms in measure(target, 40, 9, repeats=2).values():
        assert 0 < ms["attention_ms"] < ms["step_ms"]
