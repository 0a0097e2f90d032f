"""Drafts for the requests of an engine, whichever model runner the engine has.

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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aseer.dgds.batch import NOTHING, Batch, Row
from aseer.dgds.budget import MIN_CONFIDENCE, Candidates, Outcome
from aseer.dgds.messages import EXTRA_ARGS_KEY
from aseer.dgds.replica import RequestKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.steptime import StepTimeModel

_log = logging.getLogger("aseer.dgds")


class Clock(Protocol):
    """What is known of the last step.

    Attributes:
        num_scheduled: drafted tokens that it verified, by request.
        num_tokens: that it computed.
        was_idle: whether the engine had nothing to do before the step.
    """

    num_scheduled: dict[str, int]
    num_tokens: int
    was_idle: bool


class Drafting:
    """The drafter, joined to its runner."""

    def __init__(
        self,
        runner: Any,
        replica: Replica,
        budget: Budget,
        model: StepTimeModel,
        clock: Clock,
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
        self._rows: dict[str, Row] = {}
        self._batch = Batch(None, [], [])
        self._has_drafted = False  # whether the last look drafted a token

    @property
    def has_drafted(self) -> bool:
        """Whether the last look drafted a token, whose fate is to be learned."""
        return self._has_drafted

    @property
    def is_profile(self) -> bool:
        """Whether the batch only measures what steps take."""
        return self._batch.is_profile

    def draft_anything(self, sampled: list[list[int]]) -> list[list[int]]:
        """Draft as many tokens as the rows of a profile ask for, whatever they are."""
        drafts: list[list[int]] = [[] for _ in sampled]
        batch = self._batch
        for place, row in zip(batch.places.tolist(), batch.rows, strict=True):
            drafts[place] = [sampled[place][-1]] * (row.profile or 0)
        return drafts

    def find(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> int:
        """Find the rows that get drafts and have sampled; returns how many."""
        self._batch = self._find_batch(sampled, num_tokens, token_ids)
        return len(self._batch.rows)

    def _find_batch(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> Batch:
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
        return Batch(pattern, places, rows, num_context)

    def _end_finished(self) -> None:
        gone = self._rows.keys() - self._runner.input_batch.req_id_to_index.keys()
        if gone:
            now = time.monotonic()
            for request_id in gone:
                self._replica.end(self._rows.pop(request_id).key, now)

    def _begin(
        self, place: int, req_id: str, num_tokens: int, token_ids: NDArray[np.int32]
    ) -> Row | None:
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
                key, text[:base], text[base:], time.monotonic(), told.get("images", "")
            )
        row = Row(
            key=key,
            handle=handle,
            base=base,
            end=min(num_input + params.max_tokens, self._max_model_len),
            may_stop_at=num_input + params.min_tokens,
            weight=self._probe_weight if told["probe"] else 1.0,
            drafted=NOTHING,
            profile=profile,
        )
        self._rows[req_id] = row
        return row

    def learn(self, sampled: list[list[int]]) -> None:
        """Tell the budget what became of the last drafts."""
        batch = self._batch
        if not self._has_drafted or not batch.rows or batch.is_profile:
            return
        self._has_drafted = False
        req_ids = self._runner.input_batch.req_ids
        scheduled = self._clock.num_scheduled
        said = []
        num_drafted = []
        num_accepted = []
        for row, place in zip(batch.rows, batch.places.tolist(), strict=True):
            if len(row.drafted):
                confidences = row.drafted[: scheduled.get(req_ids[place], 0)]
                row.drafted = NOTHING
                if len(confidences):
                    said.append(confidences)
                    num_drafted.append(len(confidences))
                    num_accepted.append(len(sampled[place]) - 1)
        if said:
            drafted, accepted = np.array(num_drafted), np.array(num_accepted)
            self._budget.learn(Outcome(np.concatenate(said), drafted, accepted))

    def look(
        self,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
        most: int,
    ) -> list[list[int]]:
        """Bring the trees up to date, and draft at most `most` tokens a row."""
        drafts: list[list[int]] = [[] for _ in sampled]
        batch = self._batch
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
        return drafts

    def _lose_track(self, num_lost: int) -> None:
        """Begin all rows anew, since the text of some differs from the engine's."""
        _log.warning("%d requests lost track of their text", num_lost)
        now = time.monotonic()
        for row in self._rows.values():
            self._replica.end(row.key, now)
        self._rows.clear()
        self._batch.req_ids = None

    def observe(self, sampled: Sequence[Sequence[int]], step_s: float) -> None:
        """Learn a step's time, if it only decoded, and only rows that get drafts."""
        batch, clock = self._batch, self._clock
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
