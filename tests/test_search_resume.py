"""The checkpoint: exact, atomic, and after kill -9 at any moment the run that would have been."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import networkx
import pytest

from mock_search import MockModel, drive, fields
from specdec.search import ROOT, Completion, Kind, NodeStatus, Search, SearchConfig
from specdec.search import journal as journal_module
from specdec.search.bg_mcts import BgMcts
from specdec.search.journal import Journal, read_snapshot

ROOT_FOLDER = Path(__file__).parent.parent
CONFIG = SearchConfig(step_tokens=20)
MODEL = MockModel(4, empty=0.05, unscored=0.05, repeat=0.1)
BUDGET = 3000
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from mock_search import MockModel, drive
from specdec.search import Search, SearchConfig, journal
journal._LEAST_EVENTS = 16  # many snapshots
search = Search({policy!r}, {budget}, config=SearchConfig(step_tokens=20), checkpoint={path!r})
print("ready", flush=True)
drive(search, {model!r}, width=3)
print("done", flush=True)
"""


def reference(policy: str) -> dict[str, object]:
    """The same search without a file, uninterrupted."""
    search = Search(policy, BUDGET, config=CONFIG)
    drive(search, MODEL, width=3)
    return fields(search)


def start(policy: str, path: Path) -> subprocess.Popen[str]:
    """Start or resume the search in a process of its own; it is about to work."""
    code = CHILD.format(tests=str(Path(__file__).parent), policy=policy, path=str(path), budget=BUDGET, model=MODEL)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT_FOLDER, env=os.environ)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill_once(policy: str, path: Path, seconds: float) -> bool:
    """Start or resume the search and kill it that long after it began to work; False: it was done."""
    process = start(policy, path)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait()
    return "done" not in rest


@pytest.mark.slow
def test_kill_9_at_20_random_moments(tmp_path: Path) -> None:
    policy, rng, kills = "bg_mcts", random.Random(1), 0
    expected = reference(policy)
    process, begun = start(policy, tmp_path / "whole.json"), time.monotonic()
    assert process.communicate(timeout=300)[0] == "done\n"
    whole = time.monotonic() - begun  # seconds, the end of the process included
    for run in itertools.count():
        if kills == 20:
            break
        path = tmp_path / f"run{run}.json"
        while kills < 20 and kill_once(policy, path, rng.uniform(0.0, whole / 2)):
            kills += 1
        search = Search(policy, BUDGET, config=CONFIG, checkpoint=path)
        drive(search, MODEL, width=3)
        assert fields(search) == expected


@pytest.mark.parametrize("policy", ["bg_mcts", "mcts", "best_of_n", "beam", "rebase", "refinement", "tree_bon"])
def test_a_run_stopped_after_every_event_equals_the_uninterrupted_one(policy: str, tmp_path: Path, monkeypatch: object) -> None:
    """As kill -9, at every moment between two writes, in one process: a new Search is read from the files before every call."""
    monkeypatch.setattr(journal_module, "_LEAST_EVENTS", 5)  # type: ignore[attr-defined]
    config, budget = SearchConfig(step_tokens=20), 250
    plain = Search(policy, budget, config=config)
    drive(plain, MODEL, width=2)

    def reopened() -> Search:
        return Search(policy, budget, config=config, checkpoint=tmp_path / "run.json")

    while True:
        requests = reopened().outstanding() or reopened().ask(2)
        if not requests:
            break
        search = reopened()
        request = search.outstanding()[0]  # one at a time, in the order of asking
        assert request == requests[0]
        search.tell(request, MODEL(request))
    assert fields(reopened()) == fields(plain)


def test_a_line_that_was_cut_is_as_if_never_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    search = Search("bg_mcts", 500, config=CONFIG, checkpoint=path)
    drive(search, MODEL, width=2, steps=4)
    whole = fields(search)
    log = path.with_name("run.json.journal")
    with log.open("ab") as file:
        file.write(b'{"number": 99, "ask"')
    again = Search("bg_mcts", 500, config=CONFIG, checkpoint=path)
    assert fields(again) == whole
    drive(again, MODEL, width=2, steps=1)  # and the next event begins on a line of its own
    assert fields(Search("bg_mcts", 500, config=CONFIG, checkpoint=path)) == fields(again)


