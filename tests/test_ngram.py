"""NgramIndex against a naive rescan, and prompt lookup on the vectors of drafting.md section 11."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.sequence import SamplingParams, Sequence
from specdec.sources.ngram import SEPARATOR, NgramIndex, NgramSource, find, match_length


def make_seq(tokens: list[int], number: int = 0) -> Sequence:
    randomness: Any = None
    return Sequence(number, list(tokens), SamplingParams(), randomness)


def rescan(stream: list[int], gram: list[int]) -> list[int]:
    """All positions of the last token of `gram` in `stream` that have a follower, most recent first."""
    length = len(gram)
    ends = range(length - 1, len(stream) - 1)
    return [end for end in reversed(ends) if stream[end - length + 1 : end + 1] == gram and SEPARATOR not in gram]


def chain_of(index: NgramIndex, row: int, gram: list[int]) -> list[int]:
    query = np.array(gram, np.int32)
    end, found = find(index.arrays, row, query, len(query) - 1), []
    while end >= 0:
        found.append(end)
        end = int(index.arrays.previous[row, end])
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 3), max_size=12), max_size=8))
def test_index_equals_a_rescan_after_any_commits(commits: list[list[int]]) -> None:
    index = NgramIndex((1, 2, 3), capacity=1024)
    stream: list[int] = []
    for commit in commits:
        index.extend(commit)
        stream += commit
    for row, length in enumerate((1, 2, 3)):
        for end in range(length - 1, len(stream)):
            gram = stream[end - length + 1 : end + 1]
            assert chain_of(index, row, gram) == rescan(stream, gram)


def test_docstring_example_the_end_is_not_its_own_match() -> None:
    index = NgramIndex((1, 2))
    index.extend([7, 8, 9, 7, 8])
    assert chain_of(index, 0, [7]) == [3, 0]
    assert chain_of(index, 1, [7, 8]) == [1]


def test_memory_is_bounded_and_the_newest_text_survives() -> None:
    index = NgramIndex((1, 2, 4), capacity=256)
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 50, 5000).tolist()
    for start in range(0, 5000, 37):
        index.extend(stream[start : start + 37])
    assert index.size <= 256 and len(index.arrays.tokens) == 256
    kept = index.tokens.tolist()
    assert kept == stream[-len(kept) :] and len(kept) >= 128
    for end in range(200, 227):
        assert chain_of(index, 1, kept[end - 1 : end + 1]) == rescan(kept, kept[end - 1 : end + 1])
    index.extend(stream)
    assert index.tokens.tolist() == stream[-256:]


def test_match_length_stops_at_separators_and_at_the_limit() -> None:
    index = NgramIndex()
    index.extend([1, 2, SEPARATOR, 3, 4, 5])
    query = np.array([9, SEPARATOR, 3, 4], np.int32)
    assert match_length(index.arrays, 4, query, 3, 8) == 2
    assert match_length(index.arrays, 4, query, 3, 1) == 1


def test_prompt_lookup_takes_the_longest_match_then_the_most_recent_full_one() -> None:
    source = NgramSource((3,))
    source.start(seq := make_seq([1, 2, 3, 7, 8, 9, 4, 5, 1, 2, 3]))
    assert source.chain(seq, 8).tokens.tolist() == [7, 8, 9, 4, 5, 1, 2, 3]
    source = NgramSource((3, 4))
    source.start(seq := make_seq([0, 1, 2, 3, 50, 9, 1, 2, 3, 100, 8, 9, 1, 2, 3]))
    assert source.chain(seq, 1).tokens.tolist() == [100]
    source.start(seq := make_seq([0, 1, 2, 3, 50, 9, 1, 2, 3, 100, 8, 1, 2, 3], 1))
    chain = source.chain(seq, 8)
    assert chain.tokens.tolist() == [50, 9, 1, 2, 3, 100, 8, 1], "the most recent one has too short a continuation"
    assert (chain.match_length, chain.agreement) == (3, 0.5)


def test_prompt_lookup_life_cycle() -> None:
    source = NgramSource((2,))
    source.start(seq := make_seq([1, 2, 3]))
    assert len(source.chain(seq, 4)) == 0
    seq.append([1, 2])
    source.update(seq, [1, 2])
    assert source.chain(seq, 2).tokens.tolist() == [3, 1]
    source.finish(seq)
    source.finish(seq)
    with pytest.raises(KeyError):
        source.chain(seq, 2)


@pytest.mark.parametrize(
    "arguments", [{"lengths": ()}, {"lengths": (0,)}, {"lengths": (40,)}, {"capacity": 3}, {"max_occurrences": 0}]
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NgramSource(**arguments)
