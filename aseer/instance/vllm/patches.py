"""Every change that aseer makes to vLLM's code and objects, and why.

Each is a row of `PATCHES`. `apply` makes those of one moment of a process's life and
logs them, in the log of the engine. All else that aseer does with vLLM goes through
names that `aseer/compat/names.py` lists. Two modules have their own: what touches model
runner V2's insides is `aseer/dgds/speculator.py`, which lists it, and `replay.py`, for
benchmarks and tests only, replaces sampled tokens.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

from aseer.compat.patching import Patch, apply_patches
from aseer.dgds.proposer import GroupDrafter
from aseer.instance.vllm import EXECUTOR
from aseer.instance.vllm.packing import is_on_cpu, pack_experts, pack_tied_heads
from aseer.instance.vllm.reload import notice_losses
from aseer.instance.vllm.rows import (
    expand_batch_to_tokens,
    expands_rightly,
    keep_masks_apart,
)
from aseer.instance.vllm.sinks import load_sinks

Moment = Literal["configure", "worker", "sampler", "drafting", "refusal", "reload"]

# Below vLLM's own logger, which has a handler in each of its processes.
_log = logging.getLogger("vllm.aseer")
_POLL_S = 0.1  # longer than a step's pause, far shorter than a trainer's


def apply(moment: Moment, *targets: Any) -> list[str]:
    """Apply and log the patches of a moment.

    Args:
        moment: and what is given with it: "configure" (nothing, before an engine is
            configured), "worker" (nothing, before a worker makes its model runner),
            "sampler" (the runner, before its sampler for drafts is tested), "drafting"
            (the runner, when it begins to draft by group), "refusal" (the runner, if it
            must not draft), "reload" (the model and a `Reload` that is closed when its
            new weights are loaded).
    Returns:
        The names of those that changed something.
    """
    return apply_patches(PATCHES, moment, _log, *targets)


def keep_schedule() -> bool:
    """Have vLLM keep the schedule of `speculation.unpadded` on model runner V1.

    Ours has the same number for every batch size: there is nothing to follow.
    """
    from vllm.config import VllmConfig

    return _keep_schedule(VllmConfig)


def _keep_schedule(config_class: Any) -> bool:
    name = "_maybe_disable_dynamic_sd_for_v1"
    drop = getattr(config_class, name, None)
    if drop is None:
        return False

    @functools.wraps(drop)
    def drop_others(config: Any) -> None:
        speculative = config.speculative_config
        if speculative is None or speculative.method != "custom_class":
            drop(config)

    setattr(config_class, name, drop_others)
    return True


def poll_less() -> bool:
    """Have a CPU engine's workers stop polling soon after their last call."""
    from vllm.distributed.device_communicators import shm_broadcast

    waiting = getattr(shm_broadcast, "SpinCondition", None)
    if waiting is None or not is_on_cpu():
        return False
    waiting.__init__ = functools.partialmethod(waiting.__init__, busy_loop_s=_POLL_S)
    return True


def spare_generators() -> bool:
    """Have a CPU engine's seeded requests draw nothing for a part of their prompt."""
    if not is_on_cpu():
        return False
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample_tokens = getattr(GPUModelRunner, "sample_tokens", None)
    if sample_tokens is None:
        return False

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
    return True


def verify_by_sampling(runner: Any) -> bool:
    """Have drafts by group verified by `DraftVerifier`."""
    if not _drafts_by_group(runner):
        return False
    from aseer.dgds.verifier import DraftVerifier

    runner.rejection_sampler = DraftVerifier(runner.sampler)
    return True


def expand_settings_rightly(runner: Any) -> bool:
    """Have vLLM's own sampler spread settings over tokens rightly, if it does not."""
    if _drafts_by_group(runner):
        return False
    from vllm.v1.sample import rejection_sampler

    if expands_rightly(rejection_sampler.expand_batch_to_tokens, runner.device):
        return False
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def _drafts_by_group(runner: Any) -> bool:
    return isinstance(getattr(runner, "drafter", None), GroupDrafter)


def draft_near_the_end(runner: Any) -> bool:
    """Have drafts asked for near the model's length; ours end in time by themselves."""
    if not hasattr(runner, "effective_drafter_max_model_len"):
        return False
    runner.effective_drafter_max_model_len += runner.num_spec_tokens
    return True


