"""The distance to the limit: the selection oracle against all trees, the ladder and the floor by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bench.limits import Grown, Ladder, Step, WatchedBestFirst, climb, floor_bytes, main, proposed_path, steps_of
from bench.record import Prompt, Record, Recorder
from bench.simulate import Replayed, Simulator
from conftest import make_tiny_llama
from oracles_limits import best_choice
from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree
from specdec.methods import make_builder
from specdec.target import TargetModel
from specdec.trees.evidence import Evidence, new_evidence
from tiny_models import VOCAB, build


def with_candidates(nodes: int, candidates: dict[int, list[int]]) -> Evidence:
    """Evidence that proposed these tokens after these nodes."""
    evidence = new_evidence(nodes)
    for node, tokens in candidates.items():
        evidence.tokens[node, : len(tokens)] = tokens
        evidence.counts[node] = len(tokens)
    return evidence


def pool_of(tree: DraftTree, evidence: Evidence) -> list[tuple[int, ...]]:
    """All candidates as paths: those that became nodes, and those that did not."""
    paths = []
    for node in range(len(tree)):
        path = tuple(tree.tokens[tree.path(node)[1:]].tolist())
        paths += [(*path, int(token)) for token in evidence.tokens[node, : max(0, evidence.counts[node])]]
    return paths


A, B, C, X, Y = 1, 2, 3, 8, 9
WORKED = DraftTree.from_paths(0, [[A], [X], [A, Y]])
PROPOSED = {0: [A, X], 1: [Y, B], 2: [], 3: [C]}


@pytest.mark.parametrize(
    ("future", "most", "nodes"),
    [
        ([A, B, C], 8, 3),  # b was not chosen; nobody was asked what follows it
        ([A, B, C], 2, 2),  # the node budget
        ([A, Y, C, C], 8, 4),  # c below a leaf
        ([A, B], 8, 3),
        ([A], 8, 2),
        ([C, A], 8, 1),  # a draft miss
        ([], 8, 1),  # the text ends here
    ],
)
def test_proposed_path_by_hand(future, most, nodes):
    evidence = with_candidates(4, PROPOSED)
    assert proposed_path(WORKED, evidence, future, most) == nodes
    choice = best_choice(pool_of(WORKED, evidence), future, most)
    assert (choice.tokens, choice.nodes) == (nodes, nodes)


def test_proposed_path_is_the_best_of_all_trees():
    """Random small trees: no other choice of at most N candidates emits more, and none emits as much with fewer nodes."""
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(150):
        paths = [rng.integers(1, 4, rng.integers(1, 4)).tolist() for _ in range(3)]
        tree = DraftTree.from_paths(0, paths).prefix(5)
        chosen = {node: tree.tokens[tree.children(node)].tolist() for node in range(len(tree))}
        more = {node: [t for t in rng.permutation(3)[:2] + 1 if t not in tokens] for node, tokens in chosen.items()}
        evidence = with_candidates(len(tree), {node: chosen[node] + more[node] for node in chosen})
        future, most = rng.integers(1, 4, 4).tolist(), int(rng.integers(1, 6))
        choice = best_choice(pool_of(tree, evidence), future, most)
        found = proposed_path(tree, evidence, future, most)
        assert (found, found) == (choice.tokens, choice.nodes)
        lengths.add(found)
    assert len(lengths) >= 4, "the cases tell something"


def test_the_worked_example():
    """The numbers of the module's docstring."""
    costs = CostModel({(1, 1, 0): 0.040, (1, 4, 0): 0.040, (1, 8, 0): 0.050})
    ladder = climb([Step(emitted=2, nodes=8, context=0, proposed=3, wide=4)], costs, 0.002, 8)
    assert ladder.engine == pytest.approx(2 / 0.052)
    assert ladder.share == pytest.approx(0.513, abs=0.001)
    assert ladder.losses() == pytest.approx({"host time": 0.0205, "rejected nodes": 0.1333, "selection misses": 1 / 3}, abs=1e-4)
    assert ladder.share + sum(ladder.losses().values()) == pytest.approx(1)
    assert ladder.wide == pytest.approx(4 / 0.040)
    assert ladder.true_tokens == pytest.approx(8 / 0.050)
    assert climb([Step(2, 8, 0, 3, 3)], costs, 0.002, 4).true_tokens == pytest.approx(4 / 0.040)


def test_sums_over_steps_not_means_of_ratios():
    costs = CostModel({(1, 1, 0): 1.0, (1, 4, 0): 3.0})
    ladder = climb([Step(1, 1, 0, 1, 2), Step(3, 4, 0, 4, 4)], costs, 0.0, 4)
    assert ladder == Ladder(4 / 4, 4 / 4, 4 / 4, 5 / 4, 6 / 6, 4 / 3)


