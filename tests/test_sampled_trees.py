"""SampledTree: what it draws is what the rules suppose, exactly, by enumeration of its own draws and of the rule's coins."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from enumeration import Chance, EnumeratingRandomness, direct_law, distance, exact_law, speculate
from oracles_verify import PROMPT, Toy, draft_law, joint_law, make_sequence, step_law
from specdec import DRAFTER_METHODS, Engine, SamplingParams
from specdec.cost_model import CostModel
from specdec.draft_tree import DraftTree, Kind, Source
from specdec.randomness import Randomness
from specdec.sequence import Sequence
from specdec.sources.base import Chain as Draft
from specdec.sources.draft_model import DraftModel, Growth
from specdec.sources.lens import Lens
from specdec.sources.suffix_automaton import SuffixSource
from specdec.trees.by_model import Costs
from specdec.trees.chain import Chain
from specdec.trees.drafted import DraftedTree
from specdec.trees.sampled import UNBORN, SampledTree, _best_first, _Draw, _drawn
from specdec.trees.trust import bins
from specdec.verify.rules import RULES
from test_draft_model import GREEDY, PROMPTS, perturbed, same_as_plain, sharp

__all__ = ["sharp"]  # a fixture

EXACT = 1e-9


class ToyDrafter:
    """DraftModel's interface over a toy."""

    def __init__(self, toy: Any) -> None:
        self.toy, self.vocab_size, self.reads_guesses, self.reader = toy, toy.vocab_size, True, toy
        self.kept: list[list[int]] = []
        self.remembers = False

    def start(self, seq: Sequence) -> None: ...

    def finish(self, seq: Sequence) -> None: ...

    def keep(self, seq: Sequence, nodes: list[int]) -> None:
        self.kept.append(nodes)

    def verified(self, seq: Sequence, nodes: list[int]) -> None: ...

    def depth_limit(self, seq: Sequence) -> int:
        return 99

    def grow(self, seqs: Seq[Sequence], guesses: Seq[Seq[int]]) -> tuple[list[Growth], list[torch.Tensor]]:
        growths, logits = [Growth(seq.token_ids[-1]) for seq in seqs], []
        for seq, growth, more in zip(seqs, growths, guesses):
            for node, token in enumerate(more):
                growth.add(node, token)
            logits.append(torch.stack([self.toy([*seq.token_ids, *more[:end]]) for end in range(len(more) + 1)]))
        return growths, logits

    def extend(self, seqs: Seq[Sequence], growths: Seq[Growth], known: Seq[int]) -> list[torch.Tensor]:
        found = []
        for seq, growth, old in zip(seqs, growths, known):
            tree = growth.tree()
            texts = [seq.token_ids + tree.tokens[tree.path(node)[1:]].tolist() for node in range(old, len(tree))]
            found.append(torch.stack([self.toy(text) for text in texts]) if texts else torch.empty(0, self.vocab_size))
        return found


def trees_of(builder: SampledTree, budget: int, depth: int) -> list[tuple[DraftTree, float]]:
    def draft(randomness: Randomness) -> DraftTree:
        seq = make_sequence()
        seq.randomness = randomness
        return builder.build([seq], [budget], [depth])[0]

    return draft_law(draft)


@pytest.mark.parametrize(
    ("vocab_size", "draw", "branching", "rules"),
    [
        (3, "iid", (2,), ("kseq", "optimal_transport", "recursive_rejection", "traversal")),
        (3, "iid", (1,), ("block", "kseq")),
        (3, "without_replacement", (2, 2), ("recursive_rejection", "traversal")),
        (4, "without_replacement", (3, 1), ("recursive_rejection",)),
        (4, "without_replacement", (1,), ("block", "traversal")),
        (4, "hybrid", (2, 2), ("recursive_rejection", "traversal")),
        (5, "hybrid", (3, 1), ("recursive_rejection",)),
        (3, "hybrid", (1,), ("block",)),
    ],
)
def test_law_is_exact(vocab_size: int, draw: str, branching: tuple[int, ...], rules: tuple[str, ...]) -> None:
    target = Toy(vocab_size, seed=vocab_size)
    drafter: Any = ToyDrafter(Toy(vocab_size, seed=vocab_size + 50, near=target, quality=0.4))
    for rule in rules:
        builder = SampledTree(drafter, draw, rule, branching)
        trees = trees_of(builder, 20, 2)
        law = joint_law(step_law(RULES[builder.rule], trees, target), target)
        assert distance(law, direct_law(target, PROMPT, 3)) < EXACT
        if rule != "block":
            assert all(len(tree) <= 20 for tree, _ in trees)


