"""The simulator is the engine's loop: same steps, same accepted lengths, and no model once everything is recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from bench.record import UNKNOWN, Prompt, Record, Recorder
from bench.simulate import NotRecordedError, Simulator, engine_lengths, main, summary
from conftest import make_tiny_llama
from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree
from specdec.engine import Engine
from specdec.learning import top_k
from specdec.methods import METHODS, make_builder
from tiny_models import VOCAB, build

BUDGET = 8
TOKENS = 24
NAMES = [name for name in METHODS if name != "auto"]  # auto is best_first


def repetitive(length: int, seed: int) -> tuple[int, ...]:
    """A prompt in which sources find something."""
    rng = np.random.default_rng(seed)
    return tuple(np.resize(rng.integers(1, VOCAB, max(1, length // 3)), length).tolist())


@pytest.fixture(scope="module")
def model():
    return build("llama", max_position_embeddings=1024)


def empty_record(eos: tuple[int, ...] = ()) -> Record:
    """One prompt a case: a single token, one chunk, more than one chunk of prefill, one that shares its start with it."""
    lengths = (1, 30, 270)
    prompts = [Prompt(str(number), "group", repetitive(length, number)) for number, length in enumerate(lengths)]
    prompts.append(Prompt("shared start", "group", (*prompts[2].token_ids[:40], 5, 6)))
    return Record(prompts, TOKENS, eos, VOCAB)


@pytest.fixture(scope="module")
def record(model) -> tuple[Record, Recorder]:
    """Filled by whoever comes first, as on a user's disk."""
    record = empty_record()
    return record, Recorder(model, record)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("method", NAMES)
def test_replay_is_the_engine(model, record, method, cold):
    answers, recorder = record
    real = engine_lengths(Engine(model, method=method, budget=BUDGET), answers, cold)
    asked = Simulator(answers, make_builder(method, VOCAB, None), BUDGET, recorder).run(cold)
    assert [replay.accept_lengths for replay in asked] == real
    again = Simulator(answers, make_builder(method, VOCAB, None), BUDGET).run(cold)
    assert [replay.accept_lengths for replay in again] == real
    assert sum(replay.misses for replay in again) == 0, "nothing is asked twice"


def test_replay_stops_at_end_tokens(model):
    """A drafted end token is not walked over; the text ends inside a step."""
    free = Engine(model, method="none", budget=1).generate([list(repetitive(30, 1))])[0].token_ids
    ending = build("llama", max_position_embeddings=1024)
    ending.generation_config.eos_token_id = free[17]
    answers = empty_record((free[17],))
    recorder = Recorder(ending, answers)
    for method in ("best_first", "suffix"):
        real = engine_lengths(Engine(ending, method=method, budget=BUDGET), answers, cold=False)
        replays = Simulator(answers, make_builder(method, VOCAB, None), BUDGET, recorder).run(cold=False)
        assert [replay.accept_lengths for replay in replays] == real
        assert any(len(replay.token_ids) < TOKENS for replay in replays)
    twice = Record(answers.prompts[1:2] * 2, TOKENS, answers.eos_token_ids, VOCAB)
    Simulator(twice, make_builder("none", VOCAB, None), 1, Recorder(ending, twice)).run(cold=True)
    first, second = Simulator(twice, make_builder("suffix", VOCAB, None), 2 * TOKENS).run(cold=False)
    assert len(second.accept_lengths) < len(first.accept_lengths), (
        "the whole text was drafted, its end too; nobody asked behind it"
    )


def test_only_misses_are_asked_about(model):
    """A chain needs the answers along the text alone: a record made without drafts holds them all."""
    answers = empty_record()
    recorder = Recorder(model, answers)
    plain = Simulator(answers, make_builder("none", VOCAB, None), 1, recorder).run(cold=True)
    assert recorder.forwards == sum(len(replay.accept_lengths) for replay in plain) == 4 * TOKENS
    for method in ("ngram", "suffix"):
        Simulator(answers, make_builder(method, VOCAB, None), BUDGET, recorder).run(cold=False)
    assert recorder.forwards == 4 * TOKENS
    trees = Simulator(answers, make_builder("best_first", VOCAB, None), BUDGET, recorder).run(cold=False)
    steps = sum(len(replay.accept_lengths) for replay in trees)
    assert 0 < recorder.forwards - 4 * TOKENS <= steps
    assert sum(replay.misses for replay in trees) > 0


def test_without_the_model_unknown_nodes_stop_a_replay_or_teach_nothing(model):
    answers = empty_record()
    with pytest.raises(NotRecordedError, match="the prompt 1 is not recorded; fix: --ask"):
        Simulator(answers, make_builder("best_first", VOCAB, None), BUDGET).run(cold=True, prompts=answers.prompts[1:])
    Simulator(answers, make_builder("none", VOCAB, None), 1, Recorder(model, answers)).run(cold=True)
    with pytest.raises(NotRecordedError, match="1: nobody asked the model about a node of step 1 before; fix: --ask"):
        Simulator(answers, make_builder("best_first", VOCAB, None), BUDGET).run(cold=True, prompts=answers.prompts[1:])
    replays = Simulator(answers, make_builder("best_first", VOCAB, None), BUDGET, skip=True).run(cold=True)
    plain = Simulator(answers, make_builder("none", VOCAB, None), 1).run(cold=True)
    assert [replay.token_ids for replay in replays] == [replay.token_ids for replay in plain]
    assert sum(replay.misses for replay in replays) > 0


