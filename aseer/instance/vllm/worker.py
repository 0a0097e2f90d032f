"""What aseer adds to vLLM's worker (its `worker_extension_cls`): calls for drafting and
for new weights.

Each is called by the instance process through `collective_rpc`, in every worker of an
engine. Drafts are made in the first worker alone; vLLM hands them to the others.
"""

from __future__ import annotations

import functools
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.dgds.budget import make_budget
from aseer.dgds.cap import CappedBudget
from aseer.dgds.client import DraftClient
from aseer.dgds.messages import DraftingSpec
from aseer.dgds.proposer import GroupDrafter
from aseer.dgds.replica import Replica
from aseer.dgds.steptime import StepTimeModel
from aseer.instance.vllm import EXECUTOR
from aseer.instance.vllm.executor import send_drafts_along
from aseer.instance.vllm.kvgroups import describe_groups
from aseer.instance.vllm.v2 import (
    is_v2,
    offer,
    refuse_drafts,
    start_drafting,
    verify_drafts,
)
from aseer.weights.files import OpenIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aseer.types import KvGroup

_log = logging.getLogger("aseer.instance")
_TIMES = ("step_s", "draft_s", "share_buckets")
_DRAFTS = ("num_drafts", "drafted", "accepted")
_POLL_S = 0.1  # longer than a step's pause, far shorter than a trainer's


def poll_less() -> None:
    """Have a CPU engine's workers stop polling soon after their last call.

    vLLM's wait for the next call by polling for a second, and only then sleep. On a CPU
    that second is taken from whoever computes there next, such as the trainer.
    """
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    waiting = getattr(shm_broadcast, "SpinCondition", None)
    if waiting is None or not current_platform.is_cpu():
        return
    waiting.__init__ = functools.partialmethod(waiting.__init__, busy_loop_s=_POLL_S)


def spare_generators() -> None:
    """Have a CPU engine's seeded requests draw nothing for a part of their prompt.

    vLLM draws a token for every request of a step, and where part of a prompt is still
    to be computed it drops the token and sets the request's generator back. A CPU's
    generator cannot be set back: the engine dies.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample_tokens = getattr(GPUModelRunner, "sample_tokens", None)
    if sample_tokens is None:
        return

    @functools.wraps(sample_tokens)
    def sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        mask = getattr(runner, "discard_request_mask", None)  # a row each
        dropped = [i for i in generators if mask is not None and mask.np[i]]
        spared = {i: generators.pop(i) for i in dropped}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            generators.update(spared)

    GPUModelRunner.sample_tokens = sample


def pack_tied_heads(model: Any) -> None:
    """Have a CPU's output layer follow the embedding that it shares its weight with.

    vLLM's reload writes the new values to the weight they share; but a CPU computes
    logits from a packed copy of it, which is made anew only for layers that a
    checkpoint has tensors of.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(
            module.quant_method, UnquantizedEmbeddingMethod
        ):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def experts_packed_anew(model: Any) -> Iterator[None]:
    """Have a CPU's experts compute with the weights that are loaded meanwhile.

    They read weights in an order of their own, into which vLLM puts them when it first
    loads a model. Its reload leaves them in a checkpoint's order, which is then read as
    if it were theirs: other numbers, and no error.
    """
    from vllm.platforms import current_platform

    packed: set[int] = set()

    def note(layer: Any, pack: Callable[[Any], None]) -> None:
        packed.add(id(layer))
        pack(layer)

    layers: list[tuple[Any, Any]] = []
    for layer in model.modules() if current_platform.is_cpu() else ():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts: Any = getattr(kernel, "fused_experts", None)
        if hasattr(experts, "process_weights_after_loading"):
            layers.append((layer, experts))
    for _, experts in layers:
        pack = experts.process_weights_after_loading
        experts.process_weights_after_loading = functools.partial(note, pack=pack)
    try:
        yield
    finally:
        for _, experts in layers:
            del experts.process_weights_after_loading  # the class's own again
    for layer, experts in layers:
        if id(layer) not in packed:
            experts.process_weights_after_loading(layer)


