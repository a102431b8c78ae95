"""specdec on Ray: texts for a dataset, the HTTP server as a deployment, searches over many problems. Needs `specdec[ray]`.

    texts = ray.data.read_json("prompts.jsonl").map_batches(
        specdec.ray.Generator,
        fn_constructor_kwargs={"model": "Qwen/Qwen3-0.6B", "params": SamplingParams(max_new_tokens=128), "key": "id"},
        batch_size=32, concurrency=2, num_cpus=4,
    )

Ray schedules, moves the data and starts a dead worker's part anew; specdec makes that harmless: a row's text depends on its key, the
model and the parameters, and not on the worker, on its batch or on how often it was tried (in half precision up to near-ties, see
README). A worker uses what was declared to Ray and no more: as many threads as CPUs, and a GPU only where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError

try:
    import ray
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise ImportError("specdec.ray needs ray; fix: pip install 'specdec[ray]'") from error

from specdec.engine import Engine
from specdec.models import load
from specdec.search.reason import ReasonResult
from specdec.search.reason import reason_all as reason_here
from specdec.search.request import GenerationError
from specdec.sequence import SamplingParams

if TYPE_CHECKING:
    from ray.serve import Application

    from specdec.serve.app import Limits

__all__ = ["Generator", "deployment", "reason_all"]

GRACE = 10.0  # seconds for a task to end after it was interrupted

Model = (
    str | Path | Callable[[], tuple[Any, Any]] | None
)  # folder or hub name, what makes (model, tokenizer), or the embedded one


class Generator:
    """Completes a column of prompts: a callable class for `ray.data.Dataset.map_batches`, with one engine a worker.

    A batch gets four columns more: `output` (the text; with n > 1 a list of them), `output`_tokens and `output`_steps (new tokens
    and verification steps, over all samples), and `output`_error: "", or why the row's prompt was refused (empty, longer than the
    context, no prompt at all), whose text is "" then. One bad row does not end a job.

    Args:
        model: local folder or hub name, a callable that makes (model, tokenizer), or None: the embedded model.
        params: how to sample; with a temperature it needs a seed, so that a row that is tried again gets its text again.
        prompt: column of strings, chats or lists of token ids.
        output: column of the texts.
        key: column of ints >= 0 or strings that tell rows apart. Row i of key i has the text that `Engine.generate` gives the i-th
            prompt of a list. None: the prompt itself, so that equal prompts get equal samples.
        warm_state: file that the workers of a node share, see Engine.share_state.
        share_every: batches between two looks at it.
        options: of `Engine` (max_rows, method, budget, ...), and `dtype`.

    Raises:
        ValueError: a temperature without a seed, share_every < 1; at the call, a missing column or a key of another type.
    """

    def __init__(
        self,
        model: Model = None,
        params: SamplingParams | None = None,
        *,
        prompt: str = "prompt",
        output: str = "text",
        key: str | None = None,
        warm_state: str | Path | None = None,
        share_every: int = 16,
        **options: Any,
    ) -> None:
        self.params = params or SamplingParams()
        if self.params.temperature > 0 and self.params.seed is None:
            raise ValueError("params must have a seed where temperature > 0, or a retried row gets another text; fix: seed=0")
        if share_every < 1:
            raise ValueError(f"share_every must be >= 1 (batches), got {share_every}")
        self.prompt, self.output, self.key = prompt, output, key
        self.warm_state, self.share_every = warm_state, share_every
        self.engine = _engine(model, **options)
        self._batches = 0
        self._share()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = [_plain(prompt) for prompt in self._column(batch, self.prompt)]
        keys = prompts if self.key is None else self._column(batch, self.key)
        places = [_place(key if self.key is not None else repr(key)) for key in keys]
        encoded, errors = self._encode(prompts)
        results = iter(
            self.engine.generate(list(encoded.values()), self.params, [places[row] for row in encoded]) if encoded else []
        )
        samples = [list(islice(results, self.params.n)) if row in encoded else [] for row in range(len(prompts))]
        texts = np.empty(len(samples), object)
        for row, found in enumerate(samples):
            texts[row] = "".join(result.text for result in found) if self.params.n == 1 else [result.text for result in found]
        self._batches += 1
        if self._batches % self.share_every == 0:
            self._share()
        return {
            **batch,
            self.output: texts,
            f"{self.output}_tokens": np.array([sum(len(result.token_ids) for result in found) for found in samples], np.int64),
            f"{self.output}_steps": np.array([sum(result.steps for result in found) for found in samples], np.int64),
            f"{self.output}_error": np.array([errors.get(row, "") for row in range(len(samples))], object),
        }

    def _encode(self, prompts: list[Any]) -> tuple[dict[int, list[int]], dict[int, str]]:
        """Token ids of the rows whose prompts are good, and what is wrong with the others."""
        encoded, errors = {}, {}
        for row, prompt in enumerate(prompts):
            try:
                ids = self.engine.encode(prompt)
                self.engine._check_prompt(ids, self.params)
            except (ValueError, TemplateError) as error:
                errors[row] = str(error)
            else:
                encoded[row] = ids
        return encoded, errors

    def _column(self, batch: dict[str, np.ndarray], name: str) -> np.ndarray:
        if name not in batch:
            raise ValueError(f"the dataset has no column {name!r}, it has {', '.join(map(repr, batch))}")
        return batch[name]

    def _share(self) -> None:
        if self.warm_state is not None:
            self.engine.share_state(self.warm_state)


def deployment(
    model: Model = None,
    name: str = "",
    limits: Limits | None = None,
    api_key: str | None = None,
    *,
    num_replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    warm_state: str | Path | None = None,
    share_every: float = 60.0,
    **options: Any,
) -> Application:
    """The server of `specdec serve` as a Ray Serve application: `ray.serve.run(specdec.ray.deployment(...))`.

    Args:
        model: as in Generator.
        name, limits, api_key: as in specdec.serve.app.make_app; the key travels to the replicas with the application.
        num_replicas: engines; Ray Serve spreads the requests.
        num_cpus, num_gpus: of each replica.
        warm_state, share_every: file that the replicas of a node share, and seconds between two looks at it, as in make_app.
        options: of `Engine`, and `dtype`.

    Raises:
        ImportError: ray[serve] or specdec[serve] is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError("specdec.ray.deployment needs ray[serve]; fix: pip install 'specdec[ray,serve]'") from error

    from specdec.serve.app import Limits, make_app

    limits = limits or Limits()

    def build() -> Any:
        """Runs in the replica."""
        engine, served = _engine(model, **options), name or str(model or "embedded").rstrip("/").rsplit("/", 1)[-1]
        return make_app(engine, served, limits, api_key, warm_state=warm_state, share_every=share_every)

    replica = serve.deployment(
        serve.ingress(build)(),
        name="specdec",
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        # The engine's queue decides about 429, as without Ray: what is below it must reach it.
        max_ongoing_requests=limits.waiting + int(options.get("max_rows", 8)) + 16,
    )
    return replica.bind()


