"""Recorded responses on a device, and which of their tokens a step emits.

Nothing here imports vLLM; a batch is its `InputBatch`, of which little is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.data.trace import Trace

_REJECTED = -1  # vLLM's mark for what follows the last accepted token


class _Place(NamedTuple):
    """Where a response is among all of the trace's tokens."""

    first: int
    last: int
    num_prompt_tokens: int


class Recorded:
    """A trace's responses on a device, and what a batch emits next of them."""

    def __init__(self, recorded: Trace, device: Any) -> None:
        """Copy the tokens to the device."""
        self._device = device
        self._places: dict[str, _Place] = {}
        self._place_of: dict[str, _Place | None] = {}  # by vLLM's request id
        texts = []
        first = 0
        for g, group in enumerate(recorded.groups):
            for i, response in enumerate(group.responses):
                last = first + len(response) - 1
                place = _Place(first, last, len(group.prompt))
                self._places[f"{g}/{i}"] = place
                texts.append(response)
                first = last + 1
        self._tokens = torch.from_numpy(np.concatenate(texts)).to(device)

    def instead_of_sampled(
        self, sampled: torch.Tensor, batch: Any, num_rows: int
    ) -> torch.Tensor:
        """[num_rows] tokens for what was sampled in a step without drafts."""
        found, is_recorded = self._next(batch, num_rows, 1)
        return torch.where(is_recorded, found[:, 0].to(sampled.dtype), sampled)

    def instead_of_all(
        self, sampled: torch.Tensor, num_draft_tokens: Sequence[int], batch: Any
    ) -> torch.Tensor:
        """Tokens for what was sampled after the text and after each draft of a row.

        Args:
            sampled: [rows + drafts], one row's after the other's.
        """
        found, is_recorded = self._next(
            batch, len(num_draft_tokens), max(num_draft_tokens) + 1
        )
        counts = torch.tensor(num_draft_tokens, device=self._device)[:, None]
        is_used = torch.arange(found.shape[1], device=self._device) <= counts
        is_recorded = is_recorded[:, None].expand_as(found)[is_used]
        return torch.where(is_recorded, found[is_used].to(sampled.dtype), sampled)

    def instead_of_verified(
        self,
        output: torch.Tensor,
        draft_token_ids: torch.Tensor,
        num_draft_tokens: Sequence[int],
        batch: Any,
    ) -> torch.Tensor:
        """[num_rows, most drafted + 1] tokens for what vLLM's verified sampler chose.

        Args:
            draft_token_ids: of all rows, one after the other.
        """
        num_rows, width = output.shape
        found, is_recorded = self._next(batch, num_rows, width)
        column = torch.arange(width, device=self._device)
        counts = torch.tensor(num_draft_tokens, device=self._device)[:, None]
        drafts = torch.full_like(found[:, 1:], _REJECTED).masked_scatter_(
            column[:-1] < counts, draft_token_ids.to(found.dtype)
        )
        accepted = (found[:, :-1] == drafts).cumprod(1).sum(1, keepdim=True)
        forced = found.masked_fill(column > accepted, _REJECTED)
        return torch.where(is_recorded[:, None], forced.to(output.dtype), output)

    def _next(
        self, batch: Any, num_rows: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's next tokens, [num_rows, width], and whether it has any.

        Past its end a response repeats its last token; nobody takes that.

        Args:
            batch: vLLM's InputBatch.
        """
        num_tokens = batch.num_tokens_no_spec
        rows = np.zeros((num_rows, 3), np.int64)
        for row, request_id in enumerate(batch.req_ids[:num_rows]):
            place = self._find(request_id)
            if place is not None:
                position = int(num_tokens[row]) - place.num_prompt_tokens
                rows[row] = (place.first + position, place.last, 1)
        start, last, is_recorded = torch.from_numpy(rows).to(self._device).unbind(1)
        wanted = start[:, None] + torch.arange(width, device=self._device)
        return self._tokens[wanted.minimum(last[:, None])], is_recorded.bool()

    def by_slots(self, num_slots: int) -> RecordedSlots:
        """What model runner V2 asks, which knows requests on the device by slots."""
        return RecordedSlots(self._tokens, num_slots, self._find)

    def _find(self, request_id: str) -> _Place | None:
        try:
            return self._place_of[request_id]
        except KeyError:
            place = self._places.get(request_id.rpartition("#")[0])
            self._place_of[request_id] = place
            return place


class RecordedSlots:
    """Which response each slot of model runner V2 emits."""

    def __init__(
        self,
        tokens: torch.Tensor,
        num_slots: int,
        find: Callable[[str], _Place | None],
    ) -> None:
        self._tokens = tokens
        self._find = find
        # First and last token, and tokens of the prompt; -1 = it is sampled.
        self._places = torch.full((num_slots, 3), -1, device=tokens.device)

    def begin(self, slot: int, request_id: str) -> None:
        """A request is in the slot from now on."""
        place = self._find(request_id) or (-1, -1, -1)
        self._places[slot] = torch.tensor(place, device=self._places.device)

    def instead_of(
        self, sampled: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Tokens for what was sampled.

        Args:
            sampled: [num_logits]. slots: of what each was sampled for.
            positions: of the text's last token before each.
        """
        first, last, num_prompt = self._places[slots].unbind(1)
        wanted = (first + positions + 1 - num_prompt).minimum(last).clamp(min=0)
        found = self._tokens[wanted].to(sampled.dtype)
        return torch.where(first >= 0, found, sampled)
