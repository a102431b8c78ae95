"""The benchmark's ruler: sums, ratios, rounds, resuming, batches, and one run from end to end."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import specdec
from bench import metrics, report
from bench.log import Log
from bench.metrics import Row
from bench.model_attention import make_forwards, measure
from bench.run import WARM_UP, batches, main, pending, run_all
from bench.runners import PEERS, EngineRunner, PeerRunner, make_runners
from bench.tasks import Task, encode
from conftest import make_tiny_llama
from specdec.attention import compiled_op
from specdec.target import TargetModel


def row(task: str, method: str, tokens: int, seconds: float, steps: int = 1, group: str = "g", ids=(1,)) -> Row:
    return Row(task, group, method, tokens, steps, seconds, 0.0, list(ids))


# ---- metrics ---------------------------------------------------------------------------------------------------------------


def test_sums_not_means():
    rows = [row("a", "m", 10, 1.0, steps=5), row("b", "m", 30, 2.0, steps=5)]
    assert metrics.speed(rows) == pytest.approx(40 / 3)
    assert metrics.mean_speed(rows) == pytest.approx(12.5), "and the mean beside"
    assert metrics.tokens_per_step(rows) == pytest.approx(4.0)


def test_histogram():
    assert metrics.histogram([1, 1, 3]) == [0, 2, 0, 1]
    assert metrics.histogram([]) == []


def test_rounds_are_medians():
    """Of each prompt, before anything is summed; a slow spell in one round leaves no trace."""
    rounds = [replace(row("a", "m", 10, seconds), round=i, times={"draft": seconds}) for i, seconds in enumerate([9.0, 1.0, 1.2])]
    other = row("b", "m", 10, 5.0)
    first, second = metrics.medians([*rounds, other])
    assert first == replace(rounds[0], decode_seconds=1.2, times={"draft": 1.2}) and second == other
    shorter = replace(row("a", "m", 5, 1.0), round=1, times={"draft": 1.0})
    assert metrics.medians([rounds[0], shorter, shorter])[0].decode_seconds == pytest.approx(2.0), "seconds a token count"


def test_categories_are_groups_of_their_own():
    rows = [replace(row(name, "m", 1, 1.0), category=name) for name in ("x", "y")] + [row("z", "m", 1, 1.0, group="h")]
    assert metrics.groups_of(metrics.by_category(rows)) == ["g/x", "g/y", "h", "all"]


def test_ratio_uses_common_prompts_and_covers_the_value():
    mine = [row(str(i), "m", 100, 1.0 + 0.01 * i, group="ab"[i % 2]) for i in range(20)] + [row("extra", "m", 1, 1000.0)]
    base = [row(str(i), "b", 100, 2.0, group="ab"[i % 2]) for i in range(20)]
    ratio = metrics.speed_ratio(mine, base)
    assert ratio.value == pytest.approx(40 / sum(1.0 + 0.01 * i for i in range(20)))
    assert ratio.low < ratio.value < ratio.high
    assert ratio.mean == pytest.approx(sum(2.0 / (1.0 + 0.01 * i) for i in range(20)) / 20)
    assert ratio == metrics.speed_ratio(mine, base), "the bootstrap has its own seed"


def test_ratio_of_a_method_with_itself_is_exactly_one():
    rows = [row(str(i), "m", 50 + i, 1.0 + i) for i in range(5)]
    assert metrics.speed_ratio(rows, rows) == metrics.Ratio(1.0, 1.0, 1.0, 1.0)


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
    assert result["ratios"] == {"auto@8/model.generate": {"value": 2.0, "low": 2.0, "high": 2.0, "mean": 2.0}}
    assert result["methods"]["auto@8"]["same_output"] == 1.0


def test_tables_keep_their_names_and_show_categories():
    """Four baselines side by side: no label and no column is cut; a group's categories have a table of their own."""
    names = [*report.BASELINES, "token_recycling_published@auto"]
    rows = [
        replace(row(f"t{i}", name, 10, 1.0 + i, group="mt-bench"), category=category)
        for name in names
        for i, category in enumerate(["writing", "stem"])
    ]
    text = _printed(rows, names)
    assert "…" not in text
    assert all(line.rstrip()[-1] in "│┃┓┩┘" for line in text.splitlines() if line[0] in "│┃┏┡└"), "the last column has its edge"
    assert max(map(len, map(str.rstrip, text.splitlines()))) < report.WIDTH
    assert all(name in text for name in names)
    assert "speed / model.generate by category" in text and "mt-bench/writing" in text
    assert "by category" not in _printed([replace(each, category="") for each in rows], names)