class Repeats:
    """A chain source: the last token again, or the one after it in the alphabet."""

    def __init__(self, step: int, length: int, vocab_size: int) -> None:
        self.step, self.length, self.vocab_size = step, length, vocab_size

    def start(self, seq: Sequence) -> None: ...

    def chain(self, seq: Sequence, max_len: int) -> Draft:
        many = min(max_len, self.length)
        tokens = (seq.token_ids[-1] + self.step * np.arange(1, many + 1)) % self.vocab_size
        return Draft(tokens, 3, 1.0, float(many))

    def update(self, seq: Sequence, emitted: Seq[int]) -> None: ...

    def finish(self, seq: Sequence) -> None: ...

    def reset(self) -> None: ...


@pytest.mark.parametrize("rule", ["recursive_rejection", "traversal"])
@pytest.mark.parametrize(("length", "branching"), [(1, (2, 2)), (2, (2, 2)), (2, (3, 1)), (1, (1,))])
@pytest.mark.parametrize("options", [{}, {"confidence": 0.3}, {"sampling": SamplingParams(temperature=0.4, top_k=2)}])
def test_law_is_exact_beside_a_spine(rule: str, length: int, branching: tuple[int, ...], options: dict[str, Any]) -> None:
    """Sure tokens from the text, draws off them; the drafter may have a temperature of its own."""
    target = Toy(3, seed=3)
    drafter: Any = ToyDrafter(Toy(3, seed=53, near=target, quality=0.4))
    spine = Chain(Repeats(1, length, 3))

    def draft(randomness: Randomness) -> DraftTree:
        seq = make_sequence()
        seq.randomness = randomness
        builder = SampledTree(drafter, "hybrid", rule, branching, spine=spine, **options)
        builder.start(seq)
        (tree,) = builder.build([seq], [12], [2])
        assert tree.source is not None and (tree.source == Source.CONTEXT).sum() == length
        return tree

    law = joint_law(step_law(RULES[rule], draft_law(draft), target), target)
    assert distance(law, direct_law(target, PROMPT, 3)) < EXACT


def costs(forward: float = 0.3) -> Costs:
    """A target whose forwards cost 1 (and a little for every node), a drafter whose forwards cost `forward`."""
    sizes = (1, 2, 4, 8, 16)
    target = {(1, nodes, 0): 1 + 0.005 * nodes for nodes in sizes}
    return Costs(CostModel(target), CostModel({(1, nodes, 0): forward for nodes in sizes}))


def timeless(builder: SampledTree) -> SampledTree:
    """What it builds depends on the tables alone: its own steps take no time, which the drafter's table does not believe."""
    builder.clock = lambda: 0.0
    return builder


SHAPES = [
    ("iid", (2,), "kseq"), ("iid", (2,), "optimal_transport"), ("iid", (2,), "traversal"), ("iid", (1,), "block"),
    ("without_replacement", (2, 2), "recursive_rejection"), ("without_replacement", (2, 2), "traversal"),
    ("without_replacement", (1,), "block"), ("hybrid", (2, 2), "recursive_rejection"), ("hybrid", (2, 1), "traversal"),
]  # fmt: skip


