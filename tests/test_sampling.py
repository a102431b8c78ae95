"""sampling: the same processors as generate(), applied to each node's own path, once, and only where the walk goes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from specdec.draft_tree import DraftTree
from specdec.nucleus import with_fast_top_p
from specdec.randomness import Randomness
from specdec.sampling import Law, build_processor
from specdec.sequence import SamplingParams, Sequence
from specdec.verify.match import match

VOCAB = 40
EOS = [2, 7]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)


def generates_processors(model: LlamaForCausalLM, params: SamplingParams, mask: torch.Tensor) -> LogitsProcessorList:
    """What generate() builds for these parameters (transformers, GenerationMixin._get_logits_processor)."""
    config = GenerationConfig(
        do_sample=params.temperature > 0, temperature=params.temperature or None, top_k=params.top_k, top_p=params.top_p,
        min_p=params.min_p or None, repetition_penalty=params.repetition_penalty, min_new_tokens=params.min_new_tokens,
    )  # fmt: skip
    config._eos_token_tensor = torch.tensor(EOS)
    length = mask.shape[1]
    return model._get_logits_processor(config, input_ids_seq_length=length, device="cpu", model_kwargs={"attention_mask": mask})


GRID = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens"), values, strict=True))
    for values in itertools.product((0.0, 0.7, 1.0), (0, 5), (1.0, 0.8), (0.0, 0.1), (1.0, 1.3), (0, 4))
]


@pytest.mark.parametrize("pad", [0, 3])
def test_processors_are_those_of_generate(model: LlamaForCausalLM, pad: int) -> None:
    """Same classes in the same order (top-p is a faster one), same scores bit for bit, over the grid of all parameters."""
    generator = torch.Generator().manual_seed(pad)
    mask = torch.tensor([[0] * pad + [1] * 6])
    for options in GRID:
        params = SamplingParams(**options)
        expected = generates_processors(model, params, mask)
        built = build_processor(params, EOS, prompt_length=6, pad_length=pad)
        assert [type(each) for each in built or []] == [type(each) for each in with_fast_top_p(expected)], options
        if built is None:
            continue
        for new in (0, 3, 5):
            ids = torch.randint(0, VOCAB, (1, pad + 6 + new), generator=generator)
            scores = torch.randn(1, VOCAB, generator=generator) * 3
            assert torch.equal(built(ids, scores.clone()), expected(ids, scores.clone())), options


def test_plain_greedy_has_no_processor() -> None:
    assert build_processor(SamplingParams(), EOS, 5) is None
    assert build_processor(SamplingParams(top_k=5, top_p=0.5, min_p=0.1), EOS, 5) is None  # sampling-only, as do_sample=False
    assert build_processor(SamplingParams(min_new_tokens=3), (), 5) is None  # nothing to bar


def test_stop_tokens_are_barred_like_eos() -> None:
    processor = build_processor(SamplingParams(min_new_tokens=3, stop_token_ids=(9,)), EOS, 2)
    barred = processor(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, VOCAB))[0]
    assert torch.nonzero(barred == -math.inf).flatten().tolist() == [2, 7, 9]


def test_ints_are_taken_for_floats() -> None:
    params = SamplingParams(temperature=2, repetition_penalty=2, top_p=1, min_p=0)
    assert len(build_processor(params, EOS, 1)) == 2


# ---- Law --------------------------------------------------------------------------------------------------------------------

TREE = DraftTree.from_paths(4, [[5, 6], [8, 6], [5, 9]])  # nodes: 4; 5, 6; 8, 6; 9


def sequence(processor: LogitsProcessorList | None = None, pads: int = 0, **params: float) -> Sequence:
    return Sequence(0, [3, 3, 4], SamplingParams(**params), Randomness(1), pad_ids=[0] * pads, processor=processor)


class Recorder(LogitsProcessor):
    """Stateful: remembers every prefix it was shown, and writes into the scores it was given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.seen.append(input_ids[0].tolist())
        scores[:, 0] = -math.inf
        return scores


def test_processors_see_each_nodes_own_path() -> None:
    """Siblings with different histories: token 5 is penalised under node 5 only."""
    params = SamplingParams(repetition_penalty=2.0)
    processor = build_processor(params, (), 3)
    seq, logits = sequence(processor, pads=2), torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    law = Law(logits, TREE, seq)
    for node, path in [(0, []), (1, [5]), (2, [5, 6]), (3, [8]), (4, [8, 6]), (5, [5, 9])]:
        expected = processor(torch.tensor([[0, 0, 3, 3, 4, *path]]), logits[node : node + 1].clone())
        assert torch.equal(law.scores(node), expected[0])
    assert seq.buffer.with_path([]).tolist() == [[0, 0, 3, 3, 4]]  # nothing was committed


def test_stateful_processors_run_once_a_visited_node_in_order() -> None:
    recorder, logits = Recorder(), torch.zeros(6, VOCAB)
    logits[0, 5] = logits[1, 9] = logits[5, 1] = 1.0
    before = logits.clone()
    law = Law(logits, TREE, sequence(LogitsProcessorList([recorder])), keep_visited=True)
    verdict = match(TREE, law, Randomness(0))
    assert verdict.nodes.tolist() == [0, 1, 5] and verdict.next_token == 1
    law.logprob(5, 1)
    law.scores(1)
    assert recorder.seen == [[3, 3, 4], [3, 3, 4, 5], [3, 3, 4, 5, 9]]
    assert list(law.visited) == [0, 1, 5]
    assert torch.equal(logits, before)


