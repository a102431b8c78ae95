"""Which rule is lossless for which tree: a rule refuses every tree that was not drawn as its proof supposes.

A node's `kind` says how its token came about, given its parent and its earlier siblings (verification.md sections 3.1, 4.3):

* DETERMINISTIC: a function of the committed text and of past steps (n-grams, tables, the drafter's top-k).
* IID: drawn from norm(probs[parent]). Equal draws are one node, `multiplicity` counts them; `draw_index` orders first draws.
* WITHOUT_REPLACEMENT: drawn from norm(probs[parent]) with its earlier siblings of this kind, by `draw_index`, set to 0.
* SHARED_NOISE: chosen with the noise of the target's own draw, of which every rule but `match` would make a bias (section 4.5).

What no rule can see, the builder must keep: deterministic children are fixed before any sibling is drawn, a sampled child is never
dropped because of its own token (keep it as a `virtual` node), and probs is the very row that was drawn from, after temperature
and truncation. `match` needs none of this: it takes every tree without virtual nodes.
"""

from __future__ import annotations

import numpy as np

from specdec.draft_tree import DraftTree, Kind

__all__ = ["LEGAL_KINDS", "check", "check_pair"]

_WITH_Q = frozenset({Kind.DETERMINISTIC, Kind.WITHOUT_REPLACEMENT, Kind.IID})

LEGAL_KINDS: dict[str, frozenset[Kind]] = {
    "match": frozenset(Kind),
    "recursive_rejection": _WITH_Q,
    "kseq": frozenset({Kind.DETERMINISTIC, Kind.IID}),
    "optimal_transport": frozenset({Kind.DETERMINISTIC, Kind.IID}),
    "block": _WITH_Q,  # chains only
    "traversal": _WITH_Q,
}


def check(rule: str, tree: DraftTree) -> None:
    """Refuse `tree` where `rule` would not be lossless on it.

    Raises:
        ValueError: a node of a kind that the rule does not take; a branching tree for block; siblings that carry one token, or of
            both sampled kinds, or without an order of their draws; multiplicity of a node that was not drawn i.i.d.; a virtual node
            with children; sampled nodes without `probs`, or with a token that `probs` excludes.
    """
    parents = tree.parents[1:]
    kinds = np.zeros(len(parents), np.uint8) if tree.kind is None else tree.kind[1:]
    _check_kinds(rule, kinds)
    _check_siblings(rule, tree, kinds)
    if tree.virtual is not None:
        bad = np.flatnonzero(tree.virtual[parents])
        if len(bad) or tree.virtual[0]:
            raise ValueError(f"{rule}: virtual nodes are leaves, got one with children, the root included; do not expand them")
    sampled = np.flatnonzero(kinds != Kind.DETERMINISTIC)
    if len(sampled):
        _check_draws(rule, tree, kinds, sampled)


def check_pair(rule: str, kind: Kind, chain: bool) -> None:
    """Refuse a rule for all trees of this kind, before any is drafted.

    Raises:
        ValueError: no such rule, one that is not lossless for the kind, or block for trees that branch.
    """
    if rule not in LEGAL_KINDS:
        raise ValueError(f"rule must be one of {', '.join(LEGAL_KINDS)}, got {rule!r}")
    if kind not in LEGAL_KINDS[rule]:
        raise ValueError(f"{rule} is not lossless for {kind.name} nodes; fix: verify them with {_rules_for(kind)}")
    if rule == "block" and not chain:
        raise ValueError("block takes chains; fix: branching=(1,), or verify with traversal")


def _check_kinds(rule: str, kinds: np.ndarray) -> None:
    for kind in Kind:
        if kind not in LEGAL_KINDS[rule] and kind in kinds:
            node = int(np.argmax(kinds == kind)) + 1
            raise ValueError(
                f"{rule} is not lossless for {kind.name} nodes, got node {node}; "
                f"fix: verify with {_rules_for(kind)}, or draft {_kinds_of(rule)} nodes"
            )


def _check_siblings(rule: str, tree: DraftTree, kinds: np.ndarray) -> None:
    parents, tokens = tree.parents[1:], tree.tokens[1:]
    if rule == "block" and len(np.unique(parents)) < len(parents):
        raise ValueError(
            "block takes a chain, got a node with several children; fix: verify with traversal or recursive_rejection"
        )
    if len(np.unique(np.stack([parents, tokens]), axis=1).T) < len(parents):
        raise ValueError(f"{rule}: two siblings carry the same token; merge them into one node and count its multiplicity")
    both = set(parents[kinds == Kind.IID].tolist()) & set(parents[kinds == Kind.WITHOUT_REPLACEMENT].tolist())
    if both:
        raise ValueError(
            f"{rule}: node {min(both)} has IID and WITHOUT_REPLACEMENT children, whose joint law is not recorded; draw all of one kind"
        )


def _check_draws(rule: str, tree: DraftTree, kinds: np.ndarray, sampled: np.ndarray) -> None:
    parents, nodes = tree.parents[sampled + 1], sampled + 1
    if tree.probs is None or tree.probs.ndim != 2 or len(tree.probs) != len(tree):
        shape = None if tree.probs is None else list(tree.probs.shape)
        raise ValueError(
            f"{rule} needs the law that node {nodes[0]} was drawn from: set DraftTree.probs to [{len(tree)}, V], got {shape}"
        )
    drawn = tree.probs[parents, tree.tokens[nodes]]
    if not np.all(drawn > 0):
        node = int(nodes[np.argmin(drawn > 0)])
        raise ValueError(
            f"{rule}: probs gives the token of sampled node {node} the probability {drawn.min()}, so it was drawn from another law; "
            "record probs after temperature and truncation"
        )
    order = np.zeros(len(tree), np.int32) if tree.draw_index is None else tree.draw_index
    if len(np.unique(np.stack([parents, order[nodes]]), axis=1).T) < len(nodes):
        raise ValueError(f"{rule}: sampled siblings need different draw_index values (the order of their first draws)")
    if tree.multiplicity is not None:
        counts = tree.multiplicity[nodes]
        bad = np.flatnonzero((counts < 1) | ((counts > 1) & (kinds[sampled] == Kind.WITHOUT_REPLACEMENT)))
        if len(bad):
            raise ValueError(
                f"{rule}: multiplicity of node {nodes[bad[0]]} is {counts[bad[0]]}; it is >= 1 for IID nodes and 1 for all others"
            )


def _rules_for(kind: Kind) -> str:
    return " or ".join(rule for rule, kinds in LEGAL_KINDS.items() if kind in kinds)


def _kinds_of(rule: str) -> str:
    return " or ".join(kind.name for kind in Kind if kind in LEGAL_KINDS[rule])
