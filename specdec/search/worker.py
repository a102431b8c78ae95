"""Worker: a function in a process of its own, so that a call that hangs can be killed.

A thread cannot be killed and an alarm works in the main thread only. The process starts at the first call, answers one call after
the other, is killed with its children when a call takes too long, and starts anew at the next::

    worker = Worker(simplify, seconds=5)     # a function of a module travels by name
    worker("x + x")     -> "2*x"
    worker("(x+1)**(10**9)")    -> TimeoutError; the next call works again

Arguments travel as pickles to the process, results as JSON back: what an untrusted text made of the process is not unpickled.
This file is also the program of that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

__all__ = ["Worker", "WorkerError", "kill_group"]

STARTUP_SECONDS = 120.0  # to import what the function needs; a call's own time begins after it
_MAX_REPLY = 1 << 24  # bytes


class WorkerError(RuntimeError):
    """The function raised, or its process died."""


class Worker:
    """`function` in a process of its own; calls from several threads take turns.

    Args:
        function: "module:name", imported in the process only, or an object that can be pickled; returns JSON types.
        seconds: most time of a call.
        memory: most address space of the process in bytes; None: unlimited.

    Raises:
        ValueError: `seconds` not positive, or `function` cannot be pickled or lives in __main__.
    """

    def __init__(self, function: str | Callable[..., Any], seconds: float, memory: int | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be > 0, got {seconds}")
        self.seconds, self.memory = seconds, memory
        self._function = _pickled(function)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *args: Any) -> Any:
        """`function(*args)`.

        Raises:
            TimeoutError: it took longer than `seconds`.
            WorkerError: it raised (the message says what), or the process died.
        """
        message = pickle.dumps(args)
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                _send(process.stdin, message)
                reply = _receive(process, self.seconds)
            except BaseException:  # an interrupt too: a reply that nobody read would be taken for the next one
                self._kill()
                raise
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._process = process
        self._finalizer = weakref.finalize(self, kill_group, process)
        assert process.stdin is not None
        _send(process.stdin, pickle.dumps((sys.path, self.memory, self.seconds)))
        _send(process.stdin, self._function)
        if "error" in (reply := _receive(process, STARTUP_SECONDS)):
            raise WorkerError(reply["error"])
        return process

    def _kill(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a group, and all of the group; close its pipes."""
    if process.returncode is None:  # once it is reaped, its id may be another's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _pickled(function: str | Callable[..., Any]) -> bytes:
    fix = "fix: define it at the top level of a module that can be imported"
    try:
        pickled = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{function!r:.80} cannot go to another process ({error}); {fix}") from error
    if b"__main__" in pickled:
        raise ValueError(f"{function!r:.80} lives in __main__, which another process cannot import; {fix}")
    return pickled


def _send(pipe: IO[bytes], message: bytes) -> None:
    try:
        pipe.write(struct.pack("<Q", len(message)) + message)
        pipe.flush()
    except BrokenPipeError as error:
        raise WorkerError("the worker process died") from error


def _receive(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """One line of JSON from the process."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    poll, line = select.poll(), b""
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"no result within {seconds:g} s")
        piece = os.read(process.stdout.fileno(), 1 << 16)
        line += piece
        if not piece or len(line) > _MAX_REPLY:
            raise WorkerError("the worker process died" if not piece else "the worker's result is too long")
    return dict(json.loads(line))


# ---- inside the process ---------------------------------------------------------------------------------------------------------


def _serve() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints is no reply
    paths, memory, seconds = pickle.loads(_read(requests))
    sys.path[:] = paths
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    function = None

    def load() -> bool:
        nonlocal function
        function = pickle.loads(_read(requests))
        if isinstance(function, str):
            module, name = function.split(":")
            function = getattr(import_module(module), name)
        return True

    _reply(replies, load)
    while message := _read(requests):
        signal.setitimer(
            signal.ITIMER_REAL, 2 * seconds + 1
        )  # if its parent is killed meanwhile, a call that hangs ends by itself
        _reply(replies, lambda message=message: function(*pickle.loads(message)))  # type: ignore[misc]
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read(pipe: IO[bytes]) -> bytes:
    """One message; empty at the end."""
    header = pipe.read(8)
    return pipe.read(struct.unpack("<Q", header)[0]) if len(header) == 8 else b""


def _reply(pipe: Any, call: Callable[[], Any]) -> None:
    try:
        line = json.dumps({"result": call()})
    except Exception as error:  # whatever the function raises is its caller's to see
        line = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
    data = line.encode() + b"\n"
    while data:
        data = data[pipe.write(data) :]


if __name__ == "__main__":
    _serve()
