"""Reasoner: a search on an engine grows the tree that plain sampling would, whatever is cached, batched or drafted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import specdec
from conftest import make_tiny_llama
from oracles import KeyedGumbel, sample_loop
from specdec.engine import Engine
from specdec.randomness import Randomness, stream_of
from specdec.search.answers import make_format
from specdec.search.progress import Event
from specdec.search.prompts import Prompts
from specdec.search.reasoner import Problem, Reasoner
from specdec.search.request import Kind, Result, Status
from specdec.search.search import Search, SearchConfig
from specdec.search.search_tree import SearchTree
from specdec.search.steps import Tokens
from specdec.segments import SegmentStore
from specdec.sequence import SamplingParams

PROMPTS = Prompts(problem="$problem", prefill="Step 1:")
QUESTIONS = ["What is 2 + 2?", "Name a river.", "Count to ten."]
SEED = 5


def by_length(problem: str, steps: list[str]) -> float:
    """A score that depends on the text alone."""
    return (sum(map(ord, "".join(steps))) % 97) / 96


def in_order(reasoner: Reasoner, problems: list[Problem]) -> list[Result]:
    """The results of all problems; a search that failed raises."""
    results = {}
    for problem, result in reasoner.run(problems):
        assert isinstance(result, Result), result
        results[problem.index] = result
    return [results[problem.index] for problem in problems]


def solve(
    model: Any, tokenizer: Any, questions: list[str] = QUESTIONS[:1], policy: str = "bg_mcts", budget: int = 150, **options: Any
) -> list[SearchTree]:
    method, max_rows = options.pop("method", "best_first"), options.pop("max_rows", 4)
    engine = Engine(model, tokenizer, method=method, budget=6, max_rows=max_rows)
    params = SamplingParams(temperature=options.pop("temperature", 1.0))
    config = SearchConfig(step_tokens=16, duplicates=options.pop("duplicates", "merge"))
    rule = Tokens(count=options.pop("tokens", 7))
    reasoner = Reasoner(engine, rule, PROMPTS, make_format("number"), params, SEED, **options)
    searches = [Search(policy, budget, SEED, config) for _ in questions]
    ids = [PROMPTS.encode(tokenizer, text) for text in questions]
    problems = [Problem(*each, index) for index, each in enumerate(zip(questions, searches, [by_length] * len(ids), ids))]
    results = in_order(reasoner, problems)
    assert all(0 < result.used <= budget for result in results)
    return [result.tree for result in results]


def shape(tree: SearchTree) -> list[tuple[Any, ...]]:
    return list(zip(tree.parent, tree.token_ids, tree.q, tree.status))


def test_every_node_is_what_plain_sampling_gives_after_its_path(tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    (tree,) = solve(model, tiny_tokenizer)
    prompt = PROMPTS.encode(tiny_tokenizer, QUESTIONS[0])
    assert len(tree) > 10 and max(tree.depth) > 2
    for node in range(1, len(tree)):
        if not tree.token_ids[node]:
            continue
        path = prompt + tree.path_token_ids(tree.parent[node])
        if tree.kind[node] == Kind.FORCED:
            path += PROMPTS.answer_ids(tiny_tokenizer, path)
        noise = KeyedGumbel([Randomness(SEED, stream_of(0, 0, node, 0))])
        expected = sample_loop(model, path, len(tree.token_ids[node]), LogitsProcessorList([noise]), eos=[257])
        assert list(tree.token_ids[node]) == expected, node


@pytest.mark.parametrize(
    "options",
    [{"kv_megabytes": 0}, {"kv_megabytes": 0.05}, {"method": "none"}, {"max_rows": 1}, {"method": "none", "kv_megabytes": 0}],
)
def test_the_tree_depends_neither_on_the_cache_nor_on_drafts(tiny_tokenizer: Any, options: dict[str, Any]) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    assert shape(solve(model, tiny_tokenizer, **options)[0]) == shape(solve(model, tiny_tokenizer)[0])


@pytest.mark.parametrize("width", [1, 3])
def test_a_text_drawn_anew_is_continued_from_its_own_kv(tiny_tokenizer: Any, width: int) -> None:
    """A first attempt that repeats a sibling leaves nothing behind: what goes on below the second one reads the second one's K/V."""
    model = make_tiny_llama(initializer_range=0.3)
    options: dict[str, Any] = {
        "duplicates": "resample",
        "temperature": 0.2,
        "tokens": 2,
        "width": width,
        "budget": 120,
        "policy": "mcts",
    }
    (tree,) = solve(model, tiny_tokenizer, **options)
    (uncached,) = solve(model, tiny_tokenizer, kv_megabytes=0, **options)
    again = [node for node in range(1, len(tree)) if tree.children[node] and tree.tokens[node] > len(tree.token_ids[node])]
    assert again, "no text that was drawn anew has children"
    assert shape(tree) == shape(uncached)


