"""Drafts on model runner V2, whose scheduler runs ahead of the device.

While the device computes step N, vLLM has scheduled step N + 1 already, with room for K
drafted tokens in every row (*placeholders*), and hands it to the worker. What N samples
is not known then. V2's own drafters draft on the device. Suffix trees are on the host,
so a step that may draft waits for N's tokens, which vLLM copies to the host anyway:

    device   | step N                    |            | step N + 1
    worker     launches N | waits for N's tokens | looks, trims, launches N + 1

What a step has of placeholders beyond its drafts is taken from it before it is
launched (`trimmed`): drafts have any length, as the budget says, and a step without
drafts computes what it would without speculation. vLLM's scheduler takes what was
trimmed for rejected.

A step whose look for drafts would not pay is not waited for. It is launched while the
device computes, as ever, and the trees get its tokens with the next look.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aseer.counts import DRAFTING_SHARES
from aseer.dgds.drafting import Drafting
from aseer.dgds.messages import EXTRA_ARGS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.rows import Rows
    from aseer.dgds.steptime import StepTimeModel

    # Requests, and [num_requests, longest] their drafts.
    Upload = Callable[[Sequence[str], NDArray[np.int64]], None]

# An engine with more time than this between two steps had nothing to do.
_MAX_IDLE_S = 0.02


class Sampled(Protocol):
    """What a step sampled, once its copy has arrived: vLLM's AsyncOutput."""

    model_runner_output: Any
    copy_event: Any
    sampled_token_ids: NDArray[np.int64]
    num_sampled_tokens_np: NDArray[np.int32]


def trimmed(output: Any, lengths: Mapping[str, int]) -> Any:
    """A copy of vLLM's SchedulerOutput with only so many drafted tokens.

    Args:
        lengths: drafted tokens by request; none for requests that it has not.
    """
    num_scheduled = dict(output.num_scheduled_tokens)
    drafts = {}
    dropped = 0
    for req_id, placeholders in output.scheduled_spec_decode_tokens.items():
        kept = lengths.get(req_id, 0)
        if kept:
            drafts[req_id] = placeholders[:kept]
        num_scheduled[req_id] -= len(placeholders) - kept
        dropped += len(placeholders) - kept
    return replace(
        output,
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=output.total_num_scheduled_tokens - dropped,
        scheduled_spec_decode_tokens=drafts,
    )


