"""Answers: extraction, canonical forms, grading; and the two places where untrusted text meets a machine: sympy and Python."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.search import answers as answers_module
from specdec.search.answers import (
    UNPARSABLE,
    AnswerFormat,
    CodeAnswers,
    ExactAnswers,
    MathAnswers,
    NumberAnswers,
    boxed,
    make_format,
    stated,
)  # fmt: skip
from specdec.search.sandbox import isolation, run_tests
from specdec.search.worker import Worker, WorkerError
from worker_functions import obey

NUMBERS = NumberAnswers()


@pytest.fixture(scope="module")
def maths() -> Iterator[MathAnswers]:
    pytest.importorskip("math_verify")
    made = MathAnswers(seconds=3)
    yield made
    made.close()


# ---- where the answer stands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and \boxed{cut", r"\frac{1}{2}"),
        (r"\fbox {x\}y}", r"x\}y"),
        (r"\boxed{}", ""),
        (r"\boxed{" * 2000, None),
        (r"\boxed{" + "{" * 10_000, None),
        ("boxed{5}", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The answer is 5.", "5"),
        ("Therefore, the final answer is: **5.5**\nMore", "5.5"),
        ("Answer: no. The answer is yes! Bye", "yes"),
        ("the answer is", None),
        ("answers isolated", None),
    ],
)
def test_stated(text: str, rest: str | None) -> None:
    assert stated(text) == rest


@pytest.mark.parametrize(
    ("text", "written", "canonical"),
    [
        ("so 5.\n#### 1,234", "1,234", "1234"),
        ("She pays 3. The answer is $18.50 per day.", "$18.50", "18.5"),
        (r"\boxed{18 \text{ dollars}}", r"18 \text{ dollars}", "18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", UNPARSABLE + r"\frac{1}{2}"),
        ("The answer is 3 + 4 = 7 apples", "7", "7"),
        ("The answer is −３/４", "-3/4", "-0.75"),
        ("#### 1/3", "1/3", "1/3"),
        ("#### 0.1234567890123", "0.1234567890123", "0.1234567890123"),
        ("#### -0.0", "-0.0", "0"),
        (r"\boxed{1{,}000}", "1,000", "1000"),
        ("#### 1e999999", "1e99", "1" + "0" * 99),
        (r"\boxed{1/0}", "1/0", UNPARSABLE + "1/0"),
        (r"\boxed{" + "9" * 1000 + "}", "9" * 1000, UNPARSABLE + "9" * 1000),
        ("no answer: 5 or 6?", "5", "5"),
        ("just 5", None, None),
        ("The answer is unknown", None, None),
    ],
)
def test_numbers(text: str, written: str | None, canonical: str | None) -> None:
    assert NUMBERS.extract(text) == written
    assert NUMBERS.read(text) == canonical


def test_gsm8k_gold() -> None:
    assert NUMBERS.read("Janet sells <<16-3-4=9>>9\n#### 18") == "18"
    assert NUMBERS.matches("18", "$18.00") and not NUMBERS.matches("18", "18.01")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["", "#### ", "answer is ", r"\boxed{", "$", "}"]))
def test_any_text_is_read_without_an_exception_and_canonical_forms_are_stable(text: str, cue: str) -> None:
    for each in (NUMBERS, ExactAnswers(), CodeAnswers()):
        form = each.read(text + cue + text)
        assert form is None or each.canonical(form) == form


def test_exact() -> None:
    exact = ExactAnswers()
    assert exact.read("The answer is  New\u00a0 York.") == "new york" == exact.canonical("NEW YORK")
    assert exact.matches("e\u0301", "\u00e9")
    assert ExactAnswers(case=True).canonical("New York") == "New York"


def test_formats_by_name() -> None:
    assert isinstance(make_format("number"), NumberAnswers)
    assert make_format(NUMBERS) is NUMBERS
    with pytest.raises(ValueError, match="answers must be one of exact, number, math, code"):
        make_format("latex")


def test_missing_math_verify_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"specdec\[reason\]"):
        make_format("math")


# ---- mathematics ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "equals",
    [
        ["0.5", "1/2", r"\frac{2}{4}", r"\frac12", "50%"],
        [r"2\sqrt{2}", r"\sqrt 8", r"\sqrt{8}"],
        ["x^2-1", "(x-1)(x+1)", "-1 + x^2"],
        ["5", "x=5", r"5 \text{ cm}", "5.0"],
        [r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"],
        ["(1, 2)", r"\left(1,2\right)"],
        [r"\text{Evelyn}", "evelyn", "Evelyn"],
        [r"\{2, 1\}", r"\{1,2\}"],
    ],
)
def test_equal_answers_are_one_class(maths: MathAnswers, equals: list[str]) -> None:
    forms = {maths.canonical(written) for written in equals}
    assert len(forms) == 1
    (form,) = forms
    assert maths.canonical(form) == form and not form.startswith(UNPARSABLE)


def test_different_answers_are_not(maths: MathAnswers) -> None:
    written = ["5", "-5", "0.5", "x", "y", "(1,2)", "(2,1)", r"\pi", "3.14", "evelyn", "", r"\frac{", r"\frac{1"]
    assert len({maths.canonical(each) for each in written}) == len(written)


def test_the_gold_answer_comes_first(maths: MathAnswers) -> None:
    """math-verify is asymmetric: an answer may be an equation for the number asked for, not the other way round."""
    assert maths.matches("5", "x = 5") and maths.matches(r"\frac{1}{3}", "1/3")
    assert maths.matches("5", "3+2=5") and not maths.matches("3+2=5", "5")
    assert not maths.matches("5", "6") and not maths.matches("5", "")


def test_math_extraction(maths: MathAnswers) -> None:
    assert maths.extract(r"So the answer is $\frac{1}{2}$ of it.") == r"\frac{1}{2}"
    assert maths.extract("I wonder.") is None
    assert maths.read(r"\boxed{0.5}") == r"\frac{1}{2}"


def test_what_hangs_is_killed(maths: MathAnswers) -> None:
    maths.canonical("1")  # the start does not count
    started = time.monotonic()
    hanging = "10^{10^{10}}"
    assert maths.canonical(hanging) == UNPARSABLE + hanging
    assert time.monotonic() - started < 10
    assert maths.canonical("2+3") == "5"


def test_long_answers_are_not_parsed(maths: MathAnswers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "_worker", None)
    assert maths.canonical("(" * 5000).startswith(UNPARSABLE)


def test_off_the_main_thread(maths: MathAnswers) -> None:
    """math-verify's own timeouts are alarms and fail there."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda i=i: found.append(maths.canonical(f"{i} + 1"))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["1", "2", "3", "4"]


