"""Whole sets of prompts: where each lies in the data folder, and how a row becomes the user's turns, a group and a category."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["SETS", "TaskSet", "rows_of"]

Row = dict[str, Any]
MT_BENCH = "mt-bench"  # the group of Spec-Bench's questions of two turns; it has eight categories


@dataclass(frozen=True, slots=True)
class TaskSet:
    """One file of prompts."""

    file: str  # JSON lines, under the data folder
    turns: Callable[[Row], list[str]]  # one or two
    id_field: str = ""  # "": the number of the line, from 0
    group: Callable[[Row], str] | None = None  # None: the name of the set
    category_field: str = ""  # "": none
    whole: bool = False  # long contexts: cut to the model's window alone

    def key(self, number: int, row: Row) -> Any:
        """What names the row within its file."""
        return row[self.id_field] if self.id_field else number

    def group_of(self, row: Row, name: str) -> str:
        return self.group(row) if self.group else name

    def category_of(self, row: Row, group: str) -> str:
        """The row's category; "" where it would only repeat the group."""
        category = str(row[self.category_field]) if self.category_field else ""
        return "" if category == group else category


def rows_of(text: str) -> list[Row]:
    """The rows of JSON lines. Not splitlines(): a string may hold other line separators, such as U+2028."""
    return [json.loads(line) for line in text.split("\n") if line]


def _meeting(row: Row) -> list[str]:
    """The transcript, then the first general query, so that a cut at the front keeps the query."""
    lines = [f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]]
    return ["\n".join(lines) + "\n\n" + row["general_query_list"][0]["query"]]


SETS = {
    "spec-bench": TaskSet(
        "spec-bench/question.jsonl",
        lambda row: row["turns"],
        "question_id",
        lambda row: MT_BENCH if len(row["turns"]) > 1 else row["category"],
        "category",
    ),
    "humaneval": TaskSet(
        "humaneval/HumanEval.jsonl", lambda row: [f"Complete this Python function:\n{row['prompt']}"], "task_id"
    ),
    "gsm8k": TaskSet("gsm8k/test.jsonl", lambda row: [row["question"]]),
    "math500": TaskSet("math500/test.jsonl", lambda row: [row["problem"]], "unique_id", category_field="subject"),
    "humanevalfix": TaskSet(
        "humanevalfix/humanevalpack_python.jsonl",
        lambda row: [f"Fix the bug and return the whole function:\n{row['declaration']}{row['buggy_solution']}"],
        "task_id",
        category_field="bug_type",
    ),
    "long-qmsum": TaskSet("long-qmsum/qmsum_ami_icsi_10.jsonl", _meeting, "id", whole=True),
}
