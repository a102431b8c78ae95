"""Engine: the one loop. draft -> verify (one forward) -> accept -> commit -> learn.

Worked example, greedy, root "the", tree {the: {cat: {sat}, dog}}: the forward gives the model's next token after each node; it
says "cat" after the root, "sat" after "cat" and "on" after "sat": the step keeps the K/V of the, cat, sat and emits cat, sat, on
(the bonus token), which is the next root.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec._jit import HAVE_NUMBA
from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.kv_cache import KVCache
from specdec.learning import top_k
from specdec.methods import make_builder
from specdec.pacing import Pacer
from specdec.prefix_backend import FlashAttention
from specdec.randomness import Randomness, draw_seed
from specdec.sampling import Law, build_processor
from specdec.segments import BLOCK, TextStore
from specdec.sequence import SamplingParams, Sequence
from specdec.sources.draft_model import DraftModel, make_drafter
from specdec.target import TargetModel
from specdec.text import Detokenizer, cut_at_stop, stop_string_check
from specdec.trees.base import TreeBuilder
from specdec.trees.by_model import Drafted
from specdec.trees.by_rate import ByRate
from specdec.verify.rules import RULES, UNVISITED

__all__ = ["Engine", "Result", "TextScore"]

Prompt = "str | list[int] | list[dict[str, str]] | torch.Tensor"
logger = logging.getLogger("specdec")
_STATEFUL = (
    "PrefixConstrainedLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)  # fmt: skip
WARM_UP_TOKENS = 3000
PHASES = ("prefill", "draft", "forward", "accept", "commit", "learn")


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request.

    Attributes:
        token_ids: the new tokens (an ending EOS or stop token included).
        text: their text, special tokens skipped, cut before the first stop string ("" without a tokenizer).
        finish_reason: "eos", "stop" (stop token, stop string, stopping criterion) or "length".
        prompt_tokens: tokens of the prompt.
        steps: verification forwards.
        accept_lengths: tokens emitted by each step (accepted drafts + 1).
        logprobs: log-probability of each token under the processed law, if asked for.
        times: seconds by phase; a batch's phases are shared equally among its rows.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    steps: int
    accept_lengths: list[int]
    logprobs: list[float] | None
    times: dict[str, float]

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted tokens: emitted tokens / steps."""
        return len(self.token_ids) / max(1, self.steps)


@dataclass(frozen=True, slots=True)
class TextScore:
    """How probable a text is under the model."""

    logprobs: list[float]  # of token_ids[start:], by the model's own law (temperature 1, nothing truncated)
    logits: torch.Tensor  # [V] after the last token


@dataclass(slots=True)
class StepStats:
    """What the last step did (benchmarks, pacing)."""

    rows: int = 0
    nodes: int = 0  # largest tree
    emitted: int = 0
    by_model: bool = False  # a draft model ran: its forwards are in the time of "draft"
    times: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


