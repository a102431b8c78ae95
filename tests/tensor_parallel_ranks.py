"""What test_tensor_parallel.py has torchrun start: python tensor_parallel_ranks.py FOLDER, one process a rank.

FOLDER holds a saved model a subfolder; each rank writes what it saw to FOLDER/rank<N>.json. Rank 1 has a clock that jumps and a cache
folder of its own: neither may matter.
"""
# ruff: noqa: E402 - specdec takes the clock when it is imported

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
if RANK == 1:
    jumps, lead, true_clock = random.Random(1), [0.0], time.perf_counter

    def jumping_clock() -> float:
        lead[0] += jumps.expovariate(200)  # 5 ms
        return true_clock() + lead[0]

    time.perf_counter = jumping_clock

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import specdec
from specdec import Engine, SamplingParams
from specdec.cost_model import NODES, CostModel
from specdec.ranks import Ranks
from test_tensor_parallel import LENGTH, MODELS, PROMPTS, SAMPLED

PARAMS = {"greedy": SamplingParams(max_new_tokens=LENGTH), "sampled": SAMPLED}
METHODS: list[dict[str, Any]] = [
    {"method": "none"},
    {"method": "ngram"},
    {"method": "goose", "budget": 8},
    {"method": "goose"},
    {"method": "auto"},
    {"method": "auto", "drafter": "early_exit:1"},
]


def texts(model: Any, **options: Any) -> dict[str, Any]:
    """Of all prompts in one batch, by kind of sampling, and how many steps it took."""
    engine = Engine(model, max_rows=3, **options)
    results = {name: engine.generate(PROMPTS, params) for name, params in PARAMS.items()}
    found: dict[str, Any] = {name: [result.token_ids for result in each] for name, each in results.items()}
    found["steps"] = [result.steps for each in results.values() for result in each]
    found["heads"] = {shape.key_heads for shape in engine.target.layers}.pop()
    return found


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the error that the call must raise."""
    try:
        call(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def load(name: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, **options)


def checks(name: str) -> dict[str, Any]:
    """What must be the same on every rank."""
    model = load(name, distributed_config=DistributedConfig(tp_plan="auto"))
    found: dict[str, Any] = {repr(options): texts(model, **options) for options in METHODS}
    inputs = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": torch.ones(1, len(PROMPTS[0]))}
    own = {"custom_generate": specdec.generate, "specdec_method": "goose", "max_new_tokens": LENGTH}
    found["custom_generate"] = model.generate(**inputs, do_sample=False, **own)[0, len(PROMPTS[0]) :].tolist()
    torch.manual_seed(RANK)  # the seed of a call without one is rank 0's draw
    found["unseeded"] = model.generate(**inputs, do_sample=True, **own).tolist()
    found["unseeded_engine"] = Engine(model, budget=4).generate(PROMPTS[0], SamplingParams(LENGTH, temperature=1.0)).token_ids
    return found


def errors(name: str) -> dict[str, Any]:
    """What must be refused, and what must stop."""
    model = load(name, distributed_config=DistributedConfig(tp_plan="auto"))
    found = {
        "compile": error_of(Engine, model, compile=True),
        "drafter": error_of(Engine, model, drafter=load(name)),
        "other_prompts": error_of(Engine(model, method="none").generate, PROMPTS[RANK]),
    }
    # A forward over many nodes costs the same as one on rank 0, and as many on rank 1.
    CostModel.load = lambda *_: CostModel({(1, nodes, 256): 1e-3 * nodes**RANK for nodes in NODES})  # type: ignore[method-assign]
    found["agreed_costs"] = error_of(texts, model, method="goose")
    Ranks.first = lambda self, value: value  # type: ignore[method-assign]
    found["own_costs"] = error_of(texts, model, method="goose")
    return found


if __name__ == "__main__":
    os.environ["SPECDEC_CACHE"] = str(FOLDER / f"cache{RANK}")  # of costs; compiled kernels stay in the user's
    found = {name: checks(name) for name in MODELS} | {"errors": errors(MODELS[0])}
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
