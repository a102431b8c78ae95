"""What the model said after every text that anybody asked about: enough to replay drafting without the model.

Greedy decoding with a tree asks the model about prefixes: the committed text followed by the path to each node. A `Record` is the
trie of all prefixes that any run ever asked about, each with the next token (argmax) and the k largest logits. It is keyed by the
exact prefix, so a replay that asks for what is recorded learns from rejected nodes as the engine does. `Recorder` asks the model
for what is missing and adds it: the second replay needs no model. The first answer stays, so all replays follow one text, also
in bfloat16, where the model's answer depends in the last bits on the shape of the tree. Worked example::

    prompt  the cat              the - cat - sat - on       entry 2 "the cat" says sat, entry 3 "the cat sat" says on
    tree    cat -> sat, ran             |                   entry 5 "the cat ran" says away: asked about, though rejected
            sat said next                - ran
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.draft_tree import DraftTree, TopK
from specdec.kv_cache import KVCache
from specdec.learning import top_k
from specdec.target import TargetModel

__all__ = ["UNKNOWN", "Prompt", "Record", "Recorder"]

ROOT = 0  # the entry of the empty text
UNKNOWN = -1
TOP_K = 10  # the most that a builder of specdec.METHODS reads
_PARENT_BITS = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a record."""

    task: str
    group: str
    token_ids: tuple[int, ...]