class Engine:
    """Generates with speculation; what the draft sources learn is kept between calls.

    Args:
        model: a decoder-only Hugging Face causal language model (PEFT-wrapped too).
        tokenizer: needed for string or chat prompts, texts and stop strings.
        method: a name of specdec.METHODS, or a TreeBuilder of your own.
        budget: most nodes of a draft tree, root included (a hard cap), or "auto": chosen from the measured cost model.
        max_rows: sequences decoded at once; further prompts wait for a free row.
        state: file of a state saved by save_state, to start warm.
        prefix_backend: "op", or on CUDA "flash_attn": flash-attn attends to the committed tokens and specdec's op to the trees.
        drafter: a smaller model of the same tokenizer, its folder or hub name, "early_exit:8" (the model's own first 8 layers) or
            "mtp" (the extra prediction layer of its checkpoint); for the methods of specdec.DRAFTER_METHODS and for "auto", which
            uses it where that is faster.
        compile: run the steps (and those of a drafter of its own) as machine code compiled for this machine, which takes a minute
            or two, once: the package is kept in the cache folder. On CUDA: as captured graphs. The output stays the same.

    Raises:
        UnsupportedModelError: the model cannot be accelerated without risking its output, or cannot be compiled.
        ValueError: unknown method, budget < 1, max_rows < 1, a prefix_backend that cannot run here, a drafter of another tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        method: Any = "auto",
        budget: int | str = "auto",
        max_rows: int = 8,
        state: str | Path | None = None,
        prefix_backend: str | FlashAttention = "op",
        drafter: Any = None,
        compile: bool = False,
    ) -> None:
        if budget != "auto" and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ValueError(f'budget must be "auto" or an int >= 1 (nodes a tree, root included), got {budget!r}')
        if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 1:
            raise ValueError(f"max_rows must be an int >= 1, got {max_rows!r}")
        self._model = model  # kept alive for as long as the engine; the target only refers to it
        self.target = TargetModel(model, prefix_backend=prefix_backend, compile=compile)
        self.tokenizer = _checked_tokenizer(tokenizer, self.target.vocab_size)
        self.budget, self.max_rows = budget, max_rows
        self.method = method if isinstance(method, str) else type(method).__name__
        self.pacer = Pacer(self.target, budget)
        draft_model = None if drafter is None else make_drafter(drafter, model, self.tokenizer, self.target.vocab_size, compile)
        if draft_model is not None and draft_model.reader.ranks.size != self.target.ranks.size:
            raise ValueError(
                f"{self.target.ranks.size} processes share the model and {draft_model.reader.ranks.size} the drafter; fix: load the "
                'drafter with DistributedConfig(tp_plan="auto") too, or take "early_exit:8"'
            )
        self.builder = make_builder(method, self.target.vocab_size, self.pacer.cost_model, draft_model)
        self.rule: str = getattr(self.builder, "rule", "match")
        self._accept_rule = RULES[self.rule]
        warm_up(self.builder, self.target.vocab_size, self.target.dtype)
        self.cache: KVCache = self.target.new_cache(1, 256)
        self._attach()
        self.rows: list[Sequence] = []  # live sequences; sequence i owns cache row i
        self.waiting: deque[Sequence] = deque()
        self.last_step = StepStats()
        self._ids = itertools.count(1)  # next() is atomic: sequences are made in any thread
        self._lock = threading.RLock()
        if state is not None:
            self.load_state(state)

    @property
    def _drafter(self) -> DraftModel | None:
        drafter = getattr(self.builder, "model", None)
        return drafter if isinstance(drafter, DraftModel) else None

    def _attach(self) -> None:
        if self._drafter is not None:
            self._drafter.attach(self.target, self.cache)
        if self.target.compiled is not None and self._needs_states:
            raise ValueError('drafter "mtp" reads hidden states, which compile=True does not give; fix: one of the two')

    # ---- requests -------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Any, params: SamplingParams | Seq[SamplingParams] | None = None, places: Seq[int] | None = None
    ) -> Any:
        """Complete one prompt or many.

        Args:
            prompts: a string, a chat (list of {"role", "content"}), a list of token ids or a 1-D tensor; or a list of those.
            params: one SamplingParams for all, or one a prompt.
            places: of the prompts, on which their randomness depends; None: 0, 1, 2 ...

        Returns:
            A Result for a single prompt with n = 1; otherwise a list, prompt by prompt, a prompt's samples beside each other.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, a prompt longer than the context, text without a tokenizer.
        """
        items, single = _as_list(prompts)
        each = _params_for(params, len(items))
        if places is not None and len(places) != len(items):
            raise ValueError(f"places must have one entry a prompt, got {len(places)} for {len(items)} prompts")
        with self._lock:
            sequences = self._sequences(items, each, places)
            self.run(sequences)
            results = [self._result(seq) for seq in sequences]
        return results[0] if single and len(results) == 1 else results

    def score(self, token_ids: Seq[int], start: int = 1, store: TextStore | None = None) -> TextScore:
        """Read a text without generating: one prefill, in blocks, with K/V of its own.

        Args:
            token_ids: prompt and text.
            start: log-probabilities are given from this place on, 1 <= start <= len(token_ids).
            store: K/V of texts that were read, of the same weights: what this text begins with is taken from there, what is new is
                left there. The score is the same to the bit.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, a text longer than the context, `start` outside.
        """
        ids = [int(token) for token in token_ids]
        self._check_prompt(ids, SamplingParams(max_new_tokens=1))
        if not 1 <= start <= len(ids):
            raise ValueError(f"start must be in [1, {len(ids)}], the number of tokens, got {start}")
        first = min(start, len(ids)) - 1  # whose logits are wanted
        logprobs: list[float] = []
        last: list[torch.Tensor] = []

        def observe(place: int, logits: torch.Tensor) -> None:
            following = ids[read + place + 1 : read + place + 1 + len(logits)]
            if start < len(ids) and following:
                scored = logits[: len(following)].float()
                chosen = scored.gather(1, torch.tensor(following, device=scored.device)[:, None])[:, 0]
                logprobs.extend((chosen - scored.logsumexp(-1)).tolist())
            last[:] = [logits[-1].clone()]

        if self.target.rope.past(len(ids)):  # the whole text has frequencies of its own
            store = None
        with self._lock:
            cache = self.target.new_cache(1, len(ids) + 1)
            read = store.load(ids[:first], cache) if store is not None else 0
            with self.target.unwatched():
                self.target.prefill(cache, 0, ids[read:], observe, first - read, BLOCK)
            if store is not None:
                store.save(ids[:first], cache)
        return TextScore(logprobs, last[0])

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one prompt as it is generated; closing the iterator frees its row."""
        if self.tokenizer is None:
            raise ValueError("stream needs a tokenizer to make text; fix: Engine(model, tokenizer)")
        (each,) = _params_for(params, 1)
        if each.n != 1:
            raise ValueError(f"stream gives one text, params asks for n={each.n}; fix: n=1, or Engine.generate")
        with self._lock:
            (seq,) = self._sequences([prompt], [each])
        detokenizer = Detokenizer(self.tokenizer, seq.params.stop_strings)
        with self._running([seq]):
            final = False
            while not final:
                with self._lock:
                    if not seq.finished:  # another stream of this engine may have finished it since the last piece
                        self.step()
                    final, output_ids = seq.finished, seq.output_ids
                _raise_errors([seq])
                if piece := detokenizer.push(output_ids, final):
                    yield piece

    def run(self, sequences: list[Sequence]) -> None:
        """Step until all of them have finished; if that is interrupted, they are cancelled and the engine stays usable."""
        with self._lock, self._running(sequences):
            while any(not seq.finished for seq in sequences):
                self.step()
                _raise_errors(sequences)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; step() admits it when a row is free."""
        self.waiting.append(seq)

    def new_sequence(self, token_ids: list[int], params: SamplingParams, randomness: Randomness, **fields: Any) -> Sequence:
        """A validated Sequence with a fresh id. `fields` as in Sequence (pad_ids, processor, stop_check, eos_token_ids, record).

        Drafts that depend on earlier requests, which may have had the same seed, are tested with coins that those did not have:
        the law of every text stays the model's, whatever was learned, and the seed alone does not fix it (verification.md 4.5).
        The noise of `match` may be reused.
        """
        self._check_prompt(token_ids, params)
        if self.rule in UNVISITED:
            _refuse_state(self.rule, fields.get("processor"))
        number = next(self._ids)
        if self.rule != "match" and getattr(self.builder, "remembers", True):
            randomness = randomness.apart(number)
        return Sequence(number, token_ids, params, randomness, **fields)

    def cancel(self, seq: Sequence) -> None:
        """Stop a sequence, wherever it is, and free its row."""
        with self._lock:
            if seq in self.waiting:
                self.waiting.remove(seq)
            if not seq.finished:
                seq.finish_reason = "cancelled"
            if seq.row >= 0:
                self._release(seq)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Admit waiting prompts, then verify one draft tree a row in one forward."""
        with self._lock:
            stats = self.last_step = StepStats()
            self._release_finished()  # an interrupt may have left some
            with _timed(stats, "prefill"):
                self._admit()
                self._rebuild_past_threshold()
            live = self._same_side()
            if not live:
                return
            with _timed(stats, "draft"):
                trees = self._draft(live)
            stats.by_model = any(isinstance(tree.evidence, Drafted) for tree in trees)
            with _timed(stats, "forward"):
                logits = self.target.forward(self.cache, trees, first_row=live[0].row)
            with _timed(stats, "learn"):
                top = self._reduce(logits)
            for index, (seq, tree) in enumerate(zip(live, trees)):
                self._accept(seq, tree, logits[index, : len(tree)], None if top is None else top[index][: len(tree)], stats)
            stats.rows, stats.nodes = len(live), max(len(tree) for tree in trees)
            stats.times = self.target.ranks.first(stats.times)  # what the next trees are sized by
            self.pacer.observe(stats, max(self.cache.starts, default=0))
            for seq in live:
                _share_times(seq, stats, len(live))
            self._release_finished()

    def _draft(self, live: list[Sequence]) -> list[DraftTree]:
        depths = [self._depth_limit(seq) for seq in live]
        longest = max(len(seq.token_ids) for seq in live)
        budget = self.pacer.budget(len(live), longest, self.builder.sizes_itself)
        budgets = [budget if depth > 0 else 1 for depth in depths]
        if all(most == 1 for most in budgets):
            return [DraftTree.root_only(seq.token_ids[-1]) for seq in live]
        return self.builder.build(live, budgets, depths)

    def _depth_limit(self, seq: Sequence) -> int:
        """Drafting deeper than the text may grow is waste; past the context or a RoPE threshold it is wrong."""
        position = len(seq.token_ids) - 1
        limits = [seq.remaining - 1]
        if self.target.max_positions is not None:
            limits.append(self.target.max_positions - 1 - position)
        if (rope := self.target.rope.depth_limit(position)) is not None:
            limits.append(rope)
        return max(0, min(limits))

    def _reduce(self, logits: torch.Tensor) -> list[TopK] | None:
        """The learning pass: top-k logits of every node."""
        if not self.builder.top_k:
            return None
        rows, nodes = logits.shape[:2]
        flat = top_k(logits.flatten(0, 1), self.builder.top_k)
        return [flat[row * nodes : (row + 1) * nodes] for row in range(rows)]

    def _accept(self, seq: Sequence, tree: DraftTree, logits: torch.Tensor, top: TopK | None, stats: StepStats) -> None:
        """One row's accept, commit and learn. A row that fails (a raising processor, NaN logits) fails alone, see _fail."""
        try:
            with _timed(stats, "accept"):
                keep = seq.record is not None and seq.record.keeps_scores
                law = Law(logits, tree, seq, keep, None if top is None else top.argmax)
                verdict = self._accept_rule(tree, law, seq.randomness)
                emitted = [int(tree.tokens[node]) for node in verdict.nodes[1:]] + [verdict.next_token]
                if seq.record is not None:
                    seq.record.judged(law, verdict)
                kept = seq.append(emitted)
                if seq.record is not None:
                    seq.record.emitted(seq, kept)
                if seq.params.logprobs is not None:
                    seq.logprobs += [law.logprob(int(node), token) for node, token in zip(verdict.nodes[:kept], emitted)]
                verdict = Verdict(verdict.nodes[:kept], emitted[kept - 1])
                seq.accept_lengths.append(kept)
                stats.emitted += kept
            with _timed(stats, "commit"):
                self.cache.commit(seq.row, verdict.nodes.tolist())
            with _timed(stats, "learn"):
                self.builder.update(seq, tree, verdict, top)
        except BaseException as error:
            self._fail(seq, error)

    # ---- rows -----------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.rows) < self.max_rows:
            seq = self.waiting.popleft()
            if seq.finished:
                continue
            row = len(self.rows)
            try:
                self.cache.reserve(row + 1, len(seq.token_ids) + 64)  # for want of memory, this prompt alone fails
                self.cache.lengths[row] = 0
                seq.row = row
                self.rows.append(seq)
                self.builder.start(seq)
                self._prefill(seq)
            except BaseException as error:
                self._release(seq)
                self._fail(seq, error)

    def _fail(self, seq: Sequence, error: BaseException) -> None:
        """End one row with an error, which its owner (run, stream) raises: whoever steps may be another. An interrupt is raised here too.

        The row is freed at the end of the step: until then the K/V of other rows' trees are not committed and cannot move.
        """
        seq.finish_reason, seq.error = "error", error
        if not isinstance(error, Exception):
            raise error

    def _release_finished(self) -> None:
        for seq in [seq for seq in self.rows if seq.finished]:
            self._release(seq)

    def _prefill(self, seq: Sequence) -> None:
        """Commit the prompt but its last token; what the request's store holds, or a live row with the same prompt, is copied."""
        prompt = seq.token_ids[:-1]
        if seq.store is not None and self._may_copy:
            seq.cached_tokens = seq.store.load(self.cache, seq.row)
        # A row's last token is not in the cache: only a longer row holds the whole prompt.
        longer = (other for other in self.rows[:-1] if len(other.token_ids) > len(prompt) > 0)
        twin = next((other for other in longer if other.token_ids[: len(prompt)] == prompt), None)
        if twin is not None and self._may_copy and seq.cached_tokens < len(prompt):
            self.cache.fork(twin.row, seq.row, len(prompt))
            seq.cached_tokens = len(prompt)
        known = seq.cached_tokens

        def observe(start: int, logits: torch.Tensor) -> None:
            self.builder.observe_prompt(seq, known + start, top_k(logits, self.builder.top_k))

        if known < len(prompt):
            self.target.prefill(self.cache, seq.row, prompt[known:], observe if self.builder.top_k else None)

    @property
    def _needs_states(self) -> bool:
        return self._drafter is not None and self._drafter.needs_states

    @property
    def _may_copy(self) -> bool:
        """Whether K/V that another request computed are this one's too, and nothing else is needed of the prompt."""
        return self.target.rope.kind is None and not self._needs_states

    def _rebuild_past_threshold(self) -> None:
        """longrope: the first token past the threshold changes the frequencies of the whole cache, as in transformers."""
        for seq in self.rows:
            if self.target.rope.recompute(len(seq.token_ids) - 1) and seq.output_length > 0:
                self.cache.lengths[seq.row] = 0
                self.target.prefill(self.cache, seq.row, seq.token_ids[:-1])

    def _same_side(self) -> list[Sequence]:
        """The rows of this step: all, unless a RoPE threshold separates them; then a consecutive run of rows on one side."""
        if not self.rows or self.target.rope.kind is None:
            return list(self.rows)
        sides = [self.target.rope.past(len(seq.token_ids) - 1) for seq in self.rows]
        first = min(range(len(self.rows)), key=lambda row: len(self.rows[row].accept_lengths))  # the one that waited longest
        last = first
        while last + 1 < len(self.rows) and sides[last + 1] == sides[first]:
            last += 1
        return self.rows[first : last + 1]

    def _release(self, seq: Sequence) -> None:
        """Free a row; the last live row moves into it, so that live rows stay consecutive."""
        row, last = seq.row, len(self.rows) - 1
        if row < 0:
            return
        if seq.store is not None and seq.finish_reason in ("eos", "stop", "length") and self._may_copy:
            seq.store.save(self.cache, row)
        if row != last:
            self.cache.fork(last, row)
            self.rows[row] = self.rows[last]
            self.rows[row].row = row
        self.rows.pop()
        self.cache.release(last)
        seq.row = -1
        self.builder.finish(seq)

    @contextmanager
    def _running(self, sequences: list[Sequence]) -> Iterator[None]:
        """Queue the sequences; however the block ends, none of them keeps a row."""
        try:
            with self._lock:
                for seq in sequences:
                    self.add(seq)
            yield
        finally:
            for seq in sequences:
                if not seq.finished or seq.row >= 0:
                    self.cancel(seq)

    # ---- input and output -----------------------------------------------------------------------------------------------

    def _sequences(self, items: list[Any], params: Seq[SamplingParams], places: Seq[int] | None = None) -> list[Sequence]:
        """One Sequence a prompt and sample. A prompt's stream is its place in the call, so batching cannot change its text."""
        drawn: int | None = None
        sequences = []
        for index, item, each in zip(range(len(items)) if places is None else places, items, params):
            token_ids = self.encode(item)
            seed = each.seed
            if seed is None and each.temperature > 0:
                drawn = self.target.ranks.first(draw_seed()) if drawn is None else drawn
                seed = drawn
            for sample in range(each.n):
                eos = self.eos_token_ids() if not each.ignore_eos else frozenset()
                sequences.append(
                    self.new_sequence(
                        list(token_ids),
                        each,
                        Randomness(seed or 0, (index, sample)),
                        eos_token_ids=eos,
                        processor=build_processor(each, eos, len(token_ids)),
                        stop_check=self._stop_check(each),
                    )
                )
        return sequences

    def _stop_check(self, params: SamplingParams) -> Callable[[Sequence], bool] | None:
        if not params.stop_strings:
            return None
        if self.tokenizer is None:
            raise ValueError(
                f"stop_strings={params.stop_strings!r} needs a tokenizer; fix: Engine(model, tokenizer) or stop_token_ids"
            )
        return stop_string_check(self.tokenizer, params.stop_strings)

    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's configuration."""
        for config in (getattr(self.target.model, "generation_config", None), self.target.model.config):
            eos = getattr(config, "eos_token_id", None)
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
        return frozenset()

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt: a string, a chat (with the generation prompt), or a list or tensor of ids.

        Raises:
            ValueError: none of these, or text without a tokenizer.
        """
        if isinstance(prompt, torch.Tensor) and prompt.numel() == prompt.shape[-1:].numel():
            prompt = prompt.flatten().tolist()
        is_chat = isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], dict)
        if is_chat and not all(isinstance(message, dict) and "role" in message for message in prompt):
            raise ValueError('every message of a chat must be {"role": ..., "content": ...}')
        if isinstance(prompt, str) or is_chat:
            if self.tokenizer is None:
                raise ValueError("a text or chat prompt needs a tokenizer; fix: Engine(model, tokenizer), or pass token ids")
            if isinstance(prompt, str):
                return list(self.tokenizer(prompt)["input_ids"])
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not isinstance(prompt, (list, tuple)) or not all(
            isinstance(token, Integral) and not isinstance(token, bool) for token in prompt
        ):
            raise ValueError(f"a prompt must be a string, a chat (list of messages) or a list of token ids, got {prompt!r:.80}")
        return [int(token) for token in prompt]

    def _check_prompt(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise ValueError(
                "the prompt is empty (0 tokens); fix: pass at least one token, for example the tokenizer's bos_token_id"
            )
        bad = next((token for token in token_ids if not 0 <= token < self.target.vocab_size), None)
        if bad is not None:
            raise ValueError(
                f"token id {bad} in the prompt is outside the vocabulary of {self.target.vocab_size}; fix: use this model's tokenizer"
            )
        limit, wanted = self.target.max_positions, len(token_ids) + params.max_new_tokens
        if limit is not None and wanted > limit and self.target.has_position_table:
            raise ValueError(
                f"prompt + max_new_tokens = {wanted}, the model's context is {limit} and cannot be passed; fix: shorten one of them"
            )
        if limit is not None and len(token_ids) >= limit:
            raise ValueError(f"the prompt has {len(token_ids)} tokens, the model's context is {limit}; fix: shorten the prompt")
        rope = self.target.rope
        if rope.kind == "dynamic" and wanted > rope.threshold:
            raise ValueError(
                f"prompt + max_new_tokens = {wanted} passes {rope.threshold} positions, from where dynamic RoPE depends on earlier calls and "
                "cannot be reproduced; fix: lower max_new_tokens, or call model.generate without specdec"
            )

    def _result(self, seq: Sequence) -> Result:
        text = ""
        if self.tokenizer is not None:
            text = cut_at_stop(self.tokenizer.decode(seq.output_ids, skip_special_tokens=True), seq.params.stop_strings)
        return Result(
            seq.output_ids,
            text,
            seq.finish_reason or "cancelled",
            seq.prompt_len,
            len(seq.accept_lengths),
            list(seq.accept_lengths),
            list(seq.logprobs) if seq.params.logprobs is not None else None,
            dict(seq.times),
        )

    def trim(self) -> None:
        """Give back the KV buffers, a drafter's too; they are allocated anew when needed."""
        with self._lock:
            if not self.rows:
                cache = self.target.new_cache(1, 256)  # first: without memory for it, all stays as it is
                if self._drafter is not None:
                    self._drafter.trim()
                self.cache = cache
                self._attach()

    # ---- state ----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything the draft sources and the pacing learned (benchmarks; a change of subject needs no reset)."""
        with self._lock:
            self.builder.reset()
            self.pacer.reset()

    def save_state(self, path: str | Path) -> None:
        """Write what the draft sources learned to a safetensors file, atomically."""
        from specdec.state import save_state

        with self._lock:
            save_state(self.builder.state(), path, self.method, self.target.vocab_size)

    def load_state(self, path: str | Path) -> None:
        """Inverse of save_state.

        Raises:
            ValueError: the file belongs to another method or vocabulary, or is damaged; nothing is changed then.
        """
        from specdec.state import load_state

        with self._lock:
            self.builder.load_state(load_state(path, self.method, self.target.vocab_size))

    def share_state(self, path: str | Path) -> None:
        """Take in what other engines left in a file, and leave there what this one then knows: one file for the workers of a node.

        The file is locked meanwhile (PATH.lock) and replaced atomically; without one it is written. Drafts depend on it, texts do
        not. Methods that cannot merge leave the file as it is and keep to what they have learned.

        Raises:
            ValueError: as load_state.
        """
        from filelock import FileLock

        from specdec.state import load_state, save_state

        with FileLock(f"{path}.lock"), self._lock:
            if Path(path).exists():
                if (merge := getattr(self.builder, "merge_state", None)) is None:
                    return
                merge(load_state(path, self.method, self.target.vocab_size))
            save_state(self.builder.state(), path, self.method, self.target.vocab_size)

    def info(self) -> dict[str, Any]:
        """What runs here: model, method, budget, operators, measured costs."""
        return {
            "model": self.target.name,
            "method": self.method,
            "budget": self.budget,
            "device": str(self.target.device),
            "dtype": str(self.target.dtype),
            **self.target.info(),
            **(self.target.compiled.info() if self.target.compiled else {}),
            **self.pacer.info(),
            **(self.builder.info() if isinstance(self.builder, ByRate) else {}),
        }


