"""What an evaluator, an answer format, a policy or a rule is, in JSON types: searches that differ in it must not be mixed.

    described("yes_no")                       "yes_no"
    described(ExactAnswers(case=True))        {"type": "specdec.search.answers.ExactAnswers", "case": True}
    described(YesNo.of(engine, "... $steps")) {"type": "...YesNo", "template": "... $steps", "yes_ids": [...], ...}

Frozen dataclasses and objects of `specdec.search` are their settings; a function is its name, and one of specdec's what it closes
over too. Anything else is its type, and its name_or_path where it has one (a model, a tokenizer): what may change as it is used
does not count, and neither does code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any

__all__ = ["described"]

_DEEPEST = 8  # an object that holds itself has no end
_OURS = "specdec.search."


def described(option: Any, depth: int = 0) -> Any:
    """Equal for options that do the same, as far as their settings tell."""
    if option is None or isinstance(option, (bool, int, float, str)):
        return option
    if depth == _DEEPEST:
        return _name(type(option))
    if isinstance(option, Mapping):
        return [[described(key, depth + 1), described(value, depth + 1)] for key, value in option.items()]
    if isinstance(option, (list, tuple)):
        return [described(value, depth + 1) for value in option]
    if isinstance(option, partial):
        return {"type": "partial", "of": described([option.func, option.args, option.keywords], depth + 1)}
    if hasattr(option, "__qualname__"):
        closed = [described(cell.cell_contents, depth + 1) for cell in _cells(option)]
        return {"type": _name(option), "closes": closed} if closed else _name(option)
    return {"type": _name(type(option)), **{name: described(value, depth + 1) for name, value in _settings(option).items()}}


def _cells(function: Any) -> tuple[Any, ...]:
    ours = isinstance(function, FunctionType) and function.__module__.startswith(_OURS)
    return function.__closure__ or () if ours else ()


def _settings(option: Any) -> dict[str, Any]:
    ours = type(option).__module__.startswith(_OURS)
    if is_dataclass(option) and (ours or getattr(type(option), "__dataclass_params__").frozen):  # noqa: B009 (typeshed lacks it)
        return {each.name: getattr(option, each.name) for each in fields(option) if each.init}
    if ours:
        return {name: value for name, value in vars(option).items() if not name.startswith("_")}
    path = getattr(option, "name_or_path", None)
    return {"name_or_path": path} if isinstance(path, str) else {}


def _name(option: Any) -> str:
    return f"{option.__module__}.{option.__qualname__}"