def test_many_problems_at_once_are_what_they_are_alone(tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    together = solve(model, tiny_tokenizer, QUESTIONS)
    one_by_one = solve(model, tiny_tokenizer, QUESTIONS, max_rows=1)
    assert [shape(tree) for tree in together] == [shape(tree) for tree in one_by_one]
    assert len({tuple(shape(tree)) for tree in together}) == 3


def test_a_search_that_a_cancel_ends_says_so(tiny_tokenizer: Any) -> None:
    """Set by the end of the first search, while the second is about to ask: it has budget left and is not over."""
    engine, cancel = Engine(make_tiny_llama(initializer_range=0.3), tiny_tokenizer, method="none", max_rows=2), threading.Event()

    def at_the_end(event: Event) -> None:
        if event.status is not None:
            cancel.set()

    rule, answers, params = Tokens(count=7), make_format("number"), SamplingParams(temperature=1.0)
    reasoner = Reasoner(engine, rule, PROMPTS, answers, params, SEED, on_event=at_the_end, cancel=cancel)
    searches = [Search("mcts", budget, SEED, SearchConfig(step_tokens=16)) for budget in (7, 150)]
    ids = [PROMPTS.encode(tiny_tokenizer, text) for text in QUESTIONS[:2]]
    problems = [Problem(*each, index) for index, each in enumerate(zip(QUESTIONS, searches, [by_length] * 2, ids))]
    first, second = in_order(reasoner, problems)
    assert first.used == 7 and first.status != Status.CANCELLED
    assert 0 < second.used < 150 and second.status == Status.CANCELLED
    assert not engine.rows and not engine.waiting


def test_cancelled_before_it_began(tiny_tokenizer: Any) -> None:
    engine, cancel = Engine(make_tiny_llama(), tiny_tokenizer, method="none", max_rows=2), threading.Event()
    cancel.set()
    result = specdec.reason(engine, QUESTIONS[0], 50, None, answers="exact", cancel=cancel)
    assert (result.status, result.used) == (Status.CANCELLED, 0)
    assert result.resume(10).status == Status.CANCELLED, "the event is still set"
    cancel.clear()
    assert 0 < result.resume(0).used <= 60


def test_segments_spare_the_prefill(tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(initializer_range=0.3)
    engine = Engine(model, tiny_tokenizer, method="none", max_rows=2)
    for megabytes in (100.0, 0.0):
        reasoner = Reasoner(
            engine, Tokens(count=7), PROMPTS, make_format("number"), SamplingParams(temperature=1.0), SEED, kv_megabytes=megabytes
        )
        search = Search("bg_mcts", 150, SEED, SearchConfig(step_tokens=16))
        ids = PROMPTS.encode(tiny_tokenizer, QUESTIONS[0])
        (result,) = in_order(reasoner, [Problem(QUESTIONS[0], search, by_length, ids)])
        prompt = len(ids) - 1
        if megabytes:
            assert prompt <= result.prefill_tokens < 2 * prompt and result.recomputed_tokens == 0
            assert result.cached_tokens > 5 * prompt
        else:
            assert result.cached_tokens == 0 and result.recomputed_tokens > 5 * prompt
            assert prompt <= result.prefill_tokens < 2 * prompt  # and the forced answer's cue, where there is one
        assert len(reasoner.segments) == 0 and reasoner.segments.nbytes == 0  # a finished search holds no memory


def test_least_recently_used_segments_go_first_and_parents_last() -> None:
    from specdec.kv_cache import KVCache, LayerShape

    cache = KVCache([LayerShape(2, 4, 2, 4, torch.float32, torch.device("cpu"))], rows=2, capacity=32)
    for buffer in cache.buffers():
        buffer.copy_(torch.randn_like(buffer))
    slot = 2 * 2 * 4 * 4  # bytes of one slot: keys and values, 2 heads, 4 dimensions, fp32
    store = SegmentStore(12 * slot / 1e6)
    store.save("root", None, cache, 0, 0, 4)
    store.save("a", "root", cache, 0, 4, 8)
    store.save("b", "root", cache, 0, 4, 8)
    assert store.load(["root", "a"], [5, 9], cache, 1) == 8
    assert all(torch.equal(buffer[:, 1, :, :8], buffer[:, 0, :, :8]) for buffer in cache.buffers())
    store.save("c", "root", cache, 0, 4, 8)  # b was used least recently; the root has children
    assert store.evicted == 1 and store.load(["root", "b"], [5, 9], cache, 1) == 4
    assert store.load(["root", "a"], [5, 7], cache, 1) == 6  # a node that kept fewer tokens than its segment holds
    store.save("d", "gone", cache, 0, 8, 9)
    assert len(store) == 3