@pytest.mark.parametrize(("draw", "branching", "rule"), SHAPES)
@pytest.mark.parametrize("options", [{"confidence": 0.4}, {"costs": costs()}, {"confidence": 0.3, "costs": costs(0.1)}])
def test_law_is_exact_where_drafting_stops_early(
    draw: str, branching: tuple[int, ...], rule: str, options: dict[str, Any]
) -> None:
    target = Toy(3, seed=3)
    drafter: Any = ToyDrafter(Toy(3, seed=53, near=target, quality=0.4, scale=2.0))
    trees = trees_of(timeless(SampledTree(drafter, draw, rule, branching, **options)), 20, 2)
    if draw == "without_replacement" and "confidence" in options:
        assert len({tuple(tree.depths) for tree, _ in trees}) > 1  # the shape depends on the draws
    law = joint_law(step_law(RULES[rule], trees, target), target)
    assert distance(law, direct_law(target, PROMPT, 3)) < EXACT


WIDE = [(draw, rule) for draw, _, rule in SHAPES if draw != "iid" and rule != "block"]


@pytest.mark.parametrize(("draw", "rule"), dict.fromkeys(WIDE))
@pytest.mark.parametrize("budget", [3, 4, 6])
def test_law_is_exact_where_nodes_compete_for_the_budget(draw: str, rule: str, budget: int) -> None:
    """How many children a node gets depends on what its siblings, their children and its own law are worth."""
    target = Toy(3, seed=3)
    drafter: Any = ToyDrafter(Toy(3, seed=53, near=target, quality=0.4, scale=2.0))
    trees = trees_of(SampledTree(drafter, draw, rule, confidence=0.2), budget, 2)
    assert max(len(tree) for tree, _ in trees) == budget
    law = joint_law(step_law(RULES[rule], trees, target), target)
    assert distance(law, direct_law(target, PROMPT, 3)) < EXACT


LEARNING: list[tuple[str, Any, str, dict[str, Any], int]] = [
    *((*shape, {"confidence": 0.45, "costs": costs()}, 20) for shape in SHAPES),
    *((draw, None, rule, {}, 4) for draw, rule in dict.fromkeys(WIDE)),
]


@pytest.mark.parametrize(("draw", "branching", "rule", "options", "budget"), LEARNING)
def test_law_is_exact_over_steps_that_the_builder_learns_from(
    draw: str, branching: tuple[int, ...] | None, rule: str, options: dict[str, Any], budget: int
) -> None:
    """Consecutive steps with the real keys; what a step was worth decides the shape of the next."""
    target = Toy(vocab_size := 2 if draw == "iid" else 3, seed=3)
    drafter: Any = ToyDrafter(Toy(vocab_size, seed=53, near=target, quality=0.4))
    shapes = set()

    def run(chance: Chance) -> tuple[int, ...]:
        builder = timeless(SampledTree(drafter, draw, rule, branching, **options))
        seq = Sequence(
            0, list(PROMPT), SamplingParams(temperature=1.0, max_new_tokens=3), EnumeratingRandomness(chance, 7, (0, 0))
        )

        def build(seq: Sequence) -> DraftTree:
            (tree,) = builder.build([seq], [budget], [seq.remaining - 1])
            shapes.add((len(seq.output_ids), tuple(tree.depths)))
            return tree

        return tuple(speculate(target, RULES[rule], build, lambda *seen: builder.update(*seen, None), seq).output_ids)

    assert distance(exact_law(run), direct_law(target, PROMPT, 3)) < EXACT
    assert len(shapes) > 1


def law_of_the_second(make: Callable[[Any], SampledTree], target: Any, drafter: Any, length: int, apart: bool) -> float:
    """Distance from plain sampling of a request's law, whose builder has served another of the same seed and stream before."""

    def run(chance: Chance) -> tuple[int, ...]:
        builder, texts = make(ToyDrafter(drafter)), []
        for number in (1, 2):
            randomness = EnumeratingRandomness(chance, 7, (0, 0))
            params = SamplingParams(temperature=1.0, max_new_tokens=length)
            seq = Sequence(number, [0, 0], params, randomness.apart(number) if apart else randomness)
            builder.start(seq)
            speculate(
                target, RULES[builder.rule], lambda seq: builder.build([seq], [3], [seq.remaining - 1])[0],
                lambda *seen: builder.update(*seen, None), seq,
            )  # fmt: skip
            builder.finish(seq)
            texts.append(tuple(seq.output_ids))
        return texts[1]

    return distance(exact_law(run), direct_law(target, [0, 0], length))


