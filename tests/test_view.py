"""What a person sees of a search: the HTML page (in headless Chromium where there is one), the picture, the live view."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mock_search import MockModel
from specdec.search import Completion, Result, Search, SearchConfig, SearchTree
from specdec.search.layout import tree_layout
from specdec.search.plot import write_plot
from specdec.search.progress import Event, Progress, event_of
from specdec.search.view import node_records, to_html, write_html
from specdec.search.vote import rank_answers

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
HOSTILE = "</script><script>document.title='owned'</script><!--<script> <img src=x onerror=\"document.title='owned'\"> @@DATA@@ \u2028 世界 \ud800"


def grown(budget: int = 600, seed: int = 0, text: str = "", **options: Any) -> tuple[Search, list[Event]]:
    """A search over made-up texts, and its events."""
    rng = random.Random(seed)
    search = Search("bg_mcts", budget=budget, **options)
    events = []
    while requests := search.ask(2):
        for request in requests:
            depth = len(search.tree.path(request.parent))
            answer = str(rng.choice([42, 42, 17])) if depth >= 2 and rng.random() < 0.6 else None
            ids = tuple(rng.randrange(1000) for _ in range(min(request.max_tokens, rng.randint(8, 30))))
            said = f"Step {depth + 1}: {text or 'so it goes'}\nmore of #{request.node}"
            search.tell(request, Completion(ids, said, "eos" if answer else "stop", rng.random(), answer, evaluator_tokens=5))
            events.append(event_of(search, request.node))
    events.append(event_of(search, final=True))
    return search, events


@pytest.fixture(scope="module")
def result() -> Result:
    return grown()[0].result()


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(found))


# ---- records and layout ---------------------------------------------------------------------------------------------------------


def test_records_from_every_source(result: Result) -> None:
    records = node_records(result)
    assert records == node_records(result.tree) == node_records(records)
    assert records == node_records(json.loads(json.dumps(result.tree.to_dict())))
    assert records == node_records({"format": 1, "tree": result.tree.to_dict()})
    assert node_records([{}, {"parent": 0, "q": 0.5, "new": "field"}])[1]["text"] == ""


@pytest.mark.parametrize(
    ("bad", "message"), [([], "no nodes"), ({}, "no nodes"), ([{}, {"parent": 1}], "earlier node"), ([{}, {}], "earlier")]
)
def test_bad_sources(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_records(bad)


def test_layout() -> None:
    layout = tree_layout([-1, 0, 0, 1, 1])
    assert layout.levels == [0, 1, 1, 2, 2] and layout.places == [1.25, 0.5, 2, 0, 1]
    chain = tree_layout(range(-1, 50_000))
    assert chain.levels[-1] == 50_000 and set(chain.places) == {0}


def test_leaves_never_share_a_place() -> None:
    rng = random.Random(1)
    parents = [-1, *(rng.randrange(node) for node in range(1, 500))]
    layout = tree_layout(parents)
    spots = {(level, place) for level, place in zip(layout.levels, layout.places)}
    assert len(spots) == 500


# ---- the page -------------------------------------------------------------------------------------------------------------------


def test_page_holds_the_data_and_nothing_from_outside(result: Result) -> None:
    page = to_html(result, title="A & B", problem="2 < 3", budget=600)
    data = data_of(page)
    assert [record["text"] for record in data["nodes"]] == result.tree.text
    assert data["winner"] == result.node and data["answer"] == result.answer and data["used"] == result.used
    assert sum(record["tokens"] for record in data["nodes"]) == result.used
    assert "<title>A &amp; B</title>" in page
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)


def test_hostile_texts_stay_texts() -> None:
    search, _ = grown(text=HOSTILE)
    page = to_html(search.tree, title=HOSTILE, problem=HOSTILE)
    assert page.count("</script>") == 2 and page.count("<script") == 2
    data = data_of(page)
    assert data["title"] == data["problem"] == HOSTILE and HOSTILE in data["nodes"][1]["text"]
    assert "\u2028" not in page[page.index('id="data"') :]  # it would end a line of script


def test_page_of_nothing() -> None:
    data = data_of(to_html(SearchTree()))
    assert data["winner"] == 0 and data["answers"] == []


def test_winner_without_a_result() -> None:
    records = [
        {},
        {"parent": 0, "q": 0.9},
        {"parent": 0, "q": 0.2, "status": "answered", "answer": "5"},
        {"parent": 0, "status": "dropped"},
    ]
    assert data_of(to_html(records))["winner"] == 2
    assert data_of(to_html(records[:2]))["winner"] == 1


def dump(page: Path, script: str = "") -> str:
    """The DOM after the page and `script` ran."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    if script:
        page.write_text(
            page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
        )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def rows(dom: str) -> list[int]:
    """Nodes of the rows of the collapsible tree."""
    return [int(node) for node in re.findall(r'class="row [^"]*"[^>]* data-node="(\d+)"', dom)]


