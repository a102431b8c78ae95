"""Answer formats: where the answer stands in a text, its canonical form, and whether it is right.

Votes count equal canonical forms, so a format has three parts::

    text       "... so she pays $1,250.00. The answer is $1,250.00."
    extract    "$1,250.00"            None: the text holds no answer
    canonical  "1250"                 what equal answers share
    matches    ("1250", ...) -> True  the gold answer comes first

An answer that cannot be parsed is a class of its own, "unparsable: ...", which only the very same text joins.
"""

from __future__ import annotations

import ast
import contextlib
import re
import unicodedata
from decimal import Context, Decimal
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from specdec.search.sandbox import run_tests
from specdec.search.worker import Worker, WorkerError

__all__ = [
    "FORMATS",
    "AnswerFormat",
    "CodeAnswers",
    "ExactAnswers",
    "MathAnswers",
    "NumberAnswers",
    "boxed",
    "make_format",
    "stated",
]

UNPARSABLE = "unparsable: "
MAX_ANSWER = 2000  # characters; what is longer is no answer
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])\s*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_NUMBER = re.compile(
    r"[-+]?\s?\$?\s?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?(?:\s?/\s?[0-9]+)?"
)
_ASCII = str.maketrans("０１２３４５６７８９．，−⁄", "0123456789.,-/")
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
_DIGITS = 100  # of a number


class AnswerFormat:
    """One format; subclasses are in FORMATS."""

    def extract(self, text: str) -> str | None:
        """The answer as written: the last one of the text. None: it holds none."""
        raise NotImplementedError

    def canonical(self, written: str) -> str:
        """The class of an answer: equal answers have equal strings."""
        raise NotImplementedError

    def matches(self, gold: str, written: str) -> bool:
        """Whether an answer, as written or canonical, is right."""
        return self.canonical(gold) == self.canonical(written)

    def read(self, text: str) -> str | None:
        """The class of the answer in a text, None without one."""
        written = self.extract(text)
        return None if written is None else self.canonical(written)

    def close(self) -> None:
        """Let go of processes, if there are any; they start again when needed."""


class ExactAnswers(AnswerFormat):
    """Strings: boxed or after "answer is"; white space, a final period and, unless `case`, capitals do not count."""

    def __init__(self, case: bool = False) -> None:
        self.case = case

    def extract(self, text: str) -> str | None:
        inside = boxed(text)
        return stated(text) if inside is None else inside

    def canonical(self, written: str) -> str:
        plain = " ".join(unicodedata.normalize("NFC", written).split()).rstrip(".").strip()
        return plain if self.case else plain.casefold()


class NumberAnswers(AnswerFormat):
    """Numbers, exact: after "####" (GSM8K), boxed, or after "answer is"; commas, $ and units do not count."""

    def extract(self, text: str) -> str | None:
        text = _plain_digits(text)
        _, mark, after = text.rpartition("####")
        if mark and (number := _NUMBER.search(after.strip().split("\n", 1)[0])):
            return number[0].strip()
        if (inside := boxed(text)) is not None:
            return inside
        sentence = stated(text)
        number = None if sentence is None else _NUMBER.search(sentence.rpartition("=")[2])
        return None if number is None else number[0].strip()

    def canonical(self, written: str) -> str:
        found = _NUMBER.findall(_plain_digits(written).rpartition("=")[2])
        with contextlib.suppress(ValueError, ZeroDivisionError):
            if len(found) == 1:
                return _decimal(_fraction(found[0]))
        return _unparsable(written)