def test_steps_follow_the_text():
    """A step looks at what comes after it, never at the last token, which every forward gives for nothing."""
    replayed = Replayed(Prompt("p", "g", (7,)), [A, B, C, X, Y], [2, 2, 1], [4, 4, 1], [1, 3, 5])
    trees = [WORKED, DraftTree.from_paths(B, [[C, X, Y]])]
    for tree in trees:
        tree.evidence = type("Draft", (), {"evidence": with_candidates(len(tree), PROPOSED if tree is WORKED else {})})()
    grown = [Grown(trees[0].prefix(1), trees[0]), Grown(trees[1], trees[1])]
    grown[0].own.evidence = trees[0].evidence
    assert steps_of(replayed, grown, 8) == [Step(2, 4, 1, 2, 3), Step(2, 4, 3, 3, 3), Step(1, 1, 5, 1, 1)]


@pytest.mark.parametrize("sixteen", [0.06, 0.4, None], ids=["cheap nodes", "dear nodes", "fixed"])
def test_watching_changes_nothing(sixteen):
    """The watched builder drafts as best_first does; the oracle is never behind the engine, and sees candidates it left out; the
    wide one sees those that no source was asked for."""
    costs = CostModel({(1, 1, 0): 0.04, (1, 4, 0): 0.04 + sixteen / 12, (1, 16, 0): sixteen}) if sixteen else None
    prompt = Prompt("p", "g", tuple(np.resize(np.arange(1, 9), 60).tolist()))
    record = Record([prompt], 32, (), VOCAB)
    recorder = Recorder(build("llama"), record)
    plain = Simulator(record, make_builder("best_first", VOCAB, costs), 16, recorder).run(cold=True)[0]
    watched = WatchedBestFirst(VOCAB, costs)
    replayed = Simulator(record, watched, 16, recorder).replay(prompt)
    assert (replayed.accept_lengths, replayed.tree_sizes) == (plain.accept_lengths, plain.tree_sizes)
    steps = steps_of(replayed, watched.grown, 16)
    assert sum(step.emitted for step in steps) == 32
    assert all(step.emitted <= step.proposed <= step.wide <= 16 for step in steps)
    assert sum(step.proposed for step in steps) > 32
    if sixteen is None:
        assert all(step.proposed == step.wide for step in steps)
    elif sixteen > 0.1:
        assert sum(step.wide for step in steps) > sum(step.proposed for step in steps)


def test_floor_bytes_by_hand():
    """Tied: the embedding is the last matrix; untied: one row of it is read, so it does not count."""
    options = {"vocab_size": 64, "num_hidden_layers": 1}
    tied, untied = make_tiny_llama(tie_word_embeddings=True, **options), make_tiny_llama(tie_word_embeddings=False, **options)
    attention, mlp, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 64, 3 * 32
    weights = 4 * (attention + mlp + norms + 64 * 32)
    kv = 4 * 2 * 2 * 8  # keys and values, 2 heads of 8
    for model in (tied, untied):
        assert floor_bytes(TargetModel(model), 0) == weights
        assert floor_bytes(TargetModel(model), 100) == weights + 100 * kv


def test_command_line(tmp_path, tiny_folder, monkeypatch, tiny_tokenizer):
    """From a record to the table; what the record lacks is asked and kept."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    text = "abcabcabcabdabc"
    prompts = [Prompt(f"t{i}", group, tuple(tiny_tokenizer(text)["input_ids"])) for i, group in enumerate("gh")]
    path = tmp_path / "record.npz"
    Record(prompts, 10, (257,), 258).save(path)
    app = typer.Typer()
    app.command()(main)
    arguments = ["--record", str(path), "--model", tiny_folder, "--dtype", "float32", "--timed", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert list(last["modes"]) == ["cold", "warm"] and list(last["modes"]["cold"]) == ["g", "h", "all"]
    for row in last["modes"]["warm"].values():
        assert row["share"] + row["host time"] + row["rejected nodes"] + row["selection misses"] == pytest.approx(1)
        assert 0 < row["engine"] <= row["without_host"] <= row["without_rejected"] and row["oracle"] <= row["true_tokens"]
    assert last["memory_floor_ms"] > 0 and last["host_ms"] > 0
    assert len(Record.load(path)) > 20
    assert CliRunner().invoke(app, [*arguments, "--mode", "tepid"]).exit_code == 2
