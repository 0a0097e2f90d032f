"""Steps 1 and 2: chunks, moves and an engine's death change no token, in float32.

What differs is also tried with asynchronous scheduling off, which vLLM has on GPUs
only: so a difference has a cause by name. In bfloat16 responses differ with the batch
that they are computed in, unless vLLM computes batch-invariantly: that is recorded.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.cli.findings import Finding, fail, ok
from aseer.cli.hour.rolling import (
    Compared,
    compare,
    greedy_groups,
    judge_equal,
    moving,
    num_equal,
    sample,
)
from aseer.cli.hour.steps import REPORT_IT
from aseer.errors import AseerError
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.cli.hour.site import Site
    from aseer.types import Response

_SYNC = {"async_scheduling": False}
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
UNDIVIDED: Mapping[str, Any] = {"chunk_size": 0, "policy": "group-round-robin"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """What engines of one kind gave.

    Attributes:
        compared: with undivided responses of the same engines.
        start_s: until all were up.
    """

    scheduling: str
    device: str
    start_s: float
    compared: list[Compared]


async def exactness(site: Site, num_engines: int) -> list[Exactness]:
    """Compare on so many engines, as vLLM schedules and in step with the device.

    Of one engine the latter is only asked where there is a difference to explain.
    """
    found = [await exactness_of(site, num_engines, "default", {})]
    if num_engines > 1 or judge_equal(found[0].compared):
        found.append(await exactness_of(site, num_engines, "async off", _SYNC))
    return found


async def exactness_of(
    site: Site, num_engines: int, scheduling: str, args: Mapping[str, Any]
) -> Exactness:
    """Compare on engines of one kind, with these of vLLM's arguments."""
    what = f"exact-{num_engines}-{scheduling.replace(' ', '-')}"
    config = site.tiny_config(what, num_instances=num_engines, engine_args=args)
    groups = greedy_groups()
    started = time.monotonic()
    async with Engine(config) as engine:
        start_s = time.monotonic() - started
        device = engine.instances[0].device
        whole = await sample(engine, groups, **UNDIVIDED)
        found = [compare("chunks", whole, await sample(engine, groups))]
        if num_engines > 1:
            # Weights of another version: none of the KV so far is found again.
            await engine.update_weights(site.tiny())
            with moving():
                moved = await sample(engine, groups)
            found.append(compare("chunks that move", whole, moved))
            victim = engine.instances[0].pid
            killed = await sample(
                engine, groups, midway=lambda: os.kill(victim, signal.SIGKILL)
            )
            found.append(compare("an engine killed", whole, killed))
    return Exactness(
        scheduling=scheduling,
        device=device,
        start_s=round(start_s, 1),
        compared=found,
    )


def judge_exactness(found: Sequence[Exactness]) -> Finding:
    """Equal in all, or which kind of scheduling it is that differs."""
    default, *in_step = found
    wrong = judge_equal(default.compared)
    wrong_in_step = judge_equal([c for each in in_step for c in each.compared])
    if wrong is not None and in_step and wrong_in_step is None:
        return fail(
            f"{wrong.detail}; with async scheduling off all are equal",
            f"set engine_args={_SYNC!r}, and {REPORT_IT}",
        )
    if wrong is not None and in_step:
        why = "with async scheduling off, too, so that it is not the cause"
        return fail(f"{wrong.detail}; {why}", wrong.advice)
    if wrong is not None:
        return wrong
    if wrong_in_step is not None:
        what = f"with async scheduling off: {wrong_in_step.detail}"
        return fail(what, wrong_in_step.advice)
    for each in default.compared:
        if missing := _not_tried(each):
            return fail(f"{each.what}: {missing}, so that nothing was shown", REPORT_IT)
    names = ", ".join(each.what for each in default.compared)
    return ok(
        f"equal on {default.device}: {names}; engines were up in {default.start_s:.0f} "
        f"s{'; async scheduling off: equal as well' if in_step else ''}"
    )


def _not_tried(compared: Compared) -> str:
    """What a comparison should have had and had not; "" = nothing."""
    if compared.num_chunks <= compared.num_responses:
        return "nothing was divided"
    if compared.what == "chunks that move" and not compared.num_migrations:
        return "no request moved"
    if compared.what == "an engine killed" and not compared.num_retries:
        return "the engine that died had no request"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How many responses are the same whatever batch they were computed in.

    Attributes:
        num_in_chunks: equal in chunks. num_alone: equal one group after the other.
        error: why the engine did not run; "" = it did.
    """

    what: str
    num_responses: int = 0
    num_in_chunks: int = 0
    num_alone: int = 0
    error: str = ""


async def bfloat16(site: Site) -> list[Agreement]:
    """As vLLM computes by default, and batch-invariantly."""
    found = [await _agreement(site, "by default", {})]
    if site.on_gpu:
        found.append(await _agreement(site, "batch-invariant", INVARIANT))
    else:
        why = "vLLM's batch-invariant kernels are Triton's, for GPUs"
        found.append(Agreement(what="batch-invariant", error=why))
    return found


async def _agreement(site: Site, what: str, env: Mapping[str, str]) -> Agreement:
    logs = f"bf16-{what.replace(' ', '-')}"
    config = site.tiny_config(logs, dtype="bfloat16", env=env)
    groups = greedy_groups()
    try:
        async with Engine(config) as engine:
            whole = (await sample(engine, groups, **UNDIVIDED)).responses
            chunks = (await sample(engine, groups)).responses
            alone: dict[str, Response] = {}
            for group in groups:
                alone |= (await sample(engine, [group], **UNDIVIDED)).responses
    except AseerError as error:
        return Agreement(what=what, error=str(error).partition("\n")[0])
    return Agreement(
        what=what,
        num_responses=len(whole),
        num_in_chunks=num_equal(whole, chunks),
        num_alone=num_equal(whole, alone),
    )


def judge_bfloat16(found: Sequence[Agreement]) -> Finding:
    """Never a failure: bfloat16 promises nothing, and this says how much it keeps."""
    return ok("; ".join(_agreed(each) for each in found))


def _agreed(found: Agreement) -> str:
    if found.error:
        return f"{found.what}: did not run ({found.error})"
    return (
        f"{found.what}: of {found.num_responses} responses {found.num_in_chunks} are "
        f"the same in chunks, {found.num_alone} in another batch"
    )
