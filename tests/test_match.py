"""match: the walk itself, its exact law by enumeration (with controls that must fail), and equality with plain decoding."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from enumeration import Chance, EnumeratingRandomness, direct_law, distance, exact_law, speculate
from oracles import KeyedGumbel, greedy_loop, next_scores, sample_loop
from power import biased, excess
from specdec.draft_tree import ROOT, DraftTree, Verdict
from specdec.randomness import Randomness, stream_of
from specdec.sampling import Law, build_processor
from specdec.sequence import SamplingParams, Sequence
from specdec.verify.match import match

EXACT = 1e-9
VISIBLE = 5e-3  # the least total variation that a negative control must show


# ---- toys -------------------------------------------------------------------------------------------------------------------


class ToyTarget:
    """Logits [V] that depend on the last two tokens and on the length."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self._table = torch.randn(vocab_size, vocab_size, 4, vocab_size, generator=torch.Generator().manual_seed(seed)) * 1.2

    def __call__(self, ids: list[int]) -> torch.Tensor:
        return self._table[ids[-1], ids[-2], len(ids) % 4]


class Adversary:
    """Trees of changing shape, chosen by all past output and by what earlier steps accepted and rejected.

    After even sums it drafts what was emitted most after this token, else what was never seen; a rejection widens the tree.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts = np.zeros((vocab_size, vocab_size))
        self.width, self.depth = 1, 2

    def build(self, seq: Sequence) -> DraftTree:
        sign = -1 if sum(seq.token_ids) % 2 == 0 else 1

        def paths(token: int, depth: int) -> list[list[int]]:
            if depth == 0:
                return [[]]
            best = np.argsort(sign * self.counts[token], kind="stable")[: self.width].tolist()
            return [[child, *rest] for child in best for rest in paths(child, depth - 1)]

        return DraftTree.from_paths(seq.token_ids[-1], paths(seq.token_ids[-1], min(self.depth, seq.remaining - 1)))

    def learn(self, seq: Sequence, tree: DraftTree, verdict: Verdict) -> None:
        emitted = seq.accept_lengths[-1]
        for before, after in pairwise(seq.token_ids[-emitted - 1 :]):
            self.counts[before, after] += 1
        for node in set(range(1, len(tree))) - set(verdict.nodes.tolist()):
            self.counts[tree.tokens[tree.parents[node]], tree.tokens[node]] -= 0.5
        self.width = min(self.vocab_size - 1, self.width + 1) if emitted == 1 else 1
        self.depth = 1 + (self.depth + emitted) % 2


class NoiseReader(Adversary):
    """Also drafts what the target's own noise favours: allowed, since what is emitted before t depends on noise before t only."""

    def build(self, seq: Sequence) -> DraftTree:
        tilted = torch.linspace(-1.0, 1.0, self.vocab_size) * (1 + self.counts.sum() % 3)
        ahead = [seq.randomness.choose(len(seq.token_ids) + step, tilted) for step in range(min(2, seq.remaining - 1))]
        return DraftTree.from_paths(seq.token_ids[-1], [ahead, [*ahead[:-1], 0]])


def run_toy(
    chance: Chance,
    target: ToyTarget,
    length: int,
    rule=match,
    builder=Adversary,
    stream=(0, 0),
    noise=EnumeratingRandomness,
    **law,
) -> Sequence:
    params = SamplingParams(**{"temperature": 1.0, "max_new_tokens": length, **law})
    seq = Sequence(0, [0, 1], params, noise(chance, 7, stream), processor=build_processor(params, (), 2))
    drafts = builder(target.vocab_size)
    return speculate(target, rule, drafts.build, drafts.learn, seq)


def toy_law(target: ToyTarget, length: int, **options) -> dict[tuple[int, ...], float]:
    return exact_law(lambda chance: tuple(run_toy(chance, target, length, **options).output_ids))


# ---- the walk ---------------------------------------------------------------------------------------------------------------