def test_in_chromium(tmp_path: Path) -> None:
    search, _ = grown(text=HOSTILE)
    result = search.result()
    page = tmp_path / "tree.html"
    write_html(result, page, title="fine", problem=HOSTILE, budget=600)
    script = (
        """
        const report = {title: document.title, rows: [], images: document.images.length};
        const count = () => report.rows.push(document.querySelectorAll("#tree .row").length);
        count();
        document.getElementById("none").click(); count();
        document.querySelector("#tree .fold").click(); count();
        document.getElementById("all").click(); count();
        const search = document.getElementById("search");
        search.value = "#NODE"; search.dispatchEvent(new Event("input")); count();
        search.value = ""; search.dispatchEvent(new Event("input"));
        document.querySelectorAll("#overview .dot")[1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
        report.path = document.querySelectorAll("#path .step").length;
        report.dots = document.querySelectorAll("#overview .dot").length;
        report.answers = document.querySelectorAll("#answers tr.go").length;
        document.body.append(Object.assign(document.createElement("p"), {id: "report", textContent: JSON.stringify(report)}));
    """
    ).replace("NODE", str(result.node))
    dom = dump(page, script)
    found = re.search(r'<p id="report">(.*?)</p>', dom, re.DOTALL)
    assert found is not None, dom[-3000:]
    report = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    kept = sum(status not in ("pending", "dropped") for status in result.tree.status)
    top = len(result.tree.children[0])
    first = result.tree.children[result.tree.children[0][0]]
    assert report["title"] == "fine" and report["images"] == 0  # no text became markup
    assert report["rows"][1:4] == [top, top + len(first), kept - 1]
    assert report["rows"][0] >= len(result.tree.path(result.node)) and 1 <= report["rows"][4] < kept
    assert report["dots"] == kept and report["answers"] == len(result.answers) and report["path"] == 1
    assert sorted(rows(dom)) == [
        node for node in range(1, len(result.tree)) if result.tree.status[node] not in ("pending", "dropped")
    ]


def test_deep_and_large_trees_in_chromium(tmp_path: Path) -> None:
    page = tmp_path / "deep.html"
    deep = [{"parent": node - 1, "q": 0.5, "tokens": 1, "text": "x"} for node in range(600)]
    wide = [{"parent": 0, "q": 0.1, "tokens": 1, "text": "y"} for _ in range(400)]
    write_html([*deep, *wide], page)
    dom = dump(page, "document.getElementById('all').click();")
    assert len(rows(dom)) == 999


# ---- the picture ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plot(result: Result, tmp_path: Path, ending: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"tree.{ending}"
    write_plot(result, path, title="$x <&> é")
    assert path.read_bytes().startswith(magic)


