"""specdec: an existing Hugging Face causal language model generates faster, and says the same.

The names below load on first use, so that `import specdec` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.draft_tree import DraftTree
    from specdec.engine import Engine, Result
    from specdec.hf import accelerate, generate
    from specdec.methods import DRAFTER_METHODS, METHODS
    from specdec.models import load
    from specdec.search.reason import ReasonResult, reason, reason_all
    from specdec.sequence import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "DRAFTER_METHODS",
    "METHODS",
    "DraftTree",
    "Engine",
    "ReasonResult",
    "Result",
    "SamplingParams",
    "__version__",
    "accelerate",
    "generate",
    "load",
    "reason",
    "reason_all",
]

_HOME = {
    "DRAFTER_METHODS": "methods",
    "METHODS": "methods",
    "DraftTree": "draft_tree",
    "Engine": "engine",
    "Result": "engine",
    "SamplingParams": "sequence",
    "accelerate": "hf",
    "generate": "hf",
    "load": "models",
    "ReasonResult": "search.reason",
    "reason": "search.reason",
    "reason_all": "search.reason",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"specdec.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
