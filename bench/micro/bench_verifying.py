"""What a step does with its tree: pack, reduce, accept, commit, emit; `make bench-micro ARGS="-k 'rules and vocabulary'"`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional

from bench.micro.cases import TOP_K, ladder, longest_path, make_sequence, over, timed
from specdec.attention import TreeBatch
from specdec.draft_tree import DraftTree, Kind, Verdict
from specdec.kv_cache import KVCache, LayerShape
from specdec.learning import top_k
from specdec.linear import HAVE_OP
from specdec.pacing import two_chains
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.text import Detokenizer, stop_string_check
from specdec.verify.rules import RULES

CPU = torch.device("cpu")
CERTAIN = 50.0  # a logit beside which all others are out of question
DRAWS = {"kseq": Kind.IID, "optimal_transport": Kind.IID}  # others: WITHOUT_REPLACEMENT


@over("budget")
def bench_depths(benchmark: BenchmarkFixture, budget: int) -> None:
    """A DraftTree from its arrays: checks and depths."""
    tokens, parents = np.arange(budget), np.arange(-1, budget - 1, dtype=np.int32)
    assert timed(benchmark, DraftTree, tokens, parents).depths.tolist() == list(range(budget))


@over("budget", "batch")
def bench_mask_packing(benchmark: BenchmarkFixture, budget: int, batch: int) -> None:
    """The attention op's view of a batch of trees."""
    trees = [two_chains(budget) for _ in range(batch)]
    packed = timed(benchmark, lambda: TreeBatch([512] * batch, trees, [budget] * batch, CPU).packed())
    words = packed[2][-1].numpy().view(np.uint32)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(budget, -1)[:, :budget]
    assert np.array_equal(bits.astype(bool), trees[-1].ancestor_mask())


def accepts(benchmark: BenchmarkFixture, rule: str, tree: DraftTree, vocabulary: int, temperature: float) -> None:
    """Time the walk down the tree's longest path; the logits are at hand."""
    logits, seq = torch.randn(len(tree), vocabulary), make_sequence(0, 512, temperature=temperature)
    path = longest_path(tree)
    logits[path[:-1], tree.tokens[path[1:]]] = CERTAIN

    def accept() -> Verdict:
        return RULES[rule](tree, Law(logits, tree, seq), seq.randomness)

    assert timed(benchmark, accept).nodes.tolist() == path


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@over("budget", "vocabulary")
def bench_match(benchmark: BenchmarkFixture, temperature: float, budget: int, vocabulary: int) -> None:
    """match, down a path of half of the nodes."""
    accepts(benchmark, "match", two_chains(budget), vocabulary, temperature)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "match"])
@over("budget", "vocabulary")
def bench_rules(benchmark: BenchmarkFixture, rule: str, budget: int, vocabulary: int) -> None:
    """A rule that knows q rejects a draft and accepts another at each node of a path of half of the nodes; block takes a chain."""
    tree = DraftTree.chain(range(budget)) if rule == "block" else ladder(budget)
    law = torch.softmax(torch.randn(vocabulary), 0).numpy() / 5
    probs = np.tile(law, (budget, 1))
    np.add.at(probs, (tree.parents[1:], tree.tokens[1:]), 0.4)
    kind = np.full(budget, DRAWS.get(rule, Kind.WITHOUT_REPLACEMENT), np.uint8)
    drafted = DraftTree(tree.tokens, tree.parents, kind=kind, draw_index=np.arange(budget), probs=probs)
    accepts(benchmark, rule, drafted, vocabulary, temperature=1.0)


PATHS: dict[str, Callable[[int], list[int]]] = {
    "in_place": lambda budget: list(range(budget // 2)),
    "shifted": lambda budget: [0, *range(budget // 2, budget - 1)],
    "scattered": lambda budget: list(range(0, budget, 2)),
}


@pytest.mark.parametrize("path", PATHS)
@over("budget", "batch", "context")
def bench_commit(benchmark: BenchmarkFixture, path: str, budget: int, batch: int, context: int) -> None:
    """The K/V of half of the nodes moves to the end of each row's prefix: 4 layers of Qwen2.5-1.5B's shape."""
    cache = KVCache([LayerShape(2, 128, 2, 128, torch.bfloat16, CPU)] * 4, batch, context + budget)
    nodes = PATHS[path](budget)

    def commit() -> None:
        for row in range(batch):
            cache.lengths[row] = context
            cache.commit(row, nodes)

    (buffer,) = cache.buffers()
    buffer[..., context : context + budget, :] = torch.arange(budget, dtype=torch.bfloat16)[:, None]  # whole numbers to 256
    commit()
    assert (buffer[..., context : context + len(nodes), :].float() == torch.tensor(nodes)[:, None]).all()
    timed(benchmark, commit)
    assert cache.lengths == [context + len(nodes)] * batch


@over("budget", "vocabulary", "dtype")
def bench_top_k(benchmark: BenchmarkFixture, budget: int, vocabulary: int, dtype: str) -> None:
    """The learning pass: the largest logits of every node."""
    logits = torch.randn(budget, vocabulary).to(getattr(torch, dtype))
    found = timed(benchmark, top_k, logits, TOP_K)
    assert torch.equal(logits.gather(1, torch.from_numpy(found.tokens).long()), logits.topk(TOP_K).values)


@over("vocabulary")
def bench_gumbel(benchmark: BenchmarkFixture, vocabulary: int) -> None:
    """The noise of one draw."""
    noise = timed(benchmark, Randomness(0).gumbel, 17, vocabulary)
    assert abs(noise.mean() - np.euler_gamma) < 0.05


@pytest.fixture(scope="module")
def tokenizer() -> object:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@over("context")
def bench_detokenizer(benchmark: BenchmarkFixture, tokenizer: object, context: int) -> None:
    """One more token of an output of `context` tokens becomes text, with a stop string that its end may begin."""
    detokenizer, output = Detokenizer(tokenizer, ("###",)), [token % 64 for token in range(context)]
    text = detokenizer.push(output, final=False)

    def push() -> str:
        output.append(40)
        return detokenizer.push(output, final=False)

    said = timed(benchmark, push)
    assert len(text) > context - 3
    assert said == tokenizer.decode([40])  # type: ignore[attr-defined]


@over("context")
def bench_stop_strings(benchmark: BenchmarkFixture, tokenizer: object, context: int) -> None:
    """Whether the last token of an output of `context` tokens completed a stop string."""
    seq = make_sequence(0, 8)
    seq.token_ids += [token % 64 for token in range(context)]
    last = tokenizer.decode(seq.token_ids[-6:])  # type: ignore[attr-defined]
    assert timed(benchmark, stop_string_check(tokenizer, (last,)), seq)
    assert not stop_string_check(tokenizer, (last + "?",))(seq)


@pytest.mark.parametrize("contender", ["op", "torch"])
@over("nodes", "dtype")
def bench_linear(benchmark: BenchmarkFixture, contender: str, nodes: int, dtype: str) -> None:
    """One product with a weight of SmolLM2-135M's MLP, which stays in the cache (bench/linear.py: weights that do not)."""
    if contender == "op" and not HAVE_OP:
        pytest.skip("specdec._C is not built: pip install --no-build-isolation .")
    x, weight = torch.randn(nodes, 576).to(getattr(torch, dtype)), torch.randn(1536, 576).to(getattr(torch, dtype))
    linear = torch.ops.specdec.linear if contender == "op" else functional.linear
    product = timed(benchmark, linear, x, weight)
    assert torch.allclose(product.double(), x.double() @ weight.double().T, rtol=0.02, atol=0.5)