def greedy_case(tree: DraftTree, winners: list[int]) -> Verdict:
    logits = torch.zeros(len(tree), 10)
    logits[torch.arange(len(tree)), winners] = 1.0
    seq = Sequence(0, [9, int(tree.tokens[ROOT])], SamplingParams(), Randomness(0))
    return match(tree, Law(logits, tree, seq), seq.randomness)


@pytest.mark.parametrize(
    ("paths", "winners", "nodes", "next_token"),
    [
        ([[2, 4], [3]], [2, 5, 0, 0], [0, 1], 5),  # the docstring's example
        ([[2, 4], [3]], [2, 4, 6, 0], [0, 1, 2], 6),  # a whole path accepted: the bonus token
        ([[2, 4], [3]], [3, 0, 0, 7], [0, 3], 7),  # the other branch
        ([[2, 4], [3]], [8, 0, 0, 0], [0], 8),  # nothing accepted: plain decoding
        ([], [8], [0], 8),
    ],
)
def test_walk(paths, winners, nodes, next_token) -> None:
    verdict = greedy_case(DraftTree.from_paths(1, paths), winners)
    assert verdict.nodes.tolist() == nodes and verdict.nodes.dtype == np.int32
    assert verdict.next_token == next_token


def test_virtual_nodes_are_refused() -> None:
    tree = DraftTree(np.array([1, 2]), np.array([-1, 0]), virtual=np.array([False, True]))
    with pytest.raises(ValueError, match="virtual"):
        greedy_case(tree, [2, 2])


# ---- exact laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "vocab_size", "length"), [(Adversary, 3, 5), (Adversary, 4, 4), (Adversary, 5, 3), (NoiseReader, 3, 3)]
)
def test_joint_law_is_exact_over_several_steps(builder, vocab_size: int, length: int) -> None:
    target = ToyTarget(vocab_size, seed=vocab_size)
    assert distance(toy_law(target, length, builder=builder), direct_law(target, [0, 1], length)) < EXACT


def test_law_is_exact_with_processors_on_each_path() -> None:
    """Repetition penalty and top-k make siblings' laws depend on their own path."""
    target = ToyTarget(4, seed=3)
    options = {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.5}
    processor = build_processor(SamplingParams(**options), (), 2)
    direct = direct_law(lambda ids: processor(torch.tensor([ids]), target(ids)[None])[0], [0, 1], 4)
    law = toy_law(target, 4, **options)
    assert distance(law, direct) < EXACT
    assert distance(law, direct_law(target, [0, 1], 4)) > VISIBLE


def test_drafts_are_accepted_and_rejected() -> None:
    """The toys exercise the walk: steps of every length occur."""
    lengths = exact_law(lambda chance: max(run_toy(chance, ToyTarget(3), 4).accept_lengths))
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 0.01


def test_every_position_is_drawn_once_with_its_own_key() -> None:
    def keys(chance: Chance) -> tuple:
        seq = run_toy(chance, ToyTarget(3), 4, stream=(5, 6))
        assert seq.output_length == 4
        return tuple(chance.keys)

    assert set(exact_law(keys)) == {tuple(("gumbel", 7, (5, 6), position) for position in range(2, 6))}


def pair_law(noise=EnumeratingRandomness) -> dict:
    target = ToyTarget(3, seed=2)

    def pair(chance: Chance) -> tuple:
        return tuple(
            tuple(run_toy(chance, target, 2, stream=stream_of(0, sample), noise=noise).output_ids) for sample in range(2)
        )

    return exact_law(pair)


def independent_pairs() -> dict:
    one = direct_law(ToyTarget(3, seed=2), [0, 1], 2)
    return {(a, b): one[a] * one[b] for a in one for b in one}


def test_two_samples_of_one_prompt_are_independent() -> None:
    assert distance(pair_law(), independent_pairs()) < EXACT


