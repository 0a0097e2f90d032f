"""The arms of `bench_rollout_vllm.py` on simulated engines of the measured pace."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import aseer
from aseer.errors import ConfigError
from aseer.sim.cluster import Cluster, simulate
from aseer.sim.fit import LinearSteps, fit_steps
from aseer.sim.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from replaying import Arm, Run

    from aseer.data.trace import Trace
    from aseer.report import RolloutReport, TimelineSample

_INSTANCES_A_RUN = 1000


def fit_clusters(
    arms: Sequence[Arm],
    runs: Sequence[Run],
    *,
    max_num_seqs: int,
    prefill_token_s: float,
) -> dict[bool, Cluster]:
    """Engines with a KV pool (True) and without, at the pace of their runs.

    Of the runs without drafts, all together; none for engines that had no such run.

    Args:
        prefill_token_s: as `measure_prefill` has it; a timeline does not tell.
    """
    clusters = {}
    for pool in (False, True):
        names = {a.name for a in arms if a.pool is pool and is_simulated(a)}
        reports = [run.report for run in runs if run.arm in names]
        if not reports:
            continue
        try:
            cluster = _fit(reports, max_num_seqs, prefill_token_s)
        except ConfigError as error:
            print(f"nothing is simulated of {sorted(names)}: {error}")
            continue
        print(f"simulates {sorted(names)} with steps of {cluster.step_time}")
        clusters[pool] = cluster
    return clusters


def is_simulated(arm: Arm) -> bool:
    """Not with drafts, whose acceptance is the paper's there, nor if it ends early."""
    return arm.drafting == "off" and arm.wanted == 1


def _fit(
    reports: Sequence[RolloutReport], max_num_seqs: int, prefill_token_s: float
) -> Cluster:
    instances = reports[0].instances
    capacity = instances[0].kv_tokens
    timeline = [
        replace(sample, instance_id=number * _INSTANCES_A_RUN + sample.instance_id)
        for number, report in enumerate(reports)
        for sample in report.timeline
    ]
    fitted = fit_steps(timeline, dict.fromkeys(_ids(timeline), capacity))
    pools = [report.kv for report in reports if report.kv is not None]
    load_s = sum(kv.num_loads * kv.load_p50_s for kv in pools)  # about
    num_loaded = sum(kv.num_loaded_tokens for kv in pools)
    loads_at = num_loaded / load_s if load_s else math.inf
    return Cluster(
        num_instances=len(instances),
        step_time=replace(fitted, prefill_token_s=prefill_token_s),
        num_kv_tokens=capacity,
        block_size=instances[0].block_size,
        max_num_seqs=max_num_seqs,
        kv_bytes_per_token=1,
        load_bytes_per_s=loads_at if pools else None,
        shares_prompts=True,
    )


def simulated_wall(
    arm: Arm, repetition: int, cluster: Cluster, recorded: Trace, chunk_size: int
) -> float:
    """Seconds that an arm's rollout takes when it is simulated."""
    workload = _workload(recorded, arm, repetition)
    report = simulate(
        workload,
        cluster,
        policy=arm.policy,
        known_lengths=workload.lengths if arm.knows_lengths else None,
        chunk_size=chunk_size,
    )
    return report.wall_s


def least_wall(report: RolloutReport, cluster: Cluster, recorded: Trace) -> float:
    """Seconds that an ideal order and placement of the requests would take, about.

    With the tokens a step and the drafts that a rollout had in the mean, if all engines
    are evenly loaded to the last step and their KV is always full. An estimate, no
    bound: the price of a step is fitted to such engines without drafts, and long
    responses, which take most of the KV, may repeat themselves more than the mean.

        steps = max(KV token-steps / KV, requests' steps / places, longest response)
        steps x (what a step costs) + each token computed + each token of KV read

    Prompts' KV is left out, which siblings may share.
    """
    lengths = [len(r) for group in recorded.groups for r in group.responses]
    drafts = report.speculation
    num_accepted = sum(drafts.accepted) if drafts else 0
    num_drafted = sum(drafts.drafted) if drafts else 0
    row_steps = report.num_output_tokens - num_accepted
    rate = report.num_output_tokens / row_steps
    kv_steps = sum(n * n / 2 for n in lengths) / rate
    engines, price = cluster.num_instances, cluster.step_time
    assert isinstance(price, LinearSteps)
    num_steps = max(
        kv_steps / (engines * cluster.num_kv_tokens),
        row_steps / (engines * cluster.max_num_seqs),
        max(lengths) / rate,
    )
    prompts = sum(len(group.prompt) for group in recorded.groups)
    computed = (row_steps + num_drafted) * price.token_s
    read = kv_steps * price.kv_token_s + price.prefill_s(prompts)
    return num_steps * price.base_s + (computed + read) / engines


def measure_prefill(engine: aseer.Engine, max_model_len: int) -> float:
    """Seconds that an engine takes for a token of a long prompt."""
    times = {}
    lengths = (max_model_len // 4, max_model_len - 32)
    for place, length in enumerate(lengths):
        tries = []
        for number in range(3):  # another prompt each, so that no KV is found
            prompt = [5 + 3 * place + number, 20] * (length // 2)
            group = aseer.Group(prompt, n=1, sampling={"max_tokens": 1})
            since = time.perf_counter()
            list(engine.rollout_sync([group]))
            tries.append(time.perf_counter() - since)
        times[length] = statistics.median(tries)
    short, long = lengths
    return max(0.0, times[long] - times[short]) / (long - short)


def _ids(timeline: Sequence[TimelineSample]) -> set[int]:
    return {sample.instance_id for sample in timeline}


def _workload(recorded: Trace, arm: Arm, repetition: int) -> Workload:
    """In the order in which the arm gets the groups."""
    groups = [group for _, group in arm.order(recorded, repetition)]
    return Workload(
        name=arm.name,
        lengths=[[len(r) for r in group.responses] for group in groups],
        num_prompt_tokens=[len(group.prompt) for group in groups],
        max_tokens=recorded.max_tokens,
    )
