"""Six prompts of `make verify` on the embedded model, and its negative control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tasks import DEFAULT_DATA, Task, encode, load_tasks
from bench.verify import Log, gaps, verify_bf16, verify_greedy
from specdec import METHODS, Engine, SamplingParams, models
from specdec import linear as linear_module
from specdec.linear import HAVE_OP

pytestmark = pytest.mark.slow

OWN = [
    Task(f"own/{i}", "own", text)
    for i, text in enumerate(
        [
            "Count from one to twenty, then count again.",
            "Write a Python function that reverses a string.",
            "Repeat this list twice: apple, pear, plum, apple, pear, plum.",
            "What is the capital of France, and of Italy?",
            "Translate into French: the cat sat on the mat.",
            "Tom has 3 apples and buys 4 more. How many has he now?",
        ]
    )
]


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """specdec's product for any number of rows: up to how many it is the faster one is timed, and a test must not hang on that."""
    monkeypatch.setattr(linear_module, "winning_rows", lambda *_: linear_module.UNLIMITED)


def prompts_of(tokenizer: Any, count: int) -> dict[str, list[int]]:
    """Prompts of the report split, or own ones where the benchmark data is not there; long ones cut, to keep CI short."""
    tasks = load_tasks(DEFAULT_DATA, "report", count) if (DEFAULT_DATA / "mix.json").is_file() else OWN[:count]
    return {task.id: encode(tokenizer, task)[-200:] for task in tasks}


def test_greedy_equals_generate_for_every_method(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = embedded
    methods = [name for name in METHODS if name != "auto"]  # which is best_first once the budget is a number
    prompts = prompts_of(tokenizer, 6)
    log = Log(tmp_path, "greedy")
    wrong = verify_greedy(model, prompts, log, methods, (8,), batch=5, new_tokens=12)
    wrong += verify_greedy(model, prompts, log, methods, (60,), batch=1, new_tokens=12)
    assert wrong == 0, [row for row in log.done.values() if row["wrong"]]
    assert len(log.done) == len(methods) * (6 + 1 + 6)
    again = Log(tmp_path, "greedy")
    assert again.done == log.done  # a rerun would skip all of it


@pytest.mark.usefixtures("one_product")
def test_the_bf16_audit_passes_and_a_wrong_mask_bit_fails_it(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = models.load(dtype=torch.bfloat16)
    prompts = prompts_of(tokenizer, 3)
    methods = ["goose", "best_first"]
    log = Log(tmp_path, "bf16")
    assert verify_bf16(model, prompts, log, methods, (16,), new_tokens=24, broken=False) == 0
    if HAVE_OP:  # no result depends on how many nodes a forward has, so not even a near-tie flips
        assert all(row["as_none"] for row in log.done.values())
    assert verify_bf16(model, prompts, Log(tmp_path, "broken"), methods, (16,), new_tokens=24, broken=True) > 0


@pytest.mark.skipif(not HAVE_OP, reason="specdec._C is not built: torch's own products round by the number of rows")
@pytest.mark.usefixtures("one_product")
def test_bf16_samples_are_those_of_plain_decoding_alone_and_in_a_batch() -> None:
    model, tokenizer = models.load(dtype=torch.bfloat16)
    prompts = list(prompts_of(tokenizer, 3).values())
    params = SamplingParams(max_new_tokens=32, temperature=0.8, top_p=0.95, seed=3)
    plain = [result.token_ids for result in Engine(model, method="none").generate(prompts, params)]
    engine = Engine(model, method="best_first", budget=24)
    assert [result.token_ids for result in engine.generate(prompts, params)] == plain


def test_the_gap_of_a_wrong_token_is_seen(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    (prompt,) = prompts_of(tokenizer, 1).values()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    assert float(gaps(model, prompt, output).max()) == 0.0
    wrong = [*output[:3], (output[3] + 1) % model.config.vocab_size, *output[4:]]
    assert float(gaps(model, prompt, wrong)[3]) > 0.1
