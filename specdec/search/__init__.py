"""Budgeted search for reasoning: policies that know no model, one ask/tell interface (design: BG-MCTS, arXiv 2602.09574).

A driver asks for up to n requests, generates and scores them by any means, and tells each result::

    from specdec.search import Completion, Search

    search = Search("bg_mcts", budget=2000, seed=0, checkpoint="run.json")   # a file that exists is resumed
    while requests := search.outstanding() or search.ask(4):     # outstanding: asked before a crash and never told
        for request in requests:                                 # one batch; tell in this order and runs are reproducible
            prefix = search.tree.path_token_ids(request.parent)  # ids of the path, prompt excluded
            ids, text = model(prefix, request.kind, request.max_tokens, request.stream)
            told = Completion(ids, text, finish="stop", answer=parse(text))
            for steps in search.to_score([request], [told]).values():    # none: empty, or a sibling said the same
                told = replace(told, score=evaluator(steps))
            search.tell(request, told)
    result = search.result()                                     # at any time: answer, status, tokens, the tree
    search.resume(extra=1000)                                    # and on with the same loop

`specdec.reason` is such a driver, on the engine. `used` never exceeds the budget: every request's `max_tokens` is reserved while it is in flight.
"""

from specdec.search.chain_length import ChainLength
from specdec.search.config import SearchConfig
from specdec.search.policies import POLICIES
from specdec.search.request import Answer, Completion, Finish, GenerationError, Kind, Policy, Proposal, Request, Result, Status
from specdec.search.search import Search
from specdec.search.search_tree import ROOT, Closed, NodeStatus, SearchTree

__all__ = [
    "POLICIES",
    "ROOT",
    "Answer",
    "ChainLength",
    "Closed",
    "Completion",
    "Finish",
    "GenerationError",
    "Kind",
    "NodeStatus",
    "Policy",
    "Proposal",
    "Request",
    "Result",
    "Search",
    "SearchConfig",
    "SearchTree",
    "Status",
]
