"""The things that a benchmark compares: specdec's methods, and transformers' own generate with and without prompt lookup.

One ruler: decode seconds are the seconds of the call after the prefill. specdec reports its prefill; for transformers it ends
when the streamer gets the first new tokens, and the tokens of that first call are not counted either, since their time is not.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

import specdec
from bench.metrics import Row
from bench.tasks import Task
from specdec.draft_tree import TopK
from specdec.learning import top_k
from specdec.sequence import Sequence
from specdec.sources.draft_model import early_exit_layers

__all__ = ["PEERS", "EngineRunner", "PeerRunner", "PrefixEngine", "Runner", "make_runners"]

# Peer -> what it adds to generate(); 10 tokens is what transformers' documentation shows for prompt lookup.
# "assisted" is told its drafter in peer_options().
PEERS: dict[str, dict[str, Any]] = {"model.generate": {}, "prompt_lookup": {"prompt_lookup_num_tokens": 10}, "assisted": {}}
BASELINE = "none"
PrefixMemory = dict[tuple[int, ...], tuple[list[torch.Tensor], list[tuple[int, TopK]]]]


class Runner(Protocol):
    """One method under test."""

    label: str

    def run(self, task: Task, prompt: list[int], params: specdec.SamplingParams) -> Row:
        """Generate once and time it."""

    def reset(self) -> None:
        """Forget what earlier prompts taught."""


REMEMBERED = 10  # prompts whose prefill is kept


class PrefixEngine(specdec.Engine):
    """An Engine that shares the K/V and the top logits of the latest prompts with others, so that all need one prefill.

    Args:
        memory: what is shared; give the same dict to every engine of one model.
    """

    def __init__(self, *args: Any, memory: PrefixMemory, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = memory

    def _prefill(self, seq: Sequence) -> None:
        key = tuple(seq.token_ids[:-1])
        if key not in self.memory:
            harvest: list[tuple[int, TopK]] = []
            self.target.prefill(self.cache, seq.row, key, lambda start, logits: harvest.append((start, top_k(logits, 10))))
            self.memory[key] = ([tensor.clone() for tensor in self.cache.row_tensors(seq.row)], harvest)
            while len(self.memory) > REMEMBERED:
                self.memory.pop(next(iter(self.memory)))
        saved, harvest = self.memory[key]
        self.cache.lengths[seq.row] = len(key)
        for view, tensor in zip(self.cache.row_tensors(seq.row), saved):
            view.copy_(tensor)
        if k := self.builder.top_k:
            for start, top in harvest:
                kept = top.probs[:, :k]
                self.builder.observe_prompt(seq, start, TopK(top.tokens[:, :k], kept / kept.sum(-1, keepdims=True)))


class EngineRunner:
    """specdec with one method and budget, in an engine of its own; with `memory`, which engines share, it prefills no prompt twice."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        method: str,
        budget: int | str,
        memory: PrefixMemory | None = None,
        drafter: Any = None,
    ) -> None:
        self.label = method if method == BASELINE else f"{method}@{budget}"
        self.engine = (
            specdec.Engine(model, tokenizer, method=method, budget=budget, drafter=drafter)
            if memory is None
            else PrefixEngine(model, tokenizer, method=method, budget=budget, drafter=drafter, memory=memory)
        )

    def run(self, task: Task, prompt: list[int], params: specdec.SamplingParams) -> Row:
        start = time.perf_counter()
        result = self.engine.generate([prompt], params)[0]
        wall = time.perf_counter() - start
        prefill = result.times["prefill"]
        return Row(
            task.id, task.group, self.label, len(result.token_ids), result.steps,
            wall - prefill, prefill, result.token_ids, result.times,
        )  # fmt: skip

    def reset(self) -> None:
        self.engine.reset()


class PeerRunner:
    """`model.generate` of transformers, as its users call it."""

    def __init__(self, model: Any, label: str, drafter: Any = None) -> None:
        self.model = model
        self.label = label
        self.options = peer_options(label, drafter)

    def run(self, task: Task, prompt: list[int], params: specdec.SamplingParams) -> Row:
        ids = torch.tensor([prompt], device=self.model.device)
        clock = _StreamClock()
        torch.manual_seed(params.seed or 0)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_new_tokens,
            streamer=clock,
            **_sampling_options(params),
            **self.options,
        )
        end = time.perf_counter()
        first_seen = clock.seconds[0]
        token_ids = output[0, len(prompt) :].tolist()
        return Row(
            task.id, task.group, self.label, len(token_ids) - clock.counts[0], len(clock.counts) - 1,
            end - first_seen, first_seen - start, token_ids,
        )  # fmt: skip

    def reset(self) -> None:
        """transformers keeps nothing between calls."""


class _StreamClock:
    """A streamer that notes when new tokens arrive and how many; generate() hands it the prompt first."""

    def __init__(self) -> None:
        self.saw_prompt = False
        self.seconds: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if self.saw_prompt:
            self.seconds.append(time.perf_counter())
            self.counts.append(value.numel())
        self.saw_prompt = True

    def end(self) -> None:
        """Nothing to flush."""


def _sampling_options(params: specdec.SamplingParams) -> dict[str, Any]:
    if params.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}


def peer_options(label: str, drafter: Any) -> dict[str, Any]:
    """What a peer adds to generate().

    Raises:
        ValueError: "assisted" without a drafter.
    """
    if label != "assisted":
        return PEERS[label]
    if drafter is None:
        raise ValueError('methods has "assisted", which needs a drafter; fix: --drafter, a model, early_exit:8 or mtp')
    if isinstance(drafter, str) and drafter == "mtp":
        return {"use_mtp": True}
    layers = early_exit_layers(drafter)
    return {"assistant_model": drafter} if layers is None else {"assistant_early_exit": layers}


def make_runners(
    model: Any,
    tokenizer: Any,
    methods: list[str],
    budgets: list[int | str],
    share_prefill: bool = False,
    drafter: Any = None,
) -> list[Runner]:
    """One runner a peer and for "none", one a budget for every other method; their engines may share each prompt's prefill.

    Args:
        drafter: for the methods of DRAFTER_METHODS, "auto" and "assisted": a model, "early_exit:8" or "mtp".

    Raises:
        ValueError: a name that is neither a method nor a peer; a drafter missing.
    """
    runners: list[Runner] = []
    memory: PrefixMemory | None = {} if share_prefill else None
    for method in methods:
        if method in PEERS:
            runners.append(PeerRunner(model, method, drafter))
        elif method in specdec.METHODS or method in specdec.DRAFTER_METHODS:
            each = budgets[:1] if method == BASELINE else budgets
            own = drafter if method in specdec.DRAFTER_METHODS or method == "auto" else None
            runners.extend(EngineRunner(model, tokenizer, method, budget, memory, own) for budget in each)
        else:
            names = [*specdec.METHODS, *specdec.DRAFTER_METHODS, *PEERS]
            raise ValueError(f"methods must be among {', '.join(names)}, got {method!r}")
    return runners
