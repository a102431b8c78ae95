"""specdec.ray: rows do not depend on workers, batches or retries; a worker killed in mid-run costs nothing but time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import specdec
from specdec.search.config import SearchConfig
from specdec.sequence import SamplingParams
from specdec.state import load_state

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None and not os.environ.get("CI"),
    reason="ray is not installed (pip install 'specdec[ray]'); CI must have it",
)
ROOT = Path(__file__).parents[1]
ROWS = 24
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.9, seed=5)
PROMPTS = [f"row {number} of the data, {'again ' * (number % 5)}" for number in range(ROWS)]
ENGINE: dict[str, Any] = {"budget": 6, "max_rows": 4, "method": "best_first"}
SEARCH: dict[str, Any] = {
    "seed": 7, "temperature": 1.0, "answers": "exact", "step": "tokens:7", "width": 3, "config": SearchConfig(step_tokens=16),
}  # fmt: skip
BUDGET = 150


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two declared CPUs, however many there are, on loopback; one cluster at a time, however many processes run tests."""
    import ray

    found = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # the workers import this checkout
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, runtime_env=found, log_to_driver=False,
            configure_logging=False, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def engine(tiny_folder: str) -> specdec.Engine:
    """What every worker has."""
    return specdec.Engine(*specdec.load(tiny_folder), **ENGINE)


def dataset() -> Any:
    import ray

    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    return ray.data.from_items(rows, override_num_blocks=6)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "specdec.ray", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'specdec\[ray\]'"):
        import specdec.ray  # noqa: F401


def test_specdec_itself_never_imports_ray() -> None:
    code = "import sys, specdec; specdec.Engine, specdec.reason, specdec.generate; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- Generator, in this process -------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.parametrize("key", ["id", None])
def test_rows_do_not_depend_on_their_batch(tiny_folder: str, key: str | None) -> None:
    from specdec.ray import Generator

    generator = Generator(tiny_folder, PARAMS, key=key, **ENGINE)

    def texts(*batches: list[int]) -> dict[int, str]:
        found = {}
        for rows in batches:
            batch = {"id": np.array(rows), "prompt": np.array([PROMPTS[row] for row in rows], object)}
            found |= dict(zip(rows, generator(batch)["text"]))
        return found

    whole = texts(list(range(8)))
    assert texts([7, 1, 0], [4], [2, 3, 6, 5]) == whole
    assert len(set(whole.values())) > 1


@needs_ray
def test_prompts_of_every_kind_and_several_samples(tiny_folder: str) -> None:
    from specdec.ray import Generator

    generator = Generator(tiny_folder, SamplingParams(8, 1.0, seed=1, n=2, ignore_eos=True), **ENGINE)
    prompts = np.empty(3, object)
    prompts[:] = [np.array([5, 6, 7]), np.array([{"role": "user", "content": "hi"}], object), np.str_("text")]
    found = generator({"prompt": prompts})
    expected = generator.engine.generate([[5, 6, 7], [{"role": "user", "content": "hi"}], "text"], SamplingParams(8))
    assert [len(texts) for texts in found["text"]] == [2, 2, 2] and len(expected) == 3
    assert all(first != second for first, second in found["text"])
    assert found["text_tokens"].tolist() == [16, 16, 16] and (found["text_steps"] >= 2).all()
    assert len(generator({"prompt": np.array([], object)})["text"]) == 0


@needs_ray
def test_what_a_generator_refuses(tiny_folder: str) -> None:
    from specdec.ray import Generator

    with pytest.raises(ValueError, match="must have a seed"):
        Generator(tiny_folder, SamplingParams(temperature=1.0))
    with pytest.raises(ValueError, match="share_every must be >= 1"):
        Generator(tiny_folder, share_every=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        Generator(lambda: (None, None))
    with pytest.raises(ValueError, match="dtype is for models that are loaded here, got 'bfloat16' beside a callable"):
        Generator(lambda: specdec.load(tiny_folder), dtype="bfloat16")
    generator = Generator(tiny_folder, PARAMS, key="id", **ENGINE)
    with pytest.raises(ValueError, match="no column 'id', it has 'prompt'"):
        generator({"prompt": np.array(["x"])})
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match="keys must be ints >= 0 or strings"):
            generator({"prompt": np.array(["x"]), "id": np.array([bad])})


