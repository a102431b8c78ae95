"""Search: one budgeted search, driven from outside by ask and tell. It owns the tree, the ledger and the journal, and applies the
rules that every policy shares: the hard budget, failed, empty and repeated texts, the context window, the forced answer, the vote.

The policy only says what to generate next. Everything asked and told is journalled before it is acted upon, and nothing here is
random, so replaying the journal gives the state at the moment of a crash. Interface and example: `specdec.search`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from specdec.search.budget import Budget, whole_tokens
from specdec.search.chain_length import ChainLength
from specdec.search.config import SearchConfig
from specdec.search.journal import Journal, read_snapshot
from specdec.search.policies import make_policy
from specdec.search.request import Answer, Completion, Finish, GenerationError, Kind, Policy, Request, Result, Status
from specdec.search.search_tree import ROOT, Closed, NodeStatus, SearchTree, add_piece
from specdec.search.vote import rank_answers

__all__ = ["Search"]

_SPREAD = 2.0  # a FULL text in a batch may be this many times as long as a chain is expected to be


class Search:
    """One search for the answer to one prompt.

    Args:
        policy: a name of `policies.POLICIES`, or a Policy.
        budget: policy output tokens.
        seed: of policies that draw (AB-MCTS); the texts' randomness is the driver's, by `Request.stream`.
        config: the shared options.
        checkpoint: a file that holds the search at every moment; one that exists is resumed.
        identity: anything that must be the same when resumed: prompt hash, model and evaluator ids. JSON types.
        clock: seconds, monotonic.

    Raises:
        ValueError: a bad option, or a checkpoint of another search (named).
    """

    def __init__(
        self,
        policy: str | Policy = "bg_mcts",
        budget: int = 1000,
        seed: int = 0,
        config: SearchConfig | None = None,
        checkpoint: str | Path | None = None,
        identity: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config = config or SearchConfig()
        self.policy = make_policy(policy)
        self.budget = Budget(budget, 0, config.seconds, config.count_evaluator, config.evaluator_max_tokens, clock)
        caps = (1, 1) if config.deterministic else (self.policy.child_cap, self.policy.root_cap)
        self.tree = SearchTree(*caps, answered_bias=self.policy.answered_bias, refine=self.policy.refine)
        self.seed = int(seed)
        self.notes: list[str] = []
        self.cancelled = False
        self._outstanding: dict[int, Request] = {}
        self._retries: list[int] = []  # nodes whose request is to be repeated
        self._asked = 0  # requests so far
        self._failures = 0  # evaluations that failed, in a row
        self._fallen_back = False  # to best-of-n, since the evaluator does not work
        self._forced = False  # the forced answer was asked for
        self._set_reserve()
        self._start_policy()
        described = {"name": self.policy.name, "options": asdict(self.policy)}  # type: ignore[call-overload]
        self._header = _plain(
            {"policy": described, "budget": self.budget.total, "seed": seed, "config": asdict(config), "identity": identity or {}}
        )
        self._journal = Journal(checkpoint) if checkpoint is not None else None
        if self._journal is not None:
            if self._journal.exists():
                self._load(self._journal)
            else:
                self._journal.snapshot(self.state())

    @classmethod
    def load(cls, checkpoint: str | Path) -> Search:
        """The search saved in a file, with the options saved there.

        Raises:
            ValueError: not a checkpoint, or one of a policy that is not in `policies.POLICIES`.
        """
        header = read_snapshot(Path(checkpoint))["header"]
        options = dict(header["config"])
        config = SearchConfig(**{**options, "length": ChainLength(**options["length"])})
        policy = make_policy(header["policy"]["name"], header["policy"]["options"])
        return cls(policy, header["budget"], header["seed"], config, checkpoint, header["identity"])

    # ---- the driver's side

    def ask(self, n: int = 1) -> list[Request]:
        """Up to n new requests. None while nothing is outstanding: the search is over.

        Raises:
            ValueError: n < 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        expired = self.budget.expired
        self._write({"ask": n, "expired": expired})
        requests = self._ask(n, expired)
        self._snapshot_if_due()
        return requests

    def tell(self, request: Request, completion: Completion) -> None:
        """The result of one request, in any order; in the order of asking, runs are reproducible.

        Raises:
            ValueError: the request is not outstanding, or the completion breaks its limits.
            GenerationError: the model failed twice on it. The search can go on.
        """
        if self._outstanding.get(request.id) != request:
            raise ValueError(f"request {request.id} is not outstanding: it was told already, or belongs to another search")
        completion = self._checked(request, completion)
        if self._journal is not None:
            self._write({"tell": request.id, "completion": _fields(completion)})
        self._tell(request.id, completion)
        self._snapshot_if_due()
        if completion.error is not None and request.retry:
            raise GenerationError(f"the model failed twice on request {request.id}: {completion.error}", self.result())

    def outstanding(self) -> list[Request]:
        """Requests asked and not told, in the order of asking. After a crash: generate these first."""
        return list(self._outstanding.values())

    def needs_score(self, request: Request, token_ids: tuple[int, ...], text: str) -> bool:
        """Whether this text would be evaluated: not if it is empty, equal to a sibling's, or a forced answer."""
        return not (request.kind == Kind.FORCED or _empty(token_ids, text) or self._twin(request, token_ids) is not None)

    def to_score(self, requests: Seq[Request], completions: Seq[Completion]) -> dict[int, list[str]]:
        """What an evaluator has to judge of a batch: place -> the steps up to the end of that text, its own the last of them.

        A text that goes on with one that was cut is one step with it. Of equal texts the first alone is judged, as if each had been
        told before the next was looked at: it is the same whether a crash comes between two tells or not.
        """
        wanted: dict[int, list[str]] = {}
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for place, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            ids = tuple(completion.token_ids)
            if completion.error is not None or not self.needs_score(request, ids, completion.text):
                continue
            if self.config.duplicates == "keep" or (request.parent, ids) not in seen:
                seen.add((request.parent, ids))
                wanted[place] = self._steps(request, completion)
        return wanted

    def cancel(self) -> None:
        """Ask for nothing more. What is in flight may still be told; `resume` goes on.

        A driver that throws away what it has of it generates it anew, by the same stream: the search is the one that was never
        cancelled, and those tokens are in `used` once, though they were generated twice.
        """
        self._write({"cancel": True})
        self.cancelled = True

    def resume(self, extra: int = 0, seconds: float | None = None) -> None:
        """Go on with `extra` tokens more; rho rises at once. With none, a cancelled search goes on as if it had not been.

        Args:
            extra: tokens.
            seconds: from now on, in place of what is left of the wall-clock limit; None: a limit that has passed begins anew where
                there are more tokens, which would be left unused.

        Raises:
            ValueError: `extra` negative or no whole number, `seconds` negative.
        """
        extra = whole_tokens(extra, "extra")
        if seconds is None and extra and self.budget.expired:
            seconds = self.config.seconds
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"seconds must be >= 0 or None, got {seconds}")
        self._write({"resume": extra, "seconds": seconds})
        self._resume(extra, seconds)

    def result(self) -> Result:
        """What has been found so far."""
        answers = self.ranking()()
        node = answers[0].node if answers else self.tree.best_leaf
        tree, budget = self.tree, self.budget
        return Result(
            status=self._status(node, bool(answers)),
            answer=answers[0].value if answers else None,
            node=node,
            text="".join(tree.text[each] for each in tree.path(node)),
            score=None if node == ROOT or tree.unscored[node] else tree.q[node],
            answers=tuple(answers),
            used=budget.used,
            evaluator_tokens=budget.evaluator_tokens,
            prefill_tokens=budget.prefill_tokens,
            cached_tokens=budget.cached_tokens,
            recomputed_tokens=budget.recomputed_tokens,
            tree=tree,
            notes=tuple(self.notes),
        )

    def ranking(self) -> Callable[[], list[Answer]]:
        """Ranks the answers of now, best first, whenever it is called: a node that was told never changes."""
        rule = "majority" if self._fallen_back else self.config.answer_rule
        return partial(rank_answers, self.tree, rule, self.config.chain_score, len(self.tree.answered))

    def state(self) -> dict[str, Any]:
        """The whole search as JSON types."""
        names = ("notes", "cancelled", "_retries", "_asked", "_failures", "_fallen_back", "_forced")
        return {
            "header": self._header,
            "search": {name: getattr(self, name) for name in names},
            "outstanding": [_fields(request) for request in self._outstanding.values()],
            "budget": self.budget.state(),
            "policy": self.policy.state(),
            "tree": self.tree.to_dict(),
        }

    def close(self) -> None:
        """Write a snapshot and let go of the files."""
        if self._journal is not None:
            self._journal.snapshot(self.state())

    # ---- asking

    def _ask(self, n: int, expired: bool) -> list[Request]:
        if expired and not (self.cancelled or self.budget.in_flight):
            forced = self._force()
            return [] if forced is None else [forced]
        requests: list[Request] = []
        while len(requests) < n and not (self.cancelled or expired):
            request = self._repeat() if self._retries else self._next(n - len(requests))
            if request is None:
                break
            requests.append(request)
        return requests

    def _next(self, slots: int) -> Request | None:
        """The next request. It waits where those in flight would make it shorter than it would be without them."""
        while self.budget.available >= 1:
            if self.budget.in_flight and self.budget.available < self._most(self.policy.unit == Kind.FULL, slots):
                return None
            proposal = self.policy.propose()
            if proposal is None:
                break
            parent, kind = proposal
            full = kind == Kind.FULL or (kind != Kind.STEP and self.tree.full[parent])
            most = min(self._most(full, slots), self.budget.available, self._room(parent, kind))
            if most >= 1:
                return self._request(parent, kind, full, most)
            self.tree.close(parent, Closed.TOO_LONG)
            if parent == ROOT:
                self._note(f"the prompt of {self.config.prompt_tokens} tokens fills the context window")
        return None if self.budget.in_flight else self._force()

    def _force(self) -> Request | None:
        """The forced answer: once, at the very end, where there is no answer."""
        leaf = self.tree.best_leaf
        most = min(self.config.forced_tokens, self.budget.unreserved, self._room(leaf, Kind.FORCED))
        if self._forced or self.tree.answered or leaf == ROOT or not self.budget.reserve or most < 1:
            return None
        self._forced = True
        self.budget.reserve = 0
        return self._request(leaf, Kind.FORCED, True, most)

    def _request(self, parent: int, kind: Kind, full: bool, most: int) -> Request:
        node = self.tree.reserve(parent, kind)
        return self._issue(Request(self._asked, node, parent, kind, most, (node, 0), full, self._evaluation(kind)))

    def _repeat(self) -> Request | None:
        """Once more what failed or was a duplicate, with another stream; dropped where nothing is left for it."""
        while self._retries:
            node = self._retries[0]
            kind, parent = Kind(self.tree.kind[node]), self.tree.parent[node]
            full = kind in (Kind.FULL, Kind.FORCED) or (kind != Kind.STEP and self.tree.full[parent])
            free = self.budget.unreserved if kind == Kind.FORCED else self.budget.available
            most = min(self.config.forced_tokens if kind == Kind.FORCED else self._most(full, 1), free, self._room(parent, kind))
            if most < 1 and self.budget.in_flight:
                return None
            del self._retries[0]
            if most >= 1:
                return self._issue(Request(self._asked, node, parent, kind, most, (node, 1), full, self._evaluation(kind)))
            self.tree.drop(node, 0, Completion((), ""))
            self.policy.told(node)
        return self._next(1)

    def _issue(self, request: Request) -> Request:
        expected = self.config.length.chain(self.tree) if request.full else self.config.length.step(self.tree)
        self.budget.hold(request.id, request.max_tokens, expected, evaluated=request.kind != Kind.FORCED)
        self._outstanding[request.id] = request
        self._asked += 1
        return request

    def _evaluation(self, kind: Kind) -> int | None:
        return 0 if kind == Kind.FORCED else self.config.evaluator_max_tokens

    def _most(self, full: bool, slots: int) -> int:
        """Most tokens of a step, or of a full text as one of `slots` that are about to be asked for."""
        if not full:
            return self.config.step_tokens
        share = self.budget.available
        if slots > 1 or self.budget.in_flight:
            share = max(share // slots, math.ceil(_SPREAD * self.config.length.chain(self.tree)))
        return share if self.config.full_tokens is None else min(share, self.config.full_tokens)

    def _room(self, node: int, kind: Kind) -> int:
        """Tokens of the context window that the path to `node`, with the cues on it and before it, leaves to such a request."""
        if self.config.context_window is None:
            return sys.maxsize
        cues = self.tree.path_cues[node] + (kind in (Kind.REFINE, Kind.FORCED))
        taken = self.config.prompt_tokens + self.tree.path_tokens[node] + cues * self.config.cue_tokens
        return self.config.context_window - taken

    # ---- being told

    def _checked(self, request: Request, completion: Completion) -> Completion:
        """The completion with plain values: a score that is no number is None."""
        produced = len(completion.token_ids) if completion.generated is None else completion.generated
        if not len(completion.token_ids) <= produced <= request.max_tokens:
            raise ValueError(
                f"request {request.id} allows {request.max_tokens} tokens, got {produced} generated for {len(completion.token_ids)} "
                "token_ids; fix: stop at request.max_tokens, and count the tokens that were cut in `generated`"
            )
        for name in ("evaluator_tokens", "prefill_tokens", "cached_tokens", "recomputed_tokens"):
            if getattr(completion, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(completion, name)}")
        most = request.evaluator_max_tokens
        if self.config.count_evaluator and most is not None and completion.evaluator_tokens > most:
            raise ValueError(f"the evaluator may spend {most} tokens on request {request.id}, got {completion.evaluator_tokens}")
        score = completion.score
        return Completion(
            token_ids=tuple(map(int, completion.token_ids)),
            text=completion.text,
            finish=Finish(completion.finish),
            score=None if score is None or math.isnan(score) else float(score),
            answer=completion.answer,
            generated=produced,
            evaluator_tokens=completion.evaluator_tokens,
            prefill_tokens=completion.prefill_tokens,
            cached_tokens=completion.cached_tokens,
            recomputed_tokens=completion.recomputed_tokens,
            error=completion.error,
        )

    def _tell(self, request_id: int, completion: Completion) -> None:
        request = self._outstanding.pop(request_id)
        charged = max(1, completion.generated or 0)  # an empty text is not free, or a search could go on for ever
        self.budget.settle(request_id, charged, completion)
        if not self._place(request, charged, completion):
            self.tree.charge(request.node, charged, completion)
            self._retries.append(request.node)
            return
        if self.tree.answered:
            self.budget.reserve = 0
        self.policy.told(request.node)

    def _place(self, request: Request, charged: int, completion: Completion) -> bool:
        """Make the completion part of the tree, or drop it; False: ask for it again."""
        tree, node = self.tree, request.node
        twin = self._twin(request, completion.token_ids)
        if completion.error is not None:
            if not request.retry:
                return False
            tree.drop(node, charged, completion)
        elif _empty(completion.token_ids, completion.text):
            tree.drop(node, charged, completion, empty=True)
        elif twin is not None:
            if self.config.duplicates == "resample" and not request.retry:
                return False
            tree.merge(node, twin, charged, completion, count=self.config.duplicates != "ignore")
        else:
            score = self._score(request, completion)
            tree.settle(node, charged, completion, self._status_of(request, completion), score)
            self._close_if_too_long(node)
        return True

    def _steps(self, request: Request, completion: Completion) -> list[str]:
        """The steps up to the end of this text. Of one that was cut, the last word may be half a word, which would be judged wrong."""
        steps = self.tree.steps(request.parent)
        add_piece(steps, request.kind, completion.text)
        if completion.finish == Finish.LENGTH and completion.answer is None:
            steps[-1] = _whole_words(steps[-1])
        return steps

    def _twin(self, request: Request, token_ids: tuple[int, ...]) -> int | None:
        return None if self.config.duplicates == "keep" else self.tree.twin(request.parent, tuple(token_ids))

    def _status_of(self, request: Request, completion: Completion) -> NodeStatus:
        cut = completion.finish == Finish.LENGTH and request.kind != Kind.FORCED
        if completion.answer is not None and (self.config.truncated_answers or not cut):
            return NodeStatus.ANSWERED
        return NodeStatus.ENDED if completion.finish == Finish.EOS or request.kind == Kind.FORCED else NodeStatus.OPEN

    def _close_if_too_long(self, node: int) -> None:
        kind = Kind.REFINE if self.tree.status[node] == NodeStatus.ANSWERED else Kind.STEP
        if self._room(node, kind) < (1 if self.tree.full[node] else self.config.step_tokens):
            self.tree.close(node, Closed.TOO_LONG)

    def _score(self, request: Request, completion: Completion) -> float | None:
        """The score within [0, 1]; failures in a row hand over to best-of-n."""
        if request.kind == Kind.FORCED:
            return None
        if completion.score is None:
            self._failures += 1
            if self._failures == self.config.max_failures and not (self._fallen_back or self.config.deterministic):
                self._note(f"{self._failures} evaluations failed in a row: best-of-n with a majority vote takes over")
                self._fallen_back = True
                self._start_policy()
                self.tree.set_rules(self.policy.child_cap, self.policy.root_cap, self.policy.refine)
            return None
        self._failures = 0
        if not 0 <= completion.score <= 1:
            self._note("the evaluator gave scores outside [0, 1]: clamped")
        return min(1.0, max(0.0, completion.score))

    def _note(self, message: str) -> None:
        """Say it once: in the result, and as a warning."""
        if message not in self.notes:
            self.notes.append(message)
            warnings.warn(message, stacklevel=2)

    # ---- state

    def _start_policy(self) -> None:
        if self._fallen_back:
            self.policy = make_policy("best_of_n")
        self.policy.start(self.tree, self.budget, self.config.length, self.seed)

    def _set_reserve(self) -> None:
        """Keep tokens for a forced answer where a step fits beside it."""
        enough = self.budget.total - self.budget.used >= self.config.forced_tokens + self.config.length.step(self.tree)
        self.budget.reserve = self.config.forced_tokens if enough and not self.tree.answered else 0

    def _status(self, node: int, answered: bool) -> Status:
        if self.cancelled:
            return Status.CANCELLED
        if answered:
            forced = self.tree.kind[node] == Kind.FORCED or self.tree.truncated[node]
            return Status.TRUNCATED if forced else Status.ANSWERED
        return Status.TRUNCATED if any(not closed for closed in self.tree.closed[1:]) else Status.NO_ANSWER

    def _resume(self, extra: int, seconds: float | None) -> None:
        self.cancelled = False
        if seconds is not None:
            self.budget.seconds = self.budget.elapsed + seconds
        if extra or seconds is not None:
            self.budget.extend(extra)
            self._forced = False
            self._set_reserve()

    def _write(self, event: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.write({**event, "elapsed": self.budget.elapsed})

    def _snapshot_if_due(self) -> None:
        if self._journal is not None and self._journal.due(len(self.tree)):
            self._journal.snapshot(self.state())

    def _load(self, journal: Journal) -> None:
        """The snapshot, then every event since, as if it happened now."""
        snapshot, events = journal.load()
        for name, mine in self._header.items():
            if snapshot["header"][name] != mine:
                theirs = snapshot["header"][name]
                raise ValueError(
                    f"{journal.path} holds a search with {name} {theirs}, not {mine}; fix: another path, or delete it"
                )
        for name, value in snapshot["search"].items():
            setattr(self, name, value)
        self.tree = SearchTree.from_dict(snapshot["tree"])
        self.budget.restore(snapshot["budget"])
        self._outstanding = {fields["id"]: _request_of(fields) for fields in snapshot["outstanding"]}
        self._start_policy()
        self.policy.restore(snapshot["policy"])
        for event in events:
            self._replay(event)

    def _replay(self, event: dict[str, Any]) -> None:
        self.budget.set_elapsed(event["elapsed"])
        if "ask" in event:
            self._ask(event["ask"], event["expired"])
        elif "tell" in event:
            fields = {**event["completion"], "token_ids": tuple(event["completion"]["token_ids"])}
            self._tell(event["tell"], Completion(**fields))
        elif "resume" in event:
            self._resume(event["resume"], event["seconds"])
        else:
            self.cancelled = True


def _empty(token_ids: tuple[int, ...], text: str) -> bool:
    return not token_ids or not text.strip()


def _whole_words(text: str) -> str:
    """Without the last word, where there are others."""
    return re.sub(r"\S+\Z", "", text) if len(text.split()) > 1 else text


def _fields(record: Request | Completion) -> dict[str, Any]:
    """asdict, without its deep copies."""
    return {name: getattr(record, name) for name in record.__slots__}


def _request_of(fields: dict[str, Any]) -> Request:
    return Request(**{**fields, "kind": Kind(fields["kind"]), "stream": tuple(fields["stream"])})


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))
