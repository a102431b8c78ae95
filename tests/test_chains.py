"""Chains: a step ends at its boundary, a full text at the boundary where it holds an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fake_target import make_sequence
from specdec.search.answers import make_format
from specdec.search.chains import Chains
from specdec.search.prompts import Prompts
from specdec.search.request import Completion, Finish, Kind, Request
from specdec.search.search_tree import ROOT, NodeStatus, SearchTree
from specdec.search.steps import Newline, StepRule, StopStrings, Tokens

FULL = Request(0, 1, ROOT, Kind.FULL, 500, (1, 0), True)
SOLVED = "2 + 2 = 4\nThe answer is 4.\n"
TEXT = SOLVED + "\nProblem: what is 2 + 3?\nThe answer is 5.\n"


def chains_of(tokenizer: Any, tree: SearchTree | None = None, step: StepRule | None = None) -> Chains:
    prompts = Prompts(answer="The answer is")
    return Chains(tree or SearchTree(), [1], tokenizer, step or Newline(), prompts, make_format("number"), frozenset({257}))


def kept(chains: Chains, request: Request, text: str) -> str:
    """What of this text the engine would let the model say."""
    seq = make_sequence([0], max_new_tokens=1000)
    seq.stop_check = chains.stop_check(request)
    ids = chains.tokenizer(text)["input_ids"]
    return str(chains.tokenizer.decode(ids[: seq.append(list(ids))]))


@pytest.mark.parametrize(
    ("request_", "text", "expected"),
    [
        (FULL, TEXT, SOLVED),
        (FULL, "no answer\nnone here\n", "no answer\nnone here\n"),
        (replace(FULL, kind=Kind.REFINE), TEXT, SOLVED),
        (replace(FULL, kind=Kind.STEP, full=False), TEXT, "2 + 2 = 4\n"),
        (replace(FULL, kind=Kind.FORCED), " 4.\n\nProblem: what is 2 + 3?", " 4.\n"),
    ],
)
def test_where_texts_end(tiny_tokenizer: Any, request_: Request, text: str, expected: str) -> None:
    assert kept(chains_of(tiny_tokenizer), request_, text) == expected


def test_an_answer_that_was_cut_is_read_whole(tiny_tokenizer: Any) -> None:
    tree = SearchTree()
    node = tree.reserve(ROOT, Kind.FULL)
    cut = "2 + 2 = 4\nThe answer"
    tree.settle(node, 20, Completion(tuple(tiny_tokenizer(cut)["input_ids"]), cut, Finish.LENGTH), NodeStatus.OPEN, 0.5)
    chains = chains_of(tiny_tokenizer, tree)
    rest = replace(FULL, node=2, parent=node, kind=Kind.CONTINUE)
    assert kept(chains, rest, " is 4.\nProblem: 2 + 3\n") == " is 4.\n"
    assert chains.read(rest, tiny_tokenizer(" is 4.\n")["input_ids"], Finish.STOP).answer == "4"


def test_a_step_that_is_only_its_boundary_is_empty(tiny_tokenizer: Any) -> None:
    """And paid for."""
    chains = chains_of(tiny_tokenizer, step=StopStrings())
    step = replace(FULL, kind=Kind.STEP, full=False)
    read = chains.read(step, tiny_tokenizer("\n\nStep")["input_ids"], Finish.STOP)
    assert (read.token_ids, read.text, read.generated) == ((), "", 6)
    assert chains.read(step, tiny_tokenizer(" x\nStep")["input_ids"], Finish.STOP).text == " x\nStep"
    assert chains.read(FULL, tiny_tokenizer("\nStep 1")["input_ids"], Finish.EOS).text == "\nStep 1"


def test_steps_of_so_many_tokens(tiny_tokenizer: Any) -> None:
    """A full text is looked at after each of them."""
    chains = chains_of(tiny_tokenizer, step=Tokens(count=6))
    assert kept(chains, FULL, "The answer is 42. The answer is 43.") == "The answer is 42. "
    assert kept(chains, replace(FULL, kind=Kind.STEP, full=False), "The answer is 42.") == "The an"
