"""The drafter that vLLM calls after every step (its `custom_class` method).

vLLM makes the drafter with vLLM's configuration alone, and passes no request ids. So
the drafter drafts nothing until the worker extension has joined it to the model runner.
Requests are told apart by what the controller put into their `extra_args`; a request
without that gets no drafts.

A chunk's prompt is the group's prompt followed by what the request's earlier chunks
generated; what follows the group's prompt is the request's *text*, the same on any
engine that the request runs on. A chunk's last token is sampled without a draft: vLLM
keeps the KV of a step's tokens for other requests only once the next step begins, so
the next chunk would compute again what the last step accepted. Drafts do not reach past
the chunk's `max_tokens` either: tokens that the engine would sample there are thrown
away, and must not get into the tree.

A step that does not look for drafts leaves the trees alone; the next look gives the
trees everything that was sampled since. Tokens that a chunk sampled between its last
look and its end reach the trees when the request goes on here, or from the server.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aseer.dgds.budget import MIN_CONFIDENCE, Candidates, Outcome
from aseer.dgds.messages import EXTRA_ARGS_KEY
from aseer.dgds.replica import RequestKey
from aseer.dgds.stepclock import StepClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.steptime import StepTimeModel

_log = logging.getLogger("aseer.dgds")


@dataclass(slots=True, eq=False)
class _Row:
    """A chunk that runs here.

    Attributes:
        base: tokens before the request's text, which are the group's prompt.
        end: the most tokens that the row may have, prompt included.
        may_stop_at: number of tokens from which on the request may stop. No draft
            crosses that number: for all tokens of a draft vLLM decides by the length
            before the draft whether stop tokens are forbidden.
        drafted: confidences of the tokens that were drafted last.
        profile: how many tokens to draft whatever they are, to measure a step's time.
    """

    key: RequestKey
    handle: int
    base: int
    end: int
    may_stop_at: int
    weight: float
    drafted: NDArray[np.float32]
    profile: int | None = None


_NOTHING = np.empty(0, np.float32)


class _Batch:
    """Rows that run together, and what stays the same as long as the batch does.

    Attributes:
        req_ids: vLLM's ids of the whole batch; None if some requests have not sampled,
            since in the next step it may be others that have not.
        rows: the requests that get drafts and have sampled.
        places: [num_rows], where in the batch the rows are.
        handles, bases, ends, stops, weights: [num_rows], the fields of `_Row`; `ends`
            without the last token, which is sampled without a draft.
        num_context: tokens of all requests in the batch.
        num_free: how many tokens every row may draft at least.
    """

    def __init__(
        self,
        req_ids: Sequence[str] | None,
        places: Sequence[int],
        rows: Sequence[_Row],
        num_context: int = 0,
    ) -> None:
        num = len(rows)
        self.req_ids = None if req_ids is None else list(req_ids)
        self.rows = list(rows)
        self.places = np.array(places, np.int64)
        self.handles = np.fromiter((r.handle for r in rows), np.int64, num)
        self.bases = np.fromiter((r.base for r in rows), np.int64, num)
        self.ends = np.fromiter((r.end - 1 for r in rows), np.int64, num)
        self.stops = np.fromiter((r.may_stop_at for r in rows), np.int64, num)
        self.weights = np.fromiter((r.weight for r in rows), np.float64, num)
        self.is_profile = bool(rows) and rows[0].profile is not None
        self.num_context = num_context
        self.num_free = 0
        self._full: dict[int, NDArray[np.int32]] = {}

    def grow(self, sampled: Sequence[Sequence[int]]) -> None:
        """Count the tokens that were sampled in a step."""
        sizes = list(map(len, sampled))
        self.num_context += sum(sizes)
        self.num_free -= max(sizes, default=0)

    def room(self, num_tokens: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        """[num_rows], how many tokens each row may draft, at most `most`.

        Args:
            num_tokens: tokens of each request in the batch, by place.
        """
        if self.num_free < most:
            texts = num_tokens[self.places]
            stops = np.minimum(self.stops, self.ends)
            ends = np.where(texts < self.stops, stops, self.ends)
            # Every step samples one token more than it accepts.
            free = np.maximum(ends - texts - 1, 0)
            self.num_free = int(free.min())
            if self.num_free < most:
                room: NDArray[np.int32] = np.minimum(free, most).astype(np.int32)
                return room
        if most not in self._full:
            self._full[most] = np.full(len(self.rows), most, np.int32)
        return self._full[most]


class GroupDrafter:
    """Drafts for each request from its group's tree."""

    def __init__(self, vllm_config: Any) -> None:
        self._max_model_len = vllm_config.model_config.max_model_len
        self._drafting: _Drafting | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no draft model."""

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
        self._batch = _Batch(None, [], [])
        self._has_drafted = False  # whether the last look drafted a token

    def step(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> list[list[int]]:
        since = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in sampled]
        batch = self._find_batch(sampled, num_tokens, token_ids)
        rows = batch.rows
        if batch.is_profile:
            for place, row in zip(batch.places.tolist(), rows, strict=True):
                drafts[place] = [sampled[place][-1]] * (row.profile or 0)
        elif rows:
            if self._has_drafted:
                self._learn(batch, sampled)
            most = self._budget.max_draft_tokens(len(rows))
            if most:
                looks_since = time.perf_counter()
                self._look(batch, num_tokens, token_ids, most, drafts)
                self._budget.pay(len(rows), time.perf_counter() - looks_since)
        step_s = self._clock.end_step(since)
        self._observe(batch, sampled, step_s)
        return drafts

    def _find_batch(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> _Batch:
        """The rows that get drafts and have sampled: mostly those of the last step."""
        req_ids = self._runner.input_batch.req_ids
        if all(sampled) and self._batch.req_ids == req_ids:
            self._batch.grow(sampled)
            return self._batch
        self._end_finished()
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
        num_context = int(num_tokens[: len(sampled)].sum())
        pattern = req_ids if all(sampled) else None
        self._batch = _Batch(pattern, places, rows, num_context)
        return self._batch

    def _end_finished(self) -> None:
        gone = self._rows.keys() - self._runner.input_batch.req_id_to_index.keys()
        if gone:
            now = time.monotonic()
            for request_id in gone:
                self._replica.end(self._rows.pop(request_id).key, now)

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
            end=min(num_input + params.max_tokens, self._max_model_len),
            may_stop_at=num_input + params.min_tokens,
            weight=self._probe_weight if told["probe"] else 1.0,
            drafted=_NOTHING,
            profile=profile,
        )
        self._rows[req_id] = row
        return row

    def _learn(self, batch: _Batch, sampled: list[list[int]]) -> None:
        """Tell the budget what became of the last drafts."""
        self._has_drafted = False
        req_ids = self._runner.input_batch.req_ids
        scheduled = self._clock.num_scheduled
        said = []
        num_drafted = []
        num_accepted = []
        for row, place in zip(batch.rows, batch.places.tolist(), strict=True):
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

    def _look(
        self,
        batch: _Batch,
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
        most: int,
        drafts: list[list[int]],
    ) -> None:
        """Bring the trees up to date, and draft at most `most` tokens a row."""
        num_lost = self._replica.follow(
            batch.handles, token_ids, batch.places, batch.bases, num_tokens
        )
        if num_lost:
            self._lose_track(num_lost)
        found = self._replica.draft(
            batch.handles, batch.room(num_tokens, most), MIN_CONFIDENCE
        )
        candidates = Candidates(
            confidences=found.confidences,
            offsets=found.offsets,
            weights=batch.weights,
            num_context_tokens=batch.num_context,
        )
        lengths = self._budget.choose(candidates)
        for i in lengths.nonzero()[0].tolist():
            start = int(found.offsets[i])
            end = start + int(lengths[i])
            drafts[batch.places[i]] = found.tokens[start:end].tolist()
            batch.rows[i].drafted = found.confidences[start:end]
            self._has_drafted = True

    def _lose_track(self, num_lost: int) -> None:
        """Begin all rows anew, since the text of some differs from the engine's."""
        _log.warning("%d requests lost track of their text", num_lost)
        now = time.monotonic()
        for row in self._rows.values():
            self._replica.end(row.key, now)
        self._rows.clear()
        self._batch.req_ids = None

    def _observe(
        self, batch: _Batch, sampled: Sequence[Sequence[int]], step_s: float
    ) -> None:
        """Learn a step's time, if it only decoded, and only rows that get drafts."""
        clock = self._clock
        num_rows = len(sampled)
        num_drafted = sum(clock.num_scheduled.values())
        if (
            clock.was_idle
            or len(batch.rows) != num_rows
            or clock.num_tokens != num_rows + num_drafted
        ):
            return
        self._model.observe(
            num_rows,
            num_drafted,
            batch.num_context,
            step_s,
            is_profile=batch.is_profile,
        )
        if num_drafted and not batch.is_profile:
            num_sampled = sum(map(len, sampled))
            self._budget.settle(num_rows, num_sampled, batch.num_context, step_s)
