"""The automaton against naive rescans, and the source that drafts from it."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.sources.base import Chain
from specdec.sources.suffix_automaton import SEPARATOR, SuffixAutomaton, SuffixSource

small_texts = st.lists(st.integers(0, 3), max_size=60)


def naive_match(text):
    """Longest suffix that also ends earlier."""
    for length in range(len(text) - 1, 0, -1):
        if any(text[end - length : end] == text[-length:] for end in range(length, len(text))):
            return length
    return 0


def naive_match_of(text, query):
    for length in range(len(query), 0, -1):
        if any(text[end - length : end] == query[-length:] for end in range(length, len(text) + 1)):
            return length
    return 0


def continuations(text, suffix):
    """token -> (times it followed `suffix` in the text, position of the last time)."""
    counts, last = Counter(), {}
    for start in range(len(text) - len(suffix)):
        if text[start : start + len(suffix)] == suffix:
            token = text[start + len(suffix)]
            counts[token] += 1
            last[token] = start
    return {token: (count, last[token]) for token, count in counts.items()}


def request(seq_id, token_ids):
    return SimpleNamespace(id=seq_id, token_ids=list(token_ids))


def emit(source, seq, tokens):
    seq.token_ids.extend(tokens)
    source.update(seq, tokens)


@given(text=st.lists(st.integers(-1, 3), max_size=60), cut=st.integers(0, 60))
@settings(deadline=None, max_examples=100)
def test_match_equals_a_naive_rescan(text, cut):
    automaton = SuffixAutomaton(capacity=1)
    automaton.extend(text[:cut])
    assert automaton.match() == naive_match(text[:cut])
    for i in range(cut, len(text)):
        automaton.extend(text[i : i + 1])
        assert automaton.match() == naive_match(text[: i + 1])
    assert automaton.text.tolist() == text


@given(text=small_texts, query=st.lists(st.integers(0, 4), max_size=12))
@settings(deadline=None, max_examples=100)
def test_match_of_another_text_equals_a_naive_rescan(text, query):
    automaton = SuffixAutomaton()
    automaton.extend(text)
    assert automaton.match_of(query) == naive_match_of(text, query)


@given(text=st.lists(st.integers(0, 3), max_size=30))  # links are never deeper than VOTE_DEPTH: the counts are exact
@settings(deadline=None, max_examples=100)
def test_the_first_token_is_the_most_frequent_then_most_recent_continuation(text):
    automaton = SuffixAutomaton(capacity=4, floor=0.0)
    automaton.extend(text)
    chain = automaton.chain(5)
    assert chain.match_length == naive_match(text)
    if chain.match_length == 0:
        assert len(chain) == 0 and chain.score == 0
        return
    seen = continuations(text, text[-chain.match_length :])
    best = max(seen, key=seen.get)
    share = seen[best][0] / sum(count for count, _ in seen.values())
    assert chain.tokens[0] == best and chain.agreement == pytest.approx(share)
    assert 0 < chain.score <= len(chain)


@given(text=small_texts)
@settings(deadline=None, max_examples=50)
def test_every_edge_count_is_exact_where_the_depth_allows(text):
    automaton = SuffixAutomaton(floor=0.0)
    automaton.extend(text[:30])
    for length in range(1, 4):
        for start in range(len(text[:30]) - length):
            suffix = text[start : start + length]
            seen = continuations(text[:30], suffix)
            if seen:
                top = max(count for count, _ in seen.values())
                chain = automaton.chain_after([9, *suffix], 1)
                assert chain.agreement == pytest.approx(top / sum(count for count, _ in seen.values()))


def test_worked_example():
    automaton, bold = SuffixAutomaton(), SuffixAutomaton(floor=0.0)
    for each in (automaton, bold):
        each.extend([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3])
    chain = automaton.chain(5)
    assert chain.tokens.tolist() == [8, 1, 2] and chain.tokens.dtype == np.int64
    assert bold.chain(6).tokens.tolist() == [8, 1, 2, 3, 8, 1]
    assert (automaton.match(), chain.match_length, chain.agreement) == (3, 3, 0.5)


def test_a_text_without_repetition_drafts_nothing():
    automaton = SuffixAutomaton()
    assert automaton.match() == 0 and len(automaton.chain(8)) == 0
    automaton.extend(range(50))
    assert automaton.match() == 0 and len(automaton.chain(8)) == 0


def test_consensus_raises_agreement_and_score():
    agree, differ = SuffixAutomaton(), SuffixAutomaton()
    agree.extend([1, 2, 3, 42, 5, 1, 2, 3, 42, 6, 1, 2, 3])
    differ.extend([1, 2, 3, 42, 5, 1, 2, 3, 43, 6, 1, 2, 3])
    assert agree.chain(1).agreement == 1.0 and agree.chain(1).tokens.tolist() == [42]
    assert differ.chain(1).agreement == 0.5 and differ.chain(1).tokens.tolist() == [43]
    assert agree.chain(1).score > differ.chain(1).score


def test_the_chain_never_runs_across_a_separator():
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, 3, SEPARATOR, 4, 5, SEPARATOR])
    assert automaton.chain_after([1, 2], 8).tokens.tolist() == [3]
    assert SuffixAutomaton().chain_after([1], 8).match_length == 0
    assert len(automaton.chain_after([5], 8)) == 0


@given(text=st.lists(st.integers(0, 3), max_size=120), size=st.integers(1, 7))
@settings(deadline=None, max_examples=50)
def test_past_max_tokens_it_equals_a_fresh_automaton_of_the_recent_text(text, size):
    automaton = SuffixAutomaton(capacity=1, max_tokens=16)
    for start in range(0, len(text), size):
        automaton.extend(text[start : start + size])
        assert len(automaton) <= 16
        assert automaton.text.tolist() == text[: start + size][-len(automaton) :]
        assert automaton.match() == naive_match(automaton.text.tolist())
    fresh = SuffixAutomaton()
    fresh.extend(automaton.text)
    assert fresh.chain(8).tokens.tolist() == automaton.chain(8).tokens.tolist()


@pytest.mark.parametrize(
    "text", [[7] * 5000, list(range(5000)), [i % 7 for i in range(5000)], [i * i % 11 * (i % 3) for i in range(5000)]]
)
def test_memory_is_linear(text):
    automaton = SuffixAutomaton(capacity=1)
    automaton.extend(text)
    assert automaton.state_count <= 2 * len(text) and automaton.edge_count <= 3 * len(text)
    assert automaton.nbytes <= 140 * 2 * len(text)


@pytest.mark.parametrize("arguments", [{"capacity": 0}, {"max_tokens": 1}, {"floor": 1.0}])
def test_bad_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SuffixAutomaton(**arguments)


@pytest.mark.parametrize("token", [-2, 2**31])
def test_bad_tokens_are_refused_and_change_nothing(token):
    automaton = SuffixAutomaton()
    with pytest.raises(ValueError, match="tokens must be in"):
        automaton.extend([1, token])
    assert len(automaton) == 0


def test_source_drafts_from_the_own_text_and_caps_by_the_match():
    source, seq = SuffixSource(factor=1.0), request(0, [1, 2, 3, 4, 5, 6, 7, 1, 2])
    source.start(seq)
    assert source.chain(seq, 10).tokens.tolist() == [3, 4]  # a match of 2 drafts 2
    emit(source, seq, [3, 4])
    assert source.chain(seq, 10).tokens.tolist() == [5, 6, 7, 1]
    assert source.chain(seq, 3).tokens.tolist() == [5, 6, 7]
    assert len(source.chain(seq, 0)) == 0
    source.finish(seq)


@pytest.mark.parametrize(("factor", "offset", "length"), [(1.0, 0.0, 4), (1.0, 1.0, 5), (0.5, 0.0, 2), (0.0, 0.0, 0)])
def test_draft_length_is_tied_to_the_match(factor, offset, length):
    source, seq = SuffixSource(factor=factor, offset=offset), request(0, [*range(12), *range(4)])
    source.start(seq)
    assert len(source.chain(seq, 10)) == length


def test_min_match_declines_weak_evidence():
    source, seq = SuffixSource(min_match=3), request(0, [1, 2, 3, 4, 1, 2])
    source.start(seq)
    assert len(source.chain(seq, 10)) == 0


def test_a_finished_output_helps_the_next_request_but_its_prompt_does_not():
    source, first = SuffixSource(), request(0, [50, 51, 52, 53, 54])
    source.start(first)
    emit(source, first, [10, 11, 12, 13, 14, 15])
    source.finish(first)
    second = request(1, [99, 10, 11, 12])
    source.start(second)
    assert source.chain(second, 8).tokens.tolist() == [13, 14, 15]
    third = request(2, [50, 51, 52, 53])
    source.start(third)
    assert len(source.chain(third, 8)) == 0
    source.reset()
    assert len(source.chain(second, 8)) == 0


def test_the_own_text_wins_unless_the_shared_match_is_longer_by_more_than_the_bias():
    source, first = SuffixSource(local_bias=2), request(0, [0])
    source.start(first)
    emit(source, first, [1, 2, 3, 4, 5, 70, 71, 72, 73, 74])
    source.finish(first)
    near = request(1, [3, 4, 5, 60, 61, 62, 8, 1, 2, 3, 4, 5])  # own match 3, shared match 5
    source.start(near)
    assert source.chain(near, 1).tokens.tolist() == [60]
    far = request(2, [4, 5, 60, 61, 62, 8, 1, 2, 3, 4, 5])  # own match 2, shared match 5
    source.start(far)
    assert source.chain(far, 1).tokens.tolist() == [70]


def test_running_requests_share_full_blocks():
    source, writer, reader = SuffixSource(share_every=4), request(0, [0]), request(1, [98, 11, 12, 13])
    source.start(writer)
    source.start(reader)
    emit(source, writer, [11, 12, 13])
    assert len(source.chain(reader, 8)) == 0
    emit(source, writer, [14])
    assert source.chain(reader, 8).tokens.tolist() == [14]


def test_requests_leave_nothing_behind():
    source = SuffixSource(max_tokens=64)
    for i in range(100):
        seq = request(i, [1, 2, 3])
        source.start(seq)
        emit(source, seq, [i % 5, i % 3])
        source.finish(seq)
        source.finish(seq)  # twice is harmless
    assert not source._local and not source._unshared and len(source._shared) <= 64


@pytest.mark.parametrize(
    "arguments", [{"factor": -1.0}, {"min_match": 0}, {"local_bias": -1}, {"share_every": -1}, {"context": 0}]
)
def test_bad_settings_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SuffixSource(**arguments)


def test_empty_chain():
    assert len(Chain.empty()) == 0 and Chain.empty(3).match_length == 3