def _printed(rows: list[Row], labels: list[str]) -> str:
    console = Console(width=report.WIDTH, record=True, file=io.StringIO())
    report.print_tables(rows, labels, console)
    return console.export_text()


# ---- run -------------------------------------------------------------------------------------------------------------------


class FakeRunner:
    """Emits its call number; fails at the call it is told to."""

    def __init__(self, label: str, fail_at: int | None = None) -> None:
        self.label, self.fail_at, self.calls, self.resets = label, fail_at, 0, 0
        self.prompts: list[tuple[int, ...]] = []

    def run(self, tasks, prompts, params) -> list[Row]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine is on fire")
        self.prompts += map(tuple, prompts)
        return [row(task.id, self.label, self.calls, 1.0, ids=(ord(self.label),)) for task in tasks]

    def reset(self) -> None:
        self.resets += 1


TASKS = [Task(f"t{i}", "g", f"text {i}") for i in range(4)]
SETTINGS = {"mode": "cold"}


def run_fakes(path, tokenizer, runners, warm=False, rounds=1, batch=1, tasks=TASKS):
    log = Log(path, SETTINGS)
    quiet = Console(file=io.StringIO())
    run_all(tasks, runners, tokenizer, specdec.SamplingParams(), log, warm, quiet, rounds, batch)
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
    assert log.rows[: len(kept)] == kept == Log(path, SETTINGS).rows[: len(kept)]
    assert sorted((r.task, r.method) for r in log.rows) == sorted((t.id, m) for t in TASKS for m in "ab")
    assert sum(runner.calls - 1 for runner in again) == 8 - len(kept), "one warm-up each, then only what was missing"


def test_warm_run_resumes_by_round(tmp_path, tiny_tokenizer):
    """Finished rounds are kept, a half one is run again: what its engine knew is gone."""
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError):
        run_fakes(path, tiny_tokenizer, [FakeRunner("a", fail_at=1 + 4 + 3)], warm=True, rounds=3)
    kept = Log(path, SETTINGS).rows
    assert [r.round for r in kept] == [0] * 4 + [1] * 2
    again = FakeRunner("a")
    rows = run_fakes(path, tiny_tokenizer, [again], warm=True, rounds=3).rows
    assert rows[:4] == kept[:4]
    assert [(r.round, r.task) for r in rows] == [(number, task.id) for number in range(3) for task in TASKS]
    assert rows == Log(path, SETTINGS).rows
    assert again.calls == 1 + 8


def test_rounds_start_from_nothing(tiny_tokenizer):
    """Warm: forgotten after the warm-up and before every further round, and at no other time. Cold: before every prompt too."""
    warm, cold = FakeRunner("a"), FakeRunner("b")
    run_fakes(None, tiny_tokenizer, [warm], warm=True, rounds=3)
    run_fakes(None, tiny_tokenizer, [cold], rounds=3)
    assert warm.resets == 3
    assert cold.resets >= 1 + 3 * len(TASKS)


def test_a_line_cut_by_a_kill_is_dropped(tmp_path, tiny_tokenizer):
    path = tmp_path / "run.jsonl"
    rows = run_fakes(path, tiny_tokenizer, [FakeRunner("a")]).rows
    path.write_text(path.read_text()[:-5])
    assert Log(path, SETTINGS).rows == rows[:-1]
    path.write_text("not a log\n")
    with pytest.raises(ValueError, match=r"run.jsonl is no log of this benchmark"):
        Log(path, SETTINGS)


def test_batches_keep_a_turn_and_the_next_apart():
    tasks = [Task("a", "g", ""), Task("a2", "g", "", follows="a"), Task("b", "g", ""), Task("c", "g", "")]
    assert [[task.id for task in batch] for batch in batches(tasks, 2)] == [["a", "b"], ["c"], ["a2"]]
    assert [[task.id for task in batch] for batch in batches(tasks, 1)] == [["a"], ["a2"], ["b"], ["c"]]


