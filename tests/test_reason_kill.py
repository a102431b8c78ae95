"""kill -9 at 20 random moments of a search on an engine: the resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

KILLS = 20


class Server:
    """tests/search_server.py, at work."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("search_server.py"))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, path: Path, seconds: float | None = None) -> str:
        """Search with that checkpoint; kill it after so long. Returns "killed" or the exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it had ended
                os.kill(child, signal.SIGKILL)
        return self.process.stdout.readline().strip()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.slow
def test_kill_9_at_20_random_moments(server: Server, tmp_path: Path) -> None:
    assert server.run(tmp_path / "plain") == "0"
    started = time.monotonic()
    assert server.run(tmp_path / "plain") == "0"
    whole = time.monotonic() - started
    expected: dict[str, Any] = json.loads((tmp_path / "plain.tree").read_text())
    assert len(expected["tree"]["nodes"]["parent"]) > 20
    rng, kills, run = random.Random(3), 0, 0
    while kills < KILLS:
        run += 1
        path = tmp_path / f"run{run}.json"
        while kills < KILLS and not path.with_suffix(".tree").exists():
            kills += server.run(path, rng.uniform(0.0, whole / 2)) == "killed"
        if not path.with_suffix(".tree").exists():
            assert server.run(path) == "0"
        assert json.loads(path.with_suffix(".tree").read_text()) == expected, f"run {run}"
