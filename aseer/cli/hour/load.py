"""Step 3: a model of real size on every GPU, and the death of one of its engines."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.cli.findings import Finding, fail, ok, warn
from aseer.cli.hour.rolling import num_tokens, sample
from aseer.cli.hour.steps import REPORT_IT
from aseer.data import load_prompts
from aseer.groups import Group
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aseer.cli.hour.site import Site

DEFAULT = "default limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A rollout with the real model.

    Attributes:
        rows: the most requests that an engine runs at once.
        kv_tokens: that an engine's KV holds.
        start_s: until all engines were up.
        num_wanted: tokens that were asked for. num_short: responses with fewer.
        controller_cpu: processor time of this process over the rollout's wall time.
        idle_fraction: of the engines' time.
        killed: whether one of the engines was.
    """

    what: str
    num_engines: int
    rows: int
    kv_tokens: int
    start_s: float
    num_responses: int
    num_wanted: int
    num_short: int
    wall_s: float
    tail_s: float
    tokens_per_s: float
    num_preemptions: int
    num_migrations: int
    num_recomputed_tokens: int
    num_retries: int
    idle_fraction: float
    controller_cpu: float
    killed: bool


async def loads(site: Site) -> list[Load]:
    """By the default limits; by those of large batches; and there with one killed."""
    sizes = site.sizes
    limits = {
        "max_num_seqs": sizes.rows,
        "engine_args": {"max_num_batched_tokens": sizes.step_tokens},
    }
    named = f"{sizes.rows:,} rows and {sizes.step_tokens:,} tokens a step"
    return [
        *await _loads(site, DEFAULT, {}, with_death=False),
        *await _loads(site, named, limits, with_death=site.sizes.num_engines > 1),
    ]


async def _loads(
    site: Site, what: str, limits: Mapping[str, Any], *, with_death: bool
) -> list[Load]:
    logs = "load-limits" if limits else "load-default"
    config = site.real_config(logs, **limits)
    started = time.monotonic()
    async with Engine(config) as engine:
        start_s = time.monotonic() - started
        groups = real_groups(site.sizes.groups, site)
        found = [await _load(engine, what, groups, start_s)]
        if with_death:
            few = real_groups(max(2, site.sizes.groups // 4), site)
            victim = engine.instances[0].pid
            death = await _load(
                engine,
                "an engine killed",
                few,
                start_s,
                kill=lambda: os.kill(victim, signal.SIGKILL),
            )
            found.append(death)
    return found


def real_groups(
    num: int, site: Site, *, n: int = 0, max_tokens: int = 0, prefix: str = ""
) -> list[Group]:
    """Groups with the questions that come with aseer, as plain text, in turn.

    Args:
        n, max_tokens: 0 = as many as `Sizes` says.
        prefix: before each, so that it is not the question of another rollout.
    """
    sizes = site.sizes
    sampling = {
        "temperature": 1.0,
        "max_tokens": max_tokens or sizes.max_tokens,
        "ignore_eos": True,
    }
    texts = [
        "\n".join(message["content"] for message in record.messages or ())
        for record in load_prompts()
    ]
    return [
        Group(
            prefix + texts[i % len(texts)],
            n=n or sizes.siblings,
            group_id=f"r{i}",
            sampling=sampling,
        )
        for i in range(num)
    ]


async def _load(
    engine: Engine,
    what: str,
    groups: Sequence[Group],
    start_s: float,
    kill: Callable[[], object] | None = None,
) -> Load:
    info = engine.instances[-1]
    num_engines = len(engine.instances)
    before = time.process_time()
    responses, report = await sample(engine, groups, midway=kill)
    cpu_s = time.process_time() - before
    num_wanted = num_tokens(groups)
    num_each = num_wanted // sum(group.n for group in groups)
    return Load(
        what=what,
        num_engines=num_engines,
        rows=info.max_num_seqs,
        kv_tokens=report.instances[-1].kv_tokens,
        start_s=round(start_s, 1),
        num_responses=len(responses),
        num_wanted=num_wanted,
        num_short=sum(len(r.token_ids) != num_each for r in responses.values()),
        wall_s=round(report.wall_s, 2),
        tail_s=round(report.tail_s, 2),
        tokens_per_s=round(report.throughput_tok_s, 1),
        num_preemptions=report.num_preemptions,
        num_migrations=report.num_migrations,
        num_recomputed_tokens=report.num_recomputed_tokens,
        num_retries=report.num_retries,
        idle_fraction=round(report.idle_fraction, 3),
        controller_cpu=round(cpu_s / max(report.wall_s, 1e-9), 3),
        killed=kill is not None,
    )


def judge_loads(found: Sequence[Load]) -> Finding:
    """All tokens came. A preemption costs time only, and should not be: a warning."""
    for each in found:
        if each.num_short:
            return fail(
                f"{each.what}: {each.num_short} of {each.num_responses} responses are "
                "shorter than they should be",
                REPORT_IT,
            )
        if each.killed and not each.num_retries:
            return fail(
                f"{each.what}: it had no request, so that nothing was shown", REPORT_IT
            )
    detail = "; ".join(_told(each) for each in found)
    if num := sum(each.num_preemptions for each in found if not each.killed):
        return warn(f"{num} preemptions, where none should be; {detail}", REPORT_IT)
    return ok(detail)


def _told(each: Load) -> str:
    if each.killed:
        return (
            f"{each.what}: all {each.num_responses} responses came, {each.num_retries} "
            "chunks were lost and made again"
        )
    return (
        f"{each.what} ({each.rows} rows an engine): {each.tokens_per_s:,.0f} tokens/s "
        f"on {each.num_engines} engines, {each.num_preemptions} preemptions, "
        f"controller {each.controller_cpu:.0%} of a core"
    )
