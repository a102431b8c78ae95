"""Record the model's greedy continuation of mix.json prompts, with the top logits at every position.

A record makes drafting measurable without the model: `bench.simulate` replays a tree builder along the recorded text in
seconds. One run a split (minutes on two cores); a finished record is never touched again::

    python -m bench.record --model /path/to/smollm2 --split tune --out records_tune.npz

Arrays of the .npz, T = all tokens of all prompts, one prompt after the other, R = prompts:

    ids         [T] int32       prompt tokens, then the greedy output
    offsets     [R + 1] int64   prompt r owns ids[offsets[r] : offsets[r + 1]]
    prompt_len  [R] int64       how many of them are the prompt
    groups      [R] str         the group of mix.json
    top_tokens  [T, 8] int32    most probable next tokens after each position, best first; -1: unknown (the last one)
    top_logits  [T, 8] float32
    logsumexp   [T] float32     over the full vocabulary: exp(top_logits - logsumexp) are the full-softmax probabilities
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOP_K = 8
MAX_PROMPT_TOKENS = 1500
MAX_NEW_TOKENS = 128
ID_FIELDS = {"spec-bench": "question_id", "humaneval": "task_id", "humanevalfix": "task_id"}


def _row(data: Path, file: str, key: object) -> dict[str, Any]:
    """The row of one data file that mix.json names; files without an id field count rows from 0."""
    field_name = ID_FIELDS.get(file.split("/")[0])
    with (data / file).open(encoding="utf-8") as lines:
        if field_name is None:
            return dict(json.loads(next(islice(lines, int(str(key)), None))))
        for line in lines:
            row = json.loads(line)
            if row[field_name] == key:
                return dict(row)
    raise ValueError(f"{file} has no row {key!r} (mix.json and the data folder must belong together)")


def mix_prompts(data: Path, split: str) -> list[tuple[str, str]]:
    """(group, user turn) of every prompt of one split of mix.json, in its order."""
    mix = json.loads((data / "mix.json").read_text(encoding="utf-8"))
    prompts = []
    for entry in mix[split]:
        row = _row(data, entry["file"], entry["id"])
        template = mix["templates"].get(entry["group"]) or mix["templates"][entry["file"].split("/")[0]]
        prompts.append((entry["group"], template.format(**row)))
    return prompts


@dataclass
class _Text:
    """One prompt with what has been recorded of it."""

    group: str
    ids: list[int]
    prompt_len: int = 0
    done: bool = False
    tokens: list[np.ndarray] = field(default_factory=list)  # each [n, 8]
    logits: list[np.ndarray] = field(default_factory=list)  # each [n, 8]
    logsumexp: list[np.ndarray] = field(default_factory=list)  # each [n]

    def observe(self, logits: torch.Tensor) -> int:
        """Keep the top of logits [n, V]; returns the greedy token of the last row."""
        top = torch.topk(logits, TOP_K, dim=-1)
        self.tokens.append(top.indices.numpy().astype(np.int32))
        self.logits.append(top.values.numpy().astype(np.float32))
        self.logsumexp.append(torch.logsumexp(logits, -1).numpy().astype(np.float32))
        return int(top.indices[-1, 0])


@torch.inference_mode()
def record_batch(model: Any, texts: list[_Text], eos: set[int]) -> None:
    """Greedy decoding of a left-padded batch; fills every text in place."""
    longest = max(len(text.ids) for text in texts)
    pads = torch.tensor([longest - len(text.ids) for text in texts])
    tokens = torch.tensor([[0] * (longest - len(text.ids)) + text.ids for text in texts])
    mask = (torch.arange(longest)[None] >= pads[:, None]).long()
    cache = None
    for step in range(MAX_NEW_TOKENS):
        width = tokens.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        out = model.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chosen = torch.zeros(len(texts), 1, dtype=torch.long)
        for row, text in enumerate(texts):
            if not text.done:
                hidden = out.last_hidden_state[row, int(pads[row]) if step == 0 else 0 :]
                token = text.observe(model.lm_head(hidden).float())
                text.ids.append(token)
                text.done = token in eos
                chosen[row] = token
        if all(text.done for text in texts):
            break
        tokens, mask = chosen, torch.cat([mask, torch.ones(len(texts), 1, dtype=torch.long)], 1)


def save(path: Path, texts: list[_Text]) -> None:
    """Write the arrays that the module docstring lists."""
    unknown = [np.full((1, TOP_K), -1, np.int32), np.zeros((1, TOP_K), np.float32), np.zeros(1, np.float32)]
    arrays = {
        "ids": np.concatenate([np.array(text.ids, np.int32) for text in texts]),
        "offsets": np.cumsum([0] + [len(text.ids) for text in texts]),
        "prompt_len": np.array([text.prompt_len for text in texts]),
        "groups": np.array([text.group for text in texts]),
        "top_tokens": np.concatenate([part for text in texts for part in [*text.tokens, unknown[0]]]),
        "top_logits": np.concatenate([part for text in texts for part in [*text.logits, unknown[1]]]),
        "logsumexp": np.concatenate([part for text in texts for part in [*text.logsumexp, unknown[2]]]),
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local path or hub name")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--split", choices=["tune", "report"], default="tune")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=6)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    eos_ids = model.generation_config.eos_token_id
    eos = set(eos_ids) if isinstance(eos_ids, list) else {eos_ids}
    texts = []
    for group, prompt in mix_prompts(args.data, args.split):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"][-MAX_PROMPT_TOKENS:]
        texts.append(_Text(group, list(ids), len(ids)))
    for start in range(0, len(texts), args.batch):
        record_batch(model, texts[start : start + args.batch], eos)
        save(args.out, texts[: start + args.batch])
        print(json.dumps({"recorded": min(start + args.batch, len(texts)), "of": len(texts)}), flush=True)


if __name__ == "__main__":
    main()
