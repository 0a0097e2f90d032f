"""A trainer on a Ray cluster of two hosts, that things happen to; says what it saw.

Runs on an interpreter that has Ray and aseer, and neither pytest nor these tests. The
hosts are two raylets of this machine, whose GPUs are in name only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.cluster_utils import Cluster

import aseer

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = {"num_cpus": 1, "num_gpus": 2, "object_store_memory": 80 << 20}
NUM_GPUS = 4
DEADLINE_S = 120.0
GROUPS = [
    aseer.Group(
        [5, 6, 7 + i],
        n=4,
        sampling={"temperature": 0.0, "max_tokens": 600, "ignore_eos": True},
        group_id=f"g{i}",
    )
    for i in range(8)
]


def config(**settings: Any) -> aseer.EngineConfig:
    return aseer.EngineConfig(
        model="sim",
        device="sim",
        chunk_size=64,
        report_interval_s=0.02,
        start_timeout_s=DEADLINE_S,
        shutdown_timeout_s=5.0,
        node_timeout_s=4.0,
        max_request_retries=0,  # a lost node counts against no request
        engine_args={"num_kv_blocks": 256, "step_s": 0.002},
        **settings,
    )


def on_ray() -> aseer.EngineConfig:
    """Of an engine on both hosts, with an instance of both GPUs on each."""
    return config(nodes="ray", num_instances=1, gpus_per_instance=2)


def until(is_so: Callable[[], object]) -> float:
    """Wait until something is so; how many seconds it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() < began + DEADLINE_S, "it never came"
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def free_gpus() -> int:
    return int(ray.available_resources().get("GPU", 0))


def pids(engine: aseer.Engine) -> set[int]:
    return {info.pid for info in engine.instances}


def content(responses: list[aseer.Response]) -> dict[str, Any]:
    return {r.request_id: (r.token_ids, r.logprobs, r.error) for r in responses}


def roll(
    engine: aseer.Engine, in_the_middle: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """What a rollout generates; something happens with its first response."""
    early = aseer.Group([9], n=1, sampling={"max_tokens": 2}, group_id="early")
    responses = []
    for response in engine.rollout_sync([*GROUPS, early]):
        if response.group_id == "early":
            in_the_middle()
        else:
            responses.append(response)
    return content(responses)


def two_others(engine: aseer.Engine, old: set[int]) -> bool:
    """Whether two instances are up, not both of which are old."""
    return len(engine.instances) == 2 and pids(engine) != old


def alive(processes: set[int]) -> list[int]:
    return [pid for pid in processes if psutil.pid_exists(pid)]


def lives(cluster: Cluster, expected: dict[str, Any]) -> dict[str, Any]:
    """An engine through the deaths of an agent and of a host, and with a further one,
    to its orderly end.
    """
    saw: dict[str, Any] = {}
    second = cluster.list_all_nodes()[-1]
    with aseer.Engine(on_ray()) as engine:
        trainers = ray.util.placement_group([{"GPU": 1}])
        saw["trainer_had_room"] = trainers.wait(1.0)
        saw["free_gpus"] = free_gpus()
        saw["undisturbed"] = roll(engine) == expected

        old = pids(engine)
        agent = psutil.Process(min(old)).parent()
        saw["agent_killed"] = roll(engine, agent.kill) == expected
        saw["agent_back_s"] = until(lambda: two_others(engine, old))
        saw["trainer_had_room_then"] = trainers.wait(0.5)
        ray.util.remove_placement_group(trainers)  # it would have the new host's GPUs

        old = pids(engine)
        lost = roll(engine, lambda: cluster.remove_node(second, allow_graceful=False))
        saw["host_killed"] = lost == expected
        until(lambda: len(engine.instances) == 1)
        cluster.add_node(**HOST)
        saw["host_back_s"] = until(lambda: two_others(engine, old))
        saw["at_last"] = roll(engine) == expected
        third = cluster.add_node(**HOST)
        saw["late_s"] = until(lambda: len(engine.instances) == 3)
        saw["free_gpus_late"] = free_gpus()
        saw["late"] = roll(engine) == expected
        old |= pids(engine)
        lost = roll(engine, lambda: cluster.remove_node(third, allow_graceful=False))
        saw["late_killed"] = lost == expected
    saw["freed_s"] = until(lambda: free_gpus() == NUM_GPUS)
    saw["left"] = alive(old)
    return saw


def failed() -> dict[str, Any]:
    """An opening on hosts that lack what their engines run on."""
    python = Path("python").absolute()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    engine = aseer.Engine(replace(on_ray(), python=python))
    python.unlink()
    words = ""
    try:
        with engine:
            pass
    except aseer.EngineError as error:
        words = str(error)
    return {"words": words, "freed_s": until(lambda: free_gpus() == NUM_GPUS)}


def interrupted() -> dict[str, Any]:
    """Ctrl-C in a rollout."""
    started: set[int] = set()
    try:
        with aseer.Engine(on_ray()) as engine:
            started = pids(engine)
            roll(engine, lambda: os.kill(os.getpid(), signal.SIGINT))
    except KeyboardInterrupt:
        pass
    freed_s = until(lambda: free_gpus() == NUM_GPUS)
    return {"started": len(started), "freed_s": freed_s, "left": alive(started)}


def killed(address: str) -> dict[str, Any]:
    """The end of another trainer, that cannot close anything."""
    with subprocess.Popen(
        [sys.executable, "-P", __file__, address], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        started = set(json.loads(other.stdout.readline()))
        held = NUM_GPUS - free_gpus()
        other.kill()
    freed_s = until(lambda: free_gpus() == NUM_GPUS)
    until(lambda: not alive(started))
    return {"started": len(started), "held": held, "freed_s": freed_s}


def be_killed(address: str) -> None:
    """Say which instances there are, and wait for the end."""
    ray.init(address=address)
    with aseer.Engine(on_ray()) as engine:
        sys.stdout.write(json.dumps(sorted(pids(engine))) + "\n")
        sys.stdout.flush()
        time.sleep(DEADLINE_S)


def main() -> None:
    with aseer.Engine(config(num_instances=2)) as engine:
        expected = roll(engine)
    cluster = Cluster(initialize_head=True, head_node_args=HOST)
    try:
        cluster.add_node(**HOST)
        ray.init(address=cluster.address)
        saw = {
            "lives": lives(cluster, expected),
            "failed": failed(),
            "interrupted": interrupted(),
            "killed": killed(cluster.address),
        }
        Path("saw.json").write_text(json.dumps(saw))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        be_killed(sys.argv[1])
    else:
        main()