class MathAnswers(AnswerFormat):
    """Mathematics by math-verify: boxed or after "answer is". Bounded by a process that is killed; too slow is unparsable.

    Args:
        seconds: most time of one parse or comparison.
        memory: most bytes of the process.

    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2 << 30) -> None:
        if find_spec("math_verify") is None:
            raise ImportError('answers="math" needs math-verify. Fix: pip install "specdec[reason]", or another answer format')
        self.seconds, self.memory = seconds, memory
        self._worker = Worker("specdec.search.math_forms:answer", seconds, memory)
        self._known: dict[str, str] = {}

    def extract(self, text: str) -> str | None:
        inside = boxed(text)
        if inside is not None or (sentence := stated(text)) is None:
            return inside
        parts = sentence.split("$")
        return parts[1] if len(parts) >= 3 else sentence

    def canonical(self, written: str) -> str:
        if written not in self._known:
            form = self._asked("canonical", written)
            self._known[written] = _unparsable(written) if form is None else form
        return self._known[written]

    def matches(self, gold: str, written: str) -> bool:
        return super().matches(gold, written) or bool(self._asked("equal", gold, written))

    def close(self) -> None:
        self._worker.close()

    def _asked(self, operation: str, *texts: str) -> Any:
        """The worker's answer; None where it took too long, too much memory, or raised."""
        if any(len(text) > MAX_ANSWER or text.startswith(UNPARSABLE) for text in texts):
            return None
        with contextlib.suppress(TimeoutError, WorkerError):
            return self._worker(operation, *texts)
        return None


class CodeAnswers(AnswerFormat):
    """Python: the last fenced block. Equal are programs that differ in comments and layout only; the gold answer is its tests.

    Args:
        seconds: most time of a run of the tests, see `sandbox.run_tests`.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds

    def extract(self, text: str) -> str | None:
        blocks = _FENCE.findall(text)
        return blocks[-1] if blocks else None

    def canonical(self, written: str) -> str:
        try:
            return ast.unparse(ast.parse(written))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return _unparsable(written)

    def matches(self, gold: str, written: str) -> bool:
        return run_tests(written, gold, seconds=self.seconds).passed


FORMATS: dict[str, type[AnswerFormat]] = {
    "exact": ExactAnswers,
    "number": NumberAnswers,
    "math": MathAnswers,
    "code": CodeAnswers,
}


def make_format(answers: str | AnswerFormat) -> AnswerFormat:
    """The format of a name, or the object itself.

    Raises:
        ValueError: no such format.
        ImportError: "math" without math-verify.
    """
    if isinstance(answers, AnswerFormat):
        return answers
    if answers not in FORMATS:
        raise ValueError(f"answers must be one of {', '.join(FORMATS)}, or an AnswerFormat object, got {answers!r}")
    return FORMATS[answers]()


def boxed(text: str) -> str | None:
    """What stands inside the last complete \\boxed{...} or \\fbox{...}."""
    found, opened = (-1, -1), []  # opened: where the insides of the open braces begin, -1 for those of no box
    for brace in _BRACES.finditer(text):
        if brace[0].endswith("{"):
            opened.append(brace.end() if "b" in brace[0] else -1)
        elif brace[0] == "}" and opened:
            found = max(found, (opened.pop(), brace.start()))
    return text[found[0] : found[1]].strip() if found[0] >= 0 else None


def stated(text: str) -> str | None:
    """The rest of the sentence after the last "answer is" or "answer:", without emphasis; None where there is none."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    rest = text[phrases[-1].end() :].lstrip(" \t*_:")
    end = _SENTENCE_END.search(rest)
    return (rest if end is None else rest[: end.start()]).strip(" \t*_`") or None


def _plain_digits(text: str) -> str:
    """Full-width digits and typographic signs as ASCII, LaTeX's spellings of $ and the thousands separator as plain ones."""
    return text.translate(_ASCII).replace("\\$", "$").replace("{,}", ",").replace("\\!", "")


def _fraction(written: str) -> Fraction:
    plain = re.sub(r"[,$\s]", "", written)
    if len(plain) > _DIGITS:
        raise ValueError("too many digits")
    numerator, _, denominator = plain.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def _decimal(value: Fraction) -> str:
    """As a decimal number where that is exact, else as a fraction."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(value)
    exact = Context(prec=4 * _DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return format(exact, "f") if value.denominator > 1 else str(value.numerator)


def _unparsable(written: str) -> str:
    plain = " ".join(written.removeprefix(UNPARSABLE)[:MAX_ANSWER].split())
    return UNPARSABLE + plain
