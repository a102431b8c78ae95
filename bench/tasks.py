"""The prompts of a benchmark: the splits of `mix.json`, whole sets by name, a user's own file, or random words.

* report, tune: two disjoint splits of 54 prompts in 9 groups, named by mix.json; figures are stated on them.
* spec-bench, humaneval, gsm8k, math500, humanevalfix, long-qmsum: every row of a set (bench.task_sets).
* a file.jsonl: one prompt a line, {"id", "group", "prompt"} or {"id", "group", "messages"}; id and group may be left out.
* random: text that nothing can predict.

A prompt is one user turn through the model's chat template with the generation prompt, cut to the last 1,500 tokens; the long
contexts and a user's own are cut to the model's window alone. The second turn of an MT-Bench question `follows` the first: its
prompt holds the first turn's answer. Example row of mix.json, and the task it becomes::

    {"group": "gsm8k", "file": "gsm8k/test.jsonl", "id": 261}    ->    Task("gsm8k/261", "gsm8k", "Charlie wants to ...")
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from .task_sets import SETS, TaskSet, rows_of

__all__ = ["DEFAULT_DATA", "NAMES", "Message", "Task", "encode", "load_tasks", "random_tasks"]

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = ("report", "tune")
NAMES = (*SPLITS, "random", *SETS)
MAX_PROMPT_TOKENS = 1500
WORDS = (
    "amber quartz lantern velvet orbit cactus mirror tundra pickle saddle copper ribbon walrus magnet thistle gravel anchor "
    "biscuit comet dagger ember fossil glacier hammer iguana jungle kettle ladder meadow nectar otter pepper quiver raven sponge"
).split()

Message = dict[str, str]  # {"role", "content"}


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of a benchmark."""

    id: str  # unique, "group/id"
    group: str
    text: str  # the user's turn
    category: str = ""  # finer than the group; "": the group is all there is
    before: tuple[Message, ...] = ()  # the messages of the conversation until then
    follows: str = ""  # id of the task whose prompt and answer come before; "": none
    whole: bool = False  # cut to the model's window alone


