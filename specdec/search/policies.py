"""POLICIES: name -> class, or another constructor of one. The whole menu, one row a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from specdec.search.ab_mcts import AbMcts
from specdec.search.beam import Beam, Rebase
from specdec.search.best_of_n import BestOfN
from specdec.search.bg_mcts import BgMcts
from specdec.search.mcts import Mcts
from specdec.search.refinement import Refinement
from specdec.search.request import Policy
from specdec.search.small_budget import SmallBudget
from specdec.search.tree_bon import TreeBon

__all__ = ["POLICIES", "PolicyRow", "make_policy"]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy: `make()` with its defaults."""

    make: Callable[[], Policy]
    summary: str


POLICIES: dict[str, PolicyRow] = {
    "bg_mcts": PolicyRow(BgMcts, "Budget-Guided MCTS with the rules for small budgets"),
    "bg_mcts_coded": PolicyRow(BgMcts.coded, "the same as its authors' code has it"),
    "bg_mcts_printed": PolicyRow(BgMcts.printed, "the same as its paper has it"),
    "backtrack": PolicyRow(lambda: BgMcts(small=SmallBudget(backtrack=inf)), "its rule for small budgets at every budget"),
    "mcts": PolicyRow(Mcts, "plain MCTS over steps"),
    "mcts_coded": PolicyRow(Mcts.coded, "the same as BG-MCTS's authors' code has it"),
    "best_of_n": PolicyRow(BestOfN, "independent full texts and a vote"),
    "greedy": PolicyRow(lambda: BestOfN(n=1), "one full text; sample at temperature 0"),
    "beam": PolicyRow(Beam, "beam search over steps"),
    "rebase": PolicyRow(Rebase, "level by level, shares in proportion to softmax(score)"),
    "refinement": PolicyRow(Refinement, "one full text, reconsidered again and again"),
    "tree_bon": PolicyRow(TreeBon, "layered best-of-n"),
    "ab_mcts": PolicyRow(AbMcts, "AB-MCTS-A by TreeQuest (extra: treequest)"),
}


def make_policy(policy: str | Policy, options: dict[str, Any] | None = None) -> Policy:
    """The policy of a name, with `options` in place of its defaults; or the object itself.

    Raises:
        ValueError: no such policy or option.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, or a Policy object, got {policy!r}")
    made: Any = POLICIES[policy].make()
    known = {each.name for each in fields(made)}
    for name, value in (options or {}).items():
        if name not in known:
            raise ValueError(f"policy {policy!r} has no option {name!r}; it has {', '.join(sorted(known))}")
        setattr(made, name, SmallBudget(**value) if name == "small" and isinstance(value, dict) else value)
    if callable(check := getattr(made, "__post_init__", None)):
        check()
    return made
