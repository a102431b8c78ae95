"""Chain: a source's continuation, cut to budget and depth."""

from __future__ import annotations

import numpy as np
import pytest

from fake_target import FakeTarget, drive, greedy, make_sequence
from specdec.sources.base import Chain as Draft
from specdec.sources.ngram import NgramSource
from specdec.trees.chain import Chain


class _Recorder:
    """A source that always proposes the same tokens, more than it was asked for, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def start(self, seq) -> None:
        self.shown = list(seq.token_ids)

    def chain(self, seq, max_len: int) -> Draft:
        return Draft(np.arange(1, 10), 3, 1.0, 5.0)

    def update(self, seq, emitted) -> None:
        self.shown += emitted

    def finish(self, seq) -> None: ...

    def reset(self) -> None: ...


@pytest.mark.parametrize(("budget", "depth", "expected"), [(4, 9, 4), (9, 2, 3), (1, 9, 1), (9, 0, 1), (99, 99, 10)])
def test_budget_and_depth_cap_the_chain(budget: int, depth: int, expected: int) -> None:
    builder, seq = Chain(_Recorder()), make_sequence([7])
    builder.start(seq)
    (tree,) = builder.build([seq], [budget], [depth])
    assert tree.tokens.tolist() == [7, 1, 2, 3, 4, 5, 6, 7, 8, 9][:expected]


@pytest.mark.parametrize("eos", [(), (3,)])
def test_the_source_sees_every_emitted_token_once(eos: tuple[int, ...]) -> None:
    target, source = FakeTarget(vocab=8), _Recorder()
    run = drive(target, Chain(source), [1, 2], 30, eos=eos)
    assert source.shown == [1, 2, *run.tokens]


@pytest.mark.parametrize("budget", [1, 2, 8, 60])
def test_output_is_greedy(budget: int) -> None:
    target = FakeTarget()
    assert drive(target, Chain(NgramSource()), [1, 2, 3], 60, budget).tokens == greedy(target, [1, 2, 3], 60)


def test_reset_keeps_running_requests() -> None:
    builder, seq = Chain(_Recorder()), make_sequence([7])
    builder.start(seq)
    builder.reset()
    assert len(builder.build([seq], [4], [4])[0]) == 4
    builder.finish(seq)
    builder.finish(seq)  # a cancelled request may be finished twice
