"""Prompts: every text that a search puts before or between what the model writes, as templates that a user can replace.

Templates are `string.Template`s: $problem is filled in, $$ is a dollar sign, braces mean nothing (so \\boxed{} needs no care). The
defaults follow BG-MCTS: a worked example in steps, an answer that begins with "Step 1:", and cues to reconsider and to finish.

Token ids only ever grow. The prompt is encoded once; cues and the model's own tokens are appended, and nothing is tokenised again::

    encode(problem)  =  [chat template of system and user, generation prompt] + [prefill]
    path             =  encode(problem) + step 1 + step 2 + cue + step 3 ...
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["JUDGE", "Prompts"]

EXAMPLE = r"""Here is an example of the form of an answer.

Problem: A box holds 3 red balls and twice as many blue ones. A third of all the balls are taken out. How many are left?

Step 1: There are 2 * 3 = 6 blue balls.

Step 2: Together there are 3 + 6 = 9 balls.

Step 3: A third of them is 9 / 3 = 3, so 9 - 3 = 6 are left.

Step 4: The answer is \boxed{6}."""
JUDGE = r"""Here is a problem and the beginning of a solution.

Problem: $problem

Solution so far:
$steps

Is the last step correct, and does it lead towards the answer? Say Yes or No."""
_SENTINEL = "\ue000specdec\ue001"  # private-use characters: no template, problem or tokenizer gives them a meaning


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts of a search. Cues go between pieces that the model writes.

    Attributes:
        problem: the user's turn, with $problem, and $example if wanted.
        example: one worked example in steps.
        system: a system message; "": none.
        prefill: the beginning of the answer, written for the model.
        reconsider: goes after an answer that is to be thought over.
        answer: goes after a chain that must end now; what follows it is read as the answer.

    Raises:
        ValueError: a template without $problem, or with other names.
    """

    problem: str = (
        "$example\n\nSolve the following problem in the same way, and end with the answer in \\boxed{}.\n\nProblem: $problem"
    )
    example: str = EXAMPLE
    system: str = ""
    prefill: str = "Step 1:"
    reconsider: str = "\n\nLet me check this answer by solving the problem again from the beginning.\n\n"
    answer: str = "\n\nTherefore, the final answer is:"

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), str):
                raise ValueError(f"{field.name} must be a string, got {getattr(self, field.name)!r:.80}")
        template = Template(self.problem)
        names = set(template.get_identifiers()) if template.is_valid() else set()
        if "problem" not in names or names - {"problem", "example"}:
            raise ValueError(
                f"problem must be a template with $problem (and $example if wanted; $$ is a dollar sign), got {self.problem!r:.200}"
            )

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """Prompts of a TOML file: any of the fields above as strings; the others keep their defaults.

        Raises:
            ValueError: not TOML, a field that does not exist, or a bad template.
            OSError: the file cannot be read.
        """
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML ({error})") from error
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{path} has the unknown field {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**given)

    def with_fields(self, **changed: str) -> Prompts:
        """A copy with other texts."""
        return replace(self, **changed)

    def user_turn(self, problem: str) -> str:
        """What the user says."""
        return Template(self.problem).substitute(problem=problem, example=self.example)

    def encode(self, tokenizer: Any, problem: str) -> list[int]:
        """Token ids up to the first token that the model writes. A tokenizer without a chat template gets plain text."""
        text = self.user_turn(problem)
        if tokenizer.chat_template is None:
            plain = f"{self.system}\n\n{text}\n\n" if self.system else f"{text}\n\n"
            prompt = list(tokenizer(plain)["input_ids"])
        else:
            rendered = tokenizer.apply_chat_template(self._chat(text), tokenize=False, add_generation_prompt=True)
            prompt = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return prompt + encode_piece(tokenizer, self.prefill)

    def reconsider_ids(self, tokenizer: Any, path: list[int], eos_token_ids: frozenset[int] = frozenset()) -> list[int]:
        """Token ids to append to a path that holds an answer, so that the model solves the problem again."""
        return _cue(tokenizer, path, self.reconsider, eos_token_ids) + encode_piece(tokenizer, self.prefill)

    def answer_ids(self, tokenizer: Any, path: list[int], eos_token_ids: frozenset[int] = frozenset()) -> list[int]:
        """Token ids to append to a path so that the model states its answer. The answer format reads cue and answer together."""
        return _cue(tokenizer, path, self.answer, eos_token_ids)

    def cue_tokens(self, tokenizer: Any, eos_token_ids: frozenset[int] = frozenset()) -> int:
        """Most tokens of a cue, wherever it stands."""
        paths: list[list[int]] = [[], *([token] for token in eos_token_ids)]
        cues = (cue(tokenizer, path, eos_token_ids) for path in paths for cue in (self.reconsider_ids, self.answer_ids))
        return max(len(cue) for cue in cues)

    def _chat(self, text: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]


def _cue(tokenizer: Any, path: list[int], text: str, eos_token_ids: frozenset[int]) -> list[int]:
    """An unfinished turn is continued by the cue, as if the model had written it. After one that ended with EOS the user says it, in
    a turn made by the chat template, and the model's next turn begins."""
    if not path or path[-1] not in eos_token_ids or tokenizer.chat_template is None:
        return encode_piece(tokenizer, text)
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _SENTINEL},
        {"role": "user", "content": text.strip()},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    glue = encode_piece(tokenizer, rendered.rpartition(_SENTINEL)[2])
    return glue[1:] if glue[:1] == path[-1:] else glue  # the template closes the turn itself


def encode_piece(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that continues another: no special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
