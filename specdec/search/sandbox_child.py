"""The program of a sandboxed process: take limits on, run the code and its tests, write the verdict. Standard library only.

Reads the job as JSON from standard input; its argument is the number of the file descriptor that the verdict goes to. Only a run
that reaches the end of the tests writes the token, so `exit(0)` inside the code is no way to pass.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import Any

STARTUP_SECONDS = 5.0  # of this process, before the limits hold
TIMEOUT = 128 + signal.SIGALRM  # exit status


def limit(job: dict[str, Any]) -> None:
    """Limits that cannot be lifted again: they hold for every process that the code starts."""
    os.chdir(job["folder"])
    os.umask(0o077)
    limits = {
        resource.RLIMIT_CPU: math.ceil(job["seconds"]),
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["output"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))


def run(job: dict[str, Any], verdict: int) -> None:
    """Become the sandboxed process: returns only by an exception."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit(job)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    space: dict[str, Any] = {"__name__": "__main__"}
    for name in ("code", "tests"):
        exec(compile(job[name], f"<{name}>", "exec"), space)
    os.write(verdict, job["token"].encode())
    sys.stdout.flush()
    os._exit(0)  # whatever threads are left


def main() -> None:
    """Wait for the run: the first process of a namespace ignores signals such as the timer's, so it does not run the code itself."""
    job, verdict = json.load(sys.stdin), int(sys.argv[1])
    if (child := os.fork()) == 0:
        run(job, verdict)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
