"""The texts of the requests that run on an engine, a row each, on the host.

Model runner V2 keeps texts on the device. A drafter needs them where the suffix trees
are, in the form in which model runner V1 has them (`GroupDrafter`): rows that lie one
behind another, and the ids of their requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


class Rows:
    """The running requests, with the names that vLLM gives such things.

    Attributes:
        req_ids: vLLM's ids, by row.
        req_id_to_index: the other way round.
        requests: by id, each with its `sampling_params`.
        structured: ids of those with a grammar.
        token_ids: [max_num_rows, max_model_len], the texts, prompts included.
        num_tokens, num_prompt_tokens: [max_num_rows].
    """

    def __init__(self, max_num_rows: int, max_model_len: int) -> None:
        # Under asynchronous scheduling a request may begin before the worker is told
        # that another is over.
        shape = (2 * max_num_rows, max_model_len + 1)
        self.req_ids: list[str] = []
        self.req_id_to_index: dict[str, int] = {}
        self.requests: dict[str, Any] = {}
        self.structured: set[str] = set()
        self.token_ids: NDArray[np.int32] = np.zeros(shape, np.int32)
        self.num_tokens: NDArray[np.int32] = np.zeros(shape[0], np.int32)
        self.num_prompt_tokens: NDArray[np.int32] = np.zeros(shape[0], np.int32)
        self._asked: list[str] = []
        self._places: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, request: Any) -> None:
        """Add one of vLLM's NewRequestData, or replace what has its id."""
        req_id = request.req_id
        self.remove((req_id,))
        text = request.prefill_token_ids
        place = len(self.req_ids)
        self.req_ids.append(req_id)
        self.req_id_to_index[req_id] = place
        self.requests[req_id] = request
        params = request.sampling_params
        if getattr(params, "structured_outputs", None) is not None:
            self.structured.add(req_id)
        self.token_ids[place, : len(text)] = text
        self.num_tokens[place] = len(text)
        # A request that was preempted comes with what it has generated.
        self.num_prompt_tokens[place] = request.prompt_len
        self._asked = []

    def remove(self, req_ids: Iterable[str]) -> None:
        """Remove those that are here; the last rows take their places."""
        for req_id in req_ids:
            place = self.req_id_to_index.pop(req_id, None)
            if place is None:
                continue
            del self.requests[req_id]
            self.structured.discard(req_id)
            self._asked = []
            last = self.req_ids.pop()
            if last != req_id:
                from_place = len(self.req_ids)
                self.req_ids[place] = last
                self.req_id_to_index[last] = place
                num = self.num_tokens[from_place]
                self.token_ids[place, :num] = self.token_ids[from_place, :num]
                self.num_tokens[place] = num
                self.num_prompt_tokens[place] = self.num_prompt_tokens[from_place]

    def places(self, req_ids: Sequence[str]) -> NDArray[np.int64]:
        """[len(req_ids)], the rows of these requests; -1 for those that are not here.

        Batches mostly are those of the step before.
        """
        if self._asked != req_ids:
            found = (self.req_id_to_index.get(req_id, -1) for req_id in req_ids)
            self._places = np.fromiter(found, np.int64, len(req_ids))
            self._asked = list(req_ids)
        return self._places

    def append(
        self,
        req_ids: Sequence[str],
        tokens: NDArray[np.int64],
        counts: NDArray[np.int32],
    ) -> None:
        """Append what a step sampled.

        Args:
            tokens: [len(req_ids), widest], of which the first `counts` count.
        """
        places = self.places(req_ids)
        is_here = places >= 0
        columns = np.arange(tokens.shape[1])
        taken, column = np.nonzero(is_here[:, None] & (columns < counts[:, None]))
        rows = places[taken]
        self.token_ids[rows, self.num_tokens[rows] + column] = tokens[taken, column]
        self.num_tokens[places[is_here]] += counts[is_here].astype(np.int32)
