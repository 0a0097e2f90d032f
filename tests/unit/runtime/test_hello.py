"""What the pool makes of an instance's hello."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import aseer
from aseer.instance.messages import (
    Hello,
)
from aseer.node.machine import Launch
from aseer.runtime.causes import start_error
from aseer.runtime.instances import InstancePool
from aseer.transport.base import PROTOCOL_VERSION
from tests.unit.builders import info_of
from tests.unit.runtime.machine import node_of


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (Hello(PROTOCOL_VERSION, info_of(1)), "its hello makes no sense"),
        (Hello(PROTOCOL_VERSION, info_of(block_size=0)), "its hello makes no sense"),
        (
            Hello(PROTOCOL_VERSION, info_of(num_kv_blocks=-1)),
            "its hello makes no sense",
        ),
        (Hello(PROTOCOL_VERSION - 1, info_of()), "it speaks protocol"),
        (Hello(PROTOCOL_VERSION, info_of()), ""),
    ],
    ids=["another's name", "no block size", "fewer than no blocks", "older", "right"],
)
def test_an_instance_whose_hello_is_wrong_is_killed(hello: Hello, why: str) -> None:
    launch = Launch(instance_id=0, backend="sim", engine_args={}, env={}, share="all")
    config = aseer.EngineConfig(model="sim", device="sim")
    nothing: Any = None
    pool = InstancePool(config, [launch], node_of(nothing), nothing)
    (slot,) = pool._slots.values()
    pool._slots.begin_incarnation(slot)
    kills: list[int] = []
    slot.process = SimpleNamespace(kill=lambda: kills.append(1))  # type: ignore[assignment]
    pool.on_message(slot.identity, hello)
    assert (slot.killed_because or "").startswith(why)
    assert bool(kills) == bool(why)
    process: Any = SimpleNamespace(cause=lambda: "a signal", log_tail=lambda: "")
    assert f"cause: {why or 'a signal'}" in str(start_error(slot, process, "died"))
    assert slot.said_hello.is_set() == (not why)
