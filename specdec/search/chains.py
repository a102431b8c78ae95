"""Chains: the token ids and texts of a search's paths. One place knows how a request's input is put together and its output read.

    input of a request   =  prompt + (cue + own tokens of each node from the root to the parent) + the request's cue
    output               ->  the step (cut where the rule says), its text, the answer in it

Ids are kept and only ever appended; a cue is not among a node's own tokens and not charged to the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from specdec.search.answers import AnswerFormat
from specdec.search.prompts import Prompts
from specdec.search.request import Completion, Finish, Kind, Request
from specdec.search.search_tree import ROOT, SearchTree
from specdec.search.steps import StepRule, step_check
from specdec.sequence import Sequence

__all__ = ["Chains"]


class Chains:
    """The paths of one tree.

    Args:
        tree: of the search; read only.
        prompt_ids: up to the first token that the model writes.
        eos: tokens that end a text: a cue after one of them begins a new turn.
    """

    def __init__(
        self,
        tree: SearchTree,
        prompt_ids: Seq[int],
        tokenizer: Any,
        step: StepRule,
        prompts: Prompts,
        answers: AnswerFormat,
        eos: frozenset[int],
    ) -> None:
        self.tree, self.prompt_ids = tree, list(prompt_ids)
        self.tokenizer, self.step, self.prompts, self.answers, self.eos = tokenizer, step, prompts, answers, eos
        self._pieces: dict[int, list[int]] = {}  # node -> its cue and its own tokens

    def path_ids(self, node: int) -> list[int]:
        """Everything up to the end of `node`."""
        return [*self.prompt_ids, *(token for each in self.tree.path(node) for token in self._piece(each))]

    def ends(self, node: int) -> tuple[list[int], list[int]]:
        """The path from the root to `node`, and how many tokens there are up to the end of each of its nodes."""
        path, ends, end = [ROOT, *self.tree.path(node)], [], 0
        for each in path:
            end += len(self.prompt_ids) if each == ROOT else len(self._piece(each))
            ends.append(end)
        return path, ends

    def cue(self, parent: int, kind: Kind) -> list[int]:
        """What goes before the text of such a request."""
        if kind == Kind.REFINE:
            return self.prompts.reconsider_ids(self.tokenizer, self.path_ids(parent), self.eos)
        if kind == Kind.FORCED:
            return self.prompts.answer_ids(self.tokenizer, self.path_ids(parent), self.eos)
        return []

    def stop_check(self, request: Request) -> Callable[[Sequence], bool]:
        """Ends a step at its boundary, and a full text at the first boundary where it holds an answer: a small model goes on to
        problems of its own, whose answers would take the place of this one's and cost tokens."""
        if not request.full:
            return step_check(self.step, self.tokenizer)
        before = self.answer_begins(request)

        def answered(seq: Sequence) -> bool:
            output = seq.output_ids
            if self.step.ended(output, self.tokenizer) == self.step.ended(output[:-1], self.tokenizer):
                return False
            return self.answers.extract(before + self._decode(output)) is not None

        return answered

    def read(self, request: Request, token_ids: Seq[int], finish: Finish, **meters: Any) -> Completion:
        """What the model wrote after path and cue, as a Completion without score; `meters` are further fields of it."""
        cue, generated = self.cue(request.parent, request.kind), len(token_ids)
        cut = None if request.full else self.step.cut(token_ids, self.tokenizer)
        if cut is not None:
            token_ids, finish = token_ids[: cut.tokens], Finish.STOP
        known = [*self.path_ids(request.parent), *cue]
        text = self._decode([*known, *token_ids])[len(self._decode(known)) :]
        if cut is not None and self.step.blank(text):
            token_ids, text = [], ""  # a step that is nothing but its boundary is an empty one
        self._pieces[request.node] = [*cue, *token_ids]
        answer = self.answers.read(self.answer_begins(request) + text)
        return Completion(tuple(token_ids), text, finish, answer=answer, generated=generated, **meters)

    def _piece(self, node: int) -> list[int]:
        """A node's cue and own tokens; worked out anew for the nodes of a resumed search."""
        if node not in self._pieces:
            self._pieces[node] = [*self.cue(self.tree.parent[node], Kind(self.tree.kind[node])), *self.tree.token_ids[node]]
        return self._pieces[node]

    def answer_begins(self, request: Request) -> str:
        """What an answer may have begun with: the cue of a FORCED, the beginning of the piece that a CONTINUE goes on with."""
        if request.kind == Kind.FORCED:
            return self._decode(self.cue(request.parent, request.kind))
        node, pieces = request.parent, list[str]()
        kind: Kind = request.kind
        while kind == Kind.CONTINUE:
            pieces.append(self.tree.text[node])
            kind, node = Kind(self.tree.kind[node]), self.tree.parent[node]
        return "".join(reversed(pieces))

    def _decode(self, token_ids: Seq[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