def _raise_errors(sequences: list[Sequence]) -> None:
    for seq in sequences:
        if seq.error is not None:
            raise seq.error


def _refuse_state(rule: str, processors: Any) -> None:
    """A rule that looks at nodes which it may reject must not change what a processor remembers; transformers' own keep nothing."""
    for processor in processors or ():
        kind = type(processor)
        if kind.__module__ != "transformers.generation.logits_process" or kind.__name__ in _STATEFUL:
            raise ValueError(
                f"logits_processor has a {kind.__name__}, which may keep a state, and the acceptance rule {rule!r} asks for the laws of "
                'nodes that it may reject; fix: a method whose rule is "match" or "recursive_rejection"'
            )


def warm_up(builder: Any, vocab_size: int, dtype: torch.dtype) -> None:
    """Drive a builder through made-up requests, so that the numba kernels are compiled (or read from the cache) here and not in a
    step of a user's text; what it learned from them is forgotten."""
    if not HAVE_NUMBA or not isinstance(builder, TreeBuilder):
        return
    started = time.perf_counter()
    for part in _compiled(builder):
        for request in range(2):  # the second finds the text of the first
            _made_up_request(part, vocab_size, dtype, request)
        part.reset()
    if (seconds := time.perf_counter() - started) > 3:
        logger.warning("specdec: compiled the drafting kernels in %.0f s; they are cached for the next process", seconds)