class Record:
    """A trie of texts with the model's answers; entry = node of the trie = a text.

    Args:
        prompts: what is replayed, in this order.
        max_new_tokens: most tokens of each text after its prompt.
        eos_token_ids: tokens that end a text.
        vocab_size: of the model.
        k: logits kept an entry, at most `vocab_size`.
    """

    def __init__(
        self, prompts: Iterable[Prompt], max_new_tokens: int, eos_token_ids: Iterable[int], vocab_size: int, k: int = TOP_K
    ) -> None:
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = vocab_size
        self.k = min(k, vocab_size)
        self.model = ""  # whose answers these are; "": nobody's yet
        self._children: dict[int, int] = {}  # parent << 32 | token -> entry
        self._size = 1
        self._allocate(1024)

    def __len__(self) -> int:
        """Entries, the empty text included."""
        return self._size

    def entry(self, parent: int, token: int, add: bool = False) -> int:
        """The entry of parent's text followed by `token`; UNKNOWN where there is none and `add` does not make it."""
        key = parent << _PARENT_BITS | token
        found = self._children.get(key, UNKNOWN)
        if found < 0 and add:
            found = self._children[key] = self._size
            self._size += 1
            if found == len(self.next):
                self._allocate(2 * found)
        return found

    def path(self, token_ids: Iterable[int], start: int = ROOT, add: bool = False) -> list[int]:
        """Entries after each of `token_ids`, which follow the text of `start`; UNKNOWN from the first unknown one on."""
        entries = []
        for token in token_ids:
            start = UNKNOWN if start < 0 else self.entry(start, token, add)
            entries.append(start)
        return entries

    def nodes(self, tree: DraftTree, root: int, add: bool = False) -> list[int]:
        """Entries of a tree's nodes, [N]; `root` is the entry of the committed text."""
        entries = [root]
        for parent, token in zip(tree.parents.tolist()[1:], tree.tokens.tolist()[1:]):
            above = entries[parent]
            entries.append(UNKNOWN if above < 0 else self.entry(above, token, add))
        return entries

    def known(self, entries: Seq[int]) -> np.ndarray:
        """[M] bool: the model's answer is recorded."""
        rows = np.array(entries, np.int64)
        return (rows >= 0) & (self.next[rows] >= 0)

    def put(self, entries: Seq[int], logits: torch.Tensor) -> None:
        """Record logits [M, V]; entries that have an answer keep it."""
        rows = np.array(entries, np.int64)
        fresh = np.flatnonzero(self.next[rows] < 0)
        rows, logits = rows[fresh], logits[torch.from_numpy(fresh).to(logits.device)]
        tokens = top_k(logits, self.k).tokens
        self.tokens[rows] = tokens
        self.logits[rows] = logits.gather(-1, torch.from_numpy(tokens).long().to(logits.device)).float().cpu().numpy()
        self.next[rows] = logits.argmax(-1).cpu().numpy()

    def top(self, entries: Seq[int], k: int) -> TopK:
        """What the engine's learning pass gives for these entries; rows of -1 where nothing is recorded.

        Raises:
            ValueError: k exceeds what was recorded.
        """
        if k > self.k:
            raise ValueError(f"the builder reads the top {k} logits, the record keeps {self.k}; fix: record with k={k}")
        rows, known = np.array(entries, np.int64), self.known(entries)
        tokens, logits = self.tokens[rows, :k], self.logits[rows, :k]
        weights = np.exp(logits - logits[:, :1])  # as specdec.learning.top_k, to the last bit
        probs = weights / weights.sum(-1, keepdims=True)
        tokens[~known], probs[~known] = UNKNOWN, 0.0
        return TopK(tokens, probs, np.where(known, self.next[rows], UNKNOWN))

    def save(self, path: Path) -> None:
        """Write a .npz file, over what is there."""
        keys = np.fromiter(self._children.keys(), np.int64, len(self._children))
        entries = np.fromiter(self._children.values(), np.int64, len(self._children))
        part = path.with_suffix(".part.npz")
        np.savez_compressed(
            part, keys=keys, entries=entries, next=self.next[: self._size], tokens=self.tokens[: self._size],
            logits=self.logits[: self._size], eos=np.array(sorted(self.eos_token_ids), np.int64),
            numbers=np.array([self.max_new_tokens, self.vocab_size, self.k]), model=np.array(self.model),
            tasks=np.array([prompt.task for prompt in self.prompts]), groups=np.array([prompt.group for prompt in self.prompts]),
            lengths=np.array([len(prompt.token_ids) for prompt in self.prompts]),
            prompts=np.array([token for prompt in self.prompts for token in prompt.token_ids], np.int64),
        )  # fmt: skip
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Inverse of save."""
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
        texts = np.split(arrays["prompts"], np.cumsum(arrays["lengths"])[:-1])
        prompts = [
            Prompt(str(task), str(group), tuple(text.tolist()))
            for task, group, text in zip(arrays["tasks"], arrays["groups"], texts)
        ]
        max_new_tokens, vocab_size, k = arrays["numbers"].tolist()
        record = cls(prompts, max_new_tokens, arrays["eos"].tolist(), vocab_size, k)
        record.model = str(arrays["model"])
        record._children = dict(zip(arrays["keys"].tolist(), arrays["entries"].tolist()))
        record._size = len(arrays["next"])
        record.next, record.tokens, record.logits = arrays["next"], arrays["tokens"], arrays["logits"]
        return record

    def _allocate(self, size: int) -> None:
        old = self.__dict__.get("next", np.empty(0))
        before = len(old)
        fresh = np.full(size, UNKNOWN, np.int32), np.zeros((size, self.k), np.int32), np.zeros((size, self.k), np.float32)
        if before:
            fresh[0][:before], fresh[1][:before], fresh[2][:before] = self.next, self.tokens, self.logits
        self.next: np.ndarray = fresh[0]  # [E] the argmax, UNKNOWN: never asked about
        self.tokens: np.ndarray = fresh[1]  # [E, k] best first
        self.logits: np.ndarray = fresh[2]  # [E, k]


class Recorder:
    """Asks the model what a record lacks, as the engine would: prompt in chunks, then one forward a tree.

    The K/V of every prompt asked about is kept, so that a later replay can go on anywhere in its text.

    Raises:
        ValueError: the record holds another model's answers, or the model's positions depend on the length of the text.
        UnsupportedModelError: as TargetModel.
    """

    def __init__(self, model: Any, record: Record) -> None:
        self.record = record
        self._model = model  # kept alive: the target only refers to it
        self.target = TargetModel(model)
        if self.target.rope.kind is not None:
            raise ValueError(
                f"{self.target.name} has {self.target.rope.kind} RoPE, whose answers depend on how they are asked for"
            )
        name = f"{self.target.name} {Path(model.config._name_or_path).name} {self.target.dtype}"
        if record.model not in ("", name):
            raise ValueError(
                f"the record holds answers of {record.model}, the model is {name}; fix: --model, --dtype or a new --record"
            )
        record.model = name
        self.forwards = 0  # of trees
        self._caches: dict[tuple[int, ...], KVCache] = {}

    def prefill(self, prompt: Prompt) -> None:
        """Record what the model expects along a prompt, but for its last token."""
        entries = self.record.path(prompt.token_ids[:-1], add=True)
        cache = self._caches[prompt.token_ids] = self.target.new_cache(1, 256)

        def observe(start: int, logits: torch.Tensor) -> None:
            self.record.put(entries[start : start + len(logits)], logits)

        self.target.prefill(cache, 0, prompt.token_ids[:-1], observe)

    def verify(self, prompt: Prompt, token_ids: Seq[int], tree: DraftTree, entries: Seq[int]) -> None:
        """Record what the model says at every node of a tree below the text `token_ids`, which starts with the prompt."""
        if prompt.token_ids not in self._caches:
            self.prefill(prompt)
        cache = self._caches[prompt.token_ids]
        held = min(cache.lengths[0], len(token_ids) - 1)
        cache.lengths[0] = held  # what lies behind is overwritten
        self.target.prefill(cache, 0, token_ids[held:-1])
        logits = self.target.forward(cache, [tree])[0, : len(tree)]
        self.record.put(entries, logits)
        self.forwards += 1

    def commit(self, prompt: Prompt, nodes: np.ndarray) -> None:
        """Keep the K/V of the path that the last `verify` led to."""
        self._caches[prompt.token_ids].commit(0, nodes.tolist())
