"""match: draw the target's own token at every visited node; where a child carries it, go there (verification.md sections 0, 4).

One draw a visited prefix, with noise keyed by absolute position: what is emitted is plain sampling with this noise, token for
token, so the rule is lossless for any tree, and for a tree built without the noise no lossless rule accepts more. Temperature 0
is the same walk with the argmax. Worked example, root "the" with children "cat" -> "sat" and "dog"::

    draw(the) = cat -> node 1    draw(cat) = ran, no such child -> accepted: the, cat; next token: ran
"""

from __future__ import annotations

import numpy as np

from specdec.draft_tree import ROOT, DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law

__all__ = ["match"]


def match(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the tree did not foresee.

    `randomness` is unused: `law.draw` reads the noise of the token's position; the rules that toss coins use it.

    Raises:
        ValueError: the tree has virtual nodes (they exist for rules that know q).
    """
    if tree.virtual is not None and tree.virtual.any():
        raise ValueError("match takes no virtual nodes: it is lossless for any tree, so drop them while building the tree")
    nodes = [ROOT]
    while True:
        token = law.draw(nodes[-1])
        child = -1 if law.ends(token) else tree.child(nodes[-1], token)
        if child < 0:
            return Verdict(np.array(nodes, np.int32), token)
        nodes.append(child)
