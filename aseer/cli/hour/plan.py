"""The steps in their order, and which of them this machine can see."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aseer
from aseer.cli.checks import check_kv_pool
from aseer.cli.hour import (
    drafts,
    exact,
    load,
    machine,
    pool,
    sleeping,
    training,
    weights,
)
from aseer.cli.hour.site import DEFAULT_MODEL, Site, sizes_for, too_few_gpus
from aseer.cli.hour.steps import Seen, Step, step
from aseer.node.machine import this_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
_T = TypeVar("_T")
# What a machine of eight GPUs is tried with, so that a smaller one says what it lacks.
_FULL = sizes_for(8)
_NO_SLEEP = "vLLM cannot sleep on a CPU"
_NO_TRANSFER = "weights go straight between GPUs, and there is none"


def site_here(scratch: Path, folder: Path, model: str | None) -> Site:
    """What the list runs on here.

    Args:
        scratch: for models, removed in the end.
        folder: of the report.
        model: the real one, as the user named it; None = the default on GPUs, and on a
            CPU a tiny one.
    """
    here = this_machine()
    gpus = () if here.cpu_only else here.gpus
    checkout = Path(aseer.__file__).resolve().parents[1]
    return Site(
        scratch=scratch,
        logs=folder / "logs",
        gpus=gpus,
        model=model or (DEFAULT_MODEL if gpus else None),
        checkout=checkout if (checkout / "pyproject.toml").is_file() else None,
    )


def all_steps(site: Site) -> list[Step]:
    """The steps in order."""
    two = too_few_gpus(site, 2)
    no_gpu = not site.on_gpu
    model = site.model or "a tiny model"
    wanted = _FULL.ranks if site.on_gpu else ()
    replay, train = training.replay_options(site), training.train_options(site)
    return [
        step(
            "machine",
            "GPUs, shared memory, packages, and what `aseer doctor` checks",
            lambda: machine.machine_facts(site),
            machine.judge_machine,
        ),
        step(
            "one-engine",
            "in float32, chunks equal undivided responses",
            _ran(lambda: exact.exactness(site, 1)),
            exact.judge_exactness,
        ),
        step(
            "two-engines",
            "the same with requests that move, with an engine killed, and with async "
            "scheduling off",
            _ran(lambda: exact.exactness(site, 2)),
            exact.judge_exactness,
            skip=two,
        ),
        step(
            "bf16",
            "how much of that bfloat16 keeps, with and without VLLM_BATCH_INVARIANT=1",
            _ran(lambda: exact.bfloat16(site)),
            exact.judge_bfloat16,
        ),
        step(
            "load",
            f"{model} on every GPU: limits, preemptions, the controller's share of a "
            "core, an engine killed",
            _ran(lambda: load.loads(site)),
            load.judge_loads,
        ),
        step(
            "weights",
            "new weights and the old ones again, to engines of 1, 2 and all workers",
            _ran(lambda: weights.updates(site)),
            partial(weights.judge_updates, wanted=wanted),
        ),
        step(
            "weights-direct",
            "the same straight from a trainer's GPU (ipc, nccl)",
            _ran(lambda: weights.direct_updates(site)),
            weights.judge_updates,
            skip=_NO_TRANSFER if no_gpu else "",
        ),
        step(
            "weights-size",
            f"how long new weights of {model} take",
            _ran(lambda: weights.sized_update(site)),
            weights.judge_sized,
        ),
        step(
            "sleep",
            "engines sleep and wake, whole and by tags",
            _ran(lambda: sleeping.slept(site)),
            sleeping.judge_slept,
            skip=_NO_SLEEP if no_gpu else "",
        ),
        Step(
            name="pool",
            about="tokens computed at a move over the KV pool; its server killed, and "
            "stopped",
            see=lambda: _see_pool(site),
            skip=two,
        ),
        step(
            "drafts",
            "grouped drafts change nothing, on each of vLLM's model runners",
            _ran(lambda: drafts.drafted(site)),
            drafts.judge_drafted,
        ),
        step(
            "drafts-ranks",
            "nor do they on an engine of two workers",
            _ran(lambda: drafts.drafted_by_ranks(site)),
            drafts.judge_drafted,
            skip=two,
        ),
        step(
            "drafts-speed",
            f"tokens/s of {model} with drafts and without, by requests at once",
            _ran(lambda: drafts.speeds(site)),
            drafts.judge_speeds,
        ),
        step(
            "ngram",
            "vLLM's drafts from a request's own text change nothing",
            _ran(lambda: drafts.ngrams(site)),
            drafts.judge_drafted,
        ),
        step(
            "replay",
            "a recorded rollout, replayed by every way of scheduling",
            lambda: training.replayed(site),
            training.judge_replayed,
            skip=training.obstacle(site, training.BENCH, replay),
        ),
        step(
            "grpo",
            "a step of GRPO, whose trainer and engines agree",
            lambda: training.trained(site),
            training.judge_trained,
            skip=two or training.obstacle(site, training.TRAIN, train, "matplotlib"),
        ),
    ]


def _see_pool(site: Site) -> Seen:
    """As any step, where there can be a pool."""
    checked = check_kv_pool()
    if checked.status != "ok":
        return Seen(replace(checked, status="skip"))
    found = asyncio.run(pool.pooled(site))
    return Seen(pool.judge_pooled(found), found)


def _ran(measure: Callable[[], Coroutine[Any, Any, _T]]) -> Callable[[], _T]:
    return lambda: asyncio.run(measure())