@needs_ray
@pytest.mark.parametrize("n", [1, 2])
def test_a_bad_row_has_an_error_and_the_others_their_texts(tiny_folder: str, n: int) -> None:
    from specdec.ray import Generator

    generator = Generator(tiny_folder, replace(PARAMS, n=n), key="id", **ENGINE)
    bad = {
        1: ("", "the prompt is empty"),
        2: ("x" * 5000, "5000 tokens"),
        4: (None, "must be a string"),
        5: ([9999], "vocabulary"),
    }
    prompts = np.empty(6, object)
    prompts[:] = [bad[row][0] if row in bad else PROMPTS[row] for row in range(6)]
    found = generator({"id": np.arange(6), "prompt": prompts})
    good = generator({"id": np.array([0, 3]), "prompt": np.array([PROMPTS[0], PROMPTS[3]], object)})
    assert good["text_error"].tolist() == ["", ""]
    for name in ("text", "text_tokens", "text_error"):
        assert [found[name][row] for row in (0, 3)] == list(good[name])
    for row, (_, message) in bad.items():
        assert message in found["text_error"][row]
        assert found["text"][row] == ("" if n == 1 else []) and found["text_tokens"][row] == found["text_steps"][row] == 0
    nothing = generator({"id": np.arange(1), "prompt": np.array([""], object)})
    assert nothing["text"].tolist() == ["" if n == 1 else []] and nothing["text_error"][0]


@needs_ray
def test_workers_share_what_they_learn(tiny_folder: str, tmp_path: Path) -> None:
    from specdec.ray import Generator

    first = Generator(tiny_folder, PARAMS, warm_state=tmp_path / "warm", share_every=1, **ENGINE)
    first({"prompt": np.array(PROMPTS[:4], object)})
    second = Generator(tiny_folder, PARAMS, warm_state=tmp_path / "warm", **ENGINE)
    text = second.engine.generate(PROMPTS[0], PARAMS).text
    assert text == first.engine.generate(PROMPTS[0], PARAMS).text
    assert len(second.engine.builder.state()["shared.tokens"]) > 100


# ---- on a cluster ---------------------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_leaves_every_row_once_and_equal(
    cluster: None, engine: specdec.Engine, tiny_folder: str, tmp_path: Path
) -> None:
    import specdec.ray

    flag = tmp_path / "killed"

    class Mortal(specdec.ray.Generator):
        """Dies by kill -9 with its second batch generated and not handed over, once in all."""

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            found = super().__call__(batch)
            if self._batches == 2 and not flag.exists():
                flag.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    options = {"model": tiny_folder, "params": PARAMS, "key": "id", "warm_state": tmp_path / "warm", "share_every": 1, **ENGINE}
    rows = dataset().map_batches(
        Mortal, fn_constructor_kwargs=options, batch_size=2, concurrency=2, num_cpus=1
    ).take_all()  # fmt: skip
    assert flag.exists(), "nobody was killed"
    expected = engine.generate(PROMPTS, PARAMS)  # no Ray: one call
    assert sorted(row["id"] for row in rows) == list(range(ROWS))
    assert {row["id"]: row["text"] for row in rows} == {number: result.text for number, result in enumerate(expected)}
    assert {row["id"]: row["text_tokens"] for row in rows} == {n: len(result.token_ids) for n, result in enumerate(expected)}


@needs_ray
@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_been(
    cluster: None, engine: specdec.Engine, tiny_folder: str, tmp_path: Path
) -> None:
    import specdec.ray

    flag = tmp_path / "killed"

    def mortal(problem: str, steps: list[str]) -> float:
        """A score that depends on the text alone; its process dies by kill -9 once, well inside a search."""
        if len(steps) >= 3 and not flag.exists():
            flag.write_text(problem)
            os.kill(os.getpid(), signal.SIGKILL)
        return (sum(map(ord, "".join(steps))) % 97) / 96

    problems = ["What is 2 + 2?", "What is 3 * 3?"]
    options = {"evaluator": mortal, "engine_options": ENGINE, **SEARCH}
    found = dict(specdec.ray.reason_all(tiny_folder, problems, BUDGET, tmp_path / "searches", **options))
    assert flag.exists(), "nobody was killed"
    expected = dict(specdec.reason_all(engine, problems, BUDGET, mortal, **SEARCH))
    for place, problem in enumerate(problems):
        assert (found[place].answer, found[place].used) == (expected[place].answer, expected[place].used)
        assert found[place].tree.to_dict() == expected[place].tree.to_dict()
        if problem == flag.read_text():
            assert found[place].generated < found[place].used, "it began anew"
    again = dict(specdec.ray.reason_all(tiny_folder, problems, BUDGET, tmp_path / "searches", **options))
    assert [again[place].generated for place in range(2)] == [0, 0]


