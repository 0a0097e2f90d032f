"""Step 4: new weights, from wherever a trainer has them, to engines of any size."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aseer.cli.findings import Finding, fail, ok
from aseer.cli.hour.rolling import (
    RANKS_ROUNDING,
    ROUNDING,
    difference,
    greedy_groups,
    num_equal,
    sample,
)
from aseer.cli.hour.steps import REPORT_IT
from aseer.errors import ConfigError
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.cli.hour.rolling import Sampled
    from aseer.cli.hour.site import Site
    from aseer.report import WeightUpdateReport

Transfer = Literal["host", "ipc", "nccl"]
_GB = 1e9
# Of the real model's KV, so that a trainer's copy of its weights fits beside an engine.
_KV_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """Two updates of the tiny model: to other weights, and back.

    Attributes:
        ranks: workers of the engine.
        source: the device that had the tensors.
        num_unchanged: responses that the other weights left as they were.
        back: how responses of the first weights differ from those before; "" = not.
        ranks_differ: how responses differ from those of one worker; "" = not.
        send_s, prepare_s, switch_s: of the update to other weights.
    """

    ranks: int
    transfer: str
    source: str
    num_responses: int
    num_unchanged: int
    back: str
    ranks_differ: str
    send_s: float
    prepare_s: float
    switch_s: float


async def updates(site: Site) -> list[Updated]:
    """Through the host's memory, to engines of one worker, two, and all."""
    found: list[Updated] = []
    first: tuple[Sampled, Sampled] | None = None
    for ranks in site.sizes.ranks:
        seen, each = await _update(site, ranks, "host", first)
        first = first or seen
        found.append(each)
        _let_go(site)
    return found


async def direct_updates(site: Site) -> list[Updated]:
    """Straight from a trainer's GPU: the engine's own, and if there is one another."""
    ways: tuple[Transfer, ...] = ("ipc", "nccl") if site.num_gpus > 1 else ("ipc",)
    found = [(await _update(site, 1, way, None))[1] for way in ways]
    _let_go(site)
    return found


async def _update(
    site: Site, ranks: int, transfer: Transfer, first: tuple[Sampled, Sampled] | None
) -> tuple[tuple[Sampled, Sampled], Updated]:
    """Update to other weights and back.

    Args:
        first: rollouts of one worker with either weights; None = this is that one.
    """
    args: dict[str, Any] = {}
    if transfer != "host":
        args["weight_transfer_config"] = {"backend": transfer}
    # By "nccl" the trainer is on the first GPU and the engine on the second.
    place = {"gpus": [site.gpus[1]]} if transfer == "nccl" else {}
    old, new = (site.tiny(seed, wide=True) for seed in (0, 1))
    config = site.tiny_config(
        f"weights-{transfer}-{ranks}",
        model=str(old),
        gpus_per_instance=ranks,
        engine_args=args,
        **place,
    )
    device, groups = _device(site), greedy_groups()
    async with Engine(config) as engine:
        before = await sample(engine, groups)
        report = await engine.update_weights(tensors(new, device), transfer=transfer)
        other = await sample(engine, groups)
        await engine.update_weights(tensors(old, device), transfer=transfer)
        back = await sample(engine, groups)
    differ = ""
    if first is not None:
        pairs = zip(first, (before, other), strict=True)
        found = (difference(a.responses, b.responses, RANKS_ROUNDING) for a, b in pairs)
        differ = next(filter(None, found), "")
    return (before, other), Updated(
        ranks=ranks,
        transfer=transfer,
        source=device,
        num_responses=len(before.responses),
        num_unchanged=num_equal(before.responses, other.responses),
        back=difference(before.responses, back.responses, ROUNDING),
        ranks_differ=differ,
        **_seconds(report),
    )


def judge_updates(found: Sequence[Updated], wanted: Sequence[int] = ()) -> Finding:
    """Other weights say other things, and the old ones what they said.

    Args:
        wanted: numbers of workers that a larger machine would be tried with.
    """
    for each in found:
        what = f"{each.ranks} workers, weights by {each.transfer!r}"
        if each.num_unchanged == each.num_responses:
            return fail(f"{what}: new weights change nothing", REPORT_IT)
        if each.back:
            return fail(f"{what}: back at the first weights, {each.back}", REPORT_IT)
        if each.ranks_differ:
            return fail(f"{what}: unlike one worker, {each.ranks_differ}", REPORT_IT)
    tried = ", ".join(
        f"{each.ranks} ({each.transfer}, {each.switch_s:.1f} s)" for each in found
    )
    missing = [str(n) for n in wanted if n not in {each.ranks for each in found}]
    left_out = f"; too few GPUs for {' and '.join(missing)}" if missing else ""
    return ok(
        f"from {found[0].source} to engines of so many workers: {tried}{left_out}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedUpdate:
    """An update of the real model's weights.

    Attributes:
        load_s: to read the checkpoint to the trainer's device, which is no part of it.
    """

    num_engines: int
    source: str
    gb: float
    load_s: float
    send_s: float
    prepare_s: float
    switch_s: float


async def sized_update(site: Site) -> SizedUpdate:
    """Give every engine the real model's own weights, from a trainer's tensors."""
    found = await _sized_update(site)
    _let_go(site)
    return found


async def _sized_update(site: Site) -> SizedUpdate:
    device = _device(site)
    room = {"kv_cache_bytes": _KV_BYTES} if site.on_gpu else {}
    config = site.real_config("weights-size", kv_pool="off", **room)
    async with Engine(config) as engine:
        started = time.monotonic()
        source = tensors(_checkpoint(site.real()), device)
        load_s = time.monotonic() - started
        report = await engine.update_weights(source, transfer="host")
        num_engines = len(engine.instances)
    return SizedUpdate(
        num_engines=num_engines,
        source=device,
        gb=round(report.num_bytes / _GB, 3),
        load_s=round(load_s, 1),
        **_seconds(report),
    )


def judge_sized(found: SizedUpdate) -> Finding:
    """Recorded; what is right of it the tiny model has shown."""
    seconds = found.send_s + found.prepare_s + found.switch_s
    return ok(
        f"{found.gb:.1f} GB from {found.source} to {found.num_engines} engines in "
        f"{seconds:.1f} s: {found.send_s:.1f} s sending, {found.prepare_s:.1f} "
        f"preparing, {found.switch_s:.1f} switching"
    )


def tensors(folder: Path, device: str) -> dict[str, Any]:
    """A checkpoint's tensors by name, on a device.

    Raises:
        ConfigError: it has none in safetensors.
    """
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path, device=device)
    if not found:
        raise ConfigError(
            f"{folder} has no *.safetensors; give a model that has them by --model"
        )
    return found


def _checkpoint(model: str) -> Path:
    """Where a model's files are that engines have loaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _device(site: Site) -> str:
    """Where a trainer would have its weights."""
    return "cuda:0" if site.on_gpu else "cpu"


def _let_go(site: Site) -> None:
    """Give back a GPU's memory that tensors had, for the engines to come."""
    if site.on_gpu:
        import torch

        torch.cuda.empty_cache()


def _seconds(report: WeightUpdateReport) -> dict[str, float]:
    return {
        "send_s": round(report.send_s, 2),
        "prepare_s": round(report.prepare_s, 2),
        "switch_s": round(report.switch_s, 2),
    }