def production_hybrid(drafter: Any) -> SampledTree:
    builder = DRAFTER_METHODS["hybrid"].make(drafter, None)
    assert isinstance(builder, SampledTree)
    return builder


def spine_of_all_requests(drafter: Any) -> SampledTree:
    return SampledTree(drafter, "hybrid", spine=Chain(SuffixSource(share_every=256)))


def trust_of_all_requests(drafter: Any) -> SampledTree:
    """What the first request has accepted decides whether the second draws a second level."""
    return timeless(SampledTree(drafter, "without_replacement", branching=(1,), confidence=0.0, costs=costs(0.2125)))


class LensDrafter(ToyDrafter):
    """The toy's logits are states, read through a Lens that learns from the target's at every accepted token."""

    def __init__(self, early: Toy, late: Toy) -> None:
        super().__init__(early)
        self.remembers, self.states, self.target = True, early, late
        self.lens = Lens(torch.nn.Identity(), early.vocab_size, torch.device("cpu"))
        self.toy = lambda text: self.lens(self.states(text)[None])[0]

    def verified(self, seq: Sequence, nodes: list[int]) -> None:
        for end in range(len(seq.token_ids) - len(nodes), len(seq.token_ids)):
            text = list(seq.token_ids[:end])
            self.lens.learn(self.states(text)[None], self.target(text)[None])


def lens_of_all_requests(drafter: Any) -> SampledTree:
    model: Any = LensDrafter(drafter.toy, SIMILAR[0])
    return SampledTree(model, "without_replacement", confidence=0.0)


def constant(*logits: float) -> Toy:
    """The same float32 logits after every text."""
    toy = Toy(len(logits), scale=0.0)
    toy.table += torch.tensor(logits)
    return toy


SIMILAR = Toy(2, seed=3), Toy(2, seed=53, near=Toy(2, seed=3), quality=0.4), 4
ALIKE = constant(0.85, 0.0), constant(-0.2, 0.0), 3  # at every level, so that Trust files their tokens together


@pytest.mark.parametrize(
    ("make", "toys", "remembers"),
    [
        (production_hybrid, SIMILAR, False),
        pytest.param(spine_of_all_requests, SIMILAR, True, marks=pytest.mark.slow),
        (trust_of_all_requests, ALIKE, True),
        (lens_of_all_requests, SIMILAR, True),
    ],
)
def test_law_is_exact_after_a_request_with_the_same_seed(make: Any, toys: tuple[Any, Any, int], remembers: bool) -> None:
    """verification.md 4.5: of an earlier request that had the same coins this one may know nothing; else it gets its own."""
    assert make(ToyDrafter(toys[1])).remembers == remembers  # this is what the engine goes by
    assert law_of_the_second(make, *toys, apart=remembers) < EXACT


def test_a_lens_that_knows_its_own_coins_would_bias_the_text() -> None:
    """Why `remembers` is true with it: the same request without coins of its own."""
    assert law_of_the_second(lens_of_all_requests, *SIMILAR, apart=False) > 1e-4


def test_requests_with_the_same_coins_learn_apart() -> None:
    """How broad a tree is follows from what the request's own drafts were worth, and is forgotten with it."""
    drafter: Any = ToyDrafter(Toy(4))
    params = SamplingParams(temperature=1.0)
    first, second = (Sequence(number, [0, 0], params, Randomness(1)) for number in (1, 2))
    for options, apart in (({}, True), ({"costs": costs()}, False)):
        builder = SampledTree(drafter, "without_replacement", **options)
        assert (builder.trust_of(first) is not builder.trust_of(second)) == apart == (not builder.remembers)
        old = builder.trust_of(first)
        assert builder.trust_of(first) is old
        builder.finish(first)
        assert (builder.trust_of(first) is not old) == apart