def load_tasks(data: Path, name: str, limit: int | None = None, groups: Iterable[str] = ()) -> list[Task]:
    """Tasks by name, in the order of their file.

    Args:
        data: folder with mix.json and the sets (unused by "random" and by a user's own file).
        name: one of NAMES, or the path of a .jsonl file.
        limit: keep so many, spread over the groups: a multiple of their number keeps them balanced. A second turn is not
            counted and stays with its first.
        groups: keep these groups only; empty is all.

    Raises:
        ValueError: unknown name or group, limit < 1, a folder without the data, a malformed file of the user.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    tasks = _named(data, name)
    wanted, there = set(groups), {task.group for task in tasks}
    if unknown := wanted - there:
        raise ValueError(f"tasks {name} have no group {', '.join(sorted(unknown))}; they have {', '.join(sorted(there))}")
    tasks = [task for task in tasks if not wanted or task.group in wanted]
    return tasks if limit is None else _spread(tasks, limit)


def random_tasks(count: int = 12, words: int = 60, seed: int = 0) -> list[Task]:
    """Lists of random words: with a temperature of 1.5 on top, a text that no draft can foresee."""
    rng = random.Random(seed)
    return [Task(f"random-words/{i}", "random-words", " ".join(rng.choices(WORDS, k=words))) for i in range(count)]


def encode(tokenizer: Any, task: Task, before: Sequence[Message] = (), window: int | None = None) -> list[int]:
    """The prompt's token ids: chat template with the generation prompt, the last tokens that fit.

    Args:
        before: messages that come first, for a task that follows another; the task's own are used without.
        window: most tokens of a prompt that the model takes; None is no bound.
    """
    messages = [*(before or task.before), {"role": "user", "content": task.text}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bounds = [bound for bound in (window, None if task.whole else MAX_PROMPT_TOKENS) if bound is not None]
    return ids[-min(bounds) :] if bounds else ids


def _named(data: Path, name: str) -> list[Task]:
    if name in SPLITS:
        return _mix(data, name)
    if name in SETS:
        return _set(data, name, SETS[name])
    if name == "random":
        return random_tasks()
    if name.endswith(".jsonl"):
        return _own(Path(name))
    raise ValueError(f"tasks must be one of {', '.join(NAMES)}, or a file of yours that ends in .jsonl, got {name!r}")


# ---- mix.json and whole sets -----------------------------------------------------------------------------------------------


def _mix(data: Path, split: str) -> list[Task]:
    mix = json.loads(_text(data, "mix.json", split))
    sets = {each.file: each for each in SETS.values()}
    if unknown := {entry["file"] for entry in mix[split]} - set(sets):
        raise ValueError(f"mix.json may name {', '.join(sets)}; it names {', '.join(sorted(unknown))}")
    files = {entry["file"]: _by_key(data, split, sets[entry["file"]]) for entry in mix[split]}
    tasks = []
    for entry in mix[split]:
        row, group = files[entry["file"]][entry["id"]], entry["group"]
        category = sets[entry["file"]].category_of(row, group)
        tasks.append(Task(f"{group}/{entry['id']}", group, _template(mix["templates"], entry).format(**row), category))
    return tasks


def _text(data: Path, file: str, name: str) -> str:
    """A file of the data folder."""
    if not (path := data / file).is_file():
        raise ValueError(f"data must be a folder with {file} for the tasks {name}, got {data}; fix: --data, or the tasks random")
    return path.read_text(encoding="utf-8")


def _by_key(data: Path, name: str, task_set: TaskSet) -> dict[Any, dict[str, Any]]:
    return {task_set.key(number, row): row for number, row in enumerate(rows_of(_text(data, task_set.file, name)))}


def _template(templates: dict[str, str], entry: dict[str, Any]) -> str:
    """By group, else by the folder of the file: code-edit and humanevalfix differ in name."""
    return templates.get(entry["group"]) or templates[Path(entry["file"]).parent.name]


def _set(data: Path, name: str, task_set: TaskSet) -> list[Task]:
    """Every row of a set, each turn a task."""
    tasks = []
    for key, row in _by_key(data, name, task_set).items():
        group = task_set.group_of(row, name)
        ids = [f"{group}/{key}{suffix}" for suffix in ("", "/turn-2")]
        for turn, text in enumerate(task_set.turns(row)):
            follows = ids[0] if turn else ""
            tasks.append(Task(ids[turn], group, text, task_set.category_of(row, group), follows=follows, whole=task_set.whole))
    return tasks


# ---- a user's own file -----------------------------------------------------------------------------------------------------


def _own(path: Path) -> list[Task]:
    if not path.is_file():
        raise ValueError(f"tasks must be one of {', '.join(NAMES)}, or a .jsonl file that is there, got {str(path)!r}")
    lines = path.read_text(encoding="utf-8").split("\n")
    tasks = [_own_task(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise ValueError(f'{path} holds no prompt; fix: one {{"prompt": "..."}} a line')
    if repeated := [name for name, count in Counter(task.id for task in tasks).items() if count > 1]:
        raise ValueError(
            f"{path} has the id {repeated[0].split('/', 1)[1]!r} more than once in a group; fix: ids of their own, or none"
        )
    return tasks


def _own_task(path: Path, number: int, line: str) -> Task:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where} must be an object with either "prompt" or "messages", got {line:.80}')
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not _is_conversation(messages):
        raise ValueError(
            f'{where}: a prompt is text, messages are [{{"role", "content"}}, ...] of text that end with the user\'s'
        )
    group = str(row.get("group", path.stem))
    text, before = messages[-1]["content"], tuple(messages[:-1])
    return Task(f"{group}/{row.get('id', number)}", group, text, str(row.get("category", "")), before, whole=True)


def _is_conversation(messages: Any) -> bool:
    shaped = isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    return shaped and bool(messages) and messages[-1]["role"] == "user"


# ---- a part of them --------------------------------------------------------------------------------------------------------


def _spread(tasks: list[Task], limit: int) -> list[Task]:
    """`limit` of the tasks, taken from each group in turn, and what follows them; their order stays."""
    by_group: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        if not task.follows:
            by_group[task.group].append(task)
    in_turn = [task for task in chain.from_iterable(zip_longest(*by_group.values())) if task is not None]
    kept = {task.id for task in in_turn[:limit]}
    return [task for task in tasks if task.id in kept or task.follows in kept]
