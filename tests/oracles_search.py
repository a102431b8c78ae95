"""Slow and obvious: the statistics of a search tree from its definition, and BG-MCTS's scores by walking every subtree."""

from __future__ import annotations

import math

from specdec.search import ROOT, Kind, NodeStatus, SearchTree

__all__ = ["child_scores", "in_tree", "statistics", "subtree", "widening_score"]


def in_tree(tree: SearchTree, node: int) -> bool:
    """Part of the statistics: told, not dropped, not a forced answer."""
    gone = tree.status[node] in (NodeStatus.PENDING, NodeStatus.DROPPED)
    return not gone and (node == ROOT or tree.kind[node] != Kind.FORCED)


def subtree(tree: SearchTree, top: int) -> list[int]:
    """Nodes below `top` and itself."""
    nodes = []
    for node in range(len(tree)):
        above = node
        while above not in (top, -1):
            above = tree.parent[above]
        if above == top and in_tree(tree, node):
            nodes.append(node)
    return nodes


def bias_depth(tree: SearchTree, node: int) -> float:
    """d(x) of the formula, capped."""
    answered = tree.status[node] == NodeStatus.ANSWERED and not tree.answered_bias
    return 0.0 if answered else min(tree.depth[node], tree.depth_limit)


def statistics(tree: SearchTree, node: int) -> dict[str, float]:
    """visits, sum_q, sum_depth and the children's sums of one node; a merged sibling counts as often as it was drawn."""
    below = [x for x in subtree(tree, node) if x != ROOT]
    children = [x for x in range(len(tree)) if tree.parent[x] == node and in_tree(tree, x)]
    scored = [x for x in children if not tree.unscored[x]]
    return {
        "visits": sum(tree.copies[x] for x in below) + (node == ROOT),
        "sum_q": math.fsum(tree.copies[x] * tree.q[x] for x in below),
        "sum_depth": math.fsum(tree.copies[x] * bias_depth(tree, x) for x in below),
        "child_count": sum(tree.copies[x] for x in scored),
        "child_sum": math.fsum(tree.copies[x] * tree.q[x] for x in scored),
        "child_squares": math.fsum(tree.copies[x] * tree.q[x] ** 2 for x in scored),
        "child_exp": math.fsum(math.exp(tree.q[x]) for x in children),
    }


def child_scores(
    tree: SearchTree, node: int, rho: float, dbar: float, g_max: float = math.inf, count_root: bool = False
) -> list[float]:
    """S(p, s, rho) of search.md 5.2 for every child, c = sqrt 2, kappa = 1."""
    children = tree.children[node]
    visits = 1 if node == ROOT and not count_root else len(subtree(tree, node))
    scores = []
    for child in children:
        below = subtree(tree, child)
        depths = [0 if tree.status[x] == NodeStatus.ANSWERED else tree.depth[x] for x in below]
        value = sum(tree.q[x] + (1 - rho) * min(d / dbar, g_max) for x, d in zip(below, depths)) / len(below)
        prior = math.exp(tree.q[child]) / sum(math.exp(tree.q[other]) for other in children)
        scores.append(value + rho * math.sqrt(2) * prior * math.sqrt(math.log(visits) / len(below)))
    return scores


def widening_score(tree: SearchTree, node: int, rho: float) -> float:
    """E(p, rho) with lambda = 1."""
    scores = [tree.q[child] for child in tree.children[node]]
    mean = sum(scores) / len(scores)
    return mean + rho * sum((score - mean) ** 2 for score in scores) / len(scores)