@pytest.mark.parametrize(("make", "toys"), [(spine_of_all_requests, SIMILAR), (trust_of_all_requests, ALIKE)])
def test_control_what_was_learned_from_the_same_coins_fails(make: Any, toys: tuple[Any, Any, int]) -> None:
    assert law_of_the_second(make, *toys, apart=False) > 5e-3


def test_no_level_is_drawn_that_does_not_pay() -> None:
    drafter: Any = ToyDrafter(Toy(4, seed=4, scale=3.0))
    seq = make_sequence()
    depth = {}
    for forward in (0.001, 0.15, 50.0):
        (tree,) = timeless(SampledTree(drafter, "hybrid", None, (2, 1), costs=costs(forward))).build([seq], [16], [8])
        depth[forward] = int(tree.depths.max())
    assert depth[0.001] > depth[0.15] > depth[50.0] == 1


@pytest.mark.parametrize(("draw", "rule"), [("without_replacement", "traversal"), ("hybrid", "recursive_rejection")])
def test_the_worse_the_drafter_the_broader_the_trees(draw: str, rule: str) -> None:
    """What the first tokens of a request have shown decides the shape for the others, at one budget."""
    drafter = Toy(12, seed=1, scale=2.0)
    widths, depths = {}, {}
    for name, target in (("right", drafter), ("wrong", Toy(12, seed=9, scale=2.0))):
        toy: Any = ToyDrafter(drafter)
        builder, trees = SampledTree(toy, draw, rule), []
        seq = Sequence(0, [1, 2, 3], SamplingParams(temperature=1.0, max_new_tokens=120), Randomness(3))

        def build(seq: Sequence, builder: SampledTree = builder, trees: list[DraftTree] = trees) -> DraftTree:
            trees += builder.build([seq], [10], [9])
            return trees[-1]

        speculate(target, RULES[rule], build, lambda *seen, builder=builder: builder.update(*seen, None), seq)
        widths[name] = np.mean([len(tree.children(0)) for tree in trees[-15:]])
        depths[name] = np.mean([tree.depths.max() for tree in trees[-15:]])
    assert widths["wrong"] > 1.5 * widths["right"] and depths["right"] > 1.5 * depths["wrong"]


def test_a_drafter_that_is_mostly_wrong_spends_its_nodes_at_the_root() -> None:
    """DraftedTree: it says .9 and is right 1 time of 8; after a few tokens no forward goes into what hangs on that."""
    drafter: Any = ToyDrafter(Toy(40, seed=1, scale=2.0))
    builder, shapes = DraftedTree(drafter), []
    seq = Sequence(0, [1, 2, 3], SamplingParams(temperature=1.0), Randomness(3))
    for step in range(17):
        (tree,) = builder.build([seq], [20], [9])
        shapes.append((len(tree.children(0)), int(tree.depths.max())))
        for kind in range(2):
            builder.trusts[seq.params].learn(np.array([kind]), np.log(np.array([0.9])), np.array([step % 8 == 7]))
    assert shapes[0][1] >= 4 and shapes[0][0] < 10
    assert shapes[-1][1] <= 2 and shapes[-1][0] >= 15


def test_the_mean_tree_has_the_size_that_pays() -> None:
    """With costs: a target whose nodes are dear gets fewer of them."""
    drafter: Any = ToyDrafter(Toy(30, seed=4, scale=0.3))
    seq, sizes = make_sequence(), []
    for node in (0.0, 0.1, 1.0):
        table = {(1, nodes, 0): 1 + node * nodes for nodes in range(1, 33)}
        costs = Costs(CostModel(table), CostModel({(1, 1, 0): 0.05}))
        (tree,) = timeless(SampledTree(drafter, "without_replacement", costs=costs)).build([seq], [32], [8])
        sizes.append(len(tree))
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2] >= 4