def test_the_walk_ends_at_eos() -> None:
    """No processor sees what would follow the end of the text, even where the tree goes on."""
    recorder, logits = Recorder(), torch.zeros(6, VOCAB)
    logits[0, 5] = 1.0
    seq = sequence(LogitsProcessorList([recorder]))
    seq.eos_token_ids = frozenset([5])
    verdict = match(TREE, Law(logits, TREE, seq), seq.randomness)
    assert verdict.nodes.tolist() == [0] and verdict.next_token == 5
    assert recorder.seen == [[3, 3, 4]]


def test_processors_must_keep_the_shape() -> None:
    class Batched(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return scores + torch.zeros(2, VOCAB)

    with pytest.raises(ValueError, match=r"returned scores of shape \[2, 40\] for \[1, 40\]"):
        Law(torch.zeros(6, VOCAB), TREE, sequence(LogitsProcessorList([Batched()]))).draw(0)


def test_greedy_without_processors_copies_nothing() -> None:
    logits = torch.randn(6, VOCAB)
    law = Law(logits, TREE, sequence())
    assert law.scores(3).data_ptr() == logits[3].data_ptr()
    assert law.visited is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_float32_as_in_generate(dtype: torch.dtype) -> None:
    """Ties that the cast creates fall to the first token, as in generate()."""
    logits = torch.zeros(1, VOCAB, dtype=dtype)
    logits[0, 6] = logits[0, 9] = 1.0
    logits[0, 9] += 1e-12
    law = Law(logits, DraftTree.root_only(4), sequence())
    assert law.scores(0).dtype == torch.float32
    assert law.draw(0) == int(torch.argmax(logits[0].float())) == 6


def test_draw_uses_the_noise_of_the_absolute_position() -> None:
    logits = torch.randn(6, VOCAB)
    law = Law(logits, TREE, sequence(pads=5, temperature=1.0))
    noise = Randomness(1)
    for node, position in [(0, 3), (1, 4), (3, 4), (2, 5), (5, 5)]:  # 3 tokens without padding: the next is at position 3
        assert law.draw(node) == int(torch.argmax(logits[node] + noise.gumbel(position, VOCAB)))


def test_logprob_is_that_of_the_processed_law() -> None:
    params = {"temperature": 0.5, "top_k": 3}
    logits = torch.randn(1, VOCAB)
    law = Law(logits, DraftTree.root_only(4), sequence(build_processor(SamplingParams(**params)), **params))
    top = torch.topk(logits[0], 3)
    expected = torch.log_softmax(top.values / 0.5, -1)
    np.testing.assert_allclose([law.logprob(0, token) for token in top.indices.tolist()], expected, rtol=1e-5)
    outside = int(torch.argmin(logits))
    assert law.logprob(0, outside) == -math.inf


def test_visited_keeps_raw_and_processed() -> None:
    params = {"temperature": 0.5}
    logits = torch.randn(6, VOCAB)
    law = Law(logits, TREE, sequence(build_processor(SamplingParams(**params)), **params), keep_visited=True)
    law.draw(0)
    raw, scores = law.visited[0]
    assert torch.equal(raw, logits[0]) and torch.equal(scores, logits[0] / 0.5)
    plain = Law(logits, TREE, sequence(), keep_visited=True)
    plain.draw(0)
    assert list(plain.visited) == [0] and plain.visited[0][1].data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_refused_with_its_place(temperature: float) -> None:
    logits = torch.zeros(6, VOCAB)
    logits[1, 17] = math.nan
    law = Law(logits, TREE, sequence(temperature=temperature))
    law.draw(0)
    with pytest.raises(FloatingPointError, match=r"position 4 \(node 1 of the tree\) contain nan"):
        law.draw(1)


def test_infinity_is_greedy_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 17] = math.inf
    assert Law(logits, DraftTree.root_only(4), sequence()).draw(0) == 17
    with pytest.raises(FloatingPointError, match="inf"):
        Law(logits, DraftTree.root_only(4), sequence(temperature=1.0)).draw(0)


def test_logprob_of_an_infinite_score_is_its_limit() -> None:
    """Greedy takes the first of the tokens with +inf, whose law is equal shares among them; inf - inf would be NaN."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 17] = math.inf
    law = Law(logits, DraftTree.root_only(4), sequence())
    assert law.logprob(0, 17) == 0 and law.logprob(0, 3) == -math.inf
    logits[0, 20] = math.inf
    assert law.logprob(0, 17) == law.logprob(0, 20) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-40, 1e-300, 9e-7, 1.1e6, 1e300])
def test_factors_that_overflow_logits_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*1e-06"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_is_refused(temperature: float) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return torch.full_like(scores, -math.inf)

    law = Law(torch.zeros(1, VOCAB), DraftTree.root_only(4), sequence(LogitsProcessorList([Nothing()]), temperature=temperature))
    with pytest.raises(ValueError, match="every token is excluded at position 3"):
        law.draw(0)


def test_a_processor_that_repairs_nan_is_honoured() -> None:
    """As in generate(): what counts is what the processors return."""

    class Repair(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return torch.nan_to_num(scores, nan=-1.0)

    logits = torch.full((1, VOCAB), math.nan)
    logits[0, 8] = 0.0
    assert Law(logits, DraftTree.root_only(4), sequence(LogitsProcessorList([Repair()]))).draw(0) == 8


def test_logits_must_have_one_row_a_node() -> None:
    with pytest.raises(ValueError, match="one row a node, got 5 rows for a tree of 6"):
        Law(torch.zeros(5, VOCAB), TREE, sequence())