def assert_all_cpus_are_free() -> None:
    import ray

    everything = ray.remote(lambda: "free").options(num_cpus=2)
    assert ray.get(everything.remote(), timeout=120) == "free"


@needs_ray
@pytest.mark.slow
def test_a_search_that_raises_takes_nobody_with_it(
    cluster: None, engine: specdec.Engine, tiny_folder: str, tmp_path: Path
) -> None:
    """The other's result comes, too; and once nobody asks any more, a search that runs gives its CPU back."""
    import ray

    import specdec.ray

    (tmp_path / "0.json").write_text("nonsense")
    problems = ["What is 2 + 2?", "What is 3 * 3?"]
    options = {"evaluator": None, "engine_options": ENGINE, "warm_state": tmp_path / "warm", **SEARCH}
    found = dict(specdec.ray.reason_all(tiny_folder, problems, BUDGET, tmp_path, **options))
    assert isinstance(found[0], ray.exceptions.RayTaskError) and isinstance(found[0].cause, ValueError)
    expected = dict(specdec.reason_all(engine, problems, BUDGET, None, **SEARCH))
    assert found[1].tree.to_dict() == expected[1].tree.to_dict()
    assert len(load_state(tmp_path / "warm", "best_first", engine.target.vocab_size)["shared.tokens"]) > 100

    endless = specdec.ray.reason_all(tiny_folder, problems, 10**9, checkpoints=tmp_path, **options)
    (tmp_path / "1.json").unlink()  # of a smaller budget
    assert next(endless)[0] == 0
    endless.close()
    assert_all_cpus_are_free()


@needs_ray
@pytest.mark.slow
def test_a_search_that_no_interrupt_reaches_gives_its_cpu_back(
    cluster: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import specdec.ray

    begun = tmp_path / "begun"

    def deaf(problem: str, steps: Any) -> float:
        begun.touch()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1)

    monkeypatch.setattr(specdec.ray, "GRACE", 2.0)
    (tmp_path / "0.json").write_text("nonsense")
    searches = specdec.ray.reason_all(
        tiny_folder, ["What is 2 + 2?", "What is 3 * 3?"], BUDGET, tmp_path, evaluator=deaf, engine_options=ENGINE, **SEARCH
    )
    assert next(searches)[0] == 0
    while not begun.exists():
        time.sleep(0.1)
    searches.close()
    assert_all_cpus_are_free()


@needs_ray
@pytest.mark.slow
def test_a_benchmark_that_is_spread_writes_the_texts_of_one_that_is_not(cluster: None, tiny_folder: str, tmp_path: Path) -> None:
    from rich.console import Console

    from bench.run import _measure, _Plan, _spread
    from bench.tasks import Task

    tasks = [Task(f"t{number}", "g", prompt) for number, prompt in enumerate(PROMPTS[:5])]
    params = SamplingParams(max_new_tokens=8)
    plan = _Plan(["none", "ngram"], [4], params, tiny_folder, "float32", None, False, "warm", 1, 1, {"ray": 2})
    spread, labels = _spread(plan, tasks, tmp_path / "out.jsonl", 2)
    whole, same = _measure(plan, tasks, None, Console(quiet=True))
    assert labels == same and len(spread.rows) == 5 * len(labels)
    assert {(row.task, row.method): row.token_ids for row in spread.rows} == {
        (row.task, row.method): row.token_ids for row in whole.rows
    }
    with pytest.raises(ValueError, match="out must be a new file"):
        _spread(plan, tasks, tmp_path / "out.jsonl", 2)
    with pytest.raises(ValueError, match="at most the number of prompts"):
        _spread(plan, tasks, None, 6)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 2.0}], 2, 1, 0),
        ([{"CPU": 16.0, "GPU": 1.0}], 3, 5, 1 / 3),
        ([{"CPU": 8.0, "GPU": 4.0}], 2, 4, 2),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 1, 4, 0),
        ([{"CPU": 1.0}], 4, 1, 0),
    ],
)
def test_what_a_spread_benchmark_declares(nodes: list[dict[str, float]], workers: int, cpus: int, gpus: float) -> None:
    from bench.run import share_of

    assert share_of(nodes, workers) == {"num_cpus": cpus, "num_gpus": gpus}


