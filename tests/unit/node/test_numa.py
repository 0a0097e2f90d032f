"""Engines are bound to the NUMA nodes of their GPUs, where that is known to work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aseer.config import EngineConfig
from aseer.node.machine import Machine, numa_nodes_to_bind
from aseer.runtime.launch import plan_instances

if TYPE_CHECKING:
    from pathlib import Path


def machine(gpus, nodes):
    return Machine(
        gpus=gpus,
        cores=(0, 1),
        free_memory_bytes=1 << 34,
        cpu_only=False,
        cpu_dtype="bfloat16",
        numa_nodes=nodes,
    )


def test_engines_stay_near_their_gpus():
    found = machine(("0", "1", "2", "3"), (0, 0, 1, 1))
    config = EngineConfig(model="m", gpus_per_instance=2)
    near = [
        launch.engine_args["numa_bind_nodes"]
        for launch in plan_instances(config, found)
    ]
    assert near == [[0, 0], [1, 1]]
    assert all(
        launch.engine_args["numa_bind"] for launch in plan_instances(config, found)
    )
    named = EngineConfig(model="m", gpus=[3])
    (launch,) = plan_instances(named, found)
    assert launch.engine_args["numa_bind_nodes"] == [1]


@pytest.mark.parametrize(
    ("gpus", "nodes", "args"),
    [
        (("0", "1"), (), {}),
        (("GPU-1234", "1"), (0, 1), {}),
        (("0", "5"), (0, 1), {}),
        (("0", "1"), (0, 1), {"numa_bind": False}),
    ],
)
def test_engines_are_not_bound_where_that_is_unknown_or_the_users_choice(
    gpus, nodes, args
):
    found = machine(gpus, nodes)
    config = EngineConfig(model="m", gpus_per_instance=2, engine_args=args)
    (launch,) = plan_instances(config, found)
    assert "numa_bind_nodes" not in launch.engine_args
    assert launch.engine_args.get("numa_bind", False) is False


def fake_gpus(root: Path, gpus: dict[str, tuple[int, str]], present: set[int]) -> None:
    for bus, (minor, node) in gpus.items():
        told = root / "proc/driver/nvidia/gpus" / bus / "information"
        told.parent.mkdir(parents=True)
        told.write_text(f"Model: \t H200\nDevice Minor: \t {minor}\n")
        device = root / "sys/bus/pci/devices" / bus.lower()
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    (root / "dev").mkdir()
    for minor in present:
        (root / f"dev/nvidia{minor}").touch()


@pytest.mark.parametrize(
    ("vllm", "nodes", "present", "expected"),
    [
        ("0.32.0", "0011", {0, 1, 2, 3}, (0, 0, 1, 1)),
        ("0.33.0", "0011", {1, 2}, (0, 1)),
        ("0.30.0", "0011", {0, 1, 2, 3}, ()),
        ("0.32.0", "0000", {0, 1, 2, 3}, ()),
        ("0.32.0", "0011", {2, 3}, ()),
        ("", "0011", {0, 1, 2, 3}, ()),
    ],
)
def test_gpus_are_found_on_their_numa_nodes(
    tmp_path, monkeypatch, vllm, nodes, present, expected
):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    buses = [f"0000:{bus}:00.0" for bus in ("1B", "43", "9A", "C3")]
    gpus = {bus: (i, nodes[i]) for i, bus in enumerate(buses)}
    fake_gpus(tmp_path, gpus, present)
    parts = (tmp_path / name for name in ("proc", "dev", "sys"))
    assert numa_nodes_to_bind(vllm, *parts) == expected


def test_without_numactl_or_where_the_kernel_knows_no_node_nothing_is_bound(
    tmp_path, monkeypatch
):
    fake_gpus(tmp_path, {"0000:1B:00.0": (0, "0"), "0000:43:00.0": (1, "-1")}, {0, 1})
    parts = [tmp_path / name for name in ("proc", "dev", "sys")]
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert numa_nodes_to_bind("0.32.0", *parts) == ()
    (parts[2] / "bus/pci/devices/0000:43:00.0/numa_node").write_text("1")
    assert numa_nodes_to_bind("0.32.0", *parts) == (0, 1)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert numa_nodes_to_bind("0.32.0", *parts) == ()
