"""An instance whose requests emit recorded tokens: for benchmarks and tests only.

    python -m aseer.instance.vllm.replay TRACE

is to be started in place of `aseer.instance.main`. Request "g/i" then emits what
response i of the trace's group g (counted from 0) holds, at whatever position it is,
over all chunks; other requests are sampled as ever. The model and the sampler do all
their work first: only then is the sampled token replaced, and a drafted token accepted
exactly if it equals the recorded one. So every way of rolling out does the same work.
Logprobs are those of the recorded tokens under the engine's own model.

At another weight version, which a benchmark gives every run (KV and group drafts of
others are not found then), vLLM's own suffix drafter forgets what it has seen, too.

On vLLM's model runner V2 its own drafters cannot be replayed, ours can.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch
from vllm.v1.sample import rejection_sampler

from aseer.data import trace
from aseer.dgds.verifier import DraftVerifier
from aseer.instance import main as instance
from aseer.instance.vllm.backend import VllmBackend
from aseer.instance.vllm.v2 import is_v2
from aseer.instance.vllm.weights import call_workers
from aseer.instance.vllm.worker import WorkerExtension

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.data.trace import Trace
    from aseer.instance.base import Emit, InstanceSpec
    from aseer.types import Chunk, ChunkEnd, InstanceInfo

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


class ReplayExtension(WorkerExtension):
    """The worker's extension, with replay."""

    def aseer_start_replay(self, path: str) -> None:
        """From now on requests of the trace emit its tokens."""
        runner = self.model_runner
        recorded = Recorded(trace.load(path), self.device)
        if is_v2(runner):
            self._replay_on_v2(runner, recorded.by_slots(runner.max_num_reqs))
            return
        sample = runner.sampler.sample
        verify = rejection_sampler.rejection_sample

        def replay_sample(logits: Any, *args: Any, **kwargs: Any) -> Any:
            sampled, logprobs = sample(logits, *args, **kwargs)
            batch = runner.input_batch
            if len(sampled) > batch.num_reqs:  # drafts too: replaced by what verifies
                return sampled, logprobs
            return recorded.instead_of_sampled(sampled, batch, len(sampled)), logprobs

        def replay_all(
            sample_all: Any, logits: Any, metadata: Any, sampling: Any
        ) -> tuple[Any, Any]:
            sampled, logprobs = sample_all(logits, metadata, sampling)
            batch, num_drafts = runner.input_batch, metadata.num_draft_tokens
            return recorded.instead_of_all(sampled, num_drafts, batch), logprobs

        def replay_verify(
            draft_token_ids: Any, num_draft_tokens: Any, *args: Any, **kwargs: Any
        ) -> Any:
            output = verify(draft_token_ids, num_draft_tokens, *args, **kwargs)
            return recorded.instead_of_verified(
                output, draft_token_ids, num_draft_tokens, runner.input_batch
            )

        runner.sampler.sample = replay_sample
        rejection_sampler.rejection_sample = replay_verify
        verifier = getattr(runner, "rejection_sampler", None)
        if isinstance(verifier, DraftVerifier):
            ours: Any = verifier
            ours.sample_all = partial(replay_all, verifier.sample_all)

    def _replay_on_v2(self, runner: Any, recorded: RecordedSlots) -> None:
        from aseer.dgds.verifier_v2 import RowVerifier

        verifier = runner.rejection_sampler
        if verifier is not None and not isinstance(verifier, RowVerifier):
            raise RuntimeError(
                "on model runner V2 vLLM's own drafts cannot be replayed; set "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        add, sample = runner.add_requests, runner.sampler.sample

        def add_requests(scheduler_output: Any) -> None:
            add(scheduler_output)
            for new in scheduler_output.scheduled_new_reqs:
                slot = runner.req_states.req_id_to_index[new.req_id]
                recorded.begin(slot, new.req_id)

        def replay_sample(
            logits: Any,
            slots: Any,
            idx_mapping: Any,
            idx_mapping_np: Any,
            positions: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            mapped = (slots, idx_mapping, idx_mapping_np, positions)
            sampled, processed = sample(logits, *mapped, *args, **kwargs)
            return recorded.instead_of(sampled, slots, positions), processed

        runner.add_requests = add_requests
        runner.sampler.sample = replay_sample

    def aseer_forget_texts(self) -> None:
        """Let vLLM's suffix drafter begin anew."""
        runner = self.model_runner
        if hasattr(getattr(runner, "drafter", None), "suffix_cache"):
            runner.drafter = type(runner.drafter)(runner.vllm_config)


class ReplayBackend(VllmBackend):
    """See `Backend`."""

    def __init__(self, spec: InstanceSpec, path: str) -> None:
        extension = f"{ReplayExtension.__module__}.{ReplayExtension.__qualname__}"
        args = {**spec.engine_args, "worker_extension_cls": extension}
        super().__init__(msgspec.structs.replace(spec, engine_args=args))
        self._path = path
        self._weight_version = 0
        self._forgetting = asyncio.Lock()

    async def start(self) -> InstanceInfo:
        """See `Backend`."""
        trace.load(self._path)  # a bad one is told before the engine's start
        info = await super().start()
        await call_workers(self._engine, "aseer_start_replay", self._path)
        return info

    async def run(self, chunk: Chunk, emit: Emit) -> ChunkEnd:
        """See `Backend`."""
        async with self._forgetting:
            if chunk.weight_version != self._weight_version:
                self._weight_version = chunk.weight_version
                await call_workers(self._engine, "aseer_forget_texts")
        return await super().run(chunk, emit)


if __name__ == "__main__":
    # Under its own name, by which the engine's processes find the extension, too.
    from aseer.instance.vllm.replay import ReplayBackend as _Backend

    instance.make_backend = partial(_Backend, path=sys.argv[1])
    instance.main()
