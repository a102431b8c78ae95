"""What the benches of the search compare: policies by name, each with the shared options that belong to it.

Beside the names of `specdec.search.POLICIES` there is BG-MCTS without `backtrack`: the paper's selection with search.md's rules for
small budgets, which backtracking takes the place of where the budget holds fewer than 32 chains.
"""

from __future__ import annotations

from specdec.search import Policy, SearchConfig
from specdec.search.bg_mcts import AS_CODED, BgMcts
from specdec.search.policies import POLICIES, make_policy
from specdec.search.small_budget import SmallBudget

__all__ = ["NAMES", "NO_BACKTRACK", "config_of", "policy_of"]

NO_BACKTRACK = "bg_mcts_no_backtrack"
NAMES = (*POLICIES, NO_BACKTRACK)
_CODED = ("bg_mcts_coded", "bg_mcts_printed", "mcts_coded")


def policy_of(name: str) -> Policy:
    """A new policy.

    Raises:
        ValueError: no such name.
    """
    return BgMcts(small=SmallBudget(backtrack=0)) if name == NO_BACKTRACK else make_policy(name)


def config_of(name: str) -> SearchConfig:
    """The shared options that it runs under."""
    return AS_CODED if name in _CODED else SearchConfig()
