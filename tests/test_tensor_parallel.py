"""One model on two processes (transformers' tp_plan, gloo): the text of one process, and no rank goes its own way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from oracles_engine import greedy
from specdec import Engine, SamplingParams

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("tensor_parallel_ranks.py")
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [11, 12], [20, 21, 22, 23, 24, 25, 26, 20, 21]]
SAMPLED = SamplingParams(max_new_tokens=16, temperature=0.7, seed=3)
MODELS = ("llama", "qwen2")
LENGTH = 20


def make(name: str) -> Any:
    return tiny_models.build(name, head_dim=16)  # which the compiled op takes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in MODELS:
        make(name).save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = run.communicate(timeout=240)
    finally:
        run.terminate()  # torchrun then ends its ranks
    assert run.returncode == 0, errors[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    model = make(name)
    truth = [greedy(model, prompt, LENGTH) for prompt in PROMPTS]
    sampled = [result.token_ids for result in Engine(model, method="none").generate(PROMPTS, SAMPLED)]
    methods = [method for method in ranks[0][name] if method.startswith("{")]
    assert len(methods) == 6
    for rank in ranks:
        for method in methods:
            found = rank[name][method]
            assert found["greedy"] == truth and found["sampled"] == sampled, method
            assert found["heads"] == 1  # of two
        assert rank[name]["custom_generate"] == truth[0]
    drafted = [sum(ranks[0][name][method]["steps"]) for method in methods]
    assert drafted[2] < drafted[0], "goose must have drafted what was accepted"


def test_ranks_do_the_same(ranks: list[dict[str, Any]]) -> None:
    """Rank 1's clock jumps, its cache of costs is empty and its torch generator is another."""
    assert all(ranks[0][name] == ranks[1][name] for name in MODELS)


def test_measured_costs_are_those_of_the_first(ranks: list[dict[str, Any]]) -> None:
    """They size the trees: each rank by its own costs, Ranks.first being switched off, must stop."""
    for rank in ranks:
        assert rank["errors"]["agreed_costs"] == "no error"
        assert rank["errors"]["own_costs"].startswith("RuntimeError") and "different forwards" in rank["errors"]["own_costs"]


def test_other_prompts_stop(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        message = rank["errors"]["other_prompts"]
        assert message.startswith("RuntimeError") and "different forwards" in message and f"this is rank {number}" in message


def test_what_cannot_be_shared_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "compile=True is impossible, 2 processes share it" in rank["errors"]["compile"]
        assert "2 processes share the model and 1 the drafter" in rank["errors"]["drafter"]
