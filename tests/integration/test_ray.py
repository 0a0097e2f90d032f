"""Nodes that Ray places, with simulated instances: in full on a real cluster of two
raylets, and what is not Ray's without it.

`make test-trainers` makes environments that have Ray, and names their interpreters.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.errors import ConfigError, EngineError
from tests.e2e.trainers import DEADLINE_S, RAY_PLUGIN, left_behind, run
from tests.integration.sims import config_of, groups_of
from tests.unit.integrations.rays import Ray, Started, importable
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINER = Path(__file__).parent / "ray_trainer.py"
PYTHONS = {
    trainer: os.environ.get(f"ASEER_{trainer.upper()}_PYTHON", "")
    for trainer in ("verl", "skyrl")  # have different releases of Ray
}


class LocalRay(Ray):
    """Runs each actor's agent on a thread of this process."""

    def start(self, kind: type, options: dict[str, Any]) -> Started:
        actor = super().start(kind, options)
        started = actor.serve.remote

        def serve(settings: Any) -> Any:
            def work() -> None:
                try:
                    actor.ends.set_result(asyncio.run(kind().serve(settings)))
                except Exception as error:
                    actor.ends.set_exception(error)

            threading.Thread(target=work).start()
            return started(settings)

        actor.serve.remote = serve
        return actor

    def modules(self) -> dict[str, dict[str, Any]]:
        modules = super().modules()
        modules["ray"]["wait"] = lambda refs, num_returns, timeout: wait(
            [ref.ends for ref in refs], timeout
        )
        return modules


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRay]:
    ray = LocalRay()
    with importable(ray, monkeypatch) as ray.module:
        yield ray


async def test_an_engine_runs_on_the_nodes_that_were_placed_and_ends_them(ray):
    async with aseer.Engine(config_of(nodes="ray", num_instances=1)) as engine:
        assert [info.instance_id for info in engine.instances] == [0, 1]
        assert all(info.node for info in engine.instances), "none is the trainer's own"
        responses = [r async for r in engine.rollout(groups_of(4))]
    assert [r.error for r in responses] == [None] * 16
    ends = [actor.ends.result() for actor in ray.actors]
    assert ends == ["the engine was closed"] * 2
    assert all(actor.was_killed for actor in ray.actors)
    assert ray.groups[0].is_removed


async def test_a_host_that_joins_ray_in_the_middle_gets_work(ray, monkeypatch):
    monkeypatch.setattr(ray.module, "_HOSTS_INTERVAL_S", 0.1)
    config = config_of(nodes="ray", num_instances=1, engine_args={"step_s": 0.005})
    async with aseer.Engine(config) as engine:
        old = {info.instance_id for info in engine.instances}
        responses = []
        sampling = {"max_tokens": 1000, "ignore_eos": True}
        async for response in engine.rollout(groups_of(8, **sampling)):
            if not responses:
                ray.hosts.append({"CPU": 8, "GPU": 2})
            responses.append(response)
        await until(lambda: len(engine.instances) == 3)
        again = [r async for r in engine.rollout(groups_of(8))]
    assert [r.error for r in [*responses, *again]] == [None] * 64
    assert {i for r in again for i in r.metrics.instances} > old
    ends = [actor.ends.result() for actor in ray.actors]
    assert ends == ["the engine was closed"] * 3
    assert all(group.is_removed for group in ray.groups)


async def test_an_agent_that_cannot_run_ends_the_opening_with_its_words(
    ray, monkeypatch
):
    def refuse(python: str | None) -> None:
        raise ConfigError("its interpreter has another release")

    monkeypatch.setattr(ray.module, "interpreter_at", refuse)
    engine = aseer.Engine(config_of(nodes="ray"))
    with pytest.raises(EngineError, match="placed failed: ConfigError: its interp"):
        await engine.__aenter__()
    assert ray.groups[0].is_removed


@pytest.fixture
def folder():
    """Short, since Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("trainer", PYTHONS)
def test_ray_keeps_nodes_up_and_their_gpus_from_others_and_leaves_nothing(
    folder, trainer
):
    python = PYTHONS[trainer]
    if not python:
        pytest.skip(f"ASEER_{trainer.upper()}_PYTHON is not set")
    said = run(
        [python, "-P", str(TRAINER)],
        folder,
        PYTHONPATH=RAY_PLUGIN,
        RAY_AUTH_MODE="token",  # as new releases have it by default
        RAY_AUTH_TOKEN=secrets.token_hex(32),
    )
    saw = json.loads((folder / "saw.json").read_text())
    lives, interrupted, killed = saw["lives"], saw["interrupted"], saw["killed"]
    rollouts = ("undisturbed", "agent_killed", "host_killed", "at_last", "late")
    for rollout in (*rollouts, "late_killed"):
        assert lives[rollout], f"{rollout}: its responses are one machine's\n{said}"
    assert lives["free_gpus"] == 0
    assert lives["free_gpus_late"] == 0, "those of the host that joined are taken"
    assert not lives["trainer_had_room"]
    assert not lives["trainer_had_room_then"], "also while Ray restarts an agent"
    assert "that Ray has placed failed: ConfigError: python=" in saw["failed"]["words"]
    assert (interrupted["started"], killed["started"], killed["held"]) == (2, 2, 4)
    assert lives["left"] == interrupted["left"] == []
    assert left_behind(folder, 20.0) == []