@needs_ray
def test_the_rates_of_two_workers() -> None:
    """Worker b starts late and ends early: added, it counts as if it had worked throughout."""
    from bench.ray_scaling import added_rate, ratios_of, wall_clock_rate

    rows = [{"worker": "a", "end": float(second), "text_tokens": 10} for second in range(1, 10)]
    rows += [{"worker": "b", "end": second, "text_tokens": 10} for second in (4.0, 5.0, 6.0)]
    assert added_rate(rows) == 80 / 8 + 20 / 2
    assert wall_clock_rate(rows) == 70 / 5  # after second 4: five batches of a, two of b
    assert ratios_of({"no Ray": [20.0], "1 worker": [10.0, 8.0, 12.0], "2 workers": [15.0]}) == {"scaling": 1.5, "overhead": 0.5}
    with pytest.raises(ValueError, match="b had fewer than three batches"):
        wall_clock_rate(rows[:-1])


@needs_ray
@pytest.mark.slow
def test_the_scaling_benchmark_measures_equal_texts(cluster: None, tiny_folder: str) -> None:
    from bench.ray_scaling import wall_clock_rate, with_ray, without_ray

    options = {"model": tiny_folder, "params": SamplingParams(max_new_tokens=4), "key": "id", "max_rows": 2, "dtype": "float32"}
    here, there = without_ray(PROMPTS[:8], 2, options), with_ray(PROMPTS[:8], 2, options, 1)
    assert sorted((row["id"], row["text"]) for row in here) == sorted((row["id"], row["text"]) for row in there)
    assert len({row["worker"] for row in there}) == 1 and len({row["end"] for row in there}) == 4
    assert wall_clock_rate(here) > 0 and wall_clock_rate(there) > 0


@needs_ray
@pytest.mark.slow
def test_the_server_as_a_deployment(cluster: None, engine: specdec.Engine, tiny_folder: str, tmp_path: Path) -> None:
    """Two replicas, which share what their drafts learn."""
    import httpx
    from ray import serve

    import specdec.ray

    def learned() -> int:
        return len(load_state(tmp_path / "warm", "best_first", engine.target.vocab_size)["shared.tokens"])

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    warm = {"warm_state": tmp_path / "warm", "share_every": 0.2}
    try:
        serve.run(specdec.ray.deployment(tiny_folder, "tiny", api_key="secret", num_replicas=2, num_cpus=0.5, **warm, **ENGINE))
        assert serve.status().applications["default"].deployments["specdec"].replica_states == {"RUNNING": 2}
        url, key = f"http://127.0.0.1:{port}/v1/completions", {"authorization": "Bearer secret"}
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.9, "seed": 5}
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        expected = engine.generate(PROMPTS[0], PARAMS).text
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: httpx.post(url, json=body, headers=key, timeout=60).json(), range(16)))
        assert [answer["choices"][0]["text"] for answer in answers] == [expected] * 16
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=key, timeout=60) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        asked = {"problem": "What is 2 + 2?", "budget": BUDGET, "evaluator": None, "step_tokens": 16, "tree": True}
        asked |= {name: value for name, value in SEARCH.items() if name != "config"}
        found = httpx.post(url.replace("completions", "reason"), json={"model": "tiny", **asked}, headers=key, timeout=60).json()
        ((_, search),) = specdec.reason_all(engine, ["What is 2 + 2?"], BUDGET, None, **SEARCH)
        assert found["tree"] == json.loads(json.dumps(search.tree.to_dict()))
        for _ in range(600):
            if learned():
                break
            time.sleep(0.1)
        assert learned(), "nothing was shared"
    finally:
        serve.shutdown()
