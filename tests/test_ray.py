"""specdec.ray: rows do not depend on workers, batches or retries; a worker killed in mid-run costs nothing but time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import specdec
from specdec.search.config import SearchConfig
from specdec.sequence import SamplingParams

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
    generator = Generator(tiny_folder, PARAMS, key="id", **ENGINE)
    with pytest.raises(ValueError, match="no column 'id', it has 'prompt'"):
        generator({"prompt": np.array(["x"])})
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match="keys must be ints >= 0 or strings"):
            generator({"prompt": np.array(["x"]), "id": np.array([bad])})


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


@needs_ray
@pytest.mark.slow
def test_the_server_as_a_deployment(cluster: None, engine: specdec.Engine, tiny_folder: str) -> None:
    import httpx
    from ray import serve

    import specdec.ray

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(specdec.ray.deployment(tiny_folder, "tiny", api_key="secret", num_cpus=0.5, **ENGINE))
        url, key = f"http://127.0.0.1:{port}/v1/completions", {"authorization": "Bearer secret"}
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.9, "seed": 5}
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        answer = httpx.post(url, json=body, headers=key, timeout=60).json()
        assert answer["choices"][0]["text"] == engine.generate(PROMPTS[0], PARAMS).text
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=key, timeout=60) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
    finally:
        serve.shutdown()