def test_every_method_continues_the_same_conversation(tmp_path, tiny_tokenizer):
    """The second turn's prompt holds the first answer measured: one prompt for all methods, rounds, and after a resume."""
    path = tmp_path / "run.jsonl"
    tasks = [Task("a", "g", "who?"), Task("a2", "g", "why?", follows="a")]
    runners = [FakeRunner("X"), FakeRunner("Y")]
    rows = run_fakes(path, tiny_tokenizer, runners, rounds=2, tasks=tasks).rows
    late = FakeRunner("Z")
    run_fakes(path, tiny_tokenizer, [late], tasks=tasks)
    answer = tiny_tokenizer.decode(rows[0].token_ids)
    expected = f"<user>who?<assistant>{answer}<user>why?<assistant>"
    for runner in (*runners, late):
        seconds = [tiny_tokenizer.decode(prompt) for prompt in runner.prompts if len(prompt) > len("<user>who?<assistant>")]
        assert seconds[1:] == [expected] * (len(runner.prompts) // 2), "the first is the warm-up"


def test_the_warm_up_is_not_measured(tiny_tokenizer):
    with pytest.raises(ValueError, match="prompt of the warm-up"):
        run_fakes(None, tiny_tokenizer, [FakeRunner("a")], tasks=[Task("t", "g", WARM_UP.text)])


def test_order_of_methods_is_shuffled_and_fixed():
    runners = [FakeRunner(name) for name in "abcd"]
    parts = [[Task(str(i), "g", "")] for i in range(10)]
    orders = [[[r.label for r in order] for _, _, order in pending(parts, runners, Log(None, {}), rounds=2)] for _ in range(2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) > 6


def test_log_refuses_other_settings(tmp_path):
    Log(tmp_path / "run.jsonl", {"dtype": "float32"})
    with pytest.raises(ValueError, match="dtype: 'float32' there, 'bfloat16' now"):
        Log(tmp_path / "run.jsonl", {"dtype": "bfloat16"})


def test_make_runners(tiny_llama, tiny_tokenizer):
    runners = make_runners(tiny_llama, tiny_tokenizer, ["none", "ngram", "model.generate"], [4, 8])
    assert [runner.label for runner in runners] == ["none", "ngram@4", "ngram@8", "model.generate"]
    own = make_runners(tiny_llama, tiny_tokenizer, ["ngram@16", "suffix"], [4, 8])
    assert [runner.label for runner in own] == ["ngram@16", "suffix@4", "suffix@8"]
    for wrong in ("ngram@many", "model.generate@8"):
        with pytest.raises(ValueError, match="@?many|@8"):
            make_runners(tiny_llama, tiny_tokenizer, [wrong], [4])
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
    (theirs,) = PeerRunner(tiny_llama, peer, make_tiny_llama(num_hidden_layers=1)).run([task], [prompt], params)
    (ours,) = EngineRunner(tiny_llama, tiny_tokenizer, "ngram", 8).run([task], [prompt], params)
    assert theirs.token_ids == ours.token_ids and len(ours.token_ids) == 24
    assert ours.tokens == 24
    assert 0 < theirs.tokens < 24
    assert theirs.steps == 23 or peer in ("prompt_lookup", "assisted")
    assert min(theirs.decode_seconds, theirs.prefill_seconds, ours.decode_seconds, ours.prefill_seconds) > 0
    for each in (theirs, ours):
        assert sum(each.accepted) == each.steps
        assert sum(length * count for length, count in enumerate(each.accepted)) == each.tokens


def test_batches_give_each_prompt_its_row(tiny_llama, tiny_tokenizer):
    """The texts of one at a time; the batch's seconds in equal shares; a text that ends early ends with its EOS."""
    params = specdec.SamplingParams(max_new_tokens=24)
    tasks = [Task(name, "g", text, "c") for name, text in (("a", "abcabc"), ("b", "a longer prompt"), ("c", "xyz"))]
    prompts = [encode(tiny_tokenizer, task) for task in tasks]
    alone = [PeerRunner(tiny_llama, "model.generate").run([task], [prompt], params)[0] for task, prompt in zip(tasks, prompts)]
    tiny_llama.generation_config.eos_token_id = alone[0].token_ids[5]
    runners = make_runners(tiny_llama, tiny_tokenizer, ["model.generate", "none", "ngram"], [8], batch=3)
    for runner in runners:
        rows = runner.run(tasks, prompts, params)
        assert [(row.task, row.category) for row in rows] == [("a", "c"), ("b", "c"), ("c", "c")]
        for row, expected in zip(rows, alone):
            ends = [i for i, token in enumerate(expected.token_ids, 1) if token == alone[0].token_ids[5]]
            assert row.token_ids == expected.token_ids[: (ends or [24])[0]]
            assert row.tokens == len(row.token_ids) - (runner.label == "model.generate")
        assert len({(row.decode_seconds, row.prefill_seconds) for row in rows}) == 1
        assert min(rows[0].decode_seconds, rows[0].prefill_seconds) > 0
    assert len(rows[0].token_ids) < 24, "it does end early"
    with pytest.raises(ValueError, match="'prompt_lookup', which transformers runs one prompt at a time; fix: .*--batch 1"):
        make_runners(tiny_llama, tiny_tokenizer, ["prompt_lookup"], [8], batch=2)


def test_command_line(tiny_folder, tmp_path):
    """One run from end to end: tables, rows on disk, one JSON object as the last line."""
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "results" / "run.jsonl"
    arguments = (
        "--tasks random --methods none,ngram,model.generate --budget 4,8 --mode cold --limit 2 --rounds 2 --max-new-tokens 6 "
    )
    arguments += f"--dtype float32 --model {tiny_folder} --out {out}"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert list(last["methods"]) == ["none", "ngram@4", "ngram@8", "model.generate"]
    assert all(method["same_output"] == 1.0 for method in last["methods"].values())
    assert last["settings"]["threads"] == torch.get_num_threads()
    assert len(out.read_text().splitlines()) == 1 + 1 + 2 * 2 * 4, "settings, costs, rows"
    assert last["rounds"] == 2 and "commit" in last["settings"] and last["methods"]["none"]["accepted"][1] == 12
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout.splitlines()[-1]) == last, "all rows were there: nothing ran again"
    wrong = CliRunner().invoke(app, ["--mode", "tepid", "--model", tiny_folder])
    assert wrong.exit_code == 2 and "mode must be cold or warm" in wrong.stderr
    tight = CliRunner().invoke(app, ["--tasks", "random", "--max-new-tokens", "2048", "--model", tiny_folder])
    assert tight.exit_code == 2 and "max_new_tokens must be below the model's window of 2048" in tight.stderr


def test_a_missing_peer_is_named_and_skipped(tiny_folder, monkeypatch):
    import bench.run

    monkeypatch.setattr(bench.run, "missing_arctic", lambda: "no arctic-inference (extra: peers)")
    app = typer.Typer()
    app.command()(bench.run.main)
    options = f"--tasks random --limit 1 --max-new-tokens 3 --dtype float32 --model {tiny_folder}".split()
    result = CliRunner().invoke(app, ["--methods", "suffix_arctic,none", *options])
    assert result.exit_code == 0 and "skipped: suffix_arctic, no arctic-inference (extra: peers)" in result.stderr
    assert list(json.loads(result.stdout.splitlines()[-1])["methods"]) == ["none"]
    alone = CliRunner().invoke(app, ["--methods", "suffix_arctic", *options])
    assert alone.exit_code == 2 and "no arctic-inference" in alone.stderr


@pytest.mark.skipif(compiled_op() is None, reason="specdec._C is not built")
def test_ways_of_attention_compute_the_same(tiny_llama):
    """What bench.model_attention compares is one function, and its attention is part of its step."""
    target = TargetModel(tiny_llama)
    logits = {way: forward() for way, (forward, _) in make_forwards(target, 40, 9).items()}
    for way in ("torch", "transformers"):
        torch.testing.assert_close(logits[way], logits["op"], rtol=1e-4, atol=1e-4)
    for ms in measure(target, 40, 9, repeats=2).values():
        assert 0 < ms["attention_ms"] < ms["step_ms"]


def test_compile_after_a_methods_name_compiles_its_engine(monkeypatch: pytest.MonkeyPatch, tiny_llama: Any) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("bench.runners.specdec.Engine", lambda model, tokenizer, **options: made.append(options))
    runners = make_runners(tiny_llama, None, ["none", "none+compile", "auto+compile"], ["auto", 8])
    assert [runner.label for runner in runners] == ["none", "none+compile", "auto+compile@auto", "auto+compile@8"]
    assert [(options["method"], options["compile"]) for options in made] == [
        ("none", False), ("none", True), ("auto", True), ("auto", True),
    ]  # fmt: skip
