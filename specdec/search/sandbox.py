"""Runs a model's Python against tests, in a process of its own with little to harm.

Bounds: wall-clock and CPU time, memory, size of files and output, and, where the kernel allows namespaces, no network and no process
that outlives the run. As root it runs as a user of its own, who may start few processes and write only where everybody may. This
holds off what models write by mistake; it is no wall against an attacker: what the caller may read, the program may read, and when
the caller is not root it may write what he may. `isolation()` says which of these bounds this machine has::

    run_tests("def add(a, b): return a + b", "assert add(2, 2) == 4").passed   -> True
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from specdec.search import sandbox_child
from specdec.search.worker import kill_group

__all__ = ["CodeResult", "isolation", "run_tests"]

_USER = "USER"  # stands for the number in a command
_PYTHON = (sys.executable, "-I")
_UNSHARE = ("unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True, slots=True)
class CodeResult:
    """How a run ended."""

    passed: bool  # the program and all its tests ran to their end
    status: str  # "passed", "failed" (an exception, a wrong exit), "timeout", "killed" (by a signal: memory, CPU time, output)
    output: str  # beginning of what it printed, errors too


def run_tests(
    code: str, tests: str = "", seconds: float = 5.0, memory: int = 1 << 29, output: int = 1 << 16, processes: int = 16
) -> CodeResult:
    """Run `code`, then `tests` in the same namespace; passed if both end without an exception.

    Args:
        seconds: most wall-clock time; as much CPU time.
        memory: most address space in bytes.
        output: most bytes of any file that it writes, standard output among them.
        processes: most processes and threads, where `isolation` has "user"; else of all that the user runs.

    Raises:
        ValueError: a limit that is not positive.
    """
    for name, value in {"seconds": seconds, "memory": memory, "output": output, "processes": processes}.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    limits = {"seconds": seconds, "memory": memory, "output": output, "processes": processes}
    job = {"code": code, "tests": tests, "token": secrets.token_hex(16), **limits}
    return _run(job, 60_000 + secrets.randbelow(5_000))  # a user for each run: its limit of processes is its own


def isolation() -> tuple[str, ...]:
    """What holds here besides the limits of one process: of "network", "processes" and "user"."""
    found = {"network": "unshare", "processes": "unshare", "user": "setpriv"}
    return tuple(name for name, command in found.items() if command in _wrapper())


def _run(job: dict[str, Any], user: int) -> CodeResult:
    with tempfile.TemporaryDirectory(prefix="specdec-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        job["folder"] = str(folder / "work")
        (folder / "work").mkdir()
        if "setpriv" in _wrapper():
            folder.chmod(0o711)
            os.chown(folder / "work", user, user)
        (folder / "job").write_text(json.dumps(job))
        (folder / "job").chmod(0o600)
        code = _execute(folder, user, job["seconds"])
        passed = code == 0 and (folder / "verdict").read_text() == job["token"]
        with (folder / "log").open("rb") as file:
            printed = file.read(job["output"]).decode(errors="replace")
    ends = {None: "timeout", sandbox_child.TIMEOUT: "timeout", 0: "passed" if passed else "failed"}
    return CodeResult(passed, ends.get(code, "killed" if code is not None and code > 128 else "failed"), printed)


def _execute(folder: Path, user: int, seconds: float) -> int | None:
    """Run the job of a folder: the exit status, above 128 for a signal; None: it had to be killed from here."""
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "job").open("rb") as job, (folder / "log").open("wb") as log, (folder / "verdict").open("wb") as verdict:
        process = subprocess.Popen(
            [*_as_user(_wrapper(), user), *_PYTHON, sandbox_child.__file__, str(verdict.fileno())],
            stdin=job, stdout=log, stderr=log, env=environment, pass_fds=[verdict.fileno()], start_new_session=True, cwd="/",
        )  # fmt: skip
        try:
            ended = _ends_within(process.pid, seconds + sandbox_child.STARTUP_SECONDS)
        finally:
            kill_group(process)  # before it is reaped: what it left running is of its group
    return process.returncode if ended else None


def _ends_within(pid: int, seconds: float) -> bool:
    """Wait for a child process without reaping it."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


@cache
def _wrapper() -> tuple[str, ...]:
    """The command that the interpreter runs under: the first that works here."""
    if os.geteuid() == 0:
        candidates = [(*_UNSHARE, *_setpriv()), _UNSHARE, _setpriv()]
    else:
        candidates = [(*_UNSHARE, "--user", "--map-current-user")]
    return next((command for command in candidates if _works(command)), ())


def _works(wrapper: tuple[str, ...]) -> bool:
    if shutil.which(wrapper[0]) is None:
        return False
    command = [*_as_user(wrapper, 60_000), *_PYTHON, "-c", "import decimal"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, cwd="/").returncode == 0


def _setpriv() -> tuple[str, ...]:
    """Another user without rights, but that of reading where the interpreter itself is not for everybody to read (below /root)."""
    files = (Path(sys.executable).resolve(), Path(os.__file__).resolve(), Path(sandbox_child.__file__).resolve())
    readable = all(folder.stat().st_mode & 0o001 for file in files for folder in file.parents)
    rights = "-all" if readable else "-all,+dac_read_search"
    kept = ("--inh-caps", rights, "--ambient-caps", rights, "--bounding-set", rights)
    return ("setpriv", "--reuid", _USER, "--regid", _USER, "--clear-groups", "--no-new-privs", *kept)


def _as_user(wrapper: tuple[str, ...], user: int) -> list[str]:
    return [str(user) if part == _USER else part for part in wrapper]
