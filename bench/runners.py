"""The things that a benchmark compares: specdec's methods, transformers' own ways to generate, and other packages' drafts.

One ruler: decode seconds are the seconds of the call after the prefill. specdec reports its prefill; for transformers it ends
when the streamer gets the first new tokens, and the tokens of that first call are not counted either, since their time is not.
A batch is one call; each of its prompts has an equal share of its seconds.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

import specdec
from specdec.draft_tree import TopK
from specdec.learning import top_k
from specdec.sequence import Sequence
from specdec.sources.draft_model import early_exit_layers

from .arctic import ARCTIC, ArcticSuffix, missing_arctic
from .metrics import Row, histogram
from .tasks import Task

__all__ = ["PEERS", "EngineRunner", "PeerRunner", "PrefixEngine", "Runner", "make_runners"]

# Peer -> what it adds to generate(); 10 tokens is what transformers' documentation shows for prompt lookup.
# "assisted" is told its drafter in peer_options().
PEERS: dict[str, dict[str, Any]] = {"model.generate": {}, "prompt_lookup": {"prompt_lookup_num_tokens": 10}, "assisted": {}}
ONE_AT_A_TIME = ("prompt_lookup", "assisted")  # transformers refuses batches there
BASELINE = "none"
COMPILED = "+compile"  # after a method's name: its engine has compile=True
MAX_ROWS = 8
PrefixMemory = dict[tuple[int, ...], tuple[list[torch.Tensor], list[tuple[int, TopK]]]]


class Runner(Protocol):
    """One method under test."""

    label: str

    def run(self, tasks: list[Task], prompts: list[list[int]], params: specdec.SamplingParams) -> list[Row]:
        """Generate once for all of the prompts at a time and time it; one row a prompt."""

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
        max_rows: int = MAX_ROWS,
    ) -> None:
        name = method.removesuffix(COMPILED)
        self.label = method if name == BASELINE else f"{method}@{budget}"
        builder = ArcticSuffix(ARCTIC[name]) if name in ARCTIC else name
        options = {"method": builder, "budget": budget, "drafter": drafter, "max_rows": max_rows, "compile": name != method}
        self.engine = (
            specdec.Engine(model, tokenizer, **options)
            if memory is None
            else PrefixEngine(model, tokenizer, **options, memory=memory)
        )

    def run(self, tasks: list[Task], prompts: list[list[int]], params: specdec.SamplingParams) -> list[Row]:
        start = time.perf_counter()
        results = self.engine.generate(prompts, params)
        wall = time.perf_counter() - start
        prefill = sum(result.times["prefill"] for result in results)
        return [
            Row(
                task.id, task.group, self.label, len(result.token_ids), result.steps,
                (wall - prefill) / len(tasks), prefill / len(tasks), result.token_ids, result.times,
                category=task.category, accepted=histogram(result.accept_lengths),
            )
            for task, result in zip(tasks, results)
        ]  # fmt: skip

    def reset(self) -> None:
        self.engine.reset()


class PeerRunner:
    """`model.generate` of transformers, as its users call it."""

    def __init__(self, model: Any, label: str, drafter: Any = None) -> None:
        self.model = model
        self.label = label
        self.options = peer_options(label, drafter)

    def run(self, tasks: list[Task], prompts: list[list[int]], params: specdec.SamplingParams) -> list[Row]:
        ids, mask = _left_padded(prompts, self.model.device)
        clock = _StreamClock()
        torch.manual_seed(params.seed or 0)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=params.max_new_tokens,
            streamer=clock,
            **_sampling_options(params),
            **self.options,
        )
        end = time.perf_counter()
        first_seen = clock.seconds[0]
        eos = _eos_token_ids(self.model)
        rows = []
        for task, row in zip(tasks, output[:, ids.shape[1] :].tolist()):
            token_ids = _until(row, eos)
            lengths = clock.counts[1:] if len(tasks) == 1 else [1] * (len(token_ids) - 1)
            rows.append(
                Row(
                    task.id, task.group, self.label, sum(lengths), len(lengths),
                    (end - first_seen) / len(tasks), (first_seen - start) / len(tasks), token_ids,
                    category=task.category, accepted=histogram(lengths),
                )
            )  # fmt: skip
        return rows

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


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [B, L], the prompts flush right."""
    longest = max(len(prompt) for prompt in prompts)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids.to(device), (torch.arange(longest) >= pads[:, None]).long().to(device)


def _eos_token_ids(model: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def _until(token_ids: list[int], eos: set[int]) -> list[int]:
    """Up to the first end of sequence, itself included: what follows pads a batch."""
    return token_ids[: next((place for place, token in enumerate(token_ids, 1) if token in eos), len(token_ids))]


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


def parse_budgets(text: str) -> list[int | str]:
    """Node budgets, separated by commas.

    Raises:
        ValueError: neither auto nor an integer.
    """
    try:
        return [part if part == "auto" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"budget must be auto or integers, separated by commas, got {text!r}") from error


def make_runners(
    model: Any,
    tokenizer: Any,
    methods: list[str],
    budgets: list[int | str],
    share_prefill: bool = False,
    drafter: Any = None,
    batch: int = 1,
) -> list[Runner]:
    """One runner a peer and for "none", one a budget for every other method; their engines may share each prompt's prefill.

    Args:
        methods: names; "goose@16" has a budget of its own.
        drafter: for the methods of DRAFTER_METHODS, "auto" and "assisted": a model, "early_exit:8" or "mtp".
        batch: most prompts of a run.

    Raises:
        ValueError: a name that is neither a method nor a peer; a drafter or a package missing; a peer that takes no batch.
    """
    runners: list[Runner] = []
    memory: PrefixMemory | None = {} if share_prefill else None
    for entry in methods:
        method, _, own_budget = entry.partition("@")
        if batch > 1 and method in ONE_AT_A_TIME:
            raise ValueError(
                f"methods has {method!r}, which transformers runs one prompt at a time; fix: leave it out, or --batch 1"
            )
        name = method.removesuffix(COMPILED)
        if name in ARCTIC and (reason := missing_arctic()):
            raise ValueError(f"methods has {method!r}: {reason}")
        if method in PEERS and not own_budget:
            runners.append(PeerRunner(model, method, drafter))
        elif name in {*specdec.METHODS, *specdec.DRAFTER_METHODS, *ARCTIC}:
            each = parse_budgets(own_budget) if own_budget else budgets[:1] if name == BASELINE else budgets
            own = drafter if name in specdec.DRAFTER_METHODS or name == "auto" else None
            rows = max(batch, MAX_ROWS)
            runners.extend(EngineRunner(model, tokenizer, method, budget, memory, own, rows) for budget in each)
        else:
            names = [*specdec.METHODS, *specdec.DRAFTER_METHODS, *ARCTIC, *PEERS]
            raise ValueError(
                f'methods must be among {", ".join(names)}, all but the last {len(PEERS)} also with "+compile" and "@budget", got {entry!r}'
            )
    return runners
