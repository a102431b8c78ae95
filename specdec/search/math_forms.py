"""Mathematical answers by math-verify: their canonical form, and whether two are equal. Runs inside a Worker, since sympy may hang.

math-verify (Hugging Face, Apache-2.0) parses LaTeX and plain expressions to sympy. `verify` wants (gold, answer) in this order, and
both its timeouts must be None: they are alarms, which work in a main thread only. Importing this file needs math-verify.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

__all__ = ["answer", "canonical", "equal"]

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that the timeouts are off
_TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|textrm|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # no command; such a run of letters is read as a product
_FUNCTIONS = frozenset("arccos arcsin arctan cos cosh cot csc exp inf log max min mod pi sec sin sinh sqrt tan tanh".split())


def answer(operation: str, *texts: str) -> Any:
    """`canonical` or `equal` by name: what the Worker calls."""
    return canonical(*texts) if operation == "canonical" else equal(*texts)


def canonical(written: str) -> str | None:
    """LaTeX that equal answers share: "0.5", "1/2" and "\\frac{2}{4}" are all "\\frac{1}{2}". Words are kept, in lower case.

    None: it cannot be parsed.
    """
    if (words := _words(written)) is not None:
        return words
    parsed = _parsed(written)
    if not parsed or isinstance(parsed[0], str):
        return None
    value = parsed[0]
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:
        value = value.rhs
    if isinstance(value, sympy.Interval) and value.left_open and value.right_open:
        value = sympy.Tuple(value.start, value.end)  # "(1, 2)" may be a point
    if isinstance(value, sympy.Tuple):
        return f"({', '.join(_simple(part) for part in value)})"
    return _simple(value)


def equal(gold: str, written: str) -> bool:
    """Whether math-verify takes `written` for the same as `gold`."""
    return bool(verify(_parsed(gold), _parsed(written), timeout_seconds=None))


def _words(written: str) -> str | None:
    """The text of an answer in words."""
    plain = _TEXT.sub(r"\1", written)
    if any(word not in _FUNCTIONS for word in _WORD.findall(written if plain == written else plain)) and not re.search(
        "[0-9]", plain
    ):
        return " ".join(plain.lower().split())
    return None


def _simple(value: Any) -> str:
    if isinstance(value, sympy.Expr):
        value = sympy.simplify(sympy.nsimplify(value, rational=True))
    return str(sympy.latex(value))


def _parsed(written: str) -> list[Any]:
    options: dict[str, Any] = {"extraction_config": _TARGETS, "parsing_timeout": None}
    return list(parse(f"${written}$", **options) or parse(written, **options))
