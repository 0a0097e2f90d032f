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
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.sample import rejection_sampler

from aseer.data import trace
from aseer.dgds.verifier import DraftVerifier
from aseer.instance import main as instance
from aseer.instance.vllm.backend import VllmBackend
from aseer.instance.vllm.recorded import Recorded, RecordedSlots
from aseer.instance.vllm.v2 import is_v2
from aseer.instance.vllm.weights import call_workers
from aseer.instance.vllm.worker import WorkerExtension

if TYPE_CHECKING:
    from aseer.instance.base import Emit, InstanceSpec
    from aseer.types import Chunk, ChunkEnd, InstanceInfo


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
