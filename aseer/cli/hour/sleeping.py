"""Step 5: engines that sleep give a trainer their memory, and wake as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aseer.cli.findings import Finding, fail, ok, warn
from aseer.cli.hour.machine import output_of
from aseer.cli.hour.rolling import ROUNDING, difference, greedy_groups, sample
from aseer.cli.hour.steps import REPORT_IT
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from aseer.cli.hour.site import Site

_QUERY = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
_KV_BYTES = 4 << 30  # much beside the rest of a tiny engine, so that it is seen to go


@dataclass(frozen=True, slots=True, kw_only=True)
class Slept:
    """An engine before and after each kind of sleep.

    Attributes:
        after_level_1, after_tags, after_level_2: how responses differ then from those
            before; "" = not. By tags weights wake, are updated, and KV wakes.
        used_mib: memory of all GPUs that is used awake; asleep_mib: at level 1;
            weights_mib: with weights awake and no KV. None = not known.
    """

    after_level_1: str
    after_tags: str
    after_level_2: str
    used_mib: int | None
    asleep_mib: int | None
    weights_mib: int | None


async def slept(site: Site) -> Slept:
    """Put an engine to sleep in every way, and wake it."""
    args = {"enable_sleep_mode": True}
    config = site.tiny_config("sleep", engine_args=args, kv_cache_bytes=_KV_BYTES)
    groups = greedy_groups()
    async with Engine(config) as engine:
        before = await sample(engine, groups)

        async def differ() -> str:
            found = await sample(engine, groups)
            return difference(before.responses, found.responses, ROUNDING)

        used = _used_mib()
        await engine.sleep()
        asleep = _used_mib()
        await engine.wake()
        after_level_1 = await differ()
        await engine.sleep()
        await engine.wake(["weights"])
        with_weights = _used_mib()
        await engine.update_weights(site.tiny())
        await engine.wake(["kv_cache"])
        after_tags = await differ()
        await engine.sleep(2)
        await engine.wake()
        await engine.update_weights(site.tiny())
        after_level_2 = await differ()
    return Slept(
        after_level_1=after_level_1,
        after_tags=after_tags,
        after_level_2=after_level_2,
        used_mib=used,
        asleep_mib=asleep,
        weights_mib=with_weights,
    )


def judge_slept(found: Slept) -> Finding:
    """An engine that slept says what it said, and had let its memory go."""
    ways = {
        "level 1": found.after_level_1,
        "waking by tags": found.after_tags,
        "level 2": found.after_level_2,
    }
    for way, differs in ways.items():
        if differs:
            return fail(f"after sleep, {way}: {differs}", REPORT_IT)
    if found.used_mib is None or found.asleep_mib is None:
        return ok("as before after each kind of sleep; nvidia-smi tells no memory")
    freed = found.used_mib - found.asleep_mib
    detail = f"as before after each kind of sleep; {freed} MiB were free meanwhile"
    if freed < _KV_BYTES >> 21:
        return warn(detail, "less than half of the KV cache: " + REPORT_IT)
    return ok(detail)


def _used_mib() -> int | None:
    """Memory in use on all GPUs."""
    return used_mib(output_of(*_QUERY))


def used_mib(listed: str) -> int | None:
    """The sum of a number a line; None if there is none."""
    numbers = [int(line) for line in listed.split() if line.isdecimal()]
    return sum(numbers) if numbers else None