# ---- the worker -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(obey, seconds=1.0, memory=512 << 20)
    yield made
    made.close()


def test_worker_survives_everything(worker: Worker) -> None:
    first = worker("a")["pid"]
    with pytest.raises(WorkerError, match="KeyError"):
        worker("raise")
    assert worker("print")["pid"] == first  # what it prints is no reply
    with pytest.raises(WorkerError, match="MemoryError"):
        worker("eat")
    assert worker("b")["pid"] == first
    with pytest.raises(TimeoutError, match="within 1 s"):
        worker("hang")
    with pytest.raises(WorkerError, match="died"):
        worker("die")
    assert worker("世界\ud800")["order"] == "世界\ud800"
    assert not Path(f"/proc/{first}").exists()


def test_worker_refuses_what_cannot_travel() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        Worker(lambda: 0, 1)
    with pytest.raises(ValueError, match="seconds must be > 0"):
        Worker(obey, 0)


def test_worker_says_what_it_cannot_import() -> None:
    with pytest.raises(WorkerError, match="ModuleNotFoundError"):
        Worker("no_such_module:f", 1)(0)


def test_workers_end_with_their_owner() -> None:
    """Also when a call hangs and the owner is killed."""
    program = """
        import os, sys, threading
        from specdec.search.worker import Worker
        worker = Worker("time:sleep", 0.3)
        worker(0)
        print(worker._process.pid, flush=True)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), 9)).start()
        worker(1000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# ---- code -----------------------------------------------------------------------------------------------------------------------


def test_code_is_the_last_block_and_layout_does_not_count() -> None:
    code = CodeAnswers()
    text = "First\n```python\nold\n```\nthen\n```py\ndef f(x):  # twice\n    return (2*x)\n```\nDone."
    assert code.read(text) == "def f(x):\n    return 2 * x" == code.canonical("def f(x):\n\n  return 2*x")
    assert code.extract("no block") is None
    assert code.canonical("def f(").startswith(UNPARSABLE)
    assert code.canonical("-" * 100_000 + "1").startswith(UNPARSABLE)
    assert code.canonical("x\0").startswith(UNPARSABLE)


def test_code_is_graded_by_tests() -> None:
    code = CodeAnswers(seconds=2)
    assert code.matches("assert f(2) == 4", "def f(x): return 2 * x")
    assert not code.matches("assert f(2) == 4", "def f(x): return x")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(0)", "failed"),  # leaving early is no way to pass
        ("import os; os._exit(0)", "failed"),
        ("def f(", "failed"),
        ("x = 'a' * 10**10", "failed"),  # MemoryError
        ("while True: pass", "timeout"),
        ("import time; time.sleep(1000)", "timeout"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed"),
    ],
)
def test_bad_programs(code: str, status: str) -> None:
    started = time.monotonic()
    assert run_tests(code, "assert True", seconds=0.5).status == status
    assert time.monotonic() - started < 8


def test_huge_output_is_cut() -> None:
    result = run_tests("while True: print('x' * 1000)", seconds=2, output=10_000)
    assert not result.passed and len(result.output) == 10_000


def test_fork_bomb() -> None:
    if "user" not in isolation():
        pytest.skip("no limit of processes is enforced here: never run this one without it")
    result = run_tests("import os\nwhile True: os.fork()", seconds=1)
    assert not result.passed


def test_nothing_outlives_the_run(tmp_path: Path) -> None:
    if "processes" not in isolation():
        pytest.skip("the kernel gives no namespaces here")
    mark = f"specdec-{os.getpid()}"
    escape = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execlp('sleep', '{mark}', '1000')"
    assert run_tests(escape, "import time; time.sleep(0.2)").passed
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert mark not in running


def test_no_network() -> None:
    if "network" not in isolation():
        pytest.skip("the kernel gives no namespaces here")
    assert run_tests("import socket", "assert [name for _, name in socket.if_nameindex()] in ([], ['lo'])").passed
    assert not run_tests("import socket; socket.create_connection(('127.0.0.1', 9), 1)").passed


def test_the_callers_files_are_safe(tmp_path: Path) -> None:
    if "user" not in isolation():
        pytest.skip("the caller is not root")
    (tmp_path / "mine").write_text("mine")
    assert not run_tests(f"open({str(tmp_path / 'mine')!r}, 'w')").passed
    assert (tmp_path / "mine").read_text() == "mine"
    assert run_tests("open('own', 'w').write('x')", "assert open('own').read() == 'x'").passed


@pytest.mark.parametrize("limit", ["seconds", "memory", "output", "processes"])
def test_bad_limits(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} must be > 0"):
        run_tests("", **{limit: 0})


def test_every_format_has_the_three_parts() -> None:
    for made in (ExactAnswers(), NumberAnswers(), CodeAnswers()):
        assert isinstance(made, AnswerFormat) and made.extract("") is None
