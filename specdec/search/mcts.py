"""Plain Monte Carlo tree search over reasoning steps: BG-MCTS without its budget, without widening, without the small-budget rules.

    S(s) = mean q of the subtree + c P(s) sqrt(ln m_p / m_s)          P = softmax of the siblings' q; a childless node gets k texts

`coded()` is the baseline of BG-MCTS's repository: c = 2^(1/4) (the root of 2 taken twice) and every node twice in its own counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.search.bg_mcts import BgMcts
from specdec.search.small_budget import SmallBudget

__all__ = ["Mcts"]


@dataclass
class Mcts(BgMcts):
    """The same options with other defaults; see BgMcts."""

    root_visits: str = "count"
    g_max: float | None = None
    anneal_exploration: bool = False
    completion_bias: bool = False
    anneal_widening: bool = False
    widen: bool = False
    gen_bonus: str = "off"
    child_cap: int | None = 2
    root_cap: int | None = 2
    small: SmallBudget = field(default_factory=lambda: SmallBudget(first_dive=0, backtrack=0, finish=0))

    name = "mcts"

    @classmethod
    def coded(cls) -> Mcts:
        """Under the SearchConfig `bg_mcts.AS_CODED`."""
        return cls(c=2**0.25, own_twice=True, fill=False, child_cap=None, root_cap=None, refine=True)