# ---- controls that must fail ------------------------------------------------------------------------------------------------


class StreamlessRandomness(EnumeratingRandomness):
    def __init__(self, chance: Chance, seed: int, stream: tuple[int, ...]) -> None:
        super().__init__(chance, seed, ())


class SharedPositions(EnumeratingRandomness):
    def choose(self, position: int, scores: torch.Tensor) -> int:
        return super().choose(position // 2, scores)


def redraw_after_mismatch(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    verdict = match(tree, law, randomness)
    last = int(verdict.nodes[-1])
    return Verdict(verdict.nodes, randomness.choose(1000 + law.position(last), law.scores(last)))


def longest_branch(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """Every root-to-leaf path walks with its own noise; the longest accepted one wins."""
    leaves = sorted(set(range(len(tree))) - set(tree.parents.tolist()))
    best = Verdict(np.zeros(0, np.int32), -1)
    for branch, leaf in enumerate(leaves):
        nodes, (node, *rest) = [], tree.path(leaf)
        while True:
            nodes.append(node)
            token = randomness.choose(1000 * (branch + 1) + law.position(node), law.scores(node))
            if not rest or tree.tokens[rest[0]] != token:
                break
            node, *rest = rest
        if len(nodes) > len(best.nodes):
            best = Verdict(np.array(nodes, np.int32), token)
    return best


def test_control_noise_without_stream_fails() -> None:
    assert distance(pair_law(noise=StreamlessRandomness), independent_pairs()) > VISIBLE


@pytest.mark.parametrize("wrong", [{"rule": redraw_after_mismatch}, {"rule": longest_branch}, {"noise": SharedPositions}])
def test_control_wrong_rules_fail(wrong) -> None:
    target = ToyTarget(3, seed=4)
    assert distance(toy_law(target, 3, **wrong), direct_law(target, [0, 1], 3)) > VISIBLE


# ---- real noise -------------------------------------------------------------------------------------------------------------


def real_counts(target, trials: int, reuse: int = 1) -> Counter:
    counts: Counter = Counter()
    params = SamplingParams(temperature=1.0, max_new_tokens=2)
    for trial in range(trials):
        seq = Sequence(0, [0, 1], params, Randomness(3, stream_of(0, trial // reuse)))
        drafts = Adversary(3)
        counts[tuple(speculate(target, match, drafts.build, drafts.learn, seq).output_ids)] += 1
    return counts


def joint_excess(counts: Counter, law: dict[tuple[int, ...], float]) -> float:
    return excess(np.array([counts[text] for text in law]), np.array(list(law.values())))


def test_chi_square_of_joint_with_gumbel_noise() -> None:
    target, trials = ToyTarget(3, seed=5), 1000
    direct = direct_law(target, [0, 1], 2)
    assert joint_excess(real_counts(target, trials), direct) < 1
    assert joint_excess(real_counts(target, trials, reuse=100), direct) > 1  # control: streams used 100 times


def biased_logits(logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(biased(torch.softmax(logits.double(), -1).numpy())).log()


@pytest.mark.slow
def test_chi_square_of_joint_sees_a_bias_of_2_percent() -> None:
    target, trials = ToyTarget(3, seed=5), 60_000
    direct = direct_law(target, [0, 1], 2)
    assert joint_excess(real_counts(target, trials), direct) < 1

    def wrong(ids: list[int]) -> torch.Tensor:
        return biased_logits(target(ids)) if len(ids) == 2 else target(ids)

    assert joint_excess(real_counts(wrong, trials), direct) > 1


@pytest.mark.slow
def test_chi_square_of_one_token_sees_a_bias_of_2_percent() -> None:
    """verification.md 7, T3: V = 16 and 2e5 trials, the four most probable tokens drafted."""
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    law = torch.softmax(logits.double(), -1).numpy()
    tree = DraftTree.from_paths(1, [[token] for token in np.argsort(-law)[:4].tolist()])
    params = SamplingParams(temperature=1.0)

    def counts(logits: torch.Tensor) -> np.ndarray:
        rows, tokens = logits.float().repeat(len(tree), 1), []
        for trial in range(200_000):
            seq = Sequence(0, [0, 1], params, Randomness(5, (trial,)))
            verdict = match(tree, Law(rows, tree, seq), seq.randomness)
            tokens.append(int(tree.tokens[verdict.nodes[1]]) if len(verdict.nodes) > 1 else verdict.next_token)
        return np.bincount(tokens, minlength=16)

    assert excess(counts(logits), law) < 1
    assert excess(counts(biased_logits(logits)), law) > 1


# ---- equality with plain decoding -------------------------------------------------------------------------------------------


@lru_cache
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # random initialisation is nearly uniform: peak it
    return model


PROMPT = [5, 17, 3, 3, 29]


def speculate_on(model, seq: Sequence, truth: list[int]) -> list[int]:
    """Trees of the true continuation up to a wrong token at a moving depth, plus wrong branches at every node of it."""

    def build(seq: Sequence) -> DraftTree:
        done = seq.output_length
        good = truth[done : done + done % 4]
        wrong = [[*good[:depth], (true + 1) % 61, 4] for depth, true in enumerate(truth[done : done + len(good) + 1])]
        return DraftTree.from_paths(seq.token_ids[-1], [*wrong[:1], good, *wrong[1:]])

    return speculate(lambda ids: next_scores(model, ids), match, build, lambda *_: None, seq).output_ids


SAMPLERS = [
    {"temperature": 0.3},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "min_new_tokens": 6},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_sampled_text_equals_generate_with_the_same_noise(sampler) -> None:
    """Oracle: model.generate(do_sample=False), transformers' warpers, then the keyed noise; and a plain loop without cache."""
    model, count = tiny_llama(), 16
    params = SamplingParams(**sampler, max_new_tokens=count, seed=11)
    randomness = Randomness(11, stream_of(0, 0))
    warpers = build_processor(SamplingParams(**{**sampler, "repetition_penalty": 1.0, "min_new_tokens": 0})) or []
    penalties = {key: sampler[key] for key in ("repetition_penalty", "min_new_tokens") if key in sampler}
    oracle = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long), do_sample=False,
        max_new_tokens=count, logits_processor=LogitsProcessorList([*warpers, KeyedGumbel([randomness])]), **penalties,
    )[0, len(PROMPT) :].tolist()  # fmt: skip
    processor = build_processor(params, [2], len(PROMPT))
    looped = sample_loop(model, PROMPT, count, LogitsProcessorList([*(processor or []), KeyedGumbel([randomness])]), eos=[2])
    assert looped == oracle
    seq = Sequence(0, list(PROMPT), params, randomness, frozenset([2]), processor=processor)
    assert speculate_on(model, seq, oracle) == oracle
    assert max(seq.accept_lengths) > 1


def test_greedy_text_equals_argmax_loop() -> None:
    model = tiny_llama()
    truth = greedy_loop(model, PROMPT, 16)
    seq = Sequence(0, list(PROMPT), SamplingParams(max_new_tokens=16), Randomness(0))
    assert speculate_on(model, seq, truth) == truth
    assert max(seq.accept_lengths) == 4


def test_samples_of_one_prompt_differ_and_repeat_in_any_order() -> None:
    target, params = ToyTarget(16), SamplingParams(temperature=1.0, max_new_tokens=12)

    def text(sample: int) -> tuple[int, ...]:
        drafts = Adversary(16)
        seq = Sequence(0, [0, 1], params, Randomness(1, stream_of(0, sample)))
        return tuple(speculate(target, match, drafts.build, drafts.learn, seq).output_ids)

    texts = [text(sample) for sample in range(8)]
    assert len(set(texts)) == 8
    assert [text(sample) for sample in reversed(range(8))] == texts[::-1]