def time_steps(runner: Any) -> bool:
    """Have every step timed by the drafter's clock."""
    clock = getattr(runner, "aseer_clock", None)
    if clock is None:
        return False
    runner.execute_model = clock.timed(runner.execute_model)
    return True


def send_drafts_along(runner: Any) -> bool:
    """Have a runner add its drafts to every step's output, for `DraftingExecutor`."""
    parallel = runner.vllm_config.parallel_config
    if parallel.distributed_executor_backend != EXECUTOR:
        return False
    sample_tokens = runner.sample_tokens

    @functools.wraps(sample_tokens)
    def with_drafts(*args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        if output is not None:
            output.aseer_drafts = runner.take_draft_token_ids()
        return output

    runner.sample_tokens = with_drafts
    return True


def take_undrafted_steps_as_plain(runner: Any) -> bool:
    """Have a CPU's steps in which nothing was drafted prepared as without speculation.

    Models that carry a state from step to step are left out.
    """
    prepare = getattr(runner, "_prepare_inputs", None)
    is_hybrid = getattr(runner.model_config, "is_hybrid", True)
    if prepare is None or is_hybrid or not is_on_cpu():
        return False

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
    return True


def draft_nothing(runner: Any) -> bool:
    """Have whatever drafter vLLM has draft nothing; False if that cannot be had.

    Model runner V2 has a speculator instead of a drafter. It drafts on the device, for
    steps that are launched already.
    """
    if not hasattr(runner, "drafter"):
        return False

    def propose(*args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in runner.input_batch.req_ids]

    runner.drafter.propose = propose
    return True


# Run with 0.32; the same lines were read in 0.26, 0.30 and 0.33.
_ALL = "0.26 to 0.33"

PATCHES = (
    Patch(
        keep_schedule,
        "configure",
        "vLLM drops a schedule of drafts for drafters that it does not know to follow "
        "one, and then has requests verify made-up tokens",
        "from 0.33 on, model runner V1",
    ),
    Patch(
        poll_less,
        "worker",
        "a worker polls for a second after each call, and takes that second from "
        "whoever computes next on its core, such as the trainer",
        f"{_ALL}, on CPUs",
    ),
    Patch(
        spare_generators,
        "worker",
        "vLLM samples after a part of a prompt, and then sets the request's generator "
        "back, which a CPU's cannot be: the engine dies of a seeded request",
        f"{_ALL}, on CPUs",
    ),
    Patch(
        keep_masks_apart,
        "worker",
        "a request beside one with allowed_token_ids samples from those, too, once "
        "rows of their batch have moved",
        "0.26 to 0.30, model runner V1",
    ),
    Patch(
        expand_settings_rightly,
        "sampler",
        "the sampler for drafts divides logits by uninitialised memory, since its "
        "kernel writes temperatures into a copy",
        "up to 0.32, on CPUs",
    ),
    Patch(
        verify_by_sampling,
        "sampler",
        "vLLM makes its own sampler for drafts, with which a draft changes what a "
        "seeded request samples; there is no setting for another",
        f"{_ALL}, model runner V1",
    ),
    Patch(
        draft_near_the_end,
        "drafting",
        "one request near the model's length has all others draft token 0",
        f"{_ALL}, model runner V1",
    ),
    Patch(
        time_steps,
        "drafting",
        "nobody tells the drafter what a step takes",
        f"{_ALL}, model runner V1",
    ),
    Patch(
        send_drafts_along,
        "drafting",
        "vLLM asks a worker for its drafts by a call of its own after every step, "
        "several percent of a short one",
        f"{_ALL}, on CPUs",
    ),
    Patch(
        take_undrafted_steps_as_plain,
        "drafting",
        "steps without drafts are prepared as if there were some, which takes longer",
        "from 0.32 on; needless and harmless before",
    ),
    Patch(
        draft_nothing,
        "refusal",
        "vLLM has no call that stops an engine's drafts",
        f"{_ALL}, model runner V1",
    ),
    Patch(
        notice_losses,  # the first, so that it looks when all others are done
        "reload",
        "what a layer does not take of new weights is lost without an error",
        _ALL,
    ),
    Patch(
        pack_tied_heads,
        "reload",
        "a tied output layer computes with the weights before the last update",
        f"{_ALL}, on CPUs",
    ),
    Patch(
        pack_experts,
        "reload",
        "experts compute with new weights in the wrong order",
        f"{_ALL}, on CPUs",
    ),
    Patch(
        load_sinks,
        "reload",
        "attention computes with the sinks before the last update",
        "0.32",
    ),
)
