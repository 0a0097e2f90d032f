"""An engine's arguments as vLLM gets them, and a node that follows with them."""

from __future__ import annotations

from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.stand_ins import imported

MODULE = "aseer.instance.vllm.arguments"
FOLLOWER = "aseer.instance.vllm.follower"
RETENTION = "prefix_cache_retention_interval"
OURS = {
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": True,
    "disable_log_stats": True,
}


class Args:
    """vLLM's AsyncEngineArgs: takes anything, and has the fields it is given."""

    def __init__(self, **args: Any) -> None:
        self.args = args

    def create_engine_config(self, **how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.args, how


class Executor:
    """vLLM's, whose workers die at once."""

    made: list[Any]

    def __init__(self, config: Any, **how: Any) -> None:
        self.made.append((config, how))

    def start_worker_monitor(self, *, inline: bool) -> None:
        self.made.append(("waits until one has died", inline))


def names_of(
    *, has_request_interval: bool = True, fields: tuple[str, ...] = (RETENTION,)
) -> dict[str, dict[str, Any]]:
    args = make_dataclass("AsyncEngineArgs", fields, bases=(Args,), init=False)
    return {
        "vllm.engine.arg_utils": {"AsyncEngineArgs": args},
        "vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(LLM_CLASS="llm")},
        "vllm.v1.executor.multiproc_executor": {"MultiprocExecutor": Executor},
        "aseer.instance.vllm.asking": {
            "HAS_REQUEST_INTERVAL": has_request_interval,
            "STREAM_INTERVAL": 16,
        },
        "aseer.instance.vllm.transfer": {"with_our_receivers": lambda args: args},
    }


@pytest.mark.parametrize(
    ("release", "defaults"),
    [
        ({}, {RETENTION: None}),
        ({"fields": ()}, {}),
        (
            {"fields": (), "has_request_interval": False},
            {"stream_interval": 16},
        ),
    ],
    ids=["new", "without retention", "old"],
)
def test_defaults_are_those_that_the_release_knows(monkeypatch, release, defaults):
    module = imported(monkeypatch, MODULE, names_of(**release))
    given = {"block_size": 32}
    assert module.with_our_defaults(given) == given | defaults
    assert given == {"block_size": 32}


def test_what_a_user_says_comes_before_a_default(monkeypatch):
    module = imported(monkeypatch, MODULE, names_of(has_request_interval=False))
    given = {RETENTION: 7, "stream_interval": 1}
    assert module.with_our_defaults(given) == given


def test_what_aseer_cannot_do_without_is_set(monkeypatch):
    module = imported(monkeypatch, MODULE, names_of())
    assert module.engine_args_of({"model": "m"}).args == {"model": "m"} | OURS


def test_a_node_that_follows_has_workers_alone_until_one_dies(monkeypatch):
    module = imported(monkeypatch, FOLLOWER, names_of(), anew=[MODULE])
    Executor.made = []
    module.follow({"model": "m", "node_rank": 1})
    args = {"model": "m", "node_rank": 1, RETENTION: None} | OURS
    assert Executor.made == [
        (
            (args, {"usage_context": "llm", "headless": True}),
            {"monitor_workers": False},
        ),
        ("waits until one has died", True),
    ]
