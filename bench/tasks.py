"""The prompts that figures are stated on: `mix.json`, two disjoint splits of 54 prompts in 9 groups.

One user turn through the model's chat template with the generation prompt, cut to the last 1,500 tokens. A third split, `random`,
is text that nothing can predict. Example row of mix.json, and the task it becomes::

    {"group": "gsm8k", "file": "gsm8k/test.jsonl", "id": 261}    ->    Task("gsm8k/261", "gsm8k", "Charlie wants to ...")
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_DATA", "SPLITS", "Task", "encode", "load_tasks", "random_tasks"]

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = ("report", "tune", "random")
MAX_PROMPT_TOKENS = 1500
ID_FIELDS = {"spec-bench": "question_id", "humaneval": "task_id", "humanevalfix": "task_id"}  # gsm8k: the line number
WORDS = (
    "amber quartz lantern velvet orbit cactus mirror tundra pickle saddle copper ribbon walrus magnet thistle gravel anchor "
    "biscuit comet dagger ember fossil glacier hammer iguana jungle kettle ladder meadow nectar otter pepper quiver raven sponge"
).split()


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of a benchmark."""

    id: str  # unique, "group/id"
    group: str
    text: str  # the user's turn


def load_tasks(data: Path, split: str, limit: int | None = None, groups: Iterable[str] = ()) -> list[Task]:
    """Tasks of one split, in the order of mix.json.

    Args:
        data: folder with mix.json (unused by the split "random").
        split: "report", "tune" or "random".
        limit: keep so many, spread over the groups: a multiple of their number keeps them balanced.
        groups: keep these groups only; empty is all.

    Raises:
        ValueError: unknown split or group, or a folder without mix.json.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    tasks = random_tasks() if split == "random" else _mix(data, split)
    wanted, there = set(groups), {task.group for task in tasks}
    if unknown := wanted - there:
        raise ValueError(f"split {split} has no group {', '.join(sorted(unknown))}; it has {', '.join(sorted(there))}")
    tasks = [task for task in tasks if not wanted or task.group in wanted]
    return tasks if limit is None else _spread(tasks, limit)


def random_tasks(count: int = 12, words: int = 60, seed: int = 0) -> list[Task]:
    """Lists of random words: with a temperature of 1.5 on top, a text that no draft can foresee."""
    rng = random.Random(seed)
    return [Task(f"random-words/{i}", "random-words", " ".join(rng.choices(WORDS, k=words))) for i in range(count)]


def encode(tokenizer: Any, task: Task) -> list[int]:
    """The prompt's token ids: chat template with the generation prompt, last 1,500 tokens."""
    messages = [{"role": "user", "content": task.text}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])[-MAX_PROMPT_TOKENS:]


def _mix(data: Path, split: str) -> list[Task]:
    path = data / "mix.json"
    if not path.is_file():
        raise ValueError(f"data must be a folder with mix.json, got {data}; name one with --data, or use the split random")
    mix = json.loads(path.read_text(encoding="utf-8"))
    files = {row["file"]: _rows(data / row["file"]) for row in mix[split]}
    return [
        Task(f"{row['group']}/{row['id']}", row["group"], _fill(_template(mix["templates"], row), files[row["file"]][row["id"]]))
        for row in mix[split]
    ]


def _rows(path: Path) -> dict[Any, dict[str, Any]]:
    """The rows of a .jsonl file by the id that mix.json uses."""
    field = ID_FIELDS.get(path.parent.name)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {row[field] if field else number: row for number, row in enumerate(rows)}


def _template(templates: dict[str, str], row: dict[str, Any]) -> str:
    """By group, else by the folder of the file: code-edit and humanevalfix differ in name."""
    return templates.get(row["group"]) or templates[Path(row["file"]).parent.name]


def _fill(template: str, row: dict[str, Any]) -> str:
    return template.format(**row)


def _spread(tasks: list[Task], limit: int) -> list[Task]:
    """`limit` of the tasks, taken from each group in turn; their order stays."""
    by_group: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_group[task.group].append(task)
    in_turn = [task for task in chain.from_iterable(zip_longest(*by_group.values())) if task is not None]
    kept = {task.id for task in in_turn[:limit]}
    return [task for task in tasks if task.id in kept]