def _compiled(builder: Any) -> Iterator[Any]:
    """The builder and those that it is made of, as far as they run numba kernels."""
    if getattr(builder, "compiles", True):
        yield builder
    for part in getattr(builder, "parts", ()):
        yield from _compiled(part)


def _made_up_request(builder: TreeBuilder, vocab_size: int, dtype: torch.dtype, request: int) -> None:
    prompt = [(i * i + i // 5) % vocab_size for i in range(WARM_UP_TOKENS)]  # long enough that what grows has grown once
    seq = Sequence(-1 - request, prompt, SamplingParams(max_new_tokens=8), Randomness(0, 0), row=0)
    seq.randomness.gumbel(0, vocab_size)
    k = builder.top_k
    builder.start(seq)
    if k:
        builder.observe_prompt(seq, 0, top_k(torch.zeros(16, vocab_size, dtype=dtype), k))
    for _ in range(2):
        (tree,) = builder.build([seq], [8], [4])
        top = top_k(torch.zeros(len(tree), vocab_size, dtype=dtype), k) if k else None
        verdict = Verdict(np.array(tree.path(len(tree) - 1), np.int32), 0)
        tree.child(0, 0)
        seq.append([int(tree.tokens[node]) for node in verdict.nodes[1:]] + [verdict.next_token])
        builder.update(seq, tree, verdict, top)
    builder.finish(seq)


@contextmanager
def _timed(stats: StepStats, phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        stats.times[phase] += time.perf_counter() - started


def _share_times(seq: Sequence, stats: StepStats, rows: int) -> None:
    for phase, seconds in stats.times.items():
        seq.times[phase] = seq.times.get(phase, 0.0) + seconds / rows


def _as_list(prompts: Any) -> tuple[list[Any], bool]:
    """A list of prompts, and whether the caller gave a single one."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, torch.Tensor):
        return ([prompts], True) if prompts.dim() == 1 else (list(prompts), False)
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(
            f"prompts must be a string, a chat, a list of token ids, or a list of those, got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("prompts is empty; fix: pass at least one prompt")
    single = isinstance(prompts[0], (int, dict)) or not isinstance(prompts[0], (str, list, tuple, torch.Tensor))
    return ([prompts], True) if single else (list(prompts), False)


def _params_for(params: SamplingParams | Seq[SamplingParams] | None, count: int) -> Seq[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(each, SamplingParams) for each in params):
        raise ValueError(f"params must be a SamplingParams or a list of them, one a prompt, got {params!r:.80}")
    if len(params) != count:
        raise ValueError(f"params has {len(params)} entries for {count} prompts; fix: pass one SamplingParams, or one a prompt")
    return params


def _checked_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """Refuse a tokenizer whose ids the model does not have."""
    if tokenizer is None:
        return None
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}; fix: AutoTokenizer.from_pretrained(...)"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} ids but the model's vocabulary is {vocab_size}; fix: load the tokenizer of this model, or call "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    return tokenizer
