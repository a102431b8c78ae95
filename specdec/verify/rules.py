"""RULES: name -> acceptance rule, all with the signature (tree, law, randomness) -> Verdict.

| rule | accepts from | cost a step |
|---|---|---|
| match | any tree; the best there is for deterministic ones, and for drafts that share the target's noise | one draw a visited node |
| recursive_rejection | any mix of children; made for draws without replacement, alone or beside deterministic ones | V a tried child |
| kseq | i.i.d. children; at least 1 - (1 - 1/k)^k of the optimum | V a visited node |
| optimal_transport | i.i.d. children; the optimum of one node | V log V a visited node |
| block | chains; at least what token by token accepts | V a node |
| traversal | as recursive_rejection, and accepts more on deep trees | V a node |
"""

from __future__ import annotations

from collections.abc import Callable

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.block import block
from specdec.verify.kseq import kseq
from specdec.verify.match import match
from specdec.verify.optimal_transport import optimal_transport
from specdec.verify.recursive_rejection import recursive_rejection
from specdec.verify.traversal import traversal

__all__ = ["RULES", "UNVISITED", "AcceptRule"]

AcceptRule = Callable[[DraftTree, Law, Randomness], Verdict]

RULES: dict[str, AcceptRule] = {
    rule.__name__: rule for rule in (match, recursive_rejection, kseq, optimal_transport, block, traversal)
}

UNVISITED = frozenset({"block", "traversal"})  # ask for the laws of nodes that they may reject: no processor may keep a state