def test_the_budget_goes_to_the_best_draws() -> None:
    """The docstring's example."""
    mean = np.array([0.5, 0.1])
    start = _Draw(0.5, 7, 0, 0, np.array([0.5, 0.3]))
    draws = list(islice(_best_first([start], mean, deepest=4, confidence=0.2), 3))
    assert [(draw.node, draw.chance) for draw in draws] == [(7, 0.5), (7, pytest.approx(0.3)), (UNBORN, 0.25)]


def test_what_the_draws_will_be_is_foreseen() -> None:
    """Against draws: how probable to the drafter the first, second, ... token is."""
    law, many = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]), 4
    rng, found = np.random.default_rng(0), np.zeros((many, len(law)))
    for _ in range(4000):
        found[np.arange(many), rng.choice(len(law), many, replace=False, p=law)] += 1 / 4000
    places = bins(np.log(law))
    foreseen = _drawn(law, many)
    assert np.allclose(foreseen.sum(1), 1.0, atol=0.03)
    for place in set(places.tolist()):
        assert foreseen[:, place] == pytest.approx(found[:, places == place].sum(1), abs=0.12)


def test_a_law_recorded_wrong_is_seen() -> None:
    """Negative control: draws by a law that is not the one in `probs`."""
    target = Toy(4, seed=4)
    drafter: Any = ToyDrafter(Toy(4, seed=54, near=target, quality=0.4))
    trees = trees_of(SampledTree(drafter, "without_replacement", None, (2, 1)), 20, 2)
    for tree, _ in trees:
        assert tree.probs is not None
        tree.probs = np.sqrt(tree.probs)
    law = joint_law(step_law(RULES["recursive_rejection"], trees, target), target)
    assert distance(law, direct_law(target, PROMPT, 3)) > 5e-3


@pytest.mark.parametrize("draw", ["iid", "without_replacement", "hybrid"])
@pytest.mark.parametrize("budget", [1, 2, 5, 9, 30])
def test_budget_is_a_hard_cap_and_the_shape_is_fixed(draw: str, budget: int) -> None:
    drafter: Any = ToyDrafter(Toy(50, seed=1, scale=0.1))
    sizes = set()
    for seed in range(20):
        seq = Sequence(0, [1, 2, 3], SamplingParams(temperature=1.0), Randomness(seed))
        (tree,) = SampledTree(drafter, draw).build([seq], [budget], [6])
        assert len(tree) <= budget and tree.depths.max(initial=0) <= 6
        draws = len(tree) if tree.multiplicity is None or draw != "iid" else int(tree.multiplicity.sum())
        sizes.add(draws if draw != "iid" else tuple(np.bincount(tree.depths, tree.multiplicity)))
    assert len(sizes) == 1  # no token decides how many others are drawn


