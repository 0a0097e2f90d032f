"""`aseer doctor --gpu`: what to see on a new machine before a long run is given to it.

Steps in the order in which one rests on the other; the first that fails ends it, since
what comes after would only fail for the same reason. Each is timed. All run with a tiny
model in float32, in which equal means equal; on a CPU what needs a GPU is skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.cli.checks import all_checks, check_engine
from aseer.cli.findings import Finding, fail, ok
from aseer.config import EngineConfig
from aseer.errors import AseerError
from aseer.groups import Group
from aseer.models.tiny import make_tiny
from aseer.runtime.engine import Engine
from aseer.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from aseer.types import Response

_NUM_TOKENS = 160  # over a chunk of the pool's, so that what moves is found there
_CHUNK = 32
_REPORT = "report this, with first-hour.json"
_ROUNDING = 2e-5  # of logprobs, between kernels for one row and for several


class Step(NamedTuple):
    """A thing to see, and how."""

    name: str
    run: Callable[[], Finding]


class Outcome(NamedTuple):
    """What a step found."""

    name: str
    finding: Finding


def all_steps(scratch: Path) -> list[Step]:
    """The steps in order; `scratch` is for a tiny model's files."""
    tiny = scratch / "tiny"
    return [
        Step("machine", lambda: _machine(scratch)),
        Step("one engine", lambda: check_engine(make_tiny(tiny))),
        Step("two engines", lambda: _tried(_two_engines(tiny))),
        Step("drafts and weights", lambda: _tried(_drafts_and_weights(tiny))),
        Step("sleep", lambda: _tried(_sleep(tiny))),
    ]


def run_steps(steps: Sequence[Step], tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Run steps up to the first that fails; the rest are skipped."""
    outcomes: list[Outcome] = []
    failed = ""
    for step in steps:
        started = time.monotonic()
        if failed:
            finding = Finding(status="skip", detail=f"after {failed} failed")
        else:
            finding = step.run().after(time.monotonic() - started)
        failed = failed or (step.name if finding.status == "fail" else "")
        outcomes.append(Outcome(step.name, finding))
        tell(outcomes[-1])
    return outcomes


def write_report(outcomes: Sequence[Outcome], folder: Path) -> tuple[Path, Path]:
    """Write what was found, for programs and for readers."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "first-hour.json", folder / "first-hour.md"
    steps = [{"name": o.name, **asdict(o.finding)} for o in outcomes]
    is_ok = all(o.finding.status != "fail" for o in outcomes)
    data.write_text(json.dumps({"ok": is_ok, "steps": steps}, indent=1) + "\n")
    lines = ["# First hour", "", "| step | | s | found |", "|---|---|---|---|"]
    for name, finding in outcomes:
        text = " ".join(filter(None, (finding.detail, finding.advice)))
        text = " ".join(text.split()).replace("|", "\\|")
        lines.append(f"| {name} | {finding.status} | {finding.seconds:.1f} | {text} |")
    page.write_text("\n".join(lines) + "\n")
    return data, page


def _machine(scratch: Path) -> Finding:
    checks = all_checks(scratch, with_engine=False)
    found = {check.name: check.run() for check in checks}
    bad = {name: f for name, f in found.items() if f.status == "fail"}
    for name, finding in bad.items():
        return fail(f"{name}: {finding.detail}", finding.advice)
    gpus = found["gpus"].detail
    return ok(f"GPUs: {gpus}; KV pool: {found['kv pool'].detail}")


def _tried(trial: Any) -> Finding:
    try:
        finding: Finding = asyncio.run(trial)
    except AseerError as error:
        return fail(str(error), "the engine's log, quoted above, says why")
    return finding


def _config(model: Path, num_instances: int, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        num_instances=num_instances,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        chunk_size=_CHUNK,
        kv_cache_bytes=64 << 20,
        **settings,
    )


def _groups() -> list[Group]:
    sampling = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    return [
        Group(list(range(3, 3 + length)), n=2, group_id=f"g{length}", sampling=sampling)
        for length in (7, 33, 90)
    ]


async def _sample(
    engine: Engine, *, kill: int | None = None, **settings: Any
) -> dict[str, Response]:
    """All responses by request; an instance's process is killed after the first one."""
    found: dict[str, Response] = {}
    async for response in engine.rollout(_groups(), **settings):
        found[response.request_id] = response
        if kill is not None:
            os.kill(kill, signal.SIGKILL)
            kill = None
    return found


def _difference(a: dict[str, Response], b: dict[str, Response]) -> str | None:
    """How two rollouts of the same groups differ; None if they do not."""
    if a.keys() != b.keys():
        return f"{len(a)} and {len(b)} responses"
    for request_id, one in a.items():
        other = b[request_id]
        if list(one.token_ids) != list(other.token_ids):
            return f"the tokens of {request_id}"
        pairs = zip(one.logprobs, other.logprobs, strict=True)
        off = max((abs(x - y) for x, y in pairs), default=0.0)
        if off > _ROUNDING:
            return f"the logprobs of {request_id}, by {off:.1e}"
    return None


async def _two_engines(model: Path) -> Finding:
    """Undivided, in chunks that move, and with an engine killed: all are the same."""
    async with Engine(_config(model, 2)) as engine:
        whole = await _sample(engine, chunk_size=0, policy="group-round-robin")
        chunks = await _sample(engine, policy="fcfs")
        if difference := _difference(whole, chunks):
            return fail(
                f"chunks differ from undivided responses: {difference}", _REPORT
            )
        killed = await _sample(engine, kill=engine.instances[0].pid)
        if difference := _difference(whole, killed):
            return fail(f"after an engine's death: {difference}", _REPORT)
        device = engine.instances[-1].device
    return ok(f"chunks, moves and an engine's death change nothing on {device}")


async def _drafts_and_weights(model: Path) -> Finding:
    """Drafts change no token; new weights do, and the old ones give the old ones."""
    async with Engine(_config(model, 1)) as engine:
        plain = await _sample(engine)
    async with Engine(_config(model, 1, speculation="dgds")) as engine:
        drafted = await _sample(engine)
        if difference := _difference(plain, drafted):
            return fail(f"with drafts: {difference}", "set speculation='off'")
        report = await engine.update_weights(model)
        again = await _sample(engine)
        if difference := _difference(plain, again):
            return fail(f"after an update to the same weights: {difference}", _REPORT)
    return ok(f"drafts change nothing; an update took {report.switch_s:.1f} s")


async def _sleep(model: Path) -> Finding:
    """An engine that slept says what it said before."""
    sleeps = {"enable_sleep_mode": True}
    async with Engine(_config(model, 1)) as engine:
        if engine.instances[0].device == "cpu":
            return Finding(status="skip", detail="vLLM cannot sleep on a CPU")
    async with Engine(_config(model, 1, engine_args=sleeps)) as engine:
        before = await _sample(engine)
        await engine.sleep()
        await engine.wake()
        if difference := _difference(before, await _sample(engine)):
            return fail(f"after sleep and wake: {difference}", _REPORT)
    return ok("an engine that slept goes on as before")