def test_a_damaged_journal_is_said_to_be(tmp_path: Path) -> None:
    """A cut line with another behind it, and an event that is missing, named by line; the files are left as they are."""
    path = tmp_path / "run.json"
    drive(Search("bg_mcts", 500, config=CONFIG, checkpoint=path), MODEL, width=2, steps=4)
    log = path.with_name("run.json.journal")
    lines = log.read_bytes().splitlines(keepends=True)
    for damaged, message in (
        ([*lines[:2], lines[2][:9], *lines[3:]], r"run.json.journal, line 3 is damaged \("),
        ([*lines[:2], *lines[3:]], r"line 3 is damaged \(event 4 follows 2\)"),
        ([*lines[:3], lines[2], *lines[3:]], r"line 4 is damaged \(event 3 follows 3\)"),
        (lines[1:], r"line 1 is damaged \(event 2 follows 0\)"),
        ([*lines[:2], b"[]\n"], r"line 3 is damaged \("),
    ):
        log.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match=message):
            Search("bg_mcts", 500, config=CONFIG, checkpoint=path)
        assert log.read_bytes() == b"".join(damaged)
    log.unlink()  # as the message says
    assert len(Search("bg_mcts", 500, config=CONFIG, checkpoint=path).tree) == 1


class Slow:
    """A file on a nearly full disk: it takes a few bytes of a write, and in the end none."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        count = min(7, self.room, len(data))
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= count
        return int(self.file.write(data[:count]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_short_writes_are_gone_on_with_and_failed_ones_undone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.json")
    journal.snapshot({"header": {}})
    journal.write({"ask": 1})
    journal._file = Slow(journal._file, room=60)
    journal.write({"ask": 2})
    with pytest.raises(OSError, match="No space left"):
        journal.write({"ask": 3, "long": "x" * 100})
    journal._file = journal._file.file
    journal.write({"ask": 4})
    journal.close()
    assert [event["ask"] for event in Journal(tmp_path / "run.json").load()[1]] == [1, 2, 4]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """While the first works on the search; and the first, if the second has worked on it since."""
    path = tmp_path / "run.json"
    code = f"""
