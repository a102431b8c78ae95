"""Replay a tree builder along recorded greedy text, without the model: tokens a step in seconds.

The walk follows the recorded output, as the model itself would. Logits are known on the recorded path only, so the builder learns
nothing from rejected nodes and the figures are a lower bound of the real engine's. Records come from `bench.record`::

    python -m bench.simulate --records records_tune.npz --budget 16 --warm
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import SamplingParams, Sequence
from specdec.trees.base import TreeBuilder

if TYPE_CHECKING:
    from specdec.randomness import Randomness


@dataclass
class Tally:
    """Tokens and steps, prefill excluded."""

    tokens: int = 0
    steps: int = 0
    nodes: int = 0
    seconds: float = 0.0  # host time in build and update
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)  # group -> (tokens, steps)

    @property
    def rate(self) -> float:
        """Tokens a step."""
        return self.tokens / max(1, self.steps)


def follow(tree: DraftTree, future: np.ndarray) -> np.ndarray:
    """Nodes of the walk from the root along the recorded tokens `future`, root included, [A] int32."""
    nodes = [0]
    for token in future:
        child = tree.child(nodes[-1], int(token))
        if child < 0:
            break
        nodes.append(child)
    return np.array(nodes, np.int32)


class Replay:
    """One record file, ready to be replayed any number of times."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self._data = {name: data[name] for name in data.files}
        weights = np.exp(self._data["top_logits"] - self._data["top_logits"][:, :1])
        self._probs = (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    def __len__(self) -> int:
        return len(self._data["groups"])

    def run(self, builder: TreeBuilder, budget: int, cold: bool = False, prompts: int | None = None) -> Tally:
        """Replay all prompts in order (or the first `prompts`); cold: the builder forgets everything before each."""
        tally = Tally()
        builder.reset()
        for row in range(len(self) if prompts is None else prompts):
            if cold:
                builder.reset()
            self._prompt(builder, budget, row, tally)
        return tally

    def _top(self, start: int, stop: int) -> TopK:
        return TopK(self._data["top_tokens"][start:stop], self._probs[start:stop])

    def _prompt(self, builder: TreeBuilder, budget: int, row: int, tally: Tally) -> None:
        begin, end = (int(offset) for offset in self._data["offsets"][row : row + 2])
        ids = self._data["ids"][begin:end].astype(np.int64)
        count = int(self._data["prompt_len"][row])
        limit = SamplingParams(max_new_tokens=len(ids) - count)
        seq = Sequence(row, ids[:count].tolist(), limit, cast("Randomness", None))
        builder.start(seq)
        builder.observe_prompt(seq, 0, self._top(begin, begin + count))
        seq.append([int(ids[count])])
        tokens, steps = 0, 0
        while not seq.finished:
            at = len(seq.token_ids) - 1  # position of the root
            started = time.perf_counter()
            tree = builder.build([seq], [budget], [seq.remaining - 1])[0]
            built = time.perf_counter()
            nodes = follow(tree, ids[at + 1 :])
            top = TopK(np.full((len(tree), 8), -1, np.int32), np.zeros((len(tree), 8), np.float32))
            on_path = self._top(begin + at, begin + at + len(nodes))
            top.tokens[nodes], top.probs[nodes] = on_path.tokens, on_path.probs
            kept = seq.append(ids[at + 1 : at + 1 + len(nodes)].tolist())
            verdict = Verdict(nodes[:kept], seq.token_ids[-1])
            updating = time.perf_counter()
            builder.update(seq, tree, verdict, top)
            tally.seconds += time.perf_counter() - updating + built - started
            tally.nodes += len(tree)
            tokens, steps = tokens + kept, steps + 1
        builder.finish(seq)
        tally.tokens += tokens
        tally.steps += steps
        group = str(self._data["groups"][row])
        before = tally.groups.get(group, (0, 0))
        tally.groups[group] = (before[0] + tokens, before[1] + steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--method", default="best_first")
    parser.add_argument("--budget", type=int, nargs="+", default=[8, 16, 32, 60])
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=False, help="reset before every prompt")
    parser.add_argument("--warm", dest="cold", action="store_false", help="carry state over (default)")
    args = parser.parse_args()

    from specdec.methods import make_builder

    replay = Replay(args.records)
    replay.run(make_builder(args.method, 1 << 17, None), 8, prompts=1)  # compile
    for budget in args.budget:
        tally = replay.run(make_builder(args.method, 1 << 17, None), budget, args.cold)
        groups = {name: round(tokens / steps, 2) for name, (tokens, steps) in tally.groups.items()}
        host = {"nodes": round(tally.nodes / tally.steps, 1), "host_ms": round(1e3 * tally.seconds / tally.steps, 3)}
        print(
            json.dumps({"budget": budget, "cold": args.cold, "tokens_a_step": round(tally.rate, 3), **host, "groups": groups}),
            flush=True,
        )


if __name__ == "__main__":
    main()