def test_answers_are_the_learning_pass():
    """top() gives the bits of the engine's top_k for every k; the first answer stays."""
    answers = Record([], 8, (), 50)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    entries = answers.path([7, 8, 9, 7], add=True)
    answers.put(entries, logits)
    answers.put(entries[:2], -logits[:2])
    for k in (1, 8, 10):
        mine, engines = answers.top(entries, k), top_k(logits, k)
        np.testing.assert_array_equal(mine.tokens, engines.tokens)
        np.testing.assert_array_equal(mine.probs, engines.probs)
    assert answers.next[entries].tolist() == logits.argmax(-1).tolist()
    with pytest.raises(ValueError, match="reads the top 11 logits, the record keeps 10"):
        answers.top(entries, 11)


def test_entries_are_exact_prefixes():
    answers = Record([], 8, (), 50)
    one = answers.path([1, 2, 3], add=True)
    other = answers.path([2, 2, 3], add=True)
    assert not set(one) & set(other), "the same last tokens after another start"
    assert answers.path([1, 2, 4, 5]) == [*one[:2], UNKNOWN, UNKNOWN]
    tree = DraftTree.from_paths(3, [[4, 5], [4, 6], [7]])
    nodes = answers.nodes(tree, one[-1], add=True)
    assert nodes[2] == answers.path([1, 2, 3, 4, 5])[-1] and len(set(nodes)) == 5
    assert answers.nodes(DraftTree.from_paths(3, [[4, 9], [7]]), one[-1]) == [*nodes[:2], UNKNOWN, nodes[4]]
    assert answers.known(nodes).sum() == 0
    unknown = answers.top([one[0], UNKNOWN], 3)
    assert (unknown.tokens == UNKNOWN).all() and (unknown.probs == 0).all()


def test_save_and_load(model, tmp_path):
    answers = empty_record((3,))
    Simulator(answers, make_builder("goose", VOCAB, None), BUDGET, Recorder(model, answers)).run(cold=False)
    answers.save(tmp_path / "record.npz")
    loaded = Record.load(tmp_path / "record.npz")
    assert loaded.prompts == answers.prompts and len(loaded) == len(answers) > 400
    assert (loaded.max_new_tokens, loaded.eos_token_ids, loaded.vocab_size, loaded.k) == (TOKENS, {3}, VOCAB, 10)
    runs = [Simulator(each, make_builder("goose", VOCAB, None), BUDGET).run(cold=False) for each in (answers, loaded)]
    assert [r.accept_lengths for r in runs[0]] == [r.accept_lengths for r in runs[1]]
    loaded.path([9] * 2000, add=True)  # room is made behind what was loaded
    loaded.put([len(loaded) - 1], torch.ones(1, VOCAB))


def test_lengths_that_change_rope_are_refused():
    with pytest.raises(ValueError, match="longrope RoPE"):
        Recorder(build("phi3_longrope"), empty_record())


def test_answers_of_two_models_are_not_mixed(model):
    answers = empty_record()
    Recorder(model, answers)
    Recorder(model, answers)
    with pytest.raises(
        ValueError, match=r"holds answers of LlamaForCausalLM .*float32, the model is .*float64; fix: --model, --dtype"
    ):
        Recorder(build("llama").double(), answers)


def test_summary_by_hand(model):
    answers = Record([Prompt("p", "g", (1, 2, 3))], 12, (), VOCAB)
    replays = Simulator(answers, make_builder("none", VOCAB, None), 1, Recorder(model, answers)).run(cold=True)
    replays[0].host_seconds = 0.5
    row = summary(replays, CostModel({(1, 1, 0): 0.125}))
    assert (row["tokens"], row["steps"], row["tokens_a_step"], row["nodes_a_step"]) == (12, 12, 1.0, 1.0)
    assert row["modelled_tokens_a_second"] == pytest.approx(12 / (0.5 + 12 * 0.125))


def test_command_line(tmp_path, tiny_folder):
    """A record is made and checked against the engine, and replayed without a model."""
    app = typer.Typer()
    app.command()(main)
    path = tmp_path / "record.npz"
    arguments = ["--record", str(path), "--methods", "ngram,best_first", "--mode", "cold,warm", "--budget", "6"]
    missing = CliRunner().invoke(app, arguments)
    assert missing.exit_code == 2 and "fix: --ask" in missing.stderr
    new = ["--ask", "--check", "--model", tiny_folder, "--split", "random", "--limit", "2", "--max-new-tokens", "12"]
    made = CliRunner().invoke(app, [*arguments, *new])
    assert made.exit_code == 0, made.output
    runs = json.loads(made.stdout.splitlines()[-1])["runs"]
    assert [run["same_steps"] for run in runs] == [1.0] * 4
    replayed = CliRunner().invoke(app, arguments)
    again = json.loads(replayed.stdout.splitlines()[-1])["runs"]
    assert [run["misses"] for run in again] == [0] * 4
    assert [run["steps"] for run in again] == [run["steps"] for run in runs]
    refused = CliRunner().invoke(app, [*arguments, "--mode", "tepid"])
    assert refused.exit_code == 2 and "mode must be cold or warm" in refused.stderr


def test_vocabulary_smaller_than_k():
    tiny = make_tiny_llama(vocab_size=6)
    answers = Record([Prompt("p", "g", (1, 2, 3))], 6, (), 6)
    assert answers.k == 6
    replays = Simulator(answers, make_builder("best_first", 6, None), 4, Recorder(tiny, answers)).run(cold=True)
    assert sum(replays[0].accept_lengths) == 6