class _Later:
    """Something of which some methods are put off; they return nothing."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def put_off(of: Any, calls: list[Callable[[], None]], *methods: str) -> Any:
    """The same, but what these methods are told waits in `calls`."""

    def add(name: str, *args: Any, **kwargs: Any) -> None:
        calls.append(functools.partial(getattr(of, name), *args, **kwargs))

    later = _Later(of)
    for name in methods:
        setattr(later, name, functools.partial(add, name))
    return later


class Ahead:
    """A worker's drafting: `prepare` each step before its launch, `took` its tokens.

    Also the `Clock` of its `Drafting`, and the engine's counts: `step_s`, `draft_s` and
    `share_buckets` as in `DraftCounts`; `num_drafts`, and `drafted` and `accepted` by
    position.
    """

    def __init__(
        self,
        rows: Rows,
        replica: Replica,
        budget: Budget,
        model: StepTimeModel,
        probe_weight: float,
        max_model_len: int,
        upload: Upload,
        *,
        launches_ahead: bool = True,
    ) -> None:
        """Prepare to draft.

        Args:
            upload: puts drafts where the next step reads them.
            launches_ahead: whether a launched step computes on while the worker goes
                on, as on a GPU. Then a look costs what passes until the next launch.
        """
        self._rows = rows
        self._budget = budget
        # What is learned of the last step has time until this one is launched.
        self._later: list[Callable[[], None]] = []
        self._model = put_off(model, self._later, "observe")
        self._drafting = Drafting(
            self,
            replica,
            put_off(budget, self._later, "learn", "settle"),
            self._model,
            self,
            probe_weight,
            max_model_len,
        )
        self._upload = upload
        self._launches_ahead = launches_ahead
        self._pending: deque[tuple[Sampled, dict[str, int]]] = deque()
        # Of the step that was launched last.
        self.num_scheduled: dict[str, int] = {}
        self.num_tokens = 0
        self.was_idle = True
        self._num_rows = 0
        self._num_rows_before = 0  # of the step before, if all its rows decoded
        self._is_profile = False
        self._num_looked = 0  # rows that were looked at for it
        self._draft_s = 0.0
        # When it was prepared, and when the step before was over; 0 = not waited for.
        self._prepared_at = self._over_at = 0.0
        self.step_s = self.draft_s = 0.0
        self.share_buckets = [0] * (len(DRAFTING_SHARES) + 1)
        self.num_drafts = 0
        self.drafted: list[int] = []
        self.accepted: list[int] = []

    # What `Drafting` asks of a runner.

    @property
    def input_batch(self) -> Rows:
        """The running requests."""
        return self._rows

    @property
    def requests(self) -> dict[str, Any]:
        """By id, each with its `sampling_params`."""
        return self._rows.requests

    # Called by the worker.

    def prepare(self, output: Any) -> Any:
        """Draft for a step that is to be launched; returns what is to be launched.

        Args:
            output: vLLM's SchedulerOutput, with placeholders; left as it is.
        """
        prepared_at = time.perf_counter()
        placeholders = output.scheduled_spec_decode_tokens
        most, profile = self._wanted(placeholders)
        waits = bool(most or profile or self._drafting.has_drafted)
        sampled = self._take(wait=waits)
        over_at = time.perf_counter() if waits else 0.0
        is_first = not output.scheduled_cached_reqs.req_ids
        if not is_first and not self.was_idle:
            self._measure(sampled, prepared_at, over_at)
        self._drafting.learn(sampled)
        sampled = self._forget(output, sampled)
        drafts: dict[str, list[int]] = {}
        self._num_looked = 0
        if most or profile:
            drafts = self._draft(sampled, most, placeholders)
        for request in output.scheduled_new_reqs:
            self._rows.add(request)
        if drafts:
            self._write(drafts)
        is_plain = self.num_tokens == self._num_rows
        self._num_rows_before = self._num_rows if is_plain else 0
        self.num_scheduled = {r: len(tokens) for r, tokens in drafts.items()}
        launched = trimmed(output, self.num_scheduled)
        self.num_tokens = launched.total_num_scheduled_tokens
        self.was_idle = is_first
        self._num_rows = len(launched.num_scheduled_tokens)
        self._is_profile = profile is not None
        self._prepared_at, self._over_at = prepared_at, over_at
        self._draft_s = time.perf_counter() - (over_at or prepared_at)
        return launched

    def launched(self) -> None:
        """Note that the step that was prepared is on its way.

        If it was waited for, the device had nothing to do since the step before.
        """
        if self._over_at and self._launches_ahead:
            self._draft_s = time.perf_counter() - self._over_at
        self.draft_s += self._draft_s
        if self._num_looked:
            self._budget.pay(self._num_looked, self._draft_s)
        for call in self._later:
            call()
        self._later.clear()

    def took(self, sampled: Sampled) -> None:
        """Note what the launched step will have sampled."""
        self._pending.append((sampled, self.num_scheduled))

    # Parts of `prepare`

    def _wanted(self, placeholders: Mapping[str, Any]) -> tuple[int, int | None]:
        """How many tokens each row may draft; and if it is a profile, how many it does.

        A profile's rows all ask for the same number.
        """
        if not placeholders:
            return 0, None
        profile = self._profile_of(next(iter(placeholders)))
        if profile is not None:
            return 0, profile
        return self._budget.max_draft_tokens(len(placeholders)), None

    def _profile_of(self, req_id: str) -> int | None:
        request = self._rows.requests.get(req_id)
        params = None if request is None else request.sampling_params
        told = (params.extra_args or {}).get(EXTRA_ARGS_KEY) if params else None
        return told.get("profile") if told else None

    def _take(self, *, wait: bool) -> list[list[int]]:
        """What was sampled since the last call, by row.

        All steps but the last are over: vLLM has had their tokens before it scheduled
        the next one.
        """
        sampled: list[list[int]] = [[] for _ in self._rows.req_ids]
        while len(self._pending) > (0 if wait else 1):
            done, scheduled = self._pending.popleft()
            done.copy_event.synchronize()
            output = done.model_runner_output
            tokens, counts = done.sampled_token_ids, done.num_sampled_tokens_np
            places = self._rows.places(output.req_ids).tolist()
            self._rows.append(output.req_ids, tokens, counts)
            for place, row, num in zip(
                places, tokens.tolist(), counts.tolist(), strict=True
            ):
                if place >= 0:
                    sampled[place] += row[:num]
            if scheduled:
                self._later.append(functools.partial(self._count, done, scheduled))
        return sampled

    def _count(self, done: Sampled, scheduled: Mapping[str, int]) -> None:
        """Count a step's drafts, and what of them was accepted."""
        places = done.model_runner_output.req_id_to_index
        for req_id, num_drafted in scheduled.items():
            num_accepted = int(done.num_sampled_tokens_np[places[req_id]]) - 1
            missing = [0] * (num_drafted - len(self.drafted))
            self.drafted += missing
            self.accepted += missing
            self.num_drafts += 1
            for position in range(num_drafted):
                self.drafted[position] += 1
                self.accepted[position] += position < num_accepted

    def _measure(
        self, sampled: list[list[int]], prepared_at: float, over_at: float
    ) -> None:
        """Learn how long the last step took, if both its ends are known.

        Steps that are waited for are known to be over. Of others it is known at which
        pace they are launched, which is the device's: a step without speculation. The
        pace is that of the step before, which the launch of the next has to wait for.
        """
        if over_at and self._over_at:
            step_s = over_at - self._over_at
            if self.num_scheduled:
                self._drafting.observe(sampled, step_s)
        elif not over_at and not self._over_at:
            step_s = prepared_at - self._prepared_at
            if self.num_tokens == self._num_rows == self._num_rows_before:
                num_context = int(self._rows.num_tokens[: len(sampled)].sum())
                self._model.observe(
                    self._num_rows,
                    0,
                    num_context,
                    step_s,
                    is_profile=self._is_profile,
                )
        else:
            return
        self.step_s += step_s
        share = min(1.0, self._draft_s / step_s) if step_s else 0.0
        self.share_buckets[bisect_left(DRAFTING_SHARES, share)] += 1

    def _forget(self, output: Any, sampled: list[list[int]]) -> list[list[int]]:
        """Drop what is over, blank what is not in the step; returns the rest."""
        rows = self._rows
        gone = output.finished_req_ids | (output.preempted_req_ids or set())
        gone = gone & rows.req_id_to_index.keys()
        if gone:
            by_id = dict(zip(rows.req_ids, sampled, strict=True))
            rows.remove(gone)
            sampled = [by_id[req_id] for req_id in rows.req_ids]
        placeholders = output.scheduled_spec_decode_tokens
        if len(placeholders) < len(rows.req_ids):
            for place, req_id in enumerate(rows.req_ids):
                if req_id not in placeholders:
                    sampled[place] = []
        return sampled

    def _draft(
        self, sampled: list[list[int]], most: int, placeholders: Mapping[str, Any]
    ) -> dict[str, list[int]]:
        rows = self._rows
        num_found = self._drafting.find(sampled, rows.num_tokens, rows.token_ids)
        if not num_found:
            return {}
        if self._drafting.is_profile:
            found = self._drafting.draft_anything(sampled)
        else:
            self._num_looked = num_found
            found = self._drafting.look(sampled, rows.num_tokens, rows.token_ids, most)
        # What a grammar allows vLLM has computed without them.
        return {
            req_id: tokens[: len(placeholders[req_id])]
            for req_id, tokens in zip(rows.req_ids, found, strict=True)
            if tokens and req_id not in rows.structured
        }

    def _write(self, drafts: Mapping[str, Sequence[int]]) -> None:
        tokens = np.zeros((len(drafts), max(map(len, drafts.values()))), np.int64)
        for row, draft in zip(tokens, drafts.values(), strict=True):
            row[: len(draft)] = draft
        self._upload(list(drafts), tokens)