from specdec.search import Search
Search("greedy", 100, checkpoint={str(path)!r}).ask()
"""
    journal = Search("greedy", 100, checkpoint=path)
    journal.ask()
    other = [sys.executable, "-c", code]
    refused = subprocess.run(other, capture_output=True, text=True, check=False)
    assert "run.json is in use by another process" in refused.stderr
    journal.close()
    assert subprocess.run(other, check=False).returncode == 0
    first = Search("greedy", 100, checkpoint=path)
    first.close()
    second = Search("greedy", 100, checkpoint=path)
    second.ask()
    second.close()
    with pytest.raises(ValueError, match="another search has gone on with"):
        first.ask()


def test_events_that_the_snapshot_holds_are_skipped(tmp_path: Path) -> None:
    """A crash after the snapshot was renamed and before the journal was deleted."""
    path = tmp_path / "run.json"
    search = Search("bg_mcts", 500, config=CONFIG, checkpoint=path)
    drive(search, MODEL, width=2, steps=4)
    log = path.with_name("run.json.journal")
    kept = log.read_bytes()
    search.close()
    log.write_bytes(kept)
    assert fields(Search("bg_mcts", 500, config=CONFIG, checkpoint=path)) == fields(search)


def test_a_failed_write_leaves_the_old_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    journal = Journal(path)
    journal.snapshot({"header": {}})
    before = path.read_text()

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        journal.snapshot({"header": {"changed": True}})
    assert path.read_text() == before


def test_an_event_costs_the_same_however_large_the_tree(tmp_path: Path) -> None:
    """Snapshots come when the journal is as long as the tree: their number grows with the logarithm of the events."""
    path = tmp_path / "run.json"
    search = Search("best_of_n", 10**6, config=SearchConfig(full_tokens=80), checkpoint=path)
    written: list[int] = []
    original = Journal.snapshot

    def counted(self: Journal, state: dict[str, object]) -> None:
        written.append(len(search.tree))
        original(self, state)

    Journal.snapshot = counted  # type: ignore[method-assign]
    try:
        drive(search, MockModel(1), width=1, steps=3000)
    finally:
        Journal.snapshot = original  # type: ignore[method-assign]
    assert len(search.tree) > 2500 and 4 <= len(written) <= 16


def test_the_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Search("bg_mcts", 500, checkpoint=path, identity={"prompt": "sha256:1"}).close()
    Search("bg_mcts", 500, checkpoint=path, identity={"prompt": "sha256:1"})
    for arguments, name in [
        ({"policy": "beam", "budget": 500}, "policy"),
        ({"policy": BgMcts(kappa=2.0), "budget": 500}, "policy"),
        ({"policy": "bg_mcts", "budget": 501}, "budget"),
        ({"policy": "bg_mcts", "budget": 500, "seed": 1}, "seed"),
        ({"policy": "bg_mcts", "budget": 500, "config": CONFIG}, "config"),
        ({"policy": "bg_mcts", "budget": 500, "identity": {"prompt": "sha256:2"}}, "identity"),
    ]:
        with pytest.raises(ValueError, match=f"holds a search with {name} .* fix: another path"):
            Search(**{"identity": {"prompt": "sha256:1"}, **arguments}, checkpoint=path)  # type: ignore[arg-type]


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("", "[1]", "{}", "\x00\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="is not a search checkpoint"):
            Search("bg_mcts", 500, checkpoint=path)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 3"):
        read_snapshot(path)


def test_load_needs_nothing_but_the_file(tmp_path: Path) -> None:
    """Policy options, configuration, extra budget and a cancelled state are in it."""
    path = tmp_path / "run.json"
    search = Search(BgMcts(kappa=0.5), 300, seed=3, config=CONFIG, checkpoint=path)
    drive(search, MODEL, width=1, steps=5)
    search.resume(100)
    search.cancel()
    again = Search.load(path)
    assert fields(again) == fields(search) and again.cancelled
    assert (again.policy.kappa, again.config, again.budget.total) == (0.5, CONFIG, 400)  # type: ignore[attr-defined]


def test_exports(tmp_path: Path) -> None:
    search = Search("bg_mcts", 400, config=CONFIG)
    drive(search, MODEL, width=2)
    first = search.tree.children[ROOT][0]
    search.tree.text[first] = "a\x00b & <c>"
    graph = search.tree.to_networkx()
    told = [n for n in range(len(search.tree)) if search.tree.status[n] not in (NodeStatus.DROPPED, NodeStatus.PENDING)]
    assert sorted(graph.nodes) == told and networkx.is_arborescence(graph)
    assert graph.nodes[first]["q"] == search.tree.q[first]
    search.tree.write_graphml(tmp_path / "tree.graphml")
    read = networkx.read_graphml(tmp_path / "tree.graphml")
    assert read.nodes[str(first)]["text"] == "a\ufffdb & <c>" and read.number_of_edges() == graph.number_of_edges()


def test_elapsed_time_is_carried_over(tmp_path: Path) -> None:
    now = [100.0]
    search = Search("bg_mcts", 500, checkpoint=tmp_path / "run.json", clock=lambda: now[0])
    now[0] = 107.0
    (request,) = search.ask()
    again = Search("bg_mcts", 500, checkpoint=tmp_path / "run.json", clock=lambda: 5.0)
    assert again.budget.elapsed == pytest.approx(7.0)
    assert again.outstanding() == [request] and request.kind == Kind.STEP
    again.tell(request, Completion((1,), "x", score=0.5))