def take_undrafted_steps_as_plain(runner: Any) -> None:
    """Have a CPU's steps in which nothing was drafted prepared as without speculation.

    vLLM tells apart drafted tokens from sampled ones in every step, whether there are
    any or not, and asks `speculative_config` whether it must. Models that carry a state
    from step to step need it always.
    """
    from vllm.platforms import current_platform

    prepare = getattr(runner, "_prepare_inputs", None)
    is_hybrid = getattr(runner.model_config, "is_hybrid", True)
    if prepare is None or is_hybrid or not current_platform.is_cpu():
        return

    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.scheduled_spec_decode_tokens:
            return prepare(scheduler_output, *args, **kwargs)
        config, runner.speculative_config = runner.speculative_config, None
        try:
            return prepare(scheduler_output, *args, **kwargs)
        finally:
            runner.speculative_config = config

    runner._prepare_inputs = prepare_inputs


# vLLM imports this in a worker, before the worker's queues and model runner are made.
poll_less()
spare_generators()
offer()


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any
    device: Any
    rank: int
    aseer_weights: OpenIndex | None = None

    def aseer_prepare_weights(self, path: str) -> None:
        """Open the files of new weights, and see that they are there."""
        self.aseer_discard_weights()
        self.aseer_weights = OpenIndex(path)

    def aseer_commit_weights(self) -> None:
        """Load what was prepared, each worker its own part of every tensor."""
        assert self.aseer_weights is not None, "prepare first"
        with experts_packed_anew(self.model_runner.model):
            self.reload_weights(weights_iterator=self.aseer_weights.tensors())
        pack_tied_heads(self.model_runner.model)
        self.aseer_discard_weights()

    def aseer_describe_kv(self) -> tuple[list[KvGroup], int]:
        """See `describe_groups`."""
        config = self.vllm_config
        speculative = config.speculative_config
        num_drafted = speculative.num_speculative_tokens if speculative else 0
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        return describe_groups(
            # What lies in the host's memory takes none of the device's blocks.
            [g.kv_cache_spec for g in groups if not getattr(g, "host_resident", False)],
            batched_tokens=config.scheduler_config.max_num_batched_tokens,
            step_tokens=1 + num_drafted,
            num_steps=getattr(config, "max_concurrent_batches", 2),
        )

    def aseer_discard_weights(self) -> None:
        """Forget what was prepared."""
        if self.aseer_weights is not None:
            self.aseer_weights.close()
        self.aseer_weights = None

    def aseer_check_sampler(self) -> dict[str, Any]:
        """Set up the sampler that verifies drafts, and test it; a `Verdict` as a dict.

        That of vLLM's own drafters is mended if it must be; `was_mended` is added.
        """
        from aseer.dgds.sampler import mend, test_sampler
        from aseer.dgds.verifier import DraftVerifier

        runner = self.model_runner
        if getattr(runner, "rejection_sampler", None) is None:
            return {"is_right": True, "fault": "", "was_mended": False}
        if is_v2(runner):
            return {**verify_drafts(runner)._asdict(), "was_mended": False}
        was_mended = False
        if isinstance(getattr(runner, "drafter", None), GroupDrafter):
            runner.rejection_sampler = DraftVerifier(runner.sampler)
        else:
            was_mended = mend(self.device)
        verdict = test_sampler(runner.rejection_sampler, self.device)
        return {**verdict._asdict(), "was_mended": was_mended}

    def aseer_refuse_drafts(self) -> bool:
        """Draft nothing, whatever drafter vLLM has; whether that can be had.

        Model runner V2's own speculators draft on the device, for steps that are
        launched already.
        """
        runner = self.model_runner
        if is_v2(runner):
            return refuse_drafts(runner)

        def propose(*args: Any, **kwargs: Any) -> list[list[int]]:
            return [[] for _ in runner.input_batch.req_ids]

        runner.drafter.propose = propose
        return True

    def aseer_start_drafting(self, spec: dict[str, Any]) -> None:
        """Join the drafter to the runner and the draft server."""
        runner = self.model_runner
        if not is_v2(runner):
            self._prepare_v1(runner)
        if self.rank != 0:
            return
        drafting = msgspec.convert(spec, DraftingSpec)
        settings = drafting.settings
        model = StepTimeModel()
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

    def _prepare_v1(self, runner: Any) -> None:
        # vLLM drafts token 0 for all when one request nears the model's length; our
        # drafts end in time by themselves.
        if hasattr(runner, "effective_drafter_max_model_len"):
            runner.effective_drafter_max_model_len += runner.num_spec_tokens
        if self.vllm_config.parallel_config.distributed_executor_backend == EXECUTOR:
            send_drafts_along(runner)
        take_undrafted_steps_as_plain(runner)

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
