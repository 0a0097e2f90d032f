"""A stand-in for Ray's interface, as far as `aseer.integrations.ray` asks it."""

from __future__ import annotations

import importlib
import sys
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

MODULE = "aseer.integrations.ray"


class Started:
    """An actor, whose `serve` ends when the test says so."""

    def __init__(self, kind: type, options: dict[str, Any]) -> None:
        self.kind = kind
        self.options = options
        self.settings: Any = None
        self.was_killed = False
        self.ends: Future[str] = Future()
        self.serve = SimpleNamespace(remote=self._serve)

    def _serve(self, settings: Any) -> Any:
        self.settings = settings
        return SimpleNamespace(future=self._future, ends=self.ends)

    def _future(self) -> Future[str]:
        """A new one each time: whoever cancels it cancels nothing else."""
        future: Future[str] = Future()

        def pass_on(ends: Future[str]) -> None:
            if future.done():
                return
            if (error := ends.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(ends.result())

        self.ends.add_done_callback(pass_on)
        return future


@dataclass
class Group:
    """A placement group."""

    bundles: list[dict[str, int]]
    strategy: str
    has_room: bool
    host: str = ""
    is_whole: bool = True
    is_removed: bool = False
    was_asked: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_seconds: float) -> bool:
        self.was_asked.set()
        return self.has_room


class Ray:
    """A cluster, and this process's connection to it."""

    def __init__(self) -> None:
        self.is_connected = True
        self.hosts: list[dict[str, float]] = [{"CPU": 8, "GPU": 2} for _ in range(2)]
        self.dead: list[dict[str, float]] = []
        self.has_room = True
        self.groups: list[Group] = []
        self.actors: list[Started] = []
        self.gpus_of_the_actor: list[str] = []

    def place(
        self,
        bundles: list[dict[str, int]],
        strategy: str,
        bundle_label_selector: Sequence[dict[str, str]] = (),
    ) -> Group:
        (host,) = [each["ray.io/node-id"] for each in bundle_label_selector] or [""]
        self.groups.append(Group(bundles, strategy, self.has_room, host))
        return self.groups[-1]

    def nodes(self) -> list[dict[str, Any]]:
        alive, dead = ([*hosts] for hosts in (self.hosts, self.dead))
        return [
            {"NodeID": f"{'dead' if i >= len(alive) else 'host'}-{i}"}
            | {"Alive": i < len(alive), "Resources": resources}
            for i, resources in enumerate([*alive, *dead])
        ]

    def start(self, kind: type, options: dict[str, Any]) -> Started:
        self.actors.append(Started(kind, options))
        return self.actors[-1]

    def remote(self, kind: type) -> Any:
        def start(options: dict[str, Any]) -> Started:
            return self.start(kind, options)

        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda: start(options))
        )

    def kill(self, actor: Started, *, no_restart: bool) -> None:
        actor.was_killed = no_restart

    def modules(self) -> dict[str, dict[str, Any]]:
        context = SimpleNamespace(
            get_accelerator_ids=lambda: {"GPU": self.gpus_of_the_actor, "TPU": []}
        )
        return {
            "ray": {
                "is_initialized": lambda: self.is_connected,
                "nodes": self.nodes,
                "cluster_resources": lambda: {"GPU": 4.0, "CPU": 16.0},
                "available_resources": lambda: {"GPU": 1.0, "CPU": 16.0},
                "remote": self.remote,
                "kill": self.kill,
                "wait": lambda refs, num_returns, timeout: (refs, []),
                "get_runtime_context": lambda: context,
            },
            "ray.util": {
                "get_node_ip_address": lambda: "127.0.0.1",
                "placement_group": self.place,
                "placement_group_table": lambda group: {
                    "state": "CREATED" if group.is_whole else "RESCHEDULING"
                },
                "remove_placement_group": lambda group: setattr(
                    group, "is_removed", True
                ),
            },
            "ray.util.scheduling_strategies": {
                "PlacementGroupSchedulingStrategy": lambda group, **where: (
                    group,
                    where["placement_group_bundle_index"],
                ),
                "NodeAffinitySchedulingStrategy": lambda node, soft: (node, soft),
            },
        }


@contextmanager
def importable(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray can be imported; our module over it."""
    for name, content in ray.modules().items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    try:
        yield importlib.import_module(MODULE)
    finally:
        sys.modules.pop(MODULE, None)
