"""Which answer a search gives: the best-scored, the heaviest by weighted vote, or the most frequent.

With answers "4" [.9], "5" [.8], "5" [.7] (scores in brackets): best = "4"; majority and weighted vote = "5" (weight 1.5 against .9).
A chain's score is that of its last step ("last", as BG-MCTS and search-and-learn have it), or the least, mean or product of all.
Forced answers count only where there is no other; an unscored one votes without weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import prod

from specdec.search.request import Answer, Kind
from specdec.search.search_tree import SearchTree

__all__ = ["CHAIN_SCORES", "RULES", "chain_score", "rank_answers"]

RULES = ("auto", "best", "weighted", "majority")
_ENOUGH = 3  # answers from which "auto" votes
CHAIN_SCORES: dict[str, Callable[[list[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "mean": lambda scores: sum(scores) / len(scores),
    "product": prod,
}


def chain_score(tree: SearchTree, node: int, how: str = "last") -> float:
    """Score of the path that ends at `node`, in [0, 1]."""
    if how == "last":
        return tree.q[node]
    return CHAIN_SCORES[how]([tree.q[each] for each in tree.step_ends(node)])


def rank_answers(tree: SearchTree, rule: str = "auto", how: str = "last", first: int | None = None) -> list[Answer]:
    """The classes of equal answers, best first. Ties: more votes, then the better single node, then the earlier one.

    "auto" is the weighted vote where there are three answers or more, else the best. `first`: of the first so many that were told.
    """
    answered = tree.answered[:first]
    nodes = sorted(node for node in answered if tree.kind[node] != Kind.FORCED) or sorted(answered)
    scores = {node: chain_score(tree, node, how) for node in nodes}
    classes: dict[str, list[int]] = defaultdict(list)
    for node in nodes:
        classes[str(tree.answer[node])].append(node)
    if rule == "auto":
        rule = "weighted" if len(nodes) >= _ENOUGH else "best"
    answers = []
    for value, members in classes.items():
        weight = sum(scores[node] for node in members if not tree.unscored[node])
        answers.append(Answer(value, len(members), weight, max(members, key=lambda node: (scores[node], -node))))
    measures = {"best": lambda a: scores[a.node], "weighted": lambda a: a.weight, "majority": lambda a: a.votes}
    return sorted(answers, key=lambda a: (-measures[rule](a), -a.votes, -scores[a.node], a.node))
