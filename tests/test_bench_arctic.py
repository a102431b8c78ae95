"""Arctic's suffix decoding in specdec's loop: trees from its drafts, and its own package where it is installed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import specdec
from bench.arctic import ARCTIC, ArcticSuffix, missing_arctic
from bench.runners import make_runners
from bench.tasks import Task, encode
from specdec.randomness import Randomness
from specdec.sequence import SamplingParams, Sequence

TOKENS, PARENTS = [5, 6, 7, 8], [-1, 0, 0, -1]  # in their numbering, without the root


@dataclass
class Draft:
    token_ids: list[int]
    parents: list[int]


@dataclass
class FakeCache:
    """Drafts one fixed tree and notes what it is told."""

    calls: list[tuple] = field(default_factory=list)

    def start_request(self, request, tokens):
        self.calls.append(("start", request, tokens.tolist()))

    def add_active_response(self, request, tokens):
        self.calls.append(("add", request, tokens.tolist()))

    def stop_request(self, request):
        self.calls.append(("stop", request))

    def speculate(self, request, context, max_spec_tokens, use_tree_spec):
        self.calls.append(("speculate", request, context.tolist(), max_spec_tokens, use_tree_spec))
        assert context.dtype == np.int32
        return Draft(TOKENS[:max_spec_tokens], PARENTS[:max_spec_tokens])


def test_drafts_become_trees_within_budget_and_depth():
    caches: list[FakeCache] = []
    builder = ArcticSuffix(tree=True, new_cache=lambda: caches.append(FakeCache()) or caches[-1])
    seq = Sequence(9, [1, 2, 3], SamplingParams(), Randomness(0, 0))
    builder.start(seq)
    (tree,) = builder.build([seq], [8], [8])
    assert tree.tokens.tolist() == [3, *TOKENS] and tree.parents.tolist() == [-1, 0, 1, 1, 0]
    assert len(builder.build([seq], [3], [8])[0]) == 3
    assert len(builder.build([seq], [8], [1])[0]) == 2
    assert len(builder.build([seq], [1], [8])[0]) == len(builder.build([seq], [8], [0])[0]) == 1
    seq.append([4, 5])
    builder.update(seq, tree, None, None)
    builder.update(seq, tree, None, None)
    builder.finish(seq)
    asked = [("speculate", 9, [1, 2, 3], most, True) for most in (7, 2, 1)]
    assert caches[0].calls == [("start", 9, [1, 2, 3]), *asked, ("add", 9, [4, 5]), ("stop", 9)]
    builder.reset()
    assert len(caches) == 2, "all outputs are forgotten"


def test_missing_package_is_an_error_that_names_the_extra(monkeypatch, tiny_llama, tiny_tokenizer):
    monkeypatch.setattr("bench.arctic.find_spec", lambda name: None)
    assert "extra: peers" in missing_arctic()
    with pytest.raises(
        ValueError, match="'suffix_arctic': the package arctic-inference .extra: peers. is not installed; fix: pip"
    ):
        make_runners(tiny_llama, tiny_tokenizer, ["suffix_arctic"], [8])


@pytest.mark.skipif(find_spec("arctic_inference") is None, reason="needs arctic-inference (make peers)")
@pytest.mark.parametrize("method", ARCTIC)
def test_their_package_drafts_and_changes_no_text(tiny_llama, tiny_tokenizer, method):
    """Chain and tree, two requests in a batch; the second time round it knows the answer, until it is reset."""
    params = specdec.SamplingParams(max_new_tokens=40)
    tasks = [Task(text, "g", text) for text in ("abcabcabcabc", "xyz")]
    prompts = [encode(tiny_tokenizer, task) for task in tasks]
    plain, arctic = make_runners(tiny_llama, tiny_tokenizer, ["none", method], [8], batch=2)
    expected = [row.token_ids for row in plain.run(tasks, prompts, params)]
    first, second = arctic.run(tasks, prompts, params), arctic.run(tasks, prompts, params)
    arctic.reset()
    third = arctic.run(tasks, prompts, params)
    assert [row.token_ids for row in first] == [row.token_ids for row in second] == expected
    steps = [sum(row.steps for row in rows) for rows in (first, second, third)]
    assert steps[1] < steps[0] == steps[2] < 80
    assert max(len(row.accepted) for row in second) - 1 <= 8
    assert json.dumps([row.accepted for row in first])


def test_the_extra_is_in_pyproject():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^peers = \["arctic-inference', text, re.M)