def reason_all(
    model: Model,
    problems: Iterable[str],
    budget: int = 2000,
    checkpoints: str | Path | None = None,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_retries: int = 3,
    warm_state: str | Path | None = None,
    engine_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[tuple[int, ReasonResult | GenerationError | RayError]]:
    """`specdec.reason_all` with a Ray task a problem; yields (place, result) as they end. Their `resume` is not there.

    What a task raised (a bad option, a checkpoint of another search) or why it could not end (its worker died too often) comes in the
    place of its result, and the others go on. Tasks that still run when nobody asks for results any more are cancelled.

    A worker's process keeps its engine from task to task. A task whose worker died is tried again and goes on from its checkpoint;
    the result is that of a search that was never interrupted, for a search depends on its place and seed alone.

    Args:
        model: as in Generator.
        problems, budget: as in specdec.reason_all.
        checkpoints: folder that all workers see, for a file a problem; files that are there are resumed. None: a retry begins anew.
        num_cpus, num_gpus: of each task.
        max_retries: of a task whose worker died.
        warm_state: file that the workers of a node share before and after every search, see Engine.share_state.
        engine_options: of `Engine`, and `dtype`.
        options: of specdec.reason_all (evaluator, policy, seed, temperature, ...), which can be pickled.
    """
    folder = None if checkpoints is None else Path(checkpoints).resolve()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    task = ray.remote(_reason).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries)
    recipe = ray.cloudpickle.dumps(partial(_engine, model, **(engine_options or {})))
    state = None if warm_state is None else Path(warm_state).resolve()
    running = {
        task.remote(recipe, place, problem, budget, None if folder is None else folder / f"{place}.json", state, options): place
        for place, problem in enumerate(problems)
    }
    try:
        while running:
            (ended,), _ = ray.wait(list(running))
            yield running.pop(ended), _result_of(ended)
    finally:
        _stop(list(running))