def test_plot_of_nothing_and_of_unscored_nodes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(SearchTree(), tmp_path / "empty.svg")
    write_plot(
        [{}, {"parent": 0, "q": None}, {"parent": 0, "q": 0.5, "unscored": True, "status": "answered"}], tmp_path / "few.svg"
    )
    with pytest.raises(ValueError, match="not supported"):
        write_plot(SearchTree(), tmp_path / "tree.doc")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.search.plot.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"specdec\[reason\]"):
        write_plot(SearchTree(), "tree.svg")


# ---- live -----------------------------------------------------------------------------------------------------------------------


def test_events_follow_the_search() -> None:
    search, events = grown()
    assert [event.used for event in events] == sorted(event.used for event in events)
    assert [event.node for event in events[:-1]] == sorted(range(1, len(events)))
    assert events[-1].status == search.result().status and events[-1].nodes == len(search.tree) - 1
    assert all(event.used <= event.budget == 600 for event in events)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", [MockModel(1, unscored=0.1, repeat=0.3), MockModel(2, answer=0.0), MockModel(3, unscored=0.6)])
def test_answers_read_late_are_those_of_the_event(model: MockModel) -> None:
    """After the end, of searches with requests in flight, without an answer, or handed over to a vote, each against what was found then."""
    search = Search("bg_mcts", 600, config=SearchConfig(step_tokens=20, max_failures=2))
    events, then = [], []
    while requests := search.outstanding() or search.ask(3):
        request = random.Random(len(search.tree)).choice(requests)
        search.tell(request, model(request))
        events.append(event_of(search, request.node))
        then.append((search.result(), tuple(rank_answers(search.tree, "majority" if search.notes else "auto"))))
    assert len(events) > 20 and len({(result.node, result.answers) for result, _ in then}) > 3
    for event, (result, ranked) in zip(events, then):
        assert event.answers == result.answers == ranked
        assert event.steps == tuple(search.tree.steps(result.node))


def test_an_event_ranks_nothing_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import specdec.search.search as module

    ranked = [0]
    monkeypatch.setattr(module, "rank_answers", lambda *args: ranked.append(1) or rank_answers(*args))
    _, events = grown()
    assert len(events) > 20 and sum(ranked) == 1  # for the status of the last
    assert events[-1].answers == events[-1].answers and sum(ranked) == 2


def watched(events: list[Event], terminal: bool) -> str:
    out = io.StringIO()
    ticks = iter(range(10_000))
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with Progress(console, clock=lambda: float(next(ticks))) as progress:
        for event in events:
            progress(event)
        if terminal:
            progress._live.refresh()
    return out.getvalue()


def test_without_a_terminal_it_writes_lines() -> None:
    search, events = grown()
    lines = watched(events, terminal=False).splitlines()
    assert 2 <= len(lines) < len(events)
    result = search.result()
    assert (
        lines[-1]
        == f"problem 0: {result.used} of 600 tokens, {len(search.tree) - 1} steps, answer {result.answer}, {result.status}"
    )


def test_results_of_a_pipe_stay_there(capsys: pytest.CaptureFixture[str]) -> None:
    """`specdec reason --file problems.jsonl > results.jsonl`, watched in a terminal."""
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True)):
        print('{"id": 1}')
    assert capsys.readouterr().out == '{"id": 1}\n' and '"id"' not in out.getvalue()


def test_in_a_terminal_it_shows_budget_answers_and_path() -> None:
    search, events = grown(text="\x1b[2J[red]evil[/red] 世界\x07")
    shown = watched(events, terminal=True)
    result = search.result()
    assert f"{600 - result.used} of 600 tokens left" in shown and "best path" in shown
    assert f"#{result.answers[0].node}" in shown and "[red]evil[/red] 世界" in shown
    assert "\x1b[2J" not in shown and "\x07" not in shown


def test_many_searches_in_one_view() -> None:
    events = [event_of(grown(budget=100, seed=seed)[0], problem=f"p{seed}", final=seed < 3) for seed in range(12)]
    shown = watched(events, terminal=True)
    assert "problem p11" in shown and "and 2 more" in shown


def test_nothing_to_show() -> None:
    assert "no step yet" in watched([], terminal=True)