def test_virtual_sampling_order_and_kinds() -> None:
    drafter: Any = ToyDrafter(Toy(6, seed=2))
    seq = Sequence(0, [1, 2, 3], SamplingParams(temperature=1.0), Randomness(5))
    (tree,) = SampledTree(drafter, "hybrid", None, (3, 1)).build([seq], [8], [2])
    children = tree.children(0)
    assert tree.kind is not None and tree.probs is not None and tree.draw_index is not None
    assert [Kind(kind) for kind in tree.kind[children]] == [Kind.DETERMINISTIC] + [Kind.WITHOUT_REPLACEMENT] * 2
    sure, *drawn = tree.tokens[children].tolist()
    assert tree.probs[0, sure] == 0 and (tree.probs[0, drawn] > 0).all() and tree.draw_index[children].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "greedy"}, "draw must be one of iid, without_replacement, hybrid, got 'greedy'"),
        ({"rule": "luck"}, "rule must be one of match, "),
        ({"rule": "kseq"}, "kseq is not lossless for WITHOUT_REPLACEMENT nodes; fix: verify them with "),
        ({"rule": "block"}, "block takes chains; fix: branching="),
        ({"branching": ()}, "branching must be numbers >= 1, at least one"),
        ({"branching": (2, 0)}, "branching must be numbers >= 1, at least one"),
        ({"draw": "iid", "spine": Chain(Repeats(1, 1, 3))}, "spine needs draw=.hybrid."),
        ({"sampling": SamplingParams()}, "sampling must have a temperature above 0"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    drafter: Any = ToyDrafter(Toy(3))
    with pytest.raises(ValueError, match=message):
        SampledTree(drafter, **options)


ENGINES = [
    ("iid", "kseq"), ("iid", "optimal_transport"), ("iid", "recursive_rejection"), ("iid", "traversal"),
    ("without_replacement", "recursive_rejection"), ("without_replacement", "traversal"), ("without_replacement", "match"),
    ("hybrid", "recursive_rejection"), ("hybrid", "traversal"),
]  # fmt: skip


def engine_of(model: Any, draw: str, rule: str, noise: float = 0.3) -> Engine:
    builder = SampledTree(DraftModel(perturbed(model, noise), model.config.vocab_size), draw, rule)
    return Engine(model, method=builder, budget=12)


@pytest.mark.parametrize(("draw", "rule"), ENGINES)
def test_greedy_text_is_that_of_the_target(sharp: Any, draw: str, rule: str) -> None:
    same_as_plain(engine_of(sharp, draw, rule), sharp, GREEDY)


@pytest.mark.parametrize(("draw", "rule"), ENGINES)
def test_a_seed_fixes_the_text_alone_or_in_a_batch(sharp: Any, draw: str, rule: str) -> None:
    """The same prompt index and seed: same text, whatever else is in the batch. The drafts count, so the method is part of it."""
    params = SamplingParams(max_new_tokens=24, temperature=1.5, top_k=30, seed=11)
    engine = engine_of(sharp, draw, rule)
    batch = engine.generate(PROMPTS, params)
    assert engine.generate(PROMPTS, params)[2].token_ids == batch[2].token_ids
    assert engine.generate(PROMPTS[:1], params)[0].token_ids == batch[0].token_ids
    assert sum(len(result.token_ids) for result in batch) > 1.1 * sum(result.steps for result in batch)  # drafts are accepted


@pytest.mark.parametrize(
    ("method", "with_costs", "own"), [("hybrid", False, False), ("hybrid", True, True), ("draft_model", True, False)]
)
def test_requests_have_coins_of_their_own_where_they_learn_from_each_other(
    sharp: Any, method: str, with_costs: bool, own: bool
) -> None:
    """The noise of `match` is the seed's alone in any case."""
    drafter = DraftModel(sharp, sharp.config.vocab_size)
    engine = Engine(sharp, method=DRAFTER_METHODS[method].make(drafter, costs() if with_costs else None), budget=12)
    first, again = (engine.new_sequence([1, 2], GREEDY, Randomness(3, (0, 0))).randomness for _ in range(2))
    assert torch.equal(first.gumbel(5, 50), again.gumbel(5, 50))
    coins = [[randomness.pick(np.ones(1000), step, 0, 0, "emit") for step in range(8)] for randomness in (first, again)]
    assert (coins[0] != coins[1]) == own


@pytest.mark.parametrize("method", DRAFTER_METHODS)
def test_a_seed_fixes_the_text_of_one_method_and_budget(sharp: Any, method: str) -> None:
    """Whatever the engine wrote before: here the very text, which hybrid's spine once took up."""
    params = SamplingParams(max_new_tokens=30, temperature=0.8, top_k=8, seed=11)
    engine = Engine(sharp, method=method, drafter=perturbed(sharp, 0.5), budget=12)
    texts = [[result.token_ids for result in engine.generate(PROMPTS, params)] for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("rule", ["traversal"])
def test_a_processor_with_a_memory_is_refused_where_rejected_nodes_are_read(sharp: Any, rule: str) -> None:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Remembers(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

    engine = engine_of(sharp, "without_replacement", rule)
    with pytest.raises(ValueError, match="has a Remembers, which may keep a state, and the acceptance rule 'traversal'"):
        engine.new_sequence([1, 2], GREEDY, Randomness(0), processor=LogitsProcessorList([Remembers()]))
