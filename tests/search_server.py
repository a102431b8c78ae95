"""A process that runs one search on an engine a line: `python search_server.py FOLDER`, then the checkpoint's path on stdin.

It forks for every line, so that a killed search costs no new interpreter; one thread, for threads do not survive a fork. Prints the
child's process number when the child begins, and nothing else; the child writes what it found beside the checkpoint, `.tree`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import specdec
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.search.search import SearchConfig

BUDGET, PROBLEM = 400, "What is 2 + 2?"


def by_length(problem: str, steps: list[str]) -> float:
    """A score that depends on the text alone."""
    return (sum(map(ord, "".join(steps))) % 97) / 96


def search(engine: specdec.Engine, checkpoint: Path | None, tree: Path) -> None:
    result = specdec.reason(
        engine, PROBLEM, BUDGET, by_length, seed=7, temperature=1.0, answers="exact", step="tokens:7", width=3,
        config=SearchConfig(step_tokens=16), checkpoint=checkpoint,
    )  # fmt: skip
    found = {"answer": result.answer, "used": result.used, "tree": result.tree.to_dict()}
    temporary = tree.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.rename(tree)


def main() -> None:
    torch.set_num_threads(1)
    engine = specdec.Engine(
        make_tiny_llama(initializer_range=0.3), make_tiny_tokenizer(), method="best_first", budget=6, max_rows=3
    )
    engine.generate(
        [[5, 6, 7]] * 3, specdec.SamplingParams(max_new_tokens=4)
    )  # whatever is made on first use is made before the forks
    for line in sys.stdin:
        path = Path(line.strip())
        child = os.fork()
        if child == 0:
            search(engine, None if path.name == "plain" else path, path.with_suffix(".tree"))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