def _stop(tasks: list[Any]) -> None:
    """Interrupt them. One that does not end for that, since an interrupt may be lost while a process starts or in a callback, loses
    its process: a search goes on from its checkpoint wherever it was killed."""
    for task in tasks:
        ray.cancel(task)
    deaf = ray.wait(tasks, num_returns=len(tasks), timeout=GRACE)[1] if tasks else []
    for task in deaf:
        ray.cancel(task, force=True)


def _result_of(ended: Any) -> ReasonResult | GenerationError | RayError:
    try:
        result, failure = ray.get(ended)
    except RayError as error:
        return error
    return result if failure is None else GenerationError(failure, result)


def _reason(
    recipe: bytes, place: int, problem: str, budget: int, checkpoint: Path | None, state: Path | None, options: dict[str, Any]
) -> tuple[ReasonResult, str | None]:
    """One search, in a worker: result, why it failed. A GenerationError itself does not pickle."""
    files, engine = None if checkpoint is None else [checkpoint], _kept_engine(recipe)
    if state is not None:
        engine.share_state(state)
    ((_, found),) = reason_here(engine, [problem], budget, checkpoints=files, places=[place], **options)
    if state is not None:
        engine.share_state(state)
    result, failure = (found.result, str(found)) if isinstance(found, GenerationError) else (found, None)
    assert isinstance(result, ReasonResult)
    return replace(result, _go_on=None), failure  # what goes on holds the engine


@lru_cache(maxsize=1)
def _kept_engine(recipe: bytes) -> Engine:
    """The engine of this worker's process."""
    engine: Engine = ray.cloudpickle.loads(recipe)()
    return engine


def _engine(model: Model, dtype: str | None = None, **options: Any) -> Engine:
    """An engine on the resources that Ray assigned to this worker; outside of Ray, on those of the process.

    Raises:
        ValueError: a model without a tokenizer, a dtype for a model that is made elsewhere, or a bad option.
    """
    if callable(model) and dtype is not None:
        raise ValueError(
            f"dtype is for models that are loaded here, got {dtype!r} beside a callable; fix: let it make one of that dtype"
        )
    device = None
    if ray.is_initialized() and (context := ray.get_runtime_context()).worker.mode == ray.WORKER_MODE:
        assigned = context.get_assigned_resources()
        torch.set_num_threads(max(1, int(assigned.get("CPU", 1))))
        device = "cuda" if assigned.get("GPU", 0) > 0 else "cpu"
    loaded, tokenizer = model() if callable(model) else load(model, dtype, device)
    if tokenizer is None:
        raise ValueError("model has no tokenizer, and columns hold texts; fix: a callable that returns (model, tokenizer)")
    return Engine(loaded, tokenizer, **options)


def _plain(prompt: Any) -> Any:
    """A prompt as Python has it: Ray hands over numpy's types."""
    if isinstance(prompt, np.ndarray):
        return [_plain(part) for part in prompt]
    return prompt.item() if isinstance(prompt, np.generic) else prompt


def _place(key: Any) -> int:
    """Where a row's randomness comes from: the int itself, or 63 bits of the string.

    Raises:
        ValueError: neither, or negative.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and key >= 0:
        return int(key)
    if not isinstance(key, str):
        raise ValueError(f"keys must be ints >= 0 or strings, got {key!r:.80}")
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
