"""What aseer adds to vLLM's worker (its `worker_extension_cls`): calls for drafting and
for new weights.

Each is called by the instance process through `collective_rpc`, in every worker of an
engine. Drafts are made in the first worker alone; vLLM hands them to the others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.dgds.budget import make_budget
from aseer.dgds.cap import CappedBudget
from aseer.dgds.client import DraftClient
from aseer.dgds.messages import DraftingSpec
from aseer.dgds.profile import graph_tokens
from aseer.dgds.replica import Replica
from aseer.dgds.steptime import StepTimeModel
from aseer.instance.vllm import patches
from aseer.instance.vllm.kvgroups import describe_groups
from aseer.instance.vllm.reload import Reload
from aseer.instance.vllm.transfer import offer_receivers
from aseer.instance.vllm.v2 import (
    is_v2,
    offer,
    refuse_drafts,
    start_drafting,
    verify_drafts,
)
from aseer.weights.carriers import gpu_id
from aseer.weights.files import OpenIndex

if TYPE_CHECKING:
    from aseer.types import KvGroup

_TIMES = ("step_s", "draft_s", "share_buckets")
_DRAFTS = ("num_drafts", "drafted", "accepted")

# vLLM imports this in a worker, before the worker's queues and model runner are made.
patches.apply("worker")
offer()
offer_receivers()


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any
    weight_transfer_engine: Any
    device: Any
    rank: int
    aseer_weights: OpenIndex | None = None
    aseer_transfer: Reload | None = None

    def aseer_prepare_weights(self, *paths: str) -> None:
        """Open the files of new weights, and see that they are there.

        Args:
            paths: of their index, on each node of the engine.
        """
        self.aseer_discard_weights()
        rank = self.vllm_config.parallel_config.node_rank
        self.aseer_weights = OpenIndex(paths[rank])

    def aseer_commit_weights(self) -> None:
        """Load what was prepared, each worker its own part of every tensor.

        Raises:
            EngineError: vLLM lost some; nobody knows now what it computes with.
        """
        assert self.aseer_weights is not None, "prepare first"
        with Reload() as reloaded:
            patches.apply("reload", self.model_runner.get_model(), reloaded)
            self.reload_weights(weights_iterator=self.aseer_weights.tensors())
        self.aseer_discard_weights()

    def aseer_gpu(self) -> str:
        """The id of the worker's GPU; empty if it has none."""
        import torch

        if self.device.type != "cuda":
            return ""
        return gpu_id(torch.cuda.get_device_properties(self.device))

    def aseer_begin_transfer(self) -> None:
        """Mend vLLM's reload for the weights that are about to come."""
        self.aseer_transfer = reloaded = Reload()
        patches.apply("reload", self.model_runner.get_model(), reloaded)

    def aseer_end_transfer(self) -> None:
        """All weights of a transfer are loaded; leave the trainer's group.

        Raises:
            EngineError: vLLM lost some; nobody knows now what it computes with.
        """
        assert self.aseer_transfer is not None, "begin first"
        reloaded, self.aseer_transfer = self.aseer_transfer, None
        self.weight_transfer_engine.shutdown()
        reloaded.close()

    def aseer_describe_kv(self) -> tuple[list[KvGroup], int]:
        """See `describe_groups`."""
        config = self.vllm_config
        speculative = config.speculative_config
        num_drafted = speculative.num_speculative_tokens if speculative else 0
        plan = self.model_runner.kv_cache_config
        groups = plan.kv_cache_groups
        return describe_groups(
            # What lies in the host's memory takes none of the device's blocks.
            [g.kv_cache_spec for g in groups if not getattr(g, "host_resident", False)],
            batched_tokens=config.scheduler_config.max_num_batched_tokens,
            step_tokens=1 + num_drafted,
            num_steps=getattr(config, "max_concurrent_batches", 2),
            max_num_seqs=config.scheduler_config.max_num_seqs,
            hash_tokens=getattr(plan, "hash_block_size", None),
        )

    def aseer_why_no_pool(self) -> str:
        """Why the engine takes no part in its KV pool; "" = it does, or has none."""
        from vllm.distributed.kv_transfer import kv_transfer_state

        if not kv_transfer_state.has_kv_transfer_group():
            return ""
        return getattr(kv_transfer_state.get_kv_transfer_group(), "why_no_pool", "")

    def aseer_rest_kv(self) -> None:
        """Have nothing copy from the engine's KV any more, before it sleeps."""
        from vllm.distributed.kv_transfer import kv_transfer_state

        if kv_transfer_state.has_kv_transfer_group():
            # Of ours alone. From 0.33 on vLLM tells all connectors itself.
            connector = kv_transfer_state.get_kv_transfer_group()
            getattr(connector, "rest_kv", lambda: None)()

    def aseer_discard_weights(self) -> None:
        """Forget what was prepared."""
        if self.aseer_weights is not None:
            self.aseer_weights.close()
        self.aseer_weights = None

    def aseer_check_sampler(self) -> dict[str, Any]:
        """Set up the sampler that verifies drafts, and test it; a `Verdict` as a dict.

        That of vLLM's own drafters is mended if it must be.
        """
        runner = self.model_runner
        if getattr(runner, "rejection_sampler", None) is None:
            return {"is_right": True, "fault": ""}
        if is_v2(runner):
            return dict(verify_drafts(runner)._asdict())
        from aseer.dgds.sampler import test_sampler

        patches.apply("sampler", runner)
        return test_sampler(runner.rejection_sampler, self.device)._asdict()

    def aseer_refuse_drafts(self) -> bool:
        """Draft nothing, whatever drafter vLLM has; whether that can be had.

        Model runner V2's own speculators draft on the device, for steps that are
        launched already.
        """
        runner = self.model_runner
        if is_v2(runner):
            return refuse_drafts(runner)
        patches.apply("refusal", runner)
        return True

    def aseer_start_drafting(self, spec: dict[str, Any]) -> None:
        """Join the drafter to the runner and the draft server."""
        if self.rank == 0:
            self._join_drafter(spec)
        if not is_v2(self.model_runner):
            patches.apply("drafting", self.model_runner)

    def _join_drafter(self, spec: dict[str, Any]) -> None:
        runner = self.model_runner
        drafting = msgspec.convert(spec, DraftingSpec)
        settings = drafting.settings
        model = StepTimeModel(graph_tokens(self.vllm_config))
        replica = Replica(ttl_s=settings.group_ttl_s)
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        budget = CappedBudget(make_budget(settings, model), vocab_size)
        parts = (replica, budget, model, settings.probe_weight)
        if is_v2(runner):
            runner.aseer_clock = start_drafting(runner, *parts)
        else:
            runner.aseer_clock = runner.drafter.start(runner, *parts)
        identity = f"drafter-{os.getpid()}".encode()
        runner.aseer_client = DraftClient(
            replica, drafting.endpoint, identity, drafting.fetch_interval_s
        )

    def aseer_drafting_times(self) -> dict[str, Any]:
        """Fields of `DraftCounts` since the start: its times.

        On model runner V2 its drafts as well, since vLLM counts placeholders there.
        """
        clock = getattr(self.model_runner, "aseer_clock", None)
        if clock is None:
            return {}
        counts = {name: getattr(clock, name) for name in _TIMES}
        if is_v2(self.model_runner):
            counts |= {name: getattr(clock, name) for name in _DRAFTS}
        return counts
