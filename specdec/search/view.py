"""A search tree as one HTML file without anything from outside.

The page (`view.html`) holds the data as JSON and draws them itself: a collapsible tree with scores and states, the text of any path,
the answers with their votes, and the budget used over time. Texts come from a model, so they go in as text and never as markup::

    write_html(result, "tree.html", problem=problem, budget=2000)
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdec.search.layout import tree_layout
from specdec.search.request import Result
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree
from specdec.search.vote import rank_answers

__all__ = ["chosen_node", "node_records", "to_html", "write_html"]

FIELDS: dict[str, Any] = {
    "parent": -1, "kind": "step", "status": "open", "closed": "", "truncated": False, "unscored": False, "q": None, "text": "",
    "answer": None, "tokens": 0, "evaluator_tokens": 0, "visits": 1,
}  # fmt: skip
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def node_records(source: Any) -> list[dict[str, Any]]:
    """The nodes as one dict each, with the fields of FIELDS.

    Args:
        source: a Result, a SearchTree, its `to_dict()` or the JSON of a checkpoint, or such records already.

    Raises:
        ValueError: none of these, no nodes, or a node whose parent does not precede it.
    """
    if isinstance(source, Result):
        source = source.tree
    if isinstance(source, SearchTree):
        columns = {name: getattr(source, name) for name in FIELDS}
        records = [{name: column[node] for name, column in columns.items()} for node in range(len(source))]
    elif isinstance(source, Mapping):
        columns = source.get("tree", source).get("nodes", {})
        count = len(columns.get("parent", ()))
        records = [{name: columns[name][node] for name in FIELDS if name in columns} for node in range(count)]
    else:
        records = [dict(record) for record in source]
    if not records:
        raise ValueError(
            "source must be a Result, a SearchTree, its to_dict(), or records with at least the root; it has no nodes"
        )
    for node, record in enumerate(records):
        if node and not 0 <= record.get("parent", -1) < node:
            raise ValueError(f"node {node} has parent {record.get('parent')!r}; it must be an earlier node")
    return [{**FIELDS, **{name: record[name] for name in FIELDS if name in record}} for record in records]


def to_html(source: Any, title: str = "Search tree", problem: str = "", budget: int | None = None) -> str:
    """The page.

    Args:
        source: see `node_records`. Of a Result the page also shows the chosen answer, its status and the notes.
        title, problem: texts at the top.
        budget: policy output tokens that were allowed; None: not shown.

    Raises:
        ValueError: see `node_records`.
    """
    data = _data(node_records(source), source)
    data |= {"title": title, "problem": problem, "budget": budget}
    parts = {"@@TITLE@@": html.escape(title), "@@DATA@@": _json(data)}
    page = files("specdec.search").joinpath("view.html").read_text(encoding="utf-8")
    return re.sub("@@TITLE@@|@@DATA@@", lambda found: parts[found[0]], page)


def write_html(source: Any, path: str | Path, title: str = "Search tree", problem: str = "", budget: int | None = None) -> None:
    """`to_html` as a file."""
    text = to_html(source, title, problem, budget)
    Path(path).write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair has no UTF-8


def chosen_node(source: Any, records: list[dict[str, Any]]) -> int:
    """The node of the answer: a Result's own, else the best answered one, else the best; the root of a tree that holds nothing."""
    if isinstance(source, Result):
        return source.node

    def worth(node: int) -> tuple[bool, float, int]:
        record = records[node]
        return record["status"] == NodeStatus.ANSWERED, -1.0 if record["unscored"] or record["q"] is None else record["q"], -node

    if isinstance(source, SearchTree) and (answers := rank_answers(source)):
        return answers[0].node
    return max((node for node, record in enumerate(records) if node and is_told(record)), key=worth, default=ROOT)


def is_told(record: dict[str, Any]) -> bool:
    """Part of the tree: neither in flight nor dropped."""
    return record["status"] not in (NodeStatus.PENDING, NodeStatus.DROPPED)


def _data(records: list[dict[str, Any]], source: Any) -> dict[str, Any]:
    """Everything that the page shows, but for its texts at the top."""
    winner = chosen_node(source, records)
    layout = tree_layout([record["parent"] for record in records])
    if isinstance(source, Result):
        answers, status, notes, used = source.answers, str(source.status), list(source.notes), source.used
    else:
        answers = tuple(rank_answers(source)) if isinstance(source, SearchTree) else ()
        status, notes, used = "", [], sum(record["tokens"] for record in records)
    return {
        "nodes": records,
        "levels": layout.levels,
        "places": layout.places,
        "winner": winner,
        "answer": records[winner]["answer"],
        "answers": [{"value": each.value, "votes": each.votes, "weight": each.weight, "node": each.node} for each in answers],
        "status": status,
        "notes": notes,
        "used": used,
        "evaluator_tokens": sum(record["evaluator_tokens"] for record in records),
    }


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: _ESCAPES[found[0]], text)
