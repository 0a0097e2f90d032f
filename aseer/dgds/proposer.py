"""The drafter that vLLM calls after every step (its `custom_class` method).

vLLM makes it with its configuration alone and passes no request ids, so it drafts
nothing until the worker extension has joined it to the runner. Requests are told apart
by what the controller put into their `extra_args`; one without that gets no drafts.

A chunk's prompt holds what earlier chunks generated. The group's prompt is shorter, and
what follows it is the request's text, the same on whichever engine it runs. A chunk's
last token is sampled without a draft: vLLM keeps the KV of a step's tokens for others
only once the next step begins, and the next chunk would compute again what was accepted
in the last. Nor do drafts reach past the chunk's `max_tokens`: what the engine would
sample there is thrown away, and must not be in the tree.

A step that does not look for drafts leaves the trees alone: the next look gives them
all that was sampled since. What a chunk sampled between its last look and its end they
get when the request goes on here, or from the server.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aseer.dgds.budget import MIN_CONFIDENCE, Candidates, Outcome
from aseer.dgds.messages import EXTRA_ARGS_KEY
from aseer.dgds.replica import RequestKey, row_offsets
from aseer.types import DRAFTING_SHARES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.steptime import StepTimeModel

_log = logging.getLogger("aseer.dgds")

_MAX_IDLE_S = 0.02  # between steps; after more the engine had nothing to do


@dataclass(slots=True, eq=False)
class _Row:
    """A chunk that runs here.

    Attributes:
        base: tokens before its text: its group's prompt.
        end: tokens it may have at most, prompt included.
        num_held: tokens of its text that its tree has.
        may_stop_at: tokens from which on it may stop. No draft crosses that: vLLM would
            forbid stop tokens behind it by the length before it.
        drafted: confidences of what was drafted for it last.
        profile: tokens to draft whatever they are, to see what a step takes.
    """

    key: RequestKey
    handle: int
    base: int
    num_held: int
    end: int
    may_stop_at: int
    weight: float
    drafted: NDArray[np.float32]
    profile: int | None = None


_NOTHING = np.empty(0, np.float32)


class _Batch:
    """Rows that run together, and what stays the same as long as they do.

    Attributes:
        handles, bases, ends, stops, weights: [num_rows] of `_Row`'s; `ends` without the
            last token, which is sampled by itself.
    """

    def __init__(self, rows: Sequence[_Row]) -> None:
        num = len(rows)
        self.rows = list(rows)
        self.handles = np.fromiter((r.handle for r in rows), np.int64, num)
        self.bases = np.fromiter((r.base for r in rows), np.int64, num)
        self.ends = np.fromiter((r.end - 1 for r in rows), np.int64, num)
        self.stops = np.fromiter((r.may_stop_at for r in rows), np.int64, num)
        self.weights = np.fromiter((r.weight for r in rows), np.float64, num)


class GroupDrafter:
    """Drafts for each request from its group's tree."""

    def __init__(self, vllm_config: Any) -> None:
        self._max_model_len = vllm_config.model_config.max_model_len
        self._drafting: _Drafting | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def start(
        self,
        runner: Any,
        replica: Replica,
        budget: Budget,
        model: StepTimeModel,
        probe_weight: float,
    ) -> StepClock:
        """Draft from now on; returns what measures the steps."""
        clock = StepClock(runner)
        self._drafting = _Drafting(
            runner, replica, budget, model, clock, probe_weight, self._max_model_len
        )
        return clock

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft for every request of the batch; see vLLM's CustomClassProposer."""
        drafting = self._drafting
        if drafting is None:
            return [[] for _ in sampled_token_ids]
        try:
            return drafting.step(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception:
            _log.exception("drafting failed; no drafts from now on")
            self._drafting = None
            return [[] for _ in sampled_token_ids]


class StepClock:
    """Measures the steps of a runner, and what was scheduled in them."""

    def __init__(self, runner: Any) -> None:
        self.step_s = 0.0
        self.draft_s = 0.0
        self.share_buckets = [0] * (len(DRAFTING_SHARES) + 1)
        self.num_scheduled: dict[str, int] = {}
        self.num_tokens = 0
        self.was_idle = True  # before the step, so that it took its time to begin
        self._started_at = 0.0
        self._ended_at = 0.0
        self._execute = runner.execute_model
        runner.execute_model = self._timed_execute

    def _timed_execute(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.perf_counter()
        self.was_idle = now - self._ended_at > _MAX_IDLE_S
        self._started_at = now if self.was_idle else self._ended_at
        self.num_tokens = scheduler_output.total_num_scheduled_tokens
        self.num_scheduled = {
            request_id: len(tokens)
            for request_id, tokens in (
                scheduler_output.scheduled_spec_decode_tokens.items()
            )
        }
        return self._execute(scheduler_output, *args, **kwargs)

    def end_step(self, drafting_since: float) -> float:
        """The step is over, drafting included; its seconds."""
        self._ended_at = time.perf_counter()
        step_s = self._ended_at - self._started_at
        draft_s = self._ended_at - drafting_since
        self.step_s += step_s
        self.draft_s += draft_s
        self.share_buckets[bisect_left(DRAFTING_SHARES, draft_s / step_s)] += 1
        return step_s


class _Drafting:
    """The drafter, joined to its runner."""

    def __init__(
        self,
        runner: Any,
        replica: Replica,
        budget: Budget,
        model: StepTimeModel,
        clock: StepClock,
        probe_weight: float,
        max_model_len: int,
    ) -> None:
        self._runner = runner
        self._replica = replica
        self._budget = budget
        self._model = model
        self._clock = clock
        self._probe_weight = probe_weight
        self._max_model_len = max_model_len
        self._rows: dict[str, _Row] = {}
        self._batch = _Batch([])

    def step(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> list[list[int]]:
        since = time.perf_counter()
        self._end_finished()
        places, rows = self._running(sampled, num_tokens, token_ids)
        drafts: list[list[int]] = [[] for _ in sampled]
        is_profile = bool(rows) and rows[0].profile is not None
        if is_profile:
            for place, row in zip(places, rows, strict=True):
                drafts[place] = [sampled[place][-1]] * (row.profile or 0)
        elif rows:
            self._learn(rows, places, sampled)
            most = self._budget.max_draft_tokens(len(rows))
            if most:
                looks_since = time.perf_counter()
                if self._batch.rows != rows:
                    self._batch = _Batch(rows)
                self._append(places, num_tokens, token_ids)
                self._draft(places, num_tokens, most, drafts)
                self._budget.pay(time.perf_counter() - looks_since)
        step_s = self._clock.end_step(since)
        self._observe(len(sampled), len(rows), num_tokens, step_s, is_profile)
        return drafts

    def _end_finished(self) -> None:
        gone = self._rows.keys() - self._runner.input_batch.req_id_to_index.keys()
        if gone:
            now = time.monotonic()
            for request_id in gone:
                self._replica.end(self._rows.pop(request_id).key, now)

    def _running(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> tuple[list[int], list[_Row]]:
        """Where in the batch there are rows of ours that have sampled, and which."""
        req_ids = self._runner.input_batch.req_ids
        places = []
        rows = []
        for place, tokens in enumerate(sampled):
            if tokens:
                row = self._rows.get(req_ids[place]) or self._begin(
                    place, req_ids[place], int(num_tokens[place]), token_ids[place]
                )
                if row is not None:
                    places.append(place)
                    rows.append(row)
        return places, rows

    def _begin(
        self, place: int, req_id: str, num_tokens: int, token_ids: NDArray[np.int32]
    ) -> _Row | None:
        params = self._runner.requests[req_id].sampling_params
        told = (params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if told is None:
            return None
        num_input = int(self._runner.input_batch.num_prompt_tokens[place])
        key = RequestKey(told["group"], told["request"])
        base = told["prompt_tokens"]
        profile = told.get("profile")
        handle = -1
        if profile is None:
            text = np.ascontiguousarray(token_ids[:num_tokens], np.int32)
            handle = self._replica.begin(
                key, text[:base], text[base:], time.monotonic()
            )
        row = _Row(
            key=key,
            handle=handle,
            base=base,
            num_held=num_tokens - base,
            end=min(num_input + params.max_tokens, self._max_model_len),
            may_stop_at=num_input + params.min_tokens,
            weight=self._probe_weight if told["probe"] else 1.0,
            drafted=_NOTHING,
            profile=profile,
        )
        self._rows[req_id] = row
        return row

    def _learn(
        self, rows: Sequence[_Row], places: Sequence[int], sampled: list[list[int]]
    ) -> None:
        """See what became of the last drafts."""
        req_ids = self._runner.input_batch.req_ids
        scheduled = self._clock.num_scheduled
        said = []
        num_drafted = []
        num_accepted = []
        for row, place in zip(rows, places, strict=True):
            if len(row.drafted):
                confidences = row.drafted[: scheduled.get(req_ids[place], 0)]
                row.drafted = _NOTHING
                if len(confidences):
                    said.append(confidences)
                    num_drafted.append(len(confidences))
                    num_accepted.append(len(sampled[place]) - 1)
        if said:
            drafted, accepted = np.array(num_drafted), np.array(num_accepted)
            self._budget.learn(Outcome(np.concatenate(said), drafted, accepted))

    def _append(
        self,
        places: Sequence[int],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> None:
        """Give the trees what was sampled since they were last looked at."""
        batch = self._batch
        ends = num_tokens[places]
        starts = np.fromiter((r.num_held for r in batch.rows), np.int64, len(places))
        new = [
            token_ids[place, start:end]
            for place, start, end in zip(
                places, (batch.bases + starts).tolist(), ends.tolist(), strict=True
            )
        ]
        offsets = row_offsets(map(len, new), len(new))
        held = self._replica.append(batch.handles, np.concatenate(new), offsets, starts)
        for row, num_held in zip(batch.rows, held.tolist(), strict=True):
            row.num_held = num_held
        lost = held != ends - batch.bases
        if lost.any():
            self._lose_track(int(lost.sum()))

    def _lose_track(self, num_lost: int) -> None:
        """Rows whose text here is not what the engine has: all are begun anew."""
        _log.warning("%d requests lost track of their text", num_lost)
        now = time.monotonic()
        for row in self._rows.values():
            self._replica.end(row.key, now)
        self._rows.clear()

    def _draft(
        self,
        places: Sequence[int],
        num_tokens: NDArray[np.int32],
        most: int,
        drafts: list[list[int]],
    ) -> None:
        batch = self._batch
        texts = num_tokens[places]
        ends = np.where(
            texts < batch.stops, np.minimum(batch.stops, batch.ends), batch.ends
        )
        # Every step samples one token more than it accepts.
        room = np.clip(ends - texts - 1, 0, most).astype(np.int32)
        found = self._replica.draft(batch.handles, room, min_confidence=MIN_CONFIDENCE)
        candidates = Candidates(
            confidences=found.confidences,
            offsets=found.offsets,
            weights=batch.weights,
            num_context_tokens=int(texts.sum()),
        )
        lengths = self._budget.choose(candidates)
        tokens = found.tokens.tolist()
        for i in np.flatnonzero(lengths).tolist():
            start = int(found.offsets[i])
            end = start + int(lengths[i])
            drafts[places[i]] = tokens[start:end]
            batch.rows[i].drafted = found.confidences[start:end]

    def _observe(
        self,
        num_rows: int,
        num_tracked: int,
        num_tokens: NDArray[np.int32],
        step_s: float,
        is_profile: bool,
    ) -> None:
        """Learn what a step takes, if it only decoded and was all ours."""
        if self._clock.was_idle:
            return
        num_drafted = sum(self._clock.num_scheduled.values())
        if num_tracked == num_rows and self._clock.num_tokens == num_rows + num_drafted:
            self._model.observe(
                num_rows,
                num_drafted,
                int(num_tokens[:num_rows].sum()),
                step_s,
                is_profile=is_profile,
            )
